"""What memkernels is for, in two parts: ``python -m memkernels demo``.

1. A table of the ops, against float64, against what this machine can do, and against torch.
2. A byte-level transformer trained on Python's own documentation with `paged_attention` in forward
   and backward; with a memory of product keys in the place of an MLP, and with a gated delta net in
   the place of one layer's attention. Then served from a `PagedKVCache` or from the delta net's
   state, under policies that read or keep only some of the cache, and timed beside the same model
   on torch.

`Transformer` and the three attention functions after it are the example to start from: one model
trains on packed sequences, decodes from pages, or runs on torch, by the function it is given.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memkernels
from memkernels import demo_delta, demo_lookup, demo_memory, demo_ops, demo_policies, demo_scan
from memkernels.demo_delta import Recurrence, States
from memkernels.demo_memory import Training
from memkernels.nn import GatedDeltaNet, PagedKVCache, ProductKeyMemory, Step

try:
    from matplotlib.figure import Figure
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f'{error.name} is missing: pip install "memkernels[demo]"') from None

NUM_LAYERS = 4
DIM = 256
HIDDEN = 512
NUM_HEADS = 8
NUM_KV_HEADS = 2
HEAD_DIM = 32
PAGE_SIZE = 16
CONTEXT = 512  # of training
MEMORY_LAYER = 2
DELTA_LAYER = 1

PROMPTS = (
    "The ",
    "A class definition ",
    "If an exception is raised in the ",
    "When a function is called, the arguments are evaluated from left to right, and ",
)

# ---- the model -----------------------------------------------------------------------------------

# attend(layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq, D], for T packed tokens.
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(DIM, 2 * HIDDEN, bias=False)
        self.value_proj = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).chunk(2, dim=-1)
        return self.value_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention with grouped query heads, or a delta net; then an MLP or a memory. Both behind an
    RMSNorm."""

    def __init__(self, mlp: nn.Module, delta_net: GatedDeltaNet | None):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(DIM)
        self.delta_net = delta_net
        if delta_net is None:
            self.qkv = nn.Linear(DIM, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, bias=False)
            self.o_proj = nn.Linear(NUM_HEADS * HEAD_DIM, DIM, bias=False)
        self.mlp_norm = nn.RMSNorm(DIM)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        layer: int,
        rotation: tuple[Tensor, Tensor],
        attend: Attention,
        recur: Recurrence | None,
    ) -> Tensor:
        normed = self.mixer_norm(x)
        if self.delta_net is not None:
            x = x + recur(layer, self.delta_net, normed)
        else:
            qkv = self.qkv(normed).unflatten(-1, (-1, HEAD_DIM))
            q, k, v = qkv.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
            attended = attend(layer, rotate(q, *rotation), rotate(k, *rotation), v)
            x = x + self.o_proj(attended.flatten(1))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Logits of the next byte. Tokens of all sequences are packed in one dimension; what belongs
    together is known to the attention function alone, and to that of delta nets.

    memories: ``{layer: memory}``, which takes the place of that layer's MLP.
    delta_nets: ``{layer: delta net}``, which takes the place of that layer's attention.
    """

    def __init__(
        self,
        memories: dict[int, ProductKeyMemory] | None = None,
        delta_nets: dict[int, GatedDeltaNet] | None = None,
    ):
        super().__init__()
        mlps = {layer: MLP() for layer in range(NUM_LAYERS)} | (memories or {})
        nets = delta_nets or {}
        self.embedding = nn.Embedding(256, DIM)
        self.blocks = nn.ModuleList(Block(mlps[i], nets.get(i)) for i in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:  # each block begins as the identity
            nn.init.zeros_((block.delta_net or block).o_proj.weight)
            nn.init.zeros_(block.mlp.value_proj.weight)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attention,
        recur: Recurrence | None = None,
    ) -> Tensor:
        """tokens ``[T]`` at positions ``[T]`` of their sequences -> ``[T, 256]``."""
        rotation = rotation_at(positions)
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, rotation, attend, recur)
        return self.head(self.norm(x))


def rotation_at(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rotate`, ``[T, 1, D / 2]``."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = positions[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (Su et al., 2021) of x ``[T, H, D]``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


# ---- what attention can be -----------------------------------------------------------------------


def packed_attention(cu_seqlens: Tensor) -> Attention:
    """Whole sequences, packed: for training, and for anything without a cache."""

    def attend(layer, q, k, v):
        return memkernels.paged_attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)

    return attend


def cached_attention(cache: PagedKVCache, step: Step) -> Attention:
    """New tokens of sequences in a cache: prefill and decoding alike."""

    def attend(layer, q, k, v):
        cache.append(layer, k, v, step)
        return cache.attend(layer, q, step)

    return attend


def torch_attention(k_cache: Tensor, v_cache: Tensor, length: int) -> Attention:
    """The peer: one new token each for sequences of equal length, in contiguous caches
    ``[layers, B, Hkv, max_len, D]``. No mask, no padding, no copy: as good as plain torch gets."""

    def attend(layer, q, k, v):
        k_cache[layer, :, :, length] = k
        v_cache[layer, :, :, length] = v
        # The query heads of a group as rows: K and V are read once for all of them.
        out = F.scaled_dot_product_attention(
            q.unflatten(1, (NUM_KV_HEADS, -1)),
            k_cache[layer, :, :, : length + 1],
            v_cache[layer, :, :, : length + 1],
        )
        return out.flatten(1, 2)

    return attend


# ---- train ---------------------------------------------------------------------------------------


def load_text() -> tuple[Tensor, Tensor]:
    """Bytes of what Python's ``help()`` knows about the language, and a held-out sixteenth."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    held_out = len(data) // 16
    return data[:-held_out], data[-held_out:]


