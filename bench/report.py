"""Draws the README's tables of speeds from records: ``python bench/report.py RECORD.json ...``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from case import unit

README = Path(__file__).parent.parent / "README.md"
SHOWN = 2  # the fastest peers of a case; the record has them all


def table(record: dict) -> str:
    about, limits = record["machine"], record["limits"]
    device = f"{about['cpu']}, {about['threads']} threads, {about['isa']} kernels"
    if "gpu" in about:
        device = f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}"
    lines = [
        f"{device}, torch {about['torch']}, {about['date']}; limits: "
        + ", ".join(f"{name} {value / 1e9:.0f} {unit(name)}" for name, value in limits.items())
        + ".",
        "",
        "| case | speed | fastest peers |",
        "|---|---|---|",
    ]
    for case in record["cases"]:
        fastest = sorted(case["peers"].items(), key=lambda peer: peer[1]["ratio"])[:SHOWN]
        peers = "; ".join(f"{peer['ratio']:.2f}x {name}" for name, peer in fastest)
        of = f"{case['of_limits'][case['limit']]:.0%} of {case['limit']}"
        lines.append(f"| {case['case']} | {of} | {peers} |")
    return "\n".join(lines)


def main(*records: str) -> None:
    text = README.read_text()
    drawn = "\n\n".join(table(json.loads(Path(record).read_text())) for record in records)
    pattern = r"<!-- results -->.*<!-- /results -->"
    README.write_text(
        re.sub(
            pattern,
            lambda _: f"<!-- results -->\n{drawn}\n<!-- /results -->",
            text,
            flags=re.DOTALL,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
