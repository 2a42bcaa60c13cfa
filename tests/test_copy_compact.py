"""Copying pages of a paged cache, and moving the tokens that are kept together."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import memkernels
from cases import POISON_PAGE, attention_case
from memkernels import reference
from test_attention import apart
from tolerance import assert_same_bits, unchanged

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["NHD", "HND", "mixed", "shared"]


def random_caches(num_pages, page_size, *, heads=2, head_dims=(24, 10), layout="NHD",
                  dtype=torch.float32, seed=0):  # fmt: skip
    """K and V. "mixed": V alone is head-major; "shared": V is a view of the rows of K."""
    generator = torch.Generator().manual_seed(seed)
    caches = []
    for name, head_dim in zip("kv", head_dims, strict=True):
        head_major = layout == "HND" or (layout == "mixed" and name == "v")
        shape = (num_pages, heads, page_size) if head_major else (num_pages, page_size, heads)
        cache = torch.randn(*shape, head_dim, generator=generator).to(dtype)
        caches.append(cache.transpose(1, 2) if head_major else cache)
    if layout == "shared":
        caches[1] = caches[0][..., : head_dims[1]]
    return caches


def clones(*caches):
    """Copies with the same strides, of which V is still a view of K if it was."""
    k_cache, v_cache = caches
    if v_cache.data_ptr() == k_cache.data_ptr():
        k_cache = k_cache.clone()
        return k_cache, k_cache[..., : v_cache.shape[-1]]
    return k_cache.clone(), v_cache.clone()


def arrays(*tensors):
    """For the reference, which copies and never computes: float64 holds every value exactly."""
    return [(t.double() if t.is_floating_point() else t).contiguous().numpy() for t in tensors]


# ---- copy_pages ----------------------------------------------------------------------------------


def random_pairs(num_pages, n, seed=0):
    """Sources repeat, destinations do not; a quarter of the pairs has a -1."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(num_pages, generator=generator)
    sources = pages[n:][torch.randint(num_pages - n, (n,), generator=generator)]
    pairs = torch.stack([sources, pages[:n]], 1)
    skipped = torch.rand(n, generator=generator) < 0.25
    pairs[skipped, torch.randint(2, (n,), generator=generator)[skipped]] = -1
    return pairs


def check_copy(copy_pages, k_cache, v_cache, pairs):
    expected = reference.copy_pages(*arrays(k_cache, v_cache, pairs))
    with unchanged(pairs):
        assert copy_pages(k_cache, v_cache, pairs) is None
    for cache, exact in zip((k_cache, v_cache), expected, strict=True):
        assert_same_bits(cache, torch.from_numpy(exact).to(cache.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_copy(ops, dtype, layout, index_dtype):
    for n, page_size in (1, 1), (5, 7), (10, 16):
        caches = random_caches(12, page_size, layout=layout, dtype=dtype)
        check_copy(ops.copy_pages, *caches, random_pairs(12, n).to(index_dtype))


@given(st.data())
def test_copy_at_random(ops, data):
    num_pages = data.draw(st.integers(2, 20))
    caches = random_caches(
        num_pages,
        data.draw(st.sampled_from([1, 3, 16])),
        heads=data.draw(st.integers(1, 3)),
        head_dims=(data.draw(st.integers(20, 70)), data.draw(st.integers(1, 20))),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 2**16)),
    )
    pairs = random_pairs(num_pages, data.draw(st.integers(0, num_pages - 1)))
    check_copy(ops.copy_pages, *caches, pairs)


def test_copy_nan(ops):
    """Unused slots hold anything; so do their copies."""
    caches = random_caches(4, 5)
    for cache in caches:
        cache[0, 1] = torch.nan
        cache[0, 2] = torch.inf
    check_copy(ops.copy_pages, *caches, torch.tensor([[0, 3]]))
    assert caches[0][3, 1].isnan().all()


def test_copy_nothing(ops):
    caches = random_caches(6, 5)
    skipped = torch.tensor([[-1, 2], [3, -1], [-1, -1], [-1, 2], [2, -1]])
    for pairs in torch.zeros(0, 2, dtype=torch.long), skipped:
        with unchanged(*caches):
            ops.copy_pages(*caches, pairs)


