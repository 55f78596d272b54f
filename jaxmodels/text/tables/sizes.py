"""Bytes that parts of a compressed file may have, the file as bytes that are mapped, not read, and names of columns."""

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import open_regular
from jaxmodels.process.texts import quoted

# Bytes of a part after decompression: of any, and for each byte of the file. Texts shrink to a tenth, tables of numbers
# to a hundredth; zstandard makes 32,000 times as much of zeros.
LEAST_PART, RATIO = 2**28, 100
LEAST_SUM, EXPANSION = 2**28, 1_000  # bytes of all parts, or characters of all texts, and for each byte of the file
LEAST_PIECES = 1_000  # pages or messages of any file
PAGE_BYTES, MESSAGE_BYTES = 50, 150  # bytes of a file for each other one: those of one row have more


def largest(file: Path) -> int:
    """Most bytes that a part of a file may have after decompression."""
    return max(LEAST_PART, RATIO * file.stat().st_size)


def largest_sum(file: Path, among: int = 1) -> int:
    """Most bytes of all parts of a file after decompression, and characters of all its texts.

    among: number of the files that are read together, which share what a small file may stand for.
    """
    return LEAST_SUM // among + EXPANSION * file.stat().st_size


def most_pages(file: Path) -> int:
    """Most pages of a column in a file, each of which is looked at."""
    return LEAST_PIECES + file.stat().st_size // PAGE_BYTES


def most_messages(file: Path) -> int:
    """Most messages of a file, each of which is looked at."""
    return LEAST_PIECES + file.stat().st_size // MESSAGE_BYTES


def check_strings(file: Path, kind: Any, field: str) -> None:
    """Raise ValueError, naming the file, if a column has another type than strings: before a value is decoded."""
    import pyarrow

    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(getattr(pyarrow.types, f"is_{name}")(value) for name in ("string", "large_string", "string_view")):
        raise ValueError(f"{file} has {quoted(str(kind), 200)} in the column {quoted(field)}, must be strings")


def check_single(file: Path, names: Sequence[str], field: str) -> None:
    """Raise ValueError, naming the file, if several columns have the name of the texts."""
    if names.count(field) > 1:
        raise ValueError(f"{file} has {names.count(field):,} columns with the name {quoted(field)}; expected one")


@contextlib.contextmanager
def mapped(file: Path) -> Iterator[mmap.mmap]:
    """Context with the bytes of a file; raises ValueError, naming it, if it is empty or not a regular file."""
    with open_regular(file) as opened:
        if not file.stat().st_size:
            raise ValueError(f"{file} is truncated: it has 0 bytes")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
