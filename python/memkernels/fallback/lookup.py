"""Lookup memories: product keys, hashes, sums of a table's rows, and what trains the table.

Indices are checked on the CPU, and the first wrong one is named with its place; on other devices
one that is out of range is skipped like -1. Rows are gathered: memory is proportional to what is
read. cu_seqlens is read on the host.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from memkernels.fallback import attention as _attention
from memkernels.fallback.attention import (
    _check,
    _check_distinct,
    _check_index,
    _describe,
    _no_gradient,
    _offsets,
)
from memkernels.fallback.selection import _check_range, _descending, _wide

_QUANTISED = (torch.int8, torch.float8_e4m3fn)

_ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
    "none": lambda h: h,
}


def product_key_topk(query, keys, k):
    """`memkernels.product_key_topk` in plain torch.

    Memory is proportional to tokens times keys. A matrix product may tell equal keys apart, if they
    are not integers: then not every tie goes to the lower index.
    """
    op = "product_key_topk"
    floating = query.dim() == 4 and query.shape[2] == 2 and query.is_floating_point()
    _check(op, floating, "query", "floating [T, H, 2, Dk]", _describe(query))
    _check_some(op, "query", query)
    num_heads, head_dim = query.shape[1], query.shape[3]
    alike = keys.dim() == 4 and keys.dtype == query.dtype
    alike = alike and (*keys.shape[:2], keys.shape[3]) == (num_heads, 2, head_dim)
    _check(op, alike, "keys", f"{query.dtype} [{num_heads}, 2, N, {head_dim}]", _describe(keys))
    size = keys.shape[2]
    _check(op, size <= 65536, "keys", "at most 65536 a half", size)
    most = min(size, 128)
    _check(op, 1 <= k <= most, "k", f"1 to {most}", k)

    dtype = _attention._accumulator(query.dtype)
    query, keys = query.to(dtype).permute(1, 2, 0, 3), keys.to(dtype)  # [H, 2, T or N, Dk]
    # Autocast would undo the choice of accumulator.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        halves = query @ keys.mT
    halves = halves.masked_fill(halves.isnan(), -torch.inf)
    order = _descending(halves)[..., :k]
    best = halves.gather(-1, order)
    # k pairs precede one of ranks whose product exceeds k.
    rank = torch.arange(1, k + 1, device=query.device)
    first, second = (rank[:, None] * rank <= k).nonzero(as_tuple=True)
    sums = best[:, 0][..., first] + best[:, 1][..., second]  # [H, T, pairs]
    index = order[:, 0][..., first] * size + order[:, 1][..., second]
    # The sum of both infinities is NaN.
    index = index.where(sums > -torch.inf, size * size)
    sums = sums.masked_fill(sums.isnan(), -torch.inf)
    index, rising = index.sort(-1)
    chosen = _descending(sums.gather(-1, rising))[..., :k]
    index = index.gather(-1, chosen).sort(-1).values  # [H, T, k], missing ones last
    found = index < size * size

    # Scores anew from the keys that were found: no gradient, nor a NaN in one, reaches others.
    index = index.where(found, 0)
    heads = torch.arange(num_heads, device=query.device)[:, None, None] * size
    values = 0
    for half, i in enumerate((index // size, index % size)):
        table = keys[:, half].flatten(0, 1)
        rows = table.index_select(0, (heads + i).flatten()).unflatten(0, i.shape)
        rows = rows.masked_fill(~found[..., None], 0)
        values = values + (query[:, half, :, None] * rows).sum(-1)
    values = values.masked_fill(~found, -torch.inf)
    order = _descending(values)
    values, index = values.gather(-1, order), index.where(found, -1).gather(-1, order)
    return values.transpose(0, 1).contiguous(), index.transpose(0, 1).contiguous()


def embedding_bag(
    input, weight, offsets=None, *, per_sample_weights=None, scales=None, sparse=False
):
    """`memkernels.embedding_bag` in plain torch."""
    op = "embedding_bag"
    quantised = weight.dtype in _QUANTISED
    # Of other floating types of one byte nothing is known.
    known = quantised or (weight.is_floating_point() and weight.itemsize > 1)
    expected = "floating, int8 or float8_e4m3fn [N, D]"
    _check(op, known and weight.dim() == 2, "weight", expected, _describe(weight))
    _check_some(op, "weight", weight)
    dtype = torch.float32 if quantised else weight.dtype
    index, bag, place = _read(op, input, offsets, len(weight))
    _check_factors(op, "per_sample_weights", per_sample_weights, input.shape, dtype)
    if scales is None:
        _check(op, not quantised, "scales", f"given with {weight.dtype}", None)
    else:
        _check(op, quantised, "scales", f"absent with {weight.dtype}", _describe(scales))
        _check_scales(op, scales, weight.shape)
        _no_gradient(op, weight=weight, scales=scales)

    # Each row is read once and listed afterwards, so that gradients of duplicates add up unrounded.
    rows, inverse = index.unique(return_inverse=True)
    table = _SparseRows.apply(weight, rows) if sparse else weight.index_select(0, rows)
    accumulator = _attention._accumulator(dtype)
    table = table.to(accumulator)
    if quantised:
        factors = scales.index_select(0, rows)
        if scales.dtype == torch.uint8:
            factors = factors.view(torch.float8_e8m0fnu)
        table = table * factors.to(accumulator).repeat_interleave(
            weight.shape[1] // scales.shape[1], 1
        )
    values = table.index_select(0, inverse)
    if per_sample_weights is not None:
        values = values * per_sample_weights.flatten()[place, None].to(accumulator)
    size = len(input if offsets is None else offsets)
    out = values.new_zeros(size, weight.shape[1]).index_add(0, bag, values)
    return out.to(dtype)


def embedding_bag_backward(
    grad, input, num_embeddings, offsets=None, *, per_sample_weights=None, out=None
):
    """`memkernels.embedding_bag_backward` in plain torch."""
    op = "embedding_bag_backward"
    _check(op, num_embeddings >= 0, "num_embeddings", "at least 0", num_embeddings)
    index, bag, place = _read(op, input, offsets, num_embeddings)
    size = len(input if offsets is None else offsets)
    alike = grad.dim() == 2 and len(grad) == size and grad.is_floating_point()
    _check(op, alike, "grad", f"floating [{size}, D]", _describe(grad))
    _check_some(op, "grad", grad)
    _check_factors(op, "per_sample_weights", per_sample_weights, input.shape, grad.dtype)
    _no_gradient(op, grad=grad)
    if out is not None:
        shape, dtypes = [num_embeddings, grad.shape[1]], (grad.dtype, _wide(grad.dtype))
        alike = list(out.shape) == shape and out.dtype in dtypes
        _check(op, alike, "out", f"{dtypes[0]} or {dtypes[1]} {shape}", _describe(out))
        _check_written(op, out=out)

    values = grad.to(_attention._accumulator(grad.dtype)).index_select(0, bag)
    if per_sample_weights is not None:
        _no_gradient(op, per_sample_weights=per_sample_weights)
        values = values * per_sample_weights.flatten()[place, None].to(values.dtype)
    rows, inverse = index.unique(return_inverse=True)
    if out is not None:
        total = values.new_zeros(len(rows), grad.shape[1]).index_add(0, inverse, values)
        out[rows] = (out[rows].to(total.dtype) + total).to(out.dtype)
        return out
    grads = values.new_zeros(input.numel(), grad.shape[1]).index_add(0, inverse, values)
    count = torch.tensor([len(rows)], device=rows.device)
    return functional.pad(rows, (0, len(grads) - len(rows)), value=-1), grads, count


def row_sgd(param, rows, grads, count, *, lr, weight_decay=0):
    """`memkernels.row_sgd` in plain torch: writes the table in place."""
    rows, grads = _steps("row_sgd", param, rows, grads, count)
    values = param[rows].to(grads.dtype)
    param[rows] = (values - lr * (grads + weight_decay * values)).to(param.dtype)


def row_adagrad(param, sum, rows, grads, count, *, lr, eps=1e-10):
    """`memkernels.row_adagrad` in plain torch: writes the table and its accumulator in place."""
    op = "row_adagrad"
    wide = _wide(param.dtype)
    alike = sum.shape in (param.shape, param.shape[:1]) and sum.dtype == wide
    expected = f"{wide} {list(param.shape)} or {list(param.shape[:1])}"
    _check(op, alike, "sum", expected, _describe(sum))
    _check_written(op, sum=sum)
    rows, grads = _steps(op, param, rows, grads, count)
    squares = grads.square()
    total = sum[rows] + (squares if sum.dim() == 2 else squares.mean(1))
    root = total.sqrt() if sum.dim() == 2 else total.sqrt()[:, None]
    param[rows] = (param[rows].to(grads.dtype) - lr * grads / (root + eps)).to(param.dtype)
    sum[rows] = total


def row_adam(
    param,
    exp_avg,
    exp_avg_sq,
    rows,
    grads,
    count,
    *,
    step,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0,
):
    """`memkernels.row_adam` in plain torch: writes the table and its moments in place."""
    op = "row_adam"
    for name, moment in ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq):
        dtypes = param.dtype, _wide(param.dtype)
        alike = moment.shape == param.shape and moment.dtype in dtypes
        expected = f"{dtypes[0]} or {dtypes[1]} {list(param.shape)}"
        _check(op, alike, name, expected, _describe(moment))
        _check_written(op, **{name: moment})
    _check(op, step >= 1, "step", "at least 1", step)
    _check(op, all(0 <= beta < 1 for beta in betas), "betas", "at least 0 and below 1", betas)
    rows, grads = _steps(op, param, rows, grads, count)
    beta1, beta2 = betas
    mean = beta1 * exp_avg[rows].to(grads.dtype) + (1 - beta1) * grads
    square = beta2 * exp_avg_sq[rows].to(grads.dtype) + (1 - beta2) * grads.square()
    root = (square / (1 - beta2**step)).sqrt() + eps
    values = param[rows].to(grads.dtype) * (1 - lr * weight_decay)
    param[rows] = (values - lr / (1 - beta1**step) * mean / root).to(param.dtype)
    exp_avg[rows] = mean.to(exp_avg.dtype)
    exp_avg_sq[rows] = square.to(exp_avg_sq.dtype)


def ngram_hash(
    token_ids,
    multipliers,
    moduli,
    offsets,
    *,
    orders,
    past_ids=None,
    cu_seqlens=None,
    eos_id=None,
    pad_id=0,
):
    """`memkernels.ngram_hash` in plain torch."""
    op = "ngram_hash"
    _check_index(op, "token_ids", token_ids, ndim=2)
    batch, length = token_ids.shape
    some = len(orders) > 0 and min(orders) >= 1
    _check(op, some, "orders", "one or more, each at least 1", orders)
    reach = max(orders) - 1
    alike = multipliers.shape == (reach + 1,) and multipliers.dtype == torch.int64
    _check(op, alike, "multipliers", f"torch.int64 [{reach + 1}]", _describe(multipliers))
    heads = moduli.numel() // len(orders)
    alike = moduli.shape == (len(orders) * heads,) and moduli.dtype == torch.int64 and heads > 0
    _check(op, alike, "moduli", f"torch.int64 [{len(orders)} * heads]", _describe(moduli))
    alike = offsets.shape == moduli.shape and offsets.dtype == torch.int64
    _check(op, alike, "offsets", f"torch.int64 {list(moduli.shape)}", _describe(offsets))
    _check_range(op, "moduli", moduli, 1, None)
    bounds = None
    if cu_seqlens is not None:
        _check(op, batch == 1, "token_ids", "[1, T] beside cu_seqlens", _describe(token_ids))
        bounds = list(pairwise(_offsets(op, "cu_seqlens", cu_seqlens, length)))
    sequences = batch if bounds is None else len(bounds)
    if past_ids is None:
        past_ids = token_ids.new_full((sequences, reach), pad_id, dtype=torch.long)
    _check_index(op, "past_ids", past_ids, ndim=2)
    alike = past_ids.shape == (sequences, reach)
    _check(op, alike, "past_ids", [sequences, reach], _describe(past_ids))

    past_ids, token_ids = past_ids.long(), token_ids.long()
    if bounds is None:
        grams = _grams(torch.cat([past_ids, token_ids], 1), length)
    else:
        parts = [
            _grams(torch.cat([past, token_ids[0, start:stop]])[None], stop - start)
            for past, (start, stop) in zip(past_ids, bounds, strict=True)
        ]
        grams = torch.cat([token_ids.new_empty(1, 0, reach + 1), *parts], 1)
    if eos_id is not None:
        earlier = grams[..., 1:]
        hidden = (earlier == eos_id).cumsum(-1) > 0
        grams = torch.cat([grams[..., :1], earlier.masked_fill(hidden, eos_id)], -1)
    # Elsewhere than on the CPU a modulus may be wrong; division by zero is not to happen.
    wrong = moduli < 1
    moduli = moduli.masked_fill(wrong, 1)
    products = grams * multipliers
    result = []
    for i, order in enumerate(orders):
        mix = products[..., 0]
        for j in range(1, order):
            mix = mix ^ products[..., j]
        mine = slice(i * heads, (i + 1) * heads)
        rows = mix[..., None] % moduli[mine] + offsets[mine]
        blocked = (grams[..., :order] < 0).any(-1, keepdim=True) | wrong[mine]
        result.append(rows.masked_fill(blocked, -1))
    return torch.cat(result, -1)


def engram_gate(hidden, k, v, weight, *, eps=1e-6, sign="zero"):
    """`memkernels.engram_gate` in plain torch."""
    op = "engram_gate"
    floating = hidden.dim() == 3 and hidden.is_floating_point()
    _check(op, floating, "hidden", "floating [T, C, D]", _describe(hidden))
    _check_some(op, "hidden", hidden)
    shape, dtype = hidden.shape, hidden.dtype
    alike = k.shape == shape and k.dtype == dtype
    _check(op, alike, "k", f"{dtype} {list(shape)}", _describe(k))
    alike = v.shape == (shape[0], shape[2]) and v.dtype == dtype
    _check(op, alike, "v", f"{dtype} {[shape[0], shape[2]]}", _describe(v))
    _check_factors(op, "weight", weight, shape[1:], dtype)
    _check(op, sign in ("zero", "copy"), "sign", "zero or copy", sign)

    accumulator = _attention._accumulator(dtype)
    hidden, k, v, weight = (x.to(accumulator) for x in (hidden, k, v, weight))
    hidden, k = (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() for x in (hidden, k))
    d = (hidden * k * weight).sum(-1) * shape[2] ** -0.5
    root = d.abs().clamp(min=1e-6).sqrt()
    root = d.sign() * root if sign == "zero" else root.copysign(d)
    return (root.sigmoid()[..., None] * v[:, None]).to(dtype)


def lsh_codes(z):
    """`memkernels.lsh_codes` in plain torch."""
    op = "lsh_codes"
    floating = z.dim() == 3 and z.is_floating_point()
    _check(op, floating, "z", "floating [T, tables, bits]", _describe(z))
    bits = z.shape[2]
    _check(op, 1 <= bits <= 30, "z", "of 1 to 30 bits", bits)
    powers = 2 ** torch.arange(bits - 1, -1, -1, device=z.device)
    codes = ((z >= 0) * powers).sum(-1).int()
    size = z.to(_attention._accumulator(z.dtype)).abs()
    # The sum stays outside the logarithm, which has no slope at 0.
    return codes, size.sum(-1) * (-functional.softplus(-2 * size).sum(-1)).exp()


def sparse_ffn(x, up, down, indices, weights=None, *, activation="gelu"):
    """`memkernels.sparse_ffn` in plain torch."""
    op = "sparse_ffn"
    _check(op, x.dim() == 2 and x.is_floating_point(), "x", "floating [T, D]", _describe(x))
    _check_some(op, "x", x)
    alike = up.dim() == 2 and up.shape[1] == x.shape[1] and up.dtype == x.dtype
    _check(op, alike, "up", f"{x.dtype} [N, {x.shape[1]}]", _describe(up))
    alike = down.dim() == 2 and len(down) == len(up) and down.dtype == x.dtype
    _check(op, alike, "down", f"{x.dtype} [{len(up)}, Dout]", _describe(down))
    _check_some(op, "down", down)
    _check_index(op, "indices", indices, ndim=2)
    _check_some(op, "indices", indices)
    alike = len(indices) == len(x)
    _check(op, alike, "indices", f"of {len(x)} rows", len(indices))
    _check_factors(op, "weights", weights, indices.shape, x.dtype)
    _check(op, activation in _ACTIVATIONS, "activation", " or ".join(_ACTIVATIONS), activation)

    index, inside = _checked(op, "indices", indices, len(up))
    token, column = inside.nonzero(as_tuple=True)
    rows, inverse = index[inside].unique(return_inverse=True)
    dtype = _attention._accumulator(x.dtype)
    up, down = (table.index_select(0, rows).to(dtype) for table in (up, down))
    tokens = x.to(dtype).index_select(0, token)
    hidden = (tokens * up.index_select(0, inverse)).sum(-1, keepdim=True)
    hidden = _ACTIVATIONS[activation](hidden)
    if weights is not None:
        hidden = hidden * weights[token, column, None].to(dtype)
    values = hidden * down.index_select(0, inverse)
    return values.new_zeros(len(x), down.shape[1]).index_add(0, token, values).to(x.dtype)


class _SparseRows(torch.autograd.Function):
    """Different rows of a table, rising, whose gradient is a coalesced tensor of these rows."""

    @staticmethod
    def forward(ctx, weight, rows):
        ctx.save_for_backward(rows)
        ctx.shape = weight.shape
        return weight.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        sparse = torch.sparse_coo_tensor(
            rows[None], grad, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return sparse, None


def _read(op, input, offsets, size):
    """What bags read: the indices, the bag of each, and its place in the flattened input."""
    _check_index(op, "input", input, ndim=2 if offsets is None else 1)
    if offsets is None:
        _check_some(op, "input", input)
    index, inside = _checked(op, "input", input, size)
    if offsets is None:
        bag = torch.arange(len(input), device=input.device)[:, None].expand_as(input)
    else:
        _check_index(op, "offsets", offsets)
        enough = len(offsets) > 0 or len(input) == 0
        _check(op, enough, "offsets", "of at least one bag", len(offsets))
        if offsets.is_cpu:
            starts = offsets.tolist()
            ascending = starts[:1] in ([], [0]) and starts == sorted(starts)
            ascending = ascending and all(start <= len(input) for start in starts[-1:])
            _check(op, ascending, "offsets", f"ascending from 0 to at most {len(input)}", starts)
        places = torch.arange(len(input), device=input.device)
        bag = torch.searchsorted(offsets.long(), places, right=True) - 1
        inside = inside & (bag >= 0)
    (place,) = inside.flatten().nonzero(as_tuple=True)
    return index.flatten()[place], bag.flatten()[place], place


def _checked(op, name, index, size):
    """Index as int64, and where it is in range and not -1; on the CPU, checked first."""
    index = index.long()
    inside = (index >= 0) & (index < size)
    if index.is_cpu:
        for place in ((index != -1) & ~inside).nonzero()[:1].tolist():
            wrong = f"{index[tuple(place)].item()} at {place}"
            _check(op, False, name, f"-1 or below {size}", wrong)
    return index, inside


def _check_written(op, **tensors):
    """What an op writes has no gradient, and no two elements in one place."""
    _no_gradient(op, **tensors)
    for name, tensor in tensors.items():
        expanded = any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        _check(
            op, not expanded, name, "without elements that overlap", f"strides {tensor.stride()}"
        )


def _check_some(op, name, tensor):
    _check(op, tensor.shape[-1] > 0, name, "of at least one column", _describe(tensor))


def _check_factors(op, name, factors, shape, dtype):
    """Factors that may be wider than what they belong to; None: there are none."""
    if factors is not None:
        dtypes = dtype, _wide(dtype)
        alike = factors.shape == shape and factors.dtype in dtypes
        expected = f"{dtypes[0]} or {dtypes[1]} {list(shape)}"
        _check(op, alike, name, expected, _describe(factors))


def _check_scales(op, scales, shape):
    alike = scales.dim() == 2 and len(scales) == shape[0]
    alike = alike and scales.shape[1] > 0 and shape[1] % scales.shape[1] == 0
    alike = alike and scales.dtype in (torch.float32, torch.uint8)
    expected = f"torch.float32 or torch.uint8 [{shape[0]}, {shape[1]} / block]"
    _check(op, alike, "scales", expected, _describe(scales))


def _steps(op, param, rows, grads, count):
    """The different rows that change, and their gradients in the accumulator's dtype."""
    floating = param.dim() == 2 and param.is_floating_point()
    _check(op, floating, "param", "floating [N, D]", _describe(param))
    _check_some(op, "param", param)
    _check_index(op, "rows", rows)
    wide, shape = _wide(param.dtype), (len(rows), param.shape[1])
    alike = grads.shape == shape and grads.dtype == wide
    _check(op, alike, "grads", f"{wide} {list(shape)}", _describe(grads))
    _check_index(op, "count", count)
    _check(op, len(count) == 1, "count", "of one entry", len(count))
    _check_range(op, "count", count, 0, len(rows))
    _no_gradient(op, grads=grads)
    _check_written(op, param=param)
    used = torch.arange(len(rows), device=rows.device) < count
    index, inside = _checked(op, "rows", rows.where(used, -1), len(param))
    index = index[inside]
    _check_distinct(op, "rows", index)
    return index, grads[inside].to(_attention._accumulator(grads.dtype))


def _grams(ids, length):
    """``[B, length, reach + 1]``: of ids ``[B, reach + length]`` each of the last, and those before
    it, the nearest first."""
    last = ids.shape[1] - length
    return torch.stack([ids[:, last - j : last - j + length] for j in range(last + 1)], -1)
