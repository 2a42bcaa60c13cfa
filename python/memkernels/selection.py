"""Selection of keys: which pages or tokens a query attends to, and which a cache forgets.

Score, select, attend, forget. `summarize_keys` and `score_pages` rank the pages of a sequence for a
query, `select_topk` makes lists of the best, which `memkernels.gather_attention` attends to.
`attention_colstats` adds up the attention that keys receive, `evict` turns that into what
`memkernels.compact_kv` is to keep. `knn_topk` searches a bank of keys, and `indexer_scores` ranks
tokens by small heads of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels import _library, fallback
from memkernels.attention import _lse_dtype

_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def summarize_keys(
    k_cache: Tensor, page_table: Tensor, seq_lens: Tensor, *, kind: str = "minmax"
) -> Tensor:
    """One summary of the keys of every page and head, for `score_pages`.

    Summaries belong to physical pages, like the keys: sequences that share a page share its
    summary, and a page table that changes leaves them valid.

    Args:
        k_cache: ``[num_pages, page_size, Hkv, D]``, contiguous in its last dimension; float32,
            bfloat16, float16, or float64 on the CPU.
        page_table: ``[B, max_pages]`` integers; the first ``ceil(L / page_size)`` entries of a row
            are used, -1 is skipped.
        seq_lens: ``[B]`` integers. A page counts as far as the longest of its sequences fills it.
        kind: "minmax", the smallest and the largest of each channel (Quest, Tang et al., 2024); or
            "mean" of the keys (InfLLM, Xiao et al., 2024; LongMem, Wang et al., 2023).

    Returns:
        ``[num_pages, Hkv, 2, D]`` in the dtype of the cache, minima first, exact; or
        ``[num_pages, Hkv, D]`` float32 (float64 for float64). 0 for pages of no sequence.

    Not differentiable. Raises RuntimeError on arguments that contradict the above, and under grad
    mode if ``k_cache`` requires grad.
    """
    if _library.use_fallback(k_cache, "summarize_keys"):
        return fallback.summarize_keys(k_cache, page_table, seq_lens, kind=kind)
    if _library.below_autograd(k_cache):
        with _BelowAutograd():
            return _summarize_keys(k_cache, page_table, seq_lens, kind=kind)
    return _summarize_keys(k_cache, page_table, seq_lens, kind=kind)


def update_summaries(
    summary: Tensor,
    k_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    num_new: int | Tensor = 1,
) -> None:
    """Brings summaries up to date, in place, after tokens were appended.

    Every page that holds one of the last ``num_new`` tokens of a sequence is summarized anew, so
    that the result is bit for bit that of `summarize_keys`, whatever the page held before.

    Args:
        summary: as `summarize_keys` returns it, of either kind, contiguous.
        k_cache, page_table, seq_lens: as in `summarize_keys`; lengths include the new tokens.
        num_new: new tokens of each sequence, a number or ``[B]`` integers.

    Not differentiable. Raises RuntimeError on arguments that contradict the above, and under grad
    mode if a tensor requires grad; ``summary`` is unchanged then.
    """
    if _library.use_fallback(k_cache, "update_summaries"):
        fallback.update_summaries(summary, k_cache, page_table, seq_lens, num_new)
        return
    tensors = [summary, k_cache, page_table, seq_lens, None]
    if isinstance(num_new, Tensor):
        tensors[-1], num_new = num_new, 0
    if _library.below_autograd(summary, k_cache):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            _update_summaries(*tensors, num_new=num_new)
        _library.bump_versions(summary)
    else:
        _update_summaries(*tensors, num_new=num_new)


def score_pages(
    q: Tensor,
    summary: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    cu_seqlens_q: Tensor | None = None,
    *,
    kind: str = "minmax",
    group_reduce: str = "max",
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Scores every page of a sequence for each of its queries.

    With kind "minmax" the score of a page is ``scale * sum_c max(q_c min_c, q_c max_c)``, which no
    logit of its keys exceeds (Quest, Tang et al., 2024): the dot product of ``min(q, 0)`` and
    ``max(q, 0)`` with the summary. With "mean" it is ``scale * q.mean``; instead of a mean, a page
    may have a landmark key, a centroid or any other vector.

    Args:
        q: ``[total_q, Hq, D]``; float32, bfloat16, float16, or float64 on the CPU.
        summary: ``[num_pages, Hkv, 2, D]`` in q's dtype for "minmax"; ``[num_pages, Hkv, D]``
            float32 (float64 for float64) or in q's dtype for "mean". Contiguous in its last
            dimensions.
        page_table: ``[B, max_pages]`` integers; only the first ``ceil(L / page_size)`` entries of
            a row are read, -1 is an absent page.
        seq_lens: ``[B]`` integers.
        page_size: tokens a page.
        cu_seqlens_q: ``[B + 1]`` offsets of each sequence's queries, its last ones; None: one
            query a sequence.
        kind: "minmax" or "mean".
        group_reduce: what becomes of the scores of a group's query heads: their "max", "mean" or
            "sum".
        causal: leave out pages that begin after the query's position.
        scale: factor on the scores; None: ``D ** -0.5``, as in attention.

    Returns:
        ``[total_q, Hkv, max_pages]`` float32 (float64 for float64); -inf for pages that are absent,
        outside the sequence or hidden from the query.

    Not differentiable. Raises RuntimeError on arguments that contradict the above, and under grad
    mode if ``q`` or ``summary`` requires grad.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    options = {"kind": kind, "group_reduce": group_reduce, "causal": causal, "scale": scale}
    tensors = q, summary, page_table, seq_lens, cu_seqlens_q
    if _library.use_fallback(q, "score_pages"):
        return fallback.score_pages(*tensors[:4], page_size, cu_seqlens_q, **options)
    if _library.below_autograd(q, summary):
        with _BelowAutograd():
            return _score_pages(*tensors, page_size=page_size, **options)
    return _score_pages(*tensors, page_size=page_size, **options)


def select_topk(
    scores: Tensor,
    k: int,
    lengths: Tensor | None = None,
    keep_first: int = 0,
    keep_last: int = 0,
    *,
    threshold: float | None = None,
) -> Tensor:
    """Indices of the k largest scores of each row, in rising order.

    Exact and deterministic: of equal scores the lower index wins, and -0 equals +0. Scores of NaN
    and -inf are never selected.

    Args:
        scores: ``[..., N]``, up to 5 dimensions, contiguous in the last; float32, bfloat16,
            float16, or float64 on the CPU.
        k: how many to select; more than N is allowed.
        lengths: integers that broadcast to ``[...]``: a row's scores from there on do not count.
            None: N.
        keep_first, keep_last: so many indices at the beginning and at the end of each row's
            length, selected whatever their scores. They count towards k.
        threshold: select only scores that reach it, still at most k.

    Returns:
        ``[..., k]`` int32, -1 where fewer are selected.

    Raises RuntimeError on arguments that contradict the above, and if
    ``keep_first + keep_last > k``.
    """
    if _library.use_fallback(scores, "select_topk"):
        return fallback.select_topk(scores, k, lengths, keep_first, keep_last, threshold=threshold)
    if lengths is not None and lengths.shape != scores.shape[:-1]:
        lengths = _expand("select_topk", "lengths", lengths, scores.shape[:-1])
    options = {"k": k, "keep_first": keep_first, "keep_last": keep_last, "threshold": threshold}
    if _library.below_autograd(scores):
        with _BelowAutograd():
            return _select_topk(scores, lengths, **options)
    return _select_topk(scores, lengths, **options)


def attention_colstats(
    q: Tensor,
    k_cache: Tensor,
    page_table: Tensor | None,
    seq_lens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    lse: Tensor,
    *,
    reduce: str = "sum",
    threshold: float | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | Tensor | None = None,
    sink_tokens: int = 0,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    accumulate_into: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """How much attention each key receives from the given queries of its sequence.

    The probabilities ``exp(logit - lse)`` of `memkernels.paged_attention`, reduced over the queries
    and over the heads of a group, without ever being written: "sum" for H2O (Zhang et al., 2023)
    and SnapKV (Li et al., 2024), "max", or "count" of those that reach a threshold (CORM, Dai et
    al., 2024). To restrict the queries, as SnapKV and CItruS (Bai et al., 2024) do, pass the last
    ones of each sequence only.

    Args:
        q, k_cache, page_table, seq_lens, cu_seqlens_q: as in `memkernels.paged_attention`, paged or
            contiguous.
        lse: ``[total_q, Hq]`` as it returned for these queries; float32 (float64 for float64).
        reduce: "sum", "max" or "count".
        threshold: for "count"; None: ``1 / t`` for a query at position ``t - 1``, which is CORM's.
            Rounding decides on probabilities that equal it.
        scale, causal, window, sink_tokens, softcap, key_bias: those of the forward.
        accumulate_into: ``[B, Hkv, >= Lmax]``, contiguous, of the result's dtype: changed in place
            to ``decay * old + new``, or ``max(decay * old, new)`` for "max", for the keys of each
            sequence; beyond its length nothing is touched.
        decay: see above.

    Returns:
        ``[B, Hkv, Lmax]`` float32 (float64 for float64), 0 beyond a sequence's length, with
        ``Lmax = max_pages * page_size`` or that of the contiguous cache; or ``accumulate_into``.

    Deterministic. Not differentiable. Raises RuntimeError on arguments that contradict the above,
    and under grad mode if a tensor requires grad; nothing has changed then.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    options = {
        "reduce": reduce, "threshold": threshold, "scale": scale, "causal": causal,
        "window": window, "sink_tokens": sink_tokens, "softcap": softcap,
    }  # fmt: skip
    inputs = q, k_cache, page_table, seq_lens, cu_seqlens_q, lse
    if _library.use_fallback(q, "attention_colstats"):
        return fallback.attention_colstats(
            *inputs, key_bias=key_bias, accumulate_into=accumulate_into, decay=decay, **options
        )
    head_window = None
    if isinstance(window, Tensor):
        head_window, options["window"] = window, None
    inputs = *inputs, head_window, key_bias
    tensors = {
        "q": q, "k_cache": k_cache, "lse": lse, "key_bias": key_bias,
        "accumulate_into": accumulate_into,
    }  # fmt: skip
    below = _library.below_autograd(*tensors.values())
    if accumulate_into is None:
        if below:
            with _BelowAutograd():
                return _attention_colstats(*inputs, **options)
        return _attention_colstats(*inputs, **options)
    if below:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            _accumulate_colstats(accumulate_into, *inputs, **options, decay=decay)
        _library.bump_versions(accumulate_into)
    else:
        _library.no_gradient("attention_colstats", tensors)
        _accumulate_colstats(accumulate_into, *inputs, **options, decay=decay)
    return accumulate_into


