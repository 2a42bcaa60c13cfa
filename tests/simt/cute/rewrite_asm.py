"""Copies headers with every GNU asm statement turned into a call of the interpreter in ptx.h.

    python rewrite_asm.py SOURCE TARGET

SOURCE is the include folder of CUTLASS; TARGET, a build product, goes before it on the include path
and holds the headers that reach the hardware.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FOLDERS = "cute", "cutlass/arch", "cutlass/pipeline"
FILES = "cutlass/cutlass.h", "cutlass/barrier.h", "cutlass/detail/helper_macros.hpp"
ASM = re.compile(r"\basm\b\s*(?:volatile|__volatile__)?\s*\(")


def skip(text: str, i: int) -> int:
    """The index behind the string literal or comment at i, or behind the character there."""
    if text[i] == '"':
        i += 1
        while text[i] != '"':
            i += 2 if text[i] == "\\" else 1
    elif text.startswith("//", i):
        i = text.find("\n", i) % (len(text) + 1)
    return i + 1


def closing(text: str, i: int) -> int:
    """The index behind the parenthesis that closes the one at i."""
    depth = 0
    while True:
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i + 1
        i = skip(text, i)


def split(text: str, separator: str) -> list[str]:
    """At separators outside parentheses, strings and comments; `::` in names stays."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif text[i] == separator and depth == 0:
            if separator == ":" and re.match(r"::[A-Za-z_]", text[i:]):
                i += 2
                continue
            parts.append(text[start:i])
            start = i + 1
        i = skip(text, i)
    return [*parts, text[start:]]


def operands(section: str, function: str) -> list[str]:
    calls = []
    for operand in split(section, ","):
        operand = re.sub(r"//[^\n]*", "", operand).strip()
        if operand:
            match = re.fullmatch(r'(?:\[\w+\]\s*)?"[^"]*"\s*\((.*)\)', operand, re.DOTALL)
            calls.append(f"::simt::{function}({match.group(1)})")
    return calls


def rewrite(text: str) -> str:
    out, end = [], 0
    for match in ASM.finditer(text):
        if match.start() < end:
            continue
        opening = match.end() - 1
        out.append(text[end : match.start()])
        end = closing(text, opening)
        sections = [*split(text[opening + 1 : end - 1], ":"), "", ""]
        instruction = re.sub(r"//[^\n]*", "", sections[0]).strip()
        calls = operands(sections[1], "output") + operands(sections[2], "input")
        out.append(
            f"{{ static const ::simt::Instruction instruction_({instruction}); "
            f"::simt::Operand operands_[{max(len(calls), 1)}] = {{{', '.join(calls)}}}; "
            "instruction_.run(operands_, __FILE__, __LINE__); }"
        )
    return "".join(out) + text[end:]


def main(source: Path, target: Path) -> None:
    headers = [source / name for name in FILES]
    for folder in FOLDERS:
        headers += [p for p in (source / folder).rglob("*") if p.suffix in (".h", ".hpp")]
    for header in headers:
        text = header.read_text()
        try:
            text = rewrite(text)
        except (AttributeError, IndexError):
            print(f"left as it is: {header}")  # asm in a macro, which no kernel here expands
        text = re.sub(r"(define\s+\w+\s+)#pragma unroll( 1)?", r"\1", text)
        # The toolkit's own headers keep __CUDA_ARCH__ undefined: host branches.
        text = re.sub(r"\b__CUDA_ARCH__\b", "SIMT_CUDA_ARCH", text)
        text = re.sub(r"\bstatic const __device__\b", "static constexpr", text)
        if header.name == "util.hpp" and header.parent.name == "arch":
            text = text.replace(
                "cast_smem_ptr_to_uint(void const* const ptr)\n{",
                "cast_smem_ptr_to_uint(void const* const ptr)\n{\n  return ::simt::offset_of(ptr);",
            )
        to = target / header.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
