"""The oracle itself, against answers small enough to work out by hand.

Most cases give every token the same logit, so that attention is the mean of the visible values and
lse the logarithm of their number; token j has the value 2**j, so that a mean names its tokens.
"""

from __future__ import annotations

import numpy as np
import pytest

from memkernels import reference

INF = np.inf


def uniform(num_queries, length, *, num_heads=1, num_kv_heads=1, **kwargs):
    """Attention of one sequence with all logits zero; out and lse without their size-1 dims."""
    q = np.zeros((num_queries, num_heads, 2))
    k = np.zeros((1, length, num_kv_heads, 2))
    v = np.broadcast_to(2.0 ** np.arange(length)[:, None, None], (1, length, num_kv_heads, 1))
    cu_seqlens_q = np.array([0, num_queries])
    out, lse = reference.paged_attention(q, k, v, cu_seqlens_q=cu_seqlens_q, **kwargs)
    return out.squeeze(), lse.squeeze()


def mean_of(tokens):
    return np.mean([2.0**j for j in tokens]) if tokens else 0.0


def check_visible(result, visible):
    """Each query saw exactly the tokens named."""
    out, lse = result
    np.testing.assert_allclose(out, [mean_of(tokens) for tokens in visible])
    np.testing.assert_allclose(lse, [np.log(len(tokens)) if tokens else -INF for tokens in visible])


def test_causal_queries_are_the_last_ones():
    check_visible(uniform(2, 4), [[0, 1, 2], [0, 1, 2, 3]])


def test_not_causal():
    check_visible(uniform(2, 3, causal=False), [[0, 1, 2], [0, 1, 2]])


def test_more_queries_than_tokens():
    check_visible(uniform(4, 2), [[], [], [0], [0, 1]])
    check_visible(uniform(4, 2, causal=False), [[0, 1]] * 4)


def test_no_tokens():
    check_visible(uniform(2, 0), [[], []])
    check_visible(uniform(2, 0, causal=False), [[], []])


def test_window_counts_the_query_itself():
    check_visible(uniform(3, 4, window=1), [[1], [2], [3]])
    check_visible(uniform(3, 4, window=2), [[0, 1], [1, 2], [2, 3]])
    check_visible(uniform(3, 4, window=9), [[0, 1], [0, 1, 2], [0, 1, 2, 3]])


def test_window_without_causality_is_one_sided():
    check_visible(uniform(3, 4, window=2, causal=False), [[0, 1, 2, 3], [1, 2, 3], [2, 3]])


def test_sink_tokens_widen_the_window_but_not_the_past():
    check_visible(uniform(4, 4, window=1, sink_tokens=2), [[0], [0, 1], [0, 1, 2], [0, 1, 3]])


def test_window_of_each_kv_head():
    out, lse = uniform(1, 3, num_heads=4, num_kv_heads=2, window=np.array([1, 2]))
    np.testing.assert_allclose(out, [4, 4, 3, 3])
    np.testing.assert_allclose(lse, np.log([1, 1, 2, 2]))


def test_key_bias_weighs_and_masks():
    bias = np.log([1.0, 3.0]).reshape(1, 2, 1)
    out, lse = uniform(1, 2, key_bias=bias)
    np.testing.assert_allclose([out, lse], [(1 + 3 * 2) / 4, np.log(4)])
    check_visible(uniform(2, 3, key_bias=np.array([0, -INF, 0]).reshape(1, 3, 1)), [[0], [0, 2]])
    check_visible(uniform(1, 2, key_bias=np.full((1, 2, 1), -INF)), [[]])


def test_sink_logit_takes_weight_and_counts_in_lse():
    out, lse = uniform(1, 3, sink_logit=np.zeros(1))
    np.testing.assert_allclose([out, lse], [7 / 4, np.log(4)])
    out, lse = uniform(2, 1, sink_logit=np.array([-1.5]))
    np.testing.assert_allclose([out[0], lse[0]], [0, -1.5])  # an empty row
    check_visible(uniform(2, 1, sink_logit=np.array([-INF])), [[], [0]])


