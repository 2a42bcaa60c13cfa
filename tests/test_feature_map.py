"""Feature maps of linear attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

import memkernels
from checks import at_random, check_error, gradients, outcome
from scan_cases import KINDS, map_case
from test_attention import DTYPES, apart
from test_scan import check_scan
from tolerance import assert_same_bits

each_kind = pytest.mark.parametrize("kind", KINDS)


def check_map(ops, arguments):
    out = check_scan(ops, "feature_map", arguments)
    assert out.dtype == arguments["x"].dtype and out.is_contiguous()


@at_random(
    leading=st.lists(st.integers(0, 4), max_size=3),
    dim=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    nu=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_at_random(scan_ops, leading, dim, **options):
    check_map(scan_ops, map_case(*leading, dim, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
def test_sizes(scan_ops, kind, dtype):
    for shape in (33, 2, 16), (3, 128), (5, 64), (700, 8), (17,), (2, 1):
        check_map(scan_ops, map_case(*shape, kind=kind, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dot_products_of_taylor_features(scan_ops, dtype):
    for dim in 1, 2, 16, 33:
        q, k = (map_case(20, dim, kind="taylor2", dtype=dtype, seed=i)["x"] for i in (0, 1))
        features = [scan_ops.feature_map(x, "taylor2") for x in (q, k)]
        assert features[0].shape == (20, 1 + dim + dim * (dim + 1) // 2)
        s = (q * k).sum(-1) / dim**0.5
        torch.testing.assert_close((features[0] * features[1]).sum(-1), 1 + s + s.square() / 2)


def test_products_of_neighbours(scan_ops):
    """dpfp: r is [x, -x], where positive, and goes round."""
    x = torch.tensor([2.0, -3, 5])  # r: 2 0 5 0 3 0
    out = scan_ops.feature_map(x, "dpfp", nu=2)
    assert out.tolist() == [0, 0, 0, 0, 0, 0, 6, 0, 10, 0, 15, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(scan_ops, dtype):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -100, 100]).to(dtype)
    inf, nan = torch.inf, torch.nan
    tiny = torch.tensor(-100.0).double().exp().to(dtype).item()
    expected = {
        "elu1": [1, 1, inf, 0, nan, tiny, 101],
        "relu2": [0, 0, inf, 0, nan, 0, 10000],
    }
    for kind, values in expected.items():
        actual = outcome(scan_ops, "feature_map", {"x": special, "kind": kind})
        values = torch.tensor(values).to(dtype)
        torch.testing.assert_close(actual, values, equal_nan=True, rtol=1e-2, atol=1e-30)


@each_kind
def test_nan_stays_in_its_row(scan_ops, kind):
    arguments = map_case(5, 20, kind=kind)
    clean = outcome(scan_ops, "feature_map", arguments)
    arguments["x"][3, 7] = torch.nan
    actual = outcome(scan_ops, "feature_map", arguments)
    assert actual[3].isnan().any()
    assert_same_bits(actual[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


@each_kind
def test_gradients_at_zero(scan_ops, kind):
    """Where r is not positive none passes; elu has slope 1 on either side."""
    arguments = map_case(3, 6, kind=kind) | {"x": torch.zeros(3, 6)}
    (grad,) = gradients(scan_ops.feature_map, arguments).values()
    assert grad.isfinite().all()
    assert bool(grad.any()) == (kind in ("elu1", "taylor2"))


@each_kind
def test_gradcheck(kind):
    arguments = map_case(3, 2, 5, kind=kind, dtype=torch.float64)
    x = arguments.pop("x").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: memkernels.feature_map(x, **arguments), [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_kind
def test_same_bits_for_any_threads_and_alone(num_threads, kind, dtype):
    arguments = map_case(700, 20, kind=kind, dtype=dtype)
    num_threads(1)
    expected = outcome(memkernels, "feature_map", arguments)
    grads = gradients(memkernels.feature_map, arguments)
    for threads in 1, 2, 3:
        num_threads(threads)
        assert_same_bits(outcome(memkernels, "feature_map", arguments), expected)
        assert_same_bits(gradients(memkernels.feature_map, arguments), grads)
    for row in 0, 1, 333, 699:
        alone = arguments | {"x": arguments["x"][row]}
        assert_same_bits(outcome(memkernels, "feature_map", alone), expected[row])


@each_kind
def test_strided_inputs_work_or_are_refused_by_name(scan_ops, kind):
    arguments = map_case(4, 3, 6, kind=kind)
    expected = outcome(scan_ops, "feature_map", arguments)
    x = arguments["x"]
    layouts = [(apart(x, dim), dim < 2) for dim in range(3)]
    layouts += [
        (x.transpose(0, 1).contiguous().transpose(0, 1), True),
        (x.mT.contiguous().mT, False),
    ]
    for strided, contiguous_rows in layouts:
        try:
            actual = outcome(scan_ops, "feature_map", arguments | {"x": strided})
        except RuntimeError as error:
            assert "feature_map: x" in str(error)
            assert not contiguous_rows
        else:
            assert_same_bits(actual, expected)


ERRORS = {
    "integer_x": ("x", lambda c: {"x": c.x.int()}),
    "no_dimensions": ("x", {"x": torch.tensor(1.0)}),
    "kind": ("kind", {"kind": "exp"}),
    "nu": ("nu", {"kind": "dpfp", "nu": 0}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument(scan_ops, error):
    check_error(scan_ops, "feature_map", map_case(4, 6, kind="elu1"), ERRORS[error])


@pytest.mark.parametrize(
    ("shape", "kind", "error"),
    [
        ((2, 4), "dpfp", "nu must be at most"),
        ((0, 2**33), "taylor2", "x has 8589934592 columns; taylor2"),
    ],
)
def test_more_features_than_can_be_counted(kernels, shape, kind, error):
    with pytest.raises(RuntimeError, match=f"feature_map: {error}"):
        kernels.feature_map(torch.ones(shape), kind, nu=2**61)
