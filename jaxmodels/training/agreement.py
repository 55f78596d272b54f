"""Agreement of a checkpoint with its run: hyperparameters, position in the data, and the optimizer's counts.

A run's config.json and its checkpoints are separate files. If they contradict each other, a resumed run would go on as
another one, without an error.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io.npy import map_array
from jaxmodels.io.steps import MARK, difference
from jaxmodels.process.texts import quoted

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
                f"{folder / MARK} was saved with {key}={quoted(then)}, but the run's config.json has "
                f"{key}={quoted(now)}: continue unchanged, or in a new run with --branch"
            )

    def check_counts(self, folder: Path, optimizer: Mapping[str, Any], step: int) -> None:
        """Raise ValueError, naming the array, if a count of a restored optimizer is not the number of steps."""
        for name, array in optimizer.items() if self.counted else ():
            if name.endswith(".count") and (np.asarray(array) != step).any():
                found = np.asarray(array).reshape(-1)[0]
                raise ValueError(f"{folder / 'state'} has {name}={found}, must be {step}, the number of steps")


def read_losses(file: Path, steps: int) -> np.ndarray:
    """Losses of a run's steps, float32 [steps]; raises ValueError, naming the file, if it holds anything else."""
    losses = map_array(file)
    if losses.shape != (steps,) or losses.dtype != np.float32:
        raise ValueError(f"{file} has {losses.dtype}{list(losses.shape)}, must be float32[{steps}]")
    if not np.isfinite(losses).all():
        raise ValueError(f"{file} has losses that are not finite")
    return losses
