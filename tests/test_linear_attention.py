"""Linear attention with every decay, and what is made of it: Infini-attention's writes, Mamba2."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

import memkernels
from checks import PLAIN, at_random, check, check_error, check_gradients, gradients, outcome, put
from scan_cases import GATES, SLACK, linear_case, part, step_case
from test_attention import DTYPES
from test_scan import check_scan
from tolerance import assert_accurate, assert_same_bits

each_gate = pytest.mark.parametrize("gate", GATES)
LINEAR = "linear_attention"


def assert_nothing(grad):
    """But what rounding leaves of a sum over all that comes after."""
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-4)


@st.composite
def chunk_sizes(draw):
    """Keyword arguments of `linear_case` and `delta_case`."""
    lengths = st.lists(st.sampled_from([0, 1, 16, 65]) | st.integers(0, 40), max_size=4)
    heads = draw(st.integers(1, 3))
    return {
        "lengths": draw(st.tuples(st.integers(0, 2), st.integers(0, 70)) | lengths),
        "heads": (heads, heads * draw(st.integers(1, 3))),
        "dims": (draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        "gate": draw(st.sampled_from(GATES)),
        "narrow": draw(st.booleans()),
        "decays": draw(st.sampled_from(["mild", "hard"])),
        "states": draw(st.booleans()),
        "padded": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        "seed": draw(st.integers(0, 2**16)),
    }


@at_random(
    sizes=chunk_sizes(),
    normalize=st.booleans(),
    scale=st.sampled_from([None, 1.0, 0.3]),
)
def test_at_random(scan_ops, sizes, **options):
    """A large eps, without which gradients of a first token's averages are the zeros of 1 - 1."""
    check_scan(scan_ops, LINEAR, linear_case(**sizes, **options, eps=0.5))


