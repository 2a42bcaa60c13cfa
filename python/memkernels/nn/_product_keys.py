"""Queries and product keys: what finds slots for `ProductKeyMemory` and experts for `PEER`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import memkernels


class ProductKeys(nn.Module):
    """Finds ``k`` of ``num_keys ** 2`` slots for each token and head."""

    def __init__(
        self,
        dim: int,
        num_keys: int,
        heads: int,
        k: int,
        key_dim: int,
        norm: str | None,
        bias: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ):
        super().__init__()
        self._check(key_dim % 2 == 0, f"key_dim must be even, got {key_dim}")
        self._check(norm in ("rms", "layer", None), f"norm must be rms, layer or None, got {norm}")
        self.k = k
        like = {"dtype": dtype, "device": device}
        half = key_dim // 2
        self.query_proj = nn.Linear(dim, heads * key_dim, bias, **like)
        self.keys = nn.Parameter(torch.empty(heads, 2, num_keys, half, **like))
        self.query_norm = self.key_norm = nn.Identity()
        if norm == "rms":
            self.query_norm, self.key_norm = (nn.RMSNorm(half, 1e-6, **like) for _ in range(2))
            # Scores begin with a variance of 1 a half, as the logits of attention do.
            nn.init.constant_(self.query_norm.weight, half**-0.5)
        elif norm == "layer":
            self.query_norm = nn.LayerNorm(half, **like)
        nn.init.xavier_uniform_(self.query_proj.weight)
        nn.init.uniform_(self.keys, -(key_dim**-0.5), key_dim**-0.5)

    def lookup(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The best slots of tokens ``[..., dim]``: scores before their activation, falling,
        ``[..., heads, k]`` float32 (float64 for float64), and indices, int64."""
        heads, halves, _, half = self.keys.shape
        # Norms in the dtype of the parameters, under autocast too.
        query = self.query_proj(x).to(self.keys.dtype).reshape(-1, heads, halves, half)
        query, keys = self.query_norm(query), self.key_norm(self.keys)
        scores, indices = memkernels.product_key_topk(query, keys, self.k)
        shape = *x.shape[:-1], heads, self.k
        return scores.view(shape), indices.view(shape)

    def _check(self, ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"{type(self).__name__}: {message}")
