"""Benchmarks of the scan family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import lookup_peers
import memkernels
import peers
import scan_peers
from bench_attention import BF16, F32
from bench_lookup import BACKWARD, both
from case import Case, short
from memkernels import _measure
from scan_peers import Inputs

CHUNK = 64


def calls(function: Callable, x: Inputs, grad: Tensor | None) -> Callable:
    """Calls of the function; with the gradient of its result, those of all its tensors, which are
    compared in its dtype."""

    def run():
        if grad is None:
            return function(**x)
        leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
        grads = torch.autograd.grad(function(**leaves), list(leaves.values()), grad)
        return lambda: [t.to(grad.dtype) for t in grads]

    return run


def channels_first(
    function: Callable, x: Inputs, grad: Tensor | None, names: Sequence[str]
) -> Callable:
    """The same of a function that has its result, and the named tensors, with tokens last."""
    there = {n: t.movedim(1, -1).contiguous() if n in names else t for n, t in x.items()}
    run_there = calls(function, there, None if grad is None else grad.movedim(1, -1).contiguous())

    def run():
        results = run_there()
        if grad is None:
            return lambda: results.movedim(-1, 1)
        return lambda: [
            t.movedim(-1, 1) if name in names else t for name, t in zip(x, results(), strict=True)
        ]

    return run


def against(adapters: Sequence[Callable], x: Inputs, grad: Tensor | None) -> dict[str, Callable]:
    """Calls of what adapters return as functions of tensors."""
    found = peers.among(adapters, x)
    return {name: calls(function, x, grad) for name, function in found.items()}


def traffic(x: Inputs, out: Tensor, grad: Tensor | None) -> int:
    """Bytes of the tensors, read, and of the result, written; backward, all of them read again,
    and the gradients written."""
    read = sum(t.nbytes for t in x.values())
    return read + out.nbytes + (0 if grad is None else 2 * read + out.nbytes)


def first(op: Callable) -> Callable:
    """The op without the state that it returns, which nobody asked for."""
    return lambda **x: op(**x)[0]


# ---- matrices ------------------------------------------------------------------------------------


def products(x: Inputs, *, backward: bool) -> int:
    """The arithmetic of chunks of 64 tokens, a multiply-add as 2. Products of a chunk with a state
    count ``2 K V`` a token; those inside a chunk are triangles, and count ``C K`` or ``C V``.

    Forward, q reads the state and k writes it (the delta rule's k reads it too); inside, q meets k
    and the result v (k meets k, and a triangular system is solved). Backward, the same without q's
    read and what it meets v for, again; then the state's gradient is read by k and v and written by
    q and the output's gradient, which reads the state (the delta rule: reads and writes by k more),
    and each product inside has two gradients."""
    heads, values = x["v"].shape[-2:]
    keys = x["k"].shape[-1]
    tokens = x["v"][..., 0, 0].numel() * heads
    with_state, of_keys, of_values = (3, 2, 2) if "beta" in x else (2, 1, 1)
    if backward:
        with_state, of_keys, of_values = (11, 8, 7) if "beta" in x else (7, 4, 3)
    inside = CHUNK * (of_keys * keys + of_values * values)
    return tokens * (2 * with_state * keys * values + inside)


def matrices(
    op: Callable,
    gates: str | None,
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 8,
    dim: int = 128,
    dtype: torch.dtype = F32,
    backward: bool = False,
    slow: bool = False,
) -> Case:
    """Gates of "heads" or "channels", or none; with slow peers, for short forwards. Whatever the
    dtype, on a CPU sums and products are float32, and so are the matrix products they are held
    against."""
    q, k, v, dout = torch.randn(4, batch, tokens, heads, dim)
    x = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v}
    if op is memkernels.delta_rule:
        x["beta"] = torch.rand(batch, tokens, heads)
    x = {name: t.to(dtype) for name, t in x.items()}
    if gates:
        x["g"] = -0.01 - torch.rand(q.shape if gates == "channels" else q.shape[:-1]) / 10
    grad = dout.to(dtype) if backward else None
    on_cpu = v.is_cpu
    theirs = against([scan_peers.fla_naive if on_cpu else scan_peers.fla_chunks], x, grad)
    if on_cpu and not backward:
        theirs |= peers.among([scan_peers.onnx_scan, scan_peers.vllm_scan], x)
    if slow:
        theirs |= against([scan_peers.by_token], x, None)
    return Case(
        f"{op.__name__} {short(dtype)} "
        + (f"{batch} x " if batch > 1 else "")
        + f"{tokens} x {heads} x {dim}"
        + (f", decay of {gates}" if gates else "")
        + (f", {BACKWARD}" if backward else ""),
        calls(first(op), x, grad),
        {
            f"matmul {'f32' if on_cpu else short(dtype)}": products(x, backward=backward),
            "read": traffic(x, x["v"], grad),
        },
        theirs,
    )


# ---- channels ------------------------------------------------------------------------------------


def selective(
    tokens: int,
    channels: int,
    states: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = F32,
    backward: bool,
) -> Case:
    """As Mamba calls it. Flops are those of each state of each token without the exponential, which
    all peers share: 6 (decay, input, update, output); backward 4 of them again, and 15 of the
    gradients of h, a, the input, A, B, C and delta."""
    u, delta, z, dout = torch.randn(4, batch, tokens, channels).to(dtype)
    B, C = torch.randn(2, batch, tokens, 1, states).to(dtype)
    x = {
        "u": u,
        "delta": delta,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": B,
        "C": C,
        "D": torch.ones(channels),
        "z": z,
        "delta_bias": torch.rand(channels) - 4,
    }
    grad = dout if backward else None
    ours = partial(memkernels.selective_scan, delta_softplus=True)
    if u.is_cpu:
        theirs = against((scan_peers.selective_scan, scan_peers.selective_mambapy), x, grad)
        if not backward:  # whose autograd takes half a minute
            theirs |= peers.among([scan_peers.selective_channels_first], x)
        others = {"torch exp in cache, once": scan_peers.exponentials(x)}
    else:
        found, others = peers.among([scan_peers.selective_mamba], x), {}
        names = "u", "delta", "B", "C", "z"
        theirs = {name: channels_first(f, x, grad, names) for name, f in found.items()}
    return Case(
        f"selective_scan {short(dtype)} "
        + (f"{batch} x " if batch > 1 else "")
        + f"{tokens} x {channels} x {states}"
        + (f", {BACKWARD}" if backward else ""),
        calls(first(ours), x, grad),
        {
            "flops f32": (25 if backward else 6) * batch * tokens * channels * states,
            "read": traffic(x, u, grad),
        },
        theirs,
        others,
    )


def diagonal(
    batch: int,
    tokens: int,
    channels: int,
    *,
    dtype: torch.dtype = F32,
    constant: bool = False,
    backward: bool = False,
) -> Case:
    """Bytes: x and a read, h written; backward, h, a and its gradient read, those of x and a
    written."""
    x, dout = torch.randn(2, batch, tokens, channels, dtype=dtype)
    a = torch.rand(channels if constant else x.shape) / 5 + 0.8
    if dtype.is_complex:
        a = torch.polar(a, torch.randn(a.shape))
    tensors, grad = {"x": x, "a": a}, dout if backward else None
    adapters = [scan_peers.diagonal_mambapy, scan_peers.diagonal_assoc]
    if x.is_cpu:
        adapters.insert(0, scan_peers.diagonal_loop)
    return Case(
        f"diagonal_scan {'complex' if dtype.is_complex else short(dtype)} "
        f"{batch} x {tokens} x {channels}"
        + (", one decay a channel" if constant else "")
        + (f", {BACKWARD}" if backward else ""),
        calls(first(memkernels.diagonal_scan), tensors, grad),
        {"read": 2 * x.nbytes + a.nbytes + (3 * x.nbytes + 2 * a.nbytes if backward else 0)},
        against(adapters, tensors, grad),
    )


def tokens_first(function: Callable) -> Callable:
    """A function of channels-first x, whatever its strides, of x as it is."""
    return lambda x, **others: function(x=x.mT, **others).mT


def convolution(
    batch: int, tokens: int, channels: int, *, dtype: torch.dtype = F32, backward: bool = False
) -> Case:
    """Four taps, silu. Bytes: x and the result; backward, x, the result's gradient and that of
    x."""
    x = torch.randn(batch, tokens, channels).to(dtype)
    tensors = {"x": x, "weight": torch.randn(channels, 4).to(dtype)}
    tensors["bias"] = torch.randn(channels).to(dtype)
    grad = torch.randn(x.shape).to(dtype) if backward else None
    ours = partial(memkernels.causal_conv1d, activation="silu")
    compiled = lookup_peers.compiled(scan_peers.conv_sum)
    theirs = {
        "torch conv1d, channels first": channels_first(scan_peers.conv1d, tensors, grad, "x"),
        "torch, a sum over taps": calls(scan_peers.conv_sum, tensors, grad),
        "torch.compile, a sum over taps": calls(compiled, tensors, grad),
    }
    if not x.is_cpu:
        for name, function in peers.among([scan_peers.causal_conv], tensors).items():
            theirs[f"{name}, channels first"] = channels_first(function, tensors, grad, "x")
            theirs[name] = calls(tokens_first(function), tensors, grad)
    elif not backward:
        theirs |= peers.among([scan_peers.onnx_conv], tensors)
    out = torch.empty_like(x)
    return Case(
        f"causal_conv1d {short(dtype)} {batch} x {tokens} x {channels}, 4 taps, silu"
        + (f", {BACKWARD}" if backward else ""),
        calls(first(ours), tensors, grad),
        {"read": (5 if backward else 2) * x.nbytes},
        theirs,
        {"torch copy of x, into used memory": lambda: out.copy_(x), "torch clone of x": x.clone},
    )


# ---- steps ---------------------------------------------------------------------------------------


def step(
    name: str,
    ours: Callable,
    plain: Callable,
    x: Inputs,
    *sizes: int,
    adapters: Sequence[Callable] = (),
    megabytes: int,
) -> Case:
    """One token a row, in place: bytes are those of the states, read and written. Sets of states
    larger than the caches take turns; every peer has its own. They are compared in the dtype of the
    inputs."""
    dtype = next(iter(x.values())).dtype
    nbytes = 4 * torch.Size(sizes).numel()
    states = torch.randn(-(-(megabytes << 20) // nbytes), *sizes)

    def in_turns(function: Callable, mine: list[Tensor]) -> Callable:
        turns = itertools.cycle(mine)

        def run():
            results = function(state=next(turns))
            return lambda: [t.to(dtype) for t in results]

        return run

    def own() -> list[Tensor]:
        return [lookup_peers.copied(state) for state in states]

    def theirs(adapter: Callable) -> dict[str, Callable]:
        mine = own()
        return {name: in_turns(function, mine) for name, function in adapter(x, mine).items()}

    def in_place(state):
        return ours(**x, state=state), state

    return Case(
        name,
        in_turns(in_place, own()),
        {"update": 2 * nbytes},
        {
            "torch": in_turns(partial(plain, **x), own()),
            "torch.compile": in_turns(partial(lookup_peers.compiled(plain), **x), own()),
        }
        | peers.among([partial(theirs, adapter) for adapter in adapters]),
    )


def heads_step(
    op: Callable, batch: int, heads: int, dim: int, *, dtype: torch.dtype = F32, megabytes: int
) -> Case:
    """With gates as Gated DeltaNet makes them."""
    q, k, v = torch.randn(3, batch, heads, dim)
    x = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v}
    x = {name: t.to(dtype) for name, t in x.items()}
    a, b = torch.randn(2, batch, heads).to(dtype).float()
    if op is memkernels.delta_rule_step:
        x["beta"] = b.sigmoid()
        plain, vllm = scan_peers.delta_step, scan_peers.vllm_delta_step
    else:
        plain, vllm = scan_peers.linear_step, scan_peers.vllm_linear_step
    adapters = [scan_peers.onnx_step, vllm] if v.is_cpu else [scan_peers.fla_step]
    x["g"] = -F.softplus(a)
    name = f"{op.__name__} {short(dtype)} {batch} x {heads} x {dim}, decay of heads"
    sizes = batch, heads, dim, dim
    return step(name, op, plain, x, *sizes, adapters=adapters, megabytes=megabytes)


def selective_step(batch: int, channels: int, states: int, *, megabytes: int) -> Case:
    x = {
        "u": torch.randn(batch, channels),
        "delta": torch.rand(batch, channels) / 10,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(batch, 1, states),
        "C": torch.randn(batch, 1, states),
    }
    return step(
        f"selective_scan_step f32 {batch} x {channels} x {states}",
        memkernels.selective_scan_step,
        scan_peers.selective_step,
        x,
        batch,
        channels,
        states,
        adapters=[] if x["u"].is_cpu else [scan_peers.mamba_step],
        megabytes=megabytes,
    )


def conv_step(batch: int, channels: int, *, megabytes: int) -> Case:
    x = {"x": torch.randn(batch, channels), "weight": torch.randn(channels, 4)}
    return step(
        f"causal_conv1d_step f32 {batch} x {channels}, 4 taps, silu",
        partial(memkernels.causal_conv1d_step, activation="silu"),
        scan_peers.conv_step,
        x,
        batch,
        channels,
        3,
        adapters=[scan_peers.vllm_conv_step if x["x"].is_cpu else scan_peers.conv_update],
        megabytes=megabytes,
    )


# ---- features and routes -------------------------------------------------------------------------


def features(kind: str, tokens: int, heads: int, dim: int, *, backward: bool = False) -> Case:
    """Bytes: x and its features; backward, x, their gradient and that of x."""
    x = torch.randn(1, tokens, heads, dim)
    ours = partial(memkernels.feature_map, kind=kind)
    out = ours(x)
    grad = torch.randn(out.shape) if backward else None

    def run(function):
        return calls(function, {"x": x}, grad)()

    return Case(
        f"feature_map {kind} f32 {tokens} x {heads} x {dim}"
        + (f", {BACKWARD}" if backward else ""),
        lambda: run(ours),
        {"read": x.nbytes + out.nbytes + (2 * x.nbytes + out.nbytes if backward else 0)},
        both(getattr(scan_peers, kind), run),
    )


def routes(tokens: int, dim: int, choices: int, memories: int) -> Case:
    """To the memories and back. Bytes: each choice's row read, written and read again, and the
    result."""
    x, weights = torch.randn(tokens, dim), torch.rand(tokens, choices)
    ids = torch.rand(tokens, memories).topk(choices).indices

    def ours():
        rows, _, inverse = memkernels.route_tokens(x, ids, memories)
        return rows, memkernels.unroute_tokens(rows, inverse, weights)

    return Case(
        f"route_tokens, unroute_tokens f32 {tokens} x {dim}, {choices} of {memories}",
        ours,
        {f"gather {4 * dim}": (3 * choices + 1) * x.nbytes},
        {"torch argsort, index_add": lambda: scan_peers.routed(x, ids, weights)},
    )


# ---- all -----------------------------------------------------------------------------------------


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        yield from quick_cases()
    else:
        yield from gpu_cases() if _measure.on_gpu() else full_cases()


def full_cases() -> Iterator[Case]:
    delta, linear = memkernels.delta_rule, memkernels.linear_attention
    for dtype in F32, BF16:
        yield matrices(delta, "heads", 512, dtype=dtype, slow=dtype == F32)
        yield matrices(delta, "heads", 4096, dtype=dtype)
    yield matrices(delta, None, 4096)
    for tokens in 512, 4096:
        yield matrices(delta, "heads", tokens, backward=True)
    for dtype in F32, BF16:
        yield matrices(linear, "heads", 4096, dtype=dtype)
    yield matrices(linear, "heads", 4096, backward=True)
    for tokens in 512, 4096:
        yield matrices(delta, "channels", tokens)
    yield matrices(delta, "channels", 512, backward=True)
    yield matrices(linear, "channels", 4096)
    for backward in (False, True):
        yield selective(512, 1536, 16, backward=backward)
    for op in memkernels.linear_attention_step, memkernels.delta_rule_step:
        yield heads_step(op, 256, 8, 128, megabytes=128)
    yield heads_step(op, 256, 8, 128, dtype=BF16, megabytes=128)
    yield selective_step(256, 4096, 16, megabytes=128)
    yield conv_step(256, 4096, megabytes=128)
    for dtype in F32, BF16:
        for backward in (False, True):
            yield convolution(4, 2048, 2048, dtype=dtype, backward=backward)
    for backward in (False, True):
        yield diagonal(4, 2048, 2048, backward=backward)
    yield diagonal(4, 2048, 2048, dtype=torch.complex64, constant=True)
    for backward in (False, True):
        yield features("taylor2", 4096, 16, 16, backward=backward)
        yield features("dpfp", 4096, 8, 64, backward=backward)
    yield routes(8192, 1024, 2, 8)


def gpu_cases() -> Iterator[Case]:
    """Sizes that fill a large GPU, and that its caches cannot hold."""
    delta, linear = memkernels.delta_rule, memkernels.linear_attention
    for batch, tokens, heads in (1, 8192, 96), (8, 2048, 16):
        for op, gates in itertools.product((delta, linear), ("heads", "channels")):
            for backward in (False, True):
                sizes = {"batch": batch, "heads": heads, "dtype": BF16}
                yield matrices(op, gates, tokens, backward=backward, **sizes)
    yield matrices(delta, None, 8192, heads=96, dtype=BF16)
    yield matrices(delta, "heads", 8192, heads=96)
    for batch, tokens in (8, 2048), (1, 16384):
        for backward in (False, True):
            sizes = {"batch": batch, "dtype": BF16}
            yield selective(tokens, 4096, 16, backward=backward, **sizes)
    for op in memkernels.linear_attention_step, memkernels.delta_rule_step:
        for batch, heads in (256, 32), (1, 32), (1, 8):
            yield heads_step(op, batch, heads, 128, dtype=BF16, megabytes=1024)
    yield selective_step(1024, 8192, 16, megabytes=1024)
    yield conv_step(4096, 8192, megabytes=1024)
    for dtype in BF16, F32:
        for backward in (False, True):
            yield convolution(8, 4096, 4096, dtype=dtype, backward=backward)
    for backward in (False, True):
        yield diagonal(8, 4096, 4096, backward=backward)
    yield diagonal(8, 4096, 4096, dtype=BF16)
    yield diagonal(4, 4096, 4096, dtype=torch.complex64, constant=True)
    for backward in (False, True):
        yield features("taylor2", 65536, 16, 16, backward=backward)
        yield features("dpfp", 65536, 8, 64, backward=backward)
    yield routes(65536, 1024, 2, 8)


def quick_cases() -> Iterator[Case]:
    for op in memkernels.delta_rule, memkernels.linear_attention:
        for gates in "heads", "channels":
            yield matrices(op, gates, 128, heads=2, dim=32, slow=True)
            yield matrices(op, gates, 128, heads=2, dim=32, backward=True)
        yield matrices(op, "heads", 128, heads=2, dim=32, dtype=BF16)
    yield matrices(memkernels.delta_rule, None, 128, heads=2, dim=32)
    for backward in (False, True):
        yield selective(32, 64, 8, backward=backward)
        yield convolution(2, 32, 64, backward=backward)
        yield diagonal(2, 32, 64, backward=backward)
    yield features("taylor2", 16, 2, 8, backward=True)
    yield features("dpfp", 16, 2, 8)
    yield diagonal(2, 32, 64, dtype=torch.complex64, constant=True)
    for op in memkernels.linear_attention_step, memkernels.delta_rule_step:
        yield heads_step(op, 4, 2, 32, megabytes=1)
    yield heads_step(op, 4, 2, 32, dtype=BF16, megabytes=1)
    yield selective_step(4, 64, 16, megabytes=1)
    yield conv_step(4, 64, megabytes=1)
    yield routes(64, 32, 2, 4)
