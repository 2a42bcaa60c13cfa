"""Random inputs of the ops.

What must not be read is poisoned: NaN in unused slots, nonsense in unused page table entries.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

import memkernels
from memkernels import fallback, reference

POISON_PAGE = 2**31 - 1


def arrays(arguments: dict) -> dict:
    """Keyword arguments of a reference: tensors as float64, integer or boolean arrays."""

    def convert(value):
        if not isinstance(value, Tensor):
            return value
        value = value.detach().contiguous()
        return (value.double() if value.is_floating_point() else value).numpy()

    return {name: convert(value) for name, value in arguments.items()}


@dataclass
class AttentionCase:
    """Arguments of `memkernels.paged_attention`, by its names."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor | None = None
    seq_lens: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    key_bias: Tensor | None = None
    sink_logit: Tensor | None = None
    options: dict = field(default_factory=dict)  # scale, causal, window, ...

    def arguments(self) -> dict:
        """Keyword arguments of the op."""
        fields = (f.name for f in dataclasses.fields(self) if f.name != "options")
        return {name: getattr(self, name) for name in fields} | self.options

    def numpy(self) -> dict:
        """Keyword arguments of the reference: float64 and integer arrays."""
        return arrays(self.arguments())

    def reference(self):
        """The reference's (out, lse), float64 arrays."""
        return reference.paged_attention(**self.numpy())

    def fallback(self):
        """The fallback's (out, lse)."""
        return fallback.paged_attention(**self.arguments())

    def tensors(self) -> dict:
        """The floating tensors, which are the differentiable ones."""
        arguments = self.arguments().items()
        return {n: t for n, t in arguments if isinstance(t, Tensor) and t.is_floating_point()}

    def replace(self, **changes) -> AttentionCase:
        """A case with other fields or options."""
        names = {f.name for f in dataclasses.fields(self)}
        options = self.options | {n: v for n, v in changes.items() if n not in names}
        fields = {n: v for n, v in changes.items() if n in names}
        return dataclasses.replace(self, options=options, **fields)

    def to(self, *args) -> AttentionCase:
        """Floating tensors moved or converted, as by `Tensor.to`, with their own strides."""
        return self.replace(**{name: t.to(*args) for name, t in self.tensors().items()})

    def requires_grad(self) -> AttentionCase:
        """Detached, with every floating tensor a leaf that requires grad."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.tensors().items()}
        return self.replace(**leaves)

    def rows(self, b: int) -> slice:
        """The queries of sequence b."""
        if self.cu_seqlens_q is None:
            return slice(b, b + 1)
        return slice(*self.cu_seqlens_q[b : b + 2].tolist())

    def select(self, b: int) -> AttentionCase:
        """Sequence b alone."""
        changes = {"q": self.q[self.rows(b)]}
        if self.cu_seqlens_q is not None:
            offsets = self.cu_seqlens_q[b : b + 2]
            changes["cu_seqlens_q"] = offsets - offsets[0]
        if self.seq_lens is not None:
            changes["seq_lens"] = self.seq_lens[b : b + 1]
        if self.page_table is not None:
            changes["page_table"] = self.page_table[b : b + 1]
        else:
            tokens = slice(b, b + 1)
            if self.cu_seqlens_k is not None:
                offsets = self.cu_seqlens_k[b : b + 2]
                tokens = slice(*offsets.tolist())
                changes["cu_seqlens_k"] = offsets - offsets[0]
            changes |= {"k_cache": self.k_cache[tokens], "v_cache": self.v_cache[tokens]}
            if self.key_bias is not None:
                changes["key_bias"] = self.key_bias[tokens]
        return self.replace(**changes)


@dataclass
class GatherCase(AttentionCase):
    """Arguments of `memkernels.gather_attention`, by its names."""

    indices: Tensor | None = None

    def arguments(self) -> dict:
        """Keyword arguments of the op."""
        return {n: v for n, v in super().arguments().items() if n != "cu_seqlens_k"}

    def reference(self):
        """The reference's (out, lse), float64 arrays."""
        return reference.gather_attention(**self.numpy())

    def fallback(self):
        """The fallback's (out, lse)."""
        return fallback.gather_attention(**self.arguments())

    def select(self, b: int) -> GatherCase:
        """Sequence b alone."""
        return super().select(b).replace(indices=self.indices[self.rows(b)])


