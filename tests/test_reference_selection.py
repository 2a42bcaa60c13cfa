"""The oracle itself, against answers small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from memkernels import reference

INF, NAN = np.inf, np.nan


def equal(actual, expected):
    np.testing.assert_array_equal(actual, expected)


# ---- summaries -----------------------------------------------------------------------------------


def summaries(tokens, table, lengths, kind="mean"):
    """Of pages of two tokens with one channel, without dimensions of size 1."""
    cache = np.array(tokens, dtype=float).reshape(-1, 2, 1, 1)
    summary = reference.summarize_keys(cache, np.array(table), np.array(lengths), kind=kind)
    return summary[:, 0, ..., 0]


def test_summaries_of_pages_by_their_fill():
    """Token j of the only sequence is j; page 0 is the second and holds one token of its two."""
    tokens = [2, NAN], [NAN, NAN], [0, 1]
    equal(summaries(tokens, [[2, 0, 99]], [3]), [2, 0, 0.5])
    equal(summaries(tokens, [[2, 0, 99]], [3], "minmax"), [[2, 2], [0, 0], [0, 1]])


def test_summaries_of_absent_pages_and_of_no_sequences():
    tokens = [1, 2], [3, 4]
    equal(summaries(tokens, [[-1, 0]], [4]), [1.5, 0])
    equal(summaries(tokens, [[-1, -1]], [4]), [0, 0])
    equal(summaries(tokens, [[0, 1]], [0]), [0, 0])
    equal(summaries(tokens, np.zeros((0, 2), int), []), [0, 0])


def test_a_shared_page_counts_as_far_as_the_longest_sequence_fills_it():
    tokens = [1, 2], [3, NAN]
    equal(summaries(tokens, [[0], [0]], [1, 2]), [1.5, 0])
    equal(summaries(tokens, [[0], [0]], [1, 1]), [1, 0])
    # The page is the second of one sequence, and there short; the first of another, and there full.
    equal(summaries(tokens, [[1, 0], [0, -1]], [3, 2]), [1.5, NAN])
    equal(summaries(tokens, [[0, 0]], [3]), [1.5, 0])


def test_nan_of_a_key_makes_both_extrema_nan():
    equal(summaries([[1, NAN], [-INF, 5]], [[0, 1]], [4], "minmax"), [[NAN, NAN], [-INF, 5]])
    equal(summaries([[1, NAN], [-INF, 5]], [[0, 1]], [4]), [NAN, -INF])


def test_summaries_of_heads_and_channels():
    cache = np.arange(8.0).reshape(1, 2, 2, 2)
    args = cache, np.array([[0]]), np.array([2])
    equal(reference.summarize_keys(*args, kind="mean"), [[[2, 3], [4, 5]]])
    extrema = reference.summarize_keys(*args)
    equal(extrema, [[[[0, 1], [4, 5]], [[2, 3], [6, 7]]]])
    assert reference.summarize_keys(cache.astype(np.float32), *args[1:]).dtype == np.float32


@pytest.mark.parametrize(
    ("lengths", "num_new", "touched"),
    [
        ([5], 1, [2]),
        ([5], 2, [1, 2]),
        ([4], 1, [1]),
        ([4], 2, [1]),
        ([4], 3, [0, 1]),
        ([4], 9, [0, 1]),
        ([5], 0, []),
        ([0], 3, []),
        ([5], [1], [2]),
        ([5, 3], [0, 2], [3, 4]),
    ],
)
def test_updates_touch_pages_with_new_tokens(lengths, num_new, touched):
    cache = np.arange(1.0, 13).reshape(6, 2, 1, 1)
    table = np.array([[0, 1, 2], [3, 4, 5]])[: len(lengths)]
    old = np.full((6, 1, 1), 7.0)
    num_new = num_new if isinstance(num_new, int) else np.array(num_new)
    new = reference.update_summaries(old, cache, table, np.array(lengths), num_new)
    equal(np.flatnonzero(new != 7), touched)
    fresh = reference.summarize_keys(cache, table, np.array(lengths), kind="mean")
    equal(new[touched], fresh[touched])
    assert (old == 7).all()


def test_updates_of_extrema_and_of_a_page_that_another_sequence_fills():
    cache = np.array([1.0, 5]).reshape(1, 2, 1, 1)
    old = np.zeros((1, 1, 2, 1))
    args = cache, np.array([[0], [0]]), np.array([1, 2])
    equal(reference.update_summaries(old, *args, np.array([1, 0])).ravel(), [1, 5])


# ---- scores --------------------------------------------------------------------------------------


def scores(q, summary, length, kind="mean", page_size=2, **kwargs):
    """Of the queries ``[n, heads, D]`` of one sequence with pages in order, for one KV head."""
    q, summary = np.array(q, dtype=float), np.array(summary, dtype=float)[:, None]
    table, offsets = np.arange(len(summary))[None], np.array([0, len(q)])
    args = q, summary, table, np.array([length]), page_size, offsets
    return reference.score_pages(*args, kind=kind, **{"scale": 1, **kwargs})[:, 0]


def test_scores_of_means():
    equal(scores([[[1, 2]]], [[3, 4], [5, -6]], 4), [[11, -7]])


def test_scores_of_extrema_bound_the_logits():
    """The page holds keys between (-1, 2) and (3, 4)."""
    box = [[[-1, 2], [3, 4]]]
    queries = [[[1, 1]], [[-1, 1]], [[1, -1]], [[-1, -1]], [[0, 0]]]
    bounds = scores(queries, box, 2, "minmax", causal=False)
    equal(bounds[:, 0], [3 + 4, 1 + 4, 3 - 2, 1 - 2, 0])


def test_scores_of_infinite_extrema_are_what_arithmetic_says():
    equal(scores([[[2]], [[-2]]], [[[-INF], [5]]], 2, "minmax", causal=False), [[NAN], [INF]])


def test_pages_outside_the_sequence_and_after_the_query_are_hidden():
    pages = [[1], [2], [3]]
    queries = [[[1]]] * 4
    visible = [[1, -INF, -INF], [1, 2, -INF], [1, 2, -INF], [1, 2, 3]]
    equal(scores(queries, pages, 5), visible)
    equal(scores(queries, pages, 5, causal=False), [[1, 2, 3]] * 4)
    equal(scores(queries, pages, 4, causal=False), [[1, 2, -INF]] * 4)
    equal(scores(queries, pages, 2), [[-INF] * 3, [-INF] * 3, [1, -INF, -INF], [1, -INF, -INF]])
    equal(scores(queries, pages, 0), [[-INF] * 3] * 4)


def test_scores_of_a_group():
    pages = [[1], [-2]]
    q = [[[1], [4]]]
    equal(scores(q, pages, 4), [[4, -2]])
    equal(scores(q, pages, 4, group_reduce="sum"), [[5, -10]])
    equal(scores(q, pages, 4, group_reduce="mean"), [[2.5, -5]])
    # A negative scale turns the order round before the maximum is taken.
    equal(scores(q, pages, 4, scale=-1), [[-1, 8]])


def test_scores_scale_by_the_head_dim_and_look_pages_up():
    q, summary = np.ones((2, 4, 4)), np.arange(4.0).reshape(2, 2, 1) * np.ones(4)
    table = np.array([[1, -1, 0], [0, 99, 99]])
    result = reference.score_pages(q, summary, table, np.array([5, 2]), 2, kind="mean")
    equal(result[0], [[4, -INF, 0], [6, -INF, 2]])
    equal(result[1], [[0, -INF, -INF], [2, -INF, -INF]])


# ---- select --------------------------------------------------------------------------------------


def selected(scores, k, *args, **kwargs):
    result = reference.select_topk(np.array(scores, dtype=float), k, *args, **kwargs)
    assert result.dtype == np.int32
    return result.tolist()


def test_the_largest_in_rising_order():
    assert selected([3, 1, 2, 5], 2) == [0, 3]
    assert selected([3, 1], 4) == [0, 1, -1, -1]
    assert selected([], 2) == [-1, -1]
    assert selected([3, 1], 0) == []


def test_equal_scores_go_to_the_lower_index():
    assert selected([1, 2, 2, 2, 1], 2) == [1, 2]
    assert selected([-0.0, 0.0, -0.0], 2) == [0, 1]
    assert selected([0.0, -0.0, 5], 2) == [0, 2]


def test_nan_and_minus_infinity_are_never_selected():
    assert selected([NAN, -INF, 1, INF], 4) == [2, 3, -1, -1]
    assert selected([NAN, NAN], 1) == [-1]


def test_kept_ends_count_and_win_whatever_their_scores():
    row = [NAN, 1, 9, 8, -INF]
    assert selected(row, 3, None, 1, 1) == [0, 2, 4]
    assert selected(row, 4, None, 2, 1) == [0, 1, 2, 4]
    assert selected(row, 9, None, 4, 4) == [0, 1, 2, 3, 4, -1, -1, -1, -1]
    assert selected(row, 2, np.array(3), 1, 1) == [0, 2]
    assert selected(row, 4, np.array(1), 2, 2) == [0, -1, -1, -1]


def test_lengths_of_rows():
    rows = [[1, 2, 3], [1, 2, 3]]
    assert selected(rows, 2, np.array([3, 1])) == [[1, 2], [0, -1]]
    assert selected([rows, rows], 1, np.array([[2], [0]])) == [[[1], [1]], [[-1], [-1]]]


def test_threshold_is_reached_and_does_not_concern_kept_ends():
    assert selected([1, 2, 3, 2], 4, threshold=2) == [1, 2, 3, -1]
    assert selected([1, 2, 3, 2], 1, threshold=2) == [2]
    assert selected([1, 2, 3, 1], 3, None, 1, 1, threshold=4) == [0, 3, -1]
    assert selected([NAN, -INF], 2, threshold=-INF) == [-1, -1]


# ---- colstats ------------------------------------------------------------------------------------


def received(num_queries, length, *, num_heads=1, num_kv_heads=1, lse=0.0, capacity=None, **kwargs):
    """Of one sequence, with all logits zero; every query gives exp(-lse) to what it sees."""
    q = np.zeros((num_queries, num_heads, 2))
    k = np.zeros((1, length if capacity is None else capacity, num_kv_heads, 2))
    lse = np.broadcast_to(lse, (num_queries, num_heads))
    lengths, offsets = np.array([length]), np.array([0, num_queries])
    return reference.attention_colstats(q, k, None, lengths, offsets, lse, **kwargs)[0].squeeze()


def test_each_query_gives_to_the_keys_it_sees():
    equal(received(2, 4), [2, 2, 2, 1])
    equal(received(2, 3, causal=False), [2, 2, 2])
    equal(received(4, 2), [2, 1])
    equal(received(2, 2, capacity=4), [2, 1, 0, 0])
    equal(received(3, 5, window=2), [0, 1, 2, 2, 1])
    equal(received(2, 4, window=1, sink_tokens=1), [2, 0, 1, 1])
    np.testing.assert_allclose(received(2, 3, lse=np.log(2)), [1, 1, 0.5])


def test_groups_add_up_and_windows_are_those_of_heads():
    equal(received(1, 2, num_heads=3), [3, 3])
    windows = np.array([1, 2])
    stats = received(1, 3, num_heads=4, num_kv_heads=2, window=windows)
    equal(stats, [[0, 0, 2], [0, 2, 2]])


def test_maximum_and_count():
    lse = -np.log([[1.0], [3.0], [2.0]])
    np.testing.assert_allclose(received(3, 3, lse=lse, reduce="max"), [3, 3, 2])
    equal(received(3, 3, lse=lse, reduce="count", threshold=1.5), [2, 2, 1])
    # By default 1 / (pos + 1), which one of equals reaches.
    lse = np.log([[2.0], [3.0], [5.0]])
    equal(received(3, 4, lse=lse, reduce="count"), [2, 2, 1, 0])
    assert not received(2, 0, reduce="max", capacity=3).any()


def test_rows_whose_lse_is_minus_infinity_give_nothing():
    lse = np.array([[-INF], [0.0]])
    equal(received(2, 3, lse=lse, causal=False), [1, 1, 1])
    equal(received(2, 3, lse=lse, causal=False, reduce="count", threshold=0.0), [1, 1, 1])


def test_scale_softcap_and_bias_make_the_logits_of_attention():
    q, k = np.array([[[3.0]]]), np.array([[[[2.0]], [[7.0]]]])
    bias = np.array([0.5, -INF]).reshape(1, 2, 1)
    kwargs = {"scale": 0.5, "softcap": 2.0, "key_bias": bias}
    stats = reference.attention_colstats(q, k, None, None, None, np.ones((1, 1)), **kwargs)
    np.testing.assert_allclose(stats, [[[np.exp(2 * np.tanh(3 / 2) + 0.5 - 1), 0]]])


def test_what_keys_receive_lies_at_their_logical_place():
    """In pages of two: the second page is absent, the third is cut, page 1 is somebody else's."""
    q, k = np.ones((1, 1, 1)), np.full((3, 2, 1, 1), NAN)
    k[2], k[0, 0] = np.log([[[2.0]], [[3.0]]]), np.log(5.0)
    args = q, k, np.array([[2, -1, 0, 99]]), np.array([5]), None, np.zeros((1, 1))
    stats = reference.attention_colstats(*args)
    np.testing.assert_allclose(stats, [[[2, 3, 0, 0, 5, 0, 0, 0]]])


