"""Memory scans: one token after the other, all rows of a batch at once, packed sequences in turn.

Gradients take memory for the state after every token. cu_seqlens is read on the host. Slots are
checked on the CPU; on other devices one that is out of range is skipped like -1.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch

from memkernels.fallback import attention as _attention
from memkernels.fallback.attention import (
    _check,
    _check_distinct,
    _check_index,
    _describe,
    _no_gradient,
    _offsets,
)
from memkernels.fallback.lookup import (
    _ACTIVATIONS,
    _check_factors,
    _check_some,
    _check_written,
    _checked,
)
from memkernels.fallback.selection import _wide


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
    """`memkernels.linear_attention` in plain torch."""
    op = "linear_attention"
    _check_heads(op, q, k, v, g, ["B", "T"])
    sequences, bounds = _sequences(op, v, cu_seqlens)
    shape = sequences, v.shape[2], k.shape[3], v.shape[3]
    states = [_initial(op, "initial_state", initial_state, v, shape)]
    if normalize:
        states.append(_initial(op, "initial_z", initial_z, v, shape[:3]))
    else:
        _check(op, initial_z is None, "initial_z", "absent without normalize", "one")
    tokens = *_every_head(q, k, v), _decay(g, v)
    step = functools.partial(_linear, scale=k.shape[3] ** -0.5 if scale is None else scale, eps=eps)
    out, *states = _scan(step, tokens, states, bounds, v)
    if not output_final_state:
        return out, None, None
    return (out, *states) if normalize else (out, *states, None)


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
    """`memkernels.delta_rule` in plain torch."""
    op = "delta_rule"
    _check_heads(op, q, k, v, g, ["B", "T"])
    _check_factors(op, "beta", beta, v.shape[:3], v.dtype)
    sequences, bounds = _sequences(op, v, cu_seqlens)
    shape = sequences, v.shape[2], k.shape[3], v.shape[3]
    state = _initial(op, "initial_state", initial_state, v, shape)
    tokens = _delta_tokens(q, k, v, beta, g, qk_l2norm)
    step = functools.partial(_delta, scale=k.shape[3] ** -0.5 if scale is None else scale)
    out, state = _scan(step, tokens, [state], bounds, v)
    return out, state if output_final_state else None


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
    """`memkernels.selective_scan` in plain torch."""
    op = "selective_scan"
    _check_channels(op, u, delta, A, B, C, D, z, delta_bias, ["B", "T"])
    sequences, bounds = _sequences(op, u, cu_seqlens)
    state = _initial(op, "initial_state", initial_state, u, (sequences, *A.shape))
    tokens = _selective_tokens(u, delta, B, C, z, delta_bias, delta_softplus)
    out, state = _scan(_selective(A, D), tokens, [state], bounds, u)
    return out, state if output_final_state else None


def diagonal_scan(
    x, a, initial_state=None, reset=None, cu_seqlens=None, *, output_final_state=False
):
    """`memkernels.diagonal_scan` in plain torch."""
    op = "diagonal_scan"
    known = x.dim() == 3 and (x.is_floating_point() or x.is_complex())
    _check(op, known, "x", "floating or complex [B, T, D]", _describe(x))
    _check_some(op, "x", x)
    dtypes = x.dtype, x.dtype.to_real()
    alike = a.shape in (x.shape, x.shape[2:]) and a.dtype in dtypes
    expected = f"{dtypes[0]} or {dtypes[1]} {list(x.shape)} or {list(x.shape[2:])}"
    _check(op, alike, "a", expected, _describe(a))
    if reset is None:
        reset = x.new_zeros(x.shape[:2], dtype=torch.bool)
    alike = reset.shape == x.shape[:2] and reset.dtype in (torch.bool, torch.uint8)
    _check(op, alike, "reset", f"bool {list(x.shape[:2])}", _describe(reset))
    sequences, bounds = _sequences(op, x, cu_seqlens)
    state = _initial(op, "initial_state", initial_state, x, (sequences, x.shape[2]))

    def step(x, a, reset, state):
        state = a * state.masked_fill(reset, 0) + x
        return state, state

    dtype = _attention._accumulator(x.dtype)
    tokens = x.to(dtype), a.to(dtype).expand_as(x), reset.bool()[..., None]
    out, state = _scan(step, tokens, [state], bounds, x)
    return out, state if output_final_state else None


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
    """`memkernels.causal_conv1d` in plain torch."""
    op = "causal_conv1d"
    length = _check_conv(op, x, weight, bias, dilation, activation, ["B", "T"])
    sequences, bounds = _sequences(op, x, cu_seqlens)
    shape = sequences, x.shape[2], length
    if initial_state is None:
        initial_state = x.new_zeros(shape)
    alike = initial_state.shape == shape and initial_state.dtype == x.dtype
    _check(op, alike, "initial_state", f"{x.dtype} {list(shape)}", _describe(initial_state))
    outs, states = [x[:, :0]], [initial_state[:0]]
    for tokens, (state,) in _parts([initial_state], bounds):
        out, state = _convolve(x[:, tokens], state, weight, bias, dilation, activation)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 1), torch.cat(states) if output_final_state else None


def feature_map(x, kind, *, nu=3):
    """`memkernels.feature_map` in plain torch."""
    op = "feature_map"
    floating = x.dim() > 0 and x.is_floating_point()
    _check(op, floating, "x", "floating [..., D]", _describe(x))
    _check_some(op, "x", x)
    kinds = "elu1", "relu2", "taylor2", "dpfp"
    _check(op, kind in kinds, "kind", " or ".join(kinds), kind)
    _check(op, nu >= 1, "nu", "at least 1", nu)
    dim, dtype = x.shape[-1], x.dtype
    x = x.to(_attention._accumulator(dtype))
    if kind == "elu1":
        features = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    elif kind == "relu2":
        features = x.relu().square()
    elif kind == "taylor2":
        i, j = torch.triu_indices(dim, dim, device=x.device)
        factors = x.new_full((len(i),), dim**-0.5).where(i != j, (2 * dim) ** -0.5)
        products = x.index_select(-1, i) * x.index_select(-1, j) * factors
        features = torch.cat([torch.ones_like(x[..., :1]), x * dim**-0.25, products], -1)
    else:
        r = torch.cat([x, -x], -1).relu()
        features = torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)
    return features.to(dtype)


def route_indices(expert_ids, num_memories):
    """``(order [T * r], cu_seqlens [M + 2], inverse [T, r])`` of tokens sorted by memory."""
    op = "route_tokens"
    _check_index(op, "expert_ids", expert_ids, ndim=2)
    _check_some(op, "expert_ids", expert_ids)
    _check(op, num_memories >= 0, "num_memories", "at least 0", num_memories)
    index, inside = _checked(op, "expert_ids", expert_ids, num_memories)
    memory, entry = index.where(inside, num_memories).flatten().sort(stable=True)
    order = (entry // expert_ids.shape[1]).where(memory < num_memories, -1)
    ends = torch.arange(num_memories + 2, device=memory.device)
    cu_seqlens = torch.searchsorted(memory, ends, out_int32=True)
    rows = torch.arange(len(entry), device=entry.device)
    inverse = torch.empty_like(entry).scatter(0, entry, rows).view_as(index)
    return order, cu_seqlens, inverse.where(inside, -1)


# ---- one token a sequence ------------------------------------------------------------------------


def linear_attention_step(
    q, k, v, state, z=None, g=None, state_indices=None, *, scale=None, eps=1e-6
):
    """`memkernels.linear_attention_step` in plain torch: writes state and z in place."""
    op = "linear_attention_step"
    _check_heads(op, q, k, v, g, ["B"])
    _refuse_gradients(op, q=q, k=k, v=v, state=state, z=z, g=g)
    shape = v.shape[1], k.shape[2], v.shape[2]
    states = {"state": (state, shape)} | ({} if z is None else {"z": (z, shape[:2])})
    tokens = *_every_head(q, k, v), _decay(g, v)
    step = functools.partial(_linear, scale=k.shape[2] ** -0.5 if scale is None else scale, eps=eps)
    return _step(op, step, tokens, states, state_indices, v)


def delta_rule_step(
    q, k, v, beta, state, g=None, state_indices=None, *, scale=None, qk_l2norm=False
):
    """`memkernels.delta_rule_step` in plain torch: writes state in place."""
    op = "delta_rule_step"
    _check_heads(op, q, k, v, g, ["B"])
    _check_factors(op, "beta", beta, v.shape[:2], v.dtype)
    _refuse_gradients(op, q=q, k=k, v=v, beta=beta, state=state, g=g)
    states = {"state": (state, (v.shape[1], k.shape[2], v.shape[2]))}
    tokens = _delta_tokens(q, k, v, beta, g, qk_l2norm)
    step = functools.partial(_delta, scale=k.shape[2] ** -0.5 if scale is None else scale)
    return _step(op, step, tokens, states, state_indices, v)


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
    """`memkernels.selective_scan_step` in plain torch: writes state in place."""
    op = "selective_scan_step"
    _check_channels(op, u, delta, A, B, C, D, z, delta_bias, ["B"])
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "state": state, "D": D, "z": z}
    _refuse_gradients(op, **given, delta_bias=delta_bias)
    tokens = _selective_tokens(u, delta, B, C, z, delta_bias, delta_softplus)
    states = {"state": (state, A.shape)}
    return _step(op, _selective(A, D), tokens, states, state_indices, u)


def causal_conv1d_step(
    x, weight, state, bias=None, state_indices=None, *, dilation=1, activation=None
):
    """`memkernels.causal_conv1d_step` in plain torch: writes state in place."""
    op = "causal_conv1d_step"
    length = _check_conv(op, x, weight, bias, dilation, activation, ["B"])
    _refuse_gradients(op, x=x, weight=weight, state=state, bias=bias)

    def step(x, state):
        out, state = _convolve(x[:, None], state, weight, bias, dilation, activation)
        return out[:, 0], state

    states = {"state": (state, (x.shape[1], length))}
    return _step(op, step, [x], states, state_indices, x, state_dtype=x.dtype)


# ---- of one token --------------------------------------------------------------------------------


def _linear(q, k, v, decay, state, z=None, *, scale, eps):
    state = decay[..., None] * state + k[..., None] * v[..., None, :]
    out = scale * (q[..., None] * state).sum(-2)
    if z is None:
        return out, state
    z = decay * z + k
    return out / (scale * (q * z).sum(-1, keepdim=True) + eps), state, z


def _delta(q, k, v, beta, decay, state, *, scale):
    state = decay[..., None] * state
    u = beta[..., None] * (v - (k[..., None] * state).sum(-2))
    state = state + k[..., None] * u[..., None, :]
    return scale * (q[..., None] * state).sum(-2), state


def _selective(A, D):
    def step(u, delta, B, C, gate, state):
        B, C = (x.repeat_interleave(len(A) // x.shape[-2], -2) for x in (B, C))
        state = _discretised(delta[..., None], A) * state + (delta * u)[..., None] * B
        out = (C * state).sum(-1)
        return (out if D is None else out + D * u) * gate, state

    return step


def _discretised(delta, A):
    """``exp(delta * A)``, whose derivative is 0 where A is -inf."""
    finite = A.clamp(min=torch.finfo(A.dtype).min)
    return (delta * finite).where(finite == A, (delta * A).detach()).exp()


def _convolve(x, state, weight, bias, dilation, activation):
    """Of all tokens ``[B, T, D]``."""
    inputs = torch.cat([state.mT, x], 1)
    wide, length = inputs.to(_attention._accumulator(x.dtype)), x.shape[1]
    weight = weight.to(wide.dtype)
    out = 0 if bias is None else bias.to(wide.dtype)
    for i, factors in enumerate(weight.unbind(1)):
        out = out + factors * wide[:, i * dilation : i * dilation + length]
    out = _ACTIVATIONS[activation or "none"](out)
    return out.to(x.dtype), inputs[:, length:].mT


# ---- of all tokens, in the dtype of sums ---------------------------------------------------------


def _every_head(q, k, v):
    """q, k and v, each of all value heads."""
    dtype, group = _attention._accumulator(v.dtype), v.shape[-2] // q.shape[-2]
    return *(x.to(dtype).repeat_interleave(group, -2) for x in (q, k)), v.to(dtype)


def _decay(g, v):
    """``[..., HV, 1 or K]``."""
    dtype = _attention._accumulator(v.dtype)
    if g is None:
        return v.new_ones((1,), dtype=dtype).expand(*v.shape[:-1], 1)
    decay = g.to(dtype).exp()
    return (decay if g.dim() == v.dim() else decay[..., None]).expand(*v.shape[:-1], -1)


def _delta_tokens(q, k, v, beta, g, qk_l2norm):
    q, k, values = _every_head(q, k, v)
    if qk_l2norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    return q, k, values, beta.to(values.dtype), _decay(g, v)


def _selective_tokens(u, delta, B, C, z, delta_bias, delta_softplus):
    dtype = _attention._accumulator(u.dtype)
    u, delta, B, C = (x.to(dtype) for x in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = torch.logaddexp(delta, delta.new_zeros(()))  # softplus is cut off
    gate = torch.ones_like(u) if z is None else torch.nn.functional.silu(z.to(dtype))
    return u, delta, B, C, gate


def _scan(step, tokens, states, bounds, like):
    """Moves states on along the tokens ``[B, T, ...]``; returns step's results, in the dtype of
    like ``[B, T, D...]``, and the last states.

    ``step(*token, *states)`` gives ``(result, *states)``; bounds are those of packed sequences.
    """
    tokens = list(zip(*(x.unbind(1) for x in tokens), strict=True))
    # Empty parts first: no tokens and no sequences have a shape, and a graph, too.
    outs, lasts = [like[:, :0]], [[state[:0] for state in states]]
    for part, mine in _parts(states, bounds):
        for token in tokens[part]:
            out, *mine = step(*token, *mine)
            outs.append(out.to(like.dtype)[:, None])
        lasts.append(mine)
    wide = _wide(like.dtype)
    return torch.cat(outs, 1), *(torch.cat(last).to(wide) for last in zip(*lasts, strict=True))


def _step(op, step, tokens, states, state_indices, like, state_dtype=None):
    """One token ``[B, ...]`` of those that have a slot, whose states are written.

    states has for each name the pool and what a slot's shape must be.
    """
    state_dtype = state_dtype or _wide(like.dtype)
    for name, (pool, shape) in states.items():
        alike = pool.dim() > 0 and pool.shape[1:] == shape and pool.dtype == state_dtype
        expected = f"{state_dtype} [slots, {str(list(shape))[1:]}"
        _check(op, alike, name, expected, _describe(pool))
        _check_written(op, **{name: pool})
    pools = [pool for pool, _ in states.values()]
    for name, pool in zip(states, pools, strict=True):
        _check(op, len(pool) == len(pools[0]), name, f"of {len(pools[0])} slots", len(pool))
    used, slots = _slots(op, state_indices, len(like), len(pools[0]))
    dtype = _attention._accumulator(state_dtype)
    mine = [pool[slots].to(dtype) for pool in pools]
    result, *mine = step(*(x[used] for x in tokens), *mine)
    for pool, state in zip(pools, mine, strict=True):
        pool[slots] = state.to(pool.dtype)
    out = torch.zeros_like(like)
    out[used] = result.to(out.dtype)
    return out


def _slots(op, state_indices, rows, count):
    """The rows that have a slot, and their slots."""
    if state_indices is None:
        _check(op, rows <= count, "state", f"of at least {rows} slots", count)
        return slice(rows), slice(rows)
    _check_index(op, "state_indices", state_indices)
    _check(op, len(state_indices) == rows, "state_indices", f"of {rows} rows", len(state_indices))
    index, inside = _checked(op, "state_indices", state_indices, count)
    slots = index[inside]
    _check_distinct(op, "state_indices", slots)
    return inside, slots


def _sequences(op, tokens, cu_seqlens):
    """How many there are, and the bounds of packed ones."""
    batch, length = tokens.shape[:2]
    if cu_seqlens is None:
        return batch, None
    _check(op, batch == 1, "cu_seqlens", "beside a batch of 1", f"one of {batch}")
    bounds = _offsets(op, "cu_seqlens", cu_seqlens, length)
    return len(bounds) - 1, bounds


def _parts(states, bounds):
    """The tokens that are scanned at once, and the states they begin with."""
    if bounds is None:
        return [(slice(None), states)]
    return [
        (slice(start, stop), [state[n : n + 1] for state in states])
        for n, (start, stop) in enumerate(pairwise(bounds))
    ]


def _initial(op, name, state, like, shape):
    """In the dtype of sums; zeros if there is none."""
    dtype = _attention._accumulator(like.dtype)
    if state is None:
        return like.new_zeros(shape, dtype=dtype)
    alike = state.shape == shape and state.dtype == _wide(like.dtype)
    _check(op, alike, name, f"{_wide(like.dtype)} {list(shape)}", _describe(state))
    return state.to(dtype)


# ---- checks --------------------------------------------------------------------------------------


def _refuse_gradients(op, **tensors):
    _no_gradient(op, **{name: t for name, t in tensors.items() if t is not None})


def _check_heads(op, q, k, v, g, leading):
    ndim = len(leading) + 2
    floating = q.dim() == ndim and q.is_floating_point()
    _check(op, floating, "q", f"floating [{', '.join(leading)}, H, K]", _describe(q))
    _check_some(op, "q", q)
    *sizes, heads, dim = q.shape
    alike = k.shape == q.shape and k.dtype == q.dtype
    _check(op, alike, "k", f"{q.dtype} {list(q.shape)}", _describe(k))
    alike = v.dim() == ndim and list(v.shape[:-2]) == sizes and v.dtype == q.dtype
    _check(op, alike, "v", f"{q.dtype} {[*sizes, 'HV', 'V']}", _describe(v))
    _check_some(op, "v", v)
    divides = heads > 0 and v.shape[-2] % heads == 0
    _check(op, divides, "v", f"of a multiple of {heads} heads", v.shape[-2])
    if g is not None:
        shapes = {1: v.shape[-2:-1], ndim: (*v.shape[:-1], dim)}
        _check_factors(op, "g", g, shapes.get(g.dim(), v.shape[:-1]), q.dtype)


def _check_channels(op, u, delta, A, B, C, D, z, delta_bias, leading):
    ndim = len(leading) + 1
    floating = u.dim() == ndim and u.is_floating_point()
    _check(op, floating, "u", f"floating [{', '.join(leading)}, D]", _describe(u))
    _check_some(op, "u", u)
    *sizes, channels = u.shape
    wide = _wide(u.dtype)
    alike = A.dim() == 2 and len(A) == channels and A.dtype == wide
    _check(op, alike, "A", f"{wide} [{channels}, S]", _describe(A))
    _check(op, 1 <= A.shape[1] <= 256, "A", "of 1 to 256 states", A.shape[1])
    alike = B.dim() == ndim + 1 and list(B.shape[:-2]) == sizes and B.shape[-1] == A.shape[1]
    alike = alike and B.dtype == u.dtype
    _check(op, alike, "B", f"{u.dtype} {[*sizes, 'G', A.shape[1]]}", _describe(B))
    groups = B.shape[-2]
    _check(op, groups > 0 and channels % groups == 0, "B", f"of groups of {channels}", groups)
    given = {"delta": (delta, u), "C": (C, B), "z": (z, u)}
    for name, (tensor, like) in given.items():
        alike = tensor is None or (tensor.shape == like.shape and tensor.dtype == like.dtype)
        _check(op, alike, name, _describe(like), None if alike else _describe(tensor))
    for name, tensor in {"D": D, "delta_bias": delta_bias}.items():
        if tensor is not None:
            alike = tensor.shape == (channels,) and tensor.dtype == wide
            _check(op, alike, name, f"{wide} [{channels}]", _describe(tensor))


def _check_conv(op, x, weight, bias, dilation, activation, leading):
    """Returns how many inputs a state holds."""
    floating = x.dim() == len(leading) + 1 and x.is_floating_point()
    _check(op, floating, "x", f"floating [{', '.join(leading)}, D]", _describe(x))
    _check_some(op, "x", x)
    channels = x.shape[-1]
    alike = weight.dim() == 2 and len(weight) == channels and 1 <= weight.shape[1] <= 16
    alike = alike and weight.dtype in (x.dtype, _wide(x.dtype))
    expected = f"{x.dtype} or {_wide(x.dtype)} [{channels}, 1 to 16]"
    _check(op, alike, "weight", expected, _describe(weight))
    if bias is not None:
        alike = bias.shape == (channels,) and bias.dtype == weight.dtype
        _check(op, alike, "bias", f"{weight.dtype} [{channels}]", _describe(bias))
    _check(op, 1 <= dilation < 2**31, "dilation", "from 1 to 2^31 - 1", dilation)
    known = activation in (None, "none", "silu")
    _check(op, known, "activation", "silu or none", activation)
    return (weight.shape[1] - 1) * dilation
