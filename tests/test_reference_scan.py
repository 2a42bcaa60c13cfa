"""The oracle itself, against answers small enough to work out by hand, and identities."""

from __future__ import annotations

import numpy as np
import pytest

from memkernels import reference

LN2 = np.log(2)
INF, NAN = np.inf, np.nan


def equal(actual, expected):
    np.testing.assert_array_equal(actual, expected)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def numbers(*values):
    """Of one sequence, head and channel: ``[1, T, 1, 1]``."""
    return np.array(values, dtype=float).reshape(1, -1, 1, 1)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ---- linear attention ----------------------------------------------------------------------------


def linear(q, k, v, g=None, **options):
    """Of one head and channel: o as a list."""
    out, *_ = reference.linear_attention(*(numbers(*x) for x in (q, k, v)), g, **options)
    return out.ravel().tolist()


def test_a_state_sums_up_what_is_written():
    assert linear([1, 1, 2], [1, 2, 0], [3, 5, 7], scale=1.0) == [3, 13, 26]
    assert linear([1, 1, 2], [1, 2, 0], [3, 5, 7], scale=0.5) == [1.5, 6.5, 13]


def test_the_token_is_written_before_it_is_read_and_forgets_before_it_is_written():
    halves = np.full((1, 3, 1), -LN2)
    close(linear([1, 1, 1], [1, 1, 1], [4, 8, 16], halves), [4, 10, 21])
    resets = np.array([0, -INF, 0]).reshape(1, 3, 1)
    assert linear([1, 1, 1], [1, 1, 1], [4, 8, 16], resets) == [4, 8, 24]


def test_gates_of_heads_tokens_and_channels():
    q, k, v = draw(1, 4, 2, 3), draw(1, 4, 2, 3), draw(1, 4, 2, 5)
    g = np.array([-0.5, -1])
    expected = reference.linear_attention(q, k, v, g)[0]
    equal(reference.linear_attention(q, k, v, np.broadcast_to(g, (1, 4, 2)))[0], expected)
    channels = np.broadcast_to(g[:, None], (1, 4, 2, 3))
    equal(reference.linear_attention(q, k, v, channels)[0], expected)
    channels = channels.copy()
    channels[..., 1] = -INF
    out = reference.linear_attention(q, k, v, channels)[0]
    assert not np.allclose(out, expected)
    q = q * np.array([1, 0, 1])
    equal(reference.linear_attention(q, k, v, channels)[0],
          reference.linear_attention(q, k, v, g)[0])  # fmt: skip


def test_linear_attention_is_its_sums():
    q, k, v, g = draw(2, 6, 1, 3), draw(2, 6, 1, 3, seed=1), draw(2, 6, 2, 5), -(draw(2, 6, 2) ** 2)
    start, start_z = draw(2, 2, 3, 5), draw(2, 2, 3)
    total = g.cumsum(1)
    sums, keys = np.zeros((2, 6, 2, 5)), np.zeros((2, 6, 2))
    for b, t, h in np.ndindex(2, 6, 2):
        sums[b, t, h] = np.exp(total[b, t, h]) * q[b, t, 0] @ start[b, h]
        keys[b, t, h] = np.exp(total[b, t, h]) * q[b, t, 0] @ start_z[b, h]
        for s in range(t + 1):
            weight = np.exp(total[b, t, h] - total[b, s, h]) * (q[b, t, 0] @ k[b, s, 0])
            sums[b, t, h] += weight * v[b, s, h]
            keys[b, t, h] += weight
    close(reference.linear_attention(q, k, v, g, start)[0], 3**-0.5 * sums)
    options = {"scale": 0.7, "normalize": True, "eps": 0.01}
    out = reference.linear_attention(q, k, v, g, start, start_z, **options)[0]
    close(out, 0.7 * sums / (0.7 * keys + 0.01)[..., None])


