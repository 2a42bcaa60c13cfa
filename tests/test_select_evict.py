"""Selecting the best scores of rows, and what a cache is to keep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import memkernels
from cases import attention_case, colstats_case, evict_case
from checks import at_random, check, check_error, outcome
from memkernels.nn import PagedKVCache
from test_attention import DTYPES, apart
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits, unchanged

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
def test_select(ops, n, dtype):
    rows = kinds_of_rows(n, dtype)
    for k in sorted({0, 1, 2, max(n - 1, 0), n, n + 5, 2048}):
        check_selected(ops, rows, k)


@pytest.mark.parametrize(
    ("dtype", "k"),
    [(torch.float32, k) for k in (1, 2048, 99_999)]
    + [pytest.param(d, k, marks=pytest.mark.full) for d in DTYPES for k in (2, 100_000, 100_005)],
)
def test_select_from_many(ops, dtype, k):
    check_selected(ops, kinds_of_rows(100_000, dtype), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_select_from_one_long_row(ops, dtype):
    rows = kinds_of_rows(70_000, dtype)
    for i, k in enumerate([2048, 1, 40_000, 2048, 333, 9, 5, 50_000, 69_999, 20_000]):
        check_selected(ops, rows[i : i + 1], k, torch.tensor([70_000 - i]), 3 if k > 9 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 9, 300])
def test_kept_ranges_win_whatever_their_scores(ops, n, dtype):
    """Even where they overlap or are longer than the row."""
    rows = kinds_of_rows(n, dtype)
    for keep_first, keep_last, extra in itertools.product((0, 1, n + 2), (0, 5, n), (0, 3)):
        k = keep_first + keep_last + extra
        check_selected(ops, rows, k, None, keep_first, keep_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [-torch.inf, -1.0, 0.0, 1.5, torch.inf])
def test_scores_below_the_threshold_are_not_selected(ops, dtype, threshold):
    """But those of kept ranges are."""
    for n, k in (9, 4), (65, 65), (1000, 1200):
        rows = kinds_of_rows(n, dtype)
        check_selected(ops, rows, k, threshold=threshold)
        check_selected(ops, rows, k, None, 2, 1, threshold=threshold)


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
def test_select_at_random(ops, arguments):
    check_selected(ops, **arguments)


def test_select_from_strided_and_expanded_scores(ops):
    scores = torch.randn(3, 4, 70)
    check_selected(ops, scores.transpose(0, 1), 9)
    for dim in range(2):
        check_selected(ops, apart(scores, dim), 9)
        check_selected(ops, scores.narrow(dim, 0, 1).expand_as(scores), 3)


def test_lengths_cut_rows(ops):
    """Per sequence, for all its heads; behind them NaN and inf mean nothing."""
    scores = torch.randn(4, 2, 30)
    lengths = torch.tensor([30, 0, 7, 1])[:, None]
    for behind in torch.nan, torch.inf:
        scores[torch.arange(30).expand_as(scores) >= lengths[..., None]] = behind
        for keep in 0, 3:
            check_selected(ops, scores, 9, lengths, keep, keep)


def test_scores_of_training_are_selected_from(ops):
    """Indices carry no gradient, so there is nothing to refuse."""
    scores = torch.randn(3, 20, requires_grad=True)
    selected = ops.select_topk(scores, 4)
    assert not selected.requires_grad
    assert_same_bits(selected, ops.select_topk(scores.detach(), 4))


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
def test_select_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = {"scores": torch.randn(2, 3, 20), "k": 4, "lengths": torch.tensor([[9], [20]])}
    check_error(ops, "select_topk", arguments, SELECT_ERRORS[error])


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
def test_evict_at_random(ops, arguments):
    check_evicted(ops, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", ["head", "sequence"])
def test_evict_of_many(ops, dtype, group):
    options = {"keep_first": 4, "keep_last": 64, "group": group, "dtype": dtype}
    check_evicted(ops, evict_case([5000, 0, 400, 513, 512], 512, levels=60, **options))


def test_evict_never_drops_what_is_protected(ops):
    arguments = evict_case([40, 9, 4], 8, keep_first=2, keep_last=3)
    pinned = torch.zeros(3, 2, 43, dtype=torch.bool)
    pinned[0, 0, [7, 8, 42]] = pinned[0, 1, 20] = True  # 42 is behind the end
    arguments["stats"][pinned] = torch.nan
    keep = check_evicted(ops, arguments | {"pinned": pinned})
    assert {0, 1, 7, 8, 37, 38, 39} < set(keep[0, 0].tolist())
    assert {0, 1, 20, 37, 38, 39} < set(keep[0, 1].tolist())
    assert {0, 1, 6, 7, 8} < set(keep[1, 0].tolist())
    assert keep[2, 0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


@pytest.mark.parametrize("group", ["head", "sequence"])
def test_a_budget_beyond_the_length_keeps_everything(ops, group):
    """Even if more than the budget would be protected of a longer sequence."""
    ranges = {"keep_first": 30, "keep_last": 30, "pinned": torch.ones(12).bool()}
    for budget in 9, 30, [9, 0, 5]:
        arguments = evict_case([9, 0, 5], budget, group=group, **ranges)
        keep = check_evicted(ops, arguments)
        every = torch.arange(keep.shape[-1])
        every = every.where(every < arguments["seq_lens"][:, None, None], -1)
        assert_same_bits(keep, every.int().expand_as(keep).contiguous())


def test_nan_ranks_below_minus_infinity_and_both_are_kept_at_need(ops):
    stats = torch.tensor([torch.nan, -torch.inf, -2.0, torch.nan, 1.0, -torch.inf]).expand(1, 1, 6)
    arguments = {"stats": stats, "seq_lens": torch.tensor([6])}
    for budget, expected in enumerate([[], [4], [2, 4], [1, 2, 4], [1, 2, 4, 5], [0, 1, 2, 4, 5]]):
        keep = check_evicted(ops, arguments | {"budget": budget})
        assert keep.tolist() == [[expected]]


def test_evict_from_strided_statistics(ops):
    arguments = evict_case([40, 0, 33], 8)
    for dim in range(3):
        check_evicted(ops, arguments | {"stats": apart(arguments["stats"], dim)})


def test_evict_of_no_sequences_and_of_no_tokens(ops):
    assert check_evicted(ops, evict_case([], 4)).shape == (0, 2, 4)
    assert check_evicted(ops, evict_case([], [], max_budget=4)).shape == (0, 2, 4)
    nothing = {"stats": torch.empty(2, 3, 0), "seq_lens": torch.zeros(2).int(), "budget": 2}
    assert (check_evicted(ops, nothing) == -1).all()


def test_statistics_of_training_are_evicted_by(ops):
    arguments = evict_case([40, 9], 4)
    expected = outcome(ops, "evict", arguments)
    arguments["stats"].requires_grad_()
    assert_same_bits(outcome(ops, "evict", arguments), expected)


@pytest.mark.parametrize("group", ["head", "sequence"])
def test_attend_forget_and_attend_again(ops, group):
    """Attention over what eviction has kept is attention over the whole with the rest masked."""
    case = attention_case("paged", [50, 7, 0], causal=False, dtype=torch.float64)
    stats = ops.attention_colstats(**colstats_case(case))
    ranges = {"keep_first": 2, "keep_last": 3}
    keep = ops.evict(stats, case.seq_lens, 9, group=group, **ranges)
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


def test_a_cache_takes_what_eviction_keeps(ops):
    cache = PagedKVCache(1, 20, 4, 2, 8, max_seqs=3)
    ids = cache.allocate(2)
    step = cache.extend(ids, [30, 5])
    k, q = torch.randn(35, 2, 8), torch.randn(35, 4, 8)
    cache.append(0, k, k, step)
    _, lse = cache.attend(0, q, step, return_lse=True)
    lists = step.page_table, step.seq_lens, step.cu_seqlens_q
    stats = ops.attention_colstats(q, cache.k[0], *lists, lse)
    keep = ops.evict(stats, step.seq_lens, 12, keep_first=1, keep_last=4)
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
def test_evict_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = evict_case([40, 9], 8, keep_first=2, keep_last=3)
    check_error(ops, "evict", arguments, EVICT_ERRORS[error])
