"""Scans under the compiler, and under autocast."""

from __future__ import annotations

import pytest
import torch

import memkernels
from checks import PLAIN, WRITTEN, floats, gradients, inexact, opcheck, outcome, tensors
from scan_cases import EXAMPLES, STEPS, arguments_of, route_case, step_of
from test_feature_map import each_kind, map_case
from tolerance import assert_same_bits

# The compiler takes its time: of each backward, with all that may be given.
FEW = ["gated_attention", "normalized_attention", "kimi_delta", "selective_scan", "diagonal_scan",
       "complex_diagonal", "causal_conv1d"]  # fmt: skip
each_example = pytest.mark.parametrize("example", FEW)
each_step = pytest.mark.parametrize("op", STEPS)

# What the public functions say beside what is given.
DEFAULTS = {
    "linear_attention": {"scale": 0.3, "eps": 1e-6},
    "delta_rule": {"scale": 0.3, "qk_l2norm": False},
    "causal_conv1d": {"dilation": 1, "activation": "none"},
    "linear_attention_step": {"scale": 0.3, "eps": 1e-6},
    "delta_rule_step": {"scale": 0.3},
}


def internal(op, arguments):
    """The arguments of an op behind the public one: complex numbers are pairs, bools bytes."""
    arguments = DEFAULTS.get(op, {}) | arguments
    for name, tensor in tensors(arguments).items():
        if tensor.is_complex():
            arguments[name] = torch.view_as_real(tensor)
        elif tensor.dtype == torch.bool:
            arguments[name] = tensor.view(torch.uint8)
    return arguments


# ---- opcheck -------------------------------------------------------------------------------------


@each_example
def test_opcheck(example):
    op, arguments = arguments_of(example, [2, 0, 3], dim=3)
    arguments = internal(op, arguments)
    for tensor in floats(arguments).values():
        tensor.requires_grad_()
    opcheck(op, arguments)


@pytest.mark.parametrize("needs", ["all", "few"])
@each_example
def test_opcheck_of_backwards(example, needs):
    op, arguments = arguments_of(example, [2, 0, 3], dim=3)
    arguments = internal(op, arguments)
    names = [a.name for a in getattr(torch.ops.memkernels, op).default._schema.arguments]
    given = [name for name in names if inexact(arguments.get(name))]
    asked = given if needs == "all" else given[::2]
    out, *states = call(op, arguments)
    arguments |= {
        "dout": torch.ones_like(out),
        "dh": torch.ones_like(out),
        "dstate": torch.ones_like(states[0]),
        "dz": torch.ones_like(states[-1]) if arguments.get("normalize") else None,
        "out": out if arguments.get("normalize") else None,
        "h": out,
        "needs": sum(1 << names.index(name) for name in asked),
    }
    opcheck(f"{op}_backward", arguments)


def call(op, arguments):
    """The op behind the public one."""
    op = getattr(torch.ops.memkernels, op).default
    schema = op._schema.arguments
    positional = [arguments.get(a.name) for a in schema if not a.kwarg_only]
    return op(*positional, **{a.name: arguments[a.name] for a in schema if a.kwarg_only})


@each_step
def test_opcheck_of_steps(op):
    for slots in 2, [2, -1, 0]:
        opcheck(op, DEFAULTS.get(op, {}) | step_of(op, slots, 3, dim=3))


@each_kind
def test_opcheck_of_features(kind):
    arguments = map_case(3, 4, kind=kind)
    opcheck("feature_map", {n: t.requires_grad_() for n, t in floats(arguments).items()}
            | {"kind": kind, "nu": 3})  # fmt: skip
    out = memkernels.feature_map(**arguments).detach()
    arguments["x"].requires_grad_(False)
    opcheck("feature_map_backward", arguments | {"dout": torch.ones_like(out)})


def test_opcheck_of_routes():
    opcheck("route_indices", route_case(5, 2, 3))


# ---- compile and export --------------------------------------------------------------------------


@each_example
def test_compile_forward_and_backward(example):
    function = getattr(memkernels, EXAMPLES[example])
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, dim in ((2, 7), 8), ((3, 5), 6):
        _, arguments = arguments_of(example, lengths, dim)
        assert_same_bits(gradients(compiled, arguments), gradients(function, arguments))
    torch._dynamo.reset()


