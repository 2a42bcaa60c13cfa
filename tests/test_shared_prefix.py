"""Sequences that begin with the same pages: attended to together, with the bits of each alone."""

from __future__ import annotations

import time

import pytest
import torch

import memkernels
from cases import attention_case
from tolerance import assert_same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def shared_and_private(lengths, queries=None, *, prefixes, **options):
    """Two cases with the same values: sequences that hold the pages of another one, and copies.

    ``prefixes[b] = (leader, pages)``: sequence b begins with that many pages of the leader.
    """
    private = attention_case("paged", lengths, queries, **options)
    table = private.page_table.clone()
    for b, (leader, pages) in prefixes.items():
        own, theirs = private.page_table[b, :pages], table[leader, :pages]
        own[theirs < 0] = -1
        present = own >= 0
        for cache in private.k_cache, private.v_cache, private.key_bias:
            if cache is not None:
                cache[own[present].long()] = cache[theirs[present].long()]
        table[b, :pages] = torch.where(present, theirs, -1)
        private.page_table[b, :pages] = own
    return private.replace(page_table=table), private


def check_same(lengths, queries=None, **options):
    shared, private = shared_and_private(lengths, queries, **options)
    results = memkernels.paged_attention(**shared.arguments(), return_lse=True)
    expected = memkernels.paged_attention(**private.arguments(), return_lse=True)
    assert_same_bits(results, expected)
    return shared, results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "queries", "batch"),
    [
        ((4, 4), 1, 30),  # many sequences of one row a head
        ((8, 2), 1, 2),
        ((8, 2), 1, 9),
        ((3, 1), 3, 7),
        ((5, 1), 4, 5),  # 20 rows alone already
        ((16, 1), 1, 15),
    ],
)
def test_one_prefix(dtype, heads, queries, batch):
    check_same(
        [600 + 7 * b for b in range(batch)],
        [queries] * batch,
        prefixes=dict.fromkeys(range(1, batch), (0, 34)),
        heads=heads,
        head_dims=(40, 24),
        dtype=dtype,
    )


@pytest.mark.parametrize("page_size", [1, 7, 16, 100, 300])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_page_sizes(page_size, layout):
    prefixes = dict.fromkeys(range(1, 5), (0, 590 // page_size))
    check_same([700] * 5, prefixes=prefixes, page_size=page_size, layout=layout)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"softcap": 2.0, "key_bias": True, "sink_logit": True},
        {"absent_pages": 0.3},
        {"window": 100, "sink_tokens": 3},
        {"window": torch.tensor([5000, 40])},
        {"share_kv": True, "head_dims": (48, 40)},
        {"index_dtype": torch.int64},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(options):
    check_same([700, 700, 650, 690], prefixes=dict.fromkeys((1, 2, 3), (0, 40)), **options)


def test_prefixes_within_prefixes():
    """A tree of prefixes, a stranger, an empty sequence, and lengths with splits of their own."""
    check_same(
        [1500, 1400, 0, 1300, 9000, 9000, 800, 1200, 1500],
        prefixes={1: (0, 80), 3: (1, 50), 4: (0, 60), 5: (4, 500), 7: (3, 20), 8: (0, 93)},
    )


def test_different_numbers_of_queries():
    check_same(
        [700, 700, 700, 700, 700, 300],
        [1, 2, 1, 2, 60, 400],
        prefixes=dict.fromkeys(range(1, 6), (0, 18)),
    )


def test_strided_table():
    shared, results = check_same([700] * 3, prefixes={1: (0, 40), 2: (0, 40)})
    table = shared.page_table.T.contiguous().T
    again = memkernels.paged_attention(
        **shared.replace(page_table=table).arguments(), return_lse=True
    )
    assert_same_bits(again, results)


def test_a_sequence_alone_and_any_number_of_threads():
    batch = 20
    shared, results = check_same([900] * batch, prefixes=dict.fromkeys(range(1, batch), (0, 50)))
    alone = memkernels.paged_attention(**shared.select(7).arguments(), return_lse=True)
    assert_same_bits(alone, [t[7:8] for t in results])
    threads = torch.get_num_threads()
    try:
        for n in 1, 3:
            torch.set_num_threads(n)
            again = memkernels.paged_attention(**shared.arguments(), return_lse=True)
            assert_same_bits(again, results)
    finally:
        torch.set_num_threads(threads)


def test_not_a_number_in_one_query_stays_there():
    shared, results = check_same([700] * 8, prefixes=dict.fromkeys(range(1, 8), (0, 40)))
    shared.q[3] = torch.nan
    out, _ = memkernels.paged_attention(**shared.arguments(), return_lse=True)
    others = torch.arange(8) != 3
    assert out[3].isnan().all()
    assert_same_bits(out[others], results[0][others])


def test_gradients():
    """The backward goes through the shared forward."""
    shared, private = shared_and_private([600] * 3, prefixes={1: (0, 34), 2: (0, 34)})
    grads = []
    for case in shared, private:
        case = case.replace(k_cache=case.k_cache.nan_to_num(), v_cache=case.v_cache.nan_to_num())
        q = case.q.clone().requires_grad_()
        memkernels.paged_attention(**case.replace(q=q).arguments()).square().sum().backward()
        grads.append(q.grad)
    assert_same_bits(*grads)


def test_sharing_saves_time():
    shared, private = shared_and_private(
        [2100] * 40, prefixes=dict.fromkeys(range(1, 40), (0, 128)), head_dims=(128, 128)
    )
    best = [float("inf")] * 2
    for _ in range(5):
        for i, case in enumerate((shared, private)):
            start = time.perf_counter()
            memkernels.paged_attention(**case.arguments())
            best[i] = min(best[i], time.perf_counter() - start)
    assert best[0] < 0.8 * best[1]
