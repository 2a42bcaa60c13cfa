"""Lookup memories: a few rows of a large table for each token.

`product_key_topk` finds rows by two half keys, `ngram_hash` and `lsh_codes` compute where they lie,
`embedding_bag` adds them up, `sparse_ffn` uses them as the neurons of a network, `engram_gate` lets
a hidden state decide how much of them it takes. `row_sgd`, `row_adagrad` and `row_adam` change only
the rows that a gradient touches.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from memkernels import _library, fallback
from memkernels.attention import _lse_dtype


def product_key_topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of N * N product keys for each token and head (Lample et al., 2019).

    The key of slot ``i1 * N + i2`` is the i1-th key of the first half beside the i2-th of the
    second; its score is the sum of the halves' dot products with the query's halves. Exact: the k
    best pairs are made of the k best of each half.

    Args:
        query: ``[T, H, 2, Dk]``; float32, bfloat16, float16, or float64 on the CPU.
        keys: ``[H, 2, N, Dk]``, dtype of query, contiguous in the last dimension; N up to 65536.
        k: 1 to 128, at most N.

    Returns:
        scores ``[T, H, k]`` float32 (float64 for float64), falling, and indices ``[T, H, k]``
        int64. Of equal scores the lower index comes first; NaN and -inf are never found: where
        fewer than k are, -inf and -1.

    Differentiable once in query and keys, through the scores. Raises RuntimeError on arguments that
    contradict the above.
    """
    if _library.use_fallback(query, "product_key_topk", query, keys):
        return fallback.product_key_topk(query, keys, k)
    return _library.call(_product_key_topk, (query, keys), query, keys, k=k)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    *,
    per_sample_weights: Tensor | None = None,
    scales: Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """Sums of table rows, as ``torch.nn.functional.embedding_bag(mode="sum")``.

    The values of product-key memories (Lample et al., 2019; Berges et al., 2024), Engram tables
    (DeepSeek-AI, 2026), MemoryFormer tables and the decoders of sparse autoencoders. Accumulates in
    float32 (float64 for float64), in the order of the bag.

    Args:
        input: indices, ``[T, K]``, or flat ``[n]`` with offsets; int32 or int64. -1 is skipped.
        weight: ``[N, D]``; float32, bfloat16, float16, float64 on the CPU; or, without gradient,
            int8 or float8_e4m3fn with scales. Beside input on CUDA it and scales may be in pinned
            memory of the host, without gradient: rows are read in place, and what is in the memory
            must stay until the stream has run.
        offsets: ``[T]``, where each bag of a flat input begins; a bag may be empty.
        per_sample_weights: shape of input, float32 or the dtype of weight (float64 for float64).
        scales: ``[N, D / block]``, factors of blocks of a quantised row: float32, or uint8 holding
            e8m0 exponents.
        sparse: make the gradient of weight a coalesced sparse COO tensor of the rows that were
            read, as `memkernels.nn.RowAdam` takes. Not under torch.compile: its size depends on
            the indices.

    Returns:
        ``[T, D]`` in the dtype of weight; float32 for quantised weights.

    Differentiable once in weight and per_sample_weights; at -1 the latter's gradient is 0.
    Deterministic, duplicates included. Raises RuntimeError on arguments that contradict the above;
    an index outside the table is named with its place.
    """
    options = {"per_sample_weights": per_sample_weights, "scales": scales, "sparse": sparse}
    place = input if weight.is_cpu else weight
    if _library.use_fallback(place, "embedding_bag", weight, per_sample_weights):
        if weight.is_cpu and not input.is_cpu:
            raise RuntimeError("embedding_bag: weight is on the CPU, which needs CUDA kernels here")
        return fallback.embedding_bag(input, weight, offsets, **options)
    tensors = input, weight, offsets, per_sample_weights, scales
    return _library.call(_embedding_bag, tensors[1:], *tensors, sparse=sparse)