def test_scale_softcap_and_bias_apply_in_this_order():
    q = np.array([[[3.0]]])
    k = np.array([[[[2.0]]]])
    v = np.ones((1, 1, 1, 1))
    lse = reference.paged_attention(q, k, v)[1]
    assert lse == 6  # scale defaults to D**-0.5 = 1
    kwargs = {"scale": 0.5, "softcap": 2.0, "key_bias": np.full((1, 1, 1), 10.0)}
    lse = reference.paged_attention(q, k, v, **kwargs)[1]
    np.testing.assert_allclose(lse, 2 * np.tanh(3 / 2) + 10)


def test_softmax_of_two():
    q = np.array([[[1.0, 0.0, 0.0, 0.0]]])
    k = np.array([[[[0.0] * 4], [[2 * np.log(3), 0, 0, 0]]]])
    v = np.array([[[[0.0]], [[1.0]]]])
    out, lse = reference.paged_attention(q, k, v)
    np.testing.assert_allclose([out.item(), lse.item()], [0.75, np.log(4)])


def test_pages_are_looked_up_and_absent_ones_skipped():
    k = np.zeros((3, 2, 1, 1))
    v = np.arange(6.0).reshape(3, 2, 1, 1)
    k[1, 1] = v[1, 1] = np.nan  # past the end of the sequence
    table = np.array([[2, 1, 99]])
    args = np.zeros((1, 1, 1)), k, v
    out, lse = reference.paged_attention(*args, table, np.array([3]))
    np.testing.assert_allclose([out.item(), lse.item()], [(4 + 5 + 2) / 3, np.log(3)])
    table[0, 0] = -1
    out, lse = reference.paged_attention(*args, table, np.array([3]))
    np.testing.assert_allclose([out.item(), lse.item()], [2, 0])


@pytest.mark.parametrize("kind", ["contiguous", "packed"])
def test_sequences_do_not_see_each_other(kind):
    q = np.zeros((3, 1, 1))
    k = np.zeros((4, 1, 1))
    v = np.array([1.0, 2, 4, 8]).reshape(4, 1, 1)
    if kind == "packed":
        kwargs = {"cu_seqlens_k": np.array([0, 1, 4])}
    else:
        k, v = (np.stack([x[[0, 3, 3]], x[1:]]) for x in (k, v))
        kwargs = {"seq_lens": np.array([1, 3])}
    out, _ = reference.paged_attention(q, k, v, cu_seqlens_q=np.array([0, 1, 3]), **kwargs)
    np.testing.assert_allclose(out.squeeze(), [1, 3, 14 / 3])


def test_query_heads_share_kv_heads_in_blocks():
    v = np.array([1.0, 2.0]).reshape(1, 1, 2, 1)
    out, _ = reference.paged_attention(np.zeros((1, 6, 1)), np.zeros_like(v), v)
    np.testing.assert_allclose(out.squeeze(), [1, 1, 1, 2, 2, 2])


def test_nan_reaches_only_those_who_see_it():
    q, k, v = np.zeros((3, 1, 1)), np.zeros((1, 3, 1, 1)), np.ones((1, 3, 1, 1))
    k[0, 1] = np.nan
    out, lse = reference.paged_attention(q, k, v, cu_seqlens_q=np.array([0, 3]))
    np.testing.assert_array_equal(np.isnan(out.squeeze()), [False, True, True])
    np.testing.assert_array_equal(np.isnan(lse.squeeze()), [False, True, True])


