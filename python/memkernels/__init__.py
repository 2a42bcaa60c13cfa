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
from memkernels.lookup import (
    embedding_bag,
    embedding_bag_backward,
    engram_gate,
    lsh_codes,
    ngram_hash,
    product_key_topk,
    row_adagrad,
    row_adam,
    row_sgd,
    sparse_ffn,
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
    "embedding_bag",
    "embedding_bag_backward",
    "engram_gate",
    "evict",
    "gather_attention",
    "indexer_scores",
    "knn_topk",
    "lse_from_log2",
    "lse_to_log2",
    "lsh_codes",
    "merge_states",
    "ngram_hash",
    "paged_attention",
    "product_key_topk",
    "row_adagrad",
    "row_adam",
    "row_sgd",
    "score_pages",
    "select_topk",
    "sparse_ffn",
    "summarize_keys",
    "update_summaries",
]

del _library
