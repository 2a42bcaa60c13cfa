"""Product keys, and the networks whose neurons they choose, forward and backward."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import memkernels
from cases import arrays
from checks import at_random, check, check_error, check_gradients, gradients, outcome, put, upstream
from lookup_cases import ffn_case, product_key_case, wide
from memkernels import fallback, reference
from test_attention import DTYPES
from test_selection import ALONE, INDEX_DTYPES
from tolerance import assert_accurate, assert_same_bits

# ---- product_key_topk ----------------------------------------------------------------------------


def best(ops, arguments):
    scores, indices = outcome(ops, "product_key_topk", arguments)
    shape = (*arguments["query"].shape[:2], arguments["k"])
    assert scores.shape == indices.shape == shape
    assert scores.dtype == wide(arguments["query"].dtype) and indices.dtype == torch.int64
    return scores, indices


def check_exact(ops, arguments):
    """Where every score is exact, so is what is found."""
    scores, indices = best(ops, arguments)
    exact_scores, exact_indices = reference.product_key_topk(**arrays(arguments))
    np.testing.assert_array_equal(indices.numpy(), exact_indices)
    assert_same_bits(scores, torch.from_numpy(exact_scores).to(scores.dtype))
    return scores, indices


def exact_scores(arguments, indices):
    """Of slots, in float64; and how far rounding may take them."""
    query, keys = arguments["query"].double(), arguments["keys"].double()
    size = keys.shape[2]
    heads = torch.arange(len(keys))[:, None]
    scores = rounding = 0
    for half, rows in enumerate((indices // size, indices % size)):
        key, one = keys[heads, half, rows], query[:, :, half, None]
        scores = scores + (key * one).sum(-1)
        rounding = rounding + key.norm(dim=-1) * one.norm(dim=-1)
    return scores, 8 * torch.finfo(wide(arguments["query"].dtype)).eps * rounding


def check_near(ops, arguments):
    """The scores are the best; what is found has them, in order."""
    scores, indices = best(ops, arguments)
    exact = reference.product_key_topk(**arrays(arguments))[0]
    baseline = fallback.product_key_topk(**arguments)[0]
    assert_accurate(scores, exact, baseline, dtype=scores.dtype, slack=ALONE)
    own, rounding = exact_scores(arguments, indices)
    assert ((scores - own).abs() <= rounding).all()
    assert (indices.sort(-1).values.diff() > 0).all()
    assert (scores.diff() <= 0).all()
    assert (indices.diff()[scores.diff() == 0] > 0).all()


@st.composite
def searches(draw, **options):
    size = draw(st.integers(1, 12) | st.integers(1, 70))
    return product_key_case(
        draw(st.sampled_from([0, 1, 3, 8, 17])),
        size,
        draw(st.integers(1, min(size, 9)) | st.integers(1, size)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 70)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
        **options,
    )


@at_random(arguments=searches(integers=True))
def test_integers_at_random(ops, arguments):
    """Ties are everywhere."""
    check_exact(ops, arguments)


@at_random(arguments=searches())
def test_keys_at_random(ops, arguments):
    check_near(ops, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "k"), [(128, 128), (513, 32)])
def test_many_keys(ops, size, k, dtype):
    check_near(ops, product_key_case(3, size, k, head_dim=64, dtype=dtype))


@pytest.mark.parametrize(("tokens", "size", "k"), [(2, 700, 128), (2, 300, 33), (35, 140, 5)])
def test_many_equal_keys(ops, tokens, size, k):
    check_exact(ops, product_key_case(tokens, size, k, integers=True, heads=1, head_dim=3))


@pytest.mark.parametrize("falling", [False, True])
def test_keys_in_order_of_their_scores(ops, falling):
    keys = torch.arange(1024.0).expand(1, 2, -1)
    keys = (keys.flip(-1) if falling else keys).unsqueeze(-1).contiguous()
    check_exact(ops, {"query": torch.ones(1, 1, 2, 1), "keys": keys, "k": 128})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_are_those_of_all_pairs(ops, dtype):
    sizes = {"head_dim": 3, "integers": True, "dtype": dtype}
    arguments = product_key_case(40, 60, 50, **sizes)
    scores, indices = best(ops, arguments)
    pairs = torch.arange(60 * 60).expand(40, 2, -1)
    order = exact_scores(arguments, pairs)[0].sort(dim=-1, descending=True, stable=True)
    assert_same_bits(indices, order.indices[..., :50])
    assert_same_bits(scores, order.values[..., :50].to(scores.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_copies_of_a_key_are_equally_good(tokens, dtype):
    """Wherever they lie: pairs of copies come together, in their order."""
    arguments = product_key_case(tokens, 7, 100, heads=1, head_dim=33, dtype=dtype)
    arguments["keys"] = arguments["keys"].repeat(1, 1, 15, 1)  # 225 copies of each pair
    scores, indices = best(memkernels, arguments)
    assert (scores == scores[..., :1]).all()
    first = indices[..., :1] // 105 % 7, indices[..., :1] % 7
    rows = torch.arange(15) * 7
    copies = (first[0] + rows).unsqueeze(-1) * 105 + (first[1] + rows).unsqueeze(-2)
    assert_same_bits(indices, copies.flatten(-2)[..., :100])


@at_random(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_special_scores_at_random(ops, data, dtype):
    """NaN and -inf are never found; where fewer than k are, -inf and -1."""
    size = data.draw(st.integers(1, 6))
    values = st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 2.0])
    keys = data.draw(st.lists(values, min_size=2 * size, max_size=2 * size))
    arguments = {
        "query": torch.ones(1, 1, 2, 1, dtype=dtype),
        "keys": torch.tensor(keys, dtype=dtype).view(1, 2, size, 1),
        "k": data.draw(st.integers(1, size)),
    }
    check_exact(ops, arguments)


def test_nan_of_a_query_stays_in_its_token_and_head(ops):
    arguments = product_key_case(9, 20, 7)
    scores, indices = best(ops, arguments)
    dirty = arguments | {"query": put(arguments["query"], (3, 1, 0, 5), torch.nan)}
    scores[3, 1], indices[3, 1] = -torch.inf, -1
    assert_same_bits(best(ops, dirty), (scores, indices))


PRODUCT_KEY_ERRORS = {
    "rank_of_query": ("query", lambda c: {"query": c.query[0]}),
    "three_halves": ("query", lambda c: {"query": c.query[:, :, [0, 1, 1]]}),
    "integer_query": ("query", lambda c: {"query": c.query.int()}),
    "no_columns_of_query": ("query|keys", lambda c: {"query": c.query[..., :0]}),
    "no_columns": ("query|keys", lambda c: {"query": c.query[..., :0], "keys": c.keys[..., :0]}),
    "rank_of_keys": ("keys", lambda c: {"keys": c.keys[0]}),
    "halves_of_keys": ("keys", lambda c: {"keys": c.keys[:, :1]}),
    "heads_of_keys": ("keys|query", lambda c: {"keys": c.keys[:1]}),
    "columns_of_keys": ("keys|query", lambda c: {"keys": c.keys[..., :5]}),
    "dtype_of_keys": ("keys|query", lambda c: {"keys": c.keys.half()}),
    "no_keys": ("k|keys", lambda c: {"keys": c.keys[:, :, :0]}),
    "too_many_keys": ("keys", lambda c: {"keys": c.keys[:, :, :1].expand(-1, -1, 65537, -1)}),
    "k_zero": ("k", {"k": 0}),
    "k_negative": ("k", {"k": -1}),
    "k_above_size": ("k", {"k": 21}),
    "k_above_128": ("k", lambda c: {"keys": c.keys.repeat(1, 1, 10, 1), "k": 129}),
}


@pytest.mark.parametrize("error", PRODUCT_KEY_ERRORS)
def test_product_key_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = product_key_case(5, 20, 3)
    check_error(ops, "product_key_topk", arguments, PRODUCT_KEY_ERRORS[error])


def test_65536_keys_of_a_half(ops):
    """The largest index is that of the last pair."""
    keys = torch.zeros(1, 2, 65536, 1)
    keys[:, :, -1] = 1
    scores, indices = ops.product_key_topk(torch.ones(1, 1, 2, 1), keys, 2)
    assert indices.tolist() == [[[2**32 - 1, 65535]]]
    assert scores.tolist() == [[[2, 1]]]


# ---- its gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_scores(dtype):
    for tokens, size, k, head_dim in (40, 30, 9, 37), (3, 8, 8, 64), (0, 4, 2, 5):
        arguments = product_key_case(tokens, size, k, head_dim=head_dim, dtype=dtype)
        check_gradients(memkernels, "product_key_topk", arguments)


def test_gradcheck_of_scores(ops):
    arguments = product_key_case(3, 6, 4, head_dim=3, dtype=torch.float64)
    leaves = [arguments[name].requires_grad_() for name in ("query", "keys")]
    assert torch.autograd.gradcheck(lambda *x: ops.product_key_topk(*x, 4)[0], leaves)


@pytest.mark.parametrize("names", [["query"], ["keys"]])
def test_each_gradient_of_scores_only_if_asked_for(ops, names):
    arguments = product_key_case(9, 20, 5)
    every = gradients(ops.product_key_topk, arguments)
    fewer = gradients(ops.product_key_topk, arguments, names)
    assert_same_bits(fewer, {name: every[name] for name in names})


def test_what_is_not_found_has_no_gradient(ops):
    """Nor passes on the gradients that arrive at the missing scores."""
    arguments = product_key_case(9, 6, 5)
    arguments["keys"][0, 1, 1:] = torch.nan  # leaves one key of a half, of head 0
    arguments["query"][4] = torch.nan
    grads = gradients(ops.product_key_topk, arguments)
    assert not grads["query"][4].any() and not grads["keys"][0, 1, 1:].any()
    for grad in grads.values():
        assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("name", ["query", "keys"])
def test_gradients_of_gradients_are_right_or_refused(ops, name):
    arguments = product_key_case(5, 6, 3, dtype=torch.float64)
    leaves = [arguments[n].requires_grad_() for n in ("query", "keys")]

    def second(ops):
        loss = ops.product_key_topk(**arguments)[0].square().sum()
        (grad,) = torch.autograd.grad(loss, arguments[name], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves)

    try:
        actual = second(ops)
    except RuntimeError as error:
        assert "differentia" in str(error)
    else:
        torch.testing.assert_close(actual, second(fallback))


def product_key_memory(ops, query, keys, values):
    """Lample et al. (2019), of heads that share their values."""
    scores, indices = ops.product_key_topk(query, keys, 5)
    weights = scores.softmax(-1).to(values.dtype)
    return ops.embedding_bag(indices.flatten(1), values, per_sample_weights=weights.flatten(1))


def test_a_product_key_memory(ops):
    """Against all products, in plain torch."""
    arguments = product_key_case(11, 9, 5, dtype=torch.float64)
    leaves = [arguments["query"], arguments["keys"], torch.randn(81, 13).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    query, keys, values = leaves
    halves = torch.einsum("thpd,hpnd->pthn", query, keys)
    scores, indices = (halves[0][..., None] + halves[1][..., None, :]).flatten(-2).topk(5)
    expected = (scores.softmax(-1)[..., None] * values[indices]).sum((1, 2))
    actual = product_key_memory(ops, *leaves)
    torch.testing.assert_close(actual, expected)
    dout = upstream(expected)
    expected = torch.autograd.grad(expected, leaves, dout)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, dout), expected)


# ---- sparse_ffn ----------------------------------------------------------------------------------

ACTIVATIONS = ["gelu", "gelu_tanh", "silu", "relu", "none"]
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@st.composite
def networks(draw, **options):
    dims = st.integers(1, 80) | st.just(260)
    return ffn_case(
        draw(st.integers(0, 7)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([1, 2, 9, 300])),
        (draw(dims), draw(dims)),
        factors=draw(st.sampled_from([None, "same", "wide"])),
        skipped=draw(st.sampled_from([0, 0.2, 1])),
        popular=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from(DTYPES)),
        index_dtype=draw(st.sampled_from(INDEX_DTYPES)),
        seed=draw(st.integers(0, 2**16)),
        **options,
    )


@at_random(arguments=networks())
def test_networks_at_random(ops, arguments):
    # In float64 plain torch may have the very sums of the reference.
    dtype = arguments["x"].dtype
    slack = 8 * ALONE if dtype == torch.float64 else ALONE
    out = check(ops, "sparse_ffn", arguments, slack=slack)
    assert out.dtype == dtype and out.is_contiguous()


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_networks_of_integers_are_exact_for_every_dim(ops, activation, dtype):
    for dim, dim_out in (1, 7), (8, 16), (15, 1), (33, 130), (64, 64), (200, 33):
        sizes = {"integers": True, "factors": "same", "activation": activation, "dtype": dtype}
        arguments = ffn_case(5, 11, 30, (dim, dim_out), **sizes)
        exact = torch.from_numpy(reference.sparse_ffn(**arrays(arguments)))
        assert_same_bits(outcome(ops, "sparse_ffn", arguments), exact.to(dtype))


@activations
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_any_size(ops, activation, dtype):
    """Each number is as accurate as float32 is for numbers around 9, and so is its gradient."""
    h = torch.cat([torch.linspace(-9, 9, 37), torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4])])
    one = torch.ones(1, 1, dtype=dtype)
    x, indices = h.to(dtype)[:, None], torch.zeros(len(h), 1, dtype=torch.long)
    arguments = {"x": x, "up": one, "down": one, "indices": indices, "activation": activation}
    exact = reference.sparse_ffn(**arrays(arguments))
    eps = torch.finfo(dtype).eps
    rounding = {"rtol": 2 * eps, "atol": 64 * torch.finfo(wide(dtype)).eps}
    actual = outcome(ops, "sparse_ffn", arguments).double().numpy()
    np.testing.assert_allclose(actual, exact, **rounding)
    (grad,) = gradients(ops.sparse_ffn, arguments, ["x"]).values()
    in_float64 = {name: t.double() for name, t in (("x", x), ("up", one), ("down", one))}
    (exact,) = gradients(fallback.sparse_ffn, arguments | in_float64, ["x"]).values()
    np.testing.assert_allclose(grad.double().numpy(), exact.numpy(), **rounding)


def test_tokens_of_no_neurons_give_zero(ops):
    arguments = ffn_case(4, 3, 9, (6, 5), skipped=1)
    arguments["x"][1] = torch.nan
    for changes in {}, {"up": arguments["up"][:0], "down": arguments["down"][:0]}:
        assert not outcome(ops, "sparse_ffn", arguments | changes).any()
    none = {name: arguments[name][:0] for name in ("x", "indices")}
    assert outcome(ops, "sparse_ffn", arguments | none).shape == (0, 5)


@activations
def test_every_neuron_is_a_dense_network(ops, activation):
    arguments = ffn_case(9, 40, 40, (24, 17), dtype=torch.float64, activation=activation)
    arguments["indices"] = torch.arange(40).expand(9, -1)
    up, down = (arguments[name].nan_to_num(nan=0.5) for name in ("up", "down"))
    act = {
        "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        "none": lambda h: h,
    }.get(activation) or getattr(torch.nn.functional, activation)
    expected = act(arguments["x"] @ up.T) @ down
    actual = outcome(ops, "sparse_ffn", arguments | {"up": up, "down": down})
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["x", "up", "down", "weights"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_reaches_only_the_tokens_that_use_it(ops, name, value):
    arguments = ffn_case(12, 4, 30, (20, 9), factors="same", activation="none")
    row = arguments["indices"][3][arguments["indices"][3] >= 0][0].item()
    clean = outcome(ops, "sparse_ffn", arguments)
    users = (arguments["indices"] == row).any(1)
    if name in ("x", "weights"):
        users = torch.arange(12) == 3
    column = (arguments["indices"][3] == row).nonzero()[0].item()
    place = {"x": (3, 2), "weights": (3, column)}.get(name, (row, 2))
    dirty = arguments | {name: put(arguments[name], place, value)}
    actual = outcome(ops, "sparse_ffn", dirty)
    assert_same_bits(actual[~users], clean[~users])
    touched = actual[users, 2] if name == "down" else actual[users]
    assert not users.all() and not touched.isfinite().any()


VARIANTS = {
    "plain": {},
    "factors": {"factors": "same"},
    "wide_factors": {"factors": "wide"},
    "popular": {"factors": "same", "popular": True, "activation": "silu"},
    "tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu", "factors": "same"},
    "linear": {"activation": "none", "factors": "same"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_networks(kernels, variant, dtype):
    arguments = ffn_case(9, 12, 40, (37, 64), dtype=dtype, **VARIANTS[variant])
    check_gradients(kernels, "sparse_ffn", arguments, slack=8)


@activations
@pytest.mark.parametrize("factors", [None, "same"])
def test_gradcheck_of_networks(ops, activation, factors):
    sizes = {"factors": factors, "dtype": torch.float64, "activation": activation}
    arguments = ffn_case(3, 3, 4, (3, 2), **sizes)
    names = ["x", "up", "down"] + (["weights"] if factors else [])
    leaves = [arguments[name].nan_to_num().requires_grad_() for name in names]

    def out(*values):
        return ops.sparse_ffn(**arguments | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(out, leaves)


def test_relu_has_gradient_zero_at_zero(ops):
    """As torch has it."""
    arguments = ffn_case(4, 3, 9, (6, 5), activation="relu", skipped=0)
    arguments["x"] = torch.zeros(4, 6)
    for grad in gradients(ops.sparse_ffn, arguments).values():
        assert not grad.any()


@pytest.mark.parametrize("names", [["x"], ["up"], ["down"], ["weights"], ["up", "weights"]])
def test_each_gradient_of_networks_only_if_asked_for(ops, names):
    arguments = ffn_case(9, 7, 20, (12, 10), factors="same")
    every = gradients(ops.sparse_ffn, arguments)
    fewer = gradients(ops.sparse_ffn, arguments, names)
    assert_same_bits(fewer, {name: every[name] for name in names})


@pytest.mark.parametrize("many", [6, 10, 130])
def test_all_pairs_equal(ops, many):
    """More equal sums than k, of keys in no order: the lowest indices win."""
    order = torch.randperm(130, generator=torch.Generator().manual_seed(many))
    halves = torch.where(order < many, 1e30, -order.float())
    keys = torch.stack([halves, halves.flip(0)])[None, ..., None]
    query = torch.ones(1, 1, 2, 1)
    scores, indices = ops.product_key_topk(query, keys, 128)
    exact_scores, exact = reference.product_key_topk(query.numpy(), keys.numpy(), 128)
    assert indices.tolist() == exact.tolist()
    np.testing.assert_array_equal(scores.numpy(), exact_scores.astype(np.float32))


FFN_ERRORS = {
    "rank_of_x": ("x", lambda c: {"x": c.x[0]}),
    "integer_x": ("x", lambda c: {"x": c.x.int()}),
    "columns_of_x": ("x|up", lambda c: {"x": c.x[:, :-1]}),
    "no_columns_of_x": ("x", lambda c: {"x": c.x[:, :0], "up": c.up[:, :0]}),
    "rank_of_up": ("up", lambda c: {"up": c.up[0]}),
    "dtype_of_up": ("up", lambda c: {"up": c.up.half()}),
    "rank_of_down": ("down", lambda c: {"down": c.down[0]}),
    "rows_of_down": ("down|up", lambda c: {"down": c.down[:-1]}),
    "no_columns_of_down": ("down", lambda c: {"down": c.down[:, :0]}),
    "dtype_of_down": ("down", lambda c: {"down": c.down.double()}),
    "rows_of_indices": ("indices", lambda c: {"indices": c.indices[:-1], "weights": None}),
    "no_columns_of_indices": (
        "indices", lambda c: {"indices": c.indices[:, :0], "weights": None}
    ),
    "rank_of_indices": ("indices", lambda c: {"indices": c.indices[0]}),
    "dtype_of_indices": ("indices", lambda c: {"indices": c.indices.float()}),
    "index_too_large": (r"indices\b.* \[3, 2", lambda c: {"indices": put(c.indices, (3, 2), 9)}),
    "index_below_minus_one": ("indices", lambda c: {"indices": put(c.indices, (3, 2), -2)}),
    "shape_of_weights": ("weights", lambda c: {"weights": c.weights[:, :1]}),
    "narrow_weights": ("weights", lambda c: {"weights": c.weights.half()}),
    "double_weights": ("weights", lambda c: {"weights": c.weights.double()}),
    "activation": ("activation", {"activation": "tanh"}),
}  # fmt: skip


@pytest.mark.parametrize("error", FFN_ERRORS)
def test_ffn_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = ffn_case(5, 4, 9, (6, 5), factors="same")
    check_error(ops, "sparse_ffn", arguments, FFN_ERRORS[error])
