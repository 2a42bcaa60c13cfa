"""What every scan promises, whatever it keeps."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch

import memkernels
from checks import (
    PLAIN,
    as_tuple,
    check,
    check_error,
    check_gradients,
    floats,
    gradients,
    in_float64,
    inexact,
    outcome,
    put,
    tensors,
)
from scan_cases import (
    EXAMPLES,
    KINDS,
    LENGTHS,
    OF_TOKENS,
    SLACK,
    STATES,
    STEPS,
    arguments_of,
    map_case,
    part,
    spans,
    step_of,
)
from test_attention import DTYPES, each_other_isa, run_python
from test_lookup import layouts
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits

each_example = pytest.mark.parametrize("example", EXAMPLES)
each_step = pytest.mark.parametrize("op", STEPS)
FEW = ["gated_attention", "kimi_delta", "selective_scan", "diagonal_scan", "causal_conv1d"]
RAGGED = [5, 0, 21, 1, 0, 70, 0]


def tokens_of(op, arguments, result, n):
    """What a result has for sequence n: of its tokens, and its last states."""
    b, start, stop = spans(op, arguments)[n]
    out, *states = result
    return [out[b : b + 1, start:stop], *(s if s is None else s[n : n + 1] for s in states)]


def check_scan(ops, op, arguments, slack=SLACK):
    """Its results, and gradients, unless those are autograd's."""
    result = check(ops, op, arguments, slack)
    if ops is not PLAIN:
        check_gradients(ops, op, arguments, 2 * slack)
    return result


# ---- sizes ---------------------------------------------------------------------------------------


@each_example
def test_every_length(scan_ops, example):
    op, arguments = arguments_of(example, LENGTHS, dim=5)
    check_scan(scan_ops, op, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@each_example
def test_dtypes(scan_ops, example, dtype):
    op, arguments = arguments_of(example, RAGGED, dtype=dtype)
    out, *states = check_scan(scan_ops, op, arguments)
    first = arguments[OF_TOKENS[op][0]]
    sums = first.dtype if op == "causal_conv1d" else torch.promote_types(first.dtype, torch.float32)
    assert out.dtype == first.dtype and out.is_contiguous()
    assert all(state is None or state.dtype == sums for state in states)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@each_example
def test_no_sequences_and_no_tokens(scan_ops, example, index_dtype):
    """A sequence of no tokens ends as it begins."""
    for lengths in (0, 5), (3, 0), [], [0], [0, 0, 4, 0]:
        op, arguments = arguments_of(example, lengths, index_dtype=index_dtype)
        _, *states = check_scan(scan_ops, op, arguments)
        for n, (_, start, stop) in enumerate(spans(op, arguments)):
            if start == stop:
                for state, name in zip(states, STATES, strict=False):
                    if state is not None:
                        assert_same_bits(state[n], arguments[name][n].contiguous())


@each_example
def test_gradients_of_no_tokens(scan_ops, example):
    """Autograd's are expanded ones, with strides of 0."""
    for lengths in (1, 0), (0, 5):
        op, arguments = arguments_of(example, lengths)
        leaves = {name: t.requires_grad_() for name, t in floats(arguments).items()}
        results = getattr(scan_ops, op)(**arguments | leaves)
        sum(x.sum().abs() for x in results if inexact(x)).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is None or name in STATES or not leaf.grad.any()


@each_example
def test_no_final_state_unless_asked_for(scan_ops, example):
    op, arguments = arguments_of(example)
    out, *_ = getattr(scan_ops, op)(**arguments)
    del arguments["output_final_state"]
    alone, *states = getattr(scan_ops, op)(**arguments)
    assert_same_bits(alone, out)
    assert states == [None] * len(states)


@pytest.mark.full
@pytest.mark.parametrize("example", FEW)
def test_many_tokens(example):
    op, arguments = arguments_of(example, (1, 70000), dim=2)
    check(memkernels, op, arguments, slack=SLACK)
    _, arguments = arguments_of(example, (1, 70000), dim=2, dtype=torch.float64)
    function = getattr(memkernels, op)
    parts = functools.partial(in_parts, op, function, [300, 40000, 69990])
    actual, expected = gradients(function, arguments), gradients(parts, arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# ---- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@each_example
def test_same_bits_alone_and_in_a_batch(example, dtype):
    for lengths in (3, 33), LENGTHS:
        op, arguments = arguments_of(example, lengths, dtype=dtype)
        together = outcome(memkernels, op, arguments)
        for n in range(len(spans(op, arguments))):
            alone = outcome(memkernels, op, part(op, arguments, n))
            expected = tokens_of(op, arguments, together, n)
            assert_same_bits(list(alone), [x if x is None else x.contiguous() for x in expected])


@each_example
def test_packed_is_as_rows_of_a_batch(scan_ops, example):
    op, rows = arguments_of(example, (3, 20))
    packed = {name: t.flatten(0, 1)[None] for name in OF_TOKENS[op]
              if (t := rows[name]) is not None and t.ndim > 1}  # fmt: skip
    packed = rows | packed | {"cu_seqlens": torch.tensor([0, 20, 40, 60])}
    out, *states = outcome(scan_ops, op, packed)
    expected, *expected_states = outcome(scan_ops, op, rows)
    # torch's functions round in another way where a tensor ends.
    compare = torch.testing.assert_close if scan_ops is PLAIN else assert_same_bits
    compare([out.view(expected.shape), *states], [expected, *expected_states])
    actual, expected = (gradients(getattr(scan_ops, op), x) for x in (packed, rows))
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name].view_as(grad), grad)


