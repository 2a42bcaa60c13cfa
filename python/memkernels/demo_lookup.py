"""The cases of the lookup family in the demo's table of ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import memkernels
from memkernels import fallback
from memkernels.demo_ops import DTYPES, Case

EXACT = 8  # tokens that are computed in float64


def keys(dtype: str, limit: float, tokens: int, num_keys: int, k: int) -> Case:
    """The best of num_keys ** 2 slots; both halves' scores are most of the work."""
    heads, dim = 4, 128
    query = torch.randn(tokens, heads, 2, dim).to(DTYPES[dtype])
    halves = torch.randn(heads, 2, num_keys, dim).to(DTYPES[dtype])

    def peer():
        scores = query.permute(1, 2, 0, 3) @ halves.mT  # [H, 2, T, N]
        first, second = scores.topk(k).values.unbind(1)
        sums = first[..., :, None] + second[..., None, :]
        return (sums.flatten(2).topk(k).values.transpose(0, 1),)

    exact, _ = fallback.product_key_topk(query[:EXACT].double(), halves.double(), k)
    return Case(
        op="product_key_topk",
        dtype=dtype,
        shape=f"{tokens} x 4 of {num_keys}^2, k {k}",
        ours=lambda: memkernels.product_key_topk(query, halves, k)[:1],
        peer=peer,
        exact=(exact,),
        work=2 * 2 * dim * num_keys * heads * tokens,
        unit="GFLOP/s",
        limit=limit,
    )


def bag(dtype: str, limit: float, tokens: int, backward: bool) -> Case:
    """Weighted sums of 128 rows each; bytes are those of the rows, and of a dense gradient."""
    rows, dim, size = 65536, 512, 128
    table = torch.randn(rows, dim).to(DTYPES[dtype])
    index, weights = torch.randint(rows, (tokens, size)), torch.rand(tokens, size).to(table.dtype)
    dout = torch.randn(tokens, dim).to(table.dtype)

    def run(embedding_bag, index, table, weights, dout):
        if not backward:
            return (embedding_bag(index, table, per_sample_weights=weights),)
        leaves = [x.detach().requires_grad_() for x in (table, weights)]
        out = embedding_bag(index, leaves[0], per_sample_weights=leaves[1])
        return out, *torch.autograd.grad(out, leaves, dout)

    def torch_bag(index, table, per_sample_weights):
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=per_sample_weights)

    read = index.numel() * dim * table.itemsize
    given = index, table, weights, dout
    exact = (x.double() if x.is_floating_point() else x for x in given)
    return Case(
        op=f"embedding_bag{' training' if backward else ''}",
        dtype=dtype,
        shape=f"{tokens} x {size} of {rows} x {dim}",
        ours=lambda: run(memkernels.embedding_bag, *given),
        peer=lambda: run(torch_bag, *given),
        exact=run(fallback.embedding_bag, *exact),
        work=2 * read + table.nbytes if backward else read,
        unit="GB/s",
        limit=limit,
    )


