"""PagedKVCache: bookkeeping against a dict of lists, and attention through its pages."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import memkernels
from memkernels.nn import PagedKVCache
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
    host = cache._free_pages, cache._free_ids, cache._lengths, cache._table.tolist()
    return copy.deepcopy((*host, cache.page_table.tolist(), cache.seq_lens.tolist()))


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
    assert step.max_seqlen == 5
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


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layout": "NDH"}, "layout must be NHD or HND"), ({"page_size": 0}, "page_size must be")],
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
