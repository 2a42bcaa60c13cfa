"""Memory of what has left a cache, searched by nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import memkernels
from memkernels.nn.paged_kv_cache import PagedKVCache, Step
from memkernels.nn.policies import Policy


class KNNMemory(Policy):
    """What leaves the cache stays within reach of the nearest-neighbour search of some layers
    (Memorizing Transformers, Wu et al., 2022).

    `evict` moves all but the latest tokens into a bank, first in, first out. In a layer with a
    gate, each query head also attends to the ``k`` entries of the bank with the largest dot
    products, and its result is ``g * memory + (1 - g) * local`` with ``g = sigmoid(gate)``; local
    alone as long as the bank is empty. No token is in the cache and in the bank at once.

    Simplified: local attention is to all that the cache holds, between ``window`` and
    ``window + slack`` tokens and a step's own, where the paper has its segments; keys and queries
    are normalised, if at all, by the caller, and keys enter the bank as they were cached, with
    their rotation; there is one bank a layer and sequence.

    Args:
        cache: see `Policy`.
        size: entries of a sequence's bank.
        gate: ``{layer: [Hq]}``, the logits of ``g``. Other layers attend locally.
        window: tokens that stay in the cache.
        k: entries that a query finds.
        slack: tokens beyond the window that `evict` tolerates.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        size: int,
        gate: dict[int, Tensor],
        *,
        window: int = 512,
        k: int = 32,
        slack: int = 32,
    ):
        super().__init__(cache)
        self._check_at_least(1, size=size, window=window, k=k)
        self._check_at_least(0, slack=slack)
        num_layers, _, _, heads, _ = cache.k.shape
        self._gates: dict[int, Tensor] = {}
        for layer, logits in gate.items():
            self._check(0 <= layer < num_layers, f"gate has no layer {layer} of {num_layers}")
            ok = logits.ndim == 1 and logits.shape[0] > 0 and logits.shape[0] % heads == 0
            expected, got = f"[Hq] for {heads} KV heads", list(logits.shape)
            self._check(ok, f"gate of layer {layer} must be {expected}, got {got}")
            self._gates[layer] = logits.detach().to(cache.k.device).sigmoid()[:, None]
        self._size, self._window, self._k, self._slack = size, window, k, slack
        self._banks = [  # of keys and of values, [gated layers, max_seqs, Hkv, size, D or Dv]
            x.new_zeros(len(gate), len(self._dropped), heads, size, x.shape[-1])
            for x in (cache.k, cache.v)
        ]
        self._states += [bank.transpose(0, 1) for bank in self._banks]

    def attend(self, layer: int, q: Tensor, step: Step, **options) -> Tensor:
        local = super().attend(layer, q, step, **options)
        if layer not in self._gates or not len(q) or not self._dropped[list(step.seq_ids)].any():
            return local
        logits = {name: options[name] for name in ("scale", "softcap") if name in options}
        memory, lse = self._remember(layer, q, step, **logits)
        found = (lse > -torch.inf)[..., None]
        gate = self._gates[layer].where(found, 0).to(local.dtype)  # [T, Hq, 1]
        return torch.lerp(local, memory, gate)

    def evict(self, seq_ids: Sequence[int]) -> None:
        cache, size = self.cache, self._size
        due = self._longer_than(self._window + self._slack, seq_ids)
        if not due:
            return
        leaving = self._lengths(due) - self._window  # [B]; of these only the last fit in a bank
        tokens = [np.arange(max(0, count - size), count) for count in leaving]
        owner = np.repeat(due, [len(x) for x in tokens])
        token = np.concatenate(tokens)
        entry = self._indices((self._dropped[owner] + token) % size)
        owner, token = self._indices(owner), self._indices(token)
        page, offset = cache.page_table[owner, token // cache.page_size], token % cache.page_size
        copies = [[x[layer][page, offset] for layer in self._gates] for x in (cache.k, cache.v)]
        keep = np.arange(self._window) + leaving[:, None, None]
        self._compact(due, torch.from_numpy(keep))
        for bank, rows in zip(self._banks, copies, strict=True):
            for bank_layer, new in zip(bank, rows, strict=True):
                bank_layer[owner, :, entry] = new

    def _remember(self, layer: int, q: Tensor, step: Step, **logits) -> tuple[Tensor, Tensor]:
        """Attention to the nearest entries of the bank, and its lse."""
        first, last = min(step.seq_ids), max(step.seq_ids)
        seq_ids, num_seqs, longest = np.array(step.seq_ids), last + 1 - first, max(step.num_new)
        heads = self.cache.k.shape[3]
        valid = np.zeros(num_seqs, dtype=np.int64)  # the banks between those of the step are void
        valid[seq_ids - first] = np.minimum(self._dropped[seq_ids], self._size)
        valid = self.cache._to_device(valid)
        starts = (seq_ids - first) * longest
        place = [start + np.arange(n) for start, n in zip(starts, step.num_new, strict=True)]
        place = self._indices(np.concatenate(place))
        padded = q.new_zeros(num_seqs * longest, *q.shape[1:]).index_copy_(0, place, q)
        # A query head is a query of its KV head: [sequence, query and head of group, Hkv, D].
        queries = padded.unflatten(1, (heads, -1)).transpose(1, 2)
        queries = queries.reshape(num_seqs, -1, heads, q.shape[-1])
        index = list(self._gates).index(layer)
        k_bank, v_bank = (bank[index, first : last + 1] for bank in self._banks)
        _, entries = memkernels.knn_topk(
            queries.transpose(0, 1).flatten(1, 2),
            k_bank.flatten(0, 1),
            valid.repeat_interleave(heads),
            self._k,
        )
        per_seq = queries.shape[1]
        out, lse = memkernels.gather_attention(
            queries.flatten(0, 1),
            k_bank.transpose(1, 2),
            v_bank.transpose(1, 2),
            entries.unflatten(1, (num_seqs, heads)).transpose(0, 1).flatten(0, 1),
            None,
            valid,
            torch.arange(num_seqs + 1, device=q.device) * per_seq,
            unit="token",
            causal=False,
            return_lse=True,
            **logits,
        )
        group = q.shape[1] // heads
        out, lse = (
            x.unflatten(0, (-1, group)).transpose(1, 2).flatten(1, 2)[place] for x in (out, lse)
        )
        return out, lse
