"""CUDA kernels under the host runner: the same bits for any schedule, no races, no stray accesses,
and indices out of range skipped where nothing checks them. What they compute is tested beside the
other backends (conftest.ops)."""

from __future__ import annotations

import functools

import pytest
import torch

import cuda_ops
import memkernels
import test_cuda_lookup
from cases import attention_case, colstats_case, gather_case
from test_attention_backward import gradients
from tolerance import assert_same_bits, check_attention, unchanged

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def decode(dtype=torch.bfloat16, **options):
    """Split over blocks, with all that changes a logit."""
    options = {"heads": (8, 2), "softcap": 3.0, "window": 200, "sink_tokens": 5} | options
    return attention_case(
        "paged", [700, 40, 0, 300], dtype=dtype, key_bias=True, sink_logit=True, **options
    )


CASES = {
    "decode_bf16": decode,
    "decode_f32": lambda: decode(torch.float32, head_dims=(72, 36)),
    "append_f16": lambda: attention_case(
        "paged", [290, 33, 5], [7, 16, 2], heads=(6, 2), page_size=7, dtype=torch.float16
    ),
    "prefill_bf16": lambda: attention_case(
        "packed", [90, 150], [90, 30], head_dims=(128, 128), dtype=torch.bfloat16
    ),
    "latent_bf16": lambda: attention_case(
        "paged", [70, 20], heads=(20, 1), head_dims=(576, 512), share_kv=True, dtype=torch.bfloat16
    ),
    "odd_head_dims": lambda: attention_case(
        "contiguous", [50, 18], [1, 9], head_dims=(37, 21), dtype=torch.float16
    ),
    "pages_bf16": lambda: gather_case(
        [700, 40, 0], num_listed=30, heads=(8, 2), dtype=torch.bfloat16
    ),
    "tokens_f32": lambda: gather_case([300, 40], [2, 1], unit="token", num_listed=270),
}  # fmt: skip


COLSTATS = {
    "decode_bf16": lambda: colstats_case(decode(head_dims=(64, 1)), reduce="sum"),
    "append_f32": lambda: colstats_case(
        attention_case("paged", [190, 90, 0], [3, 20, 2], heads=(6, 2), window=70, sink_tokens=3),
        reduce="max",
    ),
    "prefill_f16": lambda: colstats_case(
        attention_case(
            "contiguous", [140, 150], [140, 60], head_dims=(37, 1), dtype=torch.float16
        ),
        reduce="count",
    ),
}  # fmt: skip


def attend_with(arguments, case, run=cuda_ops.on_host, **options):
    op = "gather_attention" if hasattr(case, "indices") else "paged_attention"
    return run(op, **arguments, return_lse=True, **options)


def attend(case, **options):
    """By the host runner, unless told otherwise."""
    return attend_with(case.arguments(), case, **options)


def differentiate(case, **options):
    """Gradients of all that is differentiable, as a list."""
    return list(gradients(lambda **a: attend_with(a, case, **options), case).values())


def colstats(arguments, run=cuda_ops.on_host, **options):
    """Fresh ones, and the same accumulated."""
    fresh = run("attention_colstats", **arguments, **options)
    into = {"accumulate_into": torch.ones_like(fresh), "decay": 0.5}
    return fresh, run("attention_colstats", **arguments, **into, **options)


def write(seed=0, run=cuda_ops.on_host, **options):
    """append_kv, copy_pages, compact_kv and merge_states on random inputs; all their results."""
    generator = torch.Generator().manual_seed(seed)
    caches = torch.randn(2, 12, 7, 3, 24, generator=generator).bfloat16()
    k_cache, v_cache = caches[0], caches[1][..., :20]
    run = functools.partial(run, **options)
    new = torch.randn(30, 3, 24, generator=generator).bfloat16()
    slots = torch.randperm(84, generator=generator)[:30].masked_fill(torch.arange(30) % 5 == 0, -1)
    run("append_kv", new, new[..., :20], k_cache, v_cache, slots)
    run("copy_pages", k_cache, v_cache, torch.tensor([[0, 5], [-1, 2], [1, 6]]))
    keep = torch.rand(2, 3, 40, generator=generator).argsort(-1)[..., :25].sort(-1).values
    table = torch.randperm(12, generator=generator).view(2, 6)
    lengths = run("compact_kv", k_cache, v_cache, table, torch.tensor([42, 41]), keep)
    outs, lses = torch.randn(3, 9, 2, 40), torch.randn(3, 9, 2)
    lses[0, :5] = -torch.inf
    return caches, lengths, *run("merge_states", outs.half(), lses)


