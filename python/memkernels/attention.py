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
    if _library.use_fallback(q, "paged_attention"):
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
    if _library.use_fallback(outs, "merge_states"):
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


def lse_to_log2(lse: Tensor) -> Tensor:
    """Natural-log lse to base 2, the convention of FlashInfer."""
    return lse / _LN2


def lse_from_log2(lse: Tensor) -> Tensor:
    """Base-2 lse (the convention of FlashInfer) to the natural log used here."""
    return lse * _LN2


# ---- registrations -------------------------------------------------------------------------------

_ops = torch.ops.memkernels
_paged_attention = _ops.paged_attention.default
_paged_attention_backward = _ops.paged_attention_backward.default
_merge_states = _ops.merge_states.default
_merge_states_backward = _ops.merge_states_backward.default
_append_kv = _ops.append_kv.default

_lib = _library.library


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@torch.library.register_fake("memkernels::paged_attention", lib=_lib)
def _(q, k_cache, v_cache, *args, **options):
    out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=_lse_dtype(q.dtype))


@torch.library.register_fake("memkernels::paged_attention_backward", lib=_lib)
def _(dout, dlse, out, lse, q, k_cache, v_cache, *args, needs, **options):
    key_bias, sink_logit = args[5], args[6]
    inputs = (q, k_cache, v_cache, key_bias, sink_logit)
    return tuple(
        t.new_empty(t.shape) if needs >> i & 1 else q.new_empty(0) for i, t in enumerate(inputs)
    )


def _paged_attention_context(ctx, inputs, keyword_only_inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs


def _paged_attention_grad(ctx, dout, dlse):
    *inputs, out, lse = ctx.saved_tensors
    differentiable = (0, 1, 2, 8, 9)  # q, k_cache, v_cache, key_bias, sink_logit
    needs = sum(1 << bit for bit, i in enumerate(differentiable) if ctx.needs_input_grad[i])
    grads: list[Tensor | None] = [None] * len(inputs)
    if (dout is None and dlse is None) or not needs:
        return tuple(grads)
    if dout is None:
        dout = torch.zeros_like(out)
    computed = _paged_attention_backward(
        dout.contiguous(), _contiguous(dlse), out, lse, *inputs, needs=needs, **ctx.options
    )
    for bit, i in enumerate(differentiable):
        if ctx.needs_input_grad[i]:
            grads[i] = computed[bit]
    return tuple(grads)


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
    _paged_attention._name,
    _paged_attention_grad,
    setup_context=_paged_attention_context,
    lib=_lib,
)
torch.library.register_autograd(
    _merge_states._name, _merge_states_grad, setup_context=_merge_states_context, lib=_lib
)
_library.once_differentiable("paged_attention")
_library.once_differentiable("merge_states")
_library.in_place("append_kv", mutated=("k_cache", "v_cache"))


@torch.library.register_fake("memkernels::append_kv", lib=_lib)
def _(k, v, k_cache, v_cache, slot_mapping):
    return None


def _cast_paged_attention(dtype, q, k_cache, v_cache, page_table, *args, **options):
    if page_table is not None:
        dtype = k_cache.dtype
    cast = [t.to(dtype) if _library.autocasts(t) else t for t in (q, k_cache, v_cache)]
    return (*cast, page_table, *args), options


_library.register_autocast("paged_attention", _cast_paged_attention)
