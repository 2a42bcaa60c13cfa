"""Sums of table rows, on every backend: against the reference, torch's own, and exact answers."""

from __future__ import annotations

import mmap
import os
import re

import pytest
import torch
from hypothesis import strategies as st

import memkernels
from cases import arrays
from checks import at_random, check, check_error, outcome, put
from lookup_cases import FP8, bag_case, quantised_case
from memkernels import reference
from test_attention import DTYPES
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits, unchanged

FLAT = [3, 0, 0, 9, 1, 0]


def bag(ops, arguments):
    return outcome(ops, "embedding_bag", arguments)


def check_bag(ops, arguments, slack=2):
    out = check(ops, "embedding_bag", arguments, slack)
    quantised = arguments.get("scales") is not None
    assert out.dtype == (torch.float32 if quantised else arguments["weight"].dtype)
    assert out.is_contiguous()
    return out


def check_exact(ops, arguments):
    """Where every sum is exact, only the result is rounded, to the nearest."""
    out = bag(ops, arguments)
    exact = reference.embedding_bag(**arrays(arguments))
    assert_same_bits(out, torch.from_numpy(exact).to(out.dtype))
    return out


@st.composite
def bag_sizes(draw):
    """Keyword arguments of `bag_case`."""
    lengths = st.lists(st.sampled_from([0, 1, 5]) | st.integers(0, 40), min_size=1, max_size=6)
    return {
        "bags": draw(st.tuples(st.integers(0, 7), st.integers(1, 40)) | lengths),
        "num_rows": draw(st.sampled_from([1, 2, 9, 300])),
        "dim": draw(st.integers(1, 80) | st.sampled_from([128, 260])),
        "factors": draw(st.sampled_from([None, "same", "wide"])),
        "skipped": draw(st.sampled_from([0, 0.2, 1])),
        "popular": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "index_dtype": draw(st.sampled_from(INDEX_DTYPES)),
        "seed": draw(st.integers(0, 2**16)),
    }


