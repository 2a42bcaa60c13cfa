"""Random arguments of the scan ops, by their names.

What must not be read is poisoned: NaN behind the rows of padded tensors, in slots that no row has,
and in rows without a slot.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lookup_cases import wide

# Chunks add up their products and solve their systems in another order than the fallback, whose
# every token rounds once. Gradients get twice as much: those of gates are sums over all that
# comes after, of differences.
SLACK = 4
# Sizes around those of tiles and chunks.
LENGTHS = [0, 1, 2, 15, 16, 17, 47, 48, 49, 63, 64, 65, 129]
GATES = [None, "head", "token", "channel"]


def linear_case(
    lengths: tuple[int, int] | list[int],
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (8, 8),
    *,
    gate: str | None = None,
    narrow: bool = False,
    decays: str = "mild",
    states: bool = False,
    normalize: bool = False,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    **options,
) -> dict:
    """Arguments of `memkernels.linear_attention`.

    Args:
        lengths: ``(B, T)``, or the lengths of packed sequences.
        heads: ``(H, HV)``; dims: ``(K, V)``.
        gate: one of GATES: g is absent, ``[HV]``, ``[B, T, HV]`` or ``[B, T, HV, K]``.
        narrow: g has the dtype of q, not of sums.
        decays: "mild" ones; "hard": many are 0, -50 or -inf.
        states: there are initial ones.
        normalize: with features that are not negative, as the normaliser wants them.
        padded: the tensors are parts of wider ones.
    """
    draw = _Draw(dtype, seed, padded)
    sizes, sequences, cu_seqlens = _lengths(lengths, index_dtype)
    (heads, value_heads), (dim, value_dim) = heads, dims
    features = draw.positive if normalize else draw
    state = sequences, value_heads, dim, value_dim
    return {
        "q": features(*sizes, heads, dim),
        "k": features(*sizes, heads, dim),
        "v": draw(*sizes, value_heads, value_dim),
        "g": _gate(draw, gate, sizes, value_heads, dim, narrow, decays),
        "initial_state": draw(*state, dtype=wide(dtype)) if states else None,
        "initial_z": draw.positive(*state[:3], dtype=wide(dtype)) if states and normalize else None,
        "cu_seqlens": cu_seqlens,
        "normalize": normalize,
        "output_final_state": True,
    } | options


def delta_case(
    lengths: tuple[int, int] | list[int],
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (8, 8),
    *,
    gate: str | None = None,
    narrow: bool = False,
    decays: str = "mild",
    states: bool = False,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    **options,
) -> dict:
    """Arguments of `memkernels.delta_rule`: see `linear_case`.

    Keys have lengths up to 2, and beta is at most 2 over its key's square: as far as no state can
    grow. With qk_l2norm, keys of any length.
    """
    draw = _Draw(dtype, seed, padded)
    sizes, sequences, cu_seqlens = _lengths(lengths, index_dtype)
    (heads, value_heads), (dim, value_dim) = heads, dims
    k = draw(*sizes, heads, dim)
    most = torch.full((*sizes, value_heads), 2.0)
    if not options.get("qk_l2norm"):
        length = 2 * torch.rand(*sizes, heads, 1, generator=draw.generator)
        k.copy_(k.double() / k.double().norm(dim=-1, keepdim=True).clamp(min=1e-3) * length)
        squares = k.double().square().sum(-1).repeat_interleave(value_heads // heads, -1)
        most = 1.98 / squares.clamp(min=0.99)
    beta = draw.like(most * torch.rand(most.shape, generator=draw.generator), narrow)
    return {
        "q": draw(*sizes, heads, dim),
        "k": k,
        "v": draw(*sizes, value_heads, value_dim),
        "beta": beta,
        "g": _gate(draw, gate, sizes, value_heads, dim, narrow, decays),
        "initial_state": (
            draw(sequences, value_heads, dim, value_dim, dtype=wide(dtype)) if states else None
        ),
        "cu_seqlens": cu_seqlens,
        "output_final_state": True,
    } | options


def selective_case(
    lengths: tuple[int, int] | list[int],
    channels: int = 8,
    size: int = 4,
    *,
    groups: int = 1,
    extras: str = "",
    states: bool = False,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    **options,
) -> dict:
    """Arguments of `memkernels.selective_scan`.

    Args:
        size: S.
        extras: which of D, z and b, the bias of delta, there are.
    """
    draw = _Draw(dtype, seed, padded)
    sizes, sequences, cu_seqlens = _lengths(lengths, index_dtype)
    of_tokens, of_groups = (*sizes, channels), (*sizes, groups, size)
    return {
        "u": draw(*of_tokens),
        "delta": draw(*of_tokens) if options.get("delta_softplus") else draw.positive(*of_tokens),
        "A": draw.like(-draw.positive(channels, size, dtype=wide(dtype)) - 0.1),
        "B": draw(*of_groups),
        "C": draw(*of_groups),
        "D": draw(channels, dtype=wide(dtype)) if "D" in extras else None,
        "z": draw(*of_tokens) if "z" in extras else None,
        "delta_bias": draw.positive(channels, dtype=wide(dtype)) if "b" in extras else None,
        "initial_state": draw(sequences, channels, size, dtype=wide(dtype)) if states else None,
        "cu_seqlens": cu_seqlens,
        "output_final_state": True,
    } | options


def diagonal_case(
    lengths: tuple[int, int] | list[int],
    channels: int = 8,
    *,
    constant: bool = False,
    real: bool = False,
    resets: float = 0,
    states: bool = False,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    **options,
) -> dict:
    """Arguments of `memkernels.diagonal_scan`.

    Args:
        constant: a is ``[D]``.
        real: a is, even if x is complex.
        resets: the share of tokens where reset is set; 0: there is none.
    """
    draw = _Draw(dtype, seed, padded)
    sizes, sequences, cu_seqlens = _lengths(lengths, index_dtype)
    shape = (channels,) if constant else (*sizes, channels)
    a = 2 * torch.rand(shape, generator=draw.generator, dtype=torch.float64) - 1
    which = torch.rand(shape, generator=draw.generator)
    for i, special in enumerate((0, 1, -1)):
        a[(which >= i / 10) & (which < (i + 1) / 10)] = special
    if dtype.is_complex and not real:
        phase = 6.28 * torch.rand(shape, generator=draw.generator, dtype=torch.float64)
        a = torch.polar(a.abs(), phase)
    reset = torch.rand(sizes, generator=draw.generator) < resets
    return {
        "x": draw(*sizes, channels),
        "a": draw.padded(a.to(dtype.to_real() if real else dtype)),
        "initial_state": draw(sequences, channels, dtype=wide(dtype)) if states else None,
        "reset": reset if resets else None,
        "cu_seqlens": cu_seqlens,
        "output_final_state": True,
    } | options


def conv_case(
    lengths: tuple[int, int] | list[int],
    channels: int = 8,
    width: int = 4,
    *,
    bias: bool = False,
    wide_weight: bool = False,
    states: bool = False,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    **options,
) -> dict:
    """Arguments of `memkernels.causal_conv1d`; options: dilation and activation."""
    draw = _Draw(dtype, seed, padded)
    sizes, sequences, cu_seqlens = _lengths(lengths, index_dtype)
    weight_dtype = wide(dtype) if wide_weight else dtype
    length = (width - 1) * options.get("dilation", 1)
    return {
        "x": draw(*sizes, channels),
        "weight": draw(channels, width, dtype=weight_dtype),
        "bias": draw(channels, dtype=weight_dtype) if bias else None,
        "initial_state": draw(sequences, channels, length) if states else None,
        "cu_seqlens": cu_seqlens,
        "output_final_state": True,
    } | options


CASES = {
    "linear_attention": linear_case,
    "delta_rule": delta_case,
    "selective_scan": selective_case,
    "diagonal_scan": diagonal_case,
    "causal_conv1d": conv_case,
}
# The arguments that have a row for each token.
OF_TOKENS = {
    "linear_attention": ["q", "k", "v", "g"],
    "delta_rule": ["q", "k", "v", "beta", "g"],
    "selective_scan": ["u", "delta", "B", "C", "z"],
    "diagonal_scan": ["x", "a", "reset"],
    "causal_conv1d": ["x"],
}
STATES = ["initial_state", "initial_z"]


def step_case(
    op: str,
    slots: list[int] | int,
    num_slots: int,
    *sizes,
    index_dtype: torch.dtype = torch.int64,
    **options,
) -> dict:
    """Arguments of the step of a scan.

    Args:
        slots: state_indices; or a number of rows, without.
        sizes, options: those of the case of the scan.
    """
    rows = slots if isinstance(slots, int) else len(slots)
    arguments = CASES[op]((rows, 1), *sizes, states=True, **options)
    for name in OF_TOKENS[op]:
        if arguments[name] is not None and arguments[name].ndim > 1:
            arguments[name] = arguments[name][:, 0]
    index = torch.arange(rows) if isinstance(slots, int) else torch.tensor(slots, dtype=torch.long)
    for name in STATES:
        states = arguments.pop(name, None)
        if states is not None:
            pool = torch.full((num_slots, *states.shape[1:]), torch.nan, dtype=states.dtype)
            pool[index[index >= 0]] = states[index >= 0]
            arguments["state" if name == "initial_state" else "z"] = pool
    for name in OF_TOKENS[op]:
        if arguments[name] is not None and arguments[name].ndim > 1:
            arguments[name][index < 0] = torch.nan
    for name in "cu_seqlens", "output_final_state", "normalize":
        arguments.pop(name, None)
    indices = None if isinstance(slots, int) else index.to(index_dtype)
    return arguments | {"state_indices": indices}


def route_case(
    tokens: int,
    chosen: int,
    num_memories: int,
    *shape: int,
    skipped: float = 0.2,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> dict:
    """Arguments of `memkernels.route_tokens`; shape is what follows T in x's."""
    draw = _Draw(dtype, seed)
    ids = torch.randint(max(num_memories, 1), (tokens, chosen), generator=draw.generator)
    share = skipped if num_memories else 1
    ids[torch.rand(ids.shape, generator=draw.generator) < share] = -1
    return {
        "x": draw(tokens, *shape),
        "expert_ids": ids.to(index_dtype),
        "num_memories": num_memories,
    }