def embedding_bag_backward(
    grad: Tensor,
    input: Tensor,
    num_embeddings: int,
    offsets: Tensor | None = None,
    *,
    per_sample_weights: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | Tensor:
    """The gradient of `embedding_bag`'s weight as rows, which `row_adam` and its kin take; or added
    to a buffer, which several layers may share.

    Args:
        grad: ``[T, D]``, of the op's result.
        input, offsets, per_sample_weights: as they were in the forward.
        num_embeddings: N.
        out: ``[N, D]``, float32 or the dtype of grad (float64 for float64): what the gradient is
            added to, in place. Only rows that were read are touched.

    Returns:
        out, if it was given; else ``(rows [M], grads [M, D], count [1])`` with M the size of input:
        the different rows that were read, rising, int64, and -1 from ``count`` on; their gradients,
        float32 (float64 for float64), 0 there.

    Deterministic. Not differentiable. Raises RuntimeError on arguments that contradict the above;
    out is unchanged then.
    """
    if _library.use_fallback(grad, "embedding_bag_backward"):
        return fallback.embedding_bag_backward(
            grad, input, num_embeddings, offsets, per_sample_weights=per_sample_weights, out=out
        )
    tensors = grad, input, offsets, per_sample_weights
    if out is None:
        return _library.call(
            _embedding_bag_backward,
            (grad, per_sample_weights),
            *tensors,
            num_embeddings=num_embeddings,
        )
    if out.dim() < 1 or len(out) != num_embeddings:
        raise RuntimeError(
            f"embedding_bag_backward: out must have num_embeddings = {num_embeddings} rows, "
            f"got {list(out.shape)}"
        )
    _library.call_in_place(_embedding_bag_accumulate, (out,), out, *tensors)
    return out


def row_sgd(
    param: Tensor, rows: Tensor, grads: Tensor, count: Tensor, *, lr: float, weight_decay: float = 0
) -> None:
    """SGD on the rows of a table that have a gradient, in place: ``p -= lr * (g + decay * p)``.

    Args:
        param: ``[N, D]``; float32, bfloat16, float16, or float64 on the CPU.
        rows, grads, count: as `embedding_bag_backward` returns them; a row of -1 is skipped.

    Raises RuntimeError on arguments that contradict each other; nothing has changed then.
    """
    if _library.use_fallback(param, "row_sgd"):
        fallback.row_sgd(param, rows, grads, count, lr=lr, weight_decay=weight_decay)
        return
    _library.call_in_place(
        _row_sgd, (param,), param, rows, grads, count, lr=lr, weight_decay=weight_decay
    )


def row_adagrad(
    param: Tensor,
    sum: Tensor,
    rows: Tensor,
    grads: Tensor,
    count: Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
) -> None:
    """Adagrad (Duchi et al., 2011) on the rows of a table that have a gradient, in place.

    Args:
        param: as in `row_sgd`.
        sum: ``[N, D]`` or, one accumulator a row (the mean of its squares), ``[N]``; float32
            (float64 for float64).
        rows, grads, count: as in `row_sgd`.
    """
    if _library.use_fallback(param, "row_adagrad"):
        fallback.row_adagrad(param, sum, rows, grads, count, lr=lr, eps=eps)
        return
    _library.call_in_place(
        _row_adagrad, (param, sum), param, sum, rows, grads, count, lr=lr, eps=eps
    )


def row_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grads: Tensor,
    count: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
) -> None:
    """Adam (Kingma and Ba, 2015) on the rows of a table that have a gradient, in place.

    Moments of other rows do not decay (torch's SparseAdam); the bias correction is that of the
    global step. weight_decay is decoupled (AdamW).

    Args:
        param: as in `row_sgd`.
        exp_avg, exp_avg_sq: ``[N, D]``, float32 or the dtype of param (float64 for float64).
        rows, grads, count: as in `row_sgd`.
        step: of the optimiser, from 1 on.
    """
    options = {"step": step, "lr": lr, "eps": eps, "weight_decay": weight_decay}
    states = param, exp_avg, exp_avg_sq
    if _library.use_fallback(param, "row_adam"):
        fallback.row_adam(*states, rows, grads, count, betas=betas, **options)
        return
    beta1, beta2 = betas
    _library.call_in_place(
        _row_adam, states, *states, rows, grads, count, beta1=beta1, beta2=beta2, **options
    )


