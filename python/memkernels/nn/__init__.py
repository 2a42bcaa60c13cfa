"""Modules to plug into models."""

from __future__ import annotations

from memkernels.nn.knn_memory import KNNMemory
from memkernels.nn.paged_kv_cache import PagedKVCache, Step
from memkernels.nn.policies import HeavyHitter, Policy, Quest, SnapWindow, Streaming

__all__ = [
    "HeavyHitter",
    "KNNMemory",
    "PagedKVCache",
    "Policy",
    "Quest",
    "SnapWindow",
    "Step",
    "Streaming",
]
