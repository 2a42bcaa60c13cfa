"""Gradients of embedding_bag: as tensors, as rows, and added to a buffer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

import memkernels
from cases import arrays
from checks import at_random, check, check_error, check_gradients, gradients, outcome, put, upstream
from lookup_cases import FP8, backward_case, bag_case, poison_unread, quantised_case, wide
from memkernels import reference
from test_attention import DTYPES
from test_embedding_bag import FLAT, bag_sizes
from test_selection import ALONE, INDEX_DTYPES
from tolerance import assert_same_bits, unchanged

BAGS = pytest.mark.parametrize("bags", [(6, 5), FLAT], ids=["equal", "flat"])
sparse_or_dense = pytest.mark.parametrize("sparse", [False, True])


def rows_of(ops, arguments):
    return outcome(ops, "embedding_bag_backward", arguments)


# ---- as rows, and added to a buffer --------------------------------------------------------------


@at_random(sizes=bag_sizes())
def test_rows_at_random(ops, sizes):
    arguments = backward_case(bag_case(**sizes))
    # A row may be the small difference of two large ones.
    rows, grads, count = check(ops, "embedding_bag_backward", arguments, slack=4)
    assert (rows.dtype, grads.dtype, count.dtype) == (torch.int64, wide(sizes["dtype"]), rows.dtype)
    assert len(rows) == len(grads) == arguments["input"].numel() and count.shape == (1,)


@at_random(sizes=bag_sizes(), in_wide=st.booleans())
def test_buffers_at_random(ops, sizes, in_wide):
    """Rows that no bag reads are NaN, and stay so."""
    arguments = backward_case(bag_case(**sizes))
    generator = torch.Generator().manual_seed(sizes["seed"])
    out = torch.randn(sizes["num_rows"], sizes["dim"], generator=generator)
    out = out.to(wide(sizes["dtype"]) if in_wide else sizes["dtype"])
    out = poison_unread(out, arguments["input"])
    check(ops, "embedding_bag_backward", arguments | {"out": out}, slack=2)
    assert ops.embedding_bag_backward(**arguments, out=out) is out


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_integers_are_exact_for_every_dim(ops, dtype):
    for dim in 1, 7, 8, 16, 33, 64, 130, 576:
        sizes = {"factors": "same", "popular": True, "integers": True, "dtype": dtype, "seed": dim}
        arguments = backward_case(bag_case((7, 20), 30, dim, **sizes))
        exact = [torch.from_numpy(x) for x in reference.embedding_bag_backward(**arrays(arguments))]
        exact[1] = exact[1].to(wide(dtype))
        assert_same_bits(rows_of(ops, arguments), tuple(exact))
        out = torch.full((30, dim), 3.0, dtype=dtype)
        exact = reference.embedding_bag_backward(**arrays(arguments | {"out": out}))
        actual = rows_of(ops, arguments | {"out": out})
        assert_same_bits(actual, torch.from_numpy(exact).to(dtype))


def long_rows(dim, dtype=torch.float32, **options):
    """Rows of one entry to more than 2048, which end anywhere."""
    arguments = backward_case(bag_case((170, 20), 90, dim, dtype=dtype, **options))
    rows = torch.arange(90).repeat_interleave(torch.tensor([1, 64, 65, 130, 2100] + [3] * 85))
    rows = torch.nn.functional.pad(rows, (0, 3400 - len(rows)), value=-1)
    order = torch.randperm(3400, generator=torch.Generator().manual_seed(0))
    return arguments | {"input": rows[order].view(170, 20)}


@pytest.mark.parametrize("dim", [5, 24])
def test_long_rows_of_integers_are_exact(ops, dim):
    arguments = long_rows(dim, integers=True)
    exact = [torch.from_numpy(x) for x in reference.embedding_bag_backward(**arrays(arguments))]
    exact[1] = exact[1].float()
    assert_same_bits(rows_of(ops, arguments), tuple(exact))
    out = torch.zeros(90, dim)
    ops.embedding_bag_backward(**arguments, out=out)
    assert_same_bits(out, exact[1][:90])


def test_the_gradient_of_a_row_depends_on_its_entries_alone(kernels):
    arguments = long_rows(8, torch.bfloat16)
    _, expected, _ = rows_of(kernels, arguments)
    input = arguments["input"]
    for others in range(90), (2, 4), (3,), (4, 50, 89):
        kept = torch.isin(input, torch.tensor(others))
        rows, grads, count = rows_of(kernels, arguments | {"input": input.where(kept, -1)})
        assert rows[:count].tolist() == list(others)
        assert_same_bits(grads[:count], expected[rows[:count]])


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_rows_of_nothing(ops, index_dtype):
    empty = torch.empty(0, 3, dtype=index_dtype)
    for input, offsets, bags in (
        (empty, None, 0),
        (torch.full((2, 3), -1, dtype=index_dtype), None, 2),
        (empty.flatten(), torch.zeros(2, dtype=index_dtype), 2),
        (empty.flatten(), empty.flatten(), 0),
    ):
        grad = torch.full((bags, 4), torch.nan)
        for num_rows in 9, 0:
            arguments = {"grad": grad, "input": input, "num_embeddings": num_rows}
            rows, grads, count = rows_of(ops, arguments | {"offsets": offsets})
            assert count.tolist() == [0] and (rows == -1).all() and not grads.any()
            assert grads.shape == (input.numel(), 4)
            out = torch.full((num_rows, 4), torch.nan)
            ops.embedding_bag_backward(**arguments, offsets=offsets, out=out)
            assert out.isnan().all()


def test_layers_that_share_a_table_add_to_one_buffer(ops):
    """A strided one: every other column of a wider buffer's rows."""
    one, other = bag_case((6, 5), 20, 12), bag_case(FLAT, 20, 12, factors="same", seed=1)
    leaf = torch.randn(20, 12).requires_grad_()
    buffer = torch.zeros(20, 24)[:, :12]
    for arguments in one, other:
        out = ops.embedding_bag(**arguments | {"weight": leaf})
        out.backward(upstream(out))
        del arguments["weight"]
        ops.embedding_bag_backward(upstream(out), **arguments, num_embeddings=20, out=buffer)
    torch.testing.assert_close(buffer, leaf.grad)


