"""What pytest prints for a test whose pair differs; the pairs' reports are made without a run."""

import contextlib
import re
import types

import pytest

import parity
from parity.plugin import show_stage
from tests.parity.report.samples import differing

pytest_plugins = ["pytester"]
PORT = """
import pytest, parity

@pytest.mark.parity_case()
def test_marked():
    return None, None, None

def test_fixture(parity_check):
    parity_check(None, None, None)

def test_direct():
    parity.check().raise_if_failed()

def test_assert():
    assert parity.check().passed

@pytest.mark.parity_sweep()
def test_nothing():
    return None

def test_bug():
    raise ValueError("of the test itself")

@pytest.mark.xfail(strict=True)
def test_expected(parity_check):
    parity_check(None, None, None)
"""


@pytest.fixture
def printed(pytester, monkeypatch):
    """Run tests of PORT by name and return what pytest printed."""
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setitem(vars(parity), "check", lambda *values, **arguments: differing())
    pytester.makepyfile(test_port=PORT)

    def run(name, *arguments):
        done = pytester.runpytest_inprocess("-p", "parity.plugin", "-p", "no:cacheprovider", "-k", name, *arguments)
        return done.stdout.str()

    return run


@pytest.mark.parametrize(("name", "line"), [("marked", 3), ("fixture", 8), ("direct", 11)])
def test_what_differs_is_shown_without_frames(printed, name, line):
    text = printed(f"test_{name}")
    shown = text.partition(f"_ test_{name} _")[2].partition("short test summary")[0].splitlines()[1:]
    assert shown[0] == "gpt: DIFFERS"
    assert shown[1].startswith("  first divergence: model.h.0.ln_1")
    assert [row.split(":")[0] for row in shown if "FAILED" in row] == [
        f"  FAILED parameter gradients ({dtype})" for dtype in ("float64", "float32")
    ]
    assert f"test_port.py:{line}" in shown
    assert not any(frame in text for frame in ("plugin.py", "raise_if_failed", "Traceback", "def test_", "  ok "))
    assert re.search(rf"FAILED test_port.py::test_{name} - gpt: first divergence: model", text)


def test_more_verbosity_shows_the_whole_report_and_the_tree(printed):
    text = printed("test_marked", "-v")
    assert "ok     float64: output 0.3 × noise" in text
    assert "note   float32 inside" in text
    assert "h.0  encloses" in text
    report = text.partition("_ test_marked _")[2].partition("short test summary")[0]
    assert max(map(len, report.splitlines()[1:])) <= 90


def test_the_traceback_can_be_asked_for(printed):
    assert "plugin.py" in printed("test_marked", "--full-trace")


def test_a_traceback_of_one_line_is_one_line(printed):
    text = printed("test_marked", "--tb=line")
    shown = text.partition("= FAILURES =")[2].partition("short test summary")[0].splitlines()[1:-1]
    assert [line.split(" (")[0] for line in shown if "pairs agree" not in line] == [
        "test_port.py:3: gpt: first divergence: model.h.0.ln_1"
    ]


def test_an_assertion_shows_one_line_of_the_report(printed):
    text = printed("test_assert")
    assert "<Report gpt: DIFFERS, 2 of 6 readings failed; first divergence" in text
    assert "Check(" not in text


def test_refused_arguments_are_one_line_and_other_errors_keep_their_frames(printed):
    text = printed("test_nothing")
    assert "\nValueError: parity_sweep: the test returned NoneType" in text
    assert "plugin.py" not in text
    assert "hidden" not in text
    assert '    raise ValueError("of the test itself")' in printed("test_bug")


def test_expected_failures_stay_expected(printed):
    assert "1 xfailed" in printed("test_expected")


@pytest.mark.parametrize(("verbosity", "terminal"), [(1, True), (0, True), (1, False)])
def test_stages_are_shown_with_v_in_a_terminal(request, capsys, monkeypatch, verbosity, terminal):
    reporter = types.SimpleNamespace(isatty=terminal)
    capture = types.SimpleNamespace(global_and_fixture_disabled=contextlib.nullcontext)
    plugins = {"terminalreporter": reporter, "capturemanager": capture}
    with monkeypatch.context() as patched:
        patched.setattr(request.config.pluginmanager, "getplugin", plugins.get)
        patched.setattr(request.config, "get_verbosity", lambda: verbosity)
        patched.setenv("TERM", "xterm")
        patched.setenv("COLUMNS", str(len(request.node.nodeid) + 12))
        show_stage(request.node, "check", "training loss")
        show_stage(request.node)
    shown = "\x1b7check trai\x1b[K\x1b8\x1b7\x1b[K\x1b8"
    assert capsys.readouterr().out == (shown if verbosity and terminal else "")
