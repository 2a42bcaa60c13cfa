"""One measured case: what runs, beside what, and how much work it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# How far results may lie apart, relative to their norm: a few roundings of the dtype.
TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
}


@dataclass
class Case:
    """`ours` and `peers` return the same tensors on their first call, or, where picking them out
    would be timed, a function that does so."""

    name: str
    ours: Callable[[], object]
    # What a call does of each thing that this machine limits: bytes or flops, by the limit's name.
    # "read": bytes streamed from memory; "gather <n>": the same in random pieces of n bytes;
    # "update": bytes read and written in place; "flops <dtype>": arithmetic; "matmul <dtype>":
    # arithmetic, held against torch's matrix products.
    work: dict[str, float]
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    # What runs in turns for scale, without computing the same.
    others: dict[str, Callable[[], object]] = field(default_factory=dict)

    def check(self) -> None:
        """Every peer computes what `ours` does; one that raises is left out."""
        expected = list(_results(self.ours))
        for name, peer in list(self.peers.items()):
            try:
                results = list(_results(peer))
            except Exception as error:  # whatever a compiler or a foreign op raises
                lines = str(error).strip().splitlines() or [type(error).__name__]
                left_out(f"{name}, in {self.name}: {lines[0]}")
                del self.peers[name]
                continue
            for ours, theirs in zip(expected, results, strict=True):
                apart = _apart(ours, theirs)
                limit = max(TOLERANCE.get(x.dtype, 0.0) for x in (ours, theirs))
                assert apart <= limit, f"{self.name}: {name} lies {apart:.1e} away from ours"


@functools.cache  # once, however many cases it concerns
def left_out(reason: str) -> None:
    print(f"left out: {reason}", flush=True)


def unit(limit: str) -> str:
    return "GFLOP/s" if limit.startswith(("flops", "matmul")) else "GB/s"


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]


def _results(call: Callable[[], object]) -> Iterator[Tensor]:
    def tensors(value):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            for part in value:
                yield from tensors(part)

    value = call()
    return tensors(value() if callable(value) else value)


def _apart(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):  # of large copies, without more copies
        return 0.0
    if not a.is_complex():
        a, b = a.float(), b.float()
    return ((a - b).norm() / b.norm()).item()
