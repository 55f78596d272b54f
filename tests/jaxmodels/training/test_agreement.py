"""Checkpoints that contradict their run, as files of others may: they are refused by name, or an older one is read."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmodels.io.checkpoint import read_arrays
from jaxmodels.io.steps import MARK, steps
from jaxmodels.training.checkpoints import typed
from jaxmodels.training.script import main, parse
from jaxmodels.training.trainer import Trainer
from tests.train_common import TEXT, TINY
from train import rope

PROGRAM = "python -m train.rope"
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def ended(tmp_path_factory, compile_cache) -> Path:
    """A run with checkpoints 5 and 7."""
    folder = tmp_path_factory.mktemp("ended")
    (folder / "sea.txt").write_text(TEXT)
    flags = [*TINY, "--text", folder / "sea.txt", "--no-tensorboard", "--compile-cache", compile_cache, "--steps", 7]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(rope.Rope, PROGRAM, [*map(str, flags), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(ended, tmp_path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


def opened(run: Path, *flags: str) -> Trainer:
    """The run as it is resumed, up to the first step."""
    experiment, command = parse(rope.Rope, PROGRAM, ["--resume", str(run), "--no-tensorboard", *flags])
    trainer = Trainer(experiment, run, command.options)
    trainer.close()
    return trainer


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file, and the sizes of its step's files in complete.json."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    measure(file)


def measure(file: Path) -> None:
    """Write the sizes of the files of the step that a file lies in to its complete.json, so that it is complete."""
    step = next((folder for folder in file.parents if folder.parent.name == "checkpoints"), None)
    if step is not None and file != step / MARK:
        mark = json.loads((step / MARK).read_text())
        found = (path for path in step.rglob("*") if path.is_file() and path.name not in (MARK, ".jaxmodels.json"))
        mark["files"] = {str(path.relative_to(step)): path.stat().st_size for path in found}
        (step / MARK).write_text(json.dumps(mark))


def test_an_unchanged_run_is_resumed(run):
    assert opened(run, "--steps", "9").position.step == 7


@pytest.mark.parametrize("part", ["model/params", "state"])
def test_arrays_of_another_float_dtype_are_named_and_an_older_checkpoint_is_read(run, part, capsys):
    from orbax.checkpoint import v1 as ocp

    folder = run / "checkpoints" / "7" / part
    arrays = read_arrays(folder, {name: typed(a, DEVICE) for name, a in ocp.metadata(folder).metadata.items()})
    name = next(name for name, array in sorted(arrays.items()) if array.dtype == jnp.float32)
    shutil.rmtree(folder)
    ocp.save(folder, arrays | {name: arrays[name].astype(jnp.bfloat16)})
    measure(folder / "state")
    assert opened(run).position.step == 5
    said = rf"checkpoint 7 is skipped: .*/7/{part} .*{re.escape(name)} has dtype bfloat16, expected float32\n"
    assert re.search(said, capsys.readouterr().err)
    assert steps(run / "checkpoints") == [5]
