"""Part 1 of the demo: each op against float64, against this machine's limits, against torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import memkernels
from memkernels import fallback
from memkernels._measure import flops_limit, interleaved, read_limit

PAGE_SIZE = 16
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass
class Case:
    op: str
    dtype: str
    shape: str
    ours: Callable[[], tuple[Tensor, ...]]
    peer: Callable[[], tuple[Tensor, ...]]
    exact: tuple[Tensor, ...]  # float64, of the first rows of each result
    work: float  # bytes moved or floating-point operations
    unit: str  # GB/s or GFLOP/s
    limit: float  # of work a second


# ---- cases ---------------------------------------------------------------------------------------


def decode(dtype: str, limit: float, batch: int, length: int) -> Case:
    """One query a sequence, over pages in random order."""
    pages = length // PAGE_SIZE
    q = torch.randn(batch, 32, 128).to(DTYPES[dtype])
    k, v = (torch.randn(batch * pages, PAGE_SIZE, 8, 128).to(q.dtype) for _ in range(2))
    page_table = torch.randperm(batch * pages).view(batch, pages)
    seq_lens = torch.full((batch,), length)

    def gather(cache: Tensor, rows: int = batch) -> Tensor:  # [B, length, Hkv, D]
        return cache[page_table[:rows]].flatten(1, 2)

    def peer():
        # The heads of a group as rows of queries: many times faster than enable_gqa=True.
        kv = (gather(cache).transpose(1, 2) for cache in (k, v))
        return (F.scaled_dot_product_attention(q.unflatten(1, (8, 4)), *kv).flatten(1, 2),)

    return Case(
        op="paged_attention decode",
        dtype=dtype,
        shape=f"{batch} x {length}, heads 32/8 x 128",
        ours=lambda: (memkernels.paged_attention(q, k, v, page_table, seq_lens),),
        peer=peer,
        exact=fallback.paged_attention(*(x.double() for x in (q[:1], gather(k, 1), gather(v, 1)))),
        work=k.nbytes + v.nbytes,
        unit="GB/s",
        limit=limit,
    )


def causal(dtype: str, limit: float, length: int, backward: bool) -> Case:
    """Causal self-attention of one packed sequence, with gradients or without."""
    heads, dim = 4, 128
    q, k, v, dout = (torch.randn(length, heads, dim).to(DTYPES[dtype]) for _ in range(4))
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

    return Case(
        op=f"paged_attention {'training' if backward else 'prefill'}",
        dtype=dtype,
        shape=f"{length} causal, heads {heads} x {dim}",
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


def gather(limit: float, batch: int, length: int, listed: int) -> Case:
    """One query a sequence, over some of its pages, other ones for each head."""
    pages = length // PAGE_SIZE
    q = torch.randn(batch, 32, 128).bfloat16()
    k, v = (torch.randn(batch * pages, PAGE_SIZE, 8, 128).to(q.dtype) for _ in range(2))
    page_table = torch.randperm(batch * pages).view(batch, pages)
    seq_lens = torch.full((batch,), length)
    indices = torch.rand(batch, 8, pages).topk(listed, sorted=False).indices

    def peer():
        rows = page_table[:, None].expand(-1, 8, -1).gather(2, indices)  # [B, Hkv, listed]
        heads = torch.arange(8)[:, None]
        kv = (cache.transpose(1, 2)[rows, heads].flatten(2, 3) for cache in (k, v))
        return (F.scaled_dot_product_attention(q.unflatten(1, (8, 4)), *kv).flatten(1, 2),)

    exact = fallback.gather_attention(
        *(x.double() for x in (q, k, v)), indices, page_table, seq_lens, scale=128**-0.5
    )
    return Case(
        op="gather_attention decode",
        dtype="bf16",
        shape=f"{batch} x {listed} of {pages} pages",
        ours=lambda: (memkernels.gather_attention(q, k, v, indices, page_table, seq_lens),),
        peer=peer,
        exact=exact[:1],
        work=(k.nbytes + v.nbytes) * listed / pages,
        unit="GB/s",
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
        op="append_kv",
        dtype="bf16",
        shape=f"{count} tokens, heads 8 x 128",
        ours=lambda: append_kv(ours),
        peer=lambda: index_copy(peers, k, v),
        exact=index_copy(caches(k.double()), k.double(), v.double()),
        work=2 * (k.nbytes + v.nbytes),
        unit="GB/s",
        limit=limit,
    )


def compact(limit: float, length: int) -> Case:
    """Half of the tokens, others for each head, together in place; bytes as for append_kv."""
    pages = length // PAGE_SIZE
    caches = tuple(torch.randn(pages, PAGE_SIZE, 8, 128).bfloat16() for _ in range(2))
    page_table, seq_lens = torch.arange(pages)[None], torch.tensor([length])
    keep = torch.rand(1, 8, length).topk(length // 2).indices.sort().values
    rows = keep[0].T[..., None].expand(-1, -1, 128)  # [length / 2, Hkv, D]

    def gathered(cache: Tensor) -> Tensor:
        return cache.flatten(0, 1).gather(0, rows).unflatten(0, (-1, PAGE_SIZE))

    def peer():
        for cache in theirs:
            cache[: pages // 2] = gathered(cache)
        return theirs

    def ours():
        memkernels.compact_kv(*caches, page_table, seq_lens, keep)
        return caches

    theirs = tuple(cache.clone() for cache in caches)
    return Case(
        op="compact_kv",
        dtype="bf16",
        shape=f"{length // 2} of {length} tokens",
        ours=ours,
        peer=peer,
        exact=tuple(gathered(cache).double() for cache in caches),
        work=sum(cache.nbytes for cache in caches),
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
        op="merge_states",
        dtype="f32",
        shape=f"4 x {count}, heads 32 x 128",
        ours=lambda: memkernels.merge_states(outs, lses),
        peer=peer,
        exact=fallback.merge_states(outs[:, :64].double(), lses[:, :64].double()),
        work=outs.nbytes * 5 / 4,
        unit="GB/s",
        limit=limit,
    )


def score(limit: float, batch: int, length: int) -> Case:
    """Quest's bound on every page of a sequence; bytes are those of the summaries."""
    pages = length // PAGE_SIZE
    q = torch.randn(batch, 32, 128).bfloat16()
    k = torch.randn(batch * pages, PAGE_SIZE, 8, 128).to(q.dtype)
    page_table = torch.randperm(batch * pages).view(batch, pages)
    seq_lens = torch.full((batch,), length)
    summary = memkernels.summarize_keys(k, page_table, seq_lens)

    def peer():
        queries = q.unflatten(1, (8, 4))
        split = torch.cat([queries.clamp(max=0), queries.clamp(min=0)], -1)
        rows = summary[page_table].flatten(3).permute(0, 2, 3, 1)  # [B, Hkv, 2 D, pages]
        return ((split @ rows).amax(2) * 128**-0.5,)

    exact = fallback.score_pages(
        q[:1].double(), summary.double(), page_table[:1], seq_lens[:1], PAGE_SIZE
    )
    return Case(
        op="score_pages",
        dtype="bf16",
        shape=f"{batch} x {pages} pages",
        ours=lambda: (memkernels.score_pages(q, summary, page_table, seq_lens, PAGE_SIZE),),
        peer=peer,
        exact=(exact,),
        work=summary.nbytes,
        unit="GB/s",
        limit=limit,
    )


