"""NumPy oracles of every op's forward: plain, slow, float64, and the meaning of record.

One file a family. Each function takes the arguments of the public op as NumPy arrays, checks
nothing, and returns every result. Tests hold every backend against these.
"""

from __future__ import annotations

from memkernels.reference.attention import (
    append_kv,
    compact_kv,
    copy_pages,
    gather_attention,
    merge_states,
    paged_attention,
)
from memkernels.reference.lookup import (
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
from memkernels.reference.scan import (
    causal_conv1d,
    causal_conv1d_step,
    delta_rule,
    delta_rule_step,
    diagonal_scan,
    feature_map,
    infini_update,
    linear_attention,
    linear_attention_step,
    route_indices,
    route_tokens,
    selective_scan,
    selective_scan_step,
    ssd,
    unroute_tokens,
)
from memkernels.reference.selection import (
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
    "infini_update",
    "knn_topk",
    "linear_attention",
    "linear_attention_step",
    "lsh_codes",
    "merge_states",
    "ngram_hash",
    "paged_attention",
    "product_key_topk",
    "route_indices",
    "route_tokens",
    "row_adagrad",
    "row_adam",
    "row_sgd",
    "score_pages",
    "select_topk",
    "selective_scan",
    "selective_scan_step",
    "sparse_ffn",
    "ssd",
    "summarize_keys",
    "unroute_tokens",
    "update_summaries",
]
