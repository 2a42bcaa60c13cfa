"""Memory of the last few tokens, looked up by a hash of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memkernels
from memkernels.nn.tables import empty_table


class Engram(nn.Module):
    """Conditional memory of n-grams (Engram, DeepSeek-AI, 2026).

    Hashes of the n-grams that end at a token choose one row each for ``heads`` heads of every
    order; their concatenation ``e`` gives a value, which each of C channels of the hidden state
    gates, and a short causal convolution spreads::

        v = engram_gate(hidden, key_proj(e), value_proj(e), gate_weight)
        out = v + silu(conv(rms_norm(v) * conv_norm))

    The result is to be added to the hidden state. `forward` takes batches, packed sequences, and
    sequences that go on from what an earlier call has returned::

        layer = Engram(1024, vocab_size=50000, moduli=400_000, sparse=True)
        hidden = hidden + layer(hidden, token_ids)      # [B, T, 1024], [B, T]

        out, past = layer(hidden, prompt, return_past=True)
        out, past = layer(hidden, token, **past, return_past=True)

    Hashes are as in the paper's code: multipliers of NumPy's ``default_rng(seed)``, where it gives
    each layer the seed ``seed + 10007 * layer``, and primes as moduli, each of one head alone: a
    second layer's begin at ``moduli=int(layer.moduli[-1]) + 1``. Of a published model pass both as
    they are.

    Args:
        dim: D, of hidden states.
        vocab_size: different ids, after token_map; bounds the multipliers, so that nothing wraps.
        moduli: a number: each head takes the next prime from there on; or ``[len(orders) * heads]``
            int64, the heads of the first order first. The table has their sum as rows.
        orders: lengths of the n-grams.
        heads: of each order.
        head_dim: columns of the table.
        channels: C; hidden states of one channel may do without that dimension.
        conv_size: tokens that the convolution sees, ``max(orders)`` apart; 0: no convolution. It
            begins as 0.
        seed: of the multipliers.
        multipliers: ``[max(orders)]`` int64, instead.
        pad_id: the token before the beginning.
        eos_id: a token over which no n-gram reaches; None: there is none.
        token_map: ``[vocabulary]`` int64, the id that stands for each token in the hash; pad_id and
            eos_id are mapped too. Negative tokens stay, and block their n-grams.
        weight: the table, ``[rows, head_dim]`` with as many rows or more: a Parameter; or for
            inference, without gradient and not in the state dict, a tensor such as `open_table`'s,
            also int8 or float8_e4m3fn with scales. None: a Parameter of its own.
        scales: of a quantised table, as in `memkernels.embedding_bag`.
        sparse: make the table's gradient a sparse COO tensor of the rows that were read, as
            `RowAdam` and its kin take.
        eps: of all norms.
        sign: of 0 in the gate: "zero", or "copy" as in newer models.
        dtype, device: of the parameters.

    State dict:
        ``weight`` ``[rows, head_dim]``, ``key_proj.weight`` ``[C * D, E]`` and
        ``value_proj.weight`` ``[D, E]`` with ``E = len(orders) * heads * head_dim``,
        ``gate_weight`` ``[C, D]``, the product of the weights of the norms of hidden states and
        keys; with a convolution ``conv_norm`` ``[C, D]`` and ``conv.weight``
        ``[C * D, 1, conv_size]``; and ``multipliers``, ``moduli``, ``offsets``, int64.

    Raises RuntimeError on arguments that contradict each other.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        moduli: int | Tensor,
        *,
        orders: tuple[int, ...] = (2, 3),
        heads: int = 8,
        head_dim: int = 64,
        channels: int = 1,
        conv_size: int = 4,
        seed: int = 0,
        multipliers: Tensor | None = None,
        pad_id: int = 0,
        eos_id: int | None = None,
        token_map: Tensor | None = None,
        weight: Tensor | None = None,
        scales: Tensor | None = None,
        sparse: bool = False,
        eps: float = 1e-6,
        sign: str = "zero",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self._orders, self._reach = list(orders), max(orders) - 1
        self._pad_id, self._sparse, self._eps, self._sign = pad_id, sparse, eps, sign
        like = {"dtype": dtype, "device": device}

        if multipliers is None:
            bound = max(1, np.iinfo(np.int64).max // vocab_size // 2)
            draws = np.random.default_rng(seed).integers(0, bound, size=max(orders))
            multipliers = torch.from_numpy(2 * draws + 1)
        num_heads = len(orders) * heads
        if isinstance(moduli, int):
            moduli = torch.tensor(_primes(moduli, num_heads))
        for name, given, size in (
            ("multipliers", multipliers, max(orders)),
            ("moduli", moduli, num_heads),
        ):
            ok = given.shape == (size,) and given.dtype == torch.int64
            got = f"{list(given.shape)} {given.dtype}"
            _check(ok, f"{name} must be [{size}] torch.int64, got {got}")
            self.register_buffer(name, given.to(device))
        self.register_buffer("offsets", (moduli.cumsum(0) - moduli).to(device))
        if token_map is not None:
            token_map = token_map.to(device)
        self.register_buffer("token_map", token_map, persistent=False)
        self._eos_id = eos_id
        if eos_id is not None and token_map is not None:
            self._eos_id = int(token_map[eos_id])

        rows = int(moduli.sum())
        if weight is None:
            weight = nn.Parameter(empty_table(rows, head_dim, **like))
            nn.init.normal_(weight)
        ok = weight.ndim == 2 and len(weight) >= rows and weight.shape[1] == head_dim
        got = list(weight.shape)
        _check(ok, f"weight must be [{rows} or more, {head_dim}], got {got}")
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

        width = num_heads * head_dim
        self.key_proj = nn.Linear(width, channels * dim, bias=False, **like)
        self.value_proj = nn.Linear(width, dim, bias=False, **like)
        self.gate_weight = nn.Parameter(torch.ones(channels, dim, **like))
        self.conv = None
        if conv_size > 0:
            self.conv_norm = nn.Parameter(torch.ones(channels, dim, **like))
            size = channels * dim
            self.conv = nn.Conv1d(
                size, size, conv_size, groups=size, dilation=max(orders), bias=False, **like
            )
            nn.init.zeros_(self.conv.weight)

    def _apply(self, fn, recurse=True):
        # A table that is no parameter keeps its dtype: module.bfloat16() is not meant for it.
        kept = {name: self._buffers.get(name) for name in ("weight", "scales")}
        self._buffers.update({name: None for name in kept if name in self._buffers})
        super()._apply(fn, recurse)
        for name, table in kept.items():
            if table is not None:
                self._buffers[name] = table.to(self.key_proj.weight.device)
        return self

    def embed(
        self, token_ids: Tensor, past_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """What the table has for each token: ``[B * T, E]`` of token_ids ``[B, T]``."""
        if past_ids is None:
            num_seqs = len(token_ids if cu_seqlens is None else cu_seqlens[1:])
            past_ids = self._padding(token_ids, num_seqs)
        rows = memkernels.ngram_hash(
            self._mapped(token_ids),
            self.multipliers,
            self.moduli,
            self.offsets,
            orders=self._orders,
            past_ids=self._mapped(past_ids),
            cu_seqlens=cu_seqlens,
            eos_id=self._eos_id,
        )
        found = memkernels.embedding_bag(
            rows.view(-1, 1), self.weight, scales=self.scales, sparse=self._sparse
        )
        return found.view(-1, self.value_proj.in_features)

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        *,
        past_ids: Tensor | None = None,
        past_values: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_past: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor | None]]:
        """What to add to hidden.

        Args:
            hidden: ``[*, C, D]`` or, of one channel, ``[*, D]``, where ``*`` is the shape of
                token_ids.
            token_ids: ``[B, T]``; or ``[T]``, one sequence, or several with cu_seqlens.
            past_ids: ``[N, max(orders) - 1]``, the tokens before each of N sequences, the latest
                last; None: pad_id.
            past_values: ``[N, (conv_size - 1) * max(orders), C, D]``, what the convolution has of
                these tokens, their normalised values; None: 0.
            cu_seqlens: ``[N + 1]``, where packed sequences begin and end.
            return_past: also return past_ids and past_values for a call that goes on from here.

        Returns:
            A tensor like hidden; or this and a dict, whose past_values is None without a
            convolution.
        """
        shape, (channels, dim) = hidden.shape, self.gate_weight.shape
        expected = f"{[*token_ids.shape, channels, dim]} for these token_ids, got {list(shape)}"
        ok = shape[-1] == dim and hidden.numel() == token_ids.numel() * channels * dim
        _check(ok, f"hidden must be {expected}")
        ids = token_ids if token_ids.ndim == 2 else token_ids[None]
        e = self.embed(ids, past_ids, cu_seqlens).to(self.value_proj.weight.dtype)
        hidden = hidden.reshape(-1, channels, dim)
        k, v = self.key_proj(e).view(hidden.shape), self.value_proj(e)
        out = memkernels.engram_gate(
            hidden.to(k.dtype), k, v, self.gate_weight, eps=self._eps, sign=self._sign
        )  # [T, C, D]

        if self.conv is not None:
            values = F.rms_norm(out, out.shape[-1:], eps=self._eps) * self.conv_norm
            if past_values is not None:
                past_values = past_values.to(values.dtype).flatten(2).mT.contiguous()
            spread, past_values = memkernels.causal_conv1d(
                values.view(*ids.shape, channels * dim),
                self.conv.weight[:, 0],
                initial_state=past_values,
                cu_seqlens=cu_seqlens,
                dilation=self.conv.dilation[0],
                activation="silu",
                output_final_state=return_past,
            )
            out = out + spread.view(out.shape)
        out = out.view(shape)
        if not return_past:
            return out
        if past_values is not None:
            past_values = past_values.mT.unflatten(2, (channels, dim))
        if cu_seqlens is None:
            cu_seqlens = torch.arange(len(ids) + 1, device=ids.device) * ids.shape[1]
        if past_ids is None:
            past_ids = self._padding(ids, len(cu_seqlens) - 1)
        past_ids = _latest(past_ids, ids.flatten(), cu_seqlens.long())
        return out, {"past_ids": past_ids, "past_values": past_values}

    def _padding(self, token_ids: Tensor, num_seqs: int) -> Tensor:
        return token_ids.new_full((num_seqs, self._reach), self._pad_id)

    def _mapped(self, token_ids: Tensor) -> Tensor:
        if self.token_map is None:
            return token_ids
        return self.token_map[token_ids.clamp(min=0)].where(token_ids >= 0, token_ids)


def _latest(past: Tensor, new: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last R tokens of each sequence, as past ``[N, R]``, of that and of packed ``new [T]``."""
    num_seqs, reach = past.shape
    first, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    place = end + torch.arange(-reach, 0, device=new.device)  # in new, or before it
    row = torch.arange(1, num_seqs + 1, device=new.device)[:, None]
    place = torch.where(place < first, row * reach + place - first, past.numel() + place)
    return torch.cat((past.flatten().to(new.dtype), new))[place]


def _primes(start: int, count: int) -> list[int]:
    """The first primes from start on."""
    candidates = (n for n in itertools.count(max(start, 2)) if _is_prime(n))
    return list(itertools.islice(candidates, count))


def _is_prime(n: int) -> bool:
    return all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"Engram: {message}")
