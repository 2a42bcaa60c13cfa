"""Attention over cached keys and values, one sequence at a time, and what is done to caches.

Lengths and offsets are read on the host, once a call. Indices are checked on the CPU; on other
devices one that is out of range is skipped like -1.
"""

from __future__ import annotations

from itertools import pairwise

import torch


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
    """`memkernels.paged_attention` in plain torch; always returns ``(out, lse)``.

    Memory is proportional to queries times keys of the longest sequence.

    Returns:
        ``(out, lse)``: ``[total_q, Hq, Dv]`` in q's dtype, and ``[total_q, Hq]`` in float32
        (float64 for float64).
    """
    op = "paged_attention"
    packed = cu_seqlens_k is not None
    _check_attention(op, q, k_cache, v_cache, softcap, key_bias, sink_logit, packed)
    _check_window(op, k_cache.shape[-2], window, sink_tokens)
    keys = _key_ranges(op, k_cache, page_table, seq_lens, cu_seqlens_k, max_seqlen)
    queries = _query_ranges(op, q.shape[0], len(keys), cu_seqlens_q)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    groups = (k_cache.shape[-2], q.shape[1] // k_cache.shape[-2])
    sink = None if sink_logit is None else sink_logit.view(*groups, 1, 1)

    def sequences():
        for b, ((q_start, q_stop), (k_start, length)) in enumerate(zip(queries, keys, strict=True)):
            j = torch.arange(length, device=q.device)
            if page_table is not None:
                j, place = _resolve_pages(op, j, page_table[b], k_cache)
            elif packed:
                place = slice(k_start, k_start + length)
            else:
                place = (b, slice(0, length))
            pos = torch.arange(length - (q_stop - q_start), length, device=q.device)[:, None]
            visible = _visible(pos, j, causal, window, sink_tokens)  # [Hkv or 1, n, L]
            bias = None if key_bias is None else key_bias[place].T[:, None, None]
            out, lse = _attend(
                q[q_start:q_stop].unflatten(1, groups).permute(1, 2, 0, 3),  # [Hkv, group, n, D]
                k_cache[place].transpose(0, 1)[:, None],  # [Hkv, 1, L, D]
                v_cache[place].transpose(0, 1)[:, None],
                bias,
                sink,
                visible[:, None],
                scale,
                softcap,
            )
            yield out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)

    return _join(q, v_cache.shape[-1], sequences())


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
    """`memkernels.gather_attention` in plain torch; always returns ``(out, lse)``.

    Memory is proportional to the tokens listed for the queries of a sequence, times the head dim.

    Returns:
        ``(out, lse)``: ``[total_q, Hq, Dv]`` in q's dtype, and ``[total_q, Hq]`` in float32
        (float64 for float64).
    """
    op = "gather_attention"
    _check_attention(op, q, k_cache, v_cache, softcap, key_bias, sink_logit)
    _check(op, unit in ("page", "token"), "unit", "page or token", unit)
    given = unit == "token" or page_table is not None
    _check(op, given, "page_table", "given with unit page", page_table)
    keys = _key_ranges(op, k_cache, page_table, seq_lens)
    queries = _query_ranges(op, q.shape[0], len(keys), cu_seqlens_q)
    page_size, num_kv_heads = k_cache.shape[1:3]
    _check_index(op, "indices", indices, ndim=3)
    alike = len(indices) == len(q) and indices.shape[1] in (1, num_kv_heads)
    _check(op, alike, "indices", f"[{len(q)}, {num_kv_heads} or 1, K]", _describe(indices))
    if scale is None:
        scale = q.shape[-1] ** -0.5
    step = page_size if unit == "page" else 1
    groups = (num_kv_heads, q.shape[1] // num_kv_heads)
    sink = None if sink_logit is None else sink_logit.view(*groups, 1)
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]

    def sequences():
        for b, ((q_start, q_stop), (_, length)) in enumerate(zip(queries, keys, strict=True)):
            listed = indices[q_start:q_stop]
            listed, valid = _valid_index(op, "indices", listed, -(-length // step))
            j = (listed[..., None] * step + torch.arange(step, device=q.device)).flatten(-2)
            visible = valid.repeat_interleave(step, -1) & (j < length)  # [n, Hkv or 1, T]
            if page_table is None:
                place, row = (b, slice(0, length)), j
            else:
                # To this op a page that nobody lists is as good as absent.
                pages = page_table[b, : -(-length // page_size)]
                unlisted = torch.ones_like(pages, dtype=torch.bool)
                unlisted[j[visible] // page_size] = False
                present = torch.arange(length, device=q.device)
                pages = pages.masked_fill(unlisted, -1)
                present, place = _resolve_pages(op, present, pages, k_cache)
                # Token of the sequence to row of what is read; the last entry: not listed.
                rows = torch.full((length + 1,), -1, device=q.device)
                rows[present] = torch.arange(len(present), device=q.device)
                row = rows[j.where(visible, length)]
                visible = visible & (row >= 0)
            if causal:
                pos = torch.arange(length - (q_stop - q_start), length, device=q.device)
                visible = visible & (j <= pos[:, None, None])
            # What is not visible gets row 0, but there may be no row: where nobody sees, no column.
            columns = visible.any(0).any(0)
            visible, row = visible[..., columns], row.where(visible, 0)[..., columns]
            row = row * num_kv_heads + heads  # [n, Hkv, T]
            k, v, bias = (_rows(x, place, row) for x in (k_cache, v_cache, key_bias))
            out, lse = _attend(
                q[q_start:q_stop].unflatten(1, groups),  # [n, Hkv, group, D]
                k,
                v,
                None if bias is None else bias[:, :, None],
                sink,
                visible[:, :, None],
                scale,
                softcap,
            )
            yield out.flatten(1, 2), lse.flatten(1, 2)

    return _join(q, v_cache.shape[-1], sequences())


def merge_states(outs, lses):
    """`memkernels.merge_states` in plain torch: outs ``[n, T, H, D]``, lses ``[n, T, H]``."""
    alike = outs.dim() == 4 and lses.shape == outs.shape[:3]
    _check("merge_states", alike, "lses", "[n, T, H] of outs", _describe(lses))
    with torch.autocast(outs.device.type, enabled=False):
        absent = lses == -torch.inf
        values = outs.to(_accumulator(outs.dtype)).masked_fill(absent[..., None], 0)
        weights, lse = _softmax(lses.to(values.dtype), dim=0)
        out = (weights[..., None] * values).sum(0)
    return out.to(outs.dtype), lse


def append_kv(k, v, k_cache, v_cache, slot_mapping):
    """`memkernels.append_kv` in plain torch: writes the caches in place."""
    op = "append_kv"
    _check_caches(op, k_cache, v_cache)
    _no_gradient(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    _check_index(op, "slot_mapping", slot_mapping)
    num_pages, page_size, num_heads, _ = k_cache.shape
    for name, new, cache in ("k", k, k_cache), ("v", v, v_cache):
        shape = (len(slot_mapping), num_heads, cache.shape[-1])
        alike = new.shape == shape and new.dtype == cache.dtype
        _check(op, alike, name, f"{cache.dtype} {list(shape)}", _describe(new))
    slots, valid = _valid_index(op, "slot_mapping", slot_mapping, num_pages * page_size)
    slots = slots[valid]
    _check_distinct(op, "slot_mapping", slots)
    place = slots // page_size, slots % page_size
    k_cache[place] = k[valid]
    v_cache[place] = v[valid]


def copy_pages(k_cache, v_cache, pairs):
    """`memkernels.copy_pages` in plain torch: writes the caches in place."""
    op = "copy_pages"
    _check_caches(op, k_cache, v_cache)
    _no_gradient(op, k_cache=k_cache, v_cache=v_cache)
    _check_index(op, "pairs", pairs, ndim=2)
    _check(op, pairs.shape[1] == 2, "pairs", "[n, 2]", _describe(pairs))
    pairs, valid = _valid_index(op, "pairs", pairs, len(k_cache))
    sources, destinations = pairs[valid.all(1)].unbind(1)
    _check_distinct(op, "pairs", destinations)
    if pairs.is_cpu:
        both = sources[torch.isin(sources, destinations)].tolist()
        _check(op, not both, "pairs", "free of pages that are source and destination", both)
    k_cache[destinations] = k_cache[sources]
    v_cache[destinations] = v_cache[sources]


def compact_kv(k_cache, v_cache, page_table, seq_lens, keep):
    """`memkernels.compact_kv` in plain torch: writes the caches, returns the new seq_lens."""
    op = "compact_kv"
    _check_caches(op, k_cache, v_cache)
    _no_gradient(op, k_cache=k_cache, v_cache=v_cache)
    lengths = [length for _, length in _key_ranges(op, k_cache, page_table, seq_lens)]
    page_size, num_heads = k_cache.shape[1:3]
    _check_index(op, "keep", keep, ndim=3)
    alike = len(keep) == len(lengths) and keep.shape[1] in (1, num_heads)
    _check(op, alike, "keep", f"[{len(lengths)}, {num_heads} or 1, K]", _describe(keep))

    counts = torch.zeros_like(seq_lens)
    used = [torch.empty(0, dtype=torch.long, device=keep.device)]
    moves = [torch.empty(5, 0, dtype=torch.long, device=keep.device)]
    for b, length in enumerate(lengths):
        pages = page_table[b, : -(-length // page_size)]
        pages, present = _valid_index(op, "page_table", pages, len(k_cache))
        used.append(pages[present])
        pages = pages.where(present, -1)
        tokens, valid = _valid_index(op, "keep", keep[b], length)
        _check_kept(op, tokens, valid)
        counts[b] = valid[0].sum()
        head, target = valid[:, :length].expand(num_heads, -1).nonzero(as_tuple=True)
        token = tokens.expand(num_heads, -1)[head, target]
        source_page, target_page = pages[token // page_size], pages[target // page_size]
        _check_present(op, "keep", source_page)
        _check_present(op, "page_table", target_page)
        moves.append(
            torch.stack([source_page, token % page_size, target_page, target % page_size, head])
        )
    _check_distinct(op, "page_table", torch.cat(used))

    moves = torch.cat(moves, 1)
    source_page, source, target_page, target, head = moves[:, (moves >= 0).all(0)]
    # All is read before any of it is overwritten: V may be a view of K.
    k, v = (cache[source_page, source, head] for cache in (k_cache, v_cache))
    k_cache[target_page, target, head] = k
    v_cache[target_page, target, head] = v
    return counts


def _join(q, value_dim, sequences):
    """The (out, lse) of all sequences, from an iterator over those of each."""
    # Empty parts first: a batch of no sequences has a shape, and a graph, too.
    outs = [q[:0, :, :1].expand(-1, -1, value_dim)]
    lses = [q[:0, :, 0].to(_accumulator(q.dtype))]
    # Autocast would undo the choice of accumulator.
    with torch.autocast(q.device.type, enabled=False):
        for out, lse in sequences:
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs).to(q.dtype), torch.cat(lses)


def _attend(q, k, v, bias, sink, visible, scale, softcap):
    """Attention over any leading dimensions, all results in the accumulator's dtype.

    q is ``[..., n, D]``, k and v ``[..., T, D or Dv]``. bias and visible broadcast with the logits
    ``[..., n, T]``, sink with ``[..., n, 1]``.
    """
    dtype = _accumulator(q.dtype)
    if bias is not None:
        bias = bias.to(dtype)
        visible = visible & (bias != -torch.inf)
    # What no query sees must not reach a product: 0 * NaN is NaN.
    unseen = ~visible.any(-2)[..., None]  # [..., T, 1]
    k, v = (x.to(dtype).masked_fill(unseen, 0) for x in (k, v))

    logits = scale * (q.to(dtype) @ k.mT)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~visible, -torch.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.to(dtype).expand(*logits.shape[:-1], 1)], -1)
    weights, lse = _softmax(logits, dim=-1)
    return weights[..., : k.shape[-2]] @ v, lse


def _rows(cache, place, row):
    """The rows ``[*row.shape, ...]`` of the (token, head)s at a place of a cache, if there is one.

    Each token is read once and listed afterwards, so that gradients of duplicates add up unrounded;
    and by index_select, whose gradient adds in a fixed order on the CPU.
    """
    if cache is None:
        return None
    tokens = cache[place].to(_accumulator(cache.dtype))
    return tokens.flatten(0, 1).index_select(0, row.flatten()).unflatten(0, row.shape)


def _softmax(logits, dim):
    """Softmax and logsumexp; where all logits are -inf: 0 and -inf, with gradients 0."""
    empty = (logits == -torch.inf).all(dim, keepdim=True)
    # Masked before as well as after: a NaN computed and then discarded still has NaN gradients.
    logits = logits.masked_fill(empty, 0)
    weights = logits.softmax(dim).masked_fill(empty, 0)
    return weights, logits.logsumexp(dim).masked_fill(empty.squeeze(dim), -torch.inf)


def _visible(pos, j, causal, window, sink_tokens):
    """``[Hkv or 1, n, L]``: whether the query at pos ``[n, 1]`` sees the token at j ``[L]``."""
    visible = (j <= pos if causal else torch.ones_like(j <= pos))[None]
    if window is not None:
        window = torch.as_tensor(window, device=j.device).reshape(-1, 1, 1)
        visible = visible & ((pos - j < window) | (j < sink_tokens))
    return visible


def _resolve_pages(op, j, pages, cache):
    """The tokens of j ``[L]`` whose page is present, and their place: (page, offset)."""
    page_size = cache.shape[1]
    used = pages[: -(-len(j) // page_size)]
    used, valid = _valid_index(op, "page_table", used, len(cache))
    j = j[valid[j // page_size]]
    return j, (used[j // page_size], j % page_size)


def _valid_index(op, name, index, size):
    """Index as int64, and where it is in range and not -1; on the CPU, checked first."""
    index = index.long()
    if index.is_cpu:
        for wrong in index[(index < -1) | (index >= size)].tolist():
            _check(op, False, name, f"-1 or below {size}", wrong)
    return index, (index >= 0) & (index < size)


def _key_ranges(op, k_cache, page_table, seq_lens, cu_seqlens_k=None, max_seqlen=None):
    """A (start, length) for each sequence; start is 0 but for packed keys."""
    if cu_seqlens_k is not None:
        _check(op, page_table is None, "page_table", "absent beside cu_seqlens_k", "both")
        _check(op, seq_lens is None, "seq_lens", "absent beside cu_seqlens_k", "both")
        offsets = _offsets(op, "cu_seqlens_k", cu_seqlens_k, len(k_cache))
        ranges = [(a, b - a) for a, b in pairwise(offsets)]
    else:
        if page_table is None:
            batch, capacity = k_cache.shape[:2]
        else:
            _check_index(op, "page_table", page_table, ndim=2)
            _check(op, seq_lens is not None, "seq_lens", "given with page_table", None)
            batch, capacity = len(page_table), page_table.shape[1] * k_cache.shape[1]
        lengths = [capacity] * batch
        if seq_lens is not None:
            _check_index(op, "seq_lens", seq_lens)
            lengths = seq_lens.tolist()
        _check(op, len(lengths) == batch, "seq_lens", f"of {batch} sequences", len(lengths))
        for length in lengths:
            _check(op, 0 <= length <= capacity, "seq_lens", f"0 to {capacity}", length)
        ranges = [(0, length) for length in lengths]
    for _, length in ranges:
        enough = max_seqlen is None or length <= max_seqlen
        _check(op, enough, "max_seqlen", f"at least {length}", max_seqlen)
    return ranges


def _query_ranges(op, total_q, batch, cu_seqlens_q):
    """A (start, stop) for each sequence."""
    if cu_seqlens_q is None:
        _check(op, total_q == batch, "q", f"of {batch} rows (one a sequence)", total_q)
        return [(b, b + 1) for b in range(batch)]
    offsets = _offsets(op, "cu_seqlens_q", cu_seqlens_q, total_q)
    _check(op, len(offsets) == batch + 1, "cu_seqlens_q", f"of {batch + 1} entries", len(offsets))
    return list(pairwise(offsets))


def _offsets(op, name, cu_seqlens, total):
    _check_index(op, name, cu_seqlens)
    offsets = cu_seqlens.tolist()
    ascending = offsets[:1] == [0] and offsets[-1] == total and offsets == sorted(offsets)
    _check(op, ascending, name, f"ascending from 0 to {total}", offsets)
    return offsets


def _check_attention(op, q, k_cache, v_cache, softcap, key_bias, sink_logit, packed=False):
    floating = q.dim() == 3 and q.is_floating_point()
    _check(op, floating, "q", "floating [total_q, Hq, D]", _describe(q))
    for name, tensor in ("k_cache", k_cache), ("v_cache", v_cache):
        alike = tensor.dim() == (3 if packed else 4) and tensor.dtype == q.dtype
        leading = "[total_k" if packed else "[B or num_pages, Lmax or page_size"
        _check(op, alike, name, f"{q.dtype} {leading}, Hkv, D]", _describe(tensor))
    num_heads, head_dim = q.shape[1:]
    *leading, num_kv_heads, key_dim = k_cache.shape
    _check(op, key_dim == head_dim, "k_cache", f"of head dim {head_dim}", key_dim)
    alike = v_cache.shape[:-1] == k_cache.shape[:-1]
    _check(op, alike, "v_cache", f"{[*leading, num_kv_heads, 'Dv']}", _describe(v_cache))
    divides = num_kv_heads > 0 and num_heads % num_kv_heads == 0
    _check(op, divides, "q", f"of a multiple of {num_kv_heads} heads", num_heads)
    _check(op, softcap >= 0, "softcap", "at least 0", softcap)
    if key_bias is not None:
        alike = key_bias.shape == k_cache.shape[:-1]
        _check(op, alike, "key_bias", [*leading, num_kv_heads], _describe(key_bias))
    if sink_logit is not None:
        alike = sink_logit.shape == (num_heads,)
        _check(op, alike, "sink_logit", [num_heads], _describe(sink_logit))


def _check_window(op, num_kv_heads, window, sink_tokens):
    if isinstance(window, torch.Tensor):
        _check_index(op, "window", window)
        _check(op, len(window) == num_kv_heads, "window", f"of {num_kv_heads} heads", len(window))
    else:
        _check(op, window is None or window >= 1, "window", "at least 1", window)
    _check(op, sink_tokens >= 0, "sink_tokens", "at least 0", sink_tokens)


def _check_caches(op, k_cache, v_cache):
    _check(op, k_cache.dim() == 4, "k_cache", "of 4 dimensions", _describe(k_cache))
    alike = v_cache.dim() == 4 and v_cache.shape[:3] == k_cache.shape[:3]
    alike = alike and v_cache.dtype == k_cache.dtype
    _check(op, alike, "v_cache", f"as k_cache {_describe(k_cache)}", _describe(v_cache))


def _check_index(op, name, tensor, ndim=1):
    integer = tensor.dim() == ndim and tensor.dtype in (torch.int32, torch.int64)
    _check(op, integer, name, f"int32 or int64 of {ndim} dimensions", _describe(tensor))


def _check_distinct(op, name, index):
    if index.is_cpu:
        _check(op, len(index.unique()) == len(index), name, "free of duplicates", "some")


def _check_present(op, name, pages):
    if pages.is_cpu:
        _check(op, bool((pages >= 0).all()), name, "without absent pages where tokens go", -1)


def _check_kept(op, tokens, valid):
    """tokens and valid ``[heads, K]``, of one sequence."""
    if not tokens.is_cpu:
        return
    after, before = tokens[:, 1:], tokens[:, :-1]
    wrong = valid[:, 1:] & ((after <= before) | ~valid[:, :-1])
    _check(op, not wrong.any(), "keep", "ascending, then -1", after[wrong].tolist())
    counts = valid.sum(1).tolist()
    _check(op, len(set(counts)) <= 1, "keep", "of as many tokens for every head", counts)


def _check(op, ok, name, expected, got):
    if not ok:
        raise RuntimeError(f"{op}: {name} must be {expected}, got {got}")


def _no_gradient(op, **tensors):
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"{op}: not differentiable, but {name} requires grad")


def _describe(tensor):
    return f"{tensor.dtype} {list(tensor.shape)}"


def _accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)
