"""Chunked memory scans: a state of fixed size, updated along the sequence.

`linear_attention` and `delta_rule` keep a matrix for each head, `selective_scan` and
`diagonal_scan` a few numbers for each channel, `causal_conv1d` the last inputs; their ``_step``
ops move pools of such states on by one token, in place. `infini_update` writes a whole segment at
once, `route_tokens` and `unroute_tokens` spread tokens over several memories, `ssd` speaks Mamba2's
language, and `feature_map` is what linear attention puts in the place of the softmax.

Sequences are rows of a batch, or packed along T with ``cu_seqlens [N + 1]`` and a batch of 1. A
sequence split in two, the second part beginning with the first one's final state, is the sequence
in one piece, gradients included. Sums are in float32 (float64 for float64); every op is
deterministic, to the bit, for any number of threads.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from memkernels import _library, fallback
from memkernels.attention import _lse_dtype
from memkernels.lookup import embedding_bag


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_z: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Linear attention with any decay: ``S = exp(g) * S + k v^T``, ``o = scale * S^T q``.

    Without g, linear attention (Katharopoulos et al., 2020; BASED, Arora et al., 2024); g of a
    head, RetNet (Sun et al., 2023) and Lightning attention; of a token, Mamba2 (Dao & Gu, 2024; see
    `ssd`); of a token and channel, gated linear attention (Yang et al., 2023). JRT (Arora et al.,
    2024) is an initial state and z that carry gradients. q and k come as `feature_map` has left
    them.

    Args:
        q, k: ``[B, T, H, K]``, on CUDA K up to 256; float32, bfloat16, float16, or float64 on the
            CPU.
        v: ``[B, T, HV, V]``, HV a multiple of H: value head h reads query head ``h // (HV / H)``.
        g: log decay, ``[HV]``, ``[B, T, HV]`` or ``[B, T, HV, K]``, float32 or the dtype of q;
            -inf forgets everything before the token. None: no decay.
        initial_state: ``[N, HV, K, V]`` float32 (float64 for float64); None: zeros.
        initial_z: ``[N, HV, K]``, with normalize only, dtype of the state; None: zeros.
        cu_seqlens: ``[N + 1]`` int32 or int64 from 0 to T, with B = 1: sequences packed along T,
            which may be empty; else N = B.
        scale: K ** -0.5 if None.
        normalize: divide by what the keys alone would give: ``z = exp(g) * z + k`` and
            ``o = scale * S^T q / (scale * z . q + eps)``.
        output_final_state: return the state after each sequence.

    Returns:
        o ``[B, T, HV, V]`` in the dtype of q; and, if asked for, else None, state
        ``[N, HV, K, V]``; and z ``[N, HV, K]``, if also normalize.

    Sums are float32 (float64). Of bfloat16, a CPU with AVX512-BF16 rounds what matrix products
    take to it, the state included, as GPUs do, of float16 too; the state itself stays float32. So
    in float16 on CUDA no number of it may pass 65504.

    Differentiable once in q, k, v, g and the initial states, through the final ones too. The
    backward recomputes what it needs from the states at the starts of chunks, of one head a worker
    at a time, on CUDA of all at once: a state for every 16 to 64 tokens, and its gradient. Raises
    RuntimeError on arguments that contradict the above.
    """
    tensors = q, k, v, g, initial_state, initial_z, cu_seqlens
    scale = _scale("linear_attention", scale, k)
    options = {"scale": scale, "normalize": normalize, "eps": eps}
    options["output_final_state"] = output_final_state
    if _library.use_fallback(q, "linear_attention", *tensors[:6]):
        return fallback.linear_attention(*tensors, **options)
    out, state, z = _library.call(_linear_attention, tensors[:6], *tensors, **options)
    if not output_final_state:
        return out, None, None
    return out, state, z if normalize else None


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule: ``S = exp(g) * S``, ``u = beta * (v - S^T k)``, ``S = S + k u^T``,
    ``o = scale * S^T q``.

    Without g, DeltaNet (Schlag et al., 2021; Yang et al., 2024); g of a token, Gated DeltaNet (Yang
    et al., 2024); of a token and channel, Kimi Delta Attention (Kimi Team, 2025). The chunks'
    triangular systems are solved in float32 (float64), not inverted: keys need not be of length 1,
    and beta may reach 2.

    Args:
        q, k: ``[B, T, H, K]``, on CUDA K up to 256; float32, bfloat16, float16, or float64 on the
            CPU.
        v: ``[B, T, HV, V]``, HV a multiple of H: value head h reads query head ``h // (HV / H)``.
        beta: ``[B, T, HV]``, float32 or the dtype of q.
        g: log decay, ``[HV]``, ``[B, T, HV]`` or ``[B, T, HV, K]``, float32 or the dtype of q;
            -inf forgets everything before the token. None: no decay.
        initial_state: ``[N, HV, K, V]`` float32 (float64 for float64); None: zeros.
        cu_seqlens: ``[N + 1]`` int32 or int64 from 0 to T, with B = 1: sequences packed along T,
            which may be empty; else N = B.
        scale: K ** -0.5 if None.
        qk_l2norm: first divide each row of q and k by ``sqrt(sum of its squares + 1e-6)``.
        output_final_state: return the state after each sequence.

    Returns:
        o ``[B, T, HV, V]`` in the dtype of q; and state ``[N, HV, K, V]`` if asked for, else None.

    Sums are in what `linear_attention`'s are. Differentiable once in q, k, v, beta, g and
    initial_state, through the final state too; the backward recomputes, as there. Raises
    RuntimeError on arguments that contradict the above.
    """
    tensors = q, k, v, beta, g, initial_state, cu_seqlens
    scale = _scale("delta_rule", scale, k)
    options = {"scale": scale, "qk_l2norm": qk_l2norm, "output_final_state": output_final_state}
    if _library.use_fallback(q, "delta_rule", *tensors[:6]):
        return fallback.delta_rule(*tensors, **options)
    out, state = _library.call(_delta_rule, tensors[:6], *tensors, **options)
    return out, state if output_final_state else None


def infini_update(
    k: Tensor, v: Tensor, state: Tensor, z: Tensor, *, delta: bool = True, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Writes a segment into the compressive memory of Infini-attention (Munkhdalai et al., 2024).

    Every token of the segment sees the old memory: ``u = v - S^T k / (z . k + eps)`` with delta,
    else v; ``S + sum of k u^T`` and ``z + sum of k`` are returned. Reading it is
    ``S^T q / (z . q + eps)``. k and q come as `feature_map` has left them.

    Args:
        k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``, HV a multiple of H.
        state: ``[B, HV, K, V]``; z: ``[B, HV, K]``; float32 (float64 for float64).
        delta: write only what the memory does not give already.

    Returns:
        The new state and z; the old ones are not changed.

    Differentiable in k, v, state, z: two matrix products of torch.
    """
    op = "infini_update"
    _check(k.ndim == 4, op, "k must be [B, T, H, K]", k)
    _check(v.ndim == 4 and v.shape[:2] == k.shape[:2], op, "v must be [B, T, HV, V]", v)
    heads, dim = k.shape[2:]
    _check(heads > 0 and v.shape[2] % heads == 0, op, f"v needs a multiple of {heads} heads", v)
    sizes = k.shape[0], v.shape[2], dim
    _check(state.shape == (*sizes, v.shape[3]), op, "state must be [B, HV, K, V]", state)
    _check(z.shape == sizes, op, "z must be [B, HV, K]", z)
    for name, t in {"state": state, "z": z}.items():
        expected = _lse_dtype(k.dtype)
        _check(t.dtype == expected, op, f"{name} must be {expected}, got {t.dtype}")
    _check(v.dtype == k.dtype, op, f"v must be {k.dtype} as k is, got {v.dtype}")
    with torch.autocast(k.device.type, enabled=False):
        k = k.to(state.dtype).transpose(1, 2).repeat_interleave(v.shape[2] // heads, dim=1)
        u = v.to(state.dtype).transpose(1, 2)
        if delta:
            u = u - k @ state / ((k @ z[..., None]) + eps)
        return state + k.mT @ u, z + k.sum(2)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mamba's selective scan (Gu & Dao, 2023): ``h = exp(delta * A) * h + delta * u * B``,
    ``y = C . h + D * u``, ``out = y * silu(z)``, for each channel.

    Args:
        u, delta: ``[B, T, D]``; float32, bfloat16, float16, or float64 on the CPU.
        A: ``[D, S]``, float32 (float64 for float64), usually negative; S from 1 to 256.
        B, C: ``[B, T, G, S]``, dtype of u, D a multiple of G; channel d reads group
            ``d // (D / G)``.
        D: ``[D]``, float32 (float64 for float64).
        z: ``[B, T, D]``, dtype of u.
        delta_bias: ``[D]``, float32 (float64 for float64), added to delta.
        initial_state: ``[N, D, S]`` float32 (float64 for float64); None: zeros.
        cu_seqlens: ``[N + 1]`` int32 or int64 from 0 to T, with B = 1: sequences packed along T,
            which may be empty; else N = B.
        delta_softplus: delta is ``log(1 + exp(delta + delta_bias))``.
        output_final_state: return the state after each sequence.

    Returns:
        out ``[B, T, D]`` in the dtype of u; and state ``[N, D, S]`` if asked for, else None.

    Differentiable once in every floating tensor, through the final state too. Raises RuntimeError
    on arguments that contradict the above.
    """
    tensors = u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens
    options = {"delta_softplus": delta_softplus, "output_final_state": output_final_state}
    if _library.use_fallback(u, "selective_scan", *tensors[:9]):
        return fallback.selective_scan(*tensors, **options)
    out, state = _library.call(_selective_scan, tensors[:9], *tensors, **options)
    return out, state if output_final_state else None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba2's state space duality (Dao & Gu, 2024), in its names and layouts, by
    `linear_attention`: ``h = exp(dt * A) * h + dt * B x^T``, ``y = C . h + D * x``, times silu(z).

    Args:
        x: ``[batch, T, H, P]``; z alike.
        dt: ``[batch, T, H]``, positive after dt_bias ``[H]``, dt_softplus and dt_limit.
        A: ``[H]``, negative.
        B, C: ``[batch, T, G, N]``, H a multiple of G.
        D: ``[H]`` or ``[H, P]``.
        initial_states: ``[sequences, H, P, N]``: the transpose of `linear_attention`'s states.
        cu_seqlens: as there.

    Returns:
        ``[batch, T, H, P]``; with return_final_states also the states ``[sequences, H, P, N]``.

    Differentiable once in every floating tensor. Raises RuntimeError on arguments that contradict
    the above.
    """
    op = "ssd"
    _check(x.ndim == 4, op, "x must be [batch, T, H, P]", x)
    heads = x.shape[2]
    _check(dt.shape == x.shape[:3], op, f"dt must be {list(x.shape[:3])}", dt)
    for name, t in {"A": A, "dt_bias": dt_bias}.items():
        _check(t is None or t.shape == (heads,), op, f"{name} must be [{heads}]", t)
    _check(
        D is None or D.shape in ((heads,), (heads, x.shape[3])), op, "D must be [H] or [H, P]", D
    )
    _check(z is None or z.shape == x.shape, op, f"z must be {list(x.shape)}", z)
    for name, t in {"B": B, "C": C, "z": z}.items():
        alike = t is None or t.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
        _check(alike, op, f"{name} must be {x.dtype} as x is")
    for name, t in {"B": B, "C": C}.items():
        alike = t.ndim == 4 and t.shape[:2] == x.shape[:2] and t.shape == B.shape
        _check(alike, op, f"{name} must be [batch, T, G, N], as x and B are", t)
    _check(
        B.shape[2] > 0 and heads % B.shape[2] == 0,
        op,
        f"B must have a divisor of {heads} groups",
        B,
    )
    _check(
        initial_states is None or initial_states.ndim == 4,
        op,
        "initial_states must be [sequences, H, P, N]",
        initial_states,
    )
    dt = dt.to(_lse_dtype(x.dtype))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    out, state, _ = linear_attention(
        C,
        B,
        (x * dt[..., None]).to(x.dtype),
        dt * A,
        None if initial_states is None else initial_states.mT.contiguous(),
        cu_seqlens=cu_seqlens,
        scale=1.0,
        output_final_state=return_final_states,
    )
    if D is not None:
        out = out + (x * (D if D.ndim == 2 else D[:, None])).to(out.dtype)
    if z is not None:
        out = out * torch.nn.functional.silu(z).to(out.dtype)
    return (out, state.mT) if return_final_states else out


def diagonal_scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``h[t] = a[t] * h[t - 1] + x[t]``, element by element.

    The decay itself is given, not its logarithm: 0, 1, negative and complex ones are exact, as the
    polarised channels of Wang et al. (2025), FFM (Morad et al., 2023) and diagonal state spaces
    need them.

    Args:
        x: ``[B, T, D]``; float32, bfloat16, float16, float64 on the CPU; or complex64, complex128.
        a: ``[B, T, D]``, or ``[D]`` for all tokens, dtype of x, or its real dtype if x is complex.
        initial_state: ``[N, D]``, dtype of the sums: float32 (float64 for float64, x's own for
            complex); None: zeros.
        reset: ``[B, T]`` bool: where set, h of the token before counts as 0.
        cu_seqlens: ``[N + 1]`` int32 or int64 from 0 to T, with B = 1: sequences packed along T,
            which may be empty; else N = B.
        output_final_state: return the state after each sequence.

    Returns:
        h ``[B, T, D]`` in the dtype of x; and state ``[N, D]`` if asked for, else None.

    Differentiable once in x, a and initial_state, through the final state too. Raises RuntimeError
    on arguments that contradict the above.
    """
    tensors = x, a, initial_state, reset, cu_seqlens
    options = {"output_final_state": output_final_state}
    if _library.use_fallback(x, "diagonal_scan", *tensors[:3]):
        return fallback.diagonal_scan(*tensors, **options)
    if reset is not None and reset.dtype == torch.bool:
        reset = reset.view(torch.uint8)
    if not x.is_complex():
        pairs = x, a, initial_state
    else:
        if not a.is_complex():
            real = x.dtype.to_real()
            _check(
                a.dtype == real, "diagonal_scan", f"a must be {x.dtype} or {real}, got {a.dtype}"
            )
            a = torch.complex(a, torch.zeros_like(a))
        pairs = tuple(
            torch.view_as_real(t.resolve_conj()) if t is not None and t.is_complex() else t
            for t in (x, a, initial_state)
        )
    h, state = _library.call(_diagonal_scan, pairs, *pairs, reset, cu_seqlens, **options)
    if x.is_complex():
        h, state = torch.view_as_complex(h), torch.view_as_complex(state)
    return h, state if output_final_state else None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A causal convolution of each channel:
    ``y[t] = sum_i weight[i] x[t - (W - 1 - i) * dilation]``.

    Args:
        x: ``[B, T, D]``; float32, bfloat16, float16, or float64 on the CPU.
        weight: ``[D, W]``, float32 or the dtype of x; W from 1 to 16.
        bias: ``[D]``, dtype of weight.
        initial_state: ``[N, D, (W - 1) * dilation]``, dtype of x, the inputs before each sequence,
            the latest last; None: zeros.
        cu_seqlens: ``[N + 1]`` int32 or int64 from 0 to T, with B = 1: sequences packed along T,
            which may be empty; else N = B.
        activation: "silu", or None.
        output_final_state: return the inputs that a continuation needs.

    Returns:
        ``[B, T, D]`` in the dtype of x; and state ``[N, D, (W - 1) * dilation]`` if asked for, else
        None.

    Differentiable once in x, weight, bias and initial_state, through the final state too. Raises
    RuntimeError on arguments that contradict the above.
    """
    tensors = x, weight, bias, initial_state, cu_seqlens
    options = {"dilation": dilation, "activation": activation or "none"}
    options["output_final_state"] = output_final_state
    if _library.use_fallback(x, "causal_conv1d", *tensors[:4]):
        return fallback.causal_conv1d(*tensors, **options)
    out, state = _library.call(_causal_conv1d, tensors[:4], *tensors, **options)
    return out, state if output_final_state else None


def feature_map(x: Tensor, kind: str, *, nu: int = 3) -> Tensor:
    """What stands for the softmax in linear attention.

    Args:
        x: ``[..., D]``; float32, bfloat16, float16, or float64 on the CPU.
        kind: "elu1", ``elu(x) + 1`` (Katharopoulos et al., 2020; Infini-attention): D features.
            "relu2", ``max(x, 0) ** 2``: D features. "taylor2", whose dot products are
            ``1 + s + s ** 2 / 2`` with ``s = q . k / sqrt(D)`` (BASED, Arora et al., 2024), in its
            symmetric form of ``1 + D + D * (D + 1) / 2`` features: 1, ``x_i / D ** 0.25``, then for
            ``i <= j`` in order ``x_i x_j / sqrt(D)``, over sqrt(2) where i = j. "dpfp", with
            ``r = max([x, -x], 0)`` the products ``r[i] * r[i - j]``, indices modulo 2 D, for j = 1
            to nu (Schlag et al., 2021; ARMT): ``2 * D * nu`` features.

    Returns:
        ``[..., features]``, dtype of x.

    Differentiable once in x.
    """
    if _library.use_fallback(x, "feature_map", x):
        return fallback.feature_map(x, kind, nu=nu)
    return _library.call(_feature_map, (x,), x, kind=kind, nu=nu)


def route_tokens(x: Tensor, expert_ids: Tensor, num_memories: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts tokens by the memories they are sent to (MoM, Du et al., 2025), for a scan with
    cu_seqlens over one sequence a memory.

    Args:
        x: ``[T, ...]``; float32, bfloat16, float16, or float64 on the CPU.
        expert_ids: ``[T, r]`` int32 or int64, the memories of each token; -1: none.
        num_memories: M.

    Returns:
        x permuted ``[T * r, ...]``, where a memory's tokens keep their order; cu_seqlens
        ``[M + 2]`` int32, whose last sequence holds what was sent to no memory, as zeros; inverse
        ``[T, r]`` int64, the row each token and choice went to, -1 for none.

    Sizes do not depend on what expert_ids hold. Differentiable once in x. Raises RuntimeError on
    arguments that contradict the above.
    """
    if _library.use_fallback(x, "route_indices"):
        order, cu_seqlens, inverse = fallback.route_indices(expert_ids, num_memories)
    else:
        order, cu_seqlens, inverse = _library.call(
            _route_indices, (), expert_ids, num_memories=num_memories
        )
    _check(x.shape[:1] == expert_ids.shape[:1], "route_tokens", "x needs T rows", x)
    _check(0 not in x.shape[1:], "route_tokens", "x has empty rows", x)
    rows = embedding_bag(order[:, None], x.flatten(1) if x.ndim > 1 else x[:, None])
    return rows.view(-1, *x.shape[1:]), cu_seqlens, inverse


def unroute_tokens(y: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums the memories' answers for each token: ``sum_j weights[t, j] * y[inverse[t, j]]``.

    Args:
        y: ``[T * r, ...]``, what a scan made of the rows of `route_tokens`.
        inverse: ``[T, r]``, from there; -1 is skipped.
        weights: ``[T, r]``, float32 or the dtype of y; None: 1.

    Returns:
        ``[T, ...]``, dtype of y.

    Differentiable once in y and weights. Deterministic.
    """
    _check(inverse.ndim == 2, "unroute_tokens", "inverse must be [T, r]", inverse)
    rows = y.flatten(1) if y.ndim > 1 else y[:, None]
    return embedding_bag(inverse, rows, per_sample_weights=weights).view(-1, *y.shape[1:])


# ---- one token a sequence ------------------------------------------------------------------------


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    z: Tensor | None = None,
    g: Tensor | None = None,
    state_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`linear_attention` of one token a row, in place on a pool of states.

    Args:
        q, k: ``[B, H, K]``; v: ``[B, HV, V]``; g: ``[HV]``, ``[B, HV]`` or ``[B, HV, K]``.
        state: ``[slots, HV, K, V]`` float32 (float64 for float64), changed; contiguous in K and V.
        z: ``[slots, HV, K]``, changed; normalises if given.
        state_indices: ``[B]`` int32 or int64, the slot of each row; -1: no state, and out is 0. No
            slot may appear twice. None: slot b for row b.

    Returns:
        ``[B, HV, V]``, dtype of q.

    Not differentiable: raises under grad mode if a tensor requires grad. Raises RuntimeError on
    arguments that contradict the above, changing nothing.
    """
    scale = _scale("linear_attention_step", scale, k)
    tensors = q, k, v, state, z, g, state_indices
    if _library.use_fallback(q, "linear_attention_step"):
        return fallback.linear_attention_step(*tensors, scale=scale, eps=eps)
    mutated = (state,) if z is None else (state, z)
    return _library.call_in_place(_linear_step, mutated, *tensors, scale=scale, eps=eps)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    g: Tensor | None = None,
    state_indices: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> Tensor:
    """`delta_rule` of one token a row, in place on a pool of states.

    Args:
        q, k: ``[B, H, K]``; v: ``[B, HV, V]``; beta: ``[B, HV]``; g: ``[HV]``, ``[B, HV]`` or
            ``[B, HV, K]``.
        state, state_indices: as in `linear_attention_step`.

    Returns:
        ``[B, HV, V]``, dtype of q.

    Not differentiable: raises under grad mode if a tensor requires grad. Raises RuntimeError on
    arguments that contradict the above, changing nothing.
    """
    scale = _scale("delta_rule_step", scale, k)
    tensors = q, k, v, beta, state, g, state_indices
    options = {"scale": scale, "qk_l2norm": qk_l2norm}
    if _library.use_fallback(q, "delta_rule_step"):
        return fallback.delta_rule_step(*tensors, **options)
    return _library.call_in_place(_delta_step, (state,), *tensors, **options)


def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    *,
    delta_softplus: bool = False,
) -> Tensor:
    """`selective_scan` of one token a row, in place on a pool of states.

    Args:
        u, delta, z: ``[B, D]``; A: ``[D, S]``; B, C: ``[B, G, S]``; D, delta_bias: ``[D]``.
        state: ``[slots, D, S]`` float32 (float64 for float64), changed; contiguous in D and S.
        state_indices: as in `linear_attention_step`.

    Returns:
        ``[B, D]``, dtype of u.

    Not differentiable: raises under grad mode if a tensor requires grad. Raises RuntimeError on
    arguments that contradict the above, changing nothing.
    """
    tensors = u, delta, A, B, C, state, D, z, delta_bias, state_indices
    if _library.use_fallback(u, "selective_scan_step"):
        return fallback.selective_scan_step(*tensors, delta_softplus=delta_softplus)
    return _library.call_in_place(
        _selective_step, (state,), *tensors, delta_softplus=delta_softplus
    )


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
) -> Tensor:
    """`causal_conv1d` of one token a row, in place on a pool of states.

    Args:
        x: ``[B, D]``; weight: ``[D, W]``; bias: ``[D]``.
        state: ``[slots, D, (W - 1) * dilation]``, dtype of x, changed: x comes in at the end.
            Contiguous in its last two dimensions.
        state_indices: as in `linear_attention_step`.

    Returns:
        ``[B, D]``, dtype of x.

    Not differentiable: raises under grad mode if a tensor requires grad. Raises RuntimeError on
    arguments that contradict the above, changing nothing.
    """
    tensors = x, weight, state, bias, state_indices
    options = {"dilation": dilation, "activation": activation or "none"}
    if _library.use_fallback(x, "causal_conv1d_step"):
        return fallback.causal_conv1d_step(*tensors, **options)
    return _library.call_in_place(_conv_step, (state,), *tensors, **options)


def _scale(op: str, scale: float | None, k: Tensor) -> float:
    _check(k.ndim > 0 and k.shape[-1] > 0, op, "k must have rows of K > 0", k)
    return k.shape[-1] ** -0.5 if scale is None else scale


def _check(ok: bool, op: str, message: str, got: Tensor | None = None) -> None:
    if not ok:
        raise RuntimeError(f"{op}: {message}" + ("" if got is None else f", got {list(got.shape)}"))


# ---- registrations -------------------------------------------------------------------------------

_ops = torch.ops.memkernels
_linear_attention = _ops.linear_attention.default
_delta_rule = _ops.delta_rule.default
_selective_scan = _ops.selective_scan.default
_diagonal_scan = _ops.diagonal_scan.default
_causal_conv1d = _ops.causal_conv1d.default
_feature_map = _ops.feature_map.default
_route_indices = _ops.route_indices.default
_linear_step = _ops.linear_attention_step.default
_delta_step = _ops.delta_rule_step.default
_selective_step = _ops.selective_scan_step.default
_conv_step = _ops.causal_conv1d_step.default

_lib = _library.library

_library.in_place("linear_attention_step", mutated=("state", "z"))
for _op in ("delta_rule_step", "selective_scan_step", "causal_conv1d_step"):
    _library.in_place(_op, mutated=("state",))


def _fake(op):
    return torch.library.register_fake(f"memkernels::{op}", lib=_lib)


def _sequences(batch, cu_seqlens):
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


@_fake("linear_attention")
def _(
    q, k, v, g, initial_state, initial_z, cu_seqlens, *, scale, normalize, eps, output_final_state
):
    return _fake_scan(k, v, cu_seqlens, output_final_state, normalize)


@_fake("delta_rule")
def _(q, k, v, beta, g, initial_state, cu_seqlens, *, scale, qk_l2norm, output_final_state):
    return _fake_scan(k, v, cu_seqlens, output_final_state, False)[:2]


def _fake_scan(k, v, cu_seqlens, output_final_state, normalize):
    sizes = _sequences(v.shape[0], cu_seqlens), v.shape[2], k.shape[3], v.shape[3]
    dtype = _lse_dtype(v.dtype)
    state = v.new_empty(sizes if output_final_state else (0,), dtype=dtype)
    z = v.new_empty(sizes[:3] if output_final_state and normalize else (0,), dtype=dtype)
    return v.new_empty(v.shape), state, z


def _fake_gradients(needs, inputs, wide=()):
    """Of the inputs that need one, else empty; in the dtype of sums for those named wide."""

    def fake(bit, t):
        if t is None:
            return inputs[0].new_empty(0, dtype=torch.float32)
        dtype = _lse_dtype(t.dtype) if bit in wide else t.dtype
        return t.new_empty(t.shape if needs >> bit & 1 else (0,), dtype=dtype)

    return tuple(fake(bit, t) for bit, t in enumerate(inputs))


def _fake_chunk_gradients(needs, inputs, gate):
    """q's and k's are those of each value head, in the dtype of sums, if several share them; so
    are those of gates, of every token."""
    q, _, v = inputs[:3]
    shared = (0, 1) if v.shape[2] != q.shape[2] else ()
    grads = list(_fake_gradients(needs, inputs, wide=(*shared, *range(3, gate + 1))))
    for bit in shared:
        if needs >> bit & 1:
            grads[bit] = grads[bit].new_empty((*v.shape[:3], q.shape[3]))
    if needs >> gate & 1 and inputs[gate].ndim == 1:
        grads[gate] = grads[gate].new_empty(v.shape[:3])
    return tuple(grads)


@_fake("linear_attention_backward")
def _(
    dout, dstate, dz, q, k, v, g, initial_state, initial_z, cu_seqlens, *, needs, scale,
    normalize, eps,
):  # fmt: skip
    return _fake_chunk_gradients(needs, (q, k, v, g, initial_state, initial_z), gate=3)


@_fake("delta_rule_backward")
def _(
    dout, dstate, q, k, v, beta, g, initial_state, cu_seqlens, *, needs, scale, qk_l2norm
):  # fmt: skip
    return _fake_chunk_gradients(needs, (q, k, v, beta, g, initial_state), gate=4)


@_fake("selective_scan")
def _(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, *, delta_softplus,
    output_final_state,
):  # fmt: skip
    sizes = _sequences(u.shape[0], cu_seqlens), *A.shape
    state = u.new_empty(sizes if output_final_state else (0,), dtype=A.dtype)
    return u.new_empty(u.shape), state


@_fake("selective_scan_backward")
def _(
    dout, dstate, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, *, needs,
    delta_softplus,
):  # fmt: skip
    inputs = u, delta, A, B, C, D, z, delta_bias, initial_state
    return _fake_gradients(needs, inputs)


@_fake("diagonal_scan")
def _(x, a, initial_state, reset, cu_seqlens, *, output_final_state):
    sizes = _sequences(x.shape[0], cu_seqlens), *x.shape[2:]
    state = x.new_empty(
        sizes if output_final_state else (0, *x.shape[3:]), dtype=_lse_dtype(x.dtype)
    )
    return x.new_empty(x.shape), state


@_fake("diagonal_scan_backward")
def _(dh, dstate, a, h, initial_state, reset, cu_seqlens, *, needs):
    dtype = _lse_dtype(h.dtype)
    sizes = _sequences(h.shape[0], cu_seqlens), *h.shape[2:]
    constant = a.ndim < h.ndim
    return (
        h.new_empty(h.shape if needs & 1 else (0,)),
        h.new_empty(
            (sizes if constant else h.shape) if needs & 2 else (0,),
            dtype=dtype if constant else a.dtype,
        ),
        h.new_empty(sizes if needs & 4 else (0,), dtype=dtype),
    )


@_fake("causal_conv1d")
def _(x, weight, bias, initial_state, cu_seqlens, *, dilation, activation, output_final_state):
    length = (weight.shape[1] - 1) * dilation
    sizes = _sequences(x.shape[0], cu_seqlens), x.shape[2], length
    return x.new_empty(x.shape), x.new_empty(sizes if output_final_state else (0,))


@_fake("causal_conv1d_backward")
def _(dout, dstate, x, weight, bias, initial_state, cu_seqlens, *, needs, dilation, activation):
    return _fake_gradients(needs, (x, weight, bias, initial_state), wide=(1, 2))


@_fake("feature_map")
def _(x, *, kind, nu):
    dim = x.shape[-1]
    features = {
        "elu1": dim,
        "relu2": dim,
        "taylor2": 1 + dim + dim * (dim + 1) // 2,
        "dpfp": 2 * dim * nu,
    }
    return x.new_empty((*x.shape[:-1], features[kind]))


@_fake("feature_map_backward")
def _(dout, x, *, kind, nu):
    return x.new_empty(x.shape)


@_fake("route_indices")
def _(expert_ids, *, num_memories):
    order = expert_ids.new_empty(expert_ids.numel(), dtype=torch.int64)
    cu_seqlens = expert_ids.new_empty(num_memories + 2, dtype=torch.int32)
    return order, cu_seqlens, expert_ids.new_empty(expert_ids.shape, dtype=torch.int64)


@_fake("linear_attention_step")
def _(q, k, v, state, z, g, state_indices, *, scale, eps):
    return v.new_empty(v.shape)


@_fake("delta_rule_step")
def _(q, k, v, beta, state, g, state_indices, *, scale, qk_l2norm):
    return v.new_empty(v.shape)


@_fake("selective_scan_step")
def _(u, delta, A, B, C, state, D, z, delta_bias, state_indices, *, delta_softplus):
    return u.new_empty(u.shape)


@_fake("causal_conv1d_step")
def _(x, weight, state, bias, state_indices, *, dilation, activation):
    return x.new_empty(x.shape)


def _context(ctx, inputs, keyword_only_inputs, output):
    ctx.set_materialize_grads(False)
    ctx.options = dict(keyword_only_inputs)
    ctx.options.pop("output_final_state", None)
    ctx.save_for_backward(*inputs)


def _needs(ctx):
    """A bit for each input that needs a gradient."""
    return sum(1 << bit for bit, needed in enumerate(ctx.needs_input_grad) if needed)


def _dense(grad):
    """None, too, for the gradient of a state that was not asked for, which is empty."""
    return None if grad is None or grad.numel() == 0 else grad.contiguous()


def _asked(grads, needs, inputs):
    """The gradients that were asked for, then None for the inputs that have none."""
    given = [grad if needs >> bit & 1 else None for bit, grad in enumerate(grads)]
    return *given, *(None for _ in inputs[len(given) :])


def _in_dtypes(grads, inputs):
    return tuple(g if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def _chunk_gradients(grads, needs, inputs, gate):
    grads = list(_asked(grads, needs, inputs))
    for i in 0, 1:
        if grads[i] is not None and grads[i].shape != inputs[i].shape:  # of each value head
            grads[i] = grads[i].unflatten(2, (inputs[i].shape[2], -1)).sum(3)
    if grads[gate] is not None and inputs[gate].ndim == 1:
        grads[gate] = grads[gate].sum((0, 1))
    return _in_dtypes(grads, inputs)


def _linear_gradient(ops, ctx, dout, dstate, dz):
    inputs = ctx.saved_tensors
    needs = _needs(ctx)
    dout = torch.zeros_like(inputs[2]) if dout is None else dout.contiguous()
    grads = ops.linear_attention_backward.default(
        dout, _dense(dstate), _dense(dz), *inputs, needs=needs, **ctx.options
    )
    return _chunk_gradients(grads, needs, inputs, gate=3)


def _delta_gradient(ops, ctx, dout, dstate):
    inputs = ctx.saved_tensors
    needs = _needs(ctx)
    dout = torch.zeros_like(inputs[2]) if dout is None else dout.contiguous()
    grads = ops.delta_rule_backward.default(
        dout, _dense(dstate), *inputs, needs=needs, **ctx.options
    )
    return _chunk_gradients(grads, needs, inputs, gate=4)


def _selective_gradient(ops, ctx, dout, dstate):
    inputs = ctx.saved_tensors
    needs = _needs(ctx)
    dout = torch.zeros_like(inputs[0]) if dout is None else dout.contiguous()
    grads = ops.selective_scan_backward.default(
        dout, _dense(dstate), *inputs, needs=needs, **ctx.options
    )
    return _asked(grads, needs, inputs)


def _diagonal_context(ctx, inputs, keyword_only_inputs, output):
    _, a, initial_state, reset, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, output[0], initial_state, reset, cu_seqlens)


def _diagonal_gradient(ops, ctx, dh, dstate):
    a, h, *rest = ctx.saved_tensors
    needs = _needs(ctx)
    dh = torch.zeros_like(h) if dh is None else dh.contiguous()
    dx, da, dinitial = ops.diagonal_scan_backward.default(
        dh, _dense(dstate), a, h, *rest, needs=needs
    )
    if a.ndim < h.ndim and ctx.needs_input_grad[1]:
        da = da.sum(0).to(a.dtype)
    return _asked((dx, da, dinitial), needs, (None,) * 5)


def _conv_gradient(ops, ctx, dout, dstate):
    inputs = ctx.saved_tensors
    needs = _needs(ctx)
    dout = torch.zeros_like(inputs[0]) if dout is None else dout.contiguous()
    grads = ops.causal_conv1d_backward.default(
        dout, _dense(dstate), *inputs, needs=needs, **ctx.options
    )
    return _in_dtypes(_asked(grads, needs, inputs), inputs)


def _feature_gradient(ops, ctx, dout):
    if dout is None:
        return None
    return ops.feature_map_backward.default(dout.contiguous(), *ctx.saved_tensors, **ctx.options)


def _register_autograd(namespace: str, lib) -> None:
    ops = getattr(torch.ops, namespace)
    for op, gradient, context in (
        ("linear_attention", _linear_gradient, _context),
        ("delta_rule", _delta_gradient, _context),
        ("selective_scan", _selective_gradient, _context),
        ("diagonal_scan", _diagonal_gradient, _diagonal_context),
        ("causal_conv1d", _conv_gradient, _context),
        ("feature_map", _feature_gradient, _context),
    ):
        gradient = functools.partial(gradient, ops)  # of the same namespace
        torch.library.register_autograd(
            f"{namespace}::{op}", gradient, setup_context=context, lib=lib
        )


_register_autograd("memkernels", _lib)
for _op in (
    "linear_attention", "delta_rule", "selective_scan", "diagonal_scan", "causal_conv1d",
    "feature_map",
):  # fmt: skip
    _library.once_differentiable(_op)


def _cast(t, dtype):
    return t.to(dtype) if t is not None and _library.autocasts(t) else t


def _wide(t, like):
    """A companion of tensors of that dtype: in it, or else in float32."""
    if t is None or t.dtype == like.dtype or not _library.autocasts(t):
        return t
    return t.float()


def _cast_leading(count):
    """The rule of an op whose first tensors share a dtype, beside companions."""

    def rule(dtype, *tensors, **options):
        main = tuple(_cast(t, dtype) for t in tensors[:count])
        return main + tuple(_wide(t, main[0]) for t in tensors[count:]), options

    return rule


def _cast_selective(dtype, u, delta, A, B, C, D, z, *rest, **options):
    u, delta, B, C, z = (_cast(t, dtype) for t in (u, delta, B, C, z))
    return (u, delta, A, B, C, D, z, *rest), options


def _cast_conv(dtype, x, weight, bias, initial_state, cu_seqlens, **options):
    x = _cast(x, dtype)
    weight, bias = _wide(weight, x), _wide(bias, x)
    return (x, weight, bias, _cast(initial_state, dtype), cu_seqlens), options


_library.register_autocast("linear_attention", _cast_leading(3))
_library.register_autocast("delta_rule", _cast_leading(3))
_library.register_autocast("selective_scan", _cast_selective)
_library.register_autocast("causal_conv1d", _cast_conv)
