"""PagedKVCache: bookkeeping against a dict of lists, and attention through its pages."""

from __future__ import annotations

import contextlib
import copy
import random
from unittest import mock

import numpy as np
import pytest
import torch

import memkernels
from memkernels.nn import PagedKVCache
from memkernels.nn._page_pool import content_keys
from tolerance import assert_same_bits, unchanged

HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 16, 8


def make_cache(num_pages=8, page_size=4, max_seqs=3, num_layers=2, **options):
    options = {"head_dim_v": DIM_V, **options}
    return PagedKVCache(
        num_layers, num_pages, page_size, KV_HEADS, DIM, max_seqs=max_seqs, **options
    )


def tokens(n, dtype=torch.float32):
    return tuple(torch.randn(n, h, d).to(dtype) for h, d in [(KV_HEADS, DIM), (KV_HEADS, DIM_V)])


def state(cache):
    """Everything the bookkeeping knows, on the host and on the device."""
    host = cache._free_ids, cache._lengths, cache._moved_from, cache._table.tolist()
    device = cache.page_table.tolist(), cache.seq_lens.tolist()
    return copy.deepcopy((*host, *device, vars(cache._pool)))


def write(cache, step, first=0):
    """Gives the new tokens values of their own: first, first + 1, ... plus 1000 a layer and 100 a
    head; the values negative."""
    for layer in range(len(cache.k)):
        token = first + 1000.0 * layer + torch.arange(len(step.positions))
        values = (token[:, None] + 100 * torch.arange(KV_HEADS))[..., None]  # [T, Hkv, 1]
        cache.append(layer, values.repeat(1, 1, DIM), -values.repeat(1, 1, DIM_V), step)


def started(cache, count, first=0):
    """A new sequence of tokens with the values first, first + 1, ..."""
    (seq_id,) = cache.allocate()
    write(cache, cache.extend([seq_id], count), first)
    return seq_id