def test_accumulation_decays_what_was_there_within_the_sequence():
    old = np.array([[[4.0, 2.0, 8.0, NAN]]])
    kwargs = {"capacity": 3, "accumulate_into": old, "decay": 0.5}
    equal(received(1, 2, **kwargs), [3, 2, 8, NAN])
    equal(received(1, 2, **kwargs, reduce="max"), [2, 1, 8, NAN])
    equal(old.ravel(), [4, 2, 8, NAN])


# ---- evict ---------------------------------------------------------------------------------------


def kept(stats, length, budget, **kwargs):
    """Of one sequence; stats ``[L]`` or ``[heads, L]``."""
    stats = np.array(stats, dtype=float)
    args = stats.reshape(1, -1, stats.shape[-1]), np.array([length]), budget
    keep = reference.evict(*args, **kwargs)
    assert keep.dtype == np.int32
    return keep[0, 0].tolist() if stats.ndim == 1 else keep[0].tolist()


def test_the_largest_statistics_stay_and_of_equals_the_earlier():
    assert kept([3, 1, 2, 5], 4, 2) == [0, 3]
    assert kept([3, 1, 2, 5], 3, 2) == [0, 2]
    assert kept([1, 1, 1, 1], 4, 2) == [0, 1]
    assert kept([1, 2], 2, 4) == [0, 1, -1, -1]
    assert kept([1, 2], 0, 1) == [-1]
    assert kept([1, 2], 2, 0) == []