# By example, its op.
EXAMPLES = {
    "linear_attention": "linear_attention",
    "gated_attention": "linear_attention",
    "normalized_attention": "linear_attention",
    "delta_rule": "delta_rule",
    "gated_delta_rule": "delta_rule",
    "kimi_delta": "delta_rule",
    "selective_scan": "selective_scan",
    "diagonal_scan": "diagonal_scan",
    "constant_diagonal": "diagonal_scan",
    "complex_diagonal": "diagonal_scan",
    "causal_conv1d": "causal_conv1d",
    "plain_conv": "causal_conv1d",
}
STEPS = ["linear_attention_step", "delta_rule_step", "selective_scan_step", "causal_conv1d_step"]


def arguments_of(
    example: str,
    lengths: tuple[int, int] | list[int] = (2, 19),
    dim: int = 12,
    dtype: torch.dtype = torch.float32,
    **options,
) -> tuple[str, dict]:
    """The op of an example, and arguments with all that may be given."""
    op = EXAMPLES[example]
    options = {"states": True, "dtype": dtype} | options
    chunks = (2, 4), (dim, dim + 1)
    if example == "linear_attention":
        return op, linear_case(lengths, *chunks, gate="head", **options)
    if example == "gated_attention":
        return op, linear_case(lengths, *chunks, gate="channel", narrow=True, **options)
    if example == "normalized_attention":
        return op, linear_case(lengths, *chunks, gate="token", normalize=True, **options)
    if example == "delta_rule":
        return op, delta_case(lengths, *chunks, narrow=True, **options)
    if example == "gated_delta_rule":
        return op, delta_case(lengths, *chunks, gate="token", qk_l2norm=True, **options)
    if example == "kimi_delta":
        return op, delta_case(lengths, *chunks, gate="channel", **options)
    if example == "selective_scan":
        softplus = {"delta_softplus": True, "groups": 2, "extras": "Dzb"}
        return op, selective_case(lengths, 2 * dim, 5, **softplus, **options)
    if example == "causal_conv1d":
        silu = {"bias": True, "wide_weight": True, "dilation": 2, "activation": "silu"}
        return op, conv_case(lengths, dim, **silu, **options)
    if example == "plain_conv":
        return op, conv_case(lengths, dim, **options)
    if example == "diagonal_scan":
        return op, diagonal_case(lengths, dim, resets=0.1, **options)
    if example == "constant_diagonal":
        return op, diagonal_case(lengths, dim, constant=True, **options)
    options["dtype"] = torch.promote_types(torch.complex64, wide(dtype))
    return op, diagonal_case(lengths, dim, **options)


