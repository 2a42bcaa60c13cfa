"""Summaries and scores of pages, then what every op of selection promises."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
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
from checks import at_random, check, check_error, opcheck, outcome, put, tensors
from memkernels import fallback, reference
from memkernels.nn import PagedKVCache
from test_attention import DTYPES, RAGGED, apart, each_other_isa, run_python
from test_attention import ERRORS as ATTENTION_ERRORS
from tolerance import assert_same_bits, unchanged

INDEX_DTYPES = [torch.int32, torch.int64]
KINDS = ["minmax", "mean"]
ALONE = 16  # slack of what may be a single number, and that the small difference of large ones
LONG = {"lengths": [3000, 40, 0, 300, 17], "queries": [1, 40, 0, 300, 3]}

kinds = pytest.mark.parametrize("kind", KINDS)


# ---- what the tests of this family share ---------------------------------------------------------


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
def test_summaries_at_random(ops, sizes, kind, shared):
    """Shared pages count as far as the longest sequence fills them, or NaN would be missing."""
    case = attention_case("paged", **sizes)
    check_summary(ops, share_pages(case, sizes["seed"]) if shared else case, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [5, 64, 128, 576])
@kinds
def test_summaries_of_head_dims(ops, kind, dtype, head_dim):
    sizes = {"head_dims": (head_dim, 1), "layout": "HND", "dtype": dtype}
    check_summary(ops, attention_case("paged", [50, 18, 0, 129], **sizes), kind)


@kinds
def test_summaries_of_many_pages(ops, kind):
    check_summary(ops, attention_case("paged", [9000, 5, 4000], head_dims=(8, 1)), kind)


def test_a_page_counts_as_far_as_its_longest_sequence_fills_it(ops):
    """The two sequences have the same three pages, of which the shorter fills one and a half."""
    case = attention_case("paged", [40])
    expected = check_summary(ops, case, "minmax")
    table = case.page_table.expand(2, -1)
    shared = case.replace(page_table=table, seq_lens=torch.tensor([24, 40]))
    assert_same_bits(check_summary(ops, shared, "minmax"), expected)


@kinds
def test_pages_of_no_sequence_have_summary_zero(ops, kind):
    case = attention_case("paged", [40, 0, 7], absent_pages=0.3)
    summary = outcome(ops, "summarize_keys", keys_of(case, kind))
    assert not summary[~used_pages(case)].any()
    nobody = case.replace(seq_lens=torch.zeros_like(case.seq_lens))
    assert not outcome(ops, "summarize_keys", keys_of(nobody, kind)).any()


@kinds
def test_summaries_of_no_sequences_and_of_no_pages(ops, kind):
    case = attention_case("paged", [], head_dims=(8, 8))
    summary = check_summary(ops, case, kind)
    shape = (2, 2, 2, 8) if kind == "minmax" else (2, 2, 8)
    assert summary.shape == shape and not summary.any()
    summary = check_summary(ops, case.replace(k_cache=case.k_cache[:0]), kind)
    assert summary.shape == (0, *shape[1:])


@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_of_a_key_reaches_only_its_page_head_and_channel(ops, kind, value):
    case = attention_case("paged", [40, 20])
    clean = check_summary(ops, case, kind)
    page = case.page_table[0, 1].item()
    for offset in range(16):
        dirty = case.replace(k_cache=put(case.k_cache, (page, offset, 1, 3), value))
        summary = check_summary(ops, dirty, kind)
        if value != value:
            assert summary[page, 1, ..., 3].isnan().all()
        summary[page, 1, ..., 3] = clean[page, 1, ..., 3]
        assert_same_bits(summary, clean)


@pytest.mark.parametrize("dim", range(3))
def test_summaries_of_strided_caches(ops, dim):
    case = attention_case("paged", RAGGED["lengths"])
    strided = {"k_cache": apart(case.k_cache, dim), "page_table": apart(case.page_table, 1)}
    check_summary(ops, case.replace(**strided), "minmax")


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


def test_tangents_are_never_lost():
    q, bank = torch.randn(2, 1, 8), torch.randn(1, 9, 8)
    with torch.autograd.forward_ad.dual_level():
        memkernels.knn_topk(q, bank, None, 2)
        q = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match=r"knn_topk: q .*not differentiable"):
            memkernels.knn_topk(q, bank, None, 2)


SUMMARY_ERRORS = TABLE_ERRORS | {
    "rank_of_k_cache": ("k_cache", lambda c: {"k_cache": c.k_cache[0]}),
    "integer_k_cache": ("k_cache", lambda c: {"k_cache": c.k_cache.int()}),
    "kind": ("kind", {"kind": "median"}),
}  # fmt: skip


@pytest.mark.parametrize("error", SUMMARY_ERRORS)
def test_summary_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = keys_of(attention_case("paged", RAGGED["lengths"]))
    check_error(ops, "summarize_keys", arguments, SUMMARY_ERRORS[error])


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
def test_updates_at_random(ops, data, sizes, kind, shared):
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
    check_update(ops, case, num_new, kind)


@kinds
def test_one_new_token_is_the_default(ops, kind):
    case = attention_case("paged", [17, 16, 0])
    arguments = update_case(case, 1, kind)
    expected = outcome(ops, "update_summaries", arguments)
    del arguments["num_new"]
    assert_same_bits(outcome(ops, "update_summaries", arguments), expected)


@at_random(data=st.data(), kind=st.sampled_from(KINDS))
def test_updating_is_rebuilding_as_a_cache_lives(ops, data, kind):
    """Appended to, forked with copy-on-write, freed, and its pages used again."""
    cache = PagedKVCache(
        *(1, 64, data.draw(st.sampled_from([1, 3, 4])), 2, 5),
        max_seqs=5,
        layout=data.draw(st.sampled_from(["NHD", "HND"])),
    )
    cache.k.fill_(torch.nan)
    tables = {"page_table": cache.page_table, "seq_lens": cache.seq_lens}
    pages = SimpleNamespace(k_cache=cache.k[0], **tables)
    summary = ops.summarize_keys(**keys_of(pages, kind))
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
            ops.update_summaries(
                summary, cache.k[0], step.page_table, step.seq_lens, torch.tensor(counts).long()
            )
        rebuilt = ops.summarize_keys(**keys_of(pages, kind))
        used = used_pages(pages)
        assert_same_bits(summary[used], rebuilt[used])


@kinds
def test_updating_is_rebuilding_after_compaction(ops, kind):
    """All that is left is new: more new tokens than tokens are fine."""
    case = attention_case("paged", [40, 9])
    summary = outcome(ops, "summarize_keys", keys_of(case, kind))
    keep = torch.tensor([0, 3, 4, 7, 8]).expand(2, 2, -1)
    lens = memkernels.compact_kv(case.k_cache, case.v_cache, case.page_table, case.seq_lens, keep)
    case = case.replace(seq_lens=lens)
    ops.update_summaries(summary, case.k_cache, case.page_table, lens, num_new=40)
    used = used_pages(case)
    rebuilt = outcome(ops, "summarize_keys", keys_of(case, kind))
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
def test_update_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = update_case(attention_case("paged", RAGGED["lengths"]), 3)
    check_error(ops, "update_summaries", arguments, UPDATE_ERRORS[error])


@kinds
@pytest.mark.parametrize("dim", range(3))
def test_strided_summaries_are_updated_or_refused_by_name(ops, kind, dim):
    arguments = update_case(attention_case("paged", RAGGED["lengths"]), 3, kind)
    expected = outcome(ops, "update_summaries", arguments)
    strided = arguments | {"summary": apart(arguments["summary"], dim)}
    try:
        ops.update_summaries(**strided)
    except RuntimeError as error:
        assert "update_summaries: summary" in str(error)
        expected = arguments["summary"]
    assert_same_bits(strided["summary"], expected)


def test_the_version_of_the_summary_alone_is_bumped(ops):
    for num_new in 3, torch.tensor([1, 0, 2, 0, 3]):
        arguments = update_case(attention_case("paged", RAGGED["lengths"]), num_new)
        versions = {name: t._version for name, t in tensors(arguments).items()}
        ops.update_summaries(**arguments)
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
def test_scores_at_random(ops, sizes, kind, means, shared, **options):
    summary_dtype = sizes["dtype"] if means == "as q" else None
    options |= {"summary_dtype": summary_dtype, "shared_pages": shared}
    check_scores(ops, score_case(kind, **sizes, **options), slack=ALONE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((5, 1), 5), ((8, 2), 64), ((1, 1), 80), ((32, 1), 128), ((16, 1), 576)]
)
@kinds
def test_scores_of_head_dims(ops, kind, dtype, heads, head_dim):
    sizes = {"heads": heads, "head_dims": (head_dim, 1), "dtype": dtype}
    check_scores(ops, score_case(kind, [50, 18], [1, 5], **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{"lengths": [9000, 5, 0, 700]}, {"lengths": [290, 330],
                                   "queries": [290, 70], "heads": (2, 1)}])  # fmt: skip
@kinds
def test_scores_of_many_pages_and_of_many_queries(ops, kind, dtype, sizes):
    check_scores(ops, score_case(kind, **sizes, dtype=dtype, absent_pages=0.1))


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
    # Twice as much as float32 rounds is what three products of tf32 do.
    rounding = 4 * head_dim * torch.finfo(torch.promote_types(case.q.dtype, torch.float32)).eps
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
def test_no_logit_exceeds_the_score_of_its_page(ops, sizes):
    """And if a page holds one token, its score is the logit."""
    check_bound(ops, attention_case("paged", **sizes))


def test_no_logit_of_a_long_sequence_exceeds_the_score_of_its_page(ops):
    for dtype in DTYPES:
        check_bound(ops, attention_case("paged", [1500, 40], [3, 40], dtype=dtype))


def test_keys_after_the_query_hide_their_pages(ops):
    """Of pages of 4 tokens, queries at 2 to 9 see one to three, and at -3 to -1 none."""
    arguments = score_case("minmax", [10, 2], [8, 5], page_size=4)
    visible = (check_scores(ops, arguments) > -torch.inf).sum(-1)[:, 0]
    assert visible.tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 0, 0, 0, 1, 1]
    arguments["causal"] = False
    visible = (check_scores(ops, arguments) > -torch.inf).sum(-1)[:, 0]
    assert visible.tolist() == [3] * 8 + [1] * 5


@kinds
def test_scores_of_no_sequences_of_no_tokens_and_of_no_pages(ops, kind):
    for queries in None, []:
        assert check_scores(ops, score_case(kind, [], queries)).shape == (0, 2, 1)
    arguments = score_case(kind, [0, 0], [2, 1])
    assert (check_scores(ops, arguments) == -torch.inf).all()
    arguments |= {"summary": arguments["summary"][:0], "page_table": torch.empty(2, 0).int()}
    assert check_scores(ops, arguments).shape == (3, 2, 0)


@kinds
@pytest.mark.parametrize("name", ["q", "summary"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("group_reduce", ["max", "mean", "sum"])
def test_nan_reaches_only_the_scores_that_use_it(ops, kind, name, value, group_reduce):
    """It is in page 2 of sequence 1, which row 2 does not see, or in row 4, for KV head 1."""
    options = {"page_size": 4, "group_reduce": group_reduce}
    arguments = score_case(kind, [8, 16, 8], [2, 9, 1], **options)
    clean = outcome(ops, "score_pages", arguments)
    page = arguments["page_table"][1, 2].item()
    place = (4, 3) if name == "q" else (page, 1)
    dirty = arguments | {name: put(arguments[name], place, value)}
    actual = outcome(ops, "score_pages", dirty)
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
def test_where_pages_lie_never_matters(ops, sizes, kind):
    """Not for a bit of a score, nor for what is selected."""
    case = attention_case("paged", **sizes)
    moved, moved_to = move_pages(case)

    def select(case):
        summary = ops.summarize_keys(**keys_of(case, kind))
        lists = case.page_table, case.seq_lens, case.k_cache.shape[1], case.cu_seqlens_q
        scores = ops.score_pages(case.q, summary, *lists, kind=kind)
        return summary, scores, ops.select_topk(scores, 3)

    (summary, *selected), (moved_summary, *moved_selected) = select(case), select(moved)
    assert_same_bits(moved_summary[moved_to], summary)
    assert_same_bits(moved_selected, selected)


@kinds
def test_columns_behind_the_sequences_never_change_scores(ops, kind):
    arguments = score_case(kind, **RAGGED)
    scores = outcome(ops, "score_pages", arguments)
    table = torch.nn.functional.pad(arguments["page_table"], (0, 40), value=-7)
    wider = outcome(ops, "score_pages", arguments | {"page_table": table})
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
    "queries_of_no_sequence": ("q|cu_seqlens_q", lambda c: {
        "page_table": c.page_table[:0], "seq_lens": c.seq_lens[:0],
        "cu_seqlens_q": torch.zeros(1, dtype=torch.int32),
    }),
    "page_size_zero": ("page_size", {"page_size": 0}),
    "no_heads_of_q": ("q", lambda c: {"q": c.q[:, :0]}),
    "scale_nan": ("scale", {"scale": float("nan")}),
    "page_size_too_small": ("seq_lens|page_table|page_size", {"page_size": 1}),
    "kind": ("kind", {"kind": "median"}),
    "group_reduce": ("group_reduce", {"group_reduce": "min"}),
}  # fmt: skip


@pytest.mark.parametrize("error", SCORE_ERRORS)
def test_score_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = score_case("minmax", **RAGGED)
    check_error(ops, "score_pages", arguments, SCORE_ERRORS[error])


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
def test_strided_inputs_work_or_are_refused_by_name(ops, op):
    """Keys and scores lie anywhere, as long as their last dimension is contiguous."""
    arguments = example(op, **RAGGED)
    expected = outcome(ops, op, arguments)
    for name, tensor in tensors(arguments).items():
        for dim in range(tensor.dim()):
            strided = arguments | {name: apart(tensor, dim)}
            try:
                actual = outcome(ops, op, strided)
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
def test_ops_without_a_backward_say_so(ops, op, name):
    arguments = example(op, **RAGGED)
    arguments[name].requires_grad_()
    message = rf"{op}: .*not differentiable"
    with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments)
    with torch.no_grad():
        getattr(ops, op)(**arguments)


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


@each_other_isa
def test_every_isa(isa):
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
