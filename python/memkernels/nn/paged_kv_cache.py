"""The keys and values of many growing sequences, in pages that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import memkernels


@dataclass(frozen=True)
class Step:
    """Where the new tokens of B sequences go, for every layer; T tokens in all.

    A snapshot: it holds until its sequences are extended again or freed.
    """

    page_table: Tensor  # [B, pages of the longest] int32, -1 where a sequence has no page
    seq_lens: Tensor  # [B] int32, new tokens included
    cu_seqlens_q: Tensor  # [B + 1] int32, where the new tokens of each sequence begin and end
    positions: Tensor  # [T] int64, of each new token in its sequence
    slot_mapping: Tensor  # [T] int64, page * page_size + offset
    max_seqlen: int  # the largest of seq_lens, known to the host


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
        max_seq_len: tokens a sequence can have; None: as many as the pool holds.
        layout: order of heads and tokens in a page, "NHD" or "HND" (a permuted view).
        dtype, device: of keys and values.

    Attributes:
        k, v: ``[num_layers, num_pages, page_size, Hkv, D]`` and ``[..., Dv]``, uninitialised.
        page_table: ``[max_seqs, max_pages]`` int32, the pages of sequence ``id`` in row ``id``,
            -1 where there is none.
        seq_lens: ``[max_seqs]`` int32, tokens of each sequence.

    Raises:
        RuntimeError: when pages or sequences run out, a sequence would outgrow ``max_seq_len``,
            or an id is not in use; always before anything has changed.
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
        layout: str = "NHD",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        _check(layout in ("NHD", "HND"), f"layout must be NHD or HND, got {layout}")
        _check(page_size >= 1, f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self.max_seq_len = num_pages * page_size if max_seq_len is None else max_seq_len

        def cache(dim: int) -> Tensor:
            inner = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
            data = torch.empty(num_layers, num_pages, *inner, dim, dtype=dtype, device=device)
            if data.is_cpu:  # random pages cost fewer address translations
                torch.ops.memkernels._advise_huge_pages(data)
            return data if layout == "NHD" else data.transpose(2, 3)

        self.k = cache(head_dim)
        self.v = cache(head_dim if head_dim_v is None else head_dim_v)
        self._table = np.empty((max_seqs, self._pages_for(self.max_seq_len)), dtype=np.int32)
        self.page_table = torch.empty(self._table.shape, dtype=torch.int32, device=device)
        self.seq_lens = torch.empty(max_seqs, dtype=torch.int32, device=device)
        self.reset()

    def reset(self) -> None:
        """Frees every sequence; allocation starts over in its first order."""
        self._table.fill(-1)
        self.page_table.fill_(-1)
        self.seq_lens.zero_()
        # Both are taken from the end, so the lowest first, and again in the order of their use.
        self._free_pages = list(reversed(range(self.k.shape[1])))
        self._free_ids = list(reversed(range(len(self.seq_lens))))
        self._lengths: dict[int, int] = {}  # of the sequences in use

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

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

    def extend(self, seq_ids: Sequence[int], num_tokens: int | Sequence[int] = 1) -> Step:
        """Reserves slots for new tokens at the end of sequences, once for all layers.

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
        held, needed = (list(map(self._pages_for, tokens)) for tokens in (starts, lengths))
        new, free, total = sum(needed) - sum(held), len(self._free_pages), self.k.shape[1]
        _check(new <= free, f"{new} pages needed, {free} of {total} free")

        places = [  # (row, column) of each new page
            (seq_id, column)
            for seq_id, begin, end in zip(seq_ids, held, needed, strict=True)
            for column in range(begin, end)
        ]
        self._set_pages(places, [self._free_pages.pop() for _ in places])
        self._lengths.update(zip(seq_ids, lengths, strict=True))
        return self._step(seq_ids, starts, counts)

    def append(self, layer: int, k: Tensor, v: Tensor, step: Step) -> None:
        """Writes the keys ``[T, Hkv, D]`` and values ``[T, Hkv, Dv]`` of a step's new tokens."""
        memkernels.append_kv(k, v, self.k[layer], self.v[layer], step.slot_mapping)

    def attend(self, layer: int, q: Tensor, step: Step, **options):
        """Attention of a step's new tokens, q ``[T, Hq, D]``, to their sequences so far.

        options and result are those of `memkernels.paged_attention`.
        """
        return memkernels.paged_attention(
            q,
            self.k[layer],
            self.v[layer],
            step.page_table,
            step.seq_lens,
            step.cu_seqlens_q,
            max_seqlen=step.max_seqlen,
            **options,
        )

    def free(self, seq_ids: Sequence[int]) -> None:
        """Ends sequences and returns their pages to the pool."""
        self._check_ids(seq_ids)
        for seq_id in reversed(seq_ids):
            pages = self._table[seq_id, : self._pages_for(self._lengths.pop(seq_id))]
            self._free_pages += reversed(pages.tolist())
            self._free_ids.append(seq_id)
        self._table[list(seq_ids)] = -1
        rows = self._to_device(np.array(seq_ids, dtype=np.int64))
        self.page_table.index_fill_(0, rows, -1)
        self.seq_lens.index_fill_(0, rows, 0)

    def _set_pages(self, places: list[tuple[int, int]], pages: list[int]) -> None:
        if not places:
            return
        places, pages = np.array(places), np.array(pages, dtype=np.int32)
        self._table[tuple(places.T)] = pages
        self.page_table[tuple(self._to_device(places).T)] = self._to_device(pages)

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
        step = Step(
            page_table=self._to_device(page_table),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            cu_seqlens_q=self._to_device(cu_seqlens_q),
            positions=self._to_device(position),
            slot_mapping=self._to_device(page * self.page_size + position % self.page_size),
            max_seqlen=max_seqlen,
        )
        self.seq_lens[self._to_device(rows)] = step.seq_lens
        return step

    def _check_ids(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            _check(seq_id in self._lengths, f"sequence {seq_id} is not in use")
        _check(len(set(seq_ids)) == len(seq_ids), f"a sequence is given twice in {list(seq_ids)}")

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor, device = torch.from_numpy(array), self.page_table.device
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # else the copy would wait for the device
        return tensor.to(device, non_blocking=True)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"PagedKVCache: {message}")
