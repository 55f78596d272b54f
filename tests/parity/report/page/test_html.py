"""The HTML page and its part for notebooks: structure, escapes, colors."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from parity.report.page.charts import VERDICTS, color, curves
from parity.report.page.html import fragment, page
from parity.report.page.style import PALETTE, ROOT, STYLE
from parity.report.results import Reading, Trajectory
from tests.parity.report.samples import HOSTILE, STAMP, agreeing, differing, hostile

VOID = {"meta", "br", "rect", "line", "polyline"}


class Outline(HTMLParser):
    """Checks that elements are nested correctly; lists elements with their attributes and ancestors, and the text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), [name for name, _ in self.open], [c for _, c in self.open]))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class", "")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if not self.open or self.open[-1][0] != "style":
            self.text += data

    def all(self, tag):
        """Attributes of the elements of a kind, outside of drawings."""
        return [attributes for name, attributes, above, _ in self.found if name == tag and "svg" not in above]


def without_style(html):
    return re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize("reports", [[agreeing()], [differing()], [agreeing(), differing(), hostile()]])
def test_the_page_is_well_formed_and_accessible(reports):
    html = page(reports)
    outline = Outline(html)
    assert outline.all("html") == [{"lang": "en"}]
    assert len(outline.all("title")) == len(outline.all("h1")) == len(outline.all("main")) == 1
    levels = [int(tag[1]) for tag, *_ in outline.found if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    assert all(attributes["scope"] in ("col", "row") for attributes in outline.all("th"))
    for tag, _, _, classes in outline.found:
        assert tag != "table" or "scroll" in classes, "a table scrolls by itself"
    regions = [attributes for attributes in outline.all("div") if attributes.get("class") == "scroll"]
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in regions)
    assert not re.search(r"\b(src|href)\s*=(?!\"#)|url\(|@import|<script", html)


def test_a_report_that_stands_alone_is_open_and_among_others_if_it_failed():
    assert "<details" not in page([agreeing()])
    assert "round trip" in page([agreeing()])
    alone = Outline(page([differing()]))
    assert next(parents for tag, _, parents, _ in alone.found if tag == "table").count("details") == 0
    html = page([agreeing("good"), differing("wrong")])
    opened = {name: bool(mark) for mark, name in re.findall(r"<details( open)?><summary><h2>(\w+)</h2>", html)}
    assert opened == {"good": False, "wrong": True}
    links = [attributes["href"] for attributes in Outline(html).all("a")]
    ids = [attributes["id"] for attributes in Outline(html).all("div") if "id" in attributes]
    assert links == [f"#{name}" for name in ids], "each name leads to its report"
    assert len(set(ids)) == 2


def test_the_page_has_date_versions_notes_and_what_was_not_compared():
    text = Outline(page([differing()])).text
    for shown in (STAMP["date"], "torch 2.13.0", "jax 0.10.2", "float32 inside: model.h.0.table"):
        assert shown in text
    assert "cached decoding: the model has no cache" in text
    assert text.index("first divergence: model.h.0.ln_1") < text.index("parameter gradients") < text.index("Notes")


def test_sub_modules_have_full_paths_and_a_legend():
    html = page([differing()])
    outline = Outline(html)
    tree = html[html.index('<ul class="tree">') :]
    for path in ("model.h.0.ln_1", "model.h.3", "model.drop", "90% of the model's error", "has another shape"):
        assert path in outline.text
    assert "blocks.0" in tree, "Flax's name, which differs"
    assert "in the run 1e+13×" in tree, "the error in units of the noise"
    assert "not compared" in outline.text
    legend = html[html.index('<dl class="legend">') :].partition("</dl>")[0]
    assert [legend.count(f">{shown}</span>") for shown, _ in VERDICTS.values()] == [1] * len(VERDICTS)
    assert '<dl class="legend">' not in page([agreeing()])


def test_the_tree_is_open_down_to_the_culprits_that_matter_and_the_first_shows_all_its_errors():
    html = page([differing()])
    tree = html[html.index('<ul class="tree">') :].partition('<dl class="legend">')[0]
    opened = re.findall(r"<details open><summary><span><code>.*?<b>([\w. ]*)</b>", tree)
    assert opened == ["the model", "0", "ln_1", "1"]


def test_a_notebook_shows_the_body_of_the_page():
    report = differing()
    shown = report._repr_html_()
    assert shown == fragment(report)
    assert shown.startswith('<div class="parity">')
    assert not re.search(r"<(html|head|body|meta)\b", shown)
    Outline(shown)
    body = without_style(shown).partition("<main>")[2].partition("</main>")[0]
    assert body
    assert body in page([report])


