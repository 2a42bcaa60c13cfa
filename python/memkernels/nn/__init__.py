"""Modules to plug into models."""

from __future__ import annotations

from memkernels.nn.paged_kv_cache import PagedKVCache, Step

__all__ = ["PagedKVCache", "Step"]
