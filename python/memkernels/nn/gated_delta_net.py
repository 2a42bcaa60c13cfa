"""A token mixer whose memory is a matrix a head, however long the sequence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memkernels


class GatedDeltaState(NamedTuple):
    """What `GatedDeltaNet` keeps of N sequences, of any length: rows of four tensors."""

    memory: Tensor  # [N, HV, K, V], float32 (float64 for float64)
    conv_q: Tensor  # [N, H * K, conv_size - 1], the last inputs of the convolutions
    conv_k: Tensor  # [N, H * K, conv_size - 1]
    conv_v: Tensor  # [N, HV * V, conv_size - 1]


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (Yang et al., 2024), for the place of attention.

    Each value head keeps a matrix, which decays by what the token says and then takes its value
    for its key, as far as it does not give that already (`memkernels.delta_rule`)::

        q, k, v = silu(conv(q_proj(x))), silu(conv(k_proj(x))), silu(conv(v_proj(x)))
        g = -exp(A_log) * softplus(a_proj(x) + dt_bias)
        o = delta_rule(q, k, v, sigmoid(b_proj(x)), g, qk_l2norm=True)
        out = o_proj(rms_norm(o) * o_norm * silu(g_proj(x)))

    `forward` trains and prefills, `step` decodes; `GatedDeltaState` is all that either needs of
    the tokens before::

        layer = GatedDeltaNet(1024, num_heads=4, head_dim=192)
        y = layer(x)                                        # [B, T, 1024] of [B, T, 1024]

        with torch.no_grad():
            y, state = layer(prompt, return_state=True)
            y = layer.step(token, state)                    # [B, 1024] of [B, 1024]; state changes

        pool = layer.make_state(64)                         # 64 slots, of which some are in use
        for slots, new in zip(pool, state):
            slots[ids] = new
        y = layer.step(token, pool, ids)

    Args:
        hidden_size: of tokens.
        num_heads: H, heads of q and k.
        head_dim: K, of each.
        num_v_heads: HV, a multiple of H: value head h reads query head ``h // (HV / H)``. None: H.
        expand_v: V is ``head_dim * expand_v``.
        allow_neg_eigval: beta reaches 2, and the memory can turn a value round.
        conv_size: tokens that each convolution sees.
        norm_eps: of the norm of o.
        dtype, device: of the parameters.

    State dict, in the names and shapes of flash-linear-attention's layer:
        ``q_proj.weight`` and ``k_proj.weight`` ``[H * K, hidden_size]``, ``v_proj.weight`` and
        ``g_proj.weight`` ``[HV * V, hidden_size]``, ``a_proj.weight`` and ``b_proj.weight``
        ``[HV, hidden_size]``, ``A_log`` and ``dt_bias`` ``[HV]``, which want no weight decay,
        ``q_conv1d.weight``, ``k_conv1d.weight`` and ``v_conv1d.weight`` ``[channels, 1,
        conv_size]``, ``o_norm.weight`` ``[V]``, ``o_proj.weight`` ``[hidden_size, HV * V]``.

    Raises RuntimeError on arguments that contradict each other.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        num_v_heads: int | None = None,
        expand_v: float = 2.0,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        ok = num_v_heads % num_heads == 0
        _check(ok, f"num_v_heads must be a multiple of {num_heads}, got {num_v_heads}")
        head_v_dim = round(head_dim * expand_v)
        ok = math.isclose(head_v_dim, head_dim * expand_v)
        _check(ok, f"head_dim * expand_v must be whole, got {head_dim} * {expand_v}")
        self._head_dim, self._head_v_dim = head_dim, head_v_dim
        self._largest_beta = 2 if allow_neg_eigval else 1
        like = {"dtype": dtype, "device": device}

        def linear(width: int) -> nn.Linear:
            return nn.Linear(hidden_size, width, bias=False, **like)

        def conv(width: int) -> nn.Conv1d:
            return nn.Conv1d(width, width, conv_size, groups=width, bias=False, **like)

        key_dim, value_dim = num_heads * head_dim, num_v_heads * head_v_dim
        self.q_proj, self.k_proj, self.v_proj = map(linear, (key_dim, key_dim, value_dim))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = map(conv, (key_dim, key_dim, value_dim))
        self.a_proj, self.b_proj = linear(num_v_heads), linear(num_v_heads)
        # As Mamba2 begins: exp(A_log) in (0, 16), softplus(dt_bias) from 1e-3 to 0.1.
        self.A_log = nn.Parameter(torch.empty(num_v_heads, **like).uniform_(1e-3, 16).log_())
        step = torch.empty(num_v_heads, **like).uniform_(math.log(1e-3), math.log(0.1)).exp_()
        self.dt_bias = nn.Parameter(step.expm1().log())
        self.g_proj = linear(value_dim)
        self.o_norm = nn.RMSNorm(head_v_dim, norm_eps, **like)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False, **like)

    def forward(
        self,
        x: Tensor,
        state: GatedDeltaState | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, GatedDeltaState]:
        """Of whole sequences, or of what comes next in them.

        Args:
            x: ``[B, T, hidden_size]``.
            state: where each sequence stands, not changed; it may carry gradients. None: at the
                beginning.
            cu_seqlens: ``[N + 1]`` with B = 1, where packed sequences begin and end, which may be
                empty. None: N = B sequences.
            return_state: also return where the sequences stand then.

        Returns:
            ``[B, T, hidden_size]``; or this and a state, whose convolutions' inputs are in the
            dtype of their projections: autocast's, under autocast.
        """
        self._check_input(x, 3)
        memory, *pasts = (None,) * 4 if state is None else state
        qkv, inputs = [], []
        for (project, conv, dim), past in zip(self._branches(), pasts, strict=True):
            y, past = memkernels.causal_conv1d(
                project(x),
                conv.weight[:, 0],
                initial_state=past,
                cu_seqlens=cu_seqlens,
                activation="silu",
                output_final_state=return_state,
            )
            qkv.append(y.unflatten(-1, (-1, dim)))
            inputs.append(past)
        beta, g = self._gates(x)
        o, memory = memkernels.delta_rule(
            *qkv, beta, g, memory, cu_seqlens, qk_l2norm=True, output_final_state=return_state
        )
        out = self._output(o, x)
        return (out, GatedDeltaState(memory, *inputs)) if return_state else out

    def step(
        self, x: Tensor, state: GatedDeltaState, state_indices: Tensor | None = None
    ) -> Tensor:
        """Of one token a sequence, in place. Not differentiable: call it under no_grad.

        Args:
            x: ``[B, hidden_size]``.
            state: of any number of slots; those named are changed.
            state_indices: ``[B]`` int32 or int64, the slot of each row; -1: none, and out is 0. No
                slot may appear twice. None: slot b for row b.

        Returns:
            ``[B, hidden_size]``.
        """
        self._check_input(x, 2)
        self._check_state(state)
        qkv = []
        for (project, conv, dim), past in zip(self._branches(), state[1:], strict=True):
            y = memkernels.causal_conv1d_step(
                project(x),
                conv.weight[:, 0],
                past,
                state_indices=state_indices,
                activation="silu",
            )
            qkv.append(y.unflatten(-1, (-1, dim)))
        beta, g = self._gates(x)
        o = memkernels.delta_rule_step(*qkv, beta, state.memory, g, state_indices, qk_l2norm=True)
        return self._output(o, x)

    def make_state(self, num_seqs: int, dtype: torch.dtype | None = None) -> GatedDeltaState:
        """The state of sequences at their beginning, or of a pool's free slots: zeros.

        dtype: of the projections, if not that of their parameters.
        """
        like = self.q_proj.weight
        dtypes = (_wide(like.dtype), *(dtype or like.dtype,) * 3)
        shapes = self._state_shapes(num_seqs)
        made = (like.new_zeros(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True))
        return GatedDeltaState(*made)

    def _branches(self):
        """Of q, k, v: the projection, the convolution, and the head's dim."""
        return (
            (self.q_proj, self.q_conv1d, self._head_dim),
            (self.k_proj, self.k_conv1d, self._head_dim),
            (self.v_proj, self.v_conv1d, self._head_v_dim),
        )

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """beta and g ``[..., HV]``, as wide as sums."""
        a, b = self.a_proj(x), self.b_proj(x)
        wide = _wide(a.dtype)
        g = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)
        return self._largest_beta * b.to(wide).sigmoid(), g

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        normed = F.rms_norm(o, o.shape[-1:], eps=self.o_norm.eps) * self.o_norm.weight
        gate = self.g_proj(x).view(o.shape)
        return self.o_proj((normed * F.silu(gate)).flatten(-2))

    def _state_shapes(self, num_seqs: int) -> list[tuple[int, ...]]:
        heads = len(self.A_log), self._head_dim, self._head_v_dim
        channels = ((len(conv.weight), conv.kernel_size[0] - 1) for _, conv, _ in self._branches())
        return [(num_seqs, *shape) for shape in (heads, *channels)]

    def _check_input(self, x: Tensor, ndim: int) -> None:
        expected = [*"BT"[: ndim - 1], self.q_proj.in_features]
        ok = x.ndim == ndim and x.shape[-1] == expected[-1]
        _check(ok, f"x must be [{', '.join(map(str, expected))}], got {list(x.shape)}")

    def _check_state(self, state: GatedDeltaState) -> None:
        """All at once, as ops write one after the other."""
        shapes = self._state_shapes(len(state.memory))
        for name, t, shape in zip(state._fields, state, shapes, strict=True):
            _check(t.shape == shape, f"{name} must be {list(shape)}, got {list(t.shape)}")
        expected = _wide(state.conv_q.dtype)
        _check(state.memory.dtype == expected, f"memory must be {expected}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of sums."""
    return torch.promote_types(dtype, torch.float32)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"GatedDeltaNet: {message}")
