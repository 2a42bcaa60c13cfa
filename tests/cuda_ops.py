"""The ops with their CUDA kernels, for CPU tensors: on a GPU where there is one and the build has
CUDA kernels, else on the host, by the runner in tests/simt."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import hypothesis
import pytest
import torch
from torch import Tensor

import memkernels
from memkernels import _C, _library, attention, lookup, scan, selection
from tolerance import assert_same_bits

SIMT = Path(__file__).parent / "simt"
OPS = (
    "paged_attention", "gather_attention", "merge_states", "append_kv", "copy_pages", "compact_kv",
    "summarize_keys", "update_summaries", "score_pages", "select_topk", "evict",
    "attention_colstats", "knn_topk", "indexer_scores", "product_key_topk", "embedding_bag",
    "embedding_bag_backward", "row_sgd", "row_adagrad", "row_adam", "ngram_hash", "engram_gate",
    "lsh_codes", "sparse_ffn", "linear_attention", "delta_rule", "selective_scan", "diagonal_scan",
    "causal_conv1d", "feature_map", "infini_update", "ssd", "route_tokens", "unroute_tokens",
    "linear_attention_step", "delta_rule_step", "selective_scan_step", "causal_conv1d_step",
)  # fmt: skip
DIFFERENTIABLE = (
    "paged_attention", "gather_attention", "indexer_scores", "product_key_topk", "embedding_bag",
    "engram_gate", "lsh_codes", "sparse_ffn", "linear_attention", "delta_rule", "selective_scan",
    "diagonal_scan", "causal_conv1d", "feature_map", "infini_update", "ssd", "route_tokens",
    "unroute_tokens",
)  # fmt: skip
MODULES = attention, selection, lookup, scan
ASYNC = {"eager": 0, "lazy": 1, "random": 2}


def on_gpu() -> bool:
    return torch.cuda.is_available() and _C.build_info()["cuda"] is not None


def build(source: Path, name: str, *options: str) -> Path:
    """Builds a CMake project of the tests, or what changed of it; returns its build folder."""
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the host runner of CUDA kernels needs {', '.join(missing)}")
    repository = SIMT.parents[1]
    root = repository / "build" if os.access(repository, os.W_OK) else Path(tempfile.gettempdir())
    folder = root / name
    configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(folder)]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", *options]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # against other processes of a parallel run
        for command in configure, ["cmake", "--build", str(folder)]:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return folder


def library(check: str = "") -> ctypes.CDLL:
    """The runner, with a detector ("race" or "address") if wanted, its ops loaded."""
    return _load(check)


@functools.cache
def build_runner(check: str) -> Path:
    core = Path(_C.__file__).parent / "libmemkernels.so"
    return build(
        *(SIMT, f"memkernels-simt-{check or 'plain'}"),
        *(f"-DLIBMEMKERNELS={core}", f"-DSIMT_CHECK={check}"),
    )


@functools.cache
def _load(check: str) -> ctypes.CDLL:
    path = str(build_runner(check) / "libmemkernels_simt.so")
    torch.ops.load_library(path)
    namespace = f"memkernels_simt{check}"
    autograd = torch.library.Library(namespace, "FRAGMENT")
    for module in MODULES:
        module._register_autograd(namespace, autograd)
    loaded = ctypes.CDLL(path)
    loaded.autograd = autograd  # registered as long as this lives
    return loaded


@functools.cache
def cute_library() -> ctypes.CDLL:
    """CuTe kernels under the runner."""
    if importlib.util.find_spec("cutlass_library") is None:
        pytest.skip("no CUTLASS headers: pip install --no-deps nvidia-cutlass==4.2.0.0")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), str(Path(nvcc).resolve().parents[1])]
    home = next((h for h in homes if (Path(h) / "include/cuda_bf16.h").exists()), None)
    if home is None:
        pytest.skip("no CUDA headers: set CUDA_HOME")
    folder = build(SIMT / "cute", "memkernels-simt-cute", f"-DCUDA_HOME={home}")
    return ctypes.CDLL(str(folder / "libmemkernels_simt_cute.so"))


@contextlib.contextmanager
def schedule(seed: int, async_copies: str = "lazy", runner: ctypes.CDLL | None = None):
    """Within, blocks and threads take turns in an order drawn from the seed (0: as numbered), and
    copies land at once ("eager"), when waited for ("lazy") or either ("random")."""
    configure = (runner or library()).simt_configure
    configure(ctypes.c_uint64(seed), ASYNC[async_copies])
    yield
    configure(ctypes.c_uint64(0), ASYNC["lazy"])


def launches() -> int:
    """How many kernels the runner has launched since the last call."""
    return library().simt_launches()


def races() -> tuple[int, str]:
    """How many races there were since the last call, and the first of them."""
    text = ctypes.create_string_buffer(256)
    return library("race").simt_races(text, len(text)), text.value.decode()


@functools.cache
def emulated(check: str) -> list[tuple[ModuleType, dict[str, torch._ops.OpOverload]]]:
    """By module, the names that stand for torch ops, and the ops of the host runner for them."""
    ops = getattr(torch.ops, f"memkernels_simt{check}")
    return [
        (
            module,
            {
                name: getattr(ops, op._opname).default
                for name, op in vars(module).items()
                if isinstance(op, torch._ops.OpOverload)
            },
        )
        for module in MODULES
    ]


def on_host(op: str, *args, check_indices: bool = True, check: str = "", **kwargs):
    """The public function, with the op of the host runner behind it."""
    library(check)
    with contextlib.ExitStack() as patches:
        for module, ops in emulated(check):
            patches.enter_context(mock.patch.multiple(module, **ops))
        environment = {"MEMKERNELS_CHECK": str(int(check_indices))}
        patches.enter_context(mock.patch.dict(os.environ, environment))
        return getattr(memkernels, op)(*args, **kwargs)


def tests_of(cases: dict[str, Callable], unchecked: dict[str, Callable]) -> tuple[Callable, ...]:
    """Tests of a family's kernels. Both hold functions of `run(op, *args, **kwargs)`, which calls
    an op with its CUDA kernel: `cases` return what they compute, `unchecked` ones, for which
    nothing checks indices, compare it themselves."""

    @pytest.mark.parametrize("name", cases)
    def same_bits(name):
        expected = cases[name](on_host)
        for seed, copies in (1, "lazy"), (2, "random"), (3, "eager"):
            with schedule(seed, copies):
                assert_same_bits(cases[name](on_host), expected)

    @pytest.mark.full
    @pytest.mark.parametrize("name", cases)
    def no_races(name):
        races()
        with schedule(1, runner=library("race")):
            cases[name](functools.partial(on_host, check="race"))
        assert races() == (0, "")

    @pytest.mark.parametrize("name", unchecked)
    def skipped(name):
        unchecked[name](functools.partial(on_host, check_indices=False))

    return same_bits, no_races, skipped


def run_all(run: Callable, cases: dict[str, Callable], unchecked: dict[str, Callable]) -> None:
    """The same kernels, for a process under a sanitizer."""
    for compute in cases.values():
        compute(run)
    for compare in unchecked.values():
        compare(functools.partial(run, check_indices=False))


needs_gpu = pytest.mark.skipif(not on_gpu(), reason="no GPU, or a build without CUDA kernels")


def on_cuda(arguments: dict) -> dict:
    return {n: t.cuda() if isinstance(t, Tensor) else t for n, t in arguments.items()}


def check_captured(compute: Callable[[], list[Tensor]]) -> None:
    """A graph of what is launched gives the same bits."""
    expected = [result.clone() for result in compute()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute()
    for result in results:
        result.zero_()
    graph.replay()
    assert_same_bits(list(results), expected)


class Moved(torch.autograd.Function):
    """A leaf on the CPU as it was moved to the device, with its strides and aliases."""

    @staticmethod
    def forward(ctx, value, move):
        return move()

    @staticmethod
    def backward(ctx, grad):
        return grad.cpu(), None


def on_device(op: str, *args, check_indices: bool = True, **kwargs):
    """The public function on copies of the tensors, whose changes come back."""
    storages, versions = {}, []

    def move(value):
        if not isinstance(value, Tensor):
            return value
        if value.requires_grad:
            return Moved.apply(value, lambda: move(value.detach()))
        storage = value.untyped_storage()
        there = storages.get(storage.data_ptr())
        if there is None:
            there = storages[storage.data_ptr()] = (storage, storage.cuda())
        layout = value.storage_offset(), value.shape, value.stride()
        moved = torch.empty(0, dtype=value.dtype, device="cuda").set_(there[1], *layout)
        versions.append((value, moved, moved._version))
        return moved

    args, kwargs = torch.utils._pytree.tree_map(move, (args, kwargs))
    try:
        with mock.patch.dict(os.environ, {"MEMKERNELS_CHECK": str(int(check_indices))}):
            results = getattr(memkernels, op)(*args, **kwargs)
    finally:
        for here, there in storages.values():
            here.copy_(there)
        changed = [value for value, moved, version in versions if moved._version > version]
        torch.autograd.graph.increment_version(changed)
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, results)


def run(op: str, *args, **kwargs):
    """An op with its CUDA kernel; what that lacks skips the test or example."""
    tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, Tensor)]
    lacking = None
    if any(x.dtype in (torch.float64, torch.complex128) for x in tensors):
        lacking = "CUDA kernels have no float64"
    elif op not in DIFFERENTIABLE and _library.wants_gradient(*tensors):
        lacking = "autograd of this op is above what is tested here"
    if lacking:
        if hypothesis.currently_in_test_context():
            hypothesis.reject()
        pytest.skip(lacking)
    return (on_device if on_gpu() else on_host)(op, *args, **kwargs)


def namespace() -> SimpleNamespace:
    """All ops, with all their results."""
    ops = {op: functools.partial(run, op) for op in OPS}
    for op in "paged_attention", "gather_attention":
        ops[op] = functools.partial(ops[op], return_lse=True)
    for op in "paged_attention", "gather_attention", "linear_attention", "delta_rule":
        # Three products of tf32 keep 22 bits of a float32, which shows where values cancel.
        ops[op].slack = {torch.float32: 8}
    return SimpleNamespace(**ops, ROUNDED=(torch.bfloat16, torch.float16))
