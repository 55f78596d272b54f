"""Documents in text files and JSONL, and tables of their scores."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmodels.io.bounded import open_regular, parsed
from jaxmodels.io.content import recognised
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.scoring.documents import Score, Scores, total_of
from jaxmodels.text.documents import LINE_BYTES, Source, kind_of
from jaxmodels.text.sources import open_text
from jaxmodels.text.vocabularies import utf8

MOST_ROWS = 20  # documents of a JSONL file that have rows of their own in a table


class Document(NamedTuple):
    """A text, its file as the user named it, and its line there if the file is JSONL. A long text is a source."""

    file: str
    line: int | None
    text: str | Source

    @property
    def name(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


def read_documents(name: str, field: str | None = None) -> Iterator[Document]:
    """Read the documents of a corpus or file, one after the other.

    name: python_docs, tiny_shakespeare or a UTF-8 file. field: of the JSON objects in a file whose name ends in .jsonl,
    one a line: the document's text; empty lines are skipped. Raises ValueError, naming file and line, if one cannot be
    read or a JSONL file comes without a field.
    """
    path = Path(name)
    if kind_of(path) != "jsonl":
        text = open_text(name)
        if not isinstance(text, str):
            for _ in text.chunks():  # errors come before the work
                pass
        yield Document(name, None, text)
        return
    if field is None:
        raise ValueError(f"text={name!r} is JSONL; name the field that holds the text, such as --jsonl-field text")
    number = 0
    for number, line in json_lines(path):
        yield Document(name, number, text_of(line, field, f"{name}:{number}"))
    if not number:
        raise ValueError(f"text={name!r} has no documents")


def json_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and content of each line of a UTF-8 file that is not blank."""
    try:
        with open_regular(file) as opened:
            for number, line in enumerate(iter(lambda: opened.readline(LINE_BYTES + 1), b""), start=1):
                if len(line) > LINE_BYTES:
                    raise ValueError(f"line {number} has more than {LINE_BYTES:,} bytes")
                text = line.decode("utf-8")
                if text.strip("\ufeff \t\r\n"):
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        reason = f"line {number} is not UTF-8: {error.reason}"
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        return
    raise ValueError(f"text={str(file)!r} must be a readable UTF-8 file: {recognised(file) or reason}")


def text_of(line: str, field: str, where: str) -> str:
    """Text in a field of a line of JSON; raises ValueError, naming the line, if it has none."""
    try:
        content = parsed(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {shortened(str(error), 200)}") from None
    if not isinstance(content, dict) or not isinstance(content.get(field), str):
        names = [quoted(name, 40) for name in list(content)[:10]] if isinstance(content, dict) else []
        has = ", ".join(names) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{where} must be an object with a string {quoted(field)}; it has {has or 'no fields'}")
    try:
        utf8(content[field])  # JSON may have half of a surrogate pair
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return content[field]


def table(documents: Sequence[Document], scores: Scores, unit: str) -> str:
    """Table with a row for each document, or for each JSONL file with more than MOST_ROWS, and one for all."""
    files: dict[str, list[int]] = {}
    for i, document in enumerate(documents):
        files.setdefault(document.file, []).append(i)
    lines: list[tuple[str, Score]] = []
    for file, members in files.items():
        if len(members) > MOST_ROWS:
            own = total_of([scores.documents[i] for i in members])
            lines.append((f"{file} ({len(members):,} documents)", own))
        else:
            lines += [(documents[i].name, scores.documents[i]) for i in members]
    lines.append((f"total ({len(documents):,} document{'s'[: len(documents) != 1]})", scores.total))
    heading = ("document", f"{unit}s", "loss", "perplexity", "bits/byte", "bits/char")
    cells = [heading, *(cells_of(name, score) for name, score in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    written = []
    for name, *numbers in cells:
        right = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        written.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join(written)


def cells_of(name: str, score: Score) -> tuple[str, ...]:
    numbers = (score.loss, score.perplexity, score.bits_per_byte, score.bits_per_character)
    return (name, f"{score.tokens:,}", *("-" if number is None else f"{number:.4f}" for number in numbers))


def write_json(file: Path, documents: Sequence[Document], scores: Scores) -> None:
    """Write scores as JSON: {"documents": [{"file": …, "line": …, "tokens": …, "loss": …, …}, …], "total": {…}}.

    Document by document: a million of them would take a gigabyte as one text.
    """
    with file.open("w", encoding="utf-8") as out:
        out.write('{\n  "documents": [')
        for i, (document, score) in enumerate(zip(documents, scores.documents, strict=True)):
            about = {"file": document.file, "line": document.line} | values_of(score)
            out.write((",\n    " if i else "\n    ") + as_json(about, "    "))
        out.write(("\n  ]" if documents else "]") + f',\n  "total": {as_json(values_of(scores.total), "  ")}\n}}\n')


def as_json(values: Mapping[str, Any], indent: str) -> str:
    """Object of numbers and texts as `json.dumps` writes it with an indent of 2, but without reference cycles."""
    lines = (f"{indent}  {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def values_of(score: Score) -> dict[str, Any]:
    """Numbers of a score; None for those that are infinite, which JSON has not."""
    names = ("loss", "perplexity", "bits_per_byte", "bits_per_character")
    numbers = {name: getattr(score, name) for name in names}
    finite = {name: x if x is not None and math.isfinite(x) else None for name, x in numbers.items()}
    return {"tokens": score.tokens} | finite
