"""The cases of the scan family in the demo's table of ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import memkernels
from memkernels import fallback
from memkernels.demo_ops import DTYPES, Case

CHUNK = 64
EXACT = 80  # tokens that are computed in float64


def in_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None = None) -> Tensor:
    """Plain torch, of one sequence ``[1, T, H, *]``: the delta rule, or without beta linear
    attention, with a decay of heads."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    chunks = [
        x.to(dtype).unflatten(1, (-1, CHUNK)).transpose(2, 3)[0]  # [chunks, H, CHUNK, *]
        for x in (q * k.shape[-1] ** -0.5, k, v, g[..., None])
    ]
    queries, keys, values, g = chunks
    g = g.cumsum(2)
    decay = (g - g.mT).exp().tril()
    if beta is not None:
        beta = beta.to(dtype).unflatten(1, (-1, CHUNK)).transpose(2, 3)[0, ..., None]
        seen = (beta * (keys @ keys.mT) * decay).tril(-1) + torch.eye(CHUNK, dtype=dtype)
        right = beta * torch.cat((values, g.exp() * keys), -1)
        solved = torch.linalg.solve_triangular(seen, right, upper=False, unitriangular=True)
        values, known = solved.split((v.shape[-1], k.shape[-1]), -1)
    state, out = 0, []
    scores, rest, last = (queries @ keys.mT) * decay, (g[:, :, -1:] - g).exp(), g[:, :, -1:].exp()
    for i, u in enumerate(values):
        if i > 0 and beta is not None:
            u = u - known[i] @ state
        inside = scores[i] @ u
        out.append(inside if i == 0 else inside + (g[i].exp() * queries[i]) @ state)
        state = last[i] * state + (rest[i] * keys[i]).mT @ u
    return torch.cat(out, 1).transpose(0, 1)[None].to(q.dtype)  # [1, T, H, V]


def matrices(op: str, dtype: str, limit: float, tokens: int, backward: bool) -> Case:
    """A matrix for each of 4 heads. Products are float32 in every dtype; those with the state
    count whole, and those within chunks of 64 tokens as triangles."""
    heads, dim = 4, 128
    q, k, v, dout = torch.randn(4, 1, tokens, heads, dim)
    inputs = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v}
    if op == "delta_rule":
        inputs["beta"] = torch.rand(1, tokens, heads)
    inputs = {name: x.to(DTYPES[dtype]) for name, x in inputs.items()}
    inputs["g"] = -torch.rand(1, tokens, heads) / 10

    def run(function, inputs):
        if not backward:
            return (function(**inputs)[0],)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out = function(**leaves)
        return out[0], *torch.autograd.grad(out, leaves.values(), dout.to(out.dtype))

    def ours(**inputs):
        return getattr(memkernels, op)(**inputs)[0]

    with_state, inside = (3, 4) if op == "delta_rule" else (2, 2)
    if backward:
        with_state, inside = (11, 15) if op == "delta_rule" else (7, 7)
    return Case(
        op=f"{op}{' training' if backward else ''}",
        dtype=dtype,
        shape=f"{tokens}, heads {heads} x {dim}^2",
        ours=lambda: run(ours, inputs),
        peer=lambda: run(in_chunks, inputs),
        exact=run(in_chunks, {name: x.double() for name, x in inputs.items()}),
        work=tokens * heads * dim * (2 * with_state * dim + CHUNK * inside),
        unit="GFLOP/s",
        limit=limit,
    )


def step(limit: float, rows: int) -> Case:
    """One token for each of many states; bytes are those of the states, read and written."""
    heads, dim = 8, 128
    q, k, v = F.normalize(torch.randn(3, rows, heads, dim), dim=-1)
    beta, g = torch.rand(rows, heads), -torch.rand(rows, heads) / 10
    state = torch.randn(rows, heads, dim, dim)
    exact, theirs, own = state[:1].double(), state.clone(), state

    def peer():
        theirs.mul_(g.exp()[..., None, None])
        u = beta[..., None] * (v - (k[..., None, :] @ theirs)[..., 0, :])
        theirs.view(-1, dim, dim).baddbmm_(k.view(-1, dim, 1), u.view(-1, 1, dim))
        return ((q[..., None, :] @ theirs)[..., 0, :] * dim**-0.5,)

    first = (x[:1].double() for x in (q, k, v, beta))
    return Case(
        op="delta_rule_step",
        dtype="f32",
        shape=f"{rows}, heads {heads} x {dim}^2",
        ours=lambda: (memkernels.delta_rule_step(q, k, v, beta, own, g),),
        peer=peer,
        exact=(fallback.delta_rule_step(*first, exact, g[:1].double()),),
        work=2 * state.nbytes,
        unit="GB/s",
        limit=limit,
    )