def test_nan_ranks_below_minus_infinity_yet_fills_the_budget():
    row = [NAN, -INF, 1, NAN]
    assert [kept(row, 4, n) for n in (1, 2, 3, 4)] == [[2], [1, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_protected_tokens_stay_whatever_their_statistics():
    row = [NAN, 5, 4, 3, -INF]
    assert kept(row, 5, 3, keep_first=1, keep_last=1) == [0, 1, 4]
    assert kept(row, 4, 2, keep_first=1, keep_last=1) == [0, 3]
    assert kept(row, 2, 3, keep_first=4, keep_last=4) == [0, 1, -1]
    pinned = np.array([False, False, False, True, False])
    assert kept(row, 5, 2, pinned=pinned) == [1, 3]
    assert kept(row, 5, 2, keep_last=1, pinned=pinned) == [3, 4]
    assert kept(row, 3, 2, pinned=pinned) == [1, 2]


def test_heads_keep_their_own_or_what_the_sequence_keeps():
    rows = [[5, 1, 2], [0, 3, 3]]
    assert kept(rows, 3, 1) == [[0], [1]]
    assert kept(rows, 3, 1, group="sequence") == [[0]]
    assert kept(rows, 3, 2, group="sequence") == [[0, 2]]
    assert kept([[5, 1], [NAN, 0]], 2, 1, group="sequence") == [[1]]
    pinned = np.array([[False, True, False], [False, False, False]])
    assert kept(rows, 3, 1, pinned=pinned) == [[1], [1]]
    assert kept(rows, 3, 2, pinned=pinned, group="sequence") == [[0, 1]]


def test_budgets_of_sequences():
    stats, lengths = np.arange(6.0).reshape(2, 1, 3), np.array([3, 2])
    keep = reference.evict(stats, lengths, np.array([1, 3]))
    assert keep.tolist() == [[[2, -1, -1]], [[0, 1, -1]]]
    keep = reference.evict(stats, lengths, np.array([1, 0]), max_budget=2)
    assert keep.tolist() == [[[2, -1]], [[-1, -1]]]


# ---- knn -----------------------------------------------------------------------------------------


def nearest(query, bank, k, valid_len=None, **kwargs):
    """Of one query and one head: values and indices, as lists."""
    valid_len = None if valid_len is None else np.array([valid_len])
    q, bank = np.array(query, dtype=float)[None, None], np.array(bank, dtype=float)[None]
    values, indices = reference.knn_topk(q, bank, valid_len, k, **kwargs)
    return values[0, 0].tolist(), indices[0, 0].tolist()


def test_nearest_come_best_first():
    bank = [[1, 0], [2, 2], [0, 3]]
    assert nearest([1, 1], bank, 2) == ([4, 3], [1, 2])
    assert nearest([1, 1], bank, 2, metric="l2") == ([1, 2], [0, 1])
    values, indices = nearest([1, 1], bank, 3, metric="cosine")
    np.testing.assert_allclose(values, [1, 0.5**0.5, 0.5**0.5])
    assert indices == [1, 0, 2]


def test_equal_scores_come_in_order_of_their_indices():
    assert nearest([1], [[2], [3], [2], [3]], 3) == ([3, 3, 2], [1, 3, 0])
    assert nearest([0], [[1], [-1], [1]], 3, metric="l2") == ([1, 1, 1], [0, 1, 2])


def test_fewer_than_k():
    assert nearest([1], [[2], [3]], 3, valid_len=1) == ([2, -INF, -INF], [0, -1, -1])
    assert nearest([1], [[2]], 2, metric="l2") == ([1, INF], [0, -1])
    assert nearest([1], np.zeros((0, 1)), 1) == ([-INF], [-1])
    assert nearest([1], [[2]], 0) == ([], [])


def test_nan_and_minus_infinity_are_never_found():
    bank = [[NAN], [-INF], [1], [INF]]
    assert nearest([1], bank, 3) == ([INF, 1, -INF], [3, 2, -1])
    assert nearest([1], bank, 3, metric="l2") == ([0, INF, INF], [2, -1, -1])
    assert nearest([NAN], bank, 1) == ([-INF], [-1])


def test_a_zero_vector_has_similarity_zero():
    assert nearest([1, 0], [[-1, 0], [0, 0], [2, 0]], 3, metric="cosine") == ([1, 0, -1], [2, 1, 0])
    assert nearest([0, 0], [[1, 0], [0, 0]], 2, metric="cosine") == ([0, 0], [0, 1])


def test_buckets_send_their_best():
    bank = [[1], [5], [4], [6], [3]]  # of two buckets: 1, 4, 3 and 5, 6
    assert nearest([1], bank, 3, buckets=2) == ([6, 4, -INF], [3, 2, -1])
    assert nearest([1], bank, 3, buckets=2, valid_len=2) == ([5, 1, -INF], [1, 0, -1])
    assert nearest([1], [[2], [2], [2]], 2, buckets=2) == ([2, 2], [0, 1])
    assert nearest([1], bank, 2, buckets=9) == ([6, 5], [3, 1])


def test_heads_have_banks_and_lengths_of_their_own():
    q, bank = np.ones((1, 2, 1)), np.array([[[1.0], [2]], [[4], [3]]])
    values, indices = reference.knn_topk(q, bank, np.array([1, 2]), 1)
    assert values.ravel().tolist() == [1, 4] and indices.ravel().tolist() == [0, 0]


# ---- indexer -------------------------------------------------------------------------------------


def test_heads_vote_with_their_weights():
    q = np.array([[[1.0, 0], [0, 1], [-1, -1]]])
    k = np.array([[1.0, 2], [-1, -2], [0, 0]])
    w = np.array([[1.0, 10, 100]])
    equal(reference.indexer_scores(q, w, k, causal=False), [[21, 300, 0]])
    equal(reference.indexer_scores(q, -w, k, causal=False), [[-21, -300, 0]])


def test_queries_are_the_last_of_their_sequence():
    q, w = np.ones((3, 1, 1)), np.ones((3, 1))
    k = np.array([[1.0], [2]])
    equal(reference.indexer_scores(q, w, k), [[-INF, -INF], [1, -INF], [1, 2]])
    equal(reference.indexer_scores(q, w, k, causal=False), [[1, 2]] * 3)


def test_keys_of_contiguous_and_of_paged_sequences():
    q, w = np.ones((3, 1, 1)), np.ones((3, 1))
    lengths, offsets = np.array([1, 3]), np.array([0, 1, 3])
    k = np.array([[1, NAN, NAN, NAN], [2, 3, 4, NAN]])[..., None]
    expected = np.array([[1, -INF, -INF, -INF], [2, 3, -INF, -INF], [2, 3, 4, -INF]])
    equal(reference.indexer_scores(q, w, k, None, lengths, offsets), expected)
    pages = np.array([[4, NAN], [2, 3], [1, NAN]])[..., None]
    table = np.array([[2, 99], [1, 0]])
    equal(reference.indexer_scores(q, w, pages, table, lengths, offsets), expected)
    table[1, 0] = -1
    expected[1:, :2] = -INF
    equal(reference.indexer_scores(q, w, pages, table, lengths, offsets), expected)


def test_nan_of_a_key_reaches_those_who_see_it():
    q, w, k = np.ones((2, 1, 1)), np.ones((2, 1)), np.array([[1.0], [NAN]])
    equal(reference.indexer_scores(q, w, k), [[1, -INF], [1, NAN]])
