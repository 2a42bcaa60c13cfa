"""Attention over paged, contiguous and packed keys and values, one sequence at a time.

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
    packed = cu_seqlens_k is not None
    _check_tensors(q, k_cache, v_cache, key_bias, sink_logit, packed)
    _check_options(k_cache.shape[-2], window, sink_tokens, softcap)
    keys = _key_ranges(k_cache, page_table, seq_lens, cu_seqlens_k, max_seqlen)
    queries = _query_ranges(q.shape[0], len(keys), cu_seqlens_q)
    if scale is None:
        scale = q.shape[-1] ** -0.5

    # Empty parts first: a batch of no sequences has a shape, and a graph, too.
    outs = [q[:0, :, :1].expand(-1, -1, v_cache.shape[-1])]
    lses = [q[:0, :, 0].to(_accumulator(q.dtype))]
    # Autocast would undo the choice of accumulator.
    with torch.autocast(q.device.type, enabled=False):
        for b, ((q_start, q_stop), (k_start, length)) in enumerate(zip(queries, keys, strict=True)):
            n = q_stop - q_start
            j = torch.arange(length, device=q.device)
            if page_table is not None:
                j, place = _resolve_pages(j, page_table[b], k_cache)
            elif packed:
                place = slice(k_start, k_start + length)
            else:
                place = (b, slice(0, length))
            pos = torch.arange(length - n, length, device=q.device)[:, None]
            out, lse = _attend(
                q[q_start:q_stop],
                k_cache[place],
                v_cache[place],
                None if key_bias is None else key_bias[place],
                sink_logit,
                _visible(pos, j, causal, window, sink_tokens),
                scale,
                softcap,
            )
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs).to(q.dtype), torch.cat(lses)


def merge_states(outs, lses):
    """`memkernels.merge_states` in plain torch: outs ``[n, T, H, D]``, lses ``[n, T, H]``."""
    alike = outs.dim() == 4 and lses.shape == outs.shape[:3]
    _check(alike, "lses", "[n, T, H] of outs", _describe(lses), op="merge_states")
    with torch.autocast(outs.device.type, enabled=False):
        absent = lses == -torch.inf
        values = outs.to(_accumulator(outs.dtype)).masked_fill(absent[..., None], 0)
        weights, lse = _softmax(lses.to(values.dtype), dim=0)
        out = (weights[..., None] * values).sum(0)
    return out.to(outs.dtype), lse


def append_kv(k, v, k_cache, v_cache, slot_mapping):
    """`memkernels.append_kv` in plain torch: writes the caches in place."""
    op = "append_kv"
    for name, tensor in ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"{op}: not differentiable, but {name} requires grad")
    _check_index("slot_mapping", slot_mapping, op=op)
    _check(k_cache.dim() == 4, "k_cache", "of 4 dimensions", _describe(k_cache), op)
    num_pages, page_size, num_heads, _ = k_cache.shape
    for name, new, cache in ("k", k, k_cache), ("v", v, v_cache):
        alike = cache.shape[:3] == k_cache.shape[:3] and cache.dtype == k_cache.dtype
        _check(alike, f"{name}_cache", f"as k_cache {_describe(k_cache)}", _describe(cache), op)
        shape = (len(slot_mapping), num_heads, cache.shape[-1])
        alike = new.shape == shape and new.dtype == cache.dtype
        _check(alike, name, f"{cache.dtype} {list(shape)}", _describe(new), op)
    slots, valid = _valid_index("slot_mapping", slot_mapping, num_pages * page_size, op)
    slots = slots[valid]
    if slots.device.type == "cpu":
        _check(len(slots.unique()) == len(slots), "slot_mapping", "free of duplicates", "some", op)
    place = slots // page_size, slots % page_size
    k_cache[place] = k[valid]
    v_cache[place] = v[valid]


def _attend(q, k, v, bias, sink_logit, visible, scale, softcap):
    """Attention of one sequence, all results in the accumulator's dtype.

    q is ``[n, Hq, D]``, k and v ``[L, Hkv, D or Dv]``, bias ``[L, Hkv]``, and visible
    ``[Hkv or 1, n, L]``.
    """
    n, num_heads, _ = q.shape
    length, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    dtype = _accumulator(q.dtype)

    visible = visible.expand(num_kv_heads, n, length)
    if bias is not None:
        bias = bias.to(dtype).T[:, None]  # [Hkv, 1, L]
        visible = visible & (bias != -torch.inf)
    # What no query sees must not reach a product: 0 * NaN is NaN.
    unseen = ~visible.any(1)[..., None]  # [Hkv, L, 1]
    q = q.to(dtype).unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3)  # [Hkv, group, n, D]
    k = k.to(dtype).transpose(0, 1).masked_fill(unseen, 0)[:, None]  # [Hkv, 1, L, D]
    v = v.to(dtype).transpose(0, 1).masked_fill(unseen, 0)[:, None]

    logits = scale * (q @ k.mT)  # [Hkv, group, n, L]
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[:, None]
    logits = logits.masked_fill(~visible[:, None], -torch.inf)
    if sink_logit is not None:
        sink = sink_logit.to(dtype).view(num_kv_heads, group, 1, 1).expand(-1, -1, n, 1)
        logits = torch.cat([logits, sink], -1)
    weights, lse = _softmax(logits, dim=-1)
    out = weights[..., :length] @ v

    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)


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


def _resolve_pages(j, pages, cache):
    """The tokens of j ``[L]`` whose page is present, and their place: (page, offset)."""
    page_size = cache.shape[1]
    used = pages[: -(-len(j) // page_size)]
    used, valid = _valid_index("page_table", used, len(cache))
    j = j[valid[j // page_size]]
    return j, (used[j // page_size], j % page_size)


def _valid_index(name, index, size, op="paged_attention"):
    """Index as int64, and where it is in range and not -1; on the CPU, checked first."""
    index = index.long()
    if index.device.type == "cpu":
        for wrong in index[(index < -1) | (index >= size)].tolist():
            _check(False, name, f"-1 or below {size}", wrong, op)
    return index, (index >= 0) & (index < size)


def _key_ranges(k_cache, page_table, seq_lens, cu_seqlens_k, max_seqlen):
    """A (start, length) for each sequence; start is 0 but for packed keys."""
    if cu_seqlens_k is not None:
        _check(page_table is None, "page_table", "absent beside cu_seqlens_k", "both")
        _check(seq_lens is None, "seq_lens", "absent beside cu_seqlens_k", "both")
        offsets = _offsets("cu_seqlens_k", cu_seqlens_k, len(k_cache))
        ranges = [(a, b - a) for a, b in pairwise(offsets)]
    else:
        if page_table is None:
            batch, capacity = k_cache.shape[:2]
        else:
            _check_index("page_table", page_table, ndim=2)
            _check(seq_lens is not None, "seq_lens", "given with page_table", None)
            batch, capacity = len(page_table), page_table.shape[1] * k_cache.shape[1]
        lengths = [capacity] * batch
        if seq_lens is not None:
            _check_index("seq_lens", seq_lens)
            lengths = seq_lens.tolist()
        _check(len(lengths) == batch, "seq_lens", f"of {batch} sequences", len(lengths))
        for length in lengths:
            _check(0 <= length <= capacity, "seq_lens", f"0 to {capacity}", length)
        ranges = [(0, length) for length in lengths]
    for _, length in ranges:
        enough = max_seqlen is None or length <= max_seqlen
        _check(enough, "max_seqlen", f"at least {length}", max_seqlen)
    return ranges


def _query_ranges(total_q, batch, cu_seqlens_q):
    """A (start, stop) for each sequence."""
    if cu_seqlens_q is None:
        _check(total_q == batch, "q", f"of {batch} rows (one a sequence)", total_q)
        return [(b, b + 1) for b in range(batch)]
    offsets = _offsets("cu_seqlens_q", cu_seqlens_q, total_q)
    _check(len(offsets) == batch + 1, "cu_seqlens_q", f"of {batch + 1} entries", len(offsets))
    return list(pairwise(offsets))


def _offsets(name, cu_seqlens, total):
    _check_index(name, cu_seqlens)
    offsets = cu_seqlens.tolist()
    ascending = offsets[:1] == [0] and offsets[-1] == total and offsets == sorted(offsets)
    _check(ascending, name, f"ascending from 0 to {total}", offsets)
    return offsets


def _check_tensors(q, k_cache, v_cache, key_bias, sink_logit, packed):
    _check(q.dim() == 3 and q.is_floating_point(), "q", "floating [total_q, Hq, D]", _describe(q))
    for name, tensor in ("k_cache", k_cache), ("v_cache", v_cache):
        alike = tensor.dim() == (3 if packed else 4) and tensor.dtype == q.dtype
        leading = "[total_k" if packed else "[B or num_pages, Lmax or page_size"
        _check(alike, name, f"{q.dtype} {leading}, Hkv, D]", _describe(tensor))
    num_heads, head_dim = q.shape[1:]
    *leading, num_kv_heads, key_dim = k_cache.shape
    _check(key_dim == head_dim, "k_cache", f"of head dim {head_dim}", key_dim)
    alike = v_cache.shape[:-1] == k_cache.shape[:-1]
    _check(alike, "v_cache", f"{[*leading, num_kv_heads, 'Dv']}", _describe(v_cache))
    divides = num_kv_heads > 0 and num_heads % num_kv_heads == 0
    _check(divides, "q", f"of a multiple of {num_kv_heads} heads", num_heads)
    if key_bias is not None:
        alike = key_bias.shape == k_cache.shape[:-1]
        _check(alike, "key_bias", [*leading, num_kv_heads], _describe(key_bias))
    if sink_logit is not None:
        _check(sink_logit.shape == (num_heads,), "sink_logit", [num_heads], _describe(sink_logit))


def _check_options(num_kv_heads, window, sink_tokens, softcap):
    if isinstance(window, torch.Tensor):
        _check_index("window", window)
        _check(len(window) == num_kv_heads, "window", f"of {num_kv_heads} heads", len(window))
    else:
        _check(window is None or window >= 1, "window", "at least 1", window)
    _check(sink_tokens >= 0, "sink_tokens", "at least 0", sink_tokens)
    _check(softcap >= 0, "softcap", "at least 0", softcap)


def _check_index(name, tensor, ndim=1, op="paged_attention"):
    integer = tensor.dim() == ndim and tensor.dtype in (torch.int32, torch.int64)
    _check(integer, name, f"int32 or int64 of {ndim} dimensions", _describe(tensor), op)


def _check(ok, name, expected, got, op="paged_attention"):
    if not ok:
        raise RuntimeError(f"{op}: {name} must be {expected}, got {got}")


def _describe(tensor):
    return f"{tensor.dtype} {list(tensor.shape)}"


def _accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)
