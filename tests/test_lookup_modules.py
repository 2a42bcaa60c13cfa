"""The lookup modules against compositions of plain NumPy and torch, the optimisers of their tables
against those of torch, and tables on disk."""

from __future__ import annotations

import io
import mmap
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memkernels
from memkernels.nn import PEER, Engram, ProductKeyMemory, RowAdagrad, RowAdam, RowSGD, open_table
from module_checks import assert_alike, draw, randomise, reloaded, rms, shapes
from tolerance import assert_same_bits

DIM = 12

# ---- product keys --------------------------------------------------------------------------------


def best(query, keys, k):
    """Scores and slots of queries ``[T, H, 2, d]``: the k best of all pairs."""
    halves = torch.einsum("thpd,hpnd->thpn", query, keys)
    sums = halves[:, :, 0, :, None] + halves[:, :, 1, None, :]
    return sums.flatten(2).topk(k)


def plain_memory(m, k, activation="softmax", norm="rms"):
    def run(x):
        tokens = x.flatten(0, -2)
        query = m.query_proj(tokens).view(len(tokens), *m.keys.shape[:2], -1)
        keys = m.keys
        if norm == "rms":
            query, keys = rms(query, m.query_norm.weight), rms(keys, m.key_norm.weight)
        elif norm == "layer":
            query = F.layer_norm(query, query.shape[-1:], m.query_norm.weight, m.query_norm.bias)
        scores, slots = best(query, keys, k)
        weights = scores.relu() if activation == "relu" else scores.softmax(-1)
        out = (weights[..., None] * m.values[slots]).sum((1, 2))
        if m.gate_proj is not None:
            out = out * F.silu(m.gate_proj(tokens))
        if m.value_proj is not None:
            out = m.value_proj(out)
        return out.view(*x.shape[:-1], -1)

    return run


def small_memory(num_keys=7, **options):
    sizes = {"heads": 3, "k": 5, "key_dim": 8, "dtype": torch.float64}
    return randomise(ProductKeyMemory(DIM, num_keys, **(sizes | options)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": None, "activation": "relu"},
        {"norm": "layer", "gate": True, "bias": True},
        {"gate": True, "value_dim": 6, "sparse": True},
        {"dim_out": 9},
        {"dim_out": 9, "value_dim": 6, "heads": 1, "k": 1},
    ],
    ids=lambda options: ", ".join(options),
)
def test_memory_is_its_formula(options):
    memory = small_memory(**options)
    same = {name: options[name] for name in ("activation", "norm") if name in options}
    plain = plain_memory(memory, options.get("k", 5), **same)
    assert_alike(memory, draw(2, 4, DIM), memory, plain)
    assert memory(draw(2, 0, DIM)).shape == (2, 0, options.get("dim_out", DIM))


def test_memory_at_scale():
    memory = ProductKeyMemory.at_scale(DIM, 40)
    assert shapes(memory) == {
        "keys": (4, 2, 40, 256),
        "values": (1600, DIM),
        "query_proj.weight": (4 * 512, DIM),
        "query_proj.bias": (4 * 512,),
        "query_norm.weight": (256,),
        "key_norm.weight": (256,),
        "gate_proj.weight": (DIM, DIM),
        "gate_proj.bias": (DIM,),
        "value_proj.weight": (DIM, DIM),
        "value_proj.bias": (DIM,),
    }
    assert memory.values.std().item() == pytest.approx(DIM**-0.5, rel=0.1)
    assert memory.lookup(torch.randn(3, DIM))[1].shape == (3, 4, 32)
    own = ProductKeyMemory.at_scale(DIM, 40, key_dim=8, value_dim=5, bias=False)
    assert shapes(own)["value_proj.weight"] == (DIM, 5) and own.keys.shape[-1] == 4
    plain = ProductKeyMemory(DIM, 40, norm=None)
    assert list(shapes(plain)) == ["keys", "values", "query_proj.weight"]


