"""The keys and values of many growing sequences, in pages that all layers share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import memkernels
from memkernels.nn._page_pool import PagePool, content_keys
from memkernels.nn.tables import empty_table

Place = tuple[int, int]  # row and column of the page table


@dataclass(frozen=True)
class Step:
    """Where the new tokens of B sequences go, for every layer; T tokens in all.

    A snapshot: it holds until its sequences are extended again, compacted or freed.
    """

    page_table: Tensor  # [B, pages of the longest] int32, -1 where a sequence has no page
    seq_lens: Tensor  # [B] int32, new tokens included
    cu_seqlens_q: Tensor  # [B + 1] int32, where the new tokens of each sequence begin and end
    positions: Tensor  # [T] int64, of each new token in its sequence
    slot_mapping: Tensor  # [T] int64, page * page_size + offset
    # Known to the host:
    max_seqlen: int  # the largest of seq_lens
    seq_ids: tuple[int, ...]  # of the B sequences
    num_new: tuple[int, ...]  # new tokens of each


class PagedKVCache:
    """A KV cache of fixed-size pages, as in PagedAttention (Kwon et al., 2023).

    Sequences take pages as they grow and give them back when freed, so memory follows the tokens
    in use, not the longest sequence. One page table serves all layers: a page id names the same
    place in each of them.

    A forward pass reserves its tokens once, then writes and attends layer by layer::

        cache = PagedKVCache(num_layers, num_pages, page_size, num_kv_heads, head_dim, max_seqs=64)
        ids = cache.allocate(2)
        step = cache.extend(ids, [5, 3])            # 5 + 3 new tokens
        for layer in range(num_layers):
            q, k, v = ...                           # [8, Hq, D], [8, Hkv, D], [8, Hkv, Dv]
            cache.append(layer, k, v, step)
            out = cache.attend(layer, q, step)      # [8, Hq, Dv]
        cache.free(ids)

    Sequences share pages: `fork` continues one in several ways, `reuse` starts one from what
    another has left behind with `publish`. A shared page is copied before it is written to.
    Sequences also shrink: `compact` drops tokens, and windows give back pages out of sight.

    Bookkeeping is done on the host; the device's tables follow in place, and nothing waits for
    them. Pages and ids are handed out in an order that depends only on the calls made.
    Serving only: nothing here is differentiable.

    Args:
        num_layers: layers of the model.
        num_pages: pages in the pool; a page holds ``page_size`` tokens of every layer.
        page_size: tokens a page, any positive number.
        num_kv_heads, head_dim: ``Hkv`` and ``D``.
        head_dim_v: ``Dv``; None: ``head_dim``.
        max_seqs: sequences that can live at once.
        max_seq_len: tokens a sequence can have; None: as many as the pool holds. With a window it
            can be more.
        window: how many of the latest tokens a query sees, itself included: a number, ``[Hkv]`` or
            ``[num_layers, Hkv]`` integers; None: all. `extend` gives back pages that are out of
            the largest window. A head that is to see everything has a window of ``max_seq_len``.
        sink_tokens: first tokens of a sequence that stay visible outside the window.
        layout: order of heads and tokens in a page, "NHD" or "HND" (a permuted view).
        dtype, device: of keys and values.

    Attributes:
        k, v: ``[num_layers, num_pages, page_size, Hkv, D]`` and ``[..., Dv]``, uninitialised.
        page_table: ``[max_seqs, max_pages]`` int32, the pages of sequence ``id`` in row ``id``,
            -1 where there is none.
        seq_lens: ``[max_seqs]`` int32, tokens of each sequence.

    Raises:
        RuntimeError: when pages or sequences run out, a sequence would outgrow ``max_seq_len``,
            an id is not in use, or arguments contradict each other or the sequence; always before
            anything has changed.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        max_seqs: int,
        max_seq_len: int | None = None,
        window: int | Tensor | None = None,
        sink_tokens: int = 0,
        layout: str = "NHD",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        _check(layout in ("NHD", "HND"), f"layout must be NHD or HND, got {layout}")
        _check(page_size >= 1, f"page_size must be at least 1, got {page_size}")
        _check(sink_tokens >= 0, f"sink_tokens must not be negative, got {sink_tokens}")
        self.page_size = page_size
        self.max_seq_len = num_pages * page_size if max_seq_len is None else max_seq_len
        self.sink_tokens = sink_tokens
        self._windows, self._largest_window = [window] * num_layers, window
        if isinstance(window, Tensor):
            shapes = (num_kv_heads,), (num_layers, num_kv_heads)
            ok = tuple(window.shape) in shapes and window.dtype in (torch.int32, torch.int64)
            got = f"{list(window.shape)} {window.dtype}"
            _check(ok, f"window must be [Hkv] or [num_layers, Hkv] integers, got {got}")
            per_layer = window.to(device, copy=True).expand(*shapes[1])
            self._windows, self._largest_window = list(per_layer), int(window.max())
            window = int(window.min())
        _check(window is None or window >= 1, f"window must be at least 1, got {window}")

        def cache(dim: int) -> Tensor:
            inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
            data = empty_table(num_layers, num_pages, *inner, dim, dtype=dtype, device=device)
            return data if layout == "NHD" else data.transpose(2, 3)

        self.k = cache(head_dim)
        self.v = cache(head_dim if head_dim_v is None else head_dim_v)
        self._table = np.empty((max_seqs, self._pages_for(self.max_seq_len)), dtype=np.int32)
        self.page_table = torch.empty(self._table.shape, dtype=torch.int32, device=device)
        self.seq_lens = torch.empty(max_seqs, dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        """Frees every sequence and forgets what was published; all starts in its first order."""
        self._table.fill(-1)
        self.page_table.fill_(-1)
        self.seq_lens.zero_()
        self._pool = PagePool(self.k.shape[1])
        self._free_ids = list(reversed(range(len(self.seq_lens))))
        self._lengths: dict[int, int] = {}  # of the sequences in use
        self._moved_from: dict[int, int] = {}  # where compaction has first moved a token

    @property
    def num_free_pages(self) -> int:
        """Pages that can be taken, those that only `reuse` would still find included."""
        return self._pool.num_free

    def length(self, seq_id: int) -> int:
        """Tokens of a sequence, known without asking the device."""
        self._check_ids([seq_id])
        return self._lengths[seq_id]

    def allocate(self, num_seqs: int = 1) -> list[int]:
        """Starts empty sequences and returns their ids, which are their rows of the page table."""
        free, total = len(self._free_ids), len(self.seq_lens)
        _check(num_seqs <= free, f"{num_seqs} sequences needed, {free} of {total} free")
        ids = [self._free_ids.pop() for _ in range(num_seqs)]
        self._lengths |= dict.fromkeys(ids, 0)
        return ids

    def fork(self, seq_id: int, num_forks: int = 1) -> list[int]:
        """Starts sequences with the tokens of another, which are written in every layer."""
        length = self.length(seq_id)
        ids = self._start(num_forks, self._pages(seq_id), length)
        if seq_id in self._moved_from:
            self._moved_from |= dict.fromkeys(ids, self._moved_from[seq_id])
        return ids

    def publish(self, seq_id: int, token_ids: Sequence[int] | np.ndarray | Tensor) -> None:
        """Lets `reuse` find the full pages among the first tokens of a sequence.

        Pages whose content is findable already are left out. What is published outlives the
        sequence, until its pages are needed: then the least recently used go first, and of one
        sequence the last.

        Args:
            token_ids: what the first tokens of the sequence are; written in every layer, never
                moved by `compact`, and on pages that no window has given back.
        """
        length, tokens = self.length(seq_id), _token_array(token_ids)
        count, name = len(tokens), f"sequence {seq_id}"
        _check(count <= length, f"{count} token_ids, {name} has {length} tokens")
        moved = self._moved_from.get(seq_id, length)
        _check(count <= moved, f"{count} token_ids, {name} was compacted from token {moved} on")
        pages = self._table[seq_id, : self._pages_for(count)].tolist()
        _check(-1 not in pages, f"{name} has absent pages among its first {count} tokens")
        keys = list(content_keys(tokens, self.page_size))
        contradicted = any(map(self._pool.contradicts, pages, keys))
        _check(not contradicted, f"{name} has been published with other token_ids")
        self._pool.publish(pages, keys)

    def reuse(self, token_ids: Sequence[int] | np.ndarray | Tensor) -> tuple[int, int]:
        """Starts a sequence from the longest published prefix of its tokens.

        Returns:
            ``(seq_id, num_tokens)``: the new sequence, and how many of ``token_ids`` it holds
            already. Whole pages, perhaps none, and never all tokens: the last one's query is what
            the next token comes from.
        """
        tokens = _token_array(token_ids)
        pages = self._pool.find(content_keys(tokens[:-1], self.page_size))
        num_tokens = len(pages) * self.page_size
        (seq_id,) = self._start(1, pages, num_tokens)
        return seq_id, num_tokens

    def extend(self, seq_ids: Sequence[int], num_tokens: int | Sequence[int] = 1) -> Step:
        """Reserves slots for new tokens at the end of sequences, once for all layers.

        A partly filled last page that is shared is copied first, and pages out of the window are
        given back.

        Args:
            seq_ids: B different ids.
            num_tokens: new tokens of each, or of all alike.
        """
        counts = [num_tokens] * len(seq_ids) if isinstance(num_tokens, int) else list(num_tokens)
        self._check_ids(seq_ids)
        _check(len(counts) == len(seq_ids), f"{len(seq_ids)} sequences, {len(counts)} num_tokens")
        _check(all(count >= 0 for count in counts), f"num_tokens has a negative number: {counts}")
        starts = [self._lengths[seq_id] for seq_id in seq_ids]
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        longest, limit = max(lengths, default=0), self.max_seq_len
        _check(longest <= limit, f"a sequence would have {longest} tokens, max_seq_len is {limit}")

        out_of_sight = [place for seq_id in seq_ids for place in self._out_of_sight(seq_id)]
        leaving = Counter(int(self._table[place]) for place in out_of_sight)
        freed = sum(self._pool.holders[page] == times for page, times in leaving.items())
        partly_filled = [
            (seq_id, start // self.page_size)
            for seq_id, start, count in zip(seq_ids, starts, counts, strict=True)
            if count and start % self.page_size
        ]
        shared = self._shared(partly_filled, leaving)
        new = _places(seq_ids, *(map(self._pages_for, tokens) for tokens in (starts, lengths)))
        self._check_pages(len(shared) + len(new), freed)

        self._give_back(out_of_sight)
        self._copy_on_write(shared)
        self._set_pages(new, self._pool.take(len(new)))
        self._set_lengths(seq_ids, lengths)
        return self._step(seq_ids, starts, counts)

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Writes the keys ``[T, Hkv, D]`` and values ``[T, Hkv, Dv]`` of a step's new tokens."""
        memkernels.append_kv(k, v, self.k[layer], self.v[layer], step.slot_mapping)

    def attend(self, layer: int, q: Tensor, step: Step, **options):
        """Attention of a step's new tokens, q ``[T, Hq, D]``, to their sequences so far.

        options and result are those of `memkernels.paged_attention`; window and sink_tokens
        default to the cache's.
        """
        return memkernels.paged_attention(
            q,
            self.k[layer],
            self.v[layer],
            step.page_table,
            step.seq_lens,
            step.cu_seqlens_q,
            max_seqlen=step.max_seqlen,
            **{"window": self._windows[layer], "sink_tokens": self.sink_tokens, **options},
        )

    def compact(self, seq_ids: Sequence[int], keep: Tensor) -> None:
        """Keeps chosen tokens of sequences, in order, and gives back the pages this empties.

        Pages from the first moved token on must be the sequence's own to be written to; those
        that are not are copied first, into free pages. Keeping only first tokens moves nothing.
        Waits for the device, if ``keep`` lies there.

        Args:
            seq_ids: B different ids, of sequences without absent pages.
            keep: ``[B, Hkv, K]`` integers, for every layer alike, or ``[num_layers, B, Hkv, K]``;
                1 in place of Hkv: for all heads alike. Tokens of the sequence, ascending, then -1.
                A sequence keeps equally many in every head and layer.
        """
        self._check_ids(seq_ids)
        lengths = np.array([self._lengths[seq_id] for seq_id in seq_ids], dtype=np.int64)
        tokens, kept = self._checked_keep(keep, lengths)
        for seq_id in seq_ids:
            absent = -1 in self._pages(seq_id)
            _check(not absent, f"sequence {seq_id} has absent pages, it cannot be compacted")
        moved = ((tokens != np.arange(tokens.shape[-1])) & (tokens >= 0)).any((0, 2))  # [B, K]
        still = np.logical_and.accumulate(~moved, axis=-1).sum(-1)  # [B], K where nothing moves
        moving = np.flatnonzero(still < kept)
        ids = [seq_ids[b] for b in moving]
        first = still[moving] // self.page_size  # pages before it stay as they are
        shared = self._shared(_places(ids, first, self._pages_for(kept[moving])))
        self._check_pages(len(shared))

        self._copy_on_write(shared)
        involved = [set(self._pages(i)[begin:]) for i, begin in zip(ids, first, strict=True)]
        for turn in _disjoint(involved):
            rows = moving[turn]
            self._move([ids[i] for i in turn], first[turn], lengths[rows], tokens[:, rows])
        self._give_back(_places(seq_ids, self._pages_for(kept), self._pages_for(lengths)))
        self._set_lengths(seq_ids, kept.tolist())
        for seq_id, start, count in zip(seq_ids, still.tolist(), kept.tolist(), strict=True):
            start = min(start, self._moved_from.pop(seq_id, start))
            if start < count:
                self._moved_from[seq_id] = start

    def free(self, seq_ids: Sequence[int]) -> None:
        """Ends sequences and returns their pages to the pool."""
        self._check_ids(seq_ids)
        for seq_id in reversed(seq_ids):
            self._pool.release([page for page in self._pages(seq_id) if page >= 0])
            del self._lengths[seq_id]
            self._moved_from.pop(seq_id, None)
            self._free_ids.append(seq_id)
        self._table[list(seq_ids)] = -1
        rows = self._to_device(np.array(seq_ids, dtype=np.int64))
        self.page_table.index_fill_(0, rows, -1)
        self.seq_lens.index_fill_(0, rows, 0)

    def _start(self, num_seqs: int, pages: list[int], num_tokens: int) -> list[int]:
        """Starts sequences on pages that others hold or have published; -1: absent."""
        ids = self.allocate(num_seqs)
        for _ in ids:
            self._pool.hold(page for page in pages if page >= 0)
        self._set_pages(_places(ids, [0] * num_seqs, [len(pages)] * num_seqs), pages * num_seqs)
        self._set_lengths(ids, [num_tokens] * num_seqs)
        return ids

    def _out_of_sight(self, seq_id: int) -> list[Place]:
        """Pages that no query from the sequence's next token on can see."""
        if self._largest_window is None:
            return []
        begin = self._pages_for(self.sink_tokens)
        end = (self._lengths[seq_id] - self._largest_window + 1) // self.page_size
        row = self._table[seq_id, begin : max(begin, end)]
        return [(seq_id, begin + column) for column in np.flatnonzero(row >= 0).tolist()]

    def _shared(self, places: list[Place], leaving: Counter[int] | None = None) -> list[Place]:
        """Those whose pages must not be written to; the last of several owners may."""
        leaving = Counter(leaving)
        shared = []
        for place in places:
            page = int(self._table[place])
            if self._pool.is_shared(page, leaving[page]):
                leaving[page] += 1
                shared.append(place)
        return shared

    def _copy_on_write(self, places: list[Place]) -> None:
        if not places:
            return
        sources = [int(self._table[place]) for place in places]
        copies = self._pool.take(len(places))
        pairs = self._to_device(np.array([sources, copies]).T.copy())
        for k, v in zip(self.k, self.v, strict=True):
            memkernels.copy_pages(k, v, pairs)
        self._set_pages(places, copies)
        self._pool.release(sources)

    def _give_back(self, places: list[Place]) -> None:
        pages = [int(self._table[place]) for place in places]
        self._set_pages(places, [-1] * len(places))
        self._pool.release(pages)

    def _checked_keep(self, keep: Tensor, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """keep as ``[num_layers or 1, B, Hkv or 1, K]`` on the host, and tokens kept ``[B]``."""
        num_layers, heads = self.k.shape[0], self.k.shape[3]
        batch, shape = len(lengths), tuple(keep.shape)
        ok = shape[-3:-1] in ((batch, heads), (batch, 1)) and shape[:-3] in ((), (num_layers,))
        expected = f"[{batch}, {heads} or 1, K] or [{num_layers}, {batch}, {heads} or 1, K]"
        _check(ok, f"keep must be {expected}, got {list(shape)}")
        integers = keep.dtype in (torch.int32, torch.int64)
        _check(integers, f"keep must be int32 or int64, got {keep.dtype}")
        tokens = keep.cpu().numpy().astype(np.int64)
        tokens = tokens if tokens.ndim == 4 else tokens[None]
        valid = tokens >= 0
        counts = valid.sum(-1)  # [layers, B, heads]
        kept = counts.max((0, 2), initial=0)
        equal = (counts == kept[:, None]).all()
        _check(equal, "keep keeps different numbers of tokens in the heads or layers of a sequence")
        padded = np.arange(tokens.shape[-1]) >= counts[..., None]
        ok = np.where(padded, tokens == -1, valid & (tokens < lengths[:, None, None])).all()
        ascending = (padded[..., 1:] | (np.diff(tokens) > 0)).all()
        _check(ok and ascending, "keep must have ascending tokens of its sequence, then -1")
        return tokens, kept

    def _move(self, seq_ids, first, lengths, tokens) -> None:
        """Compacts sequences of ``lengths`` from their page ``first`` on, and gives nothing back.

        The op sees these pages as the whole sequence: earlier ones may be shared, and it refuses
        what might be written to twice.
        """
        offsets = first * self.page_size
        pages = [self._pages(seq_id)[begin:] for seq_id, begin in zip(seq_ids, first, strict=True)]
        table = np.full((len(pages), max(map(len, pages))), -1, dtype=np.int32)
        keep = np.full_like(tokens, -1)
        for b, offset in enumerate(offsets):
            table[b, : len(pages[b])] = pages[b]
            rest = tokens[:, b, :, offset:]
            keep[:, b, :, : rest.shape[-1]] = np.maximum(rest - offset, -1)
        table, seq_lens, keep = map(self._to_device, (table, lengths - offsets, keep))
        for layer, keep_layer in enumerate(keep.expand(len(self.k), -1, -1, -1)):
            memkernels.compact_kv(self.k[layer], self.v[layer], table, seq_lens, keep_layer)

    def _set_pages(self, places: list[Place], pages: list[int]) -> None:
        if not places:
            return
        places, pages = np.array(places), np.array(pages, dtype=np.int32)
        self._table[tuple(places.T)] = pages
        self.page_table[tuple(self._to_device(places).T)] = self._to_device(pages)

    def _set_lengths(self, seq_ids: Sequence[int], lengths: list[int]) -> None:
        self._lengths.update(zip(seq_ids, lengths, strict=True))
        rows = self._to_device(np.array(seq_ids, dtype=np.int64))
        self.seq_lens.index_copy_(0, rows, self._to_device(np.array(lengths, dtype=np.int32)))

    def _step(self, seq_ids, starts, counts) -> Step:
        rows, start, count = np.array([seq_ids, starts, counts], dtype=np.int64)
        seq_lens = start + count
        max_seqlen = int(seq_lens.max(initial=0))
        page_table = self._table[rows, : self._pages_for(max_seqlen)]
        cu_seqlens_q = np.cumsum([0, *counts], dtype=np.int32)
        token = np.arange(cu_seqlens_q[-1])  # [T], as all below
        owner = np.repeat(np.arange(len(rows)), count)
        position = token + (start - cu_seqlens_q[:-1])[owner]
        page = page_table[owner, position // self.page_size].astype(np.int64)
        return Step(
            page_table=self._to_device(page_table),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            cu_seqlens_q=self._to_device(cu_seqlens_q),
            positions=self._to_device(position),
            slot_mapping=self._to_device(page * self.page_size + position % self.page_size),
            max_seqlen=max_seqlen,
            seq_ids=tuple(seq_ids),
            num_new=tuple(counts),
        )

    def _check_ids(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            _check(seq_id in self._lengths, f"sequence {seq_id} is not in use")
        _check(len(set(seq_ids)) == len(seq_ids), f"a sequence is given twice in {list(seq_ids)}")

    def _check_pages(self, needed: int, freed: int = 0) -> None:
        free, total = self._pool.num_free + freed, self.k.shape[1]
        _check(needed <= free, f"{needed} pages needed, {free} of {total} free")

    def _pages(self, seq_id: int) -> list[int]:
        """The pages of a sequence, -1 where one is absent."""
        return self._table[seq_id, : self._pages_for(self._lengths[seq_id])].tolist()

    def _pages_for(self, num_tokens: int | np.ndarray) -> int | np.ndarray:
        return -(-num_tokens // self.page_size)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor, device = torch.from_numpy(array), self.page_table.device
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # else the copy would wait for the device
        return tensor.to(device, non_blocking=True)


def _places(seq_ids: Sequence[int], begins: Iterable[int], ends: Iterable[int]) -> list[Place]:
    return [
        (seq_id, column)
        for seq_id, begin, end in zip(seq_ids, begins, ends, strict=True)
        for column in range(begin, end)
    ]


def _disjoint(sets: list[set[int]]) -> list[list[int]]:
    """Indices of the sets, grouped so that no two sets of a group have an element in common."""
    groups: list[tuple[list[int], set[int]]] = []
    for i, elements in enumerate(sets):
        for members, union in groups:
            if union.isdisjoint(elements):
                members.append(i)
                union |= elements
                break
        else:
            groups.append(([i], set(elements)))
    return [members for members, _ in groups]


def _token_array(token_ids: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
    tokens = np.asarray(token_ids.cpu() if isinstance(token_ids, Tensor) else token_ids)
    ok = tokens.ndim == 1 and (np.can_cast(tokens.dtype, np.int64) or not tokens.size)
    _check(ok, f"token_ids must be [T] integers, got {list(tokens.shape)} {tokens.dtype}")
    return tokens.astype(np.int64)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"PagedKVCache: {message}")
