"""Draws the README's table of speeds from a record: ``python bench/report.py RECORD.json``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def table(record: dict) -> str:
    about, ceilings = record["machine"], record["ceilings"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['isa']} kernels, "
        f"torch {about['torch']}, {about['date']}; ceilings: "
        + ", ".join(f"{name} {value / 1e9:.0f} G/s" for name, value in ceilings.items())
        + ".",
        "",
        "| case | of ceiling | peers |",
        "|---|---|---|",
    ]
    for case in record["cases"]:
        peers = ", ".join(f"{name} {peer['ratio']:.2f}x" for name, peer in case["peers"].items())
        lines.append(f"| {case['case']} | {case['of_ceiling']:.0%} | {peers} |")
    return "\n".join(lines)


def main(record: str) -> None:
    text = README.read_text()
    drawn = table(json.loads(Path(record).read_text()))
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
