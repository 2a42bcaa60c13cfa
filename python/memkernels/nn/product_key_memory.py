"""A layer that adds up a few of the many values in a table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memkernels
from memkernels.nn._product_keys import ProductKeys
from memkernels.nn.tables import empty_table


class ProductKeyMemory(ProductKeys):
    """Product-key memory (Lample et al., 2019), and that of Memory Layers at Scale (Berges et al.,
    2024): `at_scale`.

    Each head of a token finds ``k`` slots, and the values of all heads' slots are added up,
    weighted by their scores: ``y = sum over heads and slots of w * values[slot]``. With a gate,
    ``y = value_proj(y * silu(gate_proj(x)))``::

        memory = ProductKeyMemory.at_scale(1024, num_keys=256, sparse=True)
        other = ProductKeyMemory.at_scale(1024, num_keys=256, sparse=True, values=memory.values)
        table = RowAdam([memory.values], lr=1e-3)
        y = memory(x)                                   # [..., 1024] of x [..., 1024]
        scores, slots = memory.lookup(x)                # [..., heads, k] each
        used = slots.unique().numel() / len(memory.values)

    There is no batch norm of queries, Lample's: it tells a token what follows, and padding takes
    part in it.

    Args:
        dim: of tokens.
        num_keys: keys of a half; there are ``num_keys ** 2`` slots.
        dim_out: of the result; None: dim.
        heads, k: queries of a token, and slots that each finds, at most num_keys and 128.
        key_dim: of a query, both halves together.
        value_dim: columns of the table; None: dim_out.
        norm: "rms": an RMS norm of each half of queries and keys, with a scale that all heads share
            (qk-norm); "layer": a layer norm of each half of a query; None.
        activation: of scores: "softmax" over a head's slots, or "relu", with which slots do not
            compete (Csordás et al., 2023).
        gate: whether tokens gate what they read.
        bias: of the projections.
        values: the table of another layer, to be shared; None: one of its own. Layers that share
            add up their gradients, and a state dict names the table once for each of them but
            stores it once.
        sparse: make the table's gradient a sparse COO tensor of the rows that were read, as
            `RowAdam` and its kin take.
        dtype, device: of the parameters. Values may have another dtype than the rest: pass them.

    State dict:
        ``query_proj.weight`` ``[heads * key_dim, dim]``, ``keys`` ``[heads, 2, num_keys,
        key_dim / 2]``, ``values`` ``[num_keys ** 2, value_dim]``; by options ``query_norm.weight``
        and ``key_norm.weight`` or ``query_norm.bias`` ``[key_dim / 2]``, ``gate_proj.weight``
        ``[value_dim, dim]``, ``value_proj.weight`` ``[dim_out, value_dim]`` (with a gate, or if the
        dims differ), and ``query_proj.bias``, ``gate_proj.bias``, ``value_proj.bias``.

    Raises RuntimeError on arguments that contradict each other.
    """

    def __init__(
        self,
        dim: int,
        num_keys: int = 512,
        dim_out: int | None = None,
        *,
        heads: int = 4,
        k: int = 32,
        key_dim: int = 256,
        value_dim: int | None = None,
        norm: str | None = "rms",
        activation: str = "softmax",
        gate: bool = False,
        bias: bool = False,
        values: nn.Parameter | None = None,
        sparse: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(dim, num_keys, heads, k, key_dim, norm, bias, dtype, device)
        known = activation in ("softmax", "relu")
        self._check(known, f"activation must be softmax or relu, got {activation}")
        self._activation, self._sparse = activation, sparse
        dim_out = dim if dim_out is None else dim_out
        value_dim = dim_out if value_dim is None else value_dim
        like = {"dtype": dtype, "device": device}
        shape = num_keys**2, value_dim
        if values is None:
            values = nn.Parameter(empty_table(*shape, **like))
            nn.init.normal_(values, std=value_dim**-0.5)
        got = list(values.shape)
        self._check(got == list(shape), f"values must be {list(shape)}, got {got}")
        self.values = values
        self.gate_proj = self.value_proj = None
        if gate:
            self.gate_proj = nn.Linear(dim, value_dim, bias, **like)
            nn.init.normal_(self.gate_proj.weight, std=dim_out**-0.5)
        if gate or value_dim != dim_out:
            self.value_proj = nn.Linear(value_dim, dim_out, bias, **like)
            nn.init.normal_(self.value_proj.weight, std=dim_out**-0.5)

    @classmethod
    def at_scale(cls, dim: int, num_keys: int = 1024, **options) -> ProductKeyMemory:
        """With the settings of Memory Layers at Scale: a gate, biases, key_dim 512, and qk-norm,
        which the paper has and its released code has not. The paper trains the values with a
        learning rate of their own, 1e-3, and shares them between layers."""
        return cls(dim, num_keys, **{"key_dim": 512, "gate": True, "bias": True} | options)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., dim]`` -> ``[..., dim_out]``."""
        scores, slots = self.lookup(x)
        weights = scores.softmax(-1) if self._activation == "softmax" else scores.relu()
        bags = -1, scores.shape[-2] * self.k
        out = memkernels.embedding_bag(
            slots.view(bags),
            self.values,
            per_sample_weights=weights.view(bags),
            sparse=self._sparse,
        )
        out = out.to(x.dtype).view(*x.shape[:-1], self.values.shape[1])
        if self.gate_proj is not None:
            out = out * F.silu(self.gate_proj(x))
        return out if self.value_proj is None else self.value_proj(out)