def test_states_are_what_was_written():
    k, v = draw(1, 4, 1, 3), draw(1, 4, 1, 2)
    arguments = k, k, v, None, draw(1, 1, 3, 2), draw(1, 1, 3)
    options = {"normalize": True, "output_final_state": True}
    _, state, z = reference.linear_attention(*arguments, **options)
    close(state[0, 0], arguments[4][0, 0] + k[0, :, 0].T @ v[0, :, 0])
    close(z[0, 0], arguments[5][0, 0] + k[0, :, 0].sum(0))
    assert reference.linear_attention(*arguments[:5])[1:] == (None, None)
    assert reference.linear_attention(*arguments[:5], output_final_state=True)[2] is None


# ---- the delta rule ------------------------------------------------------------------------------


def test_a_delta_overwrites():
    k, v = numbers(1, 1, 2), numbers(5, 9, 4)
    out, state = reference.delta_rule(
        k, k, v, np.ones((1, 3, 1)), scale=1.0, output_final_state=True
    )
    assert out.ravel().tolist() == [5, 9, 2 * (9 + 2 * (4 - 2 * 9))]
    assert state.item() == 9 + 2 * (4 - 2 * 9)


def test_half_a_delta():
    k, v = numbers(1, 1), numbers(8, 0)
    out, _ = reference.delta_rule(k, k, v, np.full((1, 2, 1), 0.5), scale=1.0)
    assert out.ravel().tolist() == [4, 2]


def test_what_is_forgotten_is_not_taken_back():
    """The state decays first, and then is compared with the value."""
    k, v = numbers(1, 1), numbers(8, 8)
    resets = np.array([0, -INF]).reshape(1, 2, 1)
    out, state = reference.delta_rule(
        k, k, v, np.ones((1, 2, 1)), resets, scale=1.0, output_final_state=True
    )
    assert out.ravel().tolist() == [8, 8] and state.item() == 8


def test_beta_of_zero_leaves_what_decays():
    q, k, v, g = draw(1, 5, 1, 3), draw(1, 5, 1, 3), draw(1, 5, 1, 2), -(draw(1, 5, 1, 3) ** 2)
    start = draw(1, 1, 3, 2)
    out, state = reference.delta_rule(
        q, k, v, np.zeros((1, 5, 1)), g, start, output_final_state=True
    )
    expected = np.exp(g.cumsum(1)[0, :, 0])[..., None] * start[0, 0]
    close(state[0, 0], expected[-1])
    close(out[0, :, 0], 3**-0.5 * (q[0, :, 0, :, None] * expected).sum(1))


def test_rows_of_length_one():
    q, k, v, beta = draw(1, 5, 1, 3), draw(1, 5, 1, 3), draw(1, 5, 2, 2), draw(1, 5, 2) ** 2
    unit = [x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k)]
    close(reference.delta_rule(q, k, v, beta, qk_l2norm=True)[0],
          reference.delta_rule(*unit, v, beta)[0])  # fmt: skip


# ---- what is made of linear attention ------------------------------------------------------------


def test_a_segment_sees_the_old_memory():
    k, v = numbers(2, 3), numbers(10, 20)
    state, z = np.full((1, 1, 1, 1), 6.0), np.full((1, 1, 1), 2.0)
    new, new_z = reference.infini_update(k, v, state, z, eps=0)
    assert new.item() == 6 + 2 * (10 - 3) + 3 * (20 - 3) and new_z.item() == 7
    new, new_z = reference.infini_update(k, v, state, z, delta=False)
    assert new.item() == 6 + 20 + 60 and new_z.item() == 7
    assert state.item() == 6 and z.item() == 2


def test_ssd_is_linear_attention():
    x, B, C = draw(1, 6, 4, 3), draw(1, 6, 2, 5), draw(1, 6, 2, 5, seed=1)
    dt, A, D, z = draw(1, 6, 4) ** 2, -(draw(4) ** 2), draw(4), draw(1, 6, 4, 3, seed=2)
    start = draw(1, 4, 3, 5)
    y, states = reference.ssd(x, dt, A, B, C, D, z, initial_states=start, return_final_states=True)
    linear, state, _ = reference.linear_attention(
        C, B, x * dt[..., None], dt * A, start.swapaxes(2, 3), scale=1.0, output_final_state=True
    )
    close(y, (linear + D[:, None] * x) * z / (1 + np.exp(-z)))
    close(states, state.swapaxes(2, 3))