def select(seed=0, run=cuda_ops.on_host, **options):
    """Summaries, scores and selections of random inputs, of short rows and of a long one."""
    generator = torch.Generator().manual_seed(seed)
    run = functools.partial(run, **options)
    k_cache = torch.randn(12, 7, 2, 36, generator=generator).half()
    table = torch.randperm(12, generator=generator).view(2, 6)
    table[1, 2] = table[0, 0]
    lengths = torch.tensor([42, 31])
    results = []
    for kind in "minmax", "mean":
        summary = run("summarize_keys", k_cache, table, lengths - 9, kind=kind)
        run("update_summaries", summary, k_cache, table, lengths, 9)
        q = torch.randn(5, 6, 36, generator=generator).half()
        offsets = torch.tensor([0, 4, 5])
        scores = run("score_pages", q, summary, table, lengths, 7, offsets, kind=kind)
        results += [summary, scores, run("select_topk", scores, 3, keep_last=1)]
    levels = torch.randint(-99, 99, (2, 40_000), generator=generator).bfloat16()
    results += [run("select_topk", levels, 300), run("select_topk", levels[:1], 300)]
    stats = levels[:, :900].view(2, 3, 300)
    return *results, run("evict", stats, torch.tensor([300, 40]), 50, keep_first=2)


@pytest.mark.parametrize("compute", [attend, differentiate])
@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_schedule(compute, name):
    case = CASES[name]()
    expected = compute(case)
    for seed, copies in (1, "lazy"), (2, "random"), (3, "eager"):
        with cuda_ops.schedule(seed, copies):
            assert_same_bits(compute(case), expected)


@pytest.mark.parametrize("compute", [write, select])
def test_other_ops_give_the_same_bits_for_any_schedule(compute):
    torch.manual_seed(0)
    expected = compute()
    for seed in 1, 2, 3:
        torch.manual_seed(0)
        with cuda_ops.schedule(seed, "random"):
            assert_same_bits(compute(), expected)


def test_one_block_selects_as_several_do():
    *_, rows, row, _ = select()
    assert_same_bits(row, rows[:1])


def test_a_sparse_step_of_decoding_is_three_launches():
    case = attention_case("paged", [600, 40], heads=(8, 2), dtype=torch.bfloat16)
    inputs = case.page_table, case.seq_lens
    summary = cuda_ops.on_host("summarize_keys", case.k_cache, *inputs)
    cuda_ops.launches()
    scores = cuda_ops.on_host("score_pages", case.q, summary, *inputs, 16)
    pages = (case.seq_lens[:, None] + 15) // 16
    indices = cuda_ops.on_host("select_topk", scores, 20, pages, keep_last=1)
    cuda_ops.on_host("gather_attention", case.q, case.k_cache, case.v_cache, indices, *inputs)
    assert cuda_ops.launches() == 3