def ngram_hash(
    token_ids: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    *,
    orders: list[int],
    past_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
) -> Tensor:
    """Rows of hashed n-gram tables for each token (Engram, DeepSeek-AI, 2026).

    For order n: ``mix = xor over j < n of id[t - j] * multipliers[j]`` in wrapping int64, then
    ``mix mod moduli[h] + offsets[h]`` with the floored modulo (the sign of the modulus) for the
    heads of that order.

    Args:
        token_ids: ``[B, T]`` int32 or int64.
        multipliers: ``[max(orders)]`` int64.
        moduli, offsets: ``[len(orders) * heads]`` int64, the heads of the first order first; moduli
            are positive.
        orders: lengths of the n-grams, at least 1 each.
        past_ids: ``[N, max(orders) - 1]``, the ids before each sequence, the latest last; None:
            pad_id.
        cu_seqlens: ``[N + 1]`` with B = 1: sequences packed along T; else N = B.
        eos_id: an n-gram does not reach over it: ids before the latest eos among the earlier ids
            read as eos_id.
        pad_id: what stands before the beginning.

    Returns:
        ``[B, T, len(moduli)]`` int64. A negative id blocks the n-grams that hold it: -1.

    Bit-exact on every backend. Raises RuntimeError on arguments that contradict the above.
    """
    tensors = token_ids, multipliers, moduli, offsets, past_ids, cu_seqlens
    options = {"orders": orders, "eos_id": eos_id, "pad_id": pad_id}
    if _library.use_fallback(token_ids, "ngram_hash"):
        context = {"past_ids": past_ids, "cu_seqlens": cu_seqlens}
        return fallback.ngram_hash(*tensors[:4], **context, **options)
    return _library.call(_ngram_hash, (), *tensors, **options)


def engram_gate(
    hidden: Tensor, k: Tensor, v: Tensor, weight: Tensor, *, eps: float = 1e-6, sign: str = "zero"
) -> Tensor:
    """Gates a memory's value by how well its keys match the hidden states (Engram, DeepSeek-AI,
    2026).

    ``d = sum(rms_norm(hidden) * rms_norm(k) * weight) / sqrt(D)`` and
    ``g = sigmoid(sign(d) * sqrt(max(|d|, 1e-6)))`` for each of C channels; ``out = g * v``.

    Args:
        hidden, k: ``[T, C, D]``; float32, bfloat16, float16, or float64 on the CPU.
        v: ``[T, D]``, shared by the channels, dtype of hidden.
        weight: ``[C, D]``, the product of both norms' weights, float32 or the dtype of hidden.
        eps: of both norms.
        sign: of 0: "zero", or "copy" for that of the zero.

    Returns:
        ``[T, C, D]``, dtype of hidden.

    Differentiable once in hidden, k, v, weight; below 1e-6 no gradient passes ``d``.
    """
    tensors = hidden, k, v, weight
    if _library.use_fallback(hidden, "engram_gate", *tensors):
        return fallback.engram_gate(*tensors, eps=eps, sign=sign)
    return _library.call(_engram_gate, tensors, *tensors, eps=eps, sign=sign)


def lsh_codes(z: Tensor) -> tuple[Tensor, Tensor]:
    """Sign-bit addresses of hash tables, and how firmly they are held (MemoryFormer, Ding et al.,
    2024).

    ``code = sum_i [z_i >= 0] * 2 ** (bits - 1 - i)`` and
    ``score = sum_i |z_i| / prod_i (1 + exp(-2 |z_i|))``. The tables' read is `embedding_bag` with
    ``code + table * 2 ** bits`` as input and scores as weights.

    Args:
        z: ``[T, tables, bits]``, bits up to 30; float32, bfloat16, float16, or float64 on the CPU.

    Returns:
        codes ``[T, tables]`` int32, and scores ``[T, tables]`` float32 (float64 for float64).

    Differentiable once in z, through the scores.
    """
    if _library.use_fallback(z, "lsh_codes", z):
        return fallback.lsh_codes(z)
    return _library.call(_lsh_codes, (z,), z)


