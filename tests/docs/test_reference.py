"""The generated pages: every public name and every command has an entry, and docstrings become lists of arguments."""

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest

import jaxmodels
import parity

pytest.importorskip("mkdocs")
griffe = pytest.importorskip("griffe")

from docs.tools import commands, hooks, reference  # noqa: E402
from docs.tools.docstrings import as_list  # noqa: E402
from tests.docs.test_python import PAGES, blocks  # noqa: E402

ROOT = Path(__file__).parents[2]
# The public contract beside that of the two packages.
CONTRACT = """
jaxmodels.rope: RotaryPositionalEmbeddings RotaryPEMultiHeadAttention RotaryValuePEMultiHeadAttention
jaxmodels.transformer: MultiHeadAttention RelativeMultiHeadAttention TransformerLayer Encoder AutoregressiveTransformer
jaxmodels.feedback: FeedbackAttention FeedbackTransformerLayer FeedbackTransformer FeedbackTransformerKV
jaxmodels.feedback: AutoregressiveModel
jaxmodels.retro: NearestNeighborEncoder RetroModel
jaxmodels.neox: NeoXConfig NeoX quantize
jaxmodels.synthesizer: DenseSynthesizer SynthesizerAttention
jaxmodels.generate: generate
jaxmodels.convert: from_torch to_torch load_into_torch
jaxmodels.convert.neox: load_neox save_neox
jaxmodels.convert.hf: load_hf save_hf
"""


def contract() -> set[str]:
    lines = [line.split(": ") for line in CONTRACT.strip().splitlines()]
    names = {f"{module}.{name}" for module, listed in lines for name in listed.split()}
    own = {f"{m.__name__}.{name}" for m in (jaxmodels, parity) for name in m.__all__ if name != "__version__"}
    return names | own


def test_every_public_name_has_an_entry():
    assert contract() <= reference.public().keys()


@pytest.mark.parametrize("name", reference.public())
def test_an_entry_exists_and_is_documented(name):
    module, _, attribute = name.rpartition(".")
    assert (getattr(importlib.import_module(module), attribute).__doc__ or "").strip()


def test_what_pages_import_has_an_entry():
    """Names of the two packages in the Python blocks of the guides."""
    imported = set()
    for page in PAGES:
        for block in blocks(page):
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("jaxmodels", "parity"):
                    imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert len(imported) > 10
    assert imported <= reference.public().keys()


def test_every_command_and_flag_has_an_entry():
    text = {page: make() for page, make in commands.PAGES.items()}
    of_jaxmodels = text["reference/command-jaxmodels.md"]
    assert re.findall(r"^## jaxmodels ([\w-]+)$", of_jaxmodels, re.M) == list(commands.COMMANDS)
    assert "### jaxmodels convert neox\n" in of_jaxmodels
    for flag in ("--strip-prefix PREFIX", "--repetition-penalty", "--stride", "--delete"):
        assert f"`{flag}" in of_jaxmodels, flag
    assert "`--trajectory OPTIMIZER …`" in text["reference/command-parity.md"]
    scripts = text["reference/scripts.md"]
    assert re.findall(r"^## train\.(\w+)$", scripts, re.M) == [*commands.EXPERIMENTS, "plan"]
    for flag in ("--mesh", "--learning-rate", "--topology", "--lora-rank", "--text"):
        assert len(re.findall(rf"^`{flag} ", scripts, re.M)) >= 1, flag
    assert re.search(r"^\| `--n-layers` \| ", scripts, re.M)  # a preset's value


def test_a_help_text_is_escaped_and_an_argument_without_help_is_listed():
    parser = argparse.ArgumentParser("p")
    parser.add_argument("--a_b", help="a <b> of *c* | 100%% (default: %(default)s)", default=3)
    parser.add_argument("files", nargs="*", metavar="FILE")
    text = commands.section(parser, "p")
    assert r":   a \<b\> of \*c\* \| 100% (default: 3)" in text
    assert "`[FILE …]`\n:   –" in text


def test_arguments_of_a_docstring_become_a_list():
    text = "Compare.\n\nx: first,\n    indented. y: no\na, b: two\nRaises ValueError if x: no.\n\nnote: prose"
    expected = (
        "Compare.\n\n- `x`: first,\n  indented. y: no\n- `a`, `b`: two\n\nRaises ValueError if x: no.\n\nnote: prose"
    )
    assert as_list(text, {"x", "a", "b"}) == expected
    run_in = "Compare x; b: no.\n\nx: first. a, b: two; c: no. Raises ValueError\nif x is no. More."
    expected = (
        "Compare x.\n\n- `b`: no.\n\n- `x`: first.\n- `a`, `b`: two; c: no.\n\nRaises ValueError\nif x is no. More."
    )
    assert as_list(run_in, {"x", "a", "b"}) == expected
    assert as_list("a, b: two\n    indented.\nProse.\n\nx: first,\nnot indented", {"x", "a", "b"}) == (
        "- `a`, `b`: two\n  indented.\n\nProse.\n\n- `x`: first,\n  not indented"
    )
    assert as_list("Compare.\nx: first,\nnot indented", {"x"}) == "Compare.\n\n- `x`: first,\n  not indented"


@pytest.mark.parametrize(
    ("page", "target", "expected"),
    [
        ("parity/check.md", "../zoo.md", "../zoo.md"),
        ("parity/check.md", "../../examples/gpt2.py", "R/blob/main/examples/gpt2.py"),
        ("security.md", "../SECURITY.md", "project/security.md"),
        ("project/contributing.md", "docs/guides/models.md", "../guides/models.md"),
        ("project/security.md", "docs/security.md", "../security.md"),
        ("index.md", "../jaxmodels", "R/tree/main/jaxmodels"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page, target, expected):
    assert hooks.destination(page, target, "R") == expected


def test_inline_code_that_names_an_entry_is_linked():
    assert hooks.target_of("parity.check(…)") == "reference/parity.md#parity.check"
    assert hooks.target_of("jaxmodels verify SRC DST") == "reference/command-jaxmodels.md#jaxmodels-verify"
    assert hooks.target_of("parity verify A B") == "reference/command-parity.md#parity-verify"
    assert hooks.target_of("jaxmodels of ours") is None
    assert hooks.target_of("check") is None
