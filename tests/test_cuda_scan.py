"""CUDA kernels of the scan family under the host runner: the same bits for any schedule, no races,
no stray accesses, and indices out of range cut off where nothing checks them. What they compute is
tested beside the other backends (conftest.scan_ops)."""

from __future__ import annotations

import functools
import itertools
from types import (
    SimpleNamespace,
)

import pytest
import torch

import cuda_ops
from checks import (
    WRITTEN,
    check,
    check_gradients,
    gradients,
    outcome,
)
from scan_cases import (
    KINDS,
    OF_TOKENS,
    SLACK,
    delta_case,
    linear_case,
    map_case,
    route_case,
    step_case,
)
from tolerance import (
    assert_same_bits,
)

# ---- the chunk engine ----------------------------------------------------------------------------


# Heads that share queries; aligned rows and not; every class of K, and several blocks of V.
LINEAR = {
    "bf16": (([70, 0, 5], (1, 2), (16, 24)), {"gate": "token", "dtype": torch.bfloat16}),
    "wide_v": (((1, 70), (1, 1), (80, 136)), {"normalize": True, "dtype": torch.float16}),
    "wide_k": (((1, 35), (1, 1), (200, 8)), {"gate": "head"}),
    "odd": (([70, 3], (2, 2), (13, 21)), {"gate": "token", "normalize": True, "states": True}),
    "channels": (([70, 3], (1, 1), (24, 16)), {"gate": "channel", "states": True}),
}
DELTA = {
    "bf16": (([70, 0, 5], (1, 2), (72, 24)), {"gate": "token", "dtype": torch.bfloat16}),
    "wide_k": (((1, 35), (1, 1), (136, 40)), {"qk_l2norm": True, "dtype": torch.float16}),
    "odd": (([70, 3], (2, 2), (13, 21)), {"gate": "head", "states": True}),
    "channels": (([70, 3], (1, 1), (24, 16)), {"gate": "channel", "dtype": torch.bfloat16}),
}


def chunk_scans(run):
    results = [
        run("linear_attention", **linear_case(*c, **options)) for c, options in LINEAR.values()
    ]
    return results + [
        run("delta_rule", **delta_case(*c, **options)) for c, options in DELTA.values()
    ]


def scans_in_segments(run):
    """There are two, and one."""
    lengths = [2100, 30]
    sizes = lengths, (1, 1), (8, 8)
    return [
        run("linear_attention", **linear_case(*sizes, gate="token", dtype=torch.bfloat16)),
        run("delta_rule", **delta_case(*sizes, states=True, dtype=torch.bfloat16)),
    ]


def chunks_of_wild_offsets(run):
    """Offsets are cut off at the tokens."""
    for op, case in ("linear_attention", linear_case), ("delta_rule", delta_case):
        arguments = case([40, 30], (1, 1), (8, 8), gate="token", states=True)
        expected = run(op, **arguments)
        for wild in [-7, 40, 71], [-(2**40), 40, 2**40]:
            offsets = {"cu_seqlens": torch.tensor(wild)}
            assert_same_bits(run(op, **arguments | offsets), expected)
        for wild in [70, 2**40, -(2**40)], [2**40, -(2**40), 2**50], [30, 70, 10]:
            run(op, **arguments | {"cu_seqlens": torch.tensor(wild)})


# ---- steps of matrices ---------------------------------------------------------------------------

# Slots, (H, HV), (K, V): tiles of one warp and of several, wide and narrow ones, several of a
# block, states that registers do not hold, rows and columns of odd numbers.
MATRIX_STEPS = [
    ([1, -1, 0], (1, 2), (128, 72)),
    ([2, 0, -1, 1], (2, 2), (16, 40)),
    ([0], (1, 1), (64, 12)),
    ([1, 0], (1, 1), (300, 9)),
    ([0], (1, 1), (530, 8)),
]


def matrix_steps():
    for i, (slots, heads, dims) in enumerate(MATRIX_STEPS):
        dtype = [torch.bfloat16, torch.float32, torch.float16][i % 3]
        gate = ["channel", "token", None, "head"][i % 4]
        sizes = slots, 3, heads, dims
        options = {"gate": gate, "narrow": i % 2 == 0, "dtype": dtype, "seed": i}
        normal = {"normalize": i % 2 == 1}
        yield "linear_attention_step", step_case("linear_attention", *sizes, **options, **normal)
        normal = {"qk_l2norm": i % 2 == 0}
        yield "delta_rule_step", step_case("delta_rule", *sizes, **options, **normal)


def steps_of_matrices(run):
    results = []
    for op, arguments in matrix_steps():
        results += [run(op, **arguments), *(arguments[n] for n in WRITTEN[op] if n in arguments)]
    return results


@pytest.mark.parametrize("case", range(2 * len(MATRIX_STEPS)))
def test_steps_of_matrices(case):
    op, arguments = list(matrix_steps())[case]
    check(cuda_ops.namespace(), op, arguments, slack=SLACK)