def test_the_version_of_the_buffer_alone_is_bumped(ops):
    arguments = backward_case(bag_case((6, 5), 20, 12)) | {"out": torch.zeros(20, 12)}
    weight = torch.ones(1, requires_grad=True)
    product = (weight * arguments["out"]).sum()
    versions = arguments["grad"]._version, arguments["out"]._version
    ops.embedding_bag_backward(**arguments)
    assert arguments["grad"]._version == versions[0]
    assert arguments["out"]._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        ops.embedding_bag_backward(**arguments | {"out": torch.zeros(20, 12)})


ERRORS = {
    "index_too_large": ("input", lambda c: {"input": put(c.input, (3, 2), 9)}),
    "index_below_minus_one": ("input", lambda c: {"input": put(c.input, (3, 2), -2)}),
    "num_embeddings_too_small": ("input|out", {"num_embeddings": 8}),
    "negative_num_embeddings": ("num_embeddings|out", {"num_embeddings": -1}),
    "rows_of_grad": ("grad", lambda c: {"grad": c.grad[:-1]}),
    "rank_of_grad": ("grad", lambda c: {"grad": c.grad[0]}),
    "integer_grad": ("grad", lambda c: {"grad": c.grad.int()}),
    "no_columns_of_grad": ("grad|out", lambda c: {"grad": c.grad[:, :0]}),
    "no_columns_of_input": (
        "input", lambda c: {"input": c.input[:, :0], "per_sample_weights": None}
    ),
    "offsets_of_rows": ("input|offsets", {"offsets": torch.tensor([0, 3])}),
    "falling_offsets": (
        "offsets", lambda c: {"input": c.input.flatten(), "per_sample_weights": None,
                              "offsets": torch.tensor([0, 3, 2, 4, 4])}
    ),
    "shape_of_factors": (
        "per_sample_weights", lambda c: {"per_sample_weights": c.per_sample_weights[:, :1]}
    ),
    "narrow_factors": (
        "per_sample_weights", lambda c: {"per_sample_weights": c.per_sample_weights.half()}
    ),
}  # fmt: skip