def test_scores_begin_with_the_variance_of_attention():
    memory = ProductKeyMemory(64, 128, key_dim=64, heads=2, k=1)
    query = memory.query_norm(memory.query_proj(torch.randn(200, 64)).view(200, 2, 2, 32))
    scores = torch.einsum("thpd,hpnd->thpn", query, memory.key_norm(memory.keys))
    assert scores.std().item() == pytest.approx(1, rel=0.1)


def test_lookup_tells_which_slots_are_used():
    memory = small_memory(sparse=True)
    x = draw(4, DIM)
    scores, slots = memory.lookup(x)
    assert scores.shape == slots.shape == (4, 3, 5) and slots.dtype == torch.int64
    assert (scores.diff() <= 0).all()
    memory(x).sum().backward()
    assert_same_bits(memory.values.grad.coalesce().indices()[0], slots.unique())


@pytest.mark.parametrize("sparse", [False, True])
def test_layers_share_values(sparse):
    first = small_memory(sparse=sparse)
    second = small_memory(sparse=sparse, values=first.values)
    model = nn.ModuleList([first, second])
    assert sum(p is first.values for p in model.parameters()) == 1

    def both(x):
        return second(first(x))

    plain = [plain_memory(m, 5) for m in model]
    assert_alike(model, draw(4, DIM), both, lambda x: plain[1](plain[0](x)))

    state = model.state_dict()
    assert state["0.values"].data_ptr() == state["1.values"].data_ptr()
    values = nn.Parameter(torch.zeros_like(first.values))
    twins = nn.ModuleList(small_memory(values=values) for _ in range(2))
    reloaded(model, twins)
    assert twins[0].values is twins[1].values
    assert_same_bits(twins[1](twins[0](draw(4, DIM))), both(draw(4, DIM)))


def test_memory_in_bfloat16_and_under_autocast():
    x = draw(4, DIM, dtype=torch.float32)
    narrow = small_memory(dtype=torch.bfloat16, gate=True)
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    values = nn.Parameter(torch.randn(49, DIM, dtype=torch.bfloat16))
    mixed = small_memory(dtype=torch.float32, values=values, gate=True)
    assert mixed(x).dtype == torch.float32
    with torch.autocast("cpu"):
        out = small_memory(dtype=torch.float32, gate=True)(x)
    torch.testing.assert_close(
        out.float(), small_memory(dtype=torch.float32, gate=True)(x), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_dim": 5}, "key_dim must be even, got 5"),
        ({"norm": "batch"}, "norm must be rms, layer or None, got batch"),
        ({"activation": "gelu"}, "activation must be softmax or relu, got gelu"),
        (
            {"values": nn.Parameter(torch.zeros(48, DIM))},
            f"values must be [49, {DIM}], got [48, {DIM}]",
        ),
    ],
)
def test_memory_errors(options, message):
    with pytest.raises(RuntimeError, match=re.escape(f"ProductKeyMemory: {message}")):
        small_memory(**options)


# ---- experts -------------------------------------------------------------------------------------


def small_peer(**options):
    sizes = {"heads": 3, "k": 4, "key_dim": 8, "dtype": torch.float64}
    return randomise(PEER(DIM, 6, **(sizes | options)))


@pytest.mark.parametrize("options", [{}, {"dim_out": 5, "activation": "silu", "norm": "rms"}])
def test_experts_are_their_formula(options):
    layer = small_peer(**options)
    act = F.silu if options else F.gelu

    def plain(x):
        query = layer.query_proj(x).view(len(x), 3, 2, 4)
        keys = layer.keys
        if options:
            query = rms(query, layer.query_norm.weight)
            keys = rms(keys, layer.key_norm.weight)
        scores, experts = best(query, keys, 4)
        hidden = act(torch.einsum("td,thkd->thk", x, layer.up[experts]))
        return torch.einsum("thk,thkd->td", scores.softmax(-1) * hidden, layer.down[experts])

    assert_alike(layer, draw(7, DIM), layer, plain)
    assert layer(draw(2, 0, DIM)).shape == (2, 0, options.get("dim_out", DIM))