def held(cache, seq_id, layer=0, head=0):
    """The values of a sequence's tokens, read through the device's page table."""
    length = int(cache.seq_lens[seq_id])
    pages = cache.page_table[seq_id, : -(-length // cache.page_size)]
    k, v = (x[layer, pages][:, :, head].flatten(0, 1)[:length] for x in (cache.k, cache.v))
    assert k.eq(k[:, :1]).all() and v.eq(-k[:, :1]).all()
    return [int(x) - 1000 * layer - 100 * head for x in k[:, 0]]


def pages(cache, seq_id):
    return [page for page in cache.page_table[seq_id].tolist() if page >= 0]


@contextlib.contextmanager
def page_copies():
    """The pairs that each call of copy_pages gets."""
    calls = []

    def copy_pages(k, v, pairs):
        calls.append(pairs.tolist())
        original(k, v, pairs)

    original = memkernels.copy_pages
    with mock.patch.object(memkernels, "copy_pages", copy_pages):
        yield calls


def test_step():
    cache = make_cache()
    a, b = cache.allocate(2)
    table, lengths = cache.page_table, cache.seq_lens
    cache.extend([a], 3)
    step = cache.extend([b, a], [5, 2])

    assert cache.page_table is table and cache.seq_lens is lengths
    assert table[a].tolist() == [0, 3, -1, -1, -1, -1, -1, -1]
    assert table[b].tolist() == [1, 2, -1, -1, -1, -1, -1, -1]
    assert lengths.tolist() == [5, 5, 0]
    assert table.dtype == lengths.dtype == torch.int32
    assert step.page_table.tolist() == [[1, 2], [0, 3]]
    assert step.seq_lens.tolist() == [5, 5]
    assert step.cu_seqlens_q.tolist() == [0, 5, 7]
    assert step.positions.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert step.slot_mapping.tolist() == [4, 5, 6, 7, 8, 3, 12]
    assert (step.max_seqlen, step.seq_ids, step.num_new) == (5, (b, a), (5, 2))
    assert (cache.length(a), cache.num_free_pages) == (5, 4)


def test_no_tokens():
    cache = make_cache()
    for step in cache.extend([]), cache.extend(cache.allocate(2), 0):
        assert step.slot_mapping.numel() == 0
        cache.append(0, *tokens(0), step)
        assert cache.attend(0, torch.randn(0, HEADS, DIM), step).shape == (0, HEADS, DIM_V)
    assert cache.num_free_pages == 8


def test_free_and_reuse():
    cache = make_cache()
    ids = cache.allocate(3)
    cache.extend(ids, [9, 4, 1])
    before = cache.page_table.clone()
    cache.free([ids[0], ids[1]])
    assert cache.num_free_pages == 7
    assert cache.page_table[:2].eq(-1).all() and cache.seq_lens.tolist() == [0, 0, 1]
    assert_same_bits(cache.page_table[2], before[2])
    # The same calls find the same ids and the same pages.
    assert cache.allocate(2) == ids[:2]
    cache.extend(ids[:2], [9, 4])
    assert_same_bits(cache.page_table, before)


def test_reset():
    cache = make_cache()
    first = state(cache)
    cache.extend(cache.allocate(3), [3, 9, 8])
    cache.reset()
    assert state(cache) == first


def test_forks_share_pages_until_they_write():
    cache = make_cache()
    a = started(cache, 6)
    b, c = cache.fork(a, 2)
    assert pages(cache, a) == pages(cache, b) == pages(cache, c) == [0, 1]
    assert (cache.num_free_pages, cache.length(c), cache.seq_lens.tolist()) == (6, 6, [6, 6, 6])

    with page_copies() as calls:  # b has to copy, then a, and c is alone
        write(cache, cache.extend([b, a, c], [1, 3, 1]), 10)
    assert calls == [[[1, 2], [1, 3]]] * 2
    assert [pages(cache, i) for i in (a, b, c)] == [[0, 3, 4], [0, 2], [0, 1]]
    for layer in range(2):
        for head in range(KV_HEADS):
            at = layer, head
            assert held(cache, b, *at) == [0, 1, 2, 3, 4, 5, 10]
            assert held(cache, a, *at) == [0, 1, 2, 3, 4, 5, 11, 12, 13]
            assert held(cache, c, *at) == [0, 1, 2, 3, 4, 5, 14]
    cache.free([a, b])
    assert cache.num_free_pages == 6
    assert held(cache, c) == [0, 1, 2, 3, 4, 5, 14]


def test_forks_copy_only_partly_filled_pages():
    cache = make_cache()
    a = started(cache, 8)
    (b,) = cache.fork(a)
    with page_copies() as calls:
        cache.extend([a, b], [0, 1])
        cache.free([b])
        cache.extend([a], 1)
        (c,) = cache.fork(a)
        cache.extend([c], 0)
        cache.free([a])
        cache.extend([c], 1)
    assert calls == []
    assert cache.fork(c, 0) == []


def test_reuse():
    cache = make_cache(max_seqs=8)
    a = started(cache, 11)
    cache.publish(a, range(11))
    assert cache.reuse(range(11)) == (1, 8)
    assert pages(cache, 1) == pages(cache, a)[:2]
    assert held(cache, 1, 1, 1) == list(range(8))
    assert cache.reuse(range(8)) == (2, 4)  # one token is left to compute
    assert cache.reuse(torch.arange(9)) == (3, 8)
    assert cache.reuse([*range(4), 9, *range(5, 8)]) == (4, 4)
    assert cache.reuse(np.arange(4, 10, dtype=np.int32)) == (5, 0)  # known, behind other tokens
    assert cache.reuse([]) == (6, 0)
    assert cache.seq_lens.tolist() == [11, 8, 4, 8, 4, 0, 0, 0]
    write(cache, cache.extend([3, 4], 2), 20)
    assert held(cache, 3) == [*range(8), 20, 21]
    assert held(cache, 4) == [*range(4), 22, 23]
    cache.free([0, 1, 2, 3, 4, 5, 6])
    assert cache.num_free_pages == 8
    assert cache.reuse(range(11))[1] == 8


def test_publish_goes_on_where_it_stopped():
    cache = make_cache()
    a = started(cache, 3)
    for count, found in (3, 0), (5, 4), (8, 8):
        write(cache, cache.extend([a], count - cache.length(a)), cache.length(a))
        cache.publish(a, range(count))
        seq_id, num_tokens = cache.reuse(range(20))
        assert num_tokens == found
        cache.free([seq_id])


def test_published_first_stays():
    cache = make_cache()
    a, b = started(cache, 4), started(cache, 8)
    cache.publish(a, range(4))
    cache.publish(b, range(8))
    c, num_tokens = cache.reuse(range(9))
    assert num_tokens == 8
    assert pages(cache, c) == [pages(cache, a)[0], pages(cache, b)[1]]


def test_published_pages_are_not_written_to():
    cache = make_cache()
    a = started(cache, 8)
    cache.publish(a, range(8))
    cache.compact([a], torch.arange(6)[None, None])
    with page_copies() as calls:
        write(cache, cache.extend([a], 1), 20)
    assert calls == [[[1, 2]]] * 2
    assert held(cache, a) == [0, 1, 2, 3, 4, 5, 20]
    b, num_tokens = cache.reuse(range(9))
    assert num_tokens == 8
    assert held(cache, b, 1) == list(range(8))


def found(cache, tokens):
    """How many of the tokens can be reused; leaves the order of eviction as it is."""
    keys = content_keys(np.array(tokens), cache.page_size)
    return len(cache._pool.find(keys)) * cache.page_size


def test_eviction_takes_the_least_recently_used_and_its_last_pages_first():
    cache = make_cache(num_pages=7)
    old, new = range(8), range(100, 112)
    for tokens in old, new:
        a = started(cache, len(tokens), tokens[0])
        cache.publish(a, tokens)
        cache.free([a])
    assert cache.num_free_pages == 7
    (a,) = cache.allocate()
    left = []
    for _ in range(4):
        cache.extend([a], 4)
        left.append((found(cache, old), found(cache, new)))
    # Two pages have never held anything; then each goes for one.
    assert left == [(8, 12), (8, 12), (4, 12), (0, 12)]
    cache.free([a])
    b, _ = cache.reuse([*new, 1])
    cache.free([b])
    cache.extend(cache.allocate(), 4 * 5)
    assert found(cache, new) == 8
    cache.reset()
    assert cache.reuse([*new, 1])[1] == 0


def test_reuse_makes_recently_used():
    cache = make_cache(num_pages=2, page_size=1)
    for token in 5, 6:
        a = started(cache, 1)
        cache.publish(a, [token])
        cache.free([a])
    cache.free([cache.reuse([5, 0])[0]])
    started(cache, 1)
    assert (found(cache, [5]), found(cache, [6])) == (1, 0)


def test_a_prefix_outlives_what_follows_it():
    """Also where another sequence published it, or a window has given it back before."""
    cache = make_cache(num_pages=5, page_size=1)
    a, b = started(cache, 1), started(cache, 2)
    cache.publish(a, [7])
    cache.publish(b, [7, 8])
    cache.free([a])
    cache.free([b])
    started(cache, 4)
    assert found(cache, [7, 8]) == 1

    cache = make_cache(num_pages=4, page_size=1, max_seq_len=9, window=2)
    a = started(cache, 3)
    cache.publish(a, [7, 8, 9])
    cache.extend([a], 1)  # gives back the first two
    cache.extend([a], 1)  # the third, and needs a page
    assert found(cache, [7, 8, 9]) == 2


def test_compact():
    """Different tokens in each layer and head; what no token moves in stays shared."""
    torch.manual_seed(0)
    cache = make_cache(16, page_size=2, max_seqs=4)
    a = started(cache, 9)
    (b,) = cache.fork(a)
    c = started(cache, 6, 20)
    keep_a = torch.tensor(
        [[[0, 1, 2, 4, 6], [0, 1, 2, 3, 8]], [[0, 1, 2, 6, 8], [0, 1, 2, 5, 6]]]
    )  # [layers, heads, tokens]
    keep_c = torch.tensor([[[1, 2, 4], [0, 4, 5]], [[3, 4, 5], [0, 1, 5]]])
    keep = torch.full((2, 2, KV_HEADS, 7), -1, dtype=torch.int32)
    keep[:, 0, :, :3], keep[:, 1, :, :5] = keep_c, keep_a
    with page_copies() as calls:
        cache.compact([c, a], keep)
    # Of a, page 0 has nothing moved, pages 1 and 2 are written to and b's, 3 and 4 only read.
    assert calls == [[[1, 8], [2, 9]]] * 2
    assert [pages(cache, i) for i in (a, b, c)] == [[0, 8, 9], [0, 1, 2, 3, 4], [5, 6]]
    assert (cache.length(a), cache.length(c), cache.num_free_pages) == (5, 3, 16 - 9)
    for layer in range(2):
        for head in range(KV_HEADS):
            assert held(cache, a, layer, head) == keep_a[layer, head].tolist()
            assert held(cache, b, layer, head) == list(range(9))
            assert held(cache, c, layer, head) == (20 + keep_c[layer, head]).tolist()
    assert cache.seq_lens.tolist() == [5, 9, 3, 0]

    write(cache, cache.extend([c, a], 2), 50)
    assert held(cache, c, 1, 0) == [23, 24, 25, 50, 51]
    cache.compact([a, c], torch.full((2, 1, 0), -1))
    assert (cache.length(a), pages(cache, c)) == (0, [])


def test_compact_forks_together():
    """A page that both only read from is not copied; of one that both write to, one copy."""
    cache = make_cache()
    a = started(cache, 12)
    (b,) = cache.fork(a)
    with page_copies() as calls:
        cache.compact([a, b], torch.tensor([[[1, 10]], [[9, 11]]]))
    assert calls == [[[0, 3]]] * 2
    assert held(cache, a, 1, 1) == [1, 10]
    assert held(cache, b, 1, 1) == [9, 11]
    assert cache.num_free_pages == 6


def test_compacting_a_published_sequence():
    cache = make_cache()
    a = started(cache, 8)
    cache.publish(a, range(8))
    cache.compact([a], torch.tensor([[[0, 1, 2, 3, 5, 7]]]))
    assert held(cache, a) == [0, 1, 2, 3, 5, 7]
    b, num_tokens = cache.reuse(range(9))
    assert num_tokens == 8
    assert held(cache, b) == list(range(8))

    (c,) = cache.fork(a)
    for seq_id in a, c:
        cache.publish(seq_id, range(4))
        with pytest.raises(RuntimeError, match=r"5 token_ids, .* was compacted from token 4 on"):
            cache.publish(seq_id, range(5))
    # Nothing is left of what has moved.
    cache.compact([a], torch.arange(4)[None, None])
    write(cache, cache.extend([a], 4), 30)
    cache.publish(a, [0, 1, 2, 3, 30, 31, 32, 33])
    assert found(cache, [0, 1, 2, 3, 30, 31, 32, 33]) == 8
    cache.free([c])
    assert started(cache, 8, 40) == c
    cache.publish(c, range(40, 48))


WINDOWS = {
    "number": (3, [[3, 3], [3, 3]]),
    "heads": (torch.tensor([2, 5]), [[2, 5], [2, 5]]),
    "layers": (torch.tensor([[2, 5], [4, 1]], dtype=torch.int32), [[2, 5], [4, 1]]),
}


@pytest.mark.parametrize("sink_tokens", [0, 3])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name, sink_tokens):
    """Attention is that over all tokens, while pages out of sight are given back."""
    torch.manual_seed(0)
    window, per_layer = WINDOWS[name]
    cache = make_cache(14, page_size=2, window=window, sink_tokens=sink_tokens)
    ids = cache.allocate(2)
    seen = {(layer, i): [] for layer in range(2) for i in ids}
    for counts in [7, 1], [1, 1], [3, 0], [1, 5], [4, 4]:
        starts = [cache.length(i) for i in ids]
        step = cache.extend(ids, counts)
        for i, start in zip(ids, starts, strict=True):
            largest, row = max(map(max, per_layer)), cache.page_table[i].tolist()
            absent = [
                all(j >= sink_tokens and start - j >= largest for j in (2 * c, 2 * c + 1))
                for c in range(-(-cache.length(i) // 2))
            ]
            assert [page < 0 for page in row[: len(absent)]] == absent
        for layer in range(2):
            (k, v), q = tokens(sum(counts)), torch.randn(sum(counts), HEADS, DIM)
            cache.append(layer, k, v, step)
            out = cache.attend(layer, q, step)
            parts = [x.split(counts) for x in (k, v, q, out)]
            for i, k, v, q, out in zip(ids, *parts, strict=True):
                seen[layer, i].append((k, v))
                k_all, v_all = (torch.cat(x)[None] for x in zip(*seen[layer, i], strict=True))
                expected = memkernels.paged_attention(
                    q, k_all, v_all, cu_seqlens_q=torch.tensor([0, len(q)]),
                    window=torch.tensor(per_layer[layer]), sink_tokens=sink_tokens,
                )  # fmt: skip
                torch.testing.assert_close(out, expected)
    used = {page for i in ids for page in pages(cache, i)}
    assert cache.num_free_pages == 14 - len(used) > 0


def test_options_of_attend_win():
    cache = make_cache(window=4, sink_tokens=1)
    step = cache.extend(cache.allocate(), 8)
    (k, v), q = tokens(8), torch.randn(8, HEADS, DIM)
    cache.append(0, k, v, step)
    cu_seqlens_q = torch.tensor([0, 8])
    for options in {}, {"window": 2}, {"sink_tokens": 3}, {"window": None}:
        expected = memkernels.paged_attention(
            q, k[None], v[None], cu_seqlens_q=cu_seqlens_q,
            **{"window": 4, "sink_tokens": 1, **options},
        )  # fmt: skip
        torch.testing.assert_close(cache.attend(0, q, step, **options), expected)


def test_a_window_makes_its_own_room():
    """An extension may take the pages that it gives back, unless others hold them."""
    cache = make_cache(num_pages=3, page_size=2, max_seq_len=20, window=2)
    (a,) = cache.allocate()
    for _ in range(4):
        cache.extend([a], 2)
    assert (pages(cache, a), cache.num_free_pages) == ([0, 1], 1)
    (b,) = cache.fork(a)
    assert cache.page_table[b].tolist() == cache.page_table[a].tolist()
    before = state(cache)
    with pytest.raises(RuntimeError, match="2 pages needed, 1 of 3 free"):
        cache.extend([a], 4)
    assert state(cache) == before
    cache.extend([a, b], 2)
    assert cache.num_free_pages == 0


def keep(*rows):
    return torch.tensor(rows)[:, None]


ERRORS = {
    "pages": (
        lambda cache: cache.extend([1, 0], [8, 8]),
        "PagedKVCache: 4 pages needed, 3 of 8 free",
    ),
    "length": (
        lambda cache: cache.extend([1, 0], [1, 12]),
        "PagedKVCache: a sequence would have 21 tokens, max_seq_len is 20",
    ),
    "sequences": (
        lambda cache: cache.allocate(2),
        "PagedKVCache: 2 sequences needed, 1 of 3 free",
    ),
    "unknown": (lambda cache: cache.extend([0, 2]), "PagedKVCache: sequence 2 is not in use"),
    "twice": (
        lambda cache: cache.extend([1, 1]),
        r"PagedKVCache: a sequence is given twice in \[1, 1\]",
    ),
    "counts": (lambda cache: cache.extend([0, 1], [1]), "PagedKVCache: 2 sequences, 1 num_tokens"),
    "negative": (
        lambda cache: cache.extend([0, 1], [1, -1]),
        r"PagedKVCache: num_tokens has a negative number: \[1, -1\]",
    ),
    "free_unknown": (lambda cache: cache.free([0, 7]), "PagedKVCache: sequence 7 is not in use"),
    "free_twice": (
        lambda cache: cache.free([0, 0]),
        r"PagedKVCache: a sequence is given twice in \[0, 0\]",
    ),
    "length_of": (lambda cache: cache.length(2), "PagedKVCache: sequence 2 is not in use"),
    "forks": (lambda cache: cache.fork(0, 2), "PagedKVCache: 2 sequences needed, 1 of 3 free"),
    "fork_unknown": (lambda cache: cache.fork(2), "PagedKVCache: sequence 2 is not in use"),
    "publish_unknown": (
        lambda cache: cache.publish(2, [1]),
        "PagedKVCache: sequence 2 is not in use",
    ),
    "publish_more": (
        lambda cache: cache.publish(1, range(6)),
        "PagedKVCache: 6 token_ids, sequence 1 has 5 tokens",
    ),
    "float_tokens": (
        lambda cache: cache.publish(0, [0.5]),
        r"PagedKVCache: token_ids must be \[T\] integers, got \[1\] float64",
    ),
    "huge_tokens": (lambda cache: cache.reuse([2**63]), "PagedKVCache: token_ids must be"),
    "token_rows": (lambda cache: cache.reuse(torch.zeros(1, 3, dtype=int)), "PagedKVCache: token_"),
    "compact_unknown": (
        lambda cache: cache.compact([0, 2], keep([0], [0])),
        "PagedKVCache: sequence 2 is not in use",
    ),
    "keep_batch": (
        lambda cache: cache.compact([0, 1], keep([0])),
        r"PagedKVCache: keep must be \[2, 2 or 1, K\] or \[2, 2, 2 or 1, K\], got \[1, 1, 1\]",
    ),
    "keep_layers": (
        lambda cache: cache.compact([0], keep([0]).expand(3, -1, -1, -1)),
        "PagedKVCache: keep must be",
    ),
    "keep_floats": (
        lambda cache: cache.compact([0], keep([0]).float()),
        "PagedKVCache: keep must be int32 or int64, got torch.float32",
    ),
    "keep_outside": (
        lambda cache: cache.compact([0, 1], keep([5], [5])),
        "PagedKVCache: keep must have ascending tokens of its sequence, then -1",
    ),
    "keep_order": (
        lambda cache: cache.compact([1], keep([2, 1])),
        "PagedKVCache: keep must have ascending tokens",
    ),
    "keep_gap": (
        lambda cache: cache.compact([1], keep([1, -1, 2])),
        "PagedKVCache: keep must have ascending tokens",
    ),
    "keep_padding": (
        lambda cache: cache.compact([1], keep([1, -2])),
        "PagedKVCache: keep must have ascending tokens",
    ),
    "keep_heads": (
        lambda cache: cache.compact([1], torch.tensor([[[0, 1], [1, -1]]])),
        "PagedKVCache: keep keeps different numbers of tokens in the heads or layers",
    ),
    "keep_unequal_layers": (
        lambda cache: cache.compact([1], torch.tensor([[[[0, 1]]], [[[1, -1]]]])),
        "PagedKVCache: keep keeps different numbers of tokens in the heads or layers",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_change_nothing(error):
    call, message = ERRORS[error]
    cache = make_cache(max_seq_len=20)
    step = cache.extend(cache.allocate(2), [9, 5])
    for layer in range(2):
        cache.append(layer, *tokens(14), step)
    before = state(cache)
    with unchanged(cache.k, cache.v), pytest.raises(RuntimeError, match=message):
        call(cache)
    assert state(cache) == before
    cache.extend([1, 0], [8, 1])  # and what fits still does


SHARED_ERRORS = {
    "copy": (lambda cache: cache.extend([1, 2]), "2 pages needed, 1 of 9 free"),
    "copy_and_new": (lambda cache: cache.extend([1], 4), "2 pages needed, 1 of 9 free"),
    "compact": (
        lambda cache: cache.compact([1], keep([0, 2, 3, 4, 5])),
        "2 pages needed, 1 of 9 free",
    ),
    "no_sequence": (lambda cache: cache.reuse(range(9)), "1 sequences needed, 0 of 4 free"),
    "other": (
        lambda cache: cache.publish(1, [0, 1, 2, 9]),
        "sequence 1 has been published with other token_ids",
    ),
    "absent": (
        lambda cache: cache.publish(0, range(6)),
        "sequence 0 has absent pages among its first 6 tokens",
    ),
    "compact_absent": (
        lambda cache: cache.compact([1, 0], keep([0], [0])),
        "sequence 0 has absent pages, it cannot be compacted",
    ),
}


@pytest.mark.parametrize("error", SHARED_ERRORS)
def test_errors_over_shared_pages_change_nothing(error):
    call, message = SHARED_ERRORS[error]
    cache = make_cache(9, max_seqs=4, max_seq_len=40, window=9)
    a = started(cache, 13)
    cache.extend([a], 12)  # gives back one page
    b = started(cache, 6)
    cache.publish(b, range(6))
    cache.fork(b, 2)
    assert cache.num_free_pages == 1
    before = state(cache)
    with (
        unchanged(cache.k, cache.v),
        pytest.raises(RuntimeError, match=f"PagedKVCache: {message}"),
    ):
        call(cache)
    assert state(cache) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "NDH"}, "layout must be NHD or HND"),
        ({"page_size": 0}, "page_size must be"),
        ({"sink_tokens": -1}, "sink_tokens must not be negative, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": torch.tensor([4, 0])}, "window must be at least 1, got 0"),
        (
            {"window": torch.tensor([4, 4, 4])},
            r"window must be \[Hkv\] or \[num_layers, Hkv\] integers, got \[3\] torch.int64",
        ),
        ({"window": torch.tensor([4.0, 4.0])}, "window must be"),
    ],
)
def test_construction_errors(options, message):
    with pytest.raises(RuntimeError, match=f"PagedKVCache: {message}"):
        make_cache(**options)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_through_the_cache(layout, page_size, dtype):
    """Prompts, then chunks, then single tokens: each step sees what contiguous attention sees."""
    torch.manual_seed(0)
    cache = make_cache(64, page_size, layout=layout, dtype=dtype)
    assert cache.k[0].shape == (64, page_size, KV_HEADS, DIM)
    ids = cache.allocate(3)
    seen = {(layer, i): [] for layer in range(2) for i in ids}
    for counts in [7, 1, 12], [3, 0, 5], [1, 1, 1], [1, 1, 1]:
        step = cache.extend(ids, counts)
        for layer in range(2):
            k, v = tokens(sum(counts), dtype)
            q = torch.randn(sum(counts), HEADS, DIM).to(dtype)
            cache.append(layer, k, v, step)
            out, lse = cache.attend(layer, q, step, window=9, return_lse=True)
            parts = [x.split(counts) for x in (k, v, q, out, lse)]
            for i, k, v, q, out, lse in zip(ids, *parts, strict=True):
                seen[layer, i].append((k, v))
                k_all, v_all = (torch.cat(x)[None] for x in zip(*seen[layer, i], strict=True))
                expected = memkernels.paged_attention(
                    q,
                    k_all,
                    v_all,
                    cu_seqlens_q=torch.tensor([0, len(q)]),
                    window=9,
                    return_lse=True,
                )
                torch.testing.assert_close((out, lse), expected)