def test_steps_of_ssd_have_bounds():
    x, B = draw(1, 3, 1, 2), draw(1, 3, 1, 4)
    dt, A, bias = numbers(-9, 0, 9)[..., 0], np.array([-1.0]), np.array([1.0])
    options = {"dt_bias": bias, "dt_softplus": True, "dt_limit": (0.5, 2.0)}
    expected = np.clip(np.log1p(np.exp(dt + bias)), 0.5, 2)
    close(reference.ssd(x, dt, A, B, B, **options), reference.ssd(x, expected, A, B, B))


# ---- channels ------------------------------------------------------------------------------------


def test_selective_scan_by_hand():
    u, delta = np.array([[[2.0], [4]]]), np.array([[[1.0], [0.5]]])
    A, B, C = np.array([[-LN2, 0]]), np.array([[[[3.0, 1]], [[1, 5]]]]), np.ones((1, 2, 1, 2))
    out, state = reference.selective_scan(u, delta, A, B, C, output_final_state=True)
    close(out.ravel(), [6 + 2, 6 * 0.5**0.5 + 2 + 2 + 10])
    close(state.ravel(), [6 * 0.5**0.5 + 2, 2 + 10])
    D, z = np.array([10.0]), np.array([[[0.0], [1]]])
    close(reference.selective_scan(u, delta, A, B, C, D)[0].ravel(), out.ravel() + D * u.ravel())
    close(reference.selective_scan(u, delta, A, B, C, z=z)[0].ravel(),
          [0, out[0, 1, 0] / (1 + np.exp(-1))])  # fmt: skip


def test_delta_of_a_selective_scan():
    u, delta, A = draw(1, 5, 4), draw(1, 5, 4, seed=1), -(draw(4, 3) ** 2)
    B, C, bias = draw(1, 5, 2, 3), draw(1, 5, 2, 3, seed=1), draw(4)
    soft = np.log1p(np.exp(delta + bias))
    close(reference.selective_scan(u, delta, A, B, C, delta_bias=bias, delta_softplus=True)[0],
          reference.selective_scan(u, soft, A, B, C)[0])  # fmt: skip
    close(reference.selective_scan(u, delta, A, B, C, delta_bias=bias)[0],
          reference.selective_scan(u, delta + bias, A, B, C)[0])  # fmt: skip
    for group in 0, 1:
        mine, channels = slice(group, group + 1), slice(2 * group, 2 * group + 2)
        alone = reference.selective_scan(
            u[..., channels], soft[..., channels], A[channels], B[:, :, mine], C[:, :, mine]
        )
        equal(alone[0], reference.selective_scan(u, soft, A, B, C)[0][..., channels])


def test_diagonal_scan_by_hand():
    x, a = numbers(1, 2, 4)[..., 0], numbers(NAN, 3, 0)[..., 0]
    reset = np.array([[False, False, False]])
    equal(reference.diagonal_scan(x[:, 1:], a[:, 1:])[0].ravel(), [2, 4])
    start = np.array([[5.0]])
    h, state = reference.diagonal_scan(x[:, 1:], a[:, 1:], start, output_final_state=True)
    equal(h.ravel(), [17, 4])
    equal(state, [[4]])
    constant = np.array([-1.0])
    equal(reference.diagonal_scan(x, constant, start, reset)[0].ravel(), [-4, 6, -2])
    reset[0, 1] = True
    equal(reference.diagonal_scan(x, constant, start, reset)[0].ravel(), [-4, 2, 2])
    h, _ = reference.diagonal_scan(np.ones((1, 3, 1), dtype=complex), np.array([1j]))
    equal(h.ravel(), [1, 1 + 1j, 1j])


def test_a_reset_forgets_infinities():
    x = numbers(INF, 1, 1)[..., 0]
    reset = np.array([[False, True, False]])
    equal(reference.diagonal_scan(x, np.array([0.5]), None, reset)[0].ravel(), [INF, 1, 1.5])


