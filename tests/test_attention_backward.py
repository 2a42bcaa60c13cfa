"""Gradients of paged attention: against finite differences and autograd through the fallback."""

from __future__ import annotations

import functools

import pytest
import torch

import memkernels
from cases import attention_case
from memkernels import fallback
from tolerance import assert_accurate, assert_same_bits, slack_of, straightforward

KINDS = ["paged", "contiguous", "packed"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

native = functools.partial(memkernels.paged_attention, return_lse=True)


def upstream(case):
    """Random gradients of out and lse; an empty row has them too, and must ignore them."""
    generator = torch.Generator().manual_seed(1)
    num_rows, num_heads, _ = case.q.shape
    dout = torch.randn(num_rows, num_heads, case.v_cache.shape[-1], generator=generator)
    dlse = torch.randn(num_rows, num_heads, generator=generator)
    lse_dtype = torch.promote_types(case.q.dtype, torch.float32)
    return dout.to(case.q.dtype), dlse.to(lse_dtype)


def gradients(paged_attention, case, names=None):
    """Gradients of the named arguments (all floating ones by default), by name."""
    names = list(case.tensors()) if names is None else names
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in names}
    results = paged_attention(**case.arguments() | leaves)
    dout, dlse = upstream(case)
    grads = torch.autograd.grad(results, leaves.values(), (dout, dlse.to(results[1].dtype)))
    return dict(zip(names, grads, strict=True))


def check_gradients(paged_attention, case):
    actual = gradients(paged_attention, case)
    exact = gradients(fallback.paged_attention, case.to(torch.float64))
    with straightforward():
        baseline = gradients(fallback.paged_attention, case)
    for name, grad in actual.items():
        assert grad.dtype == getattr(case, name).dtype
        # Eight: where one key has nearly all the weight, dS is the difference of two equal numbers,
        # dO.v and rowsum(dO * O), that were rounded apart, as in every memory-efficient backward.
        slack = 8 * slack_of(paged_attention, case.q.dtype)
        accuracy = {"dtype": case.q.dtype, "name": f"gradient of {name}", "slack": slack}
        assert_accurate(grad, exact[name], baseline[name], **accuracy)
    return actual


