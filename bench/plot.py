"""Measures and draws decode over context lengths and page sizes: ``python bench/run.py --plot
DIR``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bench_attention
import peers
from bench_attention import BF16, F32
from case import Case, short

try:
    import matplotlib
except ImportError:
    raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None

matplotlib.use("agg")
import matplotlib.pyplot as plt

PEER = "torch SDPA, contiguous"


def draw(
    directory: Path, measure: Callable[[Case], dict], about: dict, limits: dict, quick: bool
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    title = f"{about['cpu']}, {about['threads']} threads, {about['isa']} kernels"
    for name, figure in (
        ("decode_context", contexts(measure, limits, quick)),
        ("decode_page_size", page_sizes(measure, quick)),
    ):
        figure.suptitle(title, fontsize="small")
        path = directory / f"{name}.svg"
        figure.savefig(path)
        print(f"wrote {path}")


def contexts(measure: Callable[[Case], dict], limits: dict, quick: bool) -> plt.Figure:
    """As many sequences as fill the same number of tokens, at every length."""
    tokens = 1 << (12 if quick else 17)
    lengths = [1 << power for power in range(10, tokens.bit_length())]
    figure, axes = plt.subplots(layout="constrained")
    for dtype, colour in (BF16, "C0"), (F32, "C1"):
        ours, theirs = [], []
        for length in lengths:
            record = measure(decode(dtype, tokens // length, length, 16, quick))
            ours.append(record["GB/s"])
            theirs.append(record["GB/s"] / record["peers"][PEER]["ratio"])
        axes.plot(lengths, ours, f"{colour}o-", label=f"memkernels {short(dtype)}, pages of 16")
        axes.plot(lengths, theirs, f"{colour}x--", label=f"{PEER} {short(dtype)}")
    axes.axhline(limits["read"] / 1e9, color="grey", label="streaming reads")
    axes.set(xlabel=f"tokens a sequence, {tokens} in all", ylabel="GB/s", ylim=(0, None))
    return _finished(figure, axes, lengths)


def page_sizes(measure: Callable[[Case], dict], quick: bool) -> plt.Figure:
    """Of streaming reads; and, where pages are too short for that, of random reads of a page."""
    sizes = [1, 2, 4, 7, 8, 16, 32, 64, 128]
    batch, length = (2, 512) if quick else (8, 4096)
    records = [measure(decode(BF16, batch, length, size, quick)) for size in sizes]
    figure, axes = plt.subplots(layout="constrained")
    read = [100 * record["of_limits"]["read"] for record in records]
    theirs = [of / record["peers"][PEER]["ratio"] for of, record in zip(read, records, strict=True)]
    gathers = {
        size: 100 * fraction
        for size, record in zip(sizes, records, strict=True)
        for name, fraction in record["of_limits"].items()
        if name.startswith("gather")
    }
    axes.plot(sizes, read, "C0o-", label="memkernels, of streaming reads")
    axes.plot(*zip(*gathers.items(), strict=True), "C0s:", label="memkernels, of gathers of a page")
    axes.plot(sizes, theirs, "C1x--", label=f"{PEER}, of streaming reads")
    axes.set(
        xlabel=f"tokens a page, bf16, {batch} sequences of {length}", ylabel="%", ylim=(0, None)
    )
    return _finished(figure, axes, sizes)


def decode(dtype, batch: int, length: int, page_size: int, quick: bool) -> Case:
    return bench_attention.decode(
        dtype,
        batch,
        length,
        page_size=page_size,
        megabytes=8 if quick else 512,
        against=[peers.sdpa_contiguous],
    )


def _finished(figure: plt.Figure, axes: plt.Axes, ticks: list[int]) -> plt.Figure:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick >> 10}k" if tick >= 1024 else str(tick) for tick in ticks])
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
