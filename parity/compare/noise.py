"""The unit of every comparison: a tensor's own rounding noise, and differences in units of it ("× noise").

The noise of a tensor is its largest change when PyTorch's module runs in float64 with every parameter and input moved
by up to one unit in the last place (`ULPS`), over `RUNS` runs. An implementation of the same mathematics that rounds
differently is off by about this much, whatever the conditioning; a wrong one by orders of magnitude more. `LIMIT` lies
between them. Noise is proportional to the unit that was moved: `Noise.scaled` predicts that of a narrower dtype.

NaN, infinities and mask constants have no noise. They must be at the same places on both sides. `check_counted` refuses
outputs of nothing else, in which any implementation would agree.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jaxmodels.process.texts import shortened

LIMIT = 32.0  # × noise; correct implementations are at 0.1 to 2, planted mistakes at 1000 and more
PREDICTED = (
    8.0  # × noise predicted for float32: correct ports are at 0.5 to 5; XLA's tanh and exp lose several last places
)
OWN = 2.0  # × PyTorch's own value in a narrow dtype
ULPS = {"float64": 2.0**-52, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
RUNS = 4
HUGE = 1e30  # finite constants beyond it stand for an infinity, such as `torch.finfo(torch.float32).min`
BLOCK = 2**20  # elements that are compared at a time
OUTLIER = 1e6  # multiple of the median beyond which a constant may be a mask, such as -1e9 among logits

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Rounding noise of one tensor: unit, its largest change; elements of magnitude `masks_from` or more are masks."""

    unit: float
    masks_from: float = HUGE

    def scaled(self, ulps: float) -> "Noise":
        """The noise for a unit in the last place that is `ulps` times as large."""
        return dataclasses.replace(self, unit=self.unit * ulps)

    def error(self, result: np.ndarray | None, truth: np.ndarray | None) -> float:
        """max|result - truth| in units of the noise.

        Infinite if one is missing or has another shape, and if masks, NaN or infinities are at different places.
        """
        if result is None or truth is None or result.shape != truth.shape:
            return math.inf
        difference = max((self.difference(*pair) for pair in blocks(result, truth)), default=0.0)
        if not difference:
            return 0.0
        return difference / self.unit if self.unit and math.isfinite(difference) else math.inf

    def difference(self, result: np.ndarray, truth: np.ndarray) -> float:
        """max|result - truth| but for masks; infinite if masks are at different places."""
        with np.errstate(invalid="ignore", over="ignore"):
            apart, magnitude = np.abs(result - truth), np.abs(truth)
            masks = ~(magnitude < self.masks_from)
            if masks.any():
                same = (result == truth) | (np.isnan(result) & np.isnan(truth))
                same |= (apart <= LIMIT * ULPS["float64"] * magnitude) & np.isfinite(apart)
                same |= huge(result) & huge(truth) & (np.sign(result.real) == np.sign(truth.real))
                if not same[masks].all():
                    return math.inf
            difference = float(np.max(apart, initial=0.0, where=~masks))
        return math.inf if math.isnan(difference) else difference


Noises = Mapping[str, Noise]


def huge(array: np.ndarray) -> np.ndarray:
    """True for finite elements that stand for an infinity."""
    return (np.abs(array) >= HUGE) & np.isfinite(array)


