"""Extension of griffe: arguments that a docstring describes as `name: text` become a list."""

import re
from itertools import pairwise
from typing import Any

import griffe

ITEM = re.compile(r"^([a-z]\w*(?:\([\w, ]+\))?(?:, [a-z]\w*)*): (.*)")


def as_list(text: str, known: set[str]) -> str:
    """Docstring with each passage that begins with `name: ` or `a, b: ` as an item of a list.

    An item ends at a line that is not indented, if the docstring indents any line of an item, else at an empty one.
    known: names of the arguments or attributes; other words before a colon are left alone.
    """
    lines: list[str] = []
    hanging = any(ITEM.match(a) and b.startswith("    ") for a, b in pairwise(text.splitlines()))
    inside = False  # an item
    for line in text.splitlines():
        found = ITEM.match(line)
        names = re.sub(r"\(.*?\)", "", found[1]).split(", ") if found else []
        if found and set(names) <= known:
            if lines and lines[-1] and not inside:
                lines.append("")
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
