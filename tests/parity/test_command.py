"""The command `parity` and `python -m parity`."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

import jaxmodels
import parity.cases.suite
import parity.command
import parity.report.progress
from parity.cases import load_cases, select
from parity.command import main

ROOT = Path(__file__).parents[2]


def test_a_case_runs_and_is_reported_everywhere(tmp_path, capsys):
    files = ["--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "out.html")]
    assert main(["rope.embeddings", "transformer.feed_forward", *files]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 cases agree" in shown
    assert "jax 0." in shown
    reports = json.loads((tmp_path / "out.json").read_text())
    assert [report["name"] for report in reports] == ["rope.embeddings", "transformer.feed_forward"]
    assert all(report["passed"] and report["environment"]["seed"] == "0" for report in reports)
    html = (tmp_path / "out.html").read_text()
    assert "rope.embeddings" in html
    assert "2 of 2 cases agree" in html
    assert not re.search(r"(src|href)\s*=(?!\"#)|url\(|@import|<script", html), "the page must be self-contained"


@pytest.mark.slow
def test_reports_of_two_processes_keep_the_order_of_the_cases(tmp_path):
    names = ["transformer.feed_forward", "rope.embeddings"]
    assert main([*names, "--workers", "2", "--json", str(tmp_path / "out.json")]) == 0
    reports = json.loads((tmp_path / "out.json").read_text())
    assert [report["name"] for report in reports] == select(names)
    assert all(report["passed"] and report["checks"] for report in reports)


WAITING = """
import pathlib, sys, time
from parity.command import main
from parity.cases import case

@case("waiting.case", "waits")
def waiting(rng):
    pathlib.Path("started").touch()
    time.sleep(600)

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to list processes")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_if_the_command_is_killed(tmp_path, number):
    """Whoever sends the signal to the command alone: a terminal sends Ctrl-C to all of its processes."""
    (tmp_path / "waiting.py").write_text(WAITING)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MARKER": str(tmp_path)}
    command = [sys.executable, "waiting.py", "waiting.case", "rope.embeddings", "--workers", "2"]

    def running() -> int:
        """Number of processes with this test's environment."""
        found = 0
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                found += f"MARKER={tmp_path}".encode() in file.read_bytes().split(b"\0")
        return found

    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_until((tmp_path / "started").exists, 120)
        assert running() >= 3
        process.send_signal(number)
        assert process.wait(20) == (130 if number == signal.SIGINT else -number)
    wait_until(lambda: running() == 0, 20)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


