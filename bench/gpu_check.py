"""What a machine with a GPU has to show, in stages of less than ten minutes each.

    python bench/gpu_check.py [STAGE ...] [--out DIR]

Needs no network: torch 2.10 or newer with CUDA, nvcc, cmake, ninja, scikit-build-core, pybind11,
pytest and hypothesis are taken as they are. Whatever the stages (tests, memcheck, racecheck,
synccheck, initcheck, bench; all of them by default), what has changed is built first, for the GPU
that is there, into build/gpu. Logs, and the record of the benchmarks, go to DIR.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "build" / "gpu"


def run(name: str, command: list[str], out: Path, **environment: str) -> bool:
    """Runs a command, its output into a log, and shows the end of it."""
    start, log = time.monotonic(), out / f"{name}.log"
    environment = os.environ | {"PYTHONPATH": f"{PACKAGE}:{ROOT / 'tests'}"} | environment
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    print(f"== {name}: exit {code} after {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(log.read_text().splitlines()[-25:]), flush=True)
    return code == 0


def build(out: Path) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "--upgrade", "--target", str(PACKAGE)]
    command += [f"--config-settings=build-dir={ROOT / 'build/gpu-cmake'}", str(ROOT)]
    return run("build", command, out, MEMKERNELS_CUDA="ON", CUDAARCHS="native")


def tests(out: Path) -> bool:
    """The ordinary tests, which take the GPU where there is one; not those of the host runner."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=30", "--durations=10"]
    command += ["-k", "cuda and not schedule", "--ignore=tests/test_simt.py", "tests"]
    return run("tests", command, out)


def sanitizer(check: str, out: Path) -> bool:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    code = "import test_cuda_kernels as t; t.every_kernel()"
    command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", code]
    return run(check, command, out, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def bench(out: Path) -> bool:
    record = out / f"{datetime.date.today().isoformat()}.json"
    command = [sys.executable, "bench/run.py", "--device", "cuda", "--json", str(record)]
    return run("bench", command, out)


SANITIZERS = "memcheck", "racecheck", "synccheck", "initcheck"
STAGES = {
    "tests": tests,
    **{check: functools.partial(sanitizer, check) for check in SANITIZERS},
    "bench": bench,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("stages", nargs="*", default=list(STAGES), metavar="STAGE")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if not build(args.out):
        sys.exit(1)
    results = [STAGES[stage](args.out) for stage in args.stages]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
