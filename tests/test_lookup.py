"""What every lookup op promises, whatever it looks up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import memkernels
from checks import WRITTEN, check, floating, floats, gradients, outcome, tensors, upstream
from lookup_cases import EXAMPLES, arguments_of, bag_case
from memkernels import fallback
from test_attention import DTYPES, apart, each_other_isa, run_python
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits, unchanged

each_example = pytest.mark.parametrize("example", EXAMPLES)

DIFFERENTIABLE = [
    *("product_key_topk", "embedding_bag", "flat_bags"),
    *("engram_gate", "lsh_codes", "sparse_ffn"),
]
each_differentiable = pytest.mark.parametrize("example", DIFFERENTIABLE)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_example
def test_same_bits_every_time_and_for_any_threads(num_threads, example, dtype):
    op, arguments = arguments_of(example, 400, 130, dtype)
    num_threads(1)
    expected = outcome(memkernels, op, arguments)
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(outcome(memkernels, op, arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_differentiable
def test_same_gradients_every_time_and_for_any_threads(num_threads, example, dtype):
    op, arguments = arguments_of(example, 400, 130, dtype)
    function = getattr(memkernels, op)
    num_threads(1)
    expected = gradients(function, arguments)
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(gradients(function, arguments), expected)


# The arguments that have a row for each token.
OF_TOKENS = {
    "product_key_topk": ["query"],
    "embedding_bag": ["input", "per_sample_weights"],
    "int8_bags": ["input", "per_sample_weights"],
    "fp8_bags": ["input", "per_sample_weights"],
    "engram_gate": ["hidden", "k", "v"],
    "lsh_codes": ["z"],
    "sparse_ffn": ["x", "indices", "weights"],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("example", OF_TOKENS)
def test_same_bits_alone_and_in_a_batch(example, dtype):
    op, arguments = arguments_of(example, 70, 130, dtype)
    expected = outcome(memkernels, op, arguments)
    parts = []
    for rows in slice(0, 1), slice(1, 2), slice(2, 7), slice(7, 70):
        alone = {name: arguments[name][rows] for name in OF_TOKENS[example]}
        parts.append(outcome(memkernels, op, arguments | alone))
    if isinstance(expected, Tensor):
        parts, expected = [[part] for part in parts], [expected]
    assert_same_bits([torch.cat(part) for part in zip(*parts, strict=True)], list(expected))


@each_example
def test_index_dtypes_never_change_bits(example):
    op, arguments = arguments_of(example)
    expected = outcome(memkernels, op, arguments)
    indices = [name for name, t in tensors(arguments).items() if t.dtype == torch.int64]
    if op == "ngram_hash":  # whose numbers are 64 bits wide
        indices = ["token_ids", "past_ids", "cu_seqlens"]
    for names in [[name] for name in indices] + [indices]:
        short = {name: arguments[name].int() for name in names}
        assert_same_bits(outcome(memkernels, op, arguments | short), expected)


# ---- strides, sizes, devices and dtypes ----------------------------------------------------------


def layouts(tensor):
    """The same values elsewhere in memory, and whether rows are still contiguous."""
    for dim in range(tensor.dim()):
        yield apart(tensor, dim), dim < tensor.dim() - 1
    if tensor.dim() > 2:
        yield tensor.transpose(-3, -2).contiguous().transpose(-3, -2), True


@each_example
def test_strided_inputs_work_or_are_refused_by_name(ops, example):
    """Rows lie anywhere; that they are contiguous may be asked for."""
    op, arguments = arguments_of(example)
    expected = outcome(ops, op, arguments)
    for name, tensor in tensors(arguments).items():
        if name in WRITTEN.get(op, []):
            continue
        for strided, contiguous_rows in layouts(tensor):
            try:
                actual = outcome(ops, op, arguments | {name: strided})
            except RuntimeError as error:
                assert f"{op}: {name}" in str(error)
                assert not contiguous_rows
            else:
                torch.testing.assert_close(actual, expected, equal_nan=True)


@each_differentiable
def test_gradients_of_strided_inputs(ops, example):
    op, arguments = arguments_of(example)
    function = getattr(ops, op)
    expected = gradients(function, arguments)
    strided = arguments | {name: apart(t, 0) for name, t in tensors(arguments).items()}
    torch.testing.assert_close(gradients(function, strided), expected, equal_nan=True)


@each_differentiable
def test_gradients_of_expanded_inputs(ops, example):
    """One row for all tokens; and a gradient of the result with strides of 0."""
    op, arguments = arguments_of(example)
    name = next(iter(floats(arguments)))
    rows = arguments[name][:1].nan_to_num().expand_as(arguments[name])
    grads = []
    for all_rows in rows, rows.contiguous():
        leaf = all_rows.detach().requires_grad_()
        result = floating(getattr(ops, op)(**arguments | {name: leaf}))
        grads += torch.autograd.grad(result.sum(), leaf)
    assert_same_bits(*grads)


FAR = {
    "product_key_topk": ["query", "keys"],
    "embedding_bag": ["input", "weight", "per_sample_weights"],
    "int8_bags": ["weight", "scales"],
    "rows_of_a_gradient": ["grad"],
    "accumulated_gradient": ["out"],
    "row_adam": ["param", "exp_avg", "exp_avg_sq", "grads"],
    "row_adagrad": ["sum"],
    "engram_gate": ["hidden", "k", "v"],
    "lsh_codes": ["z"],
    "sparse_ffn": ["x", "up", "down", "indices"],
}


@pytest.mark.full
@pytest.mark.parametrize(("example", "name"), [(e, name) for e in FAR for name in FAR[e]])
def test_more_than_2_to_the_31_elements(example, name):
    """The first and the last row of a tensor are so far apart; nothing between is touched."""
    op, arguments = arguments_of(example, dtype=torch.bfloat16)
    expected = outcome(memkernels, op, arguments)
    rows = arguments[name].contiguous()
    stride = 2**31 // (len(rows) - 1)
    far = torch.empty(2**31 + rows.numel(), dtype=rows.dtype)
    far = far.as_strided(rows.shape, (stride, *rows.stride()[1:]))
    far.copy_(rows)
    if name in WRITTEN.get(op, []):
        written = arguments | {n: arguments[n].clone() for n in WRITTEN[op]} | {name: far}
        getattr(memkernels, op)(**written)
        actual = tuple(written[n].contiguous() for n in WRITTEN[op])
        assert_same_bits(actual if len(actual) > 1 else actual[0], expected)
    else:
        assert_same_bits(outcome(memkernels, op, arguments | {name: far}), expected)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_rows_behind_2_to_the_31_elements(dtype):
    """A contiguous table of so many, read, and its gradient as rows."""
    small = bag_case((5, 7), 40, 1024, dtype=torch.bfloat16)
    shift = 2**21
    weight = torch.empty(shift + 40, 1024, dtype=dtype)
    assert weight.numel() > 2**31
    weight[shift:] = small["weight"].nan_to_num() * 10
    scales = {"scales": torch.ones(1, 1).expand(len(weight), 1)} if dtype == torch.int8 else {}
    input = small["input"].where(small["input"] < 0, small["input"] + shift)
    actual = memkernels.embedding_bag(input, weight, **scales)
    few = {name: scale[:40] for name, scale in scales.items()}
    expected = memkernels.embedding_bag(small["input"], weight[shift:].clone(), **few)
    assert_same_bits(actual, expected)
    if dtype == torch.bfloat16:
        grad = upstream(actual)
        rows, *others = memkernels.embedding_bag_backward(grad, input, len(weight))
        small_rows, *expected = memkernels.embedding_bag_backward(grad, small["input"], 40)
        assert_same_bits(others, expected)
        assert_same_bits(rows, small_rows.where(small_rows < 0, small_rows + shift))
        leaf = weight.requires_grad_()
        memkernels.embedding_bag(input, leaf, sparse=True).backward(grad)
        assert_same_bits(leaf.grad.coalesce().indices()[0], rows[rows >= 0])


@each_example
def test_shapes_without_data(example):
    for index_dtype in INDEX_DTYPES:
        op, arguments = arguments_of(example, index_dtype=index_dtype)
        expected = outcome(memkernels, op, arguments)
        meta = {name: t.to("meta") for name, t in tensors(arguments).items()}
        actual = outcome_of_meta(op, arguments | meta)
        for fake, real in zip(*(as_list(x) for x in (actual, expected)), strict=True):
            assert fake.is_meta
            alike = (fake.shape, fake.dtype, fake.stride())
            assert alike == (real.shape, real.dtype, real.stride())


def outcome_of_meta(op, arguments):
    result = getattr(memkernels, op)(**arguments)
    written = [n for n in WRITTEN.get(op, []) if arguments.get(n) is not None]
    return [arguments[n] for n in written] if written else result


def as_list(result):
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if "int8" not in e and e != "ngram_hash"])
def test_unsupported_dtype_lists_the_supported_ones(example):
    op, arguments = arguments_of(example)
    arguments |= {name: t.to(torch.float8_e5m2) for name, t in floats(arguments).items()}
    with pytest.raises(RuntimeError, match=rf"{op}: .*float32"):
        getattr(memkernels, op)(**arguments)


# By example, what autocast to bfloat16 casts, and to which dtype. Tables stay as they are.
AUTOCAST = {
    "product_key_topk": dict.fromkeys(("query", "keys"), torch.bfloat16),
    "embedding_bag": {"per_sample_weights": torch.float32},
    "engram_gate": dict.fromkeys(("hidden", "k", "v"), torch.bfloat16),
    "lsh_codes": {},
    "sparse_ffn": dict.fromkeys(("x", "weights"), torch.float32),
}


@pytest.mark.parametrize("example", AUTOCAST)
def test_autocast(example):
    """Forward, and backward in the dtypes of the leaves; float64 is left alone."""
    op, arguments = arguments_of(example)
    other = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}
    casts = AUTOCAST[example].items()
    arguments |= {name: arguments[name].to(other[dtype]) for name, dtype in casts}
    in_float64 = {name: t.double() for name, t in floats(arguments).items()}
    cast = {name: arguments[name].to(dtype) for name, dtype in casts}
    for given, meant in (arguments, arguments | cast), (arguments | in_float64,) * 2:
        expected = outcome(memkernels, op, meant)
        grads = gradients(getattr(memkernels, op), meant)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(outcome(memkernels, op, given), expected)
            actual = gradients(getattr(memkernels, op), given)
        assert_same_bits(actual, {name: g.to(given[name].dtype) for name, g in grads.items()})


# ---- autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", [memkernels, fallback], ids=["native", "fallback"])
@pytest.mark.parametrize(
    ("example", "name"),
    [("rows_of_a_gradient", "grad"), ("rows_of_a_gradient", "per_sample_weights"),
     ("accumulated_gradient", "grad"), ("accumulated_gradient", "out"), ("row_sgd", "param"),
     ("row_sgd", "grads"), ("row_adagrad", "param"), ("row_adagrad", "sum"), ("row_adam", "param"),
     ("row_adam", "exp_avg"), ("row_adam", "exp_avg_sq")],
)  # fmt: skip
def test_ops_without_a_backward_say_so(ops, example, name):
    op, arguments = arguments_of(example)
    arguments[name].requires_grad_()
    message = r"(row|embedding_bag)_\w+: .*not differentiable"
    with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments)
    with torch.no_grad():
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("example", ["engram_gate", "lsh_codes", "sparse_ffn"])
def test_differentiable_once(example, weighted):
    """A gradient of a gradient raises; above all it is not silently incomplete."""
    op, arguments = arguments_of(example)
    name = next(iter(floats(arguments)))
    leaf = arguments[name].requires_grad_()
    result = floating(getattr(memkernels, op)(**arguments))
    weight = torch.ones_like(result).requires_grad_(weighted)

    def second():
        (grad,) = torch.autograd.grad(result, leaf, weight, create_graph=True)
        (grad * leaf).sum().backward()

    with pytest.raises(RuntimeError, match="differentia"):
        second()


@each_differentiable
def test_no_graph_without_need(example):
    op, arguments = arguments_of(example)
    function = getattr(memkernels, op)
    assert not any(x.requires_grad for x in as_list(function(**arguments)))
    for leaf in floats(arguments).values():
        leaf.requires_grad_()
        with torch.no_grad():
            assert not any(x.requires_grad for x in as_list(function(**arguments)))
        results = as_list(function(**arguments))
        assert [x.requires_grad for x in results] == [x.is_floating_point() for x in results]
        leaf.requires_grad_(False)


@pytest.mark.parametrize(
    "example",
    [
        *DIFFERENTIABLE,
        *("rows_of_a_gradient", "accumulated_gradient", "row_sgd", "row_adagrad", "row_adam"),
    ],
)
def test_tangents_are_never_lost(example):
    op, arguments = arguments_of(example)
    for name, tensor in floats(arguments).items():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))
            with pytest.raises(RuntimeError, match=r"not differentiable"):
                getattr(memkernels, op)(**arguments | {name: dual})


# ---- processes -----------------------------------------------------------------------------------


def compact_check():
    """A little of everything, for one process an ISA."""
    for example in EXAMPLES:
        for dtype in DTYPES:
            for dim in 37, 64:
                op, arguments = arguments_of(example, dim=dim, dtype=dtype)
                check(memkernels, op, arguments, slack=16)


@each_other_isa
def test_every_isa(isa):
    run_python("import test_lookup; test_lookup.compact_check()", MEMKERNELS_CPU_ISA=isa)


def check_public_ops_are_the_fallback():
    for example in EXAMPLES:
        op, arguments = arguments_of(example)
        assert_same_bits(outcome(memkernels, op, arguments), outcome(fallback, op, arguments))
        if op == "embedding_bag":  # a strided last dimension, which the native op refuses
            arguments["weight"] = apart(arguments["weight"], -1)
            outcome(memkernels, op, arguments)


def test_backend_variable_selects_the_fallback():
    code = "import test_lookup; test_lookup.check_public_ops_are_the_fallback()"
    run_python(code, MEMKERNELS_BACKEND="torch")
