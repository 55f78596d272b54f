"""The annotated pages: passages of the sources in pairs, equations, figures, colors."""

import html
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

markdown = pytest.importorskip("markdown")
pytest.importorskip("latex2mathml")

from docs.tools import annotate  # noqa: E402

PAGES = sorted(page for page in annotate.PAGES.glob("*.md") if page.name != "index.md")
PASSAGES = annotate.collect()


def built(page: Path) -> str:
    text, pieces = annotate.prepare(page.read_text(encoding="utf-8"), PASSAGES)
    return annotate.fill(markdown.markdown(text, extensions=["extra"]), pieces)


def tree(root: Path, torch: str, flax: str) -> Path:
    for package, source in (("torch_ref", torch), ("jaxmodels", flax)):
        (root / package).mkdir()
        (root / package / "m.py").write_text(source, encoding="utf-8")
    return root


def page(root: Path, text: str) -> str:
    (root / "style.css").write_text("")
    prepared, pieces = annotate.prepare(text, {"a.b": {}}, root)
    return annotate.fill(markdown.markdown(prepared, extensions=["extra"]), pieces)


def test_every_passage_is_on_a_page_and_every_page_has_passages():
    shown = {page.stem: annotate.names_in(page.read_text(encoding="utf-8")) for page in PAGES}
    assert shown
    assert all(shown.values())
    assert {name for names in shown.values() for name in names} == set(PASSAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_complete(page):
    text = built(page)
    rows = len(annotate.names_in(page.read_text(encoding="utf-8")))
    assert text.count('class="annotated-code"') == 2 * rows
    assert text.count('class="annotated-row"') == rows
    assert text.count("<svg") >= 1
    assert "<math" in text
    words = re.sub(r"<(style|pre|svg|math).*?</\1>", "", text, flags=re.S)
    assert not re.search(r"PIECE|SPAN|\$|<!--|markdown=", words)


@pytest.mark.parametrize("name", PASSAGES)
def test_a_passage_is_linked_to_its_first_line(name):
    for piece in (piece for pieces in PASSAGES[name].values() for piece in pieces):
        lines = (annotate.ROOT / piece.file).read_text(encoding="utf-8").splitlines()[piece.first - 1 : piece.last]
        assert piece.code.splitlines()[0] == lines[0].strip()
        shown = annotate.code_box("title", [piece])
        assert f"/blob/main/{piece.file}#L{piece.first}-L{piece.last}" in shown
        code = html.unescape(re.sub(r"<[^>]+>", "", shown[shown.index("<pre") :]))
        assert code.split() == piece.code.split()


def test_a_passage_ends_with_its_definition_or_its_paragraph(tmp_path):
    torch = "# [a.whole]\n@f\ndef g(x):\n    # [a.part]\n    y = x\n    z = y\n\n    return z\n\n\nw = 1\n"
    torch += "# [a.part]\nv = 2\nu = 3\n"
    flax = "class G:\n    # [a.whole]\n    def g(x):\n        return x\n\n    h = 1\n\n    def i(x):\n"
    flax += "        for _ in x:\n            # [a.part]\n            pass\n        return x\n"
    found = annotate.collect(tree(tmp_path, torch, flax))
    pieces = {name: {side: [(p.first, p.last) for p in ps] for side, ps in s.items()} for name, s in found.items()}
    assert pieces == {
        "a.whole": {"torch": [(2, 8)], "flax": [(3, 4)]},
        "a.part": {"torch": [(5, 6), (13, 14)], "flax": [(11, 11)]},
    }
    assert "[a.part]" not in found["a.whole"]["torch"][0].code
    assert found["a.whole"]["flax"][0].where == "G.g"
    assert found["a.part"]["flax"][0].where == "G.i"


def test_checks_and_long_docstrings_are_shortened(tmp_path):
    source = '''# [a.b]
def f(x):
    """First.

    More.
    """
    if x:
        raise ValueError(
            x
        )
    assert x
    if x:
        y = 1
    return y
'''
    found = annotate.collect(tree(tmp_path, source, source))
    code = 'def f(x):\n    """First."""\n    # …\n    if x:\n        y = 1\n    return y'
    assert found["a.b"]["flax"][0].code == code


@pytest.mark.parametrize(
    ("torch", "flax", "expected"),
    [
        ("# [a.b]\nx = 1\n", "x = 1\n", r"a\.b .*torch_ref/m\.py:2 \(torch\)"),
        ("x = 1\n", "# [a.b]\nx = 1\n", r"a\.b .*jaxmodels/m\.py:2 \(flax\)"),
        ("# [a.b]\nx = 1\n", "# [a.b]\nx = 1\n# [a.b: third]\ny = 1\n", r"a\.b .*m\.py:4 \(third\)"),
        ("# [a.b]\n\nx = 1\n", "# [a.b]\nx = 1\n", r"torch_ref/m\.py:1 marks a\.b"),
        ("# [a.b]\nx = 1\n", "x = 1\n# [a.b]\n", r"jaxmodels/m\.py:2 marks a\.b"),
    ],
    ids=["torch alone", "flax alone", "three sides", "nothing follows", "end of file"],
)
def test_a_passage_without_its_twin_is_refused(tmp_path, torch, flax, expected):
    with pytest.raises(ValueError, match=expected):
        annotate.collect(tree(tmp_path, torch, flax))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_equations_are_valid_mathml(page):
    children = {"msub": 2, "msup": 2, "mfrac": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
    for text in re.findall(r"<math.*?</math>", built(page), re.S):
        for element in ET.fromstring(text).iter():
            name = element.tag.partition("}")[2]
            assert len(element) == children.get(name, len(element)), text


def test_a_page_that_names_an_unknown_passage_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.c"):
        page(tmp_path, "# T\n\n## A\n\n<!-- passage: a.c -->\n")


def test_code_and_prices_are_not_equations(tmp_path):
    text = page(tmp_path, "# T\n\n`$a$` and $b$\n\n```\n$c$\n```\n")
    assert text.count("<math") == 1
    assert "<code>$a$</code>" in text
    assert "$c$" in text


@pytest.mark.parametrize("tex", [r"\nosuchcommand x", r"\begin{aligned} a &= b \end{aligned}"])
def test_an_equation_that_cannot_be_converted_is_refused(tex):
    with pytest.raises(ValueError, match="equation"):
        annotate.mathml(tex, True)


def test_every_figure_is_on_a_page_and_has_a_script():
    used = {match[2] for page in PAGES for match in annotate.FIGURE.finditer(page.read_text(encoding="utf-8"))}
    files = {file.name for file in (annotate.PAGES / "figures").iterdir()}
    scripts = {file.stem for file in (annotate.ROOT / "docs" / "figures").glob("*.py")}
    assert used == files
    assert {Path(name).stem for name in files} <= scripts
    assert all((annotate.PAGES / "figures" / name).stat().st_size < 100_000 for name in files)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_have_the_contrast_of_wcag_aa(scheme):
    style = (annotate.PAGES / "style.css").read_text(encoding="utf-8")
    colors = dict(re.findall(r"(--[\w-]+): (#\w{6})", re.findall(r"^[:\[][^{]+\{(.*?)^\}", style, re.M | re.S)[scheme]))
    pairs = [(name, "--code-bg") for name in colors if name.startswith("--code-") and name != "--code-bg"]
    for name, back in [*pairs, ("--figure-ink", "--figure-back"), ("--figure-soft", "--figure-back")]:
        dark, light = sorted(luminance(colors[one]) for one in (name, back))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name
