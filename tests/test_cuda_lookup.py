"""CUDA kernels of the lookup family under the host runner: the same bits for any schedule, no
races, no stray accesses, and indices out of range skipped where nothing checks them. What they
compute is tested beside the other backends (conftest.ops)."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cuda_ops
import memkernels
from checks import gradients, put
from lookup_cases import (
    FP8,
    backward_case,
    bag_case,
    codes_case,
    ffn_case,
    gate_case,
    hash_case,
    product_key_case,
    quantised_case,
    rows_case,
)
from tolerance import assert_same_bits

# ---- gradients of bags, steps of rows ------------------------------------------------------------


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


def gradients_of_bags_out_of_range(run):
    arguments = backward_case(bag_case((40, 9), 20, 8))
    arguments["input"][3, 2], arguments["input"][7, 5] = 10**12, -9
    skipped = arguments["input"].where(arguments["input"] < 20, -1).clamp(min=-1)
    expected = run("embedding_bag_backward", **arguments | {"input": skipped})
    assert_same_bits(run("embedding_bag_backward", **arguments), expected)
    flat = backward_case(bag_case([4, 0, 30, 6], 20, 8))
    for offsets in [5, 2, 90, -7], [-(10**12), 10**12, 3, 3], [40, 40, 40, 40]:
        run("embedding_bag_backward", **flat | {"offsets": torch.tensor(offsets)})


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


def test_most_rows_that_can_be_sorted_by():
    """As many as keys of 32 bits tell apart from what is skipped."""
    arguments = {"grad": torch.ones(2, 3), "input": torch.tensor([[2**32 - 2], [-1]])}
    most = 2**32 - 1
    rows, _, _ = cuda_ops.on_host("embedding_bag_backward", **arguments, num_embeddings=most)
    assert rows.tolist() == [2**32 - 2, -1]
    with pytest.raises(RuntimeError, match="num_embeddings = 4294967296 exceeds"):
        cuda_ops.on_host("embedding_bag_backward", **arguments, num_embeddings=most + 1)


@cuda_ops.needs_gpu
def test_training_of_a_table_is_captured_in_a_graph():
    bag = cuda_ops.on_cuda(bag_case((40, 9), 20, 8, factors="same"))
    table = bag["weight"].clone()

    def step():
        table.copy_(bag["weight"])
        out = memkernels.embedding_bag(**bag)
        rows = memkernels.embedding_bag_backward(out, bag["input"], len(table))
        memkernels.row_sgd(table, *rows, lr=0.1)
        return out, *rows, table

    cuda_ops.check_captured(step)


# ---- sparse networks -----------------------------------------------------------------------------


# The host runner has two multiprocessors: one to three tokens of many neurons share their work
# among several blocks.
NETWORKS = {
    "a token's columns": ((5, 41, 30, (40, 150)), {"factors": "wide"}),
    "runs of a narrow sum": ((5, 300, 30, (300, 24)), {"dtype": torch.bfloat16}),
    "elements one by one": ((4, 13, 30, (37, 21)), {"factors": "same", "activation": "silu"}),
    "few tokens": ((2, 300, 30, (72, 40)), {"factors": "same", "activation": "relu"}),
    "few tokens of odd rows": ((3, 300, 30, (99, 33)), {"dtype": torch.half}),
}


def networks(run):
    results = []
    for sizes, options in NETWORKS.values():
        arguments = ffn_case(*sizes, **options)
        results.append(run("sparse_ffn", **arguments))
        results += gradients(functools.partial(run, "sparse_ffn"), arguments).values()
    return results


def neurons_out_of_range(run):
    for sizes, options in NETWORKS.values():
        arguments = ffn_case(*sizes, **options)
        skipped = arguments["indices"] < 0
        nonsense = arguments["indices"].masked_fill(skipped, -(10**12))
        nonsense[:, ::2] = nonsense[:, ::2].masked_fill(skipped[:, ::2], 2**32 + 1)
        both = [arguments | {"indices": nonsense}, arguments]
        assert_same_bits(*(run("sparse_ffn", **a) for a in both))
        names = [name for name in ("x", "weights") if arguments[name] is not None]
        assert_same_bits(*(gradients(functools.partial(run, "sparse_ffn"), a, names) for a in both))


@pytest.mark.parametrize("dims", [(72, 40), (128, 300), (37, 77)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_give_the_same_bits_alone_and_in_a_batch(dims, dtype):
    """In several blocks a token and in one, that is."""

    def outcome(tokens, many):
        x, *tables, weights = (
            arguments[name][:tokens] if name in ("x", "weights") else arguments[name]
            for name in ("x", "up", "down", "weights")
        )
        x.requires_grad_(), weights.requires_grad_()
        cuda_ops.launches()
        out = cuda_ops.on_host("sparse_ffn", x, *tables, arguments["indices"][:tokens], weights)
        assert cuda_ops.launches() == many
        grads = torch.autograd.grad(out, (x, weights), torch.ones_like(out))
        assert cuda_ops.launches() == many
        return [result[:1] for result in (out, *grads)]

    arguments = ffn_case(4, 500, 40, dims, factors="wide", dtype=dtype)
    assert_same_bits(outcome(1, 2), outcome(4, 1))


# ---- hashes, gates, codes ------------------------------------------------------------------------


def hashes(run):
    """Several tiles and chunks of heads, and more orders than a launch has."""
    several = {"eos_id": 3, "vocabulary": 11, "past": True}
    return [
        run("ngram_hash", **hash_case([200, 0, 3], [2, 3], heads=8, **several)),
        run("ngram_hash", **hash_case((2, 700), [2], heads=1, dtype=torch.int32)),
        run("ngram_hash", **hash_case((1, 9), [1, 2], heads=300, **several)),
        run("ngram_hash", **hash_case((3, 5), [2, 1, 3] * 6, heads=3, **several)),
    ]


def gates(run):
    """Rows of one warp and of several, aligned and not."""
    return [
        run("engram_gate", **gate_case(*sizes, dtype=dtype, wide_weight=wide, sign=sign))
        for sizes, dtype, wide, sign in [
            ((3, 5, 64), torch.float32, False, "zero"),
            ((5, 3, 37), torch.bfloat16, True, "copy"),
            ((3, 4, 1032), torch.float16, True, "zero"),
            ((3, 2, 4104), torch.bfloat16, False, "zero"),
        ]
    ]


def gradients_of_gates(run):
    """Also of many tokens, of which blocks add up some."""
    return [
        list(gradients(functools.partial(run, "engram_gate"), arguments).values())
        for arguments in (
            gate_case(5, 3, 37, dtype=torch.bfloat16, wide_weight=True),
            gate_case(3, 9, 64, dtype=torch.float16),
            gate_case(3, 4, 2056, dtype=torch.bfloat16),
            gate_case(1030, 2, 8),
        )
    ]


def codes(run):
    return [
        run("lsh_codes", **codes_case(30, 9, bits, dtype=dtype))
        for bits, dtype in [(8, torch.bfloat16), (13, torch.float16), (30, torch.float32)]
    ]


def gradients_of_codes(run):
    function = functools.partial(run, "lsh_codes")
    return [
        list(gradients(function, codes_case(30, 9, bits, dtype=dtype)).values())
        for bits, dtype in [(16, torch.bfloat16), (13, torch.float16), (8, torch.float32)]
    ]


def hashes_of_wild_offsets(run):
    """Offsets are clamped to the tokens; a modulus below 1 is 1."""
    arguments = hash_case([5, 4], [2, 3], past=True)
    expected = run("ngram_hash", **arguments)
    for wild in [0, 5, 2**40], [-7, 5, 9], [-(2**40), 5, 2]:
        offsets = {"cu_seqlens": torch.tensor(wild)}
        assert_same_bits(run("ngram_hash", **arguments | offsets), expected)
    for wild in [9, 9, 9], [2**40, -(2**40), 2**50], [3, 8, 1]:
        run("ngram_hash", **arguments | {"cu_seqlens": torch.tensor(wild)})
    moduli = arguments["moduli"]
    expected = run("ngram_hash", **arguments | {"moduli": put(moduli, 2, 1)})
    for wild in 0, -1, -(2**63):
        assert_same_bits(
            run("ngram_hash", **arguments | {"moduli": put(moduli, 2, wild)}), expected
        )


def test_gradients_of_too_many_channels_are_refused():
    with pytest.raises(RuntimeError, match="engram_gate_backward: hidden has 1025 channels"):
        gradients(functools.partial(cuda_ops.on_host, "engram_gate"), gate_case(2, 1025, 3))


# ---- product keys --------------------------------------------------------------------------------


def product_keys(run):
    """With few blocks, which share a head's keys, and with many; in several launches; with queries
    that are copied again for each tile of keys; with long pipelines and short ones; of many equal
    scores."""
    sizes = [
        ((3, 530, 40), {"heads": 1, "head_dim": 72, "dtype": torch.bfloat16}),
        ((40, 300, 40), {"heads": 1, "head_dim": 37, "dtype": torch.float16}),
        ((40, 135, 9), {"head_dim": 228}),
        ((5, 135, 128), {"head_dim": 228}),
        ((150, 260, 128), {"head_dim": 136, "integers": True, "dtype": torch.bfloat16}),
    ]
    cases = [product_key_case(*tokens_size_k, **options) for tokens_size_k, options in sizes]
    return [run("product_key_topk", **arguments) for arguments in cases]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_keys_of_a_token_are_the_same_bits_alone(dtype):
    """Its head's keys are then shared by several blocks, that is."""
    arguments = product_key_case(35, 400, 30, heads=1, head_dim=40, dtype=dtype)
    scores, indices = cuda_ops.on_host("product_key_topk", **arguments)
    alone = arguments | {"query": arguments["query"][34:]}
    assert_same_bits(cuda_ops.on_host("product_key_topk", **alone), (scores[34:], indices[34:]))