def blocks(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays of one shape in float64 or complex128; large ones in pieces along the first axis, to save memory."""
    first = arrays[0]
    rows = max(1, BLOCK * first.shape[0] // first.size) if first.size > BLOCK and first.ndim else 0
    for i in range(0, first.shape[0] if rows else 1, rows or 1):
        yield tuple(wide(array[i : i + rows] if rows else array) for array in arrays)


def wide(array: np.ndarray) -> np.ndarray:
    """The array in float64 or complex128."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64, copy=False)


def counted(array: np.ndarray) -> int:
    """Number of elements that have a noise: neither NaN nor infinite, nor constants that stand for an infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        return sum(int(np.count_nonzero(np.abs(block) < HUGE)) for (block,) in blocks(array))


def check_counted(outputs: Tensors) -> None:
    """Raise ValueError, naming the outputs, if none of them has an element that is compared in units of noise."""
    if outputs and not any(map(counted, outputs.values())):
        held = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in outputs.items())
        raise ValueError(f"{shortened(held, 400)} has no finite number, so that nothing could be compared")


class Spread:
    """The largest changes of one tensor over several runs, from which its noise follows."""

    def __init__(self, truth: np.ndarray):
        self.floating = truth.dtype.kind in "fc" or truth.dtype.name == "bfloat16"
        sample = wide(truth.reshape(-1)[:: max(1, truth.size // BLOCK)] if truth.size > BLOCK else truth)
        with np.errstate(over="ignore"):
            size = np.abs(sample)
        ordinary = size[(size > 0) & (size < HUGE)]
        self.outliers_from = max(OUTLIER * float(np.median(ordinary)), 1e3) if ordinary.size else HUGE
        self.largest = self.largest_ordinary = 0.0  # of all that is no infinity, and of those that are no outliers
        self.plain = True
        for (block,) in blocks(truth):
            with np.errstate(over="ignore"):
                size = np.abs(block)
            finite, ordinary = size < HUGE, size < min(self.outliers_from, HUGE)
            self.plain &= bool(ordinary.all())
            self.largest = max(self.largest, float(np.max(size, initial=0.0, where=finite)))
            self.largest_ordinary = max(self.largest_ordinary, float(np.max(size, initial=0.0, where=ordinary)))
        self.change = self.change_of_outliers = 0.0

    def add(self, moved: np.ndarray, truth: np.ndarray) -> None:
        """Take another run into account."""
        for run, right in blocks(moved, truth):
            with np.errstate(invalid="ignore", over="ignore"):
                apart, size = np.abs(run - right), np.abs(right)
            finite, outliers = (size < HUGE) & np.isfinite(apart), size >= self.outliers_from
            self.change = max(self.change, float(np.max(apart, initial=0.0, where=finite & ~outliers)))
            of_outliers = float(np.max(apart, initial=0.0, where=finite & outliers))
            self.change_of_outliers = max(self.change_of_outliers, of_outliers)

    def noise(self, ulp: float) -> Noise:
        """The noise: at least one unit in the last place of the largest element; 0 for zeros and for integers."""
        if not self.floating:  # integers must be equal, unless rounding decides them, as the index of a maximum
            return Noise(self.change)
        # Outliers that move by no more than their own last place are constants, and rounding to them hides all else.
        if self.change_of_outliers <= 2 * ulp * self.largest:
            masks_from = HUGE if self.plain else min(self.outliers_from, HUGE)
            return Noise(max(self.change, ulp * self.largest_ordinary), masks_from)
        return Noise(max(self.change, self.change_of_outliers, ulp * self.largest))


def noises_of(truth: Tensors, runs: Iterable[Tensors], ulp: float) -> dict[str, Noise]:
    """The noise of tensors of one kind, from runs that moved by `ulp`."""
    spreads = {name: Spread(tensor) for name, tensor in truth.items()}
    for moved in runs:
        for name, spread in spreads.items():
            spread.add(moved[name], truth[name])
    return of_spreads(spreads, ulp)


def of_spreads(spreads: Mapping[str, Spread], ulp: float) -> dict[str, Noise]:
    """The noise of tensors of one kind, from their spreads."""
    noises = {name: spread.noise(ulp) for name, spread in spreads.items()}
    # A tensor that is exactly zero on one side, by cancellation, may be one rounding of the others on the other side.
    scale = max((spread.largest_ordinary for spread in spreads.values()), default=0.0)
    return {n: Noise(ulp * scale) if spreads[n].floating and not noise.unit else noise for n, noise in noises.items()}


def errors(result: Tensors, truth: Tensors, noises: Noises) -> dict[str, float]:
    """Differences by name in units of the noise; infinite for a tensor that only one side has."""
    return {n: noises[n].error(result.get(n), truth[n]) if n in noises else math.inf for n in {**truth, **result}}


class Largest:
    """The largest noise of each tensor so far, step by step: a run that was once off by so much may be so again."""

    def __init__(self) -> None:
        self.noises: dict[tuple[str, str], Noise] = {}

    def of(self, kind: str, noises: Noises) -> dict[str, Noise]:
        """The noises of a kind, each at least as large as before."""
        for name, noise in noises.items():
            known = self.noises.get((kind, name), noise)
            self.noises[kind, name] = max(known, noise, key=lambda one: one.unit)
        return {name: self.noises[kind, name] for name in noises}


def moved(array: np.ndarray, ulp: float, rng: np.random.Generator) -> np.ndarray:
    """The array with every element moved by up to `ulp`, relative to its size; other arrays than floats unchanged."""
    if array.dtype.kind not in "fc":
        return array
    by = array * (ulp * rng.uniform(-1.0, 1.0, array.shape))
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(np.abs(array) < HUGE, array + by, array)


def worst(values: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the largest; NaN counts as the largest."""
    return max(values.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