def test_copy_slices_of_a_larger_cache(ops):
    """What lies between the rows of a cache is somebody else's."""
    caches = [apart(apart(cache, 2), 0) for cache in random_caches(6, 5)]
    between = [cache._base.clone() for cache in caches]
    check_copy(ops.copy_pages, *caches, torch.tensor([[4, 1], [4, 2]]))
    for cache, before in zip(caches, between, strict=True):
        changed = (cache._base != before).sum()
        assert changed == 2 * cache[0].numel()


def test_copy_strided_pairs(ops):
    caches = random_caches(6, 5)
    check_copy(ops.copy_pages, *caches, torch.tensor([[1, 1], [4, 2]]).T)
    check_copy(ops.copy_pages, *caches, apart(torch.tensor([[5, 3]]), 1))


def test_copy_many_pages(ops):
    """More of them than one task takes."""
    caches = random_caches(3000, 16, heads=1, head_dims=(8, 8))
    check_copy(ops.copy_pages, *caches, random_pairs(3000, 2000))


COPY_ERRORS = {
    "source_too_large": ("pairs", 2, lambda t: torch.tensor([[0, 1], [6, 2]])),
    "destination_too_large": ("pairs", 2, lambda t: torch.tensor([[0, 1], [0, 6]])),
    "below_minus_one": ("pairs", 2, lambda t: torch.tensor([[0, 1], [-2, 2]])),
    "too_large_beside_minus_one": ("pairs", 2, lambda t: torch.tensor([[0, 1], [-1, 6]])),
    "huge": ("pairs", 2, lambda t: torch.tensor([[0, 1], [2**40, 2]])),
    "destination_twice": ("pairs", 2, lambda t: torch.tensor([[0, 1], [2, 3], [4, 1]])),
    "same_pair_twice": ("pairs", 2, lambda t: torch.tensor([[0, 1], [0, 1]])),
    "chain": ("pairs", 2, lambda t: torch.tensor([[0, 1], [1, 2]])),
    "chain_backwards": ("pairs", 2, lambda t: torch.tensor([[1, 2], [0, 1]])),
    "swap": ("pairs", 2, lambda t: torch.tensor([[1, 2], [2, 1]])),
    "onto_itself": ("pairs", 2, lambda t: torch.tensor([[0, 1], [3, 3]])),
    "columns": ("pairs", 2, lambda t: torch.tensor([[0, 1, 2]])),
    "rank_of_pairs": ("pairs", 2, lambda t: torch.tensor([0, 1])),
    "dtype_of_pairs": ("pairs", 2, lambda t: torch.tensor([[0.0, 1.0]])),
    "rank_of_k_cache": ("k_cache", 0, lambda t: t[0]),
    "rank_of_v_cache": ("v_cache", 1, lambda t: t[0]),
    "pages_of_v_cache": ("v_cache", 1, lambda t: t[:-1]),
    "slots_of_v_cache": ("v_cache", 1, lambda t: t[:, :-1]),
    "heads_of_v_cache": ("v_cache", 1, lambda t: t[:, :, :1]),
    "dtype_of_v_cache": ("v_cache", 1, lambda t: t.double()),
}


@pytest.mark.parametrize("error", COPY_ERRORS)
def test_copy_errors_name_the_argument_and_change_nothing(ops, error):
    names, position, change = COPY_ERRORS[error]
    tensors = [*random_caches(6, 5), torch.tensor([[0, 1]])]
    tensors[position] = change(tensors[position])
    with unchanged(*tensors), pytest.raises(RuntimeError, match=rf"copy_pages: .*({names})"):
        ops.copy_pages(*tensors)


# ---- compact_kv ----------------------------------------------------------------------------------


