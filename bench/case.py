"""One measured case: what runs, beside what, and how much work it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Case:
    name: str
    ours: Callable[[], object]
    work: float  # bytes or flops a call
    limit: str  # "read", or "flops <dtype>": the ceiling that the work is compared with
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        return "GB/s" if self.limit == "read" else "GFLOP/s"


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
