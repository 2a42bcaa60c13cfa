"""What a query attends to and what a cache forgets: policies over a PagedKVCache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import memkernels
from memkernels.nn.paged_kv_cache import PagedKVCache, Step


class Policy:
    """Attention through a cache, by way of what it selects, observes and evicts.

    `attend` takes the place of `PagedKVCache.attend`, and `positions` that of
    ``step.positions``, since indices in a cache that forgets are not positions in the text::

        policy = HeavyHitter(cache, budget=1024)
        step = cache.extend(ids, [5, 3])
        positions = policy.positions(step)          # for rotary embeddings
        for layer in range(num_layers):
            cache.append(layer, k, v, step)
            out = policy.attend(layer, q, step)     # [8, Hq, Dv]
        policy.evict(ids)                           # after any step, or now and then
        cache.free(ids)
        policy.reset(ids)

    This base attends to everything and forgets nothing. Serving only, under ``torch.no_grad()``.

    Args:
        cache: without a window. Others may use it too, but `PagedKVCache.compact` is left to the
            policy where it keeps anything about tokens.

    Raises:
        RuntimeError: on arguments that contradict each other or the cache, named with the class;
            and what the cache raises. Always before anything has changed.
    """

    def __init__(self, cache: PagedKVCache):
        window = cache._largest_window
        self._check(window is None, f"cache must have no window, it has one of {window}")
        self.cache = cache
        self._dropped = np.zeros(len(cache.seq_lens), dtype=np.int64)  # tokens of each sequence
        # All that is known of sequences, each with one row an id.
        self._states: list[np.ndarray | Tensor] = [self._dropped]

    def attend(self, layer: int, q: Tensor, step: Step, **options) -> Tensor:
        """Attention of a step's new tokens, q ``[T, Hq, D]``, after their keys were appended.

        options are those of `memkernels.paged_attention`, as far as the attention to what was
        selected knows them too.
        """
        selected = self.select(layer, q, step)
        if selected is None:
            out, lse = self.cache.attend(layer, q, step, return_lse=True, **options)
        else:
            out, lse = memkernels.gather_attention(
                q,
                self.cache.k[layer],
                self.cache.v[layer],
                selected,
                step.page_table,
                step.seq_lens,
                step.cu_seqlens_q,
                return_lse=True,
                **options,
            )
        self.observe(layer, q, step, lse, **options)
        return out

    def select(self, layer: int, q: Tensor, step: Step) -> Tensor | None:
        """The pages that each query attends to, ``[T, Hkv, K]``; None: all."""
        return None

    def observe(self, layer: int, q: Tensor, step: Step, lse: Tensor, **options) -> None:
        """Learns from a layer's attention, of which lse ``[T, Hq]`` came and options went in."""

    def evict(self, seq_ids: Sequence[int]) -> None:
        """Shrinks those of the sequences that are beyond their budget, once all layers of a step
        are done."""

    def positions(self, step: Step) -> Tensor:
        """``[T]`` int64: where the new tokens stand in the text, evicted tokens counted."""
        dropped = self._dropped[list(step.seq_ids)]
        if not dropped.any():
            return step.positions
        return step.positions + self.cache._to_device(dropped.repeat(step.num_new))

    def reset(self, seq_ids: Sequence[int], source: int | None = None) -> None:
        """Forgets all about sequences, whose ids are to be used anew; or, of new forks of
        ``source``, knows what is known of that."""
        ids, limit = list(seq_ids), len(self._dropped)
        for seq_id in ids if source is None else [*ids, source]:
            self._check(0 <= seq_id < limit, f"sequence {seq_id} is none of the cache's {limit}")
        for state, seq_id in itertools.product(self._states, ids):
            state[seq_id] = 0 if source is None else state[source]

    def _compact(self, seq_ids: Sequence[int], keep: Tensor) -> None:
        lengths = self._lengths(seq_ids)
        self.cache.compact(seq_ids, keep)
        self._dropped[list(seq_ids)] += lengths - self._lengths(seq_ids)

    def _lengths(self, seq_ids: Sequence[int]) -> np.ndarray:
        return np.array([self.cache.length(seq_id) for seq_id in seq_ids], dtype=np.int64)

    def _longer_than(self, limit: int, seq_ids: Sequence[int]) -> list[int]:
        return [seq_id for seq_id in seq_ids if self.cache.length(seq_id) > limit]

    def _indices(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return self.cache._to_device(np.array(numbers, dtype=np.int64))

    def _check(self, ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"{type(self).__name__}: {message}")

    def _check_at_least(self, least: int, **arguments: int) -> None:
        for name, value in arguments.items():
            self._check(value >= least, f"{name} must be at least {least}, got {value}")


class Quest(Policy):
    """Each query attends to the pages that may hold its largest logits (Quest, Tang et al., 2024).

    Pages are ranked by a bound on the logits of their keys. Steps of one token a sequence select;
    other steps, such as prefill, attend to everything. Nothing is evicted.

    Summaries belong to pages, as in the paper: forks share them, and published pages keep theirs.
    Simplified: query heads of a group read the same pages, those of the largest bound among them;
    the budget is the same in all layers and heads.

    Args:
        cache: see `Policy`.
        budget: tokens to attend to, in whole pages.
        keep_first, keep_last: pages at the ends of a sequence that are always attended to, as part
            of the budget.
        dense_layers: first layers, which attend to everything.
        kind: "minmax", Quest's; or "mean", pages ranked by their mean key (InfLLM, Xiao et al.,
            2024).
    """

    def __init__(
        self,
        cache: PagedKVCache,
        budget: int,
        *,
        keep_first: int = 1,
        keep_last: int = 1,
        dense_layers: int = 2,
        kind: str = "minmax",
    ):
        super().__init__(cache)
        self._check_at_least(
            0, keep_first=keep_first, keep_last=keep_last, dense_layers=dense_layers
        )
        self._check(kind in ("minmax", "mean"), f"kind must be minmax or mean, got {kind}")
        self._pages, self._protected = budget // cache.page_size, (keep_first, keep_last)
        least = max(1, keep_first + keep_last) * cache.page_size
        self._check(budget >= least, f"budget must be at least {least} tokens, got {budget}")
        self._kind = kind
        num_layers, num_pages, _, heads, dim = cache.k.shape
        shape, dtype = (num_pages, heads, 2, dim), cache.k.dtype
        if kind == "mean":
            shape, dtype = (num_pages, heads, dim), torch.promote_types(dtype, torch.float32)
        self._summaries = {
            layer: cache.k.new_zeros(shape, dtype=dtype)
            for layer in range(dense_layers, num_layers)
        }

    def select(self, layer: int, q: Tensor, step: Step) -> Tensor | None:
        if layer not in self._summaries:
            return None
        summary, keys = self._summaries[layer], self.cache.k[layer]
        where = step.page_table, step.seq_lens
        if any(count != 1 for count in step.num_new):
            memkernels.update_summaries(summary, keys, *where, step.cu_seqlens_q.diff())
            return None
        memkernels.update_summaries(summary, keys, *where)
        page_size = self.cache.page_size
        scores = memkernels.score_pages(q, summary, *where, page_size, kind=self._kind)
        lengths = (step.seq_lens + (page_size - 1)) // page_size
        return memkernels.select_topk(scores, self._pages, lengths[:, None], *self._protected)

    def rebuild(self) -> None:
        """Summarizes the pages of all sequences anew.

        Due after `PagedKVCache.compact`, and after tokens of a layer that were never attended to
        by this policy. Also after a `PagedKVCache.reuse`, if it finds what was compacted before.
        """
        cache = self.cache
        for layer, summary in self._summaries.items():
            where = cache.page_table, cache.seq_lens, cache.seq_lens
            memkernels.update_summaries(summary, cache.k[layer], *where)


class HeavyHitter(Policy):
    """Sequences keep their recent tokens and those that got most attention (H2O, Zhang et al.,
    2023).

    Every layer and KV head keeps its own tokens, by the attention they have received from all
    queries so far. Simplified: the heads of a group are added up; a sequence may exceed its budget
    by some slack, so that tokens are evicted many at a time.

    Tokens that `PagedKVCache.reuse` finds start without any attention. The statistics take
    ``num_layers * max_seqs * Hkv * max_seq_len`` floats.

    Args:
        cache: see `Policy`.
        budget: tokens a sequence keeps.
        keep_first: first tokens of the text, which stay.
        keep_last: most recent tokens, which stay; None: half the budget, as in the paper.
        slack: tokens beyond the budget that `evict` tolerates.
        decay: factor on all earlier attention at each step.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        budget: int,
        *,
        keep_first: int = 0,
        keep_last: int | None = None,
        slack: int = 32,
        decay: float = 1.0,
    ):
        super().__init__(cache)
        keep_last = budget // 2 if keep_last is None else keep_last
        self._check_at_least(1, budget=budget)
        self._check_at_least(0, keep_first=keep_first, keep_last=keep_last, slack=slack)
        protected = f"keep_first and keep_last protect {keep_first} + {keep_last} tokens"
        self._check(keep_first + keep_last <= budget, f"{protected}, the budget is {budget}")
        self._budget, self._slack, self._decay = budget, slack, decay
        self._protected = {"keep_first": keep_first, "keep_last": keep_last}
        max_seqs, max_pages = cache.page_table.shape
        # [num_layers, max_seqs, Hkv, max_len]; 0 beyond a sequence's length.
        self._stats = cache.k.new_zeros(
            (len(cache.k), max_seqs, cache.k.shape[3], max_pages * cache.page_size),
            dtype=torch.promote_types(cache.k.dtype, torch.float32),
        )
        self._states.append(self._stats.transpose(0, 1))

    def observe(self, layer: int, q: Tensor, step: Step, lse: Tensor, **options) -> None:
        rows, in_use = self._indices(step.seq_ids), self._in_use(layer, step)
        stats = in_use.index_select(0, rows)
        memkernels.attention_colstats(
            q,
            self.cache.k[layer],
            step.page_table,
            step.seq_lens,
            step.cu_seqlens_q,
            lse,
            accumulate_into=stats,
            decay=self._decay,
            **_without_sink_logit(options),
        )
        in_use.index_copy_(0, rows, stats)

    def evict(self, seq_ids: Sequence[int]) -> None:
        due = self._due(seq_ids)
        if not due:
            return
        num_layers, budget = len(self.cache.k), self._budget
        rows, in_use = self._indices(due), self._stats[..., : self._lengths(due).max()]
        stats = in_use.index_select(1, rows)  # [num_layers, B, Hkv, L]
        seq_lens = self.cache.seq_lens[rows].repeat(num_layers)
        keep = memkernels.evict(stats.flatten(0, 1), seq_lens, budget, **self._protected)
        keep = keep.unflatten(0, (num_layers, -1))
        self._compact(due, keep)
        kept = stats.gather(-1, keep.long())
        in_use.index_copy_(1, rows, F.pad(kept, (0, stats.shape[-1] - budget)))

    def _due(self, seq_ids: Sequence[int]) -> list[int]:
        return self._longer_than(self._budget + self._slack, seq_ids)

    def _in_use(self, layer: int, step: Step) -> Tensor:
        """What is kept of a layer, ``[max_seqs, Hkv, L]``, as far as the step's sequences go."""
        return self._stats[layer, ..., : step.page_table.shape[1] * self.cache.page_size]


class SnapWindow(HeavyHitter):
    """Prompts keep what their last queries attend to (SnapKV, Li et al., 2024).

    A token counts as much as the most attended one among its ``pool`` neighbours, by the attention
    of the last ``window`` queries of a step. `evict` shrinks sequences whose latest step had more
    than one token; what is generated after stays. Prompts may come in chunks, each followed by an
    `evict`: with an instruction at the end of each chunk this is CItruS (Bai et al., 2024), with
    generic query tokens there StreamMem (Yang et al., 2025).

    Simplified: SnapKV's pool is a mean in some of its settings; such instructions and query tokens
    stay in the cache until the next `evict`, and tokens are dropped, never merged.

    Args:
        cache: see `Policy`.
        budget: tokens a sequence keeps, the last ``window`` among them.
        window: queries that observe.
        pool: tokens in a neighbourhood, an odd number.
        keep_first: first tokens of the text, which stay.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        budget: int,
        *,
        window: int = 32,
        pool: int = 7,
        keep_first: int = 0,
    ):
        self._check_at_least(1, window=window, pool=pool)
        self._check(pool % 2 == 1, f"pool must be odd, got {pool}")
        super().__init__(cache, budget, keep_first=keep_first, keep_last=window, slack=0)
        self._window, self._pool = window, pool
        # Tokens of each sequence when it was last observed, 0 once that is used up.
        self._observed = np.zeros_like(self._dropped)
        self._states.append(self._observed)

    def observe(self, layer: int, q: Tensor, step: Step, lse: Tensor, **options) -> None:
        counts = np.array(step.num_new, dtype=np.int64)
        seen = np.flatnonzero(counts > 1)
        if not len(seen):
            return
        last = np.minimum(counts[seen], self._window)
        queries = np.concatenate(
            [np.arange(end - n, end) for end, n in zip(counts.cumsum()[seen], last, strict=True)]
        )
        queries, rows = self._indices(queries), self._indices(seen)
        seq_lens = step.seq_lens[rows]
        stats = memkernels.attention_colstats(
            q[queries],
            self.cache.k[layer],
            step.page_table[rows],
            seq_lens,
            self.cache._to_device(np.cumsum([0, *last], dtype=np.int32)),
            lse[queries],
            **_without_sink_logit(options),
        )
        # The window is kept anyway; its large statistics are not to reach its neighbours.
        tokens = torch.arange(stats.shape[-1], device=stats.device)
        own = tokens >= (seq_lens - self._window)[:, None, None]
        stats = F.max_pool1d(stats.masked_fill(own, 0), self._pool, 1, self._pool // 2)
        seq_ids = np.array(step.seq_ids)[seen]
        self._in_use(layer, step).index_copy_(0, self._indices(seq_ids), stats)
        self._observed[seq_ids] = self._lengths(seq_ids.tolist())

    def evict(self, seq_ids: Sequence[int]) -> None:
        super().evict(seq_ids)
        self._observed[list(seq_ids)] = 0

    def _due(self, seq_ids: Sequence[int]) -> list[int]:
        long = self._longer_than(self._budget, seq_ids)
        return [seq_id for seq_id in long if self._observed[seq_id] == self.cache.length(seq_id)]


class Streaming(Policy):
    """Queries see the first tokens and a window (StreamingLLM, Xiao et al., 2023), in some or in
    all heads (DuoAttention, Xiao et al., 2024).

    Where all heads stream, `evict` drops what none will see again. One head that is to see
    everything keeps all tokens, for all heads and layers alike.

    Simplified: keys keep the rotation they were cached with, so that distances are those in the
    text, not those in the cache as in StreamingLLM; which heads stream is for the caller to know.

    Args:
        cache: see `Policy`.
        window: how many of the latest tokens a query sees, itself included: a number, ``[Hkv]`` or
            ``[num_layers, Hkv]`` integers. A head that is to see everything (DuoAttention's
            retrieval heads) has a window of ``max_seq_len``.
        sink_tokens: first tokens of the text, which stay visible.
        slack: tokens beyond the window that `evict` tolerates.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        window: int | Tensor,
        *,
        sink_tokens: int = 4,
        slack: int = 32,
    ):
        super().__init__(cache)
        self._check_at_least(0, sink_tokens=sink_tokens, slack=slack)
        num_layers, heads = cache.k.shape[0], cache.k.shape[3]
        smallest = largest = window
        self._windows = [window] * num_layers
        if isinstance(window, Tensor):
            shapes = (heads,), (num_layers, heads)
            ok = tuple(window.shape) in shapes and window.dtype in (torch.int32, torch.int64)
            got = f"{list(window.shape)} {window.dtype}"
            self._check(ok, f"window must be [Hkv] or [num_layers, Hkv] integers, got {got}")
            smallest, largest = int(window.min()), int(window.max())
            self._windows = list(window.to(cache.k.device, copy=True).expand(*shapes[1]))
        self._check(smallest >= 1, f"window must be at least 1, got {smallest}")
        self._largest, self._sinks, self._slack = largest, sink_tokens, slack

    def attend(self, layer: int, q: Tensor, step: Step, **options) -> Tensor:
        seen = {"window": self._windows[layer], "sink_tokens": self._sinks}
        return super().attend(layer, q, step, **seen, **options)

    def evict(self, seq_ids: Sequence[int]) -> None:
        kept = self._sinks + self._largest
        due = self._longer_than(kept + self._slack, seq_ids)
        # A window of max_seq_len never comes here: no sequence is longer.
        if due:
            token = np.arange(kept)
            moved = (self._lengths(due) - kept)[:, None, None] * (token >= self._sinks)
            self._compact(due, torch.from_numpy(token + moved))


def _without_sink_logit(options: dict) -> dict:
    """The options of probabilities whose lse is known: it has the sink logit in it."""
    return {name: option for name, option in options.items() if name != "sink_logit"}
