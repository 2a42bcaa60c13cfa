"""Mamba's selective scan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from checks import PLAIN, at_random, check, check_error, gradients, in_float64, outcome, put
from scan_cases import selective_case
from test_attention import DTYPES
from test_scan import check_scan
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits

SELECTIVE = "selective_scan"
EXTRAS = ["", "D", "z", "b", "Dzb"]


@at_random(
    lengths=st.tuples(st.integers(0, 2), st.integers(0, 70))
    | st.lists(st.sampled_from([0, 1, 16, 65]) | st.integers(0, 40), max_size=4),
    per_group=st.integers(1, 20),
    groups=st.integers(1, 3),
    size=st.integers(1, 20),
    extras=st.sampled_from(EXTRAS),
    delta_softplus=st.booleans(),
    states=st.booleans(),
    padded=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from(INDEX_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_at_random(scan_ops, per_group, groups, **sizes):
    arguments = selective_case(channels=per_group * groups, groups=groups, **sizes)
    check_scan(scan_ops, SELECTIVE, arguments)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (33, 16), (130, 16), (64, 128), (3, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(scan_ops, sizes, dtype):
    arguments = selective_case((1, 65), *sizes, extras="Dzb", states=True, dtype=dtype)
    check_scan(scan_ops, SELECTIVE, arguments)


@pytest.mark.parametrize("delta_softplus", [False, True])
@pytest.mark.parametrize("extras", EXTRAS)
def test_extras(scan_ops, extras, delta_softplus):
    for states in False, True:
        sizes = {"groups": 3, "extras": extras, "states": states}
        arguments = selective_case([33, 0, 9], 12, 5, **sizes, delta_softplus=delta_softplus)
        check_scan(scan_ops, SELECTIVE, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softplus_is_never_cut_off(scan_ops, dtype):
    """Of numbers of any size, with the gradient there."""
    values = torch.tensor([-800.0, -90, -30, -15, -1e-3, 0, 1e-3, 15, 19.9, 20.1, 30, 90])
    arguments = selective_case((1, len(values)), 3, 2, delta_softplus=True, dtype=dtype)
    arguments["delta"] = values.to(dtype)[None, :, None].expand(-1, -1, 3).contiguous()
    check_scan(scan_ops, SELECTIVE, arguments)
    # Of tiny ones alone, where the result is nothing but them.
    few = {name: arguments[name][:, 2:4] for name in ("u", "delta", "B", "C")}
    out, _ = outcome(scan_ops, SELECTIVE, arguments | few)
    assert (out[:, 0].abs() < 1e-11).all() and out[:, 0].all()


def test_decays_of_nothing_and_everything(scan_ops):
    """delta of 0 keeps the state; a huge one forgets it."""
    arguments = selective_case((1, 40), 4, 3, states=True)
    arguments["delta"].zero_()
    _, state = check_scan(scan_ops, SELECTIVE, arguments)
    assert_same_bits(state, arguments["initial_state"])
    arguments["delta"][:, 20] = 1e5
    check_scan(scan_ops, SELECTIVE, arguments)


def test_gradients_where_everything_decays_at_once(scan_ops):
    """A of -inf has no gradient, nor delta one through it."""
    arguments = selective_case((2, 20), 6, 4)
    arguments["A"][::2, 1:3] = -torch.inf
    grads = gradients(getattr(scan_ops, SELECTIVE), arguments)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["A"][::2, 1:3].any()
    exact = gradients(PLAIN.selective_scan, arguments | in_float64(arguments))
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), exact[name], rtol=1e-4, atol=1e-4)


def test_growth(scan_ops):
    """A may be positive."""
    arguments = selective_case((2, 40), 4, 3, states=True)
    arguments["A"] = arguments["A"].abs() / 10
    check_scan(scan_ops, SELECTIVE, arguments)


@pytest.mark.parametrize("tokens", [80, 530])
def test_growth_beyond_all_numbers(scan_ops, tokens):
    """By e^96, in which the rounding of A shows; what it meets may be small enough, or nothing."""
    arguments = selective_case((2, tokens), 4, 3, states=True)
    arguments["A"].fill_(3)
    arguments["u"].zero_()
    arguments["delta"].zero_()[:, :32] = 1
    arguments["initial_state"].mul_(1e-20)
    check(scan_ops, SELECTIVE, arguments, slack=16)
    for scale in 1e-30, 0:

        def scaled(ops, arguments, scale=scale):
            return gradients(lambda **c: getattr(ops, SELECTIVE)(**c)[0] * scale, arguments)

        exact = scaled(PLAIN, arguments | in_float64(arguments))
        for name, grad in scaled(scan_ops, arguments).items():
            atol = 1e-4 * exact[name].abs().max().item()
            torch.testing.assert_close(grad.double(), exact[name], rtol=1e-4, atol=atol)


def test_gradients_by_themselves(scan_ops):
    arguments = selective_case([40, 0, 9], 6, 5, groups=2, extras="Dzb", states=True)
    together = gradients(getattr(scan_ops, SELECTIVE), arguments)
    for name, grad in together.items():
        assert_same_bits(gradients(getattr(scan_ops, SELECTIVE), arguments, [name])[name], grad)


def test_nan_stays_in_its_channels(scan_ops):
    arguments = selective_case((2, 30), 8, 5, groups=2, extras="Dzb", states=True)
    clean = outcome(scan_ops, SELECTIVE, arguments)
    one, group = [5], [4, 5, 6, 7]
    for name, place, touched in [
        ("u", (1, 9, 5), one), ("delta", (1, 9, 5), one), ("z", (1, 9, 5), one), ("D", (5,), one),
        ("delta_bias", (5,), one), ("A", (5, 2), one), ("initial_state", (1, 5, 2), one),
        ("B", (1, 9, 1, 2), group), ("C", (1, 9, 1, 2), group),
    ]:  # fmt: skip
        dirty = arguments | {name: put(arguments[name], place, torch.nan)}
        others = torch.tensor([channel for channel in range(8) if channel not in touched])
        for dim, x, y in zip((2, 1), outcome(scan_ops, SELECTIVE, dirty), clean, strict=True):
            assert_same_bits(x.index_select(dim, others), y.index_select(dim, others))


ERRORS = {
    "rank_of_u": ("u", lambda c: {"u": c.u[0]}),
    "integer_u": ("u", lambda c: {"u": c.u.int()}),
    "tokens_of_delta": ("delta", lambda c: {"delta": c.delta[:, :-1]}),
    "columns_of_delta": ("delta", lambda c: {"delta": c.delta[..., :-1]}),
    "dtype_of_delta": ("delta", lambda c: {"delta": c.delta.half()}),
    "channels_of_A": ("A", lambda c: {"A": c.A[:-1]}),
    "rank_of_A": ("A", lambda c: {"A": c.A[:, 0]}),
    "no_states": ("A", lambda c: {"A": c.A[:, :0], "B": c.B[..., :0], "C": c.C[..., :0],
                                  "initial_state": c.initial_state[..., :0]}),
    "states_beyond_256": ("A", lambda c: {"A": c.A[:, :1].repeat(1, 257)}),
    "narrow_A": ("A", lambda c: {"A": c.A.half()}),
    "tokens_of_B": ("B", lambda c: {"B": c.B[:, :-1]}),
    "groups_of_both": ("B|C", lambda c: {"B": c.B[:, :, [0, 1, 1]], "C": c.C[:, :, [0, 1, 1]]}),
    "columns_of_B": ("B", lambda c: {"B": c.B[..., :-1]}),
    "dtype_of_B": ("B", lambda c: {"B": c.B.half()}),
    "rank_of_B": ("B", lambda c: {"B": c.B[:, :, 0]}),
    "groups_of_C": ("C", lambda c: {"C": c.C[:, :, :1]}),
    "columns_of_C": ("C", lambda c: {"C": c.C[..., :-1]}),
    "dtype_of_C": ("C", lambda c: {"C": c.C.half()}),
    "channels_of_D": ("D", lambda c: {"D": c.D[:-1]}),
    "narrow_D": ("D", lambda c: {"D": c.D.half()}),
    "tokens_of_z": ("z", lambda c: {"z": c.z[:, :-1]}),
    "dtype_of_z": ("z", lambda c: {"z": c.z.half()}),
    "channels_of_bias": ("delta_bias", lambda c: {"delta_bias": c.delta_bias[:-1]}),
    "narrow_bias": ("delta_bias", lambda c: {"delta_bias": c.delta_bias.half()}),
    "channels_of_state": ("initial_state", lambda c: {"initial_state": c.initial_state[:, :-1]}),
    "narrow_state": ("initial_state", lambda c: {"initial_state": c.initial_state.half()}),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(scan_ops, error):
    arguments = selective_case((2, 9), 8, 5, groups=2, extras="Dzb", states=True)
    check_error(scan_ops, SELECTIVE, arguments, ERRORS[error])