def attention_case(
    kind: str,
    lengths: list[int],
    queries: list[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dims: tuple[int, int] = (64, 64),
    page_size: int = 16,
    layout: str = "NHD",
    share_kv: bool = False,
    absent_pages: float = 0.0,
    key_bias: bool = False,
    sink_logit: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
    seed: int = 0,
    **options,
) -> AttentionCase:
    """Random attention inputs.

    Args:
        kind: "paged" (a permuted page table), "contiguous" or "packed".
        lengths: tokens of each sequence.
        queries: queries of each sequence; None means one each and no cu_seqlens_q.
        heads: (Hq, Hkv).
        head_dims: (D, Dv).
        layout: "NHD", or "HND" whose tokens are strided.
        share_kv: V is a view of the first Dv columns of K.
        absent_pages: the share of table entries that are -1.
        key_bias, sink_logit: whether there are any; a tenth of the biases is -inf.
        options: further keyword arguments of the op.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    batch = len(lengths)

    page_table = seq_lens = cu_seqlens_k = None
    if kind == "packed":
        cu_seqlens_k = _offsets(lengths, index_dtype)
        used = torch.ones(sum(lengths), dtype=torch.bool)
    else:
        seq_lens = torch.tensor(lengths, dtype=index_dtype)
        if kind == "contiguous":
            used = torch.arange(max(lengths, default=0) + 3) < seq_lens[:, None]
        else:
            page_table, used = _page_table(lengths, page_size, absent_pages, generator)
            page_table = page_table.to(index_dtype)

    def floats(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def cached(*row_shape):
        """``[*used.shape, Hkv, *row_shape]``, NaN where unused."""
        heads_at = 1 if layout == "HND" else used.dim()
        shape = list(used.shape)
        shape.insert(heads_at, num_kv_heads)
        cache = floats(*shape, *row_shape).movedim(heads_at, used.dim())
        cache[~used] = torch.nan
        return cache

    k_cache = cached(head_dims[0])
    bias = None
    if key_bias:
        bias = cached().to(torch.promote_types(dtype, torch.float32))
        bias[torch.rand(bias.shape, generator=generator) < 0.1] = -torch.inf
    return AttentionCase(
        q=floats(batch if queries is None else sum(queries), num_heads, head_dims[0]),
        k_cache=k_cache,
        v_cache=k_cache[..., : head_dims[1]] if share_kv else cached(head_dims[1]),
        page_table=page_table,
        seq_lens=seq_lens,
        cu_seqlens_q=None if queries is None else _offsets(queries, index_dtype),
        cu_seqlens_k=cu_seqlens_k,
        key_bias=bias,
        sink_logit=floats(num_heads) if sink_logit else None,
        options=options,
    )


def gather_case(
    lengths: list[int],
    queries: list[int] | None = None,
    *,
    kind: str = "paged",
    unit: str = "page",
    num_listed: int = 3,
    shared: bool = False,
    skipped: float = 0.2,
    seed: int = 0,
    **options,
) -> GatherCase:
    """Random inputs of attention over listed pages or tokens; what no query sees is poisoned.

    The lists are drawn with replacement, from the whole sequence whatever a query's position.

    Args:
        kind: "paged", or "contiguous" for tokens.
        num_listed: entries of each list.
        shared: one list for all heads.
        skipped: the share of entries that are -1.
        options: further arguments of `attention_case`.
    """
    case = attention_case(kind, lengths, queries, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    heads = 1 if shared else case.k_cache.shape[2]
    step = case.k_cache.shape[1] if unit == "page" else 1
    counts = [1] * len(lengths) if queries is None else queries
    sizes = [
        -(-length // step) for length, n in zip(lengths, counts, strict=True) for _ in range(n)
    ]
    sizes = torch.tensor(sizes, dtype=torch.long)[:, None, None]
    shape = (len(case.q), heads, num_listed)
    indices = (torch.rand(shape, generator=generator, dtype=torch.float64) * sizes).long()
    indices[(torch.rand(shape, generator=generator) < skipped) | (sizes == 0)] = -1
    return _poison_unseen(list_case(case, indices.to(case.seq_lens.dtype), unit))


def list_case(case: AttentionCase, indices: Tensor | None = None, unit: str = "page") -> GatherCase:
    """The same inputs with lists; by default with everything listed, in order."""
    if indices is None:
        step = case.k_cache.shape[1] if unit == "page" else 1
        sizes = -(-case.seq_lens.long() // step)
        indices = torch.full((len(case.q), 1, int(sizes.amax())), -1)
        for b, size in enumerate(sizes):
            indices[case.rows(b), :, :size] = torch.arange(size)
        indices = indices.to(case.seq_lens.dtype)
    case = case.replace(unit=unit)
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return GatherCase(**fields, indices=indices)


def score_case(
    kind: str,
    lengths: list[int],
    queries: list[int] | None = None,
    *,
    summary_dtype: torch.dtype | None = None,
    shared_pages: bool = False,
    causal: bool = True,
    scale: float | None = None,
    group_reduce: str = "max",
    seed: int = 0,
    **sizes,
) -> dict:
    """Random arguments of `memkernels.score_pages`; summaries of pages of no sequence are NaN.

    Args:
        kind: "minmax", whose minima need not be smaller here, or "mean".
        summary_dtype: None: that `memkernels.summarize_keys` returns.
        shared_pages: see `share_pages`.
        sizes: further arguments of `attention_case`.
    """
    case = attention_case("paged", lengths, queries, seed=seed, **sizes)
    if shared_pages:
        case = share_pages(case, seed)
    if summary_dtype is None:
        widened = torch.promote_types(case.q.dtype, torch.float32)
        summary_dtype = case.q.dtype if kind == "minmax" else widened
    num_pages, page_size, num_kv_heads, head_dim = case.k_cache.shape
    shape = (num_pages, num_kv_heads, *((2,) if kind == "minmax" else ()), head_dim)
    generator = torch.Generator().manual_seed(seed + 1)
    summary = torch.randn(shape, generator=generator).to(summary_dtype)
    summary[~used_pages(case)] = torch.nan
    return {
        "q": case.q,
        "summary": summary,
        "page_table": case.page_table,
        "seq_lens": case.seq_lens,
        "page_size": page_size,
        "cu_seqlens_q": case.cu_seqlens_q,
        "kind": kind,
        "group_reduce": group_reduce,
        "causal": causal,
        "scale": scale,
    }


def colstats_case(case: AttentionCase, **options) -> dict:
    """Arguments of `memkernels.attention_colstats`, with the lse of the case's attention.

    Args:
        options: further arguments: reduce, threshold, ...
    """
    _, lse = memkernels.paged_attention(**case.arguments(), return_lse=True)
    names = "q", "k_cache", "page_table", "seq_lens", "cu_seqlens_q", "key_bias"
    tensors = {name: getattr(case, name) for name in names}
    return tensors | {"lse": lse} | case.options | options


def evict_case(
    lengths: list[int],
    budget: int | list[int],
    *,
    heads: int = 2,
    levels: int = 9,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
    seed: int = 0,
    **options,
) -> dict:
    """Random arguments of `memkernels.evict`: many ties, NaN and -inf, and inf behind the ends.

    Args:
        levels: different statistics, multiples of 1/4, so that their sums are exact.
        options: further arguments of the op.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), heads, max(lengths, default=0) + 3)
    stats = (torch.randint(levels, shape, generator=generator) - 2) / 4
    special = torch.rand(shape, generator=generator)
    stats[special < 0.1] = torch.nan
    stats[special > 0.9] = -torch.inf
    seq_lens = torch.tensor(lengths, dtype=index_dtype)
    behind = torch.arange(shape[-1]) >= seq_lens[:, None]
    stats = stats.masked_fill(behind[:, None], torch.inf).to(dtype)
    if not isinstance(budget, int):
        budget = torch.tensor(budget, dtype=index_dtype)
    return {"stats": stats, "seq_lens": seq_lens, "budget": budget} | options