def train(model: Transformer, steps: int, batch: int = 2, length: int = CONTEXT):
    """Returns a `Training`, and a function that computes the held-out loss."""
    data, held_out = load_text()
    cu_seqlens = torch.arange(0, batch * length + 1, length)
    attend = packed_attention(cu_seqlens)
    recur = demo_delta.packed_recurrence(cu_seqlens)
    positions = torch.arange(length).repeat(batch)

    def loss_on(text: Tensor, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        window = text[starts + torch.arange(length + 1)]
        logits = model(window[:, :-1].flatten(), positions, attend, recur)
        return F.cross_entropy(logits, window[:, 1:].flatten())

    @torch.no_grad()
    def held_out_loss(batches: int = 8) -> float:
        generator = torch.Generator().manual_seed(1)
        return sum(loss_on(held_out, generator).item() for _ in range(batches)) / batches

    optimizers = demo_memory.make_optimizers(model, lr=3e-3)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(0)
    training = Training(held_out=[(0, held_out_loss())])
    progress = tqdm(range(1, steps + 1), desc="train", unit="step")
    for step in progress:
        start = time.perf_counter()
        loss = loss_on(data, generator)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizers[0].param_groups[0]["params"], 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        training.losses.append(loss.item())
        training.seconds.append(time.perf_counter() - start)
        if step % max(1, steps // 5) == 0:
            training.held_out.append((step, held_out_loss()))
        latest = training.losses[-1], training.held_out[-1][1]
        progress.set_postfix(loss=f"{latest[0]:.2f}", held_out=f"{latest[1]:.2f}")
    return training, held_out_loss


# ---- serve ---------------------------------------------------------------------------------------


def make_cache(lengths: list[int]) -> PagedKVCache:
    """With room for sequences of these lengths."""
    pages = sum(-(-length // PAGE_SIZE) for length in lengths)
    return PagedKVCache(
        NUM_LAYERS,
        pages,
        PAGE_SIZE,
        NUM_KV_HEADS,
        HEAD_DIM,
        max_seqs=len(lengths),
        max_seq_len=max(lengths),
    )


@torch.no_grad()
def generate(model: Transformer, prompts: list[Tensor], count: int, temperature: float = 0.6):
    """Continues prompts of different lengths side by side by count bytes each.

    Returns:
        The new tokens and the logits they were drawn from: ``[B, count]``, ``[B, count, 256]``.
    """
    cache = make_cache([len(prompt) + count for prompt in prompts])
    ids = cache.allocate(len(prompts))
    generator = torch.Generator().manual_seed(0)
    drawn, logits = [], []
    states: States = {}
    # The first step is the prefill: whole prompts. Each later one feeds a single token back.
    tokens, step = torch.cat(prompts), cache.extend(ids, [len(prompt) for prompt in prompts])
    while True:
        recur = demo_delta.kept_recurrence(states, step)
        out = model(tokens, step.positions, cached_attention(cache, step), recur)
        logits.append(out[step.cu_seqlens_q[1:] - 1])  # [B, 256], after each last token
        weights = (logits[-1] / temperature).softmax(-1)
        tokens = torch.multinomial(weights, 1, generator=generator)[:, 0]
        drawn.append(tokens)
        if len(drawn) == count:
            break
        step = cache.extend(ids)
    cache.free(ids)
    return torch.stack(drawn, 1), torch.stack(logits, 1)


@torch.no_grad()
def serve(model: Transformer, count: int) -> None:
    prompts = [torch.tensor(list(prompt.encode())) for prompt in PROMPTS]
    start = time.perf_counter()
    drawn, logits = generate(model, prompts, count)
    seconds = time.perf_counter() - start
    for prompt, tokens in zip(PROMPTS, drawn, strict=True):
        text = bytes(tokens.tolist()).decode(errors="replace")
        text = f"{prompt}| {' '.join(text.split())}"
        print(textwrap.fill(text, 96, initial_indent="  > ", subsequent_indent="    "))
    print(f"  {drawn.numel() / seconds:.0f} tokens/s, {len(prompts)} sequences side by side")

    difference = recomputed(model, prompts, drawn, logits)
    print(f"  paged decoding against full recomputation: logits differ by at most {difference:.1e}")


@torch.no_grad()
def recomputed(model: Transformer, prompts: list[Tensor], drawn: Tensor, logits: Tensor) -> float:
    """The largest difference of `generate`'s logits from those without cache and state."""
    worst = 0.0
    for prompt, tokens, decoded in zip(prompts, drawn, logits, strict=True):
        whole = torch.cat((prompt, tokens[:-1]))
        cu_seqlens = torch.tensor([0, len(whole)])
        attend, recur = packed_attention(cu_seqlens), demo_delta.packed_recurrence(cu_seqlens)
        full = model(whole, torch.arange(len(whole)), attend, recur)
        worst = max(worst, (full[len(prompt) - 1 :] - decoded).abs().max().item())
    return worst


@torch.no_grad()
def serve_alike(model: Transformer, prefix_len: int, batch: int, count: int) -> None:
    """Prompts with a common beginning, which is computed, kept and read once, or by each."""
    text, _ = load_text()
    prefix, rest = text[:prefix_len], text[prefix_len:]
    prompts = [torch.cat((prefix, rest[40 * b : 40 * b + 20 + b])) for b in range(batch)]
    token_bytes = NUM_LAYERS * NUM_KV_HEADS * 2 * HEAD_DIM * 4  # of keys and values
    logits: list[Tensor] = []
    print(
        f"  {'prefix':<10}{'computed':>10}{'prefill':>10}{'KV kept':>10}{'KV read a step':>17}",
        end="",
    )
    print(f"{'KV saved':>11}{'step':>10}")
    for shared in False, True:
        cache = make_cache([len(prompt) + count for prompt in prompts])
        capacity = cache.num_free_pages
        start, computed, ids = time.perf_counter(), 0, []
        for prompt in prompts:
            seq_id, held = cache.reuse(prompt)
            step = cache.extend([seq_id], len(prompt) - held)
            model(prompt[held:], step.positions, cached_attention(cache, step))
            if shared:
                cache.publish(seq_id, prompt)
            computed += len(prompt) - held
            ids.append(seq_id)
        prefill, best = time.perf_counter() - start, float("inf")
        for token in range(count):
            tokens = torch.full((batch,), 97 + token % 26)
            start = time.perf_counter()
            step = cache.extend(ids)
            logits.append(model(tokens, step.positions, cached_attention(cache, step)))
            best = min(best, time.perf_counter() - start)
        kept = (capacity - cache.num_free_pages) * PAGE_SIZE * token_bytes
        # What is common is read once as far as it fills splits, here of 256 tokens.
        saved = (batch - 1) * (prefix_len // 256 * 256) * token_bytes if shared else 0
        read = sum(map(cache.length, ids)) * token_bytes - saved
        print(f"  {'shared' if shared else 'repeated':<10}{computed:>10}{prefill:>8.2f} s", end="")
        print(f"{kept / 1e6:>7.1f} MB{read / 1e6:>14.1f} MB{saved / 1e6:>8.1f} MB", end="")
        print(f"{best * 1e3:>7.1f} ms")
    repeated, alike = torch.stack(logits).chunk(2)
    print(f"  logits differ by at most {(repeated - alike).abs().max():.1e}")


@torch.no_grad()
def serve_from_states(model: Transformer, contexts: tuple[int, ...], count: int) -> None:
    """A model with a delta net in DELTA_LAYER, beside attention in the layers around it."""

    def run(layer: int, x: Tensor, cache: PagedKVCache, states: States, step: Step) -> Tensor:
        attend, recur = cached_attention(cache, step), demo_delta.kept_recurrence(states, step)
        return model.blocks[layer](x, layer, rotation_at(step.positions), attend, recur)

    delta_net = model.blocks[DELTA_LAYER].delta_net
    demo_delta.table(run, delta_net, [DELTA_LAYER - 1, DELTA_LAYER], make_cache, contexts)
    prompts = [torch.tensor(list(prompt.encode())) for prompt in PROMPTS]
    difference = recomputed(model, prompts, *generate(model, prompts, count))
    print("\n  decoding from states against full recomputation: logits differ by at most ", end="")
    print(f"{difference:.1e}")


# ---- race ----------------------------------------------------------------------------------------


class Timed:
    """An attention function that adds up the seconds spent in it."""

    def __init__(self, attend: Attention):
        self.attend = attend
        self.seconds = 0.0

    def __call__(self, *args) -> Tensor:
        start = time.perf_counter()
        out = self.attend(*args)
        self.seconds += time.perf_counter() - start
        return out


@torch.no_grad()
def race(model: Transformer, context: int, batch: int = 8, steps: int = 10):
    """Decodes from caches that hold random keys and values of context tokens a sequence.

    Returns:
        (seconds, of which attention) of the best step on memkernels and on torch, and the largest
        difference between their logits.
    """
    cache = make_cache([context + steps] * batch)
    ids = cache.allocate(batch)
    for _ in range(0, context, PAGE_SIZE):  # side by side, so that their pages interleave
        step = cache.extend(ids, PAGE_SIZE)

    def fill(pool: Tensor) -> Tensor:
        """Fills pages, and returns the same as ``[layers, B, Hkv, max_len, D]``."""
        contiguous = torch.empty(NUM_LAYERS, batch, NUM_KV_HEADS, context + steps, HEAD_DIM)
        for layer in range(NUM_LAYERS):
            pool[layer].normal_()
            rows = pool[layer, step.page_table].flatten(1, 2)  # [B, context, Hkv, D]
            contiguous[layer, :, :, :context] = rows.transpose(1, 2)
        return contiguous

    k_cache, v_cache = fill(cache.k), fill(cache.v)
    tokens = torch.arange(batch)

    def memkernels_step(length: int):
        step = cache.extend(ids)
        attend = Timed(cached_attention(cache, step))
        return model(tokens, step.positions, attend), attend.seconds

    def torch_step(length: int):
        attend = Timed(torch_attention(k_cache, v_cache, length))
        return model(tokens, torch.full((batch,), length), attend), attend.seconds

    best = [(float("inf"), 0.0)] * 2
    difference = 0.0
    for length in range(context, context + steps):
        logits = []
        for i, decode in enumerate((memkernels_step, torch_step)):  # in turns: the same machine
            start = time.perf_counter()
            out, attention = decode(length)
            best[i] = min(best[i], (time.perf_counter() - start, attention))
            logits.append(out)
        difference = max(difference, (logits[0] - logits[1]).abs().max().item())
    return *best, difference


def race_all(model: Transformer, contexts: tuple[int, ...], batch: int = 8):
    """Returns ``{engine: [(tokens/s, attention's share), ...]}``, one entry a context."""
    print(f"  {'context':>7}{'memkernels':>22}{'torch':>22}{'ratio':>9}{'logits differ':>15}")
    results: dict[str, list] = {"memkernels": [], "torch": []}
    for context in contexts:
        *best, difference = race(model, context, batch)
        line = f"  {context:>7}"
        for engine, (seconds, attention) in zip(results, best, strict=True):
            results[engine].append((batch / seconds, attention / seconds))
            line += f"{batch / seconds:>15.0f} ({attention / seconds:4.0%})"
        print(f"{line}{best[1][0] / best[0][0]:>8.2f}x{difference:>15.1e}")
    return results


# ---- the story -----------------------------------------------------------------------------------


def draw(trainings: dict[str, Training], reads: Tensor, contexts, results, path: str) -> None:
    figure = Figure(figsize=(17, 3.8), layout="constrained")
    loss, slots, rate, share = figure.subplots(1, 4)
    for color, (name, training) in enumerate(trainings.items()):
        steps = range(1, len(training.losses) + 1)
        loss.plot(steps, training.losses, color=f"C{color}", alpha=0.25)
        points = zip(*training.held_out, strict=True)
        loss.plot(*points, "o-", color=f"C{color}", label=f"{name}, held out")
    loss.set(title="Byte-level model, attention by memkernels", xlabel="step")
    loss.set_ylabel("nats per byte")
    used = reads[reads > 0].sort(descending=True).values
    slots.loglog(range(1, len(used) + 1), used / reads.sum(), color="C1", label="held out")
    slots.set(title=f"{len(used) / len(reads):.0%} of the memory's slots are read")
    slots.set(xlabel="slot, most read first", ylabel="share of reads")
    places = torch.arange(len(contexts))
    for shift, (engine, values) in zip((-0.2, 0.2), results.items(), strict=True):
        rates, shares = zip(*values, strict=True)
        bars = rate.bar(places + shift, rates, 0.4, label=engine)
        rate.bar_label(bars, fmt="%.0f", fontsize=8)
        bars = share.bar(places + shift, [100 * s for s in shares], 0.4, label=engine)
        share.bar_label(bars, fmt="%.0f", fontsize=8)
    rate.set(title="Decoding", ylabel="tokens/s")
    share.set(title="Attention in a decoding step", ylabel="% of time", ylim=(0, 110))
    for axes in rate, share:
        axes.set(xlabel="context", xticks=places, xticklabels=contexts)
    for axes in loss, slots, rate, share:
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(quick: bool = False, out: str = "memkernels_demo.png") -> None:
    torch.manual_seed(0)
    print(f"memkernels {memkernels.__version__}, torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads\n\n1. The ops\n")
    demo_ops.table([demo_ops.cases, demo_lookup.cases, demo_scan.cases], quick)

    print("\n2. A language model on Python's documentation, with other memories in two layers\n")
    memory = demo_memory.make_memory(DIM)
    model, remembering = Transformer(), Transformer({MEMORY_LAYER: memory})
    hybrid = Transformer(delta_nets={DELTA_LAYER: demo_delta.make_net(DIM)})
    models = {
        "attention, MLPs": model,
        "memory for one MLP": remembering,
        "delta net in one layer": hybrid,
    }
    trainings, held_out_loss = {}, {}
    for name, each in models.items():
        trainings[name], held_out_loss[each] = train(each, steps=20 if quick else 200)
    reads = demo_memory.count_reads(memory, held_out_loss[remembering])
    demo_memory.table(models, trainings, reads)
    print("\nServing the first from pages\n")
    serve(model, count=32 if quick else 200)

    contexts = (256, 1024) if quick else (1024, 4096, 16384)
    print("\nA layer of the third with attention, and the one with the delta net, of 8 sequences\n")
    serve_from_states(hybrid, contexts, count=32)

    batch, prefix_len = (4, 512) if quick else (16, 2048)
    print(f"\n{batch} prompts that share their first {prefix_len} bytes\n")
    serve_alike(model, prefix_len, batch, count=8)

    print(f"\n8 held-out texts of {CONTEXT} bytes, a quarter of them to keep or to read\n")
    prompt = CONTEXT - (32 if quick else 128)
    demo_policies.table(model, make_cache, load_text()[1], CONTEXT, prompt)

    print("\nDecoding 8 sequences: tokens/s in the best step (attention's share of it)\n")
    results = race_all(model, contexts)
    draw(trainings, reads, contexts, results, out)
    print(f"\nFigure: {out}")
