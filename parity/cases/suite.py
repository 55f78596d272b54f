"""Run one case of the project with all requested readings."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from parity.cases import Make, Pair
from parity.compare.comparison import Comparison
from parity.measure.check import read_check
from parity.measure.dtypes import read_sweep
from parity.measure.invariances import read_invariances
from parity.measure.precision import read_fast_path
from parity.measure.trajectory import read_trajectory
from parity.report.report import Report, Result


@dataclasses.dataclass(frozen=True)
class Selection:
    """Readings in addition to the check.

    trajectories: names of optimizers; steps: their number of steps. fast: errors and determinism at the default matmul
    precision, or at `matmul_precision`.
    """

    invariances: bool = False
    sweep: bool = False
    trajectories: tuple[str, ...] = ()
    steps: int = 100
    fast: bool = False
    matmul_precision: str | None = None


def examine(
    make: Make,
    name: str,
    selection: Selection,
    *,
    device: str | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """The report of a case: its check and the selected readings; an exception ends them and is recorded."""
    return Report.gathered(name, readings(make, selection, device, seed, progress))


def readings(
    make: Make,
    selection: Selection,
    device: str | None,
    seed: int,
    progress: Callable[[str], None],
) -> Iterator[Result]:
    """The results, one after the other."""
    pair = pair_of(make, seed)
    comparison = comparison_of(pair, device=device, seed=seed)
    yield read_check(comparison, half=pair.half, steps=pair.steps, progress=progress)
    if selection.invariances:
        progress("invariances")
        yield read_invariances(comparison)
    if selection.sweep:
        yield read_sweep(comparison, progress=lambda dtype: progress(f"sweep, {dtype}"))
    for optimizer in selection.trajectories if trains(pair) else ():
        for precision in ("float64", "float32") if comparison.float64 else ("float32",):
            training = f"{optimizer}, {precision}"
            progress(training)
            yield read_trajectory(
                comparison,
                optimizer=optimizer,
                steps=selection.steps,
                precision=precision,
                progress=functools.partial(show_step, progress, f"{training}, step {{}} of {selection.steps}"),
            )
    if selection.fast:
        progress("default precision")
        yield read_fast_path(comparison, matmul_precision=selection.matmul_precision)


def show_step(progress: Callable[[str], None], template: str, step: int) -> None:
    progress(template.format(step + 1))


def pair_of(make: Make, seed: int) -> Pair:
    """The pair of a case; PyTorch's weights and the inputs are drawn from the seed."""
    torch.manual_seed(seed)
    return make(np.random.default_rng(seed))


def comparison_of(pair: Pair, *, device: str | None = None, seed: int = 0) -> Comparison:
    """The comparison of a pair."""
    return Comparison.of(
        pair.torch,
        pair.flax,
        pair.inputs,
        labels=pair.labels,
        zero_gradients=pair.zero_gradients,
        device=device,
        seed=seed,
    )


def trains(pair: Pair) -> bool:
    """True if PyTorch's module has parameters that it trains."""
    return any(parameter.requires_grad for parameter in pair.torch.parameters())