@pytest.mark.parametrize("gate", [None, "token", "channel"])
@pytest.mark.parametrize("dims", [(64, 153), (128, 128), (5, 33), (1, 1), (20, 260)])
def test_dims(scan_ops, dims, gate):
    check_scan(scan_ops, LINEAR, linear_case((1, 65), (1, 2), dims, gate=gate, states=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_taylor_features(scan_ops, dtype):
    """As many as 16 channels have."""
    sizes = {"gate": "channel", "states": True, "dtype": dtype}
    check_scan(scan_ops, LINEAR, linear_case((1, 65), (1, 2), (153, 64), **sizes))


# ---- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@each_gate
def test_gates_in_either_dtype(scan_ops, gate, dtype, narrow):
    sizes = {"gate": gate, "narrow": narrow, "decays": "hard", "states": True, "dtype": dtype}
    arguments = linear_case([70, 0, 17], (1, 2), (20, 12), **sizes)
    check_scan(scan_ops, LINEAR, arguments)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("at", [0, 1, 15, 16, 40, 63, 64, 79])
@pytest.mark.parametrize("gate", ["token", "channel"])
def test_a_reset_forgets_everything(scan_ops, gate, at, normalize):
    """What follows is as if it were the beginning; nothing before has a gradient from it."""
    sizes = {"gate": gate, "states": True, "normalize": normalize}
    arguments = linear_case((1, 80), (1, 2), (12, 9), **sizes)
    arguments["g"][:, at] = -torch.inf
    alone = part(LINEAR, arguments, 0, at) | {"initial_state": None, "initial_z": None}
    actual, *states = check(scan_ops, LINEAR, arguments, slack=SLACK)
    expected = outcome(scan_ops, LINEAR, alone)
    torch.testing.assert_close((actual[:, at:], *states), expected)

    def after(**leaves):
        out, *states = getattr(scan_ops, LINEAR)(**leaves)
        return out[:, at:], *states

    grads = gradients(after, arguments)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["initial_state"].any()
    for name in "q", "k", "v":
        assert not grads[name][:, :at].any()
    assert_nothing(grads["g"][:, :at])
    alone = gradients(getattr(scan_ops, LINEAR), alone, ["q", "k", "v", "g"])
    for name, grad in alone.items():
        torch.testing.assert_close(grads[name][:, at:], grad)


def test_a_reset_of_one_channel(scan_ops):
    arguments = linear_case((1, 70), (1, 1), (6, 5), gate="channel", states=True)
    arguments["g"][:, [20, 64], :, 3] = -torch.inf
    check_scan(scan_ops, LINEAR, arguments)


@pytest.mark.parametrize("gate", ["head", "token", "channel"])
def test_resets_everywhere(scan_ops, gate):
    """Every token for itself."""
    arguments = linear_case((2, 40), (1, 2), (8, 8), gate=gate, states=True)
    arguments["g"].fill_(-torch.inf)
    check_scan(scan_ops, LINEAR, arguments)


@pytest.mark.parametrize("value", [0.0, -50.0, -0.001, 0.01])
@each_gate
def test_gates_of_one_value(scan_ops, gate, value):
    """None forgets; almost everything is forgotten; little; and growth."""
    arguments = linear_case((1, 130), (1, 2), (8, 8), gate=gate, states=True)
    if gate is not None:
        arguments["g"].fill_(value)
    check_scan(scan_ops, LINEAR, arguments)


def test_no_gate_is_a_gate_of_zero(scan_ops):
    arguments = linear_case((2, 70), (1, 2), (8, 8), states=True)
    expected = outcome(scan_ops, LINEAR, arguments)
    for shape in (2,), (2, 70, 2), (2, 70, 2, 8):
        actual = outcome(scan_ops, LINEAR, arguments | {"g": torch.zeros(shape)})
        torch.testing.assert_close(actual, expected)


# ---- normalisation -------------------------------------------------------------------------------


@each_gate
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized(scan_ops, gate, dtype):
    sizes = {"gate": gate, "normalize": True, "dtype": dtype}
    for states in False, True:
        arguments = linear_case([70, 0, 9], (1, 2), (12, 9), states=states, **sizes)
        check_scan(scan_ops, LINEAR, arguments)


@pytest.mark.parametrize("name", ["initial_state", "initial_z"])
def test_one_initial_state_without_the_other(scan_ops, name):
    arguments = linear_case((2, 40), normalize=True, states=True) | {name: None}
    check_scan(scan_ops, LINEAR, arguments)


def test_normalized_values_are_averages(scan_ops):
    """Of equal values, the value."""
    arguments = linear_case((2, 70), (1, 2), (8, 3), normalize=True, gate="token", eps=0.0)
    value = arguments["v"][:, :1].expand_as(arguments["v"])
    out, *_ = outcome(scan_ops, LINEAR, arguments | {"v": value})
    torch.testing.assert_close(out, value)


def test_nan_stays_in_its_head(scan_ops):
    arguments = linear_case((2, 30), (2, 4), (8, 5), gate="channel", normalize=True, states=True)
    clean = outcome(scan_ops, LINEAR, arguments)
    touched = {"q": [2, 3], "k": [2, 3], "v": [3], "g": [3]}
    for name, heads in touched.items():
        dirty = arguments | {name: put(arguments[name], (1, 9, -1), torch.nan)}
        others = [head for head in range(4) if head not in heads]
        for x, y in zip(outcome(scan_ops, LINEAR, dirty), clean, strict=True):
            of_heads = 2 if x.ndim == 4 and x.shape[1] == 30 else 1
            index = torch.tensor(others)
            assert_same_bits(x.index_select(of_heads, index), y.index_select(of_heads, index))


@pytest.mark.parametrize("gate", ["head", "token", "channel"])
def test_growth_beyond_the_largest_number(scan_ops, gate):
    for tokens in 1, 20:
        arguments = linear_case((1, tokens), (1, 2), (5, 6), gate=gate, states=True)
        arguments["initial_state"].fill_(0.5)
        for g in 88.7, 89.5, 100.0, torch.inf:
            arguments["g"] = torch.full_like(arguments["g"], g)
            _, state, _ = outcome(scan_ops, LINEAR, arguments)
            assert (state.isfinite() == (tokens == 1 and g == 88.7)).all()


@pytest.mark.parametrize("delta", [False, True])
def test_no_value_heads(scan_ops, delta):
    arguments = linear_case((2, 9), (2, 0), (8, 5), states=True)
    if delta:
        arguments |= {"beta": torch.ones(2, 9, 0)}
        arguments = {n: t for n, t in arguments.items() if n not in ("initial_z", "normalize")}
    op = "delta_rule" if delta else LINEAR
    out, state, *_ = outcome(scan_ops, op, arguments)
    assert out.shape == (2, 9, 0, 5) and state.shape == (2, 0, 8, 5)
    assert not any(grad.any() for grad in gradients(getattr(scan_ops, op), arguments).values())


ERRORS = {
    "no_columns_of_k": ("q|k", lambda c: {"q": c.q[..., :0], "k": c.k[..., :0]}),
    "no_dimensions_of_k": ("k", lambda c: {"k": c.k[0, 0, 0, 0]}),
    "rank_of_q": ("q", lambda c: {"q": c.q[0]}),
    "integer_q": ("q", lambda c: {"q": c.q.int()}),
    "tokens_of_k": ("k", lambda c: {"k": c.k[:, :-1]}),
    "heads_of_k": ("k", lambda c: {"k": c.k[:, :, :1]}),
    "columns_of_k": ("k", lambda c: {"k": c.k[..., :-1]}),
    "dtype_of_k": ("k", lambda c: {"k": c.k.half()}),
    "batch_of_v": ("v", lambda c: {"v": c.v[:1]}),
    "tokens_of_v": ("v", lambda c: {"v": c.v[:, :-1]}),
    "heads_of_v": ("v", lambda c: {"v": c.v[:, :, :3]}),
    "dtype_of_v": ("v", lambda c: {"v": c.v.half()}),
    "rank_of_v": ("v", lambda c: {"v": c.v[:, :, 0]}),
    "rank_of_g": ("g", lambda c: {"g": c.g[0, 0]}),
    "tokens_of_g": ("g", lambda c: {"g": c.g[:, :-1]}),
    "heads_of_g": ("g", lambda c: {"g": c.g[:, :, :2]}),
    "heads_of_constant_g": ("g", lambda c: {"g": c.g[0, 0, :2, 0]}),
    "columns_of_g": ("g", lambda c: {"g": c.g[..., :-1]}),
    "narrow_g": ("g", lambda c: {"g": c.g.half()}),
    "double_g": ("g", lambda c: {"g": c.g.double()}),
    "heads_of_state": ("initial_state", lambda c: {"initial_state": c.initial_state[:, :2]}),
    "narrow_state": ("initial_state", lambda c: {"initial_state": c.initial_state.half()}),
    "columns_of_z": ("initial_z", lambda c: {"initial_z": c.initial_z[..., :-1]}),
    "sequences_of_z": ("initial_z", lambda c: {"initial_z": c.initial_z[:1]}),
    "narrow_z": ("initial_z", lambda c: {"initial_z": c.initial_z.half()}),
    "z_without_normalize": ("initial_z", {"normalize": False}),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(scan_ops, error):
    sizes = {"gate": "channel", "normalize": True, "states": True}
    arguments = linear_case((2, 9), (2, 4), (8, 5), **sizes)
    check_error(scan_ops, LINEAR, arguments, ERRORS[error])


# ---- infini_update -------------------------------------------------------------------------------


def segment_case(dtype=torch.float32, **sizes):
    arguments = linear_case((2, 33), (2, 4), (12, 9), normalize=True, states=True, dtype=dtype)
    return {
        "k": arguments["k"],
        "v": arguments["v"],
        "state": arguments["initial_state"],
        "z": arguments["initial_z"] + 1,
    } | sizes


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(scan_ops, dtype, delta):
    arguments = segment_case(dtype, delta=delta)
    check_scan(scan_ops, "infini_update", arguments)


def test_what_was_written_is_not_written_again(scan_ops):
    """Of one key; reading it back gives its value."""
    k = torch.tensor([0.0, 2, 0])[None, None, None].double()
    v = torch.tensor([5.0, 7])[None, None, None].double()
    zeros = torch.zeros(1, 1, 3, 2).double(), torch.zeros(1, 1, 3).double()
    state, z = scan_ops.infini_update(k, v, *zeros, eps=1e-12)
    again, _ = scan_ops.infini_update(k, v, state, z, eps=1e-12)
    torch.testing.assert_close(again, state)
    torch.testing.assert_close(state[0, 0].mT @ k[0, 0, 0] / (z[0, 0] @ k[0, 0, 0]), v[0, 0, 0])


SEGMENT_ERRORS = {
    "rank_of_k": ("k", lambda c: {"k": c.k[0]}),
    "tokens_of_v": ("v", lambda c: {"v": c.v[:, :-1]}),
    "heads_of_v": ("v", lambda c: {"v": c.v[:, :, :3]}),
    "dtype_of_v": ("v", lambda c: {"v": c.v.half()}),
    "heads_of_state": ("state", lambda c: {"state": c.state[:, :2]}),
    "dtype_of_state": ("state", lambda c: {"state": c.state.half()}),
    "columns_of_z": ("z", lambda c: {"z": c.z[..., :-1]}),
    "dtype_of_z": ("z", lambda c: {"z": c.z.half()}),
}


@pytest.mark.parametrize("error", SEGMENT_ERRORS)
def test_errors_of_segments(scan_ops, error):
    check_error(scan_ops, "infini_update", segment_case(), SEGMENT_ERRORS[error])


# ---- ssd -----------------------------------------------------------------------------------------


def ssd_case(lengths, extras="", *, states=False, dtype=torch.float32, seed=0, **options):
    """Arguments of `memkernels.ssd`, with 4 heads of 6 channels, 2 groups and states of 5.

    Args:
        extras: which of D, D of channels (d), z and b, dt_bias, there are.
    """
    case = linear_case(lengths, (2, 4), (5, 6), gate="token", states=True, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(torch.promote_types(dtype, torch.float32))

    return {
        "x": case["v"],
        "dt": -case["g"].to(dtype),
        "A": -draw(4).abs(),
        "B": case["k"],
        "C": case["q"],
        "D": draw(4) if "D" in extras else draw(4, 6) if "d" in extras else None,
        "z": draw(*case["v"].shape).to(dtype) if "z" in extras else None,
        "dt_bias": draw(4) if "b" in extras else None,
        "initial_states": case["initial_state"].mT if states else None,
        "cu_seqlens": case["cu_seqlens"],
        "return_final_states": states,
    } | options


@pytest.mark.parametrize(
    "options",
    [{}, {"extras": "D"}, {"extras": "dz", "states": True},
     {"extras": "Dzb", "states": True, "dt_softplus": True, "dt_limit": (0.1, 0.8)}],
    ids=["plain", "D", "z", "all"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [(2, 70), [17, 0, 40]], ids=["rows", "packed"])
def test_ssd(scan_ops, lengths, dtype, options):
    arguments = ssd_case(lengths, dtype=dtype, **options)
    check(scan_ops, "ssd", arguments, slack=2 * SLACK)
    check_gradients(scan_ops, "ssd", arguments, slack=2 * SLACK)


def test_ssd_under_autocast():
    """Which may have left x in float32 and not what comes from a projection."""
    arguments = ssd_case((2, 70), "Dz")
    narrow = {name: arguments[name].bfloat16() for name in ("B", "C", "z")}
    exact = memkernels.ssd(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = memkernels.ssd(**arguments | narrow)
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max())


SSD_ERRORS = {
    "rank_of_x": ("x", lambda c: {"x": c.x[0]}),
    "heads_of_dt": ("dt", lambda c: {"dt": c.dt[..., :-1]}),
    "heads_of_A": ("A", lambda c: {"A": c.A[:-1]}),
    "heads_of_dt_bias": ("dt_bias", lambda c: {"dt_bias": c.dt_bias[:-1]}),
    "columns_of_D": ("D", lambda c: {"D": torch.ones(4, 3)}),
    "tokens_of_z": ("z", lambda c: {"z": c.z[:, :-1]}),
    "dtype_of_z": ("z", lambda c: {"z": c.z.double()}),
    "tokens_of_B": ("B", lambda c: {"B": c.B[:, :-1]}),
    "groups_of_B": ("B", lambda c: {"B": c.x[:, :, :3], "C": c.x[:, :, :3]}),
    "dtype_of_B": ("B", lambda c: {"B": c.B.half()}),
    "columns_of_C": ("C", lambda c: {"C": c.C[..., :-1]}),
    "rank_of_states": ("initial_states", lambda c: {"initial_states": c.initial_states[0]}),
}


@pytest.mark.parametrize("error", SSD_ERRORS)
def test_errors_of_ssd(scan_ops, error):
    check_error(scan_ops, "ssd", ssd_case((2, 9), "Dzb", states=True), SSD_ERRORS[error])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssd_in_two_bytes(scan_ops, dtype):
    """Its steps round to that dtype: no worse than in float32 by a few of its units."""
    arguments = ssd_case((2, 70), "Dz", dtype=dtype)
    wide = {n: t.float() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    out, exact = scan_ops.ssd(**arguments), PLAIN.ssd(**wide)
    assert out.dtype == dtype
    assert_accurate(out, exact.double(), exact.to(dtype), dtype=dtype, slack=SLACK)


def test_a_step_is_a_scan_of_one_token(scan_ops):
    step = step_case(LINEAR, 3, 3, (2, 4), (8, 5), gate="token", normalize=True)
    out, state, z = outcome(scan_ops, "linear_attention_step", step)
    names = {"initial_state": "state", "initial_z": "z"}
    tokens = {name: step[name][:, None] for name in ("q", "k", "v", "g")}
    scan = tokens | {name: step[pool] for name, pool in names.items()}
    expected = outcome(scan_ops, LINEAR, scan | {"normalize": True, "output_final_state": True})
    torch.testing.assert_close((out[:, None], state, z), expected)
