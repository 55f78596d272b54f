"""Record batches of Parquet files, whose compressed pages are measured before they are read.

The values of a column lie in pages, each after a header with its sizes, in Thrift's compact protocol:

    1: kind   2: bytes after decompression   3: bytes in the file   5, 7, 8: {1: number of values, …} of each kind

The file's own metadata has sums of these sizes, which nothing compares with them.

https://github.com/apache/parquet-format
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmodels.process.texts import quoted
from jaxmodels.text.tables.sizes import RATIO, check_single, largest, mapped

EXPANDED = 2**30  # bytes of a group of rows that may be more than `RATIO` times as many as the file has
ROWS, DECODED = 256, 2**27  # rows that are decoded at once, and bytes that they may take
VALUE_BYTES = 16  # that a value takes while it is decoded, besides its text
DEPTH = 8  # of structures in a header
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
NUMBERS = (4, 5, 6)  # of 16, 32 and 64 bits


def batches(file: Path, field: str) -> Iterator[Any]:
    """Record batches of one column of a Parquet file.

    Raises ValueError, naming the file, if it has no such column, or if a page or a group of rows is too large.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(str(file), buffer_size=2**20, pre_buffer=False) as opened:
        names = opened.schema_arrow.names
        if field not in names:
            shown = ", ".join(quoted(name, 40) for name in names[:20])
            raise ValueError(f"{file} has no column {quoted(field)}; it has {shown}")
        check_single(file, names, field)
        for group in range(opened.metadata.num_row_groups):  # not by column: damaged sizes of one end the process
            size = opened.metadata.row_group(group).total_byte_size
            most = max(EXPANDED, RATIO * file.stat().st_size)
            if size > most:
                raise ValueError(f"{file} has {size:,} bytes in a group of rows; at most {most:,} are read")
        check_disjoint(file, opened.metadata, field)
        with mapped(file) as data:
            for group in range(opened.metadata.num_row_groups):
                if not opened.metadata.row_group(group).num_rows:  # it has no pages either
                    continue
                page = largest_page(file, data, opened.metadata.row_group(group), field)
                # A text may be as long as a page, and each row may repeat it.
                rows = max(1, min(ROWS, DECODED // max(1, page)))
                yield from opened.iter_batches(rows, [group], [field], use_threads=False)


def chunks(group: Any, field: str) -> Iterator[tuple[int, int]]:
    """Places in the file, from and to, of the pages of a column, and of those within it, in a group of rows."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == field or column.path_in_schema.startswith(f"{field}."):
            dictionary = column.dictionary_page_offset
            begin = column.data_page_offset if not dictionary else min(dictionary, column.data_page_offset)
            yield begin, begin + column.total_compressed_size


def check_disjoint(file: Path, metadata: Any, field: str) -> None:
    """Raise ValueError, naming the file, if groups of rows share pages of a column: each page is read once."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    places = sorted(place for group in groups if group.num_rows for place in chunks(group, field))
    for (_, end), (begin, _) in itertools.pairwise(places):
        if begin < end:
            raise ValueError(f"{file} has groups of rows that share pages of {quoted(field)} at byte {begin:,}")


def largest_page(file: Path, data: Any, group: Any, field: str) -> int:
    """Bytes of the largest page of a column in a group of rows.

    Raises ValueError, naming the file, if it is larger than `largest` allows.
    """
    found = 0
    for begin, end in chunks(group, field):
        found = max([found, *pages(data, begin, end)])
        if found > largest(file):
            raise ValueError(
                f"{file} has a page of {found:,} bytes in the column {quoted(field)} after decompression; at most "
                f"{largest(file):,} are read"
            )
    return found


def pages(data: Any, begin: int, end: int) -> Iterator[int]:
    """Bytes that each page of a column takes when it is decoded; raises ValueError for one that is damaged."""
    while begin < min(end, len(data)):
        header, place = structure(data, begin)
        unpacked, packed = header.get(2), header.get(3)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or min(unpacked, packed) < 0:
            raise ValueError(f"the page at byte {begin:,} has no sizes")
        kinds = [header[kind] for kind in (5, 7, 8) if isinstance(header.get(kind), dict)]
        values = max([kind[1] for kind in kinds if isinstance(kind.get(1), int)], default=0)
        yield max(unpacked, VALUE_BYTES * values)
        begin = place + packed


def structure(data: Any, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Numbers and structures of a structure in Thrift's compact protocol by field, and the place after it.

    Raises ValueError if it is damaged.
    """
    fields: dict[int, Any] = {}
    identity = 0
    if depth > DEPTH:
        raise ValueError("the structures of a header are nested too deeply")
    while kind := octet(data, at):
        at += 1
        step, kind = kind >> 4, kind & 15
        if step:
            identity += step
        else:
            identity, at = integer(data, at)
        fields[identity], at = element(data, at, kind, depth)
    return fields, at + 1


def element(data: Any, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A value of a kind, None for those that are left out, and the place after it."""
    if kind in (TRUE, FALSE):
        return None, at
    if kind == BYTE:
        return None, at + 1
    if kind in NUMBERS:
        return integer(data, at)
    if kind == DOUBLE:
        return None, at + 8
    if kind == BINARY:
        length, at = varint(data, at)
        return None, at + length
    if kind == STRUCT:
        return structure(data, at, depth + 1)
    raise ValueError(f"a header has a value of kind {kind} at byte {at:,}")  # a page's header has no lists and maps


def octet(data: Any, at: int) -> int:
    """Byte at a place; raises ValueError if it is not in the file."""
    if not 0 <= at < len(data):
        raise ValueError(f"it refers to byte {at:,} of {len(data):,}")
    return int(data[at])


def varint(data: Any, at: int) -> tuple[int, int]:
    """Number of 7 bits a byte, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = octet(data, at)
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number before byte {at:,} has more than 64 bits")


def integer(data: Any, at: int) -> tuple[int, int]:
    """Number with a sign in its last bit, and the place after it."""
    value, at = varint(data, at)
    return (value >> 1) ^ -(value & 1), at