def sparse_ffn(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    indices: Tensor,
    weights: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """A feed-forward network of the neurons chosen for each token: PEER (He, 2024), and MLPs with
    known sparsity.

    ``y[t] = sum_j weights[t, j] * act(x[t] . up[i]) * down[i]`` with ``i = indices[t, j]``; no
    rows are copied together.

    Args:
        x: ``[T, D]``; float32, bfloat16, float16, or float64 on the CPU.
        up, down: ``[N, D]`` and ``[N, Dout]``, dtype of x.
        indices: ``[T, K]`` int32 or int64; -1 is skipped, a duplicate counts each time.
        weights: ``[T, K]``, float32 or the dtype of x; None: 1.
        activation: "gelu" (exact), "gelu_tanh", "silu", "relu" or "none".

    Returns:
        ``[T, Dout]``, dtype of x.

    Differentiable once in x, up, down, weights. Deterministic.
    """
    tensors = x, up, down, indices, weights
    if _library.use_fallback(x, "sparse_ffn", x, up, down, weights):
        return fallback.sparse_ffn(*tensors, activation=activation)
    return _library.call(_sparse_ffn, (x, up, down, weights), *tensors, activation=activation)


# ---- registrations -------------------------------------------------------------------------------

_ops = torch.ops.memkernels
_product_key_topk = _ops.product_key_topk.default
_embedding_bag = _ops.embedding_bag.default
_embedding_bag_backward = _ops.embedding_bag_backward.default
_embedding_bag_accumulate = _ops.embedding_bag_accumulate.default
_row_sgd = _ops.row_sgd.default
_row_adagrad = _ops.row_adagrad.default
_row_adam = _ops.row_adam.default
_ngram_hash = _ops.ngram_hash.default
_engram_gate = _ops.engram_gate.default
_lsh_codes = _ops.lsh_codes.default
_sparse_ffn = _ops.sparse_ffn.default

_lib = _library.library

for _op in ("embedding_bag_backward", "embedding_bag_dense", "embedding_bag_weights"):
    _library.not_differentiable(_op, "gradients are once differentiable")
_library.in_place("embedding_bag_accumulate", mutated=("out",))
_library.in_place("row_sgd", mutated=("param",))
_library.in_place("row_adagrad", mutated=("param", "sum"))
_library.in_place("row_adam", mutated=("param", "exp_avg", "exp_avg_sq"))


def _fake(op):
    return torch.library.register_fake(f"memkernels::{op}", lib=_lib)


@_fake("product_key_topk")
def _(query, keys, *, k):
    sizes = *query.shape[:2], k
    scores = query.new_empty(sizes, dtype=_lse_dtype(query.dtype))
    return scores, query.new_empty(sizes, dtype=torch.int64)


@_fake("embedding_bag")
def _(input, weight, offsets, per_sample_weights, scales, *, sparse=False):
    dtype = weight.dtype if scales is None else torch.float32
    num_bags = (input if offsets is None else offsets).shape[0]
    return weight.new_empty(num_bags, weight.shape[1], dtype=dtype, device=input.device)


@_fake("embedding_bag_backward")
def _(grad, input, offsets, per_sample_weights, *, num_embeddings):
    rows = input.new_empty(input.numel(), dtype=torch.int64)
    grads = grad.new_empty(input.numel(), grad.shape[1], dtype=_lse_dtype(grad.dtype))
    return rows, grads, rows.new_empty(1)


@_fake("embedding_bag_dense")
def _(grad, input, offsets, per_sample_weights, *, num_embeddings):
    return grad.new_empty(num_embeddings, grad.shape[1])


@_fake("embedding_bag_weights")
def _(grad, input, weight, offsets, scales):
    return grad.new_empty(input.shape, dtype=_lse_dtype(grad.dtype))


@_fake("ngram_hash")
def _(
    token_ids, multipliers, moduli, offsets, past_ids, cu_seqlens, *, orders, eos_id=None, pad_id=0
):
    return token_ids.new_empty((*token_ids.shape, moduli.shape[0]), dtype=torch.int64)


@_fake("engram_gate")
def _(hidden, k, v, weight, *, eps, sign):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@_fake("engram_gate_backward")
def _(dout, hidden, k, v, weight, *, needs, eps, sign):
    inputs = enumerate((hidden, k, v, weight))
    return tuple(t.new_empty(t.shape if needs >> bit & 1 else (0,)) for bit, t in inputs)


@_fake("lsh_codes")
def _(z):
    shape = z.shape[:2]
    return z.new_empty(shape, dtype=torch.int32), z.new_empty(shape, dtype=_lse_dtype(z.dtype))


@_fake("lsh_codes_backward")
def _(dscores, z):
    return z.new_empty(z.shape)


@_fake("sparse_ffn")
def _(x, up, down, indices, weights, *, activation):
    return x.new_empty(x.shape[0], down.shape[1])


@_fake("sparse_ffn_backward")
def _(dy, x, up, down, indices, weights, *, needs, activation):
    factors = x.new_empty((3, *indices.shape), dtype=_lse_dtype(x.dtype))
    dx = x.new_empty(x.shape if needs & 1 else (0,))
    return dx, *(factor.clone() for factor in factors)


for _op in ("embedding_bag_accumulate", "row_sgd", "row_adagrad", "row_adam"):
    _fake(_op)(lambda *args, **options: None)


def _product_key_context(ctx, inputs, keyword_only_inputs, output):
    indices = output[1]
    ctx.mark_non_differentiable(indices)
    query, keys = inputs
    ctx.save_for_backward(
        query if ctx.needs_input_grad[1] else None,
        keys if ctx.needs_input_grad[0] else None,
        indices,
    )
    ctx.query_shape, ctx.keys_shape = query.shape, keys.shape


def _product_key_gradient(ops, ctx, dscores, _):
    # Each half of a query is a bag of rows of its half keys.
    query, keys, indices = ctx.saved_tensors
    heads, halves, size, dim = ctx.keys_shape
    rows = torch.stack([indices // size, indices % size], 2)  # [T, H, 2, k]
    first = torch.arange(heads * halves, device=rows.device).view(heads, halves, 1) * size
    rows = torch.where(indices.unsqueeze(2) < 0, -1, rows + first).flatten(0, 2)
    factors = dscores.unsqueeze(2).expand(-1, -1, halves, -1).reshape(rows.shape)
    dquery = dkeys = None
    if ctx.needs_input_grad[0]:
        table = keys.reshape(-1, dim)
        dquery = ops.embedding_bag.default(rows, table, None, factors, None, sparse=False).view(
            ctx.query_shape
        )
    if ctx.needs_input_grad[1]:
        queries = query.reshape(-1, dim)
        dkeys = ops.embedding_bag_dense.default(
            queries, rows, None, factors, num_embeddings=heads * halves * size
        ).view(ctx.keys_shape)
    return dquery, dkeys


def _bag_context(ctx, inputs, keyword_only_inputs, output):
    if inputs[-1] is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[4]):
        raise RuntimeError(
            "embedding_bag: a quantised weight and its scales are not differentiable"
        )
    input, weight, offsets, per_sample_weights, scales = inputs
    if ctx.needs_input_grad[1] and weight.device != input.device:
        raise RuntimeError("embedding_bag: a weight in the host's memory is not differentiable")
    factors = (weight, scales) if ctx.needs_input_grad[3] else (None, None)
    rows = per_sample_weights if ctx.needs_input_grad[1] else None
    ctx.save_for_backward(input, offsets, rows, *factors)
    ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
    ctx.factor_dtype = None if per_sample_weights is None else per_sample_weights.dtype
    ctx.sparse = keyword_only_inputs["sparse"]


def _bag_backward(ops, ctx, grad):
    input, offsets, per_sample_weights, weight, scales = ctx.saved_tensors
    dweight = dfactors = None
    grad, num_embeddings = grad.contiguous(), ctx.weight_shape[0]
    if ctx.needs_input_grad[1]:
        tensors = grad, input, offsets, per_sample_weights
        if ctx.sparse:
            rows, grads, count = ops.embedding_bag_backward.default(
                *tensors, num_embeddings=num_embeddings
            )
            used = slice(int(count))
            dweight = torch.sparse_coo_tensor(
                rows[None, used],
                grads[used].to(ctx.weight_dtype),
                ctx.weight_shape,
                is_coalesced=True,
                check_invariants=False,
            )
        else:
            dweight = ops.embedding_bag_dense.default(*tensors, num_embeddings=num_embeddings)
    if ctx.needs_input_grad[3]:
        dfactors = ops.embedding_bag_weights.default(grad, input, weight, offsets, scales)
        dfactors = dfactors.to(ctx.factor_dtype)
    return None, dweight, None, dfactors, None


def _needs(ctx):
    """A bit for each input that needs a gradient."""
    return sum(1 << bit for bit, needed in enumerate(ctx.needs_input_grad) if needed)


def _gate_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _gate_gradient(ops, ctx, dout):
    needs = _needs(ctx)
    grads = ops.engram_gate_backward.default(
        dout.contiguous(), *ctx.saved_tensors, needs=needs, **ctx.options
    )
    return tuple(grad if needs >> bit & 1 else None for bit, grad in enumerate(grads))


def _codes_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(*inputs)


def _codes_gradient(ops, ctx, _, dscores):
    return ops.lsh_codes_backward.default(dscores.contiguous(), *ctx.saved_tensors)


def _ffn_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _ffn_gradient(ops, ctx, dy):
    # A neuron's rows gather tokens as a bag's gradient does; only the factors are its own.
    dy = dy.contiguous()
    x, up, down, indices, weights = ctx.saved_tensors
    dx, dweights, up_factors, down_factors = ops.sparse_ffn_backward.default(
        dy, *ctx.saved_tensors, needs=_needs(ctx), **ctx.options
    )
    dup = ddown = None
    if ctx.needs_input_grad[1]:
        dup = ops.embedding_bag_dense.default(
            x, indices, None, up_factors, num_embeddings=up.shape[0]
        )
    if ctx.needs_input_grad[2]:
        ddown = ops.embedding_bag_dense.default(
            dy, indices, None, down_factors, num_embeddings=down.shape[0]
        )
    dweights = None if weights is None else dweights.to(weights.dtype)
    return dx if ctx.needs_input_grad[0] else None, dup, ddown, None, dweights


def _register_autograd(namespace: str, lib) -> None:
    ops = getattr(torch.ops, namespace)
    for op, gradient, context in (
        ("product_key_topk", _product_key_gradient, _product_key_context),
        ("embedding_bag", _bag_backward, _bag_context),
        ("engram_gate", _gate_gradient, _gate_context),
        ("lsh_codes", _codes_gradient, _codes_context),
        ("sparse_ffn", _ffn_gradient, _ffn_context),
    ):
        gradient = functools.partial(gradient, ops)  # of the same namespace
        torch.library.register_autograd(
            f"{namespace}::{op}", gradient, setup_context=context, lib=lib
        )


_register_autograd("memkernels", _lib)
for _op in ("engram_gate", "lsh_codes", "sparse_ffn"):
    _library.once_differentiable(_op)


def _cast_all(dtype, *tensors, **options):
    return tuple(t.to(dtype) if _library.autocasts(t) else t for t in tensors), options


def _cast_factors(factors, dtype):
    """Factors beside tensors of that dtype: in it, or else in float32."""
    if factors is None or factors.dtype == dtype or not _library.autocasts(factors):
        return factors
    return factors.float()


def _cast_bag(dtype, input, weight, offsets, per_sample_weights, scales, **options):
    # The table stays as it is.
    per_sample_weights = _cast_factors(per_sample_weights, weight.dtype)
    return (input, weight, offsets, per_sample_weights, scales), options


def _cast_gate(dtype, hidden, k, v, weight, **options):
    (hidden, k, v), _ = _cast_all(dtype, hidden, k, v)
    return (hidden, k, v, _cast_factors(weight, dtype)), options


def _cast_ffn(dtype, x, up, down, indices, weights, **options):
    if _library.autocasts(x):
        x = x.to(up.dtype)
    return (x, up, down, indices, _cast_factors(weights, x.dtype)), options


_library.register_autocast("product_key_topk", _cast_all)
_library.register_autocast("embedding_bag", _cast_bag)
_library.register_autocast("engram_gate", _cast_gate)
_library.register_autocast("sparse_ffn", _cast_ffn)
