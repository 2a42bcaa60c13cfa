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

__all__ = [
    "__version__",
    "append_kv",
    "compact_kv",
    "copy_pages",
    "gather_attention",
    "lse_from_log2",
    "lse_to_log2",
    "merge_states",
    "paged_attention",
]

del _library
