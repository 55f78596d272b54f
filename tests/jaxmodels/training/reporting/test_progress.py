"""The progress of a run, on a terminal and elsewhere."""

import io
import re

import pytest
from rich.console import Console

from jaxmodels.training.reporting import progress
from jaxmodels.training.reporting.progress import Line


def line(console: Console, peak: float | None = None) -> Line:
    return Line(console, 50, 7, tokens=300, flops=6e9, peak=peak)


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_before_the_first_step_and_averages_are_labeled(terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=200, highlight=False)
    with line(console, peak=1e12) as found:
        assert found.text() == "step 7/50"
        with found.doing("compiling"):
            assert found.text() == "step 7/50, compiling for 0 s"
        for loss in (3.0, 2.0):
            found.advance(loss, 0.5)
        assert found.text() == "step 9/50, loss 2.500 (mean of 2 steps), 600 tokens/s, 1% of peak, 0:00:20 left"
        for _ in range(20):
            found.advance(1.5, 0.25, share=0.5)
        assert "loss 1.500 (mean of 20 steps), 600 tokens/s" in found.text()
    assert "nan" not in shown.getvalue()
    assert "step 29/50" in shown.getvalue()
    assert "loss 1.500 (mean of 20 steps)" in shown.getvalue()


def test_a_narrow_terminal_shows_steps_and_time_whole():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=70, highlight=False, color_system=None)
    with Line(console, 300_000, 0, tokens=2**19, flops=6e9, peak=1e12) as found:
        for _ in range(20):
            found.advance(2.5, 0.25)
        found.update()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).strip().splitlines()[-1]
    assert re.search(r"step 20/300000 .*loss 2\.500 .* \d+:\d\d:\d\d left$", last), last


def test_without_a_terminal_there_is_a_line_every_few_seconds(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    shown = io.StringIO()
    with line(Console(file=shown, highlight=False)) as found, found.doing("compiling"):
        while shown.getvalue().count("\n") < 3:
            pass
    assert re.fullmatch(r"(step 7/50, compiling for 0 s\n){3,}", shown.getvalue())
