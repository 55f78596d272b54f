"""Training on both sides from one state, compared after every step: where do the trajectories part, and in what?

A step computes, in this order, the loss, its gradients, the optimizer's moments and the new parameters. The first of
these that is past its limit tells a wrong backward pass from a wrong update.
"""

import dataclasses
import glob
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from parity.compare import jax_side, torch_side
from parity.compare.adapters import as_module
from parity.compare.inputs import Inputs, matches, random_targets, roll
from parity.compare.jax_side import FlaxSide
from parity.compare.names import Names, weights_of
from parity.compare.torch_side import TorchSide
from parity.locate.tree import plain
from parity.measure import limits
from parity.measure.optimizers import OPTIMIZERS, Optimizer, flax_steps, torch_steps
from parity.report.report import Check, Report, environment


@dataclasses.dataclass(frozen=True)
class Reading(Check):
    """The worst tensor of one kind after one step (counted from 0), and how far off it is."""

    step: int = 0

    @property
    def where(self) -> str:
        return self.kind if self.worst == self.kind else f"{self.kind} of {self.worst}"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Every reading of a run, in the order in which they were computed; `losses` of both sides by step."""

    optimizer: str
    precision: str
    readings: list[Reading]
    losses: dict[str, list[float]]
    seconds: float
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(reading.passed for reading in self.readings)

    @property
    def parted(self) -> Reading | None:
        """The first reading past its limit: where both sides part."""
        return next((reading for reading in self.readings if not reading.passed), None)

    def by_kind(self) -> dict[str, list[Reading]]:
        """The readings of each kind, one per step."""
        kinds: dict[str, list[Reading]] = {}
        for reading in self.readings:
            kinds.setdefault(reading.kind, []).append(reading)
        return kinds

    def checks(self) -> list[Check]:
        """One `Check` per kind: its worst step. In float32 they only report, see `trajectory`."""
        found = []
        for kind, readings in self.by_kind().items():
            worst = max(readings, key=lambda r: np.inf if np.isnan(r.value) else r.value)
            where = f"step {worst.step}" if worst.worst == kind else f"step {worst.step}, {worst.worst}"
            limit = worst.limit if self.precision == "float64" else np.inf
            found.append(Check(f"{self.optimizer}: {kind}", self.precision, where, worst.value, limit))
        return found

    def report(self, name: str) -> Report:
        """This alone, for `parity.Report.of`."""
        return Report(name, self.checks(), None, self.seconds, self.environment, trajectories=(self,))

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinities are strings."""
        said = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("seconds", "environment")}
        return plain(said | {"passed": self.passed})

    def __str__(self) -> str:
        """A table of steps 0, 1, 2, 5, 10, … and the last, and where the sides part."""
        kinds = self.by_kind()
        steps = len(next(iter(kinds.values())))
        shown = sorted({s for s in range(steps) if str(s).strip("0") in ("", "1", "2", "5")} | {steps - 1})
        width = max(12, *map(len, kinds))
        lines = [f"{self.optimizer}, {self.precision}, {steps} steps"]
        lines.append("  step  " + "  ".join(f"{h:>{width}}" for h in ("loss (torch)", *kinds)))
        for s in shown:
            cells = [f"{self.losses['torch'][s]:.6g}", *(f"{readings[s].value:.1e}" for readings in kinds.values())]
            lines.append(f"  {s:>4}  " + "  ".join(f"{cell:>{width}}" for cell in cells))
        at = self.parted
        lines.append(
            "  the sides never part"
            if at is None
            else f"  first part at step {at.step}: {at.where}, {at.value:.1e}, at most {at.limit:g}"
        )
        return "\n".join(lines)


def trajectory(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    labels: Any = None,
    optimizer: str | Optimizer = "adam",
    learning_rate: float | Callable[[int], float] = 1e-3,
    steps: int = 100,
    precision: str = "float64",
    names: Names | None = None,
    channels_last: Sequence[str] = (),
    zero_gradients: Sequence[str] = (),
    device: str | None = None,
    randomize: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> Trajectory:
    """Trains both modules from the same weights on the same batches, and compares them after every step.

    Batches are variations of the inputs (see `Inputs.batch`). optimizer: a name in OPTIMIZERS, or an `Optimizer`;
    learning_rate may be a function of the step. precision 'float64' holds errors against float64's limit; 'float32'
    holds Flax's distance from PyTorch in float64 against PyTorch's own distance in float32, step by step: two runs that
    round differently drift apart, and how fast is PyTorch's to say. That blames libraries too: optax computes Adam's
    1 - β₂ᵗ in float32 (1.3e-5 off at the first step), PyTorch in float64. The other arguments are those of
    `parity.check`. Raises ValueError for another name, precision or number of steps, and where nothing is trained.
    """
    began = time.perf_counter()
    pair = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if pair is None:
        raise ValueError(f"optimizer={optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    if precision not in ("float64", "float32"):
        raise ValueError(f"precision={precision!r} must be float64 or float32")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    module = torch_side.randomized(torch_module, seed) if randomize else torch_module
    still = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    frozen = (*zero_gradients, *map(glob.escape, still))
    if all(matches(name, frozen) for name, _ in module.named_parameters()):
        raise ValueError("torch_module has no parameter that is trained")
    chosen = jax.devices(device)[0]
    flax_module = as_module(flax_module, inputs, channels_last)
    weights = weights_of(module, flax_module, names)
    readings: list[Reading] = []
    losses: dict[str, list[float]] = {"torch": [], "flax": []}
    with torch_side.strict_precision(), jax_side.strict_precision(precision == "float64", chosen):
        truth = TorchSide(module, torch.float64, "cpu")
        targets = random_targets(truth.outputs(inputs), seed)
        batches = [(inputs.batch(step), None if labels is None else roll(labels, step)) for step in range(steps)]
        rates = [float(learning_rate(s) if callable(learning_rate) else learning_rate) for s in range(steps)]
        run = (batches, targets, frozen, pair, rates)
        state = truth.module.state_dict()
        if precision == "float64":
            limit, own = limits.FLOAT64_LIMIT, None
        else:
            narrow = TorchSide(module, torch.float32, "cpu")
            limit, own, state = limits.RATIO_LIMIT, torch_steps(narrow, *run), narrow.module.state_dict()
        ours = FlaxSide(flax_module, state, inputs, jnp.dtype(precision), weights, channels_last)
        for step, (right, result) in enumerate(zip(torch_steps(truth, *run), flax_steps(ours, *run), strict=True)):
            theirs = None if own is None else next(own)
            for kind, tensors in right.items():
                if theirs is None:
                    values = limits.errors(result[kind], tensors)
                else:
                    values = limits.ratios(result[kind], theirs[kind], tensors)
                readings.append(Reading(kind, precision, *limits.worst(values), limit, step))
            losses["torch"].append(float(right["loss"]["loss"]))
            losses["flax"].append(float(result["loss"]["loss"]))
            progress(step)
    stamp = environment(chosen, chosen.platform != "tpu", seed)
    name = optimizer if isinstance(optimizer, str) else "own"
    return Trajectory(name, precision, readings, losses, time.perf_counter() - began, stamp)
