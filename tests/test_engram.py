"""Where hashed tables are read, and how much of them is taken: n-grams, gates and sign bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from cases import arrays
from checks import at_random, check, check_error, check_gradients, gradients, outcome, put
from lookup_cases import codes_case, gate_case, hash_case, wide
from memkernels import reference
from test_attention import DTYPES
from test_selection import ALONE, INDEX_DTYPES
from tolerance import assert_same_bits

# ---- ngram_hash ----------------------------------------------------------------------------------


def hashed(ops, arguments):
    """To the bit those of NumPy."""
    rows = check(ops, "ngram_hash", arguments)
    assert rows.dtype == torch.int64 and rows.is_contiguous()
    return rows


def of_tokens(arguments, sequence, start, stop):
    """The arguments for some tokens of a sequence; the ids before them are past_ids."""
    past_ids, token_ids = arguments["past_ids"], arguments["token_ids"]
    reach = past_ids.shape[1]
    ids = torch.cat([past_ids[sequence], token_ids[sequence]])
    tokens = ids[start + reach : stop + reach]
    past = ids[start : start + reach].to(past_ids.dtype)
    return arguments | {"token_ids": tokens[None], "past_ids": past[None], "cu_seqlens": None}


ORDERS = [[1], [2], [2, 3], [2, 3, 4], [3, 1, 3], [6]]
FEW_IDS = {"vocabulary": 11}  # with an eos, or a negative id, in most n-grams


@at_random(
    lengths=st.tuples(st.integers(0, 3), st.integers(0, 9))
    | st.lists(st.sampled_from([0, 1]) | st.integers(0, 9), max_size=4),
    orders=st.sampled_from(ORDERS),
    heads=st.integers(1, 9),
    past=st.booleans(),
    vocabulary=st.sampled_from([11, 2**31 - 1]),
    largest_modulus=st.sampled_from([1, 2, 1000, 2**31, 2**63 - 1]),
    eos_id=st.none() | st.integers(-1, 5),
    pad_id=st.integers(-1, 5),
    dtype=st.sampled_from(INDEX_DTYPES),
    seed=st.integers(0, 2**16),
)
def test_hashes_at_random(ops, **sizes):
    hashed(ops, hash_case(**sizes))


def test_hashes_of_extreme_numbers(ops):
    """Products wrap; the modulo has the sign of the modulus."""
    least, most = -(2**63), 2**63 - 1
    multipliers = [1, 3, most, least, -1, 2**62 + 1, least + 1]
    ids = torch.tensor([[0, 1, 2, 5, 2**31 - 1]])
    moduli = torch.tensor([1, 2, 3, 2**31, 2**31 - 1, 2**62, most - 1, most])
    for multiplier in multipliers:
        tensors = torch.tensor([multiplier]), moduli, torch.zeros_like(moduli)
        rows = ops.ngram_hash(ids, *tensors, orders=[1])
        for t, token in enumerate(ids[0].tolist()):
            product = (token * multiplier - least) % 2**64 + least
            assert rows[0, t].tolist() == [product % m for m in moduli.tolist()]


def test_many_tokens(ops):
    hashed(ops, hash_case([700, 0, 900], [2, 3], heads=8, eos_id=3, **FEW_IDS))


@pytest.mark.parametrize("eos_id", [None, 2])
@pytest.mark.parametrize("orders", ORDERS)
def test_tokens_one_by_one_hash_as_together(ops, orders, eos_id):
    """A cache of the last ids is all that decoding needs; packing changes nothing either."""
    arguments = hash_case((2, 12), orders, past=True, eos_id=eos_id, **FEW_IDS)
    together = hashed(ops, arguments)
    for sequence in 0, 1:
        for start, stop in [(t, t + 1) for t in range(12)] + [(0, 5), (5, 12), (4, 4)]:
            alone = hashed(ops, of_tokens(arguments, sequence, start, stop))
            assert_same_bits(alone[0], together[sequence, start:stop])
    packed = arguments | {
        "token_ids": arguments["token_ids"].view(1, -1),
        "cu_seqlens": torch.tensor([0, 12, 24]),
    }
    assert_same_bits(hashed(ops, packed), together.view(1, 24, -1))


def test_hashes_of_no_tokens(ops):
    assert hashed(ops, hash_case((0, 5), [2, 3])).shape == (0, 5, 4)
    assert hashed(ops, hash_case((3, 0), [2, 3], past=True)).shape == (3, 0, 4)
    assert hashed(ops, hash_case([0, 0], [2, 3])).shape == (1, 0, 4)
    assert hashed(ops, hash_case([], [2, 3])).shape == (1, 0, 4)


HASH_ERRORS = {
    "rank_of_token_ids": ("token_ids", lambda c: {"token_ids": c.token_ids[0]}),
    "dtype_of_token_ids": ("token_ids", lambda c: {"token_ids": c.token_ids.float()}),
    "short_token_ids": ("token_ids", lambda c: {"token_ids": c.token_ids.short()}),
    "no_orders": ("orders", {"orders": []}),
    "order_zero": ("orders", {"orders": [2, 0]}),
    "size_of_multipliers": ("multipliers", {"orders": [2, 4]}),
    "dtype_of_multipliers": ("multipliers", lambda c: {"multipliers": c.multipliers.int()}),
    "rank_of_multipliers": ("multipliers", lambda c: {"multipliers": c.multipliers[None]}),
    "size_of_moduli": ("moduli", lambda c: {"moduli": c.moduli[:-1], "offsets": c.offsets[:-1]}),
    "no_heads": ("moduli", lambda c: {"moduli": c.moduli[:0], "offsets": c.offsets[:0]}),
    "dtype_of_moduli": ("moduli", lambda c: {"moduli": c.moduli.int()}),
    "rank_of_moduli": ("moduli", lambda c: {"moduli": c.moduli[None]}),
    "modulus_zero": ("moduli", lambda c: {"moduli": put(c.moduli, 2, 0)}),
    "modulus_negative": ("moduli", lambda c: {"moduli": put(c.moduli, 2, -5)}),
    "size_of_offsets": ("offsets", lambda c: {"offsets": c.offsets[:-1]}),
    "dtype_of_offsets": ("offsets", lambda c: {"offsets": c.offsets.int()}),
    "rows_of_past_ids": ("past_ids", lambda c: {"past_ids": c.past_ids[:1]}),
    "columns_of_past_ids": ("past_ids", lambda c: {"past_ids": c.past_ids[:, :1]}),
    "rank_of_past_ids": ("past_ids", lambda c: {"past_ids": c.past_ids[0]}),
    "dtype_of_past_ids": ("past_ids", lambda c: {"past_ids": c.past_ids.float()}),
    "offsets_of_a_batch": ("token_ids|cu_seqlens", {"cu_seqlens": torch.tensor([0, 9, 18])}),
}

PACKED_ERRORS = {
    "first_offset": ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 5, 9])}),
    "last_offset": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 8])}),
    "offset_beyond_the_end": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 10])}),
    "falling_offsets": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 10, 9])}),
    "no_offsets": ("cu_seqlens", {"cu_seqlens": torch.tensor([]).long()}),
    "rank_of_offsets": ("cu_seqlens", {"cu_seqlens": torch.tensor([[0, 5, 9]])}),
    "dtype_of_offsets": ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 5, 9])}),
    "rows_of_past_ids": ("past_ids", {"cu_seqlens": torch.tensor([0, 9])}),
}


@pytest.mark.parametrize("error", HASH_ERRORS)
def test_hash_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = hash_case((2, 9), [2, 3], past=True)
    check_error(ops, "ngram_hash", arguments, HASH_ERRORS[error])


@pytest.mark.parametrize("error", PACKED_ERRORS)
def test_hash_errors_of_packed_sequences(ops, error):
    arguments = hash_case([5, 4], [2, 3], past=True)
    check_error(ops, "ngram_hash", arguments, PACKED_ERRORS[error])


# ---- engram_gate ---------------------------------------------------------------------------------

SIGNS = ["zero", "copy"]
signs = pytest.mark.parametrize("sign", SIGNS)


@at_random(
    tokens=st.integers(0, 9),
    channels=st.integers(0, 5),
    dim=st.integers(1, 80) | st.sampled_from([128, 1030]),
    wide_weight=st.booleans(),
    sign=st.sampled_from(SIGNS),
    eps=st.sampled_from([1e-6, 1e-2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_gates_at_random(ops, **sizes):
    arguments = gate_case(**sizes)
    out = check(ops, "engram_gate", arguments, slack=8)
    assert out.dtype == sizes["dtype"] and out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_many_tokens(ops, dtype):
    check(ops, "engram_gate", gate_case(70, 4, 1024, dtype=dtype), slack=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_match_is_taken_by_half(ops, dtype):
    """With the sign of a zero, by slightly more; a sum of zeros is positive."""
    arguments = gate_case(5, 3, 40, dtype=dtype)
    arguments["k"][2] = 0
    out = outcome(ops, "engram_gate", arguments)
    assert_same_bits(out[2], (arguments["v"][2] / 2).expand(3, -1).contiguous())
    out = check(ops, "engram_gate", arguments | {"sign": "copy"}, slack=8)
    if wide(dtype) == dtype:
        assert (out[2].abs() > arguments["v"][2].abs() / 2).all()


@signs
@pytest.mark.parametrize("name", ["hidden", "k", "v"])
def test_nan_reaches_only_the_gates_that_use_it(ops, name, sign):
    arguments = gate_case(6, 3, 20, sign=sign)
    clean = outcome(ops, "engram_gate", arguments)
    place = (4, 7) if name == "v" else (4, 1, 7)
    dirty = arguments | {name: put(arguments[name], place, torch.nan)}
    actual = outcome(ops, "engram_gate", dirty)
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[(4, slice(None), 7) if name == "v" else (4, 1)] = True
    assert_same_bits(actual[~touched], clean[~touched])
    assert actual[touched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_weight", [False, True])
@signs
def test_gradients_of_gates(kernels, sign, wide_weight, dtype):
    for sizes in (9, 4, 37), (40, 1, 64), (0, 3, 5), (3, 0, 5):
        arguments = gate_case(*sizes, wide_weight=wide_weight, sign=sign, dtype=dtype)
        check_gradients(kernels, "engram_gate", arguments, slack=16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_have_the_same_bits_alone_and_out_of_line(kernels, dtype):
    arguments = gate_case(7, 3, 520, dtype=dtype)

    def compute(changes, tokens=7):
        leaves = {name: x.detach().requires_grad_() for name, x in (arguments | changes).items()}
        out = kernels.engram_gate(**leaves)
        grads = torch.autograd.grad(out, leaves.values(), arguments["k"][:tokens])
        return [out, *(x for x in grads if len(x) == tokens)]

    together = compute({})
    wider = torch.zeros(7, 3, 521, dtype=dtype)
    wider[..., 1:] = arguments["hidden"]
    assert_same_bits(compute({"hidden": wider[..., 1:]}), together)
    alone = {name: arguments[name][:1] for name in ("hidden", "k", "v")}
    assert_same_bits(compute(alone, tokens=1), [x[:1] for x in together])


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(1300, 3, 40), (520, 1, 30_000)])
def test_gradients_of_gates_of_many_tokens(kernels, sizes):
    """With sums over tokens in shared memory, and where they are too large for it."""
    check_gradients(kernels, "engram_gate", gate_case(*sizes, dtype=torch.bfloat16), slack=16)


@signs
def test_gradcheck_of_gates(ops, sign):
    arguments = gate_case(3, 2, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in arguments.values()]
    assert torch.autograd.gradcheck(lambda *x: ops.engram_gate(*x, sign=sign), leaves)


@signs
def test_below_the_clamp_no_gradient_passes(ops, sign):
    """But that of the value."""
    arguments = gate_case(5, 1, 40, sign=sign)
    arguments["k"][2] = 0
    arguments["hidden"][3] *= 1e-9
    grads = gradients(ops.engram_gate, arguments)
    for row in 2, 3:
        assert not grads["hidden"][row].any() and not grads["k"][row].any()
        assert grads["v"][row].any()
    for grad in grads.values():
        assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("names", [["hidden"], ["k"], ["v"], ["weight"], ["k", "weight"]])
def test_each_gradient_of_gates_only_if_asked_for(ops, names):
    arguments = gate_case(9, 3, 20)
    every = gradients(ops.engram_gate, arguments)
    fewer = gradients(ops.engram_gate, arguments, names)
    assert_same_bits(fewer, {name: every[name] for name in names})


GATE_ERRORS = {
    "rank_of_hidden": ("hidden", lambda c: {"hidden": c.hidden[0]}),
    "integer_hidden": ("hidden", lambda c: {"hidden": c.hidden.int()}),
    "no_columns": (
        "hidden", lambda c: {"hidden": c.hidden[..., :0], "k": c.k[..., :0], "v": c.v[:, :0],
                             "weight": c.weight[:, :0]}
    ),
    "tokens_of_k": ("k", lambda c: {"k": c.k[:-1]}),
    "channels_of_k": ("k", lambda c: {"k": c.k[:, :1]}),
    "dtype_of_k": ("k", lambda c: {"k": c.k.half()}),
    "tokens_of_v": ("v", lambda c: {"v": c.v[:-1]}),
    "channels_of_v": ("v", lambda c: {"v": c.v[:, None].expand(-1, 3, -1)}),
    "dtype_of_v": ("v", lambda c: {"v": c.v.double()}),
    "channels_of_weight": ("weight", lambda c: {"weight": c.weight[:1]}),
    "columns_of_weight": ("weight", lambda c: {"weight": c.weight[:, :1]}),
    "rank_of_weight": ("weight", lambda c: {"weight": c.weight[0]}),
    "narrow_weight": ("weight", lambda c: {"weight": c.weight.half()}),
    "double_weight": ("weight", lambda c: {"weight": c.weight.double()}),
    "sign": ("sign", {"sign": "minus"}),
}  # fmt: skip


@pytest.mark.parametrize("error", GATE_ERRORS)
def test_gate_errors_name_the_argument_and_change_nothing(ops, error):
    check_error(ops, "engram_gate", gate_case(5, 3, 8), GATE_ERRORS[error])


# ---- lsh_codes -----------------------------------------------------------------------------------


@at_random(
    tokens=st.integers(0, 9),
    tables=st.integers(0, 9),
    bits=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_codes_at_random(ops, **sizes):
    codes, scores = check(ops, "lsh_codes", codes_case(**sizes), slack=ALONE)
    assert codes.dtype == torch.int32 and scores.dtype == wide(sizes["dtype"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_many_tokens(ops, dtype):
    check(ops, "lsh_codes", codes_case(300, 64, 8, dtype=dtype), slack=ALONE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers_have_their_bits(ops, dtype):
    """Either zero is positive, NaN negative; scores are infinite or NaN where z is."""
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e4, -1e4])
    generator = torch.Generator().manual_seed(0)
    for bits in 1, 2, 7, 8, 9, 16, 17, 30:
        places = torch.randint(9, (20, 3, bits), generator=generator)
        z = special[places].to(dtype)
        codes, scores = ops.lsh_codes(z)
        exact_codes, exact_scores = reference.lsh_codes(**arrays({"z": z}))
        np.testing.assert_array_equal(codes.numpy(), exact_codes)
        np.testing.assert_allclose(scores.double().numpy(), exact_scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_codes(kernels, dtype):
    for sizes in (9, 5, 8), (40, 3, 13), (2, 2, 30), (0, 2, 4):
        check_gradients(kernels, "lsh_codes", codes_case(*sizes, dtype=dtype), slack=8)


def test_gradcheck_of_codes(ops):
    z = codes_case(4, 3, 5, dtype=torch.float64)["z"].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ops.lsh_codes(z)[1], [z])


def test_gradients_of_zeros_are_zero(ops):
    """As torch has the gradient of the absolute value; huge numbers have that of their sum."""
    z = torch.tensor([[[0.0, -0.0, 3.0, -3.0], [0, 0, 0, 0], [1e4, -1e4, 9e4, 50]]])
    (grad,) = gradients(ops.lsh_codes, {"z": z}).values()
    assert not grad[0, 0, :2].any() and not grad[0, 1].any() and grad[0, 0, 2:].all()
    assert grad.isfinite().all()
    assert_same_bits(grad[0, 2, 1], -grad[0, 2, 0])


def test_a_read_of_addressed_tables(ops):
    """MemoryFormer: one row of each table, by its code, weighed by its score."""
    z = codes_case(7, 3, 4, dtype=torch.float64)["z"].requires_grad_()
    tables = torch.randn(3, 16, 10, dtype=torch.float64)
    codes, scores = ops.lsh_codes(z)
    rows = codes + torch.arange(3, dtype=torch.int32) * 16
    actual = ops.embedding_bag(rows, tables.flatten(0, 1), per_sample_weights=scores)
    expected = sum(scores[:, i, None] * tables[i, codes[:, i].long()] for i in range(3))
    torch.testing.assert_close(actual, expected)
    grads = [
        torch.autograd.grad(x.square().sum(), z, retain_graph=True) for x in (actual, expected)
    ]
    torch.testing.assert_close(*grads)


CODE_ERRORS = {
    "rank_of_z": ("z", lambda c: {"z": c.z[0]}),
    "integer_z": ("z", lambda c: {"z": c.z.int()}),
    "no_bits": ("z", lambda c: {"z": c.z[..., :0]}),
    "too_many_bits": ("z", lambda c: {"z": c.z[..., :1].expand(-1, -1, 31)}),
}


@pytest.mark.parametrize("error", CODE_ERRORS)
def test_code_errors_name_the_argument(ops, error):
    check_error(ops, "lsh_codes", codes_case(5, 3, 4), CODE_ERRORS[error])