@pytest.mark.parametrize("op", ["linear_attention_step", "delta_rule_step"])
@pytest.mark.parametrize("dims", [(128, 48), (40, 36), (16, 7)])
def test_a_row_is_the_same_bits_alone(op, dims):
    """Its tiles are narrower then, and blocks have fewer of them."""
    scan = op.removesuffix("_step")
    options = {"normalize": True} if scan == "linear_attention" else {"qk_l2norm": True}
    arguments = step_case(scan, list(range(9)), 9, (2, 4), dims, gate="token", **options)
    ops = cuda_ops.namespace()
    out, *pools = outcome(ops, op, arguments)
    alone = {n: t[8:, 3:] for n in OF_TOKENS[scan] if (t := arguments[n]) is not None}
    alone |= {n: arguments[n][8:, 1:].clone() for n in ("q", "k")}
    alone |= {n: arguments[n][8:, 3:].clone() for n in WRITTEN[op]}
    few, *changed = outcome(ops, op, arguments | alone | {"state_indices": torch.tensor([0])})
    assert_same_bits(few, out[8:, 3:])
    assert_same_bits(changed, [pool[8:, 3:] for pool in pools])


def steps_of_wild_slots(run):
    """Slots out of range are none."""
    ops = SimpleNamespace(
        linear_attention_step=functools.partial(run, "linear_attention_step"),
        delta_rule_step=functools.partial(run, "delta_rule_step"),
    )
    for op, arguments in itertools.islice(matrix_steps(), 4):
        slots, expected = arguments["state_indices"], outcome(ops, op, arguments)
        for nonsense in 3, -2, 2**62, -(2**62):
            wild = {"state_indices": slots.where(slots >= 0, nonsense)}
            assert_same_bits(outcome(ops, op, arguments | wild), expected)


# ---- feature maps --------------------------------------------------------------------------------

# Of 16 bytes and not, of one group of rows and several, of several stretches of features, and of
# more neighbours than two chunks hold.
MAPS = [((3, 11, 16), 3), ((5, 37), 2), ((40, 8), 9), ((2, 3, 9), 25), ((9, 64), 1), ((3, 1), 4)]


def map_cases(kinds=KINDS):
    for kind in kinds:
        for i, (shape, nu) in enumerate(MAPS):
            dtype = [torch.bfloat16, torch.float32, torch.float16][i % 3]
            yield map_case(*shape, kind=kind, nu=nu, dtype=dtype)


def maps(run):
    return [run("feature_map", **arguments) for arguments in map_cases()]


def gradients_of_maps(run):
    function = functools.partial(run, "feature_map")
    return [list(gradients(function, arguments).values()) for arguments in map_cases()]


@pytest.mark.parametrize("kind", KINDS)
def test_maps(kind):
    ops = cuda_ops.namespace()
    for arguments in map_cases([kind]):
        check(ops, "feature_map", arguments)
        check_gradients(ops, "feature_map", arguments)
        x, expected = arguments["x"], outcome(ops, "feature_map", arguments)
        apart = torch.stack([x] * 2, -2)[..., 0, :]
        for strided in apart, x.transpose(0, -2).contiguous().transpose(0, -2):
            actual = outcome(ops, "feature_map", arguments | {"x": strided})
            assert_same_bits(actual, expected)


def test_gradients_of_pairs_too_many_to_stage():
    check_gradients(cuda_ops.namespace(), "feature_map", map_case(5, 170, kind="taylor2"))


def test_pairs_of_too_many_columns_are_refused():
    with pytest.raises(RuntimeError, match="feature_map: x has 15000 columns; taylor2"):
        cuda_ops.on_host("feature_map", torch.zeros(0, 15000), "taylor2")


# ---- routes --------------------------------------------------------------------------------------


def routes(run):
    return [
        run("route_tokens", **route_case(*sizes, 3, index_dtype=index_dtype))
        for sizes, index_dtype in [
            ((200, 3, 7), torch.int32),
            ((9, 1, 600), torch.int64),
            ((30, 2, 1), torch.int64),
            ((5, 2, 0), torch.int32),
        ]
    ]


def routes_of_nonsense(run):
    """Goes to no memory."""
    arguments = route_case(60, 2, 5, 4)
    ids = arguments["expert_ids"]
    expected = run("route_tokens", **arguments)
    for nonsense in 5, -2, 2**62, -(2**62), 2**32:
        wild = {"expert_ids": ids.where(ids >= 0, nonsense)}
        assert_same_bits(run("route_tokens", **arguments | wild), expected)


CASES = {
    f.__name__: f
    for f in (
        chunk_scans,
        scans_in_segments,
        steps_of_matrices,
        maps,
        gradients_of_maps,
        routes,
    )
}
UNCHECKED = {
    f.__name__: f
    for f in (
        chunks_of_wild_offsets,
        steps_of_wild_slots,
        routes_of_nonsense,
    )
}
(
    test_same_bits_for_any_schedule,
    test_no_races,
    test_indices_out_of_range_are_skipped,
) = cuda_ops.tests_of(CASES, UNCHECKED)
