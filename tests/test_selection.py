"""Summaries and scores of pages, top-k and eviction, then what every op of selection promises."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memkernels
from cases import (
    arrays,
    attention_case,
    colstats_case,
    evict_case,
    indexer_case,
    knn_case,
    of_sequence,
    score_case,
    share_pages,
    used_pages,
)
from memkernels import _C, fallback, reference
from memkernels.nn import PagedKVCache
from test_attention import DTYPES, RAGGED, apart, run_python
from test_attention import ERRORS as ATTENTION_ERRORS
from tolerance import assert_accurate, assert_same_bits, unchanged

INDEX_DTYPES = [torch.int32, torch.int64]
KINDS = ["minmax", "mean"]
ALONE = 16  # slack of what may be a single number, and that the small difference of large ones
LONG = {"lengths": [3000, 40, 0, 300, 17], "queries": [1, 40, 0, 300, 3]}

kinds = pytest.mark.parametrize("kind", KINDS)


# ---- what the tests of this family share ---------------------------------------------------------


def at_random(**strategies):
    """`hypothesis.given`, with half the examples: there are eight ops, on two backends."""
    half = settings(max_examples=settings.default.max_examples // 2)
    return lambda test: half(given(**strategies)(test))


@st.composite
def attention_sizes(draw):
    """Keyword arguments of `attention_case`, but for the kind and the options."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 7, 16]) | st.integers(0, 60), max_size=3))
    decode = draw(st.booleans())
    num_kv_heads = draw(st.integers(1, 3))
    return {
        "lengths": lengths,
        "queries": None if decode else [draw(st.integers(0, min(n, 20) + 2)) for n in lengths],
        "heads": (num_kv_heads * draw(st.sampled_from([1, 2, 4, 5, 8])), num_kv_heads),
        "head_dims": (draw(st.integers(1, 80) | st.just(128)), 1),
        "page_size": draw(st.sampled_from([1, 3, 7, 16, 32])),
        "layout": draw(st.sampled_from(["NHD", "HND"])),
        "absent_pages": draw(st.sampled_from([0, 0.3])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "index_dtype": draw(st.sampled_from(INDEX_DTYPES)),
        "seed": draw(st.integers(0, 2**16)),
    }


def tensors(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def outcome(ops, op, arguments):
    """What an op returns; of one that writes instead, what it has written."""
    written = "summary" if op == "update_summaries" else None
    if written:
        arguments = arguments | {written: arguments[written].clone()}
    with unchanged(*(value for name, value in arguments.items() if name != written)):
        result = getattr(ops, op)(**arguments)
    return arguments[written] if written else result


def check(ops, op, arguments, slack=1):
    """Against the reference: indices exactly, numbers as accurately as sums in float32 are."""
    actual = outcome(ops, op, arguments)
    exact = getattr(reference, op)(**arrays(arguments))
    baseline = outcome(fallback, op, arguments)
    if isinstance(actual, Tensor):
        check_result(actual, exact, baseline, slack)
    else:
        for each in zip(actual, exact, baseline, strict=True):
            check_result(*each, slack)
    return actual


def check_result(actual, exact, baseline, slack):
    if actual.is_floating_point():
        assert_accurate(actual, exact, baseline, dtype=actual.dtype, slack=slack)
    else:
        np.testing.assert_array_equal(actual.numpy(), exact)


def check_refused(ops, op, arguments, names):
    """By a message that names the op and one of the arguments, with nothing changed."""
    message = rf"{op}: .*\b({names})\b"
    with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments)


def check_error(ops, op, arguments, error):
    """error: (names, changes) of an ERRORS, changes a dict or what makes one of the arguments."""
    names, changes = error
    if callable(changes):
        changes = changes(SimpleNamespace(**arguments))
    check_refused(ops, op, arguments | changes, names)


def opcheck(op, arguments):
    op = getattr(torch.ops.memkernels, op).default
    schema = op._schema.arguments
    positional = [arguments.get(a.name) for a in schema if not a.kwarg_only]
    options = [a.name for a in schema if a.kwarg_only and a.name in arguments]
    torch.library.opcheck(op, positional, {name: arguments[name] for name in options})


def put(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


TABLE_ERRORS = {
    name: ATTENTION_ERRORS[name]
    for name in (
        "rows_of_page_table", "dtype_of_page_table", "page_too_large", "page_below_minus_one",
        "rows_of_seq_lens", "seq_lens_too_large", "seq_lens_negative", "dtype_of_seq_lens",
    )
} | {"rank_of_page_table": ("page_table", lambda c: {"page_table": c.page_table[0]})}  # fmt: skip

QUERY_ERRORS = {
    name: ATTENTION_ERRORS[name]
    for name in (
        "rows_of_q", "rank_of_q", "integer_q", "cu_seqlens_q_start", "cu_seqlens_q_end",
        "cu_seqlens_q_falls", "cu_seqlens_q_size", "rows_of_no_sequence",
    )
}  # fmt: skip


# ---- summarize_keys ------------------------------------------------------------------------------


def keys_of(case, kind="minmax"):
    """Arguments of `memkernels.summarize_keys`."""
    names = "k_cache", "page_table", "seq_lens"
    return {name: getattr(case, name) for name in names} | {"kind": kind}


def check_summary(ops, case, kind):
    arguments = keys_of(case, kind)
    if kind == "mean":
        summary = check(ops, "summarize_keys", arguments, slack=ALONE)
        assert summary.dtype == torch.promote_types(case.k_cache.dtype, torch.float32)
        return summary
    summary = outcome(ops, "summarize_keys", arguments)
    exact = reference.summarize_keys(**arrays(arguments))
    assert_same_bits(summary, torch.from_numpy(exact).to(case.k_cache.dtype))
    return summary


@at_random(sizes=attention_sizes(), kind=st.sampled_from(KINDS), shared=st.booleans())
def test_summaries_at_random(selection_ops, sizes, kind, shared):
    """Shared pages count as far as the longest sequence fills them, or NaN would be missing."""
    case = attention_case("paged", **sizes)
    check_summary(selection_ops, share_pages(case, sizes["seed"]) if shared else case, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [5, 64, 128, 576])
@kinds
def test_summaries_of_head_dims(selection_ops, kind, dtype, head_dim):
    sizes = {"head_dims": (head_dim, 1), "layout": "HND", "dtype": dtype}
    check_summary(selection_ops, attention_case("paged", [50, 18, 0, 129], **sizes), kind)


@kinds
def test_summaries_of_many_pages(selection_ops, kind):
    check_summary(selection_ops, attention_case("paged", [9000, 5, 4000], head_dims=(8, 1)), kind)


def test_a_page_counts_as_far_as_its_longest_sequence_fills_it(selection_ops):
    """The two sequences have the same three pages, of which the shorter fills one and a half."""
    case = attention_case("paged", [40])
    expected = check_summary(selection_ops, case, "minmax")
    table = case.page_table.expand(2, -1)
    shared = case.replace(page_table=table, seq_lens=torch.tensor([24, 40]))
    assert_same_bits(check_summary(selection_ops, shared, "minmax"), expected)


@kinds
def test_pages_of_no_sequence_have_summary_zero(selection_ops, kind):
    case = attention_case("paged", [40, 0, 7], absent_pages=0.3)
    summary = outcome(selection_ops, "summarize_keys", keys_of(case, kind))
    assert not summary[~used_pages(case)].any()
    nobody = case.replace(seq_lens=torch.zeros_like(case.seq_lens))
    assert not outcome(selection_ops, "summarize_keys", keys_of(nobody, kind)).any()


@kinds
def test_summaries_of_no_sequences_and_of_no_pages(selection_ops, kind):
    case = attention_case("paged", [], head_dims=(8, 8))
    summary = check_summary(selection_ops, case, kind)
    shape = (2, 2, 2, 8) if kind == "minmax" else (2, 2, 8)
    assert summary.shape == shape and not summary.any()
    summary = check_summary(selection_ops, case.replace(k_cache=case.k_cache[:0]), kind)
    assert summary.shape == (0, *shape[1:])


@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_of_a_key_reaches_only_its_page_head_and_channel(selection_ops, kind, value):
    case = attention_case("paged", [40, 20])
    clean = check_summary(selection_ops, case, kind)
    page = case.page_table[0, 1].item()
    for offset in range(16):
        dirty = case.replace(k_cache=put(case.k_cache, (page, offset, 1, 3), value))
        summary = check_summary(selection_ops, dirty, kind)
        if value != value:
            assert summary[page, 1, ..., 3].isnan().all()
        summary[page, 1, ..., 3] = clean[page, 1, ..., 3]
        assert_same_bits(summary, clean)


@pytest.mark.parametrize("dim", range(3))
def test_summaries_of_strided_caches(selection_ops, dim):
    case = attention_case("paged", RAGGED["lengths"])
    strided = {"k_cache": apart(case.k_cache, dim), "page_table": apart(case.page_table, 1)}
    check_summary(selection_ops, case.replace(**strided), "minmax")


def test_lengths_near_the_largest_integer_are_refused():
    """Rounding them up to pages must not wrap around."""
    cache, table = torch.randn(4, 16, 2, 8), torch.tensor([[0, 1]])
    for length in 2**63 - 1, 2**63 - 16:
        lens = torch.tensor([length])
        for op, arguments in {
            "summarize_keys": (cache, table, lens),
            "score_pages": (torch.randn(1, 2, 8), torch.randn(4, 2, 2, 8), table, lens, 16),
            "paged_attention": (torch.randn(1, 2, 8), cache, cache, table, lens),
            "compact_kv": (cache, cache, table, lens, torch.zeros(1, 1, 1).int()),
        }.items():
            with pytest.raises(RuntimeError, match=f"{op}: seq_lens"):
                getattr(memkernels, op)(*arguments)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_tangents_are_never_lost(forward_mode):
    q, bank = torch.randn(2, 1, 8), torch.randn(1, 9, 8)
    with torch.autograd.forward_ad.dual_level():
        if forward_mode:
            q = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(RuntimeError, match=r"knn_topk: q .*not differentiable"):
                memkernels.knn_topk(q, bank, None, 2)
        else:
            memkernels.knn_topk(q, bank, None, 2)


SUMMARY_ERRORS = TABLE_ERRORS | {
    "rank_of_k_cache": ("k_cache", lambda c: {"k_cache": c.k_cache[0]}),
    "integer_k_cache": ("k_cache", lambda c: {"k_cache": c.k_cache.int()}),
    "kind": ("kind", {"kind": "median"}),
}  # fmt: skip


@pytest.mark.parametrize("error", SUMMARY_ERRORS)
def test_summary_errors_name_the_argument_and_change_nothing(selection_ops, error):
    arguments = keys_of(attention_case("paged", RAGGED["lengths"]))
    check_error(selection_ops, "summarize_keys", arguments, SUMMARY_ERRORS[error])


# ---- update_summaries ----------------------------------------------------------------------------


def update_case(case, num_new, kind="minmax"):
    """Arguments of `memkernels.update_summaries`, with nonsense for summaries."""
    arguments = keys_of(case, kind)
    summary = torch.full_like(fallback.summarize_keys(**arguments), 7)
    del arguments["kind"]
    return {"summary": summary, **arguments, "num_new": num_new}


def touched_pages(case, num_new):
    """``[num_pages]``: whether the page holds one of the new tokens of a sequence."""
    page_size = case.k_cache.shape[1]
    counts = torch.as_tensor(num_new).expand(len(case.seq_lens)).tolist()
    touched = torch.zeros(len(case.k_cache), dtype=torch.bool)
    for row, length, n in zip(case.page_table.long(), case.seq_lens.tolist(), counts, strict=True):
        pages = row[max(0, length - n) // page_size : -(-length // page_size)] if n else row[:0]
        touched[pages[pages >= 0]] = True
    return touched


def check_update(ops, case, num_new, kind):
    arguments = update_case(case, num_new, kind)
    expected = outcome(ops, "summarize_keys", keys_of(case, kind))
    untouched = ~touched_pages(case, num_new)
    expected[untouched] = arguments["summary"][untouched]
    assert_same_bits(outcome(ops, "update_summaries", arguments), expected)
    exact = torch.from_numpy(reference.update_summaries(**arrays(arguments)))
    torch.testing.assert_close(exact.to(expected.dtype), expected, equal_nan=True)


@at_random(
    data=st.data(), sizes=attention_sizes(), kind=st.sampled_from(KINDS), shared=st.booleans()
)
def test_updates_at_random(selection_ops, data, sizes, kind, shared):
    """Pages with new tokens get the bits of `summarize_keys`, the others keep theirs."""
    case = attention_case("paged", **sizes)
    if shared:
        case = share_pages(case, sizes["seed"])
    counts = st.sampled_from([0, 1, 2, 16, 2**31 - 1]) | st.integers(0, 60)
    if data.draw(st.booleans()):
        num_new = data.draw(counts)
    else:
        num_new = torch.tensor(
            [data.draw(counts) for _ in sizes["lengths"]],
            dtype=data.draw(st.sampled_from(INDEX_DTYPES)),
        )
    check_update(selection_ops, case, num_new, kind)


@kinds
def test_one_new_token_is_the_default(selection_ops, kind):
    case = attention_case("paged", [17, 16, 0])
    arguments = update_case(case, 1, kind)
    expected = outcome(selection_ops, "update_summaries", arguments)
    del arguments["num_new"]
    assert_same_bits(outcome(selection_ops, "update_summaries", arguments), expected)


@at_random(data=st.data(), kind=st.sampled_from(KINDS))
def test_updating_is_rebuilding_as_a_cache_lives(selection_ops, data, kind):
    """Appended to, forked with copy-on-write, freed, and its pages used again."""
    cache = PagedKVCache(
        *(1, 64, data.draw(st.sampled_from([1, 3, 4])), 2, 5),
        max_seqs=5,
        layout=data.draw(st.sampled_from(["NHD", "HND"])),
    )
    cache.k.fill_(torch.nan)
    tables = {"page_table": cache.page_table, "seq_lens": cache.seq_lens}
    pages = SimpleNamespace(k_cache=cache.k[0], **tables)
    summary = selection_ops.summarize_keys(**keys_of(pages, kind))
    ids = cache.allocate(1)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    for event in data.draw(st.lists(st.sampled_from(["extend", "extend", "fork", "free"]))):
        if event == "free" and ids:
            cache.free([ids.pop(data.draw(st.integers(0, len(ids) - 1)))])
        elif event == "fork" and len(ids) < 5:
            ids += cache.fork(data.draw(st.sampled_from(ids))) if ids else cache.allocate(1)
        elif event == "extend" and ids and cache.num_free_pages > 50:
            growing = data.draw(st.lists(st.sampled_from(ids), unique=True))
            counts = [data.draw(st.integers(0, 9)) for _ in growing]
            step = cache.extend(growing, counts)
            k = torch.randn(sum(counts), 2, 5, generator=generator)
            cache.append(0, k, k, step)
            selection_ops.update_summaries(
                summary, cache.k[0], step.page_table, step.seq_lens, torch.tensor(counts).long()
            )
        rebuilt = selection_ops.summarize_keys(**keys_of(pages, kind))
        used = used_pages(pages)
        assert_same_bits(summary[used], rebuilt[used])


@kinds
def test_updating_is_rebuilding_after_compaction(selection_ops, kind):
    """All that is left is new: more new tokens than tokens are fine."""
    case = attention_case("paged", [40, 9])
    summary = outcome(selection_ops, "summarize_keys", keys_of(case, kind))
    keep = torch.tensor([0, 3, 4, 7, 8]).expand(2, 2, -1)
    lens = memkernels.compact_kv(case.k_cache, case.v_cache, case.page_table, case.seq_lens, keep)
    case = case.replace(seq_lens=lens)
    selection_ops.update_summaries(summary, case.k_cache, case.page_table, lens, num_new=40)
    used = used_pages(case)
    rebuilt = outcome(selection_ops, "summarize_keys", keys_of(case, kind))
    assert_same_bits(summary[used], rebuilt[used])


UPDATE_ERRORS = TABLE_ERRORS | {
    "rank_of_k_cache": ("k_cache", lambda c: {"k_cache": c.k_cache[0]}),
    "pages_of_summary": ("summary|k_cache", lambda c: {"summary": c.summary[:-1].clone()}),
    "heads_of_summary": ("summary|k_cache", lambda c: {"summary": c.summary[:, :1].clone()}),
    "head_dim_of_summary": ("summary|k_cache", lambda c: {"summary": c.summary[..., :9].clone()}),
    "extrema_of_summary": ("summary", lambda c: {"summary": c.summary[:, :, :1].clone()}),
    "rank_of_summary": ("summary", lambda c: {"summary": c.summary[0]}),
    "dtype_of_summary": ("summary", lambda c: {"summary": c.summary.double()}),
    "dtype_of_means": ("summary", lambda c: {"summary": c.summary[:, :, 0].clone().bfloat16()}),
    "num_new_negative": ("num_new", {"num_new": -1}),
    "num_new_of_one_negative": ("num_new", {"num_new": torch.tensor([1, 0, -1, 2, 0])}),
    "size_of_num_new": ("num_new", {"num_new": torch.tensor([1, 0])}),
    "rank_of_num_new": ("num_new", {"num_new": torch.ones(5, 1, dtype=torch.long)}),
    "dtype_of_num_new": ("num_new", {"num_new": torch.ones(5)}),
}  # fmt: skip


@pytest.mark.parametrize("error", UPDATE_ERRORS)
def test_update_errors_name_the_argument_and_change_nothing(selection_ops, error):
    arguments = update_case(attention_case("paged", RAGGED["lengths"]), 3)
    check_error(selection_ops, "update_summaries", arguments, UPDATE_ERRORS[error])


@kinds
@pytest.mark.parametrize("dim", range(3))
def test_strided_summaries_are_updated_or_refused_by_name(selection_ops, kind, dim):
    arguments = update_case(attention_case("paged", RAGGED["lengths"]), 3, kind)
    expected = outcome(selection_ops, "update_summaries", arguments)
    strided = arguments | {"summary": apart(arguments["summary"], dim)}
    try:
        selection_ops.update_summaries(**strided)
    except RuntimeError as error:
        assert "update_summaries: summary" in str(error)
        expected = arguments["summary"]
    assert_same_bits(strided["summary"], expected)


def test_the_version_of_the_summary_alone_is_bumped(selection_ops):
    for num_new in 3, torch.tensor([1, 0, 2, 0, 3]):
        arguments = update_case(attention_case("paged", RAGGED["lengths"]), num_new)
        versions = {name: t._version for name, t in tensors(arguments).items()}
        selection_ops.update_summaries(**arguments)
        changed = [n for n, t in tensors(arguments).items() if t._version > versions[n]]
        assert changed == ["summary"]


def test_a_saved_summary_that_changes_is_noticed():
    arguments = update_case(attention_case("paged", RAGGED["lengths"]), 3)
    weight = torch.ones(1, requires_grad=True)
    product = (weight * arguments["summary"]).sum()
    memkernels.update_summaries(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_summaries_of_inference_mode():
    with torch.inference_mode():
        arguments = update_case(attention_case("paged", RAGGED["lengths"]), 3)
        memkernels.update_summaries(**arguments)


# ---- score_pages ---------------------------------------------------------------------------------


def check_scores(ops, arguments, slack=4):
    scores = check(ops, "score_pages", arguments, slack)
    assert scores.dtype == torch.promote_types(arguments["q"].dtype, torch.float32)
    return scores


@at_random(
    sizes=attention_sizes(),
    kind=st.sampled_from(KINDS),
    means=st.sampled_from(["widened", "as q"]),
    shared=st.booleans(),
    group_reduce=st.sampled_from(["max", "mean", "sum"]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3, -2.0]),
)
def test_scores_at_random(selection_ops, sizes, kind, means, shared, **options):
    summary_dtype = sizes["dtype"] if means == "as q" else None
    options |= {"summary_dtype": summary_dtype, "shared_pages": shared}
    check_scores(selection_ops, score_case(kind, **sizes, **options), slack=ALONE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((5, 1), 5), ((8, 2), 64), ((1, 1), 80), ((32, 1), 128), ((16, 1), 576)]
)
@kinds
def test_scores_of_head_dims(selection_ops, kind, dtype, heads, head_dim):
    sizes = {"heads": heads, "head_dims": (head_dim, 1), "dtype": dtype}
    check_scores(selection_ops, score_case(kind, [50, 18], [1, 5], **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{"lengths": [9000, 5, 0, 700]}, {"lengths": [290, 330],
                                   "queries": [290, 70], "heads": (2, 1)}])  # fmt: skip
@kinds
def test_scores_of_many_pages_and_of_many_queries(selection_ops, kind, dtype, sizes):
    check_scores(selection_ops, score_case(kind, **sizes, dtype=dtype, absent_pages=0.1))


def logical_keys(case, b):
    """``[L, Hkv, D]`` float64, the keys of sequence b, and ``[L]``, whether they are present."""
    j = torch.arange(case.seq_lens[b])
    page_size = case.k_cache.shape[1]
    page = case.page_table[b, j // page_size].long()
    return case.k_cache[page, j % page_size].double(), page >= 0


def check_bound(ops, case):
    """But for rounding, the score of a page is above the logits of its tokens."""
    summary = ops.summarize_keys(**keys_of(case))
    page_size, num_kv_heads, head_dim = case.k_cache.shape[1:]
    rounding = 2 * head_dim * torch.finfo(torch.promote_types(case.q.dtype, torch.float32)).eps
    scores = ops.score_pages(
        case.q, summary, case.page_table, case.seq_lens, page_size, case.cu_seqlens_q, causal=False
    )
    for b in range(len(case.seq_lens)):
        keys, present = logical_keys(case, b)
        keys, page = keys[present], (torch.arange(len(keys)) // page_size)[present]
        q = case.q[case.rows(b)].double().unflatten(1, (num_kv_heads, -1)) * head_dim**-0.5
        logits = torch.einsum("nhgd,lhd->nhgl", q, keys).amax(2)
        size = q.norm(dim=-1).amax(2)[..., None] * keys.norm(dim=-1).T
        above = scores[case.rows(b)][..., page] - logits
        assert (above >= -rounding * size).all()
        if page_size == 1:
            assert (above <= rounding * size).all()


@at_random(sizes=attention_sizes())
def test_no_logit_exceeds_the_score_of_its_page(selection_ops, sizes):
    """And if a page holds one token, its score is the logit."""
    check_bound(selection_ops, attention_case("paged", **sizes))


def test_no_logit_of_a_long_sequence_exceeds_the_score_of_its_page(selection_ops):
    for dtype in DTYPES:
        check_bound(selection_ops, attention_case("paged", [1500, 40], [3, 40], dtype=dtype))


def test_keys_after_the_query_hide_their_pages(selection_ops):
    """Of pages of 4 tokens, queries at 2 to 9 see one to three, and at -3 to -1 none."""
    arguments = score_case("minmax", [10, 2], [8, 5], page_size=4)
    visible = (check_scores(selection_ops, arguments) > -torch.inf).sum(-1)[:, 0]
    assert visible.tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 0, 0, 0, 1, 1]
    arguments["causal"] = False
    visible = (check_scores(selection_ops, arguments) > -torch.inf).sum(-1)[:, 0]
    assert visible.tolist() == [3] * 8 + [1] * 5


@kinds
def test_scores_of_no_sequences_of_no_tokens_and_of_no_pages(selection_ops, kind):
    for queries in None, []:
        assert check_scores(selection_ops, score_case(kind, [], queries)).shape == (0, 2, 1)
    arguments = score_case(kind, [0, 0], [2, 1])
    assert (check_scores(selection_ops, arguments) == -torch.inf).all()
    arguments |= {"summary": arguments["summary"][:0], "page_table": torch.empty(2, 0).int()}
    assert check_scores(selection_ops, arguments).shape == (3, 2, 0)


@kinds
@pytest.mark.parametrize("name", ["q", "summary"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("group_reduce", ["max", "mean", "sum"])
def test_nan_reaches_only_the_scores_that_use_it(selection_ops, kind, name, value, group_reduce):
    """It is in page 2 of sequence 1, which row 2 does not see, or in row 4, for KV head 1."""
    options = {"page_size": 4, "group_reduce": group_reduce}
    arguments = score_case(kind, [8, 16, 8], [2, 9, 1], **options)
    clean = outcome(selection_ops, "score_pages", arguments)
    page = arguments["page_table"][1, 2].item()
    place = (4, 3) if name == "q" else (page, 1)
    dirty = arguments | {name: put(arguments[name], place, value)}
    actual = outcome(selection_ops, "score_pages", dirty)
    exact = torch.from_numpy(reference.score_pages(**arrays(dirty)))
    touched = torch.zeros_like(actual, dtype=torch.bool)
    touched[(4, 1) if name == "q" else (slice(3, 11), 1, 2)] = True
    assert_same_bits(actual[~touched], clean[~touched])
    assert_same_bits(actual[touched].isnan(), exact[touched].isnan())
    assert not (actual == clean)[touched].all()


def move_pages(case):
    """The case with its pages in another order, and where each has gone."""
    num_pages, table = len(case.k_cache), case.page_table
    moved_to = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1))
    pages = moved_to[table.clamp(0, num_pages - 1).long()].to(table.dtype)
    table = pages.where((table >= 0) & (table < num_pages), table)
    return case.replace(k_cache=case.k_cache[moved_to.argsort()], page_table=table), moved_to


@at_random(sizes=attention_sizes(), kind=st.sampled_from(KINDS))
def test_where_pages_lie_never_matters(selection_ops, sizes, kind):
    """Not for a bit of a score, nor for what is selected."""
    case = attention_case("paged", **sizes)
    moved, moved_to = move_pages(case)

    def select(case):
        summary = selection_ops.summarize_keys(**keys_of(case, kind))
        lists = case.page_table, case.seq_lens, case.k_cache.shape[1], case.cu_seqlens_q
        scores = selection_ops.score_pages(case.q, summary, *lists, kind=kind)
        return summary, scores, selection_ops.select_topk(scores, 3)

    (summary, *selected), (moved_summary, *moved_selected) = select(case), select(moved)
    assert_same_bits(moved_summary[moved_to], summary)
    assert_same_bits(moved_selected, selected)


@kinds
def test_columns_behind_the_sequences_never_change_scores(selection_ops, kind):
    arguments = score_case(kind, **RAGGED)
    scores = outcome(selection_ops, "score_pages", arguments)
    table = torch.nn.functional.pad(arguments["page_table"], (0, 40), value=-7)
    wider = outcome(selection_ops, "score_pages", arguments | {"page_table": table})
    assert_same_bits(wider, torch.nn.functional.pad(scores, (0, 40), value=-torch.inf))


SCORE_ERRORS = TABLE_ERRORS | QUERY_ERRORS | {
    "more_heads_than_a_multiple": ("q|summary", lambda c: {"q": c.q.repeat(1, 2, 1)[:, :5]}),
    "head_dim": ("q|summary", lambda c: {"q": c.q[..., :32]}),
    "dtype_of_q": ("q|summary", lambda c: {"q": c.q.double()}),
    "dtype_of_summary": ("summary", lambda c: {"summary": c.summary.half()}),
    "dtype_of_means": (
        "summary", lambda c: {"summary": c.summary[:, :, 0].half(), "kind": "mean"}
    ),
    "rank_of_summary": ("summary", lambda c: {"summary": c.summary[0]}),
    "means_as_extrema": ("summary", lambda c: {"summary": c.summary[:, :, 0].clone()}),
    "extrema_as_means": ("summary", {"kind": "mean"}),
    "three_extrema": ("summary", lambda c: {"summary": c.summary[:, :, [0, 0, 1]]}),
    "pages_of_summary": ("page_table|summary", lambda c: {"summary": c.summary[:1]}),
    "page_size_zero": ("page_size", {"page_size": 0}),
    "no_heads_of_q": ("q", lambda c: {"q": c.q[:, :0]}),
    "scale_nan": ("scale", {"scale": float("nan")}),
    "page_size_too_small": ("seq_lens|page_table|page_size", {"page_size": 1}),
    "kind": ("kind", {"kind": "median"}),
    "group_reduce": ("group_reduce", {"group_reduce": "min"}),
}  # fmt: skip


@pytest.mark.parametrize("error", SCORE_ERRORS)
def test_score_errors_name_the_argument_and_change_nothing(selection_ops, error):
    arguments = score_case("minmax", **RAGGED)
    check_error(selection_ops, "score_pages", arguments, SCORE_ERRORS[error])


# ---- select_topk ---------------------------------------------------------------------------------


def best(scores, k, length, keep_first, keep_last, threshold):
    """The definition, for one row of float64s: by kept or not, score, index."""
    scores = scores[:length]
    index = np.arange(length)
    kept = (index < keep_first) | (index >= length - keep_last)
    eligible = scores > -np.inf
    if threshold is not None:
        eligible &= scores >= threshold
    order = np.lexsort((index, -np.where(eligible, scores, -np.inf), ~kept))
    return np.sort(order[(kept | eligible)[order]][:k])


def check_selected(ops, scores, k, lengths=None, keep_first=0, keep_last=0, threshold=None):
    ranges = {"keep_first": keep_first, "keep_last": keep_last, "threshold": threshold}
    with unchanged(scores, lengths):
        selected = ops.select_topk(scores, k, lengths, **ranges)
    *leading, n = scores.shape
    assert selected.dtype == torch.int32 and selected.shape == (*leading, k)
    assert selected.is_contiguous()
    rows = scores.double().numpy().reshape(np.prod(leading, dtype=int), n)
    lengths = torch.tensor(n) if lengths is None else lengths
    lengths = lengths.expand(leading).reshape(len(rows)).tolist()
    for actual, row, length in zip(selected.reshape(len(rows), k), rows, lengths, strict=True):
        expected = best(row, k, length, keep_first, keep_last, threshold)
        padded = np.pad(expected, (0, k - len(expected)), constant_values=-1)
        np.testing.assert_array_equal(actual.numpy(), padded)
    return selected


def kinds_of_rows(n, dtype):
    """``[10, n]``: everything that a selection could stumble over."""
    generator = torch.Generator().manual_seed(n)
    info = torch.finfo(dtype)
    random = torch.randn(n, generator=generator, dtype=torch.float64)
    levels = torch.randint(-3, 4, (n,), generator=generator).double()
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, info.max, -info.max])
    rows = [
        random,
        levels,
        random.sort().values,
        random.sort(descending=True).values,
        torch.full((n,), 1.5),
        torch.full((n,), torch.nan),
        torch.full((n,), -torch.inf),
        torch.copysign(torch.zeros(n).double(), random),
        levels * (info.smallest_normal * info.eps),  # denormals
        specials.double()[torch.randint(7, (n,), generator=generator)],
    ]
    return torch.stack([row.to(dtype) for row in rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 8192])
def test_select(selection_ops, n, dtype):
    rows = kinds_of_rows(n, dtype)
    for k in sorted({0, 1, 2, max(n - 1, 0), n, n + 5, 2048}):
        check_selected(selection_ops, rows, k)


@pytest.mark.parametrize(
    ("dtype", "k"),
    [(torch.float32, k) for k in (1, 2048, 99_999)]
    + [pytest.param(d, k, marks=pytest.mark.full) for d in DTYPES for k in (2, 100_000, 100_005)],
)
def test_select_from_many(selection_ops, dtype, k):
    check_selected(selection_ops, kinds_of_rows(100_000, dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 9, 300])
def test_kept_ranges_win_whatever_their_scores(selection_ops, n, dtype):
    """Even where they overlap or are longer than the row."""
    rows = kinds_of_rows(n, dtype)
    for keep_first, keep_last, extra in itertools.product((0, 1, n + 2), (0, 5, n), (0, 3)):
        k = keep_first + keep_last + extra
        check_selected(selection_ops, rows, k, None, keep_first, keep_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [-torch.inf, -1.0, 0.0, 1.5, torch.inf])
def test_scores_below_the_threshold_are_not_selected(selection_ops, dtype, threshold):
    """But those of kept ranges are."""
    for n, k in (9, 4), (65, 65), (1000, 1200):
        rows = kinds_of_rows(n, dtype)
        check_selected(selection_ops, rows, k, threshold=threshold)
        check_selected(selection_ops, rows, k, None, 2, 1, threshold=threshold)


@st.composite
def selections(draw):
    """Arguments of `memkernels.select_topk`: few different scores, of up to 5 dimensions."""
    leading = draw(st.lists(st.integers(0, 3), max_size=4))
    n = draw(st.integers(0, 40) | st.integers(0, 600))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scores = torch.randint(-9, 9, (*leading, n), generator=generator).double() / 2
    specials = torch.tensor([torch.nan, -torch.inf, torch.inf, -0.0]).double()
    chosen = torch.rand(scores.shape, generator=generator) < draw(st.sampled_from([0, 0.1, 0.9]))
    drawn = specials[torch.randint(4, scores.shape, generator=generator)]
    scores = drawn.where(chosen, scores).to(draw(st.sampled_from(DTYPES)))
    lengths = None
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, size])) for size in leading]
        shape = shape[draw(st.integers(0, len(shape))) :]
        lengths = torch.randint(n + 1, shape, generator=generator)
        lengths = lengths.to(draw(st.sampled_from(INDEX_DTYPES)))
    keep_first, keep_last = (draw(st.sampled_from([0, 0, 1, 4, 50])) for _ in range(2))
    return {
        "scores": draw(st.sampled_from([scores, *(apart(scores, d) for d in range(len(leading)))])),
        "k": keep_first + keep_last + draw(st.integers(0, 10) | st.integers(0, 700)),
        "lengths": lengths,
        "keep_first": keep_first,
        "keep_last": keep_last,
        "threshold": draw(st.sampled_from([None, None, 0.0, -1.5, 3.0])),
    }


