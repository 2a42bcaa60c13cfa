"""Forward of paged attention: one meaning on every backend, then what the native op adds."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memkernels
from cases import attention_case
from memkernels import _C
from tolerance import assert_same_bits, check_attention, unchanged

KINDS = ["paged", "contiguous", "packed"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RAGGED = {"lengths": [33, 0, 7, 1, 16], "queries": [5, 2, 9, 0, 16]}


def native(case, **changes):
    return memkernels.paged_attention(**case.arguments() | changes, return_lse=True)


@st.composite
def random_cases(draw):
    batch = draw(st.integers(0, 4))
    lengths = [draw(st.sampled_from([0, 1, 7, 16, 40]) | st.integers(0, 60)) for _ in range(batch)]
    decode = draw(st.booleans())
    num_kv_heads = draw(st.integers(1, 3))
    windows = st.integers(1, 30)
    return attention_case(
        draw(st.sampled_from(KINDS)),
        lengths,
        None if decode else [draw(st.integers(0, min(length, 20) + 2)) for length in lengths],
        heads=(num_kv_heads * draw(st.sampled_from([1, 2, 4, 5, 8])), num_kv_heads),
        head_dims=(draw(st.integers(1, 80)), draw(st.integers(1, 80))),
        page_size=draw(st.sampled_from([1, 3, 7, 16])),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        absent_pages=draw(st.sampled_from([0, 0.3])),
        key_bias=draw(st.booleans()),
        sink_logit=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([None, 0.3])),
        causal=draw(st.booleans()),
        window=draw(
            st.none() | windows | st.builds(lambda w: torch.tensor([w] * num_kv_heads), windows)
        ),
        sink_tokens=draw(st.sampled_from([0, 3])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        max_seqlen=draw(st.sampled_from([None, 60, 5000])),
    )


@given(case=random_cases())
def test_random_cases(ops, case):
    with unchanged(*case.arguments().values()):
        check_attention(ops.paged_attention, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dims", [(5, 5), (64, 64), (80, 48), (128, 128), (192, 128), (256, 256), (576, 512)]
)
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (5, 1), (16, 1)])
def test_head_dims(ops, dtype, head_dims, heads):
    share_kv = head_dims == (576, 512)  # V is a view of K, as in multi-head latent attention
    case = attention_case(
        "paged", [50, 18], [1, 9], heads=heads, head_dims=head_dims, share_kv=share_kv, dtype=dtype
    )
    check_attention(ops.paged_attention, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 1100, "sink_tokens": 4}, {"absent_pages": 0.2}])
def test_long_decode(ops, dtype, options):
    """Long enough to be split over workers, beside short ones."""
    lengths = [3000, 5, 0, 257]
    check_attention(ops.paged_attention, attention_case("paged", lengths, dtype=dtype, **options))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("paged", d) for d in DTYPES] + [("contiguous", torch.float32), ("packed", torch.bfloat16)],
)
@pytest.mark.parametrize("options", [{}, {"causal": False, "window": 50}])
def test_prefill(ops, kind, dtype, options):
    """Several hundred queries, alone and after a cached prefix."""
    case = attention_case(kind, [290, 330], [290, 70], heads=(2, 1), dtype=dtype, **options)
    check_attention(ops.paged_attention, case)


def test_large_logits(ops):
    """Softmax neither overflows nor underflows to an empty row."""
    case = attention_case("paged", [600, 40], [3, 40], scale=30.0, head_dims=(16, 16))
    check_attention(ops.paged_attention, case, slack=100)
    bias = torch.full(case.k_cache.shape[:-1], -1e4)
    check_attention(ops.paged_attention, case.replace(key_bias=bias), slack=1000)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows(ops, kind):
    case = attention_case(kind, [0, 2, 5], [3, 4, 1], key_bias=True, sink_logit=True)
    out, lse = check_attention(ops.paged_attention, case)
    assert not out[:5].any()  # sequence 0 has no tokens, the next 2 rows come before the first
    assert_same_bits(lse[:5], case.sink_logit.expand(5, -1))
    out, lse = ops.paged_attention(**case.replace(sink_logit=None).arguments())
    assert not out[:5].any() and (lse[:5] == -torch.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_no_sequences(ops, kind):
    for queries in None, []:
        case = attention_case(kind, [], queries, head_dims=(8, 6))
        out, lse = ops.paged_attention(**case.arguments())
        assert out.shape == (0, 4, 6) and lse.shape == (0, 4)


def test_seq_lens_default_to_the_whole_cache(ops):
    case = attention_case("packed", [12])
    k, v = (x.view(3, 4, *x.shape[1:]) for x in (case.k_cache, case.v_cache))
    q = torch.randn(3, 4, 64)
    lengths = torch.full((3,), 4)
    assert_same_bits(ops.paged_attention(q, k, v), ops.paged_attention(q, k, v, None, lengths))


def test_masked_keys_may_hold_anything(ops):
    """A key whose bias is -inf, or that no window reaches, is as good as absent."""
    case = attention_case("paged", [40], [4], heads=(4, 2), window=8, key_bias=True)
    clean = ops.paged_attention(**case.arguments())
    masked = case.key_bias == -torch.inf
    pages = case.page_table[0, :1]  # tokens 0 to 15, all before the window
    masked[pages] = True
    for cache in case.k_cache, case.v_cache:
        cache[masked] = torch.nan
    assert_same_bits(ops.paged_attention(**case.arguments()), clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stays_in_its_sequence_and_head(ops, kind, poison):
    case = attention_case(kind, [20, 30, 300], [20, 1, 2], heads=(4, 2))
    clean, clean_lse = ops.paged_attention(**case.arguments())
    # Token 19 of sequence 1.
    page = case.page_table[1, 1].item() if kind == "paged" else None
    place = {"paged": (page, 3), "contiguous": (1, 19), "packed": (20 + 19,)}[kind]
    for name in "k_cache", "v_cache":
        dirty = case.replace(**{name: getattr(case, name).clone()})
        getattr(dirty, name)[(*place, 1)] = poison
        out, lse = ops.paged_attention(**dirty.arguments())
        exact, exact_lse = (torch.from_numpy(x) for x in dirty.reference())
        touched = torch.zeros(23, 4, dtype=torch.bool)
        touched[20, 2:] = True
        assert_same_bits(out[~touched], clean[~touched])
        assert_same_bits(lse[~touched], clean_lse[~touched])
        assert_same_bits(out[touched].isnan(), exact[touched].isnan())
        assert_same_bits(lse[touched].isnan(), exact_lse[touched].isnan())


def test_nan_query_stays_in_its_row_and_head(ops):
    case = attention_case("paged", [20, 30, 40], [2, 1, 3])
    clean = ops.paged_attention(**case.arguments())[0]
    case.q[2, 1] = torch.nan
    out = ops.paged_attention(**case.arguments())[0]
    assert out[2, 1].isnan().all()
    out[2, 1] = clean[2, 1]
    assert_same_bits(out, clean)


def apart(tensor, dim):
    """The same values, twice as far apart along dim."""
    return torch.stack([tensor, tensor], dim).select(dim, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_inputs(ops, kind):
    case = attention_case(kind, **RAGGED, key_bias=True)
    strided = {name: apart(getattr(case, name), -2) for name in ("q", "k_cache", "v_cache")}
    strided["key_bias"] = apart(case.key_bias, -1)
    if kind == "paged":
        strided["page_table"] = apart(case.page_table, 1)  # columns of a wider table
    check_attention(ops.paged_attention, case.replace(**strided))
    check_attention(ops.paged_attention, case.replace(q=case.q[:1].expand_as(case.q)))


@pytest.mark.parametrize("name", ["page_table", "seq_lens", "cu_seqlens_q", "sink_logit"])
def test_other_strided_inputs_work_or_are_refused_by_name(ops, name):
    case = attention_case("paged", **RAGGED, sink_logit=True)
    try:
        check_attention(ops.paged_attention, case.replace(**{name: apart(getattr(case, name), -1)}))
    except RuntimeError as error:
        assert name in str(error)


def no_sequences(case):
    """Of a batch, whose queries stay."""
    empty = {name: getattr(case, name)[:0] for name in ("page_table", "seq_lens")}
    return empty | {"cu_seqlens_q": case.cu_seqlens_q[:1]}


ERRORS = {
    "more_heads_than_a_multiple": ("q", lambda c: {"q": c.q.repeat(1, 2, 1)[:, :5]}),
    "head_dim": ("q|k_cache", lambda c: {"q": c.q[..., :32]}),
    "rows_of_q": ("q|cu_seqlens_q|page_table", lambda c: {"cu_seqlens_q": None}),
    "rank_of_q": ("q", lambda c: {"q": c.q[0]}),
    "dtype_of_q": ("q|k_cache", lambda c: {"q": c.q.double()}),
    "integer_q": ("q", lambda c: {"q": c.q.int()}),
    "dtype_of_v": ("v_cache", lambda c: {"v_cache": c.v_cache.half()}),
    "pages_of_v": ("v_cache", lambda c: {"v_cache": c.v_cache[:-1]}),
    "heads_of_v": ("v_cache", lambda c: {"v_cache": c.v_cache[:, :, :1]}),
    "rank_of_k": ("k_cache", lambda c: {"k_cache": c.k_cache[0]}),
    "rows_of_page_table": ("page_table|seq_lens", lambda c: {"page_table": c.page_table[:-1]}),
    "dtype_of_page_table": ("page_table", lambda c: {"page_table": c.page_table.float()}),
    "page_too_large": ("page_table", lambda c: {"page_table": c.page_table.flip(1)}),
    "page_below_minus_one": ("page_table", lambda c: {"page_table": c.page_table * 0 - 2}),
    "no_seq_lens": ("seq_lens", lambda c: {"seq_lens": None}),
    "rows_of_seq_lens": ("seq_lens|page_table", lambda c: {"seq_lens": c.seq_lens[:-1]}),
    "seq_lens_too_large": ("seq_lens|page_table", lambda c: {"seq_lens": c.seq_lens + 1000}),
    "seq_lens_negative": ("seq_lens", lambda c: {"seq_lens": c.seq_lens - 5}),
    "dtype_of_seq_lens": ("seq_lens", lambda c: {"seq_lens": c.seq_lens.float()}),
    "seq_len_above_max_seqlen": ("seq_lens|max_seqlen", lambda c: {"max_seqlen": 32}),
    "cu_seqlens_q_start": ("cu_seqlens_q", lambda c: {"cu_seqlens_q": c.cu_seqlens_q + 1}),
    "cu_seqlens_q_end": ("cu_seqlens_q|indices", lambda c: {"q": c.q[:-1]}),
    "cu_seqlens_q_falls": ("cu_seqlens_q", lambda c: {"cu_seqlens_q": c.cu_seqlens_q.flip(0)}),
    "cu_seqlens_q_size": ("cu_seqlens_q", lambda c: {"cu_seqlens_q": c.cu_seqlens_q[[0, 1, -1]]}),
    "rows_of_no_sequence": ("q|cu_seqlens_q", no_sequences),
    "cu_seqlens_k": ("cu_seqlens_k|k_cache", lambda c: {"cu_seqlens_k": c.cu_seqlens_q}),
    "shape_of_key_bias": ("key_bias", lambda c: {"key_bias": c.key_bias[..., :1]}),
    "shape_of_sink_logit": ("sink_logit", lambda c: {"sink_logit": c.sink_logit[:-1]}),
    "window_zero": ("window", lambda c: {"window": 0}),
    "window_size": ("window", lambda c: {"window": torch.tensor([1, 2, 3])}),
    "sink_tokens_negative": ("sink_tokens", lambda c: {"sink_tokens": -1}),
    "softcap_negative": ("softcap", lambda c: {"softcap": -1.0}),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors_name_the_argument_and_change_nothing(ops, error):
    names, change = ERRORS[error]
    case = attention_case("paged", **RAGGED, key_bias=True, sink_logit=True)
    arguments = case.arguments() | change(case)
    message = rf"paged_attention: .*({names})"
    with unchanged(*arguments.values()), pytest.raises(RuntimeError, match=message):
        ops.paged_attention(**arguments)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_strided_last_dim_is_refused_by_name(name):
    case = attention_case("paged", **RAGGED)
    strided = getattr(case, name).repeat_interleave(2, -1)[..., ::2]
    with pytest.raises(RuntimeError, match=f"paged_attention: .*{name}"):
        native(case, **{name: strided})


def test_unsupported_dtype_lists_the_supported_ones():
    case = attention_case("paged", **RAGGED).to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"paged_attention: .*float32"):
        native(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [None, [1, 40, 0, 300, 3]])
def test_same_bits_every_time_and_for_any_threads(num_threads, dtype, queries):
    case = attention_case("paged", [3000, 40, 0, 300, 17], queries, dtype=dtype)
    num_threads(1)
    expected = native(case)
    for threads in 1, 2, 2, 3:
        num_threads(threads)
        assert_same_bits(native(case), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [None, [1, 40, 2, 70, 3]])
def test_same_bits_alone_and_in_a_batch(kernels, kind, dtype, queries):
    case = attention_case(kind, [1500, 40, 0, 300, 17], queries, dtype=dtype, sink_logit=True)
    together = kernels.paged_attention(**case.arguments())
    alone = [kernels.paged_attention(**case.select(b).arguments()) for b in range(5)]
    assert_same_bits([torch.cat(x) for x in zip(*alone, strict=True)], list(together))


def test_hints_and_index_dtypes_never_change_bits(kernels):
    case = attention_case("paged", [1500, 40, 0, 300], sink_tokens=2, window=torch.tensor([9, 700]))

    def attend(**changes):
        return kernels.paged_attention(**case.arguments() | changes)

    expected = attend()
    for max_seqlen in 1500, 1501, 10**6:
        assert_same_bits(attend(max_seqlen=max_seqlen), expected)
    long = {"page_table": case.page_table.long(), "seq_lens": case.seq_lens.long()}
    assert_same_bits(attend(**long), expected)
    assert_same_bits(attend(**long, window=torch.tensor([9, 700]).int()), expected)


def test_out_alone_is_the_same_out():
    case = attention_case("paged", **RAGGED)
    out = memkernels.paged_attention(**case.arguments())
    assert_same_bits(out, native(case)[0])


@pytest.mark.full
@pytest.mark.parametrize("append", [False, True])
def test_more_than_2_to_the_31_elements(kernels, append):
    """The pages in use are the last of a cache of 2**31 elements, the rest of it never touched."""
    num_pages, page_size, head_dim = 2**21 + 8, 16, 64
    small = attention_case(
        "paged", [100], heads=(4, 1), head_dims=(head_dim, 48), share_kv=True, dtype=torch.bfloat16
    )
    shift = num_pages - small.k_cache.shape[0]
    cache = torch.empty(num_pages, page_size, 1, head_dim, dtype=torch.bfloat16)
    assert cache.numel() > 2**31
    if append:
        slots = torch.arange(shift * page_size, num_pages * page_size)
        rows = small.k_cache.flatten(0, 1)
        other = cache.new_empty(num_pages, page_size, 1, 1)
        kernels.append_kv(rows, rows[..., :1], cache, other, slots)
    else:
        cache[shift:] = small.k_cache
    large = small.replace(
        k_cache=cache, v_cache=cache[..., :48], page_table=small.page_table[:, :-1] + shift
    )
    actual, expected = (kernels.paged_attention(**c.arguments()) for c in (large, small))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("kind", ["contiguous", "packed"])
def test_autocast_casts_to_its_dtype(kind):
    case = attention_case(kind, **RAGGED, sink_logit=True)
    expected = native(case, **{n: getattr(case, n).bfloat16() for n in ("q", "k_cache", "v_cache")})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(native(case), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_casts_the_query_to_the_dtype_of_its_pages(dtype):
    case = attention_case("paged", **RAGGED, dtype=dtype, sink_logit=True)
    case = case.replace(q=case.q.bfloat16())
    expected = native(case, q=case.q.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(native(case), expected)


class Attention(torch.nn.Module):
    def forward(self, arguments):
        return memkernels.paged_attention(**arguments, return_lse=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 5, "heads"])
def test_compile(kind, window):
    window = torch.tensor([4, 9]) if window == "heads" else window
    compiled = torch.compile(Attention(), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, queries in ([33, 0, 7], [5, 2, 9]), ([4, 50, 8, 3], [4, 6, 1, 3]):
        case = attention_case(kind, lengths, queries, key_bias=True, window=window)
        assert_same_bits(compiled(case.arguments()), native(case))
    torch._dynamo.reset()


@pytest.mark.full
def test_compile_with_inductor():
    case = attention_case("paged", **RAGGED, sink_logit=True)
    compiled = torch.compile(Attention(), fullgraph=True)
    assert_same_bits(compiled(case.arguments()), native(case))


@pytest.mark.parametrize("kind", KINDS)
def test_export(kind):
    case = attention_case(kind, **RAGGED, sink_logit=True)
    program = torch.export.export(Attention(), (case.arguments(),))
    assert_same_bits(program.module()(case.arguments()), native(case))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    case = attention_case(
        kind, [9, 0, 5], [3, 1, 5], head_dims=(8, 6), key_bias=True, sink_logit=True
    ).requires_grad()
    tensors = [
        *(case.q, case.k_cache, case.v_cache, case.page_table, case.seq_lens),
        *(case.cu_seqlens_q, case.cu_seqlens_k, None, case.key_bias, case.sink_logit),
    ]
    options = {"scale": 0.3, "causal": True, "window": None, "sink_tokens": 0, "softcap": 0.0}
    op = torch.ops.memkernels.paged_attention.default
    torch.library.opcheck(op, tensors, options | {"max_seqlen": None})


# Those of this CPU but the one that all other tests run.
each_other_isa = pytest.mark.parametrize(
    "isa", [isa for isa in _C.cpu_isas() if isa != _C.cpu_isa()]
)


def run_python(code, **environment):
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parent,
        check=True,
        timeout=120,
    )


def compact_check():
    """A little of everything, for one process an ISA."""
    attention = functools.partial(memkernels.paged_attention, return_lse=True)
    for dtype in DTYPES:
        for kind in KINDS:
            for options in {}, {"window": 9, "sink_tokens": 2, "softcap": 3.0, "key_bias": True}:
                sizes = {"heads": (10, 2), "head_dims": (72, 37), "sink_logit": True}
                case = attention_case(kind, [90, 0, 7], [30, 2, 9], dtype=dtype, **sizes, **options)
                check_attention(attention, case)
        decode = attention_case("paged", [700, 3], heads=(8, 1), head_dims=(128, 128), dtype=dtype)
        check_attention(attention, decode)


@each_other_isa
def test_every_isa(isa):
    run_python("import test_attention; test_attention.compact_check()", MEMKERNELS_CPU_ISA=isa)


def test_backend_variable_selects_the_fallback():
    """The fallback takes the strided last dimension that the native op refuses."""
    code = """
import torch, memkernels
k = torch.randn(2, 3, 1, 8)[..., ::2]
memkernels.paged_attention(torch.randn(2, 1, 4), k, k)
"""
    run_python(code, MEMKERNELS_BACKEND="torch")