def in_parts(op, function, bounds, **arguments):
    """Each row of a batch cut at the bounds, every part beginning with the last state."""
    outs = []
    length = arguments[OF_TOKENS[op][0]].shape[1]
    for start, stop in pairwise([0, *bounds, length]):
        cut = {
            name: t[:, start:stop]
            for name in OF_TOKENS[op]
            if (t := arguments[name]) is not None and t.ndim > 1
        }
        out, *states = function(**arguments | cut)
        outs.append(out)
        arguments |= {n: s for n, s in zip(STATES, states, strict=False) if s is not None}
    return torch.cat(outs, 1), *states


@pytest.mark.parametrize("bounds", [[0], [1], [16], [30], [63], [64], [77], [20, 21, 70]])
@each_example
def test_a_sequence_in_parts_is_the_sequence(example, bounds):
    """Gradients, too."""
    op, arguments = arguments_of(example, (2, 77), dim=6, dtype=torch.float64)
    function = getattr(memkernels, op)
    parts = functools.partial(in_parts, op, function, bounds)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(parts(**arguments), function(**arguments), **close)
    actual, expected = gradients(parts, arguments), gradients(function, arguments)
    torch.testing.assert_close(actual, expected, **close)


@each_example
def test_nan_stays_in_its_sequence(scan_ops, example):
    """As do its gradients; within, it may reach all tokens of its chunk."""
    op, arguments = arguments_of(example, [9, 30, 0, 9])
    clean = outcome(scan_ops, op, arguments)
    function = getattr(scan_ops, op)
    for name in OF_TOKENS[op]:
        tensor = arguments[name]
        if not inexact(tensor) or tensor.ndim < 3:
            continue
        dirty = arguments | {name: put(tensor, (0, 20), torch.nan)}
        actual = outcome(scan_ops, op, dirty)
        for n in 0, 2, 3:
            assert_same_bits(*(tokens_of(op, arguments, x, n) for x in (actual, clean)))
        assert actual[0][:, 20].isnan().any()
        grads = gradients(function, dirty)
        for each in OF_TOKENS[op]:
            if each in grads and arguments[each].ndim > 2:
                assert grads[each][:, :9].isfinite().all() and grads[each][:, 39:].isfinite().all()


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_example
def test_same_bits_every_time_and_for_any_threads(num_threads, example, dtype):
    """Of results and gradients."""
    for lengths in (3, 150), [*RAGGED, 260]:
        op, arguments = arguments_of(example, lengths, dim=36, dtype=dtype)
        function = getattr(memkernels, op)
        num_threads(1)
        expected = outcome(memkernels, op, arguments), gradients(function, arguments)
        for threads in 1, 2, 2, 3:
            num_threads(threads)
            actual = outcome(memkernels, op, arguments), gradients(function, arguments)
            assert_same_bits(actual, expected)


@each_example
def test_index_dtypes_never_change_bits(example):
    _, arguments = arguments_of(example, RAGGED)
    op, short = arguments_of(example, RAGGED, index_dtype=torch.int32)
    assert_same_bits(outcome(memkernels, op, short), outcome(memkernels, op, arguments))


