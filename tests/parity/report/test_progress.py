"""The line that shows the progress."""

import io
import os
import re
import select
import time

import pytest

from parity.report.progress import StatusLine, each


@pytest.fixture
def terminal(monkeypatch):
    """A pseudo-terminal of 50 columns: the stream, and a function that reads what was written."""
    monkeypatch.setenv("TERM", "xterm")
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 50))

    def read():
        written = b""
        while select.select([ours], [], [], 0.05)[0]:
            written += os.read(ours, 100_000)
        return written.decode()

    with os.fdopen(theirs, "w") as stream:
        yield stream, read
    os.close(ours)


def test_a_pipe_gets_a_line_for_each_name_that_ended():
    stream = io.StringIO()
    with StatusLine(stream) as line:
        for name, stage in each(["a", "b\x1b"], line):
            stage("training")
            before = stream.getvalue()
            assert name not in before
    assert re.fullmatch(r"1/2 a: done, \d+ s\n2/2 b\\x1b: done, \d+ s\n", stream.getvalue())


def test_a_pipe_gets_nothing_of_a_single_name():
    stream = io.StringIO()
    with StatusLine(stream) as line:
        for _, stage in each(["a"], line):
            stage("training")
    assert stream.getvalue() == ""


def test_a_terminal_shows_one_line_with_case_stage_and_time(terminal):
    stream, read = terminal
    with StatusLine(stream) as line:
        names = []
        for name, stage in each(["rope.attention", "synthesizer.random+vanilla_language_model"], line):
            names.append(name)
            stage("training\x1b[2J")
    written = read()
    assert "\n" not in written
    parts = written.split("\r\x1b[K")
    assert "1/2 rope.attention  0 s" in parts
    assert r"1/2 rope.attention: training\x1b[2J  0 s" in parts
    assert max(map(len, parts)) < 50
    assert written.endswith("\r\x1b[K"), "the line is erased at the end"
    assert names == ["rope.attention", "synthesizer.random+vanilla_language_model"]


def test_the_time_goes_on_within_a_stage_and_other_output_has_the_line_to_itself(terminal):
    stream, read = terminal
    with StatusLine(stream, interval=0.01) as line:
        line.show("training")
        line.since -= 61
        time.sleep(0.1)
        line.clear()
        seen = read()
        time.sleep(0.05)
        stream.write("output")
        stream.flush()
        assert read() == "output", "a cleared line stays empty"
    assert re.search(r"training  6\d s", seen)


def test_a_terminal_that_cannot_erase_a_line_gets_none(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream, read = terminal
    with StatusLine(stream) as line:
        line.show("training")
    assert read() == ""
