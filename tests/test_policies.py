"""Policies over PagedKVCache: the attention they give, and what they keep, by the papers."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

import memkernels
from memkernels.nn import HeavyHitter, KNNMemory, PagedKVCache, Quest, SnapWindow, Streaming
from tolerance import assert_same_bits, unchanged

HEADS, KV_HEADS, DIM, DIM_V, LAYERS = 4, 2, 16, 8, 2
GROUP = HEADS // KV_HEADS
GATE = {1: torch.tensor([0.5, -1.0, 2.0, 0.0])}


def make_cache(num_pages=64, page_size=4, max_seqs=3, max_seq_len=96, **options):
    options = {"head_dim_v": DIM_V, "max_seqs": max_seqs, "max_seq_len": max_seq_len, **options}
    return PagedKVCache(LAYERS, num_pages, page_size, KV_HEADS, DIM, **options)


def draw(count, seed, dtype=torch.float32):
    """q, k and v of new tokens, of all layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V)
    return [torch.randn(LAYERS, count, *s, generator=generator).to(dtype) for s in shapes]


def feed(policy, ids, qkv, counts, **options):
    """One step of a model: ``[LAYERS, T, Hq, Dv]``."""
    cache = policy.cache
    step = cache.extend(ids, counts)
    outs = []
    for layer, (q, k, v) in enumerate(zip(*qkv, strict=True)):
        cache.append(layer, k, v, step)
        outs.append(policy.attend(layer, q, step, **options))
    return torch.stack(outs)


def attend_alone(q, k, v, **options):
    """Attention of the last tokens of one text, without a cache."""
    cu_seqlens_q = torch.tensor([0, len(q)])
    return memkernels.paged_attention(q, k[None], v[None], cu_seqlens_q=cu_seqlens_q, **options)


