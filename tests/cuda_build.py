"""Compiles the CUDA build and looks at it: build times, sizes, and what each kernel takes.

    python tests/cuda_build.py [ARCHITECTURE ...] [--update]

The libraries are also loaded, and run the CPU ops, as on a machine without a GPU.

Architectures are CMake's (90a-real); by default those of the wheel. Registers, spills and shared
memory of each kernel are compared with cuda_resources.json, which holds for one version of nvcc:
a new spill, or a quarter more registers, is an error. --update writes the table instead. Where no
nvcc is found, that of PyPI is installed into a temporary environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("cuda_resources.json")
MOST_BYTES = 100 * 2**20  # of the libraries, as a wheel holds them
# nvcc 13.0 and what it needs to compile and link.
PACKAGES = [
    *("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88"),
    *("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85"),
]


def find_nvcc(work: Path) -> str:
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if found:
        return found
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return "/usr/local/cuda/bin/nvcc"
    venv.create(work / "nvcc", with_pip=True)
    pip = [str(work / "nvcc/bin/pip"), "install", "-q", "--no-deps", *PACKAGES]
    subprocess.run(pip, check=True)
    return str(next((work / "nvcc").glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc")))


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_without_gpu(site: Path, libraries: list[Path]) -> None:
    """The build runs the CPU ops under this torch, with CUDA or without, whatever the machine."""
    package = site / "memkernels"
    shutil.copytree(ROOT / "python/memkernels", package)
    for library in libraries:
        shutil.copy(library, package)
    code = """
import torch, memkernels
from memkernels import _C, _library
k = torch.randn(2, 9, 1, 8)
assert memkernels.paged_attention(k[:, 0], k, k).isfinite().all()
assert _library.has_kernel("paged_attention_backward", "cuda") and _C.build_info()["cuda"]
"""
    # Without site, whose hooks would put an editable install first.
    paths = f"{site}:{sysconfig.get_path('purelib')}"
    run([sys.executable, "-S", "-c", code], os.environ | {"PYTHONPATH": paths})


def resources(log: str) -> dict[str, dict[str, int]]:
    """By kernel and architecture, from the reports of ptxas."""
    kernels = {}
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
        r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
        re.DOTALL,
    )
    entry = ""
    for line in log.splitlines():
        if "Compiling entry function" in line:
            entry = ""
        entry += line + "\n"
        match = pattern.search(entry)
        if match:
            values = match.groupdict(default="0")
            key = f"{values.pop('name')} {values.pop('arch')}"
            kernels[key] = {name: int(value) for name, value in values.items()}
            entry = ""
    names = subprocess.run(
        ["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True
    ).stdout
    plain = [re.sub(r"memkernels::(\w+::)?cuda::", "", name) for name in names.splitlines()]
    plain = [re.sub(r"^void |\(.*\)", "", name) for name in plain]
    return dict(sorted(zip(plain, kernels.values(), strict=True)))


def compare(kernels: dict, table: dict) -> list[str]:
    complaints = []
    for name, now in kernels.items():
        before = table.get(name)
        if before is None:
            complaints.append(f"{name}: not in the table")
        elif now["stores"] + now["loads"] > before["stores"] + before["loads"]:
            complaints.append(f"{name}: spills {now['stores']} and {now['loads']} bytes")
        elif now["registers"] > 1.25 * before["registers"]:
            complaints.append(f"{name}: {now['registers']} registers, were {before['registers']}")
    return complaints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--update", action="store_true", help="write cuda_resources.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build = work / "build"
        nvcc = find_nvcc(work)
        env = os.environ | {"CUDACXX": nvcc, "MEMKERNELS_CUDA": "ON"}
        if args.architectures:
            env["CUDAARCHS"] = ";".join(args.architectures)
        version = re.search(r"release [\d.]+, V([\d.]+)", run([nvcc, "--version"], env)).group(1)
        pybind11 = run([sys.executable, "-m", "pybind11", "--cmakedir"], env).strip()
        start = time.monotonic()
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"),
            *("-DSKBUILD_PROJECT_VERSION=0", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"),
        ]
        run(configure, env)
        log = run(["cmake", "--build", str(build)], env)
        print(f"nvcc {version}; the whole build took {time.monotonic() - start:.0f} s")

        rows = [line.split("\t") for line in (build / ".ninja_log").read_text().splitlines()[1:]]
        slowest = sorted(((int(b) - int(a)) / 1e3, out) for a, b, _, out, _ in rows)[::-1][:10]
        for seconds, output in slowest:
            print(f"{seconds:8.1f} s  {output.removeprefix('CMakeFiles/')}")
        libraries = sorted(build.glob("*.so"))
        check_without_gpu(work / "site", libraries)
        for library in libraries:
            print(f"{library.stat().st_size / 2**20:8.2f} MiB  {library.name}")
        assert sum(library.stat().st_size for library in libraries) < MOST_BYTES

    kernels = {name: k for name, k in resources(log).items() if not name.startswith("cub::")}
    assert kernels, "ptxas reported no kernels"
    spilling = {name: k for name, k in kernels.items() if k["stores"] or k["loads"]}
    print(f"{len(kernels)} kernels, {len(spilling)} with spills, the most registers "
          f"{max(k['registers'] for k in kernels.values())}")  # fmt: skip
    if args.update:
        lines = [f"  {json.dumps(name)}: {json.dumps(k)}" for name, k in kernels.items()]
        TABLE.write_text(f'{{"nvcc": "{version}", "kernels": {{\n' + ",\n".join(lines) + "\n}}\n")
        return
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != version:
        print(f"cuda_resources.json is of nvcc {table['nvcc']}: not compared")
        return
    complaints = compare(kernels, table["kernels"])
    sys.exit("\n".join(complaints) or 0)


if __name__ == "__main__":
    main()
