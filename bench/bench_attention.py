"""Benchmarks of the attention family. Working sets are far larger than any cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import memkernels
import peers
from case import Case, short
from memkernels import _measure

HEAD_DIM = 128
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def filled(*shape: int, dtype: torch.dtype) -> Tensor:
    """A cache of random values; they repeat, since drawing gigabytes takes longer than measuring.
    The period is odd, so that pages differ."""
    cache = torch.empty(shape, dtype=dtype)
    if cache.is_cpu:
        torch.ops.memkernels._advise_huge_pages(cache)  # as PagedKVCache does
    noise = torch.randn((1 << 20) + 1).to(dtype)
    for part in cache.view(-1).split(noise.numel()):
        part.copy_(noise[: part.numel()])
    return cache


def random_pages(*shape: int) -> Tensor:
    return torch.randperm(torch.Size(shape).numel(), dtype=torch.int32).view(shape)


def decode(
    dtype: torch.dtype,
    batch: int,
    length: int,
    *,
    heads: tuple[int, int] = (32, 8),
    page_size: int = 16,
    megabytes: int = 512,
    against: Sequence[Callable] = peers.DECODE,
) -> Case:
    """One query a sequence over pages in random order. Several sets of pages, used in turns, make
    up the working set."""
    num_heads, num_kv_heads = heads
    pages = -(-length // page_size)
    row = num_kv_heads * HEAD_DIM * dtype.itemsize
    sets = -(-(megabytes << 20) // (2 * batch * pages * page_size * row))
    k, v = (
        filled(sets * batch * pages, page_size, num_kv_heads, HEAD_DIM, dtype=dtype)
        for _ in range(2)
    )
    q = torch.randn(batch, num_heads, HEAD_DIM).to(dtype)
    tables = random_pages(sets, batch, pages)
    work = {"read": 2 * batch * length * row}
    if page_size < 16:  # too short to count as streaming
        work[f"gather {page_size * row}"] = work["read"]
    return Case(
        f"decode {short(dtype)} {batch} x {length} heads {num_heads}/{num_kv_heads} "
        f"page {page_size}",
        attend(q, k, v, tables, length),
        work,
        peers.among(against, peers.Decode(q, k, v, tables, length)),
    )


def decode_mla(
    batch: int, length: int, *, heads: int = 16, against: Sequence[Callable] = peers.DECODE_MLA
) -> Case:
    """Multi-head latent attention: one key head of 576, whose first 512 are the values too. Each
    byte meets many heads, so arithmetic limits it as well."""
    dim, value_dim, pages = 576, 512, length // 16
    k = filled(batch * pages, 16, 1, dim, dtype=BF16)
    v = k[..., :value_dim]
    q = torch.randn(batch, heads, dim).to(BF16)
    tables = random_pages(1, batch, pages)
    return Case(
        f"decode MLA bf16 {batch} x {length} heads {heads}/1 page 16",
        attend(q, k, v, tables, length),
        {"read": k.nbytes, "flops bf16": 2 * heads * (dim + value_dim) * batch * length},
        peers.among(against, peers.Decode(q, k, v, tables, length)),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, length: int) -> Callable[[], Tensor]:
    """Decode with the tables in turns."""
    turns = itertools.cycle(tables)
    seq_lens = torch.full((q.shape[0],), length, dtype=torch.int32)
    return lambda: memkernels.paged_attention(q, k, v, next(turns), seq_lens)


def decode_shared(
    heads: tuple[int, int], *, sequences: int = 64, prefix: int = 4096, own: int = 256
) -> Case:
    """Decode of sequences that share the pages of a prefix, beside the same sequences with a copy
    of the prefix each. The bytes are those of the shared cache."""
    num_heads, num_kv_heads = heads
    order = random_pages((prefix + sequences * own) // 16)
    shared, rest = order.split([prefix // 16, sequences * own // 16])
    table = torch.cat([shared.expand(sequences, -1), rest.view(sequences, -1)], dim=1)
    k, v = (filled(order.numel(), 16, num_kv_heads, HEAD_DIM, dtype=BF16) for _ in range(2))
    copies = torch.randperm(table.numel())
    unshared = [cache[table.flatten()[copies]] for cache in (k, v)]
    unshared_table = copies.argsort().int().view(table.shape)
    q = torch.randn(sequences, num_heads, HEAD_DIM).to(BF16)
    return Case(
        f"decode bf16 {sequences} sharing {prefix}, {own} own, heads {num_heads}/{num_kv_heads}",
        attend(q, k, v, table[None], prefix + own),
        {
            "read": k.nbytes + v.nbytes,
            "flops bf16": 4 * num_heads * HEAD_DIM * sequences * (prefix + own),
        },
        {"ours, unshared": attend(q, *unshared, unshared_table[None], prefix + own)},
    )


def chosen_pages(
    *, per_head: bool, batch: int = 8, pages: int = 4096, chosen: int = 128, page_size: int = 32
) -> Case:
    """Decode over some pages of each sequence: the same for all heads, or others for each."""
    num_heads, num_kv_heads = 32, 8
    k, v = (filled(batch * pages, page_size, num_kv_heads, HEAD_DIM, dtype=BF16) for _ in range(2))
    q = torch.randn(batch, num_heads, HEAD_DIM).to(BF16)
    table = random_pages(batch, pages)
    choices = torch.rand(batch, num_kv_heads if per_head else 1, pages).argsort(dim=-1)
    indices = choices[..., :chosen].sort(dim=-1).values.int()
    seq_lens = torch.full((batch,), pages * page_size, dtype=torch.int32)
    read = 2 * batch * chosen * page_size * num_kv_heads * HEAD_DIM * BF16.itemsize
    return Case(
        f"gather_attention bf16 {batch} x {chosen} of {pages} pages of {page_size}"
        + (", per head" if per_head else ""),
        lambda: memkernels.gather_attention(q, k, v, indices, table, seq_lens, unit="page"),
        # What one head reads of a token is all that lies together.
        {f"gather {HEAD_DIM * BF16.itemsize}" if per_head else "read": read},
        {"torch gather + SDPA": lambda: peers.sdpa_chosen(q, k, v, indices, table)},
        {"paged_attention over all pages": attend(q, k, v, table[None], pages * page_size)},
    )


def causal(
    dtype: torch.dtype,
    length: int,
    heads: int,
    *,
    backward: bool,
    kv_heads: int | None = None,
    batch: int = 1,
    against: dict[str, Callable] = peers.CAUSAL,
) -> Case:
    """Causal self-attention of packed sequences, with gradients or without."""
    offsets = torch.arange(batch + 1) * length
    packed = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets)

    def random(count: int) -> Tensor:
        return torch.randn(batch * length, count, HEAD_DIM).to(dtype)

    def head_major(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, length)).transpose(1, 2).contiguous()

    qkv = [random(heads), *(random(kv_heads or heads) for _ in range(2))]
    dout = random(heads)
    theirs = [head_major(x) for x in (*qkv, dout)]

    def run(attend, inputs, dout):
        if not backward:
            return [attend(*inputs)]
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    def ours(*qkv):
        return memkernels.paged_attention(*qkv, **packed)

    def peer(attend):
        results = run(attend, theirs[:3], theirs[3])
        return lambda: [x.transpose(1, 2).flatten(0, 1) for x in results]

    sizes = f"{batch} x {length}" if batch > 1 else f"{length}"
    flops = 2 * batch * heads * HEAD_DIM * length**2
    return Case(
        f"{'forward + backward' if backward else 'prefill'} {short(dtype)} {sizes} causal, "
        f"heads {heads}" + (f"/{kv_heads}" if kv_heads else ""),
        lambda: run(ours, qkv, dout),
        # 4 L D flops a query, half of them hidden; the backward is two and a half forwards.
        {f"flops {short(dtype)}": flops * (3.5 if backward else 1)},
        {name: functools.partial(peer, attend) for name, attend in against.items()},
    )


def append(count: int) -> Case:
    """New tokens to random slots; bytes are those read and those written."""
    k, v = (torch.randn(count, 8, HEAD_DIM).bfloat16() for _ in range(2))
    caches, theirs = (
        [torch.zeros(count // 16, 16, 8, HEAD_DIM, dtype=k.dtype) for _ in range(2)]
        for _ in range(2)
    )
    slots = torch.randperm(count)

    def to(append, caches):
        append(k, v, *caches, slots)
        return caches

    return Case(
        f"append_kv bf16 {count} tokens, heads 8",
        lambda: to(memkernels.append_kv, caches),
        {"read": 2 * (k.nbytes + v.nbytes)},
        {"torch index_copy": lambda: to(peers.index_copy, theirs)},
    )


def copy(count: int) -> Case:
    """Pages onto others; bytes are those read and those written."""
    caches = [filled(2 * count, 16, 8, HEAD_DIM, dtype=BF16) for _ in range(2)]
    theirs = [cache.clone() for cache in caches]
    pairs = random_pages(count, 2)
    source, target = pairs.long().unbind(1)

    def ours():
        memkernels.copy_pages(*caches, pairs)
        return caches

    def index_move():
        peers.index_move(theirs, source, target)
        return theirs

    return Case(
        f"copy_pages bf16 {count} pages of 16, heads 8",
        ours,
        {"update": 2 * caches[0].nbytes},  # half of two caches, twice
        {"torch index_select, index_copy": index_move},
    )


def compact(batch: int, length: int, *, per_head: bool) -> Case:
    """Every second token kept, at random: the same for all heads, or others for each. Bytes are
    those read and those written. Run again, it does the same work on what it left."""
    heads, pages = 8, length // 16
    caches = [filled(batch * pages, 16, heads, HEAD_DIM, dtype=BF16) for _ in range(2)]
    theirs = [cache.clone() for cache in caches]
    table = random_pages(batch, pages)
    seq_lens = torch.full((batch,), length, dtype=torch.int32)
    choices = torch.rand(batch, heads if per_head else 1, length).argsort(dim=-1)
    keep = choices[..., : length // 2].sort(dim=-1).values

    # The peer's rows, of all heads or of one, are found before its time is taken.
    groups = keep.shape[1]
    slots = (table[:, :, None] * 16 + torch.arange(16)).view(batch, 1, length).long()
    slots = slots.expand(-1, groups, -1) * groups + torch.arange(groups)[:, None]
    source = slots.gather(2, keep).flatten()
    target = slots[..., : length // 2].flatten()

    def rows(caches):
        return [cache.view(batch * length * groups, -1) for cache in caches]

    def kept(caches):
        return lambda: [part[target] for part in rows(caches)]

    def ours():
        memkernels.compact_kv(*caches, table, seq_lens, keep)
        return kept(caches)

    def index_move():
        peers.index_move(rows(theirs), source, target)
        return kept(theirs)

    return Case(
        f"compact_kv bf16 {batch} x {length} to half{', per head' if per_head else ''}, heads 8",
        ours,
        {"update": 2 * caches[0].nbytes},  # half of two caches, twice
        {"torch index_select, index_copy": index_move},
    )


def merge(count: int) -> Case:
    """Four partial results into one; bytes are those read and those written."""
    outs, lses = torch.randn(4, count, 32, HEAD_DIM), torch.randn(4, count, 32)
    return Case(
        f"merge_states f32 4 x {count}, heads 32",
        lambda: memkernels.merge_states(outs, lses),
        {"read": outs.nbytes * 5 / 4},
        {"torch logsumexp": lambda: peers.logsumexp_merge(outs, lses)},
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
        {"read": 1000 * 2 * 16 * 2 * 64 * 4},
        others={
            "torch op on an empty batch": many(lambda: op(*empty, *[None] * 5, scale=1.0)),
            "torch.add": many(lambda: torch.add(q, q)),
        },
    )


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield from quick_cases()
    else:
        yield from gpu_cases() if _measure.on_gpu() else full_cases()


def full_cases() -> Iterator[Case]:
    for dtype, (batch, length) in itertools.product((BF16, F32), ((8, 4096), (1, 32768))):
        yield decode(dtype, batch, length)
    yield decode(BF16, 8, 4096, page_size=1)
    yield decode(BF16, 8, 4096, page_size=7)
    yield decode(BF16, 8, 4096, heads=(32, 32))
    yield decode(BF16, 8, 4096, heads=(64, 8))
    yield decode(F16, 8, 4096)
    yield decode_mla(8, 16384)
    yield decode_shared((32, 8))
    yield decode_shared((32, 32))
    yield chosen_pages(per_head=False)
    yield chosen_pages(per_head=True)
    for backward, dtype in itertools.product((False, True), (BF16, F32, F16)):
        yield causal(dtype, 4096, 8, backward=backward)
    yield append(65536)
    yield copy(4096)
    yield compact(8, 16384, per_head=False)
    yield compact(8, 16384, per_head=True)
    yield merge(16384)
    yield call()


def gpu_cases() -> Iterator[Case]:
    """Sizes that fill a large GPU, and that its caches cannot hold."""
    large = {"megabytes": 4096, "against": peers.GPU}
    for page_size in 16, 8, 1:
        yield decode(BF16, 64, 8192, page_size=page_size, **large)
    yield decode(BF16, 1, 131072, **large)
    yield decode(BF16, 256, 1024, **large)
    yield decode(BF16, 64, 8192, heads=(32, 32), **large)
    yield decode(BF16, 64, 8192, heads=(64, 8), **large)
    yield decode(F16, 64, 8192, **large)
    yield decode(F32, 64, 8192, **large)
    for heads in 16, 128:
        yield decode_mla(64, 8192, heads=heads, against=peers.GPU)
    for per_head in (False, True):
        yield chosen_pages(per_head=per_head, batch=32)
    for backward, dtype in itertools.product((False, True), (BF16, F32)):
        size = {"kv_heads": 8, "batch": 8, "against": peers.CAUSAL_GPU}
        yield causal(dtype, 4096, 32, backward=backward, **size)
    yield append(1 << 20)
    yield copy(1 << 16)
    for per_head in (False, True):
        yield compact(64, 16384, per_head=per_head)
    yield merge(1 << 17)
    yield call()


def quick_cases() -> Iterator[Case]:
    yield decode(BF16, 2, 512, megabytes=8)
    yield decode(F32, 2, 100, page_size=7, megabytes=8, against=peers.TORCH)
    yield decode_mla(2, 512, against=(*peers.TORCH, peers.vllm_mla))
    yield decode_shared((8, 2), sequences=4, prefix=64, own=16)
    for per_head in (False, True):
        yield chosen_pages(per_head=per_head, batch=2, pages=64, chosen=4)
    for backward in (False, True):
        yield causal(F32, 256, 2, backward=backward)
    yield append(256)
    yield copy(64)
    for per_head in (False, True):
        yield compact(2, 256, per_head=per_head)
    yield merge(64)
    yield call()
