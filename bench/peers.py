"""What the ops are measured against. Each peer computes the same result from the same inputs;
one that is not installed is left out by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa_gathered(q: Tensor, k: Tensor, v: Tensor, page_table: Tensor) -> Tensor:
    """torch's attention for one query a sequence, after gathering the pages into contiguous keys
    and values, which is part of its time. The heads of a group become rows of queries, which is
    many times faster here than enable_gqa=True."""
    group = q.shape[1] // k.shape[2]
    kv = (cache[page_table].flatten(1, 2).transpose(1, 2) for cache in (k, v))
    return F.scaled_dot_product_attention(q.unflatten(1, (-1, group)), *kv).flatten(1, 2)


def sdpa_contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same on keys and values [B, Hkv, L, D] that already lie together: no gathering."""
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q.unflatten(1, (-1, group)), k, v).flatten(1, 2)


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's causal self-attention on [1, H, L, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def index_copy(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """torch's scatter of rows into a cache seen as [slots, Hkv, D]."""
    for new, cache in (k, k_cache), (v, v_cache):
        cache.view(-1, *new.shape[1:]).index_copy_(0, slots, new)


def logsumexp_merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merging partial results in plain torch."""
    lse = torch.logsumexp(lses, 0)
    return ((lses - lse).exp()[..., None] * outs).sum(0), lse
