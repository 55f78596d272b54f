"""Python blocks of the pages: each is compiled, its imports and names exist, and it runs in the order of its page.

A comment before a block says otherwise: `<!-- not run: REASON -->`, or `<!-- raises NAME -->`.
"""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docs.setups import SETUPS, nothing

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")]
)
BLOCK = re.compile(
    r"(?:<!-- (not run|raises):? ([^>]+?) -->\n)?^```python\n(.*?)^```(?:\n\n```\n(.*?)^```)?", re.M | re.S
)


class Block(NamedTuple):
    """A Python block: what is said about it before, its code, and the block without a language that follows it."""

    kind: str
    about: str
    code: str
    output: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(*(part or "" for part in match.groups())) for match in BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"^```python$", text, re.M))
    return found


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_compile_and_their_imports_exist(page):
    for block in blocks(page):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:  # an attribute, or a module that is not imported yet
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


@pytest.mark.parametrize("page", WITH_CODE)
def test_a_block_that_is_not_run_says_why(page):
    assert all(len(block.about) > 10 for block in blocks(page) if block.kind == "not run")


def test_the_site_begins_with_the_example_of_the_readme():
    ours, readme = blocks("docs/index.md")[0], blocks("README.md")[0]
    assert ours.code == readme.code
    assert readme.output.startswith(ours.output.partition("…")[0])


def without_numbers(text: str) -> str:
    """A report's text in one line, its measured numbers left out."""
    return re.sub(r"[\d.]+(e[+-]\d+)?", "N", " ".join(text.split()))


@pytest.mark.slow  # runs the harness, compiles models
@pytest.mark.filterwarnings("default")  # of the libraries that a page uses
@pytest.mark.parametrize("page", [page for page in WITH_CODE if page != "docs/parity/pytest.md"])
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = SETUPS.get(page, nothing)()
    capsys.readouterr()
    for block in blocks(page):
        code = compile(block.code, page, "exec")
        if block.kind == "not run":
            continue
        if block.kind == "raises":
            with pytest.raises(Exception, match=r".+") as raised:
                exec(code, namespace)
            assert type(raised.value).__name__ == block.about
            continue
        exec(code, namespace)
        printed = capsys.readouterr().out
        if "DIFFERS" in block.output:  # a whole report, or its beginning
            shown = without_numbers(block.output.partition("…")[0])
            assert without_numbers(printed).startswith(shown)
    for name, value in namespace.items():
        if name.startswith("test_"):
            value()


@pytest.mark.slow
def test_the_test_files_of_the_page_on_the_plugin_pass(tmp_path):
    """The first block is a test file; the second is one with what is defined in the first, and a fixture."""
    first, second = (block.code for block in blocks("docs/parity/pytest.md"))
    pair = first.partition("@pytest.mark")[0]
    (tmp_path / "test_pair.py").write_text(first, encoding="utf-8")
    (tmp_path / "test_fixture.py").write_text(f"{pair}\n{second}", encoding="utf-8")
    (tmp_path / "fixtures").mkdir()
    (tmp_path / "record.py").write_text(
        f"{pair}\nimport parity\nparity.record(TorchMLP(), {{'x': x}}, 'fixtures/mlp')\n"
    )
    for command in (["record.py"], ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "parity.plugin", "."]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