# ---- bags ----------------------------------------------------------------------------------------


def bags_and_factors(run, arguments):
    """Sums of a table's rows, and the gradient of their factors."""
    out = run("embedding_bag", **arguments)
    factors = arguments["per_sample_weights"].requires_grad_()
    weighted = run("embedding_bag", **arguments)
    dout = torch.randn(weighted.shape, generator=torch.Generator().manual_seed(1))
    return out, *torch.autograd.grad(weighted, factors, dout.to(weighted.dtype))


def bags(run):
    """By groups of 4 to 32 lanes and by blocks, a long one beside short ones; of unaligned rows."""
    shapes = (
        ((300, 9), 32),
        ((40, 20), 300),
        ((3, 90), 72),
        ([2, 600, 0, *[3] * 80], 264),
        ((9, 9), 37),
    )
    dtypes = torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32
    return [
        bags_and_factors(run, bag_case(size, 50, dim, factors="wide", dtype=dtype))
        for (size, dim), dtype in zip(shapes, dtypes, strict=True)
    ]


def quantised_bags(run):
    shapes = ((150, 9), 64, 32), ([9, 530, 0, *[3] * 80], 96, 96), ((4, 20), 24, 8)
    types = (torch.int8, torch.float32), (FP8, torch.uint8), (torch.int8, torch.uint8)
    return [
        bags_and_factors(
            run,
            quantised_case(
                size, 50, dim, block=block, stored=stored, scale_dtype=scales, factors="same"
            ),
        )
        for (size, dim, block), (stored, scales) in zip(shapes, types, strict=True)
    ]


