"""Timing and this machine's limits, for the demo and the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


@dataclass
class Times:
    """Seconds a call."""

    minimum: float
    median: float


def _seconds(function: Callable) -> float:
    if not on_gpu():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    # The GPU is kept busy while the host prepares, so that only the device's time is taken.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(*functions: Callable, seconds: float = 0.3, least: int = 1) -> list[Times]:
    """Times the functions in turns, so that all see the same machine, for that long altogether
    and at least `least` rounds; a first round is not counted."""
    runs: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    end = time.perf_counter() + seconds
    while len(runs[0]) < least or time.perf_counter() < end:
        for function, times in zip(functions, runs, strict=True):
            times.append(_seconds(function))
    return [Times(min(times), statistics.median(times)) for times in runs]


def captured(function: Callable) -> Callable:
    """On a GPU, a replay of what the function launches, whose results stay where they are."""
    if not on_gpu():
        return function
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay():
        graph.replay()
        return results

    return replay


def _memory(megabytes: int) -> torch.Tensor:
    data = torch.empty(megabytes << 18)
    torch.ops.memkernels._advise_huge_pages(data)
    return data.fill_(1.0)


def read_limit(megabytes: int = 512) -> float:
    """Bytes a second at which all cores together stream memory."""
    data = _memory(megabytes)
    return data.nbytes / interleaved(lambda: torch.ops.memkernels._read_ceiling(data))[0].minimum


def gather_limit(row_bytes: int, megabytes: int = 512) -> float:
    """Bytes a second at which they read rows of that size in random order."""
    data = _memory(megabytes)
    data = data[: data.numel() // (row_bytes // 4) * (row_bytes // 4)].view(-1, row_bytes // 4)
    order = torch.randperm(len(data))
    run = interleaved(lambda: torch.ops.memkernels._gather_ceiling(data, order))[0]
    return data.nbytes / run.minimum


def update_limit(megabytes: int = 512) -> float:
    """Bytes a second, read and written, at which they change memory in place."""
    data = _memory(megabytes)
    run = interleaved(lambda: torch.ops.memkernels._update_ceiling(data))[0]
    return 2 * data.nbytes / run.minimum


def flops_limit(dtype: torch.dtype) -> float:
    """Floating-point operations a second of all cores on registers alone, in the arithmetic that
    kernels use for the dtype here."""
    like, rounds, seconds = torch.empty(0, dtype=dtype), 1 << 14, 0.0
    while seconds < 0.02:
        rounds *= 4
        start = time.perf_counter()
        flops = torch.ops.memkernels._fma_ceiling(like, rounds)
        seconds = time.perf_counter() - start
    run = interleaved(lambda: torch.ops.memkernels._fma_ceiling(like, rounds))[0]
    return flops / run.minimum


def copy_limit(megabytes: int = 4096) -> float:
    """Bytes a second, read and written, at which the GPU copies memory."""
    data = torch.empty(megabytes << 18).fill_(1.0)
    to = torch.empty_like(data)
    return 2 * data.nbytes / interleaved(lambda: to.copy_(data))[0].minimum


def matmul_limit(dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations a second at which torch multiplies large random matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / interleaved(lambda: a @ b)[0].minimum