def evict(
    stats: Tensor,
    seq_lens: Tensor,
    budget: int | Tensor,
    *,
    keep_first: int = 0,
    keep_last: int = 0,
    pinned: Tensor | None = None,
    group: str = "head",
    max_budget: int | None = None,
) -> Tensor:
    """Which tokens of each sequence a cache keeps, for `memkernels.compact_kv`.

    The tokens with the largest statistics, among them the protected ones, whatever theirs are; of
    equal ones the earlier. All heads of a sequence keep equally many: ``min(budget, L)``.

    Args:
        stats: ``[B, Hkv, L]`` such as those of `attention_colstats`; float32, bfloat16, float16, or
            float64 on the CPU. NaN ranks lowest.
        seq_lens: ``[B]`` integers, at most L.
        budget: tokens to keep, a number or ``[B]`` integers.
        keep_first, keep_last: protected tokens at the ends of each sequence (attention sinks, and
            the recent ones). They count towards the budget.
        pinned: bools that broadcast to ``[B, Hkv, L]``: further protected tokens. If there are
            more than the budget leaves room for, an error on the CPU; on CUDA the first ones stay.
        group: "head": each head keeps its own; "sequence": the heads' statistics are added, and all
            keep the same tokens.
        max_budget: bound on a budget tensor, known to the host: the size of the result. None: L.

    Returns:
        keep, ``[B, Hkv, K]`` (``[B, 1, K]`` for "sequence") int32, rising, then -1; K is the budget
        or ``max_budget``.

    Raises RuntimeError on arguments that contradict the above, and if the protected tokens exceed
    a budget.
    """
    if _library.use_fallback(stats, "evict"):
        return fallback.evict(
            stats, seq_lens, budget, keep_first=keep_first, keep_last=keep_last, pinned=pinned,
            group=group, max_budget=max_budget,
        )  # fmt: skip
    if group not in ("head", "sequence"):
        raise RuntimeError(f"evict: group must be head or sequence, got {group}")
    if stats.dim() != 3 or not stats.is_floating_point():
        got = f"{stats.dtype} {list(stats.shape)}"
        raise RuntimeError(f"evict: stats must be floating [B, Hkv, L], got {got}")
    num_protected = None
    if pinned is not None:
        pinned = _expand("evict", "pinned", pinned, stats.shape)
    if group == "sequence":
        stats = stats.sum(1, keepdim=True, dtype=_lse_dtype(stats.dtype))
        pinned = None if pinned is None else pinned.any(1, keepdim=True)
    if pinned is not None:
        stats, num_protected = _pin(stats, seq_lens, pinned, keep_first, keep_last)
    budgets = None
    if isinstance(budget, Tensor):
        if max_budget is not None and max_budget < 0:
            raise RuntimeError(f"evict: max_budget must not be negative, got {max_budget}")
        budgets, budget = budget, stats.shape[2] if max_budget is None else max_budget
    options = {"budget": budget, "keep_first": keep_first, "keep_last": keep_last}
    if _library.below_autograd(stats):
        with _BelowAutograd():
            return _evict(stats, seq_lens, budgets, num_protected, **options)
    return _evict(stats, seq_lens, budgets, num_protected, **options)


