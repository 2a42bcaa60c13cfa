"""Diagonal scans, real and complex."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from checks import at_random, check_error, gradients, outcome, put
from scan_cases import diagonal_case
from test_attention import DTYPES
from test_scan import check_scan
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits

DIAGONAL = "diagonal_scan"
COMPLEX = [torch.complex64, torch.complex128]


@at_random(
    lengths=st.tuples(st.integers(0, 2), st.integers(0, 70))
    | st.lists(st.sampled_from([0, 1, 16, 65]) | st.integers(0, 40), max_size=4),
    channels=st.integers(1, 70),
    constant=st.booleans(),
    real=st.booleans(),
    resets=st.sampled_from([0, 0.1, 1]),
    states=st.booleans(),
    padded=st.booleans(),
    dtype=st.sampled_from(DTYPES + COMPLEX),
    index_dtype=st.sampled_from(INDEX_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_at_random(scan_ops, **sizes):
    check_scan(scan_ops, DIAGONAL, diagonal_case(**sizes))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", COMPLEX)
def test_complex(scan_ops, dtype, constant, real):
    arguments = diagonal_case(
        [40, 0, 9], 33, constant=constant, real=real, resets=0.1, states=True, dtype=dtype
    )
    out, state = check_scan(scan_ops, DIAGONAL, arguments)
    assert out.dtype == state.dtype == dtype
    grads = gradients(getattr(scan_ops, DIAGONAL), arguments)
    assert grads["a"].dtype == arguments["a"].dtype


def test_complex_is_as_its_parts(scan_ops):
    """A real decay leaves them alone; one of i exchanges them."""
    arguments = diagonal_case((2, 30), 5, real=True, states=True, dtype=torch.complex64)
    h, state = outcome(scan_ops, DIAGONAL, arguments)
    for name in "real", "imag":
        parts = {n: getattr(arguments[n], name).contiguous() for n in ("x", "initial_state")}
        actual = outcome(scan_ops, DIAGONAL, arguments | parts)
        torch.testing.assert_close(actual, (getattr(h, name), getattr(state, name)))
    x = torch.zeros(1, 5, 1, dtype=torch.complex64)
    x[0, 0] = 1
    h, _ = scan_ops.diagonal_scan(x, torch.full((1,), 1j))
    assert h.flatten().tolist() == [1, 1j, -1, -1j, 1]


# ---- decays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES + COMPLEX)
def test_exact_decays(scan_ops, dtype):
    """0 forgets, 1 sums up, -1 alternates: of small integers to the bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (1, 40, 3), generator=generator).to(dtype)
    h, state = scan_ops.diagonal_scan(
        x, torch.tensor([0, 1, -1]).to(dtype), output_final_state=True
    )
    expected = [x[0, 0]]
    for t in range(1, 40):
        expected.append(x[0, t] + torch.stack([0 * x[0, 0, 0], expected[-1][1], -expected[-1][2]]))
    assert_same_bits(h[0], torch.stack(expected))
    assert_same_bits(state[0], h[0, -1].to(state.dtype))


def test_growth(scan_ops):
    arguments = diagonal_case((1, 60), 5, constant=True, states=True)
    arguments["a"] = torch.tensor([1.5, -1.2, 2.0, -2.0, 1.01])
    check_scan(scan_ops, DIAGONAL, arguments)


def test_constant_decays_are_those_of_every_token(scan_ops):
    arguments = diagonal_case((2, 30), 7, constant=True, states=True)
    every = arguments | {"a": arguments["a"].expand(2, 30, 7)}
    assert_same_bits(*(outcome(scan_ops, DIAGONAL, x) for x in (arguments, every)))
    actual, expected = (gradients(getattr(scan_ops, DIAGONAL), x) for x in (arguments, every))
    expected["a"] = expected["a"].sum((0, 1))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("length", [60, 1100])
