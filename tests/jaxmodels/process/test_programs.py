"""Exit codes of commands."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest

from jaxmodels.process.extras import MissingExtra
from jaxmodels.process.programs import run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def callback():
    """Registers a callback of the garbage collector that receives Ctrl-C, as JAX's may."""

    def interrupted(phase, info):
        if phase == "stop" and calls:
            calls.pop()
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))

    calls = [1]
    gc.callbacks.append(interrupted)
    yield
    gc.callbacks.remove(interrupted)


def test_ctrl_c_during_garbage_collection_ends_the_command(callback, capsys):
    def main():
        gc.collect()
        time.sleep(10)

    began = time.monotonic()
    assert run(main, "command") == 130
    assert time.monotonic() - began < 5
    assert capsys.readouterr().err == "command: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_ends_the_command(capsys):
    assert run(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(10), "command") == 130
    assert capsys.readouterr().err == "command: interrupted\n"


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_code_of_main_is_the_code_of_the_program(returned, code, capsys):
    assert run(lambda: returned, "command") == code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("size=3 must be even"), 2, "command: size=3 must be even\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "command: [Errno 2] No such file: 'x'\n"),
        (ValueError("name='\x1b]0;hidden\x07\u202e'"), 2, "command: name='\\x1b]0;hidden\\x07\\u202e'\n"),
        (MissingExtra("train", ("tyro",)), 2, "command: needs tyro: pip install 'jaxmodels[train]'\n"),
        (MemoryError(), 2, "command: not enough memory\n"),
        (MemoryError("8 TiB"), 2, "command: not enough memory: 8 TiB\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: 8 TiB\nat"), 2, "command: not enough memory: RESOURCE_EXHAUSTED: 8 TiB\n"),
    ],
)
def test_an_expected_failure_is_one_line(error, code, line, capsys):
    assert run(raising(error), "command") == code
    assert capsys.readouterr().err == line


def test_a_very_long_error_is_shortened(capsys):
    assert run(raising(ValueError("first\n" + "x" * 10**6 + " last")), "command") == 2
    line = capsys.readouterr().err
    assert line.startswith(r"command: first\nxx")
    assert line.count("\n") == 1  # its end
    assert line.endswith("x last\n")
    assert len(line) < 5_000


@pytest.mark.parametrize("error", [TypeError("a bug"), RuntimeError("a bug"), SystemExit(2)])
def test_other_exceptions_pass(error):
    with pytest.raises(type(error)):
        run(raising(error), "command")


@pytest.mark.parametrize("command", ["print('x' * 10**6)", "print('x' * 100); sys.exit(0)"])
def test_a_closed_pipe_ends_the_program_quietly(command):
    program = (
        f"import sys\nfrom jaxmodels.process.programs import run\nsys.exit(run(lambda: exec({command!r}), 'command'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_full_disk_under_standard_output_is_one_line(unbuffered):
    program = "import sys\nfrom jaxmodels.process.programs import run\nsys.exit(run(lambda: print('x'), 'command'))"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=buffered | unbuffered,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 2
    assert ended.stderr == "command: standard output: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("closed", "main", "code", "other"),
    [
        (1, "print('x')", 0, ""),
        (1, "print('x'); raise ValueError('bad')", 2, "command: bad\n"),
        (2, "print('x')", 0, "x\n"),
        (2, "raise ValueError('bad')", 2, ""),
    ],
)
def test_a_closed_output_is_a_discarded_one(closed, main, code, other):
    """Python has None instead of the stream, and prints what is for None to standard output."""
    program = (
        f"import sys\nfrom jaxmodels.process.programs import run\nsys.exit(run(lambda: exec({main!r}), 'command'))"
    )
    command = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert (ended.stderr, ended.stdout)[closed - 1] == other
    assert (ended.stdout, ended.stderr)[closed - 1] == ""


def test_a_warning_is_one_line_of_its_own():
    lines = """
        import sys, warnings
        from jaxmodels.process.programs import run

        def main():
            warnings.warn("a file \\x1b[31m of\\n others " + "x" * 9_000)
            run(lambda: warnings.warn("within"), "b")
            warnings.warn("after")

        run(main, "a")
        assert warnings.formatwarning("a", UserWarning, "file", 3) != "warning: a\\n"
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, *others = ended.stderr.splitlines()
    assert first.startswith(r"warning: a file \x1b[31m of others xxx")
    assert len(first) < 5_000
    assert others == ["warning: within", "warning: after"]


def test_warnings_are_still_recorded():
    with pytest.warns(UserWarning, match="^a$"):
        assert run(lambda: warnings.warn("a", stacklevel=1), "command") == 0


CHILDREN = """
import multiprocessing, subprocess, sys
sys.path = [place for place in sys.path if place] + sys.argv[1:]
from jaxmodels.process.programs import run

def main():
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
    subprocess.run([sys.executable, "-c", "import pip"], check=True)

if __name__ == "__main__":
    run(main, "command")
"""


@pytest.mark.parametrize("own", [False, True], ids=["of others", "own"])
def test_child_processes_import_nothing_from_the_current_folder(tmp_path, own):
    (tmp_path / "script").mkdir()
    script = tmp_path / "script" / "script.py"
    script.write_text(CHILDREN)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pip", "runpy", "selectors"):
        (here / f"{name}.py").write_text(f"open({name + '.imported'!r}, 'w')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run([sys.executable, script, *[here] * own], cwd=here, env=environment, capture_output=True)
    assert done.stderr == b"" or own
    assert [file.name for file in here.glob("*.imported") if file.name == "pip.imported"] == ["pip.imported"] * own
    assert own or not list(here.glob("*.imported"))


def test_the_environment_is_as_before_after_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    seen = []
    run(lambda: seen.append(os.environ["PYTHONSAFEPATH"]), "command")
    assert seen == ["1"]
    assert os.environ["PYTHONSAFEPATH"] == ""
