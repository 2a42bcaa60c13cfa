"""Benchmarks of the lookup family. Tables are larger than any cache, and what a call reads of them
is not what the last one left there: sets of indices take turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import lookup_peers
import memkernels
import peers
from bench_attention import BF16, F16, F32, filled
from case import Case, short
from lookup_peers import Bags
from memkernels import _measure
from memkernels.nn import PEER, ProductKeyMemory

FP8 = torch.float8_e4m3fn
LR = 0.1
BACKWARD = "forward + backward"


def drawn(how: str, rows: int, *shape: int) -> Tensor:
    """Indices of rows: uniform; Zipf, where the n-th most frequent row comes 1 / n times as often
    as the first; or those of 64 rows."""
    if how == "uniform":
        return torch.randint(rows, shape)
    order = torch.randperm(rows)
    if how == "64 rows":
        return order[torch.randint(64, shape)]
    mass = (1 / torch.arange(1, rows + 1, dtype=torch.float64)).cumsum(0)
    return order[torch.searchsorted(mass, torch.rand(shape, dtype=mass.dtype) * mass[-1])]


def bags(
    rows: int, dim: int, count: int, size: int, how: str, *, sets: int, dtype: torch.dtype = F32
) -> Bags:
    return Bags(
        filled(rows, dim, dtype=dtype),
        torch.stack([drawn(how, rows, count, size) for _ in range(sets)]),
        torch.rand(count, size).to(dtype),
        torch.randn(count, dim).to(dtype),
    )


def rows_read(x: Bags, how: str) -> int:
    """By one pass over a set: uniform ones come from memory each time, of others each row once."""
    return x.factors.numel() if how == "uniform" else rows_found(x)


def rows_found(x: Bags) -> int:
    return x.indices[0].unique().numel()


# ---- bags ----------------------------------------------------------------------------------------


def bag(
    rows: int, dim: int, count: int, size: int, how: str, *, dtype: torch.dtype = F32, sets: int = 8
) -> Case:
    """Weighted sums of rows of one table."""
    x = bags(rows, dim, count, size, how, sets=sets, dtype=dtype)
    turns, row = x.turns(), dim * dtype.itemsize
    return Case(
        f"embedding_bag {short(dtype)} {count} x {size} of {rows} x {dim}, {how}",
        lambda: memkernels.embedding_bag(next(turns), x.table, per_sample_weights=x.factors),
        {f"gather {row}": rows_read(x, how) * row, "flops f32": 2 * x.factors.numel() * dim},
        peers.among(lookup_peers.BAG, x),
    )


def quantised_bag(
    rows: int, dim: int, count: int, size: int, dtype: torch.dtype, *, sets: int = 8
) -> Case:
    """The same of rows of bytes: int8 with one float32 factor each, or fp8 with an e8m0 exponent
    for each 32 of a row."""
    if dtype == torch.int8:
        table = lookup_peers.copied(torch.randint(-128, 128, (rows, dim), dtype=dtype))
        scales, name, against = torch.rand(rows, 1) / 128, "int8", [lookup_peers.byte_bag]
    else:
        table = filled(rows, dim, dtype=dtype)
        scales, name, against = torch.randint(120, 132, (rows, dim // 32)).byte(), "fp8 e8m0", []
    indices = torch.stack([drawn("uniform", rows, count, size) for _ in range(sets)])
    x = Bags(table, indices, torch.rand(count, size), torch.empty(0))
    turns, reads = x.turns(), x.factors.numel()
    return Case(
        f"embedding_bag {name} {count} x {size} of {rows} x {dim}, uniform",
        lambda: memkernels.embedding_bag(
            next(turns), table, per_sample_weights=x.factors, scales=scales
        ),
        {
            f"gather {dim}": reads * (dim + scales.nbytes // rows),
            "flops f32": 2 * reads * dim,
        },
        peers.among([*against, lookup_peers.dequantised], x, scales),
    )


def training(
    kind: str, x: Bags, how: str, ours: Callable, against: dict, *, writes: int, **options
) -> Case:
    """Forward and backward of bags, both gradients, and what is done with the table's. Bytes: the
    rows that the forward and the factors' gradient read, and `writes` rows read or written for the
    table's; flops: a multiply-add of each element of a row in each of the three."""
    rows, dim = x.table.shape
    count, size = x.factors.shape
    row = dim * x.table.itemsize
    return Case(
        f"bag {BACKWARD}{kind} {count} x {size} of {rows} x {dim}, {how}",
        ours,
        {
            f"gather {row}": (2 * rows_read(x, how) + writes) * row,
            "flops f32": 6 * x.factors.numel() * dim,
        },
        against,
        **options,
    )