def test_products_of_decays_make_nothing_that_steps_do_not(scan_ops, length):
    """Tiny ones leave infinity what it is, and huge ones 0; exact zeros make it NaN."""
    a = torch.tensor([1e-30, -1e-30, 0.5, 1e30, -1e30, 1e-30])
    start = torch.tensor([[torch.inf, torch.inf, torch.inf, 0, 0, torch.inf]])
    every = a.repeat(1, length, 1)
    every[0, 40, 5] = 0
    x = torch.zeros(1, length, 6)
    h, state = scan_ops.diagonal_scan(x, every, start, output_final_state=True)
    assert h[0, :, [0, 2]].isposinf().all() and not h[0, :, 3:5].any()
    assert h[0, ::2, 1].isneginf().all() and h[0, 1::2, 1].isposinf().all()
    assert h[0, :40, 5].isposinf().all() and h[0, 40:, 5].isnan().all()
    assert_same_bits(state, h[:, -1])
    if length == 60:
        h, _ = scan_ops.diagonal_scan(x[..., :5], a[:5], start[:, :5])
        assert_same_bits(h, scan_ops.diagonal_scan(x, every, start)[0][..., :5])


# Decays, and how many there are of each, then ones; and what they multiply.
PRODUCTS = [
    ([(20, 32)], 1e-10),
    ([(1e3, 16), (1e-3, 16)], 1e-20),
    ([(1e-3, 16), (1e3, 16)], 1e20),
    ([(0.01, 32)], 1e38),
    ([(1e30, 1), (-1e-30, 1)] * 10, 1e-30),
    ([(1e-40, 1), (1e20, 2)], 2),
    ([(3e38, 1), (2e-38, 1)] * 4, 2e-38),
    ([(1e10, 3), (0, 1)], 1e-30),
    ([(0, 1), (1e30, 20)], 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_products_of_decays_beyond_the_range_of_numbers(scan_ops, dtype):
    """Where no state is: forward and backward, in a short sequence and a long one to the bit."""
    start = torch.tensor([[carry for _, carry in PRODUCTS]]).to(dtype)
    phase = 1j if dtype.is_complex else 1  # whose 64th power is 1
    results = []
    for length in 64, 1088:
        a = torch.ones(1, length, len(PRODUCTS))
        for column, (decays, _) in enumerate(PRODUCTS):
            values = torch.cat([torch.full((n,), float(x)) for x, n in decays])
            a[0, : len(values), column] = values
        expected = start.to(torch.complex128) * a.double().prod(1)
        a = a.to(dtype) * phase
        x = torch.zeros_like(a)
        _, state = scan_ops.diagonal_scan(x, a, start, output_final_state=True)
        initial = torch.zeros_like(start).requires_grad_()
        _, end = scan_ops.diagonal_scan(x, a.conj().flip(1), initial, output_final_state=True)
        (grad,) = torch.autograd.grad(end, initial, start)
        for actual in state, grad:
            error = (actual.to(expected.dtype) - expected).abs()
            assert (error <= 1e-4 * expected.abs()).all()
        results.append((state, grad))
    assert_same_bits(*results)


# ---- resets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset_dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_reset_forgets_even_infinities(scan_ops, dtype, reset_dtype):
    arguments = diagonal_case((2, 20), 5, resets=0.1, states=True, dtype=dtype)
    reset = torch.zeros(2, 20, dtype=reset_dtype)
    reset[0, 7] = reset[1, 0] = 1
    arguments |= {"reset": reset, "x": put(arguments["x"], (0, 3), torch.inf)}
    arguments["initial_state"][1] = torch.nan
    h, state = outcome(scan_ops, DIAGONAL, arguments)
    assert not h[0, 3:7].isfinite().any() and h[0, 7:].isfinite().all() and h[1].isfinite().all()
    alone = {"x": arguments["x"][:1, 7:], "a": arguments["a"][:1, 7:]}
    torch.testing.assert_close(h[:1, 7:], scan_ops.diagonal_scan(**alone)[0])
    grads = gradients(getattr(scan_ops, DIAGONAL), arguments)
    assert not grads["initial_state"][1].any()
    assert grads["x"].isfinite().all() and grads["a"][:, 7:].isfinite().all()
    assert grads["a"][1].isfinite().all() and not grads["a"][1, 0].any()
    assert state.isfinite().all()


def test_resets_are_ends_of_sequences(scan_ops):
    arguments = diagonal_case((1, 30), 5, states=False)
    reset = torch.zeros(1, 30, dtype=torch.bool)
    reset[:, [4, 17]] = True
    h, state = outcome(scan_ops, DIAGONAL, arguments | {"reset": reset})
    packed = arguments | {"cu_seqlens": torch.tensor([0, 4, 17, 30])}
    expected, states = outcome(scan_ops, DIAGONAL, packed)
    assert_same_bits(h, expected)
    assert_same_bits(state[0], states[2])


def test_resets_have_no_gradient_and_do_not_stay_nan(scan_ops):
    """Between an infinite state and a reset gradients are what they are; behind, finite."""
    x = torch.ones(1, 4, 1, requires_grad=True)
    a = torch.full((1, 4, 1), 0.5, requires_grad=True)
    reset = torch.tensor([[False, False, True, False]])
    h, _ = scan_ops.diagonal_scan(x, a, torch.full((1, 1), torch.inf), reset)
    h[:, 2:].sum().backward()
    assert x.grad.flatten().tolist() == [0, 0, 1.5, 1]
    assert a.grad.flatten()[2:].tolist() == [0, 1]


def test_nan_stays_in_its_channel(scan_ops):
    arguments = diagonal_case((2, 30), 20, states=True)
    clean = outcome(scan_ops, DIAGONAL, arguments)
    others = torch.tensor([channel for channel in range(20) if channel != 9])
    for name, place in ("x", (1, 4, 9)), ("a", (1, 4, 9)), ("initial_state", (1, 9)):
        dirty = arguments | {name: put(arguments[name], place, torch.nan)}
        for x, y in zip(outcome(scan_ops, DIAGONAL, dirty), clean, strict=True):
            assert_same_bits(x.index_select(-1, others), y.index_select(-1, others))
            assert x[..., 9].isnan().any()


def test_complex_views(scan_ops):
    """Conjugates, and one channel with any stride."""
    arguments = diagonal_case((2, 9), 4, states=True, dtype=torch.complex64)
    names = "x", "a", "initial_state"
    conjugates = {name: arguments[name].conj() for name in names}
    resolved = {name: t.resolve_conj() for name, t in conjugates.items()}
    expected = outcome(scan_ops, DIAGONAL, arguments | resolved)
    torch.testing.assert_close(outcome(scan_ops, DIAGONAL, arguments | conjugates), expected)

    one = {name: arguments[name][..., 2:3] for name in names}
    contiguous = {name: t.contiguous() for name, t in one.items()}
    expected = outcome(scan_ops, DIAGONAL, arguments | contiguous)
    torch.testing.assert_close(outcome(scan_ops, DIAGONAL, arguments | one), expected)


ERRORS = {
    "rank_of_x": ("x", lambda c: {"x": c.x[0]}),
    "integer_x": ("x", lambda c: {"x": c.x.int()}),
    "batch_of_a": ("a", lambda c: {"a": c.a[:1]}),
    "tokens_of_a": ("a", lambda c: {"a": c.a[:, :-1]}),
    "columns_of_a": ("a", lambda c: {"a": c.a[..., :-1]}),
    "columns_of_constant_a": ("a", lambda c: {"a": c.a[0, 0, :-1]}),
    "rank_of_a": ("a", lambda c: {"a": c.a[0]}),
    "narrow_a": ("a", lambda c: {"a": c.a.half()}),
    "double_a": ("a", lambda c: {"a": c.a.double()}),
    "tokens_of_reset": ("reset", lambda c: {"reset": c.reset[:, :-1]}),
    "rank_of_reset": ("reset", lambda c: {"reset": c.reset[0]}),
    "dtype_of_reset": ("reset", lambda c: {"reset": c.reset.float()}),
    "columns_of_state": ("initial_state", lambda c: {"initial_state": c.initial_state[:, :-1]}),
    "narrow_state": ("initial_state", lambda c: {"initial_state": c.initial_state.half()}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(scan_ops, error):
    arguments = diagonal_case((2, 9), 8, resets=0.1, states=True)
    check_error(scan_ops, DIAGONAL, arguments, ERRORS[error])


@pytest.mark.parametrize("error", [e for e in ERRORS if e not in ("integer_x", "rank_of_x")])
def test_errors_of_complex_scans(scan_ops, error):
    names, changes = ERRORS[error]
    arguments = diagonal_case((2, 9), 8, resets=0.1, states=True, dtype=torch.complex64)
    check_error(scan_ops, DIAGONAL, arguments, (names, changes))


def test_a_complex_decay_of_real_numbers_is_refused(scan_ops):
    arguments = diagonal_case((2, 9), 8)
    error = "a", lambda c: {"a": torch.complex(c.a, c.a)}
    check_error(scan_ops, DIAGONAL, arguments, error)
