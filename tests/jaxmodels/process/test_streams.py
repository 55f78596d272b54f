"""Output that closed pipes, full disks and encodings do not stop."""

import io
import os
import subprocess
import sys

import pytest

from jaxmodels.process.programs import run
from jaxmodels.process.streams import Output, warn
from tests.train_common import ROOT


def test_characters_that_the_encoding_lacks_are_escaped():
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    output = Output(written)
    output.write("7 ñ €\n")
    output.flush()
    assert written.buffer.getvalue() == b"7 \\xf1 \\u20ac\n"
    assert not output.isatty()


def test_a_closed_pipe_is_told_once_and_the_rest_is_discarded():
    reading, writing = os.pipe()
    closed = []
    with open(writing, "w", buffering=1, encoding="utf-8") as stream:
        output = Output(stream, lambda: closed.append(1))
        output.write("first\n")
        assert os.read(reading, 99) == b"first\n"
        os.close(reading)
        for _ in range(3):
            output.write("more\n")
            output.flush()
    assert closed == [1]


def test_other_errors_are_a_warning_and_no_signal(capsys):
    closed = []
    with open("/dev/full", "w", encoding="utf-8") as stream:
        output = Output(stream, lambda: closed.append(1))
        output.write("x" * 100_000)
        output.flush()
    assert closed == []
    assert capsys.readouterr().err.startswith("warning: nothing more is printed: ")


def test_a_warning_has_no_control_characters_and_needs_no_reader(capsys, monkeypatch):
    warn("file \x1b]0;x\x07")
    assert capsys.readouterr().err == "warning: file \\x1b]0;x\\x07\n"
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        warn("unwritten")


def test_a_command_prints_to_any_encoding():
    program = "import sys; from jaxmodels.process.programs import run; sys.exit(run(lambda: print('ñ'), 'command'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xf1\n", b"")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad")])
def test_an_error_needs_no_reader(error, monkeypatch):
    def main() -> None:
        raise error

    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run(main, "command") == (130 if isinstance(error, KeyboardInterrupt) else 2)


def test_a_warning_is_one_line_of_a_bounded_length(capsys):
    warn("checkpoint " + "\n" + "b" * 10**6 + " is skipped")
    line = capsys.readouterr().err
    assert line.startswith(r"warning: checkpoint \nbb")
    assert line.count("\n") == 1
    assert line.endswith("b is skipped\n")
    assert len(line) < 5_000
