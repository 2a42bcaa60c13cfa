"""The host runner of CUDA kernels: what it computes, and that it finds planted bugs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_ops

# Bugs of planted.cpp, in its order; by which kernel, and what the runner says.
NONE = 0
BUGS = {
    "missing_barrier": (1, "sum", "wrong numbers"),
    "producer_ahead": (2, "sum", "wrong numbers"),
    "unwritten_read": (3, "sum", "wrong numbers"),
    "divergent_barrier": (4, "sum", "divergent __syncthreads"),
    "early_exit": (5, "sum", "ends while thread|have ended"),
    "divergent_shuffle": (6, "sum", "divergent warp"),
    "missing_wait": (7, "pipeline", "wrong numbers"),
    "missing_barrier_after": (8, "pipeline", "wrong numbers"),
    "missing_barrier_at_end": (9, "pipeline", "wrong numbers"),
    "misaligned_copy": (10, "pipeline", "misaligned address"),
}
RACES = ["missing_barrier", "producer_ahead", "missing_barrier_after", "missing_barrier_at_end"]
OVERRUNS = {"shared_overrun": 11, "global_overrun": 12}


def run(kernel, bug, check=""):
    """What the runner has to say of it; empty if all is well."""
    text = ctypes.create_string_buffer(1024)
    cuda_ops.library(check).simt_planted(kernel.encode(), bug, text, len(text))
    return text.value.decode()


@pytest.mark.parametrize("copies", ["eager", "lazy", "random"])
@pytest.mark.parametrize("kernel", ["sum", "pipeline"])
def test_correct_kernels_give_no_report(kernel, copies):
    for seed in range(16):
        with cuda_ops.schedule(seed, copies):
            assert run(kernel, NONE) == ""


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug):
    number, kernel, message = BUGS[bug]
    reports = []
    for seed in range(8):
        with cuda_ops.schedule(seed):
            reports.append(run(kernel, number))
    found = {report for report in reports if report}
    assert found, "no schedule shows it"
    assert any(part in report for part in message.split("|") for report in found), found


def test_a_seed_repeats_its_schedule():
    with cuda_ops.schedule(0):
        assert run("sum", BUGS["producer_ahead"][0]) == "", "hidden where threads run in order"
    for seed in range(1, 8):
        reports = []
        for _ in range(2):
            with cuda_ops.schedule(seed):
                reports.append(run("sum", BUGS["producer_ahead"][0]))
        assert reports[0] == reports[1]


def test_reports_name_block_thread_and_place():
    report = run(BUGS["divergent_shuffle"][1], BUGS["divergent_shuffle"][0])
    assert "block (0, 0, 0)" in report and "seed 0" in report and "planted.cpp:" in report


@pytest.mark.full
@pytest.mark.parametrize("kernel", ["sum", "pipeline"])
def test_no_races_in_correct_kernels(kernel):
    cuda_ops.races()
    for seed in range(4):
        with cuda_ops.schedule(seed, runner=cuda_ops.library("race")):
            assert run(kernel, NONE, "race") == ""
    assert cuda_ops.races() == (0, "")


@pytest.mark.full
@pytest.mark.parametrize("bug", RACES)
def test_every_race_is_found_in_one_run(bug):
    """Also where the numbers happen to be right."""
    number, kernel, _ = BUGS[bug]
    cuda_ops.races()
    run(kernel, number, "race")
    count, first = cuda_ops.races()
    assert count > 0 and "after" in first


def run_with_address_sanitizer(code):
    """In a process of its own, since the sanitizer must be loaded before Python."""
    preload = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    cuda_ops.build_runner("address")  # not under the sanitizer
    environment = {"LD_PRELOAD": " ".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.full
@pytest.mark.parametrize("bug", [None, *OVERRUNS])
def test_overruns_are_found(bug):
    kernel_and_bug = f"'sum', {OVERRUNS.get(bug, NONE)}"
    done = run_with_address_sanitizer(
        f"import test_simt; assert test_simt.run({kernel_and_bug}, 'address') == ''"
    )
    if bug is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and "AddressSanitizer" in done.stderr, done.stderr


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [16, 48])
def test_products_agree_with_plain_ones(dtype, transposed, depth):
    """ldmatrix and mma.sync, for every shape and dtype that kernels use."""
    if dtype == torch.float32 and transposed:
        pytest.skip("ldmatrix transposes 16-bit elements only")
    generator = torch.Generator().manual_seed(depth)
    # Few bits, so that sums are exact.
    a, b = (torch.randint(-8, 9, (n, depth), generator=generator).to(dtype) for n in (16, 8))
    c = torch.full((16, 8), torch.nan)
    right = b.T.contiguous() if transposed else b
    kind = [torch.float32, torch.bfloat16, torch.float16].index(dtype)
    cuda_ops.library().simt_product(
        kind, transposed, *(ctypes.c_void_p(t.data_ptr()) for t in (a, right)), depth,
        ctypes.c_void_p(c.data_ptr()),
    )  # fmt: skip
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=0, atol=0)


# Bugs of cute/gemm_sm90.cpp, in its order, and what shows them.
HOPPER_BUGS = ["early_release", "short_expectation", "wrong_phase", "missing_arrival"]


def gemm(arch, bug=NONE):
    """A CuTe kernel's error against the plain product, or what the runner says of it."""
    generator = torch.Generator().manual_seed(0)
    m, n, k = 256, 128, 320
    a, b = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
    c = torch.full((m, n), torch.nan)
    text = ctypes.create_string_buffer(1024)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
    if cuda_ops.cute_library().simt_gemm(arch, bug, *pointers, m, n, k, text, len(text)):
        return text.value.decode()
    return (c.double() - a.double() @ b.double().T).abs().max().item()


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("copies", ["eager", "lazy", "random"])
def test_cute_kernels_run_from_their_own_headers(arch, copies):
    for seed in range(3):
        with cuda_ops.schedule(seed, copies, cuda_ops.cute_library()):
            assert gemm(arch) < 1e-3


@pytest.mark.full
@pytest.mark.parametrize("bug", HOPPER_BUGS)
def test_planted_bugs_of_hopper_kernels_are_found(bug):
    for seed in range(4):
        with cuda_ops.schedule(seed, runner=cuda_ops.cute_library()):
            found = gemm(90, 1 + HOPPER_BUGS.index(bug))
        if isinstance(found, str) or not found < 1e-3:
            return
    pytest.fail("no schedule shows it")
