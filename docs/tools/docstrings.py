"""Extension of griffe: arguments that a docstring describes as `name: text` become a list."""

import re
from itertools import pairwise
from typing import Any

import griffe

NAMES = r"([a-z]\w*(?:\([\w, ]+\))?(?:, [a-z]\w*)*): "
ITEM = re.compile(f"^{NAMES}(.*)")
WITHIN = re.compile(rf"[.;]\s+(?={NAMES})")
RAISES = re.compile(r"(?<=\.)\s+(?=Raises [A-Z]\w+)")


def named(names: str) -> set[str]:
    """The names before an item's colon; those of a tuple are left out."""
    return set(re.sub(r"\(.*?\)", "", names).split(", "))


def separated(block: str, known: set[str]) -> str:
    """A paragraph with each item on a line of its own, and a sentence on errors, after items, as another paragraph."""

    def broken(match: re.Match[str]) -> str:
        return ".\n" if named(match[1]) <= known else match[0]

    lines = WITHIN.sub(broken, block)
    items = any((found := ITEM.match(line)) and named(found[1]) <= known for line in lines.splitlines())
    return RAISES.sub("\n\n", lines) if items else lines


def as_list(text: str, known: set[str]) -> str:
    """Docstring with each passage that begins with `name: ` or `a, b: ` as an item of a list.

    An item ends at a line that is not indented, if the paragraph indents any line of an item, else at an empty one, and
    at a sentence on errors. known: names of the arguments or attributes; other words before a colon are left alone.
    """
    blocks = (separated(block, known) for block in re.split(r"\n[ ]*\n", text))
    return "\n\n".join(listed(part, known) for block in blocks for part in block.split("\n\n"))


def listed(block: str, known: set[str]) -> str:
    """`as_list` of one paragraph."""
    lines: list[str] = []
    hanging = any(ITEM.match(a) and b.startswith("    ") for a, b in pairwise(block.splitlines()))
    inside = False  # an item
    for line in block.splitlines():
        found = ITEM.match(line)
        if found and named(found[1]) <= known:
            if lines and lines[-1] and not inside:
                lines.append("")
            names = re.sub(r"\(.*?\)", "", found[1]).split(", ")
            lines.append("- " + ", ".join(f"`{name}`" for name in names) + f": {found[2]}")
            inside = True
        elif inside and line.strip() and (line.startswith(" ") or not hanging):
            lines.append(f"  {line.strip()}")
        else:
            if inside and line.strip():
                lines.append("")
            inside = False
            lines.append(line)
    return "\n".join(lines)


class Arguments(griffe.Extension):
    """Rewrites docstrings before mkdocstrings reads them."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if func.docstring:
            func.docstring.value = as_list(func.docstring.value, {p.name for p in func.parameters})

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.docstring:
            init = cls.members.get("__init__")
            known = {p.name for p in init.parameters} if isinstance(init, griffe.Function) else set()
            cls.docstring.value = as_list(cls.docstring.value, known | set(cls.members))
