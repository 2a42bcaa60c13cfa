"""Selection of keys: pages and tokens by score, the attention keys receive, and what to forget."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from memkernels.reference.attention import _flatten, _sequences


@np.errstate(invalid="ignore")  # infinite inputs make NaN, as they should
def summarize_keys(k_cache, page_table, seq_lens, *, kind="minmax"):
    """One summary of the keys of every page and head.

    A page counts as far as the longest of its sequences fills it; a page of none gives 0.

    Args:
        k_cache: ``[num_pages, page_size, Hkv, D]``.
        page_table: ``[B, max_pages]``; -1 is an absent page.
        seq_lens: ``[B]``.
        kind: "minmax" or "mean".

    Returns:
        ``[num_pages, Hkv, 2, D]`` in the cache's own dtype, minima first; or
        ``[num_pages, Hkv, D]`` float64.
    """
    num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
    fills = np.zeros(num_pages, np.int64)
    for pages, length in zip(page_table, seq_lens, strict=True):
        for column, page in _pages(pages, length, page_size):
            fills[page] = max(fills[page], min(page_size, length - column * page_size))
    if kind == "minmax":
        summary = np.zeros((num_pages, num_kv_heads, 2, head_dim), k_cache.dtype)
    else:
        summary = np.zeros((num_pages, num_kv_heads, head_dim))
    for page in np.flatnonzero(fills):
        keys = k_cache[page, : fills[page]]
        if kind == "minmax":
            summary[page] = np.stack([keys.min(0), keys.max(0)], axis=1)
        else:
            summary[page] = keys.astype(np.float64).mean(0)
    return summary


def update_summaries(summary, k_cache, page_table, seq_lens, num_new=1):
    """The summaries after tokens were appended; those given stay as they are.

    Every page that holds one of the last ``num_new`` tokens of a sequence is summarized anew.

    Args:
        summary: of either kind, as `summarize_keys` returns it.
        num_new: a number or ``[B]``.

    Returns:
        A changed copy, in the dtype of `summarize_keys`.
    """
    kind = "minmax" if summary.ndim == 4 else "mean"
    fresh = summarize_keys(k_cache, page_table, seq_lens, kind=kind)
    summary = summary.astype(fresh.dtype)
    page_size = k_cache.shape[1]
    num_new = np.broadcast_to(num_new, (len(seq_lens),))
    for pages, length, new in zip(page_table, seq_lens, num_new, strict=True):
        for column, page in _pages(pages, length, page_size):
            if length - new < (column + 1) * page_size and new > 0:
                summary[page] = fresh[page]
    return summary


@np.errstate(invalid="ignore")
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
    """Scores of every page of a sequence for each of its queries.

    Query ``i`` of the ``n`` of a sequence with ``L`` tokens sits at ``pos = L - n + i``. It sees
    the page that begins at token ``j`` iff ``j < L``, the page is present (not -1), and
    ``j <= pos`` if ``causal``.

    Args:
        q: ``[total_q, Hq, D]``.
        summary: ``[num_pages, Hkv, 2, D]`` or ``[num_pages, Hkv, D]``.
        page_table: ``[B, max_pages]``; -1 is an absent page.
        seq_lens: ``[B]``.
        cu_seqlens_q: ``[B + 1]``; None means one query a sequence.
        kind: "minmax", ``min(q, 0).min + max(q, 0).max``, or "mean", ``q.mean``.
        group_reduce: "max", "mean" or "sum" over the query heads of a group.

    Returns:
        ``[total_q, Hkv, max_pages]`` float64, -inf for pages that the query does not see.
    """
    num_kv_heads = summary.shape[1]
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if cu_seqlens_q is None:
        cu_seqlens_q = np.arange(len(q) + 1)
    reduce = {"max": np.max, "mean": np.mean, "sum": np.sum}[group_reduce]
    q, summary = q.astype(np.float64), summary.astype(np.float64)

    scores = np.full((len(q), num_kv_heads, page_table.shape[1]), -np.inf)
    for b, (start, stop) in enumerate(pairwise(cu_seqlens_q)):
        for row in range(start, stop):
            pos = seq_lens[b] - stop + row
            heads = q[row].reshape(num_kv_heads, -1, q.shape[-1])  # [Hkv, group, D]
            for column, page in _pages(page_table[b], seq_lens[b], page_size):
                if causal and column * page_size > pos:
                    continue
                for kv_head, vectors in enumerate(heads):
                    if kind == "minmax":
                        low, high = summary[page, kv_head]
                        products = np.minimum(vectors, 0) @ low + np.maximum(vectors, 0) @ high
                    else:
                        products = vectors @ summary[page, kv_head]
                    scores[row, kv_head, column] = reduce(scale * products)
    return scores


def select_topk(scores, k, lengths=None, keep_first=0, keep_last=0, *, threshold=None):
    """Indices of the k largest scores of each row.

    Of equal scores the lower index is selected; NaN and -inf never are.

    Args:
        scores: ``[..., N]``.
        lengths: broadcasts to ``[...]``; None means N.
        keep_first, keep_last: at the ends of each row's length, selected whatever their scores.
        threshold: the others are selected only if they reach it.

    Returns:
        ``[..., k]`` int32, rising, then -1.
    """
    lengths = np.broadcast_to(scores.shape[-1] if lengths is None else lengths, scores.shape[:-1])
    least = -np.inf if threshold is None else threshold
    selected = np.full((*scores.shape[:-1], k), -1, np.int32)
    for row in np.ndindex(lengths.shape):
        values, length = scores[row], lengths[row]
        kept = _ends(length, keep_first, keep_last)
        others = [
            i for i in range(length) if i not in kept and values[i] > -np.inf and values[i] >= least
        ]
        others.sort(key=lambda i, values=values: (-values[i], i))
        chosen = sorted([*kept, *others[: k - len(kept)]])
        selected[row][: len(chosen)] = chosen
    return selected


@np.errstate(invalid="ignore")
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
    """The attention each key receives: ``exp(logit - lse)``, reduced over queries and group heads.

    Logits and what is visible are those of `paged_attention`; a query with an lse of -inf gives
    nothing.

    Args:
        lse: ``[total_q, Hq]``.
        reduce: "sum", "max" or "count" of those that reach the threshold.
        threshold: None means ``1 / (pos + 1)``, with ``pos`` at least 0.
        accumulate_into: ``[B, Hkv, >= Lmax]``, what earlier calls returned.
        decay: factor on that.

    Returns:
        ``[B, Hkv, Lmax]`` float64, 0 where nothing arrives; or a copy of ``accumulate_into`` in
        float64, changed within each sequence's length to ``decay * old + new``, or
        ``max(decay * old, new)``.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[2]
    if scale is None:
        scale = head_dim**-0.5
    windows = np.broadcast_to(np.inf if window is None else window, (num_kv_heads,))
    keys = _flatten(k_cache, 3)
    bias = np.zeros(keys.shape[:2]) if key_bias is None else _flatten(key_bias, 2)
    batch, capacity = k_cache.shape[:2]
    if page_table is not None:
        batch, capacity = len(page_table), page_table.shape[1] * k_cache.shape[1]

    stats = np.zeros((batch, num_kv_heads, capacity))
    result = stats if accumulate_into is None else accumulate_into.astype(np.float64)
    sequences = _sequences(q, k_cache, page_table, seq_lens, cu_seqlens_q)
    for b, (first_row, num_rows, tokens) in enumerate(sequences):
        length = len(tokens)
        for i in range(num_rows):
            row, pos = first_row + i, length - num_rows + i
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                if lse[row, head] == -np.inf:
                    continue
                j = np.flatnonzero(tokens >= 0)
                j = j[(pos - j < windows[kv_head]) | (j < sink_tokens)]
                if causal:
                    j = j[j <= pos]
                j = j[bias[tokens[j], kv_head] != -np.inf]
                used = tokens[j]
                logits = scale * (keys[used, kv_head] @ q[row, head].astype(np.float64))
                if softcap > 0:
                    logits = softcap * np.tanh(logits / softcap)
                received = np.exp(logits + bias[used, kv_head] - lse[row, head])
                column = stats[b, kv_head]
                if reduce == "max":
                    column[j] = np.maximum(column[j], received)
                elif reduce == "sum":
                    column[j] += received
                else:
                    share = 1 / max(pos + 1, 1) if threshold is None else threshold
                    column[j] += received >= share
        if accumulate_into is not None:
            old, new = decay * result[b, :, :length], stats[b, :, :length]
            result[b, :, :length] = np.maximum(old, new) if reduce == "max" else old + new
    return result


