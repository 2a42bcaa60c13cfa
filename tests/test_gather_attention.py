"""Attention over listed pages or tokens, forward and backward, on every backend."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memkernels
from cases import attention_case, gather_case, list_case
from memkernels import fallback
from test_attention import ERRORS as ATTENTION_ERRORS
from test_attention import apart, each_other_isa, run_python
from test_attention_backward import TINY, gradcheck, gradients, upstream
from tolerance import (
    assert_accurate,
    assert_same_bits,
    check_attention,
    slack_of,
    straightforward,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# float16 goes the way of bfloat16: where cases are many, its own are for the wide sweep.
QUICK_DTYPES = [*DTYPES[:3], pytest.param(torch.float16, marks=pytest.mark.full)]
UNITS = ["page", "token"]
KINDS = [("paged", "page"), ("paged", "token"), ("contiguous", "token")]
RAGGED = {"lengths": [33, 0, 7, 1, 16], "queries": [5, 2, 9, 0, 16]}

kinds = pytest.mark.parametrize(("kind", "unit"), KINDS)


def native(**arguments):
    return memkernels.gather_attention(**arguments, return_lse=True)


def run(case, **changes):
    return native(**case.arguments() | changes)


def attend(kernels, case, **changes):
    return kernels.gather_attention(**case.arguments() | changes)


@pytest.fixture(scope="session")
def gather(ops):
    return ops.gather_attention


@st.composite
def random_cases(draw):
    batch = draw(st.integers(0, 4))
    lengths = [draw(st.sampled_from([0, 1, 7, 16, 40]) | st.integers(0, 60)) for _ in range(batch)]
    decode = draw(st.booleans())
    num_kv_heads = draw(st.integers(1, 3))
    kind, unit = draw(st.sampled_from(KINDS))
    return gather_case(
        lengths,
        None if decode else [draw(st.integers(0, min(length, 20) + 2)) for length in lengths],
        kind=kind,
        unit=unit,
        num_listed=draw(st.integers(0, 5) | st.integers(0, 40)),
        shared=draw(st.booleans()),
        skipped=draw(st.sampled_from([0, 0.3, 1])),
        heads=(num_kv_heads * draw(st.sampled_from([1, 2, 4, 5, 8])), num_kv_heads),
        head_dims=(draw(st.integers(1, 80)), draw(st.integers(1, 80))),
        page_size=draw(st.sampled_from([1, 3, 7, 16, 32])),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        absent_pages=draw(st.sampled_from([0, 0.3])),
        key_bias=draw(st.booleans()),
        sink_logit=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([None, 0.3])),
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 2.0])),
    )


@given(case=random_cases())
def test_random_cases(gather, case):
    with unchanged(*case.arguments().values()):
        check_attention(gather, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dims"),
    [
        ((5, 1), (5, 5)),
        ((8, 2), (64, 64)),
        ((1, 1), (80, 48)),
        ((32, 1), (128, 128)),
        ((16, 1), (576, 512)),
    ],
)
@pytest.mark.parametrize("unit", UNITS)
def test_head_dims(gather, dtype, heads, head_dims, unit):
    share_kv = head_dims == (576, 512)  # V is a view of K, as in multi-head latent attention
    sizes = {"heads": heads, "head_dims": head_dims, "share_kv": share_kv, "dtype": dtype}
    check_attention(gather, gather_case([50, 18], [1, 5], unit=unit, num_listed=20, **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("page_size", "layout"), [(1, "NHD"), (7, "HND"), (16, "HND"), (32, "NHD")]
)
@pytest.mark.parametrize("unit", UNITS)
def test_page_sizes(gather, dtype, page_size, layout, unit):
    sizes = {"page_size": page_size, "layout": layout, "dtype": dtype}
    check_attention(gather, gather_case([100, 9], [3, 2], unit=unit, num_listed=9, **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "num_listed"), [("page", 150), ("token", 2100)])
def test_long_decode(gather, dtype, unit, num_listed):
    """Lists long enough to be split over workers, beside an empty sequence."""
    sizes = {"heads": (4, 2), "num_listed": num_listed, "absent_pages": 0.1, "dtype": dtype}
    check_attention(gather, gather_case([3000, 900, 0, 257], unit=unit, **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@kinds
def test_prefill(gather, kind, unit, dtype):
    """Many queries, alone and after a cached prefix."""
    sizes = {"heads": (2, 1), "num_listed": 6, "dtype": dtype}
    check_attention(gather, gather_case([110, 330], [110, 50], kind=kind, unit=unit, **sizes))


def test_large_logits(gather):
    """Softmax neither overflows nor underflows to an empty row."""
    case = gather_case([600, 40], [3, 40], num_listed=20, scale=30.0, head_dims=(16, 16))
    check_attention(gather, case, slack=100)
    bias = torch.full(case.k_cache.shape[:-1], -1e4)
    check_attention(gather, case.replace(key_bias=bias), slack=1000)


@kinds
def test_empty_rows(gather, kind, unit):
    sizes = {"kind": kind, "unit": unit, "key_bias": True, "sink_logit": True}
    case = gather_case([0, 2, 5], [3, 4, 2], **sizes)
    case.indices[7] = -1
    out, lse = check_attention(gather, case)
    # Sequence 0 has no tokens, the next 2 rows come before the first, row 7 lists none.
    empty = torch.tensor([0, 1, 2, 3, 4, 7])
    assert not out[empty].any()
    assert_same_bits(lse[empty], case.sink_logit.expand(6, -1))
    out, lse = gather(**case.replace(sink_logit=None).arguments())
    assert not out[empty].any() and (lse[empty] == -torch.inf).all()


@kinds
@pytest.mark.parametrize("num_listed", [0, 3])
def test_nothing_listed(gather, kind, unit, num_listed):
    case = gather_case([9, 0], kind=kind, unit=unit, num_listed=num_listed, skipped=1)
    out, lse = gather(**case.arguments())
    assert out.shape == (2, 4, 64) and not out.any() and (lse == -torch.inf).all()


@kinds
def test_no_tokens_and_no_pages(gather, kind, unit):
    case = gather_case([0, 0], kind=kind, unit=unit)
    case = case.replace(k_cache=case.k_cache[:0], v_cache=case.v_cache[:0])
    if kind == "contiguous":
        caches = torch.empty(2, 2, 0, 2, 64).unbind()
        case = case.replace(k_cache=caches[0], v_cache=caches[1])
    out, lse = gather(**case.arguments())
    assert not out.any() and (lse == -torch.inf).all()


@kinds
def test_batch_of_no_sequences(gather, kind, unit):
    for queries in None, []:
        case = gather_case([], queries, kind=kind, unit=unit, head_dims=(8, 6))
        out, lse = gather(**case.arguments())
        assert out.shape == (0, 4, 6) and lse.shape == (0, 4)


def test_seq_lens_default_to_the_whole_cache(gather):
    case = gather_case([12] * 3, kind="contiguous", unit="token", index_dtype=torch.int64)
    caches = {name: getattr(case, name)[:, :12] for name in ("k_cache", "v_cache")}
    case = case.replace(**caches)
    expected = gather(**case.arguments())
    assert_same_bits(gather(**case.replace(seq_lens=None).arguments()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("heads", [(4, 2), (5, 1)])
def test_all_pages_in_order_are_paged_attention_to_the_bit(kernels, dtype, page_size, heads):
    lengths = [1500, 40, 0, 300, 17]
    sizes = {"heads": heads, "page_size": page_size, "dtype": dtype, "absent_pages": 0.1}
    case = attention_case("paged", lengths, key_bias=True, sink_logit=True, **sizes)
    expected = kernels.paged_attention(**case.arguments())
    assert_same_bits(attend(kernels, list_case(case)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@kinds
@pytest.mark.parametrize("queries", [None, [1, 10, 0, 9, 3]])
def test_everything_listed_is_paged_attention(gather, dtype, kind, unit, queries):
    lengths = [150, 40, 0, 90, 17]
    case = attention_case(kind, lengths, queries, dtype=dtype, sink_logit=True, key_bias=True)
    actual = check_attention(gather, list_case(case, unit=unit))
    expected = memkernels.paged_attention(**case.arguments(), return_lse=True)
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5}
    torch.testing.assert_close(actual, expected, **tolerance)


@kinds
@pytest.mark.parametrize("shared", [False, True])
def test_order_of_a_list_never_matters(gather, kind, unit, shared):
    """But for rounding."""
    sizes = {"num_listed": 8, "shared": shared, "dtype": torch.float64}
    case = gather_case([60, 0, 9], [3, 2, 9], kind=kind, unit=unit, **sizes)
    flipped = case.replace(indices=case.indices.flip(-1))
    torch.testing.assert_close(gather(**flipped.arguments()), gather(**case.arguments()))


def more_columns(indices, extra):
    padding = indices.new_full((*indices.shape[:2], extra), -1)
    return torch.cat([indices, padding], -1)


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@kinds
@pytest.mark.parametrize("queries", [None, [1, 20, 2, 7, 3]])
def test_columns_of_minus_one_never_change_bits(kernels, dtype, kind, unit, queries):
    sizes = {"num_listed": 30, "dtype": dtype}
    case = gather_case([700, 40, 0, 300, 17], queries, kind=kind, unit=unit, **sizes)
    expected = attend(kernels, case)
    for extra in 1, 7, 600:
        assert_same_bits(attend(kernels, case, indices=more_columns(case.indices, extra)), expected)


@kinds
def test_one_list_for_all_heads_is_the_same_list_for_each(kernels, kind, unit):
    case = gather_case(**RAGGED, kind=kind, unit=unit, shared=True, num_listed=9)
    each = case.indices.expand(-1, 2, -1)
    assert_same_bits(attend(kernels, case, indices=each), attend(kernels, case))
    assert_same_bits(attend(kernels, case, indices=each.contiguous()), attend(kernels, case))


def test_index_dtypes_never_change_bits(kernels):
    case = gather_case(**RAGGED, num_listed=9)
    expected = attend(kernels, case)
    names = "indices", "page_table", "seq_lens", "cu_seqlens_q"
    for name in names:
        assert_same_bits(attend(kernels, case, **{name: getattr(case, name).long()}), expected)
    assert_same_bits(
        attend(kernels, case, **{name: getattr(case, name).long() for name in names}), expected
    )


def test_out_alone_is_the_same_out():
    case = gather_case(**RAGGED)
    assert_same_bits(memkernels.gather_attention(**case.arguments()), run(case)[0])


LONG = [pytest.param("page", 150, id="page"), pytest.param("token", 2000, id="token")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit", "num_listed"), LONG)
@pytest.mark.parametrize("queries", [None, [1, 10, 0, 30, 3]])
def test_same_bits_every_time_and_for_any_threads(num_threads, dtype, unit, num_listed, queries):
    sizes = {"num_listed": num_listed, "dtype": dtype}
    case = gather_case([3000, 40, 0, 300, 17], queries, unit=unit, **sizes)
    num_threads(1)
    expected = run(case)
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(run(case), expected)


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@kinds
@pytest.mark.parametrize("queries", [None, [1, 9, 2, 20, 3]])
def test_same_bits_alone_and_in_a_batch(kernels, kind, unit, dtype, queries):
    sizes = {"num_listed": 90, "dtype": dtype, "sink_logit": True}
    case = gather_case([1500, 40, 0, 300, 17], queries, kind=kind, unit=unit, **sizes)
    alone = [attend(kernels, case.select(b)) for b in range(5)]
    together = attend(kernels, case)
    assert_same_bits([torch.cat(x) for x in zip(*alone, strict=True)], list(together))


@kinds
def test_same_bits_whatever_the_other_queries_list(kernels, kind, unit):
    """The NaN that the others would read must not reach a row either."""
    case = gather_case([700, 40], [5, 3], kind=kind, unit=unit, num_listed=40)
    expected = attend(kernels, case)
    for row in range(8):
        alone = case.indices.clone()
        alone[torch.arange(8) != row] = -1
        assert_same_bits(
            [x[row] for x in attend(kernels, case, indices=alone)], [x[row] for x in expected]
        )


def partly_listed(unit):
    """Of rows 2 to 4, those of sequence 1, row 3 alone lists page 2 or the second token of it."""
    case = attention_case("paged", [8, 16, 8], [2, 3, 1], page_size=4, causal=False)
    indices = torch.tensor([0, 1]).repeat(6, 2, 1)
    indices[3, :, 1] = 2 if unit == "page" else 9
    return list_case(case.replace(key_bias=torch.randn(case.k_cache.shape[:-1])), indices, unit)


def poison(case, name, value=torch.nan):
    """The case with row 3 of q, or the token that row 3 alone has listed, spoilt in KV head 0."""
    tensor = getattr(case, name).clone()
    tensor[(3, slice(2)) if name == "q" else (case.page_table[1, 2], 1, 0)] = value
    return case.replace(**{name: tensor})


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, torch.nan) for name in ("q", "k_cache", "v_cache", "key_bias")]
    + [(name, torch.inf) for name in ("q", "k_cache", "v_cache")],
)
@pytest.mark.parametrize("unit", UNITS)
def test_nan_reaches_only_those_who_list_it(gather, unit, name, value):
    case = partly_listed(unit)
    clean = gather(**case.arguments())
    dirty = poison(case, name, value)
    actual = gather(**dirty.arguments())
    touched = torch.zeros(6, 4, dtype=torch.bool)
    touched[3, :2] = True
    for x, exact, before in zip(actual, dirty.reference(), clean, strict=True):
        assert_same_bits(x[~touched], before[~touched])
        assert_same_bits(x[touched].isnan(), torch.from_numpy(exact)[touched].isnan())


@pytest.mark.parametrize("unit", UNITS)
def test_masked_keys_may_hold_anything(gather, unit):
    """A key whose bias is -inf is as good as absent."""
    case = gather_case([40], [4], unit=unit, num_listed=9, key_bias=True)
    clean = gather(**case.arguments())
    for cache in case.k_cache, case.v_cache:
        cache[case.key_bias == -torch.inf] = torch.nan
    assert_same_bits(gather(**case.arguments()), clean)


@kinds
def test_strided_inputs(gather, kind, unit):
    case = gather_case(**RAGGED, kind=kind, unit=unit, key_bias=True)
    strided = {name: apart(getattr(case, name), -2) for name in ("q", "k_cache", "v_cache")}
    strided["key_bias"] = apart(case.key_bias, -1)
    if kind == "paged":
        strided["page_table"] = apart(case.page_table, 1)  # columns of a wider table
    for dim in range(3):
        strided["indices"] = apart(case.indices, dim)
        check_attention(gather, case.replace(**strided))


def test_expanded_query(gather):
    case = gather_case(**RAGGED)
    check_attention(gather, case.replace(q=case.q[:1].expand_as(case.q)))


@pytest.mark.parametrize("name", ["page_table", "seq_lens", "cu_seqlens_q", "sink_logit"])
def test_other_strided_inputs_work_or_are_refused_by_name(gather, name):
    case = gather_case(**RAGGED, sink_logit=True)
    try:
        check_attention(gather, case.replace(**{name: apart(getattr(case, name), -1)}))
    except RuntimeError as error:
        assert name in str(error)


def put(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


FOREIGN = {"cu_seqlens_k", "window", "sink_tokens", "max_seqlen"}
ERRORS = {
    name: error
    for name, error in ATTENTION_ERRORS.items()
    if not FOREIGN & set(error[0].split("|"))
} | {
    "rows_of_indices": ("indices", lambda c: {"indices": c.indices[:-1]}),
    "heads_of_indices": ("indices", lambda c: {"indices": c.indices.expand(-1, 3, -1)}),
    "query_heads_of_indices": ("indices", lambda c: {"indices": c.indices.expand(-1, 4, -1)}),
    "no_heads_of_indices": ("indices", lambda c: {"indices": c.indices[:, :0]}),
    "rank_of_indices": ("indices", lambda c: {"indices": c.indices[:, 0]}),
    "dtype_of_indices": ("indices", lambda c: {"indices": c.indices.float()}),
    "short_indices": ("indices", lambda c: {"indices": c.indices.short()}),
    "page_beyond_the_sequence": ("indices", lambda c: {"indices": put(c.indices, (0, 0, 1), 3)}),
    "page_of_no_tokens": ("indices", lambda c: {"indices": put(c.indices, (5, 0, 0), 0)}),
    "index_below_minus_one": ("indices", lambda c: {"indices": put(c.indices, (-1, 0, 0), -2)}),
    "huge_index": ("indices", lambda c: {"indices": put(c.indices.long(), (0, 0, 0), 2**40)}),
    "token_beyond_the_sequence": (
        "indices", lambda c: {"unit": "token", "indices": put(c.indices * 0, (0, 0, 0), 33)}
    ),
    "token_of_no_tokens": ("indices", lambda c: {"unit": "token", "indices": c.indices * 0}),
    "unit": ("unit", lambda c: {"unit": "block"}),
    "no_page_table": ("page_table|unit|k_cache", lambda c: {"page_table": None}),
    "rank_of_page_table": ("page_table", lambda c: {"page_table": c.page_table[0]}),
    "listed_page": ("page_table", lambda c: {"page_table": put(c.page_table, (0, 1), 10**6)}),
    "listed_page_of_token": (
        "page_table",
        lambda c: {"unit": "token", "page_table": put(c.page_table, (0, 0), -2),
                   "indices": put(c.indices * 0 - 1, (4, 0, 0), 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(gather, error):
    names, change = ERRORS[error]
    case = attention_case("paged", **RAGGED, key_bias=True, sink_logit=True)
    case = list_case(case)
    arguments = case.arguments() | change(case)
    message = rf"gather_attention: .*({names})"
    with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
        gather(**arguments)


def test_errors_of_contiguous_caches(gather):
    case = gather_case([9, 4], kind="contiguous", unit="token", skipped=0)
    for names, changes in (
        ("unit|page_table", {"unit": "page"}),
        ("indices", {"indices": case.indices + 9}),
        ("seq_lens", {"seq_lens": case.seq_lens + 9}),
        ("seq_lens|k_cache", {"seq_lens": case.seq_lens[:1]}),
        ("q|k_cache|indices|cu_seqlens_q", {"q": case.q[:1]}),
    ):
        with pytest.raises(RuntimeError, match=rf"gather_attention: .*({names})"):
            gather(**case.arguments() | changes)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_strided_last_dim_is_refused_by_name(name):
    case = gather_case(**RAGGED)
    strided = getattr(case, name).repeat_interleave(2, -1)[..., ::2]
    with pytest.raises(RuntimeError, match=f"gather_attention: .*{name}"):
        run(case, **{name: strided})


def test_unsupported_dtype_lists_the_supported_ones():
    case = gather_case(**RAGGED).to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"gather_attention: .*float32"):
        run(case)


@pytest.mark.full
@pytest.mark.parametrize("unit", UNITS)
def test_more_than_2_to_the_31_elements(unit):
    """The pages in use are the last of a cache of 2**31 elements, the rest of it never touched."""
    num_pages, page_size, head_dim = 2**21 + 8, 16, 64
    sizes = {"heads": (4, 1), "head_dims": (head_dim, 48), "share_kv": True}
    small = gather_case([100], unit=unit, num_listed=5, dtype=torch.bfloat16, **sizes)
    shift = num_pages - small.k_cache.shape[0]
    cache = torch.empty(num_pages, page_size, 1, head_dim, dtype=torch.bfloat16)
    assert cache.numel() > 2**31
    cache[shift:] = small.k_cache
    table = small.page_table.long() + shift
    large = small.replace(k_cache=cache, v_cache=cache[..., :48], page_table=table)
    assert_same_bits(run(large), run(small))


def test_autocast_casts_to_its_dtype():
    case = gather_case(**RAGGED, kind="contiguous", unit="token", sink_logit=True)
    half = {n: getattr(case, n).bfloat16() for n in ("q", "k_cache", "v_cache")}
    expected = run(case, **half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(case), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("unit", UNITS)
def test_autocast_casts_the_query_to_the_dtype_of_its_pages(dtype, unit):
    case = gather_case(**RAGGED, unit=unit, dtype=dtype, sink_logit=True)
    case = case.replace(q=case.q.bfloat16())
    expected = run(case, q=case.q.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(case), expected)


class Attention(torch.nn.Module):
    def forward(self, arguments):
        return memkernels.gather_attention(**arguments, return_lse=True)


@kinds
def test_compile(kind, unit):
    compiled = torch.compile(Attention(), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, queries in ([33, 0, 7], [5, 2, 9]), ([4, 50, 8, 3], [4, 6, 1, 3]):
        case = gather_case(lengths, queries, kind=kind, unit=unit, key_bias=True)
        assert_same_bits(compiled(case.arguments()), run(case))
    torch._dynamo.reset()


@pytest.mark.full
def test_compile_with_inductor():
    case = gather_case(**RAGGED, sink_logit=True)
    compiled = torch.compile(Attention(), fullgraph=True)
    assert_same_bits(compiled(case.arguments()), run(case))


@kinds
def test_export(kind, unit):
    case = gather_case(**RAGGED, kind=kind, unit=unit, sink_logit=True)
    program = torch.export.export(Attention(), (case.arguments(),))
    assert_same_bits(program.module()(case.arguments()), run(case))


@kinds
def test_opcheck(kind, unit):
    sizes = {"kind": kind, "unit": unit, "head_dims": (8, 6), "page_size": 3}
    case = gather_case([9, 0, 5], [3, 1, 5], key_bias=True, sink_logit=True, **sizes)
    arguments = case.requires_grad().arguments() | {"scale": 0.3}
    op = torch.ops.memkernels.gather_attention.default
    positional = [arguments.get(a.name) for a in op._schema.arguments if not a.kwarg_only]
    options = {a.name for a in op._schema.arguments if a.kwarg_only}
    options = {name: value for name, value in arguments.items() if name in options}
    torch.library.opcheck(op, positional, options)


def compact_check():
    """A little of everything, for one process an ISA."""
    for dtype in DTYPES:
        for kind, unit in KINDS:
            sizes = {"heads": (10, 2), "head_dims": (72, 37), "num_listed": 8, "dtype": dtype}
            options = {"key_bias": True, "sink_logit": True, "softcap": 3.0}
            case = gather_case([90, 0, 7], [9, 2, 9], kind=kind, unit=unit, **sizes, **options)
            check_attention(native, case)
            check_gradients(native, case)
        sizes = {"heads": (8, 1), "head_dims": (128, 128), "num_listed": 30}
        check_attention(native, gather_case([700, 3], dtype=dtype, **sizes))


@each_other_isa
def test_every_isa(isa):
    code = "import test_gather_attention; test_gather_attention.compact_check()"
    run_python(code, MEMKERNELS_CPU_ISA=isa)


# ---- backward ------------------------------------------------------------------------------------


def check_gradients(gather_attention, case, slack=8):
    actual = gradients(gather_attention, case)
    slack = slack * slack_of(gather_attention, case.q.dtype)
    exact = gradients(fallback.gather_attention, case.to(torch.float64))
    with straightforward():
        baseline = gradients(fallback.gather_attention, case)
    for name, grad in actual.items():
        assert grad.dtype == getattr(case, name).dtype
        # Eight as for paged_attention: dS may be the difference of two nearly equal numbers.
        accuracy = {"dtype": case.q.dtype, "name": f"gradient of {name}", "slack": slack}
        assert_accurate(grad, exact[name], baseline[name], **accuracy)
    return actual


VARIANTS = {
    "plain": {},
    "decode": {"lengths": [40, 1, 0, 9], "queries": None},
    "prefill": {"lengths": [60, 90], "queries": [60, 40], "heads": (2, 1)},
    "long": {"lengths": [900, 3], "queries": [2, 3], "num_listed": 100},
    "not_causal": {"causal": False},
    "one_list": {"shared": True, "num_listed": 9},
    "softcap": {"softcap": 2.0, "scale": 0.4},
    "bias_and_sink": {"key_bias": True, "sink_logit": True},
    "absent_pages": {"absent_pages": 0.4, "page_size": 3},  # of a paged case
    "head_major": {"layout": "HND", "page_size": 7},
    "odd_sizes": {"heads": (10, 2), "head_dims": (37, 21), "page_size": 1, "num_listed": 20},
    "wide": {"heads": (4, 1), "head_dims": (576, 512), "share_kv": True},
}


@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@kinds
def test_gradients_against_autograd_through_the_fallback(kernels, kind, unit, variant, dtype):
    sizes = {"lengths": [33, 0, 7, 16], "queries": [5, 2, 9, 16], "num_listed": 5}
    case = gather_case(kind=kind, unit=unit, dtype=dtype, **sizes | VARIANTS[variant])
    check_gradients(kernels.gather_attention, case)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_gradients_against_autograd_through_the_fallback_at_random(kernels, seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[torch.randint(len(values), (), generator=generator)]

    lengths = [pick(0, 1, 7, 30, 100, 500) for _ in range(pick(1, 2, 5))]
    num_kv_heads = pick(1, 2, 3)
    kind, unit = pick(*KINDS)
    case = gather_case(
        lengths,
        pick(None, [min(length, pick(0, 1, 9, 40)) + pick(0, 2) for length in lengths]),
        kind=kind,
        unit=unit,
        num_listed=pick(1, 4, 30),
        shared=pick(True, False),
        heads=(num_kv_heads * pick(1, 4, 5, 8), num_kv_heads),
        head_dims=(pick(5, 64, 80, 128), pick(5, 64, 80, 128)),
        page_size=pick(1, 7, 16, 32),
        layout=pick("NHD", "HND"),
        absent_pages=pick(0, 0.3),
        key_bias=pick(True, False),
        sink_logit=pick(True, False),
        dtype=pick(*DTYPES),
        seed=seed,
        causal=pick(True, False),
        softcap=pick(0.0, 3.0),
    )
    # Short sequences list one key thirty times.
    check_gradients(kernels.gather_attention, case, slack=32)


@kinds
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_bias": True, "sink_logit": True, "softcap": 1.5},
        {"causal": False, "absent_pages": 0.3, "sink_logit": True},
    ],
)
def test_gradcheck(kind, unit, shared, options):
    """Four entries of lists of at most four tokens or two pages: there are duplicates."""
    sizes = TINY | {"heads": (4, 2), "num_listed": 4, "kind": kind, "unit": unit}
    gradcheck(native, gather_case(shared=shared, **sizes, **options), fast_mode=shared)


@kinds
def test_gradcheck_of_the_fallback(kind, unit):
    sizes = TINY | {"num_listed": 4, "kind": kind, "unit": unit, "absent_pages": 0.3}
    case = gather_case(**sizes, key_bias=True, sink_logit=True, softcap=1.5)
    gradcheck(fallback.gather_attention, case, fast_mode=True)


@kinds
def test_empty_rows_and_unseen_keys_get_zero(gather, kind, unit):
    case = gather_case([0, 2, 50], [3, 4, 2], kind=kind, unit=unit, num_listed=2, key_bias=True)
    grads = gradients(gather, case)
    assert not grads["q"][:5].any()
    unseen = case.key_bias.isnan()
    assert unseen[..., 0].sum() > 20  # some of them in the sequences
    for name in "k_cache", "v_cache", "key_bias":
        assert not grads[name][unseen].any()
        assert grads[name].isfinite().all() and grads[name].any()
        assert not grads[name][case.key_bias == -torch.inf].any()


def test_rows_without_keys_give_the_sink_their_lse_gradient(gather):
    case = gather_case([9], [3], skipped=1, sink_logit=True)
    grads = gradients(gather, case)
    torch.testing.assert_close(grads["sink_logit"], upstream(case)[1].sum(0))
    for name in "q", "k_cache", "v_cache":
        assert not grads[name].any()


@kinds
def test_gradients_of_duplicates_add_up(gather, kind, unit):
    """A list given twice over: the same out, and lse more by log 2, so the same gradients."""
    case = gather_case(**RAGGED, kind=kind, unit=unit, dtype=torch.float64)
    twice = case.replace(indices=case.indices.repeat(1, 1, 2))
    torch.testing.assert_close(gradients(gather, twice), gradients(gather, case))


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_of_everything_listed_are_those_of_paged_attention(gather, unit):
    sizes = {"key_bias": True, "sink_logit": True, "dtype": torch.float64}
    case = attention_case("paged", **RAGGED, **sizes)
    paged_attention = functools.partial(memkernels.paged_attention, return_lse=True)
    expected = gradients(paged_attention, case)
    torch.testing.assert_close(gradients(gather, list_case(case, unit=unit)), expected)


@pytest.mark.parametrize("unit", UNITS)
def test_masked_keys_may_hold_anything_in_backward(gather, unit):
    case = gather_case([20, 9], [20, 2], unit=unit, key_bias=True)
    clean = gradients(gather, case)
    for cache in case.k_cache, case.v_cache:
        cache[case.key_bias == -torch.inf] = torch.nan
    assert_same_bits(gradients(gather, case), clean)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "key_bias", "dout"])
@pytest.mark.parametrize("unit", UNITS)
def test_nan_reaches_only_the_gradients_of_those_who_list_it(gather, unit, name):
    case = partly_listed(unit)
    clean = gradients(gather, case)
    if name == "dout":

        def poisoned(**arguments):
            out, lse = gather(**arguments)
            factor = torch.ones_like(out)
            factor[3, :2] = torch.nan
            return out * factor, lse

        dirty = gradients(poisoned, case)
    else:
        dirty = gradients(gather, poison(case, name))
    assert dirty["q"][3, :2].isnan().any()
    # Row 3 itself, and the pages 0 and 2 or the tokens in them that it lists.
    for grads in dirty, clean:
        grads["q"][3, :2] = 0
        for cache in "k_cache", "v_cache", "key_bias":
            grads[cache][case.page_table[1, [0, 2]].long(), :, 0] = 0
    assert_same_bits(dirty, clean)


def test_shared_pages_accumulate(gather):
    """Three sequences with the same two pages: the gradient is the sum of the three."""
    case = list_case(attention_case("paged", [20], dtype=torch.float64, head_dims=(8, 8)))
    shared = case.replace(
        q=torch.randn(3, 4, 8, dtype=torch.float64),
        page_table=case.page_table.expand(3, -1),
        seq_lens=torch.tensor([20, 20, 17]),
        indices=case.indices.expand(3, -1, -1),
    )
    names = ["k_cache", "v_cache"]
    together = gradients(gather, shared, names)
    dout, dlse = upstream(shared)
    total = dict.fromkeys(names, 0)
    for b in range(3):
        one = shared.select(b)
        leaves = {name: getattr(one, name).detach().requires_grad_() for name in names}
        results = gather(**one.arguments() | leaves)
        grads = torch.autograd.grad(results, leaves.values(), (dout[b : b + 1], dlse[b : b + 1]))
        for name, grad in zip(names, grads, strict=True):
            total[name] = total[name] + grad
    torch.testing.assert_close(together, total)


def test_v_may_be_a_view_of_k(gather):
    """Both gradients arrive at the one tensor."""
    case = gather_case([9, 4], [9, 2], heads=(4, 1), dtype=torch.float64, share_kv=True)
    latent = case.k_cache.clone().requires_grad_()
    views = {"k_cache": latent, "v_cache": latent[..., :48]}
    gather(**case.replace(**views).arguments())[0].square().sum().backward()
    k, v = (view.detach().clone().requires_grad_() for view in views.values())
    gather(**case.replace(k_cache=k, v_cache=v).arguments())[0].square().sum().backward()
    k.grad[..., :48] += v.grad
    torch.testing.assert_close(latent.grad, k.grad)


@pytest.mark.parametrize("names", [["q"], ["k_cache"], ["v_cache"], ["key_bias"], ["sink_logit"],
                                   ["q", "v_cache"]])  # fmt: skip
def test_each_gradient_only_if_asked_for(names):
    """Asking for fewer changes no bits of those asked for."""
    case = gather_case([33, 7], [5, 7], key_bias=True, sink_logit=True)
    every = gradients(native, case)
    assert_same_bits(gradients(native, case, names), {name: every[name] for name in names})


@pytest.mark.parametrize("result", [0, 1])
def test_one_result_alone(gather, result):
    """A loss of out alone, or of lse alone (whose gradient does not reach v)."""
    case = gather_case([33, 0, 7], [5, 2, 9], sink_logit=True).requires_grad()
    gather(**case.arguments())[result].nan_to_num(neginf=0).square().sum().backward()
    expected = case.requires_grad()
    results = fallback.gather_attention(**expected.arguments())
    results[result].nan_to_num(neginf=0).square().sum().backward()
    for name, tensor in expected.tensors().items():
        actual, exact = getattr(case, name).grad, tensor.grad
        if exact is None:  # v_cache, of lse
            assert actual is None or not actual.any()
        else:
            torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_same_gradients_every_time_and_for_any_threads(num_threads, kind, unit, dtype):
    sizes = {"num_listed": 30, "dtype": dtype, "sink_logit": True}
    case = gather_case([700, 40, 0, 90], [3, 40, 1, 90], kind=kind, unit=unit, **sizes)
    num_threads(1)
    expected = gradients(native, case)
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(gradients(native, case), expected)


def test_columns_of_minus_one_never_change_gradients():
    case = gather_case([700, 40, 0], [3, 40, 1], num_listed=20)
    wider = case.replace(indices=more_columns(case.indices, 9))
    assert_same_bits(gradients(native, wider), gradients(native, case))


def test_strided_gradient_of_out(gather):
    case = gather_case([9, 4], [9, 2]).requires_grad()
    out = gather(**case.arguments())[0]
    dout = torch.randn(*out.shape[:2], 2 * out.shape[2])[..., ::2]
    strided = torch.autograd.grad(out, case.q, dout, retain_graph=True)
    contiguous = torch.autograd.grad(out, case.q, dout.contiguous(), retain_graph=True)
    assert_same_bits(strided, contiguous)
    ones = torch.autograd.grad(out.sum(), case.q, retain_graph=True)  # has strides of 0
    torch.testing.assert_close(ones, torch.autograd.grad(out, case.q, torch.ones_like(out)))


def test_gradient_of_no_sequences(gather):
    case = gather_case([], [])
    assert gradients(gather, case, ["q"])["q"].shape == (0, 4, 64)


@kinds
def test_gradient_of_nothing_listed(gather, kind, unit):
    case = gather_case([9, 4], kind=kind, unit=unit, num_listed=0)
    for grad in gradients(gather, case).values():
        assert not grad.any()


@pytest.mark.parametrize("weighted", [False, True])
def test_differentiable_once(weighted):
    """A gradient of a gradient raises; above all it is not silently incomplete."""
    case = gather_case([5], [5]).requires_grad()
    out = run(case)[0]
    weight = torch.ones_like(out).requires_grad_(weighted)
    (grad,) = torch.autograd.grad(out, case.q, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentia"):
        (grad * case.q).sum().backward()


def test_no_graph_without_need():
    case = gather_case([5], [5])
    assert not run(case)[0].requires_grad
    with torch.no_grad():
        assert not run(case.requires_grad())[0].requires_grad
    assert run(case.requires_grad())[0].requires_grad


def test_an_input_changed_in_place_is_noticed():
    """append_kv between forward and backward would make gradients wrong; autograd says so."""
    case = gather_case([5], [5])
    q = case.q.requires_grad_()
    out = run(case)[0]
    k, v = torch.zeros(1, 2, 64), torch.zeros(1, 2, 64)
    memkernels.append_kv(k, v, case.k_cache, case.v_cache, torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), q)


def test_gradients_under_autocast():
    """Gradients arrive in the dtypes of the leaves, whatever autocast computed in."""
    case = gather_case([9, 4], [9, 2], kind="contiguous", unit="token").requires_grad()
    half = {name: tensor.bfloat16() for name, tensor in case.tensors().items()}
    expected = gradients(native, case.replace(**half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = run(case)
    assert out.dtype == torch.bfloat16
    dout, dlse = upstream(case)
    grads = torch.autograd.grad((out, lse), case.tensors().values(), (dout.bfloat16(), dlse))
    for grad, (name, half_grad) in zip(grads, expected.items(), strict=True):
        assert grad.dtype == torch.float32, name
        assert_same_bits(grad, half_grad.float())


@kinds
def test_compile_forward_and_backward(kind, unit):
    sizes = {"kind": kind, "unit": unit, "key_bias": True, "sink_logit": True}
    case = gather_case([33, 0, 7], [5, 2, 9], **sizes)
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradients(compiled, case), gradients(native, case))
    torch._dynamo.reset()
