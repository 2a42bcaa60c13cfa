"""What the installed binaries promise: symbols, dependencies, and CPUs of long ago."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import memkernels
from memkernels import _C

FOLDER = Path(_C.__file__).parent
LIBRARIES = [FOLDER / "libmemkernels.so", FOLDER / "memkernels_torch.so", Path(_C.__file__)]

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None, reason="binutils are absent"
)


def output(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_version():
    assert memkernels.__version__ == importlib.metadata.version("memkernels")


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_only_the_stable_abi_is_needed(library):
    undefined = output("nm", "-D", "--undefined-only", library)
    assert not re.findall(r"_ZNK?(?:2at|3c10|5torch)\S*", undefined)
    dynamic = output("readelf", "-d", library)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    of_torch = {name for name in needed if re.match(r"lib(torch|c10|cud)", name)}
    assert of_torch == ({"libtorch_cpu.so"} if library.name.startswith("memkernels_t") else set())


@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_no_path_leads_out_of_the_package(library):
    paths = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", output("readelf", "-d", library))
    assert set(paths) <= {"$ORIGIN"}


OLD_CPU = """
import torch
import memkernels
from memkernels import _C, fallback

assert _C.cpu_isas() == ["baseline"], _C.cpu_isas()
page_table, seq_lens = torch.tensor([[2, 0, 1]]), torch.tensor([37])
for queries in 1, 20:
    cu_seqlens_q = torch.tensor([0, queries])
    inputs = torch.randn(queries, 4, 40), torch.randn(3, 16, 2, 40), torch.randn(3, 16, 2, 40)
    tables = page_table, seq_lens, cu_seqlens_q
    exact = fallback.paged_attention(*(x.double() for x in inputs), *tables)[0]
    for dtype in torch.float64, torch.float32, torch.bfloat16, torch.float16:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = memkernels.paged_attention(*leaves, *tables)
        out.sum().backward()
        error = (out.double() - exact).abs().max().item()
        assert error < 8 * torch.finfo(dtype).eps * 4, (dtype, error)
print("the baseline runs")
"""


@pytest.mark.full
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-user is absent")
def test_cpu_of_2008():
    """Every instruction that is executed, torch's included, is one of Nehalem's."""
    run = subprocess.run(
        ["qemu-x86_64", "-cpu", "Nehalem", sys.executable, "-c", OLD_CPU],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "the baseline runs" in run.stdout, run.stderr[-2000:]
