"""Pages that show equations, PyTorch and Flax side by side, generated from the sources.

A comment `# [rope.rotate]` in `torch_ref` or `jaxmodels` marks a passage. Above a `def` or `class` it is the
definition; above another statement it is the lines up to the next blank line, the next marker or the end of the block.
A name may be marked several times on one side: the passage then has several pieces. `# [neox.ranks: merge]` names the
side; it is `torch` or `flax` if omitted. Every passage has two sides.

A page (`docs/annotated/*.md`) shows a passage where it has the comment `<!-- passage: rope.rotate -->`: what stands
between the heading above and the comment becomes the first of three columns. `$…$` and `$$…$$` become MathML. Images
in `figures/` are written into the page, so that they follow its colors.

MkDocs calls the functions `on_…`; see `hooks` in mkdocs.yml.
"""

import ast
import dataclasses
import html
import re
import textwrap
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "annotated"
SIDES = {"torch_ref": "torch", "jaxmodels": "flax"}
TITLES = {"torch": "PyTorch", "flax": "Flax"}
MARKER = re.compile(r" *# \[([a-z]+\.[a-z_]+)(?:: ([a-z]+))?\]")
ROW = re.compile(r"<!-- passage: ([a-z]+\.[a-z_]+)((?: \| [a-z]+=[^|\n]+?)*) -->")
FIGURE = re.compile(r"^!\[([^\]]+)\]\(figures/([\w-]+\.svg)\)$", re.M)
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![`\\$])\$([^$`\n]+?)\$", re.S)
NOISE = re.compile(r"  # (noqa|type: ignore)\b.*")
LEADING = re.compile(r'^(?:<span class="w">\s*</span>|\s+)')
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.S)

Piece = tuple[int, int]  # first and last line, from 1


@dataclasses.dataclass(frozen=True)
class Passage:
    """Lines `first` to `last` of a source file, in the class or function `where`."""

    file: str
    first: int
    last: int
    where: str
    code: str


Passages = Mapping[str, Mapping[str, Sequence[Passage]]]  # by name and side


def collect(root: Path = ROOT) -> dict[str, dict[str, list[Passage]]]:
    """Find the marked passages of all sources; raises ValueError if one lacks a side or a marker marks nothing."""
    found: dict[str, dict[str, list[Passage]]] = {}
    for package, side in SIDES.items():
        for file in sorted((root / package).rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            if "# [" in source:
                for name, own_side, passage in marked(source, file.relative_to(root).as_posix()):
                    found.setdefault(name, {}).setdefault(own_side or side, []).append(passage)
    for name, sides in found.items():
        if len(sides) != 2:
            places = ", ".join(f"{p.file}:{p.first} ({side})" for side, pieces in sides.items() for p in pieces)
            raise ValueError(f"passage {name} must have two sides, is marked in {places}")
    return found


def marked(source: str, file: str) -> Iterator[tuple[str, str | None, Passage]]:
    """Name, side if it is written, and passage of each marker in a source."""
    lines, tree = source.splitlines(), ast.parse(source)
    markers = {i: match for i, line in enumerate(lines, 1) if (match := MARKER.fullmatch(line))}
    for i, match in markers.items():
        statement, where, block_end = statement_at(tree, i + 1)
        if statement is None:
            raise ValueError(f"{file}:{i} marks {match[1]}, but no statement follows it")
        first, last = i + 1, statement.end_lineno or i + 1
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{statement.name}".lstrip(".")
        else:
            ends = (n for n in range(first, block_end + 1) if n in markers or not lines[n - 1].strip())
            last = next(ends, block_end + 1) - 1
        yield match[1], match[2], Passage(file, first, last, where, shown(lines, tree, first, last))


def statement_at(tree: ast.Module, line: int) -> tuple[ast.stmt | None, str, int]:
    """Outermost statement that starts at a line, the name of what holds it, and the last line of its block."""

    def visit(node: ast.AST, where: str) -> tuple[ast.stmt | None, str, int]:
        for block in blocks(node):
            for child in block:
                decorators = getattr(child, "decorator_list", [])
                if line == min([child.lineno, *(d.lineno for d in decorators)]):
                    return child, where, block[-1].end_lineno or line
                inner = f"{where}.{child.name}".lstrip(".") if hasattr(child, "name") else where
                if (found := visit(child, inner))[0] is not None:
                    return found
        return None, "", 0

    return visit(tree, "")


def blocks(node: ast.AST) -> Iterator[list[Any]]:
    """Blocks of statements in a node."""
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list) and block:
            yield block