def held(cache, seq_id, layer, x="v"):
    """The values, or keys, of a sequence: ``[L, Hkv, Dv]``."""
    length = cache.length(seq_id)
    pages = cache.page_table[seq_id, : -(-length // cache.page_size)]
    return getattr(cache, x)[layer, pages].flatten(0, 1)[:length]


def numbered(qkv, first=0):
    """Values that tell which token of the text they belong to."""
    q, k, v = qkv
    return q, k, (first + torch.arange(v.shape[1]))[:, None, None].expand_as(v).to(v.dtype)


def kept(cache, seq_id, layer=0, head=0):
    """The tokens of a numbered text that the cache still holds."""
    return held(cache, seq_id, layer)[:, head, 0].int().tolist()


def state(policy):
    """What the bookkeeping of a policy and its cache knows."""
    cache = policy.cache
    tables = cache.page_table.tolist(), cache.seq_lens.tolist(), cache._table.tolist()
    pool = copy.deepcopy((cache._lengths, cache._free_ids, cache._moved_from, vars(cache._pool)))
    return tables, pool, [x.tolist() for x in policy._states]


ROOMY = {
    "Quest": lambda cache: Quest(cache, 96, dense_layers=0),
    "Quest, mean": lambda cache: Quest(cache, 96, dense_layers=1, kind="mean"),
    "HeavyHitter": lambda cache: HeavyHitter(cache, 90),
    "SnapWindow": lambda cache: SnapWindow(cache, 90),
    "Streaming": lambda cache: Streaming(cache, 90),
    "Streaming, all heads": lambda cache: Streaming(cache, torch.tensor([96, 96])),
    "KNNMemory": lambda cache: KNNMemory(cache, 8, GATE, window=90),
}
TIGHT = {
    "Quest": lambda cache: Quest(cache, 12, dense_layers=1),
    "HeavyHitter": lambda cache: HeavyHitter(cache, 9, slack=2, decay=0.9),
    "SnapWindow": lambda cache: SnapWindow(cache, 8, window=3, pool=3, keep_first=1),
    "Streaming": lambda cache: Streaming(cache, 6, sink_tokens=2, slack=1),
    "KNNMemory": lambda cache: KNNMemory(cache, 7, GATE, window=5, k=3, slack=2),
}
CHUNKS = [7, 1, 12], [3, 0, 5], [1, 1, 1], [1, 1, 1], [1, 1, 1], [2, 9, 1], [1, 1, 1]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROOMY)
def test_room_for_everything(name, dtype, layout):
    """To the bit what the cache gives by itself, and nothing is evicted."""
    policy = ROOMY[name](make_cache(dtype=dtype, layout=layout))
    cache = make_cache(dtype=dtype, layout=layout)
    ids = policy.cache.allocate(3)
    assert cache.allocate(3) == ids
    for seed, counts in enumerate(CHUNKS):
        q, k, v = qkv = draw(sum(counts), seed, dtype)
        out = feed(policy, ids, qkv, counts)
        policy.evict(ids)
        step = cache.extend(ids, counts)
        assert_same_bits(policy.positions(step), step.positions)
        for layer in range(LAYERS):
            cache.append(layer, k[layer], v[layer], step)
            assert_same_bits(out[layer], cache.attend(layer, q[layer], step))
    assert_same_bits(policy.cache.page_table, cache.page_table)


@pytest.mark.parametrize("name", TIGHT)
def test_others_change_nothing(name):
    """A sequence beside others, in an id used before, gives the bits it gives alone."""

    def run(crowded):
        policy = TIGHT[name](make_cache())
        ids = policy.cache.allocate(2)
        if crowded:
            feed(policy, ids, draw(25, 100), [10, 15])
            policy.evict(ids)
            feed(policy, ids, draw(2, 101), [1, 1])
            policy.evict(ids)
        policy.cache.free([ids[1]])
        policy.reset([ids[1]])
        others, (new,) = ([ids[0]] if crowded else []), policy.cache.allocate()
        outs = []
        for seed, count in enumerate([9, 5, *[1] * 9, 4]):
            before = [1, 3, 0][seed % 3] if others else 0
            if others and name == "Quest" and count == 1:
                before = 1  # it selects where all sequences have one token
            rows = zip(draw(before, 200 + seed), draw(count, seed), strict=True)
            counts = [before, count] if others else [count]
            out = feed(policy, [*others, new], [torch.cat(x, 1) for x in rows], counts)
            outs.append(out[:, before:])
            policy.evict([new, *others])
        return torch.cat(outs, 1)

    assert_same_bits(run(crowded=True), run(crowded=False))


@pytest.mark.parametrize("name", TIGHT)
def test_forks_know_what_their_source_knows(name):
    policy = TIGHT[name](make_cache())
    (a,) = policy.cache.allocate()
    for seed, count in enumerate([15, 1, 1, 9]):
        policy.evict([a])
        feed(policy, [a], draw(count, seed), [count])
    forks = policy.cache.fork(a, 2)
    policy.reset(forks, source=a)
    policy.evict([a, *forks])
    for seed, count in enumerate([1, 1, 1, 8, 1]):
        qkv = [x.repeat(1, 3, 1, 1) for x in draw(count, 10 + seed)]
        out = feed(policy, [*forks, a], qkv, [count] * 3)
        for fork in out.chunk(3, 1):
            assert_same_bits(fork, out[:, :count])
        policy.evict([*forks, a])


@pytest.mark.parametrize("name", TIGHT)
def test_positions_are_those_in_the_text(name):
    policy = TIGHT[name](make_cache())
    ids, lengths = policy.cache.allocate(3), np.zeros(3, dtype=int)
    for seed, counts in enumerate(CHUNKS):
        qkv = draw(sum(counts), seed)
        step = policy.cache.extend(ids, counts)
        expected = [n + i for n, c in zip(lengths, counts, strict=True) for i in range(c)]
        assert policy.positions(step).tolist() == expected
        for layer, (q, k, v) in enumerate(zip(*qkv, strict=True)):
            policy.cache.append(layer, k, v, step)
            policy.attend(layer, q, step)
        lengths += counts
        policy.evict(ids)
    shrunk = [policy.cache.length(i) < n for i, n in zip(ids, lengths, strict=True)]
    assert shrunk == [name != "Quest"] * 3


@pytest.mark.parametrize("name", TIGHT)
def test_steps_without_tokens(name):
    policy = TIGHT[name](make_cache())
    ids = policy.cache.allocate(2)
    feed(policy, ids, draw(30, 0), [30, 0])
    policy.evict(ids)
    for seq_ids in ids, []:
        assert feed(policy, seq_ids, draw(0, 0), [0] * len(seq_ids)).shape[1] == 0
        policy.evict(seq_ids)
        policy.reset([])


# ---- Quest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["minmax", "mean"])
def test_quest_finds_the_needle(kind):
    """One page of 16 has what the query of a head looks for; each head looks for another."""
    policy = Quest(make_cache(page_size=4), 12, dense_layers=1, kind=kind)
    ids = policy.cache.allocate(2)
    q, k, v = draw(2 * 63, 0)
    needles = [[23, 38], [9, 50]]  # [sequence, KV head]
    last_q, last_k, last_v = draw(2, 1)
    k = k / 4
    for b, row in enumerate(needles):
        for head, token in enumerate(row):
            k[:, 63 * b + token, head] = 8 * last_q[:, b, GROUP * head]
    feed(policy, ids, [q, k, v], [63, 63])
    step = policy.cache.extend(ids)
    for layer in range(LAYERS):
        policy.cache.append(layer, last_k[layer], last_v[layer], step)
    assert policy.select(0, last_q[0], step) is None
    pages = policy.select(1, last_q[1], step)
    assert pages.shape == (2, KV_HEADS, 3)
    for b, row in enumerate(needles):
        for head, token in enumerate(row):
            assert pages[b, head].tolist() == [0, token // 4, 15]
    out = policy.attend(1, last_q[1], step)
    for b, row in enumerate(needles):
        for head, token in enumerate(row):
            torch.testing.assert_close(out[b, GROUP * head], v[1, 63 * b + token, head])


@pytest.mark.parametrize("kind", ["minmax", "mean"])
def test_quest_summaries_follow_pages(kind):
    """Through forks, copies on write, recycled and published pages: the bits of a rebuild."""
    policy = Quest(make_cache(max_seqs=5), 12, dense_layers=1, kind=kind)
    cache = policy.cache

    def check():
        (summary,) = policy._summaries.values()
        used = cache.page_table[cache.page_table >= 0].unique().long()
        expected = memkernels.summarize_keys(
            cache.k[1], cache.page_table, cache.seq_lens, kind=kind
        )
        assert len(used)
        assert_same_bits(summary[used], expected[used])

    (a,) = cache.allocate()
    feed(policy, [a], draw(10, 0), [10])
    b, c = cache.fork(a, 2)
    check()
    feed(policy, [b, a, c], draw(5, 1), [1, 3, 1])
    check()
    feed(policy, [b, a, c], draw(3, 2), [1, 1, 1])
    check()
    cache.publish(a, range(14))
    cache.free([a, b])
    policy.reset([a, b])
    d, num_tokens = cache.reuse(range(14))
    assert num_tokens == 12
    feed(policy, [d, c], draw(7, 3), [3, 4])
    check()
    (e,) = cache.fork(c)
    cache.compact([c, d], torch.tensor([[[0, 1, 3, 4, 6, 7]], [[0, 1, 2, 3, 5, 9]]]))
    policy.rebuild()
    check()
    feed(policy, [c, e, d], draw(3, 4), [1, 1, 1])
    check()


# ---- HeavyHitter ---------------------------------------------------------------------------------


def test_heavy_hitters_stay():
    """Each layer and head has tokens that all queries look at."""
    policy = HeavyHitter(make_cache(), 8, keep_first=2, keep_last=3, slack=0)
    q, k, v = numbered(draw(40, 0))
    hitters = [[(7, 11, 20), (5, 6, 30)], [(9, 10, 15), (3, 12, 13)]]  # [layer][head]
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        q[layer, :, GROUP * head : GROUP * (head + 1), 0] += 6
        k[layer, list(hitters[layer][head]), head, 0] += 6
    (a,) = policy.cache.allocate()
    feed(policy, [a], [q, k, v], [40])
    policy.evict([a])
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        assert kept(policy.cache, a, layer, head) == [0, 1, *hitters[layer][head], 37, 38, 39]


def test_heavy_hitter_by_hand():
    """Statistics are carried along: every eviction keeps the tokens that a plain computation over
    lists of tokens keeps, which has their sums."""
    budget, first, last, slack, decay = 9, 1, 3, 2, 0.9
    options = {"keep_first": first, "keep_last": last, "slack": slack, "decay": decay}
    policy = HeavyHitter(make_cache(dtype=torch.float64), budget, **options)
    ids = policy.cache.allocate(2)
    tokens = {key: [] for key in np.ndindex(LAYERS, 2, KV_HEADS)}  # (number, key, attention)
    evictions = 0
    for seed, counts in enumerate([[10, 14], [1, 1], [2, 6], *[[1, 1]] * 6]):
        q, k, v = numbered(draw(sum(counts), seed, torch.float64), 100 * seed)
        feed(policy, ids, [q, k, v], counts, scale=0.7, softcap=5.0)
        policy.evict(ids)
        for (layer, b, head), old in tokens.items():
            rows = range(counts[0]) if b == 0 else range(counts[0], sum(counts))
            old[:] = [(number, key, decay * total) for number, key, total in old]
            for row in rows:
                old.append((100 * seed + row, k[layer, row, head], 0.0))
                keys = torch.stack([key for _, key, _ in old])
                queries = q[layer, row, GROUP * head : GROUP * (head + 1)]
                logits = 5 * (0.7 * queries @ keys.T / 5).tanh()
                received = logits.softmax(-1).sum(0).tolist()
                old[:] = [(n, key, s + p) for (n, key, s), p in zip(old, received, strict=True)]
            if len(old) > budget + slack:
                middle = range(first, len(old) - last)
                best = sorted(middle, key=lambda i: -old[i][2])[: budget - first - last]
                stay = [*range(first), *sorted(best), *range(len(old) - last, len(old))]
                old[:] = [old[i] for i in stay]
                evictions += 1
            assert kept(policy.cache, ids[b], layer, head) == [number for number, _, _ in old]
            stats = policy._stats[layer, ids[b], head]
            expected = torch.tensor([total for _, _, total in old], dtype=torch.float64)
            torch.testing.assert_close(stats[: len(old)], expected)
            assert stats[len(old) :].eq(0).all()
    assert evictions >= 3 * len(tokens)


def test_statistics_know_the_options():
    """Probabilities of a query add up to one, whatever went into its logits."""
    policy = HeavyHitter(make_cache(), 90)
    (a,) = policy.cache.allocate()
    for seed, options in enumerate(
        [{"scale": 0.5}, {"softcap": 3.0}, {"window": 3, "sink_tokens": 1}]
    ):
        feed(policy, [a], draw(5, seed), [5], **options)
        total = policy._stats[:, a].sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, 5.0 * GROUP * (seed + 1)))
    feed(policy, [a], draw(1, 9), [1], sink_logit=torch.full((HEADS,), 9.0))
    assert (policy._stats[:, a].sum(-1) < 15 * GROUP + 0.5).all()


