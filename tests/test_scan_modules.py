"""The scan modules against plain torch, and sequences in pieces against whole ones."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from memkernels.nn import GatedDeltaNet, GatedDeltaState, InfiniAttention, InfiniState
from module_checks import assert_alike, draw, randomise, reloaded, rms, shapes
from tolerance import assert_same_bits, unchanged

DIM = 12
CUTS = [[1] * 11, [7, 1, 0, 3], [4, 7]]


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def in_pieces(layer, counts):
    """A function of x that calls the layer on these many tokens after each other."""

    def run(x):
        outs, state = [], None
        for piece in x.split(counts, 1):
            out, state = layer(piece, state, return_state=True)
            outs.append(out)
        return torch.cat(outs, 1)

    return run


# ---- gated delta nets ----------------------------------------------------------------------------


def small_net(**options):
    sizes = {"num_v_heads": 4, "expand_v": 1.5, "dtype": torch.float64}
    return randomise(GatedDeltaNet(DIM, 2, 4, **(sizes | options)))


def plain_net(m, num_heads=2, largest_beta=1):
    """With loops over lags for the convolutions and over tokens for the rule."""

    def conv(x, weight):
        size = weight.shape[-1]
        lagged = (F.pad(x, (0, 0, size - 1 - i, 0))[:, : x.shape[1]] for i in range(size))
        return F.silu(sum(x * weight[:, 0, i] for i, x in enumerate(lagged)))

    def run(x):
        batch, length, _ = x.shape
        heads = len(m.A_log)
        q, k = (
            conv(project(x), c.weight).view(batch, length, num_heads, -1)
            for project, c in ((m.q_proj, m.q_conv1d), (m.k_proj, m.k_conv1d))
        )
        q, k = (
            (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(
                heads // num_heads, 2
            )
            for x in (q, k)
        )
        v = conv(m.v_proj(x), m.v_conv1d.weight).view(batch, length, heads, -1)
        decay = (-m.A_log.exp() * F.softplus(m.a_proj(x) + m.dt_bias)).exp()
        beta = largest_beta * m.b_proj(x).sigmoid()
        memory, outs = x.new_zeros(batch, heads, q.shape[-1], v.shape[-1]), []
        for t in range(length):
            memory = memory * decay[:, t, :, None, None]
            given = torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
            u = beta[:, t, :, None] * (v[:, t] - given)
            memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
            outs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]) * q.shape[-1] ** -0.5)
        o = rms(torch.stack(outs, 1), m.o_norm.weight, 1e-5).flatten(2)
        return m.o_proj(o * F.silu(m.g_proj(x)))

    return run


@pytest.mark.parametrize(
    "options",
    [{}, {"num_v_heads": None, "expand_v": 2}, {"allow_neg_eigval": True, "conv_size": 2}],
    ids=lambda options: ", ".join(options),
)
def test_net_is_its_formula(options):
    net = small_net(**options)
    plain = plain_net(net, largest_beta=2 if options.get("allow_neg_eigval") else 1)
    assert_alike(net, draw(2, 11, DIM), net, plain)
    for shape in (2, 0, DIM), (0, 3, DIM):
        assert net(draw(*shape)).shape == shape


def test_state_of_a_net():
    net = small_net()
    assert shapes(net) == {
        "A_log": (4,),
        "dt_bias": (4,),
        "q_proj.weight": (8, DIM),
        "k_proj.weight": (8, DIM),
        "v_proj.weight": (24, DIM),
        "q_conv1d.weight": (8, 1, 4),
        "k_conv1d.weight": (8, 1, 4),
        "v_conv1d.weight": (24, 1, 4),
        "a_proj.weight": (4, DIM),
        "b_proj.weight": (4, DIM),
        "g_proj.weight": (24, DIM),
        "o_norm.weight": (6,),
        "o_proj.weight": (DIM, 24),
    }
    fresh = GatedDeltaNet(DIM, 2, 4, num_v_heads=4, expand_v=1.5, dtype=torch.float64)
    x = draw(2, 5, DIM)
    assert_same_bits(reloaded(net, fresh)(x), net(x))

    begun = GatedDeltaNet(DIM, 1, 4, num_v_heads=1000)
    assert begun.A_log.exp().min() >= 0 and 12 < begun.A_log.exp().max() <= 16
    steps = F.softplus(begun.dt_bias)
    torch.testing.assert_close(steps.aminmax(), (steps.new_tensor(1e-3), steps.new_tensor(0.1)),
                               rtol=0.1, atol=0)  # fmt: skip


@pytest.mark.parametrize("counts", CUTS, ids=str)
def test_net_in_pieces(counts):
    net = small_net()
    assert_alike(net, draw(2, 11, DIM), in_pieces(net, counts), net)


def test_packed_sequences_do_not_meet():
    net, lengths = small_net(), [5, 0, 1, 12]
    x = draw(1, 18, DIM)
    out, state = net(x, cu_seqlens=bounds(lengths), return_state=True)
    more_lengths = [0, 2, 3, 1]
    more = draw(1, 6, DIM, seed=1)
    again, end = net(more, state, bounds(more_lengths).int(), return_state=True)

    pieces = (t.split(sizes, 1) for t, sizes in ((x, lengths), (out, lengths)))
    later = (t.split(sizes, 1) for t, sizes in ((more, more_lengths), (again, more_lengths)))
    for n, (x, out, more, again) in enumerate(zip(*pieces, *later, strict=True)):
        alone, own = net(x, return_state=True)
        torch.testing.assert_close(out, alone)
        alone, own = net(more, own, return_state=True)
        torch.testing.assert_close(again, alone)
        torch.testing.assert_close(tuple(t[n : n + 1] for t in end), tuple(own))


@torch.no_grad()
def test_net_decodes():
    """From a prompt, in slots of a pool, beside rows that have none."""
    net, x = small_net(), draw(2, 11, DIM)
    whole, end = net(x, return_state=True)
    _, state = net(x[:, :6], return_state=True)
    pool, slots = net.make_state(5), torch.tensor([3, -1, 0])
    for held, new in zip(pool, state, strict=True):
        held[[3, 0]] = new
        held[1] = torch.nan  # no slot of ours
    for t in range(6, 11):
        torch.testing.assert_close(net.step(x[:, t], state), whole[:, t])
        out = net.step(x[[0, 0, 1], t], pool, slots)
        torch.testing.assert_close(out[[0, 2]], whole[:, t])
        assert not out[1].any()
    torch.testing.assert_close(tuple(state), tuple(end))
    torch.testing.assert_close(tuple(held[[3, 0]] for held in pool), tuple(end))
    assert all(held[1].isnan().all() and not held[[2, 4]].any() for held in pool)

    begun = net.make_state(2)
    for t in range(3):
        torch.testing.assert_close(net.step(x[:, t], begun), whole[:, t])


def test_state_of_a_net_does_not_grow():
    net = small_net(dtype=torch.float32)
    expected = [(2, 4, 4, 6), (2, 8, 3), (2, 8, 3), (2, 24, 3)]
    for length in 0, 1, 50:
        _, state = net(draw(2, length, DIM, dtype=torch.float32), return_state=True)
        assert [tuple(t.shape) for t in state] == expected
        assert sum(t.untyped_storage().nbytes() for t in state) == 4 * 2 * (96 + 3 * 40)
    assert [tuple(t.shape) for t in net.make_state(2)] == expected


def test_net_in_bfloat16_and_under_autocast():
    x = draw(2, 6, DIM, dtype=torch.float32)
    net = small_net(dtype=torch.float32)
    exact = net(x)
    narrow = small_net(dtype=torch.bfloat16)
    out, state = narrow(x.bfloat16(), return_state=True)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
    assert [t.dtype for t in state] == [torch.float32] + 3 * [torch.bfloat16]
    assert [t.dtype for t in narrow.make_state(1)] == [t.dtype for t in state]

    for outer, inner in (net, torch.bfloat16), (narrow, None):
        with torch.autocast("cpu"), torch.no_grad():
            state = outer.make_state(2, dtype=inner)
            steps = torch.stack([outer.step(token, state) for token in x.unbind(1)], 1)
            out, end = outer(x, return_state=True)
        assert [t.dtype for t in end] == [t.dtype for t in state]
        torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
        torch.testing.assert_close(steps.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.full
def test_net_under_the_compiler():
    net, x = small_net(), draw(2, 6, DIM)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_alike(net, x, in_pieces(compiled, [4, 2]), net)
    step = torch.compile(net.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        states = [net.make_state(3) for _ in range(2)]
        for token in x.unbind(1):
            slots = torch.tensor([2, 0])
            outs = [run(token, s, slots) for run, s in zip((step, net.step), states, strict=True)]
            torch.testing.assert_close(*outs)
        torch.testing.assert_close(*states)


def test_errors_of_a_net():
    for options, message in (
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of 2, got 3"),
        ({"expand_v": 1.3}, "head_dim * expand_v must be whole, got 4 * 1.3"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"GatedDeltaNet: {message}")):
            small_net(**options)
    net = small_net()
    with pytest.raises(RuntimeError, match=re.escape("x must be [B, T, 12], got [3, 12]")):
        net(draw(3, DIM))
    with pytest.raises(RuntimeError, match=re.escape("x must be [B, 12], got [3, 11]")):
        net.step(draw(3, 11), net.make_state(3))


def test_a_step_that_fails_changes_nothing():
    net, x = small_net(), draw(3, DIM)
    state = GatedDeltaState(*(t + 1 for t in net.make_state(3)))
    wrong = (
        (state._replace(memory=state.memory[:2]), None, "conv_q must be [2, 8, 3], got [3, 8, 3]"),
        (state._replace(memory=state.memory.float()), None, "memory must be torch.float64"),
        (state._replace(conv_v=state.conv_v[:, 1:]), None, "conv_v must be [3, 24, 3]"),
        (state, torch.tensor([0, 0, 1]), "state_indices"),
        (state, torch.tensor([0, 3, 1]), "state_indices"),
    )
    with torch.no_grad():
        for given, slots, message in wrong:
            with unchanged(*state), pytest.raises(RuntimeError, match=re.escape(message)):
                net.step(x, given, slots)
    with unchanged(*state), pytest.raises(RuntimeError, match="not differentiable"):
        net.step(x, state)


def test_a_net_learns_to_recall():
    """Which value followed a key before: no token says it, so the state must."""
    torch.manual_seed(0)
    embedding, net = torch.nn.Embedding(16, 32), GatedDeltaNet(32, 2, 16)
    head = torch.nn.Linear(32, 16)
    model = torch.nn.ModuleList([embedding, net, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        pairs = torch.stack([torch.stack([torch.randperm(8), 8 + torch.randperm(8)], 1)
                             for _ in range(16)])  # fmt: skip
        tokens = torch.cat((pairs, pairs), 1).flatten(1)  # [16, 32]: what comes again is known
        x = embedding(tokens)
        logits = head(x + net(x))[:, 16::2]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 17::2].flatten())
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


# ---- attention in segments -----------------------------------------------------------------------


def small_attention(segment_len=4, **options):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "dtype": torch.float64}
    return randomise(InfiniAttention(DIM, segment_len=segment_len, **(sizes | options)))


def rotated(x, base):
    """x ``[n, D]``, with pairs as complex numbers."""
    half = x.shape[1] // 2
    speed = base ** -(torch.arange(half, dtype=x.dtype) / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(
        1j * torch.arange(len(x))[:, None] * speed
    )
    return torch.cat((turned.real, turned.imag), 1)


def plain_attention(m, segment_len=4, group=2, delta=True, base=10000.0):
    """With loops over sequences, heads and segments."""

    def head(gate, *qkv):
        dim = qkv[0].shape[1]
        memory, z, outs = gate.new_zeros(dim, dim), gate.new_zeros(dim), []
        for q, k, v in zip(*(x.split(segment_len) for x in qkv), strict=True):
            fq, fk = (F.elu(x) + 1 for x in (q, k))
            found = fq @ memory / (fq @ z + 1e-6)[:, None]
            if base is not None:
                q, k = rotated(q, base), rotated(k, base)
            logits = q @ k.T * k.shape[1] ** -0.5
            hidden = torch.ones_like(logits, dtype=torch.bool).triu(1)
            local = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
            outs.append(gate.sigmoid() * found + (1 - gate.sigmoid()) * local)
            u = v - fk @ memory / (fk @ z + 1e-6)[:, None] if delta else v
            memory, z = memory + fk.T @ u, z + fk.sum(0)
        return torch.cat(outs)

    def run(x):
        dim = m.o_proj.in_features // len(m.gate)
        q, k, v = (p(x).unflatten(2, (-1, dim)) for p in (m.q_proj, m.k_proj, m.v_proj))
        rows = [
            torch.cat(
                [
                    head(m.gate[h], q[b, :, h], k[b, :, h // group], v[b, :, h // group])
                    for h in range(q.shape[2])
                ],
                1,
            )
            for b in range(len(x))
        ]
        return m.o_proj(torch.stack(rows))

    return run


@pytest.mark.parametrize("length", [3, 8, 11])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": None, "delta": False}, {"num_kv_heads": 1, "rope_base": None}],
    ids=lambda options: ", ".join(options),
)
def test_attention_is_its_formula(options, length):
    layer = small_attention(**options)
    group = {"num_kv_heads": 2} | options
    plain = plain_attention(
        layer,
        group=4 // (group["num_kv_heads"] or 4),
        delta=options.get("delta", True),
        base=options.get("rope_base", 10000.0),
    )
    assert_alike(layer, draw(2, length, DIM), layer, plain)


@pytest.mark.parametrize("counts", CUTS, ids=str)
def test_attention_in_pieces(counts):
    layer = small_attention()
    assert_alike(layer, draw(2, 11, DIM), in_pieces(layer, counts), layer)


def test_attention_without_tokens():
    layer = small_attention()
    for shape in (2, 0, DIM), (0, 5, DIM):
        out, state = layer(draw(*shape), return_state=True)
        assert out.shape == shape
    _, state = layer(draw(2, 6, DIM), return_state=True)
    _, same = layer(draw(2, 0, DIM), state, return_state=True)
    assert_same_bits(tuple(same), tuple(state))


def test_what_attention_remembers():
    """Nothing of an earlier segment but what is in the state, which has no more than a segment."""
    layer, x = small_attention(), draw(2, 9, DIM)
    _, state = layer(x, return_state=True)
    assert [tuple(t.shape) for t in state] == [(2, 2, 6, 6), (2, 2, 6), (2, 1, 2, 6), (2, 1, 2, 6)]
    sizes = []
    for length in range(4, 20):
        _, state = layer(draw(2, length, DIM), return_state=True)
        sizes.append(sum(t.untyped_storage().nbytes() for t in state))
    assert len(set(sizes)) == 4 and sizes[:4] == sizes[4:8] == sizes[12:]

    with torch.no_grad():
        layer.gate.fill_(-torch.inf)  # no memory
    changed = x.clone()
    changed[:, :4] = 1
    assert_same_bits(layer(x)[:, 4:], layer(changed)[:, 4:])
    with torch.no_grad():
        layer.gate.fill_(torch.inf)  # nothing else
    assert not layer(x)[:, :4].any()
    assert (layer(x)[:, 4:] != layer(changed)[:, 4:]).all()


def test_gradients_end_where_a_state_is_detached():
    layer, x = small_attention(), draw(2, 8, DIM).requires_grad_()
    for detach in False, True:
        _, state = layer(x[:, :6], return_state=True)
        if detach:
            state = InfiniState(*(t.detach() for t in state))
        (grad,) = torch.autograd.grad(layer(x[:, 6:], state).sum(), x)
        assert grad[:, 6:].any() and bool(grad[:, :6].any()) == (not detach)


def test_attention_in_bfloat16_and_under_autocast():
    x = draw(2, 11, DIM, dtype=torch.float32)
    layer = small_attention(dtype=torch.float32)
    exact, expected = layer(x, return_state=True)
    narrow = small_attention(dtype=torch.bfloat16)
    with torch.autocast("cpu"):
        mixed = layer(x, return_state=True)
    for out, state in narrow(x.bfloat16(), return_state=True), mixed:
        assert out.dtype == torch.bfloat16
        assert [t.dtype for t in state] == 2 * [torch.float32] + 2 * [torch.bfloat16]
        torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
        # The sums are exact: what differs are the keys.
        torch.testing.assert_close(state.z, expected.z, rtol=0.01, atol=0.01)


@pytest.mark.full
def test_attention_under_the_compiler():
    layer, x = small_attention(), draw(2, 11, DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_alike(layer, x, in_pieces(compiled, [6, 5]), layer)


def test_errors_of_attention():
    for options, message in (
        ({"num_kv_heads": 3}, "num_heads must be a multiple of 3, got 4"),
        ({"num_heads": 5, "num_kv_heads": 5, "head_dim": None}, "dim must be a multiple of 5"),
        ({"head_dim": 5}, "head_dim must be even to be rotated, got 5"),
        ({"segment_len": 0}, "segment_len must be at least 1, got 0"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"InfiniAttention: {message}")):
            small_attention(**options)
    layer, x = small_attention(), draw(2, 3, DIM)
    with pytest.raises(RuntimeError, match=re.escape("x must be [B, T, 12], got [2, 3, 11]")):
        layer(x[..., :-1])
    _, state = layer(x, return_state=True)
    for given, message in (
        (InfiniState(*(t[:1] for t in state)), "memory must be [2, 2, 6, 6], got [1, 2, 6, 6]"),
        (state._replace(v=state.v[:, 1:]), "v must be [2, 3, 2, 6], got [2, 2, 2, 6]"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            layer(x, given)
    with pytest.raises(RuntimeError, match=re.escape("fewer tokens than a segment's 3, got 3")):
        small_attention(segment_len=3)(x, state)
