"""CUDA kernels of the selection family under the host runner: the same bits for any schedule, no
races, no stray accesses, and indices out of range skipped where nothing checks them. What they
compute is tested beside the other backends (conftest.ops)."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

import checks
import cuda_ops
import memkernels
from cases import attention_case, colstats_case, indexer_case, knn_case, of_sequence
from tolerance import assert_same_bits

BF16, F16 = torch.bfloat16, torch.float16

# ---- scores, selections --------------------------------------------------------------------------


def select(run):
    """Summaries, scores and selections, of short rows and of long ones."""
    generator = torch.Generator().manual_seed(0)
    k_cache = torch.randn(12, 7, 2, 36, generator=generator).half()
    table = torch.randperm(12, generator=generator).view(2, 6)
    table[1, 2] = table[0, 0]
    lengths = torch.tensor([42, 31])
    results = []
    for kind in "minmax", "mean":
        summary = run("summarize_keys", k_cache, table, lengths - 9, kind=kind)
        run("update_summaries", summary, k_cache, table, lengths, 9)
        q = torch.randn(5, 6, 36, generator=generator).half()
        offsets = torch.tensor([0, 4, 5])
        scores = run("score_pages", q, summary, table, lengths, 7, offsets, kind=kind)
        results += [summary, scores, run("select_topk", scores, 3, keep_last=1)]
    levels = torch.randint(-99, 99, (2, 40_000), generator=generator).bfloat16()
    results += [run("select_topk", levels, 300), run("select_topk", levels[:1], 300)]
    stats = levels[:, :900].view(2, 3, 300)
    return *results, run("evict", stats, torch.tensor([300, 40]), 50, keep_first=2)


def select_unchecked(run):
    """Pages out of range count as absent ones; lengths and budgets are cut to what there is."""
    k_cache, q = torch.randn(4, 4, 1, 8), torch.randn(2, 2, 8)
    absent, nonsense = torch.tensor([[2, -1, 0, 3], [1, -1, 2, 0]]), torch.tensor([10**9, -7])
    table = absent.where(absent >= 0, nonsense[:, None])
    results = []
    for pages, length in (absent, 16), (table, 10**12):
        lengths = torch.tensor([length, 9])
        summary = run("summarize_keys", k_cache, pages, lengths)
        run("update_summaries", summary, k_cache, pages, lengths, torch.tensor([3, 10**10]))
        results.append((summary, run("score_pages", q, summary, pages, lengths, 4)))
    assert_same_bits(*results)
    run("score_pages", q, summary, table, lengths, 4, torch.tensor([0, 10**9, -3]))
    rows = torch.randn(2, 20)
    everything = torch.arange(20, dtype=torch.int32)
    assert_same_bits(run("select_topk", rows, 20, torch.tensor([99, 20]))[0], everything)
    assert (run("select_topk", rows, 5, torch.tensor([-4, 20]))[0] == -1).all()
    budgets = {"budget": torch.tensor([-3, 99]), "max_budget": 4, "keep_first": 6}
    keep = run("evict", rows[:, None], torch.tensor([20, 20]), **budgets)
    assert keep.tolist() == [[[-1] * 4], [[0, 1, 2, 3]]]


def test_one_block_selects_as_several_do():
    *_, rows, row, _ = select(cuda_ops.on_host)
    assert_same_bits(row, rows[:1])


def test_a_sparse_step_of_decoding_is_three_kernels():
    case = attention_case("paged", [600, 40], heads=(8, 2), dtype=BF16)
    inputs = case.page_table, case.seq_lens
    summary = cuda_ops.on_host("summarize_keys", case.k_cache, *inputs)
    cuda_ops.launches()
    scores = cuda_ops.on_host("score_pages", case.q, summary, *inputs, 16)
    pages = (case.seq_lens[:, None] + 15) // 16
    indices = cuda_ops.on_host("select_topk", scores, 20, pages, keep_last=1)
    cuda_ops.on_host("gather_attention", case.q, case.k_cache, case.v_cache, indices, *inputs)
    assert cuda_ops.launches() == 3


@cuda_ops.needs_gpu
def test_a_sparse_step_is_captured_in_a_graph():
    arguments = attention_case("paged", [600, 40], heads=(8, 2), dtype=BF16).arguments()
    x = SimpleNamespace(**cuda_ops.on_cuda(arguments))
    inputs = x.page_table, x.seq_lens
    pages = (x.seq_lens[:, None] + 15) // 16

    def step():
        summary = memkernels.summarize_keys(x.k_cache, *inputs)
        memkernels.update_summaries(summary, x.k_cache, *inputs)
        scores = memkernels.score_pages(x.q, summary, *inputs, 16)
        indices = memkernels.select_topk(scores, 20, pages, keep_last=1)
        out = memkernels.gather_attention(x.q, x.k_cache, x.v_cache, indices, *inputs)
        return summary, scores, indices, out

    cuda_ops.check_captured(step)


# ---- column statistics ---------------------------------------------------------------------------


def stats_of(lengths, queries=None, layout="paged", reduce="sum", **options):
    """Arguments of attention_colstats for queries of sequences."""
    return colstats_case(attention_case(layout, lengths, queries, **options), reduce=reduce)


def colstats(arguments, run):
    """Fresh ones, and the same accumulated."""
    fresh = run("attention_colstats", **arguments())
    into = {"accumulate_into": torch.ones_like(fresh), "decay": 0.5}
    return fresh, run("attention_colstats", **arguments(), **into)


COLSTATS = {
    "colstats_decode_bf16": lambda: stats_of(
        [700, 40, 0, 300], heads=(8, 2), head_dims=(64, 1), softcap=3.0, window=200,
        sink_tokens=5, key_bias=True, dtype=BF16,
    ),
    "colstats_append_f32": lambda: stats_of(
        [190, 90, 0], [3, 20, 2], heads=(6, 2), window=70, sink_tokens=3, reduce="max"
    ),
    "colstats_of_many_bf16": lambda: stats_of(
        [300, 30, 0, 9] * 10, heads=(8, 8), head_dims=(16, 1), dtype=BF16
    ),
    "colstats_prefill_f16": lambda: stats_of(
        [140, 150], [140, 60], "contiguous", "count", head_dims=(37, 1), dtype=F16
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16])
def test_colstats_give_the_same_bits_alone_and_in_a_batch(dtype):
    """In small blocks and in large ones, that is."""
    options = {"heads": (6, 2), "window": 150, "sink_tokens": 2, "softcap": 3.0, "dtype": dtype}
    arguments = stats_of([300, 0, 90], [2, 1, 90], **options)
    alone = arguments | {"cu_seqlens_q": torch.tensor([0, 2])}
    alone |= {name: arguments[name][:1] for name in ("page_table", "seq_lens")}
    alone |= {name: arguments[name][:2] for name in ("q", "lse")}
    each = (cuda_ops.on_host("attention_colstats", **a)[0] for a in (alone, arguments))
    assert_same_bits(*each)


# ---- nearest neighbours --------------------------------------------------------------------------

KNN = {
    "knn_few_bf16": lambda: knn_case(
        3, 2100, 30, dtype=BF16, head_dim=200, valid_len=[2100, 900], metric="cosine"
    ),
    "knn_many_f32": lambda: knn_case(140, 1500, 9, head_dim=37, metric="l2"),
    "knn_ties_f16": lambda: knn_case(20, 2100, 30, dtype=F16, head_dim=3, integers=True),
    "knn_deep_f32": lambda: knn_case(17, 140, 3, head_dim=600, metric="cosine"),
    "knn_buckets_f16": lambda: knn_case(70, 1500, 20, dtype=F16, buckets=900, metric="l2"),
    "knn_few_buckets_bf16": lambda: knn_case(
        3, 900, 9, dtype=BF16, buckets=37, valid_len=[900, 30]
    ),
}  # fmt: skip


def knn(arguments, run):
    return run("knn_topk", **arguments())


def knn_unchecked(run):
    bank = knn_case(3, 300, 9, heads=3)
    lengths = [torch.tensor(x) for x in ([-(10**6), 10**12, 40], [0, 300, 40])]
    for buckets in None, 60:
        found = [run("knn_topk", **bank | {"valid_len": x}, buckets=buckets) for x in lengths]
        assert_same_bits(*found)


# ---- the indexer ---------------------------------------------------------------------------------


def paged(lengths, queries, **options):
    options = {"page_size": 64, "absent_pages": 0.2, "dtype": BF16} | options
    return indexer_case("paged", lengths, queries, **options)


INDEXER = {
    "indexer_prefill_bf16": lambda: paged([300, 40, 0, 9], [70, 40, 3, 1], heads=12),
    "indexer_decode_f16": lambda: paged([300, 40, 0], None, heads=9, page_size=7, dtype=F16),
    "indexer_alone_f32": lambda: indexer_case("alone", [100], [140], heads=3, head_dim=37),
    "indexer_odd_head_dims": lambda: indexer_case(
        "contiguous", [150, 9], [9, 2], head_dim=570, w_dtype=torch.float32, dtype=BF16
    ),
    "indexer_long_rows_f32": lambda: indexer_case("contiguous", [90, 9], [9, 2], head_dim=500),
}  # fmt: skip


def index(arguments, run):
    """Scores of a lightning indexer and their gradients."""
    function, arguments = functools.partial(run, "indexer_scores"), arguments()
    return [function(**arguments), *checks.gradients(function, arguments).values()]


def test_indexer_scores_of_a_sequence_are_its_own():
    """Alone the short ones have blocks of fewer keys."""
    arguments = INDEXER["indexer_prefill_bf16"]()
    together = cuda_ops.on_host("indexer_scores", **arguments)
    offsets = arguments["cu_seqlens_q"].tolist()
    for b, rows in enumerate(map(slice, offsets, offsets[1:])):
        alone = cuda_ops.on_host("indexer_scores", **of_sequence(arguments, b))
        assert_same_bits(alone, together[rows])


# ---- column statistics and the indexer, unchecked ------------------------------------------------


def with_nonsense(arguments):
    """Pages and lengths that are nonsense in places, and the same with -1 or bounds in theirs."""
    table, lengths = arguments["page_table"], arguments["seq_lens"]
    nonsense, absent = table.clone(), table.clone()
    nonsense[0, 1], nonsense[2, 0] = 10**6, -7
    absent[0, 1] = absent[2, 0] = -1
    yield arguments | {"page_table": nonsense}, arguments | {"page_table": absent}
    yield arguments | {"seq_lens": lengths * 0 - 5}, arguments | {"seq_lens": lengths * 0}


def attend_unchecked(run):
    lengths, queries = [90, 40, 33], [3, 1, 9]
    for compute, arguments in (
        (colstats, stats_of(lengths, queries, dtype=BF16)),
        (index, paged(lengths, queries, page_size=16, absent_pages=0)),
    ):
        for pair in with_nonsense(arguments):
            assert_same_bits(*(compute(lambda a=a: a, run) for a in pair))
        for offsets in [5, 3, 20, 11], [-9, 0, 2, 10**6], [0, 13, 13, 2]:
            broken = arguments | {"cu_seqlens_q": torch.tensor(offsets, dtype=torch.int32)}
            compute(lambda a=broken: a, run)  # any numbers


CASES = {"select": select}
for _compute, _cases in (colstats, COLSTATS), (knn, KNN), (index, INDEXER):
    CASES |= {name: functools.partial(_compute, arguments) for name, arguments in _cases.items()}
UNCHECKED = {f.__name__: f for f in (select_unchecked, knn_unchecked, attend_unchecked)}
(
    test_same_bits_for_any_schedule,
    test_no_races,
    test_indices_out_of_range_are_skipped,
) = cuda_ops.tests_of(CASES, UNCHECKED)