def dense_gradient(rows: int, dim: int, count: int, size: int, how: str, *, sets: int = 4) -> Case:
    """The table's gradient of all its rows."""
    x = bags(rows, dim, count, size, how, sets=sets)
    ours = lookup_peers.gradients(memkernels.embedding_bag, x)
    theirs = {"torch": lookup_peers.gradients(lookup_peers.torch_sum, x)}
    return training(", dense", x, how, ours, theirs, writes=rows)


def sparse_gradient(rows: int, dim: int, count: int, size: int, how: str, *, sets: int = 4) -> Case:
    """Of the rows that were read. Ours has each of them once; torch's repeats them, as often as
    they were read, unless it is told to add them up."""
    x = bags(rows, dim, count, size, how, sets=sets)
    ours = lookup_peers.gradients(partial(memkernels.embedding_bag, sparse=True), x)
    torch_sparse = partial(lookup_peers.torch_sum, sparse=True)
    theirs = {
        "torch sparse=True": lookup_peers.gradients(torch_sparse, x),
        "torch sparse=True, coalesced": lookup_peers.gradients(torch_sparse, x, coalesced=True),
    }
    return training(", sparse", x, how, ours, theirs, writes=rows_found(x))


def step(x: Bags, update: Callable) -> Callable:
    """Forward, both gradients, and a step of an optimiser of rows on a copy of the table. The
    forward is not differentiated in the table, whose gradient only exists as rows."""
    table = lookup_peers.copied(x.table)
    factors = x.factors.detach().requires_grad_()
    turns = x.turns()

    def run():
        indices = next(turns)
        out = memkernels.embedding_bag(indices, table, per_sample_weights=factors)
        (of_factors,) = torch.autograd.grad(out, [factors], x.grad)
        rows = memkernels.embedding_bag_backward(
            x.grad, indices, len(table), per_sample_weights=x.factors
        )
        update(table, *rows)
        return table, of_factors

    return run


def sgd(rows: int, dim: int, count: int, size: int, how: str, *, sets: int = 4) -> Case:
    """SGD on the rows that were read. FBGEMM computes the same in its backward: the factors'
    gradient from the table as it was, and the rows' new values."""
    x = bags(rows, dim, count, size, how, sets=sets)
    theirs = peers.among([partial(lookup_peers.fbgemm_step, learning_rate=LR)], x, "EXACT_SGD")
    optimiser = partial(torch.optim.SGD, lr=LR)
    theirs["torch sparse=True, SGD"] = lookup_peers.torch_step(optimiser, x, sparse=True)
    ours = step(x, partial(memkernels.row_sgd, lr=LR))
    return training(" + SGD", x, how, ours, theirs, writes=2 * rows_found(x))


def adagrad(rows: int, dim: int, count: int, size: int, how: str, *, sets: int = 4) -> Case:
    """Adagrad with one accumulator a row, likewise."""
    x = bags(rows, dim, count, size, how, sets=sets)
    options = {"learning_rate": LR, "eps": 1e-10}
    theirs = peers.among([partial(lookup_peers.fbgemm_step, **options)], x, "EXACT_ROWWISE_ADAGRAD")
    sums = torch.zeros(rows)

    def update(table, *gradient):
        memkernels.row_adagrad(table, sums, *gradient, lr=LR)

    ours = step(x, update)
    return training(" + row Adagrad", x, how, ours, theirs, writes=2 * rows_found(x))


def adam(rows: int, dim: int, count: int, size: int, how: str, *, sets: int = 4) -> Case:
    """Adam on the rows that were read, as torch's SparseAdam; its dense Adam moves all rows by
    their moments, and is the same in the first step only."""
    x = bags(rows, dim, count, size, how, sets=sets)
    moments = [torch.zeros_like(x.table) for _ in range(2)]
    steps = 0

    def update(table, *gradient):
        nonlocal steps
        steps += 1
        memkernels.row_adam(table, *moments, *gradient, step=steps, lr=LR)

    def theirs(optimiser, **options):
        return lookup_peers.torch_step(partial(optimiser, lr=LR), x, **options)

    return training(
        " + Adam", x, how,
        step(x, update),
        {"torch sparse=True, SparseAdam": theirs(torch.optim.SparseAdam, sparse=True)},
        others={
            "torch dense Adam, fused": theirs(partial(torch.optim.Adam, fused=True), sparse=False)
        },
        writes=6 * rows_found(x),
    )  # fmt: skip


