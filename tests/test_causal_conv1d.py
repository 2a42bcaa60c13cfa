"""Causal convolutions of each channel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from checks import at_random, check, check_error, gradients, outcome, put
from scan_cases import SLACK, conv_case
from test_attention import DTYPES
from test_scan import check_scan
from test_selection import INDEX_DTYPES
from tolerance import assert_same_bits

CONV = "causal_conv1d"


@at_random(
    lengths=st.tuples(st.integers(0, 3), st.integers(0, 40))
    | st.lists(st.sampled_from([0, 1, 3]) | st.integers(0, 40), max_size=5),
    channels=st.integers(1, 70),
    width=st.integers(1, 16),
    dilation=st.sampled_from([1, 1, 2, 5]),
    bias=st.booleans(),
    wide_weight=st.booleans(),
    activation=st.sampled_from([None, "silu"]),
    states=st.booleans(),
    padded=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from(INDEX_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_at_random(scan_ops, **sizes):
    check_scan(scan_ops, CONV, conv_case(**sizes))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 16])
def test_widths(scan_ops, width, dtype, activation):
    options = {"bias": True, "wide_weight": True, "states": True, "activation": activation}
    for dilation in 1, 3:
        arguments = conv_case((2, 65), 37, width, dilation=dilation, dtype=dtype, **options)
        check_scan(scan_ops, CONV, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_infinities(scan_ops, dtype):
    """As torch's: of -inf it is NaN."""
    arguments = conv_case((1, 9), 37, 2, activation="silu", dtype=dtype)
    arguments["x"][0, 4, ::3] = torch.inf
    out, _ = check(scan_ops, CONV, arguments, slack=SLACK)
    assert out[0, 4:6, ::3].isnan().any()
    assert out[0, 4:6, ::3].isposinf().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_in_torch(scan_ops, dtype):
    for dilation in 1, 2:
        arguments = conv_case((2, 30), 6, 4, bias=True, dilation=dilation, dtype=dtype)
        out, _ = outcome(scan_ops, CONV, arguments)
        x = torch.nn.functional.pad(arguments["x"].double().mT, (3 * dilation, 0))
        weight, bias = (arguments[name].double() for name in ("weight", "bias"))
        expected = torch.nn.functional.conv1d(x, weight[:, None], bias, 1, 0, dilation, 6)
        tolerance = {} if dtype.itemsize > 2 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(out, expected.mT.to(dtype), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [False, True])
def test_the_state_is_the_last_inputs(scan_ops, dtype, states):
    """To the bit; of sequences shorter than the kernel, too, and their gradients."""
    lengths = [0, 1, 2, 5, 6, 7, 20]
    arguments = conv_case(lengths, 9, 4, dilation=2, states=states, dtype=dtype)
    _, state = check_scan(scan_ops, CONV, arguments)
    start = 0
    for n, length in enumerate(lengths):
        before = torch.zeros(9, 6, dtype=dtype)
        if states:
            before = arguments["initial_state"][n]
        inputs = torch.cat([before, arguments["x"][0, start : start + length].mT], 1)
        assert_same_bits(state[n], inputs[:, length:].contiguous())
        start += length
    grads = gradients(lambda **c: getattr(scan_ops, CONV)(**c)[1], arguments)
    assert not grads["weight"].any()


def test_nan_stays_in_its_channel_and_window(scan_ops):
    arguments = conv_case((2, 30), 20, 4, dilation=2, states=True)
    clean, _ = outcome(scan_ops, CONV, arguments)
    dirty = arguments | {"x": put(arguments["x"], (1, 4, 9), torch.nan)}
    actual, _ = outcome(scan_ops, CONV, dirty)
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[1, [4, 6, 8, 10], 9] = True
    assert actual[touched].isnan().all()
    assert_same_bits(actual[~touched], clean[~touched])


def test_any_dilation_of_one_tap(scan_ops):
    """Costs nothing: a tap of its own reads no other token."""
    arguments = conv_case((2, 9), 5, 1, states=True)
    expected = check_scan(scan_ops, CONV, arguments)
    assert_same_bits(check_scan(scan_ops, CONV, arguments | {"dilation": 2**31 - 1}), expected)


ERRORS = {
    "rank_of_x": ("x", lambda c: {"x": c.x[0]}),
    "integer_x": ("x", lambda c: {"x": c.x.int()}),
    "channels_of_weight": ("weight", lambda c: {"weight": c.weight[:-1]}),
    "rank_of_weight": ("weight", lambda c: {"weight": c.weight[:, None]}),
    "no_width": ("weight", lambda c: {"weight": c.weight[:, :0]}),
    "width_beyond_16": ("weight", {"weight": torch.ones(8, 17)}),
    "narrow_weight": ("weight", lambda c: {"weight": c.weight.half(), "bias": c.bias.half()}),
    "double_weight": ("weight", lambda c: {"weight": c.weight.double(), "bias": c.bias.double()}),
    "channels_of_bias": ("bias", lambda c: {"bias": c.bias[:-1]}),
    "dtype_of_bias": ("bias", lambda c: {"bias": c.bias.half()}),
    "channels_of_state": ("initial_state", lambda c: {"initial_state": c.initial_state[:, :-1]}),
    "length_of_state": ("initial_state", {"dilation": 2}),
    "dtype_of_state": ("initial_state", lambda c: {"initial_state": c.initial_state.half()}),
    "no_dilation": ("dilation", lambda c: {"dilation": 0, "initial_state": None}),
    "dilation_beyond_int32": ("dilation", {"dilation": 2**31}),
    "activation": ("activation", {"activation": "gelu"}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(scan_ops, error):
    arguments = conv_case((2, 9), 8, 4, bias=True, states=True)
    check_error(scan_ops, CONV, arguments, ERRORS[error])
