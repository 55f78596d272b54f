"""Columns: one list for the terminal, HTML, JSON and JUnit XML."""

import io
import json
import re
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

import parity
from parity.measure.invariances import VARIANTS
from parity.report.columns import COUNT, NOISE, TABLES, Column, Unit, legend, tables, unit_of
from parity.report.report import Report
from parity.report.results import Check
from parity.report.stamp import software
from parity.report.terminal import summary

CHECKS = [
    Check("output", "float64", "output", 0.8, 32.0),
    Check("output", "float32", "output", 0.512, 4.0, own=0.3),
    Check("jit / no jit", "float64", "output", 0.23, 32.0),
    Check("perplexity", "float32", "logits", 0.03456, 0.01),
]


def outputs(reports, folder):
    """Text of each output."""
    terminal = io.StringIO()
    summary(reports, Console(file=terminal, width=200))
    files = {"json": folder / "out.json", "junit": folder / "out.xml", "page": folder / "out.html"}
    parity.write(*reports, **files)
    return {"terminal": terminal.getvalue()} | {kind: file.read_text() for kind, file in files.items()}


@pytest.fixture
def reports():
    return [
        Report("mlp", CHECKS, 1.0, software()),
        Report("empty", [], 1.0, software()),
    ]


def test_a_new_column_is_in_every_output(reports, monkeypatch, tmp_path):
    before = outputs(reports, tmp_path)
    new = Column("∂perplexity", "perplexity", "float32", Unit("{:.1%} off", "{:.2%} off", "{:.0%}", "a test"))
    monkeypatch.setitem(TABLES, "case", [*TABLES["case"], new])
    after = outputs(reports, tmp_path)
    for kind in after:
        assert "∂perplexity" not in before[kind]
        assert "∂perplexity" in after[kind], kind
        assert "3.5% off" in after[kind], kind
    assert "a test, at most 1%" in after["terminal"]
    assert "a test, at most 1%" in after["page"]
    (cell,) = (c for c in json.loads(after["json"])[0]["columns"] if c["title"] == "float32 ∂perplexity")
    assert cell == {"title": "float32 ∂perplexity", "value": 0.03456, "text": "3.5% off", "passed": False}
    properties = {p.get("name"): p.get("value") for p in ET.fromstring(after["junit"]).iter("property")}
    assert properties["float32 ∂perplexity"] == "3.5% off"
    assert after["page"].count(">3.5% off<") == 2, "in the table of cases and in the case's own"
    assert "perplexity (float32): 3.46% off, at most 1%" in after["junit"]


def test_a_new_unit_is_in_every_output(reports, monkeypatch, tmp_path):
    noise = Unit("{:.0f} × noise", "{:.3g} × noise", "{:g} × noise", "difference / rounding noise")
    monkeypatch.setitem(TABLES, "case", [Column("output", "output", "float32", noise)])
    for text in outputs(reports, tmp_path).values():
        assert "1 × noise" in text
    assert "0.512 × noise (PyTorch 0.3 × noise), at most 4 × noise" in str(CHECKS[1])
    assert legend([CHECKS]) == "float32: difference / rounding noise, at most 4 × noise."


def test_the_terminal_shows_only_columns_with_values(reports, tmp_path):
    text = outputs(reports, tmp_path)["terminal"]
    assert re.search(r"float64 +float32", text)
    assert re.search(r"case +output +output +result", text)
    assert re.search(r"mlp +0\.8× +0\.51× +DIFFERS", text)
    assert re.search(r"empty +– +– +agrees", text)
    assert re.search(r"must not change +jit", text)
    assert "bfloat16" not in text
    assert f"float64, float32: {NOISE.legend}, at most 32, 4." in text


def test_a_table_without_columns_is_left_out_and_all_verdicts_remain(reports, tmp_path):
    text = outputs(reports[1:], tmp_path)["terminal"]
    assert re.search(r"empty +agrees", text)
    assert "must not change" not in text


def test_the_unit_of_a_check_is_its_columns_or_that_of_its_precision():
    assert unit_of(Check("jit / no jit", "float32", "", 0.0, 1e-5)) is NOISE
    assert unit_of(Check("output", "float32", "", 0.0, 4.0)) is NOISE
    assert unit_of(Check("sweep: output", "bfloat16", "", 0.0, 4.0)) is NOISE
    assert unit_of(Check("round trip", "bits", "", 0.0, 0.0)) is COUNT


def test_every_variant_of_the_invariances_has_a_column():
    assert [column.kind for column in TABLES["must not change"]] == list(VARIANTS)


def test_titles_are_unique():
    titles = [column.title for listed in TABLES.values() for column in listed]
    assert len(set(titles)) == len(titles)
    assert dict(tables([[]])) == {"case": [], "must not change": []}
    assert legend([[]]) == ""