def step_of(op: str, slots: list[int] | int, num_slots: int, dim: int = 12, **options) -> dict:
    """Arguments of a step with all that may be given."""
    scan = op.removesuffix("_step")
    sizes = {
        "linear_attention": [(2, 4), (dim, dim + 1)],
        "delta_rule": [(2, 4), (dim, dim + 1)],
        "selective_scan": [2 * dim, 5],
        "causal_conv1d": [dim, 4],
    }
    given = {
        "linear_attention": {"gate": "channel", "normalize": True},
        "delta_rule": {"gate": "token", "qk_l2norm": True},
        "selective_scan": {"delta_softplus": True, "groups": 2, "extras": "Dzb"},
        "causal_conv1d": {"bias": True, "dilation": 2, "activation": "silu"},
    }
    return step_case(scan, slots, num_slots, *sizes[scan], **given[scan] | options)


def spans(op: str, arguments: dict) -> list[tuple[int, int, int]]:
    """For each sequence ``(b, start, stop)``: its row of the batch, and tokens."""
    batch, length = arguments[OF_TOKENS[op][0]].shape[:2]
    if arguments["cu_seqlens"] is None:
        return [(b, 0, length) for b in range(batch)]
    return [(0, *ends) for ends in pairwise(arguments["cu_seqlens"].tolist())]


