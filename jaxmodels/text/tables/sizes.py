"""Bytes that parts of a compressed file may have, and the file as bytes that are mapped, not read."""

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

from jaxmodels.io.bounded import open_regular

# Bytes of a part after decompression: of any, and for each byte of the file. Texts shrink to a tenth, tables of numbers
# to a hundredth; zstandard makes 32,000 times as much of zeros.
LEAST_PART, RATIO = 2**28, 100


def largest(file: Path) -> int:
    """Most bytes that a part of a file may have after decompression."""
    return max(LEAST_PART, RATIO * file.stat().st_size)


@contextlib.contextmanager
def mapped(file: Path) -> Iterator[mmap.mmap]:
    """Context with the bytes of a file; raises ValueError, naming it, if it is empty or not a regular file."""
    with open_regular(file) as opened:
        if not file.stat().st_size:
            raise ValueError(f"{file} is truncated: it has 0 bytes")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
