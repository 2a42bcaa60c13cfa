"""The oracle itself, against answers small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from memkernels import reference

INF, NAN = np.inf, np.nan


def equal(actual, expected):
    np.testing.assert_array_equal(actual, expected)


# ---- product keys --------------------------------------------------------------------------------


def best(first, second, k):
    """Of one token and head whose halves score as given: scores and indices, as lists."""
    keys = np.array([first, second], dtype=float)[None, ..., None]
    scores, indices = reference.product_key_topk(np.ones((1, 1, 2, 1)), keys, k)
    assert scores.dtype == np.float64 and indices.dtype == np.int64
    return scores[0, 0].tolist(), indices[0, 0].tolist()


def test_best_pairs_come_first():
    assert best([1, 3], [10, 40], 2) == ([43, 41], [3, 1])
    assert best([5, 4, 0], [3, 0, 0], 3) == ([8, 7, 5], [0, 3, 1])


def test_equal_scores_come_in_order_of_their_indices():
    assert best([0, 0, 0], [1, 1, 1], 3) == ([1, 1, 1], [0, 1, 2])
    assert best([2, 1, 3], [1, 3, 2], 3) == ([6, 5, 5], [7, 1, 8])
    assert best([0.0, -0.0], [-0.0, 0.0], 2) == ([0, 0], [0, 1])


def test_the_order_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    for k in (1, 2, 5, 8):
        first, second = rng.integers(-2, 3, (2, 8)).astype(float)
        sums = (first[:, None] + second).ravel()
        order = np.argsort(-sums, kind="stable")[:k]
        assert best(first, second, k) == (sums[order].tolist(), order.tolist())


def test_nan_and_minus_infinity_are_never_found():
    assert best([NAN, 1, -INF], [2, NAN, 3], 3) == ([4, 3, -INF], [5, 3, -1])
    assert best([NAN, NAN], [1, 2], 2) == ([-INF, -INF], [-1, -1])
    assert best([INF, 0], [-INF, 1], 2) == ([INF, 1], [1, 3])


def test_of_an_infinite_half_the_best_partners_compete():
    assert best([1, 5], [INF, 0], 1) == ([INF], [2])
    assert best([1, 5], [INF, 0], 2) == ([INF, INF], [0, 2])


def test_heads_and_halves_have_keys_of_their_own():
    query = np.array([[[[1, 0], [0, 1]], [[0, 2], [2, 0]]]], dtype=float)
    keys = np.arange(16.0).reshape(2, 2, 2, 2)
    scores, indices = reference.product_key_topk(query, keys, 1)
    equal(scores[0, :, 0], [2 + 7, 2 * 11 + 2 * 14])
    equal(indices[0, :, 0], [3, 3])


# ---- bags ----------------------------------------------------------------------------------------

TABLE = np.array([[1.0, 10], [2, 20], [3, 30], [NAN, NAN]])


def test_sums_of_rows():
    equal(reference.embedding_bag(np.array([[0, 2], [1, 1]]), TABLE), [[4, 40], [4, 40]])
    weights = np.array([[2.0, 1], [0.5, -1]])
    out = reference.embedding_bag(np.array([[0, 2], [1, 1]]), TABLE, per_sample_weights=weights)
    equal(out, [[5, 50], [-1, -10]])


def test_minus_one_is_skipped_with_its_weight():
    weights = np.array([[NAN, 2.0], [NAN, NAN]])
    index = np.array([[-1, 1], [-1, -1]])
    equal(reference.embedding_bag(index, TABLE, per_sample_weights=weights), [[4, 40], [0, 0]])


def test_bags_end_where_the_next_begins():
    index, offsets = np.array([0, 1, 2, -1]), np.array([0, 2, 2, 3])
    equal(reference.embedding_bag(index, TABLE, offsets)[:, 0], [3, 0, 3, 0])
    equal(reference.embedding_bag(index[:0], TABLE, offsets[:1]), [[0, 0]])
    assert reference.embedding_bag(index[:0], TABLE, offsets[:0]).shape == (0, 2)
    assert reference.embedding_bag(np.zeros((2, 0), int), TABLE).tolist() == [[0, 0], [0, 0]]


def test_nan_reaches_only_the_bags_that_read_it():
    equal(reference.embedding_bag(np.array([[3], [0]]), TABLE), [[NAN, NAN], [1, 10]])
    zero = np.zeros((1, 1))
    equal(reference.embedding_bag(np.array([[3]]), TABLE, per_sample_weights=zero), [[NAN, NAN]])


def test_scales_are_those_of_blocks():
    weight = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int8)
    scales = np.array([[0.5, 2], [1, -1]], np.float32)
    out = reference.embedding_bag(np.array([[0], [1]]), weight, scales=scales)
    equal(out, [[0.5, 1, 6, 8], [5, 6, -7, -8]])
    exponents = np.array([[127, 130], [0, 255]], np.uint8)
    out = reference.embedding_bag(np.array([[0], [1]]), weight, scales=exponents)
    equal(out, [[1, 2, 24, 32], [5 * 2.0**-127, 6 * 2.0**-127, NAN, NAN]])


def test_rows_of_the_gradient_rise_and_duplicates_add_up():
    grad = np.array([[1.0, 2], [10, 20]])
    index = np.array([[5, -1, 2], [2, 2, 0]])
    rows, grads, count = reference.embedding_bag_backward(grad, index, 9)
    equal(rows, [0, 2, 5, -1, -1, -1])
    equal(grads, [[10, 20], [21, 42], [1, 2], [0, 0], [0, 0], [0, 0]])
    equal(count, [3])
    weights = np.array([[3.0, NAN, 1], [0, 2, 4]])
    _, grads, _ = reference.embedding_bag_backward(grad, index, 9, per_sample_weights=weights)
    equal(grads[:3], [[40, 80], [21, 42], [3, 6]])


def test_rows_of_the_gradient_of_flat_and_of_empty_bags():
    grad = np.array([[1.0], [NAN], [3]])
    index, offsets = np.array([4, 4, 1]), np.array([0, 2, 2])
    rows, grads, count = reference.embedding_bag_backward(grad, index, 5, offsets)
    equal(rows, [1, 4, -1])
    equal(grads, [[3], [2], [0]])
    equal(count, [2])
    rows, grads, count = reference.embedding_bag_backward(grad, np.zeros((3, 0), int), 5)
    assert rows.shape == (0,) and grads.shape == (0, 1) and count.tolist() == [0]


# ---- rows ----------------------------------------------------------------------------------------


def touched():
    """Row 2 gets 4; a row of -1, and what lies after the count, are not to be read."""
    rows, grads = np.array([-1, 2, 0]), np.array([[NAN], [4], [NAN]])
    return rows, grads, np.array([2])


def test_sgd_changes_the_rows_that_have_a_gradient():
    param = np.array([[1.0], [2], [3]])
    equal(reference.row_sgd(param, *touched(), lr=0.5), [[1], [2], [1]])
    equal(reference.row_sgd(param, *touched(), lr=0.5, weight_decay=1), [[1], [2], [3 - 3.5]])
    equal(param, [[1], [2], [3]])
    none = np.array([0])
    equal(reference.row_sgd(param, *touched()[:2], none, lr=1, weight_decay=1), param)


def test_adagrad_divides_by_the_root_of_all_squares():
    param, sum = np.array([[1.0], [2], [3]]), np.array([[7.0], [7], [9]])
    new, total = reference.row_adagrad(param, sum, *touched(), lr=5, eps=3)
    equal(new, [[1], [2], [3 - 5 * 4 / (5 + 3)]])
    equal(total, [[7], [7], [25]])
    equal(sum.ravel(), [7, 7, 9])


def test_adagrad_of_rows_adds_the_mean_of_squares():
    args = np.array([0]), np.array([[1.0, 7]]), np.array([1])
    new, total = reference.row_adagrad(np.zeros((1, 2)), np.array([11.0]), *args, lr=6, eps=0)
    equal(total, [36])
    equal(new, [[-1, -7]])


def test_the_first_step_of_adam_is_the_sign_of_the_gradient():
    param, zero = np.array([[1.0], [2], [3]]), np.zeros((3, 1))
    kwargs = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0}
    new, mean, square = reference.row_adam(param, zero, zero, *touched(), step=1, **kwargs)
    equal(new, [[1], [2], [2.5]])
    equal(mean, [[0], [0], [2]])
    equal(square, [[0], [0], [4]])
    assert not zero.any()


def test_adam_corrects_by_the_step_then_adds_eps_and_decays_apart():
    args = np.array([0]), np.array([[4.0]]), np.array([1])
    param, mean, square = np.array([[10.0]]), np.array([[2.0]]), np.array([[20.0]])
    kwargs = {"step": 2, "lr": 0.5, "betas": (0.5, 0.5), "eps": 1, "weight_decay": 0.25}
    new, mean, square = reference.row_adam(param, mean, square, *args, **kwargs)
    # Moments 3 and 18; over 3 / 4 they are 4 and 24.
    np.testing.assert_allclose(new, [[10 - 0.5 * 0.25 * 10 - 0.5 * 4 / (np.sqrt(24) + 1)]])
    equal([mean, square], [[[3]], [[18]]])


# ---- hashes --------------------------------------------------------------------------------------


def hashed(tokens, *, orders=(3,), multipliers=(1, 16, 256), heads=1, **kwargs):
    """Of ids below 16 the digits of what is returned are the token, its predecessor, ..."""
    many = len(orders) * heads
    moduli, offsets = np.full(many, 1 << 40), np.zeros(many, int)
    kwargs.setdefault("pad_id", 15)
    tokens, multipliers = np.atleast_2d(tokens), np.array(multipliers)[: max(orders)]
    rows = reference.ngram_hash(tokens, multipliers, moduli, offsets, orders=orders, **kwargs)
    assert rows.dtype == np.int64
    return rows


def digits(*args, **kwargs):
    """Of one head, in hexadecimal: the latest id last."""
    return [f"{row:03x}" if row >= 0 else "" for row in hashed(*args, **kwargs).ravel().tolist()]


def test_ngrams_end_at_their_token():
    assert digits([1, 2, 3, 4]) == ["ff1", "f12", "123", "234"]
    assert digits([1, 2, 3], orders=[1]) == ["001", "002", "003"]
    assert digits([1, 2, 3], orders=[2]) == ["0f1", "012", "023"]
    assert digits([1], pad_id=0) == ["001"]
    assert digits(np.zeros((1, 0), int)) == []


def test_orders_have_heads_of_their_own():
    moduli, offsets = np.array([5, 7, 11, 13]), np.array([0, 100, 200, 300])
    args = np.array([[3, 4]]), np.array([1, 16]), moduli, offsets
    rows = reference.ngram_hash(*args, orders=[2, 1])
    mix = 4 ^ 3 * 16
    equal(rows[0, 1], [mix % 5, mix % 7 + 100, 4 + 200, 4 + 300])
    equal(rows[0, 0], [3, 3 + 100, 3 + 200, 3 + 300])


def test_past_ids_stand_before_the_sequence():
    assert digits([1, 2], past_ids=np.array([[8, 9]])) == ["891", "912"]
    past = np.array([[8, 9], [6, 7]])
    assert digits([[1, 2], [3, 4]], past_ids=past) == ["891", "912", "673", "734"]


def test_packed_sequences_do_not_see_each_other():
    bounds = np.array([0, 2, 2, 3])
    assert digits([1, 2, 3], cu_seqlens=bounds) == ["ff1", "f12", "ff3"]
    past = np.array([[8, 9], [6, 7], [4, 5]])
    assert digits([1, 2, 3], cu_seqlens=bounds, past_ids=past) == ["891", "912", "453"]


def test_an_ngram_does_not_reach_over_an_eos():
    tokens = [1, 2, 0xE, 3, 4, 5]
    assert digits(tokens, eos_id=0xE) == ["ff1", "f12", "12e", "ee3", "e34", "345"]
    assert digits([0xE, 0xE, 1], eos_id=0xE) == ["ffe", "eee", "ee1"]
    past = np.array([[7, 0xE]])
    assert digits([1, 2], eos_id=0xE, past_ids=past) == ["ee1", "e12"]
    assert digits([1, 2], eos_id=0xE, past_ids=past[:, ::-1]) == ["e71", "712"]
    assert digits([1], eos_id=0xE, pad_id=0xE) == ["ee1"]


def test_what_an_eos_hides_stays_hidden():
    tokens, multipliers = [1, 0xE, 2, 3, 4], (1, 16, 256, 4096)
    kwargs = {"orders": [4], "multipliers": multipliers, "eos_id": 0xE}
    assert digits(tokens, **kwargs) == ["fff1", "ff1e", "eee2", "ee23", "e234"]


def test_a_negative_id_blocks_the_ngrams_that_hold_it():
    assert digits([1, -1, 2, 3, 4]) == ["ff1", "", "", "", "234"]
    assert digits([1, -7, 2], orders=[2]) == ["0f1", "", ""]
    assert digits([1, 2, 3], pad_id=-1) == ["", "", "123"]
    assert digits([1, 2], past_ids=np.array([[-1, 9]])) == ["", "912"]
    # Behind an eos it is not read.
    assert digits([-1, 0xE, 2], eos_id=0xE) == ["", "", "ee2"]
    equal(hashed([1, -1, 2], orders=(1, 2), heads=2)[0, 2], [2, 2, -1, -1])


def test_products_wrap_and_the_modulo_is_floored():
    def row(token, multiplier, modulus, offset=0):
        arrays = [np.array([x]) for x in (multiplier, modulus, offset)]
        return reference.ngram_hash(np.array([[token]], np.int32), *arrays, orders=[1]).item()

    big = 2**62
    assert row(3, big, 1000) == -big % 1000 == 96
    assert row(2, big, 1000) == -(2**63) % 1000
    assert row(4, big, 1000) == 0
    assert row(5, 7, 8, offset=10**12) == 10**12 + 3


# ---- gates ---------------------------------------------------------------------------------------


def gate(d, sign="zero"):
    """Of vectors of one channel: both norms leave the sign, so that d is what the weight says."""
    one = np.ones((1, 1, 1))
    args = one, one, np.ones((1, 1)), np.full((1, 1), d)
    return reference.engram_gate(*args, eps=0, sign=sign).item()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_gates_are_sigmoids_of_signed_roots():
    np.testing.assert_allclose([gate(4.0), gate(-9.0)], [sigmoid(2), sigmoid(-3)])
    assert gate(INF) == 1 and gate(-INF) == 0
    assert np.isnan(gate(NAN)) and np.isnan(gate(NAN, "copy"))


def test_small_matches_are_clamped_with_their_sign():
    for d in (1e-9, 1e-6):
        np.testing.assert_allclose([gate(d), gate(-d)], sigmoid(np.array([1e-3, -1e-3])))
    assert gate(0.0) == gate(-0.0) == 0.5
    # A sum of zeros begins with a positive one.
    np.testing.assert_allclose([gate(0.0, "copy"), gate(-0.0, "copy")], sigmoid(1e-3))
    np.testing.assert_allclose(gate(-5e-324, "copy"), sigmoid(-1e-3))


def test_both_sides_are_normed_and_values_are_shared():
    hidden, k = np.array([[[3.0, 4], [1, 0]]]), np.array([[[4.0, 3], [0, 2]]])
    v, weight = np.array([[10.0, -20]]), np.array([[1.0, 3], [5, 5]])
    out = reference.engram_gate(hidden, k, v, weight, eps=1)
    d = (3 * 4 * 1 + 4 * 3 * 3) / 13.5 / np.sqrt(2)
    np.testing.assert_allclose(out[0, 0], sigmoid(np.sqrt(d)) * v[0])
    equal(out[0, 1], 0.5 * v[0])


# ---- codes ---------------------------------------------------------------------------------------


def test_the_first_bit_is_the_highest_and_zero_is_positive():
    z = np.array([[[1.0, -1, -1], [-2, 0, -0.0], [NAN, -INF, INF]]])
    codes, _ = reference.lsh_codes(z)
    assert codes.dtype == np.int32
    equal(codes, [[4, 3, 1]])
    equal(reference.lsh_codes(np.ones((1, 1, 30)))[0], [[2**30 - 1]])


def test_scores_of_codes():
    log2 = np.log(2)  # 1 + exp(-2 log 2) is 5 / 4
    z = np.array([[[log2, -log2], [0, 0], [0, log2], [1000, -3], [INF, 1], [NAN, 1]]])
    _, scores = reference.lsh_codes(z)
    expected = [2 * log2 * 16 / 25, 0, log2 * 4 / 5 / 2, 1003 / (1 + np.exp(-6)), INF, NAN]
    np.testing.assert_allclose(scores, [expected])


# ---- networks ------------------------------------------------------------------------------------


def test_neurons_add_what_they_are_worth():
    x, up = np.array([[1.0, 2], [NAN, 0]]), np.array([[1.0, 1], [-1, 0], [NAN, NAN]])
    down = np.array([[10.0], [1], [NAN]])
    index = np.array([[0, 1, 0, -1], [-1, -1, -1, -1]])
    weights = np.array([[1.0, 2, 0.5, NAN], [1, 1, 1, 1]])
    out = reference.sparse_ffn(x, up, down, index, activation="none")
    equal(out, [[3 * 10 - 1 + 3 * 10], [0]])
    out = reference.sparse_ffn(x, up, down, index, weights, activation="none")
    equal(out, [[3 * 10 - 2 + 0.5 * 3 * 10], [0]])
    out = reference.sparse_ffn(x, up, down, index, weights, activation="relu")
    equal(out, [[3 * 10 + 0.5 * 3 * 10], [0]])


@pytest.mark.parametrize(
    ("activation", "one"),
    [
        ("gelu", 0.8413447460685429),
        ("gelu_tanh", 0.8411919906082768),
        ("silu", 0.7310585786300049),
        ("relu", 1),
        ("none", 1),
    ],
)
def test_activations(activation, one):
    args = np.ones((1, 1)), np.array([[1.0], [-1]]), np.eye(2), np.array([[0, 1]])
    out = reference.sparse_ffn(*args, activation=activation)
    # Of the smooth ones f(x) - f(-x) is x.
    other = {"relu": 0, "none": -1}.get(activation, one - 1)
    np.testing.assert_allclose(out, [[one, other]], rtol=1e-12)