# ---- SnapWindow ----------------------------------------------------------------------------------


def test_what_the_last_queries_look_at_stays():
    """With its neighbours; what the queries before them look at does not, nor what comes after."""
    policy = SnapWindow(make_cache(), 12, window=4, pool=3, keep_first=1)
    cache, channels = policy.cache, torch.zeros(40, dtype=torch.long)
    channels[36:] = 1
    q, k, v = numbered(draw(40, 0))
    q, k = q / 4, k / 4
    q[:, torch.arange(40), :, channels] += 8
    k[:, 10:16, :, 0] += 8  # what the first queries look at
    k[:, [20, 27], 0, 1] += 8  # what the last do, in one head
    k[:, [7, 30], 1, 1] += 9  # and in the other
    k[:, 36:, :, 1] += 9  # the window itself
    (a,) = cache.allocate()
    feed(policy, [a], [q, k, v], [40])
    policy.evict([a])
    window = [36, 37, 38, 39]
    expected = [[0, 19, 20, 21, 26, 27, 28], [0, 6, 7, 8, 29, 30, 31]]
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        tokens = kept(cache, a, layer, head)
        assert len(tokens) == 12 and tokens[-4:] == window
        assert set(expected[head]) < set(tokens)
    for seed in range(40 - 12):  # generated tokens stay
        feed(policy, [a], numbered(draw(1, seed), 40 + seed), [1])
        policy.evict([a])
    assert cache.length(a) == 40
    feed(policy, [a], numbered(draw(5, 1), 68), [5])  # until the next chunk
    policy.evict([a])
    assert cache.length(a) == 12
    assert kept(cache, a)[-4:] == [69, 70, 71, 72]


