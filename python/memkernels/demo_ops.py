"""Part 1 of the demo: each op against float64, against this machine's limits, against torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import memkernels
from memkernels import fallback

PAGE_SIZE = 16
SHORT = {torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclass
class Case:
    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    peer: Callable[[], tuple[Tensor, ...]]
    exact: tuple[Tensor, ...]  # float64, of the first rows of each result
    work: float  # bytes moved or floating-point operations
    unit: str  # GB/s or GFLOP/s
    limit: float  # of work a second


def best_times(*functions: Callable, seconds: float = 0.3) -> list[float]:
    """Shortest run of each, called in turns so that all see the same machine."""
    best = [math.inf] * len(functions)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best


# ---- limits --------------------------------------------------------------------------------------


def read_limit() -> float:
    """Bytes a second at which all cores together stream memory."""
    data = torch.ones(64 << 20)  # 256 MiB
    return data.nbytes / best_times(lambda: torch.ops.memkernels._read_ceiling(data))[0]


def flops_limit(dtype: torch.dtype) -> float:
    """Floating-point operations a second of all cores on registers alone."""
    name, iterations, seconds = str(dtype).removeprefix("torch."), 1 << 14, 0.0
    while seconds < 0.02:
        iterations *= 4
        start = time.perf_counter()
        flops = torch.ops.memkernels._fma_ceiling(name, iterations)
        seconds = time.perf_counter() - start
    return flops / best_times(lambda: torch.ops.memkernels._fma_ceiling(name, iterations))[0]


# ---- cases ---------------------------------------------------------------------------------------


def decode(dtype: torch.dtype, limit: float, batch: int, length: int) -> Case:
    """One query a sequence over pages in random order. torch gathers the pages, then attends."""
    pages = length // PAGE_SIZE
    q = torch.randn(batch, 32, 128).to(dtype)
    k, v = (torch.randn(batch * pages, PAGE_SIZE, 8, 128).to(dtype) for _ in range(2))
    page_table = torch.randperm(batch * pages).view(batch, pages)
    seq_lens = torch.full((batch,), length)

    def gather(cache: Tensor, rows: int = batch) -> Tensor:  # [B, length, Hkv, D]
        return cache[page_table[:rows]].flatten(1, 2)

    def peer():
        kv = (gather(cache).transpose(1, 2) for cache in (k, v))
        return (F.scaled_dot_product_attention(q[:, :, None], *kv, enable_gqa=True)[:, :, 0],)

    return Case(
        name=f"paged_attention decode    {SHORT[dtype]:>4}  {batch} x {length}, heads 32/8 x 128",
        ours=lambda: (memkernels.paged_attention(q, k, v, page_table, seq_lens),),
        peer=peer,
        exact=fallback.paged_attention(*(x.double() for x in (q[:1], gather(k, 1), gather(v, 1)))),
        work=k.nbytes + v.nbytes,
        unit="GB/s",
        limit=limit,
    )


def causal(dtype: torch.dtype, limit: float, length: int, backward: bool) -> Case:
    """Causal self-attention of one packed sequence, with gradients or without."""
    heads, dim = 8, 128
    q, k, v, dout = (torch.randn(length, heads, dim).to(dtype) for _ in range(4))
    packed = {name: torch.tensor([0, length]) for name in ("cu_seqlens_q", "cu_seqlens_k")}

    def torch_attention(q, k, v):
        qkv = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, length, D]
        return F.scaled_dot_product_attention(*qkv, is_causal=True)[0].transpose(0, 1)

    def run(attend, *inputs):
        if not backward:
            return (attend(*inputs),)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))

    kind = "forward + backward" if backward else "prefill"
    return Case(
        name=f"paged_attention {kind:<10}{SHORT[dtype]:>4}  {length} causal, heads 8 x 128",
        ours=lambda: run(lambda *qkv: memkernels.paged_attention(*qkv, **packed), q, k, v),
        peer=lambda: run(torch_attention, q, k, v),
        exact=run(
            lambda *qkv: fallback.paged_attention(*qkv, **packed)[0],
            *(x.double() for x in (q, k, v)),
        ),
        # 4 L D flops a query, half of them hidden; the backward is two and a half forwards.
        work=4 * heads * dim * length**2 / 2 * (3.5 if backward else 1),
        unit="GFLOP/s",
        limit=limit,
    )


def append(limit: float, count: int) -> Case:
    """New tokens to random slots; bytes are those read and those written."""
    k, v = (torch.randn(count, 8, 128).bfloat16() for _ in range(2))
    slots = torch.randperm(count)

    def caches(like: Tensor = k) -> tuple[Tensor, Tensor]:
        shape = count // PAGE_SIZE, PAGE_SIZE, *like.shape[1:]
        return like.new_zeros(shape), like.new_zeros(shape)

    def index_copy(caches, k, v):
        for cache, new in zip(caches, (k, v), strict=True):
            cache.view(-1, *new.shape[1:]).index_copy_(0, slots, new)
        return caches

    def append_kv(caches):
        memkernels.append_kv(k, v, *caches, slots)
        return caches

    ours, peers = caches(), caches()
    return Case(
        name=f"append_kv                 bf16  {count} tokens, heads 8 x 128",
        ours=lambda: append_kv(ours),
        peer=lambda: index_copy(peers, k, v),
        exact=index_copy(caches(k.double()), k.double(), v.double()),
        work=2 * (k.nbytes + v.nbytes),
        unit="GB/s",
        limit=limit,
    )


def merge(limit: float, count: int) -> Case:
    """Four partial results into one; bytes are those read and those written."""
    outs = torch.randn(4, count, 32, 128)
    lses = torch.randn(4, count, 32)

    def peer():
        lse = lses.logsumexp(0)
        return ((lses - lse).exp()[..., None] * outs).sum(0), lse

    return Case(
        name=f"merge_states               f32  4 x {count}, heads 32 x 128",
        ours=lambda: memkernels.merge_states(outs, lses),
        peer=peer,
        exact=fallback.merge_states(outs[:, :64].double(), lses[:, :64].double()),
        work=outs.nbytes * 5 / 4,
        unit="GB/s",
        limit=limit,
    )


# ---- the table -----------------------------------------------------------------------------------


def error(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Largest error of any result, relative to the largest number in it."""
    return max(
        ((a[: len(e)] - e).abs().max() / e.abs().max()).item()
        for a, e in zip(actual, exact, strict=False)
    )