@at_random(arguments=selections())
def test_select_at_random(selection_ops, arguments):
    check_selected(selection_ops, **arguments)


def test_select_from_strided_and_expanded_scores(selection_ops):
    scores = torch.randn(3, 4, 70)
    check_selected(selection_ops, scores.transpose(0, 1), 9)
    for dim in range(2):
        check_selected(selection_ops, apart(scores, dim), 9)
        check_selected(selection_ops, scores.narrow(dim, 0, 1).expand_as(scores), 3)


def test_lengths_cut_rows(selection_ops):
    """Per sequence, for all its heads; behind them NaN and inf mean nothing."""
    scores = torch.randn(4, 2, 30)
    lengths = torch.tensor([30, 0, 7, 1])[:, None]
    for behind in torch.nan, torch.inf:
        scores[torch.arange(30).expand_as(scores) >= lengths[..., None]] = behind
        for keep in 0, 3:
            check_selected(selection_ops, scores, 9, lengths, keep, keep)


def test_scores_of_training_are_selected_from(selection_ops):
    """Indices carry no gradient, so there is nothing to refuse."""
    scores = torch.randn(3, 20, requires_grad=True)
    selected = selection_ops.select_topk(scores, 4)
    assert not selected.requires_grad
    assert_same_bits(selected, selection_ops.select_topk(scores.detach(), 4))


