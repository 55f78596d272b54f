"""Tables in the terminal, at several widths."""

import dataclasses
import io

import pytest
from rich.console import Console

from parity.report.columns import READINGS
from parity.report.report import Report
from parity.report.results import Check
from parity.report.terminal import print_failure, summary
from tests.parity.report.samples import HOSTILE, STAMP, agreeing, differing, hostile

NAME = "synthesizer.random+vanilla_language_model"


def shown(reports, width):
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    for report in reports:
        print_failure(report, console)
    summary(reports, console)
    return stream.getvalue()


def table(reports, width):
    """Lines of the first table."""
    lines = shown(reports, width).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["float64"])
    return lines[start:]


def full(name, failing=""):
    """A report with every reading of the first table in float64 and float32."""
    return Report(
        name,
        [
            Check(kind, precision, "output", 3e11 if kind == failing else 0.2 * (i + 1), 32.0)
            for precision in ("float64", "float32")
            for i, kind in enumerate(READINGS.values())
        ],
        12.3,
        STAMP,
    )


@pytest.mark.parametrize("width", [60, 80, 100, 120, 184])
def test_no_line_is_wider_than_the_terminal(width):
    text = shown([full(NAME), full("mlp", failing="output"), agreeing()], width)
    assert max(map(len, text.splitlines())) <= width
    assert "DIFFERS" in text
    assert "12.3" in text
    assert NAME in text.replace("\n", "") or NAME[:12] in text


def test_columns_are_folded_only_if_there_is_no_room():
    reports = [full("mlp", failing="trained parameters")]
    wide, middle, narrow = (table(reports, width) for width in (184, 95, 60))
    assert wide[1].split() == ["case", *READINGS, *READINGS, "result", "s"]
    assert middle[1].split() == ["case", *READINGS, "worst", "result", "s"], "float64 is folded last"
    assert narrow[1].split() == ["case", "worst", "worst", "result", "s"]
    assert narrow[3].split() == ["mlp", "3e+11×", "3e+11×", "DIFFERS", "12.3"], "a failed reading stands for its group"
    assert "named 'worst'" in shown(reports, 60)
    assert "named 'worst'" not in shown(reports, 184)


def test_names_are_neither_markup_nor_control_characters():
    text = shown([hostile(), agreeing("[bold]mlp[/bold]")], 100)
    assert "[bold]mlp[/bold]" in text
    assert "[red]" in text
    assert not set(HOSTILE) & set(text) - set("<b>&\"'[red]31m/script\n")


def test_sweeps_and_trajectories_fit_too():
    assert max(map(len, shown([dataclasses.replace(differing(), checks=[])], 60).splitlines())) <= 60


def test_a_failed_report_is_printed_once():
    assert shown([differing()], 100).count("adam, float64, 3 steps") == 1