def bags_of_nonsense(run):
    for size in (9, 20), (200, 20), [5, 600, 3]:
        arguments = bag_case(size, 30, 40, factors="same", dtype=torch.bfloat16)
        absent = arguments["input"] == -1
        expected = bags_and_factors(run, arguments)
        for nonsense in 30, -2, 2**62, -(2**62):
            arguments["input"][absent] = nonsense
            assert_same_bits(bags_and_factors(run, arguments), expected)
    arguments["offsets"] = torch.tensor([0, 5, 608])
    expected = bags_and_factors(run, arguments)
    arguments["offsets"] = torch.tensor([-(2**60), 5, 2**60])
    assert_same_bits(bags_and_factors(run, arguments), expected)
    arguments["offsets"] = torch.tensor([9, 2**60, -(2**60)])
    bags_and_factors(run, arguments)


@pytest.mark.parametrize("length", [7, 30, 1100])
def test_a_bag_is_the_same_among_few_and_among_many(length):
    """By a block, by a group of lanes, and by a block among groups."""
    run = cuda_ops.run
    arguments = bag_case((270, length), 50, 32, factors="wide", dtype=torch.float16)
    many = run("embedding_bag", **arguments)
    few = {name: arguments[name][:3] for name in ("input", "per_sample_weights")}
    assert_same_bits(run("embedding_bag", **arguments | few), many[:3])
    flat = {name: arguments[name].flatten() for name in few}
    flat["offsets"] = torch.arange(270) * length
    assert_same_bits(run("embedding_bag", **arguments | flat), many)


