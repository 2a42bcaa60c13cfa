"""The attention that keys receive, on every backend: against the reference and softmax itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

import memkernels
from cases import arrays, attention_case, colstats_case
from checks import at_random, check, check_error, check_refused, opcheck, outcome, put
from memkernels import fallback, reference
from test_attention import DTYPES, RAGGED, apart
from test_attention import ERRORS as ATTENTION_ERRORS
from test_selection import QUERY_ERRORS, TABLE_ERRORS, attention_sizes
from tolerance import assert_accurate, assert_same_bits, unchanged

KINDS = ["paged", "contiguous"]
REDUCES = ["sum", "max", "count"]

kinds = pytest.mark.parametrize("kind", KINDS)
reduces = pytest.mark.parametrize("reduce", REDUCES)


def colstats(ops, arguments):
    return outcome(ops, "attention_colstats", arguments)


def check_colstats(ops, arguments, slack=4):
    """slack: the exponential multiplies the rounding error of a logit."""
    if arguments["reduce"] == "count":
        stats = check_count(ops, arguments)
    else:
        stats = check(ops, "attention_colstats", arguments, slack)
    assert stats.dtype == torch.promote_types(arguments["q"].dtype, torch.float32)
    return stats


def check_count(ops, arguments):
    """A probability within rounding of its threshold may count, or not."""
    stats = colstats(ops, arguments)
    least, most = (
        reference.attention_colstats(**arrays(arguments | {"lse": arguments["lse"] + shift}))
        for shift in (1e-4, -1e-4)
    )
    counts = stats.double().numpy()
    assert counts.shape == most.shape and (counts == counts.round()).all()
    assert (least <= counts).all() and (counts <= most).all()
    return stats


@st.composite
def random_cases(draw):
    sizes = draw(attention_sizes())
    num_kv_heads = sizes["heads"][1]
    windows = st.lists(st.integers(1, 30), min_size=num_kv_heads, max_size=num_kv_heads)
    case = attention_case(
        draw(st.sampled_from(KINDS)),
        **sizes,
        key_bias=draw(st.booleans()),
        sink_logit=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 30) | st.builds(torch.tensor, windows)),
        sink_tokens=draw(st.sampled_from([0, 3])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
    )
    return colstats_case(
        case,
        reduce=draw(st.sampled_from(REDUCES)),
        threshold=draw(st.sampled_from([None, 0.0, 0.05, 2.0])),
    )


@at_random(arguments=random_cases())
def test_random_cases(ops, arguments):
    """What is accumulated onto nothing is the same, to the bit."""
    stats = check_colstats(ops, arguments)
    total = accumulated(ops, arguments, torch.zeros_like(stats), decay=0.5)
    assert_same_bits(total, stats)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((5, 1), 5), ((8, 2), 64), ((1, 1), 80), ((32, 1), 128), ((16, 1), 576)]
)
def test_head_dims(ops, dtype, heads, head_dim):
    sizes = {"heads": heads, "head_dims": (head_dim, 1), "dtype": dtype}
    case = attention_case("paged", [50, 18], [1, 9], **sizes)
    check_colstats(ops, colstats_case(case, reduce="sum"))


@pytest.mark.parametrize("dtype", DTYPES)
@reduces
def test_decode_of_long_sequences(ops, reduce, dtype):
    """Long enough to be split over workers, beside short ones."""
    options = {"absent_pages": 0.2, "window": 1100, "sink_tokens": 4, "head_dims": (32, 1)}
    case = attention_case("paged", [3000, 5, 0, 257], dtype=dtype, **options)
    check_colstats(ops, colstats_case(case, reduce=reduce))


@pytest.mark.parametrize(("kind", "dtype"), [("paged", d) for d in DTYPES]
                         + [("contiguous", torch.float32)])  # fmt: skip
@reduces
def test_prefill(ops, reduce, kind, dtype):
    """Several hundred queries, alone and after a cached prefix."""
    sizes = {"heads": (2, 1), "head_dims": (16, 1), "dtype": dtype}
    case = attention_case(kind, [300, 330], [300, 70], **sizes)
    # Twice the usual slack: one probability is added to hundreds of others.
    check_colstats(ops, colstats_case(case, reduce=reduce), slack=8)


OPTIONS = {
    "plain": {},
    "not_causal": {"causal": False},
    "window": {"window": 6, "sink_tokens": 2},
    "window_of_heads": {"window": torch.tensor([3, 90]), "sink_tokens": 1},
    "softcap": {"softcap": 2.0, "scale": 0.4},
    "bias": {"key_bias": True},
    "sink": {"sink_logit": True},
    "absent_pages": {"absent_pages": 0.4, "page_size": 3},
}


def unit_values(case):
    """A cache of values: token j of a sequence has the j-th unit vector, in every head."""
    size, num_kv_heads = case.k_cache.shape[1:3]
    if case.page_table is None:
        values = torch.eye(size, dtype=case.q.dtype).expand(len(case.k_cache), -1, -1)
    else:
        num_columns = case.page_table.shape[1]
        units = torch.eye(num_columns * size, dtype=case.q.dtype).unflatten(0, (num_columns, size))
        values = units.new_zeros(len(case.k_cache), *units.shape[1:])
        for pages, length in zip(case.page_table.long(), case.seq_lens, strict=True):
            pages = pages[: -(-length // size)]
            values[pages[pages >= 0]] = units[: len(pages)][pages >= 0]
    return values[:, :, None].expand(-1, -1, num_kv_heads, -1)


@kinds
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_probabilities_are_those_of_attention(ops, kind, options, reduce):
    """With unit vectors for values, attention gives out its probabilities."""
    case = attention_case(kind, **RAGGED, dtype=torch.float64, **OPTIONS[options])
    given, _ = fallback.paged_attention(**case.replace(v_cache=unit_values(case)).arguments())
    given = given.unflatten(1, (case.k_cache.shape[2], -1))  # [total_q, Hkv, group, tokens]
    nobody = torch.zeros_like(given[:1])
    given = [torch.cat([given[case.rows(b)], nobody]) for b in range(5)]
    reduction = torch.sum if reduce == "sum" else torch.amax
    expected = torch.stack([reduction(probabilities, (0, 2)) for probabilities in given])
    actual = colstats(ops, colstats_case(case, reduce=reduce))
    torch.testing.assert_close(actual, expected)


def test_queries_share_out_what_they_have(ops):
    """A row of attention sums to one; with a sink, to less; empty ones give nothing."""
    case = attention_case("paged", **RAGGED, dtype=torch.float64)
    stats = colstats(ops, colstats_case(case))
    giving = torch.tensor([5, 0, 7, 0, 16]) * 2  # of the queries, those that see keys; two a group
    torch.testing.assert_close(stats.sum(-1), giving[:, None].expand(-1, 2).double())
    case = case.replace(sink_logit=torch.zeros(4).double())
    assert (colstats(ops, colstats_case(case)).sum(-1) <= giving[:, None]).all()


def test_the_default_threshold_counts_what_is_above_the_mean(ops):
    """Queries like all of their keys receive the mean everywhere, and everything counts."""
    q = torch.zeros(4, 2, 8, dtype=torch.float64)
    k = torch.randn(1, 9, 1, 8, dtype=torch.float64)
    offsets = torch.tensor([0, 4])
    lse = torch.arange(6, 10).double().log()[:, None].expand(4, 2) - 1e-9
    counts = ops.attention_colstats(q, k, None, None, offsets, lse, reduce="count")
    assert counts.tolist() == [[[8, 8, 8, 8, 8, 8, 6, 4, 2]]]
    lse = lse + 2e-9
    counts = ops.attention_colstats(q, k, None, None, offsets, lse, reduce="count")
    assert not counts.any()


def test_only_the_given_queries_count(ops):
    """A prefill in two chunks, accumulated, is one in one."""
    case = attention_case("contiguous", [40], [40], dtype=torch.float64)
    whole = colstats_case(case)
    total = torch.zeros(1, 2, 43, dtype=torch.float64)
    for begin, end in (0, 25), (25, 40):
        chunk = {
            "q": whole["q"][begin:end],
            "lse": whole["lse"][begin:end],
            "seq_lens": torch.tensor([end]),
            "cu_seqlens_q": torch.tensor([0, end - begin]),
        }
        ops.attention_colstats(**whole | chunk, accumulate_into=total)
    torch.testing.assert_close(total, colstats(ops, whole))


@kinds
@reduces
def test_nothing_is_received_where_nothing_is_seen(ops, kind, reduce):
    """Beyond a sequence, of masked keys and of rows whose lse is -inf."""
    case = attention_case(kind, [0, 2, 5], [3, 4, 1], key_bias=True)
    arguments = colstats_case(case, reduce=reduce)
    assert (arguments["lse"][:5] == -torch.inf).all()
    stats = check_colstats(ops, arguments)
    behind = torch.arange(stats.shape[-1]) >= case.seq_lens[:, None]
    assert not stats.transpose(1, 2)[behind].any()
    arguments["lse"] = torch.full_like(arguments["lse"], -torch.inf)
    assert not colstats(ops, arguments).any()


@kinds
@reduces
def test_batch_of_no_sequences(ops, kind, reduce):
    for queries in None, []:
        case = attention_case(kind, [], queries, head_dims=(8, 1))
        stats = colstats(ops, colstats_case(case, reduce=reduce))
        assert stats.shape == (0, 2, 16 if kind == "paged" else 3)


def test_seq_lens_default_to_the_whole_cache(ops):
    case = attention_case("contiguous", [12] * 3, [2, 0, 4])
    case = case.replace(k_cache=case.k_cache[:, :12], v_cache=case.v_cache[:, :12])
    arguments = colstats_case(case)
    expected = colstats(ops, arguments)
    assert_same_bits(colstats(ops, arguments | {"seq_lens": None}), expected)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("name", ["q", "k_cache", "key_bias", "lse"])
def test_nan_reaches_only_the_statistics_that_use_it(ops, name, reduce):
    """It is in query 3 or token 9 of sequence 1, in the last query head or KV head."""
    case = attention_case("paged", [8, 16, 8], [2, 9, 1], page_size=4, key_bias=True, window=8)
    arguments = colstats_case(case, reduce=reduce)
    clean = colstats(ops, arguments)
    token = (case.page_table[1, 2].item(), 1, 1)
    place = (2 + 3, 3) if name in ("q", "lse") else token
    arguments[name] = put(arguments[name], place, torch.nan)
    dirty = colstats(ops, arguments)
    exact = torch.from_numpy(reference.attention_colstats(**arrays(arguments)))
    touched = torch.zeros_like(dirty, dtype=torch.bool)
    touched[1, 1, slice(3, 11) if name in ("q", "lse") else 9] = True
    assert_same_bits(dirty[~touched], clean[~touched])
    assert_same_bits(dirty[touched].isnan(), exact[touched].isnan())
    assert dirty[touched].isnan().any()


def test_masked_keys_may_hold_anything(ops):
    case = attention_case("paged", [40], [4], window=8, key_bias=True)
    arguments = colstats_case(case)
    clean = colstats(ops, arguments)
    masked = case.key_bias == -torch.inf
    masked[case.page_table[0, :1]] = True  # tokens 0 to 15, all before the window
    case.k_cache[masked] = torch.nan
    assert_same_bits(colstats(ops, arguments), clean)


def test_large_logits(ops):
    case = attention_case("paged", [600, 40], [3, 40], scale=30.0, head_dims=(16, 16))
    check_colstats(ops, colstats_case(case, reduce="sum"), slack=400)


@kinds
def test_strided_inputs(ops, kind):
    case = attention_case(kind, **RAGGED, key_bias=True)
    arguments = colstats_case(case, reduce="sum")
    for name, dims in {"q": (0, 1), "k_cache": (0, 1, 2), "key_bias": (0, 1, 2)}.items():
        for dim in dims:
            strided = arguments | {name: apart(arguments[name], dim)}
            check_colstats(ops, strided)


# ---- accumulation --------------------------------------------------------------------------------


def accumulated(ops, arguments, into, decay):
    """A copy of into, accumulated into."""
    into = into.clone()
    with unchanged(*arguments.values()):
        result = ops.attention_colstats(**arguments, accumulate_into=into, decay=decay)
    assert result is into
    return into


def earlier(case, extra=0, seed=3):
    """Earlier statistics of a case, NaN where they are nobody's."""
    num_kv_heads = case.k_cache.shape[2]
    capacity = case.k_cache.shape[1]
    if case.page_table is not None:
        capacity *= case.page_table.shape[1]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(case.seq_lens), num_kv_heads, capacity + extra)
    stats = torch.rand(shape, generator=generator, dtype=torch.float64)
    stats = stats.to(torch.promote_types(case.q.dtype, torch.float32))
    behind = torch.arange(shape[-1]) >= case.seq_lens[:, None]
    return stats.masked_fill(behind[:, None], torch.nan)


