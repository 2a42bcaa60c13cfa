"""Optimiser steps on the rows of a table that have a gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from cases import arrays
from checks import WRITTEN, at_random, check, check_error, outcome, put, tensors
from lookup_cases import backward_case, bag_case, rows_case
from memkernels import reference
from test_attention import DTYPES, apart
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits

OPS = ["row_sgd", "row_adagrad", "row_adam"]
each_op = pytest.mark.parametrize("op", OPS)


def written(op, arguments):
    return [arguments[name] for name in WRITTEN[op]]


@st.composite
def random_cases(draw, op):
    options = {}
    if op != "row_adagrad":
        options["weight_decay"] = draw(st.sampled_from([0, 0.01]))
    if op == "row_adam":
        options |= {"step": draw(st.sampled_from([1, 2, 1000])), "betas": (0.8, 0.99)}
    num_rows = draw(st.integers(1, 30))
    used = draw(st.integers(0, num_rows))
    return rows_case(
        op,
        num_rows,
        draw(st.integers(1, 80) | st.just(260)),
        used,
        capacity=used + draw(st.sampled_from([0, 1, 20])),
        skipped=draw(st.sampled_from([0, 0.3])),
        wide_state=draw(st.booleans()),
        row_state=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        index_dtype=draw(st.sampled_from(INDEX_DTYPES)),
        seed=draw(st.integers(0, 2**16)),
        **options,
    )


@each_op
@at_random(data=st.data())
def test_steps_at_random(ops, op, data):
    """Rows that are not named are NaN, and stay so."""
    check(ops, op, data.draw(random_cases(op)), slack=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_of_integers_is_exact_for_every_dim(ops, dtype):
    for dim in 1, 7, 16, 33, 64, 130, 576:
        arguments = rows_case("row_sgd", 20, dim, 15, integers=True, dtype=dtype)
        arguments |= {"lr": 0.5, "weight_decay": 0.25}
        exact = torch.from_numpy(reference.row_sgd(**arrays(arguments)))
        assert_same_bits(outcome(ops, "row_sgd", arguments), exact.to(dtype))


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_keep_their_bits(ops, op, dtype):
    arguments = rows_case(op, 40, 20, 15, dtype=dtype)
    for name in WRITTEN[op]:
        arguments[name] = arguments[name].nan_to_num(nan=3.0)
    others = torch.ones(40, dtype=torch.bool)
    rows = arguments["rows"][: arguments["count"]]
    others[rows[rows >= 0]] = False
    before = [tensor.clone() for tensor in written(op, arguments)]
    getattr(ops, op)(**arguments)
    for new, old in zip(written(op, arguments), before, strict=True):
        assert_same_bits(new[others], old[others])
        assert not (new == old)[~others].all(-1).any()


@each_op
def test_nothing_to_do(ops, op):
    nothing = {"rows": torch.tensor([0, 1]), "grads": torch.full((2, 6), torch.nan)}
    for changes in (
        nothing | {"count": torch.tensor([0])},
        nothing | {"rows": torch.tensor([-1, -1]), "count": torch.tensor([2])},
        {"rows": torch.tensor([]).long(), "grads": torch.empty(0, 6), "count": torch.tensor([0])},
    ):
        for num_rows in 2, 0:
            arguments = rows_case(op, num_rows, 6, 0) | changes
            before = written(op, arguments)
            actual = outcome(ops, op, arguments)
            actual = [actual] if op == "row_sgd" else list(actual)
            assert_same_bits(actual, before)


@each_op
def test_nan_of_a_gradient_stays_in_its_row(ops, op):
    arguments = rows_case(op, 20, 40, 10, skipped=0)
    clean = written(op, arguments)
    row = arguments["rows"][4].item()
    poisoned = arguments | {"grads": put(arguments["grads"], (4, 7), torch.nan)}
    clean, dirty = (outcome(ops, op, each) for each in (arguments, poisoned))
    for new, old in zip(*([x] if op == "row_sgd" else x for x in (dirty, clean)), strict=True):
        assert new[row, 7].isnan()
        new[row, 7] = old[row, 7]
        assert_same_bits(new, old)


# ---- the optimisers of torch ---------------------------------------------------------------------


def sparse_gradient(param, generator):
    """Of some rows; and the same as `embedding_bag_backward` returns it."""
    rows = torch.randperm(len(param), generator=generator)[:9].sort().values
    grads = torch.randn(9, param.shape[1], generator=generator, dtype=param.dtype)
    sparse = torch.sparse_coo_tensor(rows[None], grads, param.shape, check_invariants=False)
    return sparse.coalesce(), (
        torch.nn.functional.pad(rows, (0, 2), value=-1),
        torch.nn.functional.pad(grads, (0, 0, 0, 2)),
        torch.tensor([9]),
    )


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_op
def test_steps_are_those_of_torch(ops, op, dtype):
    """Adam's: SparseAdam, which adds eps to the root before the root is corrected."""
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(20, 12, generator=generator, dtype=dtype)
    theirs = param.clone().requires_grad_()
    states = [torch.zeros_like(param) for _ in WRITTEN[op][1:]]
    optimiser = {
        "row_sgd": torch.optim.SGD,
        "row_adagrad": torch.optim.Adagrad,
        "row_adam": torch.optim.SparseAdam,
    }[op]([theirs], lr=0.1)
    for step in range(1, 6):
        theirs.grad, rows = sparse_gradient(param, generator)
        options = {}
        if op == "row_adam":
            options["step"] = step
            optimiser.param_groups[0]["eps"] = 1e-8 * (1 - 0.999**step) ** 0.5
        optimiser.step()
        getattr(ops, op)(param, *states, *rows, lr=0.1, **options)
        torch.testing.assert_close(param, theirs.detach())


