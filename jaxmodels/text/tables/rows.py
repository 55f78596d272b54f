"""Rows of a column of strings as Arrow reads them, in a child process of `process.confined`.

A few kilobytes may stand for gigabytes, and for some damaged files Arrow ends the process without an error of Python.
What a file costs is known only when it is read, so nothing is measured here: the caller sets limits for the process.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxmodels.process.confined import Attached, data_bytes
from jaxmodels.process.texts import quoted, shortened

PIECE, ROWS = 2**20, 10_000  # bytes of texts, and rows, after which a reply is sent
DECODED, MOST_DECODED = 2**24, 256  # bytes, as the footer says, and rows that are decoded at once
MAGIC = b"ARROW1"  # first bytes of Arrow's random-access format; the other one is a stream, as `datasets` writes it
STRINGS = ("string", "large_string", "string_view")


class Refused(ValueError):
    """The file is readable, but has no such column of strings; the message is a sentence without its subject."""


def operations() -> Mapping[str, Callable[..., Any]]:
    """Operation `piece`."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # other allocators reserve memory, which counts
    import pyarrow
    from pyarrow import parquet  # noqa: F401, imported while there are no limits for a file

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    return {"piece": Reader().piece}


class Reader:
    """The file that is read, and the place up to which its rows were sent.

    A request names both: the process that answered the one before goes on, any other begins at that place.
    """

    def __init__(self) -> None:
        self.place: tuple[Any, ...] = ()
        self.chunks: Iterator[tuple[int, np.ndarray, np.ndarray, Any]] = iter(())
        self.before = usage()

    def piece(self, file: str, kind: str, field: str, row: int, most: int) -> Attached:
        """Texts of rows from one on, of at most `most` bytes.

        The value has: rows, lengths: number of each row with a text, and bytes of the text; empty: number of the rows
        without one; next: the row that follows, null after the last; refused, damaged: why the file is not read;
        seconds, bytes: processor time and memory that it has taken. Attached are the texts in UTF-8, one after the
        other; nothing if they are longer than `most`.
        """
        if (file, kind, field, row) != self.place:
            self.chunks, self.before = iter(()), usage()
            self.chunks = chunks(file, kind, field, row)
        about: dict[str, Any] = {"rows": [], "lengths": [], "empty": 0, "next": None}
        texts: list[Any] = []
        size, end = 0, row
        try:
            for following, rows, lengths, data in self.chunks:
                about["rows"] += rows.tolist()
                about["lengths"] += lengths.tolist()
                texts.append(data)
                size, end = size + len(data), following
                about["empty"] = end - row - len(about["rows"])
                if size >= PIECE or end - row >= ROWS:
                    about["next"] = end
                    break
        except MemoryError:
            raise
        except Exception as error:  # pyarrow raises many kinds for damaged files
            about["refused" if isinstance(error, Refused) else "damaged"] = shortened(str(error), 400)
        self.place = (file, kind, field, about["next"])
        if about["next"] is None:
            self.chunks = iter(())
        seconds, held = (now - before for now, before in zip(usage(), self.before, strict=True))
        return Attached(about | {"seconds": seconds, "bytes": held}, texts if size <= most else [])


def usage() -> tuple[float, int]:
    """Seconds of processor time and bytes of memory of this process."""
    return time.process_time(), data_bytes() or 0


def chunks(file: str, kind: str, field: str, row: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, Any]]:
    """Texts of some rows from one on: the row that follows, numbers of rows with a text, lengths, and all the bytes.

    So many rows are taken at once that their texts have about `PIECE` bytes: each may repeat or view a long one.
    """
    count = 1
    for begin, column in (arrow_columns if kind == "arrow" else parquet_columns)(file, field, row):
        if begin + len(column) <= row:
            continue
        column.validate(full=True)  # with offsets beyond the file, other memory would be read
        at = max(0, row - begin)
        while at < len(column):
            part = binary(column.slice(at, count))
            following = at + len(part)
            rows = begin + at + np.arange(len(part))
            if part.null_count:
                rows, part = rows[part.is_valid().to_numpy(zero_copy_only=False)], part.drop_null()
            lengths, data = buffers(part)
            yield begin + following, rows, lengths, data
            at = following
            count = min(2 * count, MOST_DECODED) if len(data) < PIECE // 2 else max(1, count // 2)


def binary(column: Any) -> Any:
    """Column of large_binary from one of strings or of a dictionary of them."""
    import pyarrow

    try:
        return column.cast(pyarrow.large_binary())
    except pyarrow.ArrowNotImplementedError:  # of views, in older versions
        return pyarrow.array(column.to_pylist(), pyarrow.large_binary())


def buffers(column: Any) -> tuple[np.ndarray, Any]:
    """Lengths [n] of the values of a column of large_binary without missing ones, and the bytes of all."""
    _, places, data = column.buffers()
    if not len(column) or data is None:
        return np.zeros(len(column), np.int64), b""
    ends = np.frombuffer(places, "<i8")[column.offset : column.offset + len(column) + 1]
    return np.diff(ends), memoryview(data)[int(ends[0]) : int(ends[-1])]


def parquet_columns(file: str, field: str, row: int) -> Iterator[tuple[int, Any]]:
    """Number of the first row, and the column, of each part of a Parquet file, from the group of a row on."""
    from pyarrow import parquet

    with parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as opened:
        check(opened.schema_arrow, field)
        about = opened.metadata
        groups = [
            (about.row_group(i).num_rows, about.row_group(i).total_byte_size) for i in range(about.num_row_groups)
        ]
        group, begin = 0, 0
        while group < len(groups) and begin + groups[group][0] <= row:
            begin += groups[group][0]
            group += 1
        rows, size = (sum(each) for each in zip((0, 1), *groups[group:], strict=True))
        count = max(1, min(MOST_DECODED, DECODED * rows // max(1, size)))
        for batch in opened.iter_batches(count, range(group, len(groups)), [field], use_threads=False):
            yield begin, batch.column(batch.schema.names.index(field))  # text.en is read with text
            begin += len(batch)


def arrow_columns(file: str, field: str, row: int) -> Iterator[tuple[int, Any]]:
    """Number of the first row, and the column, of each batch of an Arrow file of either format."""
    import pyarrow

    with pyarrow.memory_map(file) as opened:
        new = pyarrow.ipc.open_file if opened.read(len(MAGIC)) == MAGIC else pyarrow.ipc.open_stream
        opened.seek(0)
        names = check(new(opened).schema, field)
        opened.seek(0)
        options = pyarrow.ipc.IpcReadOptions(use_threads=False, included_fields=[names.index(field)])
        reader = new(opened, options=options)
        listed = hasattr(reader, "num_record_batches")
        begin = 0
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if listed else reader:
            yield begin, batch.column(0)
            begin += len(batch)


def check(schema: Any, field: str) -> list[str]:
    """Names of the columns; raises Refused unless one of them has the name of the texts, and is of strings."""
    import pyarrow

    names = list(schema.names)
    if (count := names.count(field)) > 1:
        raise Refused(f"has {count:,} columns with the name {quoted(field)}; expected one")
    if not count:
        raise Refused(f"has no column {quoted(field)}; it has {', '.join(quoted(name, 40) for name in names[:20])}")
    kind = schema.field(field).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(getattr(pyarrow.types, f"is_{name}")(value) for name in STRINGS):
        raise Refused(f"has {quoted(str(kind), 200)} in the column {quoted(field)}, must be strings")
    return names