VARIANTS = {
    "plain": {},
    "decode": {"lengths": [40, 1, 0, 9], "queries": None},
    "prefill": {"lengths": [160, 210], "queries": [160, 70], "heads": (2, 1)},
    "long": {"lengths": [900, 3], "queries": [2, 3]},
    "not_causal": {"causal": False, "window": 6},
    "window_of_heads": {"window": torch.tensor([3, 9]), "sink_tokens": 2},
    "softcap": {"softcap": 2.0, "scale": 0.4},
    "bias_and_sink": {"key_bias": True, "sink_logit": True},
    "absent_pages": {"absent_pages": 0.4, "page_size": 3},  # of a paged case
    "head_major": {"layout": "HND", "page_size": 7},
    "odd_sizes": {"heads": (10, 2), "head_dims": (37, 21), "page_size": 1},
    "wide": {"heads": (4, 1), "head_dims": (576, 512), "share_kv": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_autograd_through_the_fallback(kernels, kind, variant, dtype):
    sizes = {"lengths": [33, 0, 7, 16], "queries": [5, 2, 9, 16]}
    case = attention_case(kind, **sizes | VARIANTS[variant], dtype=dtype)
    check_gradients(kernels.paged_attention, case)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_against_autograd_through_the_fallback_at_random(kernels, seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[torch.randint(len(values), (), generator=generator)]

    lengths = [pick(0, 1, 7, 30, 100, 500) for _ in range(pick(1, 2, 5))]
    num_kv_heads = pick(1, 2, 3)
    case = attention_case(
        pick(*KINDS),
        lengths,
        pick(None, [min(length, pick(0, 1, 9, 40)) + pick(0, 2) for length in lengths]),
        heads=(num_kv_heads * pick(1, 4, 5, 8), num_kv_heads),
        head_dims=(pick(5, 64, 80, 128), pick(5, 64, 80, 128)),
        page_size=pick(1, 7, 16),
        layout=pick("NHD", "HND"),
        absent_pages=pick(0, 0.3),
        key_bias=pick(True, False),
        sink_logit=pick(True, False),
        dtype=pick(*DTYPES),
        seed=seed,
        causal=pick(True, False),
        window=pick(None, 4, torch.arange(1, num_kv_heads + 1) * 3),
        sink_tokens=pick(0, 2),
        softcap=pick(0.0, 3.0),
    )
    check_gradients(kernels.paged_attention, case)


def gradcheck(paged_attention, case, **kwargs):
    tensors = case.requires_grad().tensors()

    def outputs(*values):
        out, lse = paged_attention(**case.arguments() | dict(zip(tensors, values, strict=True)))
        return out, lse.masked_fill(lse == -torch.inf, 0)  # -inf has no finite difference

    assert torch.autograd.gradcheck(outputs, tuple(tensors.values()), **kwargs)


TINY = {
    "lengths": [4, 0, 2],
    "queries": [2, 1, 3],
    "heads": (2, 1),
    "head_dims": (3, 2),
    "page_size": 3,
    "dtype": torch.float64,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_bias": True, "sink_logit": True, "softcap": 1.5},
        {"causal": False, "window": 2, "sink_tokens": 1, "sink_logit": True},
    ],
)
def test_gradcheck(kind, options):
    gradcheck(native, attention_case(kind, **TINY, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_fallback(kind):
    case = attention_case(kind, **TINY, key_bias=True, sink_logit=True, softcap=1.5)
    gradcheck(fallback.paged_attention, case, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_and_unused_slots_get_zero(ops, kind):
    case = attention_case(kind, [0, 2, 5], [3, 4, 1], key_bias=True)
    grads = gradients(ops.paged_attention, case)
    assert not grads["q"][:5].any()
    for name in "k_cache", "v_cache", "key_bias":
        assert not grads[name][getattr(case, name).isnan()].any()
        assert grads[name].isfinite().all() and grads[name].any()
    masked = case.key_bias == -torch.inf
    for name in "k_cache", "v_cache", "key_bias":
        assert not grads[name][masked].any()


def test_rows_without_keys_give_the_sink_their_lse_gradient(ops):
    case = attention_case("paged", [0], [3], sink_logit=True)
    grads = gradients(ops.paged_attention, case)
    torch.testing.assert_close(grads["sink_logit"], upstream(case)[1].sum(0))
    assert not grads["q"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_masked_keys_may_hold_anything(ops, kind):
    case = attention_case(kind, [20, 9], [20, 2], key_bias=True)
    clean = gradients(ops.paged_attention, case)
    for cache in case.k_cache, case.v_cache:
        cache[case.key_bias == -torch.inf] = torch.nan
    assert_same_bits(gradients(ops.paged_attention, case), clean)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "dout"])
def test_nan_stays_in_its_sequence_and_head(ops, name):
    case = attention_case("packed", [20, 30, 300], [20, 4, 2])
    clean = gradients(ops.paged_attention, case)
    row = 21 if name == "q" else 31
    if name == "dout":
        paged_attention = ops.paged_attention

        def poisoned(**arguments):
            out, lse = paged_attention(**arguments)
            factor = torch.ones_like(out)
            factor[21, 0] = torch.nan
            return out * factor, lse

        dirty = gradients(poisoned, case)
    else:
        tensor = getattr(case, name).clone()
        tensor[row, 0] = torch.nan
        dirty = gradients(ops.paged_attention, case.replace(**{name: tensor}))
    assert dirty["q"][20:24, :2].isnan().any()
    # Sequence 1 is rows 20 to 23 of q and 20 to 49 of the keys; the others and head 1 are clean.
    for key, stop, group in ("q", 24, 2), ("k_cache", 50, 1), ("v_cache", 50, 1):
        for grads in dirty, clean:
            grads[key][20:stop, :group] = 0
        assert_same_bits(dirty[key], clean[key])


def test_shared_pages_accumulate(ops):
    """Three sequences with the same two pages: the gradient is the sum of the three."""
    case = attention_case("paged", [20], dtype=torch.float64, head_dims=(8, 8))
    q = torch.randn(3, 4, 8, dtype=torch.float64)
    shared = case.replace(
        q=q, page_table=case.page_table.expand(3, -1), seq_lens=torch.tensor([20, 20, 17])
    )
    together = gradients(ops.paged_attention, shared)
    dout, dlse = upstream(shared)
    alone = {name: torch.zeros_like(getattr(case, name)) for name in ("k_cache", "v_cache")}
    for b in range(3):
        one = shared.select(b)
        leaves = {name: getattr(one, name).detach().requires_grad_() for name in alone}
        results = ops.paged_attention(**one.arguments() | leaves)
        upstream_grads = dout[b : b + 1], dlse[b : b + 1]
        grads = torch.autograd.grad(results, leaves.values(), upstream_grads)
        for name, grad in zip(alone, grads, strict=True):
            alone[name] += grad
    for name, grad in alone.items():
        torch.testing.assert_close(together[name], grad)


def test_v_may_be_a_view_of_k(ops):
    """Both gradients arrive at the one tensor."""
    case = attention_case("packed", [9, 4], [9, 2], heads=(4, 1), dtype=torch.float64)
    latent = torch.randn(13, 1, 64, dtype=torch.float64, requires_grad=True)
    views = {"k_cache": latent, "v_cache": latent[..., :48]}
    ops.paged_attention(**case.replace(**views).arguments())[0].square().sum().backward()
    k, v = (view.detach().clone().requires_grad_() for view in views.values())
    ops.paged_attention(**case.replace(k_cache=k, v_cache=v).arguments())[
        0
    ].square().sum().backward()
    k.grad[..., :48] += v.grad
    torch.testing.assert_close(latent.grad, k.grad)


@pytest.mark.parametrize("names", [["q"], ["k_cache"], ["v_cache"], ["key_bias"], ["sink_logit"],
                                   ["q", "v_cache"]])  # fmt: skip
def test_each_gradient_only_if_asked_for(names):
    """Asking for fewer changes no bits of those asked for."""
    case = attention_case("paged", [33, 7], [5, 7], key_bias=True, sink_logit=True)
    every = gradients(native, case)
    assert_same_bits(gradients(native, case, names), {name: every[name] for name in names})


@pytest.mark.parametrize("result", [0, 1])
def test_one_result_alone(ops, result):
    """A loss of out alone, or of lse alone (whose gradient does not reach v)."""
    case = attention_case("paged", [33, 0, 7], [5, 2, 9], sink_logit=True).requires_grad()
    ops.paged_attention(**case.arguments())[result].nan_to_num(neginf=0).square().sum().backward()
    expected = case.requires_grad()
    results = fallback.paged_attention(**expected.arguments())
    results[result].nan_to_num(neginf=0).square().sum().backward()
    for name, tensor in expected.tensors().items():
        actual, exact = getattr(case, name).grad, tensor.grad
        if exact is None:  # v_cache, of lse
            assert actual is None or not actual.any()
        else:
            torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_time_and_for_any_threads(kind, dtype):
    case = attention_case(kind, [700, 40, 0, 90], [3, 40, 1, 90], dtype=dtype, sink_logit=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = gradients(native, case)
        for threads in 1, 2, 2, 3:
            torch.set_num_threads(threads)
            assert_same_bits(gradients(native, case), expected)
    finally:
        torch.set_num_threads(before)


def test_strided_gradient_of_out(ops):
    case = attention_case("packed", [9, 4], [9, 2]).requires_grad()
    out = ops.paged_attention(**case.arguments())[0]
    dout = torch.randn(*out.shape[:2], 2 * out.shape[2])[..., ::2]
    strided = torch.autograd.grad(out, case.q, dout, retain_graph=True)
    assert_same_bits(strided, torch.autograd.grad(out, case.q, dout.contiguous()))
    out = ops.paged_attention(**case.arguments())[0]
    ones = torch.autograd.grad(out.sum(), case.q)  # arrives with strides of 0
    out = ops.paged_attention(**case.arguments())[0]
    torch.testing.assert_close(ones, torch.autograd.grad(out, case.q, torch.ones_like(out)))


def test_batch_of_no_sequences(ops):
    case = attention_case("packed", [], [])
    assert gradients(ops.paged_attention, case, ["q"])["q"].shape == (0, 4, 64)


@pytest.mark.parametrize("weighted", [False, True])
def test_differentiable_once(weighted):
    """A gradient of a gradient raises; above all it is not silently incomplete."""
    case = attention_case("packed", [5], [5]).requires_grad()
    out = native(**case.arguments())[0]
    weight = torch.ones_like(out).requires_grad_(weighted)
    (grad,) = torch.autograd.grad(out, case.q, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia"):
        (grad * case.q).sum().backward()


def test_no_graph_without_need():
    case = attention_case("paged", [5], [5])
    assert not native(**case.arguments())[0].requires_grad
    with torch.no_grad():
        assert not native(**case.requires_grad().arguments())[0].requires_grad
    assert native(**case.requires_grad().arguments())[0].requires_grad


def test_an_input_changed_in_place_is_noticed():
    """append_kv between forward and backward would make gradients wrong; autograd says so."""
    case = attention_case("paged", [5], [5])
    q = case.q.requires_grad_()
    out = native(**case.arguments())[0]
    k, v = torch.zeros(1, 2, 64), torch.zeros(1, 2, 64)
    memkernels.append_kv(k, v, case.k_cache, case.v_cache, torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), q)


def test_autocast():
    """Gradients arrive in the dtypes of the leaves, whatever autocast computed in."""
    case = attention_case("packed", [9, 4], [9, 2]).requires_grad()
    half = {name: tensor.bfloat16() for name, tensor in case.tensors().items()}
    expected = gradients(native, case.replace(**half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = native(**case.arguments())
    assert out.dtype == torch.bfloat16
    dout, dlse = upstream(case)
    grads = torch.autograd.grad((out, lse), case.tensors().values(), (dout.bfloat16(), dlse))
    for grad, (name, half_grad) in zip(grads, expected.items(), strict=True):
        assert grad.dtype == torch.float32, name
        assert_same_bits(grad, half_grad.float())


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    case = attention_case(kind, [33, 0, 7], [5, 2, 9], key_bias=True, sink_logit=True)

    def attention(**arguments):
        return memkernels.paged_attention(**arguments, return_lse=True)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradients(compiled, case), gradients(native, case))
    torch._dynamo.reset()
