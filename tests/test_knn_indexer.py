"""Search in a bank of keys, and the scores of a lightning indexer, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

import memkernels
from cases import arrays, indexer_case, knn_case, of_sequence
from checks import (
    at_random,
    check,
    check_error,
    check_gradients,
    check_refused,
    gradients,
    opcheck,
    outcome,
    put,
    upstream,
)
from memkernels import fallback, reference
from test_attention import DTYPES, RAGGED, apart
from test_selection import ALONE, QUERY_ERRORS, TABLE_ERRORS, attention_sizes
from tolerance import assert_accurate, assert_same_bits

METRICS = ["dot", "cosine", "l2"]

metrics = pytest.mark.parametrize("metric", METRICS)


# ---- knn_topk ------------------------------------------------------------------------------------


def knn(ops, arguments):
    values, indices = outcome(ops, "knn_topk", arguments)
    shape = (*arguments["q"].shape[:2], arguments["k"])
    assert values.shape == indices.shape == shape
    assert values.dtype == torch.promote_types(arguments["q"].dtype, torch.float32)
    assert indices.dtype == torch.int64
    return values, indices


def check_exact(ops, arguments):
    """Where every score is exact, so is what is found."""
    values, indices = knn(ops, arguments)
    exact_values, exact_indices = reference.knn_topk(**arrays(arguments))
    np.testing.assert_array_equal(indices.numpy(), exact_indices)
    assert_same_bits(values, torch.from_numpy(exact_values).to(values.dtype))
    return values, indices


def exact_scores(arguments):
    """``[Q, H, N]`` float64, larger is better; and how far rounding may take a score."""
    q, bank = arguments["q"].double().transpose(0, 1), arguments["bank"].double()
    dots, squares = q @ bank.mT, bank.square().sum(-1)[:, None]
    sizes = q.norm(dim=-1)[..., None] * squares.sqrt()
    metric = arguments.get("metric", "dot")
    if metric == "cosine":
        dots, sizes = dots / sizes, torch.ones_like(sizes)
    elif metric == "l2":
        dots = 2 * dots - q.square().sum(-1)[..., None] - squares
        sizes = q.square().sum(-1)[..., None] + squares
    eps = torch.finfo(torch.promote_types(arguments["q"].dtype, torch.float32)).eps
    return dots.transpose(0, 1), 8 * eps * sizes.transpose(0, 1)


def check_near(ops, arguments):
    """What is found has the scores it says, is in order, and nothing left out is better."""
    values, indices = knn(ops, arguments)
    scores, rounding = exact_scores(arguments)
    sign = -1 if arguments.get("metric") == "l2" else 1
    found = sign * values.double()
    assert (indices >= 0).all()
    assert (indices.sort(-1).values.diff() > 0).all()
    assert ((found - scores.gather(-1, indices)).abs() <= rounding.gather(-1, indices)).all()
    assert (found.diff() <= 0).all()
    same = found.diff() == 0
    assert (indices.diff()[same] > 0).all()
    others = scores.scatter(-1, indices, -torch.inf) - rounding
    if arguments["k"]:
        assert (others.amax(-1) <= found[..., -1]).all()


def check_as_near(arguments, indices, expected):
    """As many entries as expected, all different, and but for rounding the same scores."""
    assert_same_bits(indices < 0, expected < 0)
    in_order = indices.sort(-1).values
    assert (in_order.diff() > 0)[in_order[..., 1:] >= 0].all()
    scores, rounding = (torch.nn.functional.pad(x, (0, 1)) for x in exact_scores(arguments))
    places = [x % scores.shape[-1] for x in (indices, expected)]  # -1: the last column, of zeros
    one, other = (scores.gather(-1, place) for place in places)
    doubt = sum(rounding.gather(-1, place) for place in places)
    assert ((one - other).abs() <= doubt).all()


@st.composite
def searches(draw, **options):
    size = draw(st.integers(0, 40) | st.integers(0, 300))
    heads = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(0, size), min_size=heads, max_size=heads)
    return knn_case(
        draw(st.sampled_from([0, 1, 3, 5, 17, 70])),
        size,
        draw(st.integers(0, 9) | st.integers(0, size + 5)),
        heads=heads,
        head_dim=draw(st.integers(1, 80) | st.just(128)),
        valid_len=draw(st.none() | lengths),
        dtype=draw(st.sampled_from(DTYPES)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        buckets=draw(st.sampled_from([None, None, 1, 3, 7, 64, 1000])),
        seed=draw(st.integers(0, 2**16)),
        **options,
    )


@at_random(data=st.data(), metric=st.sampled_from(["dot", "l2"]))
def test_knn_of_integers_at_random(ops, data, metric):
    """Ties are everywhere."""
    check_exact(ops, data.draw(searches(integers=True, metric=metric)))


@at_random(data=st.data(), metric=st.sampled_from(METRICS))
def test_knn_at_random(ops, data, metric):
    """The very entries of the reference, but where rounding leaves a doubt about their order."""
    arguments = data.draw(searches(metric=metric))
    values, indices = knn(ops, arguments)
    exact_values, exact_indices = reference.knn_topk(**arrays(arguments))
    baseline = fallback.knn_topk(**arguments)[0]
    assert_accurate(values, exact_values, baseline, dtype=values.dtype, slack=ALONE)
    check_as_near(arguments, indices, torch.from_numpy(exact_indices))


@metrics
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 3, 70])
def test_knn_of_large_banks(ops, metric, dtype, num_queries):
    for size, k in (5000, 40), (1025, 1025):
        case = knn_case(num_queries, size, k, dtype=dtype, metric=metric, head_dim=24)
        check_near(ops, case)


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 3, 70])
def test_ties_of_large_banks_go_to_the_lower_index(ops, metric, dtype, num_queries):
    sizes = {"integers": True, "head_dim": 3, "metric": metric, "dtype": dtype}
    arguments = knn_case(num_queries, 5000, 100, **sizes)
    values, indices = knn(ops, arguments)
    scores, _ = exact_scores(arguments)
    best = scores.sort(dim=-1, descending=True, stable=True)
    assert_same_bits(indices, best.indices[..., :100])
    assert_same_bits(values.abs(), best.values[..., :100].abs().to(values.dtype))


@metrics
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 3, 70])
def test_duplicates_are_equally_near(metric, dtype, num_queries):
    """Wherever in the bank they lie: all copies of an entry come together, in their order."""
    arguments = knn_case(num_queries, 19, 1009, metric=metric, dtype=dtype, head_dim=33)
    arguments["bank"] = arguments["bank"].repeat(1, 54, 1)[:, :1009]
    values, indices = knn(memkernels, arguments)
    entry = indices % 19
    together = entry.diff() == 0
    assert together.sum() == together[..., 0].numel() * (1009 - 19)
    assert (indices.diff()[together] == 19).all()
    assert (values.diff()[together] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosines_of_exact_norms_are_exact(ops, dtype):
    """Of 1, 4, 16 or 64 signs each: norms and similarities are powers of two, with many ties."""
    generator = torch.Generator().manual_seed(0)

    def signs(*shape):
        rows = torch.randint(0, 2, (*shape, 64), generator=generator) * 2.0 - 1
        count = 4 ** torch.randint(0, 4, shape, generator=generator)[..., None]
        return rows.where(torch.arange(64) < count, 0).to(dtype)

    q, bank = signs(7, 2), signs(2, 300)
    bank[:, ::11] = q[0, :, None] = 0
    arguments = {"q": q, "bank": bank, "valid_len": None, "k": 310, "metric": "cosine"}
    values, indices = check_exact(ops, arguments)
    assert not values[0, :, :300].any() and (indices[0, :, :300] == torch.arange(300)).all()


def test_buckets_give_their_best_alone(ops):
    for size, buckets in (2000, 64), (70, 9), (5, 9):
        arguments = knn_case(3, size, 12, integers=True, buckets=buckets)
        _, indices = check_exact(ops, arguments)
        for row in indices.flatten(0, 1):
            found = row[row >= 0]
            assert len(found) == min(12, buckets, size)
            assert len((found % buckets).unique()) == len(found)
    as_many = knn_case(3, 70, 12, integers=True, buckets=70)
    assert_same_bits(knn(ops, as_many), knn(ops, as_many | {"buckets": None}))


@metrics
def test_entries_behind_valid_len_never_count(ops, metric):
    """They are NaN; a head with no entries finds nothing."""
    arguments = knn_case(3, 40, 9, heads=4, valid_len=[40, 0, 5, 9], metric=metric)
    values, indices = knn(ops, arguments)
    found = torch.tensor([9, 0, 5, 9])[:, None]
    assert ((indices >= 0) == (torch.arange(9) < found)).all()
    assert (indices < arguments["valid_len"][:, None]).all()
    missing = torch.inf if metric == "l2" else -torch.inf
    assert (values[indices < 0] == missing).all() and values[indices >= 0].isfinite().all()


@metrics
def test_empty_searches(ops, metric):
    for num_queries, size, k in (0, 9, 3), (2, 9, 0), (2, 0, 3), (0, 0, 0):
        arguments = knn_case(num_queries, size, k, metric=metric)
        _, indices = check_exact(ops, arguments)
        assert (indices == -1).all()


@metrics
@pytest.mark.parametrize("num_queries", [1, 70])
def test_nan_is_never_found(ops, metric, num_queries):
    arguments = knn_case(num_queries, 50, 60, metric=metric)
    clean_values, clean = knn(ops, arguments)
    arguments["bank"][1, 7, 3] = torch.nan
    values, indices = knn(ops, arguments)
    assert_same_bits([values[:, 0], indices[:, 0]], [clean_values[:, 0], clean[:, 0]])
    without = clean[:, 1][clean[:, 1] != 7].view(num_queries, -1)
    assert_same_bits(indices[:, 1, :59], without)
    arguments["q"][0, 0] = torch.nan
    values, indices = knn(ops, arguments)
    assert (indices[0, 0] == -1).all()
    assert_same_bits(indices[1:, 0], clean[1:, 0])


@metrics
def test_infinite_entries_are_found_if_their_score_is_best(ops, metric):
    """inf is the best product and the worst distance, which is never found."""
    arguments = knn_case(3, 40, 50, integers=True, metric=metric, heads=1)
    arguments["q"] = arguments["q"].abs() + 1
    arguments["bank"][0, 9] = torch.inf
    arguments["bank"][0, 12] = -torch.inf
    exact_values, exact = reference.knn_topk(**arrays(arguments))
    values, indices = knn(ops, arguments)
    np.testing.assert_array_equal((indices == 9).numpy(), exact == 9)
    assert not (indices == 12).any()
    np.testing.assert_allclose(values.numpy(), exact_values, rtol=1e-6)


@metrics
def test_an_entry_is_nearest_to_itself(ops, metric):
    """Where distances are differences of large numbers, none is negative."""
    arguments = knn_case(50, 50, 1, metric=metric, head_dim=64)
    arguments["bank"] = torch.nn.functional.normalize(arguments["bank"], dim=-1) * 100
    arguments["q"] = arguments["bank"].transpose(0, 1).contiguous()
    values, indices = knn(ops, arguments)
    assert (indices == torch.arange(50)[:, None, None]).all()
    if metric == "l2":
        assert (values >= 0).all() and (values <= 64 * 1e4 * torch.finfo(torch.float32).eps).all()


def test_heads_never_change_each_others_bits():
    """Nor what follows in the bank."""
    arguments = knn_case(9, 700, 20, heads=3, valid_len=[700, 300, 20])
    together = knn(memkernels, arguments)
    for head in range(3):
        length = int(arguments["valid_len"][head])
        alone = {
            "q": arguments["q"][:, head : head + 1],
            "bank": arguments["bank"][head : head + 1, :length],
            "valid_len": None,
        }
        alone = knn(memkernels, arguments | alone)
        assert_same_bits(alone, tuple(x[:, head : head + 1] for x in together))


KNN_ERRORS = {
    "rank_of_q": ("q", lambda c: {"q": c.q[0]}),
    "integer_q": ("q", lambda c: {"q": c.q.int()}),
    "heads_of_q": ("q|bank", lambda c: {"q": c.q[:, :1]}),
    "head_dim": ("q|bank", lambda c: {"q": c.q[..., :8]}),
    "dtype_of_q": ("q|bank", lambda c: {"q": c.q.double()}),
    "rank_of_bank": ("bank", lambda c: {"bank": c.bank[0]}),
    "dtype_of_bank": ("bank", lambda c: {"bank": c.bank.half()}),
    "valid_len_too_large": ("valid_len", {"valid_len": torch.tensor([41, 3])}),
    "valid_len_negative": ("valid_len", {"valid_len": torch.tensor([-1, 3])}),
    "rows_of_valid_len": ("valid_len", {"valid_len": torch.tensor([4])}),
    "rank_of_valid_len": ("valid_len", {"valid_len": torch.tensor([[4, 3]])}),
    "dtype_of_valid_len": ("valid_len", {"valid_len": torch.tensor([4.0, 3.0])}),
    "k_negative": ("k", {"k": -1}),
    "metric": ("metric", {"metric": "manhattan"}),
    "no_buckets": ("buckets", {"buckets": 0}),
}  # fmt: skip


@pytest.mark.parametrize("error", KNN_ERRORS)
def test_knn_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = knn_case(5, 40, 9) | {"metric": "dot"}
    check_error(ops, "knn_topk", arguments, KNN_ERRORS[error])


@pytest.mark.parametrize("options", [{"buckets": None}, {"valid_len": [9, 4], "buckets": 3}])
def test_knn_opcheck(options):
    opcheck("knn_topk", knn_case(3, 9, 4, head_dim=5, metric="l2", **options))


def test_knn_compile():
    def search(q, bank):
        return memkernels.knn_topk(2 * q, bank, None, 5, metric="l2")

    compiled = torch.compile(search, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_queries, size in (7, 40), (3, 90):
        case = knn_case(num_queries, size, 5)
        tensors = case["q"], case["bank"]
        assert_same_bits(compiled(*tensors), search(*tensors))
    torch._dynamo.reset()


# ---- indexer_scores ------------------------------------------------------------------------------

KINDS = ["paged", "contiguous", "alone"]
kinds = pytest.mark.parametrize("kind", KINDS)


def indexed(ops, arguments):
    return outcome(ops, "indexer_scores", arguments)


def check_indexer(ops, arguments, slack=4):
    scores = check(ops, "indexer_scores", arguments, slack)
    assert scores.dtype == torch.promote_types(arguments["q"].dtype, torch.float32)
    return scores


def sized_case(kind, lengths, queries, **options):
    """For keys of one sequence, the first of these."""
    if kind == "alone":
        lengths, queries = lengths[:1], queries[:1]
    return indexer_case(kind, lengths, queries, **options)


@st.composite
def indexer_cases(draw):
    sizes = draw(attention_sizes())
    kind = draw(st.sampled_from(KINDS))
    if kind == "alone":
        sizes["lengths"] = [draw(st.integers(0, 60))]
        sizes["queries"] = [draw(st.integers(0, 70))]
    heads, head_dim = sizes.pop("heads")[0], sizes.pop("head_dims")[0]
    w_dtype = draw(st.sampled_from([sizes["dtype"], torch.float32]))
    return indexer_case(
        kind,
        **sizes,
        heads=heads,
        head_dim=head_dim,
        w_dtype=torch.promote_types(w_dtype, sizes["dtype"]),
        causal=draw(st.booleans()),
    )


@at_random(arguments=indexer_cases())
def test_indexer_at_random(ops, arguments):
    check_indexer(ops, arguments, slack=ALONE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 5), (3, 64), (64, 128), (5, 80), (2, 576)])
@kinds
def test_indexer_of_head_dims(ops, kind, dtype, heads, head_dim):
    sizes = {"heads": heads, "head_dim": head_dim, "dtype": dtype}
    check_indexer(ops, sized_case(kind, [50, 18], [7, 1], **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "queries"), [([3000, 5, 0, 257], None), ([300, 330], [300, 70])]
)
def test_indexer_of_long_sequences(ops, lengths, queries, dtype):
    sizes = {"heads": 3, "head_dim": 16, "absent_pages": 0.1, "dtype": dtype}
    check_indexer(ops, indexer_case("paged", lengths, queries, **sizes))


@kinds
def test_keys_that_a_query_does_not_see(ops, kind):
    """Two queries stand before the sequence."""
    arguments = sized_case(kind, [3, 0], [5, 1])
    seen = check_indexer(ops, arguments)[:5] > -torch.inf
    assert seen.sum(-1).tolist() == [0, 0, 1, 2, 3]
    seen = check_indexer(ops, arguments | {"causal": False})[:5] > -torch.inf
    assert seen.sum(-1).tolist() == [3] * 5


@pytest.mark.parametrize("kind", ["paged", "contiguous"])
def test_indexer_of_no_sequences(ops, kind):
    for queries in None, []:
        scores = indexed(ops, indexer_case(kind, [], queries))
        assert scores.shape == (0, 16 if kind == "paged" else 3)


def test_indexer_of_no_keys_and_of_no_queries(ops):
    assert indexed(ops, indexer_case("alone", [0], [3])).shape == (3, 0)
    assert indexed(ops, indexer_case("alone", [9], [0])).shape == (0, 9)


def test_keys_alone_are_one_contiguous_sequence(ops):
    arguments = indexer_case("alone", [40], [7])
    offsets = {"cu_seqlens_q": torch.tensor([0, 7]), "k": arguments["k"][None]}
    expected = indexed(ops, arguments | offsets)
    assert_same_bits(indexed(ops, arguments), expected)


@kinds
@pytest.mark.parametrize("name", ["q", "w", "k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_reaches_only_the_scores_that_use_it(ops, kind, name, value):
    """It is in query 3 or token 9 of the last sequence; relu lets it through."""
    if kind == "alone":
        arguments, first, token = indexer_case(kind, [16], [9]), 0, 9
    else:
        arguments, first, token = indexer_case(kind, [8, 16], [2, 9], page_size=4), 2, (1, 9)
    if kind == "paged":
        token = arguments["page_table"][1, 2].item(), 1
    clean = indexed(ops, arguments)
    place = token if name == "k" else (first + 3, 1)
    arguments[name] = put(arguments[name], place, value)
    dirty = indexed(ops, arguments)
    exact = torch.from_numpy(reference.indexer_scores(**arrays(arguments)))
    touched = torch.zeros_like(dirty, dtype=torch.bool)
    touched[(slice(first, None), 9) if name == "k" else first + 3] = True
    assert_same_bits(dirty[~touched], clean[~touched])
    torch.testing.assert_close(dirty, exact.to(dirty.dtype), equal_nan=True)
    assert not (dirty == clean)[touched].all()


INDEXER_ERRORS = TABLE_ERRORS | QUERY_ERRORS | {
    "rows_of_w": ("w", lambda c: {"w": c.w[:-1]}),
    "heads_of_w": ("w", lambda c: {"w": c.w[:, :1]}),
    "rank_of_w": ("w", lambda c: {"w": c.w[..., None]}),
    "dtype_of_w": ("w", lambda c: {"w": c.w.half()}),
    "wider_w": ("w", lambda c: {"w": c.w.double()}),
    "cu_seqlens_q_end": ("cu_seqlens_q", lambda c: {"q": c.q[:-1], "w": c.w[:-1]}),
    "rank_of_k": ("k", lambda c: {"k": c.k[..., None, :]}),
    "dtype_of_k": ("k|q", lambda c: {"k": c.k.half()}),
    "head_dim": ("k|q", lambda c: {"k": c.k[..., :9]}),
    "no_seq_lens": ("seq_lens", {"seq_lens": None}),
    "table_of_keys_alone": ("page_table|k", lambda c: {"k": c.k[0]}),
    "lengths_of_keys_alone": (
        "seq_lens|k", lambda c: {"k": c.k[0], "page_table": None, "cu_seqlens_q": None}
    ),
    "offsets_of_keys_alone": (
        "cu_seqlens_q|k", lambda c: {"k": c.k[0], "page_table": None, "seq_lens": None}
    ),
}  # fmt: skip


@pytest.mark.parametrize("error", INDEXER_ERRORS)
def test_indexer_errors_name_the_argument_and_change_nothing(ops, error):
    arguments = indexer_case("paged", **RAGGED)
    check_error(ops, "indexer_scores", arguments, INDEXER_ERRORS[error])


def test_indexer_errors_of_contiguous_keys(ops):
    arguments = indexer_case("contiguous", [9, 4])
    for names, changes in (
        ("seq_lens", {"seq_lens": arguments["seq_lens"] + 9}),
        ("seq_lens|k", {"seq_lens": arguments["seq_lens"][:1]}),
        ("q|k|cu_seqlens_q", {"q": arguments["q"][:1], "w": arguments["w"][:1]}),
    ):
        check_refused(ops, "indexer_scores", arguments | changes, names)


# ---- backward ------------------------------------------------------------------------------------


NAMES = ["q", "w", "k"]


VARIANTS = {
    "plain": {},
    "decode": {"lengths": [40, 1, 0, 9], "queries": [1, 1, 1, 1]},
    "prefill": {"lengths": [90, 120], "queries": [90, 40], "head_dim": 16},
    "long": {"lengths": [900, 3], "queries": [2, 3]},
    "not_causal": {"causal": False},
    "wide_weights": {"w_dtype": torch.float32},
    "absent_pages": {"absent_pages": 0.4, "page_size": 3},  # of a paged case
    "head_major": {"layout": "HND", "page_size": 7},
    "odd_sizes": {"heads": 5, "head_dim": 37, "page_size": 1},
    "many_heads": {"heads": 64, "head_dim": 128, "lengths": [33, 7], "queries": [3, 2]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@kinds
def test_gradients_against_autograd_through_the_fallback(kernels, kind, variant, dtype):
    sizes = {"lengths": [33, 0, 7, 16], "queries": [5, 2, 9, 16], "dtype": dtype}
    options = VARIANTS[variant]
    if variant == "wide_weights" and dtype == torch.float64:
        options = {}
    check_gradients(kernels, "indexer_scores", sized_case(kind, **sizes | options))


@pytest.mark.full
@at_random(arguments=indexer_cases())
def test_gradients_at_random(kernels, arguments):
    assume(arguments["seq_lens"] is None or len(arguments["seq_lens"]))  # else there is no graph
    check_gradients(kernels, "indexer_scores", arguments, slack=ALONE)


TINY = {"heads": 2, "head_dim": 3, "page_size": 3, "dtype": torch.float64}


@kinds
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(ops, kind, causal):
    arguments = sized_case(kind, [4, 0, 2], [2, 1, 3], causal=causal, **TINY)

    def visible_scores(q, w, k):
        scores = ops.indexer_scores(**arguments | {"q": q, "w": w, "k": k})
        return scores.masked_fill(scores == -torch.inf, 0)  # -inf has no finite difference

    leaves = [arguments[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(visible_scores, leaves)


@kinds
def test_hidden_keys_and_empty_rows_get_zero(ops, kind):
    arguments = sized_case(kind, [3, 9, 0], [5, 4, 2], page_size=4)
    unseen = arguments["k"].isnan()
    grads = gradients(ops.indexer_scores, arguments)
    for name in "q", "w":
        assert not grads[name][:2].any()
    assert not grads["k"][unseen].any()
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.any(), name


def test_relu_has_gradient_zero_at_zero(ops):
    """As torch has it."""
    q, k = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 5.0]])
    arguments = {"q": q, "w": torch.ones(1, 1), "k": k}
    for grad in gradients(ops.indexer_scores, arguments).values():
        assert not grad.any()


def test_gradients_of_shared_pages_add_up(ops):
    """Three sequences with the same two pages: the gradient is the sum of the three."""
    arguments = indexer_case("paged", [20, 20, 20], [2, 1, 3])
    table = arguments["page_table"][:1].expand(3, -1)
    arguments |= {"page_table": table, "seq_lens": torch.tensor([20, 20, 17]).int()}
    arguments["k"] = arguments["k"].nan_to_num()
    leaf = arguments["k"].clone().requires_grad_()
    together = ops.indexer_scores(**arguments | {"k": leaf})
    weights = upstream(together)
    (grad,) = torch.autograd.grad(together, leaf, weights)
    total = torch.zeros_like(grad)
    for b, rows in enumerate((slice(0, 2), slice(2, 3), slice(3, 6))):
        alone = ops.indexer_scores(**of_sequence(arguments | {"k": leaf}, b))
        total += torch.autograd.grad(alone, leaf, weights[rows])[0]
    torch.testing.assert_close(grad, total)


@pytest.mark.parametrize("names", [["q"], ["w"], ["k"], ["q", "k"]])
def test_each_gradient_only_if_asked_for(kernels, names):
    """Asking for fewer changes no bits of those asked for."""
    arguments = indexer_case("paged", [33, 7], [5, 7])
    every = gradients(kernels.indexer_scores, arguments)
    fewer = gradients(kernels.indexer_scores, arguments, names)
    assert_same_bits(fewer, {name: every[name] for name in names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_same_gradients_every_time_and_for_any_threads(num_threads, kind, dtype):
    arguments = sized_case(kind, [700, 40, 0, 90], [3, 40, 1, 90], dtype=dtype)
    num_threads(1)
    expected = gradients(memkernels.indexer_scores, arguments)
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(gradients(memkernels.indexer_scores, arguments), expected)


def test_gradients_of_keys_have_one_owner(num_threads):
    """Queries that are not whole blocks, many keys, and little arithmetic to hide a race behind."""
    arguments = indexer_case("alone", [8192], [191], heads=1, head_dim=8, causal=False)
    num_threads(1)
    expected = gradients(memkernels.indexer_scores, arguments)
    num_threads(2)
    for _ in range(30):
        assert_same_bits(gradients(memkernels.indexer_scores, arguments), expected)


def test_nan_reaches_the_gradients_that_use_it(kernels):
    arguments = indexer_case("alone", [9], [2], heads=1, causal=False)
    arguments["q"][1] = torch.nan
    grads = gradients(kernels.indexer_scores, arguments)
    assert grads["q"][0].isfinite().all() and grads["w"][0].isfinite().all()
    assert grads["w"][1].isnan().all() and grads["k"].isnan().all()


def test_strided_gradient_of_scores(ops):
    arguments = indexer_case("alone", [9], [4])
    q = arguments["q"].requires_grad_()
    scores = ops.indexer_scores(**arguments | {"causal": False})
    weights = torch.randn(4, 18)[:, ::2]
    strided = torch.autograd.grad(scores, q, weights, retain_graph=True)
    contiguous = torch.autograd.grad(scores, q, weights.contiguous(), retain_graph=True)
    assert_same_bits(strided, contiguous)
    ones = torch.autograd.grad(scores.sum(), q, retain_graph=True)  # has strides of 0
    torch.testing.assert_close(ones, torch.autograd.grad(scores, q, torch.ones_like(scores)))


@kinds
def test_gradients_of_strided_inputs(ops, kind):
    arguments = sized_case(kind, **RAGGED)
    expected = gradients(ops.indexer_scores, arguments)
    strided = arguments | {name: apart(arguments[name], 0) for name in NAMES}
    torch.testing.assert_close(gradients(ops.indexer_scores, strided), expected)


@pytest.mark.parametrize("kind", ["paged", "contiguous"])
def test_gradient_of_no_sequences(ops, kind):
    grads = gradients(ops.indexer_scores, indexer_case(kind, [], []), ["q"])
    assert grads["q"].shape == (0, 4, 64)


@pytest.mark.parametrize("weighted", [False, True])
def test_differentiable_once(weighted):
    """A gradient of a gradient raises; above all it is not silently incomplete."""
    arguments = indexer_case("alone", [5], [5])
    q = arguments["q"].requires_grad_()
    scores = memkernels.indexer_scores(**arguments)
    weight = torch.ones_like(scores).requires_grad_(weighted)
    (grad,) = torch.autograd.grad(scores, q, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia"):
        (grad * q).sum().backward()


def test_no_graph_without_need():
    arguments = indexer_case("paged", [5])
    assert not memkernels.indexer_scores(**arguments).requires_grad
    arguments["w"].requires_grad_()
    with torch.no_grad():
        assert not memkernels.indexer_scores(**arguments).requires_grad
    assert memkernels.indexer_scores(**arguments).requires_grad


@kinds
def test_indexer_opcheck(kind):
    arguments = sized_case(kind, [9, 0, 5], [3, 1, 5], head_dim=5, page_size=3)
    arguments |= {name: arguments[name].requires_grad_() for name in NAMES}
    opcheck("indexer_scores", arguments)


@kinds
def test_indexer_backward_opcheck(kind):
    arguments = sized_case(kind, [9, 0, 5], [3, 1, 5], head_dim=5, page_size=3)
    dscores = upstream(indexed(memkernels, arguments))
    for needs in 7, 2:
        opcheck("indexer_scores_backward", arguments | {"dscores": dscores, "needs": needs})


@kinds
def test_compile_forward_and_backward(kind):
    compiled = torch.compile(
        memkernels.indexer_scores, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for lengths, queries in ([33, 0, 7], [5, 2, 9]), ([50, 4, 8, 3], [6, 4, 1, 3]):
        arguments = sized_case(kind, lengths, queries)
        expected = gradients(memkernels.indexer_scores, arguments)
        assert_same_bits(gradients(compiled, arguments), expected)
    torch._dynamo.reset()