def test_experts_with_the_weights_of_other_layouts():
    """Queries with the halves outermost and keys [H, N, 2, d], as in PEER-pytorch."""
    layer, x = small_peer(), draw(7, DIM)
    outer = draw(2 * 3 * 4, DIM, seed=1)  # [2 * H * d, DIM]
    keys = draw(3, 6, 2, 4, seed=2)
    query = (x @ outer.T).view(7, 2, 3, 4).transpose(1, 2)
    scores, experts = best(query, keys.transpose(1, 2), 4)
    hidden = F.gelu(torch.einsum("td,thkd->thk", x, layer.up[experts])) * scores.softmax(-1)
    expected = torch.einsum("thk,thkd->td", hidden, layer.down[experts])
    with torch.no_grad():
        layer.query_proj.weight.copy_(outer.view(2, 3, 4, DIM).transpose(0, 1).reshape(-1, DIM))
        layer.keys.copy_(keys.transpose(1, 2))
    torch.testing.assert_close(layer(x), expected)


def test_state_of_experts():
    layer = small_peer(dim_out=5)
    assert shapes(layer) == {
        "keys": (3, 2, 6, 4),
        "up": (36, DIM),
        "down": (36, 5),
        "query_proj.weight": (24, DIM),
    }
    fresh = PEER(DIM, 6, 5, heads=3, k=4, key_dim=8, dtype=torch.float64)
    x = draw(3, DIM)
    assert_same_bits(reloaded(layer, fresh)(x), layer(x))
    with torch.autocast("cpu"):
        assert torch.isfinite(small_peer(dtype=torch.float32)(x.float())).all()
    assert PEER(DIM, 6, k=4).keys.shape == (8, 2, 6, DIM // 2)


# ---- n-grams -------------------------------------------------------------------------------------

PRIMES = [31, 37, 41, 43]  # from 30 on


def small_engram(moduli=30, **options):
    sizes = {"heads": 2, "head_dim": 3, "dtype": torch.float64, "pad_id": 1}
    return randomise(Engram(DIM, 50, moduli, **(sizes | options)))


def draw_tokens(*shape, seed=0, vocab_size=50):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


def plain_engram(m, token_ids, orders=(2, 3), moduli=PRIMES, pad=1, eos=None, sign=torch.sign):
    """Of a batch, with a loop over all tokens for the hash and over lags for the convolution."""
    starts = np.cumsum([0, *moduli])[:-1]
    heads = len(moduli) // len(orders)
    multipliers = m.multipliers.tolist()

    def rows(ids, t):
        grams, ended = [], False
        for j in range(max(orders)):
            token = ids[t - j] if t >= j else pad
            ended = ended or (j > 0 and token == eos)
            grams.append(eos if ended else token)
        for h, modulus in enumerate(moduli):
            mix = 0
            for j in range(orders[h // heads]):
                mix ^= grams[j] * multipliers[j]
            yield mix % modulus + starts[h]

    index = [[list(rows(ids, t)) for t in range(len(ids))] for ids in token_ids.tolist()]
    index = torch.tensor(index)

    def run(hidden):
        e = m.weight[index].flatten(2)
        channels = m.gate_weight.shape[0]
        hidden = hidden.view(*token_ids.shape, channels, DIM)
        k = m.key_proj(e).unflatten(-1, (channels, DIM))
        d = (rms(hidden, m.gate_weight) * rms(k, 1)).sum(-1) / DIM**0.5
        gate = (sign(d) * d.abs().clamp(min=1e-6).sqrt()).sigmoid()
        v = gate[..., None] * m.value_proj(e)[:, :, None]
        if m.conv is None:
            return v
        normed, length = rms(v, m.conv_norm), v.shape[1]
        taps = m.conv.weight[:, 0].view(channels, DIM, -1)
        spread = 0
        for j in range(taps.shape[-1]):
            lag = (taps.shape[-1] - 1 - j) * max(orders)
            lagged = F.pad(normed, (0, 0, 0, 0, lag, 0))[:, :length]
            spread = spread + lagged * taps[..., j]
        return v + F.silu(spread)

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 4},
        {"channels": 2, "conv_size": 0, "sparse": True},
        {"channels": 1, "conv_size": 2, "eos_id": 3, "sign": "copy"},
        {"channels": 3, "orders": (1, 4), "seed": 7},
    ],
    ids=lambda options: ", ".join(options),
)
def test_engram_is_its_formula(options):
    engram = small_engram(**options)
    token_ids = draw_tokens(2, 23, vocab_size=6 if "eos_id" in options else 50)
    same = {"orders": options.get("orders", (2, 3)), "eos": options.get("eos_id")}
    plain = plain_engram(engram, token_ids, **same)
    hidden = draw(2, 23, options["channels"], DIM)
    assert_alike(engram, hidden, lambda hidden: engram(hidden, token_ids), plain)


