"""Tables in memory, and tables that stay on disk."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor


def empty_table(*shape: int, **like) -> Tensor:
    """``torch.empty``, on the CPU in huge pages if it is large: rows that lie anywhere are then
    found without a walk through the page table each."""
    table = torch.empty(shape, **like)
    if table.is_cpu:
        torch.ops.memkernels._advise_huge_pages(table)
    return table


# Else the system may refuse a private view of a file larger than its memory.
_MAP_NORESERVE = 0x4000


def open_table(
    path: str | os.PathLike, shape: Sequence[int], dtype: torch.dtype, *, writable: bool = False
) -> Tensor:
    """A file as a tensor, without reading it.

    What is used of it is read on use: `memkernels.embedding_bag` on such a table reads the pages
    with the rows it is asked for, at the pace of the disk the first time and of memory as long as
    the page cache keeps them. Rows are told to be wanted in no order, so that the system reads a
    page at a time; whoever is to read all of it in order had better read the file::

        table = open_table("engram.bin", [384_006_168, 256], torch.float8_e4m3fn)
        scales = open_table("scales.bin", [384_006_168, 8], torch.uint8)
        out = memkernels.embedding_bag(rows, table, scales=scales)

    Args:
        path: of a file that holds the numbers and nothing else, in the byte order of the machine.
        shape, dtype: of the tensor.
        writable: what is written to the tensor goes to the file; else it stays with this tensor,
            in memory.

    Returns:
        ``shape``, on the CPU, contiguous.

    A file that this process neither owns nor may write is read a page at a time, since Linux does
    not tell it which pages are in memory.

    Raises RuntimeError unless the size of the file is that of the tensor, before the file is
    opened. The file is not to be truncated as long as the tensor lives.
    """
    path, shape = os.fspath(path), list(shape)
    expected, found = math.prod(shape) * dtype.itemsize, os.path.getsize(path)
    if found != expected:
        raise RuntimeError(
            f"open_table: {path} must have {expected} bytes for {shape} {dtype}, found {found}"
        )
    if expected == 0:
        return torch.empty(shape, dtype=dtype)
    flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE | _MAP_NORESERVE
    with open(path, "r+b" if writable else "rb") as file:
        mapping = mmap.mmap(file.fileno(), expected, flags=flags)
    mapping.madvise(mmap.MADV_RANDOM)
    return torch.frombuffer(mapping, dtype=torch.uint8).view(dtype).view(shape)
