"""Record batches of Arrow files, whose compressed buffers are measured before they are read.

A message is FF FF FF FF, the length of its description (4 bytes), the description (a flatbuffer), and a body of
buffers. A buffer that is compressed begins with its length after decompression, or -1 if it is not (8 bytes). A stream
consists of messages one after the other; the random-access format, whose first bytes are ARROW1, ends with a list of
their places.

https://arrow.apache.org/docs/format/Columnar.html
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmodels.text.tables.sizes import check_strings, largest, largest_sum, mapped, most_messages

MAGIC = b"ARROW1"
DICTIONARY, BATCH = 2, 3  # kinds of messages with buffers
V5 = 4  # version of messages whose batches name their compression
LEAST_DESCRIPTION = 16  # bytes; 0 ends a stream
BLOCK, BUFFER = 24, 16  # bytes of a message's place in the list at the end, and of a buffer's place in a body


class Table:
    """A table of a flatbuffer: fields by number, as places in the data."""

    def __init__(self, data: Any, place: int):
        self.data, self.place = data, place
        self.fields = place - number(data, "<i", place)

    @classmethod
    def root(cls, data: Any, place: int) -> "Table":
        """The table to which a flatbuffer's first bytes refer."""
        return cls(data, place + number(data, "<I", place))

    def field(self, index: int) -> int | None:
        """Place of a field's value; None if it is left out, as a default is."""
        at = 4 + 2 * index
        if at >= number(self.data, "<H", self.fields):
            return None
        offset = number(self.data, "<H", self.fields + at)
        return self.place + offset if offset else None

    def value(self, index: int, form: str) -> int:
        """A field that is a number; by default 0."""
        at = self.field(index)
        return 0 if at is None else number(self.data, form, at)

    def table(self, index: int) -> "Table | None":
        """A field that is a table."""
        at = self.field(index)
        return None if at is None else Table(self.data, at + number(self.data, "<I", at))

    def vector(self, index: int, width: int) -> range:
        """Places of the elements of a field that is a vector; raises ValueError if it ends after the data."""
        at = self.field(index)
        if at is None:
            return range(0)
        first = at + number(self.data, "<I", at)
        count = number(self.data, "<I", first)
        if first + 4 + width * count > len(self.data):
            raise ValueError(f"a list of {count:,} entries at byte {first:,}")
        return range(first + 4, first + 4 + width * count, width)


def number(data: Any, form: str, at: int) -> int:
    """Number at a place; raises ValueError if it is not in the data."""
    if not 0 <= at <= len(data) - struct.calcsize(form):
        raise ValueError(f"it refers to byte {at:,} of {len(data):,}")
    return int(struct.unpack_from(form, data, at)[0])


def batches(file: Path, field: str, among: int = 1) -> Iterator[Any]:
    """Record batches of an Arrow file: a stream, as datasets writes it, or the random-access format.

    field: name of the column of texts. Raises ValueError, naming the file, if it has another type than strings, or if
    the buffers of a message are too large after decompression.
    """
    import pyarrow

    check_messages(file, among)
    with pyarrow.memory_map(str(file)) as opened:
        if opened.read(6) == MAGIC:
            reader = pyarrow.ipc.open_file(opened)
            read = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            opened.seek(0)
            read = reader = pyarrow.ipc.open_stream(opened)
        for column in reader.schema:  # a batch is decompressed with all its columns
            if column.name == field:
                check_strings(file, column.type, field)
        yield from read


def check_messages(file: Path, among: int = 1) -> None:
    """Raise ValueError, naming the file, if messages overlap, or are too large after decompression.

    A batch, or all dictionaries, may be as large as `largest` allows; all together, as `largest_sum`. Each description
    is read once: the work is that of the file's bytes.
    """
    most, dictionaries, total, batches, end = largest(file), 0, 0, 0, 0
    with mapped(file) as data:
        for count, at in enumerate(sorted(listed(data)) if data[:6] == MAGIC else following(data)):
            if count >= most_messages(file):
                raise ValueError(f"{file} has more than {most_messages(file):,} messages")
            if at < end:
                raise ValueError(f"{file} lists a message at byte {at:,}, within another one or twice")
            kind, size, end = unpacked(data, at)
            total, batches = total + size, batches + (kind == BATCH)
            if kind == DICTIONARY:  # they are kept, and one may be added to another
                size = dictionaries = dictionaries + size
            if size > most:
                what = "dictionaries up to" if kind == DICTIONARY else "a batch at"
                raise ValueError(
                    f"{file} has {size:,} bytes in {what} byte {at:,} after decompression; at most {most:,} are read"
                )
    total += batches * dictionaries  # all texts of a dictionary are checked with each batch
    if total > largest_sum(file, among):
        raise ValueError(
            f"{file} has {total:,} bytes in its messages after decompression, with the dictionaries for each of "
            f"{batches:,} batches; at most {largest_sum(file, among):,} are read"
        )


def description(data: Any, at: int) -> tuple[int, int]:
    """Place and length of the description of the message at a place; older files lack the first four bytes."""
    begin = at + 4 if number(data, "<I", at) == 0xFFFFFFFF else at
    return begin + 4, number(data, "<i", begin)


def following(data: Any) -> Iterator[int]:
    """Places of the messages of a stream."""
    at = 0
    while at < len(data):
        begin, length = description(data, at)
        if length < LEAST_DESCRIPTION:
            return
        yield at
        at = begin + length + max(0, Table.root(data, begin).value(3, "<q"))


def listed(data: Any) -> Iterator[int]:
    """Places of the messages that are listed at the end of a file of the random-access format."""
    size = number(data, "<i", len(data) - 10)
    footer = Table.root(data, len(data) - 10 - size)
    for field in (2, 3):  # dictionaries and batches
        for at in footer.vector(field, BLOCK):
            yield number(data, "<q", at)


def unpacked(data: Any, at: int) -> tuple[int, int, int]:
    """Kind of a message, bytes of its buffers after decompression, and the place after its description.

    Raises ValueError if an older message than of version 5 has metadata of its own, where Arrow 0.17 named compression.
    """
    begin, length = description(data, at)
    end = begin + max(0, length)
    message = Table.root(data[begin:end], 0)  # a copy: what it refers to lies in it, not in that of another message
    kind, batch = message.value(1, "<B"), message.table(2)
    if kind == DICTIONARY and batch is not None:
        batch = batch.table(1)
    if batch is None or kind not in (DICTIONARY, BATCH):
        return kind, 0, end
    if message.value(0, "<h") < V5 and message.field(4) is not None:
        raise ValueError(f"the message at byte {at:,} has metadata in a version before 5, which may name a compression")
    compressed = batch.field(3) is not None
    sizes = (buffer(data, end, batch.data, place, compressed) for place in batch.vector(2, BUFFER))
    return kind, sum(sizes), end


def buffer(data: Any, body: int, batch: bytes, place: int, compressed: bool) -> int:
    """Bytes of a buffer after decompression. body: place of the message's body; place: that in its description."""
    offset, length = number(batch, "<q", place), number(batch, "<q", place + 8)
    size = number(data, "<q", body + offset) if compressed and length else -1
    return max(0, length if size < 0 else size)
