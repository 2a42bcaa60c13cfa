"""Lookup memories, one token, bag or row after the other."""

from __future__ import annotations

import math

import numpy as np


@np.errstate(invalid="ignore")  # infinite inputs make NaN, as they should
def product_key_topk(query, keys, k):
    """The k best of the ``N * N`` sums of a score of each half, best first.

    NaN and -inf are never found, of a half as of a pair. Each half is ranked by score, then index;
    a pair competes if its ranks, counted from 1, have a product of at most k, for otherwise k
    others precede it. Of equal scores the lower index comes first. That is the order of all pairs,
    except where infinities or rounding make equal what the halves tell apart.

    Args:
        query: ``[T, H, 2, Dk]``.
        keys: ``[H, 2, N, Dk]``.

    Returns:
        scores and indices ``i1 * N + i2``, both ``[T, H, k]``, float64 and int64; -inf and -1 where
        fewer are found.
    """
    query, keys = query.astype(np.float64), keys.astype(np.float64)
    num_tokens, num_heads = query.shape[:2]
    size = keys.shape[2]
    scores = np.full((num_tokens, num_heads, k), -np.inf)
    indices = np.full((num_tokens, num_heads, k), -1)
    for t, head in np.ndindex(num_tokens, num_heads):
        # Not a matrix product, which may round equal keys differently.
        first, second = (keys[head] * query[t, head, :, None]).sum(-1)
        best1, best2 = _ranked(first)[:k], _ranked(second)[:k]
        pairs = [
            (first[i1] + second[i2], i1 * size + i2)
            for rank1, i1 in enumerate(best1, 1)
            for i2 in best2[: k // rank1]
        ]
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        for j, (score, index) in enumerate(pairs[:k]):
            scores[t, head, j], indices[t, head, j] = score, index
    return scores, indices


@np.errstate(invalid="ignore")
def embedding_bag(
    input, weight, offsets=None, *, per_sample_weights=None, scales=None, sparse=False
):
    """Weighted sums of the rows that each bag lists; an index of -1 is skipped.

    Args:
        input: ``[T, K]``, or ``[n]`` with offsets.
        weight: ``[N, D]``; numbers of any kind.
        offsets: ``[T]``, where each bag begins; it ends where the next begins.
        per_sample_weights: shape of input; None means 1.
        scales: ``[N, D / block]`` factors of blocks; uint8 means ``2 ** (e - 127)``, 255 NaN.
        sparse: concerns the gradient, without meaning here.

    Returns:
        ``[T, D]`` float64; an empty bag gives 0.
    """
    weight = weight.astype(np.float64)
    if scales is not None:
        if scales.dtype == np.uint8:
            exponents = scales.astype(np.float64) - 127
            scales = np.where(scales == 255, np.nan, 2**exponents)
        weight = weight * scales.repeat(weight.shape[1] // scales.shape[1], axis=1)
    bags = _bags(input, offsets, per_sample_weights)
    out = np.zeros((len(bags), weight.shape[1]))
    for t, bag in enumerate(bags):
        for index, factor in bag:
            out[t] += factor * weight[index]
    return out


@np.errstate(invalid="ignore")
def embedding_bag_backward(
    grad, input, num_embeddings, offsets=None, *, per_sample_weights=None, out=None
):
    """The gradient of `embedding_bag`'s weight: the rows that were read, and what each receives.

    Args:
        grad: ``[T, D]``, of the result.
        input, offsets, per_sample_weights: as in `embedding_bag`.
        num_embeddings: N.
        out: ``[N, D]``, what the gradient is added to.

    Returns:
        out, a changed copy in float64; or ``(rows, grads, count)``: ``[M]`` int64, ``[M, D]``
        float64 and ``[1]`` int64, M being the size of input. The ``count`` different rows rise;
        then -1 and 0.
    """
    received = {}
    for t, bag in enumerate(_bags(input, offsets, per_sample_weights)):
        for index, factor in bag:
            received[index] = received.get(index, 0) + factor * grad[t].astype(np.float64)
    if out is not None:
        out = out.astype(np.float64)
        for index, total in received.items():
            out[index] += total
        return out
    rows = np.full(input.size, -1)
    grads = np.zeros((input.size, grad.shape[1]))
    for i, index in enumerate(sorted(received)):
        rows[i], grads[i] = index, received[index]
    return rows, grads, np.array([len(received)])


def row_sgd(param, rows, grads, count, *, lr, weight_decay=0):
    """The table after a step of SGD on some rows: ``p - lr * (g + decay * p)``.

    Args:
        param: ``[N, D]``.
        rows: ``[M]``, different ones; of the first ``count``, -1 is skipped.
        grads: ``[M, D]``.
        count: ``[1]``; what follows in rows and grads is not read.

    Returns:
        A changed copy in float64.
    """
    param = param.astype(np.float64)
    for row, grad in _steps(rows, grads, count):
        param[row] -= lr * (grad + weight_decay * param[row])
    return param


@np.errstate(invalid="ignore", divide="ignore")
def row_adagrad(param, sum, rows, grads, count, *, lr, eps=1e-10):
    """The table and its accumulator after a step of Adagrad on some rows.

    ``sum + g ** 2``, then ``p - lr * g / (sqrt(sum) + eps)``.

    Args:
        param, rows, grads, count: as in `row_sgd`.
        sum: ``[N, D]``; or ``[N]``, to which the mean of a row's squares is added.

    Returns:
        ``(param, sum)``: changed copies in float64.
    """
    param, sum = param.astype(np.float64), sum.astype(np.float64)
    for row, grad in _steps(rows, grads, count):
        sum[row] += grad**2 if sum.ndim == 2 else (grad**2).mean()
        param[row] -= lr * grad / (np.sqrt(sum[row]) + eps)
    return param, sum


@np.errstate(invalid="ignore", divide="ignore")
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
    """The table and its moments after a step of Adam on some rows.

    As in torch's AdamW: the row first shrinks by ``1 - lr * weight_decay``, and eps is added to
    the root of the corrected second moment. The moments of other rows stay as they are.

    Args:
        param, rows, grads, count: as in `row_sgd`.
        exp_avg, exp_avg_sq: ``[N, D]``.
        step: from 1 on, of all rows alike.

    Returns:
        ``(param, exp_avg, exp_avg_sq)``: changed copies in float64.
    """
    param, exp_avg = param.astype(np.float64), exp_avg.astype(np.float64)
    exp_avg_sq = exp_avg_sq.astype(np.float64)
    beta1, beta2 = betas
    for row, grad in _steps(rows, grads, count):
        exp_avg[row] = beta1 * exp_avg[row] + (1 - beta1) * grad
        exp_avg_sq[row] = beta2 * exp_avg_sq[row] + (1 - beta2) * grad**2
        mean = exp_avg[row] / (1 - beta1**step)
        root = np.sqrt(exp_avg_sq[row] / (1 - beta2**step))
        param[row] -= lr * weight_decay * param[row] + lr * mean / (root + eps)
    return param, exp_avg, exp_avg_sq


@np.errstate(over="ignore")  # int64 wraps round
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
    """Rows of hashed n-gram tables for each token: ``xor(id[t - j] * multipliers[j])`` over
    ``j < n``, wrapping, then ``% modulus + offset``, floored.

    The ids of an n-gram are found backwards from the token. Before the first token of a sequence
    stand its past_ids, or pad_id. Once one of the token's predecessors, past_ids included, is
    eos_id, all that precede it read as eos_id; the token's own eos_id hides nothing, and what
    stands before the first token is no eos unless it is that id. The rows of an n-gram with a
    negative id, as it reads after all this, are -1.

    Args:
        token_ids: ``[B, T]``.
        multipliers: ``[max(orders)]`` int64.
        moduli, offsets: ``[len(orders) * heads]`` int64, the heads of the first order first.
        past_ids: ``[N, max(orders) - 1]``, the latest last.
        cu_seqlens: ``[N + 1]``, with B = 1.

    Returns:
        ``[B, T, len(moduli)]`` int64.
    """
    batch, length = token_ids.shape
    reach, heads = max(orders) - 1, len(moduli) // len(orders)
    starts = np.arange(batch + 1) * length if cu_seqlens is None else cu_seqlens
    if past_ids is None:
        past_ids = np.full((len(starts) - 1, reach), pad_id)
    tokens = token_ids.reshape(-1).astype(np.int64)
    result = np.full((batch * length, len(moduli)), -1)
    for sequence, past in enumerate(past_ids):
        start, stop = starts[sequence], starts[sequence + 1]
        ids = np.concatenate([past.astype(np.int64), tokens[start:stop]])
        for t in range(stop - start):
            gram = ids[t : t + reach + 1][::-1].copy()  # the token, its predecessor, ...
            for j in range(1, reach):
                if gram[j] == eos_id:
                    gram[j + 1] = eos_id
            for i, order in enumerate(orders):
                if (gram[:order] >= 0).all():
                    mix = np.bitwise_xor.reduce(gram[:order] * multipliers[:order])
                    mine = slice(i * heads, (i + 1) * heads)
                    result[start + t, mine] = mix % moduli[mine] + offsets[mine]
    return result.reshape(batch, length, len(moduli))


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def engram_gate(hidden, k, v, weight, *, eps=1e-6, sign="zero"):
    """A memory's value times a gate for each channel: how well its key matches the hidden state.

    ``d = sum(rms_norm(hidden) * rms_norm(k) * weight) / sqrt(D)`` and
    ``gate = sigmoid(sign(d) * sqrt(max(|d|, 1e-6)))``.

    Args:
        hidden, k: ``[T, C, D]``.
        v: ``[T, D]``.
        weight: ``[C, D]``.
        eps: added to the mean of the squares.
        sign: "zero", where d is 0 the gate is a half; or "copy", it has the sign of that zero, as
            a rule positive: so is a sum of zeros of either sign.

    Returns:
        ``[T, C, D]`` float64.
    """
    hidden, k, v = (x.astype(np.float64) for x in (hidden, k, v))
    dim = hidden.shape[2]
    norms = [np.sqrt((x**2).sum(-1) / dim + eps) for x in (hidden, k)]
    d = (hidden * k * weight).sum(-1) / norms[0] / norms[1] / np.sqrt(dim)
    root = np.sqrt(np.maximum(np.abs(d), 1e-6))
    root = np.sign(d) * root if sign == "zero" else np.copysign(root, d)
    gate = 1 / (1 + np.exp(-root))
    return gate[..., None] * v[:, None]


def lsh_codes(z):
    """Sign bits as addresses, the first bit the highest, and how firmly they are held.

    ``code = sum_i [z_i >= 0] * 2 ** (bits - 1 - i)``, either zero counting as positive and NaN as
    negative; ``score = sum_i |z_i| / prod_i (1 + exp(-2 |z_i|))``.

    Args:
        z: ``[T, tables, bits]``.

    Returns:
        ``[T, tables]`` int32 and ``[T, tables]`` float64.
    """
    z = z.astype(np.float64)
    bits = z.shape[2]
    codes = ((z >= 0) * 2 ** np.arange(bits)[::-1]).sum(-1).astype(np.int32)
    size = np.abs(z)
    return codes, size.sum(-1) / (1 + np.exp(-2 * size)).prod(-1)


@np.errstate(invalid="ignore", over="ignore")
def sparse_ffn(x, up, down, indices, weights=None, *, activation="gelu"):
    """A network of the neurons listed for each token; -1 is skipped.

    ``y[t] = sum_j weights[t, j] * act(x[t] . up[i]) * down[i]`` with ``i = indices[t, j]``.

    Args:
        x: ``[T, D]``.
        up, down: ``[N, D]`` and ``[N, Dout]``.
        indices: ``[T, K]``.
        weights: ``[T, K]``; None means 1.
        activation: "gelu" (exact), "gelu_tanh", "silu", "relu" or "none".

    Returns:
        ``[T, Dout]`` float64.
    """
    x, up, down = (array.astype(np.float64) for array in (x, up, down))
    act = _ACTIVATIONS[activation]
    out = np.zeros((len(x), down.shape[1]))
    for t, listed in enumerate(_bags(indices, None, weights)):
        for i, factor in listed:
            out[t] += factor * act((x[t] * up[i]).sum()) * down[i]
    return out


_ACTIVATIONS = {
    "gelu": lambda h: h * (1 + math.erf(h / math.sqrt(2))) / 2,
    "gelu_tanh": lambda h: h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2,
    "silu": lambda h: h / (1 + np.exp(-h)),
    "relu": lambda h: np.maximum(h, 0),
    "none": lambda h: h,
}


def _ranked(scores):
    """Indices by score, then index, less NaN and -inf."""
    found = [i for i in range(len(scores)) if scores[i] > -np.inf]
    return sorted(found, key=lambda i: (-scores[i], i))


def _bags(input, offsets, factors):
    """For each bag its ``(index, factor)`` pairs, less those of -1."""
    factors = np.ones(input.shape) if factors is None else factors.astype(np.float64)
    if offsets is not None:
        input, factors = np.split(input, offsets)[1:], np.split(factors, offsets)[1:]
    return [
        [(int(i), f) for i, f in zip(indices, weights, strict=True) if i != -1]
        for indices, weights in zip(input, factors, strict=True)
    ]


def _steps(rows, grads, count):
    """The rows that change, each with its gradient."""
    for row, grad in zip(rows[: count[0]], grads, strict=False):
        if row != -1:
            yield row, grad.astype(np.float64)