def test_snap_window_by_hand():
    window, pool = 4, 3
    policy = SnapWindow(make_cache(dtype=torch.float64), 11, window=window, pool=pool, keep_first=2)
    ids = policy.cache.allocate(3)
    counts = [30, 1, 25]
    q, k, v = numbered(draw(sum(counts), 0, torch.float64))
    feed(policy, ids, [q, k, v], counts)
    policy.evict(ids)
    assert [policy.cache.length(i) for i in ids] == [11, 1, 11]
    for b, start, n in (0, 0, 30), (2, 31, 25):
        for layer, head in np.ndindex(LAYERS, KV_HEADS):
            keys = k[layer, start : start + n, head]
            received = torch.zeros(n, dtype=torch.float64)
            for t in range(n - window, n):
                queries = q[layer, start + t, GROUP * head : GROUP * (head + 1)]
                received[: t + 1] += (queries @ keys[: t + 1].T / DIM**0.5).softmax(-1).sum(0)
            prefix = received[: n - window].tolist()
            pooled = [max(prefix[max(0, j - 1) : j + 2]) for j in range(n - window)]
            best = sorted(range(2, n - window), key=lambda j: -pooled[j])[: 11 - window - 2]
            expected = [0, 1, *sorted(best), *range(n - window, n)]
            tokens = kept(policy.cache, ids[b], layer, head)
            assert [token - start for token in tokens] == expected


