"""Texts that come from files and names of others, made fit for a terminal: visible, and of a bounded length."""

import re
from typing import Any, TextIO

LONGEST = 4_000  # characters of an error on a terminal: about a page


def visible(text: str, keep: str = "") -> str:
    """Escape the characters that no printed text should have: control characters, direction marks, lone surrogates.

    A terminal runs control sequences: they can hide text, or rename the window. The result can also be written as XML.
    keep: characters to leave.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def for_terminal(text: str, stream: TextIO) -> str:
    """Text that a model wrote: as it is for a file or a pipe, on a terminal without control characters."""
    return visible(text, keep="\n\t") if stream.isatty() else text


def shortened(text: str, longest: int = LONGEST) -> str:
    """One line of at most `longest` characters and a note: the middle of a longer text is left out, control characters
    are escaped.
    """
    if len(text) <= longest:
        return visible(text)
    head = longest * 3 // 4
    note = f" … ({len(text) - longest:,} characters left out) … "
    return visible(text[:head]) + note + visible(text[len(text) - longest + head :])


def table_cell(text: str) -> str:
    """Text in one cell of a table in Markdown: a bar would end the cell, a line break the table.

    Neither HTML nor a link begins in it; other Markdown has its effect.
    """
    text = visible(text).replace("](", r"]\(")
    # Backslashes before a bar or < are doubled: one of them would undo the added one. Linear: a match begins a run.
    return re.sub(r"(?<!\\)(\\*)([<|])", r"\1\1\\\2", text)


def quoted(value: Any, longest: int = 80) -> str:
    """repr of a value for an error text, shortened; integers of thousands of digits are described."""
    try:
        return shortened(repr(value), longest)
    except (ValueError, RecursionError):  # more digits than Python prints, or nested too deeply
        return f"a {type(value).__name__} that is too large to print"