def knn_case(
    num_queries: int,
    num_entries: int,
    k: int,
    *,
    heads: int = 2,
    head_dim: int = 16,
    valid_len: list[int] | None = None,
    integers: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int32,
    seed: int = 0,
    **options,
) -> dict:
    """Random arguments of `memkernels.knn_topk`; entries that do not count are NaN.

    Args:
        integers: small ones, whose products and distances are exact and often equal.
        options: metric and buckets.
    """
    generator = torch.Generator().manual_seed(seed)

    def vectors(*shape):
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    bank = vectors(heads, num_entries, head_dim)
    if valid_len is not None:
        valid_len = torch.tensor(valid_len, dtype=index_dtype)
        bank[torch.arange(num_entries) >= valid_len[:, None]] = torch.nan
    q = vectors(num_queries, heads, head_dim)
    return {"q": q, "bank": bank, "valid_len": valid_len, "k": k} | options


def indexer_case(
    kind: str,
    lengths: list[int],
    queries: list[int] | None = None,
    *,
    heads: int = 4,
    head_dim: int = 64,
    w_dtype: torch.dtype | None = None,
    causal: bool = True,
    **sizes,
) -> dict:
    """Random arguments of `memkernels.indexer_scores`.

    Args:
        kind: "paged", "contiguous", or "alone": the keys of one sequence.
        w_dtype: None: that of q.
        sizes: further arguments of `attention_case`.
    """
    layout = "packed" if kind == "alone" else kind
    sizes |= {"heads": (heads, 1), "head_dims": (head_dim, 1)}
    case = attention_case(layout, lengths, queries, **sizes)
    generator = torch.Generator().manual_seed(sizes.get("seed", 0) + 1)
    arguments = {
        "q": case.q,
        "w": torch.randn(case.q.shape[:2], generator=generator).to(w_dtype or case.q.dtype),
        "k": case.k_cache.select(-2, 0),
        "page_table": case.page_table,
        "seq_lens": case.seq_lens,
        "cu_seqlens_q": case.cu_seqlens_q,
        "causal": causal,
    }
    return arguments | ({"cu_seqlens_q": None} if kind == "alone" else {})