def table(quick: bool = False) -> None:
    bf16, f32 = torch.bfloat16, torch.float32
    bandwidth = read_limit()
    flops = {dtype: flops_limit(dtype) for dtype in (bf16, f32)}
    print(f"  limits of this machine: {bandwidth / 1e9:.1f} GB/s read, ", end="")
    print(", ".join(f"{flops[d] / 1e9:.0f} GFLOP/s {SHORT[d]}" for d in flops))
    print(f"\n  {'':<58}{'error':>9}{'(torch)':>10}{'ms':>9}{'rate':>16}{'limit':>8}{'torch':>9}")

    scale = 4 if quick else 1
    cases = [lambda d=d: decode(d, bandwidth, 8, 4096 // scale) for d in (bf16, f32)]
    cases += [
        lambda d=d, b=b: causal(d, flops[d], 1024 // scale, backward=b)
        for b in (False, True)
        for d in (bf16, f32)
    ]
    cases += [lambda: append(bandwidth, 16384 // scale), lambda: merge(bandwidth, 2048 // scale)]
    for make in cases:
        case = make()
        errors = [error(run(), case.exact) for run in (case.ours, case.peer)]
        ours, peer = best_times(case.ours, case.peer)
        rate = case.work / ours
        print(
            f"  {case.name:<58}{errors[0]:>9.0e}{errors[1]:>10.0e}{ours * 1e3:>9.2f}"
            f"{rate / 1e9:>8.1f} {case.unit:<7}{rate / case.limit:>8.0%}{peer / ours:>8.1f}x"
        )
    print(
        "\n  error: largest, over the largest exact number; (torch): torch's own. limit: share of "
        "this\n  machine's. torch: how many times its time; scaled_dot_product_attention (in "
        "decode after\n  gathering the pages, which is timed), index_copy_, logsumexp and a sum."
    )
