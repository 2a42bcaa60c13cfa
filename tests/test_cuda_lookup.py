"""CUDA kernels of the lookup family under the host runner: the same bits for any schedule, no
races, no stray accesses, and indices out of range skipped where nothing checks them. What they
compute is tested beside the other backends (conftest.ops)."""

from __future__ import annotations

import functools

import pytest

import cuda_ops
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