@pytest.mark.parametrize("dtype", DTYPES)
@kinds
@reduces
@pytest.mark.parametrize("decay", [1.0, 0.9, 0.0])
def test_accumulate(ops, kind, reduce, dtype, decay):
    """Within each sequence; behind it nothing is touched."""
    case = attention_case(kind, **RAGGED, dtype=dtype)
    arguments = colstats_case(case, reduce=reduce)
    new = colstats(ops, arguments)
    for extra in 0, 5:
        old = earlier(case, extra)
        actual = accumulated(ops, arguments, old, decay)
        faded, new_there = decay * old, torch.nn.functional.pad(new, (0, extra))
        expected = torch.maximum(faded, new_there) if reduce == "max" else faded + new_there
        rounding = 4 * torch.finfo(old.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_accumulate_against_the_reference(ops, reduce):
    case = attention_case("paged", **RAGGED, key_bias=True)
    arguments = colstats_case(case, reduce=reduce)
    old = earlier(case)
    exact = reference.attention_colstats(**arrays(arguments | {"accumulate_into": old}), decay=0.7)
    baseline = accumulated(fallback, arguments, old, 0.7)
    actual = accumulated(ops, arguments, old, 0.7)
    assert_accurate(actual, exact, baseline, dtype=torch.float32, slack=4)


def test_the_version_of_what_is_accumulated_into_alone_is_bumped(ops):
    case = attention_case("paged", **RAGGED)
    arguments = colstats_case(case) | {"accumulate_into": earlier(case)}
    versions = {n: t._version for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    ops.attention_colstats(**arguments)
    assert [n for n, version in versions.items() if arguments[n]._version > version] == [
        "accumulate_into"
    ]


def test_saved_statistics_that_change_are_noticed():
    case = attention_case("paged", **RAGGED)
    stats = torch.zeros_like(earlier(case))
    weight = torch.ones(1, requires_grad=True)
    product = (weight * stats).sum()
    memkernels.attention_colstats(**colstats_case(case), accumulate_into=stats)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("name", ["accumulate_into", "q", "k_cache", "lse"])
def test_accumulation_is_not_differentiable(ops, name):
    case = attention_case("paged", **RAGGED)
    arguments = colstats_case(case) | {"accumulate_into": earlier(case)}
    arguments[name].requires_grad_()
    check_refused(ops, "attention_colstats", arguments, "not differentiable")
    with torch.no_grad():
        ops.attention_colstats(**arguments)


def test_accumulation_in_inference_mode():
    with torch.inference_mode():
        case = attention_case("paged", **RAGGED)
        memkernels.attention_colstats(**colstats_case(case), accumulate_into=earlier(case))


# ---- errors and the compiler ---------------------------------------------------------------------


ERRORS = TABLE_ERRORS | QUERY_ERRORS | {
    name: ATTENTION_ERRORS[name]
    for name in (
        "more_heads_than_a_multiple", "head_dim", "dtype_of_q", "rank_of_k", "no_seq_lens",
        "shape_of_key_bias", "window_zero", "window_size", "sink_tokens_negative",
        "softcap_negative",
    )
} | {
    "cu_seqlens_q_end": ("cu_seqlens_q", lambda c: {"q": c.q[:-1], "lse": c.lse[:-1]}),
    "rows_of_lse": ("lse", lambda c: {"lse": c.lse[:-1]}),
    "heads_of_lse": ("lse", lambda c: {"lse": c.lse[:, :2]}),
    "rank_of_lse": ("lse", lambda c: {"lse": c.lse[:, 0]}),
    "dtype_of_lse": ("lse", lambda c: {"lse": c.lse.double()}),
    "reduce": ("reduce", {"reduce": "mean"}),
    "rows_of_accumulate_into": (
        "accumulate_into", lambda c: {"accumulate_into": c.accumulate_into[:-1]}
    ),
    "heads_of_accumulate_into": (
        "accumulate_into", lambda c: {"accumulate_into": c.accumulate_into[:, :1].clone()}
    ),
    "columns_of_accumulate_into": (
        "accumulate_into", lambda c: {"accumulate_into": c.accumulate_into[..., :-1].clone()}
    ),
    "rank_of_accumulate_into": (
        "accumulate_into", lambda c: {"accumulate_into": c.accumulate_into[0]}
    ),
    "dtype_of_accumulate_into": (
        "accumulate_into", lambda c: {"accumulate_into": c.accumulate_into.double()}
    ),
    "strided_accumulate_into": (
        "accumulate_into", lambda c: {"accumulate_into": apart(c.accumulate_into, 1)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(ops, error):
    case = attention_case("paged", **RAGGED, key_bias=True)
    arguments = colstats_case(case) | {"accumulate_into": earlier(case)}
    check_error(ops, "attention_colstats", arguments, ERRORS[error])


def test_errors_of_contiguous_caches(ops):
    arguments = colstats_case(attention_case("contiguous", [9, 4]))
    for names, changes in (
        ("seq_lens", {"seq_lens": arguments["seq_lens"] + 9}),
        ("seq_lens|k_cache", {"seq_lens": arguments["seq_lens"][:1]}),
        ("q|k_cache|cu_seqlens_q|lse", {"q": arguments["q"][:1]}),
    ):
        check_refused(ops, "attention_colstats", arguments | changes, names)


@kinds
@pytest.mark.parametrize("accumulate", [False, True])
def test_opcheck(kind, accumulate):
    case = attention_case(kind, [9, 0, 5], [3, 1, 5], head_dims=(8, 1), key_bias=True)
    options = {"reduce": "sum", "threshold": None, "scale": 0.3}
    arguments = colstats_case(case, **options, head_window=torch.tensor([4, 9]))
    if accumulate:
        opcheck("accumulate_colstats", arguments | {"stats": earlier(case), "decay": 0.5})
    else:
        opcheck("attention_colstats", arguments)


@pytest.mark.parametrize(("kind", "window"), [("paged", "heads"), ("contiguous", 5)])
def test_compile(kind, window):
    window = torch.tensor([4, 9]) if window == "heads" else window

    def step(arguments, total):
        memkernels.attention_colstats(**arguments, accumulate_into=total, decay=0.5)
        return total.nan_to_num().sum() + memkernels.attention_colstats(**arguments).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, queries in ([33, 0, 7], [5, 2, 9]), ([4, 50, 8, 3], [4, 6, 1, 3]):
        case = attention_case(kind, lengths, queries, key_bias=True, window=window)
        arguments, total = colstats_case(case, reduce="max"), earlier(case)
        compiled_total = total.clone()
        expected = step(arguments, total)
        assert_same_bits([compiled(arguments, compiled_total), compiled_total], [expected, total])
    torch._dynamo.reset()