# ---- Streaming -----------------------------------------------------------------------------------

WINDOWS = {
    "number": 6,
    "heads": torch.tensor([3, 6]),
    "layers": torch.tensor([[2, 5], [6, 1]], dtype=torch.int32),
    "retrieval": torch.tensor([[6, 96], [2, 6]]),
}


@pytest.mark.parametrize("sink_tokens", [0, 3])
@pytest.mark.parametrize("name", WINDOWS)
def test_streaming(name, sink_tokens):
    """Attention is that over the whole text with windows, evicted or not."""
    window = WINDOWS[name]
    policy = Streaming(make_cache(), window, sink_tokens=sink_tokens, slack=2)
    per_layer = torch.as_tensor(window).expand(LAYERS, KV_HEADS)
    ids = policy.cache.allocate(2)
    texts = {i: [x[:, :0] for x in draw(1, 0)[1:]] for i in ids}
    evicted = 0
    for seed, counts in enumerate([[7, 1], [1, 1], [3, 0], [1, 9], [4, 4], *[[1, 1]] * 8]):
        q, k, v = draw(sum(counts), seed)
        out = feed(policy, ids, [q, k, v], counts)
        parts = [x.split(counts, 1) for x in (q, k, v, out)]
        for i, q, k, v, out in zip(ids, *parts, strict=True):
            texts[i] = [torch.cat(x, 1) for x in zip(texts[i], (k, v), strict=True)]
            for layer in range(LAYERS):
                k, v = (x[layer] for x in texts[i])
                options = {"window": per_layer[layer], "sink_tokens": sink_tokens}
                torch.testing.assert_close(out[layer], attend_alone(q[layer], k, v, **options))
        before = [policy.cache.length(i) for i in ids]
        policy.evict(ids)
        after = [policy.cache.length(i) for i in ids]
        evicted += sum(before) - sum(after)
        assert name == "retrieval" or max(after) <= sink_tokens + 6 + 2
    assert (evicted > 0) == (name != "retrieval")


