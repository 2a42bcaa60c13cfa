"""Memory scans, one token after the other.

Sequences are rows of a batch, or packed along T by ``cu_seqlens [N + 1]`` with a batch of 1; else
N = B. Final states are returned if asked for, else None.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from memkernels.reference.lookup import embedding_bag


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def linear_attention(
    q,
    k,
    v,
    g=None,
    initial_state=None,
    initial_z=None,
    cu_seqlens=None,
    *,
    scale=None,
    normalize=False,
    eps=1e-6,
    output_final_state=False,
):
    """``S = exp(g) * S + k v^T`` and ``o = scale * S^T q``.

    With normalize, ``z = exp(g) * z + k`` and ``o = scale * S^T q / (scale * z . q + eps)``.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``, value head h reading query head ``h // (HV / H)``.
        g: ``[HV]``, ``[B, T, HV]`` or ``[B, T, HV, K]``; -inf forgets; None means 0.
        initial_state, initial_z: ``[N, HV, K, V]`` and ``[N, HV, K]``; None means 0.

    Returns:
        o ``[B, T, HV, V]``, S ``[N, HV, K, V]``, z ``[N, HV, K]``, float64; z with normalize only.
    """
    q, k, v, decay, scale = _heads(q, k, v, g, scale)
    spans = _spans(v, cu_seqlens)
    state = _initial(initial_state, len(spans), *v.shape[2:3], k.shape[3], v.shape[3])
    z = _initial(initial_z, len(spans), *v.shape[2:3], k.shape[3])
    out = np.zeros(v.shape)
    for n, tokens in enumerate(spans):
        for t in tokens:
            state[n] = decay[t][..., None] * state[n] + k[t][..., None] * v[t][:, None]
            z[n] = decay[t] * z[n] + k[t]
            out[t] = scale * (q[t][..., None] * state[n]).sum(1)
            if normalize:
                out[t] /= scale * (q[t] * z[n]).sum(-1, keepdims=True) + eps
    return (
        out,
        state if output_final_state else None,
        z if output_final_state and normalize else None,
    )


@np.errstate(invalid="ignore", over="ignore")
def delta_rule(
    q,
    k,
    v,
    beta,
    g=None,
    initial_state=None,
    cu_seqlens=None,
    *,
    scale=None,
    qk_l2norm=False,
    output_final_state=False,
):
    """``S = exp(g) * S``, then ``S = S + k u^T`` with ``u = beta * (v - S^T k)``, and
    ``o = scale * S^T q``.

    Args:
        q, k, v, g, initial_state: as in `linear_attention`.
        beta: ``[B, T, HV]``.
        qk_l2norm: rows of q and k are first divided by ``sqrt(sum of squares + 1e-6)``.

    Returns:
        o ``[B, T, HV, V]`` and S ``[N, HV, K, V]``, float64.
    """
    if qk_l2norm:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k, v, decay, scale = _heads(q, k, v, g, scale)
    spans = _spans(v, cu_seqlens)
    state = _initial(initial_state, len(spans), *v.shape[2:3], k.shape[3], v.shape[3])
    out = np.zeros(v.shape)
    for n, tokens in enumerate(spans):
        for t in tokens:
            state[n] = decay[t][..., None] * state[n]
            u = beta[t][:, None] * (v[t] - (k[t][..., None] * state[n]).sum(1))
            state[n] += k[t][..., None] * u[:, None]
            out[t] = scale * (q[t][..., None] * state[n]).sum(1)
    return out, state if output_final_state else None


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def infini_update(k, v, state, z, *, delta=True, eps=1e-6):
    """A segment written at once: ``S + sum of k u^T`` and ``z + sum of k``, where every token's
    ``u = v - S^T k / (z . k + eps)`` sees the old S and z; without delta, ``u = v``.

    Args:
        k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``.
        state, z: ``[B, HV, K, V]`` and ``[B, HV, K]``.

    Returns:
        The new state and z, float64.
    """
    _, k, v, _, _ = _heads(k, k, v, None, None)
    new_state, new_z = state.astype(np.float64), z.astype(np.float64)
    for b, t in np.ndindex(v.shape[:2]):
        u = v[b, t]
        if delta:
            expected = (k[b, t][..., None] * state[b]).sum(1)
            u = u - expected / ((z[b] * k[b, t]).sum(-1, keepdims=True) + eps)
        new_state[b] += k[b, t][..., None] * u[:, None]
        new_z[b] += k[b, t]
    return new_state, new_z


@np.errstate(invalid="ignore", over="ignore")
def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    initial_state=None,
    cu_seqlens=None,
    *,
    delta_softplus=False,
    output_final_state=False,
):
    """``h = exp(delta * A) * h + delta * u * B`` and ``(C . h + D * u) * silu(z)``, where delta is
    ``delta + delta_bias``, with delta_softplus ``log(1 + exp(delta + delta_bias))``.

    Args:
        u, delta, z: ``[B, T, D]``.
        A: ``[D, S]``.
        B, C: ``[B, T, G, S]``, channel d reading group ``d // (D / G)``.
        D, delta_bias: ``[D]``.
        initial_state: ``[N, D, S]``; None means 0.

    Returns:
        ``[B, T, D]`` and h ``[N, D, S]``, float64.
    """
    channels, size = A.shape
    delta = delta.astype(np.float64) + (0 if delta_bias is None else delta_bias)
    if delta_softplus:
        delta = np.logaddexp(delta, 0)
    B, C = (np.repeat(x, channels // x.shape[2], axis=2) for x in (B, C))  # [B, T, D, S]
    spans = _spans(u, cu_seqlens)
    state = _initial(initial_state, len(spans), channels, size)
    out = np.zeros(u.shape)
    for n, tokens in enumerate(spans):
        for t in tokens:
            state[n] = np.exp(delta[t][:, None] * A) * state[n]
            state[n] += (delta[t] * u[t])[:, None] * B[t]
            out[t] = (C[t] * state[n]).sum(-1)
    if D is not None:
        out += D * u
    if z is not None:
        out *= _silu(z.astype(np.float64))
    return out, state if output_final_state else None


@np.errstate(invalid="ignore", over="ignore")
def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    cu_seqlens=None,
    *,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
):
    """``h = exp(dt * A) * h + dt * x B^T`` and ``(h C + D * x) * silu(z)`` for each head, dt being
    ``dt + dt_bias``, its softplus with dt_softplus, then within dt_limit.

    Args:
        x, z: ``[B, T, H, P]``.
        dt: ``[B, T, H]``.
        A, dt_bias: ``[H]``.
        B, C: ``[B, T, G, N]``, head h reading group ``h // (H / G)``.
        D: ``[H]`` or ``[H, P]``.
        initial_states: ``[sequences, H, P, N]``; None means 0.

    Returns:
        ``[B, T, H, P]`` float64; with return_final_states, a tuple of it and h.
    """
    heads, dim = x.shape[2:]
    dt = dt.astype(np.float64) + (0 if dt_bias is None else dt_bias)
    if dt_softplus:
        dt = np.logaddexp(dt, 0)
    dt = np.clip(dt, *dt_limit)
    B, C = (np.repeat(y, heads // y.shape[2], axis=2) for y in (B, C))
    spans = _spans(x, cu_seqlens)
    state = _initial(initial_states, len(spans), heads, dim, B.shape[3])
    out = np.zeros(x.shape)
    for n, tokens in enumerate(spans):
        for t in tokens:
            state[n] = np.exp(dt[t] * A)[:, None, None] * state[n]
            state[n] += (dt[t][:, None] * x[t])[..., None] * B[t][:, None]
            out[t] = (state[n] * C[t][:, None]).sum(-1)
    if D is not None:
        out += (D if D.ndim == 2 else D[:, None]) * x
    if z is not None:
        out *= _silu(z.astype(np.float64))
    return (out, state) if return_final_states else out


@np.errstate(invalid="ignore", over="ignore")
def diagonal_scan(
    x, a, initial_state=None, reset=None, cu_seqlens=None, *, output_final_state=False
):
    """``h[t] = a[t] * h[t - 1] + x[t]``; where reset is set, ``h[t - 1]`` counts as 0.

    Args:
        x: ``[B, T, D]``, real or complex.
        a: ``[B, T, D]`` or ``[D]``.
        initial_state: ``[N, D]``; None means 0.
        reset: ``[B, T]`` bool.

    Returns:
        h ``[B, T, D]`` and the last of each sequence ``[N, D]``, float64 or complex128.
    """
    x = x.astype(np.result_type(x, np.float64))
    a = np.broadcast_to(a, x.shape)
    spans = _spans(x, cu_seqlens)
    state = _initial(initial_state, len(spans), x.shape[2]).astype(x.dtype)
    h = np.zeros_like(x)
    for n, tokens in enumerate(spans):
        for t in tokens:
            if reset is not None and reset[t]:
                state[n] = 0
            state[n] = h[t] = a[t] * state[n] + x[t]
    return h, state if output_final_state else None


@np.errstate(invalid="ignore", over="ignore")
def causal_conv1d(
    x,
    weight,
    bias=None,
    initial_state=None,
    cu_seqlens=None,
    *,
    dilation=1,
    activation=None,
    output_final_state=False,
):
    """``y[t] = sum_i weight[i] * x[t - (W - 1 - i) * dilation] + bias``, by channel, perhaps its
    silu. Before a sequence's first input stand those of its initial state, or 0.

    Args:
        x: ``[B, T, D]``.
        weight: ``[D, W]``; bias: ``[D]``.
        initial_state: ``[N, D, (W - 1) * dilation]``, the latest input last.
        activation: "silu", or None or "none".

    Returns:
        ``[B, T, D]`` and the last inputs ``[N, D, (W - 1) * dilation]``, float64.
    """
    channels, width = weight.shape
    length = (width - 1) * dilation
    spans = _spans(x, cu_seqlens)
    state = _initial(initial_state, len(spans), channels, length)
    out = np.zeros(x.shape)
    for n, tokens in enumerate(spans):
        for t in tokens:
            window = np.concatenate([state[n], x[t][:, None]], axis=1)
            out[t] = (weight * window[:, ::dilation]).sum(1)
            state[n] = window[:, 1:]
    if bias is not None:
        out += bias
    if activation == "silu":
        out = _silu(out)
    return out, state if output_final_state else None


@np.errstate(invalid="ignore", over="ignore")
def feature_map(x, kind, *, nu=3):
    """Features ``[..., F]`` float64 of ``x [..., D]``.

    Args:
        kind: "elu1", ``elu(x) + 1``; "relu2", ``max(x, 0) ** 2``; "taylor2", 1, then
            ``x_i / D ** 0.25``, then for ``i <= j`` in order ``x_i x_j / sqrt(D)``, over sqrt(2)
            where i = j; or "dpfp", ``r[i] * r[i - j]`` for ``j = 1`` to nu of
            ``r = max([x, -x], 0)``, indices modulo 2 D.
    """
    x = x.astype(np.float64)
    dim = x.shape[-1]
    if kind == "elu1":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    if kind == "relu2":
        return np.maximum(x, 0) ** 2
    if kind == "taylor2":
        features = [np.ones_like(x[..., 0])]
        features += [x[..., i] / dim**0.25 for i in range(dim)]
        for i in range(dim):
            for j in range(i, dim):
                product = x[..., i] * x[..., j] / math.sqrt(dim)
                features.append(product / math.sqrt(2) if i == j else product)
    else:
        r = np.maximum(np.concatenate([x, -x], axis=-1), 0)
        features = [
            r[..., i] * r[..., (i - j) % (2 * dim)]
            for j in range(1, nu + 1)
            for i in range(2 * dim)
        ]
    return np.stack(features, axis=-1)


def route_indices(expert_ids, num_memories):
    """Which token each row holds once tokens are sorted by memory.

    Args:
        expert_ids: ``[T, r]``, -1: none.
        num_memories: M.

    Returns:
        order ``[T * r]`` int64, the token of each row, -1 in the last rows, which hold what was
        sent to no memory; cu_seqlens ``[M + 2]`` int32; inverse ``[T, r]`` int64, the row of each
        token and choice, or -1.
    """
    order = np.full(expert_ids.size, -1)
    inverse = np.full(expert_ids.shape, -1)
    cu_seqlens, row = [0], 0
    for memory in range(num_memories):
        for t, j in np.argwhere(expert_ids == memory):
            order[row], inverse[t, j] = t, row
            row += 1
        cu_seqlens.append(row)
    return order, np.array([*cu_seqlens, len(order)], dtype=np.int32), inverse


def route_tokens(x, expert_ids, num_memories):
    """The rows of ``x [T, ...]`` that `route_indices` orders, ``[T * r, ...]`` float64, those of no
    memory 0; with its cu_seqlens and inverse."""
    order, cu_seqlens, inverse = route_indices(expert_ids, num_memories)
    rows = np.zeros((len(order), *x.shape[1:]))
    rows[order >= 0] = x[order[order >= 0]]
    return rows, cu_seqlens, inverse


def unroute_tokens(y, inverse, weights=None):
    """``sum_j weights[t, j] * y[inverse[t, j]]``, -1 being skipped: ``[T, ...]`` float64."""
    rows = y.reshape(len(y), math.prod(y.shape[1:]))
    return embedding_bag(inverse, rows, per_sample_weights=weights).reshape(-1, *y.shape[1:])


def linear_attention_step(
    q, k, v, state, z=None, g=None, state_indices=None, *, scale=None, eps=1e-6
):
    """`linear_attention` of one token ``[B, ...]`` for each of some states of a pool.

    Args:
        state, z: ``[slots, HV, K, V]`` and ``[slots, HV, K]``; without z nothing is normalised.
        state_indices: ``[B]``, the slot of each row, -1: none, where the result is 0. None means
            ``[0, 1, ...]``.

    Returns:
        o ``[B, HV, V]``, and changed copies of state and z, float64; or without z the former two.
    """
    normalize = z is not None
    states = [state] if z is None else [state, z]

    def scan(q, k, v, g, initial_state, initial_z=None):
        return linear_attention(
            q, k, v, g, initial_state, initial_z, scale=scale, normalize=normalize, eps=eps,
            output_final_state=True,
        )  # fmt: skip

    return _step(scan, [q, k, v, g], states, state_indices, v.shape)


def delta_rule_step(
    q, k, v, beta, state, g=None, state_indices=None, *, scale=None, qk_l2norm=False
):
    """`delta_rule` of one token for each of some states of a pool: see `linear_attention_step`."""
    options = {"scale": scale, "qk_l2norm": qk_l2norm, "output_final_state": True}

    def scan(q, k, v, beta, g, initial_state):
        return delta_rule(q, k, v, beta, g, initial_state, **options)

    return _step(scan, [q, k, v, beta, g], [state], state_indices, v.shape)


def selective_scan_step(
    u,
    delta,
    A,
    B,
    C,
    state,
    D=None,
    z=None,
    delta_bias=None,
    state_indices=None,
    *,
    delta_softplus=False,
):
    """`selective_scan` of one token for each of some states: see `linear_attention_step`."""
    options = {"delta_softplus": delta_softplus, "output_final_state": True}

    def scan(u, delta, B, C, z, initial_state):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, **options)

    return _step(scan, [u, delta, B, C, z], [state], state_indices, u.shape)


def causal_conv1d_step(
    x, weight, state, bias=None, state_indices=None, *, dilation=1, activation=None
):
    """`causal_conv1d` of one token for each of some states: see `linear_attention_step`."""
    options = {"dilation": dilation, "activation": activation, "output_final_state": True}

    def scan(x, initial_state):
        return causal_conv1d(x, weight, bias, initial_state, **options)

    return _step(scan, [x], [state], state_indices, x.shape)


def _spans(tokens, cu_seqlens):
    """For each sequence the places ``(b, t)`` of its tokens."""
    batch, length = tokens.shape[:2]
    if cu_seqlens is None:
        return [[(b, t) for t in range(length)] for b in range(batch)]
    return [[(0, t) for t in range(start, stop)] for start, stop in pairwise(cu_seqlens)]


def _initial(state, *shape):
    return np.zeros(shape) if state is None else np.array(state)


def _heads(q, k, v, g, scale):
    """q, k and v of every value head, decays ``[B, T, HV, 1 or K]``, and the scale."""
    group = v.shape[2] // q.shape[2]
    q, k = (np.repeat(x.astype(np.float64), group, axis=2) for x in (q, k))
    decay = np.exp(np.zeros(1) if g is None else g.astype(np.float64))
    if g is not None and g.ndim < 4:
        decay = decay[..., None]
    decay = np.broadcast_to(decay, (*v.shape[:3], decay.shape[-1]))
    return q, k, v.astype(np.float64), decay, k.shape[3] ** -0.5 if scale is None else scale


def _step(scan, tokens, states, state_indices, shape):
    """A scan of one token a row, of which those that have a slot are scanned."""
    slots = np.arange(shape[0]) if state_indices is None else state_indices
    used = slots >= 0
    tokens = [x if x is None or x.ndim == 1 else x[used][:, None] for x in tokens]
    states = [state.astype(np.float64) for state in states]
    result, *finals = scan(*tokens, *(state[slots[used]] for state in states))
    out = np.zeros(shape)
    out[used] = result[:, 0]
    for state, final in zip(states, finals, strict=False):
        state[slots[used]] = final
    return out, *states


def _silu(x):
    return x / (1 + np.exp(-x))
