"""Attention over paged, contiguous and packed keys and values, one softmax at a time."""

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
    total_q, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[-2]
    group = num_heads // num_kv_heads
    if scale is None:
        scale = head_dim**-0.5
    windows = np.broadcast_to(np.inf if window is None else window, (num_kv_heads,))
    keys, values = _flatten(k_cache, 3), _flatten(v_cache, 3)
    bias = None if key_bias is None else _flatten(key_bias, 2)

    out = np.zeros((total_q, num_heads, v_cache.shape[-1]))
    lse = np.full((total_q, num_heads), -np.inf)
    sequences = _sequences(total_q, k_cache, page_table, seq_lens, cu_seqlens_q, cu_seqlens_k)
    for first_row, num_rows, tokens in sequences:
        length = len(tokens)
        j = np.arange(length)
        for i in range(num_rows):
            pos = length - num_rows + i
            for head in range(num_heads):
                kv_head = head // group
                visible = tokens >= 0
                if causal:
                    visible &= j <= pos
                visible &= (pos - j < windows[kv_head]) | (j < sink_tokens)
                if bias is not None:
                    visible[visible] = bias[tokens[visible], kv_head] != -np.inf
                used = tokens[visible]
                logits = scale * (keys[used, kv_head] @ q[first_row + i, head].astype(np.float64))
                if softcap > 0:
                    logits = softcap * np.tanh(logits / softcap)
                if bias is not None:
                    logits = logits + bias[used, kv_head]
                row_values = values[used, kv_head]
                if sink_logit is not None:
                    logits = np.append(logits, sink_logit[head])
                    row_values = np.append(row_values, np.zeros((1, values.shape[2])), axis=0)
                out[first_row + i, head], lse[first_row + i, head] = _attend(logits, row_values)
    return out, lse


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


def _sequences(total_q, k_cache, page_table, seq_lens, cu_seqlens_q, cu_seqlens_k):
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
        cu_seqlens_q = np.arange(total_q + 1)
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