def shown(lines: list[str], tree: ast.Module, first: int, last: int) -> str:
    """Lines of a passage without other markers, checks of arguments (as …), and docstrings after their first line."""
    kept: dict[int, str | None] = {
        n: None if MARKER.fullmatch(lines[n - 1]) else lines[n - 1] for n in range(first, last + 1)
    }
    for node in ast.walk(tree):
        start, end = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
        if not first <= start <= end <= last:
            continue
        if isinstance(node, ast.Assert) or is_check(node):
            kept.update(dict.fromkeys(range(start, end + 1)))
            kept[start] = lines[start - 1][: len(lines[start - 1]) - len(lines[start - 1].lstrip())] + "# …"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            doc = node.body[0]
            if doc.end_lineno != doc.lineno:
                kept.update(dict.fromkeys(range(doc.lineno, (doc.end_lineno or 0) + 1)))
                kept[doc.lineno] = lines[doc.lineno - 1] + '"""'
    text = textwrap.dedent("\n".join(NOISE.sub("", line) for line in kept.values() if line is not None))
    return re.sub(r"^( *# …\n)( *# …\n)+", r"\1", text, flags=re.M)


def is_check(node: ast.AST) -> bool:
    """True for an `if` that only raises."""
    return isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise)


def names_in(page: str) -> list[str]:
    """Names of the passages that a page shows."""
    return [match[1] for match in ROW.finditer(page)]


def prepare(page: str, passages: Passages, folder: Path = PAGES) -> tuple[str, list[str]]:
    """Markdown in which code, equations and figures are placeholders, and the HTML of each; see `fill`.

    Raises ValueError if the page names a passage that does not exist, or has an equation that cannot be converted.
    """
    pieces: list[str] = []

    def placeholder(piece: str) -> str:
        pieces.append(piece)
        return f"PIECE{len(pieces) - 1}END"

    def math(match: re.Match[str]) -> str:
        block = match[1] is not None
        piece = placeholder(mathml((match[1] or match[2]).strip(), block))
        return f"\n\n{piece}\n\n" if block else piece

    def row(match: re.Match[str]) -> str:
        if match[1] not in passages:
            raise ValueError(f"passage {match[1]} is marked in no source")
        titles = TITLES | dict(part.strip().split("=", 1) for part in match[2].split("|") if part.strip())
        sides = passages[match[1]]
        code = [code_box(titles[side], sides[side]) for side in titles if side in sides]
        return placeholder("".join(code))

    spans: list[str] = []

    def protect(match: re.Match[str]) -> str:
        spans.append(match[0])
        return f"SPAN{len(spans) - 1}END"

    text = MATH.sub(math, CODE.sub(protect, page))
    text = re.sub(r"SPAN(\d+)END", lambda match: spans[int(match[1])], text)
    text = FIGURE.sub(lambda match: placeholder(figure(folder / "figures" / match[2], match[1])), text)
    sections = re.split(r"^(?=#{1,3} )", text, flags=re.M)
    done = []
    for section in sections:
        match = ROW.search(section)
        if match is None:
            done.append(f'<div class="annotated-text" markdown="1">\n\n{section.strip()}\n\n</div>')
            continue
        words, rest = section[: match.start()].strip(), section[match.end() :].strip()
        done.append(f'<div class="annotated-row" markdown="1">\n<div class="annotated-words" markdown="1">\n\n{words}')
        done.append(f"</div>\n\n{row(match)}\n\n</div>")
        if rest:
            done.append(f'<div class="annotated-text" markdown="1">\n\n{rest}\n\n</div>')
    style = (folder / "style.css").read_text(encoding="utf-8")
    return "\n\n".join([*done, placeholder(f"<style>{style}</style>")]), pieces


