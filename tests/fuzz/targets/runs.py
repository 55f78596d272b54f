"""Training runs, and folders that commands clean or replace."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.targets.kind import Target, commands
from tests.fuzz.targets.models import make_model, neox_model


def make_run(folder: Path) -> None:
    """A training run with two checkpoints, whose model is small."""
    import jaxmodels
    from jaxmodels.io.steps import FORMAT, MARK
    from jaxmodels.text import CharVocabulary

    for number in (3, 7):
        step = folder / "checkpoints" / str(number)
        step.mkdir(parents=True)
        jaxmodels.save(neox_model(), step / "model")
        np.save(step / "losses.npy", np.zeros(number, np.float32))
        sizes = {str(file.relative_to(step)): file.stat().st_size for file in sorted(step.rglob("*")) if file.is_file()}
        (step / MARK).write_text(json.dumps({"format": FORMAT, "step": number, "data": {}, "files": sizes}))
    config = {"seq_len": 11, "checkpoint": "elsewhere"}  # the sizes are those of the checkpoint
    about = {"format": 3, "script": "train.neox", "standalone": True, "config": config, "sha256": "0"}
    (folder / "config.json").write_text(json.dumps(about))
    CharVocabulary("abcdefghijklmnopqrstu").save(folder / "vocabulary.json")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "validation_loss": 2.25}\n')


def read_run(folder: Path) -> Any:
    from jaxmodels.training import metrics
    from jaxmodels.training.runs.folder import open_run

    metrics.Log.lines_until(folder, [2.5])
    return open_run(folder)


SHOW = commands(["inspect", "SUBJECT"], ["plot", "SUBJECT", "--out", "OUT/curves.png"])


def make_leftovers(folder: Path) -> None:
    """A folder in which a killed process has left a part of a model, and a file, long ago."""
    make_model(folder / "model")
    (folder / "model").rename(folder / ".model.0a1b2c3d")
    (folder / ".notes.txt.0a1b2c3d.jaxmodels").write_text("half")
    (folder / "notes.txt").write_text("whole")


def clean(folder: Path) -> list[int]:
    """Everything is made old, so that it is removed if the command takes it for its own."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (time.time() - 10**5,) * 2)
    return commands(["clean", "SUBJECT", "--delete"])(folder)


def overwrite(folder: Path) -> None:
    import jaxmodels

    jaxmodels.save(neox_model(), folder, overwrite=True)


TARGETS = (
    Target("run", make_run, read_run),
    Target("run's JSON", make_run, read_run, "*.json*"),
    Target("run, inspected", make_run, SHOW),
    Target("leftovers, cleaned", make_leftovers, clean, changes=True),
    Target("model, overwritten", make_model, overwrite, changes=True),
)