def select(limit: float, rows: int, columns: int, k: int) -> Case:
    """The best of each row, in order; the peer leaves them in the order of their scores."""
    scores = torch.randn(rows, columns)
    return Case(
        op="select_topk",
        dtype="f32",
        shape=f"{rows} x {columns}, k {k}",
        ours=lambda: (memkernels.select_topk(scores, k),),
        peer=lambda: (scores.topk(k).indices.sort().values,),
        exact=(fallback.select_topk(scores[:8].double(), k).double(),),
        work=scores.nbytes,
        unit="GB/s",
        limit=limit,
    )


def colstats(limit: float, batch: int, length: int) -> Case:
    """The attention that each cached token gets from one query a sequence."""
    pages = length // PAGE_SIZE
    q = torch.randn(batch, 32, 128).bfloat16()
    k = torch.randn(batch * pages, PAGE_SIZE, 8, 128).to(q.dtype)
    page_table = torch.randperm(batch * pages).view(batch, pages)
    cache = page_table, torch.full((batch,), length), None
    _, lse = memkernels.paged_attention(q, k, k, *cache, return_lse=True)

    def peer():
        keys = k[page_table].flatten(1, 2).permute(0, 2, 3, 1)  # [B, Hkv, D, length]
        logits = q.unflatten(1, (8, 4)) @ keys * 128**-0.5
        return (logits.float().softmax(-1).sum(2),)

    one = q[:1].double(), k.double(), page_table[:1], cache[1][:1], None
    _, exact_lse = fallback.paged_attention(*one[:2], one[1], *one[2:])
    return Case(
        op="attention_colstats",
        dtype="bf16",
        shape=f"{batch} x {length}, heads 32/8 x 128",
        ours=lambda: (memkernels.attention_colstats(q, k, *cache, lse),),
        peer=peer,
        exact=(fallback.attention_colstats(*one, exact_lse),),
        work=k.nbytes,
        unit="GB/s",
        limit=limit,
    )