def test_hashes_are_the_released_ones():
    """Multipliers and moduli as the released code makes them, of its second layer."""
    bound = (2**63 - 1) // 99_092 // 2
    expected = np.random.default_rng(5 + 10007 * 15).integers(0, bound, 3, dtype=np.int64) * 2 + 1
    sieve = np.ones(10_000, dtype=bool)
    for n in range(2, 100):
        sieve[n * n :: n] = False
    primes = np.flatnonzero(sieve)
    primes = primes[primes >= 5000].tolist()
    sizes = {"heads": 4, "head_dim": 1, "dtype": torch.float64}
    first = Engram(DIM, 99_092, 5000, seed=5 + 10007, **sizes)
    after = int(first.moduli[-1]) + 1
    second = Engram(DIM, 99_092, after, seed=5 + 10007 * 15, **sizes)
    assert second.multipliers.tolist() == expected.tolist()
    assert first.moduli.tolist() + second.moduli.tolist() == primes[:16]
    assert second.offsets.tolist() == np.cumsum([0, *primes[8:15]]).tolist()
    assert (expected * 99_091 > 0).all() and 99_091 * int(expected.max()) < 2**63


def test_hashes_can_be_given():
    moduli, multipliers = torch.tensor([10, 11, 12, 13]), torch.tensor([-3, 5, 2**62 + 1])
    engram = small_engram(moduli, multipliers=multipliers, channels=2)
    token_ids, hidden = draw_tokens(1, 9), draw(1, 9, 2, DIM)
    rows = memkernels.ngram_hash(
        token_ids, multipliers, moduli, torch.tensor([0, 10, 21, 33]), orders=[2, 3], pad_id=1
    )
    torch.testing.assert_close(engram.embed(token_ids), engram.weight[rows[0]].flatten(1))
    fresh = small_engram(moduli + 1 - 1, channels=2)
    assert_same_bits(reloaded(engram, fresh)(hidden, token_ids), engram(hidden, token_ids))
    for name, wrong in ("moduli", moduli[:3]), ("multipliers", multipliers.int()):
        given = {"moduli": moduli, "multipliers": multipliers, name: wrong}
        with pytest.raises(RuntimeError, match=f"Engram: {name} must be"):
            small_engram(**given)


def test_state_of_an_engram():
    engram = small_engram(channels=2)
    assert shapes(engram) == {
        "weight": (sum(PRIMES), 3),
        "gate_weight": (2, DIM),
        "conv_norm": (2, DIM),
        "multipliers": (3,),
        "moduli": (4,),
        "offsets": (4,),
        "key_proj.weight": (2 * DIM, 12),
        "value_proj.weight": (DIM, 12),
        "conv.weight": (2 * DIM, 1, 4),
    }
    begun = Engram(DIM, 50, 30, heads=2, head_dim=3)
    assert not begun.conv.weight.any() and (begun.gate_weight == 1).all()


def in_steps(engram, hidden, token_ids, counts):
    outs, past = [], {}
    for h, ids in zip(hidden.split(counts, 1), token_ids.split(counts, 1), strict=True):
        out, past = engram(h, ids, **past, return_past=True)
        outs.append(out)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("conv_size", [0, 4])
