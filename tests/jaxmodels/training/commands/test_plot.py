"""Plots of runs of others: names, numbers and targets that are not what a run has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmodels.training import metrics
from jaxmodels.training.commands import plot
from tests.jaxmodels.io.full_disk import full_disk

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[4]
LINES = [{"step": 1, "loss": 2.5}, {"step": 2, "validation_loss": 2.25}]


def run(folder, *lines):
    """A run with lines of metrics, texts or objects."""
    folder.mkdir(parents=True)
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines or LINES]
    (folder / "metrics.jsonl").write_text("".join(texts))
    return folder


@pytest.mark.parametrize("name", ["$\\frac{$", "a$x^^$b", "a\x1b]0;hidden\x07", "_hidden", "\ud800", "\u4e2d" * 80])
def test_a_name_is_drawn_as_it_is_and_printed_with_escapes(name, tmp_path, capfd):
    folder = tmp_path / os.fsdecode(name.encode("utf-8", "surrogatepass"))
    run(folder)
    assert plot.main([str(folder), "--out", str(folder / "curves.svg")]) == 0
    printed, warned = capfd.readouterr()
    assert (printed.strip().isprintable(), printed.count("\n"), warned) == (True, 1, "")


@pytest.mark.parametrize("step", [0, 2**63 - 1])
def test_the_largest_numbers_are_drawn_without_a_warning(step, tmp_path, capfd):
    lines = [{"step": 0, "loss": -3.4e38}, {"step": step, "loss": 3.4e38}, {"step": 1, "loss": None}]
    lines += [{"step": 2, "loss": float("nan")}, {"step": 3, "loss": -float("inf")}]
    folder = run(tmp_path / "run", *lines)
    assert plot.main([str(folder), "--out", str(tmp_path / "curves.png")]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("loss", ["1e308", "-1e39", "1" * 40, "true", '"\x1b[31m"', "[2]"])
def test_a_loss_that_no_run_writes_is_refused(loss, tmp_path):
    folder = run(tmp_path / "run", f'{{"step": 1, "loss": {loss}}}\n'.replace("\x1b", "\\u001b"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1, is .* expected an object with a step and numbers"):
        plot.curves(folder)


def test_more_unreadable_lines_than_kills_leave_are_refused(tmp_path):
    folder = run(tmp_path / "run", "\n" * metrics.MOST_UNREADABLE, LINES[0])
    assert [line["loss"] for line in metrics.read(folder)] == [2.5]
    (folder / "metrics.jsonl").write_bytes(b"\n" * 2**29)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has more than 1,000 lines that are not JSON"):
        metrics.read(folder)


def test_zeros_at_the_end_are_no_line(tmp_path):
    folder = run(tmp_path / "run", LINES[0])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(bytes(3 * metrics.LINE))
    assert [line["loss"] for line in metrics.read(folder)] == [2.5]
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, has more than 65,536 bytes"):
        metrics.read(folder)


@pytest.mark.parametrize("name", ["curves.pgf", "curves.eps", "curves.\x1b[31m", "curves.png\n"])
def test_another_format_is_refused_before_any_work(name, tmp_path, capsys):
    assert plot.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m train.plot: out=")
    assert error.endswith("must end in .png, .svg, .pdf\n")


def test_a_device_is_not_replaced(tmp_path):
    folder = run(tmp_path / "run")
    os.mkfifo(tmp_path / "curves.png")
    with pytest.raises(ValueError, match=r"curves\.png is a FIFO"):
        plot.draw([folder], tmp_path / "curves.png")


def test_settings_in_the_current_folder_have_no_effect(tmp_path, monkeypatch):
    """They may have texts drawn by LaTeX, which is then started."""
    import matplotlib

    folder = run(tmp_path / "run")
    with matplotlib.rc_context({"text.usetex": True, "text.latex.preamble": r"\nonsense"}):
        plot.draw([folder], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_file_of_settings_in_the_current_folder_is_not_opened(tmp_path):
    run(tmp_path / "run")
    os.mkfifo(tmp_path / "matplotlibrc")
    program = "import sys; from jaxmodels.training.commands import plot; sys.exit(plot.main(['run']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "curves.png: 1 run\n", "")


def test_a_long_curve_keeps_its_lowest_and_highest_points(tmp_path):
    losses = [2.0] * (3 * plot.MARKS)
    losses[1001], losses[4001], losses[-1] = 9.0, 1.0, 3.0
    lines = [{"step": i, "validation_loss": loss} for i, loss in enumerate(losses)]
    _, validation = plot.curves(run(tmp_path / "run", *LINES, *lines))
    assert len(validation) == plot.MARKS + 1
    assert {(1001, 9.0), (4001, 1.0), (len(losses) - 1, 3.0)} <= set(map(tuple, validation))
    assert (validation[1:, 0] >= validation[:-1, 0])[1:].all()


@pytest.mark.parametrize("kind", ["pdf", "png", "svg"])
def test_a_full_disk_is_one_line_for_every_format(kind, tmp_path, capsys):
    folder, out = run(tmp_path / "run"), tmp_path / f"curves.{kind}"
    with full_disk():
        assert plot.main([str(folder), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert (said.count("\n"), str(out) in said, "too large" in said) == (1, True, True)
    assert not list(tmp_path.glob("*curves*"))
