"""Reports as plain text."""

import dataclasses
import pickle
import textwrap

import pytest

from jaxmodels.process.texts import visible
from parity.report.report import Differs, Report
from parity.report.results import Check, Reading, Trajectory
from parity.report.text import short, text
from tests.parity.report.samples import HOSTILE, agreeing, differing, hostile


def test_characters_that_steer_a_terminal_are_escaped():
    assert visible("h.0.ln_1 ∂ 日本 é") == "h.0.ln_1 ∂ 日本 é"
    assert visible("a\x1b[2J\r\n\u202eb\ud800\x9b") == r"a\x1b[2J\r\n\u202eb\ud800\x9b"
    assert visible("a\nb\tc", keep="\n") == "a\nb\\tc"


def test_what_differs_comes_first():
    shown = text(differing())
    order = [
        "gpt: DIFFERS",
        "first divergence: model.h.0.ln_1",
        "FAILED parameter gradients (float64): 2e+11 × noise, at most 32, at",
        "FAILED parameter gradients (float32): nan",
        "ok     bits: round trip 0",
        "ok     float64: output 0.3 × noise",
        "ok     float32: output 0.53 × noise, two runs: output 0 × noise",
        "note   float32 inside: model.h.0.table",
        "–      cached decoding: the model has no cache",
        "adam, float64, 3 steps",
    ]
    places = [shown.index(part) for part in order]
    assert places == sorted(places)
    assert str(differing()) == shown


def test_a_report_that_agrees_has_a_line_per_reading():
    lines = text(agreeing()).splitlines()
    assert "output (float32): 0.53 × noise (PyTorch 0.8 × noise), at most 4" in text(agreeing())
    assert lines[0] == "mlp: agrees"
    assert lines[1:] == [f"  {check}" for check in agreeing().checks]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_lines_fit_and_continue_below_their_text(width):
    long = "model.transformer." + "h.0." * 40 + "weight"
    checks = [Check("output", "float64", long, 1.0, 1e-10), *differing().checks]
    report = dataclasses.replace(differing(), checks=checks, notes=("a note " * 30,), sweep=None, trajectories=())
    lines = text(report, width).splitlines()
    assert max(map(len, lines)) <= width
    assert long in "".join(line.strip() for line in lines)
    notes = [i for i, line in enumerate(lines) if line.startswith("  note ")]
    assert lines[notes[0] + 1].startswith(" " * 9)
    assert lines[notes[0] + 1].split()[0] in ("a", "note")
    assert max(map(len, text(dataclasses.replace(report, name=long)).splitlines())) <= 100


def test_a_trajectory_of_adam_fits_80_columns():
    kinds = ("loss", "gradients", "first moment", "second moment", "parameters")
    readings = [Reading(kind, "float64", "w", 1.3e11, 32.0, s) for s in range(30) for kind in kinds]
    lines = str(Trajectory("adam", "float64", readings, {"torch": [1.23456789] * 30, "flax": []}, 1.0, {})).splitlines()
    assert max(map(len, lines)) <= 79
    assert lines[1].split() == ["step", "loss", "(torch)", *" ".join(kinds).split()]
    assert [line.split()[0] for line in lines[2:-1]] == ["0", "1", "2", "5", "10", "20", "29"]


def test_the_short_form_counts_readings_that_agree():
    shown = short(differing())
    assert "4 readings within the limits" in shown
    assert "ok " not in shown
    assert shown.splitlines()[:2] == text(differing()).splitlines()[:2]


def test_no_text_steers_the_terminal():
    for shown in (text(hostile()), short(hostile()), repr(hostile()), "\n".join(textwrap.wrap(text(hostile()), 50))):
        assert not set(HOSTILE) & set(shown) - set("<b>&\"'[red]31m/script\n")


def test_the_exception_is_the_report():
    with pytest.raises(Differs, match="gpt: DIFFERS") as raised:
        differing().raise_if_failed()
    assert isinstance(raised.value, AssertionError)
    assert str(raised.value) == text(raised.value.report)
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value)
    agreeing().raise_if_failed()


def test_the_repr_is_one_line():
    shown = repr(differing())
    assert shown.startswith("<Report gpt: DIFFERS, 2 of 6 readings failed; first divergence: model.h.0.ln_1")
    assert "\n" not in shown
    assert repr(Report("empty", [], 1.0, {})) == "<Report empty: agrees, 0 of 0 readings failed>"
