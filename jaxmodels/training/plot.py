"""Loss curves of runs as a picture.

python -m train.plot runs/rope runs/synthesizer/* --out curves.png
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from jaxmodels.training import metrics

PROGRAM = "python -m train.plot"
SMOOTHED = 200  # points that a curve of training losses is averaged to


@dataclasses.dataclass(frozen=True)
class Command:
    """Draws training losses, averaged, as lines and validation losses as points, in nats per token."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of runs"""
    out: Path = Path("curves.png")
    """the picture, a PNG"""


def curves(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of training [n, 2], averaged to SMOOTHED points, and of validation [m, 2].

    Raises ValueError where the run has none.
    """
    lines = metrics.read(run)
    train = np.array([(line["step"], line["loss"]) for line in lines if "loss" in line])
    validation = np.array([(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line])
    if not len(train):
        raise ValueError(f"{run / metrics.FILE} has no losses yet")
    parts = np.array_split(train, min(len(train), SMOOTHED))
    return np.array([part.mean(axis=0) for part in parts]), validation.reshape(-1, 2)


def main(arguments: Sequence[str]) -> None:
    """Writes the picture; raises ValueError for bad input."""
    command = tyro.cli(Command, args=arguments, prog=PROGRAM)
    if not command.runs:
        raise ValueError("name the folder of at least one run")
    found = {run: curves(run) for run in command.runs}
    import matplotlib

    matplotlib.use("agg")  # no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for run, (train, validation) in found.items():
        (line,) = axes.plot(*train.T, alpha=0.5)
        last = f": {validation[-1, 1]:.3f} at step {validation[-1, 0]:,.0f}" if len(validation) else ""
        axes.plot(*validation.T, "o-", color=line.get_color(), label=f"{run}{last}")
    axes.set(xlabel="step", ylabel="nats per token; line: training, points: validation")
    axes.legend()
    figure.savefig(command.out, dpi=120)
    pyplot.close(figure)
    print(f"{command.out}: {len(found)} runs")