def nearest(limit: float, queries: int, entries: int, k: int) -> Case:
    """The nearest entries of a bank, by dot product."""
    q, bank = torch.randn(queries, 1, 128), torch.randn(1, entries, 128)
    exact = (q[:8, 0].double() @ bank[0].double().T).topk(k).values
    return Case(
        op="knn_topk",
        dtype="f32",
        shape=f"{queries} of {entries}, k {k}",
        ours=lambda: (memkernels.knn_topk(q, bank, None, k)[0][:, 0],),
        peer=lambda: ((q[:, 0] @ bank[0].T).topk(k).values,),
        exact=(exact,),
        work=2 * 128 * queries * entries,
        unit="GFLOP/s",
        limit=limit,
    )


def indexer(limit: float, queries: int, keys: int, heads: int) -> Case:
    """A lightning indexer's scores of all keys."""
    q, w = torch.randn(queries, heads, 128).bfloat16(), torch.randn(queries, heads)
    k = torch.randn(keys, 128).bfloat16()
    exact = torch.einsum("ths,th->ts", (q[:8].double() @ k.double().T).relu(), w[:8].double())
    return Case(
        op="indexer_scores",
        dtype="bf16",
        shape=f"{queries} x {keys}, heads {heads}",
        ours=lambda: (memkernels.indexer_scores(q, w, k, causal=False),),
        peer=lambda: (torch.einsum("ths,th->ts", (q @ k.T).relu().float(), w),),
        exact=(exact,),
        work=2 * 128 * queries * keys * heads,
        unit="GFLOP/s",
        limit=limit,
    )


# ---- the table -----------------------------------------------------------------------------------


def error(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Largest error of any result, relative to the largest number in it."""
    return max(
        ((a[: len(e)] - e).abs().max() / e.abs().max()).item()
        for a, e in zip(actual, exact, strict=False)
    )


def cases(bandwidth: float, flops: dict[str, float], scale: int) -> list[Callable[[], Case]]:
    """Attention and selection, at the limits of reading and computing, and so much smaller."""
    made = [lambda d=d: decode(d, bandwidth, 4, 4096 // scale) for d in DTYPES]
    for backward in False, True:
        made += [lambda d=d, b=backward: causal(d, flops[d], 1024 // scale, b) for d in DTYPES]
    return [
        *made,
        lambda: gather(bandwidth, 4, 4096 // scale, 64 // scale),
        lambda: append(bandwidth, 8192 // scale),
        lambda: compact(bandwidth, 16384 // scale),
        lambda: merge(bandwidth, 2048 // scale),
        lambda: score(bandwidth, 4, 32768 // scale),
        lambda: select(bandwidth, 64, 8192 // scale, 128),
        lambda: colstats(bandwidth, 4, 4096 // scale),
        lambda: nearest(flops["f32"], 64, 65536 // scale, 32),
        lambda: indexer(flops["bf16"], 32, 4096 // scale, 64),
    ]


def table(families: list[Callable], quick: bool = False) -> None:
    """families: functions like `cases`."""
    bandwidth = read_limit(256)
    flops = {name: flops_limit(dtype) for name, dtype in DTYPES.items()}
    print(f"  limits of this machine: reading {bandwidth / 1e9:.1f} GB/s", end="")
    for dtype, limit in flops.items():
        print(f", {dtype} {limit / 1e9:.0f} GFLOP/s", end="")
    print(f"\n\n  {'op':<26}{'':<5}{'case':<27}{'error':>6}{'torch':>7}{'ms':>8}", end="")
    print(f"{'rate':>14}{'of limit':>10}{'torch':>8}")

    scale = 4 if quick else 1
    for make in (make for family in families for make in family(bandwidth, flops, scale)):
        case = make()
        ours_error, peer_error = (error(run(), case.exact) for run in (case.ours, case.peer))
        ours, peer = (times.minimum for times in interleaved(case.ours, case.peer))
        rate = case.work / ours
        print(
            f"  {case.op:<26}{case.dtype:<5}{case.shape:<27}{ours_error:>6.0e}{peer_error:>7.0e}"
            f"{ours * 1e3:>8.2f}{rate / 1e9:>6.1f} {case.unit:<7}{rate / case.limit:>10.0%}"
            f"{peer / ours:>7.1f}x"
        )
    print(
        """
  error: against float64, the largest over the largest exact number, and torch's beside it.
  torch, last: its time over ours; scaled_dot_product_attention (decode: after gathering the pages,
  which is part of its time), index_copy_, gather, logsumexp with a weighted sum, matmul with topk,
  softmax or relu, embedding_bag, SparseAdam, conv1d, or the formula op by op; of linear_attention
  and delta_rule that is in chunks of tokens, of the scans of channels token by token. training:
  forward and backward. Bytes are those of keys and values, summaries, scores or rows; for ops that
  write as much as they read both."""
    )