BROKEN = """
import os, sys
from parity.command import main
from parity.cases import case

@case("broken.case", "raises before anything is read")
def broken(rng):
    raise ValueError("n_heads=3 <does not> divide 7")

@case("broken.process", "ends its process")
def ended(rng):
    os._exit(3)

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.slow
def test_a_case_that_raises_is_reported_with_its_error_and_the_others_still_run(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    names = ["broken.case", "rope.embeddings"]

    def run(*arguments):
        files = ["--json", "out.json", "--junit", "out.xml", "--report", "out.html"]
        command = [sys.executable, "broken.py", *arguments, *files]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        return done, {report["name"]: report for report in json.loads((tmp_path / "out.json").read_text())}

    for workers in ("1", "2"):
        done, reports = run(*names, "--workers", workers)
        assert done.returncode == 2, done.stderr
        assert list(reports) == names
        assert reports["rope.embeddings"]["passed"]
        assert not reports["broken.case"]["passed"]
        error = reports["broken.case"]["error"]
        assert (error["type"], error["message"]) == ("ValueError", "n_heads=3 <does not> divide 7")
        assert "in broken" in error["traceback"]
        assert "ValueError: n_heads=3" in done.stdout
        assert "1 of 2 cases agree" in done.stdout
    root = ET.parse(tmp_path / "out.xml").getroot()
    assert (root.get("errors"), root.get("failures")) == ("1", "0")
    assert root.get("tests") == str(len(list(root.iter("testcase"))))
    assert root.find(".//error").get("message") == "n_heads=3 <does not> divide 7"
    assert "n_heads=3 &lt;does not&gt; divide 7" in (tmp_path / "out.html").read_text()
    done, reports = run("broken.process", "rope.embeddings", "--workers", "2")
    assert done.returncode == 2, done.stderr
    assert reports["broken.process"]["error"]["type"] == "BrokenProcessPool"


def test_checks_before_an_error_are_kept(tmp_path, monkeypatch, capsys):
    def raises(*arguments, **others):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(parity.cases.suite, "read_sweep", raises)
    assert main(["transformer.feed_forward", "--sweep", "--json", str(tmp_path / "out.json")]) == 2
    (report,) = json.loads((tmp_path / "out.json").read_text())
    assert report["error"]["message"] == "out of memory"
    assert all(check["passed"] for check in report["checks"])
    assert {check["kind"] for check in report["checks"]} >= {"output", "parameter gradients"}
    assert "transformer.feed_forward: ERROR" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    ["--steps 0", "--workers 0", "--seed -1", "--matmul-precision x"],
)
def test_options_that_no_case_can_run_with_are_refused_before_any_case_runs(arguments, capsys):
    assert main(["transformer.feed_forward", *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"parity: {arguments}")
    assert shown.err.count("\n") == 1
    assert "transformer.feed_forward" not in shown.out


class Line(contextlib.nullcontext):
    """A status line that keeps what it has shown."""

    def __enter__(self):
        return self

    def show(self, text):
        self.shown.append(text)

    def clear(self):
        pass


@pytest.mark.slow
def test_further_checks_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity.report.progress, "StatusLine", Line)
    monkeypatch.setattr(Line, "shown", [], raising=False)
    more = ["--invariances", "--fast", "--trajectory", "sgd", "rmsprop", "--steps", "3"]
    assert main(["transformer.feed_forward", *more, "--junit", str(tmp_path / "out.xml")]) == 0
    shown = capsys.readouterr().out
    stages = ("", ": float64", ": invariances", ": sgd, float64, step 2 of 3", ": rmsprop, float32, step 3 of 3")
    assert {f"1/1 transformer.feed_forward{stage}" for stage in stages} <= {*Line.shown}
    assert "must not change" in shown
    assert "at the default precision" in shown
    assert shown.count("no step differs") == 4  # two optimizers, in float64 and in float32
    root = ET.parse(tmp_path / "out.xml").getroot()
    assert {test.get("name") for test in root.iter("testcase")} >= {
        "jit / no jit (float64)",
        "sgd: parameters (float64)",
        "two runs: output (float32)",
        "cached / full",
    }


def test_unknown_optimizers_are_one_clear_line(capsys):
    assert main(["transformer.feed_forward", "--trajectory", "sdg"]) == 2
    assert re.search(r"--trajectory sdg\b.*\bsgd, momentum\b", capsys.readouterr().err)


def test_a_failing_case_gives_exit_code_1_and_its_divergence(tmp_path, monkeypatch, capsys):
    from jaxmodels import layers

    monkeypatch.setattr(layers.FeedForward, "__call__", lambda self, x, rng=None: self.layer2(self.layer1(x)))
    assert main(["transformer.feed_forward", "--report", str(tmp_path / "out.html")]) == 1
    shown = capsys.readouterr().out
    assert "0 of 1 cases agree" in shown
    assert "first divergence" in shown
    assert "<details open>" in (tmp_path / "out.html").read_text()


@pytest.mark.slow
def test_the_module_lists_its_cases_and_has_help():
    command = [sys.executable, "-m", "parity"]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in select([]))
    assert "--device" in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout


def test_unknown_names_are_one_clear_line(capsys):
    assert main(["rope.nonsense"]) == 2
    error = capsys.readouterr().err
    assert "rope.nonsense" in error
    assert "rope.attention" in error
    with pytest.raises(ValueError, match="ropes"):
        select(["ropes"])


def test_a_file_in_a_missing_folder_is_refused_before_any_case_runs(tmp_path, capsys):
    assert main(["rope", "--json", str(tmp_path / "nowhere" / "out.json")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_names_select_cases_and_systems():
    assert select(["rope.attention"]) == ["rope.attention"]
    assert set(select(["rope"])) == {name for name in load_cases() if name.startswith("rope.")}
    assert select([]) == list(load_cases())


def test_a_missing_device_is_one_clear_line():
    command = [sys.executable, "-m", "parity", "transformer.feed_forward", "--device", "tpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m parity: --device tpu: ")
    assert "Traceback" not in done.stderr


def test_help_and_version_need_neither_torch_nor_rich():
    for flag, text in (("--help", "--matmul-precision"), ("--version", f"parity {jaxmodels.__version__}")):
        done = without("torch", "rich", "jax", arguments=[flag])
        assert done.returncode == 0, done.stderr
        assert text in done.stdout


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("torch", ["rope"], "torch"),
        ("torch", ["--list"], "torch"),
        ("rich", ["rope"], "golden"),
        ("rich", ["--replay"], "golden"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(missing, arguments, extra):
    done = without(missing, arguments=arguments)
    assert done.returncode == 2
    assert done.stderr == f"python -m parity: needs {missing}: pip install 'jaxmodels[{extra}]'\n"
    assert not done.stdout


def without(*packages, arguments, module="parity"):
    """Run `python -m MODULE` in a process in which packages are not installed."""
    program = f"""
import runpy, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
sys.orig_argv[1:] = ["-m", {module!r}]
sys.argv[1:] = {arguments!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


def test_mutations_without_torch_are_one_line():
    done = without("torch", arguments=[], module="parity.mutations")
    assert done.returncode == 2
    assert done.stderr == "python -m parity.mutations: needs torch: pip install 'jaxmodels[torch]'\n"


def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity.command, "dispatch", interrupt)
    assert main([]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_dir_shows_the_public_names():
    code = "import sys, parity; print(*dir(parity)); print({'torch', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names, loaded = done.stdout.splitlines()
    assert names.split() == sorted(parity.__all__)
    assert loaded == "set()"
    assert all(hasattr(parity, name) for name in parity.__all__)
