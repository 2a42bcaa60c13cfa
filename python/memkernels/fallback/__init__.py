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

__all__ = [
    "append_kv",
    "compact_kv",
    "copy_pages",
    "gather_attention",
    "merge_states",
    "paged_attention",
]