# ---- what finds rows -----------------------------------------------------------------------------


def product_keys(
    tokens: int, heads: int, size: int, dim: int, k: int, *, dtype: torch.dtype = F32
) -> Case:
    """The best of size * size pairs. The products with all half keys are most of the arithmetic;
    of bf16, torch rounds them before it chooses."""
    query = torch.randn(tokens, heads, 2, dim).to(dtype)
    keys = torch.randn(heads, 2, size, dim).to(dtype)
    return Case(
        f"product_key_topk {short(dtype)} {tokens} x {heads} of {size}^2 x {dim}, k {k}",
        lambda: memkernels.product_key_topk(query, keys, k)[0],
        {f"flops {short(dtype)}": 2 * tokens * heads * 2 * size * dim},
        {
            name: lambda peer=peer: peer(query, keys, k)[0]
            for name, peer in lookup_peers.PRODUCT_KEYS.items()
        },
        {"torch matmul": lambda: lookup_peers.product_scores(query, keys)},
    )


def ngrams(tokens: int, calls: int, *, heads: int = 8, vocabulary: int = 99_092) -> Case:
    """The 2-, 3- and 4-grams of one sequence. Bytes are those of the ids, in and out."""
    multipliers = torch.randint((1 << 62) // vocabulary, (4,)) * 2 + 1
    moduli = 16_000_000 + 2 * torch.arange(3 * heads) + 1
    x = lookup_peers.Hash(
        torch.randint(vocabulary, (1, tokens)), multipliers, moduli, moduli.cumsum(0) - moduli, 2
    )

    def many(function: Callable) -> Callable:
        def run():
            for _ in range(calls):
                result = function()
            return result

        return run

    def ours():
        tensors = x.token_ids, x.multipliers, x.moduli, x.offsets
        return memkernels.ngram_hash(*tensors, orders=x.orders, pad_id=x.pad_id)

    theirs = {} if _measure.on_gpu() else peers.among(lookup_peers.HASH, x)
    return Case(
        f"{calls} calls of ngram_hash, {tokens} x {len(moduli)} ids",
        many(ours),
        {"read": calls * (1 + len(moduli)) * x.token_ids.nbytes},
        {name: many(peer) for name, peer in theirs.items()},
    )


def codes(tokens: int, tables: int, bits: int, *, backward: bool) -> Case:
    """Bytes: z and the results; backward, z and the scores' gradient again, and that of z."""
    z, dscores = torch.randn(tokens, tables, bits), torch.randn(tokens, tables)

    def run(function):
        if not backward:
            return function(z)
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(function(leaf)[1], leaf, dscores)

    results = 2 * dscores.nbytes
    return Case(
        f"lsh_codes f32 {tokens} x {tables} x {bits}" + (f", {BACKWARD}" if backward else ""),
        lambda: run(memkernels.lsh_codes),
        {"read": z.nbytes + results + (2 * z.nbytes + dscores.nbytes if backward else 0)},
        both(lookup_peers.lsh_codes, run),
    )


# ---- what uses them ------------------------------------------------------------------------------


def both(function: Callable, run: Callable) -> dict[str, Callable]:
    """A function of torch's, as it is and compiled."""
    compiled = lookup_peers.compiled(function)
    return {"torch": lambda: run(function), "torch.compile": lambda: run(compiled)}


def gate(
    tokens: int, channels: int, dim: int, *, backward: bool, dtype: torch.dtype = BF16
) -> Case:
    """Bytes: the states, keys and values read, and the result written; backward, the same again,
    and their gradients. Keys match the states a little: about 0 the gate's slope has no bound, and
    a rounding of its argument tells results apart."""
    hidden, dout = (torch.randn(tokens, channels, dim) for _ in range(2))
    k, v = hidden / 4 + torch.randn(hidden.shape), torch.randn(tokens, dim)
    inputs = [*(t.to(dtype) for t in (hidden, k, v)), torch.rand(channels, dim)]
    dout = dout.to(dtype)

    def run(function):
        if not backward:
            return function(*inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, dout)

    read = sum(x.nbytes for x in inputs)
    theirs = both(lookup_peers.engram_gate, run)
    if not backward and hidden.is_cpu:
        theirs |= peers.among([lookup_peers.onnx_gate], *inputs)
    return Case(
        f"engram_gate {short(dtype)} {tokens} x {channels} x {dim}"
        + (f", {BACKWARD}" if backward else ""),
        lambda: run(memkernels.engram_gate),
        {"read": read + dout.nbytes + (2 * read + dout.nbytes if backward else 0)},
        theirs,
    )


def neurons(rows: int, dim: int, tokens: int, k: int, *, backward: bool, sets: int = 4) -> Case:
    """k of the neurons for each token. Bytes: two rows for each of them; backward, the same again
    and the whole gradients of both tables."""
    x, dy = torch.randn(tokens, dim), torch.randn(tokens, dim)
    up, down = (filled(rows, dim, dtype=F32) for _ in range(2))
    weights = torch.rand(tokens, k)
    indices = drawn("uniform", rows, sets, tokens, k)

    def runs(function):
        turns = itertools.cycle(indices)

        def run():
            tensors = x, up, down, weights
            if backward:
                tensors = [t.detach().requires_grad_() for t in tensors]
            out = function(*tensors[:3], next(turns), tensors[3])
            return torch.autograd.grad(out, tensors, dy) if backward else out

        return run

    gathered = 2 * indices[0].numel() * dim * 4
    return Case(
        f"sparse_ffn f32 {tokens} x {k} of {rows} x {dim}" + (f", {BACKWARD}" if backward else ""),
        runs(memkernels.sparse_ffn),
        {
            f"gather {4 * dim}": 2 * gathered + up.nbytes + down.nbytes if backward else gathered,
            "flops f32": (6 if backward else 2) * 2 * indices[0].numel() * dim,
        },
        {"torch gather, matmul": runs(lookup_peers.sparse_ffn)},
    )


def layer(
    ours: torch.nn.Module,
    adapter: Callable,
    tokens: int,
    tables: list[Tensor],
    *,
    backward: bool,
    sets: int = 4,
) -> Case:
    """A layer of product keys, beside one with the same weights; several sets of tokens take turns.
    Bytes: the rows that tokens read of the tables; backward, the same again, and the tables'
    gradients. Flops: of the query's projection and of the products with all half keys."""
    (heads, halves, size, half), dim = ours.keys.shape, tables[0].shape[1]
    x, dout = torch.randn(sets, 1, tokens, dim), torch.randn(1, tokens, dim)

    def runs(module, parameters, as_ours):
        turns = itertools.cycle(x)

        def run():
            if not backward:
                return module(next(turns))
            leaf = next(turns).detach().requires_grad_()
            first, *rest = torch.autograd.grad(module(leaf), [leaf, *parameters.values()], dout)
            return lambda: [first, *map(as_ours, parameters, rest)]

        return run

    def theirs():
        peer = adapter(ours)
        return {peer.name: runs(peer.module, peer.parameters, peer.as_ours)}

    rows = len(tables) * tokens * heads * ours.k
    rows = 2 * rows + sum(map(len, tables)) if backward else rows
    products = tokens * heads * halves * half * (dim + size)
    return Case(
        f"{type(ours).__name__} f32 {tokens} x {dim}, {heads} x {ours.k} of {size}^2"
        + (f", {BACKWARD}" if backward else ""),
        runs(ours, dict(ours.named_parameters()), lambda key, gradient: gradient),
        {f"gather {4 * dim}": rows * 4 * dim, "flops f32": (6 if backward else 2) * products},
        peers.among([theirs]),
    )


def memory(dim: int, tokens: int, num_keys: int, heads: int, k: int, *, backward: bool) -> Case:
    ours = ProductKeyMemory(dim, num_keys, heads=heads, k=k, norm="layer")
    adapter = lookup_peers.product_key_memory
    return layer(ours, adapter, tokens, [ours.values], backward=backward)


def experts(dim: int, tokens: int, num_keys: int, heads: int, k: int, *, backward: bool) -> Case:
    ours = PEER(dim, num_keys, heads=heads, k=k)
    adapter = lookup_peers.peer_pytorch
    return layer(ours, adapter, tokens, [ours.up, ours.down], backward=backward)


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield from quick_cases()
    else:
        yield from gpu_cases() if _measure.on_gpu() else full_cases()


def full_cases() -> Iterator[Case]:
    large, small = (1 << 20, 256), (1 << 16, 512)
    for dtype in F32, BF16:
        yield bag(*large, 2048, 32, "uniform", dtype=dtype)
        yield bag(*large, 1024, 128, "uniform", dtype=dtype)
    yield bag(*large, 2048, 32, "uniform", dtype=F16)
    yield bag(*large, 2048, 32, "Zipf")
    yield bag(*small, 512, 128, "uniform")
    for dtype in torch.int8, FP8:
        yield quantised_bag(*large, 2048, 32, dtype)
    for kind in dense_gradient, sparse_gradient, sgd:
        for how in "uniform", "Zipf", "64 rows":
            yield kind(*small, 512, 128, how)
    yield adagrad(*small, 512, 128, "uniform")
    yield adam(*large, 2048, 32, "uniform")
    for dtype in F32, BF16:
        yield product_keys(2048, 4, 1024, 128, 32, dtype=dtype)
    yield ngrams(4096, 100)
    for backward in (False, True):
        yield codes(16384, 128, 8, backward=backward)
    for dtype, backward in (BF16, False), (F32, False), (BF16, True):
        yield gate(4096, 4, 1024, backward=backward, dtype=dtype)
    for backward in (False, True):
        yield neurons(*small, 512, 128, backward=backward)
    for backward in (False, True):
        yield memory(512, 512, 256, 4, 32, backward=backward)
    for backward in (False, True):
        yield experts(512, 512, 256, 8, 16, backward=backward)


def gpu_cases() -> Iterator[Case]:
    """Sizes that fill a large GPU, and that its caches cannot hold."""
    large, small = (1 << 22, 256), (1 << 20, 512)
    for dtype in F32, BF16:
        for rows, dim, count in (1 << 24, 32, 65536), (*large, 16384), (1 << 17, 8192, 1024):
            yield bag(rows, dim, count, 32, "uniform", dtype=dtype)
    yield bag(*large, 16384, 32, "uniform", dtype=F16)
    yield bag(*large, 16384, 32, "Zipf")
    yield bag(*large, 16, 8192, "uniform")
    for dtype in torch.int8, FP8:
        yield quantised_bag(*large, 16384, 32, dtype)
    for kind in dense_gradient, sparse_gradient, sgd:
        for how in "uniform", "Zipf", "64 rows":
            yield kind(*small, 8192, 128, how)
    yield adagrad(*small, 8192, 128, "uniform")
    yield adam(*large, 8192, 32, "uniform")
    for dtype in F32, BF16:
        yield product_keys(16384, 4, 1024, 128, 32, dtype=dtype)
    yield ngrams(1 << 20, 1)
    for backward in (False, True):
        yield codes(1 << 17, 128, 8, backward=backward)
    for dtype, backward in (BF16, False), (F32, False), (BF16, True):
        yield gate(65536, 4, 1024, backward=backward, dtype=dtype)
    for backward in (False, True):
        yield neurons(*small, 8192, 128, backward=backward)
    for backward in (False, True):
        yield memory(512, 8192, 512, 4, 32, backward=backward)


def quick_cases() -> Iterator[Case]:
    sizes = 256, 64, 16, 8
    for how, dtype in ("uniform", F32), ("uniform", BF16), ("uniform", F16), ("Zipf", F32):
        yield bag(*sizes, how, dtype=dtype)
    for dtype in torch.int8, FP8:
        yield quantised_bag(*sizes, dtype)
    for kind in dense_gradient, sparse_gradient, sgd:
        for how in "uniform", "64 rows":
            yield kind(*sizes, how)
    yield adagrad(*sizes, "uniform")
    yield adam(*sizes, "uniform")
    for dtype in F32, BF16:
        yield product_keys(16, 2, 64, 16, 8, dtype=dtype)
    yield ngrams(64, 2)
    for backward in (False, True):
        yield codes(64, 16, 4, backward=backward)
        yield gate(16, 2, 64, backward=backward)
        yield neurons(*sizes, backward=backward)
        yield memory(64, 16, 16, 2, 8, backward=backward)
        yield experts(64, 16, 16, 2, 8, backward=backward)
    yield gate(16, 2, 64, backward=False, dtype=F32)