@each_example
def test_each_gradient_only_if_asked_for(scan_ops, example):
    """The same bits, whichever are."""
    op, arguments = arguments_of(example, (2, 40))
    function = getattr(scan_ops, op)
    every = gradients(function, arguments)
    names = list(every)
    for fewer in [[name] for name in names] + [names[:2], names[1:]]:
        assert_same_bits(
            gradients(function, arguments, fewer), {name: every[name] for name in fewer}
        )


# ---- gradients -----------------------------------------------------------------------------------


@each_example
def test_gradcheck(example):
    op, arguments = arguments_of(example, [1, 0, 3], dim=2, dtype=torch.float64)
    names = list(floats(arguments))
    leaves = [arguments[name].requires_grad_() for name in names]

    def function(*leaves):
        result = getattr(memkernels, op)(**arguments | dict(zip(names, leaves, strict=True)))
        return tuple(x for x in as_tuple(result) if x is not None)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("chosen", [0, 1])
@each_example
def test_gradients_through_one_result(scan_ops, example, chosen):
    """Only what the tokens gave, or only the last state."""
    op, arguments = arguments_of(example, [30, 0, 70])

    def one(ops):
        return lambda **leaves: getattr(ops, op)(**leaves)[chosen]

    actual = gradients(one(scan_ops), arguments)
    exact = gradients(one(scan_ops), arguments | in_float64(arguments))
    for name, grad in actual.items():
        size = exact[name].abs().max() if exact[name].numel() else 1
        torch.testing.assert_close(
            grad.to(exact[name].dtype), exact[name], rtol=0, atol=1e-5 * size
        )


@pytest.mark.parametrize("weighted", [False, True])
@each_example
def test_differentiable_once(example, weighted):
    """A gradient of a gradient raises; above all it is not silently incomplete."""
    op, arguments = arguments_of(example)
    leaf = arguments[OF_TOKENS[op][0]].requires_grad_()
    result, *_ = getattr(memkernels, op)(**arguments)
    weight = torch.ones_like(result).requires_grad_(weighted)

    def second():
        (grad,) = torch.autograd.grad(result, leaf, weight, create_graph=True)
        (grad * leaf).sum().abs().backward()

    with pytest.raises(RuntimeError, match="differentia"):
        second()


@each_example
def test_no_graph_without_need(example):
    op, arguments = arguments_of(example)
    function = getattr(memkernels, op)
    assert not any(x is not None and x.requires_grad for x in function(**arguments))
    for leaf in floats(arguments).values():
        leaf.requires_grad_()
        with torch.no_grad():
            assert not any(x is not None and x.requires_grad for x in function(**arguments))
        assert all(x is None or x.requires_grad for x in function(**arguments))
        leaf.requires_grad_(False)


@each_example
def test_tangents_are_never_lost(example):
    op, arguments = arguments_of(example)
    for name, tensor in floats(arguments).items():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))
            with pytest.raises(RuntimeError, match=r"not differentiable"):
                getattr(memkernels, op)(**arguments | {name: dual})


# ---- strides, devices and dtypes -----------------------------------------------------------------


@each_example
def test_padded_inputs(scan_ops, example):
    """NaN stands behind every row."""
    for lengths in (2, 40), RAGGED:
        op, arguments = arguments_of(example, lengths, padded=True)
        dense = arguments | {name: t.contiguous() for name, t in tensors(arguments).items()}
        torch.testing.assert_close(*(outcome(scan_ops, op, x) for x in (arguments, dense)))
        function = getattr(scan_ops, op)
        torch.testing.assert_close(*(gradients(function, x) for x in (arguments, dense)))


@each_example
def test_strided_inputs_work_or_are_refused_by_name(scan_ops, example):
    """Rows lie anywhere; that they are contiguous may be asked for."""
    op, arguments = arguments_of(example, [9, 0, 30])
    expected = outcome(scan_ops, op, arguments)
    for name, tensor in tensors(arguments).items():
        for strided, contiguous_rows in layouts(tensor):
            try:
                actual = outcome(scan_ops, op, arguments | {name: strided})
            except RuntimeError as error:
                assert f"{op}: {name}" in str(error)
                assert not contiguous_rows
            else:
                torch.testing.assert_close(actual, expected)


@each_example
def test_gradients_of_expanded_inputs(scan_ops, example):
    """One row for all tokens; and a gradient of the result with strides of 0."""
    op, arguments = arguments_of(example)
    name = OF_TOKENS[op][0]
    rows = arguments[name][:, :1].expand_as(arguments[name])
    grads = []
    for all_rows in rows, rows.contiguous():
        leaf = all_rows.detach().requires_grad_()
        result = getattr(scan_ops, op)(**arguments | {name: leaf})[0]
        grads += torch.autograd.grad(result.sum(), leaf, torch.ones((), dtype=result.dtype))
    assert_same_bits(*grads)


