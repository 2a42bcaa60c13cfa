"""Attention within segments, and a memory of the segments before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import memkernels


class InfiniState(NamedTuple):
    """What `InfiniAttention` keeps of B sequences of equal length: of bounded size."""

    memory: Tensor  # [B, Hkv, D, D] of whole segments, float32 (float64 for float64)
    z: Tensor  # [B, Hkv, D], likewise
    k: Tensor  # [B, L, Hkv, D] of the segment that has begun, L < segment_len
    v: Tensor  # [B, L, Hkv, D]


class InfiniAttention(nn.Module):
    """Infini-attention (Munkhdalai et al., 2024).

    Sequences are cut into segments. Tokens attend to their own segment up to themselves, and read
    what all segments before have left in a matrix a head; ``f(x) = elu(x) + 1``::

        local = softmax(scale * rotate(q) rotate(k)^T) v
        remembered = S^T f(q) / (z . f(q) + eps)
        out = o_proj(sigmoid(gate) * remembered + (1 - sigmoid(gate)) * local)

    Then the segment is written: `memkernels.infini_update`. Keys and queries are rotated (RoPE, Su
    et al., 2021) for local attention only: the memory does not know positions.

    Calls go on where others ended, anywhere in a segment, and give what one call would have given,
    gradients included::

        layer = InfiniAttention(1024, num_heads=16, num_kv_heads=4)
        y = layer(x)                                        # [B, T, 1024] of [B, T, 1024]

        y, state = layer(prompt, return_state=True)
        y, state = layer(token, state, return_state=True)   # decoding: T = 1

        state = InfiniState(*(t.detach() for t in state))   # gradients end here

    A decoding step reads and copies the keys of its own segment, at most ``segment_len``. All
    sequences of a batch are at the same place in their segments; those of different lengths are
    batches of their own.

    Args:
        dim: of tokens.
        num_heads: Hq.
        num_kv_heads: Hkv, which Hq is a multiple of; None: Hq.
        head_dim: D; None: ``dim / num_heads``.
        segment_len: tokens of a segment.
        delta: write only what the memory does not give already.
        rope_base: None: keys and queries are not rotated.
        eps: of the division.
        dtype, device: of the parameters.

    State dict:
        ``q_proj.weight`` ``[Hq * D, dim]``, ``k_proj.weight`` and ``v_proj.weight``
        ``[Hkv * D, dim]``, ``o_proj.weight`` ``[dim, Hq * D]``, ``gate`` ``[Hq]``, which begins
        as 0.

    Raises RuntimeError on arguments that contradict each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        segment_len: int = 2048,
        delta: bool = True,
        rope_base: float | None = 10000.0,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        ok = num_heads % num_kv_heads == 0
        _check(ok, f"num_heads must be a multiple of {num_kv_heads}, got {num_heads}")
        ok = head_dim is not None or dim % num_heads == 0
        _check(ok, f"dim must be a multiple of {num_heads} without head_dim, got {dim}")
        head_dim = dim // num_heads if head_dim is None else head_dim
        ok = rope_base is None or head_dim % 2 == 0
        _check(ok, f"head_dim must be even to be rotated, got {head_dim}")
        _check(segment_len >= 1, f"segment_len must be at least 1, got {segment_len}")
        self._head_dim, self._segment_len, self._delta = head_dim, segment_len, delta
        self._rope_base, self._eps = rope_base, eps
        like = {"dtype": dtype, "device": device}
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False, **like)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False, **like)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False, **like)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False, **like)
        self.gate = nn.Parameter(torch.zeros(num_heads, **like))

    def forward(
        self, x: Tensor, state: InfiniState | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, InfiniState]:
        """Of whole sequences, or of what comes next in them.

        Args:
            x: ``[B, T, dim]``.
            state: where the sequences stand, not changed; it may carry gradients. None: at the
                beginning.
            return_state: also return where they stand then.

        Returns:
            ``[B, T, dim]``; or this and a state.
        """
        dim = self.q_proj.in_features
        _check(x.ndim == 3 and x.shape[2] == dim, f"x must be [B, T, {dim}], got {list(x.shape)}")
        q, k, v = (
            project(x).unflatten(2, (-1, self._head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        state = self._beginning(k) if state is None else state
        self._check_state(state, k)
        begun = state.k.shape[1]
        k, v = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1)

        sizes = _segments(k.shape[1], self._segment_len)
        new = [sizes[0] - begun, *sizes[1:]]
        segments = zip(q.split(new, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
        memory, z, outs = state.memory, state.z, []
        for queries, keys, values in segments:
            outs.append(self._attend(queries, keys, values, memory, z))
            if keys.shape[1] == self._segment_len:
                memory, z = memkernels.infini_update(
                    memkernels.feature_map(keys, "elu1"), values, memory, z,
                    delta=self._delta, eps=self._eps,
                )  # fmt: skip
        out = self.o_proj(torch.cat(outs, 1).flatten(2).to(q.dtype))
        if not return_state:
            return out
        whole = k.shape[1] // self._segment_len * self._segment_len
        # Copies, as views would keep all tokens.
        return out, InfiniState(memory, z, k[:, whole:].clone(), v[:, whole:].clone())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, z: Tensor) -> Tensor:
        """The last tokens of a segment, to it and to the memory: ``[B, n, Hq, D]``."""
        batch, count = q.shape[:2]
        local = memkernels.paged_attention(
            self._rotated(q, k.shape[1] - count).flatten(0, 1),
            self._rotated(k, 0),
            v,
            cu_seqlens_q=torch.arange(batch + 1, device=q.device) * count,
        )
        heads, group = k.shape[2], q.shape[2] // k.shape[2]
        with torch.autocast(q.device.type, enabled=False):  # sums as wide as the memory
            f = memkernels.feature_map(q, "elu1").to(memory.dtype).unflatten(2, (heads, group))
            f = f.transpose(1, 2).flatten(2, 3)  # [B, Hkv, n * group, D]
            found = f @ memory / (f @ z[..., None] + self._eps)
            found = found.unflatten(2, (count, group)).transpose(1, 2).flatten(2, 3)
        gate = self.gate[:, None].sigmoid()
        return gate * found + (1 - gate) * local.view(q.shape)

    def _rotated(self, x: Tensor, first: int) -> Tensor:
        """x ``[B, n, H, D]`` from that place in a segment on."""
        if self._rope_base is None:
            return x
        like = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
        exponent = torch.arange(0, self._head_dim, 2, **like) / self._head_dim
        place = torch.arange(first, first + x.shape[1], **like)
        angles = place[:, None, None] * self._rope_base**-exponent  # [n, 1, D / 2]
        cos, sin = angles.cos(), angles.sin()
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)

    def _beginning(self, k: Tensor) -> InfiniState:
        batch, _, heads, dim = k.shape
        wide = torch.promote_types(k.dtype, torch.float32)
        none = k.new_zeros(batch, 0, heads, dim)
        z = k.new_zeros(batch, heads, dim, dtype=wide)
        return InfiniState(z.new_zeros(batch, heads, dim, dim), z, none, none)

    def _check_state(self, state: InfiniState, k: Tensor) -> None:
        batch, _, heads, dim = k.shape
        begun = state.k.shape[1]
        cache = [batch, begun, heads, dim]
        shapes = [batch, heads, dim, dim], [batch, heads, dim], cache, cache
        for name, t, shape in zip(state._fields, state, shapes, strict=True):
            _check(list(t.shape) == shape, f"{name} must be {shape}, got {list(t.shape)}")
        limit = self._segment_len
        _check(begun < limit, f"k must have fewer tokens than a segment's {limit}, got {begun}")


def _segments(length: int, size: int) -> list[int]:
    """The lengths of at least one segment."""
    starts = range(0, max(length, 1), size)
    return [min(size, length - start) for start in starts]


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"InfiniAttention: {message}")