@pytest.mark.parametrize("dilation", [1, 3])
def test_convolutions_are_numpys(dilation):
    x, weight, bias, start = draw(2, 9, 3), draw(3, 4), draw(3), draw(2, 3, 3 * dilation)
    out, state = reference.causal_conv1d(
        x, weight, bias, start, dilation=dilation, output_final_state=True
    )
    for b, d in np.ndindex(2, 3):
        spread = np.zeros(3 * dilation + 1)
        spread[::dilation] = weight[d]
        inputs = np.concatenate([start[b, d], x[b, :, d]])
        close(out[b, :, d], np.convolve(inputs, spread[::-1], "valid") + bias[d])
        equal(state[b, d], inputs[9:])
    close(reference.causal_conv1d(x, weight, bias, start, dilation=dilation, activation="silu")[0],
          out / (1 + np.exp(-out)))  # fmt: skip


# ---- features ------------------------------------------------------------------------------------


def test_features_by_hand():
    equal(reference.feature_map(np.array([2.0, 0, -LN2]), "elu1").round(12), [3, 1, 0.5])
    equal(reference.feature_map(np.array([2.0, 0, -3]), "relu2"), [4, 0, 0])
    root = np.sqrt(2)
    close(reference.feature_map(np.array([3.0, 5]), "taylor2"),
          [1, 3 / root**0.5, 5 / root**0.5, 9 / 2, 15 / root, 25 / 2])  # fmt: skip
    # r = [2, 0, 0, 3]
    equal(reference.feature_map(np.array([2.0, -3]), "dpfp", nu=2), [6, 0, 0, 0, 0, 0, 0, 0])
    equal(reference.feature_map(np.array([2.0, 5]), "dpfp", nu=1), [0, 10, 0, 0])
    equal(reference.feature_map(np.array([2.0]), "dpfp", nu=4), [0, 0, 4, 0, 0, 0, 4, 0])