OUT_ERRORS = ERRORS | {
    "rows_of_out": ("out", {"out": torch.zeros(8, 6)}),
    "columns_of_out": ("out", {"out": torch.zeros(9, 5)}),
    "rank_of_out": ("out", {"out": torch.zeros(9)}),
    "narrow_out": ("out", {"out": torch.zeros(9, 6).bfloat16()}),
    "double_out": ("out", {"out": torch.zeros(9, 6).double()}),
    "overlapping_out": ("out", {"out": torch.zeros(6).expand(9, 6)}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_rows(ops, error):
    arguments = backward_case(bag_case((5, 4), 9, 6, factors="same", skipped=0))
    check_error(ops, "embedding_bag_backward", put_last_row(arguments), ERRORS[error])


@pytest.mark.parametrize("error", OUT_ERRORS)
def test_errors_of_buffers_change_nothing(ops, error):
    arguments = backward_case(bag_case((5, 4), 9, 6, factors="same", skipped=0))
    arguments = put_last_row(arguments) | {"out": torch.zeros(9, 6)}
    check_error(ops, "embedding_bag_backward", arguments, OUT_ERRORS[error])


def put_last_row(arguments):
    return arguments | {"input": put(arguments["input"], (0, 0), 8)}


# ---- through autograd ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [None, "same", "wide"])
@BAGS
def test_against_autograd_through_the_fallback(bags, factors, dtype):
    for dim, popular in (37, False), (64, True):
        sizes = {"factors": factors, "popular": popular, "dtype": dtype}
        check_gradients(memkernels, "embedding_bag", bag_case(bags, 40, dim, **sizes))


@pytest.mark.full
@at_random(sizes=bag_sizes())
def test_gradients_at_random(sizes):
    check_gradients(memkernels, "embedding_bag", bag_case(**sizes), slack=ALONE)


@pytest.mark.parametrize("factors", [None, "same"])
@BAGS
def test_gradcheck(ops, bags, factors):
    arguments = bag_case(bags, 4, 3, factors=factors, dtype=torch.float64)
    leaves = {"weight": arguments["weight"].nan_to_num()}
    if factors:
        leaves["per_sample_weights"] = arguments["per_sample_weights"].nan_to_num()

    def out(*values):
        return ops.embedding_bag(**arguments | dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(out, [leaf.requires_grad_() for leaf in leaves.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@sparse_or_dense
@BAGS
def test_gradients_are_those_of_torch(ops, bags, sparse, dtype):
    arguments = bag_case(bags, 40, 24, skipped=0, popular=True, dtype=dtype) | {"sparse": sparse}
    arguments["weight"] = arguments["weight"].nan_to_num().requires_grad_()
    expected = torch.nn.functional.embedding_bag(**arguments, mode="sum")
    (expected,) = torch.autograd.grad(expected, arguments["weight"], upstream(expected))
    (grad,) = gradients(ops.embedding_bag, arguments, ["weight"]).values()
    assert grad.layout == expected.layout
    torch.testing.assert_close(grad.to_dense(), expected.to_dense())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bags", [(6, 5), FLAT, (3, 4)], ids=["equal", "flat", "none"])
def test_sparse_gradients_are_rows_of_the_dense_one(ops, bags, dtype):
    skipped = 1 if bags == (3, 4) else 0.2
    arguments = bag_case(bags, 40, 24, factors="same", dtype=dtype, skipped=skipped)
    dense = gradients(ops.embedding_bag, arguments)
    sparse = gradients(ops.embedding_bag, arguments | {"sparse": True})
    assert_same_bits(sparse["per_sample_weights"], dense["per_sample_weights"])
    grad, input = sparse["weight"], arguments["input"]
    assert grad.is_sparse and grad.is_coalesced() and grad.shape == arguments["weight"].shape
    assert grad.dtype == dtype
    assert_same_bits(grad.indices()[0], input[input >= 0].unique())
    assert_same_bits(grad.values(), dense["weight"][grad.indices()[0]])
    assert not dense["weight"][poison_unread(dense["weight"], input).isnan()].any()


@sparse_or_dense
def test_layers_that_share_a_table_accumulate(ops, sparse):
    layers = bag_case((6, 5), 20, 12), bag_case((3, 9), 20, 12, factors="same", seed=1)
    alone = [
        gradients(ops.embedding_bag, x | {"weight": torch.ones(20, 12)}, ["weight"]) for x in layers
    ]
    leaf = torch.ones(20, 12).requires_grad_()
    for arguments in layers:
        out = ops.embedding_bag(**arguments | {"weight": leaf, "sparse": sparse})
        out.backward(upstream(out))
    assert leaf.grad.is_sparse == sparse
    expected = alone[0]["weight"] + alone[1]["weight"]
    torch.testing.assert_close(leaf.grad.to_dense(), expected)


@pytest.mark.parametrize("names", [["weight"], ["per_sample_weights"]])
def test_each_gradient_only_if_asked_for(ops, names):
    """Asking for fewer changes no bits of those asked for."""
    arguments = bag_case((6, 5), 20, 12, factors="same")
    every = gradients(ops.embedding_bag, arguments)
    fewer = gradients(ops.embedding_bag, arguments, names)
    assert_same_bits(fewer, {name: every[name] for name in names})


def test_nan_reaches_only_the_gradients_that_use_it(ops):
    arguments = bag_case((12, 4), 30, 20, factors="same")
    input = arguments["input"]
    clean = gradients(ops.embedding_bag, arguments)
    row = input[3][input[3] >= 0][0]
    poisoned = arguments | {"weight": put(arguments["weight"], (row, 7), torch.nan)}
    dirty = gradients(ops.embedding_bag, poisoned)
    assert_same_bits(dirty["weight"], clean["weight"])
    users = input == row
    assert dirty["per_sample_weights"][users].isnan().all()
    assert_same_bits(dirty["per_sample_weights"][~users], clean["per_sample_weights"][~users])

    def poisoned_upstream(**arguments):
        out = ops.embedding_bag(**arguments)
        return out * put(torch.ones(out.shape), (3, 7), torch.nan)

    dirty = gradients(poisoned_upstream, arguments)
    read = torch.zeros(30, 20, dtype=torch.bool)
    read[input[3][input[3] >= 0], 7] = True
    assert dirty["weight"][read].isnan().all()
    assert_same_bits(dirty["weight"][~read], clean["weight"][~read])
    others = torch.arange(12) != 3
    assert_same_bits(dirty["per_sample_weights"][others], clean["per_sample_weights"][others])


@pytest.mark.parametrize("index", ["same", "popular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_gradients_every_time_and_for_any_threads(num_threads, index, dtype):
    """Whatever the workers: one row that every bag reads, or a few that most do."""
    arguments = bag_case((400, 30), 500, 130, factors="wide", popular=True, dtype=dtype)
    if index == "same":
        input = torch.full_like(arguments["input"], 7)
        weight = torch.ones_like(arguments["weight"])
        arguments |= {"input": input, "weight": weight}
        arguments["per_sample_weights"].nan_to_num_()
    num_threads(1)
    expected = gradients(memkernels.embedding_bag, arguments)
    rows = rows_of(memkernels, backward_case(arguments))
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(gradients(memkernels.embedding_bag, arguments), expected)
        assert_same_bits(rows_of(memkernels, backward_case(arguments)), rows)


def test_strided_gradient_of_the_result(ops):
    arguments = bag_case((6, 5), 20, 12, factors="same")
    names = ["weight", "per_sample_weights"]
    leaves = [arguments[name].requires_grad_() for name in names]
    out = ops.embedding_bag(**arguments)
    for dout in torch.randn(6, 24)[:, ::2], torch.randn(12, 6).T, torch.ones(()).expand(6, 12):
        strided = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        contiguous = torch.autograd.grad(out, leaves, dout.contiguous(), retain_graph=True)
        assert_same_bits(strided, contiguous)


@sparse_or_dense
@pytest.mark.parametrize("name", ["weight", "per_sample_weights"])
def test_differentiable_once(name, sparse):
    """A gradient of a gradient raises; above all it is not silently incomplete."""
    arguments = bag_case((6, 5), 20, 12, factors="same", skipped=0) | {"sparse": sparse}
    leaf = arguments[name].requires_grad_()
    loss = memkernels.embedding_bag(**arguments).square().sum()
    with pytest.raises(RuntimeError, match="differentia"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("name", ["weight", "scales"])
def test_quantised_tables_have_no_gradient(ops, name):
    arguments = {"weight": torch.ones(9, 6).to(FP8), "scales": torch.ones(9, 2)}
    arguments[name].requires_grad_()
    arguments["input"] = torch.zeros(3, 2, dtype=torch.long)
    message = r"embedding_bag: .*not differentiable"
    with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
        ops.embedding_bag(**arguments)


@pytest.mark.parametrize("stored", [torch.int8, FP8])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.uint8])
def test_factors_of_a_quantised_table_have_a_gradient(ops, stored, scale_dtype):
    options = {"block": 8, "stored": stored, "scale_dtype": scale_dtype, "factors": "same"}
    for bags in (6, 5), FLAT:
        arguments = quantised_case(bags, 20, 40, **options)
        scales = arguments["scales"]
        if scale_dtype == torch.uint8:
            scales = 2.0 ** (scales.float() - 127)
        weight = arguments["weight"].float() * scales.repeat_interleave(8, 1)
        plain = arguments | {"weight": weight, "scales": None}
        name = ["per_sample_weights"]
        expected = gradients(ops.embedding_bag, plain, name)
        actual = gradients(ops.embedding_bag, arguments, name)
        torch.testing.assert_close(actual, expected)


def test_a_buffer_that_overlaps_is_refused():
    memory = torch.ones(12, 4)
    arguments = {"input": torch.zeros(6, 1, dtype=torch.long), "num_embeddings": 6}
    with (
        unchanged(memory),
        pytest.raises(RuntimeError, match=r"embedding_bag_backward: out .*grad"),
    ):
        memkernels.embedding_bag_backward(memory[3:9], **arguments, out=memory[:6])
    memkernels.embedding_bag_backward(memory[6:], **arguments, out=memory[:6])
    assert memory[0].tolist() == [7] * 4


def test_a_table_may_change_before_its_gradient_is_computed():
    """Which does not depend on it; the gradient of factors does, and says so."""
    weight = torch.ones(5, 4, requires_grad=True)
    factors = torch.ones(2, 3, requires_grad=True)
    input = torch.zeros(2, 3, dtype=torch.long)
    for inputs in (weight,), (factors,):
        out = memkernels.embedding_bag(
            input,
            weight if weight is inputs[0] else weight.detach(),
            per_sample_weights=factors if factors is inputs[0] else factors.detach(),
        ).sum()
        with torch.no_grad():
            weight.add_(1)
        if factors is inputs[0]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out, inputs)
        else:
            assert torch.autograd.grad(out, inputs)[0][0].tolist() == [6] * 4
