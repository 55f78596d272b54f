"""The console command `jaxmodels`."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

import jaxmodels
from jaxmodels import command
from jaxmodels.command import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def called(monkeypatch):
    """Arguments that the main functions of subcommands were called with; they return 3."""
    found = []

    def import_module(name):
        def main(argv, prog):
            found.append((name, argv, prog))
            return 3

        return types.SimpleNamespace(main=main)

    monkeypatch.setattr(command, "importlib", types.SimpleNamespace(import_module=import_module))
    monkeypatch.setattr(command, "prepare", lambda name: None)
    return found


def test_every_subcommand_has_a_module_and_a_line_of_help(capsys):
    assert all(importlib.util.find_spec(one.module) for one in COMMANDS.values())
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(f"  {name:9}  {one.help}" in lines for name, one in COMMANDS.items())


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"jaxmodels {jaxmodels.__version__}\n"


def test_a_subcommand_gets_its_arguments_and_its_name(called):
    assert main(["plot", "--help", "run"]) == 3
    assert main(["sample", "run"], prog="python -m jaxmodels") == 3
    assert called == [
        ("jaxmodels.training.commands.plot", ["--help", "run"], "jaxmodels plot"),
        ("jaxmodels.training.commands.sample", ["run"], "python -m jaxmodels sample"),
    ]


def test_inspect_is_a_subcommand_of_the_converter(called):
    assert main(["inspect", "folder"]) == 3
    assert called == [("jaxmodels.convert.command", ["inspect", "folder"], "jaxmodels")]


@pytest.mark.parametrize("arguments", [[], ["no-such"], ["Convert"]])
def test_an_unknown_or_missing_subcommand_is_one_line_that_lists_all(arguments, called, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxmodels: ")
    assert all(name in line for name in [*COMMANDS, *map(repr, arguments)])
    assert called == []


def test_help_and_version_import_nothing_heavy():
    program = "import sys; sys.argv[1:] = ['--version']\nfrom jaxmodels.command import main\ntry: main()\n"
    program += "finally: print(*sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "jaxmodels" in loaded
    assert not loaded & {"jax", "flax", "numpy", "torch", "tyro"}
