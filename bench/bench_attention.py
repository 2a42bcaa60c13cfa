"""Benchmarks of the attention family. Working sets are far larger than any cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

import memkernels
import peers
from case import Case, short

HEAD_DIM = 128


def decode(
    dtype: torch.dtype,
    batch: int,
    length: int,
    *,
    heads: tuple[int, int] = (32, 8),
    page_size: int = 16,
    megabytes: int = 512,
) -> Case:
    """One query a sequence over pages in random order. Several sets of pages, used in turns, make
    up the working set."""
    num_heads, num_kv_heads = heads
    pages = -(-length // page_size)
    token_bytes = 2 * num_kv_heads * HEAD_DIM * dtype.itemsize
    sets = -(-(megabytes << 20) // (batch * pages * page_size * token_bytes))
    shape = sets * batch * pages, page_size, num_kv_heads, HEAD_DIM
    k, v = (torch.empty(shape, dtype=dtype) for _ in range(2))
    for cache in k, v:
        torch.ops.memkernels._advise_huge_pages(cache)  # as PagedKVCache does
        cache.normal_()
    q = torch.randn(batch, num_heads, HEAD_DIM).to(dtype)
    tables = torch.randperm(shape[0], dtype=torch.int32).view(sets, batch, pages)
    seq_lens = torch.full((batch,), length, dtype=torch.int32)
    turns = itertools.cycle(tables)
    together = [x[tables[0].long()].flatten(1, 2).transpose(1, 2).contiguous() for x in (k, v)]
    return Case(
        f"decode {short(dtype)} {batch} x {length} heads {num_heads}/{num_kv_heads} "
        f"page {page_size}",
        lambda: memkernels.paged_attention(q, k, v, next(turns), seq_lens),
        work=batch * length * token_bytes,
        limit="read",
        peers={
            "torch SDPA, gathered": lambda: peers.sdpa_gathered(q, k, v, next(turns)),
            "torch SDPA, contiguous": lambda: peers.sdpa_contiguous(q, *together),
        },
    )


def causal(dtype: torch.dtype, length: int, heads: int, *, backward: bool) -> Case:
    """Causal self-attention of one packed sequence, with gradients or without."""
    packed = {name: torch.tensor([0, length]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    qkv = [torch.randn(length, heads, HEAD_DIM).to(dtype) for _ in range(3)]
    head_major = [x.transpose(0, 1)[None].contiguous() for x in qkv]
    dout = torch.randn(length, heads, HEAD_DIM).to(dtype)
    head_major_dout = dout.transpose(0, 1)[None].contiguous()

    def run(attend, inputs, dout):
        if not backward:
            return attend(*inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    def ours(*qkv):
        return memkernels.paged_attention(*qkv, **packed)

    return Case(
        f"{'forward + backward' if backward else 'prefill'} {short(dtype)} {length} causal, "
        f"heads {heads}",
        lambda: run(ours, qkv, dout),
        # 4 L D flops a query, half of them hidden; the backward is two and a half forwards.
        work=2 * heads * HEAD_DIM * length**2 * (3.5 if backward else 1),
        limit=f"flops {short(dtype)}",
        peers={"torch SDPA": lambda: run(peers.sdpa_causal, head_major, head_major_dout)},
    )


def append(count: int) -> Case:
    """New tokens to random slots; bytes are those read and those written."""
    k, v = (torch.randn(count, 8, HEAD_DIM).bfloat16() for _ in range(2))
    caches = [torch.zeros(count // 16, 16, 8, HEAD_DIM, dtype=k.dtype) for _ in range(2)]
    slots = torch.randperm(count)
    return Case(
        f"append_kv bf16 {count} tokens, heads 8",
        lambda: memkernels.append_kv(k, v, *caches, slots),
        work=2 * (k.nbytes + v.nbytes),
        limit="read",
        peers={"torch index_copy": lambda: peers.index_copy(k, v, *caches, slots)},
    )


def merge(count: int) -> Case:
    """Four partial results into one; bytes are those read and those written."""
    outs, lses = torch.randn(4, count, 32, HEAD_DIM), torch.randn(4, count, 32)
    return Case(
        f"merge_states f32 4 x {count}, heads 32",
        lambda: memkernels.merge_states(outs, lses),
        work=outs.nbytes * 5 / 4,
        limit="read",
        peers={"torch logsumexp": lambda: peers.logsumexp_merge(outs, lses)},
    )


def call() -> Case:
    """A call with next to nothing to do, beside the torch op below the public function and the
    cheapest call that torch itself has."""
    q, cache = torch.randn(1, 8, 64), torch.randn(4, 16, 2, 64)
    page_table = torch.zeros(1, 1, dtype=torch.int32)
    seq_lens = torch.tensor([16], dtype=torch.int32)
    inputs = (q, cache, cache, page_table, seq_lens)
    empty = (q[:0], cache, cache, page_table[:0], seq_lens[:0])
    op = torch.ops.memkernels.paged_attention.default

    def many(function):
        def run():
            for _ in range(1000):
                function()

        return run

    return Case(
        "1000 calls, batch 1, 16 tokens",
        many(lambda: memkernels.paged_attention(*inputs)),
        work=1000 * 2 * 16 * 2 * 64 * 4,
        limit="read",
        peers={
            "torch op on an empty batch": many(lambda: op(*empty, *[None] * 5, scale=1.0)),
            "torch.add": many(lambda: torch.add(q, q)),
        },
    )


def cases(quick: bool) -> Iterator[Case]:
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        yield decode(bf16, 2, 512, megabytes=8)
        yield causal(f32, 256, 2, backward=False)
        yield causal(f32, 256, 2, backward=True)
        yield append(256)
        yield merge(64)
        yield call()
        return
    for dtype, (batch, length) in itertools.product((bf16, f32), ((8, 4096), (1, 32768))):
        yield decode(dtype, batch, length)
    for backward, dtype in itertools.product((False, True), (bf16, f32, f16)):
        yield causal(dtype, 4096, 8, backward=backward)
    yield append(65536)
    yield merge(16384)
    yield call()