SELECT_ERRORS = {
    "k_negative": ("k", {"k": -1}),
    "keep_first_negative": ("keep_first", {"keep_first": -1}),
    "keep_last_negative": ("keep_last", {"keep_last": -1}),
    "more_kept_than_k": ("keep_first|keep_last|k", {"keep_first": 3, "keep_last": 2}),
    "scalar": ("scores", lambda c: {"scores": c.scores[0, 0, 0], "lengths": None}),
    "six_dimensions": ("scores", lambda c: {"scores": c.scores[None, None, None]}),
    "integer_scores": ("scores", lambda c: {"scores": c.scores.int()}),
    "length_too_large": ("lengths", {"lengths": torch.tensor([[9], [21]])}),
    "length_negative": ("lengths", {"lengths": torch.tensor([[9], [-1]])}),
    "shape_of_lengths": ("lengths", {"lengths": torch.tensor([1, 2, 3, 4])}),
    "rank_of_lengths": ("lengths", {"lengths": torch.ones(1, 2, 3).int()}),
    "dtype_of_lengths": ("lengths", {"lengths": torch.ones(2, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("error", SELECT_ERRORS)
def test_select_errors_name_the_argument_and_change_nothing(selection_ops, error):
    arguments = {"scores": torch.randn(2, 3, 20), "k": 4, "lengths": torch.tensor([[9], [20]])}
    check_error(selection_ops, "select_topk", arguments, SELECT_ERRORS[error])


# ---- evict ---------------------------------------------------------------------------------------


def check_evicted(ops, arguments):
    """Against the reference, and what `memkernels.compact_kv` demands of it."""
    keep = check(ops, "evict", arguments)
    budget = arguments["budget"]
    heads = 1 if arguments.get("group") == "sequence" else arguments["stats"].shape[1]
    size = budget
    if isinstance(budget, Tensor):
        size = arguments.get("max_budget")
        size = arguments["stats"].shape[2] if size is None else size
    assert keep.dtype == torch.int32 and keep.shape == (len(arguments["stats"]), heads, size)
    kept = torch.minimum(arguments["seq_lens"], torch.as_tensor(budget))
    assert ((keep >= 0).sum(-1) == kept[:, None]).all()
    return keep


@st.composite
def evictions(draw):
    """Arguments of `memkernels.evict` whose budgets have room for what is protected."""
    lengths = draw(st.lists(st.integers(0, 40), max_size=3))
    options = {
        "heads": draw(st.integers(1, 3)),
        "levels": draw(st.sampled_from([2, 9, 60])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "index_dtype": draw(st.sampled_from(INDEX_DTYPES)),
        "seed": draw(st.integers(0, 2**16)),
        "keep_first": draw(st.sampled_from([0, 0, 2, 50])),
        "keep_last": draw(st.sampled_from([0, 0, 3, 50])),
        "group": draw(st.sampled_from(["head", "sequence"])),
    }
    arguments = evict_case(lengths, 0, **options)
    batch, heads, capacity = arguments["stats"].shape
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(batch, heads, capacity), (batch, 1, capacity), (capacity,)]))
        generator = torch.Generator().manual_seed(options["seed"] + 1)
        arguments["pinned"] = torch.rand(shape, generator=generator) < 0.1
    more = torch.tensor([draw(st.sampled_from([0, 1, 50])) for _ in lengths], dtype=torch.long)
    budgets = num_protected(arguments) + more
    largest = int(budgets.max()) if batch else 0
    if draw(st.booleans()):
        return arguments | {"budget": largest}
    max_budget = draw(st.sampled_from([largest, largest + 3, None]))
    if max_budget is None:
        budgets = budgets.clamp(max=capacity)
    budgets = budgets.to(options["index_dtype"])
    return arguments | {"budget": budgets, "max_budget": max_budget}


def num_protected(arguments):
    """``[B]``, of the head that has most."""
    stats, pinned = arguments["stats"], arguments.get("pinned", torch.tensor(False))
    j, length = torch.arange(stats.shape[2]), arguments["seq_lens"][:, None, None]
    pinned = pinned.expand(stats.shape)
    if arguments["group"] == "sequence":
        pinned = pinned.any(1, keepdim=True)
    ends = (j < arguments["keep_first"]) | (j >= length - arguments["keep_last"])
    return ((pinned | ends) & (j < length)).sum(-1).amax(-1)


@at_random(arguments=evictions())
def test_evict_at_random(selection_ops, arguments):
    check_evicted(selection_ops, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", ["head", "sequence"])
def test_evict_of_many(selection_ops, dtype, group):
    options = {"keep_first": 4, "keep_last": 64, "group": group, "dtype": dtype}
    check_evicted(selection_ops, evict_case([5000, 0, 400, 513, 512], 512, levels=60, **options))


def test_evict_never_drops_what_is_protected(selection_ops):
    arguments = evict_case([40, 9, 4], 8, keep_first=2, keep_last=3)
    pinned = torch.zeros(3, 2, 43, dtype=torch.bool)
    pinned[0, 0, [7, 8, 42]] = pinned[0, 1, 20] = True  # 42 is behind the end
    arguments["stats"][pinned] = torch.nan
    keep = check_evicted(selection_ops, arguments | {"pinned": pinned})
    assert {0, 1, 7, 8, 37, 38, 39} < set(keep[0, 0].tolist())
    assert {0, 1, 20, 37, 38, 39} < set(keep[0, 1].tolist())
    assert {0, 1, 6, 7, 8} < set(keep[1, 0].tolist())
    assert keep[2, 0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


@pytest.mark.parametrize("group", ["head", "sequence"])
def test_a_budget_beyond_the_length_keeps_everything(selection_ops, group):
    """Even if more than the budget would be protected of a longer sequence."""
    ranges = {"keep_first": 30, "keep_last": 30, "pinned": torch.ones(12).bool()}
    for budget in 9, 30, [9, 0, 5]:
        arguments = evict_case([9, 0, 5], budget, group=group, **ranges)
        keep = check_evicted(selection_ops, arguments)
        every = torch.arange(keep.shape[-1])
        every = every.where(every < arguments["seq_lens"][:, None, None], -1)
        assert_same_bits(keep, every.int().expand_as(keep).contiguous())


def test_nan_ranks_below_minus_infinity_and_both_are_kept_at_need(selection_ops):
    stats = torch.tensor([torch.nan, -torch.inf, -2.0, torch.nan, 1.0, -torch.inf]).expand(1, 1, 6)
    arguments = {"stats": stats, "seq_lens": torch.tensor([6])}
    for budget, expected in enumerate([[], [4], [2, 4], [1, 2, 4], [1, 2, 4, 5], [0, 1, 2, 4, 5]]):
        keep = check_evicted(selection_ops, arguments | {"budget": budget})
        assert keep.tolist() == [[expected]]


def test_evict_from_strided_statistics(selection_ops):
    arguments = evict_case([40, 0, 33], 8)
    for dim in range(3):
        check_evicted(selection_ops, arguments | {"stats": apart(arguments["stats"], dim)})


def test_evict_of_no_sequences_and_of_no_tokens(selection_ops):
    assert check_evicted(selection_ops, evict_case([], 4)).shape == (0, 2, 4)
    assert check_evicted(selection_ops, evict_case([], [], max_budget=4)).shape == (0, 2, 4)
    nothing = {"stats": torch.empty(2, 3, 0), "seq_lens": torch.zeros(2).int(), "budget": 2}
    assert (check_evicted(selection_ops, nothing) == -1).all()


def test_statistics_of_training_are_evicted_by(selection_ops):
    arguments = evict_case([40, 9], 4)
    expected = outcome(selection_ops, "evict", arguments)
    arguments["stats"].requires_grad_()
    assert_same_bits(outcome(selection_ops, "evict", arguments), expected)


@pytest.mark.parametrize("group", ["head", "sequence"])
def test_attend_forget_and_attend_again(selection_ops, group):
    """Attention over what eviction has kept is attention over the whole with the rest masked."""
    case = attention_case("paged", [50, 7, 0], causal=False, dtype=torch.float64)
    stats = selection_ops.attention_colstats(**colstats_case(case))
    ranges = {"keep_first": 2, "keep_last": 3}
    keep = selection_ops.evict(stats, case.seq_lens, 9, group=group, **ranges)
    bias = torch.full(case.k_cache.shape[:-1], -torch.inf, dtype=torch.float64)
    for b, head in itertools.product(range(3), range(2)):
        j = keep[b, head if group == "head" else 0].long()
        j = j[j >= 0]
        bias[case.page_table[b, j // 16].long(), j % 16, head] = 0
    expected = memkernels.paged_attention(**case.replace(key_bias=bias).arguments())
    caches = case.k_cache, case.v_cache
    lens = memkernels.compact_kv(*caches, case.page_table, case.seq_lens, keep)
    assert lens.tolist() == [9, 7, 0]
    actual = memkernels.paged_attention(**case.replace(seq_lens=lens).arguments())
    torch.testing.assert_close(actual, expected)


def test_a_cache_takes_what_eviction_keeps(selection_ops):
    cache = PagedKVCache(1, 20, 4, 2, 8, max_seqs=3)
    ids = cache.allocate(2)
    step = cache.extend(ids, [30, 5])
    k, q = torch.randn(35, 2, 8), torch.randn(35, 4, 8)
    cache.append(0, k, k, step)
    _, lse = cache.attend(0, q, step, return_lse=True)
    lists = step.page_table, step.seq_lens, step.cu_seqlens_q
    stats = selection_ops.attention_colstats(q, cache.k[0], *lists, lse)
    keep = selection_ops.evict(stats, step.seq_lens, 12, keep_first=1, keep_last=4)
    cache.compact(ids, keep)
    assert [cache.length(seq_id) for seq_id in ids] == [12, 5]
    rows = torch.arange(12)
    for head in range(2):
        kept = cache.k[0][cache.page_table[ids[0], rows // 4].long(), rows % 4, head]
        assert_same_bits(kept, k[keep[0, head].long(), head])


EVICT_ERRORS = {
    "rank_of_stats": ("stats", lambda c: {"stats": c.stats[0]}),
    "integer_stats": ("stats", lambda c: {"stats": torch.ones_like(c.stats).int()}),
    "seq_lens_too_large": ("seq_lens", lambda c: {"seq_lens": c.seq_lens + 40}),
    "seq_lens_negative": ("seq_lens", lambda c: {"seq_lens": c.seq_lens - 10}),
    "rows_of_seq_lens": ("seq_lens|stats", lambda c: {"seq_lens": c.seq_lens[:1]}),
    "dtype_of_seq_lens": ("seq_lens", lambda c: {"seq_lens": c.seq_lens.float()}),
    "budget_negative": ("budget", {"budget": -1}),
    "budget_of_one_negative": ("budget", {"budget": torch.tensor([12, -1])}),
    "rows_of_budget": ("budget", {"budget": torch.tensor([12])}),
    "dtype_of_budget": ("budget", {"budget": torch.tensor([12.0, 12.0])}),
    "budget_above_max_budget": (
        "budget|max_budget", {"budget": torch.tensor([12, 8]), "max_budget": 10}
    ),
    "max_budget_negative": (
        "max_budget", {"budget": torch.tensor([12, 8]), "max_budget": -1}
    ),
    "keep_first_negative": ("keep_first", {"keep_first": -1}),
    "keep_last_negative": ("keep_last", {"keep_last": -1}),
    "kept_ranges_beyond_the_budget": ("budget|keep_first|keep_last", {"budget": 4}),
    "kept_ranges_beyond_a_budget": (
        "budget|keep_first|keep_last", {"budget": torch.tensor([12, 4])}
    ),
    "pinned_beyond_the_budget": ("budget|pinned", {"pinned": torch.arange(43) % 4 == 0}),
    "pinned_beyond_the_budget_in_one_head": (
        "budget|pinned",
        {"pinned": torch.stack([torch.arange(43) < 1, torch.arange(43) % 4 == 0])},
    ),
    "shape_of_pinned": ("pinned", {"pinned": torch.ones(42).bool()}),
    "dtype_of_pinned": ("pinned", {"pinned": torch.zeros(43)}),
    "group": ("group", {"group": "layer"}),
}  # fmt: skip


@pytest.mark.parametrize("error", EVICT_ERRORS)
def test_evict_errors_name_the_argument_and_change_nothing(selection_ops, error):
    arguments = evict_case([40, 9], 8, keep_first=2, keep_last=3)
    check_error(selection_ops, "evict", arguments, EVICT_ERRORS[error])


# ---- every op ------------------------------------------------------------------------------------


def example(op, lengths, queries, *, dtype=torch.float32, head_dim=64):
    """Arguments of an op, for sequences of such sizes."""
    batch, longest, total_q = len(lengths), max(lengths), sum(queries)
    sizes = {"head_dims": (head_dim, 1), "dtype": dtype}
    if op == "summarize_keys":
        return keys_of(attention_case("paged", lengths, **sizes))
    if op == "update_summaries":
        return update_case(attention_case("paged", lengths, **sizes), torch.tensor(queries).int())
    if op == "score_pages":
        return score_case("minmax", lengths, queries, **sizes)
    if op == "select_topk":
        scores = torch.randn(batch, 2, longest, generator=torch.Generator().manual_seed(0))
        lengths = torch.tensor(lengths, dtype=torch.int32)[:, None]
        return {"scores": scores.to(dtype), "k": 20, "lengths": lengths, "keep_last": 2}
    if op == "attention_colstats":
        return colstats_case(attention_case("paged", lengths, queries, key_bias=True, **sizes))
    if op == "evict":
        return evict_case(lengths, [20] * batch, max_budget=20, keep_last=2, dtype=dtype)
    sizes = {"head_dim": head_dim, "dtype": dtype}
    if op == "knn_topk":
        return knn_case(total_q, longest, 9, valid_len=[longest, longest // 2], **sizes)
    return indexer_case("paged", lengths, queries, **sizes)


OPS = [
    *("summarize_keys", "update_summaries", "score_pages", "select_topk"),
    *("attention_colstats", "evict", "knn_topk", "indexer_scores"),
]
each_op = pytest.mark.parametrize("op", OPS)


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time_and_for_any_threads(num_threads, op, dtype):
    arguments = example(op, **LONG, dtype=dtype)
    num_threads(1)
    expected = outcome(memkernels, op, arguments)
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(outcome(memkernels, op, arguments), expected)


@pytest.mark.parametrize("op", ["score_pages", "attention_colstats", "evict", "indexer_scores"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_and_in_a_batch(op, dtype):
    arguments = example(op, [1500, 40, 0, 300, 17], [1, 40, 2, 70, 3], dtype=dtype)
    alone = [outcome(memkernels, op, of_sequence(arguments, b)) for b in range(5)]
    assert_same_bits(torch.cat(alone), outcome(memkernels, op, arguments))


@each_op
def test_index_dtypes_never_change_bits(op):
    arguments = example(op, **RAGGED)
    expected = outcome(memkernels, op, arguments)
    short = [name for name, t in tensors(arguments).items() if t.dtype == torch.int32]
    for names in [[name] for name in short] + [short]:
        long = {name: arguments[name].long() for name in names}
        assert_same_bits(outcome(memkernels, op, arguments | long), expected)


@each_op
def test_strided_inputs_work_or_are_refused_by_name(selection_ops, op):
    """Keys and scores lie anywhere, as long as their last dimension is contiguous."""
    arguments = example(op, **RAGGED)
    expected = outcome(selection_ops, op, arguments)
    for name, tensor in tensors(arguments).items():
        for dim in range(tensor.dim()):
            strided = arguments | {name: apart(tensor, dim)}
            try:
                actual = outcome(selection_ops, op, strided)
            except RuntimeError as error:
                assert f"{op}: {name}" in str(error)
                assert name not in ("k_cache", "bank", "scores") or dim == tensor.dim() - 1
            else:
                torch.testing.assert_close(actual, expected)


@pytest.mark.full
@pytest.mark.parametrize(
    ("op", "name"),
    [("summarize_keys", "k_cache"), ("update_summaries", "k_cache"), ("score_pages", "summary"),
     ("select_topk", "scores"), ("attention_colstats", "k_cache"), ("evict", "stats"),
     ("knn_topk", "bank"), ("indexer_scores", "k"), ("indexer_scores", "q")],
)  # fmt: skip
def test_more_than_2_to_the_31_elements(op, name):
    """The first and the last row of a tensor are so far apart; nothing between is touched."""
    arguments = example(op, **RAGGED, dtype=torch.bfloat16)
    expected = outcome(memkernels, op, arguments)
    rows = arguments[name].contiguous()
    stride = 2**31 // (len(rows) - 1)
    far = torch.empty(2**31 + rows.numel(), dtype=rows.dtype)
    far = far.as_strided(rows.shape, (stride, *rows.stride()[1:]))
    far.copy_(rows)
    assert_same_bits(outcome(memkernels, op, arguments | {name: far}), expected)


@each_op
def test_shapes_without_data(op):
    arguments = example(op, **RAGGED)
    expected = outcome(memkernels, op, arguments)
    meta = {name: t.to("meta") for name, t in tensors(arguments).items()}
    actual = getattr(memkernels, op)(**arguments | meta)
    actual = meta["summary"] if op == "update_summaries" else actual
    results = [[x] if isinstance(x, Tensor) else x for x in (actual, expected)]
    for fake, real in zip(*results, strict=True):
        assert fake.is_meta
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(
    ("op", "name"),
    [("summarize_keys", "k_cache"), ("update_summaries", "k_cache"),
     ("update_summaries", "summary"), ("score_pages", "q"), ("score_pages", "summary"),
     ("attention_colstats", "q"), ("attention_colstats", "k_cache"), ("attention_colstats", "lse"),
     ("attention_colstats", "key_bias"), ("knn_topk", "q"), ("knn_topk", "bank")],
)  # fmt: skip
def test_ops_without_a_backward_say_so(selection_ops, op, name):
    arguments = example(op, **RAGGED)
    arguments[name].requires_grad_()
    message = rf"{op}: .*not differentiable"
    with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
        getattr(selection_ops, op)(**arguments)
    with torch.no_grad():
        getattr(selection_ops, op)(**arguments)


@each_op
def test_unsupported_dtype_lists_the_supported_ones(op):
    arguments = example(op, **RAGGED)
    floats = {n: t for n, t in tensors(arguments).items() if t.is_floating_point()}
    arguments |= {name: t.to(torch.float8_e4m3fn) for name, t in floats.items()}
    with pytest.raises(RuntimeError, match=rf"{op}: .*float32"):
        getattr(memkernels, op)(**arguments)


@pytest.mark.parametrize(
    ("op", "other"),
    [("score_pages", "summary"), ("attention_colstats", "k_cache"), ("knn_topk", "bank"),
     ("indexer_scores", "k")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_casts_the_query_to_the_dtype_of_what_it_meets(op, other, dtype):
    arguments = example(op, **RAGGED, dtype=dtype)
    arguments["q"] = arguments["q"].bfloat16()
    cast = arguments | {"q": arguments["q"].to(arguments[other].dtype)}
    expected = outcome(memkernels, op, cast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(outcome(memkernels, op, arguments), expected)


SMALL = {"lengths": [9, 0, 5], "queries": [3, 1, 5], "page_size": 3}
OPCHECKS = {
    "extrema": ("summarize_keys", lambda: keys_of(attention_case("paged", [9, 0, 5]))),
    "means": ("summarize_keys", lambda: keys_of(attention_case("paged", [9, 0, 5]), "mean")),
    "update_by_one": (
        "update_summaries", lambda: update_case(attention_case("paged", [9, 0, 5]), 1)
    ),
    "update_by_each": (
        "update_summaries",
        lambda: update_case(attention_case("paged", [9, 0, 5]), 0, "mean")
        | {"num_new_each": torch.tensor([2, 0, 1])},
    ),
    "scores": ("score_pages", lambda: score_case("minmax", **SMALL, scale=0.3)),
    "decode_scores": ("score_pages", lambda: score_case("mean", [9, 0, 5], scale=0.3)),
    "select": ("select_topk", lambda: {"scores": torch.randn(2, 3, 9), "k": 4}),
    "select_of_lengths": (
        "select_topk",
        lambda: {"scores": torch.randn(2, 9), "lengths": torch.tensor([9, 2]), "k": 4,
                 "keep_first": 1, "keep_last": 2, "threshold": 0.5},
    ),
    "evict": ("evict", lambda: evict_case([9, 0, 5], 4, keep_last=2)),
    "evict_by_each": (
        "evict", lambda: evict_case([9, 0, 5], 4) | {"budgets": torch.tensor([4, 0, 3])}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case):
    op, arguments = OPCHECKS[case]
    opcheck(op, arguments())


def select_and_attend(case, k):
    """Quest: attention to the best pages of each query."""
    lists = case.page_table, case.seq_lens
    summary = memkernels.summarize_keys(case.k_cache, *lists)
    page_size = case.k_cache.shape[1]
    scores = memkernels.score_pages(case.q, summary, *lists, page_size, case.cu_seqlens_q)
    num_pages = -(-case.seq_lens // page_size)
    if case.cu_seqlens_q is not None:
        counts = case.cu_seqlens_q.diff()
        num_pages = num_pages.repeat_interleave(counts, output_size=len(case.q))
    pages = memkernels.select_topk(scores, k, num_pages[:, None], keep_first=1, keep_last=1)
    caches = case.k_cache, case.v_cache
    return memkernels.gather_attention(case.q, *caches, pages, *lists, case.cu_seqlens_q)


def test_selecting_every_page_is_paged_attention_to_the_bit():
    """For one query a sequence."""
    case = attention_case("paged", [1500, 40, 0, 300, 17])
    expected = memkernels.paged_attention(**case.arguments())
    for k in case.page_table.shape[1], 200:
        assert_same_bits(select_and_attend(case, k), expected)


def test_selecting_every_token_is_paged_attention():
    """Tokens ranked by an indexer; one query a sequence."""
    case = attention_case("paged", [300, 40, 17], heads=(4, 1))
    lists = case.page_table, case.seq_lens
    scores = memkernels.indexer_scores(case.q, torch.ones(3, 4), case.k_cache[:, :, 0], *lists)
    tokens = memkernels.select_topk(scores[:, None], 300)
    caches = case.k_cache, case.v_cache
    actual = memkernels.gather_attention(case.q, *caches, tokens, *lists, unit="token")
    torch.testing.assert_close(actual, memkernels.paged_attention(case.q, *caches, *lists))


def test_compile_of_score_select_and_attend():
    compiled = torch.compile(select_and_attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, queries in ([33, 0, 70], [5, 2, 9]), ([4, 50, 80, 3], [4, 6, 1, 3]):
        case = attention_case("paged", lengths, queries)
        assert_same_bits(compiled(case, 3), select_and_attend(case, 3))
    torch._dynamo.reset()


def test_compile_of_updates():
    def step(summary, k_cache, *lists):
        memkernels.update_summaries(summary, 2 * k_cache, *lists)
        return summary.square().sum()

    arguments = update_case(attention_case("paged", [33, 0, 7], page_size=1), 5)
    compiled_summary = arguments["summary"].clone()
    expected = step(*arguments.values())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = compiled(compiled_summary, *list(arguments.values())[1:])
    assert_same_bits([actual, compiled_summary], [expected, arguments["summary"]])
    torch._dynamo.reset()


def compact_check():
    """A little of everything, for one process an ISA."""
    for op, dtype, head_dim in itertools.product(OPS, DTYPES, (37, 64)):
        arguments = example(op, [90, 0, 7], [20, 2, 9], dtype=dtype, head_dim=head_dim)
        check(memkernels, op, arguments, slack=4)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_isa(isa):
    if isa not in _C.cpu_isas():
        pytest.skip(f"this CPU cannot run {isa}")
    run_python("import test_selection; test_selection.compact_check()", MEMKERNELS_CPU_ISA=isa)


def check_public_ops_are_the_fallback():
    for op in OPS:
        arguments = example(op, **RAGGED)
        assert_same_bits(outcome(memkernels, op, arguments), outcome(fallback, op, arguments))
        if op == "knn_topk":  # a strided last dimension, which the native op refuses
            arguments["q"] = apart(arguments["q"], -1)
            outcome(memkernels, op, arguments)


def test_backend_variable_selects_the_fallback():
    code = "import test_selection; test_selection.check_public_ops_are_the_fallback()"
    run_python(code, MEMKERNELS_BACKEND="torch")
