"""Selection of keys: pages and tokens by score, the attention keys receive, and what to forget.

Lengths and offsets of queries and caches are read on the host, once a call. Other integers are
checked on the CPU; on other devices an index that is out of range is skipped like -1.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from memkernels.fallback import attention as _attention
from memkernels.fallback.attention import (
    _check,
    _check_attention,
    _check_index,
    _check_window,
    _describe,
    _key_ranges,
    _no_gradient,
    _query_ranges,
    _resolve_pages,
    _valid_index,
    _visible,
)


def summarize_keys(k_cache, page_table, seq_lens, *, kind="minmax"):
    """`memkernels.summarize_keys` in plain torch."""
    op = "summarize_keys"
    _check(op, kind in ("minmax", "mean"), "kind", "minmax or mean", kind)
    _check_cache(op, k_cache)
    _no_gradient(op, k_cache=k_cache)
    pages, filled = _used_pages(op, page_table, seq_lens, *k_cache.shape[:2])
    return _summarize(k_cache, _page_fill(pages, filled, len(k_cache)), kind)


def update_summaries(summary, k_cache, page_table, seq_lens, num_new=1):
    """`memkernels.update_summaries` in plain torch: writes the summary in place."""
    op = "update_summaries"
    _check_cache(op, k_cache)
    _no_gradient(op, summary=summary, k_cache=k_cache)
    num_pages, page_size, num_heads, head_dim = k_cache.shape
    kind = "minmax" if summary.dim() == 4 else "mean"
    dtype = k_cache.dtype if kind == "minmax" else _wide(k_cache.dtype)
    shape = [num_pages, num_heads, *([2] if kind == "minmax" else []), head_dim]
    alike = list(summary.shape) == shape and summary.dtype == dtype and summary.is_contiguous()
    _check(op, alike, "summary", f"contiguous {dtype} {shape}", _describe(summary))
    pages, filled = _used_pages(op, page_table, seq_lens, num_pages, page_size)
    if isinstance(num_new, torch.Tensor):
        _check_index(op, "num_new", num_new)
        _check(op, len(num_new) == len(pages), "num_new", f"of {len(pages)} rows", len(num_new))
        _check_range(op, "num_new", num_new, 0, None)
        num_new = num_new[:, None]
    else:
        _check(op, num_new >= 0, "num_new", "at least 0", num_new)

    first = (seq_lens[:, None] - num_new).clamp(min=0) // page_size
    column = torch.arange(pages.shape[1], device=pages.device)
    touched = pages[(column >= first) & (filled > 0) & (num_new > 0)].unique()
    fill = _page_fill(pages, filled, num_pages)
    summary[touched] = _summarize(k_cache[touched], fill[touched], kind).to(summary.dtype)


def score_pages(
    q,
    summary,
    page_table,
    seq_lens,
    page_size,
    cu_seqlens_q=None,
    *,
    kind="minmax",
    group_reduce="max",
    causal=True,
    scale=None,
):
    """`memkernels.score_pages` in plain torch."""
    op = "score_pages"
    _check(op, kind in ("minmax", "mean"), "kind", "minmax or mean", kind)
    reduces = {"max": torch.amax, "mean": torch.mean, "sum": torch.sum}
    _check(op, group_reduce in reduces, "group_reduce", "max, mean or sum", group_reduce)
    _check(op, page_size >= 1, "page_size", "at least 1", page_size)
    floating = q.dim() == 3 and q.is_floating_point()
    _check(op, floating, "q", "floating [total_q, Hq, D]", _describe(q))
    head_dim = q.shape[2]
    vector = [2, head_dim] if kind == "minmax" else [head_dim]
    alike = summary.dim() == 2 + len(vector) and list(summary.shape[2:]) == vector
    wide = kind == "mean" and summary.dtype == _wide(q.dtype)
    alike = alike and (summary.dtype == q.dtype or wide)
    expected = f"{q.dtype} [num_pages, Hkv, {str(vector)[1:]}"
    _check(op, alike, "summary", expected, _describe(summary))
    _no_gradient(op, q=q, summary=summary)
    num_pages, num_kv_heads = summary.shape[:2]
    divides = num_kv_heads > 0 and q.shape[1] % num_kv_heads == 0 < q.shape[1]
    _check(op, divides, "q", f"of a multiple of {num_kv_heads} heads", q.shape[1])
    pages, filled = _used_pages(op, page_table, seq_lens, num_pages, page_size)
    queries = _query_ranges(op, len(q), len(pages), cu_seqlens_q)
    if scale is None:
        scale = head_dim**-0.5
    _check(op, math.isfinite(scale), "scale", "finite", scale)

    dtype = _attention._accumulator(q.dtype)
    q = q.to(dtype).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, group, total_q, D]
    if kind == "minmax":
        q = torch.cat([q.clamp(max=0), q.clamp(min=0)], -1)
    shape = (q.shape[2], num_kv_heads, pages.shape[1])
    result = torch.full(shape, -torch.inf, dtype=dtype, device=q.device)
    # Autocast would undo the choice of accumulator.
    with torch.autocast(q.device.type, enabled=False):
        for b, ((start, stop), length) in enumerate(zip(queries, seq_lens.tolist(), strict=True)):
            columns = filled[b].nonzero()[:, 0]
            vectors = summary[pages[b, columns]].to(dtype).flatten(2)  # [C, Hkv, D or 2 D]
            scores = scale * (q[:, :, start:stop] @ vectors.permute(1, 2, 0)[:, None])
            scores = reduces[group_reduce](scores, 1)  # [Hkv, n, C]
            pos = torch.arange(length - (stop - start), length, device=q.device)[:, None]
            visible = _visible(pos, columns * page_size, causal, None, 0)
            scores = scores.masked_fill(~visible, -torch.inf)
            result[start:stop, :, columns] = scores.transpose(0, 1)
    return result


def select_topk(scores, k, lengths=None, keep_first=0, keep_last=0, *, threshold=None):
    """`memkernels.select_topk` in plain torch."""
    op = "select_topk"
    floating = 1 <= scores.dim() <= 5 and scores.is_floating_point()
    _check(op, floating, "scores", "floating [..., N] of 1 to 5 dimensions", _describe(scores))
    _check(op, k >= 0, "k", "at least 0", k)
    _check_ends(op, keep_first, keep_last)
    enough = keep_first + keep_last <= k
    _check(op, enough, "k", f"at least keep_first + keep_last = {keep_first + keep_last}", k)
    size = scores.shape[-1]
    if lengths is None:
        lengths = torch.tensor(size, device=scores.device)
    integer = lengths.dtype in (torch.int32, torch.int64)
    _check(op, integer, "lengths", "int32 or int64", lengths.dtype)
    lengths = _broadcast(op, "lengths", lengths, scores.shape[:-1])
    _check_range(op, "lengths", lengths, 0, size)

    present, ends = _ends(lengths[..., None].clamp(0, size), size, keep_first, keep_last)
    candidate = present & (scores > -torch.inf)
    if threshold is not None:
        candidate &= scores.to(_wide(scores.dtype)) >= threshold
    return _best(scores, candidate.long().masked_fill(ends, 2), k, k)


def attention_colstats(
    q,
    k_cache,
    page_table,
    seq_lens,
    cu_seqlens_q,
    lse,
    *,
    reduce="sum",
    threshold=None,
    scale=None,
    causal=True,
    window=None,
    sink_tokens=0,
    softcap=0.0,
    key_bias=None,
    accumulate_into=None,
    decay=1.0,
):
    """`memkernels.attention_colstats` in plain torch; writes ``accumulate_into`` in place.

    Memory is proportional to queries times keys of the longest sequence.
    """
    op = "attention_colstats"
    _check_attention(op, q, k_cache, k_cache, softcap, key_bias, None)
    _check_window(op, k_cache.shape[-2], window, sink_tokens)
    _check(op, reduce in ("sum", "max", "count"), "reduce", "sum, max or count", reduce)
    alike = lse.shape == q.shape[:2] and lse.dtype == _wide(q.dtype)
    _check(op, alike, "lse", f"{_wide(q.dtype)} {list(q.shape[:2])}", _describe(lse))
    _no_gradient(op, q=q, k_cache=k_cache, lse=lse)
    if key_bias is not None:
        _no_gradient(op, key_bias=key_bias)
    keys = _key_ranges(op, k_cache, page_table, seq_lens)
    queries = _query_ranges(op, len(q), len(keys), cu_seqlens_q)
    num_kv_heads = k_cache.shape[2]
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    if accumulate_into is not None:
        shape, wide = accumulate_into.shape, _wide(q.dtype)
        alike = len(shape) == 3 and shape[:2] == (len(keys), num_kv_heads)
        alike = alike and shape[2] >= capacity and accumulate_into.dtype == wide
        expected = f"contiguous {wide} [{len(keys)}, {num_kv_heads}, at least {capacity}]"
        alike = alike and accumulate_into.is_contiguous()
        _check(op, alike, "accumulate_into", expected, _describe(accumulate_into))
        _no_gradient(op, accumulate_into=accumulate_into)
    if scale is None:
        scale = q.shape[-1] ** -0.5

    dtype = _attention._accumulator(q.dtype)
    groups = (num_kv_heads, q.shape[1] // num_kv_heads)
    result = torch.zeros(len(keys), num_kv_heads, capacity, dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for b, ((start, stop), (_, length)) in enumerate(zip(queries, keys, strict=True)):
            j = torch.arange(length, device=q.device)
            if page_table is None:
                place = (b, slice(0, length))
            else:
                j, place = _resolve_pages(op, j, page_table[b], k_cache)
            pos = torch.arange(length - (stop - start), length, device=q.device)[:, None]
            visible = _visible(pos, j, causal, window, sink_tokens)[:, None]
            rows = q[start:stop].to(dtype).unflatten(1, groups).permute(1, 2, 0, 3)
            logits = scale * (rows @ k_cache[place].to(dtype).permute(1, 2, 0)[:, None])
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            if key_bias is not None:
                bias = key_bias[place].to(dtype).T[:, None, None]
                logits = logits + bias
                visible = visible & (bias != -torch.inf)
            total = lse[start:stop].to(dtype).unflatten(1, groups).permute(1, 2, 0)[..., None]
            visible = visible & (total != -torch.inf)  # [Hkv, group, n, T]
            values = (logits - total).exp()
            if reduce == "count":
                # A position below 0 (more queries than tokens) has no share of its own.
                share = 1 / (pos + 1).clamp(min=1).to(dtype) if threshold is None else threshold
                values = (values >= share).to(dtype)
            values = values.masked_fill(~visible, 0).flatten(1, 2)
            # The maximum of no query is 0.
            values = pad(values, (0, 0, 0, 1)).amax(1) if reduce == "max" else values.sum(1)
            result[b][:, j] = values
    if accumulate_into is None:
        return result
    for b, (_, length) in enumerate(keys):
        old, new = accumulate_into[b, :, :length], result[b, :, :length]
        old.copy_(torch.maximum(decay * old, new) if reduce == "max" else decay * old + new)
    return accumulate_into


def evict(
    stats,
    seq_lens,
    budget,
    *,
    keep_first=0,
    keep_last=0,
    pinned=None,
    group="head",
    max_budget=None,
):
    """`memkernels.evict` in plain torch."""
    op = "evict"
    floating = stats.dim() == 3 and stats.is_floating_point()
    _check(op, floating, "stats", "floating [B, Hkv, L]", _describe(stats))
    _check(op, group in ("head", "sequence"), "group", "head or sequence", group)
    _check_ends(op, keep_first, keep_last)
    batch, _, size = stats.shape
    _check_index(op, "seq_lens", seq_lens)
    _check(op, len(seq_lens) == batch, "seq_lens", f"of {batch} sequences", len(seq_lens))
    _check_range(op, "seq_lens", seq_lens, 0, size)
    lengths = seq_lens.clamp(0, size)[:, None, None]
    if isinstance(budget, torch.Tensor):
        _check_index(op, "budget", budget)
        _check(op, len(budget) == batch, "budget", f"of {batch} sequences", len(budget))
        _check(op, max_budget is None or max_budget >= 0, "max_budget", "at least 0", max_budget)
        _check_range(op, "budget", budget, 0, max_budget)
        k = size if max_budget is None else max_budget
        budget = budget.clamp(0, k)[:, None, None]
    else:
        _check(op, budget >= 0, "budget", "at least 0", budget)
        k = budget
        budget = torch.tensor(budget, device=stats.device)
    count = torch.minimum(budget, lengths)
    present, ends = _ends(lengths, size, keep_first, keep_last)
    pins = torch.tensor(False, device=stats.device)
    if pinned is not None:
        _check(op, pinned.dtype == torch.bool, "pinned", torch.bool, pinned.dtype)
        pins = _broadcast(op, "pinned", pinned, stats.shape)
    if group == "sequence":
        heads = stats.to(_attention._accumulator(stats.dtype)).split(1, 1)
        # One head after the other, so that sums round alike everywhere.
        stats = sum(heads, torch.zeros_like(heads[0]))
        pins = pins if pinned is None else pins.any(1, keepdim=True)
    protected = present & (pins | ends)
    if stats.is_cpu:
        few = count[ends.sum(-1, keepdim=True) > count].tolist()
        least = f"at least keep_first + keep_last = {keep_first + keep_last}"
        _check(op, not few, "budget", least, few)
        needed = protected.sum(-1, keepdim=True)
        many = needed[needed > count].tolist()
        _check(op, not many, "pinned", "within the budget", f"{many} protected tokens")

    # NaN, numbers, pinned, ends. Among too many pinned ones nothing but the order counts.
    tier = (2 - stats.isnan().long()).masked_fill(protected, 3).masked_fill(ends, 4) * present
    return _best(stats.masked_fill(protected, torch.inf), tier, count, k)


def knn_topk(q, bank, valid_len, k, *, metric="dot", buckets=None):
    """`memkernels.knn_topk` in plain torch.

    Memory is proportional to queries times entries.
    """
    op = "knn_topk"
    _check(op, q.dim() == 3 and q.is_floating_point(), "q", "floating [Q, H, D]", _describe(q))
    num_heads, head_dim = q.shape[1:]
    alike = bank.dim() == 3 and bank.dtype == q.dtype
    alike = alike and (bank.shape[0], bank.shape[2]) == (num_heads, head_dim)
    _check(op, alike, "bank", f"{q.dtype} [{num_heads}, N, {head_dim}]", _describe(bank))
    _check(op, k >= 0, "k", "at least 0", k)
    _check(op, metric in ("dot", "cosine", "l2"), "metric", "dot, cosine or l2", metric)
    _check(op, buckets is None or buckets >= 1, "buckets", "at least 1", buckets)
    _no_gradient(op, q=q, bank=bank)
    size = bank.shape[1]
    if valid_len is None:
        valid_len = torch.full((num_heads,), size, device=q.device)
    _check_index(op, "valid_len", valid_len)
    alike = len(valid_len) == num_heads
    _check(op, alike, "valid_len", f"of {num_heads} heads", len(valid_len))
    _check_range(op, "valid_len", valid_len, 0, size)

    dtype = _attention._accumulator(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, bank = q.to(dtype).transpose(0, 1), bank.to(dtype)
        scores = q @ bank.mT  # [H, Q, N]
        q_square = q.square().sum(-1)[:, :, None]
        bank_square = bank.square().sum(-1)[:, None]
        if metric == "cosine":
            norms = q_square.sqrt() * bank_square.sqrt()
            scores = (scores / norms).masked_fill(norms == 0, 0)
        elif metric == "l2":
            scores = -(q_square - 2 * scores + bank_square).clamp(min=0)
    entry = torch.arange(size, device=q.device)
    absent = scores.isnan() | (entry >= valid_len[:, None, None])
    scores = scores.masked_fill(absent, -torch.inf)
    if buckets is not None and size > 0:
        buckets = min(buckets, size)
        table = pad(scores, (0, -size % buckets), value=-torch.inf).unflatten(-1, (-1, buckets))
        best = table.argmax(-2) * buckets + torch.arange(buckets, device=q.device)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, best, scores.gather(-1, best))
    order = _descending(scores)[..., :k]
    values = scores.gather(-1, order)
    index = order.where(values > -torch.inf, -1)
    missing = (0, k - index.shape[-1])
    values, index = pad(values, missing, value=-torch.inf), pad(index, missing, value=-1)
    values = -values if metric == "l2" else values
    return values.transpose(0, 1).contiguous(), index.transpose(0, 1).contiguous()


def indexer_scores(q, w, k, page_table=None, seq_lens=None, cu_seqlens_q=None, *, causal=True):
    """`memkernels.indexer_scores` in plain torch.

    Memory is proportional to queries times heads times keys of the longest sequence.
    """
    op = "indexer_scores"
    _check(op, q.dim() == 3 and q.is_floating_point(), "q", "floating [T, Hi, D]", _describe(q))
    alike = w.shape == q.shape[:2] and w.dtype in (q.dtype, _wide(q.dtype))
    _check(op, alike, "w", f"{q.dtype} or {_wide(q.dtype)} {list(q.shape[:2])}", _describe(w))
    alike = k.dim() in (2, 3) and k.dtype == q.dtype and k.shape[-1] == q.shape[2]
    expected = f"{q.dtype} [N, D], [B, Lmax, D] or [num_pages, page_size, D] with D {q.shape[2]}"
    _check(op, alike, "k", expected, _describe(k))
    if k.dim() == 2:
        absent = {"page_table": page_table, "seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q}
        for name, tensor in absent.items():
            _check(op, tensor is None, name, "absent with keys [N, D]", "given")
        k = k[None]
        queries = [(0, len(q))]
        keys = _key_ranges(op, k, None, None)
    else:
        keys = _key_ranges(op, k, page_table, seq_lens)
        queries = _query_ranges(op, len(q), len(keys), cu_seqlens_q)
    capacity = k.shape[1] * (1 if page_table is None else page_table.shape[1])

    dtype = _attention._accumulator(q.dtype)
    # An empty part first: a batch of no sequences has a shape, and a graph, too.
    parts = [q[:0].flatten(1).sum(1, keepdim=True, dtype=dtype).expand(-1, capacity)]
    with torch.autocast(q.device.type, enabled=False):
        for b, ((start, stop), (_, length)) in enumerate(zip(queries, keys, strict=True)):
            j = torch.arange(length, device=q.device)
            if page_table is None:
                place = (b, slice(0, length))
            else:
                j, place = _resolve_pages(op, j, page_table[b], k)
            pos = torch.arange(length - (stop - start), length, device=q.device)[:, None]
            visible = _visible(pos, j, causal, None, 0)[0]  # [n, L]
            # What no query sees must not reach a product: 0 * NaN is NaN.
            tokens = k[place].to(dtype).masked_fill(~visible.any(0)[:, None], 0)
            products = torch.relu(q[start:stop].to(dtype) @ tokens.mT)  # [n, Hi, L]
            scores = (w[start:stop, None].to(dtype) @ products)[:, 0]
            scores = scores.masked_fill(~visible, -torch.inf)
            row = scores.new_full((stop - start, capacity), -torch.inf)
            parts.append(row.index_copy(1, j, scores))
        return torch.cat(parts)


def _used_pages(op, page_table, seq_lens, num_pages, page_size):
    """Pages, and how many of their tokens count, both ``[B, max_pages]``; num_pages and 0: none."""
    cache = torch.empty(num_pages, page_size, device="meta")
    lengths = [length for _, length in _key_ranges(op, cache, page_table, seq_lens)]
    lengths = torch.tensor(lengths, dtype=torch.long, device=page_table.device)[:, None]
    begins = torch.arange(page_table.shape[1], device=page_table.device) * page_size
    filled = (lengths - begins).clamp(0, page_size)
    pages, valid = _valid_index(op, "page_table", page_table.where(filled > 0, -1), num_pages)
    return pages.where(valid, num_pages), filled.where(valid, 0)


def _page_fill(pages, filled, num_pages):
    """``[num_pages]``: how many tokens of a physical page count."""
    fill = filled.new_zeros(num_pages + 1)
    return fill.scatter_reduce(0, pages.flatten(), filled.flatten(), "amax")[:-1]


def _summarize(keys, fill, kind):
    """Summaries of the first ``fill [n]`` tokens of pages ``[n, page_size, Hkv, D]``."""
    offsets = torch.arange(keys.shape[1], device=keys.device)
    unused = (offsets >= fill[:, None])[..., None, None]
    if kind == "minmax":
        low = keys.masked_fill(unused, torch.inf).amin(1)
        high = keys.masked_fill(unused, -torch.inf).amax(1)
        return torch.stack([low, high], 2).masked_fill((fill == 0)[:, None, None, None], 0)
    keys = keys.to(_attention._accumulator(keys.dtype)).masked_fill(unused, 0)
    # One token after the other: the same bits whatever the strides and the number of pages.
    total = sum(keys.unbind(1))
    return total / fill.clamp(min=1)[:, None, None]


def _ends(lengths, size, keep_first, keep_last):
    """``[..., size]``: which indices lie within lengths ``[..., 1]``, and which at their ends."""
    index = torch.arange(size, device=lengths.device)
    present = index < lengths
    return present, present & ((index < keep_first) | (index >= lengths - keep_last))


def _best(scores, tier, count, k):
    """``[..., k]`` int32: the indices of the best ``count``, rising, then -1.

    A higher tier is better, then a higher score, then a lower index; tier 0 is never chosen.
    """
    size = scores.shape[-1]
    order = _descending(scores.masked_fill(scores.isnan(), -torch.inf))
    tier = tier.gather(-1, order)
    tier, again = tier.sort(dim=-1, descending=True, stable=True)
    chosen = (torch.arange(size, device=scores.device) < count) & (tier > 0)
    index = order.gather(-1, again).where(chosen, size).sort(-1).values[..., :k]
    index = pad(index, (0, k - index.shape[-1]), value=size)
    return index.masked_fill(index == size, -1).int()


def _descending(scores):
    """The order by score, then index."""
    # -0 + 0 is +0: not every sort takes them for equal.
    return (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices


def _wide(dtype):
    """The dtype of results and of what may be wider than its neighbours."""
    return torch.promote_types(dtype, torch.float32)


def _broadcast(op, name, tensor, shape):
    sizes = tensor.shape
    alike = len(sizes) <= len(shape)
    alike = alike and all(a in (1, b) for a, b in zip(sizes[::-1], shape[::-1], strict=False))
    _check(op, alike, name, f"of a shape that broadcasts to {list(shape)}", list(sizes))
    return tensor.expand(shape)


def _check_range(op, name, tensor, low, high):
    if tensor.is_cpu:
        outside = tensor < low if high is None else (tensor < low) | (tensor > high)
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        for wrong in tensor[outside].tolist():
            _check(op, False, name, expected, wrong)


def _check_ends(op, keep_first, keep_last):
    _check(op, keep_first >= 0, "keep_first", "at least 0", keep_first)
    _check(op, keep_last >= 0, "keep_last", "at least 0", keep_last)


def _check_cache(op, k_cache):
    floating = k_cache.dim() == 4 and k_cache.is_floating_point() and k_cache.shape[1] > 0
    expected = "floating [num_pages, page_size, Hkv, D]"
    _check(op, floating, "k_cache", expected, _describe(k_cache))