@pytest.mark.parametrize("name", COLSTATS)
def test_colstats_give_the_same_bits_for_any_schedule(name):
    arguments = COLSTATS[name]()
    expected = colstats(arguments)
    for seed, copies in (1, "lazy"), (2, "random"), (3, "eager"):
        with cuda_ops.schedule(seed, copies):
            assert_same_bits(colstats(arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_colstats_give_the_same_bits_alone_and_in_a_batch(dtype):
    """In small blocks and in large ones, that is."""
    options = {"heads": (6, 2), "window": 150, "sink_tokens": 2, "softcap": 3.0, "dtype": dtype}
    arguments = colstats_case(attention_case("paged", [300, 0, 90], [2, 1, 90], **options))
    alone = arguments | {"cu_seqlens_q": torch.tensor([0, 2])}
    alone |= {name: arguments[name][:1] for name in ("page_table", "seq_lens")}
    alone |= {name: arguments[name][:2] for name in ("q", "lse")}
    assert_same_bits(colstats(alone)[0], colstats(arguments)[0][:1])


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_no_races(name):
    cuda_ops.races()
    case = CASES[name]()
    with cuda_ops.schedule(1, runner=cuda_ops.library("race")):
        check_attention(lambda **_: attend(case, check="race"), case)
        differentiate(case, check="race")
    assert cuda_ops.races() == (0, "")


@pytest.mark.full
@pytest.mark.parametrize("compute", [write, select])
def test_no_races_in_other_ops(compute):
    cuda_ops.races()
    compute(check="race")
    assert cuda_ops.races() == (0, "")


@pytest.mark.full
@pytest.mark.parametrize("name", COLSTATS)
def test_no_races_in_colstats(name):
    cuda_ops.races()
    with cuda_ops.schedule(1, runner=cuda_ops.library("race")):
        colstats(COLSTATS[name](), check="race")
    assert cuda_ops.races() == (0, "")


def damaged():
    """Cases whose indices are nonsense in places, and the same with -1 or bounds in theirs."""
    case = attention_case("paged", [90, 40, 33], [3, 1, 9], dtype=torch.bfloat16)
    nonsense = case.page_table.clone()
    nonsense[0, 1], nonsense[2, 0] = 10**6, -7
    absent = case.page_table.clone()
    absent[0, 1] = absent[2, 0] = -1
    yield case.replace(page_table=nonsense), case.replace(page_table=absent)
    capacity = case.page_table.shape[1] * 16
    full = attention_case("paged", [capacity - 16] * 2, dtype=torch.bfloat16)
    far = full.replace(seq_lens=full.seq_lens + 10**6)
    cut = full.replace(seq_lens=torch.full_like(full.seq_lens, full.page_table.shape[1] * 16))
    yield far, cut
    yield full.replace(seq_lens=full.seq_lens * 0 - 5), full.replace(seq_lens=full.seq_lens * 0)
    packed = attention_case("packed", [20, 30], [20, 30], dtype=torch.bfloat16)
    beyond = packed.cu_seqlens_k.clone()
    beyond[-1] = 10**6
    yield packed.replace(cu_seqlens_k=beyond), packed
    listed = gather_case([90, 40], num_listed=6, skipped=0, dtype=torch.bfloat16)
    indices = listed.indices.clone()
    indices[0, 0, 2], indices[1, 1, 3] = 10**6, -9
    skipped = listed.indices.clone()
    skipped[0, 0, 2] = skipped[1, 1, 3] = -1
    yield listed.replace(indices=indices), listed.replace(indices=skipped)


def check_unchecked(**options):
    options = {"run": cuda_ops.on_host, "check_indices": False} | options
    for nonsense, clean in damaged():
        for compute in attend, differentiate:
            assert_same_bits(compute(nonsense, **options), compute(clean, **options))
        if clean.cu_seqlens_k is None and not hasattr(clean, "indices"):
            names = "q", "k_cache", "page_table", "seq_lens", "cu_seqlens_q"
            lse = {"lse": attend(clean, **options)[1]}
            stats = [
                colstats({name: getattr(case, name) for name in names} | lse, **options)
                for case in (nonsense, clean)
            ]
            assert_same_bits(*stats)
    cache = torch.zeros(3, 4, 1, 8)
    new = torch.ones(4, 1, 8)
    run = functools.partial(options.pop("run"), **options)
    slots = torch.tensor([10**9, -5, 7, 12])
    run("append_kv", new, new, cache, cache.clone(), slots)
    assert cache.sum() == 8 and cache[1, 3].all()
    run("copy_pages", cache, cache.clone(), torch.tensor([[1, 99], [-4, 0], [1, 2]]))
    assert cache.sum() == 16
    keep, table = torch.tensor([[[3, 10**6, 5]]]), torch.tensor([[1, 77]])
    run("compact_kv", cache, cache.clone(), table, torch.tensor([8]), keep)
    assert cache[1, 0].all() and cache.sum() == 24
    check_unchecked_selection(run)


def check_unchecked_selection(run):
    """Pages out of range count as absent ones; lengths and budgets are cut to what there is."""
    k_cache, q = torch.randn(4, 4, 1, 8), torch.randn(2, 2, 8)
    lengths = torch.tensor([16, 9])
    absent, nonsense = torch.tensor([[2, -1, 0, 3], [1, -1, 2, 0]]), torch.tensor([10**9, -7])
    table = absent.where(absent >= 0, nonsense[:, None])
    far = torch.tensor([10**12, 9])
    results = []
    for pages, length in (absent, lengths), (table, far):
        summary = run("summarize_keys", k_cache, pages, length)
        run("update_summaries", summary, k_cache, pages, length, torch.tensor([3, 10**10]))
        results.append((summary, run("score_pages", q, summary, pages, length, 4)))
    assert_same_bits(results[1], results[0])
    run("score_pages", q, summary, table, far, 4, torch.tensor([0, 10**9, -3])[:3])
    rows = torch.randn(2, 20)
    everything = torch.arange(20, dtype=torch.int32)
    assert_same_bits(run("select_topk", rows, 20, torch.tensor([99, 20]))[0], everything)
    assert (run("select_topk", rows, 5, torch.tensor([-4, 20]))[0] == -1).all()
    budgets = {"budget": torch.tensor([-3, 99]), "max_budget": 4, "keep_first": 6}
    keep = run("evict", rows[:, None], torch.tensor([20, 20]), **budgets)
    assert keep.tolist() == [[[-1] * 4], [[0, 1, 2, 3]]]


def check_nonsense_offsets(**options):
    """Offsets of queries that are nonsense give any numbers, but touch only what is given."""
    small = attention_case("paged", [90, 40, 33], [3, 1, 9], dtype=torch.bfloat16)
    split = attention_case("paged", [600] * 3, [5, 6, 5], heads=(16, 1), dtype=torch.bfloat16)
    cases = [
        *((small, offsets) for offsets in ([5, 3, 20, 11], [-9, 0, 2, 10**6], [0, 13, 13, 2])),
        *((split, offsets) for offsets in ([0, 16, 0, 16], [16, 0, 16, 0], [0, 9, 2, 16])),
    ]
    for case, offsets in cases:
        broken = case.replace(cu_seqlens_q=torch.tensor(offsets, dtype=torch.int32))
        arguments = colstats_case(case) | {"cu_seqlens_q": broken.cu_seqlens_q}
        colstats(arguments, check_indices=False, **options)
        differentiate(broken, check_indices=False, **options)
        attend(broken, check_indices=False, **options, max_seqlen=20)


def test_indices_out_of_range_are_skipped():
    check_unchecked()
    check_nonsense_offsets()


def every_kernel(**options):
    """For a process under a sanitizer."""
    options = options or {"run": cuda_ops.on_device}
    for make in CASES.values():
        attend(make(), **options)
        differentiate(make(), **options)
    for make in COLSTATS.values():
        colstats(make(), **options)
    write(**options)
    select(**options)
    check_unchecked(**options)
    test_cuda_lookup.every_kernel(
        functools.partial(options.pop("run", cuda_ops.on_host), **options)
    )
    if "check" not in options:
        check_merge_backward(torch.ops.memkernels.merge_states_backward, torch.half, "cuda")


@pytest.mark.full
def test_no_stray_accesses():
    from test_simt import run_with_address_sanitizer

    done = run_with_address_sanitizer(
        "import test_cuda_kernels as t; o = {'check': 'address'}; "
        "t.every_kernel(**o); t.check_nonsense_offsets(**o)"
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_unsupported_dtype_lists_the_supported_ones():
    case = attention_case("paged", [9], dtype=torch.float64)
    supported = "float64; supported on CUDA: float32, bfloat16, float16"
    with unchanged(*case.tensors().values()), pytest.raises(RuntimeError, match=supported):
        attend(case)
    with pytest.raises(RuntimeError, match=supported):
        cuda_ops.on_host(
            "merge_states", torch.zeros(2, 3, 1, 4).double(), torch.zeros(2, 3, 1).double()
        )


def check_merge_backward(backward, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 11, 2, 40, generator=generator).to(dtype)
    lses = 3 * torch.randn(3, 11, 2, generator=generator)
    lses[0, :4], lses[:, 7] = -torch.inf, -torch.inf
    out, lse = memkernels.merge_states(outs, lses)
    dout, dlse = torch.randn(11, 2, 40, generator=generator).to(dtype), torch.randn(11, 2)
    for gradient in dlse, None:
        arguments = dout, gradient, out, lse, outs, lses
        expected = torch.ops.memkernels.merge_states_backward(*arguments)
        actual = backward(*(None if t is None else t.to(device) for t in arguments))
        torch.testing.assert_close([t.cpu() for t in actual], list(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_states_backward(dtype):
    cuda_ops.library()
    check_merge_backward(torch.ops.memkernels_simt.merge_states_backward, dtype)
    if cuda_ops.on_gpu():
        check_merge_backward(torch.ops.memkernels.merge_states_backward, dtype, "cuda")


def on_cuda(arguments):
    return {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}


@pytest.mark.skipif(not cuda_ops.on_gpu(), reason="no GPU, or a build without CUDA kernels")
class TestOnGpu:
    """What the host runner cannot show."""

    def test_captured_in_a_graph(self):
        case = decode()
        expected = cuda_ops.on_device("paged_attention", **case.arguments(), return_lse=True)
        tensors = on_cuda(case.arguments())
        memkernels.paged_attention(**tensors, return_lse=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = memkernels.paged_attention(**tensors, return_lse=True)
        for result in results:
            result.zero_()
        graph.replay()
        assert_same_bits([x.cpu() for x in results], list(expected))

    def test_current_stream(self):
        case = decode()
        tensors = on_cuda(case.arguments())
        expected = memkernels.paged_attention(**tensors)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**7)
            q = tensors["q"].clone()
            actual = memkernels.paged_attention(**tensors | {"q": q})
        torch.cuda.synchronize()
        assert_same_bits(actual, expected)

    def test_gradients(self):
        case = attention_case("paged", [30, 9], [3, 2], dtype=torch.float32)
        leaves = case.requires_grad().arguments()
        memkernels.paged_attention(**on_cuda(leaves)).sum().backward()
        others = case.requires_grad().arguments()
        memkernels.paged_attention(**others).sum().backward()
        torch.testing.assert_close(leaves["q"].grad, others["q"].grad)

    def test_compiles_whole(self):
        case = decode()
        tensors = on_cuda(case.arguments())
        compiled = torch.compile(memkernels.paged_attention, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(**tensors), memkernels.paged_attention(**tensors))