@at_random(sizes=bag_sizes())
def test_bags_at_random(ops, sizes):
    check_bag(ops, bag_case(**sizes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_integers_are_exact_for_every_dim(ops, dtype):
    for dim in 1, 2, 7, 8, 9, 16, 31, 32, 33, 63, 65, 127, 192, 576, 1030:
        sizes = {"integers": True, "dtype": dtype, "seed": dim}
        check_exact(ops, bag_case((5, 11), 40, dim, factors="same", **sizes))
        check_exact(ops, bag_case(FLAT, 40, dim, **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bags", [(300, 32), [2000, 1, 0, 3000]], ids=["equal", "long"])
def test_many_rows(ops, bags, dtype):
    """Enough for several workers."""
    check_bag(ops, bag_case(bags, 2000, 128, popular=True, factors="wide", dtype=dtype))


@pytest.mark.parametrize("factors", [None, "same"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bags", [(6, 5), FLAT], ids=["equal", "flat"])
def test_a_drop_in_for_torch(ops, bags, dtype, factors):
    for index_dtype in INDEX_DTYPES:
        sizes = {"dtype": dtype, "index_dtype": index_dtype, "skipped": 0}
        arguments = bag_case(bags, 40, 24, factors=factors, **sizes)
        expected = torch.nn.functional.embedding_bag(**arguments, mode="sum")
        torch.testing.assert_close(bag(ops, arguments), expected)


def test_empty_bags_are_zero(ops):
    """Nothing listed, or nothing but -1; and no bags at all."""
    table = torch.full((1, 6), torch.nan)
    none, flat = torch.empty(0, 3, dtype=torch.long), torch.empty(0, dtype=torch.int32)
    for input, offsets, num_bags in (
        (none, None, 0),
        (torch.full((4, 3), -1), None, 4),
        (flat, flat, 0),
        (flat, torch.zeros(3, dtype=torch.long), 3),
        (torch.tensor([-1, -1]), torch.tensor([0, 0, 2]), 3),
    ):
        for weight in table, table[:0]:
            out = bag(ops, {"input": input, "weight": weight, "offsets": offsets})
            assert_same_bits(out, torch.zeros(num_bags, 6))


def test_indices_of_minus_one_change_no_bit():
    """Nor whether bags are flat."""
    arguments = bag_case((9, 30), 50, 70, factors="same", dtype=torch.bfloat16)
    input, factors = arguments["input"], arguments["per_sample_weights"]
    expected = bag(memkernels, arguments)
    listed = input >= 0
    offsets = torch.nn.functional.pad(listed.sum(1).cumsum(0)[:-1], (1, 0))
    flat = {"input": input[listed], "offsets": offsets, "per_sample_weights": factors[listed]}
    assert_same_bits(bag(memkernels, arguments | flat), expected)


def test_rows_are_added_in_the_order_of_the_bag():
    """Large numbers that cancel tell."""
    weight = torch.tensor([[2.0**30], [1.0], [-(2.0**30)]]).expand(-1, 40).contiguous()
    for order, total in ([0, 2, 1], 1), ([0, 1, 2], 0), ([1, 0, 2, 1], 1):
        out = memkernels.embedding_bag(torch.tensor([order]), weight)
        assert_same_bits(out, torch.full((1, 40), float(total)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["weight", "per_sample_weights"])
def test_nan_reaches_only_the_bags_that_use_it(ops, name, value):
    """Even with a factor of zero."""
    arguments = bag_case((12, 9), 30, 20, factors="same")
    row, column = arguments["input"][3, 4].item(), 7
    clean = bag(ops, arguments)
    readers = (arguments["input"] == row).any(1)
    assert row >= 0 and not readers.all()
    touched = torch.zeros_like(clean, dtype=torch.bool)
    if name == "weight":
        arguments["per_sample_weights"][3, 4] = 0
        touched[readers, column] = True
    else:
        touched[3] = True
    place = (row, column) if name == "weight" else (3, 4)
    dirty = bag(ops, arguments | {name: put(arguments[name], place, value)})
    unused = ~touched
    unused[3] = False  # its factor has changed
    assert_same_bits(dirty[unused], clean[unused])
    assert not dirty[touched].isfinite().any()
    assert dirty[3].isnan().any() == (value != value or name == "weight")


# ---- quantised tables ----------------------------------------------------------------------------

STORED = [torch.int8, FP8]
SCALES = [torch.float32, torch.uint8]
stored_types = pytest.mark.parametrize("stored", STORED)


@at_random(
    sizes=bag_sizes(),
    block=st.sampled_from([1, 3, 8, 32, 50]),
    blocks=st.integers(1, 5),
    stored=st.sampled_from(STORED),
    scale_dtype=st.sampled_from(SCALES),
)
def test_quantised_bags_at_random(ops, sizes, block, blocks, **options):
    sizes |= {"dim": block * blocks, "dtype": torch.float32}
    check_bag(ops, quantised_case(**sizes, block=block, **options), slack=4)


@stored_types
def test_every_number_of_a_byte(ops, stored):
    """Subnormal ones and NaN included; scales of both kinds, whatever the block."""
    weight = torch.arange(256).to(torch.uint8).view(stored).view(4, 64)
    rows, exact = torch.arange(4)[:, None], weight.float()
    for block in 1, 8, 32, 64:
        shape = 4, 64 // block
        scales = torch.arange(4 * 64 // block).view(shape) % 7 - 3.0
        expected = exact * scales.repeat_interleave(block, 1) + 0.0  # a sum has no -0
        assert_same_bits(ops.embedding_bag(rows, weight, scales=scales), expected)
        exponents = (120 + torch.arange(4 * 64 // block).view(shape) % 9).to(torch.uint8)
        scales = 2.0 ** (exponents.float() - 127)
        expected = exact * scales.repeat_interleave(block, 1) + 0.0
        assert_same_bits(ops.embedding_bag(rows, weight, scales=exponents), expected)


@stored_types
def test_every_exponent(ops, stored):
    """From 2 ** -127 to 2 ** 127; 255 is NaN, of its block alone."""
    exponents = torch.arange(256).to(torch.uint8).view(16, 16)
    weight = torch.ones(16, 32).to(stored)
    out = ops.embedding_bag(torch.arange(16)[:, None], weight, scales=exponents)
    expected = 2.0 ** (torch.arange(256).double() - 127)
    expected[255] = torch.nan
    assert_same_bits(out, expected.float().view(16, 16).repeat_interleave(2, 1))


# ---- large tables --------------------------------------------------------------------------------


def resident_bytes(path):
    """How much of a mapped file is in this process's memory."""
    with open("/proc/self/smaps") as maps:
        _, mapping = maps.read().split(str(path), 1)
    return int(re.search(r"Rss:\s+(\d+) kB", mapping)[1]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
def test_a_table_in_a_file_larger_than_memory(tmp_path):
    """Only the pages that hold the rows are read."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    num_rows, dim = 2 * memory // 512, 512
    generator = torch.Generator().manual_seed(0)
    written = torch.randint(num_rows, (40,), generator=generator).unique()
    values = torch.randint(-128, 128, (len(written), dim), generator=generator).to(torch.int8)
    path = tmp_path / "table"
    with open(path, "w+b") as file:
        file.truncate(num_rows * dim)
        with mmap.mmap(file.fileno(), 0) as map:
            map.madvise(mmap.MADV_RANDOM)
            weight = torch.frombuffer(map, dtype=torch.int8).view(num_rows, dim)
            weight[written] = values
            input = torch.randint(num_rows, (500, 4), generator=generator)
            input[::5, 1] = written[torch.randint(len(written), (100,), generator=generator)]
            input[0, 0], input[1, 0] = 0, num_rows - 1
            rows, inverse = input.unique(return_inverse=True)
            scales = torch.ones(1, 1).expand(num_rows, 1)
            out = memkernels.embedding_bag(input, weight, scales=scales)
            assert resident_bytes(path) < 32 * 2**20
            expected = memkernels.embedding_bag(inverse, weight[rows], scales=scales[rows])
            assert_same_bits(out, expected)
            assert out[::5].any(1).all()
            del weight


# ---- errors --------------------------------------------------------------------------------------

ERRORS = {
    "index_too_large": ("input", lambda c: {"input": put(c.input, (3, 2), 9)}),
    "index_below_minus_one": ("input", lambda c: {"input": put(c.input, (3, 2), -2)}),
    "huge_index": ("input", lambda c: {"input": put(c.input, (3, 2), 2**63 - 1)}),
    "hugely_negative_index": ("input", lambda c: {"input": put(c.input, (3, 2), -(2**63))}),
    "index_of_an_empty_table": ("input", lambda c: {"weight": c.weight[:0]}),
    "rank_of_input": ("input", lambda c: {"input": c.input[None]}),
    "flat_input_without_offsets": ("input", lambda c: {"input": c.input.flatten()}),
    "dtype_of_input": ("input", lambda c: {"input": c.input.float()}),
    "short_input": ("input", lambda c: {"input": c.input.short()}),
    "no_columns_of_input": (
        "input", lambda c: {"input": c.input[:, :0], "per_sample_weights": None}
    ),
    "rank_of_weight": ("weight", lambda c: {"weight": c.weight[0]}),
    "integer_weight": ("weight", lambda c: {"weight": c.weight.int()}),
    "no_columns_of_weight": ("weight", lambda c: {"weight": c.weight[:, :0]}),
    "offsets_of_rows": ("input|offsets", {"offsets": torch.tensor([0, 3])}),
    "shape_of_factors": (
        "per_sample_weights", lambda c: {"per_sample_weights": c.per_sample_weights[:, :1]}
    ),
    "rank_of_factors": (
        "per_sample_weights", lambda c: {"per_sample_weights": c.per_sample_weights.flatten()}
    ),
    "narrow_factors": (
        "per_sample_weights", lambda c: {"per_sample_weights": c.per_sample_weights.half()}
    ),
    "double_factors": (
        "per_sample_weights", lambda c: {"per_sample_weights": c.per_sample_weights.double()}
    ),
    "scales_of_floats": ("scales", {"scales": torch.ones(9, 1)}),
    "int8_without_scales": ("scales", {"weight": torch.ones(9, 6, dtype=torch.int8)}),
    "fp8_without_scales": ("scales", {"weight": torch.ones(9, 6).to(FP8)}),
    "other_fp8": ("weight", {"weight": torch.ones(9, 6).to(torch.float8_e5m2)}),
}  # fmt: skip

FLAT_ERRORS = {
    "first_offset": ("offsets", {"offsets": torch.tensor([1, 3])}),
    "negative_offset": ("offsets", {"offsets": torch.tensor([-1, 3])}),
    "falling_offsets": ("offsets", {"offsets": torch.tensor([0, 3, 2])}),
    "offset_beyond_the_input": ("offsets", {"offsets": torch.tensor([0, 7])}),
    "huge_offset": ("offsets", {"offsets": torch.tensor([0, 2**63 - 1])}),
    "no_offsets": ("offsets", {"offsets": torch.tensor([], dtype=torch.long)}),
    "rank_of_offsets": ("offsets", {"offsets": torch.tensor([[0, 3]])}),
    "dtype_of_offsets": ("offsets", {"offsets": torch.tensor([0.0, 3.0])}),
    "index_too_large": ("input", lambda c: {"input": put(c.input, 4, 9)}),
    "shape_of_factors": ("per_sample_weights", {"per_sample_weights": torch.ones(5)}),
}

INT8 = torch.ones(9, 6, dtype=torch.int8)
QUANTISED_ERRORS = {
    "rows_of_scales": ("scales", {"scales": torch.ones(8, 2)}),
    "columns_of_scales": ("scales", {"scales": torch.ones(9, 4)}),
    "no_columns_of_scales": ("scales", {"scales": torch.ones(9, 0)}),
    "rank_of_scales": ("scales", {"scales": torch.ones(9)}),
    "dtype_of_scales": ("scales", {"scales": torch.ones(9, 2).half()}),
    "int8_scales": ("scales", {"scales": INT8[:, :2].clone()}),
    "narrow_factors": ("per_sample_weights", {"per_sample_weights": torch.ones(5, 4).half()}),
    "index_too_large": ("input", lambda c: {"input": put(c.input, (3, 2), 9)}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = bag_case((5, 4), 9, 6, factors="same")
    check_error(ops, "embedding_bag", arguments, ERRORS[error])


@pytest.mark.parametrize("error", FLAT_ERRORS)
def test_errors_of_flat_bags(ops, error):
    arguments = bag_case([2, 4], 9, 6)
    check_error(ops, "embedding_bag", arguments, FLAT_ERRORS[error])


@pytest.mark.parametrize("error", QUANTISED_ERRORS)
def test_errors_of_quantised_tables(ops, error):
    arguments = bag_case((5, 4), 9, 6) | {"weight": INT8, "scales": torch.ones(9, 2)}
    check_error(ops, "embedding_bag", arguments, QUANTISED_ERRORS[error])


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_the_first_index_out_of_range_is_named(ops, index_dtype):
    weight = torch.zeros(9, 6)
    input = torch.zeros(5, 4, dtype=index_dtype)
    input[1, 3], input[2, 0] = 9, -2
    flat = {"input": input.flatten(), "offsets": torch.tensor([0, 3])}
    for arguments, place in ({"input": input}, r"\[1, 3\]"), (flat, r"\[7\]"):
        message = rf"embedding_bag: input .*\b9\b.* {place}"
        with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
            ops.embedding_bag(weight=weight, **arguments)
