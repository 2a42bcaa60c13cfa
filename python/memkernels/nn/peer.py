"""A layer of very many experts of one neuron each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import memkernels
from memkernels.nn._product_keys import ProductKeys
from memkernels.nn.tables import empty_table


class PEER(ProductKeys):
    """Parameter-efficient expert retrieval (He, 2024): a mixture of a million experts.

    Each head of a token finds ``k`` experts by product keys, and
    ``y = sum over heads and experts of softmax(scores) * act(x . up[expert]) * down[expert]``::

        layer = PEER(1024, num_keys=256)                # 65536 experts
        y = layer(x)                                    # [..., 1024] of x [..., 1024]
        scores, experts = layer.lookup(x)               # [..., heads, k] each

    No rows are copied together: memory is that of x, not of x times heads times ``k``.

    Args:
        dim: of tokens.
        num_keys: keys of a half; there are ``num_keys ** 2`` experts.
        dim_out: of the result; None: dim.
        heads, k: queries of a token, and experts that each finds, at most num_keys and 128.
        key_dim: of a query, both halves together; None: dim.
        activation: of neurons, as in `memkernels.sparse_ffn`.
        norm: of queries and keys, as in `ProductKeyMemory`. The paper's batch norm tells a token
            what follows.
        bias: of the query's projection.
        dtype, device: of the parameters.

    State dict:
        ``query_proj.weight`` ``[heads * key_dim, dim]``, ``keys`` ``[heads, 2, num_keys,
        key_dim / 2]``, ``up`` ``[num_keys ** 2, dim]``, ``down`` ``[num_keys ** 2, dim_out]``;
        ``query_proj.bias`` and the norms' as in `ProductKeyMemory`. PEER-pytorch calls the tables
        ``weight_down_embed`` and ``weight_up_embed``, in this order; its queries have the halves
        outside the heads, and its keys ``[heads, num_keys, 2, key_dim / 2]``.

    Raises RuntimeError on arguments that contradict each other.
    """

    def __init__(
        self,
        dim: int,
        num_keys: int = 1024,
        dim_out: int | None = None,
        *,
        heads: int = 8,
        k: int = 16,
        key_dim: int | None = None,
        activation: str = "gelu",
        norm: str | None = None,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        key_dim = dim if key_dim is None else key_dim
        super().__init__(dim, num_keys, heads, k, key_dim, norm, bias, dtype, device)
        self._activation = activation
        like = {"dtype": dtype, "device": device}
        self.up = nn.Parameter(empty_table(num_keys**2, dim, **like))
        dim_out = dim if dim_out is None else dim_out
        self.down = nn.Parameter(empty_table(num_keys**2, dim_out, **like))
        nn.init.normal_(self.up, std=dim**-0.5)
        nn.init.normal_(self.down, std=dim_out**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., dim]`` -> ``[..., dim_out]``."""
        scores, experts = self.lookup(x)
        bags = -1, scores.shape[-2] * self.k
        out = memkernels.sparse_ffn(
            x.reshape(-1, x.shape[-1]).to(self.up.dtype),
            self.up,
            self.down,
            experts.view(bags),
            scores.softmax(-1).view(bags),
            activation=self._activation,
        )
        return out.view(*x.shape[:-1], self.down.shape[1])
