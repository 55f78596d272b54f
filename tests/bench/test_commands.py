"""The benchmarks, at sizes where their times say nothing: that they run, and print what they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATION = [f"generation.{name}" for name in ("many", "perplexity", "published")]
NAMES = [*sorted(file.stem for file in (ROOT / "bench").glob("*.py")), *GENERATION]
LIBRARIES = {"__init__", "device", "timing"}
COMMANDS = {
    "accelerator": None,  # has a test of its own
    "maxtext": None,  # runs in an environment of MaxText's
    "plans": None,  # tests/jaxmodels/training/test_plan.py compiles a few
    "plans_page": None,  # a library of bench.plans
    "feedback": ["--sizes", "16x13", "--growth", "32", "--tokens", "3", "--rounds", "1"],
    "generation.many": ["--size", "pythia_14m", "--prompts", "3", "--rows", "2", "--longest", "9", "--rounds", "1"],
    "generation.perplexity": [
        *("--steps", "2", "--hidden", "32", "--layers", "2", "--length", "17", "--windows", "3"),
        *("--prompt", "5", "--tokens", "3", "--rounds", "1"),
    ],
    "generation.published": ["--sizes", "pythia_14m", "--prompt", "7", "--tokens", "3", "--rounds", "1"],
    "finetune": ["--model", "pythia_14m", "--batch", "1", "--length", "7", "--rounds", "1", "--steps", "1"],
    "neox": [
        "--sizes",
        "pythia_14m",
        "--batch",
        "1",
        "--prompt",
        "7",
        "--tokens",
        "3",
        "--rounds",
        "1",
        "--no-compile",
        "--quantized",
    ],
    "neox_shards": ["--gigabytes", "0.003", "--hidden", "96", "--heads", "4", "--vocabulary", "127", "--rounds", "1"],
    "page": None,  # has tests of its own
    "published": None,  # a library of bench.neox_shards
    "retro": ["--only", "step", "--chunks", "2", "--batch", "1", "--rounds", "1"],
    "rope": ["--sequence", "17", "--batch", "2", "--rounds", "1", "--no-compile"],
    "score": ["--size", "pythia_14m", "--documents", "3", "--length", "11", "--batch-size", "2"],
    "scripts": ["rope", "--sequence", "17", "--rounds", "1", "--no-compile"],
    "tokenize": ["--megabytes", "1", "--rounds", "1"],
    "train_loop": ["--rounds", "1", "--steps", "2", "--batch", "1"],
}


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_benchmark_is_tested():
    assert set(NAMES) - LIBRARIES == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, arguments in COMMANDS.items() if arguments is not None])
def test_it_runs_and_names_the_machine(name, tmp_path):
    extra = ["--folder", str(tmp_path)] if name == "neox_shards" else []
    done = run(f"bench.{name}", *COMMANDS[name], *extra)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d", done.stdout)


@pytest.mark.slow
def test_the_accelerator_command_writes_a_page_and_goes_on_where_it_was(tmp_path):
    arguments = ["bench.accelerator", "--device", "cpu", "--smoke", "--folder", str(tmp_path / "parts")]
    arguments += ["--page", str(tmp_path / "page.md")]
    short = run(*arguments, "--minutes", "0.3")
    assert "wrote" in short.stdout
    assert re.search(r"not run: the 0.3 minutes were over|stopped after \d+ s", (tmp_path / "page.md").read_text())
    whole = run(*arguments)
    assert whole.returncode == 0, whole.stdout
    page = (tmp_path / "page.md").read_text()
    assert "not run" not in page
    assert len(re.findall("exit code 0", page)) == page.count("\n## ") > 5
    parts = [json.loads(file.read_text()) for file in sorted((tmp_path / "parts").glob("*.json"))]
    assert all(part["command"] in page and part["machine"] in page for part in parts)
    again = run(*arguments)
    assert again.stdout.count("done before") == len(parts)
    assert (tmp_path / "page.md").read_text() == page