@each_example
def test_shapes_without_data(example):
    for lengths in (2, 19), [3, 0, 4]:
        op, arguments = arguments_of(example, lengths)
        expected = getattr(memkernels, op)(**arguments)
        meta = {name: t.to("meta") for name, t in tensors(arguments).items()}
        actual = getattr(memkernels, op)(**arguments | meta)
        for fake, real in zip(actual, expected, strict=True):
            assert (fake is None) == (real is None)
            if real is not None:
                alike = (fake.shape, fake.dtype, fake.stride())
                assert fake.is_meta and alike == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e != "complex_diagonal"])
def test_unsupported_dtype_lists_the_supported_ones(example):
    op, arguments = arguments_of(example)
    arguments |= {name: t.to(torch.float8_e5m2) for name, t in floats(arguments).items()}
    with pytest.raises(RuntimeError, match=rf"{op}: .*float32"):
        getattr(memkernels, op)(**arguments)


@pytest.mark.full
@pytest.mark.parametrize("example", FEW)
def test_more_than_2_to_the_31_elements(example):
    """The first and the last token of a tensor are so far apart; nothing between is touched."""
    op, arguments = arguments_of(example, (1, 20), dtype=torch.bfloat16)
    expected = outcome(memkernels, op, arguments)
    for name in OF_TOKENS[op]:
        rows = arguments[name]
        if not inexact(rows) or rows.ndim < 3:
            continue
        stride = 2**31 // (rows.shape[1] - 1)
        far = torch.empty(2**31 + rows.numel(), dtype=rows.dtype)
        far = far.as_strided(rows.shape, (0, stride, *rows.stride()[2:]))
        far.copy_(rows)
        assert_same_bits(outcome(memkernels, op, arguments | {name: far}), expected)


# ---- errors --------------------------------------------------------------------------------------

PACKED_ERRORS = {
    "first_offset": ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 5, 9])}),
    "last_offset": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 8])}),
    "offset_beyond_the_end": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 10])}),
    "falling_offsets": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 10, 9])}),
    "no_offsets": ("cu_seqlens", {"cu_seqlens": torch.tensor([]).long()}),
    "rank_of_offsets": ("cu_seqlens", {"cu_seqlens": torch.tensor([[0, 5, 9]])}),
    "dtype_of_offsets": ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 5, 9])}),
    "sequences_of_states": ("initial_state", {"cu_seqlens": torch.tensor([0, 9])}),
    "dtype_of_states": (
        "initial_state", lambda c: {"initial_state": torch.zeros(c.initial_state.shape).half()}
    ),
    "rank_of_states": ("initial_state", lambda c: {"initial_state": c.initial_state[0]}),
    "columns_of_states": (
        "initial_state", lambda c: {"initial_state": c.initial_state[..., :-1]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("error", PACKED_ERRORS)
@pytest.mark.parametrize(
    "example", ["linear_attention", "delta_rule", "selective_scan", "diagonal_scan",
                "complex_diagonal", "causal_conv1d"]
)  # fmt: skip
def test_errors_of_sequences(scan_ops, example, error):
    op, arguments = arguments_of(example, [5, 4])
    check_error(scan_ops, op, arguments, PACKED_ERRORS[error])


@pytest.mark.parametrize("example", FEW)
def test_packed_sequences_have_a_batch_of_1(scan_ops, example):
    op, arguments = arguments_of(example, (2, 9))
    error = "cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 9])}
    check_error(scan_ops, op, arguments, error)


# ---- processes -----------------------------------------------------------------------------------


def compact_check():
    """A little of everything, for one process an ISA."""
    for dtype in DTYPES:
        for example in EXAMPLES:
            for dim in (5, 33) if dtype == torch.float32 else (33,):
                op, arguments = arguments_of(example, [70, 0, 9], dim, dtype)
                check_scan(memkernels, op, arguments)
        for op in STEPS:
            check(memkernels, op, step_of(op, [2, -1, 0], 4, 33, dtype=dtype), slack=SLACK)
        for kind in KINDS:
            check_scan(memkernels, "feature_map", map_case(9, 33, kind=kind, dtype=dtype))


@each_other_isa
def test_every_isa(isa):
    run_python("import test_scan; test_scan.compact_check()", MEMKERNELS_CPU_ISA=isa)
