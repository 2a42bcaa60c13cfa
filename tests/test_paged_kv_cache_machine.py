"""PagedKVCache against a dict of lists, by any sequence of calls that hypothesis comes up with."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memkernels.nn import PagedKVCache
from memkernels.nn._page_pool import content_keys
from test_paged_kv_cache import state

LAYERS, HEADS, PAGES, MAX_SEQS, MAX_SEQ_LEN = 2, 2, 12, 5, 18
Values = list[list[list[int]]]  # [layers][heads][tokens]

# Choices inside a rule are evenly spread, as those of hypothesis are not: they favour small cases,
# and a cache that is nearly empty has nothing to share or to evict.
randoms = st.integers(0, 2**32).map(random.Random)


def place(layer, head):
    return layer * HEADS + head


@dataclass
class Sequence:
    tokens: list[int | None] = field(default_factory=list)  # None: moved here by compaction
    values: Values = field(
        default_factory=lambda: [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
    )
    absent: set[int] = field(default_factory=set)  # columns that a window has given back

    def places(self):
        for layer, head in itertools.product(range(LAYERS), range(HEADS)):
            yield (layer, head), self.values[layer][head]

    def page(self, column, page_size):
        at = slice(column * page_size, (column + 1) * page_size)
        return [[values[at] for values in heads] for heads in self.values]


class Machine(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 3]), window=st.sampled_from([None, None, 2, 5]))
    def start(self, page_size, window):
        self.page_size, self.window, self.sinks = page_size, window, 2 if window == 5 else 0
        per_head = window and torch.tensor([[1, window], [window, 1]])
        self.cache = PagedKVCache(
            LAYERS, PAGES, page_size, HEADS, 4,
            max_seqs=MAX_SEQS, max_seq_len=MAX_SEQ_LEN, window=per_head, sink_tokens=self.sinks,
        )  # fmt: skip
        self.cache.k.fill_(-1)  # comparable, as uninitialised memory may not be
        self.cache.v.fill_(-1)
        self.serial = 0
        self.now = 0
        self.forget()

    def forget(self):
        self.model: dict[int, Sequence] = {}
        # By their tokens from the start: the page and what it holds, [layers, heads, page_size].
        self.published: dict[tuple[int, ...], tuple[int, Values]] = {}
        self.last_used: dict[tuple[int, ...], int] = {}
        self.held: set[int] = set()
        self.plain_free = set(range(PAGES))

    # ---- what the model says ---------------------------------------------------------------------

    def pages_for(self, num_tokens):
        return -(-num_tokens // self.page_size)

    def pages(self, seq_id):
        return self.cache.page_table[seq_id, : self.pages_for(self.length(seq_id))].tolist()

    def length(self, seq_id):
        return len(self.model[seq_id].tokens)

    def holders(self):
        return Counter(page for i in self.model for page in self.pages(i) if page >= 0)

    def copies(self, places, holders):
        """Those of the places about to be written to whose pages need a copy."""
        published = {page for page, _ in self.published.values()}
        holders, copies = holders.copy(), []
        for place in places:
            page = self.at(place)
            if page in published or holders[page] > 1:
                holders[page] -= 1
                copies.append(place)
        return copies

    @contextlib.contextmanager
    def copied(self, copies, places):
        before = {place: self.at(place) for place in places}
        yield
        assert copies == [place for place in places if self.at(place) != before[place]]

    def at(self, place):
        return int(self.cache.page_table[place])

    def chain(self, tokens):
        """The published pages that tokens begin with."""
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        found = (self.published.get(tuple(tokens[:end])) for end in ends)
        return list(itertools.takewhile(lambda page: page is not None, found))

    def refused(self, match, call, *args):
        before, k, v = state(self.cache), self.cache.k.clone(), self.cache.v.clone()
        with pytest.raises(RuntimeError, match=f"PagedKVCache: .*{match}"):
            call(*args)
        assert state(self.cache) == before
        assert self.cache.k.equal(k) and self.cache.v.equal(v)

    def no_room(self, match, call, *args):
        """Refused; then some sequence ends, lest all that follows is refused too."""
        self.refused(match, call, *args)
        if self.model:
            self.free_these([min(self.model)])

    def free_these(self, ids):
        self.cache.free(ids)
        for seq_id in ids:
            del self.model[seq_id]

    def some(self, rng):
        return rng.sample(sorted(self.model), rng.randint(1, len(self.model)))

    # ---- rules -----------------------------------------------------------------------------------

    @rule(rng=randoms, count=st.integers(1, 2))
    def allocate(self, rng, count):
        if len(self.model) + count > MAX_SEQS:
            self.no_room("sequences needed", self.cache.allocate, count)
            return
        for seq_id in self.cache.allocate(count):
            assert seq_id not in self.model
            self.model[seq_id] = Sequence()
        self.grow(rng, sorted(self.model))

    @precondition(lambda self: self.model)
    @rule(rng=randoms, count=st.integers(1, 2))
    def fork(self, rng, count):
        seq_id = rng.choice(sorted(self.model))
        if len(self.model) + count > MAX_SEQS:
            self.no_room("sequences needed", self.cache.fork, seq_id, count)
            return
        for fork in self.cache.fork(seq_id, count):
            assert fork not in self.model
            self.model[fork] = copy.deepcopy(self.model[seq_id])
        if rng.random() < 0.5:  # while all still share their last page
            self.grow(rng, self.some(rng))

    @precondition(lambda self: self.model)
    @rule(rng=randoms)
    def extend(self, rng):
        self.grow(rng, self.some(rng))

    def grow(self, rng, ids):
        new = [[0] * rng.randint(0, 3) + [1] * rng.randint(0, 2) for _ in ids]
        counts, starts = list(map(len, new)), list(map(self.length, ids))
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        if max(ends) > MAX_SEQ_LEN:
            self.no_room("max_seq_len", self.cache.extend, ids, counts)
            return
        unseen = {i: self.out_of_sight(start) for i, start in zip(ids, starts, strict=True)}
        holders = self.holders()
        for i, columns in unseen.items():
            holders -= Counter(self.pages(i)[column] for column in columns - self.model[i].absent)
        written = [
            (i, start // self.page_size)
            for i, start, count in zip(ids, starts, counts, strict=True)
            if count and start % self.page_size
        ]
        needed = sum(map(self.pages_for, ends)) - sum(map(self.pages_for, starts))
        copies = self.copies(written, holders)
        needed += len(copies)
        if needed > PAGES - len(holders):
            self.no_room("pages needed", self.cache.extend, ids, counts)
            return

        with self.copied(copies, written):
            step = self.cache.extend(ids, counts)
        first = 10 * self.serial  # 10 times a number of its own, and the place: no two are equal
        self.serial += sum(counts)
        for layer in range(LAYERS):
            values = first + 10 * torch.arange(sum(counts))[:, None] + place(layer, 0)
            k = (values + torch.arange(HEADS))[..., None].expand(-1, -1, 4).float().contiguous()
            self.cache.append(layer, k, -k, step)
        for i, tokens in zip(ids, new, strict=True):
            self.model[i].tokens += tokens
            for (layer, head), values in self.model[i].places():
                values += range(first + place(layer, head), first + 10 * len(tokens), 10)
            first += 10 * len(tokens)
            self.model[i].absent |= unseen[i]

    def out_of_sight(self, start):
        if self.window is None:
            return set()
        pages = [range(c, c + self.page_size) for c in range(0, start, self.page_size)]
        hidden = [all(j >= self.sinks and start - j >= self.window for j in page) for page in pages]
        return set(itertools.compress(itertools.count(), hidden))

    @precondition(lambda self: self.model)
    @rule(rng=randoms)
    def publish(self, rng):
        seq_id = rng.choice(sorted(self.model))
        sequence, length = self.model[seq_id], self.length(seq_id)
        count = rng.choice([length, length, rng.randint(0, length), length + 1])
        tokens, pages = sequence.tokens[:count], self.pages(seq_id)
        if count > length:
            self.refused("token_ids", self.cache.publish, seq_id, [0] * count)
            return
        if None in tokens:
            self.refused("compacted", self.cache.publish, seq_id, [0] * count)
            return
        if sequence.absent & set(range(self.pages_for(count))):
            self.refused("absent", self.cache.publish, seq_id, tokens)
            return
        ends = range(self.page_size, count + 1, self.page_size)
        known = {page for page, _ in self.published.values()}
        wrong = [end for end, page in zip(ends, pages, strict=False) if page in known]
        if wrong:  # and what is published as one thing is not published as another
            self.refused("other token_ids", self.cache.publish, seq_id, [9, *tokens[1 : wrong[0]]])
        self.cache.publish(seq_id, tokens)
        for column, end in enumerate(ends):
            values = sequence.page(column, self.page_size)
            self.published.setdefault(tuple(tokens[:end]), (pages[column], values))

    @rule(rng=randoms)
    def reuse(self, rng):
        tokens = [
            *rng.choice(sorted(self.published) or [()]),
            *rng.choices([0, 1], k=rng.randint(0, 3)),
        ]
        chain = self.chain(tokens[:-1])
        if len(self.model) == MAX_SEQS:
            self.no_room("sequences needed", self.cache.reuse, tokens)
            return
        seq_id, num_tokens = self.cache.reuse(tokens)
        assert seq_id not in self.model
        assert num_tokens == len(chain) * self.page_size
        self.model[seq_id] = Sequence(tokens[:num_tokens])
        for (layer, head), values in self.model[seq_id].places():
            values += [value for _, page in chain for value in page[layer][head]]
        assert self.pages(seq_id) == [page for page, _ in chain]

    @precondition(lambda self: self.model)
    @rule(rng=randoms, per_layer=st.booleans(), per_head=st.booleans())
    def compact(self, rng, per_layer, per_head):
        ids = self.some(rng)
        rows = {i: self.kept(rng, self.length(i), per_layer, per_head) for i in ids}
        kept = {i: len(rows[i][0][0]) for i in ids}
        keep = torch.full((LAYERS, len(ids), HEADS, max(kept.values())), -1)
        for b, i in enumerate(ids):
            keep[:, b, :, : kept[i]] = torch.tensor(rows[i])
        keep = keep if per_head else keep[:, :, :1]
        keep = keep if per_layer else keep[0]
        if any(self.model[i].absent for i in ids):
            self.refused("absent", self.cache.compact, ids, keep)
            return
        still, written = {}, []
        for i in ids:
            lists = itertools.chain(*rows[i])
            moved = [t for tokens in lists for t, token in enumerate(tokens) if t != token]
            still[i] = min(moved, default=kept[i])
            if moved:
                columns = range(still[i] // self.page_size, self.pages_for(kept[i]))
                written += [(i, column) for column in columns]
        holders = self.holders()
        copies = self.copies(written, holders)
        if len(copies) > PAGES - len(holders):
            self.no_room("pages needed", self.cache.compact, ids, keep)
            return
        with self.copied(copies, written):
            self.cache.compact(ids, keep)
        for i in ids:
            self.model[i].tokens[still[i] :] = [None] * (kept[i] - still[i])
            for (layer, head), values in self.model[i].places():
                values[:] = [values[t] for t in rows[i][layer][head]]

    def kept(self, rng, length, per_layer, per_head):
        """Tokens to keep, [layers][heads][tokens]: some first ones, and perhaps others."""
        lead = rng.randint(0, length)
        count = rng.choice([0, rng.randint(0, length - lead), max(0, length - lead - 2)])

        def some():
            return [*range(lead), *sorted(rng.sample(range(lead, length), count))]

        layers = [[some() for _ in range(HEADS)] for _ in range(LAYERS)]
        layers = layers if per_head else [heads[:1] * HEADS for heads in layers]
        return layers if per_layer else layers[:1] * LAYERS

    @precondition(lambda self: self.model)
    @rule(rng=randoms)
    def free(self, rng):
        self.free_these(self.some(rng)[:2])

    @precondition(lambda self: self.now % 20 == 19)
    @rule()
    def reset(self):
        self.cache.reset()
        self.forget()

    @precondition(lambda self: self.model and self.now % 20 == 18)
    @rule(rng=randoms)
    def mistakes(self, rng):
        cache, some, unknown = self.cache, self.some(rng), rng.choice([-1, MAX_SEQS])
        for call in cache.free, cache.extend, lambda ids: cache.compact(ids, torch.zeros(1, 1, 1)):
            self.refused("not in use", call, [*some, unknown])
            self.refused("twice", call, [*some, some[0]])
        for call in cache.fork, cache.length, lambda i: cache.publish(i, [1]):
            self.refused("not in use", call, unknown)

    # ---- invariants ------------------------------------------------------------------------------

    @invariant()
    def holds_what_the_model_holds(self):
        self.tables_and_counts()
        self.evictions()  # after which the model too has published only what can be found
        self.contents()

    def tables_and_counts(self):
        cache, holders = self.cache, self.holders()
        assert cache.page_table.tolist() == cache._table.tolist()
        assert [cache._pool.holders[page] for page in range(PAGES)] == [
            holders[page] for page in range(PAGES)
        ]
        assert cache.num_free_pages + len(holders) == PAGES
        assert set(cache._pool._free).isdisjoint({*holders, *cache._pool._idle})
        for seq_id in range(MAX_SEQS):
            length = self.length(seq_id) if seq_id in self.model else 0
            assert cache.seq_lens[seq_id] == length
            if seq_id in self.model:
                assert cache.length(seq_id) == length
                pages = self.pages(seq_id)
                absent = {column for column, page in enumerate(pages) if page < 0}
                assert absent == self.model[seq_id].absent
            assert cache.page_table[seq_id, self.pages_for(length) :].eq(-1).all()

    def contents(self):
        for seq_id, sequence in self.model.items():
            for column, page in enumerate(self.pages(seq_id)):
                self.check_page(page, sequence.page(column, self.page_size))
        for page, values in self.published.values():
            self.check_page(page, values)

    def check_page(self, page, values):
        if page < 0:
            return
        expected = torch.tensor(values).transpose(1, 2)[..., None]  # [layers, tokens, heads, 1]
        for cache, sign in (self.cache.k, 1), (self.cache.v, -1):
            assert cache[:, page, : expected.shape[1]].eq(sign * expected).all()

    def evictions(self):
        """What is not found any more: only when nothing else was left, the least recently used
        first, and nothing before what follows it."""
        self.now += 1
        pool, held = self.cache._pool, set(self.holders())
        keys = {tokens: self.key(tokens) for tokens in self.published}
        evicted = {tokens for tokens in keys if keys[tokens] not in pool._page_of}
        idle = {
            tokens
            for tokens, (page, _) in self.published.items()
            if tokens in evicted or page not in held
        }
        before, used = dict(self.last_used), set()
        for tokens, (page, _) in self.published.items():
            if tokens not in idle:
                used.add(tokens)
            elif page in self.held:  # until now; it, and through it all that it continues
                while tokens in idle:
                    used.add(tokens)
                    tokens = tokens[: -self.page_size]
        self.last_used |= dict.fromkeys(used, self.now)
        for gone in evicted:
            # A call may take pages before it gives others back, or after: what it has touched
            # says nothing about the order.
            for kept in idle - evicted - used:
                assert kept[: -self.page_size] != gone
                assert before[gone] <= before[kept]
            del self.published[gone], self.last_used[gone]
        assert pool._page_of == {keys[t]: page for t, (page, _) in self.published.items()}
        assert pool._content_of.keys() == {page for page, _ in self.published.values()}
        assert not evicted or self.plain_free <= held
        self.held, self.plain_free = held, set(pool._free)

    def key(self, tokens):
        return list(content_keys(np.array(tokens), self.page_size))[-1]


Machine.TestCase.settings = settings(
    stateful_step_count=60, max_examples=min(settings().max_examples, 500)
)
TestMachine = Machine.TestCase
