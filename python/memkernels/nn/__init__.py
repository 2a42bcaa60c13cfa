"""Modules to plug into models, the optimisers of their tables, and tables on disk."""

from __future__ import annotations

from memkernels.nn.engram import Engram
from memkernels.nn.gated_delta_net import GatedDeltaNet, GatedDeltaState
from memkernels.nn.infini_attention import InfiniAttention, InfiniState
from memkernels.nn.knn_memory import KNNMemory
from memkernels.nn.paged_kv_cache import PagedKVCache, Step
from memkernels.nn.peer import PEER
from memkernels.nn.policies import HeavyHitter, Policy, Quest, SnapWindow, Streaming
from memkernels.nn.product_key_memory import ProductKeyMemory
from memkernels.nn.row_optim import RowAdagrad, RowAdam, RowSGD
from memkernels.nn.tables import open_table

__all__ = [
    "PEER",
    "Engram",
    "GatedDeltaNet",
    "GatedDeltaState",
    "HeavyHitter",
    "InfiniAttention",
    "InfiniState",
    "KNNMemory",
    "PagedKVCache",
    "Policy",
    "ProductKeyMemory",
    "Quest",
    "RowAdagrad",
    "RowAdam",
    "RowSGD",
    "SnapWindow",
    "Step",
    "Streaming",
    "open_table",
]