# ---- KNNMemory -----------------------------------------------------------------------------------


def test_knn_memory_by_hand():
    """Against the text itself: the cache has the last tokens, the bank the ``size`` before them."""
    size, k_found, window, slack = 7, 3, 5, 2
    cache = make_cache(dtype=torch.float64)
    policy = KNNMemory(cache, size, GATE, window=window, k=k_found, slack=slack)
    ids = [0, 2]
    cache.allocate(3)
    texts = {i: [x[:, :0] for x in draw(1, 0, torch.float64)[1:]] for i in ids}
    begins = dict.fromkeys(ids, 0)  # of what is in the cache
    for seed, counts in enumerate([[6, 20], [1, 1], [5, 0], [3, 2], *[[1, 1]] * 10]):
        q, k, v = draw(sum(counts), seed, torch.float64)
        out = feed(policy, ids, [q, k, v], counts, scale=0.6)
        parts = [x.split(counts, 1) for x in (q, k, v, out)]
        for i, q, k, v, out in zip(ids, *parts, strict=True):
            texts[i] = [torch.cat(x, 1) for x in zip(texts[i], (k, v), strict=True)]
            for layer in range(LAYERS):
                k, v = (x[layer] for x in texts[i])
                begin = begins[i]
                expected = attend_alone(q[layer], k[begin:], v[begin:], scale=0.6)
                bank = slice(max(0, begin - size), begin)
                for t, h in np.ndindex(*expected.shape[:2]):
                    logits = 0.6 * k[bank, h // GROUP] @ q[layer, t, h]
                    if layer in GATE and len(logits):
                        found = logits.topk(min(k_found, len(logits)))
                        memory = found.values.softmax(-1) @ v[bank, h // GROUP][found.indices]
                        expected[t, h].lerp_(memory, GATE[layer][h].double().sigmoid())
                torch.testing.assert_close(out[layer], expected, rtol=1e-6, atol=1e-6)
            length = texts[i][0].shape[1]
            begins[i] = length - window if length - begins[i] > window + slack else begins[i]
        policy.evict(ids)
        lengths = [texts[i][0].shape[1] - begins[i] for i in ids]
        assert [cache.length(i) for i in ids] == lengths
    assert min(begins.values()) > 2 * size


# ---- errors --------------------------------------------------------------------------------------

WRONG = {
    "quest_budget": (
        functools.partial(Quest, budget=7),
        "Quest: budget must be at least 8 tokens, got 7",
    ),
    "quest_pages": (
        functools.partial(Quest, budget=3, keep_first=0, keep_last=0),
        "Quest: budget must be at least 4 tokens, got 3",
    ),
    "quest_keep": (
        functools.partial(Quest, budget=8, keep_last=-1),
        "Quest: keep_last must be at least 0, got -1",
    ),
    "quest_dense": (
        functools.partial(Quest, budget=8, dense_layers=-1),
        "Quest: dense_layers must be at least 0, got -1",
    ),
    "quest_kind": (
        functools.partial(Quest, budget=8, kind="max"),
        "Quest: kind must be minmax or mean, got max",
    ),
    "h2o_budget": (
        functools.partial(HeavyHitter, budget=0),
        "HeavyHitter: budget must be at least 1, got 0",
    ),
    "h2o_protected": (
        functools.partial(HeavyHitter, budget=8, keep_first=5),
        r"HeavyHitter: keep_first and keep_last protect 5 \+ 4 tokens, the budget is 8",
    ),
    "h2o_slack": (
        functools.partial(HeavyHitter, budget=8, slack=-1),
        "HeavyHitter: slack must be at least 0, got -1",
    ),
    "snap_window": (
        functools.partial(SnapWindow, budget=16),
        r"SnapWindow: keep_first and keep_last protect 0 \+ 32 tokens, the budget is 16",
    ),
    "snap_no_window": (
        functools.partial(SnapWindow, budget=16, window=0),
        "SnapWindow: window must be at least 1, got 0",
    ),
    "snap_pool": (
        functools.partial(SnapWindow, budget=64, pool=4),
        "SnapWindow: pool must be odd, got 4",
    ),
    "window": (
        functools.partial(Streaming, window=0),
        "Streaming: window must be at least 1, got 0",
    ),
    "window_shape": (
        functools.partial(Streaming, window=torch.ones(3, dtype=torch.int32)),
        r"Streaming: window must be \[Hkv\] or \[num_layers, Hkv\] integers, got \[3\] torch.int32",
    ),
    "window_floats": (
        functools.partial(Streaming, window=torch.ones(2)),
        "Streaming: window must be",
    ),
    "sinks": (
        functools.partial(Streaming, window=4, sink_tokens=-1),
        "Streaming: sink_tokens must be at least 0, got -1",
    ),
    "bank": (
        functools.partial(KNNMemory, size=0, gate=GATE),
        "KNNMemory: size must be at least 1, got 0",
    ),
    "gate_layer": (
        functools.partial(KNNMemory, size=8, gate={2: GATE[1]}),
        "KNNMemory: gate has no layer 2 of 2",
    ),
    "gate_heads": (
        functools.partial(KNNMemory, size=8, gate={0: torch.zeros(3)}),
        r"KNNMemory: gate of layer 0 must be \[Hq\] for 2 KV heads, got \[3\]",
    ),
}


@pytest.mark.parametrize("error", WRONG)
def test_wrong_arguments(error):
    make, message = WRONG[error]
    with pytest.raises(RuntimeError, match=message):
        make(make_cache())


@pytest.mark.parametrize("name", TIGHT)
def test_a_cache_with_a_window(name):
    with pytest.raises(RuntimeError, match=f"{name}: cache must have no window, it has one of 9"):
        TIGHT[name](make_cache(window=9))


REFUSED = {
    "reset": (
        lambda policy, ids: policy.reset([ids[0], 3]),
        "sequence 3 is none of the cache's 3",
    ),
    "reset_source": (
        lambda policy, ids: policy.reset(ids, source=-1),
        "sequence -1 is none of the cache's 3",
    ),
    "evict_unknown": (
        lambda policy, ids: policy.evict([*ids, 2]),
        "PagedKVCache: sequence 2 is not in use",
    ),
    "evict_twice": (
        lambda policy, ids: policy.evict([ids[0]] * 2),
        "PagedKVCache: a sequence is given twice",
    ),
    "evict_shared": (
        lambda policy, ids: policy.evict(ids),
        "PagedKVCache: . pages needed, 0 of 10 free",
    ),
    "attend": (
        lambda policy, ids: feed(policy, ids, [*draw(0, 0)[:2], torch.zeros(2, 0, 2, 3)], [0, 0]),
        "append_kv",
    ),
}


@pytest.mark.parametrize("error", REFUSED)
@pytest.mark.parametrize("name", [name for name in TIGHT if name != "Quest"])
def test_refused_calls_change_nothing(name, error):
    """Two sequences on the same pages, and no free page that one could be moved to."""
    call, message = REFUSED[error]
    policy = TIGHT[name](make_cache(num_pages=10))
    cache = policy.cache
    (a,) = cache.allocate()
    feed(policy, [a], draw(40, 0), [40])
    (b,) = cache.fork(a)
    policy.reset([b], source=a)
    before = state(policy)
    with unchanged(cache.k, cache.v), pytest.raises(RuntimeError, match=message):
        call(policy, [a, b])
    assert state(policy) == before
    cache.free([b])
    policy.evict([a])
    assert cache.length(a) < 40
