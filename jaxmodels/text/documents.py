"""Texts of any size as documents, read in pieces: a text, a UTF-8 file, JSONL, Arrow and Parquet files, and folders.

A `Place` says where reading goes on, so that work which was interrupted can continue there.
"""

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxmodels.io.bounded import open_regular
from jaxmodels.io.content import recognised
from jaxmodels.process.extras import require
from jaxmodels.process.texts import quoted
from jaxmodels.text.vocabularies import utf8

BLOCK = 2**20  # bytes of a text file that are read at once
LINE_BYTES = 2**25  # of a line of JSONL
LEAST_TEXT, EXPANSION = 2**28, 1_000  # characters of a compressed file: of any, and for each of its bytes
EXPANDED = 2**30  # bytes of a group of rows that may be more than 100 times as many as the file has
ROWS = 256  # of a column that are decoded at once
BOM = codecs.BOM_UTF8
OTHER_BOMS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class Place(NamedTuple):
    """Position from which reading goes on: file of a source, place in it, and characters done of the document there."""

    file: int = 0
    offset: int = 0
    done: int = 0


@dataclasses.dataclass(frozen=True)
class Document:
    """A document: chunks of its text, its place, and that of the next one. name: for errors."""

    name: str
    chunks: Iterator[str]
    offset: int
    following: int
    in_bytes: bool = False  # places in the document are bytes from `offset`, not characters


class Source:
    """Documents, one after the other. many: they are separate documents; otherwise there is one."""

    name: str
    many: bool = False

    def __len__(self) -> int:
        """Number of files."""
        return 1

    def identity(self) -> list[Any]:
        """JSON values that change if the content does."""
        raise NotImplementedError

    def sizes(self) -> list[int]:
        """Bytes of each file."""
        raise NotImplementedError

    def documents(self, file: int = 0, offset: int = 0) -> Iterator[Document]:
        """Documents of a file from a place on; raises ValueError, naming the file, for what is no text."""
        raise NotImplementedError

    def chunks(self) -> Iterator[str]:
        """All documents' texts in pieces."""
        for file in range(len(self)):
            for document in self.documents(file):
                yield from document.chunks


@dataclasses.dataclass(frozen=True)
class Text(Source):
    """A text in memory."""

    name: str
    text: str

    def identity(self) -> list[Any]:
        return [self.name, hashlib.sha256(utf8(self.text)).hexdigest()]

    def sizes(self) -> list[int]:
        return [len(self.text)]

    def documents(self, file: int = 0, offset: int = 0) -> Iterator[Document]:
        if offset == 0:
            yield Document(self.name, iter([self.text]), 0, max(1, len(self.text)))