@pytest.mark.parametrize("op", ["row_sgd", "row_adam"])
def test_weight_decay_is_that_of_torch(ops, op):
    """Adam's: AdamW; where every row has a gradient."""
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(20, 12, generator=generator)
    theirs = param.clone().requires_grad_()
    states = [torch.zeros_like(param) for _ in WRITTEN[op][1:]]
    optimiser = torch.optim.SGD if op == "row_sgd" else torch.optim.AdamW
    options = {"lr": 0.1, "weight_decay": 0.3}
    if op == "row_adam":
        options |= {"betas": (0.7, 0.9), "eps": 1e-3}
    optimiser = optimiser([theirs], **options)
    for step in range(1, 6):
        theirs.grad = torch.randn(20, 12, generator=generator)
        optimiser.step()
        now = {"step": step} if op == "row_adam" else {}
        rows = torch.arange(20), theirs.grad, torch.tensor([20])
        getattr(ops, op)(param, *states, *rows, **options, **now)
        torch.testing.assert_close(param, theirs.detach())


def test_rows_of_a_backward_are_a_dense_step(ops):
    bag = bag_case((9, 7), 30, 20, factors="same", dtype=torch.bfloat16)
    arguments = backward_case(bag)
    weight = torch.randn(30, 20).bfloat16()
    dense = torch.zeros(30, 20)
    ops.embedding_bag_backward(**arguments, out=dense)
    expected = (weight.float() - 0.1 * dense).bfloat16()
    ops.row_sgd(weight, *ops.embedding_bag_backward(**arguments), lr=0.1)
    torch.testing.assert_close(weight, expected)


# ---- what every step promises --------------------------------------------------------------------


@each_op
def test_the_order_of_rows_changes_no_bit(ops, op):
    arguments = rows_case(op, 40, 20, 30)
    expected = outcome(ops, op, arguments)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for name in "rows", "grads":
        shuffled = arguments[name].clone()
        shuffled[:30] = shuffled[order]
        arguments[name] = shuffled
    assert_same_bits(outcome(ops, op, arguments), expected)


@each_op
def test_strided_tables_are_written_in_place(ops, op):
    arguments = rows_case(op, 40, 20, 30)
    expected = outcome(ops, op, arguments)
    expected = [expected] if op == "row_sgd" else list(expected)
    names = WRITTEN[op]
    strided = arguments | {name: apart(arguments[name], 0) for name in names}
    getattr(ops, op)(**strided)
    assert_same_bits(written(op, strided), expected)
    if op == "row_adagrad":
        arguments = rows_case(op, 40, 20, 30, row_state=True)
        strided = arguments | {"sum": apart(arguments["sum"], 0)}
        expected = list(outcome(ops, op, arguments))
        getattr(ops, op)(**strided)
        assert_same_bits([strided["param"], strided["sum"]], expected)


@each_op
def test_what_is_written_alone_has_a_new_version(ops, op):
    arguments = rows_case(op, 20, 6, 10)
    product = (torch.ones(1, requires_grad=True) * arguments["param"]).sum()
    versions = {name: t._version for name, t in tensors(arguments).items()}
    getattr(ops, op)(**arguments)
    changed = [n for n, t in tensors(arguments).items() if t._version > versions[n]]
    assert changed == WRITTEN[op]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        getattr(ops, op)(**rows_case(op, 20, 6, 10))


