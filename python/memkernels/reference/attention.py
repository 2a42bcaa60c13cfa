"""Attention over cached keys and values, one softmax at a time, and what is done to caches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


@np.errstate(invalid="ignore")  # infinite inputs make NaN, as they should
def paged_attention(
    q,
    k_cache,
    v_cache,
    page_table=None,
    seq_lens=None,
    cu_seqlens_q=None,
    *,
    cu_seqlens_k=None,
    scale=None,
    causal=True,
    window=None,
    sink_tokens=0,
    softcap=0.0,
    key_bias=None,
    sink_logit=None,
    max_seqlen=None,
):
    """Attention of every query to the cached tokens of its sequence that it can see.

    Query ``i`` of the ``n`` of a sequence with ``L`` tokens sits at ``pos = L - n + i``. It sees
    token ``j`` iff ``j < L``, its page is present (not -1), its ``key_bias`` is not -inf,
    ``j <= pos`` if ``causal``, and ``pos - j < window or j < sink_tokens``.

    Args:
        q: ``[total_q, Hq, D]``.
        k_cache, v_cache: ``[num_pages, page_size, Hkv, D or Dv]`` with ``page_table``, packed
            ``[total_k, Hkv, D or Dv]`` with ``cu_seqlens_k``, else ``[B, Lmax, Hkv, D or Dv]``.
        page_table: ``[B, max_pages]``; -1 is an absent page.
        seq_lens: ``[B]``, tokens in the cache including the new ones; None means all ``Lmax``.
        cu_seqlens_q: ``[B + 1]``; None means one query a sequence.
        cu_seqlens_k: ``[B + 1]``.
        window: None, an int or ``[Hkv]``; counts the query itself.
        key_bias: ``k_cache.shape[:-1]``, added to the logits after ``softcap``.
        sink_logit: ``[Hq]``, one more logit with value zero.
        max_seqlen: a hint to the launcher, without meaning here.

    Returns:
        ``(out, lse)``: ``[total_q, Hq, Dv]`` and ``[total_q, Hq]`` (natural log), both float64.
    """
    windows = np.broadcast_to(np.inf if window is None else window, (k_cache.shape[-2],))

    def seen(row, kv_head, length, pos):
        j = np.arange(length)
        visible = (pos - j < windows[kv_head]) | (j < sink_tokens)
        return j[visible & (j <= pos)] if causal else j[visible]

    sequences = _sequences(q, k_cache, page_table, seq_lens, cu_seqlens_q, cu_seqlens_k)
    return _attention(q, k_cache, v_cache, sequences, seen, scale, softcap, key_bias, sink_logit)


@np.errstate(invalid="ignore")
def gather_attention(
    q,
    k_cache,
    v_cache,
    indices,
    page_table=None,
    seq_lens=None,
    cu_seqlens_q=None,
    *,
    unit="page",
    scale=None,
    causal=True,
    softcap=0.0,
    key_bias=None,
    sink_logit=None,
):
    """Attention of every query to the pages or tokens of its sequence that are listed for it.

    As `paged_attention`, but a query sees token ``j`` once for each time that it, or its page, is
    in the query's list; the conditions on ``j`` remain, less the window.

    Args:
        indices: ``[total_q, Hkv or 1, K]``, the n-th page or token of the sequence; -1 is skipped.
        page_table: None only with ``unit="token"``. Entries that are not listed mean nothing.
        unit: "page" or "token".

    Returns:
        ``(out, lse)``: ``[total_q, Hq, Dv]`` and ``[total_q, Hq]`` (natural log), both float64.
    """
    indices = np.broadcast_to(indices, (len(q), k_cache.shape[-2], indices.shape[-1]))
    size = k_cache.shape[1] if unit == "page" else 1

    def seen(row, kv_head, length, pos):
        listed = indices[row, kv_head].astype(np.int64)
        j = (listed[listed != -1, None] * size + np.arange(size)).ravel()
        return j[(j < length) & (j <= pos)] if causal else j[j < length]

    sequences = _sequences(q, k_cache, page_table, seq_lens, cu_seqlens_q)
    return _attention(q, k_cache, v_cache, sequences, seen, scale, softcap, key_bias, sink_logit)


def merge_states(outs, lses):
    """Attention over the union of ``n`` disjoint sets of keys, from the results over each.

    Args:
        outs: ``[n, T, H, D]``.
        lses: ``[n, T, H]``, natural log; a part with -inf contributes nothing, whatever its out
            holds.

    Returns:
        ``(out, lse)``: ``[T, H, D]`` and ``[T, H]``, both float64.
    """
    _, num_rows, num_heads, head_dim = outs.shape
    out = np.zeros((num_rows, num_heads, head_dim))
    lse = np.zeros((num_rows, num_heads))
    for t in range(num_rows):
        for head in range(num_heads):
            parts = lses[:, t, head] != -np.inf
            logits = lses[parts, t, head].astype(np.float64)
            out[t, head], lse[t, head] = _attend(logits, outs[parts, t, head].astype(np.float64))
    return out, lse


def append_kv(k, v, k_cache, v_cache, slot_mapping):
    """The caches after new tokens are written to their slots; the caches given stay as they are.

    Args:
        k, v: ``[T, Hkv, D]`` and ``[T, Hkv, Dv]``.
        k_cache, v_cache: ``[num_pages, page_size, Hkv, D or Dv]``.
        slot_mapping: ``[T]``, ``page * page_size + offset``; -1 skips the token.

    Returns:
        ``(k_cache, v_cache)``: changed copies, in the caches' own dtypes.
    """
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    page_size = k_cache.shape[1]
    for t, slot in enumerate(slot_mapping):
        if slot != -1:
            page, offset = divmod(int(slot), page_size)
            k_cache[page, offset] = k[t]
            v_cache[page, offset] = v[t]
    return k_cache, v_cache


def copy_pages(k_cache, v_cache, pairs):
    """The caches after pages are copied onto others; the caches given stay as they are.

    Args:
        k_cache, v_cache: ``[num_pages, page_size, Hkv, D or Dv]``.
        pairs: ``[n, 2]``, source and destination page; -1 in either skips the pair.

    Returns:
        ``(k_cache, v_cache)``: changed copies, in the caches' own dtypes.
    """
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    for source, destination in pairs:
        if source != -1 and destination != -1:
            k_cache[destination] = k_cache[source]
            v_cache[destination] = v_cache[source]
    return k_cache, v_cache


def compact_kv(k_cache, v_cache, page_table, seq_lens, keep):
    """The caches after the kept tokens of each sequence and head moved to its first positions.

    What lies at later positions of a sequence means nothing afterwards; here it stays.

    Args:
        k_cache, v_cache: ``[num_pages, page_size, Hkv, D or Dv]``.
        page_table: ``[B, max_pages]``.
        seq_lens: ``[B]``.
        keep: ``[B, Hkv or 1, K]``, tokens of the sequence, ascending, then -1; as many of each
            head.

    Returns:
        ``(k_cache, v_cache, new_seq_lens)``: changed copies and ``[B]``, in their own dtypes.
    """
    new_k, new_v, new_lens = k_cache.copy(), v_cache.copy(), seq_lens.copy()
    page_size, num_kv_heads = k_cache.shape[1:3]
    keep = np.broadcast_to(keep, (len(keep), num_kv_heads, keep.shape[-1]))
    for b, heads in enumerate(keep):
        for head, tokens in enumerate(heads):
            kept = tokens[tokens != -1]
            for target, token in enumerate(kept):
                to, at = page_table[b, target // page_size], target % page_size
                page, offset = page_table[b, token // page_size], token % page_size
                new_k[to, at, head] = k_cache[page, offset, head]
                new_v[to, at, head] = v_cache[page, offset, head]
            new_lens[b] = len(kept)
    return new_k, new_v, new_lens


def _attention(q, k_cache, v_cache, sequences, seen, scale, softcap, key_bias, sink_logit):
    """``(out, lse)``; ``seen(row, kv_head, length, pos)`` are the tokens that a query attends to.

    Of those, absent ones (see `_sequences`) and those with a ``key_bias`` of -inf are dropped.
    """
    total_q, num_heads, head_dim = q.shape
    group = num_heads // k_cache.shape[-2]
    if scale is None:
        scale = head_dim**-0.5
    keys, values = _flatten(k_cache, 3), _flatten(v_cache, 3)
    bias = None if key_bias is None else _flatten(key_bias, 2)

    out = np.zeros((total_q, num_heads, v_cache.shape[-1]))
    lse = np.full((total_q, num_heads), -np.inf)
    for first_row, num_rows, tokens in sequences:
        for i in range(num_rows):
            row, pos = first_row + i, len(tokens) - num_rows + i
            for head in range(num_heads):
                kv_head = head // group
                used = tokens[seen(row, kv_head, len(tokens), pos)]
                used = used[used >= 0]
                if bias is not None:
                    used = used[bias[used, kv_head] != -np.inf]
                logits = scale * (keys[used, kv_head] @ q[row, head].astype(np.float64))
                if softcap > 0:
                    logits = softcap * np.tanh(logits / softcap)
                if bias is not None:
                    logits = logits + bias[used, kv_head]
                row_values = values[used, kv_head]
                if sink_logit is not None:
                    logits = np.append(logits, sink_logit[head])
                    row_values = np.append(row_values, np.zeros((1, values.shape[2])), axis=0)
                out[row, head], lse[row, head] = _attend(logits, row_values)
    return out, lse


def _sequences(q, k_cache, page_table, seq_lens, cu_seqlens_q, cu_seqlens_k=None):
    """Yields ``(first_row, num_rows, tokens)`` for each sequence.

    ``tokens[j]`` is the place of cached token ``j`` in the cache with its leading dimensions
    flattened, -1 where its page is absent.
    """
    if cu_seqlens_k is not None:
        places = [np.arange(a, b) for a, b in pairwise(cu_seqlens_k)]
    elif page_table is None:
        batch, max_len = k_cache.shape[:2]
        lengths = np.full(batch, max_len) if seq_lens is None else seq_lens
        places = [b * max_len + np.arange(length) for b, length in enumerate(lengths)]
    else:
        page_size = k_cache.shape[1]
        places = []
        for row, length in zip(page_table.astype(np.int64), seq_lens, strict=True):
            j = np.arange(length)
            page = row[j // page_size]
            places.append(np.where(page == -1, -1, page * page_size + j % page_size))
    if cu_seqlens_q is None:
        cu_seqlens_q = np.arange(len(q) + 1)
    for tokens, (a, b) in zip(places, pairwise(cu_seqlens_q), strict=True):
        yield int(a), int(b - a), tokens


def _flatten(array, ndim):
    """Float64, with the dimensions that address a token (page and offset, ...) made one."""
    return array.reshape(-1, *array.shape[array.ndim - ndim + 1 :]).astype(np.float64)


def _attend(logits, values):
    """Softmax-weighted sum of ``values [n, D]`` and the logsumexp of ``logits [n]``."""
    top = logits.max(initial=-np.inf)
    if top == -np.inf:
        return np.zeros(values.shape[1]), -np.inf
    weights = np.exp(logits - top)
    total = weights.sum()
    return weights @ values / total, top + np.log(total)
