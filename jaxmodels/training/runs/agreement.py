"""Agreement of a checkpoint with its run: hyperparameters, model, position in the data, the optimizer's counts.

A run's config.json and its checkpoints are separate files. If they contradict each other, a resumed run would go on as
another one, without an error.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.io.bounded import errors_naming
from jaxmodels.io.checkpoint import read_config, stored_arrays
from jaxmodels.io.formats.npy import map_array
from jaxmodels.io.steps import MARK, difference, problem, steps
from jaxmodels.models import abstract, describe
from jaxmodels.process.texts import quoted
from jaxmodels.training.experiment import Experiment
from jaxmodels.weights.stored import Stored, limited

FILE = "config.json"  # of a run
LARGEST_INDEX = 2**42  # batches; of 2**20 examples, the largest, they are all that `Batches` has


@dataclasses.dataclass(frozen=True)
class Expected:
    """Content that the checkpoints of a run must have.

    hyperparameters: those that no resumed run may change, as JSON values; checkpoints of older versions do not record
    them. began: step of the checkpoint that the run was branched from, or 0. counted: each `count` in the optimizer's
    state is the number of steps, as with the optimizers of a `Config`.
    """

    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    began: int = 0
    counted: bool = False

    def check(self, folder: Path, mark: Mapping[str, Any]) -> None:
        """Raise ValueError, naming complete.json, if that of a STEP folder does not agree."""
        self.check_hyperparameters(folder, mark)
        file, data, step = folder / MARK, mark["data"], mark["step"]
        used, taken = data.get("next_index"), step - self.began
        if data.keys() != {"next_index"} or type(used) is not int or not 0 <= used < LARGEST_INDEX:
            raise ValueError(f"{file} has data={quoted(data)}; next_index alone must be there, a number of batches")
        if used < taken or taken < 0 or (self.began == 0 and used != taken):
            allowed = f"{taken}" if self.began == 0 else f"at least {taken}, as the run began at step {self.began}"
            raise ValueError(f"{file} has next_index={used} at step {step}, must be {allowed}")

    def check_hyperparameters(self, folder: Path, mark: Mapping[str, Any]) -> None:
        """Raise ValueError, naming both files, if a checkpoint was saved with other hyperparameters."""
        saved = mark.get("config", {})
        if not isinstance(saved, dict):
            raise ValueError(f"{folder / MARK} has config={quoted(saved)}, must be an object")
        common = saved.keys() & self.hyperparameters.keys()
        found = difference({key: saved[key] for key in common}, {key: self.hyperparameters[key] for key in common})
        if found is not None:
            key, then, now = found
            raise ValueError(
                f"{folder / MARK} was saved with {key}={quoted(then)}, but {folder.parents[1] / FILE} has "
                f"{key}={quoted(now)}: continue unchanged, or in a new run with --branch"
            )

    def check_counts(self, folder: Path, optimizer: Mapping[str, jax.Array], step: int) -> None:
        """Raise ValueError, naming the array, if a count of a restored optimizer is not the number of steps."""
        for name, array in optimizer.items() if self.counted else ():
            if name.endswith(".count"):
                held = np.concatenate([np.asarray(shard.data).reshape(-1) for shard in array.addressable_shards])
                if (wrong := held[held != step]).size:
                    raise ValueError(f"{folder / 'state'} has {name}={wrong[0]}, must be {step}, the number of steps")


def read_losses(file: Path, taken: int) -> np.ndarray:
    """Losses of a run's steps, float32 [taken]; raises ValueError, naming the file, if it holds anything else."""
    losses = map_array(file)
    if losses.shape != (taken,) or losses.dtype != np.float32:
        raise ValueError(f"{file} has {losses.dtype}{list(losses.shape)}, must be float32[{taken}]")
    if not np.isfinite(losses).all():
        raise ValueError(f"{file} has losses that are not finite")
    return losses


def check_model(experiment: Experiment[Any], run: Path, n_vocab: int, step: int | None = None) -> None:
    """Raise ValueError if a run's configuration builds another model than its checkpoint describes.

    step: of the checkpoint; default the latest whose description can be read. The checkpoint's model is made first,
    then the run's; each only if it has not far more tensors than are stored: millions of layers would take hours.
    Raises ValueError too if no description can be read.
    """
    skipped: list[str] = []
    for number in reversed(steps(run / "checkpoints")) if step is None else (step,):
        folder = run / "checkpoints" / str(number)
        file = folder / "model" / "config.json"
        try:
            if wrong := problem(folder):
                raise ValueError(wrong)
            stored = Stored.of(stored_arrays(folder / "model"))
            theirs = abstract(*read_config(folder / "model"), stored, file)
        except ValueError as error:
            skipped.append(str(error))
            continue
        with errors_naming(run / FILE):
            ours = limited(lambda rngs: experiment.model(n_vocab), stored, str(run / FILE))
        found = difference(*(json.loads(describe(model)) for model in (theirs, ours)))
        if found is not None:
            key, then, now = found
            key = key.removeprefix("config.")
            raise ValueError(f"{file} has {key}={quoted(then)}, but {run / FILE} gives {key}={quoted(now)}")
        return
    raise ValueError(f"{run / 'checkpoints'} has no checkpoint that can be read: {'; '.join(skipped)}")
