"""Errors for a missing extra: one line and exit code 2 from a command, an exception from an import."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmodels.process.extras import MissingExtra, available, require, running_command

ROOT = Path(__file__).parents[3]
PACKAGE = 'from jaxmodels.process.extras import require\nrequire("train", "json", "no_such_module", "no.such")\n'
LINE = "needs no_such_module, no.such: pip install 'jaxmodels[train]'"


@pytest.fixture
def project(tmp_path):
    """A folder with a `train` package of its own that needs what is not there."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "train" / "rope.py").write_text("print('started')\n")
    (tmp_path / "user.py").write_text("import train\n")
    (tmp_path / "parity").write_text(PACKAGE)
    return tmp_path


def python(folder, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


def test_modules_that_are_there_are_enough():
    require("dev", "json", "xml.dom", "numpy")


def test_an_import_raises_an_error_that_names_the_extra():
    with pytest.raises(ModuleNotFoundError, match=r"no_such_module.*jaxmodels\[train\]") as caught:
        require("train", "json", "no_such_module")
    assert (caught.value.extra, caught.value.modules) == ("train", ("no_such_module",))
    assert caught.value.name == "no_such_module"


def test_the_error_passes_between_processes():
    error = pickle.loads(pickle.dumps(MissingExtra("torch", ("torch",))))
    assert (str(error), error.modules) == ("needs torch: pip install 'jaxmodels[torch]'", ("torch",))


def test_a_module_is_found_without_importing_it():
    assert available("antigravity")
    assert "antigravity" not in sys.modules
    assert not available("json.no_such_module")
    assert not available("no_such_package.module")


@pytest.mark.parametrize("flags", [["-m"], ["-B", "-m"], ["-Wignore", "-m"], ["-X", "utf8", "-W", "ignore", "-m"]])
def test_a_command_ends_with_one_line(project, flags):
    done = python(project, *flags, "train.rope", "--steps", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"python -m train.rope: {LINE}\n"


def test_a_console_command_ends_with_one_line(project):
    done = python(project, "parity", "--list")
    assert (done.returncode, done.stderr) == (2, f"parity: {LINE}\n")


@pytest.mark.parametrize("arguments", [["user.py"], ["-m", "user"], ["-c", "import train"]])
def test_another_program_sees_the_exception(project, arguments):
    done = python(project, *arguments)
    assert done.returncode == 1
    assert done.stderr.endswith(f"MissingExtra: {LINE}\n")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["-mjaxmodels.convert", "torch"], "python -m jaxmodels.convert"),
        (["-Bm", "parity"], "python -m parity"),
        (["/venv/bin/jaxmodels", "convert"], "jaxmodels"),
        (["/venv/bin/pytest", "parity"], None),
        (["-m", "pytest", "train"], None),
        ([], None),
    ],
)
def test_the_command_that_runs_is_named_as_it_was_typed(arguments, command, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments])
    assert running_command() == command
