"""Attention over paged, contiguous or packed keys and values, and what keeps such caches.

Conventions of the family: ``total_q`` query tokens of ``B`` sequences, ``Hq`` query heads in
groups of ``Hq / Hkv`` per key-value head, head dims ``D`` and ``Dv`` up to 576, natural-log lse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memkernels import _library, fallback

_LN2 = math.log(2.0)
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | Tensor | None = None,
    sink_tokens: int = 0,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    sink_logit: Tensor | None = None,
    max_seqlen: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the visible keys of its sequence.

    PagedAttention (Kwon et al., 2023) with grouped query heads, for decoding, prefill and
    training alike. Keys and values lie in one of three layouts:

    * paged: caches ``[num_pages, page_size, Hkv, D]`` and a ``page_table``;
    * contiguous (``page_table=None``): ``[B, Lmax, Hkv, D]``;
    * packed (``cu_seqlens_k`` given): ``[total_k, Hkv, D]``, lengths from ``cu_seqlens_k``.

    All strides are honoured (an HND cache is a permuted view, V may be a slice of K); only the
    last dimension must be contiguous.

    Query ``i`` of the ``n`` of a sequence of length ``L`` stands at position
    ``p = L - n + i``. It sees key ``j < L`` if ``j <= p`` (when causal) and
    ``p - j < window or j < sink_tokens`` (when there is a window). Its logit is
    ``s = scale * q.k``, capped to ``softcap * tanh(s / softcap)``, plus ``key_bias``.

    On the CPU, sequences whose rows of the page table begin with the same pages, and which have
    equally many queries and no windows, read these pages once for all of them (ChunkAttention, Ye
    et al., 2024) as far as they fill whole splits: 256 tokens, or the next power of two that cuts
    the sequence into at most 32. No bit of a result depends on that.

    Args:
        q: ``[total_q, Hq, D]``; float32, bfloat16, float16, or float64 on the CPU.
        k_cache, v_cache: keys and values (last dim ``Dv``), dtype of ``q``.
        page_table: ``[B, max_pages]`` integers. Only the first ``ceil(L / page_size)`` entries of
            a row are read; -1 is an absent page, whose tokens are skipped.
        seq_lens: ``[B]`` integers, tokens in the cache including the new ones. May be omitted
            for contiguous caches (all ``Lmax``); must be omitted for packed ones.
        cu_seqlens_q: ``[B + 1]`` offsets of each sequence's queries; None: one query a sequence.
        cu_seqlens_k: ``[B + 1]`` offsets of each sequence's packed keys.
        scale: factor on ``q.k``; None: ``D ** -0.5``.
        causal: hide keys after the query's position.
        window: how many of the latest keys a query sees, itself included; a number, or an integer
            tensor ``[Hkv]`` for per-head windows (at least ``L``: all keys).
        sink_tokens: first keys of a sequence that stay visible outside the window.
        softcap: cap on logits; 0: none.
        key_bias: added to the logits of a key; shape of ``k_cache`` without ``D``, float32 or
            the dtype of ``q``. -inf hides the key.
        sink_logit: ``[Hq]``, one more logit a head whose value is zero (attention sinks;
            zeros give softmax_1). ``lse`` includes it.
        max_seqlen: host-side bound on the lengths; never changes a result.
        return_lse: also return the log-sum-exp.

    Returns:
        ``out [total_q, Hq, Dv]``, or ``(out, lse)`` with ``lse [total_q, Hq]`` in float32
        (float64 for float64), the natural log of the softmax denominator. A row that sees no key
        gives 0 and -inf (or its sink logit).

    Differentiable once in q, k_cache, v_cache, key_bias, sink_logit; lse carries gradient.
    Deterministic; other sequences of the batch never change a sequence's bits. Under autocast,
    contiguous and packed inputs are cast to the autocast dtype; with a page table, q is cast to
    the dtype of the cache.

    Raises:
        RuntimeError: on any shape, dtype, stride, length or page index that contradicts the
            above, naming the argument; nothing has been computed then.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if _library.use_fallback(q, "paged_attention", q, k_cache, v_cache, key_bias, sink_logit):
        out, lse = fallback.paged_attention(
            q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            scale=scale, causal=causal, window=window, sink_tokens=sink_tokens, softcap=softcap,
            key_bias=key_bias, sink_logit=sink_logit, max_seqlen=max_seqlen,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    head_window = None
    if isinstance(window, Tensor):
        head_window, window = window, None
    tensors = (
        q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, cu_seqlens_k, head_window,
        key_bias, sink_logit,
    )  # fmt: skip
    options = {"scale": scale, "causal": causal}
    if window is not None:
        options["window"] = window
    if sink_tokens:
        options["sink_tokens"] = sink_tokens
    if softcap:
        options["softcap"] = softcap
    if max_seqlen is not None:
        options["max_seqlen"] = max_seqlen
    if _library.below_autograd(q, k_cache, v_cache, key_bias, sink_logit):
        with _BelowAutograd():
            out, lse = _paged_attention(*tensors, **options)
    else:
        out, lse = _paged_attention(*tensors, **options)
    return (out, lse) if return_lse else out


def gather_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    page_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    *,
    unit: str = "page",
    scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    sink_logit: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the pages or tokens listed for it.

    The attention of systems that select their keys: Quest (Tang et al., 2024), NSA (Yuan et al.,
    2025), MoBA (Lu et al., 2025) by pages; DeepSeek sparse attention and RetrievalAttention (Liu
    et al., 2024) by tokens.

    Lists are logical: the n-th page or token of the query's own sequence, found through the page
    table, so that they outlive forks and moves. Everything else (layouts, positions, logits,
    results) is as in `paged_attention`, which this equals when every page is listed in order: bit
    for bit with one query a sequence, else up to rounding.

    Args:
        q: ``[total_q, Hq, D]``; float32, bfloat16, float16, or float64 on the CPU.
        k_cache, v_cache: ``[num_pages, page_size, Hkv, D]`` and ``[..., Dv]``, dtype of ``q``; or
            contiguous ``[B, Lmax, Hkv, D]`` with ``page_table=None`` and ``unit="token"``.
        indices: ``[total_q, Hkv, K]`` integers, or ``[total_q, 1, K]`` for all heads alike. -1 is
            skipped, a duplicate counts each time. A page is cut at the sequence's length and, when
            causal, at the query's position.
        page_table: ``[B, max_pages]`` integers; only listed entries are read. -1 is an absent page,
            whose tokens are skipped.
        seq_lens: ``[B]`` integers, tokens in the cache including the new ones.
        cu_seqlens_q: ``[B + 1]`` offsets of each sequence's queries; None: one query a sequence.
        unit: what an index names, "page" or "token".
        scale, causal, softcap, key_bias, sink_logit, return_lse: as in `paged_attention`.

    Returns:
        ``out [total_q, Hq, Dv]``, or ``(out, lse)``, as `paged_attention` does.

    Differentiable once in q, k_cache, v_cache, key_bias, sink_logit; lse carries gradient.
    Deterministic; neither other queries nor padding a list with -1 change a bit. Under autocast,
    q is cast to the dtype of the cache with a page table, else all go to the autocast dtype.

    Raises:
        RuntimeError: on any shape, dtype, stride, length or index that contradicts the above,
            naming the argument; nothing has been computed then.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if _library.use_fallback(q, "gather_attention", q, k_cache, v_cache, key_bias, sink_logit):
        out, lse = fallback.gather_attention(
            q, k_cache, v_cache, indices, page_table, seq_lens, cu_seqlens_q, unit=unit,
            scale=scale, causal=causal, softcap=softcap, key_bias=key_bias, sink_logit=sink_logit,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    tensors = (
        q, k_cache, v_cache, indices, page_table, seq_lens, cu_seqlens_q, key_bias, sink_logit,
    )  # fmt: skip
    options = {"unit": unit, "scale": scale, "causal": causal, "softcap": softcap}
    if _library.below_autograd(q, k_cache, v_cache, key_bias, sink_logit):
        with _BelowAutograd():
            out, lse = _gather_attention(*tensors, **options)
    else:
        out, lse = _gather_attention(*tensors, **options)
    return (out, lse) if return_lse else out


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint sets of keys into attention over their union.

    ``lse = log sum_n exp(lses[n])`` and ``out = sum_n exp(lses[n] - lse) * outs[n]``, as in
    cascade and split-KV attention (FlashInfer, Ye et al., 2025).

    Args:
        outs: ``[n, T, H, D]`` partial results; float32, bfloat16, float16, or float64 on the CPU.
        lses: ``[n, T, H]``, natural log, float32 (float64 beside float64); -inf marks a part that
            saw no key, whatever its ``outs`` hold. A sink logit belongs in exactly one part.

    Returns:
        ``out [T, H, D]`` and ``lse [T, H]``; 0 and -inf where every part is empty.

    Differentiable once in both arguments. Raises RuntimeError on mismatched shapes or dtypes.
    """
    if _library.use_fallback(outs, "merge_states", outs, lses):
        return fallback.merge_states(outs, lses)
    if _library.below_autograd(outs, lses):
        with _BelowAutograd():
            return _merge_states(outs, lses)
    return _merge_states(outs, lses)


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes the keys and values of new tokens into a paged cache, in place.

    Args:
        k, v: ``[T, Hkv, D]`` and ``[T, Hkv, Dv]``, dtype of the caches.
        k_cache, v_cache: ``[num_pages, page_size, Hkv, D]`` and ``[..., Dv]``, any strides.
        slot_mapping: ``[T]`` integers, ``page * page_size + offset``; -1 skips the token.

    Not differentiable. Raises RuntimeError on mismatched shapes or dtypes, on a slot outside the
    cache, on a slot given twice (on the CPU; the caller's duty on CUDA), and under grad mode if
    any tensor requires grad; the caches are unchanged then.
    """
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    if _library.use_fallback(k, "append_kv"):
        _library.no_gradient("append_kv", tensors)
        fallback.append_kv(k, v, k_cache, v_cache, slot_mapping)
    elif _library.below_autograd(*tensors.values()):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            _append_kv(k, v, k_cache, v_cache, slot_mapping)
        _library.bump_versions(k_cache, v_cache)
    else:
        _append_kv(k, v, k_cache, v_cache, slot_mapping)


def copy_pages(k_cache: Tensor, v_cache: Tensor, pairs: Tensor) -> None:
    """Copies whole pages of a paged cache onto others, in place: copy-on-write of shared pages.

    Args:
        k_cache, v_cache: ``[num_pages, page_size, Hkv, D]`` and ``[..., Dv]``, any strides.
        pairs: ``[n, 2]`` integers, source and destination page; -1 in either skips the pair.

    Not differentiable. Raises RuntimeError on mismatched shapes or dtypes, on a page outside the
    cache, on a destination given twice or a page that is both source and destination (on the CPU;
    the caller's duty on CUDA), and under grad mode if a cache requires grad; the caches are
    unchanged then.
    """
    tensors = {"k_cache": k_cache, "v_cache": v_cache}
    if _library.use_fallback(k_cache, "copy_pages"):
        _library.no_gradient("copy_pages", tensors)
        fallback.copy_pages(k_cache, v_cache, pairs)
    elif _library.below_autograd(*tensors.values()):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            _copy_pages(k_cache, v_cache, pairs)
        _library.bump_versions(k_cache, v_cache)
    else:
        _copy_pages(k_cache, v_cache, pairs)


def compact_kv(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, seq_lens: Tensor, keep: Tensor
) -> Tensor:
    """Keeps chosen tokens of each sequence and KV head and drops the others, in place.

    The eviction step of H2O (Zhang et al., 2023), SnapKV (Li et al., 2024) and their kin: the
    kept tokens of a head move, in their order, to positions ``0, 1, ...`` of the sequence. What
    lies behind them is unspecified; giving back pages is the caller's business.

    Args:
        k_cache, v_cache: ``[num_pages, page_size, Hkv, D]`` and ``[..., Dv]``, any strides; V may
            be a slice of K's rows, which then move once (no other overlap).
        page_table: ``[B, max_pages]`` integers; the first ``ceil(L / page_size)`` entries of a row
            are used.
        seq_lens: ``[B]`` integers.
        keep: ``[B, Hkv, K]`` integers, or ``[B, 1, K]`` for all heads alike: tokens of the
            sequence in rising order, then -1. All heads of a sequence keep equally many; for
            unequal budgets, treat heads as sequences (``Hkv`` = 1).

    Returns:
        ``[B]``, how many tokens each sequence has now, in the dtype of ``seq_lens``.

    Not differentiable. Raises RuntimeError on mismatched shapes or dtypes, on tokens outside the
    sequence, out of order or on an absent page, on heads that keep different numbers, on a page
    in use twice (copy shared pages first, see `copy_pages`), and under grad mode if a cache
    requires grad; the caches are unchanged then.
    """
    tensors = {"k_cache": k_cache, "v_cache": v_cache}
    if _library.use_fallback(k_cache, "compact_kv"):
        _library.no_gradient("compact_kv", tensors)
        return fallback.compact_kv(k_cache, v_cache, page_table, seq_lens, keep)
    if not _library.below_autograd(*tensors.values()):
        return _compact_kv(k_cache, v_cache, page_table, seq_lens, keep)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        new_seq_lens = _compact_kv(k_cache, v_cache, page_table, seq_lens, keep)
    _library.bump_versions(k_cache, v_cache)
    return new_seq_lens


def lse_to_log2(lse: Tensor) -> Tensor:
    """Natural-log lse to base 2, the convention of FlashInfer."""
    return lse / _LN2


def lse_from_log2(lse: Tensor) -> Tensor:
    """Base-2 lse (the convention of FlashInfer) to the natural log used here."""
    return lse * _LN2


# ---- registrations -------------------------------------------------------------------------------

_ops = torch.ops.memkernels
_paged_attention = _ops.paged_attention.default
_gather_attention = _ops.gather_attention.default
_merge_states = _ops.merge_states.default
_merge_states_backward = _ops.merge_states_backward.default
_append_kv = _ops.append_kv.default
_copy_pages = _ops.copy_pages.default
_compact_kv = _ops.compact_kv.default

_lib = _library.library


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _register_attention(op, differentiable: tuple[str, ...], lib) -> None:
    """Fake and autograd of an op ``(q, k_cache, v_cache, ...) -> (out, lse)``; its backward's
    ``needs`` has a bit for each argument of ``differentiable``, in which order gradients return."""
    namespace, name = op._schema.name.split("::")
    backward = getattr(getattr(torch.ops, namespace), f"{name}_backward").default
    names = [argument.name for argument in op._schema.arguments]
    places = [names.index(name) for name in differentiable]

    def fake(q, k_cache, v_cache, *args, **options):
        out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])
        return out, q.new_empty(q.shape[0], q.shape[1], dtype=_lse_dtype(q.dtype))

    def fake_backward(dout, dlse, out, lse, *inputs, needs, **options):
        return tuple(
            inputs[i].new_empty(inputs[i].shape) if needs >> bit & 1 else dout.new_empty(0)
            for bit, i in enumerate(places)
        )

    def context(ctx, inputs, keyword_only_inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)
        ctx.options = keyword_only_inputs

    def gradient(ctx, dout, dlse):
        *inputs, out, lse = ctx.saved_tensors
        needs = sum(1 << bit for bit, i in enumerate(places) if ctx.needs_input_grad[i])
        grads: list[Tensor | None] = [None] * len(inputs)
        if (dout is None and dlse is None) or not needs:
            return tuple(grads)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        computed = backward(dout, _contiguous(dlse), out, lse, *inputs, needs=needs, **ctx.options)
        for bit, i in enumerate(places):
            if ctx.needs_input_grad[i]:
                grads[i] = computed[bit]
        return tuple(grads)

    torch.library.register_fake(op._schema.name, fake, lib=lib)
    torch.library.register_fake(backward._schema.name, fake_backward, lib=lib)
    torch.library.register_autograd(op._schema.name, gradient, setup_context=context, lib=lib)


def _register_autograd(namespace: str, lib) -> None:
    ops = getattr(torch.ops, namespace)
    for op in ops.paged_attention.default, ops.gather_attention.default:
        _register_attention(op, ("q", "k_cache", "v_cache", "key_bias", "sink_logit"), lib)


_register_autograd("memkernels", _lib)


@torch.library.register_fake("memkernels::merge_states", lib=_lib)
def _(outs, lses):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


@torch.library.register_fake("memkernels::merge_states_backward", lib=_lib)
def _(dout, dlse, out, lse, outs, lses):
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


def _merge_states_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _merge_states_grad(ctx, dout, dlse):
    outs, lses, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    douts, dlses = _merge_states_backward(dout, _contiguous(dlse), out, lse, outs, lses)
    needs = ctx.needs_input_grad
    return (douts if needs[0] else None, dlses if needs[1] else None)


torch.library.register_autograd(
    _merge_states._name, _merge_states_grad, setup_context=_merge_states_context, lib=_lib
)
for _op in ("paged_attention", "gather_attention", "merge_states"):
    _library.once_differentiable(_op)
for _op in ("append_kv", "copy_pages", "compact_kv"):
    _library.in_place(_op, mutated=("k_cache", "v_cache"))


@torch.library.register_fake("memkernels::append_kv", lib=_lib)
def _(k, v, k_cache, v_cache, slot_mapping):
    return None


@torch.library.register_fake("memkernels::copy_pages", lib=_lib)
def _(k_cache, v_cache, pairs):
    return None


@torch.library.register_fake("memkernels::compact_kv", lib=_lib)
def _(k_cache, v_cache, page_table, seq_lens, keep):
    return torch.empty_like(seq_lens, memory_format=torch.contiguous_format)


def _cast_paged_attention(dtype, q, k_cache, v_cache, page_table, *args, **options):
    if page_table is not None:
        dtype = k_cache.dtype
    cast = [t.to(dtype) if _library.autocasts(t) else t for t in (q, k_cache, v_cache)]
    return (*cast, page_table, *args), options


_library.register_autocast("paged_attention", _cast_paged_attention)


def _cast_gather_attention(dtype, q, k_cache, v_cache, indices, *args, **options):
    cast, options = _cast_paged_attention(dtype, q, k_cache, v_cache, *args, **options)
    return (*cast[:3], indices, *cast[3:]), options


_library.register_autocast("gather_attention", _cast_gather_attention)