@each_step
def test_compile_of_steps(op):
    """What is returned, what is written, and what is computed from that afterwards."""

    def step(arguments):
        out = getattr(memkernels, op)(**arguments)
        return out * 2, arguments["state"].sum(0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in compiled, step:
        arguments = step_of(op, [2, 0], 3) | {"state_indices": None}
        arguments |= {name: arguments[name].nan_to_num() for name in WRITTEN[op]}
        results.append([*function(arguments), *(arguments[name] for name in WRITTEN[op])])
    assert_same_bits(*results)
    torch._dynamo.reset()


def test_compile_of_a_mixture_of_memories():
    """Routes, features, a scan, and the way back: one graph, whose sizes no data decide."""

    def mixture(q, k, v, expert_ids, weights):
        q, k = (memkernels.feature_map(x, "taylor2") for x in (q, k))
        routed = [memkernels.route_tokens(x, expert_ids, 3) for x in (q, k, v)]
        _, cu_seqlens, inverse = routed[0]
        rows = (rows[None] for rows, _, _ in routed)
        out, *_ = memkernels.linear_attention(*rows, cu_seqlens=cu_seqlens)
        return memkernels.unroute_tokens(out[0], inverse, weights)

    graphs = set()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixture, fullgraph=True, dynamic=True, backend=counter)
    for tokens in 7, 11, 14:
        q, k, v = (route_case(tokens, 2, 3, 5, 4, seed=i)["x"] for i in range(3))
        ids = route_case(tokens, 2, 3)["expert_ids"]
        arguments = q, k, v, ids, torch.rand(tokens, 2)
        assert_same_bits(compiled(*arguments), mixture(*arguments))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("example", ["gated_attention", "selective_scan", "causal_conv1d"])
def test_one_graph_for_any_number_of_tokens(example):
    function, graphs = getattr(memkernels, EXAMPLES[example]), set()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda arguments: function(**arguments), fullgraph=True, dynamic=True, backend=counter
    )
    for lengths in (3, 7), (3, 9), (3, 20):
        _, arguments = arguments_of(example, lengths)
        assert_same_bits(compiled(arguments), function(**arguments))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1
    torch._dynamo.reset()


@each_example
def test_export(example):
    op, arguments = arguments_of(example)
    options = {n: x for n, x in arguments.items() if not isinstance(x, torch.Tensor)}

    class Scan(torch.nn.Module):
        def forward(self, arguments):
            return getattr(memkernels, op)(**arguments, **options)

    program = torch.export.export(Scan(), (tensors(arguments),))
    actual = program.module()(tensors(arguments))
    assert_same_bits(actual, getattr(memkernels, op)(**arguments))


# ---- autocast ------------------------------------------------------------------------------------

# What autocast to bfloat16 casts to it; companions are left in, or cast to, float32. Diagonal
# scans and features are computed in what they are given.
AUTOCAST = {
    "linear_attention": ["q", "k", "v"],
    "gated_attention": ["q", "k", "v"],
    "normalized_attention": ["q", "k", "v"],
    "delta_rule": ["q", "k", "v"],
    "kimi_delta": ["q", "k", "v"],
    "selective_scan": ["u", "delta", "B", "C", "z"],
    "causal_conv1d": ["x", "initial_state"],
    "diagonal_scan": [],
}


@pytest.mark.parametrize("example", AUTOCAST)
def test_autocast(example):
    """Forward, and backward in the dtypes of the leaves; float64 is left alone."""
    op, arguments = arguments_of(example, (2, 20))
    cast = {name: arguments[name].bfloat16() for name in AUTOCAST[example]}
    double = {name: t.double() for name, t in floats(arguments).items()}
    for given, meant in (arguments, arguments | cast), (arguments | double,) * 2:
        expected = outcome(memkernels, op, meant)
        grads = gradients(getattr(memkernels, op), meant)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(outcome(memkernels, op, given), expected)
            actual = gradients(getattr(memkernels, op), given)
        assert_same_bits(actual, {name: g.to(given[name].dtype) for name, g in grads.items()})


@pytest.mark.parametrize("example", ["gated_attention", "delta_rule"])
def test_autocast_widens_narrow_companions(example):
    """Gates of another dtype of two bytes."""
    op, arguments = arguments_of(example, (2, 20), dtype=torch.bfloat16)
    name = "g" if example == "gated_attention" else "beta"
    half = arguments | {name: arguments[name].half()}
    cast = {name: arguments[name].bfloat16() for name in ("q", "k", "v")}
    expected = outcome(memkernels, op, arguments | cast | {name: half[name].float()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(outcome(memkernels, op, half), expected)


@each_example
def test_autocast_never_changes_sums_of_the_fallback(example):
    op, arguments = arguments_of(example, (2, 20))
    expected = outcome(PLAIN, op, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(outcome(PLAIN, op, arguments), expected)
