"""CUDA kernels of the scan family under the host runner: the same bits for any schedule, no races,
no stray accesses, and indices out of range cut off where nothing checks them. What they compute is
tested beside the other backends (conftest.scan_ops)."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

import cuda_ops
from checks import WRITTEN, check, check_gradients, gradients, outcome
from scan_cases import (
    KINDS,
    OF_TOKENS,
    SLACK,
    conv_case,
    delta_case,
    diagonal_case,
    linear_case,
    map_case,
    part,
    route_case,
    selective_case,
    step_case,
)
from test_attention import DTYPES
from test_scan import check_scan, tokens_of
from tolerance import assert_same_bits


def results_and_gradients(run, op, arguments):
    function = functools.partial(run, op)
    return [*function(**arguments), *gradients(function, arguments).values()]


def gradients_of_squares(ops, op, arguments, names):
    """Of half the sum of all squares, which do not depend on who else is there."""
    leaves = {n: arguments[n].detach().clone().requires_grad_() for n in names}
    out, state = getattr(ops, op)(**arguments | leaves)
    return torch.autograd.grad((out, state), leaves.values(), (out.detach(), state.detach()))


# ---- the chunk engine ----------------------------------------------------------------------------


# Heads that share queries; aligned rows and not; every class of K, and several blocks of V.
LINEAR = {
    "bf16": (([70, 0, 5], (1, 2), (16, 24)), {"gate": "token", "dtype": torch.bfloat16}),
    "wide_v": (((1, 70), (1, 1), (80, 136)), {"normalize": True, "dtype": torch.float16}),
    "wide_k": (((1, 35), (1, 1), (200, 8)), {"gate": "head"}),
    "odd": (([70, 3], (2, 2), (13, 21)), {"gate": "token", "normalize": True, "states": True}),
    "channels": (([70, 3], (1, 1), (24, 16)), {"gate": "channel", "states": True}),
    "more_channels": (((1, 35), (1, 2), (72, 8)), {"gate": "channel", "normalize": True}),
}
DELTA = {
    "bf16": (([70, 0, 5], (1, 2), (72, 24)), {"gate": "token", "dtype": torch.bfloat16}),
    "wide_k": (((1, 35), (1, 1), (136, 40)), {"qk_l2norm": True, "dtype": torch.float16}),
    "odd": (([70, 3], (2, 2), (13, 21)), {"gate": "head", "states": True}),
    "channels": (([70, 3], (1, 1), (24, 16)), {"gate": "channel", "dtype": torch.bfloat16}),
    "more_channels": (
        ((1, 70), (1, 2), (101, 8)),
        {"gate": "channel", "qk_l2norm": True, "dtype": torch.float16},
    ),
}


def chunk_scans(run):
    results = [
        run("linear_attention", **linear_case(*c, **options)) for c, options in LINEAR.values()
    ]
    return results + [
        run("delta_rule", **delta_case(*c, **options)) for c, options in DELTA.values()
    ]


def gradients_of_chunk_scans(run):
    cases = [("linear_attention", linear_case(*c, **options)) for c, options in LINEAR.values()]
    cases += [("delta_rule", delta_case(*c, **options)) for c, options in DELTA.values()]
    return [
        list(gradients(functools.partial(run, op), arguments).values()) for op, arguments in cases
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [101, 136])
def test_decays_of_many_channels(keys, dtype):
    sizes = (1, 70), (1, 2), (keys, 8)
    options = {"gate": "channel", "decays": "hard", "states": True, "dtype": dtype}
    linear = linear_case(*sizes, normalize=True, **options)
    delta = delta_case(*sizes, qk_l2norm=True, **options)
    for op, arguments in ("linear_attention", linear), ("delta_rule", delta):
        check(cuda_ops.namespace(), op, arguments, slack=SLACK)
        check_gradients(cuda_ops.namespace(), op, arguments, 2 * SLACK)


# Of three segments and one.
SEGMENTS = {
    "linear": ("linear_attention", {"gate": "token"}),
    "normalized": ("linear_attention", {"gate": "channel", "normalize": True, "states": True}),
    "delta": ("delta_rule", {}),
    "delta_with_states": ("delta_rule", {"gate": "token", "states": True}),
}


def segments(name):
    op, options = SEGMENTS[name]
    case = linear_case if op == "linear_attention" else delta_case
    return op, case([3100, 30], (1, 1), (8, 8), dtype=torch.bfloat16, **options)


def scans_in_segments(run):
    return [results_and_gradients(run, *segments(name)) for name in SEGMENTS]


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments(name):
    check_scan(cuda_ops.namespace(), *segments(name))


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_rows_of_zeros_are_normalised_in_float16(gate):
    """As factors, their norms would overflow."""
    options = {"gate": gate, "qk_l2norm": True, "dtype": torch.float16}
    arguments = delta_case((1, 100), (1, 1), (16, 16), **options)
    for name in "q", "k":
        arguments[name][:, 5:9] = 0
    arguments["v"][:, 5:9] = 90
    check(cuda_ops.namespace(), "delta_rule", arguments, slack=SLACK)
    grads = gradients(cuda_ops.namespace().delta_rule, arguments, ["v", "beta", "g"])
    assert all(grad.isfinite().all() for grad in grads.values())


def chunks_of_wild_offsets(run):
    """Offsets are cut off at the tokens."""
    cases = ("linear_attention", linear_case, "channel"), ("delta_rule", delta_case, "token")
    for op, case, gate in cases:
        arguments = case([40, 30], (1, 1), (8, 8), gate=gate, states=True)
        expected = run(op, **arguments)
        for wild in [-7, 40, 71], [-(2**40), 40, 2**40]:
            offsets = {"cu_seqlens": torch.tensor(wild)}
            assert_same_bits(run(op, **arguments | offsets), expected)
        for wild in [70, 2**40, -(2**40)], [2**40, -(2**40), 2**50], [30, 70, 10]:
            run(op, **arguments | {"cu_seqlens": torch.tensor(wild)})


def gradients_of_chunks_of_wild_offsets(run):
    cases = ("linear_attention", linear_case, "channel"), ("delta_rule", delta_case, "token")
    for op, case, gate in cases:
        function = functools.partial(run, op)
        arguments = case([40, 30], (1, 1), (8, 8), gate=gate, states=True)
        expected = gradients(function, arguments)
        wild = {"cu_seqlens": torch.tensor([-(2**40), 40, 2**40])}
        assert_same_bits(gradients(function, arguments | wild), expected)
        for wild in [70, 2**40, -(2**40)], [30, 70, 10]:
            gradients(function, arguments | {"cu_seqlens": torch.tensor(wild)})


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
# more neighbours than two chunks hold; of 16 bytes only all rows together.
MAPS = [
    ((3, 11, 16), 3),
    ((5, 37), 2),
    ((40, 8), 9),
    ((2, 3, 9), 25),
    ((9, 64), 1),
    ((3, 1), 4),
    ((8, 10), 2),
]


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


# ---- causal convolutions -------------------------------------------------------------------------

SILU = {"bias": True, "states": True, "activation": "silu"}
# Few taps and many, columns of 16 bytes, of some and of single ones; phases that have runs of their
# own, and more of them; runs of several tiles, blocks of several runs.
CONVOLUTIONS = {
    "short runs": (([40, 0, 3, 70], 16, 4), SILU | {"dtype": torch.bfloat16}),
    "runs of phases": (([40, 1, 70], 12, 3), SILU | {"dilation": 3, "wide_weight": True}),
    "many phases": (((2, 90), 8, 4), SILU | {"dilation": 20, "dtype": torch.float16}),
    "many taps": (((2, 50), 20, 9), {"bias": True, "dilation": 2}),
    "single columns": (([30, 45], 35, 4), SILU | {"dtype": torch.bfloat16, "wide_weight": True}),
    "several groups": (([30, 45], 300, 4), SILU | {"dtype": torch.bfloat16}),
    "long runs": (((2, 2600), 4, 4), SILU),
}


def convolutions(run):
    return [
        results_and_gradients(run, "causal_conv1d", conv_case(*sizes, **options))
        for sizes, options in CONVOLUTIONS.values()
    ]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    sizes, options = CONVOLUTIONS[name]
    check_scan(cuda_ops.namespace(), "causal_conv1d", conv_case(*sizes, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 7])
def test_a_convolution_is_the_same_bits_alone_and_among_others(channels, dtype):
    """Runs are longer then. Gradients of what belongs to a sequence, too."""
    ops = cuda_ops.namespace()
    many = conv_case((20, 300), channels, 3, **SILU, dtype=dtype)
    names = ["x", "initial_state"]
    for count in 20, 1:
        arguments = many | {n: many[n][:count] for n in names}
        grads = gradients_of_squares(ops, "causal_conv1d", arguments, names)
        results = [t[:1] for t in (*outcome(ops, "causal_conv1d", arguments), *grads)]
        if count == 20:
            expected = results
        assert_same_bits(results, expected)


def steps_of_convolutions(run):
    results = []
    for channels, width, dtype, options in [
        (40, 4, torch.bfloat16, {"wide_weight": True, "activation": "silu"}),
        (36, 4, torch.float32, {"bias": True}),
        (35, 4, torch.float16, {"bias": True}),
        (24, 5, torch.bfloat16, {"dilation": 3, "activation": "silu"}),
    ]:
        arguments = step_case(
            "causal_conv1d", [3, -1, 0], 5, channels, width, dtype=dtype, **options
        )
        results += [run("causal_conv1d_step", **arguments), arguments["state"]]
    return results


def convolutions_of_wild_offsets(run):
    arguments = conv_case([5, 4], 8, 4, dilation=2, **SILU)
    check_wild_offsets(run, "causal_conv1d", arguments)


def convolution_steps_of_wild_slots(run):
    for width in 4, 3:
        arguments = step_case("causal_conv1d", [1, -1, 0, -1], 3, 8, width)
        wild = arguments | {
            "state": arguments["state"].clone(),
            "state_indices": torch.tensor([1, 10**12, 0, -(10**12)]),
        }
        assert_same_bits(*((run("causal_conv1d_step", **a), a["state"]) for a in (wild, arguments)))


def check_wild_offsets(run, op, arguments):
    """For lengths of 5 and 4: offsets are cut off."""
    expected = results_and_gradients(run, op, arguments)
    for wild in [0, 5, 2**40], [-7, 5, 9], [-(2**40), 5, 2**50]:
        offsets = {"cu_seqlens": torch.tensor(wild)}
        assert_same_bits(results_and_gradients(run, op, arguments | offsets), expected)
    for wild in [9, 9, 9], [2**40, -(2**40), 2**50], [3, 8, 1], [5, 0, 5]:
        results_and_gradients(run, op, arguments | {"cu_seqlens": torch.tensor(wild)})


# ---- diagonal scans ------------------------------------------------------------------------------

# Of several tiles of a block, of blocks of one warp, of parts that are combined by a kernel of
# their own; columns of 16 bytes and not, in pairs and not.
DIAGONAL = {
    "tiles": ([300, 0, 33, 70], 72, {"resets": 0.02, "dtype": torch.bfloat16}),
    "odd columns": ((3, 150), 7, {"constant": True, "resets": 0.1}),
    "many sequences": ([5] * 30 + [40, 70], 66, {"dtype": torch.float16}),
    "complex numbers": ((2, 150), 37, {"resets": 0.02, "dtype": torch.complex64}),
    "one long sequence": ((1, 700), 12, {"resets": 0.004}),
    "a long one of constant decays": ([560], 5, {"constant": True, "dtype": torch.float32}),
    "a long one of complex numbers": ((1, 700), 3, {"constant": True, "dtype": torch.complex64}),
    "a long one of odd columns": ((1, 1100), 3, {"dtype": torch.bfloat16}),
}


def diagonal(name):
    lengths, channels, options = DIAGONAL[name]
    return diagonal_case(lengths, channels, states=True, **options)


def diagonal_scans(run):
    return [results_and_gradients(run, "diagonal_scan", diagonal(name)) for name in DIAGONAL]


@pytest.mark.parametrize("name", DIAGONAL)
def test_diagonal_scans(name):
    check_scan(cuda_ops.namespace(), "diagonal_scan", diagonal(name))


def diagonal_scans_of_wild_offsets(run):
    for constant in False, True:
        arguments = diagonal_case([5, 4], 8, constant=constant, resets=0.1, states=True)
        check_wild_offsets(run, "diagonal_scan", arguments)
    long = diagonal_case([700], 8, constant=True, states=True)
    for wild in [-5, 10**12], [300, 200], [2**50, -(2**50)]:
        offsets = {"cu_seqlens": torch.tensor(wild)}
        results_and_gradients(run, "diagonal_scan", long | offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_diagonal_scan_is_the_same_bits_alone_and_among_others(dtype):
    """Alone its parts are combined by a kernel of their own; among few, by the warps of a block;
    among many, by one warp. Gradients, too."""
    ops = cuda_ops.namespace()
    many = diagonal_case((30, 1100), 3, resets=0.002, states=True, dtype=dtype)
    names = ["x", "a", "initial_state"]
    for count in 30, 3, 1:
        arguments = many | {n: many[n][:count] for n in [*names, "reset"]}
        grads = gradients_of_squares(ops, "diagonal_scan", arguments, names)
        results = [t[:1] for t in (*outcome(ops, "diagonal_scan", arguments), *grads)]
        if count == 30:
            expected = results
        assert_same_bits(results, expected)


# ---- selective scans -----------------------------------------------------------------------------

# The host runner has two multiprocessors, which more than seven warps fill: of fewer, sequences of
# 16 parts and more are cut.
SELECTIVE = {
    "a long sequence, cut": ((1, 530), 6, 5, {"extras": "Dzb", "states": True}),
    "a long sequence, whole": ((1, 530), 260, 3, {"dtype": torch.bfloat16, "padded": True}),
    "packed, cut": ([0, 500, 33, 990], 9, 16, {"groups": 3, "states": True, "extras": "z"}),
    "packed, whole": ([40, 0, 7, 65], 40, 16, {"groups": 2, "extras": "Dzb", "delta_softplus": True,
                                               "dtype": torch.float16}),
    "many states": ((2, 34), 20, 130, {"extras": "D", "dtype": torch.bfloat16}),
    "channels in several runs": ((1, 40), 138, 250, {"states": True}),
}  # fmt: skip


def selective(name, **options):
    *sizes, fixed = SELECTIVE[name]
    return selective_case(*sizes, **fixed | options)


def selective_scans(run):
    return [run("selective_scan", **selective(name)) for name in SELECTIVE]


def gradients_of_selective_scans(run):
    function = functools.partial(run, "selective_scan")
    return [list(gradients(function, selective(name)).values()) for name in SELECTIVE]


def selective_steps(run):
    results = []
    types = torch.float32, torch.float16, torch.bfloat16, torch.float32
    for size, dtype in zip((5, 1, 16, 256), types, strict=True):
        arguments = selective_step([3, -1, 0], size, dtype)
        results += [run("selective_scan_step", **arguments), arguments["state"]]
    return results


def selective_step(slots, size, dtype=torch.float32):
    options = {"groups": 2, "extras": "Dzb", "delta_softplus": True, "dtype": dtype}
    return step_case("selective_scan", slots, 4, 70, size, **options)


def wild_sequences_of_selective_scans(run):
    """Offsets are clamped to the tokens."""
    function = functools.partial(run, "selective_scan")
    for lengths in [20, 45, 0], [600, 40, 0]:
        arguments = selective_case(lengths, 6, 5, states=True)
        tokens = sum(lengths)

        def results(offsets, arguments=arguments):
            changed = arguments | {"cu_seqlens": torch.tensor(offsets)}
            return *function(**changed), *gradients(function, changed).values()

        expected = results([0, 20, tokens, tokens])
        assert_same_bits(results([-(2**40), 20, 2**40, 2**50]), expected)
        for wild in [9, 5, 0, 2**40], [2**40, 0, -7, 40], [0, 2**62, 3, 1], [tokens, 0, tokens, 0]:
            results(wild)
    # No sequence, with another number behind the offsets, and without.
    for offsets in torch.tensor([0, 64])[:1], torch.tensor([0]):
        arguments = selective_case([64], 6, 5, extras="Db") | {"cu_seqlens": offsets}
        grads = gradients(function, arguments, ["A", "D", "delta_bias"])
        assert not any(grad.any() for grad in grads.values())


def wild_slots_of_selective_steps(run):
    def step(slots):
        arguments = selective_step([3, -1, 0, -1], 5)
        out = run("selective_scan_step", **arguments | {"state_indices": torch.tensor(slots)})
        return out, arguments["state"]

    expected = step([3, -1, 0, -1])
    for wild in [3, 4, 0, -2], [3, 2**40, 0, -(2**62)]:
        assert_same_bits(step(wild), expected)


@pytest.mark.parametrize("name", SELECTIVE)
def test_selective_scans(name):
    """Of sizes that reach every way to share the work."""
    check_scan(cuda_ops.namespace(), "selective_scan", selective(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_scans_give_the_same_bits_cut_and_whole(dtype):
    """Alone a sequence is cut, among others not."""
    op = "selective_scan"
    run = SimpleNamespace(selective_scan=functools.partial(cuda_ops.on_host, op))
    options = {"groups": 2, "extras": "Dzb", "states": True, "dtype": dtype}
    for lengths in (8, 520), [520] + [70] * 7, [0, 1030, 520] + [0] * 9:
        arguments = selective_case(lengths, 6, 5, **options)
        cuda_ops.launches()
        together = outcome(run, op, arguments)
        assert cuda_ops.launches() == 1
        for n in [0] if isinstance(lengths, tuple) or lengths[0] else [1, 2]:
            alone = outcome(run, op, part(op, arguments, n))
            assert cuda_ops.launches() == 3
            assert_same_bits(
                list(alone), [x.contiguous() for x in tokens_of(op, arguments, together, n)]
            )


CASES = {
    f.__name__: f
    for f in (
        chunk_scans,
        gradients_of_chunk_scans,
        scans_in_segments,
        steps_of_matrices,
        maps,
        gradients_of_maps,
        routes,
        convolutions,
        steps_of_convolutions,
        diagonal_scans,
        selective_scans,
        gradients_of_selective_scans,
        selective_steps,
    )
}
UNCHECKED = {
    f.__name__: f
    for f in (
        chunks_of_wild_offsets,
        gradients_of_chunks_of_wild_offsets,
        steps_of_wild_slots,
        routes_of_nonsense,
        convolutions_of_wild_offsets,
        convolution_steps_of_wild_slots,
        diagonal_scans_of_wild_offsets,
        wild_sequences_of_selective_scans,
        wild_slots_of_selective_steps,
    )
}
(
    test_same_bits_for_any_schedule,
    test_no_races,
    test_indices_out_of_range_are_skipped,
) = cuda_ops.tests_of(CASES, UNCHECKED)