def of_sequence(arguments: dict, b: int) -> dict:
    """The arguments of a selection op for sequence b alone."""
    rows, cu_seqlens_q = slice(b, b + 1), arguments.get("cu_seqlens_q")
    if cu_seqlens_q is not None:
        rows = slice(*cu_seqlens_q[b : b + 2].tolist())
    slices = dict.fromkeys(("q", "w", "lse"), rows)
    each = ["page_table", "seq_lens", "stats", "budget"]
    if arguments.get("page_table") is None:
        each += ["k", "k_cache", "key_bias"]
    slices |= dict.fromkeys(each, slice(b, b + 1))
    alone = {
        name: value[slices[name]] if name in slices and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if cu_seqlens_q is not None:
        alone["cu_seqlens_q"] = cu_seqlens_q[b : b + 2] - cu_seqlens_q[b]
    return alone


def used_pages(case: AttentionCase) -> Tensor:
    """``[num_pages]``: whether a sequence has the page."""
    num_pages, page_size = case.k_cache.shape[:2]
    used = torch.zeros(num_pages, dtype=torch.bool)
    for pages, length in zip(case.page_table.long(), case.seq_lens.tolist(), strict=True):
        pages = pages[: -(-length // page_size)]
        used[pages[pages >= 0]] = True
    return used


def share_pages(case: AttentionCase, seed: int = 0) -> AttentionCase:
    """The case with any pages in its tables: in several sequences, at several places, or absent.

    Tokens that nobody had used before are still NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    num_pages, page_size = case.k_cache.shape[:2]
    table = case.page_table
    drawn = torch.randint(-1, num_pages, table.shape, generator=generator).to(table.dtype)
    read = torch.arange(table.shape[1]) * page_size < case.seq_lens[:, None]
    return case.replace(page_table=drawn.where(read, table))


def _poison_unseen(case):
    """Nonsense in page table entries that are not listed, NaN in tokens that no query sees."""
    seen = torch.zeros(case.k_cache.shape[:-1], dtype=torch.bool)  # [.., .., Hkv]
    size, num_heads = seen.shape[1:]
    step = size if case.options["unit"] == "page" else 1
    for b, length in enumerate(case.seq_lens.tolist()):
        listed = case.indices[case.rows(b)].long()
        j = (listed.expand(-1, num_heads, -1)[..., None] * step + torch.arange(step)).flatten(2)
        visible = (j >= 0) & (j < length)  # [n, Hkv, T]
        page, offset = torch.full_like(j, b), j
        if case.page_table is not None:
            row, page, offset = case.page_table[b], j // size, j % size
            unlisted = torch.ones_like(row, dtype=torch.bool)
            unlisted[page[visible]] = False
            row[unlisted] = POISON_PAGE
            page = row[page].long()
            visible &= page >= 0
        if case.options.get("causal", True):
            visible &= j <= torch.arange(length - len(listed), length)[:, None, None]
        head = torch.arange(num_heads)[:, None].expand_as(j)
        seen[page[visible], offset[visible], head[visible]] = True
    for tensor in case.k_cache, case.v_cache, case.key_bias:
        if tensor is not None:
            tensor[~seen] = torch.nan
    return case


def _page_table(lengths, page_size, absent_pages, generator):
    """A permuted table ``[B, max_pages]`` and the used slots ``[num_pages, page_size]``."""
    counts = [-(-length // page_size) for length in lengths]
    num_pages = sum(counts) + 2
    free = torch.randperm(num_pages, generator=generator)
    table = torch.full((len(lengths), max(counts, default=0) + 1), POISON_PAGE)
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for row, count, length in zip(table, counts, lengths, strict=True):
        pages, free = free[:count], free[count:]
        used[pages] = (torch.arange(count * page_size) < length).view(count, page_size)
        absent = torch.rand(count, generator=generator) < absent_pages
        used[pages[absent]] = False
        row[:count] = pages.masked_fill(absent, -1)
    return table, used


def _offsets(sizes, dtype):
    return torch.tensor([0, *sizes]).cumsum(0).to(dtype)