def selective(limit: float, tokens: int) -> Case:
    """Mamba's; flops are those of each state of each token but the exponential."""
    channels, states = 512, 16
    u, delta = torch.randn(2, 1, tokens, channels)
    B, C = torch.randn(2, 1, tokens, 1, states)
    delta, A = F.softplus(delta - 4), -torch.arange(1.0, states + 1).repeat(channels, 1)

    def peer():
        h, out = 0, []
        for t in range(tokens):
            decay = (delta[0, t, :, None] * A).exp()
            h = decay * h + (delta * u)[0, t, :, None] * B[0, t]
            out.append(h @ C[0, t, 0])
        return (torch.stack(out),)

    first = (x[:, :EXACT].double() for x in (u, delta, B, C))
    u_, delta_, B_, C_ = first
    return Case(
        op="selective_scan",
        dtype="f32",
        shape=f"{tokens} x {channels} x {states}",
        ours=lambda: (memkernels.selective_scan(u, delta, A, B, C)[0][0],),
        peer=peer,
        exact=(fallback.selective_scan(u_, delta_, A.double(), B_, C_)[0][0],),
        work=6 * tokens * channels * states,
        unit="GFLOP/s",
        limit=limit,
    )


def diagonal(limit: float, tokens: int) -> Case:
    """Bytes are those of inputs, decays and results."""
    x, a = torch.randn(1, tokens, 1024), torch.rand(1, tokens, 1024)

    def peer():
        h, out = 0, []
        for t in range(tokens):
            h = a[0, t] * h + x[0, t]
            out.append(h)
        return (torch.stack(out),)

    first = (x[:, :EXACT].double() for x in (x, a))
    return Case(
        op="diagonal_scan",
        dtype="f32",
        shape=f"{tokens} x 1024",
        ours=lambda: (memkernels.diagonal_scan(x, a)[0][0],),
        peer=peer,
        exact=(fallback.diagonal_scan(*first)[0][0],),
        work=3 * x.nbytes,
        unit="GB/s",
        limit=limit,
    )


def convolution(limit: float, tokens: int) -> Case:
    """Four taps and silu; bytes are those of inputs and results."""
    channels = 1024
    x, weight = torch.randn(1, tokens, channels).bfloat16(), torch.randn(channels, 4).bfloat16()

    def peer():
        out = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=channels)
        return (F.silu(out).mT[0],)

    exact, _ = fallback.causal_conv1d(x[:, :EXACT].double(), weight.double(), activation="silu")
    return Case(
        op="causal_conv1d",
        dtype="bf16",
        shape=f"{tokens} x {channels}, 4 taps",
        ours=lambda: (memkernels.causal_conv1d(x, weight, activation="silu")[0][0],),
        peer=peer,
        exact=(exact[0],),
        work=2 * x.nbytes,
        unit="GB/s",
        limit=limit,
    )


def features(limit: float, tokens: int) -> Case:
    """Features whose products are the first terms of an exponential; bytes are those written."""
    x = torch.randn(tokens, 16, 16).bfloat16()
    i, j = torch.triu_indices(16, 16)
    factors = torch.where(i == j, 32**-0.5, 16**-0.5).bfloat16()

    def peer():
        return (
            torch.cat((torch.ones_like(x[..., :1]), x / 2, x[..., i] * x[..., j] * factors), -1),
        )

    exact = fallback.feature_map(x[:EXACT].double(), "taylor2")
    return Case(
        op="feature_map taylor2",
        dtype="bf16",
        shape=f"{tokens} x 16 x 16",
        ours=lambda: (memkernels.feature_map(x, "taylor2"),),
        peer=peer,
        exact=(exact,),
        work=exact[0].numel() * tokens * x.itemsize,
        unit="GB/s",
        limit=limit,
    )


def cases(bandwidth: float, flops: dict[str, float], scale: int) -> list[Callable[[], Case]]:
    made = []
    for op in "linear_attention", "delta_rule":
        made += [
            lambda op=op: matrices(op, "bf16", flops["f32"], 2048 // scale, backward=False),
            lambda op=op: matrices(op, "f32", flops["f32"], 2048 // scale, backward=False),
            lambda op=op: matrices(op, "f32", flops["f32"], 2048 // scale, backward=True),
        ]
    return [
        *made,
        lambda: step(bandwidth, 64 // scale),
        lambda: selective(flops["f32"], 1024 // scale),
        lambda: diagonal(bandwidth, 2048 // scale),
        lambda: convolution(bandwidth, 4096 // scale),
        lambda: features(bandwidth, 2048 // scale),
    ]