def adam(limit: float, count: int) -> Case:
    """One step of some rows of a table; bytes of parameter, moments and gradient."""
    shape, options = (65536, 256), {"lr": 1e-3, "eps": 1e-15}  # torch corrects eps, too
    table, rows = torch.randn(shape), torch.randperm(shape[0])[:count].sort().values
    grads, number = torch.randn(count, shape[1]), torch.tensor([count])

    def step(states):
        memkernels.row_adam(*states, rows, grads, number, step=1, **options)
        return states[:1]

    def states(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return like.clone(), torch.zeros_like(like), torch.zeros_like(like)

    ours, exact, theirs = states(table), states(table.double()), table.clone().requires_grad_()
    fallback.row_adam(*exact, rows, grads.double(), number, step=1, **options)
    theirs.grad = torch.sparse_coo_tensor(
        rows[None], grads, shape, is_coalesced=True, check_invariants=False
    )
    optimizer = torch.optim.SparseAdam([theirs], **options)

    def peer():
        optimizer.step()
        return (theirs.detach(),)

    return Case(
        op="row_adam",
        dtype="f32",
        shape=f"{count} rows of {shape[0]} x {shape[1]}",
        ours=lambda: step(ours),
        peer=peer,
        exact=exact[:1],
        work=7 * grads.nbytes,
        unit="GB/s",
        limit=limit,
    )


def hashes(limit: float, tokens: int) -> Case:
    """Rows of 8 heads for each of three orders; bytes are those of the rows' numbers."""
    orders, heads = [2, 3, 4], 8
    ids = torch.randint(100_000, (1, tokens))
    multipliers = 2 * torch.randint(2**45, (4,)) + 1
    moduli = 16_000_000 + torch.arange(len(orders) * heads)
    offsets = moduli.cumsum(0) - moduli

    def peer():
        mix = products = ids * multipliers[:, None]  # [4, T]
        mix, out = products[0], []
        for j in range(1, 4):
            mix = mix ^ F.pad(products[j], (j, 0))[:tokens]
            out.append(mix[:, None] % moduli.view(3, heads)[j - 1])
        return ((torch.cat(out, 1) + offsets)[None],)

    exact = fallback.ngram_hash(ids, multipliers, moduli, offsets, orders=orders)
    return Case(
        op="ngram_hash",
        dtype="i64",
        shape=f"{tokens}, 3 orders of 8 heads",
        ours=lambda: (memkernels.ngram_hash(ids, multipliers, moduli, offsets, orders=orders),),
        peer=peer,
        exact=(exact.double(),),
        work=tokens * len(moduli) * 8,
        unit="GB/s",
        limit=limit,
    )


def gate(limit: float, tokens: int) -> Case:
    """What of a value reaches 4 channels; bytes are those read and those written."""
    channels, dim = 4, 1024
    hidden, k = (torch.randn(tokens, channels, dim).bfloat16() for _ in range(2))
    v, weight = torch.randn(tokens, dim).bfloat16(), torch.randn(channels, dim)

    def peer():
        normed = (F.rms_norm(x.float(), (dim,), eps=1e-6) for x in (hidden, k))
        d = (next(normed) * next(normed) * weight).sum(-1) * dim**-0.5
        gate = (d.sign() * d.abs().clamp(min=1e-6).sqrt()).sigmoid()
        return ((gate[..., None] * v[:, None]).bfloat16(),)

    first = (x[:EXACT].double() for x in (hidden, k, v))
    return Case(
        op="engram_gate",
        dtype="bf16",
        shape=f"{tokens} x {channels} x {dim}",
        ours=lambda: (memkernels.engram_gate(hidden, k, v, weight),),
        peer=peer,
        exact=(fallback.engram_gate(*first, weight.double()),),
        work=3 * hidden.nbytes + v.nbytes,
        unit="GB/s",
        limit=limit,
    )


def codes(limit: float, tokens: int) -> Case:
    """Addresses in 32 tables and how firm they are; bytes are those of the projections."""
    z = torch.randn(tokens, 32, 8)
    powers = 2 ** torch.arange(7, -1, -1)

    def peer():
        size = z.abs()
        firmness = size.sum(-1) / (1 + (-2 * size).exp()).prod(-1)
        return ((z >= 0) * powers).sum(-1), firmness

    return Case(
        op="lsh_codes",
        dtype="f32",
        shape=f"{tokens} x 32 tables of 8 bits",
        ours=lambda: memkernels.lsh_codes(z),
        peer=peer,
        exact=tuple(x.double() for x in fallback.lsh_codes(z[:EXACT].double())),
        work=z.nbytes,
        unit="GB/s",
        limit=limit,
    )


def experts(limit: float, tokens: int) -> Case:
    """128 neurons of 65536 for each token; bytes are those of their rows."""
    size, dim, k = 65536, 512, 128
    x = torch.randn(tokens, dim).bfloat16()
    up, down = (torch.randn(size, dim).mul(dim**-0.5).bfloat16() for _ in range(2))
    index, weights = torch.randint(size, (tokens, k)), torch.rand(tokens, k)

    def peer():
        hidden = F.gelu((up[index] @ x[..., None])[..., 0]) * weights
        return ((hidden.bfloat16()[:, None] @ down[index])[:, 0],)

    tables = (table.double() for table in (x[:EXACT], up, down))
    return Case(
        op="sparse_ffn",
        dtype="bf16",
        shape=f"{tokens} x {k} of {size} x {dim}",
        ours=lambda: (memkernels.sparse_ffn(x, up, down, index, weights),),
        peer=peer,
        exact=(fallback.sparse_ffn(*tables, index[:EXACT], weights[:EXACT].double()),),
        work=2 * index.numel() * dim * x.itemsize,
        unit="GB/s",
        limit=limit,
    )


def cases(bandwidth: float, flops: dict[str, float], scale: int) -> list[Callable[[], Case]]:
    return [
        *(lambda d=d: keys(d, flops[d], 512 // scale, 512, 32) for d in DTYPES),
        lambda: bag("bf16", bandwidth, 512 // scale, backward=False),
        lambda: bag("f32", bandwidth, 512 // scale, backward=True),
        lambda: adam(bandwidth, 32768 // scale),
        lambda: hashes(bandwidth, 16384 // scale),
        lambda: gate(bandwidth, 2048 // scale),
        lambda: codes(bandwidth, 8192 // scale),
        lambda: experts(bandwidth, 256 // scale),
    ]