def listed(indices, length, *, page_size=2, page_table=((2, 0, 3, 1),), num_heads=1, **kwargs):
    """As `uniform`, over lists ``[n, heads, K]`` of pages or tokens of one sequence.

    What lies beyond the sequence is NaN.
    """
    indices = np.array(indices)
    num_queries, num_kv_heads = indices.shape[:2]
    page_table = np.array(page_table)
    v = np.full((4, page_size, num_kv_heads, 1), np.nan)
    for j in range(length):
        v[page_table[0, j // page_size], j % page_size] = 2.0**j
    q = np.zeros((num_queries, num_kv_heads * num_heads, 2))
    k = np.repeat(0 * v, 2, axis=-1)
    offsets = np.array([0, num_queries])
    lengths = np.array([length])
    out, lse = reference.gather_attention(q, k, v, indices, page_table, lengths, offsets, **kwargs)
    return out.ravel(), lse.ravel()


def test_listed_pages_are_cut_by_length_and_causality():
    check_visible(listed([[[1, 2]]], 5), [[2, 3, 4]])
    check_visible(listed([[[0, 1]], [[0, 1]]], 4), [[0, 1, 2], [0, 1, 2, 3]])
    check_visible(listed([[[0, 1]], [[1, 0]]], 4, causal=False), [[0, 1, 2, 3]] * 2)
    check_visible(listed([[[1]], [[1]], [[1]]], 4), [[], [2], [2, 3]])


def test_listed_tokens():
    check_visible(listed([[[4, 0]]], 5, unit="token"), [[0, 4]])
    check_visible(listed([[[3, 1]], [[3, 1]]], 4, unit="token"), [[1], [1, 3]])
    check_visible(listed([[[3]]] * 2, 4, unit="token", causal=False), [[3], [3]])


def test_listed_more_queries_than_tokens():
    for unit in "page", "token":
        check_visible(listed([[[0]]] * 3, 1, unit=unit), [[], [], [0]])
        check_visible(listed([[[0]]] * 3, 1, unit=unit, causal=False), [[0]] * 3)


def test_minus_one_anywhere_in_a_list_is_skipped():
    check_visible(listed([[[-1, 1, -1, 0, -1]]], 4), [[0, 1, 2, 3]])
    check_visible(listed([[[-1, 2, -1]]], 4, unit="token"), [[2]])
    check_visible(listed([[[-1, -1]]], 4), [[]])
    check_visible(listed(np.zeros((1, 1, 0), int), 4), [[]])
    check_visible(listed([[[-1]]], 0), [[]])


def test_duplicates_count_each_time():
    out, lse = listed([[[1, 0, 1]]], 3)
    np.testing.assert_allclose([out[0], lse[0]], [(4 + 4 + 1 + 2) / 4, np.log(4)])
    out, lse = listed([[[2, 2, 0, 2]]], 3, unit="token")
    np.testing.assert_allclose([out[0], lse[0]], [13 / 4, np.log(4)])


def test_lists_of_each_head_and_query():
    check_visible(listed([[[0], [1]]], 4), [[0, 1], [2, 3]])
    check_visible(listed([[[0], [1]]], 4, num_heads=2), [[0, 1], [0, 1], [2, 3], [2, 3]])
    check_visible(listed([[[0]], [[2]]], 6, causal=False), [[0, 1], [4, 5]])


def test_one_list_for_all_heads():
    v = np.array([1.0, 2, 4, 8]).reshape(1, 2, 2, 1)
    args = np.zeros((1, 4, 1)), 0 * v, v, np.array([[[1]]]), None
    out, _ = reference.gather_attention(*args, unit="token")
    np.testing.assert_allclose(out.squeeze(), [4, 4, 8, 8])


@pytest.mark.parametrize("unit", ["page", "token"])
def test_listed_pages_may_be_absent_and_unlisted_ones_anything(unit):
    table = np.array([[1, -1, 99, 0, -7]])
    v = np.arange(4.0).reshape(2, 2, 1, 1)
    args = np.zeros((1, 1, 1)), 0 * v, v
    indices = {"page": [0, 1, 3], "token": [0, 1, 2, 3, 6]}[unit]
    out, lse = reference.gather_attention(
        *args, np.array([[indices]]), table, np.array([7]), unit=unit
    )
    np.testing.assert_allclose([out.item(), lse.item()], [(2 + 3 + 0) / 3, np.log(3)])


def test_listed_contiguous_sequences():
    v = np.array([1.0, 2, 4, np.nan, 8, 16, 32, 64]).reshape(2, 4, 1, 1)
    args = np.zeros((2, 1, 1)), 0 * v, v, np.array([[[2, 0]], [[3, -1]]])
    out, _ = reference.gather_attention(*args, seq_lens=np.array([3, 4]), unit="token")
    np.testing.assert_allclose(out.squeeze(), [5 / 2, 64])


def test_listed_bias_and_sink():
    bias = np.log([[1.0, 3], [1, 5]]).reshape(2, 2, 1)
    bias[1, 0] = -INF
    v = np.array([1.0, 2, np.nan, 4]).reshape(2, 2, 1, 1)
    args = np.zeros((1, 1, 1)), 0 * v, v, np.array([[[0, 1, 1]]]), np.array([[0, 1]]), np.array([4])
    out, lse = reference.gather_attention(*args, key_bias=bias, sink_logit=np.zeros(1))
    total = 1 + 3 + 5 + 5 + 1  # token 2 is masked, token 3 counts twice
    np.testing.assert_allclose([out.item(), lse.item()], [(1 + 6 + 2 * 20) / total, np.log(total)])
    out, lse = listed([[[-1]]], 4, sink_logit=np.array([-1.5]))
    np.testing.assert_allclose([out[0], lse[0]], [0, -1.5])


def test_merge_states():
    outs = np.array([1.0, 5.0, np.nan]).reshape(3, 1, 1, 1)
    lses = np.array([np.log(3), 0, -INF]).reshape(3, 1, 1)
    out, lse = reference.merge_states(outs, lses)
    np.testing.assert_allclose([out.item(), lse.item()], [2, np.log(4)])
    out, lse = reference.merge_states(outs[2:], lses[2:])
    assert (out.item(), lse.item()) == (0, -INF)


def test_append_kv():
    k_cache, v_cache = np.zeros((2, 2, 1, 2)), np.zeros((2, 2, 1, 1))
    k = np.arange(6.0).reshape(3, 1, 2)
    v = np.arange(3.0).reshape(3, 1, 1)
    new_k, new_v = reference.append_kv(k, v, k_cache, v_cache, np.array([3, -1, 0]))
    np.testing.assert_array_equal(new_k.reshape(4, 2), [[4, 5], [0, 0], [0, 0], [0, 1]])
    np.testing.assert_array_equal(new_v.reshape(4), [2, 0, 0, 0])
    assert not k_cache.any() and not v_cache.any()


def test_copy_pages():
    k_cache, v_cache = np.arange(8.0).reshape(4, 1, 1, 2), np.arange(4.0).reshape(4, 1, 1, 1)
    pairs = np.array([[1, 0], [-1, 2], [2, -1], [1, 3]])
    new_k, new_v = reference.copy_pages(k_cache, v_cache, pairs)
    np.testing.assert_array_equal(new_k.reshape(4, 2), [[2, 3], [2, 3], [4, 5], [2, 3]])
    np.testing.assert_array_equal(new_v.ravel(), [1, 1, 2, 1])
    np.testing.assert_array_equal(v_cache.ravel(), np.arange(4))


def test_compact_kv():
    """Two sequences of five and one token in pages of two; two heads keep different tokens."""
    cache = np.full((4, 2, 2, 1), np.nan)
    table = np.array([[3, 0, 1], [2, 99, 99]])
    for j in range(5):
        cache[table[0, j // 2], j % 2] = [[j], [10 + j]]
    cache[2, 0] = [[7], [17]]
    keep = np.array([[[0, 2, 4, -1], [1, 3, 4, -1]], [[-1] * 4] * 2])
    new_k, new_v, lengths = reference.compact_kv(
        cache, 2 * cache, table, np.array([5, 1], dtype=np.int32), keep
    )
    np.testing.assert_array_equal(lengths, [3, 0])
    assert lengths.dtype == np.int32
    kept = new_k[table[0, [0, 0, 1]], [0, 1, 0]].squeeze()
    np.testing.assert_array_equal(kept, [[0, 11], [2, 13], [4, 14]])
    np.testing.assert_array_equal(new_v, 2 * new_k)
    *_, lengths = reference.compact_kv(cache, cache, table, np.array([5, 1]), keep[:, :1, :3])
    np.testing.assert_array_equal(lengths, [3, 0])