def test_every_text_is_escaped():
    html = page([hostile(), agreeing()])
    outline = Outline(html)
    assert r"<b>&" in outline.text
    assert r"[red]\x00\x1b[31m\x07\r\n\t\x85\u202e\u2028\ud800\uffff" in outline.text
    assert '<b>&"' not in html
    assert "<b>&amp;" not in html
    assert not set(HOSTILE) & set(html) - set("<b>&\"'[red]31m/script\n")
    html.encode("utf-8")
    assert r"\x1b" in fragment(hostile())


def test_curves_are_on_a_logarithmic_scale_with_zeros_at_the_bottom():
    values = {"loss": (1e-3, 1e1, 0.0), "moments": (float("inf"), float("nan"), 1e0)}
    readings = [Reading(kind, "float64", "w", values[kind][s], 1e1, s) for s in range(3) for kind in values]
    run = Trajectory("adam", "float64", readings, {"torch": [1.0, 0.9, 0.8], "flax": [1.0, 0.9, 0.8]}, 1.0, {})
    svg = curves(run)
    lines = [[tuple(map(float, p.split(","))) for p in found.split()] for found in re.findall(r'points="([^"]*)"', svg)]
    (loss, moments), (low, high) = lines, ("1e-3", "1e1")
    assert [x for x, _ in loss] == [0, 150, 300]
    assert [y for _, y in loss] == [120, 0, 120]
    assert [y for _, y in moments] == [0, 0, 30]
    assert f">{low}<" in svg
    assert f">{high}<" in svg


def rules():
    """(conditions, selector, declarations) of every rule in the style."""
    found, conditions, rest = [], [], STYLE
    while match := re.match(r"\s*(?:(})|([^{}]+)\{(?:([^{}]*)\})?)", rest):
        end, head, declarations = match.groups()
        if end:
            conditions.pop()
        elif declarations is None:
            conditions.append(head.strip())
        else:
            values = dict(d.strip().split(":", 1) for d in declarations.split(";") if d.strip())
            found += [
                (tuple(conditions), s.strip(), {k: v.strip() for k, v in values.items()}) for s in head.split(",")
            ]
        rest = rest[match.end() :]
    assert not rest.strip()
    assert not conditions
    return found


def test_no_style_leaves_the_report():
    assert len(rules()) > 80
    assert all(ROOT in selector for _, selector, _ in rules())


def luminance(value):
    channels = (int(value[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def variables(*conditions):
    """Colors of the scheme that holds under the conditions."""
    return next(
        found for given, selector, found in rules() if (given, selector) == (conditions, ROOT) and "--page" in found
    )


@pytest.mark.parametrize("conditions", [(), ("@media (prefers-color-scheme: dark)",)], ids=["light", "dark"])
def test_text_has_the_contrast_of_level_aa(conditions):
    colors = {f"var({name})": value for name, value in variables(*conditions).items() if name.startswith("--")}
    assert len(colors) == len(PALETTE)
    by_selector = {}
    for _, selector, declarations in rules():
        by_selector.setdefault(selector.removeprefix(ROOT).strip(), {}).update(declarations)
    behind = ["var(--page)", "var(--panel)"]  # backgrounds of text that has none of its own
    pairs = []
    for selector, declarations in by_selector.items():
        text = declarations.get("fill" if selector.startswith("svg text") else "color", "")
        background = declarations.get("background", "")
        if text.startswith("var") and selector != ".heat td.value":
            pairs += [(selector, text, b) for b in ([background] if background.startswith("var") else behind)]
    assert {selector for selector, *_ in pairs} >= {
        "",
        ".bad",
        ".good",
        ".dim",
        ".tag.culprit",
        ".tag",
        "svg text",
        "dt",
    }
    for selector, text, background in pairs:
        assert contrast(colors[text], colors[background]) >= 4.5, (selector, text, background)
    for name in colors:
        if "series" in name or name in ("var(--focus)", "var(--good)", "var(--bad)"):
            assert contrast(colors[name], colors["var(--page)"]) >= 3, f"{name} as a line"
    for share in (0.0, 0.1, 0.5, 1.0, 1.01, 30.0, 1e4, 1e11, float("inf")):
        assert contrast(colors["var(--on-heat)"], rgb(color(share))) >= 4.5, share


def rgb(hsl):
    import colorsys

    hue, saturation, light = map(float, re.fullmatch(r"hsl\((\d+) (\d+)% (\d+)%\)", hsl).groups())
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue / 360, light / 100, saturation / 100))


def test_applications_with_a_scheme_of_their_own_decide():
    for selector, page_color in (
        ("[data-jp-theme-light=false]", PALETTE["page"][1]),
        ("[data-jp-theme-light=true]", PALETTE["page"][0]),
    ):
        (found,) = [d for given, s, d in rules() if not given and s == f"{selector} {ROOT}"]
        assert found["--page"] == page_color