@pytest.mark.parametrize("seed", range(5))
def test_against_a_dict_of_lists(seed):
    """Random calls; the cache holds what a dict of Python lists holds, and refuses what has no
    room there."""
    rng = random.Random(seed)
    page_size, num_pages, max_seqs = rng.choice([1, 3, 4]), 12, 4
    cache = make_cache(num_pages, page_size, max_seqs, num_layers=1, max_seq_len=6 * page_size)
    model: dict[int, list[float]] = {}
    written = 0.0

    def pages(length):
        return -(-length // page_size)

    for _ in range(200):
        action = rng.choice(["allocate", "extend", "extend", "extend", "free"])
        chosen = rng.sample(sorted(model), rng.randint(0, len(model)))
        if action == "allocate" and len(model) < max_seqs:
            (new,) = cache.allocate()
            assert new not in model
            model[new] = []
        elif action == "allocate":
            with pytest.raises(RuntimeError, match="sequences needed"):
                cache.allocate()
        elif action == "free":
            cache.free(chosen)
            for seq_id in chosen:
                del model[seq_id]
        else:
            counts = [rng.randint(0, page_size + 1) for _ in chosen]
            new_lengths = {i: len(model[i]) + n for i, n in zip(chosen, counts, strict=True)}
            lengths = {i: len(values) for i, values in model.items()} | new_lengths
            too_long = any(length > 6 * page_size for length in lengths.values())
            if too_long or sum(map(pages, lengths.values())) > num_pages:
                before = state(cache)
                with pytest.raises(RuntimeError, match=r"max_seq_len|pages needed"):
                    cache.extend(chosen, counts)
                assert state(cache) == before
                continue
            step = cache.extend(chosen, counts)
            values = written + torch.arange(sum(counts), dtype=torch.float32)
            written += sum(counts)
            k, v = (values[:, None, None].repeat(1, KV_HEADS, d) for d in (DIM, DIM_V))
            cache.append(0, k, v, step)
            for seq_id, new in zip(chosen, values.split(counts), strict=True):
                model[seq_id] += new.tolist()

        used = sum(pages(len(values)) for values in model.values())
        assert cache.num_free_pages == num_pages - used
        assert cache.page_table.tolist() == cache._table.tolist()
        assert cache.seq_lens.tolist() == [len(model.get(i, [])) for i in range(max_seqs)]
        for seq_id, values in model.items():
            row = cache.page_table[seq_id]
            assert row[pages(len(values)) :].eq(-1).all()
            held = cache.k[0, row[: pages(len(values))], ..., 0, 0].flatten()
            assert held[: len(values)].tolist() == values