@np.errstate(invalid="ignore")
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
    """The tokens that each head keeps: ``min(budget, L)``, the protected ones and the largest.

    Of equal statistics the earlier token is kept; NaN ranks below -inf.

    Args:
        stats: ``[B, Hkv, L]``.
        seq_lens: ``[B]``.
        budget: a number or ``[B]``.
        keep_first, keep_last: protected tokens at the ends of each sequence.
        pinned: bools that broadcast to ``[B, Hkv, L]``, more protected tokens. The first stay if
            they are too many.
        group: "head", or "sequence": statistics are added and tokens pinned over the heads.
        max_budget: size of the result beside a budget ``[B]``; None means ``L``.

    Returns:
        ``[B, Hkv or 1, K]`` int32, rising, then -1.
    """
    pinned = np.broadcast_to(pinned is not None and pinned, stats.shape)
    if group == "sequence":
        stats = stats.sum(1, keepdims=True, dtype=np.float64)
        pinned = pinned.any(1, keepdims=True)
    if np.ndim(budget) == 0:
        size = int(budget)
    else:
        size = stats.shape[2] if max_budget is None else max_budget
    budget = np.broadcast_to(budget, (len(stats),))

    keep = np.full((*stats.shape[:2], size), -1, np.int32)
    for b, head in np.ndindex(keep.shape[:2]):
        ends = _ends(seq_lens[b], keep_first, keep_last)

        def rank(token, ends=ends, pins=pinned[b, head], values=stats[b, head]):
            if token in ends:
                return 0, 0, token
            if pins[token]:
                return 1, 0, token
            if np.isnan(values[token]):
                return 3, 0, token
            return 2, -values[token], token

        kept = sorted(sorted(range(seq_lens[b]), key=rank)[: budget[b]])
        keep[b, head, : len(kept)] = kept
    return keep