def _pin(stats, seq_lens, pinned, keep_first, keep_last):
    """Statistics in which pinned tokens come first, and how many are protected ``[B, Hkv]``."""
    if pinned.dtype != torch.bool:
        raise RuntimeError(f"evict: pinned must be bool, got {pinned.dtype}")
    if seq_lens.shape != stats.shape[:1]:
        raise RuntimeError(f"evict: seq_lens must be [B], got {list(seq_lens.shape)}")
    token, length = torch.arange(stats.shape[2], device=stats.device), seq_lens[:, None, None]
    ends = (token < keep_first) | (token >= length - keep_last)
    num_protected = ((pinned | ends) & (token < length)).sum(-1)
    largest = torch.finfo(stats.dtype).max
    return stats.clamp(max=largest).masked_fill(pinned, torch.inf), num_protected


def _expand(op, name, t, shape):
    sizes = zip(reversed(t.shape), reversed(shape), strict=False)
    if t.dim() > len(shape) or not all(size in (1, wanted) for size, wanted in sizes):
        raise RuntimeError(f"{op}: {name} must broadcast to {list(shape)}, got {list(t.shape)}")
    return t.expand(shape)


def knn_topk(
    q: Tensor,
    bank: Tensor,
    valid_len: Tensor | None,
    k: int,
    *,
    metric: str = "dot",
    buckets: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest entries of a bank for each query and head, best first.

    Exact search as in Memorizing Transformers (Wu et al., 2022), without writing the scores of the
    whole bank. Of equal scores the lower index wins; NaN and what is infinitely far are never
    found. Values may round in another way for another number of queries.

    Args:
        q: ``[Q, H, D]``; float32, bfloat16, float16, or float64 on the CPU.
        bank: ``[H, N, D]``, dtype of q, contiguous in its last dimension.
        valid_len: ``[H]`` integers, entries of each head's bank that count; None: N.
        k: how many; more than there are is allowed.
        metric: "dot"; "cosine", where a zero vector has similarity 0; or "l2", the squared
            distance, computed as ``|q|^2 - 2 q.b + |b|^2``.
        buckets: approximate search (Neurocache, Safaya and Yuret, 2024): entry i competes within
            bucket ``i % buckets``, whose best alone can be among the k.

    Returns:
        values and indices ``[Q, H, k]``: float32 (float64 for float64), falling (rising distances
        for "l2"), and int64. Where fewer are found, -1 and -inf (inf for "l2").

    Not differentiable: attend to what was found, by `memkernels.gather_attention` or otherwise.
    Raises RuntimeError on arguments that contradict the above, and under grad mode if q or bank
    requires grad.
    """
    options = {"k": k, "metric": metric, "buckets": buckets}
    if _library.use_fallback(q, "knn_topk"):
        return fallback.knn_topk(q, bank, valid_len, **options)
    if _library.below_autograd(q, bank):
        with _BelowAutograd():
            return _knn_topk(q, bank, valid_len, **options)
    return _knn_topk(q, bank, valid_len, **options)


def indexer_scores(
    q: Tensor,
    w: Tensor,
    k: Tensor,
    page_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """Scores of tokens by a lightning indexer: ``I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])``.

    The indexer of DeepSeek sparse attention (DeepSeek-AI, 2025). Any scale belongs in ``w``.

    Args:
        q: ``[T, Hi, D]``; float32, bfloat16, float16, or float64 on the CPU.
        w: ``[T, Hi]``, float32 or the dtype of q.
        k: dtype of q; ``[N, D]``, the keys of one sequence, of which q are the last T queries; or
            ``[num_pages, page_size, D]`` with a page table; or contiguous ``[B, Lmax, D]``.
        page_table, seq_lens, cu_seqlens_q: as in `memkernels.paged_attention`, but for one
            sequence ``[N, D]``, which has none of them.
        causal: hide keys after the query's position.

    Returns:
        ``[T, N]`` float32 (float64 for float64); N is ``max_pages * page_size`` or ``Lmax`` in the
        other layouts. -inf where the query sees no key.

    Differentiable once in q, w, k. Deterministic. Raises RuntimeError on arguments that contradict
    the above.
    """
    inputs = q, w, k, page_table, seq_lens, cu_seqlens_q
    if _library.use_fallback(q, "indexer_scores", q, w, k):
        return fallback.indexer_scores(*inputs, causal=causal)
    if _library.below_autograd(q, w, k):
        with _BelowAutograd():
            return _indexer_scores(*inputs, causal=causal)
    return _indexer_scores(*inputs, causal=causal)


# ---- registrations -------------------------------------------------------------------------------

_ops = torch.ops.memkernels
_summarize_keys = _ops.summarize_keys.default
_update_summaries = _ops.update_summaries.default
_score_pages = _ops.score_pages.default
_select_topk = _ops.select_topk.default
_evict = _ops.evict.default
_attention_colstats = _ops.attention_colstats.default
_accumulate_colstats = _ops.accumulate_colstats.default
_knn_topk = _ops.knn_topk.default
_indexer_scores = _ops.indexer_scores.default

_lib = _library.library

for _op in ("summarize_keys", "score_pages", "attention_colstats", "knn_topk"):
    _library.not_differentiable(_op)
_library.in_place("update_summaries", mutated=("summary",))
_library.in_place("accumulate_colstats", mutated=("stats",))


@torch.library.register_fake("memkernels::summarize_keys", lib=_lib)
def _(k_cache, page_table, seq_lens, *, kind):
    num_pages, _, heads, dim = k_cache.shape
    if kind == "minmax":
        return k_cache.new_empty(num_pages, heads, 2, dim)
    return k_cache.new_empty(num_pages, heads, dim, dtype=_lse_dtype(k_cache.dtype))


@torch.library.register_fake("memkernels::update_summaries", lib=_lib)
def _(summary, k_cache, page_table, seq_lens, num_new_each, *, num_new=0):
    return None


@torch.library.register_fake("memkernels::score_pages", lib=_lib)
def _(q, summary, page_table, seq_lens, cu_seqlens_q, **options):
    sizes = q.shape[0], summary.shape[1], page_table.shape[1]
    return q.new_empty(sizes, dtype=_lse_dtype(q.dtype))


@torch.library.register_fake("memkernels::select_topk", lib=_lib)
def _(scores, lengths, *, k, keep_first=0, keep_last=0, threshold=None):
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)


@torch.library.register_fake("memkernels::evict", lib=_lib)
def _(stats, seq_lens, budgets, num_protected, *, budget, keep_first=0, keep_last=0):
    return stats.new_empty((*stats.shape[:2], budget), dtype=torch.int32)


@torch.library.register_fake("memkernels::attention_colstats", lib=_lib)
def _(q, k_cache, page_table, *args, **options):
    batch, capacity = k_cache.shape[:2]
    if page_table is not None:
        batch, capacity = page_table.shape[0], page_table.shape[1] * capacity
    return q.new_empty(batch, k_cache.shape[2], capacity, dtype=_lse_dtype(q.dtype))


@torch.library.register_fake("memkernels::accumulate_colstats", lib=_lib)
def _(stats, *args, **options):
    return None


@torch.library.register_fake("memkernels::knn_topk", lib=_lib)
def _(q, bank, valid_len, *, k, metric, buckets):
    sizes = *q.shape[:2], k
    return q.new_empty(sizes, dtype=_lse_dtype(q.dtype)), q.new_empty(sizes, dtype=torch.int64)


@torch.library.register_fake("memkernels::indexer_scores", lib=_lib)
def _(q, w, k, page_table, seq_lens, cu_seqlens_q, *, causal):
    capacity = k.shape[-2] if page_table is None else k.shape[1] * page_table.shape[1]
    return q.new_empty(q.shape[0], capacity, dtype=_lse_dtype(q.dtype))


@torch.library.register_fake("memkernels::indexer_scores_backward", lib=_lib)
def _(dscores, q, w, k, page_table, seq_lens, cu_seqlens_q, *, needs, causal):
    inputs = enumerate((q, w, k))
    return tuple(t.new_empty(t.shape if needs >> bit & 1 else (0,)) for bit, t in inputs)


def _register_autograd(namespace: str, lib) -> None:
    backward = getattr(torch.ops, namespace).indexer_scores_backward.default

    def context(ctx, inputs, keyword_only_inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.options = keyword_only_inputs

    def gradient(ctx, dscores):
        needs = sum(1 << bit for bit in range(3) if ctx.needs_input_grad[bit])
        grads = backward(dscores.contiguous(), *ctx.saved_tensors, needs=needs, **ctx.options)
        needed = (grad if needs >> bit & 1 else None for bit, grad in enumerate(grads))
        return *needed, None, None, None

    torch.library.register_autograd(
        f"{namespace}::indexer_scores", gradient, setup_context=context, lib=lib
    )


_register_autograd("memkernels", _lib)
_library.once_differentiable("indexer_scores")


def _cast_score_pages(dtype, q, summary, *args, **options):
    return (q.to(summary.dtype) if _library.autocasts(q) else q, summary, *args), options


_library.register_autocast("score_pages", _cast_score_pages)


def _cast_query(dtype, q, k_cache, *args, **options):
    return (q.to(k_cache.dtype) if _library.autocasts(q) else q, k_cache, *args), options


def _cast_accumulate_colstats(dtype, stats, *args, **options):
    args, options = _cast_query(dtype, *args, **options)
    return (stats, *args), options


_library.register_autocast("attention_colstats", _cast_query)
_library.register_autocast("accumulate_colstats", _cast_accumulate_colstats)
_library.register_autocast("knn_topk", _cast_query)


def _cast_indexer(dtype, q, w, k, page_table, *args, **options):
    if page_table is not None:
        dtype = k.dtype
    q, k = (t.to(dtype) if _library.autocasts(t) else t for t in (q, k))
    if w.dtype != q.dtype and _library.autocasts(w):
        w = w.float()
    return (q, w, k, page_table, *args), options


_library.register_autocast("indexer_scores", _cast_indexer)
