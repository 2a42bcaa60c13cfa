"""Runs the benchmarks of a family, or of all: ``python bench/run.py [family] [--json FILE]``.

Each case prints its time, its rate, the percentage of the ceiling measured in the same run, and
how many times longer each peer takes. Cases and their peers take turns; times are the minimum and
the median.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

import memkernels
from case import Case
from memkernels import _C, _measure

FAMILIES = ("attention",)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def machine() -> dict:
    """What a record needs to be read later."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "memkernels": memkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
    }


def measure(case: Case, ceilings: dict[str, float], seconds: float) -> dict:
    ours, *others = _measure.interleaved(case.ours, *case.peers.values(), seconds=seconds, least=3)
    rate = case.work / ours.minimum
    record = {
        "case": case.name,
        "milliseconds": {"minimum": ours.minimum * 1e3, "median": ours.median * 1e3},
        case.unit: rate / 1e9,
        "of_ceiling": rate / ceilings[case.limit],
        "peers": {
            name: {
                "ratio": times.minimum / ours.minimum,
                "ratio_of_medians": times.median / ours.median,
            }
            for name, times in zip(case.peers, others, strict=True)
        },
    }
    print(
        f"{case.name:<46}{ours.minimum * 1e3:>9.2f}{ours.median * 1e3:>9.2f} ms"
        f"{rate / 1e9:>8.1f} {case.unit:<8}{record['of_ceiling']:>5.0%}",
        *(f"{name} {peer['ratio']:.2f}x" for name, peer in record["peers"].items()),
        sep="  ",
        flush=True,
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", default=FAMILIES, help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--quick", action="store_true", help="small cases: does it all run?")
    parser.add_argument("--json", type=Path, help="also write the record there")
    arguments = parser.parse_args()
    unknown = set(arguments.family) - set(FAMILIES)
    if unknown:
        parser.error(f"unknown family {', '.join(sorted(unknown))}")

    torch.manual_seed(0)
    about = machine()
    print(*(f"{name} {value}" for name, value in about.items()), sep=", ")
    ceilings = {"read": _measure.read_limit(64 if arguments.quick else 1024)}
    ceilings |= {f"flops {name}": _measure.flops_limit(dtype) for name, dtype in DTYPES.items()}
    print("ceilings:", *(f"{name} {limit / 1e9:.1f} G/s" for name, limit in ceilings.items()))
    print("peers: their time over ours (minima)\n")

    records = []
    with torch.no_grad():
        for family in arguments.family:
            for case in importlib.import_module(f"bench_{family}").cases(arguments.quick):
                with torch.set_grad_enabled("backward" in case.name):
                    records.append(measure(case, ceilings, 0.1 if arguments.quick else 4.0))
                del case
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": about, "ceilings": ceilings, "cases": records}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
