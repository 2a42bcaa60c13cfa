"""Tokens sorted by memory, scanned, and summed up where they came from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from checks import at_random, check, check_error, check_gradients, outcome, put
from lookup_cases import wide
from scan_cases import SLACK, route_case
from test_attention import DTYPES
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits


@at_random(
    sizes=st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(0, 9)),
    shape=st.lists(st.integers(1, 5), max_size=2),
    skipped=st.sampled_from([0, 0.2, 1]),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from(INDEX_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_at_random(scan_ops, sizes, shape, **options):
    arguments = route_case(*sizes, *shape, **options)
    rows, cu_seqlens, inverse = check(scan_ops, "route_tokens", arguments)
    assert rows.dtype == arguments["x"].dtype
    assert (cu_seqlens.dtype, inverse.dtype) == (torch.int32, torch.int64)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_many_tokens(scan_ops, index_dtype):
    for num_memories in 1, 7, 300:
        arguments = route_case(5000, 2, num_memories, 3, index_dtype=index_dtype)
        check(scan_ops, "route_tokens", arguments)


def test_tokens_keep_their_order(scan_ops):
    x = torch.tensor([[1.0], [2], [3]])
    ids = torch.tensor([[2, 0], [0, -1], [2, 2]])
    rows, cu_seqlens, inverse = scan_ops.route_tokens(x, ids, 4)
    assert rows.flatten().tolist() == [1, 2, 1, 3, 3, 0]
    assert cu_seqlens.tolist() == [0, 2, 2, 5, 5, 6]
    assert inverse.tolist() == [[2, 0], [1, -1], [3, 4]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(scan_ops, dtype, weighted):
    """Each token comes back as often as it was sent, times its weights."""
    arguments = route_case(30, 3, 5, 2, 4, dtype=dtype)
    rows, _, inverse = outcome(scan_ops, "route_tokens", arguments)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(30, 3, generator=generator).to(dtype) if weighted else None
    back = check(
        scan_ops, "unroute_tokens", {"y": rows, "inverse": inverse, "weights": weights}, slack=SLACK
    )
    assert back.dtype == dtype
    share = (arguments["expert_ids"] >= 0).double()
    if weighted:
        share = share * weights.double()
    expected = arguments["x"].double() * share.sum(1)[:, None, None]
    tolerance = {} if dtype.itemsize > 2 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(back, expected.to(dtype), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(scan_ops, dtype):
    arguments = route_case(30, 3, 5, 4, dtype=dtype)
    check_gradients(scan_ops, "route_tokens", arguments, slack=SLACK)
    rows, _, inverse = outcome(scan_ops, "route_tokens", arguments)
    back = {"y": rows, "inverse": inverse}
    for weights in None, torch.rand(30, 3).to(dtype), torch.rand(30, 3).to(wide(dtype)):
        check_gradients(scan_ops, "unroute_tokens", back | {"weights": weights}, slack=SLACK)


def test_a_mixture_of_memories(scan_ops):
    """One scan with a sequence a memory is a scan of each memory's tokens."""
    q, k, v = (route_case(20, 2, 3, 2, 4, seed=i)["x"] for i in range(3))
    ids = route_case(20, 2, 3)["expert_ids"]
    weights = torch.rand(20, 2)
    routed = [scan_ops.route_tokens(x, ids, 3) for x in (q, k, v)]
    _, cu_seqlens, inverse = routed[0]
    out, *_ = scan_ops.linear_attention(
        *(rows[None] for rows, _, _ in routed), cu_seqlens=cu_seqlens
    )
    actual = scan_ops.unroute_tokens(out[0], inverse, weights)
    expected = torch.zeros_like(actual)
    for memory in range(3):
        tokens, choices = (ids == memory).nonzero(as_tuple=True)
        alone, *_ = scan_ops.linear_attention(*(x[tokens][None] for x in (q, k, v)))
        expected.index_add_(0, tokens, alone[0] * weights[tokens, choices, None, None])
    torch.testing.assert_close(actual, expected)


def test_no_memory_reads_no_token(scan_ops):
    """NaN of a token that goes nowhere does not come back."""
    arguments = route_case(9, 2, 3, 4, skipped=0)
    arguments["expert_ids"][5] = -1
    arguments["x"] = put(arguments["x"], 5, torch.nan)
    rows, _, inverse = outcome(scan_ops, "route_tokens", arguments)
    assert not rows[-2:].any()
    back = scan_ops.unroute_tokens(rows, inverse)
    assert not back[5].any() and back.isfinite().all()


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_same_rows_for_any_threads(num_threads, scan_ops, index_dtype):
    arguments = route_case(3000, 3, 40, 2, index_dtype=index_dtype)
    num_threads(1)
    expected = outcome(scan_ops, "route_tokens", arguments)
    for threads in 2, 3:
        num_threads(threads)
        assert_same_bits(outcome(scan_ops, "route_tokens", arguments), expected)


ERRORS = {
    "memory_beyond_the_last": ("expert_ids", {"num_memories": 4}),
    "memory_below_minus_one": ("expert_ids", lambda c: {"expert_ids": put(c.expert_ids, 3, -2)}),
    "rank_of_ids": ("expert_ids", lambda c: {"expert_ids": c.expert_ids[:, 0]}),
    "no_choices": ("expert_ids", lambda c: {"expert_ids": c.expert_ids[:, :0]}),
    "dtype_of_ids": ("expert_ids", lambda c: {"expert_ids": c.expert_ids.float()}),
    "negative_memories": ("num_memories|expert_ids", {"num_memories": -1}),
    "no_columns_of_x": ("x", lambda c: {"x": c.x[:, :0]}),
    "rows_of_x": ("x", lambda c: {"x": c.x[:-1]}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument(scan_ops, error):
    arguments = route_case(30, 2, 5, 4, skipped=0)
    check_error(scan_ops, "route_tokens", arguments, ERRORS[error])
