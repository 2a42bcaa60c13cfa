"""The AVX-512 kernels, on any CPU with AVX2: built with emulated instructions, then tested by the
ordinary tests of the ops."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import memkernels
from memkernels import _C

ROOT = Path(__file__).parent.parent
TESTS = (
    "test_attention.py",
    "test_attention_backward.py",
    "test_append_merge.py",
    "test_gather_attention.py",
    "test_shared_prefix.py",
    "test_selection.py",
    "test_select_evict.py",
    "test_colstats.py",
    "test_knn_indexer.py",
    "test_embedding_bag.py",
    "test_embedding_bag_backward.py",
    "test_engram.py",
    "test_product_keys.py",
    "test_row_updates.py",
    "test_scan.py",
    "test_linear_attention.py",
    "test_delta_rule.py",
    "test_selective_scan.py",
    "test_diagonal_scan.py",
    "test_causal_conv1d.py",
    "test_scan_steps.py",
    "test_feature_map.py",
)
# What does not run the kernels, or measures them.
EXCLUDED = ("fallback", "every_isa", "compile", "export", "opcheck", "saves_time")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif("avx2" not in _C.cpu_isas(), reason="the emulation needs AVX2"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("cmake", "ninja")))
        or importlib.util.find_spec("pybind11") is None,
        reason="needs cmake, ninja and pybind11",
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    """A folder to import memkernels from, whose AVX-512 kernels are emulated."""
    folder = tmp_path_factory.mktemp("emulated")
    build = folder / "build"
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
    )
    subprocess.run(
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, "-DMEMKERNELS_EMULATE_AVX512=ON",
         "-DMEMKERNELS_CUDA=OFF", f"-DSKBUILD_PROJECT_VERSION={memkernels.__version__}",
         f"-Dpybind11_DIR={pybind11.stdout.strip()}", f"-DPython_EXECUTABLE={sys.executable}"],
        check=True,
    )  # fmt: skip
    subprocess.run(["cmake", "--build", build], check=True)
    shutil.copytree(ROOT / "python" / "memkernels", folder / "memkernels")
    for library in build.glob("*.so"):
        shutil.copy(library, folder / "memkernels")
    return folder


# Puts the folder before everything, an editable install's import hook included.
LAUNCH = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, {folder!r})
import pytest
import torch
from memkernels import _C

assert _C.__file__.startswith({folder!r}), _C.__file__
assert _C.cpu_isa() == {isa!r}, _C.cpu_isa()
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16"])
def test_ops(emulated, isa):
    tests = subprocess.run(
        [sys.executable, "-c", LAUNCH.format(folder=str(emulated), isa=isa),
         "-q", "-p", "no:cacheprovider",
         "-k", " and ".join(f"not {name}" for name in EXCLUDED),
         *(str(ROOT / "tests" / name) for name in TESTS)],
        capture_output=True, text=True, cwd=emulated, env=os.environ | {"MEMKERNELS_CPU_ISA": isa},
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-2000:]
