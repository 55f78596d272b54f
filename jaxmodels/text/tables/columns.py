"""Rows of a column of strings in Arrow and Parquet files."""

import collections
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import open_regular
from jaxmodels.io.content import recognised
from jaxmodels.process.confined import Confined
from jaxmodels.process.extras import require
from jaxmodels.process.texts import quoted, visible

ROWS = f"{__package__}.rows"  # module of the child process, which alone imports pyarrow
STARTING = {"seconds": 60.0, "megabytes": 4_000.0}  # to import it, with the threads of its libraries
# Of the child process: processor time and memory for any file, for each of its bytes, and for each byte of texts.
SECONDS, SECONDS_PER_BYTE, SECONDS_PER_TEXT_BYTE = 2.0, 1e-7, 2e-8
MEMORY, MEMORY_PER_BYTE = 5e8, 8
LEAST_SUM, EXPANSION = 2**26, 1_000  # bytes of all texts, and for each byte of the file
ROW_BYTES = 128  # for which a row counts besides its text: there may be millions of empty ones

idle: collections.deque[Confined] = collections.deque(maxlen=1)  # a child process that has read a file


def columns(file: Path, kind: str, field: str, offset: int, among: int = 1) -> Iterator[tuple[str, str, int, int]]:
    """Name, text, number and next number of each row of an Arrow or Parquet file.

    Rows without a text, which are null, are left out; a warning at the end of the file counts them. among: number of
    the files that are read together. Raises ValueError, naming the file, if it is damaged, has no such column of
    strings, takes too much time or memory, or stands for far more text than it has bytes.
    """
    require("data", "pyarrow")
    open_regular(file).close()
    try:
        child = idle.pop()
    except IndexError:
        child = Confined(ROWS, **STARTING)
    reason, empty = None, 0
    try:
        for about, texts in pieces(child, file, kind, field, offset, among):
            begin, empty = 0, empty + about["empty"]
            for row, length in zip(about["rows"], about["lengths"], strict=True):
                text = str(texts[begin : begin + length], "utf-8")
                begin += length
                yield f"{file}, row {row:,}", text, row, row + 1
            reason = about.get("refused") or damage(file, kind, about.get("damaged"))
    except BaseException:  # also if the iterator is closed early
        child.close()
        raise
    idle.append(child)
    if reason is not None:
        raise ValueError(f"{file} {reason}")
    warn_of_empty(file, empty, f", from row {offset:,} on" if offset else "")


def warn_of_empty(file: Path, empty: int, place: str) -> None:
    """Warn that rows without a text are left out, if there are any. place: where reading began, if not at row 0."""
    if empty:
        warnings.warn(f"{visible(str(file))}: rows without a text are left out{place}: {empty:,}", stacklevel=3)


def pieces(
    child: Confined, file: Path, kind: str, field: str, row: int, among: int
) -> Iterator[tuple[dict[str, Any], memoryview]]:
    """Replies of the operation `piece` from a row on, each with its texts.

    Raises ValueError, naming the file, if it takes too much time or memory, or if all texts together are too long.
    """
    size, name = file.stat().st_size, str(file.absolute())
    most, done = LEAST_SUM // among + EXPANSION * size, 0
    seconds, memory = 0.0, 0.0  # that the file has taken
    following: int | None = row
    while following is not None:
        allowed = SECONDS + SECONDS_PER_BYTE * size + SECONDS_PER_TEXT_BYTE * done
        left = MEMORY + MEMORY_PER_BYTE * size - memory
        try:
            if seconds >= allowed:
                raise ValueError(f"it takes more than {allowed:,.0f} s")
            about, texts = child.call(
                "piece", name, kind, field, following, most - done, seconds=allowed - seconds, megabytes=left / 1e6
            )
        except ValueError as error:
            raise ValueError(f"{file} is not read: {error}") from None
        done += sum(about["lengths"]) + ROW_BYTES * len(about["rows"])
        if done > most:
            raise ValueError(f"{file} holds more than {EXPANSION:,} times as much text as it has bytes")
        seconds, memory, following = about["seconds"], max(0.0, about["bytes"]), about["next"]
        yield about, memoryview(texts)


def damage(file: Path, kind: str, reason: str | None) -> str | None:
    """Sentence, without its subject, on a file that Arrow does not read; None if there is no reason."""
    if reason is None:
        return None
    return recognised(file) or f"is not a readable {kind.capitalize()} file: {quoted(reason, 200)}"
