"""What a memory does for the demo's model: `ProductKeyMemory` in the place of an MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from memkernels.nn import ProductKeyMemory, RowAdam

NUM_KEYS = 128


@dataclass
class Training:
    losses: list[float] = field(default_factory=list)  # of every step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # steps, loss after them
    seconds: list[float] = field(default_factory=list)  # of every step


def make_memory(dim: int) -> ProductKeyMemory:
    return ProductKeyMemory(dim, NUM_KEYS, k=16, key_dim=64, gate=True, sparse=True)


def memories(model: nn.Module) -> list[ProductKeyMemory]:
    return [module for module in model.modules() if isinstance(module, ProductKeyMemory)]


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW, and RowAdam for the tables of memories: it changes the rows that were read."""
    tables = {memory.values for memory in memories(model)}
    rest = [parameter for parameter in model.parameters() if parameter not in tables]
    betas = 0.9, 0.95
    optimizers = [torch.optim.AdamW(rest, lr, betas=betas, fused=True)]
    if tables:
        optimizers.append(RowAdam(list(tables), lr, betas=betas))
    return optimizers


@torch.no_grad()
def count_reads(memory: ProductKeyMemory, run: Callable[[], object]) -> Tensor:
    """How often each slot of a memory is read while a model runs: ``[slots]``."""
    counts = torch.zeros(len(memory.values), dtype=torch.int64)

    def count(memory, args):
        _, slots = memory.lookup(*args)
        counts.add_(torch.bincount(slots.flatten(), minlength=len(counts)))

    with memory.register_forward_pre_hook(count):
        run()
    return counts


def table(models: dict[str, nn.Module], trainings: dict[str, Training], reads: Tensor) -> None:
    """A row for each model; reads: of the slots of the memory."""
    print(f"\n  {'':<24}{'parameters':>12}{'a byte reads':>14}{'ms a step':>11}", end="")
    print(f"{'held-out loss':>15}{'slots read':>12}")
    for name, model in models.items():
        size = used = sum(parameter.numel() for parameter in model.parameters())
        for memory in memories(model):
            heads, dim = len(memory.keys), memory.values.shape[1]
            used -= memory.values.numel() - heads * memory.k * dim
        training = trainings[name]
        milliseconds = 1e3 * sorted(training.seconds)[len(training.seconds) // 2]
        print(
            f"  {name:<24}{size / 1e6:>10.1f} M{used / 1e6:>12.1f} M{milliseconds:>11.0f}", end=""
        )
        print(f"{training.held_out[-1][1]:>15.3f}", end="")
        print(f"{(reads > 0).float().mean():>12.1%}" if memories(model) else "")
    print("\n  held-out loss: nats per byte. ms a step: the median. slots read: of the memory's")
    print(f"  {len(reads)}, by the held-out text that the loss is of.")
