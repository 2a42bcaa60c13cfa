"""Every op in plain differentiable torch: any device and floating dtype, no hand-written backward.

One file a family. The public functions call these on devices without a native kernel, and
everywhere when ``MEMKERNELS_BACKEND=torch``. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

from memkernels.fallback.attention import (
    append_kv,
    compact_kv,
    copy_pages,
    gather_attention,
    merge_states,
    paged_attention,
)
from memkernels.fallback.lookup import (
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
from memkernels.fallback.scan import (
    causal_conv1d,
    causal_conv1d_step,
    delta_rule,
    delta_rule_step,
    diagonal_scan,
    feature_map,
    linear_attention,
    linear_attention_step,
    route_indices,
    selective_scan,
    selective_scan_step,
)
from memkernels.fallback.selection import (
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
    "append_kv",
    "attention_colstats",
    "causal_conv1d",
    "causal_conv1d_step",
    "compact_kv",
    "copy_pages",
    "delta_rule",
    "delta_rule_step",
    "diagonal_scan",
    "embedding_bag",
    "embedding_bag_backward",
    "engram_gate",
    "evict",
    "feature_map",
    "gather_attention",
    "indexer_scores",
    "knn_topk",
    "linear_attention",
    "linear_attention_step",
    "lsh_codes",
    "merge_states",
    "ngram_hash",
    "paged_attention",
    "product_key_topk",
    "route_indices",
    "row_adagrad",
    "row_adam",
    "row_sgd",
    "score_pages",
    "select_topk",
    "selective_scan",
    "selective_scan_step",
    "sparse_ffn",
    "summarize_keys",
    "update_summaries",
]
