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
import test_cuda_scan
import test_cuda_selection
from cases import attention_case, gather_case
from cuda_ops import on_cuda
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


def attend_with(arguments, case, run=cuda_ops.on_host, **options):
    op = "gather_attention" if hasattr(case, "indices") else "paged_attention"
    return run(op, **arguments, return_lse=True, **options)


def attend(case, **options):
    """By the host runner, unless told otherwise."""
    return attend_with(case.arguments(), case, **options)


def differentiate(case, **options):
    """Gradients of all that is differentiable, as a list."""
    return list(gradients(lambda **a: attend_with(a, case, **options), case).values())


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


@pytest.mark.parametrize("compute", [attend, differentiate])
@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_schedule(compute, name):
    case = CASES[name]()
    expected = compute(case)
    for seed, copies in (1, "lazy"), (2, "random"), (3, "eager"):
        with cuda_ops.schedule(seed, copies):
            assert_same_bits(compute(case), expected)


def test_writing_gives_the_same_bits_for_any_schedule():
    torch.manual_seed(0)
    expected = write()
    for seed in 1, 2, 3:
        torch.manual_seed(0)
        with cuda_ops.schedule(seed, "random"):
            assert_same_bits(write(), expected)


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
def test_no_races_in_writing():
    cuda_ops.races()
    write(check="race")
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
    write(**options)
    check_unchecked(**options)
    run = functools.partial(options.pop("run", cuda_ops.on_host), **options)
    for family in test_cuda_selection, test_cuda_lookup, test_cuda_scan:
        cuda_ops.run_all(run, family.CASES, family.UNCHECKED)
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


@cuda_ops.needs_gpu
class TestOnGpu:
    """What the host runner cannot show."""

    def test_captured_in_a_graph(self):
        case = decode()
        tensors = on_cuda(case.arguments())
        cuda_ops.check_captured(lambda: memkernels.paged_attention(**tensors, return_lse=True))

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
