"""Record batches of Parquet files, whose compressed pages are measured before they are read.

The values of a column lie in pages, each after a header with its sizes, in Thrift's compact protocol:

    1: kind   2: bytes after decompression   3: bytes in the file   5, 7, 8: {1: number of values, …} of each kind

The file's own metadata has sums of these sizes, which nothing compares with them.

https://github.com/apache/parquet-format
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.process.texts import quoted
from jaxmodels.text.tables.footer import places
from jaxmodels.text.tables.sizes import RATIO, check_single, check_strings, largest, mapped, most_pages

EXPANDED = 2**30  # bytes of a group of rows that may be more than `RATIO` times as many as the file has
ROWS, DECODED = 256, 2**27  # rows that are decoded at once, and bytes that they may take
VALUE_BYTES = 16  # that a value takes while it is decoded, besides its text
DEPTH = 8  # of structures in a header
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 12
BITS = {I16: 16, I32: 32, I64: 64}
# Fields of a page's header that are read: the kind of each, or the fields of a structure.
NUMBER_OF_VALUES = {1: I32}
DATA_PAGES = {0: 5, 3: 8}  # kinds of pages with values of the column, and the field of each
HEADER = {1: I32, 2: I32, 3: I32, 5: NUMBER_OF_VALUES, 7: NUMBER_OF_VALUES, 8: NUMBER_OF_VALUES}


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
        check_strings(file, opened.schema_arrow.field(field).type, field)
        metadata = opened.metadata
        paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        if (count := paths.count(field)) != 1:
            raise ValueError(f"{file} has {count:,} columns of texts in {quoted(field)}; expected one")
        leaves = [i for i, path in enumerate(paths) if is_within(path, field)]  # those that pyarrow reads
        for group in range(metadata.num_row_groups):  # not by column: damaged sizes of one end the process
            size = metadata.row_group(group).total_byte_size
            most = max(EXPANDED, RATIO * file.stat().st_size)
            if size > most:
                raise ValueError(f"{file} has {size:,} bytes in a group of rows; at most {most:,} are read")
        columns = places(file, leaves)
        for found in columns:
            check_disjoint(file, found, field)
        left = most_pages(file)
        with mapped(file) as data:
            for group, pieces in enumerate(zip(*columns, strict=True)):
                if not pieces[0][0]:  # without rows it has no pages either
                    continue
                together = 0
                for _, values, begin, end in pieces:
                    page, count = largest_page(file, data, begin, end, field, left, values)
                    left -= count
                    together += page
                # A text may be as long as a page, and each row may repeat it.
                rows = max(1, min(ROWS, DECODED // max(1, together)))
                for batch in opened.iter_batches(rows, [group], [field], use_threads=False):
                    yield batch.select([field])


def is_within(path: str, field: str) -> bool:
    """True for the path of a column, of a column within it, and of one whose name begins like that: text, text.en."""
    return path == field or path.startswith(f"{field}.")


def check_disjoint(file: Path, found: list[tuple[int, int, int, int]], field: str) -> None:
    """Raise ValueError, naming the file, if groups of rows share pages of a column: each page is read once.

    found: numbers of rows and values, and places, as `places` returns them.
    """
    for (_, end), (begin, _) in itertools.pairwise(sorted((begin, end) for rows, _, begin, end in found if rows)):
        if begin < end:
            raise ValueError(f"{file} has groups of rows that share pages of {quoted(field)} at byte {begin:,}")


def largest_page(file: Path, data: Any, begin: int, end: int, field: str, most: int, values: int) -> tuple[int, int]:
    """Bytes of the largest page of a column between two places in the file, and number of its pages.

    Raises ValueError, naming the file, if it is larger than `largest` allows, or if there are more than `most` pages,
    or fewer than `values` values in them: Arrow reads on for 100 bytes in a file of an old writer, to find the others.
    """
    found, count = 0, 0
    for size, held in pages(data, begin, end):
        found, count, values = max(found, size), count + 1, values - held
        if count > most:
            raise ValueError(f"{file} has more than {most_pages(file):,} pages in the column {quoted(field)}")
    if values > 0:
        raise ValueError(
            f"{file} has pages of the column {quoted(field)} that lack {values:,} values, as of its footer"
        )
    if found > largest(file):
        raise ValueError(
            f"{file} has a page of {found:,} bytes in the column {quoted(field)} after decompression; at most "
            f"{largest(file):,} are read"
        )
    return found, count


def pages(data: Any, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Bytes that each page of a column takes when it is decoded, and number of the column's values in it.

    Raises ValueError for one that is damaged.
    """
    while begin < min(end, len(data)):
        header, place = structure(data, begin, HEADER)
        unpacked, packed = header.get(2, -1), header.get(3, -1)
        if min(unpacked, packed) < 0:
            raise ValueError(f"the page at byte {begin:,} has no sizes")
        values = {field: header.get(field, {}).get(1, 0) for field in (5, 7, 8)}
        if min(values.values()) < 0:
            raise ValueError(f"the page at byte {begin:,} has less than 0 values")
        yield max(unpacked, VALUE_BYTES * max(values.values())), values.get(DATA_PAGES.get(header.get(1, -1), 0), 0)
        begin = place + packed


def structure(data: Any, at: int, kinds: Mapping[int, Any], depth: int = 0) -> tuple[dict[int, Any], int]:
    """Values of the fields in `kinds` of a structure in Thrift's compact protocol, and the place after it.

    Raises ValueError if it is damaged, or if Arrow might read it in another way: it takes the last of two equal fields,
    cuts a field's number to 16 bits, and skips a field of another kind than it expects.
    """
    fields: dict[int, Any] = {}
    last = 0
    if depth > DEPTH:
        raise ValueError("the structures of a header are nested too deeply")
    while kind := octet(data, at):
        step, kind = kind >> 4, kind & 15
        identity, at = (last + step, at + 1) if step else integer(data, at + 1, I16)
        if not last < identity < 2**15:
            raise ValueError(f"a header has field {identity:,} after field {last:,} at byte {at:,}")
        last, expected = identity, kinds.get(identity)
        inner = expected if isinstance(expected, dict) else {}
        if expected is not None and kind != (STRUCT if inner else expected):
            raise ValueError(f"a header has a value of kind {kind} in field {identity} at byte {at:,}")
        value, at = element(data, at, kind, inner, depth)
        if expected is not None:
            fields[identity] = value
    return fields, at + 1


def element(data: Any, at: int, kind: int, inner: Mapping[int, Any], depth: int) -> tuple[Any, int]:
    """A value of a kind, None for those that are left out, and the place after it. inner: `kinds` of a structure."""
    if kind in (TRUE, FALSE):
        return None, at
    if kind == BYTE:
        return None, at + 1
    if kind in BITS:
        return integer(data, at, kind)
    if kind == DOUBLE:
        return None, at + 8
    if kind == BINARY:
        length, at = varint(data, at)
        if length >= 2**31:
            raise ValueError(f"a header has a value of {length:,} bytes at byte {at:,}")
        return None, at + length
    if kind == STRUCT:
        return structure(data, at, inner, depth + 1)
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


def integer(data: Any, at: int, kind: int) -> tuple[int, int]:
    """Number with a sign in its last bit, and the place after it; raises ValueError if its kind has fewer bits."""
    value, at = varint(data, at)
    if value >= 2 ** BITS[kind]:  # Arrow would take the last bits
        raise ValueError(f"a number before byte {at:,} has more than {BITS[kind]} bits")
    return (value >> 1) ^ -(value & 1), at