@np.errstate(invalid="ignore", divide="ignore")
def knn_topk(q, bank, valid_len, k, *, metric="dot", buckets=None):
    """The k nearest entries of a bank for each query and head, best first.

    Of equal scores the lower index comes first; NaN and -inf (inf for "l2") are never found.

    Args:
        q: ``[Q, H, D]``.
        bank: ``[H, N, D]``.
        valid_len: ``[H]``, entries that count; None means N.
        metric: "dot", "cosine" (0 where a norm is 0) or "l2", the squared distance.
        buckets: only the best entry of each ``i % buckets`` competes.

    Returns:
        values and indices ``[Q, H, k]``, float64 and int64; -inf (inf for "l2") and -1 where fewer
        are found.
    """
    q, bank = q.astype(np.float64), bank.astype(np.float64)
    num_heads, size, _ = bank.shape
    valid_len = np.broadcast_to(size if valid_len is None else valid_len, (num_heads,))
    sign = -1 if metric == "l2" else 1
    values = np.full((*q.shape[:2], k), -sign * np.inf)
    indices = np.full((*q.shape[:2], k), -1)
    for t, head in np.ndindex(q.shape[:2]):
        query, entries = q[t, head], bank[head, : valid_len[head]]
        scores = entries @ query
        squares = (entries**2).sum(1)
        if metric == "cosine":
            norms = np.sqrt(squares) * np.sqrt((query**2).sum())
            scores = np.where(norms == 0, 0, scores / norms)
        elif metric == "l2":
            scores = -np.maximum((query**2).sum() - 2 * scores + squares, 0)
        found = [i for i in range(len(scores)) if scores[i] > -np.inf]
        found.sort(key=lambda i, scores=scores: (-scores[i], i))
        if buckets is not None:
            best = {}
            for i in found:
                best.setdefault(i % buckets, i)
            found = list(best.values())
        found = found[:k]
        values[t, head, : len(found)] = sign * scores[found]
        indices[t, head, : len(found)] = found
    return values, indices


@np.errstate(invalid="ignore")
def indexer_scores(q, w, k, page_table=None, seq_lens=None, cu_seqlens_q=None, *, causal=True):
    """Scores of tokens: ``I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])``.

    A query sees token ``j`` as in `paged_attention`: ``j < L``, its page is present, and
    ``j <= pos`` if ``causal``.

    Args:
        q: ``[T, Hi, D]``.
        w: ``[T, Hi]``.
        k: ``[N, D]`` for one sequence, ``[num_pages, page_size, D]`` with ``page_table``, else
            ``[B, Lmax, D]``.

    Returns:
        ``[T, N]`` float64, N being ``max_pages * page_size`` or ``Lmax``; -inf for what the query
        does not see.
    """
    if k.ndim == 2:
        k, cu_seqlens_q = k[None], np.array([0, len(q)])
    capacity = k.shape[1] * (1 if page_table is None else page_table.shape[1])
    keys = _flatten(k, 2)
    q, w = q.astype(np.float64), w.astype(np.float64)

    scores = np.full((len(q), capacity), -np.inf)
    for first_row, num_rows, tokens in _sequences(q, k, page_table, seq_lens, cu_seqlens_q):
        for i in range(num_rows):
            row, pos = first_row + i, len(tokens) - num_rows + i
            j = np.flatnonzero(tokens >= 0)
            if causal:
                j = j[j <= pos]
            products = keys[tokens[j]] @ q[row].T  # [visible, Hi]
            scores[row, j] = np.maximum(products, 0) @ w[row]
    return scores


def _pages(pages, length, page_size):
    """``(column, page)`` of the pages that a sequence uses, less absent ones."""
    used = pages[: -(-length // page_size)]
    return [(column, page) for column, page in enumerate(used) if page != -1]


def _ends(length, keep_first, keep_last):
    """The protected indices of a row."""
    return {i for i in range(length) if i < keep_first or i >= length - keep_last}