def test_dot_products_of_taylor_features():
    for dim in 1, 2, 16:
        q, k = draw(7, dim), draw(7, dim, seed=1)
        s = (q * k).sum(-1) / np.sqrt(dim)
        features = reference.feature_map(q, "taylor2") * reference.feature_map(k, "taylor2")
        assert features.shape == (7, 1 + dim + dim * (dim + 1) // 2)
        close(features.sum(-1), 1 + s + s**2 / 2)


# ---- routes --------------------------------------------------------------------------------------


def test_routes_by_hand():
    ids = np.array([[2, 0], [0, -1], [2, 2]])
    order, cu_seqlens, inverse = reference.route_indices(ids, 4)
    assert order.tolist() == [0, 1, 0, 2, 2, -1]
    assert cu_seqlens.tolist() == [0, 2, 2, 5, 5, 6] and cu_seqlens.dtype == np.int32
    assert inverse.tolist() == [[2, 0], [1, -1], [3, 4]]
    x = np.array([[1.0, 10], [2, 20], [3, 30]])
    rows, *_ = reference.route_tokens(x, ids, 4)
    equal(rows[:, 1], [10, 20, 10, 30, 30, 0])
    equal(reference.unroute_tokens(rows, inverse), [[2, 20], [2, 20], [6, 60]])
    weights = np.array([[1, 0.5], [3, NAN], [0, 2]])
    equal(reference.unroute_tokens(rows, inverse, weights)[:, 0], [1.5, 6, 6])


def test_no_tokens_and_no_memories():
    order, cu_seqlens, inverse = reference.route_indices(np.zeros((0, 2), dtype=int), 3)
    assert order.shape == (0,) and inverse.shape == (0, 2) and not cu_seqlens.any()
    order, cu_seqlens, inverse = reference.route_indices(np.full((3, 1), -1), 0)
    assert (order == -1).all() and (inverse == -1).all() and cu_seqlens.tolist() == [0, 3]


# ---- sequences -----------------------------------------------------------------------------------

SCANS = {
    "linear_attention": lambda t: (
        {"q": draw(2, t, 1, 3), "k": draw(2, t, 1, 3), "v": draw(2, t, 2, 5),
         "g": -(draw(2, t, 2, 3) ** 2), "normalize": True},
        {"initial_state": draw(2, 2, 3, 5), "initial_z": draw(2, 2, 3)},
    ),
    "delta_rule": lambda t: (
        {"q": draw(2, t, 1, 3), "k": draw(2, t, 1, 3), "v": draw(2, t, 2, 5),
         "beta": draw(2, t, 2), "g": -(draw(2, t, 2) ** 2)},
        {"initial_state": draw(2, 2, 3, 5)},
    ),
    "selective_scan": lambda t: (
        {"u": draw(2, t, 4), "delta": draw(2, t, 4), "A": draw(4, 3), "B": draw(2, t, 2, 3),
         "C": draw(2, t, 2, 3), "z": draw(2, t, 4), "D": draw(4)},
        {"initial_state": draw(2, 4, 3)},
    ),
    "diagonal_scan": lambda t: (
        {"x": draw(2, t, 4), "a": draw(2, t, 4), "reset": draw(2, t) > 1},
        {"initial_state": draw(2, 4)},
    ),
    "causal_conv1d": lambda t: (
        {"x": draw(2, t, 4), "weight": draw(4, 3), "dilation": 2},
        {"initial_state": draw(2, 4, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", SCANS)
def test_two_parts_are_the_whole(op):
    function = getattr(reference, op)
    length = 9
    arguments, states = SCANS[op](length)
    options = arguments | {"output_final_state": True}
    out, *last = function(**options, **states)
    for at in 0, 1, 4, 9:
        parts = [
            {n: x[:, part] if np.shape(x)[:2] == (2, length) else x for n, x in options.items()}
            for part in (slice(at), slice(at, None))
        ]
        first, *between = function(**parts[0], **states)
        second, *end = function(**parts[1], **dict(zip(states, between, strict=False)))
        equal(np.concatenate([first, second], 1), out)
        for state, expected in zip(end, last, strict=True):
            equal(state, expected)


@pytest.mark.parametrize("op", SCANS)
def test_packed_sequences_are_rows(op):
    function = getattr(reference, op)
    arguments, states = SCANS[op](4)
    options = arguments | {"output_final_state": True}
    out, *last = function(**options, **states)
    packed = {
        n: x.reshape(1, 8, *x.shape[2:]) if np.shape(x)[:2] == (2, 4) and n != "A" else x
        for n, x in options.items()
    }
    several = {n: np.stack([s[0], s[0], s[1]]) for n, s in states.items()}
    together, *ends = function(**packed, **several, cu_seqlens=np.array([0, 4, 4, 8]))
    equal(together.reshape(out.shape), out)
    for end, state, start in zip(ends, last, states.values(), strict=False):
        equal(end[[0, 2]], state)
        equal(end[1], start[0])
    nothing = {n: s[:0] for n, s in states.items()}
    empty = {n: x[:, :0] if np.shape(x)[:2] == (1, 8) else x for n, x in packed.items()}
    out, *ends = function(**empty, **nothing, cu_seqlens=np.array([0]))
    assert out.shape[:2] == (1, 0) and len(ends[0]) == 0


# ---- steps ---------------------------------------------------------------------------------------


def test_steps_write_the_slots_of_their_rows():
    q, k, v = np.ones((3, 1, 1)), np.ones((3, 1, 1)), np.array([1.0, NAN, 3]).reshape(3, 1, 1)
    pool = np.array([10.0, NAN, 30, NAN]).reshape(4, 1, 1, 1)
    slots = np.array([2, -1, 0])
    out, after = reference.linear_attention_step(q, k, v, pool, state_indices=slots, scale=1.0)
    equal(out.ravel(), [31, 0, 13])
    equal(after.ravel(), [13, NAN, 31, NAN])
    z = np.array([1.0, NAN, 3, NAN]).reshape(4, 1, 1)
    out, after, z = reference.linear_attention_step(q, k, v, pool, z, None, slots, eps=0)
    close(out.ravel(), [31 / 4, 0, 13 / 2])
    equal(z.ravel(), [2, NAN, 4, NAN])
    equal(pool.ravel(), [10, NAN, 30, NAN])


def test_a_convolution_step_moves_its_inputs_on():
    x, weight = np.array([[5.0, 7]]), np.array([[1.0, 10], [100, 0]])
    pool = np.array([[[1.0, 2], [3, 4]]])
    out, after = reference.causal_conv1d_step(x, weight, pool, dilation=2)
    equal(out, [[51, 300]])
    equal(after, [[[2, 5], [4, 7]]])
