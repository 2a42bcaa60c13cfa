"""Writing new tokens to their slots, and merging attention over disjoint keys."""

from __future__ import annotations

import pytest
import torch

import memkernels
from cases import attention_case
from memkernels import fallback, reference
from tolerance import assert_accurate, assert_same_bits, straightforward, unchanged

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def append_case(num_tokens=9, dtype=torch.float32, layout="NHD", head_dims=(24, 10)):
    """Tensors of an append to 5 pages of 7 slots, 2 heads; a third of the tokens has slot -1."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(num_tokens, 2, d, generator=generator).to(dtype) for d in head_dims)
    caches = []
    for d in head_dims:
        shape = (5, 7, 2, d) if layout == "NHD" else (5, 2, 7, d)
        cache = torch.full(shape, torch.nan, dtype=dtype)  # what is not written stays
        caches.append(cache if layout == "NHD" else cache.transpose(1, 2))
    slots = torch.randperm(35, generator=generator)[:num_tokens]
    slots[::3] = -1
    return k, v, *caches, slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_append(ops, dtype, layout, index_dtype):
    k, v, k_cache, v_cache, slots = append_case(dtype=dtype, layout=layout)
    arrays = [x.double().numpy() for x in (k, v, k_cache, v_cache)]
    expected = reference.append_kv(*arrays, slots.numpy())
    with unchanged(k, v, slots):
        assert ops.append_kv(k, v, k_cache, v_cache, slots.to(index_dtype)) is None
    for cache, exact in zip((k_cache, v_cache), expected, strict=True):
        assert_same_bits(cache, torch.from_numpy(exact).to(dtype))


def test_append_strided_tokens(ops):
    """k and v are slices of one projection, the cache of V a view of that of K."""
    projection = torch.randn(9, 2, 40)
    _, _, k_cache, _, slots = append_case()
    expected = k_cache.clone()
    expected.flatten(0, 1)[slots[slots >= 0]] = projection[slots >= 0, :, :24]
    ops.append_kv(projection[..., :24], projection[..., :10], k_cache, k_cache[..., :10], slots)
    assert_same_bits(k_cache, expected)


def test_append_nothing(ops):
    tensors = append_case(num_tokens=0)
    with unchanged(*tensors):
        ops.append_kv(*tensors)
    *tensors, slots = append_case()
    with unchanged(*tensors):
        ops.append_kv(*tensors, torch.full_like(slots, -1))


def test_append_then_attend(ops):
    """A sequence grown one token at a time is the sequence."""
    case = attention_case("paged", [20])
    k_cache, v_cache = (torch.full_like(x, torch.nan) for x in (case.k_cache, case.v_cache))
    for j in range(20):
        page, offset = case.page_table[0, j // 16], j % 16
        new = (cache[page, offset][None] for cache in (case.k_cache, case.v_cache))
        ops.append_kv(*new, k_cache, v_cache, (page * 16 + offset)[None])
    grown = case.replace(k_cache=k_cache, v_cache=v_cache)
    assert_same_bits(
        ops.paged_attention(**grown.arguments()), ops.paged_attention(**case.arguments())
    )


APPEND_ERRORS = {
    "slot_too_large": ("slot_mapping", 4, lambda t: t.clamp(min=35)),
    "slot_below_minus_one": ("slot_mapping", 4, lambda t: t - 2),
    "duplicate_slots": ("slot_mapping", 4, lambda t: t * 0 + 3),
    "number_of_slots": ("slot_mapping|k", 4, lambda t: t[:-1]),
    "dtype_of_slots": ("slot_mapping", 4, lambda t: t.float()),
    "dtype_of_k": ("k", 0, lambda t: t.double()),
    "dtype_of_v": ("v", 1, lambda t: t.double()),
    "head_dim_of_k": ("k", 0, lambda t: t[..., :-1]),
    "heads_of_v": ("v", 1, lambda t: t[:, :1]),
    "tokens_of_v": ("v", 1, lambda t: t[:-1]),
    "pages_of_v_cache": ("v_cache", 3, lambda t: t[:-1]),
    "rank_of_k_cache": ("k_cache", 2, lambda t: t[0]),
}


@pytest.mark.parametrize("error", APPEND_ERRORS)
def test_append_errors_name_the_argument_and_change_nothing(ops, error):
    names, position, change = APPEND_ERRORS[error]
    tensors = list(append_case())
    tensors[position] = change(tensors[position])
    with unchanged(*tensors), pytest.raises(RuntimeError, match=rf"append_kv: .*({names})"):
        ops.append_kv(*tensors)


@pytest.mark.parametrize("position", range(4))
def test_append_is_not_differentiable(ops, position):
    tensors = list(append_case())
    tensors[position].requires_grad_()
    with unchanged(*tensors), pytest.raises(RuntimeError, match=r"append_kv: .*not differentiable"):
        ops.append_kv(*tensors)
    with torch.no_grad():
        ops.append_kv(*tensors)


def test_append_bumps_the_version_of_both_caches(ops):
    k, v, k_cache, v_cache, slots = append_case()
    versions = [t._version for t in (k, v, k_cache, v_cache, slots)]
    ops.append_kv(k, v, k_cache, v_cache, slots)
    assert [t._version for t in (k, v, slots)] == [versions[0], versions[1], versions[4]]
    assert k_cache._version > versions[2] and v_cache._version > versions[3]


def test_append_opcheck():
    torch.library.opcheck(torch.ops.memkernels.append_kv.default, append_case())


def test_append_compile():
    def step(k, v, k_cache, v_cache, slots):
        memkernels.append_kv(2 * k, v, k_cache, v_cache, slots)
        return k_cache.nan_to_num().sum() + v_cache.nan_to_num().sum()

    k, v, k_cache, v_cache, slots = append_case()
    caches = k_cache.clone(), v_cache.clone()
    expected = step(k, v, k_cache, v_cache, slots)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(k, v, *caches, slots)
    assert_same_bits([result, *caches], [expected, k_cache, v_cache])
    torch._dynamo.reset()


def states(num_parts, num_rows, num_heads=3, head_dim=20, dtype=torch.float32):
    """Parts of which some are absent: lse -inf, and NaN in their out. Row 0 has no part at all."""
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(num_parts, num_rows, num_heads, head_dim, generator=generator).to(dtype)
    lses = 5 * torch.randn(num_parts, num_rows, num_heads, generator=generator)
    absent = torch.rand(lses.shape, generator=generator) < 0.2
    absent[:, :1] = True
    outs[absent] = torch.nan
    lses = lses.to(torch.promote_types(dtype, torch.float32)).masked_fill(absent, -torch.inf)
    return outs, lses


def check_merge(merge_states, outs, lses):
    out, lse = merge_states(outs, lses)
    assert out.dtype == outs.dtype and lse.dtype == lses.dtype
    exact = reference.merge_states(outs.double().numpy(), lses.double().numpy())
    with straightforward():
        baseline = fallback.merge_states(outs, lses)
    assert_accurate(out, exact[0], baseline[0], dtype=outs.dtype, name="out")
    assert_accurate(lse, exact[1], baseline[1], dtype=lses.dtype, name="lse")
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_parts", [1, 2, 3, 33])
@pytest.mark.parametrize("head_dim", [1, 20, 128])
def test_merge(ops, dtype, num_parts, head_dim):
    outs, lses = states(num_parts, 6, head_dim=head_dim, dtype=dtype)
    with unchanged(outs, lses):
        out, lse = check_merge(ops.merge_states, outs, lses)
    assert not out[0].any() and (lse[0] == -torch.inf).all()


def test_merge_strided(ops):
    outs, lses = (x.movedim(0, 2).contiguous().movedim(2, 0) for x in states(4, 6))
    check_merge(ops.merge_states, outs, lses)


def test_merge_large_lse(ops):
    outs, lses = states(3, 6)
    for shift in 1e4, -1e4:
        check_merge(ops.merge_states, outs, lses + shift)


def test_merge_no_rows(ops):
    out, lse = ops.merge_states(*states(3, 0))
    assert out.shape == (0, 3, 20) and lse.shape == (0, 3)


def test_merge_is_attention_over_the_union(ops):
    """Two halves of the keys, the sink logit given to one of them."""
    case = attention_case("contiguous", [40, 40], causal=False, sink_logit=True)
    whole = ops.paged_attention(**case.arguments())
    parts = []
    for tokens, sink_logit in (slice(0, 17), case.sink_logit), (slice(17, 40), None):
        part = case.replace(
            k_cache=case.k_cache[:, tokens],
            v_cache=case.v_cache[:, tokens],
            seq_lens=None,
            sink_logit=sink_logit,
        )
        parts.append(ops.paged_attention(**part.arguments()))
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    torch.testing.assert_close(ops.merge_states(outs, lses), whole)


def test_merge_errors(ops):
    outs, lses = states(3, 6)
    for wrong in lses[:-1], lses[..., :-1], lses[0]:
        with unchanged(outs, wrong), pytest.raises(RuntimeError, match=r"merge_states: .*lses"):
            ops.merge_states(outs, wrong)


def merge_gradients(merge_states, outs, lses):
    outs, lses = (x.detach().requires_grad_() for x in (outs, lses))
    results = merge_states(outs, lses)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return torch.autograd.grad(results, (outs, lses), upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_backward(dtype):
    outs, lses = states(4, 6, dtype=dtype)
    grads = merge_gradients(memkernels.merge_states, outs, lses)
    exact = merge_gradients(fallback.merge_states, outs.double(), lses.double())
    with straightforward():
        baseline = merge_gradients(fallback.merge_states, outs, lses)
    for name, *each in zip(("outs", "lses"), grads, exact, baseline, strict=True):
        assert_accurate(*each, dtype=dtype, name=f"gradient of {name}", slack=4)
    for grad in grads:
        assert not grad[lses == -torch.inf].any()


def test_merge_gradcheck(ops):
    def outputs(outs, lses):
        out, lse = ops.merge_states(outs, lses)
        return out, lse.masked_fill(lse == -torch.inf, 0)  # -inf has no finite difference

    tensors = states(3, 2, num_heads=2, head_dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(outputs, tuple(x.requires_grad_() for x in tensors))


def test_merge_opcheck():
    tensors = tuple(x.requires_grad_() for x in states(3, 4))
    torch.library.opcheck(torch.ops.memkernels.merge_states.default, tensors)


def test_merge_compile():
    outs, lses = states(3, 4)
    compiled = torch.compile(memkernels.merge_states, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(outs, lses), memkernels.merge_states(outs, lses))
    grads = merge_gradients(compiled, outs, lses)
    assert_same_bits(grads, merge_gradients(memkernels.merge_states, outs, lses))
    torch._dynamo.reset()
