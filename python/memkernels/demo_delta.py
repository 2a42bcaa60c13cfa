"""What a gated delta net does for the demo's model: `GatedDeltaNet` in the place of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from memkernels._measure import interleaved
from memkernels.nn import GatedDeltaNet, GatedDeltaState, PagedKVCache, Step

# recur(layer, delta_net, x [T, dim]) -> [T, dim], for T packed tokens.
Recurrence = Callable[[int, GatedDeltaNet, Tensor], Tensor]
States = dict[int, GatedDeltaState]  # of layers


def make_net(dim: int) -> GatedDeltaNet:
    return GatedDeltaNet(dim, num_heads=4, head_dim=32)


def packed_recurrence(cu_seqlens: Tensor) -> Recurrence:
    """Whole sequences, packed: for training, and for anything without a state."""

    def recur(layer, delta_net, x):
        return delta_net(x[None], cu_seqlens=cu_seqlens)[0]

    return recur


def kept_recurrence(states: States, step: Step) -> Recurrence:
    """New tokens of sequences whose states are kept, and changed: prefill and decoding alike."""

    def recur(layer, delta_net, x):
        if layer in states and set(step.num_new) == {1}:
            return delta_net.step(x, states[layer])
        out, states[layer] = delta_net(
            x[None], states.get(layer), step.cu_seqlens_q, return_state=True
        )
        return out[0]

    return recur


# run(layer, x [B, dim], cache, states, step) -> [B, dim]: a block, of one new token a sequence.
Run = Callable[[int, Tensor, PagedKVCache, States, Step], Tensor]


@torch.no_grad()
def row(run: Run, delta_net: GatedDeltaNet, layers: list[int], cache: PagedKVCache, context: int):
    """Of two layers, one with attention and one with the delta net, after context random tokens:
    bytes that a sequence keeps, and the seconds of a step."""
    ids = cache.allocate(len(cache.seq_lens))
    cache.extend(ids, context)
    k, v = cache.k[layers[0]].normal_(), cache.v[layers[0]].normal_()
    _, state = delta_net(torch.randn(1, context, delta_net.q_proj.in_features), return_state=True)
    states = {layers[1]: GatedDeltaState(*(t.repeat_interleave(len(ids), 0) for t in state))}
    step, x = cache.extend(ids), torch.randn(len(ids), delta_net.q_proj.in_features)
    times = interleaved(*(lambda i=i: run(i, x, cache, states, step) for i in layers))
    kept = (context + 1) * (k[0, 0].nbytes + v[0, 0].nbytes), sum(t.nbytes for t in state)
    return kept, [time.minimum for time in times]


def table(
    run: Run,
    delta_net: GatedDeltaNet,
    layers: list[int],
    make_cache: Callable[[list[int]], PagedKVCache],
    contexts: Iterable[int],
    batch: int = 8,
) -> None:
    print(f"  {'context':>7}{'attention: KV kept':>21}{'a step':>11}", end="")
    print(f"{'delta net: state kept':>25}{'a step':>11}")
    for context in contexts:
        cache = make_cache([context + 1] * batch)
        kept, seconds = row(run, delta_net, layers, cache, context)
        print(f"  {context:>7}{kept[0] / 1e3:>18.0f} kB{1e3 * seconds[0]:>8.2f} ms", end="")
        print(f"{kept[1] / 1e3:>22.0f} kB{1e3 * seconds[1]:>8.2f} ms")
