"""One token a sequence, on pools of states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

import memkernels
from cases import arrays
from checks import (
    PLAIN,
    WRITTEN,
    at_random,
    check,
    check_error,
    check_result,
    floats,
    outcome,
    put,
    tensors,
)
from memkernels import reference
from scan_cases import CASES, GATES, OF_TOKENS, SLACK, STATES, STEPS, step_case, step_of
from test_attention import DTYPES
from test_lookup import layouts
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits, unchanged

each_step = pytest.mark.parametrize("op", STEPS)
POOL = {
    "slots": st.integers(0, 4)
    | st.lists(st.sampled_from([-1, 0, 1, 2, 3, 4, 5]), max_size=6, unique=True)
    | st.just([-1, 3, -1, 0]),
    "num_slots": st.sampled_from([6, 9]),
    "padded": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "index_dtype": st.sampled_from(INDEX_DTYPES),
    "seed": st.integers(0, 2**16),
}
HEADS = {
    "heads": st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]),
    "dims": st.tuples(st.integers(1, 70), st.integers(1, 70)),
    "gate": st.sampled_from(GATES),
    "narrow": st.booleans(),
    "decays": st.sampled_from(["mild", "hard"]),
}


@at_random(**POOL, **HEADS, normalize=st.booleans(), scale=st.sampled_from([None, 0.3]))
def test_linear_attention_at_random(scan_ops, **sizes):
    check(scan_ops, "linear_attention_step", step_case("linear_attention", **sizes), slack=SLACK)


@at_random(**POOL, **HEADS, qk_l2norm=st.booleans(), scale=st.sampled_from([None, 0.3]))
def test_delta_rule_at_random(scan_ops, **sizes):
    check(scan_ops, "delta_rule_step", step_case("delta_rule", **sizes), slack=SLACK)


@at_random(
    **POOL,
    per_group=st.integers(1, 20),
    groups=st.integers(1, 3),
    size=st.integers(1, 20),
    extras=st.sampled_from(["", "D", "z", "b", "Dzb"]),
    delta_softplus=st.booleans(),
)
def test_selective_scan_at_random(scan_ops, per_group, groups, **sizes):
    arguments = step_case("selective_scan", channels=per_group * groups, groups=groups, **sizes)
    check(scan_ops, "selective_scan_step", arguments, slack=SLACK)


@at_random(
    **POOL,
    channels=st.integers(1, 70),
    width=st.integers(1, 16),
    dilation=st.sampled_from([1, 1, 2, 5]),
    bias=st.booleans(),
    wide_weight=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
)
def test_causal_conv1d_at_random(scan_ops, **sizes):
    check(scan_ops, "causal_conv1d_step", step_case("causal_conv1d", **sizes), slack=SLACK)


# ---- steps and scans -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@each_step
def test_token_by_token_as_a_scan(scan_ops, op, dtype):
    """Two sequences, their states in slots of a pool, the rows changing places."""
    scan, length = op.removesuffix("_step"), 20
    arguments = step_of(op, [3, 1], 5, dtype=dtype)
    several = [step_of(op, [3, 1], 5, dtype=dtype, seed=seed) for seed in range(length)]
    of_tokens = [n for n in OF_TOKENS[scan] if (t := arguments[n]) is not None and t.ndim > 1]
    whole = {name: torch.stack([x[name] for x in several], 1) for name in of_tokens}
    pools = {name: arguments[name].clone() for name in WRITTEN[op]}
    outs = []
    for t in range(length):
        rows = torch.tensor([0, 1] if t % 3 else [1, 0])
        token = {name: whole[name][rows, t] for name in of_tokens}
        slots = torch.tensor([3, 1])[rows]
        out = getattr(scan_ops, op)(**arguments | token | pools | {"state_indices": slots})
        outs.append(out[rows])

    states = {n: arguments[pool][[3, 1]] for n, pool in zip(STATES, WRITTEN[op], strict=False)}
    names = CASES[scan]((0, 0)).keys() | {"scale", "qk_l2norm"}
    options = {n: x for n, x in arguments.items() if n in names or n in ("dilation", "activation",
               "delta_softplus")}  # fmt: skip
    options |= whole | states | {"output_final_state": True}
    if op == "linear_attention_step":
        options["normalize"] = True
    exact = getattr(reference, scan)(**arrays(options))
    baseline = getattr(PLAIN, scan)(**options)
    actual = [torch.stack(outs, 1)] + [pools[name][[3, 1]] for name in WRITTEN[op]]
    for each in zip(actual, exact, baseline, strict=False):
        check_result(*each, SLACK)


# ---- pools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_step
def test_other_slots_are_not_touched(scan_ops, op, dtype):
    """To the bit: they hold NaN, and numbers; rows of -1 hold NaN, and give 0."""
    arguments = step_of(op, [6, -1, 0, 3, -1], 8, dtype=dtype)
    for name in WRITTEN[op]:
        arguments[name][[1, 5]] = 7
    out, *pools = outcome(scan_ops, op, arguments)
    assert not out[[1, 4]].any() and out[[0, 2, 3]].any(-1).all()
    others = [1, 2, 4, 5, 7]
    for name, pool in zip(WRITTEN[op], pools, strict=True):
        assert_same_bits(pool[others], arguments[name][others])
        assert (pool[[6, 0, 3]] != arguments[name][[6, 0, 3]]).any()


@each_step
def test_the_order_of_rows_is_of_no_account(op):
    """To the bit: nor is which slot a state lies in, or who else is there."""
    arguments = step_of(op, 5, 5)
    out, *pools = outcome(memkernels, op, arguments)
    scan = op.removesuffix("_step")
    of_tokens = [n for n in OF_TOKENS[scan] if (t := arguments[n]) is not None and t.ndim > 1]
    for rows, slots in ([4, 2, 0], [4, 2, 0]), ([1], [3]), ([3, 1, 4, 0, 2], [0, 1, 2, 3, 4]):
        some = {name: arguments[name][rows] for name in of_tokens}
        for name in WRITTEN[op]:
            some[name] = arguments[name].clone()
            some[name][slots] = arguments[name][rows]
        some["state_indices"] = torch.tensor(slots)
        few, *changed = outcome(memkernels, op, arguments | some)
        assert_same_bits(few, out[rows])
        for pool, expected in zip(changed, pools, strict=True):
            assert_same_bits(pool[slots], expected[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_step
def test_same_bits_for_any_threads(num_threads, op, dtype):
    arguments = step_of(op, 37, 40, 40, dtype=dtype)
    num_threads(1)
    expected = outcome(memkernels, op, arguments)
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(outcome(memkernels, op, arguments), expected)


@each_step
def test_no_rows_and_no_slots(scan_ops, op):
    for slots, num_slots in (0, 0), (0, 3), ([], 3), ([], 0), ([-1, -1], 0), ([-1], 2):
        check(scan_ops, op, step_of(op, slots, num_slots), slack=SLACK)


@pytest.mark.parametrize("op", ["linear_attention_step", "delta_rule_step"])
def test_no_heads(kernels, op):
    q, v, state = torch.zeros(2, 0, 8), torch.zeros(2, 0, 4), torch.zeros(2, 0, 8, 4)
    beta = {"beta": torch.zeros(2, 0)} if op == "delta_rule_step" else {}
    assert getattr(kernels, op)(q=q, k=q, v=v, state=state, **beta).shape == (2, 0, 4)


@pytest.mark.parametrize("gate", GATES)
def test_the_normaliser_moves_on_without_values(kernels, gate):
    sizes = [2, -1, 0], 4, (2, 4)
    none, some = (
        step_case("linear_attention", *sizes, (12, n), gate=gate, normalize=True) for n in (0, 3)
    )
    some |= {name: none[name] for name in "qkgz"}
    out, state, z = outcome(kernels, "linear_attention_step", none)
    assert out.shape == (3, 4, 0) and state.shape == (4, 4, 12, 0)
    assert_same_bits(z, outcome(kernels, "linear_attention_step", some)[2])


@each_step
def test_padded_pools(scan_ops, op):
    """Slots lie apart: every other one of a wider pool."""
    arguments = step_of(op, [2, 0], 3)
    expected = outcome(scan_ops, op, arguments)
    wider = {n: torch.stack([arguments[n]] * 2, 1) for n in WRITTEN[op]}
    pools = {name: pool[:, 1] for name, pool in wider.items()}
    out = getattr(scan_ops, op)(**arguments | pools)
    assert_same_bits((out, *pools.values()), expected)
    for name, pool in wider.items():
        assert_same_bits(pool[:, 0], arguments[name])


@each_step
def test_strided_inputs_work_or_are_refused_by_name(scan_ops, op):
    arguments = step_of(op, [2, -1, 0], 4)
    expected = outcome(scan_ops, op, arguments)
    for name, tensor in tensors(arguments).items():
        if name in WRITTEN[op]:
            continue
        for strided, contiguous_rows in layouts(tensor):
            try:
                actual = outcome(scan_ops, op, arguments | {name: strided})
            except RuntimeError as error:
                assert f"{op}: {name}" in str(error)
                assert not contiguous_rows
            else:
                torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.full
@each_step
def test_more_than_2_to_the_31_elements(op):
    """A pool whose last slot begins behind so many; nothing between is touched."""
    arguments = step_of(op, [9, 0], 10, dtype=torch.bfloat16)
    expected = outcome(memkernels, op, arguments)
    pools = {}
    for name in WRITTEN[op]:
        pool = arguments[name]
        far = torch.empty(2**31 + pool.numel(), dtype=pool.dtype)
        far = far.as_strided(pool.shape, (2**31 // 9, *pool.stride()[1:]))
        pools[name] = far.copy_(pool)
    out = getattr(memkernels, op)(**arguments | pools)
    assert_same_bits((out, *(pool.contiguous() for pool in pools.values())), expected)


# ---- autograd ------------------------------------------------------------------------------------


@each_step
def test_the_versions_of_the_pools_alone_are_bumped(scan_ops, op):
    arguments = step_of(op, [2, 0], 3)
    weight = torch.ones(1, requires_grad=True)
    products = [(weight * arguments[name]).nansum() for name in WRITTEN[op]]
    versions = {name: t._version for name, t in tensors(arguments).items()}
    getattr(scan_ops, op)(**arguments)
    for name, tensor in tensors(arguments).items():
        assert (tensor._version > versions[name]) == (name in WRITTEN[op])
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        getattr(scan_ops, op)(**step_of(op, [2, 0], 3))


@each_step
def test_not_differentiable(scan_ops, op):
    for name in floats(step_of(op, [2, 0], 3)):
        arguments = step_of(op, [2, 0], 3)
        arguments[name].requires_grad_()
        message = rf"{op}: .*\b{name}\b.*not differentiable|{op}: not differentiable.*\b{name}\b"
        with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
            getattr(scan_ops, op)(**arguments)
        with torch.no_grad():
            getattr(scan_ops, op)(**arguments)


@each_step
def test_tangents_are_never_lost(op):
    arguments = step_of(op, [2, 0], 3)
    for name, tensor in floats(arguments).items():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))
            with pytest.raises(RuntimeError, match=r"not differentiable"):
                getattr(memkernels, op)(**arguments | {name: dual})


# ---- errors --------------------------------------------------------------------------------------


@each_step
def test_inputs_within_the_state_are_refused(op):
    arguments = step_of(op, [0, 3], 4)
    state = arguments["state"].zero_().contiguous()
    for name in OF_TOKENS[op.removesuffix("_step")]:
        t = arguments[name]
        if t is not None and t.ndim > 1 and t.dtype == state.dtype:
            inside = state.flatten()[: t.numel()].view(t.shape)
            with pytest.raises(RuntimeError, match=rf"{op}: .*\b{name}\b"):
                getattr(memkernels, op)(**arguments | {"state": state, name: inside})


POOL_ERRORS = {
    "slot_beyond_the_pool": ("state_indices", {"state_indices": torch.tensor([0, 4])}),
    "slot_below_minus_one": ("state_indices", {"state_indices": torch.tensor([0, -2])}),
    "a_slot_twice": ("state_indices", {"state_indices": torch.tensor([2, 2])}),
    "rows_of_slots": ("state_indices", {"state_indices": torch.tensor([0, 1, 2])}),
    "rank_of_slots": ("state_indices", {"state_indices": torch.tensor([[0], [1]])}),
    "dtype_of_slots": ("state_indices", {"state_indices": torch.tensor([0.0, 1])}),
    "more_rows_than_slots": ("state", lambda c: {"state_indices": None, "state": c.state[:1]}),
    "rank_of_state": ("state", lambda c: {"state": c.state[0]}),
    "columns_of_state": ("state", lambda c: {"state": c.state[..., :-1].contiguous()}),
    "rows_of_state": ("state", lambda c: {"state": c.state[:, :-1].contiguous()}),
    "dtype_of_state": ("state", lambda c: {"state": c.state.half()}),
    "overlapping_state": ("state", lambda c: {"state": c.state[:1].expand(4, -1, -1, *[-1] * (
        c.state.ndim - 3))}),
}  # fmt: skip


@pytest.mark.parametrize("error", POOL_ERRORS)
@each_step
def test_errors_of_pools(scan_ops, op, error):
    """With rows before the wrong one, whose states are not to change either."""
    arguments = step_of(op, [0, 3], 4)
    if error == "more_rows_than_slots":
        arguments |= {name: arguments[name][:1] for name in WRITTEN[op]}
    check_error(scan_ops, op, arguments, POOL_ERRORS[error])


ERRORS = {
    "linear_attention_step": {
        "rank_of_q": ("q", lambda c: {"q": c.q[0]}),
        "columns_of_k": ("k", lambda c: {"k": c.k[..., :-1]}),
        "dtype_of_k": ("k", lambda c: {"k": c.k.half()}),
        "rows_of_v": ("v", lambda c: {"v": c.v[:1]}),
        "heads_of_v": ("v", lambda c: {"v": c.v[:, :3]}),
        "columns_of_g": ("g", lambda c: {"g": c.g[..., :-1]}),
        "narrow_g": ("g", lambda c: {"g": c.g.half()}),
        "slots_of_z": ("z", lambda c: {"z": c.z[:-1]}),
        "columns_of_z": ("z", lambda c: {"z": c.z[..., :-1].contiguous()}),
        "narrow_z": ("z", lambda c: {"z": c.z.half()}),
    },
    "delta_rule_step": {
        "rank_of_q": ("q", lambda c: {"q": c.q[0]}),
        "dtype_of_k": ("k", lambda c: {"k": c.k.half()}),
        "heads_of_v": ("v", lambda c: {"v": c.v[:, :3]}),
        "heads_of_beta": ("beta", lambda c: {"beta": c.beta[:, :3]}),
        "narrow_beta": ("beta", lambda c: {"beta": c.beta.half()}),
        "heads_of_g": ("g", lambda c: {"g": c.g[:, :3]}),
    },
    "selective_scan_step": {
        "rank_of_u": ("u", lambda c: {"u": c.u[0]}),
        "columns_of_delta": ("delta", lambda c: {"delta": c.delta[:, :-1]}),
        "channels_of_A": ("A", lambda c: {"A": c.A[:-1]}),
        "narrow_A": ("A", lambda c: {"A": c.A.half()}),
        "columns_of_B": ("B", lambda c: {"B": c.B[..., :-1]}),
        "groups_of_C": ("C", lambda c: {"C": c.C[:, :1]}),
        "channels_of_D": ("D", lambda c: {"D": c.D[:-1]}),
        "rows_of_z": ("z", lambda c: {"z": c.z[:1]}),
        "narrow_bias": ("delta_bias", lambda c: {"delta_bias": c.delta_bias.half()}),
    },
    "causal_conv1d_step": {
        "rank_of_x": ("x", lambda c: {"x": c.x[0]}),
        "channels_of_weight": ("weight", lambda c: {"weight": c.weight[:-1]}),
        "narrow_weight": (
            "weight", lambda c: {"weight": c.weight.half(), "bias": c.bias.half()}
        ),
        "dtype_of_bias": ("bias", lambda c: {"bias": c.bias.half()}),
        "no_dilation": ("dilation|state", {"dilation": 0}),
        "dilation_beyond_the_state": ("state", {"dilation": 3}),
        "activation": ("activation", {"activation": "gelu"}),
    },
}  # fmt: skip


@pytest.mark.parametrize(("op", "error"), [(op, e) for op in STEPS for e in ERRORS[op]])
def test_errors_name_the_argument_and_change_nothing(scan_ops, op, error):
    check_error(scan_ops, op, step_of(op, [0, 3], 4), ERRORS[op][error])


@each_step
def test_pools_are_contiguous_in_each_slot(op):
    """Strided ones are refused by the kernels, and left alone."""
    arguments = step_of(op, [0, 3], 4)
    strided = arguments["state"].mT.contiguous().mT
    with unchanged(strided), pytest.raises(RuntimeError, match=rf"{op}: .*\bstate\b"):
        getattr(memkernels, op)(**arguments | {"state": strided})


def test_a_state_is_put_to_use_and_freed():
    """Decoding with a pool: a sequence leaves, another takes its slot."""
    pool = torch.full((3, 1, 4, 4), torch.nan)
    tokens = step_of("linear_attention_step", 2, 2)
    tokens = {n: put(tokens[n][:, :1, :4].contiguous(), (), tokens[n][:, :1, :4]) for n in "qkv"}
    pool[[2, 0]] = 0
    memkernels.linear_attention_step(**tokens, state=pool, state_indices=torch.tensor([2, 0]))
    first = pool[2].clone()
    pool[2] = 0
    memkernels.linear_attention_step(**tokens, state=pool, state_indices=torch.tensor([2, -1]))
    assert_same_bits(pool[2], first)
    assert pool[1].isnan().all()