@dataclass
class Compaction:
    """Arguments of `memkernels.compact_kv`, in their order."""

    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    seq_lens: Tensor
    keep: Tensor

    def arguments(self) -> list[Tensor]:
        return list(vars(self).values())

    def replace(self, **changes) -> Compaction:
        return Compaction(**vars(self) | changes)

    def unspecified(self) -> Tensor:
        """``[num_pages, page_size]``: the slots behind what each sequence keeps."""
        num_pages, page_size = self.k_cache.shape[:2]
        slots = torch.zeros(num_pages, page_size, dtype=torch.bool)
        kept = (self.keep[:, 0] >= 0).sum(-1)
        for pages, length, n in zip(self.page_table, self.seq_lens, kept, strict=True):
            pages = pages[: -(-length // page_size)].long()
            behind = (torch.arange(len(pages) * page_size) >= n).view(-1, page_size)
            slots[pages[pages >= 0]] = behind[pages >= 0]
        return slots


def compaction(lengths, budget, *, page_size=7, heads=2, shared=False, index_dtype=torch.int32,
               seed=0, **options):  # fmt: skip
    """Keeps up to budget tokens of each sequence; two columns of -1 follow."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_size) for length in lengths]
    pages = torch.randperm(sum(counts) + 2, generator=generator)
    table = torch.full((len(lengths), max(counts, default=0) + 1), POISON_PAGE)
    keep = torch.full((len(lengths), 1 if shared else heads, budget + 2), -1)
    used = 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count] = pages[used : used + count]
        used += count
        n = int(torch.randint(min(length, budget) + 1, (), generator=generator))
        if seed % 2:
            n = min(length, budget)
        for row in keep[b]:
            row[:n] = torch.randperm(length, generator=generator)[:n].sort().values
    return Compaction(
        *random_caches(len(pages), page_size, heads=heads, seed=seed, **options),
        table.to(index_dtype),
        torch.tensor(lengths, dtype=index_dtype),
        keep.to(index_dtype),
    )


def check_compact(compact_kv, case):
    """Against the reference: every slot but those behind what was kept."""
    *expected, new_lens = reference.compact_kv(*arrays(*case.arguments()))
    anywhere = case.unspecified()
    with unchanged(case.page_table, case.seq_lens, case.keep):
        actual = compact_kv(*case.arguments())
    assert actual.dtype == case.seq_lens.dtype
    assert actual.tolist() == new_lens.tolist()
    for cache, exact in zip((case.k_cache, case.v_cache), expected, strict=True):
        exact = torch.from_numpy(exact).to(cache.dtype)
        assert_same_bits(cache[~anywhere], exact[~anywhere])
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_compact(ops, dtype, layout, shared, index_dtype):
    options = {"layout": layout, "shared": shared, "dtype": dtype, "index_dtype": index_dtype}
    for seed in range(3):
        case = compaction([40, 0, 7, 1, 33], 20, seed=seed, **options)
        check_compact(ops.compact_kv, case)


@given(st.data())
def test_compact_at_random(ops, data):
    lengths = data.draw(st.lists(st.integers(0, 70), max_size=4))
    case = compaction(
        lengths,
        data.draw(st.integers(0, 70)),
        page_size=data.draw(st.sampled_from([1, 3, 16])),
        heads=data.draw(st.integers(1, 5)),
        head_dims=(data.draw(st.integers(20, 70)), data.draw(st.integers(1, 20))),
        shared=data.draw(st.booleans()),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        index_dtype=data.draw(st.sampled_from([torch.int32, torch.int64])),
        seed=data.draw(st.integers(0, 2**16)),
    )
    check_compact(ops.compact_kv, case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compact_many_tokens(ops, layout):
    """More of them than one task takes."""
    options = {"page_size": 16, "layout": layout, "head_dims": (16, 8)}
    check_compact(ops.compact_kv, compaction([9000, 5, 4000], 5000, seed=1, **options))


def test_compact_latent_cache(ops):
    """Multi-head latent attention: one head of 576, of which 512 are V as well."""
    options = {"heads": 1, "head_dims": (576, 512), "page_size": 16, "layout": "shared"}
    for seed in range(4):
        case = compaction([300, 0, 90], 100, dtype=torch.bfloat16, seed=seed, **options)
        check_compact(ops.compact_kv, case)


@pytest.mark.parametrize("first", ["k_cache", "v_cache"])
@pytest.mark.parametrize("columns", [slice(0, 16), slice(8, 24), slice(20, 24)])
def test_compact_views_of_one_another(ops, first, columns):
    """Either cache may be the view, of any columns; each row moves once."""
    case = compaction([40, 33], 20, seed=1)
    view = case.k_cache[..., columns]
    other = "v_cache" if first == "k_cache" else "k_cache"
    check_compact(ops.compact_kv, case.replace(**{first: case.k_cache, other: view}))


def test_compact_refuses_rows_that_overlap_in_part():
    case = compaction([40, 33], 20, seed=1)
    k, v = case.k_cache[..., :16], case.k_cache[..., 8:24]
    with unchanged(case.k_cache), pytest.raises(RuntimeError, match="compact_kv: v_cache overlaps"):
        memkernels.compact_kv(*case.replace(k_cache=k, v_cache=v).arguments())


def test_compact_keeps_everything(ops):
    """Nothing moves, not even behind the end of a sequence."""
    case = compaction([40, 9], 0)
    every = torch.arange(40).expand(2, 1, -1)
    case = case.replace(keep=torch.where(every < case.seq_lens[:, None, None], every, -1))
    with unchanged(case.k_cache, case.v_cache):
        assert ops.compact_kv(*case.arguments()).tolist() == [40, 9]


def test_compact_keeps_nothing(ops):
    for budget in 0, 3:
        case = compaction([40, 0, 9], budget)
        case.keep[:] = -1
        assert check_compact(ops.compact_kv, case).tolist() == [0, 0, 0]
    case = compaction([40], 0)
    empty = case.replace(keep=case.keep[..., :0])
    assert check_compact(ops.compact_kv, empty).tolist() == [0]


def test_compact_no_sequences(ops):
    assert check_compact(ops.compact_kv, compaction([], 4)).shape == (0,)


def test_compact_absent_pages(ops):
    """An absent page is fine where nothing is kept and nothing goes."""
    case = compaction([40, 9], 0, page_size=4, heads=1)
    case.page_table[0, 4:7] = -1  # tokens 16 to 27
    case = case.replace(keep=torch.full((2, 1, 12), -1))
    kept = torch.tensor([2, 3, 11, 13, 15, 28, 29, 33, 38, 39])
    case.keep[0, 0, :10] = kept
    check_compact(ops.compact_kv, case)
    case.page_table[0, 2] = case.page_table[0, 9]  # slot of a page not listed elsewhere any more
    case.page_table[0, 9] = -1
    case.seq_lens[0] = 36
    case.keep[0, 0, 8:] = -1
    check_compact(ops.compact_kv, case)


def test_compact_entries_behind_the_sequence_mean_nothing(ops):
    """There a table may name pages in use, and pages that do not exist."""
    case = compaction([40, 9], 20, seed=1)
    case.page_table[1, 2:5] = case.page_table[0, :3]
    check_compact(ops.compact_kv, case)


def test_compact_twice(ops):
    """What was kept once is a sequence like any other."""
    case = compaction([60, 45], 30, seed=1)
    first = ops.compact_kv(*case.arguments())
    again = compaction([60, 45], 30, seed=1)
    k, v, lens = reference.compact_kv(*arrays(*again.arguments()))
    keep = torch.tensor([0, 5, 6, 29]).expand(2, 1, -1)
    exact = reference.compact_kv(k, v, again.page_table.numpy(), lens, keep.numpy())
    second = case.replace(seq_lens=first, keep=keep)
    anywhere = case.unspecified() | second.unspecified()
    assert ops.compact_kv(*second.arguments()).tolist() == [4, 4]
    for cache, expected in zip((case.k_cache, case.v_cache), exact, strict=False):
        assert_same_bits(cache[~anywhere], torch.from_numpy(expected).float()[~anywhere])


def test_compact_then_attend(ops):
    """Attention over what was kept is attention over the whole with the rest masked."""
    lengths = [50, 7]
    case = attention_case("paged", lengths, causal=False, dtype=torch.float64)
    bias = torch.full(case.k_cache.shape[:-1], -torch.inf, dtype=torch.float64)
    keep = torch.full((2, 2, 9), -1)
    for b, length in enumerate(lengths):
        for head in range(2):
            tokens = torch.randperm(length)[:5].sort().values
            keep[b, head, :5] = tokens
            bias[case.page_table[b, tokens // 16].long(), tokens % 16, head] = 0
    expected = memkernels.paged_attention(**case.replace(key_bias=bias).arguments())
    caches = case.k_cache, case.v_cache
    lens = ops.compact_kv(*caches, case.page_table, case.seq_lens, keep)
    actual = memkernels.paged_attention(**case.replace(seq_lens=lens).arguments())
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dim", range(3))
def test_compact_strided_inputs(ops, dim):
    case = compaction([40, 0, 33], 20, seed=1)
    strided = {
        "k_cache": apart(case.k_cache, dim),
        "v_cache": apart(case.v_cache, 2 - dim),
        "page_table": apart(case.page_table, 1),
        "keep": apart(case.keep, dim),
    }
    check_compact(ops.compact_kv, case.replace(**strided))


@pytest.mark.parametrize("name", ["seq_lens", "page_table", "keep"])
def test_compact_other_strided_inputs_work_or_are_refused_by_name(ops, name):
    case = compaction([40, 0, 33], 20, seed=1)
    try:
        check_compact(ops.compact_kv, case.replace(**{name: apart(getattr(case, name), -1)}))
    except RuntimeError as error:
        assert name in str(error)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compact_same_bits_for_any_threads(layout):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in 1, 2, 3:
            torch.set_num_threads(threads)
            case = compaction([3000, 5, 900], 1000, heads=5, layout=layout, seed=1)
            results.append((memkernels.compact_kv(*case.arguments()), case.k_cache, case.v_cache))
    finally:
        torch.set_num_threads(before)
    kept = ~case.unspecified()
    for lens, *caches in results:
        assert_same_bits(lens, results[0][0])
        for cache, first in zip(caches, results[0][1:], strict=True):
            assert_same_bits(cache[kept], first[kept])


def put(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def keep(*tokens):
    """For both sequences and heads, the same."""
    return lambda c: {"keep": torch.tensor(tokens).expand(2, 2, -1)}


COMPACT_ERRORS = {
    "token_too_large": ("keep", keep(0, 2, 9, -1)),  # the second sequence has nine
    "huge_token": ("keep", keep(0, 2, 2**40)),
    "token_below_minus_one": ("keep", keep(0, 1, -2)),
    "token_of_no_tokens": (
        "keep", lambda c: keep(0, 1)(c) | {"seq_lens": torch.tensor([40, 0])}
    ),
    "falls": ("keep", keep(0, 3, 2)),
    "duplicate": ("keep", keep(0, 2, 2, 3)),
    "duplicate_of_zero": ("keep", keep(0, 0)),
    "token_after_minus_one": ("keep", keep(0, 1, -1, 2)),
    "token_after_leading_minus_one": ("keep", keep(-1, 0)),
    "unequal_heads": ("keep", lambda c: {"keep": put(c.keep, (0, 1, 2), -1)}),
    "no_tokens_of_one_head": ("keep", lambda c: {"keep": put(c.keep, (1, 0), -1)}),
    "kept_on_an_absent_page": (
        "keep|page_table", lambda c: {"page_table": put(c.page_table, (0, 2), -1)}
    ),
    "moved_to_an_absent_page": (
        "keep|page_table",
        lambda c: {"page_table": put(c.page_table, (0, 0), -1),
                   "keep": torch.tensor([7, 8]).expand(2, 2, -1)},
    ),
    "page_of_two_sequences": (
        "page_table", lambda c: {"page_table": put(c.page_table, (1, 1), c.page_table[0, 3])}
    ),
    "page_twice_in_one_sequence": (
        "page_table", lambda c: {"page_table": put(c.page_table, (0, 5), c.page_table[0, 3])}
    ),
    "page_too_large": ("page_table", lambda c: {"page_table": put(c.page_table, (0, 3), 10)}),
    "page_below_minus_one": ("page_table", lambda c: {"page_table": put(c.page_table, (0, 3), -2)}),
    "seq_lens_too_large": ("seq_lens|page_table", lambda c: {"seq_lens": c.seq_lens + 100}),
    "seq_lens_negative": ("seq_lens", lambda c: {"seq_lens": c.seq_lens - 10}),
    "rows_of_seq_lens": ("seq_lens|page_table", lambda c: {"seq_lens": c.seq_lens[:1]}),
    "dtype_of_seq_lens": ("seq_lens", lambda c: {"seq_lens": c.seq_lens.float()}),
    "rows_of_page_table": ("page_table|seq_lens", lambda c: {"page_table": c.page_table[:1]}),
    "rank_of_page_table": ("page_table", lambda c: {"page_table": c.page_table[0]}),
    "dtype_of_page_table": ("page_table", lambda c: {"page_table": c.page_table.float()}),
    "rows_of_keep": ("keep", lambda c: {"keep": c.keep[:1]}),
    "heads_of_keep": ("keep", lambda c: {"keep": c.keep.repeat(1, 2, 1)[:, :3]}),
    "rank_of_keep": ("keep", lambda c: {"keep": c.keep[0]}),
    "dtype_of_keep": ("keep", lambda c: {"keep": c.keep.float()}),
    "rank_of_k_cache": ("k_cache", lambda c: {"k_cache": c.k_cache[0]}),
    "pages_of_v_cache": ("v_cache", lambda c: {"v_cache": c.v_cache[:-1]}),
    "heads_of_v_cache": ("v_cache", lambda c: {"v_cache": c.v_cache[:, :, :1]}),
    "dtype_of_v_cache": ("v_cache", lambda c: {"v_cache": c.v_cache.double()}),
}  # fmt: skip


@pytest.mark.parametrize("error", COMPACT_ERRORS)
def test_compact_errors_name_the_argument_and_change_nothing(ops, error):
    names, change = COMPACT_ERRORS[error]
    case = compaction([40, 9], 8)
    case = case.replace(**keep(0, 2, 7, 8, -1)(case))  # pages 0 and 1
    case.keep = put(case.keep, (0, slice(None), 3), 20)  # page 2
    case = case.replace(**change(case))
    with (
        unchanged(*case.arguments()),
        pytest.raises(RuntimeError, match=rf"compact_kv: .*({names})"),
    ):
        ops.compact_kv(*case.arguments())


# ---- both ----------------------------------------------------------------------------------------


def example(op, layout="NHD"):
    """Arguments of an op that changes the caches."""
    if op == "copy_pages":
        return [*random_caches(6, 5, layout=layout), torch.tensor([[0, 1], [-1, 3], [0, 4]])]
    return compaction([40, 0, 9], 20, seed=1, layout=layout).arguments()


each_op = pytest.mark.parametrize("op", ["copy_pages", "compact_kv"])


@each_op
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_strided_last_dim_is_refused_by_name(op, name):
    arguments = example(op)
    i = ["k_cache", "v_cache"].index(name)
    arguments[i] = arguments[i].repeat_interleave(2, -1)[..., ::2]
    with unchanged(*arguments), pytest.raises(RuntimeError, match=f"{op}: .*{name}"):
        getattr(memkernels, op)(*arguments)


@each_op
@pytest.mark.parametrize("position", range(2))
def test_not_differentiable(ops, op, position):
    arguments = example(op)
    arguments[position].requires_grad_()
    with unchanged(*arguments), pytest.raises(RuntimeError, match=rf"{op}: .*not differentiable"):
        getattr(ops, op)(*arguments)
    with torch.no_grad():
        getattr(ops, op)(*arguments)


@each_op
def test_version_of_both_caches_is_bumped(ops, op):
    arguments = example(op)
    versions = [t._version for t in arguments]
    getattr(ops, op)(*arguments)
    changed = [t._version > version for t, version in zip(arguments, versions, strict=True)]
    assert changed == [True, True] + [False] * (len(arguments) - 2)


@each_op
def test_a_saved_cache_that_changes_is_noticed(op):
    arguments = example(op)
    weight = torch.ones(1, requires_grad=True)
    product = (weight * arguments[0]).sum()
    getattr(memkernels, op)(*arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@each_op
def test_inference_mode(op):
    with torch.inference_mode():
        arguments = example(op)
        getattr(memkernels, op)(*arguments)


@each_op
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_opcheck(op, layout):
    torch.library.opcheck(getattr(torch.ops.memkernels, op).default, example(op, layout))


@each_op
@pytest.mark.parametrize("layout", ["NHD", "HND", "mixed"])
def test_compile(op, layout):
    def step(k_cache, v_cache, *indices):
        result = getattr(memkernels, op)(k_cache, v_cache, *indices)
        total = k_cache.square().sum() + v_cache.square().sum()
        return total if result is None else total + result.sum()

    arguments = example(op, layout)
    compiled_caches = clones(*arguments[:2])
    expected = step(*arguments)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = compiled(*compiled_caches, *arguments[2:])
    assert_same_bits([actual, *compiled_caches], [expected, *arguments[:2]])
    torch._dynamo.reset()


@each_op
def test_autocast_changes_nothing(op):
    arguments = example(op)
    caches = clones(*arguments[:2])
    getattr(memkernels, op)(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        getattr(memkernels, op)(*caches, *arguments[2:])
    assert_same_bits(caches, tuple(arguments[:2]))