def test_steps_go_on_where_others_ended(conv_size):
    engram = small_engram(channels=2, conv_size=conv_size, eos_id=3)
    token_ids, hidden = draw_tokens(3, 20, vocab_size=8), draw(3, 20, 2, DIM)
    whole = engram(hidden, token_ids)
    for counts in [1] * 20, [13, 1, 1, 0, 5], [2, 18]:
        torch.testing.assert_close(in_steps(engram, hidden, token_ids, counts), whole)
    _, past = engram(hidden[:, :1], token_ids[:, :1], return_past=True)
    assert past["past_ids"].tolist() == [[1, token] for token in token_ids[:, 0].tolist()]
    assert (past["past_values"] is None) == (conv_size == 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_do_not_meet(dtype):
    engram = small_engram(channels=2)
    lengths = [5, 0, 1, 12]
    token_ids, hidden = draw_tokens(18).to(dtype), draw(18, 2, DIM)
    cu_seqlens = torch.tensor([0, 5, 5, 6, 18], dtype=dtype)
    out, past = engram(hidden, token_ids, cu_seqlens=cu_seqlens, return_past=True)
    more, more_ids = draw(8, 2, DIM, seed=1), draw_tokens(8, seed=1).to(dtype)
    more_lengths = [3, 1, 4, 0]
    cu_seqlens = torch.tensor([0, 3, 4, 8, 8])
    again, past = engram(more, more_ids, cu_seqlens=cu_seqlens, **past, return_past=True)

    for n in range(4):
        now, later = (
            [x.split(sizes)[n] for x in xs]
            for xs, sizes in (
                ((hidden, token_ids, out), lengths),
                ((more, more_ids, again), more_lengths),
            )
        )
        alone, own = engram(*now[:2], return_past=True)
        torch.testing.assert_close(now[2], alone)
        alone, own = engram(*later[:2], **own, return_past=True)
        torch.testing.assert_close(later[2], alone)
        for name, value in own.items():
            torch.testing.assert_close(past[name][n : n + 1], value)


def test_no_ngram_reaches_over_the_end_of_a_text():
    engram, eos = small_engram(conv_size=0, eos_id=3), 3
    hidden = draw(1, 8, DIM)
    one, other = ([[*text, eos, 5, 6, 7, 8, 9]] for text in ([10, 11], [12, 13]))
    out = [engram(hidden, torch.tensor(ids)) for ids in (one, other)]
    assert_same_bits(out[0][:, 3:], out[1][:, 3:])
    assert (out[0][:, 2] != out[1][:, 2]).all()


def test_tokens_alike_are_mapped_together():
    token_map = torch.arange(60) % 50
    engram = small_engram(token_map=token_map, eos_id=53, conv_size=0)
    plain = small_engram(eos_id=3, conv_size=0)
    token_ids, hidden = draw_tokens(2, 15, vocab_size=60), draw(2, 15, DIM)
    assert_same_bits(engram(hidden, token_ids), plain(hidden, token_ids % 50))
    past = {"past_ids": torch.tensor([[54, 53], [55, 2]])}
    mapped = {"past_ids": torch.tensor([[4, 3], [5, 2]])}
    assert_same_bits(engram(hidden, token_ids, **past), plain(hidden, token_ids % 50, **mapped))
    assert shapes(engram).keys() == shapes(plain).keys()
    blocked = engram.embed(torch.tensor([[7, -1, 8, 9, 7]]))
    assert not blocked[1:4, 6:].any() and not blocked[1:3].any() and blocked[[0, 4]].all()


@pytest.mark.parametrize("exponents", [False, True])
def test_tables_for_inference(exponents):
    """Quantised, with more rows than are used."""
    rows = sum(PRIMES) + 3
    scales = 2.0 ** draw_tokens(rows, 2, vocab_size=4)
    if exponents:
        weight = draw(rows, 4, dtype=torch.float32).to(torch.float8_e4m3fn)
        given = (scales.log2() + 127).to(torch.uint8)
    else:
        weight, given = draw_tokens(rows, 4, vocab_size=256).sub(128).to(torch.int8), scales
    engram = small_engram(weight=weight, scales=given, head_dim=4, dtype=torch.float32)
    table = weight.float() * scales.repeat_interleave(2, 1)
    dense = small_engram(weight=nn.Parameter(table.clone()), head_dim=4, dtype=torch.float32)
    dense.load_state_dict({**engram.state_dict(), "weight": table})
    token_ids, hidden = draw_tokens(2, 6), draw(2, 6, DIM, dtype=torch.float32)
    torch.testing.assert_close(engram(hidden, token_ids), dense(hidden, token_ids))
    assert "weight" not in engram.state_dict() and engram.weight is weight
    with pytest.raises(RuntimeError, match=re.escape(f"[{rows - 3} or more, 3], got [{rows}, 4]")):
        small_engram(weight=weight)


def test_engram_in_other_dtypes_and_without_tokens():
    x, token_ids = draw(2, 6, 2, DIM, dtype=torch.float32), draw_tokens(2, 6)
    for shape in (2, 0), (0, 6), (0,):
        empty = token_ids.new_zeros(shape)
        assert small_engram(channels=2)(draw(*shape, 2, DIM), empty).shape == (*shape, 2, DIM)
    assert small_engram(dtype=torch.bfloat16, channels=2)(x.bfloat16(), token_ids).isfinite().all()
    exact = small_engram(dtype=torch.float32, channels=2)(x, token_ids)
    with torch.autocast("cpu"):
        out = small_engram(dtype=torch.float32, channels=2)(x, token_ids)
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
    with pytest.raises(RuntimeError, match=re.escape("hidden must be [2, 6, 2, 12]")):
        small_engram(channels=2)(x[:, :, 0], token_ids)


# ---- optimisers ----------------------------------------------------------------------------------

ROWS = 9
ROW_OPTIMISERS = {
    "SGD": (
        lambda p: RowSGD([p], lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD([p], lr=0.1, weight_decay=0.1),
    ),
    "Adagrad": (
        lambda p: RowAdagrad([p], lr=0.1),
        lambda p: torch.optim.Adagrad([p], lr=0.1, eps=1e-10),
    ),
    "Adam": (
        # SparseAdam adds eps before the bias correction.
        lambda p: RowAdam([p], lr=0.1, betas=(0.8, 0.9), eps=1e-15),
        lambda p: torch.optim.SparseAdam([p], lr=0.1, betas=(0.8, 0.9), eps=1e-15),
    ),
    "AdamW": (
        lambda p: RowAdam([p], lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.1),
    ),
}


def steps(param, optimizer, first, last, sparse=True, everywhere=False):
    """Steps of bags that read some rows, twice in one of them."""
    for step in range(first, last):
        optimizer.zero_grad()
        count = ROWS if everywhere else 4
        index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[:count]
        bags = index.repeat(2)[: count + 1][:, None]
        out = memkernels.embedding_bag(bags, param, sparse=sparse)
        (out * draw(*out.shape, seed=step).to(out.dtype)).sum().backward()
        optimizer.step()
        yield index


@pytest.mark.parametrize("name", ROW_OPTIMISERS)
def test_optimisers_against_torch(name):
    ours, theirs = ROW_OPTIMISERS[name]
    # SGD and AdamW of torch change and forget all rows; they are given gradients of all.
    everywhere = name in ("SGD", "AdamW")
    a, b = (nn.Parameter(draw(ROWS, 3)) for _ in range(2))
    sparse = name == "Adam"
    runs = (
        steps(a, ours(a), 0, 6, everywhere=everywhere),
        steps(b, theirs(b), 0, 6, sparse, everywhere),
    )
    for _ in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
    assert (a != draw(ROWS, 3)).any()


@pytest.mark.parametrize("name", ROW_OPTIMISERS)
def test_other_rows_and_their_state_stay(name):
    param = nn.Parameter(draw(ROWS, 3))
    optimizer = ROW_OPTIMISERS[name][0](param)
    for _ in steps(param, optimizer, 0, 3):
        pass
    state = {k: v.clone() for k, v in optimizer.state[param].items() if torch.is_tensor(v)}
    before = param.detach().clone()
    (index,) = steps(param, optimizer, 3, 4)
    others = torch.ones(ROWS, dtype=torch.bool)
    others[index] = False
    assert_same_bits(param[others], before[others])
    assert (param[~others] != before[~others]).all()
    for key, value in state.items():
        assert_same_bits(optimizer.state[param][key][others], value[others])


@pytest.mark.parametrize("name", ROW_OPTIMISERS)
def test_gradients_of_layers_that_share_a_table(name):
    """Uncoalesced, with rows twice, is as coalesced."""
    a, b = (nn.Parameter(draw(ROWS, 3)) for _ in range(2))
    index, grads = torch.tensor([[5, 1, 5, 0, 1]]), draw(5, 3, seed=1)
    a.grad = torch.sparse_coo_tensor(index, grads, a.shape, check_invariants=True)
    b.grad = a.grad.coalesce()
    for param in a, b:
        ROW_OPTIMISERS[name][0](param).step()
    torch.testing.assert_close(a, b)
    changed = (a != draw(ROWS, 3)).any(1).nonzero()[:, 0]
    assert changed.tolist() == [0, 1, 5]


def test_rowwise_adagrad():
    param, exact = nn.Parameter(draw(ROWS, 3)), draw(ROWS, 3)
    optimizer = RowAdagrad([param], lr=0.1, rowwise=True)
    total = torch.zeros(ROWS, dtype=torch.float64)
    for index in steps(param, optimizer, 0, 3):
        grad = param.grad.to_dense()
        total += grad.square().mean(1)
        exact[index] -= 0.1 * (grad / (total.sqrt() + 1e-10)[:, None])[index]
        torch.testing.assert_close(param.detach(), exact)
    assert optimizer.state[param]["sum"].shape == (ROWS,)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: RowAdam([p], lr=0.1),
        lambda p: RowAdam([p], lr=0.1, state_dtype=torch.bfloat16),
        lambda p: RowAdagrad([p], lr=0.1, rowwise=True),
        lambda p: RowAdagrad([p], lr=0.1),
        lambda p: RowSGD([p], lr=0.1),
    ],
)
def test_state_of_optimisers_survives(make):
    """Of a bfloat16 table: the state keeps its dtype, and the steps that follow their bits."""
    whole, broken = (nn.Parameter(draw(ROWS, 3, dtype=torch.bfloat16)) for _ in range(2))
    for _ in steps(whole, make(whole), 0, 6):
        pass
    optimizer = make(broken)
    assert not optimizer.state
    for _ in steps(broken, optimizer, 0, 3):
        pass
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = make(broken)
    fresh.load_state_dict(torch.load(file))
    for key, value in optimizer.state[broken].items():
        kept = fresh.state[broken][key]
        assert kept.dtype == value.dtype if torch.is_tensor(value) else kept == value
    for _ in steps(broken, fresh, 3, 6):
        pass
    assert_same_bits(broken, whole)


