"""The delta rule with every decay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

import memkernels
from checks import PLAIN, at_random, check, check_error, gradients, in_float64, outcome, put
from scan_cases import GATES, SLACK, delta_case, linear_case, part
from test_attention import DTYPES
from test_linear_attention import assert_nothing, chunk_sizes
from test_scan import check_scan
from test_selection import ALONE
from tolerance import assert_same_bits

each_gate = pytest.mark.parametrize("gate", GATES)
DELTA = "delta_rule"


RANDOM = {
    "sizes": chunk_sizes(),
    "qk_l2norm": st.booleans(),
    "scale": st.sampled_from([None, 1.0, 0.3]),
}


def random_case(sizes, qk_l2norm, **options):
    """The gradients of normalised rows of one element are nothing but roundings."""
    alone = sizes["dims"][0] == 1
    return delta_case(**sizes, qk_l2norm=qk_l2norm and not alone, **options), alone


@at_random(**RANDOM)
def test_at_random(scan_ops, **drawn):
    case, alone = random_case(**drawn)
    check(scan_ops, DELTA, case, slack=ALONE if alone else SLACK)


@pytest.mark.parametrize("ops", [memkernels, PLAIN], ids=["native", "fallback"])
@at_random(**RANDOM)
def test_gradients_at_random(ops, **drawn):
    """Many keys of few elements are nearly parallel, and gates' gradients small differences of
    large sums: in float64, which tells them from wrong ones."""
    case, _ = random_case(**drawn)
    check_scan(ops, DELTA, case | in_float64(case), 64 * ALONE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized_rows_of_one_element(scan_ops, dtype):
    arguments = delta_case((2, 40), (1, 2), (1, 5), dtype=dtype, qk_l2norm=True)
    check(scan_ops, DELTA, arguments, slack=SLACK)
    for name in "q", "k":  # keep away from 0, where the norm's epsilon is something
        arguments[name] = arguments[name].sign() * (1 + arguments[name].abs())
    grads = gradients(getattr(scan_ops, DELTA), arguments)
    assert_nothing(grads["q"])
    assert_nothing(grads["k"])


@pytest.mark.parametrize("gate", [None, "token", "channel"])
@pytest.mark.parametrize("dims", [(64, 153), (128, 128), (5, 33), (2, 1), (20, 260)])
def test_dims(scan_ops, dims, gate):
    check_scan(scan_ops, DELTA, delta_case((1, 65), (1, 2), dims, gate=gate, states=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_taylor_features(scan_ops, dtype):
    """As many as 16 channels have."""
    sizes = {"gate": "channel", "states": True, "dtype": dtype}
    check_scan(scan_ops, DELTA, delta_case((1, 65), (1, 2), (153, 64), **sizes))


# ---- keys and betas ------------------------------------------------------------------------------


def test_a_value_is_found_again(scan_ops):
    """With beta 1 and a key of length 1, whatever was written for it before."""
    arguments = delta_case((2, 70), dims=(8, 5), scale=1.0, qk_l2norm=True)
    arguments["k"] *= 1000  # so that the norm's epsilon is nothing
    arguments |= {"q": arguments["k"], "beta": torch.ones_like(arguments["beta"])}
    out, _ = outcome(scan_ops, DELTA, arguments)
    torch.testing.assert_close(out, arguments["v"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reflections(scan_ops, dtype):
    """With beta 2 and keys of length 1 a state never shrinks."""
    arguments = delta_case((1, 130), (1, 1), (33, 20), states=True, dtype=dtype, qk_l2norm=True)
    arguments["beta"].fill_(2)
    check_scan(scan_ops, DELTA, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_keys_with_growth(scan_ops, dtype):
    """Systems as badly conditioned as they come: every error is nearly doubled at every token."""
    arguments = delta_case((1, 20), (1, 1), (8, 8), states=True, dtype=dtype)
    arguments["k"] = arguments["k"][:, :1].expand_as(arguments["k"]).contiguous()
    arguments["k"] /= arguments["k"].norm(dim=-1, keepdim=True) / 1.2
    arguments["beta"].fill_(2)
    check(scan_ops, DELTA, arguments, slack=SLACK)


@each_gate
def test_equal_keys(scan_ops, gate):
    """What one token writes the next takes back: small differences of large sums."""
    arguments = delta_case((1, 130), (1, 2), (8, 8), gate=gate, states=True)
    arguments["k"] = torch.full_like(arguments["k"], 8**-0.5)
    for beta in 0.5, 1, 2:
        arguments["beta"].fill_(beta)
        check_scan(scan_ops, DELTA, arguments, slack=ALONE)


def test_long_keys_with_betas_that_are_small(scan_ops):
    arguments = delta_case((1, 70), (1, 2), (20, 9), states=True)
    arguments["k"] *= 30
    arguments["beta"] /= 900
    check_scan(scan_ops, DELTA, arguments)


@each_gate
def test_beta_of_zero_writes_nothing(scan_ops, gate):
    arguments = delta_case((2, 70), (1, 2), (8, 5), gate=gate, states=True)
    arguments["beta"].zero_()
    out, state = check_scan(scan_ops, DELTA, arguments)
    if gate is None:
        assert_same_bits(state, arguments["initial_state"])
    zeros = {"v": torch.zeros_like(arguments["v"])}
    names = "q", "k", "g", "initial_state"
    linear = {name: arguments[name] for name in names} | zeros | {"output_final_state": True}
    expected = scan_ops.linear_attention(**linear)[:2]
    torch.testing.assert_close((out, state), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_of_zeros(scan_ops, dtype):
    """Normalised or not, they write nothing; their gradients are finite."""
    for qk_l2norm in False, True:
        arguments = delta_case((1, 40), (1, 2), (8, 5), dtype=dtype, qk_l2norm=qk_l2norm)
        arguments["k"][:, 10:30] = 0
        arguments["q"][:, 20:] = 0
        out, _ = check_scan(scan_ops, DELTA, arguments)
        assert not out[:, 20:].any()


@each_gate
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized_rows(scan_ops, gate, dtype):
    arguments = delta_case(
        [70, 0, 9], (2, 4), (20, 9), gate=gate, states=True, dtype=dtype, qk_l2norm=True
    )
    check_scan(scan_ops, DELTA, arguments)


# ---- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@each_gate
def test_gates_in_either_dtype(scan_ops, gate, dtype, narrow):
    sizes = {"gate": gate, "narrow": narrow, "decays": "hard", "states": True, "dtype": dtype}
    check_scan(scan_ops, DELTA, delta_case([70, 0, 17], (1, 2), (20, 12), **sizes))


@pytest.mark.parametrize("at", [0, 1, 15, 16, 40, 63, 64, 79])
@pytest.mark.parametrize("gate", ["token", "channel"])
def test_a_reset_forgets_everything(scan_ops, gate, at):
    """What follows is as if it were the beginning; nothing before has a gradient from it."""
    arguments = delta_case((1, 80), (1, 2), (12, 9), gate=gate, states=True)
    arguments["g"][:, at] = -torch.inf
    alone = part(DELTA, arguments, 0, at) | {"initial_state": None}
    actual, state = check(scan_ops, DELTA, arguments, slack=SLACK)
    torch.testing.assert_close((actual[:, at:], state), outcome(scan_ops, DELTA, alone))

    def after(**leaves):
        out, state = getattr(scan_ops, DELTA)(**leaves)
        return out[:, at:], state

    grads = gradients(after, arguments)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["initial_state"].any()
    names = "q", "k", "v", "beta", "g"
    for name in names[:-1]:
        assert not grads[name][:, :at].any()
    assert_nothing(grads["g"][:, :at])
    for name, grad in gradients(getattr(scan_ops, DELTA), alone, names).items():
        torch.testing.assert_close(grads[name][:, at:], grad)


def test_a_reset_of_one_channel(scan_ops):
    arguments = delta_case((1, 70), (1, 1), (6, 5), gate="channel", states=True)
    arguments["g"][:, [20, 64], :, 3] = -torch.inf
    check_scan(scan_ops, DELTA, arguments)


@pytest.mark.parametrize("value", [0.0, -50.0, -0.001, -torch.inf])
@pytest.mark.parametrize("gate", ["head", "token", "channel"])
def test_gates_of_one_value(scan_ops, gate, value):
    arguments = delta_case((1, 130), (1, 2), (8, 8), gate=gate, states=True)
    arguments["g"].fill_(value)
    check_scan(scan_ops, DELTA, arguments)


def test_no_gate_is_a_gate_of_zero(scan_ops):
    arguments = delta_case((2, 70), (1, 2), (8, 8), states=True)
    expected = outcome(scan_ops, DELTA, arguments)
    for shape in (2,), (2, 70, 2), (2, 70, 2, 8):
        actual = outcome(scan_ops, DELTA, arguments | {"g": torch.zeros(shape)})
        torch.testing.assert_close(actual, expected)


def test_nan_stays_in_its_head(scan_ops):
    arguments = delta_case((2, 30), (2, 4), (8, 5), gate="channel", states=True)
    clean = outcome(scan_ops, DELTA, arguments)
    touched = {"q": [2, 3], "k": [2, 3], "v": [3], "g": [3], "beta": [3]}
    for name, heads in touched.items():
        place = (1, 9, -1) if name != "beta" else (1, 9, 3)
        dirty = arguments | {name: put(arguments[name], place, torch.nan)}
        others = torch.tensor([head for head in range(4) if head not in heads])
        for dim, x, y in zip((2, 1), outcome(scan_ops, DELTA, dirty), clean, strict=True):
            assert_same_bits(x.index_select(dim, others), y.index_select(dim, others))


ERRORS = {
    "rank_of_q": ("q", lambda c: {"q": c.q[0]}),
    "integer_q": ("q", lambda c: {"q": c.q.int()}),
    "tokens_of_k": ("k", lambda c: {"k": c.k[:, :-1]}),
    "columns_of_k": ("k", lambda c: {"k": c.k[..., :-1]}),
    "dtype_of_k": ("k", lambda c: {"k": c.k.half()}),
    "batch_of_v": ("v", lambda c: {"v": c.v[:1]}),
    "heads_of_v": ("v", lambda c: {"v": c.v[:, :, :3]}),
    "dtype_of_v": ("v", lambda c: {"v": c.v.half()}),
    "tokens_of_beta": ("beta", lambda c: {"beta": c.beta[:, :-1]}),
    "heads_of_beta": ("beta", lambda c: {"beta": c.beta[..., :2]}),
    "rank_of_beta": ("beta", lambda c: {"beta": c.beta[..., None]}),
    "narrow_beta": ("beta", lambda c: {"beta": c.beta.half()}),
    "double_beta": ("beta", lambda c: {"beta": c.beta.double()}),
    "rank_of_g": ("g", lambda c: {"g": c.g[0, 0]}),
    "tokens_of_g": ("g", lambda c: {"g": c.g[:, :-1]}),
    "columns_of_g": ("g", lambda c: {"g": c.g[..., :-1]}),
    "narrow_g": ("g", lambda c: {"g": c.g.half()}),
    "heads_of_state": ("initial_state", lambda c: {"initial_state": c.initial_state[:, :2]}),
    "narrow_state": ("initial_state", lambda c: {"initial_state": c.initial_state.half()}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(scan_ops, error):
    arguments = delta_case((2, 9), (2, 4), (8, 5), gate="channel", states=True)
    check_error(scan_ops, DELTA, arguments, ERRORS[error])


def test_queries_alone_are_those_of_linear_attention(scan_ops):
    """Of orthogonal keys, each written once, the two ops keep the same."""
    linear = linear_case((1, 8), (1, 1), (8, 5), gate="token")
    linear["k"] = torch.eye(8)[None, :, None]
    del linear["initial_z"], linear["normalize"]
    expected = scan_ops.linear_attention(**linear)[:2]
    actual = scan_ops.delta_rule(**linear, beta=torch.ones(1, 8, 1))
    torch.testing.assert_close(actual, expected)
