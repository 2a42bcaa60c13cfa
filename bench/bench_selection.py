"""Benchmarks of the selection family. What a step reads is cycled over layers, far larger together
than any cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import memkernels
import peers
from bench_attention import BF16, F32, HEAD_DIM, filled, random_pages
from case import Case, short
from memkernels import _measure

HEADS, KV_HEADS = 32, 8


def in_turns(functions: list[Callable]) -> Callable:
    """Each call is the next one's."""
    turns = itertools.cycle(functions)
    return lambda: next(turns)()


class Layer:
    """A cache of sequences in random pages, and summaries of its keys."""

    def __init__(
        self, batch: int, length: int, page_size: int, layout: str = "NHD", values: bool = True
    ):
        pages = length // page_size
        inner = (page_size, KV_HEADS) if layout == "NHD" else (KV_HEADS, page_size)
        caches = [
            filled(batch * pages, *inner, HEAD_DIM, dtype=BF16) for _ in range(2 if values else 1)
        ]
        caches = [cache if layout == "NHD" else cache.transpose(1, 2) for cache in caches]
        self.k, self.v = caches[0], caches[-1]
        self.page_size = page_size
        self.table = random_pages(batch, pages)
        self.seq_lens = torch.full((batch,), length, dtype=torch.int32)
        self.q = torch.randn(batch, HEADS, HEAD_DIM).to(BF16)
        self.summary = memkernels.summarize_keys(self.k, self.table, self.seq_lens)
        if self.summary.is_cpu:
            torch.ops.memkernels._advise_huge_pages(self.summary)

    def scores(self) -> Tensor:
        return memkernels.score_pages(
            self.q, self.summary, self.table, self.seq_lens, self.page_size
        )

    def dense(self) -> Tensor:
        return memkernels.paged_attention(self.q, self.k, self.v, self.table, self.seq_lens)

    def sparse(self, budget: int) -> Tensor:
        indices = memkernels.select_topk(self.scores(), budget // self.page_size, keep_last=1)
        return memkernels.gather_attention(
            self.q, self.k, self.v, indices, self.table, self.seq_lens
        )


def quest(
    length: int, page_size: int, layout: str, *, batch: int = 1, layers: int = 4, budget: int = 2048
) -> Case:
    """Score, select, attend: one step of decoding, beside attention to all of it."""
    stack = [Layer(batch, length, page_size, layout) for _ in range(layers)]
    read = stack[0].summary.nbytes + 2 * batch * budget * KV_HEADS * HEAD_DIM * BF16.itemsize
    step = [_measure.captured(lambda x=x: x.sparse(budget)) for x in stack]
    dense = [_measure.captured(x.dense) for x in stack]
    return Case(
        f"Quest step bf16 {batch} x {budget} of {length}, page {page_size} {layout}",
        in_turns(step),
        {"read": read},
        others={"paged_attention over all pages": in_turns(dense)},
    )


def scores(batch: int, length: int, page_size: int, *, layers: int = 6) -> Case:
    stack = [Layer(batch, length, page_size, values=False) for _ in range(layers)]
    for x in stack:
        del x.k, x.v
    peer = [lambda x=x: peers.page_scores(x.q, x.summary, x.table) for x in stack]
    return Case(
        f"score_pages bf16 {batch} x {length}, page {page_size}",
        in_turns([x.scores for x in stack]),
        {
            "read": stack[0].summary.nbytes,
            "gather 4096": stack[0].summary.nbytes,  # what lies together of a page
            "flops bf16": 2 * HEADS / KV_HEADS * stack[0].summary.numel(),
        },
        {"torch gather + matmul": in_turns(peer)},
    )


def summaries(pages: int, page_size: int) -> Case:
    x = Layer(1, pages * page_size, page_size, values=False)
    return Case(
        f"summarize_keys bf16 {pages} pages of {page_size}",
        lambda: memkernels.summarize_keys(x.k, x.table, x.seq_lens),
        {"read": x.k.nbytes + x.summary.nbytes},
        {"torch amin, amax": lambda: torch.stack([x.k.amin(1), x.k.amax(1)], 2)},
    )


def select(rows: int, columns: int, k: int) -> Case:
    x = torch.randn(rows, columns)
    against = [peers.torch_topk, peers.flashinfer_topk] if x.is_cuda else [peers.torch_topk]
    return Case(
        f"select_topk f32 {rows} x {columns}, k {k}",
        lambda: memkernels.select_topk(x, k),
        {"read": x.nbytes},
        peers.among(against, x, k),
    )


def colstats(batch: int, length: int, queries: int, *, layers: int = 4) -> Case:
    """Column sums of the last queries of each sequence, beside their attention."""
    stack = [Layer(batch, length, 16) for _ in range(layers)]
    offsets = torch.arange(batch + 1, dtype=torch.int32) * queries
    calls, attention = [], []
    for x in stack:
        q = torch.randn(batch * queries, HEADS, HEAD_DIM).to(BF16)
        inputs = x.table, x.seq_lens, offsets
        _, lse = memkernels.paged_attention(q, x.k, x.v, *inputs, return_lse=True)
        calls.append(
            lambda q=q, k=x.k, a=inputs, lse=lse: memkernels.attention_colstats(q, k, *a, lse)
        )
        attention.append(lambda q=q, x=x, a=inputs: memkernels.paged_attention(q, x.k, x.v, *a))
    flops = 2 * batch * queries * HEADS * HEAD_DIM * (length - queries / 2)
    return Case(
        f"attention_colstats bf16 {batch} x {length}, {queries} queries",
        in_turns(calls),
        {"read": stack[0].k.nbytes, "flops bf16": flops},
        others={"paged_attention": in_turns(attention)},
    )


def evict(batch: int, length: int, group: str) -> Case:
    """Half of the tokens of each head, or of a sequence, by their statistics. Bytes are those that
    move, read and written. Run again, it does the same work on what it left."""
    x = Layer(batch, length, 16)
    stats = torch.rand(batch, KV_HEADS, length)

    def keep():
        return memkernels.evict(
            stats, x.seq_lens, length // 2, keep_first=4, keep_last=64, group=group
        )

    def compact(keep: Tensor):
        memkernels.compact_kv(x.k, x.v, x.table, x.seq_lens, keep)

    kept = keep()
    return Case(
        f"evict + compact_kv bf16 {batch} x {length} to half, by {group}",
        lambda: compact(keep()),
        {"update": 2 * x.k.nbytes},  # half of two caches, twice
        others={"compact_kv": lambda: compact(kept)},
    )


def knn(queries: int, entries: int, k: int, *, dtype: torch.dtype = F32) -> Case:
    q = torch.randn(queries, 1, HEAD_DIM).to(dtype)
    bank = torch.randn(1, entries, HEAD_DIM).to(dtype)
    against = [peers.matmul_topk]
    if dtype == F32 and q.is_cpu:
        against.insert(0, peers.faiss_flat)
    return Case(
        f"knn_topk {short(dtype)} {queries} of {entries} x {HEAD_DIM}, k {k}",
        lambda: memkernels.knn_topk(q, bank, None, k)[0],
        {
            f"flops {short(dtype)}": 2 * queries * entries * HEAD_DIM,
            "read": bank.nbytes,
        },
        peers.among(against, q[:, 0], bank[0], k),
        {"torch matmul": lambda: q[:, 0] @ bank[0].T},
    )


def indexer(queries: int, keys: int, *, backward: bool, heads: int = 64) -> Case:
    inputs = [
        torch.randn(queries, heads, HEAD_DIM).to(BF16),
        torch.randn(queries, heads).to(BF16),
        torch.randn(keys, HEAD_DIM).to(BF16),
    ]
    dscores = torch.randn(queries, keys)

    def run(scores):
        if not backward:
            return scores(*inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(scores(*leaves), leaves, dscores)

    flops = 2 * queries * heads * keys * HEAD_DIM
    return Case(
        f"indexer_scores bf16 {queries} x {keys}, heads {heads}"
        + (", forward + backward" if backward else ""),
        lambda: run(lambda *x: memkernels.indexer_scores(*x, causal=False)),
        {"flops bf16": flops * (5 if backward else 1)},  # scores three times, and two products
        {"torch matmul, relu": lambda: run(peers.indexer_scores)},
    )


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield from quick_cases()
    else:
        yield from gpu_cases() if _measure.on_gpu() else full_cases()


def full_cases() -> Iterator[Case]:
    for page_size, layout in (32, "HND"), (32, "NHD"), (16, "HND"), (16, "NHD"):
        yield quest(131072, page_size, layout)
    yield scores(1, 131072, 32)
    yield scores(8, 32768, 16)
    yield summaries(16384, 16)
    yield select(64, 8192, 128)
    yield select(8, 1 << 20, 2048)
    yield colstats(8, 4096, 1)
    yield colstats(1, 32768, 32)
    yield colstats(1, 4096, 4096)
    yield evict(8, 16384, "head")
    yield evict(8, 16384, "sequence")
    yield knn(64, 1 << 18, 32)
    yield knn(4, 1 << 20, 32)
    yield knn(64, 1 << 18, 32, dtype=BF16)
    for backward in (False, True):
        yield indexer(256, 8192, backward=backward)
    yield indexer(1, 1 << 17, backward=False)


def gpu_cases() -> Iterator[Case]:
    """Sizes that fill a large GPU, and that its caches cannot hold."""
    for layout in "NHD", "HND":
        yield quest(131072, 16, layout, batch=8, layers=2)
    yield quest(131072, 16, "NHD", layers=4)
    yield scores(8, 131072, 16)
    yield scores(64, 32768, 16)
    yield summaries(65536, 16)
    for rows, columns, k in (64, 8192, 128), (4096, 8192, 128), (64, 65536, 2048):
        yield select(rows, columns, k)
    for rows in 1, 8, 256:
        yield select(rows, 1 << 20, 2048)
    yield colstats(64, 8192, 1)
    yield colstats(8, 32768, 32)
    yield colstats(1, 16384, 16384)
    for group in "head", "sequence":
        yield evict(64, 16384, group)
    yield knn(64, 1 << 22, 32)
    yield knn(4, 1 << 22, 32)
    for queries in 64, 4096:
        yield knn(queries, 1 << 20, 32, dtype=BF16)
    for backward in (False, True):
        yield indexer(2048, 16384, backward=backward)
    yield indexer(4096, 65536, backward=False, heads=128)
    yield indexer(1, 1 << 20, backward=False)


def quick_cases() -> Iterator[Case]:
    for layout in "HND", "NHD":
        yield quest(2048, 16, layout, layers=2, budget=128)
    yield scores(2, 1024, 16, layers=2)
    yield summaries(64, 16)
    yield select(4, 1024, 32)
    yield colstats(2, 256, 1, layers=2)
    yield colstats(1, 256, 64, layers=1)
    yield evict(2, 512, "head")
    yield knn(8, 4096, 8)
    yield knn(64, 4096, 8, dtype=BF16)
    for backward in (False, True):
        yield indexer(8, 256, backward=backward, heads=8)