@dataclasses.dataclass(frozen=True)
class TextFile(Source):
    """Bytes from start to stop of a UTF-8 file; a byte order mark at its beginning is left out."""

    file: Path
    start: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.file)

    def identity(self) -> list[Any]:
        return [*file_identity(self.file), self.start, self.stop]

    def sizes(self) -> list[int]:
        return [self.file.stat().st_size if self.stop is None else self.stop]

    def documents(self, file: int = 0, offset: int = 0) -> Iterator[Document]:
        offset = max(offset, self.start)
        with open_regular(self.file) as opened:
            head = opened.read(4)
            for mark, encoding in OTHER_BOMS.items():
                if head.startswith(mark):
                    raise ValueError(f"{self.file} is {encoding} text; expected UTF-8")
            if offset == 0 and head.startswith(BOM):
                offset = len(BOM)
        yield Document(self.name, self.read(offset), offset, self.stop or 0, in_bytes=True)

    def read(self, offset: int) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open_regular(self.file) as opened:
            opened.seek(offset)
            at, end = offset, self.stop
            while True:
                block = opened.read(BLOCK if end is None else min(BLOCK, end - at))
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    # The decoder's object begins with the bytes kept from the block before.
                    place = at + len(block) - len(error.object) + error.start
                    otherwise = f"is not UTF-8: {error.reason} at byte {place}"
                    raise ValueError(f"{self.file} {recognised(self.file) or otherwise}") from None
                if len(block) == BLOCK and not block.strip(b"\0"):  # such as a sparse file of terabytes
                    raise ValueError(f"{self.file} is no text: it has a million zero bytes from byte {at:,} on")
                if text:
                    yield text
                if not block:
                    return
                at += len(block)


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Documents of JSONL, Arrow, Parquet and text files, from a field or column of strings."""

    name: str
    files: tuple[Path, ...]
    field: str = "text"
    many: bool = True

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> list[Any]:
        return [self.field, *(value for file in self.files for value in file_identity(file))]

    def sizes(self) -> list[int]:
        return [file.stat().st_size for file in self.files]

    def documents(self, file: int = 0, offset: int = 0) -> Iterator[Document]:
        path = self.files[file]
        kind = kind_of(path)
        if kind == "text":
            for one in TextFile(path).documents(0, offset):
                yield dataclasses.replace(one, following=path.stat().st_size)
            return
        rows = lines(path, self.field, offset) if kind == "jsonl" else columns(path, kind, self.field, offset)
        for where, text, at, following in rows:
            try:
                utf8(text)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            yield Document(where, iter([text]), at, following)


def file_identity(file: Path) -> list[Any]:
    about = file.stat()
    return [str(file.resolve()), about.st_size, about.st_mtime_ns]


KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}


def kind_of(file: Path) -> str:
    """Kind of a file by its name: jsonl, parquet, arrow; any other is text."""
    return KINDS.get(file.suffix.lower(), "text")


def lines(file: Path, field: str, offset: int) -> Iterator[tuple[str, str, int, int]]:
    """Name, text, place and end of each object of a JSONL file; blank lines are left out."""
    with open_regular(file) as opened:
        if offset == 0 and opened.read(3) == BOM:
            offset = len(BOM)
        opened.seek(offset)
        while line := opened.readline(LINE_BYTES + 1):
            where = f"{file}, line at byte {offset:,}"
            if len(line) > LINE_BYTES:
                raise ValueError(f"{where} has more than {LINE_BYTES:,} bytes")
            following = offset + len(line)
            if line.strip():
                yield where, text_of(where, line, field, file), offset, following
            offset = following


def text_of(where: str, line: bytes, field: str, file: Path) -> str:
    """Field of a JSON object; raises ValueError if it is not a string."""
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} {recognised(file) or f'is not UTF-8: {error.reason}'}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} {recognised(file) or f'is not JSON: {error.msg}'}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where} is not read: {quoted(str(error), 100)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds {quoted(found)}; expected a JSON object with the field {quoted(field)}")
    text = found.get(field)
    if not isinstance(text, str):
        has = f"; it has {', '.join(quoted(name, 40) for name in list(found)[:10])}" if field not in found else ""
        raise ValueError(f"{where} has {quoted(field)}={quoted(text)}, must be a string{has}")
    return text


def columns(file: Path, kind: str, field: str, offset: int) -> Iterator[tuple[str, str, int, int]]:
    """Name, text, number and next number of each row of an Arrow or Parquet file; empty values are left out."""
    require("data", "pyarrow")
    open_regular(file).close()
    row, most = 0, LEAST_TEXT + EXPANSION * file.stat().st_size
    batches = arrow_batches(file) if kind == "arrow" else parquet_batches(file, field)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            if row + batch.num_rows <= offset:
                row += batch.num_rows
                continue
            column = strings(file, batch, field)
            for first in range(0, len(column), ROWS):
                for text in column.slice(first, ROWS).to_pylist():
                    most -= len(text or "")
                    if most < 0:
                        raise ValueError(f"{file} holds more than {EXPANSION:,} times as much text as it has bytes")
                    if text is not None and row >= offset:
                        yield f"{file}, row {row:,}", text, row, row + 1
                    row += 1
        except GeneratorExit:
            raise
        except Exception as error:  # pyarrow raises many kinds for damaged files
            if str(error).startswith(str(file)):
                raise
            reason = recognised(file) or f"is not a readable {kind.capitalize()} file: {quoted(str(error), 200)}"
            raise ValueError(f"{file} {reason}") from None


def strings(file: Path, batch: Any, field: str) -> Any:
    """Column of strings of a batch; raises ValueError if there is none of that name."""
    import pyarrow

    if field not in batch.schema.names:
        names = ", ".join(quoted(name, 40) for name in batch.schema.names[:20])
        raise ValueError(f"{file} has no column {quoted(field)}; it has {names}")
    column = batch.column(batch.schema.names.index(field))
    column.validate(full=True)  # offsets outside the file would end the process
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if not any(getattr(pyarrow.types, f"is_{name}")(kind) for name in ("string", "large_string", "string_view")):
        raise ValueError(f"{file} has {kind} in the column {quoted(field)}, must be strings")
    return column


def arrow_batches(file: Path) -> Iterator[Any]:
    """Record batches of an Arrow file: a stream, as datasets writes it, or the random-access format."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            mapped.seek(0)
            yield from pyarrow.ipc.open_stream(mapped)


def parquet_batches(file: Path, field: str) -> Iterator[Any]:
    """Record batches of one column of a Parquet file; of all columns if it is not there."""
    from pyarrow import parquet

    with parquet.ParquetFile(str(file), buffer_size=2**20, pre_buffer=False) as opened:
        columns = [field] if field in opened.schema_arrow.names else None
        for group in range(opened.metadata.num_row_groups):  # not by column: damaged sizes of one end the process
            size = opened.metadata.row_group(group).total_byte_size
            if size > max(EXPANDED, 100 * file.stat().st_size):
                raise ValueError(f"{file} has {size:,} bytes in a group of rows; at most {EXPANDED:,}")
        yield from opened.iter_batches(batch_size=ROWS, columns=columns, use_threads=False)