def test_dtype_of_the_moments():
    param = nn.Parameter(draw(ROWS, 3, dtype=torch.bfloat16))
    for dtype, expected in (None, torch.float32), (torch.bfloat16, torch.bfloat16):
        optimizer = RowAdam([param], state_dtype=dtype)
        (_,) = steps(param, optimizer, 0, 1)
        state = optimizer.state[param]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == expected


def test_groups_closures_and_schedules():
    a, b = (nn.Parameter(draw(ROWS, 3)) for _ in range(2))
    optimizer = RowSGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)

    def closure():
        optimizer.zero_grad()
        rows = torch.tensor([[2], [4]])
        loss = sum(memkernels.embedding_bag(rows, p, sparse=True).sum() for p in (a, b))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(2 * draw(ROWS, 3)[[2, 4]].sum().item())
    schedule.step()
    optimizer.step(closure)
    for param, lr in (a, 1.0), (b, 0.5):
        expected = draw(ROWS, 3)
        expected[[2, 4]] -= 1.1 * lr
        torch.testing.assert_close(param.detach(), expected)
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(a.detach()[2], draw(ROWS, 3)[2] - 1.1)


def test_dense_gradients_are_refused_by_name():
    good, bad = (nn.Parameter(draw(ROWS, 3)) for _ in range(2))
    good.grad = torch.sparse_coo_tensor([[0]], draw(1, 3), good.shape, check_invariants=True)
    bad.grad = torch.ones_like(bad)
    for params, name in (
        ([good, bad], f"1 of its group, [{ROWS}, 3],"),
        ([("table", good), ("head.weight", bad)], "head.weight"),
    ):
        message = f"RowSGD: the gradient of parameter {name} is dense"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            RowSGD(params).step()
        assert_same_bits(good, draw(ROWS, 3))


