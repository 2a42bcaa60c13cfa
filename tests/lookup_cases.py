"""Random arguments of the lookup ops, by their names.

What must not be read is poisoned: NaN in rows that no index names and in factors of -1, nonsense
behind the rows that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


def product_key_case(
    tokens: int,
    size: int,
    k: int,
    *,
    heads: int = 2,
    head_dim: int = 8,
    integers: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict:
    """Arguments of `memkernels.product_key_topk`.

    Args:
        size: keys of a half.
        integers: small ones, whose products are exact and often equal.
    """
    draw = _Draw(seed, dtype, integers)
    return {"query": draw(tokens, heads, 2, head_dim), "keys": draw(heads, 2, size, head_dim)} | {
        "k": k
    }


def bag_case(
    bags: tuple[int, int] | list[int],
    num_rows: int,
    dim: int,
    *,
    factors: str | None = None,
    skipped: float = 0.2,
    popular: bool = False,
    integers: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> dict:
    """Arguments of `memkernels.embedding_bag`.

    Args:
        bags: ``(T, K)``, or the lengths of the bags of a flat input.
        factors: None, "same" as weight or "wide": the dtype of per_sample_weights.
        skipped: the share of indices that are -1.
        popular: a few rows are read by most bags.
        integers: small ones, whose sums are exact.
    """
    draw = _Draw(seed, dtype, integers)
    offsets = None
    if isinstance(bags, list):
        offsets = torch.tensor([0, *bags]).cumsum(0)[:-1].to(index_dtype)
        bags = (sum(bags),)
    input = draw.indices(bags, num_rows, skipped, popular)
    per_sample_weights = None
    if factors is not None:
        per_sample_weights = draw(*bags).masked_fill(input < 0, torch.nan)
        if factors == "wide":
            per_sample_weights = per_sample_weights.to(wide(dtype))
    return {
        "input": input.to(index_dtype),
        "weight": poison_unread(draw(num_rows, dim), input),
        "offsets": offsets,
        "per_sample_weights": per_sample_weights,
    }


def quantised_case(
    bags: tuple[int, int] | list[int],
    num_rows: int,
    dim: int,
    *,
    block: int,
    stored: torch.dtype = torch.int8,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options,
) -> dict:
    """Arguments of `memkernels.embedding_bag` with a quantised table.

    Args:
        block: how many columns share a scale.
        options: further arguments of `bag_case`.
    """
    arguments = bag_case(bags, num_rows, dim, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    if stored == torch.int8:
        weight = torch.randint(-128, 128, (num_rows, dim), generator=generator).to(stored)
    else:
        weight = (torch.randn(num_rows, dim, generator=generator) * 50).to(stored)
    shape = num_rows, dim // block
    if scale_dtype == torch.uint8:
        scales = torch.randint(118, 124, shape, generator=generator).to(scale_dtype)
        nan = 255
    else:
        scales, nan = torch.randn(shape, generator=generator) / 100, torch.nan
    return arguments | {
        "weight": weight,
        "scales": poison_unread(scales, arguments["input"], nan),
    }


def backward_case(arguments: dict, seed: int = 0) -> dict:
    """Arguments of `memkernels.embedding_bag_backward` after those of the forward."""
    input, weight = arguments["input"], arguments["weight"]
    integers = bool((weight.nan_to_num() == weight.nan_to_num().round()).all())
    offsets = arguments["offsets"]
    num_bags = len(input if offsets is None else offsets)
    return {
        "grad": _Draw(seed + 1, weight.dtype, integers)(num_bags, weight.shape[1]),
        "input": input,
        "num_embeddings": len(weight),
        "offsets": offsets,
        "per_sample_weights": arguments["per_sample_weights"],
    }


def rows_case(
    op: str,
    num_rows: int,
    dim: int,
    used: int,
    *,
    capacity: int | None = None,
    skipped: float = 0.2,
    wide_state: bool = True,
    row_state: bool = False,
    integers: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    **options,
) -> dict:
    """Arguments of `row_sgd`, `row_adagrad` or `row_adam`; other rows than the used are NaN.

    Args:
        used: how many different rows are named; among them -1 are skipped.
        capacity: of rows and grads, which end in nonsense; None: a few more than are used.
        wide_state: Adam's moments are float32, or else of the dtype of param.
        row_state: Adagrad has one accumulator a row.
        options: further arguments of the op.
    """
    draw = _Draw(seed, dtype, integers)
    rows = torch.randperm(num_rows, generator=draw.generator)[:used].sort().values
    gaps = torch.rand(used, generator=draw.generator) < skipped
    rows = torch.where(gaps, -1, rows)
    capacity = used + 3 if capacity is None else capacity
    grads = draw(used, dim).to(wide(dtype))
    grads[gaps] = torch.nan
    padding = 0, capacity - used
    arguments = {"param": draw(num_rows, dim)}
    if op == "row_adagrad":
        state = draw(num_rows, dim).to(wide(dtype)).square()
        arguments["sum"] = state.mean(1) if row_state else state
    elif op == "row_adam":
        state_dtype = wide(dtype) if wide_state else dtype
        arguments["exp_avg"] = draw(num_rows, dim).to(state_dtype)
        arguments["exp_avg_sq"] = draw(num_rows, dim).square().to(state_dtype)
        options = {"step": 3} | options
    arguments = {name: poison_unread(state, rows) for name, state in arguments.items()}
    return arguments | {
        "rows": torch.nn.functional.pad(rows, padding, value=2**31 - 1).to(index_dtype),
        "grads": torch.nn.functional.pad(grads, (0, 0, *padding), value=torch.nan),
        "count": torch.tensor([used], dtype=index_dtype),
        "lr": 0.1,
        **options,
    }


def hash_case(
    lengths: tuple[int, int] | list[int],
    orders: list[int],
    *,
    heads: int = 2,
    past: bool = False,
    vocabulary: int = 50,
    largest_modulus: int = 2**63 - 1,
    eos_id: int | None = None,
    pad_id: int = 0,
    dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> dict:
    """Arguments of `memkernels.ngram_hash`; a tenth of the ids are negative.

    Args:
        lengths: ``(B, T)``, or the lengths of packed sequences.
        past: whether there are past_ids.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    cu_seqlens = None
    sequences, length = lengths if isinstance(lengths, tuple) else (1, sum(lengths))
    token_ids = draw(-vocabulary // 10, vocabulary, sequences, length)
    if isinstance(lengths, list):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
        sequences = len(lengths)
    reach, tables = max(orders) - 1, len(orders) * heads
    past_ids = draw(-vocabulary // 10, vocabulary, sequences, reach).to(dtype) if past else None
    # Of any size: a random number of bits.
    moduli = draw(0, 2**63 - 1, tables) >> draw(0, 63, tables)
    return {
        "token_ids": token_ids.to(dtype),
        "multipliers": draw(-(2**63), 2**63 - 1, reach + 1),
        "moduli": moduli.clamp(1, largest_modulus),
        "offsets": draw(-(2**40), 2**40, tables),
        "orders": orders,
        "past_ids": past_ids,
        "cu_seqlens": cu_seqlens,
        "eos_id": eos_id,
        "pad_id": pad_id,
    }


def gate_case(
    tokens: int,
    channels: int,
    dim: int,
    *,
    wide_weight: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options,
) -> dict:
    """Arguments of `memkernels.engram_gate`; options: eps and sign."""
    draw = _Draw(seed, dtype)
    shape = tokens, channels, dim
    weight = draw(channels, dim)
    return {
        "hidden": draw(*shape),
        "k": draw(*shape),
        "v": draw(tokens, dim),
        "weight": weight.to(wide(dtype)) if wide_weight else weight,
    } | options


def codes_case(
    tokens: int, tables: int, bits: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict:
    """Arguments of `memkernels.lsh_codes`."""
    return {"z": _Draw(seed, dtype)(tokens, tables, bits)}


def ffn_case(
    tokens: int,
    listed: int,
    num_rows: int,
    dims: tuple[int, int],
    *,
    factors: str | None = None,
    skipped: float = 0.2,
    popular: bool = False,
    integers: bool = False,
    activation: str = "gelu",
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> dict:
    """Arguments of `memkernels.sparse_ffn`: of `bag_case`, with dims ``(D, Dout)``."""
    sizes = {"skipped": skipped, "popular": popular, "integers": integers, "factors": factors}
    bags = bag_case((tokens, listed), num_rows, dims[1], dtype=dtype, seed=seed, **sizes)
    draw = _Draw(seed + 1, dtype, integers)
    return {
        "x": draw(tokens, dims[0]),
        "up": poison_unread(draw(num_rows, dims[0]), bags["input"]),
        "down": bags["weight"],
        "indices": bags["input"].to(index_dtype),
        "weights": bags["per_sample_weights"],
        "activation": activation,
    }


# By example, its op.
EXAMPLES = {
    "product_key_topk": "product_key_topk",
    "embedding_bag": "embedding_bag",
    "flat_bags": "embedding_bag",
    "int8_bags": "embedding_bag",
    "fp8_bags": "embedding_bag",
    "rows_of_a_gradient": "embedding_bag_backward",
    "accumulated_gradient": "embedding_bag_backward",
    "row_sgd": "row_sgd",
    "row_adagrad": "row_adagrad",
    "row_adam": "row_adam",
    "ngram_hash": "ngram_hash",
    "engram_gate": "engram_gate",
    "lsh_codes": "lsh_codes",
    "sparse_ffn": "sparse_ffn",
}


def arguments_of(
    example: str,
    tokens: int = 9,
    dim: int = 37,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
) -> tuple[str, dict]:
    """The op of an example, and arguments for about so many tokens."""
    op = EXAMPLES[example]
    types = {"dtype": dtype, "index_dtype": index_dtype}
    bags, weighted = (tokens, 12), {"factors": "wide", "popular": True}
    if example == "flat_bags":
        bags, weighted = [7, 0, 90 * tokens, 2, *[3] * tokens], {}
    if op == "product_key_topk":
        return op, product_key_case(tokens, 40, 12, head_dim=dim, dtype=dtype)
    if example == "int8_bags":
        return op, quantised_case(bags, 90, 2 * dim, block=dim, **weighted, index_dtype=index_dtype)
    if example == "fp8_bags":
        sizes = {"block": 8, "stored": FP8, "scale_dtype": torch.uint8, "index_dtype": index_dtype}
        return op, quantised_case(bags, 90, 8 * dim, **sizes, **weighted)
    if op == "embedding_bag":
        return op, bag_case(bags, 90, dim, **weighted, **types)
    if op == "embedding_bag_backward":
        out = {"out": torch.ones(90, dim, dtype=dtype)} if example == "accumulated_gradient" else {}
        return op, backward_case(bag_case(bags, 90, dim, **weighted, **types)) | out
    if op.startswith("row_"):
        return op, rows_case(op, 4 * tokens, dim, 3 * tokens, **types)
    if op == "ngram_hash":
        sizes = {"heads": 8, "past": True, "eos_id": 2, "vocabulary": 20, "dtype": index_dtype}
        return op, hash_case([tokens, 0, 3], [2, 3], **sizes)
    if op == "engram_gate":
        return op, gate_case(tokens, 4, dim, wide_weight=True, dtype=dtype)
    if op == "lsh_codes":
        return op, codes_case(tokens, 16, min(dim, 30), dtype=dtype)
    return op, ffn_case(tokens, 12, 90, (dim, dim + 3), **weighted, **types)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of what may be wider than its neighbours."""
    return torch.promote_types(dtype, torch.float32)


def poison_unread(table: Tensor, index: Tensor, value: float = torch.nan) -> Tensor:
    """The table, with that value in the rows that no index names."""
    table = table.clone()
    unread = torch.ones(len(table), dtype=torch.bool)
    unread[index[index >= 0].long()] = False
    table[unread] = value
    return table


class _Draw:
    """Random tensors of one dtype: normal, or integers from -4 to 4."""

    def __init__(self, seed, dtype, integers=False):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.integers = dtype, integers

    def __call__(self, *shape):
        if self.integers:
            return torch.randint(-4, 5, shape, generator=self.generator).to(self.dtype)
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def indices(self, shape, num_rows, skipped, popular):
        place = torch.rand(shape, generator=self.generator)
        index = (num_rows * (place**4 if popular else place)).long().clamp(max=num_rows - 1)
        return index.masked_fill(torch.rand(shape, generator=self.generator) < skipped, -1)
