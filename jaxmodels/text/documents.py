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

from jaxmodels.io.bounded import open_regular, parsed
from jaxmodels.io.content import recognised
from jaxmodels.process.texts import quoted
from jaxmodels.text.tables.columns import columns, warn_of_empty
from jaxmodels.text.vocabularies import utf8

BLOCK = 2**20  # bytes of a text file that are read at once
LINE_BYTES = 2**25  # of a line of JSONL
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

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files that are read."""
        return ()

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

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.file,)

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

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.files

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
        if kind == "jsonl":
            rows = lines(path, self.field, offset, nulls=True)
        else:
            rows = columns(path, kind, self.field, offset, len(self))
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


def lines(file: Path, field: str, offset: int, *, nulls: bool = False) -> Iterator[tuple[str, str, int, int]]:
    """Name, text, place and end of each object of a JSONL file; blank lines are left out.

    nulls: leave out objects whose field is null, too, as of a table; a warning at the end of the file counts them.
    """
    began, empty = offset, 0
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
                text = text_of(where, line, field, file, nulls)
                if text is not None:
                    yield where, text, offset, following
                empty += text is None
            offset = following
    warn_of_empty(file, empty, f", from byte {began:,} on" if began else "")


def text_of(where: str, line: bytes, field: str, file: Path, nulls: bool) -> str | None:
    """Field of a JSON object; raises ValueError if it is not a string. nulls: it may be null."""
    try:
        found = parsed(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} {recognised(file) or f'is not UTF-8: {error.reason}'}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} {recognised(file) or f'is not JSON: {error.msg}'}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where} is not read: {quoted(str(error), 100)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds {quoted(found)}; expected a JSON object with the field {quoted(field)}")
    text = found.get(field)
    if isinstance(text, str) or (nulls and text is None and field in found):
        return text
    has = f"; it has {', '.join(quoted(name, 40) for name in list(found)[:10])}" if field not in found else ""
    raise ValueError(f"{where} has {quoted(field)}={quoted(text)}, must be a string{has}")
