"""CUDA kernels of the lookup family under the host runner: the same bits for any schedule, no
races, no stray accesses, and indices out of range skipped where nothing checks them. What they
compute is tested beside the other backends (conftest.ops)."""

from __future__ import annotations

import functools

import pytest
import torch

import cuda_ops
from lookup_cases import backward_case, bag_case, rows_case
from tolerance import assert_same_bits

# By name, functions of `run(op, *args, **kwargs)`, which calls an op with its CUDA kernel. They
# return what several of its paths compute of random inputs.
CASES = {}
# The same of what must not depend on indices out of range: they compare it themselves.
UNCHECKED = {}


def case(compute):
    CASES[compute.__name__] = compute
    return compute


def unchecked(compute):
    UNCHECKED[compute.__name__] = compute
    return compute


@case
def gradients_of_bags(run):
    """Rows of few entries, and of more than 64 and 2048; of 16 bytes and not."""
    results = []
    for bags, num_rows, dim, dtype, factors in (
        ((5, 9), 20, 24, torch.float32, None),
        ([3, 0, 150, 2], 8, 264, torch.float16, "wide"),
        ((9, 40), 3, 7, torch.bfloat16, "same"),
        ((290, 9), 2, 8, torch.bfloat16, None),
        ((150, 80), 130, 5, torch.float32, None),
    ):
        bag = bag_case(bags, num_rows, dim, dtype=dtype, factors=factors, popular=True)
        arguments = backward_case(bag)
        out = torch.ones(num_rows, dim)
        run("embedding_bag_backward", **arguments, out=out)
        narrow = out.to(dtype)
        run("embedding_bag_backward", **arguments, out=narrow)
        results += [*run("embedding_bag_backward", **arguments), out, narrow]
    return results


@unchecked
def gradients_of_bags_out_of_range(run):
    arguments = backward_case(bag_case((40, 9), 20, 8))
    arguments["input"][3, 2], arguments["input"][7, 5] = 10**12, -9
    skipped = arguments["input"].where(arguments["input"] < 20, -1).clamp(min=-1)
    expected = run("embedding_bag_backward", **arguments | {"input": skipped})
    assert_same_bits(run("embedding_bag_backward", **arguments), expected)
    flat = backward_case(bag_case([4, 0, 30, 6], 20, 8))
    for offsets in [5, 2, 90, -7], [-(10**12), 10**12, 3, 3], [40, 40, 40, 40]:
        run("embedding_bag_backward", **flat | {"offsets": torch.tensor(offsets)})


@case
def steps_of_rows(run):
    results = []
    for dim, dtype, wide in (24, torch.float32, True), (37, torch.bfloat16, False):
        for op in "row_sgd", "row_adagrad", "row_adam":
            options = {"dtype": dtype, "wide_state": wide, "row_state": not wide}
            arguments = rows_case(op, 400, dim, 150, **options)
            run(op, **arguments)
            states = "param", "sum", "exp_avg", "exp_avg_sq"
            results += [arguments[name] for name in states if name in arguments]
    return results


@unchecked
def steps_of_rows_out_of_range(run):
    def step(rows, count):
        arguments = rows_case("row_adam", 20, 8, 9, capacity=9)
        arguments |= {"rows": rows, "count": torch.tensor([count])}
        run("row_adam", **arguments)
        return [arguments[name] for name in ("param", "exp_avg", "exp_avg_sq")]

    rows = torch.tensor([3, -1, 4, -1, 0, 19, -1, 1, 2])
    nonsense = torch.tensor([3, 10**12, 4, 20, 0, 19, -9, 1, 2])
    assert_same_bits(step(nonsense, 9), step(rows, 9))
    assert_same_bits(step(rows, 10**12), step(rows, 9))
    assert_same_bits(step(rows, -5), step(rows, 0))


def every_kernel(run):
    """For a process under a sanitizer."""
    for compute in CASES.values():
        compute(run)
    for compare in UNCHECKED.values():
        compare(functools.partial(run, check_indices=False))


@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_schedule(name):
    expected = CASES[name](cuda_ops.on_host)
    for seed, copies in (1, "lazy"), (2, "random"), (3, "eager"):
        with cuda_ops.schedule(seed, copies):
            assert_same_bits(CASES[name](cuda_ops.on_host), expected)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_no_races(name):
    cuda_ops.races()
    with cuda_ops.schedule(1, runner=cuda_ops.library("race")):
        CASES[name](functools.partial(cuda_ops.on_host, check="race"))
    assert cuda_ops.races() == (0, "")


@pytest.mark.parametrize("name", UNCHECKED)
def test_indices_out_of_range_are_skipped(name):
    UNCHECKED[name](functools.partial(cuda_ops.on_host, check_indices=False))


def test_most_rows_that_can_be_sorted_by():
    """As many as keys of 32 bits tell apart from what is skipped."""
    arguments = {"grad": torch.ones(2, 3), "input": torch.tensor([[2**32 - 2], [-1]])}
    most = 2**32 - 1
    rows, _, _ = cuda_ops.on_host("embedding_bag_backward", **arguments, num_embeddings=most)
    assert rows.tolist() == [2**32 - 2, -1]
    with pytest.raises(RuntimeError, match="num_embeddings = 4294967296 exceeds"):
        cuda_ops.on_host("embedding_bag_backward", **arguments, num_embeddings=most + 1)