ERRORS = {
    "row_too_large": ("rows", lambda c: {"rows": put(c.rows, 2, 9)}),
    "row_below_minus_one": ("rows", lambda c: {"rows": put(c.rows, 2, -2)}),
    "duplicates": ("rows", lambda c: {"rows": put(c.rows, 3, c.rows[2])}),
    "duplicates_apart": ("rows", lambda c: {"rows": put(c.rows, 4, c.rows[0])}),
    "rank_of_rows": ("rows", lambda c: {"rows": c.rows[None]}),
    "dtype_of_rows": ("rows", lambda c: {"rows": c.rows.float()}),
    "count_of_rows": ("rows|grads", lambda c: {"rows": c.rows[:-1]}),
    "columns_of_grads": ("grads", lambda c: {"grads": c.grads[:, :5]}),
    "rank_of_grads": ("grads", lambda c: {"grads": c.grads[0]}),
    "narrow_grads": ("grads", lambda c: {"grads": c.grads.bfloat16()}),
    "double_grads": ("grads", lambda c: {"grads": c.grads.double()}),
    "negative_count": ("count", lambda c: {"count": c.count - 6}),
    "count_too_large": ("count", lambda c: {"count": c.count + 4}),
    "two_counts": ("count", {"count": torch.tensor([1, 1])}),
    "rank_of_count": ("count", {"count": torch.tensor(1)}),
    "dtype_of_count": ("count", {"count": torch.tensor([1.0])}),
    "rank_of_param": ("param|sum|exp_avg", lambda c: {"param": c.param[0]}),
    "integer_param": ("param", lambda c: {"param": c.param.int()}),
    "no_columns_of_param": ("param|sum|exp_avg", lambda c: {"param": c.param[:, :0]}),
    "expanded_param": ("param", lambda c: {"param": c.param[:1].expand(9, 6)}),
}

ADAGRAD_ERRORS = ERRORS | {
    "rows_of_sum": ("sum", lambda c: {"sum": c.sum[:-1]}),
    "columns_of_sum": ("sum", lambda c: {"sum": c.sum[:, :-1]}),
    "rank_of_sum": ("sum", lambda c: {"sum": c.sum[None]}),
    "rows_of_one_accumulator_a_row": ("sum", lambda c: {"sum": c.sum[:-1, 0].clone()}),
    "narrow_sum": ("sum", lambda c: {"sum": c.sum.bfloat16()}),
    "expanded_sum": ("sum", {"sum": torch.ones(1).expand(9)}),
}

ADAM_ERRORS = ERRORS | {
    "rows_of_exp_avg": ("exp_avg", lambda c: {"exp_avg": c.exp_avg[:-1]}),
    "columns_of_exp_avg_sq": ("exp_avg_sq", lambda c: {"exp_avg_sq": c.exp_avg_sq[:, :-1]}),
    "narrow_exp_avg": ("exp_avg", lambda c: {"exp_avg": c.exp_avg.bfloat16()}),
    "double_exp_avg_sq": ("exp_avg_sq", lambda c: {"exp_avg_sq": c.exp_avg_sq.double()}),
    "expanded_exp_avg": ("exp_avg", lambda c: {"exp_avg": c.exp_avg[:1].expand(9, 6)}),
    "step_zero": ("step", {"step": 0}),
    "beta_of_one": ("betas|beta1|beta2", {"betas": (0.9, 1.0)}),
    "negative_beta": ("betas|beta1|beta2", {"betas": (-0.1, 0.9)}),
}


@pytest.mark.parametrize(
    ("op", "error"),
    [("row_sgd", error) for error in ERRORS]
    + [("row_adagrad", error) for error in ADAGRAD_ERRORS]
    + [("row_adam", error) for error in ADAM_ERRORS],
)
def test_errors_name_the_argument_and_change_nothing(ops, op, error):
    errors = {"row_sgd": ERRORS, "row_adagrad": ADAGRAD_ERRORS, "row_adam": ADAM_ERRORS}[op]
    check_error(ops, op, rows_case(op, 9, 6, 5, skipped=0), errors[error])


@each_op
def test_states_are_float64_beside_float64(ops, op):
    arguments = rows_case(op, 9, 6, 5, dtype=torch.float64)
    for name in ["grads", *WRITTEN[op][1:]]:
        narrow = arguments | {name: arguments[name].float()}
        with pytest.raises(RuntimeError, match=rf"{op}: .*\b{name}\b"):
            getattr(ops, op)(**narrow)
