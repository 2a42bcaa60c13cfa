"""CPU and CUDA kernels for the memory systems of language models."""

from __future__ import annotations

from memkernels import _library
from memkernels._C import __version__
from memkernels.attention import (
    append_kv,
    compact_kv,
    copy_pages,
    gather_attention,
    lse_from_log2,
    lse_to_log2,
    merge_states,
    paged_attention,
)
from memkernels.selection import (
    attention_colstats,
    evict,
    indexer_scores,
    knn_topk,
    score_pages,
    select_topk,
    summarize_keys,
    update_summaries,
)

__all__ = [
    "__version__",
    "append_kv",
    "attention_colstats",
    "compact_kv",
    "copy_pages",
    "evict",
    "gather_attention",
    "indexer_scores",
    "knn_topk",
    "lse_from_log2",
    "lse_to_log2",
    "merge_states",
    "paged_attention",
    "score_pages",
    "select_topk",
    "summarize_keys",
    "update_summaries",
]

del _library