def test_a_memory_learns():
    """From modules to optimisers: a table shared by two layers, and their projections."""
    torch.manual_seed(0)
    first = ProductKeyMemory.at_scale(DIM, 8, key_dim=16, k=4, sparse=True)
    second = ProductKeyMemory.at_scale(DIM, 8, key_dim=16, k=4, sparse=True, values=first.values)
    model = nn.ModuleList([first, second])
    rest = [p for p in model.parameters() if p is not first.values]
    optimizers = RowAdam([first.values], lr=1e-2), torch.optim.Adam(rest, lr=1e-2)
    x, y = torch.randn(2, 64, DIM)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(second(x + first(x)), y)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ---- tables on disk ------------------------------------------------------------------------------


def write(path, table):
    path.write_bytes(table.view(torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_tables_hold_what_the_file_holds(tmp_path, dtype):
    values = draw(1000, 8, dtype=torch.float32).to(dtype)
    path = write(tmp_path / "table", values)
    table = open_table(path, [1000, 8], dtype)
    assert table.dtype == dtype and table.shape == (1000, 8)
    rows = torch.tensor([[0, 999], [17, -1]])
    scales = None if dtype.is_floating_point and dtype.itemsize > 1 else torch.ones(1000, 1)
    assert_same_bits(
        memkernels.embedding_bag(rows, table, scales=scales),
        memkernels.embedding_bag(rows, values, scales=scales),
    )


@pytest.mark.parametrize("writable", [False, True])
def test_writing_to_tables(tmp_path, writable):
    path = write(tmp_path / "table", torch.zeros(10, 4))
    table = open_table(str(path), [10, 4], torch.float32, writable=writable)
    rows, grads = torch.tensor([3]), torch.full((1, 4), -2.0)
    memkernels.row_sgd(table, rows, grads, torch.tensor([1]), lr=1.0)
    assert table[3].tolist() == [2] * 4
    expected = 8.0 if writable else 0.0
    assert np.fromfile(path, dtype=np.float32).sum() == expected
    assert open_table(path, [10, 4], torch.float32).sum() == expected


def test_a_quantised_table_keeps_its_dtype():
    weight, scales = torch.ones(1000, 4).to(torch.float8_e4m3fn), torch.ones(1000, 1)
    layer = Engram(DIM, 50, 7, heads=2, head_dim=4, weight=weight, scales=scales)
    layer.bfloat16()
    assert layer.key_proj.weight.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.scales.dtype == torch.float32
    out = layer(torch.zeros(3, DIM, dtype=torch.bfloat16), torch.arange(3))
    assert out.dtype == torch.bfloat16


def test_an_empty_table(tmp_path):
    assert (
        open_table(write(tmp_path / "table", torch.empty(0, 4)), [0, 4], torch.float32).numel() == 0
    )


@pytest.mark.parametrize("size", [0, 159, 161, 320])
@pytest.mark.parametrize("writable", [False, True])
def test_files_of_another_size_are_refused(tmp_path, size, writable):
    path = tmp_path / "table"
    path.write_bytes(bytes(size))
    message = f"{path} must have 160 bytes for [10, 4] torch.float32, found {size}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        open_table(path, [10, 4], torch.float32, writable=writable)
    assert path.stat().st_size == size


@pytest.mark.skipif(not hasattr(mmap, "MADV_RANDOM"), reason="no such advice on this system")
def test_a_row_is_read_with_its_page_only(tmp_path):
    path = write(tmp_path / "table", torch.zeros(1 << 20, 4, dtype=torch.uint8))
    table = open_table(path, [1 << 20, 4], torch.uint8)
    with open("/proc/self/smaps") as lines:
        maps = lines.read().split(str(path))[1]
    flags = re.search(r"^VmFlags:(.*)$", maps, re.MULTILINE)[1]
    assert "rr" in flags.split()
    assert table[-1].tolist() == [0] * 4