def test_sums_of_a_table_in_the_hosts_memory_are_where_the_indices_are():
    with FakeTensorMode():
        input = torch.zeros(3, 2, dtype=torch.long, device="cuda:0")
        out = torch.ops.memkernels.embedding_bag(input, torch.zeros(9, 6), None, None, None)
    assert out.device == input.device and out.shape == (3, 6)


@cuda_ops.needs_gpu
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_a_table_in_pinned_memory(stored):
    """Is read in place, and gives what a copy on the device gives."""
    case = functools.partial(quantised_case, block=32, stored=stored)
    case = case if stored == torch.int8 else functools.partial(bag_case, dtype=stored)
    arguments = case((50, 12), 90, 64, factors="same")
    here = {"weight", "scales"} & {name for name, t in arguments.items() if t is not None}
    device = {name: t if t is None else t.cuda() for name, t in arguments.items()}
    pinned = device | {name: arguments[name].pin_memory() for name in here}

    def compute(arguments):
        factors = arguments["per_sample_weights"].detach().requires_grad_()
        out = memkernels.embedding_bag(**arguments | {"per_sample_weights": factors})
        return out, *torch.autograd.grad(out.sum(), factors)

    assert_same_bits(compute(pinned), compute(device))
    with pytest.raises(RuntimeError, match=r"embedding_bag: weight .*pinned"):
        memkernels.embedding_bag(**device | {"weight": arguments["weight"]})
    if stored == torch.bfloat16:
        pinned["weight"].requires_grad_()
        with pytest.raises(RuntimeError, match="not differentiable"):
            memkernels.embedding_bag(**pinned)
    with pytest.raises(RuntimeError, match=r"embedding_bag: .*device"):
        memkernels.embedding_bag(**device | {"input": arguments["input"]})


CASES = {
    f.__name__: f
    for f in (
        gradients_of_bags,
        steps_of_rows,
        networks,
        hashes,
        gates,
        gradients_of_gates,
        codes,
        gradients_of_codes,
        product_keys,
        bags,
        quantised_bags,
    )
}
UNCHECKED = {
    f.__name__: f
    for f in (
        gradients_of_bags_out_of_range,
        steps_of_rows_out_of_range,
        neurons_out_of_range,
        hashes_of_wild_offsets,
        bags_of_nonsense,
    )
}
(
    test_same_bits_for_any_schedule,
    test_no_races,
    test_indices_out_of_range_are_skipped,
) = cuda_ops.tests_of(CASES, UNCHECKED)