def fill(page: str, pieces: Sequence[str]) -> str:
    """HTML of a page with its placeholders replaced."""
    return re.sub(r"<p>PIECE(\d+)END</p>|PIECE(\d+)END", lambda m: pieces[int(m[1] or m[2])], page)


def mathml(tex: str, block: bool) -> str:
    """Convert an equation to MathML; raises ValueError if it holds what latex2mathml does not know."""
    text = convert(tex, display="block" if block else "inline")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"equation {tex!r} cannot be converted: {error}") from None
    left = [e.text for e in root.iter() if e.text and ("\\" in e.text or "&" in e.text)]
    if left:
        raise ValueError(f"equation {tex!r} holds {', '.join(left)}, which is not converted")
    # Browsers follow the style of a cell, not its columnalign. Names of functions and ∞ are identifiers: operators
    # would have wide spaces around them.
    text = re.sub(r'columnalign="(\w+)"', r'style="text-align:\1"', text)
    text = re.sub(r"<mo>([A-Za-z]{2,}|&#x0221E;)</mo>", r"<mi>\1</mi>", text)
    text = re.sub(
        r"(?<!<msub>)(<mi>(?:cos|sin|LN|FF)</mi>)(?!<mo [^>]*>&#x00028;)", r'\1<mspace width="0.17em"/>', text
    )
    return f'<div class="equation">{text}</div>' if block else text


def figure(file: Path, alt: str) -> str:
    """A figure's SVG, to be written into a page."""
    svg = file.read_text(encoding="utf-8")
    svg = re.sub(r"<style\b.*?</style>", "", svg[svg.index("<svg") :], count=1, flags=re.S)  # for the file on its own
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)  # the caption says what it shows
    return f'<figure class="annotated-figure">{svg}<figcaption>{html.escape(alt)}</figcaption></figure>'


def code_box(title: str, pieces: Sequence[Passage]) -> str:
    """One side of a passage as HTML: each piece under a link to its lines."""
    parts = [f'<div class="annotated-code"><p class="annotated-side">{html.escape(title)}</p>']
    for passage in pieces:
        link = f"{repository()}/blob/main/{passage.file}#L{passage.first}-L{passage.last}"
        where = f"<code>{html.escape(passage.where)}</code> " if passage.where else ""
        parts.append(f'<p class="annotated-link">{where}<a href="{link}">{passage.file}:{passage.first}</a></p>')
        parts.append(f'<pre tabindex="0"><code>{highlighted(passage.code)}</code></pre>')
    return "".join([*parts, "</div>"])


def highlighted(code: str) -> str:
    """Code as colored HTML, each line in a span that wraps with a hanging indent."""
    colored = highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
    plain = code.rstrip("\n").split("\n")
    indents = [len(line) - len(line.lstrip()) for line in plain]
    return "".join(
        f'<span class="line" style="--indent:{indent}ch">{LEADING.sub("", line)}</span>\n'
        for line, indent in zip(colored, indents, strict=True)
    )


def repository() -> str:
    """Address of the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Homepage"])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str | None:
    """MkDocs: replace passages, equations and figures by placeholders."""
    if not page.file.src_uri.startswith("annotated/"):
        return None
    page.meta["hide"] = ["navigation", "toc"]  # room for three columns
    text, page.meta["pieces"] = prepare(markdown, collect())
    return text


def on_page_content(html: str, page: Any, **_: Any) -> str | None:
    """MkDocs: fill the placeholders."""
    return fill(html, page.meta["pieces"]) if "pieces" in page.meta else None
