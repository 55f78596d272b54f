"""The gallery of bugs: every port that differs is in it, and its quotes are lines of the version that it names."""

import importlib.metadata
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest

from examples.zoo.truth import CAUSES, Cause

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
VERSION = "4.57.6"
QUOTE = re.compile(
    rf"^(PyTorch|Flax), `([\w/]+\.py):(\d+)`:\n\n<!-- not run: lines of transformers {re.escape(VERSION)} -->\n"
    r"```python\n(.*?)^```",
    re.M | re.S,
)
QUOTES = [(side, file, int(line), code) for side, file, line, code in QUOTE.findall(TEXT)]


def test_quotes_are_in_pairs():
    assert [side for side, *_ in QUOTES] == ["PyTorch", "Flax"] * (len(QUOTES) // 2)
    assert len(QUOTES) == TEXT.count(f"lines of transformers {VERSION}") > 8


def test_every_port_that_differs_is_quoted():
    """The lines that show it; the first port stands for those with the same cause."""
    quoted = {(file, line.strip()) for _, file, _, code in QUOTES for line in code.splitlines()}
    first: dict[str, Cause] = {}
    for cause in CAUSES.values():
        first.setdefault(cause.sentence, cause)
    for cause in first.values():
        for file, part in (cause.torch, cause.flax):
            if "FlaxResNetBasicLayerCollection(" not in part:  # the gallery quotes that class itself
                assert any(file == other and part in line for other, line in quoted), (file, part)


def test_verdicts_and_lines_are_those_of_the_zoo():
    zoo = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert f"transformers {VERSION}" in zoo
    for name in re.findall(r"^(\w+): DIFFERS", TEXT.partition("## Classics")[0], re.M):
        assert f"| {name} | differs |" in zoo


@pytest.mark.parametrize(
    ("side", "file", "line", "code"), QUOTES, ids=[f"{file}:{line}" for _, file, line, _ in QUOTES]
)
def test_quotes_are_exact(side, file, line, code):
    spec = importlib.util.find_spec("transformers")
    if spec is None or importlib.metadata.version("transformers") != VERSION:
        pytest.skip(f"needs transformers {VERSION}, as make zoo installs it")
    lines = (Path(spec.origin).parent / file).read_text(encoding="utf-8").splitlines()
    assert textwrap.dedent("\n".join(lines[line - 1 : line - 1 + len(code.splitlines())])) == code.rstrip("\n")