def part(op: str, arguments: dict, n: int, start: int = 0, stop: int | None = None) -> dict:
    """The arguments for some tokens of sequence n alone, beginning with its initial state."""
    b, begin, end = spans(op, arguments)[n]
    tokens = slice(begin + start, end if stop is None else begin + stop)
    cut = {name: t[n : n + 1] for name in STATES if (t := arguments.get(name)) is not None}
    for name in OF_TOKENS[op]:
        tensor = arguments[name]
        if tensor is not None and tensor.ndim > 1:
            cut[name] = tensor[b : b + 1, tokens]
    return arguments | cut | {"cu_seqlens": None}


def _lengths(lengths, index_dtype):
    """``[B, T]``, how many sequences, and cu_seqlens."""
    if isinstance(lengths, tuple):
        return lengths, lengths[0], None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index_dtype)
    return (1, sum(lengths)), len(lengths), cu_seqlens


def _gate(draw, gate, sizes, heads, dim, narrow, decays):
    if gate is None:
        return None
    shape = {"head": (heads,), "token": (*sizes, heads), "channel": (*sizes, heads, dim)}[gate]
    g = torch.rand(shape, generator=draw.generator, dtype=torch.float64).log() / 3
    if decays == "hard":
        which = torch.rand(shape, generator=draw.generator)
        for i, special in enumerate((0, -50, -torch.inf)):
            g[(which >= i / 5) & (which < (i + 1) / 5)] = special
    return draw.like(g, narrow)


class _Draw:
    """Random tensors, perhaps parts of wider ones that are NaN elsewhere."""

    def __init__(self, dtype, seed, padded=False):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.wider = dtype, 3 if padded else 0

    def __call__(self, *shape, dtype=None):
        dtype = dtype or self.dtype
        drawn = torch.complex64 if dtype.is_complex else torch.float32
        return self.padded(torch.randn(shape, generator=self.generator, dtype=drawn).to(dtype))

    def positive(self, *shape, dtype=None):
        drawn = torch.rand(shape, generator=self.generator)
        return self.padded(drawn.to(dtype or self.dtype))

    def like(self, values: Tensor, narrow: bool = False):
        return self.padded(values.to(self.dtype if narrow else wide(self.dtype)))

    def padded(self, values: Tensor):
        shape = *values.shape[:-1], values.shape[-1] + self.wider
        result = torch.full(shape, torch.nan, dtype=values.dtype)[..., : values.shape[-1]]
        return result.copy_(values)
