"""What a cache may leave unread or forget: the policies of `memkernels.nn` on the trained model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memkernels.nn import HeavyHitter, PagedKVCache, Quest, SnapWindow, Step, Streaming
from memkernels.nn.policies import Policy

TOP_KEYS = 32
DENSE_LAYERS = 1
SINKS = 4


@dataclass
class Case:
    name: str
    policy: Policy
    read: Callable[[int], float]  # tokens whose keys and values a layer reads, of n in the cache


def cases(make_cache: Callable[[], PagedKVCache], budget: int) -> list[Case]:
    quest = Quest(make_cache(), budget, dense_layers=DENSE_LAYERS)
    hitter = HeavyHitter(make_cache(), budget, slack=budget // 8)
    streaming = Streaming(make_cache(), budget - SINKS, sink_tokens=SINKS, slack=budget // 8)
    page_size, dense = quest.cache.page_size, DENSE_LAYERS / len(quest.cache.k)

    def read_by_quest(n: int) -> float:
        # The summary of a page, two vectors, is as large as the key and value of a token.
        return dense * n + (1 - dense) * (min(n, budget) + -(-n // page_size))

    return [
        Case("full", Policy(make_cache()), lambda n: n),
        Case("Quest", quest, read_by_quest),
        Case("HeavyHitter", hitter, lambda n: 1.5 * n),  # keys once more, for the statistics
        Case("Streaming", streaming, lambda n: min(n, budget)),
        Case("SnapWindow", SnapWindow(make_cache(), budget), lambda n: n),
    ]


def recall(quest: Quest, step: Step, queries: list[Tensor]) -> float:
    """Which share of the keys that a head would attend to most lies on the pages it reads.

    queries: of every layer, one for each sequence; all of equal length.
    """
    cache, shares = quest.cache, []
    for layer in range(DENSE_LAYERS, len(queries)):
        q = queries[layer].unflatten(1, (cache.k.shape[3], -1))  # [B, Hkv, group, D]
        k = cache.k[layer, step.page_table].flatten(1, 2)[:, : step.max_seqlen]
        top = torch.einsum("bhgd,blhd->bhgl", q, k).topk(TOP_KEYS).indices
        pages = quest.select(layer, queries[layer], step)  # [B, Hkv, K]
        hit = (top // cache.page_size)[..., None] == pages[:, :, None, None]
        shares.append(hit.any(-1).float().mean())
    return torch.stack(shares).mean().item()


def decode(model: nn.Module, case: Case, texts: Tensor, prompt: int) -> list[str]:
    """Prefill of the first tokens of texts ``[B, length + 1]``, then one a step; a row of cells."""
    policy, cache, batch = case.policy, case.policy.cache, len(texts)
    ids = cache.allocate(batch)
    queries: list[Tensor] = []

    def run(tokens: Tensor) -> tuple[Tensor, Step]:
        step = cache.extend(ids, tokens.shape[1])
        queries.clear()

        def attend(layer, q, k, v):
            cache.append(layer, k, v, step)
            queries.append(q)
            return policy.attend(layer, q, step)

        logits = model(tokens.flatten(), policy.positions(step), attend)
        policy.evict(ids)
        return logits, step

    run(texts[:, :prompt])
    losses, read, recalls, seconds = [], 0.0, [], 0.0
    for position in range(prompt, texts.shape[1] - 1):
        start = time.perf_counter()
        logits, step = run(texts[:, position : position + 1])
        seconds += time.perf_counter() - start
        losses.append(F.cross_entropy(logits, texts[:, position + 1]))
        read += case.read(step.max_seqlen)
        if isinstance(policy, Quest) and position % 8 == 0:
            recalls.append(recall(policy, step, queries))
    steps = len(losses)
    token_bytes = 2 * cache.k[:, 0, 0].nbytes  # of keys and values, in all layers
    return [
        f"{torch.stack(losses).mean().exp():.3f}",
        f"{cache.length(ids[0]) * token_bytes / 1e3:.0f} kB",
        f"{read / steps * token_bytes / 1e3:.0f} kB",
        f"{batch * steps / seconds:.0f}",
        f"{sum(recalls) / len(recalls):.0%}" if recalls else "",
    ]


@torch.no_grad()
def table(
    model: nn.Module,
    make_cache: Callable[[list[int]], PagedKVCache],
    held_out: Tensor,
    length: int,
    prompt: int,
    batch: int = 8,
) -> None:
    """Texts of ``length`` bytes, the first ``prompt`` of them at once, under each policy."""
    texts = held_out[: len(held_out) // batch * batch].view(batch, -1)[:, : length + 1]
    print(f"  {'policy':<14}{'perplexity':>11}{'KV kept':>10}{'KV read a token':>18}", end="")
    print(f"{'tokens/s':>11}{'recall':>9}")
    for case in cases(lambda: make_cache([length] * batch), budget=length // 4):
        cells = zip(decode(model, case, texts, prompt), (11, 10, 18, 11, 9), strict=True)
        print(f"  {case.name:<14}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    print("\n  perplexity: a byte. KV kept: by a sequence at the end. KV read: by attention and")
    print(
        f"  policy, summaries included. recall: how many of a head's {TOP_KEYS} most attended keys"
    )
    print(f"  lie on the pages that Quest reads, in all layers but the first {DENSE_LAYERS}.")
