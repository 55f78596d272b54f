"""`hint`: search for the known mistake that reproduces Flax's outputs in PyTorch's sub-module.

A mistake is named only if PyTorch's sub-module with that mistake gives Flax's outputs. Only a narrower precision is
inferred from the size of the error alone, because rounding leaves no other trace.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import nn

from parity.locate.hints import (
    arguments,
    functions,
    norms,
    numbers,
    order,
    parameters,
    patterns,
    recurrent,
    rotary,
    spatial,
)
from parity.locate.hints.mistake import Context, Family, Mistake, Subject, recorded_functions

EXPLAINED = patterns.EXPLAINED
CERTAIN = 1e-8  # a mistake that leaves less unexplained ends the search; others are compared
# Processor time for one sub-module: as many of its calls as all candidates need, so that a slow or busy machine tries
# them too; at least SECONDS, at most MOST.
CALLS = 300
SECONDS = 2.0
MOST = 30.0

Arrays = list[np.ndarray]
Repeat = Callable[[nn.Module], list[torch.Tensor]]  # the call with PyTorch's inputs, by another module


def hint(module: nn.Module, repeat: Repeat, given: Arrays, right: Arrays, dtype: Any = np.float64) -> str:
    """One line on the cause of an error, '' if it is unknown.

    module: PyTorch's sub-module. repeat: repeats its call with another module and returns the floating outputs.
    given, right: Flax's and PyTorch's outputs of that call, in PyTorch's layout.
    """
    if [a.shape for a in given] != [a.shape for a in right] or not given:
        return ""
    if any((np.isfinite(a) != np.isfinite(b)).any() for a, b in zip(given, right, strict=True)):
        return "not finite"
    try:
        found = Search(copy.deepcopy(module), repeat, given, right).first()
    except Exception:  # a module that cannot be copied or run again has no hint, but still a verdict
        found = ""
    return found or patterns.shape_of_error(given, right) or patterns.precision(given, right, dtype)


def candidates(subject: Subject) -> Iterator[Mistake | Family]:
    """Each known mistake that can be made in this module or inside it: the cheap and frequent ones first."""
    yield from functions.activations(subject)
    yield from parameters.biases_and_scales(subject)
    yield from numbers.attributes_of(subject)
    yield from norms.mistakes(subject)
    yield from rotary.mistakes(subject)
    yield from order.mistakes(subject)
    yield from recurrent.mistakes(subject)
    yield from functions.attention(subject)
    yield from functions.one_activation(subject)
    yield from arguments.mistakes(subject)
    yield from spatial.mistakes(subject)
    yield from parameters.forgotten(subject)
    yield from numbers.factors(subject)
    yield from functions.left_out(subject)


@dataclasses.dataclass
class Search:
    """The search for one call: outputs with a mistake against Flax's."""

    module: nn.Module
    repeat: Repeat
    given: Arrays
    right: Arrays

    def __post_init__(self) -> None:
        self.error = distance(self.given, self.right)
        # The direction of the error: a family's number is where the change along it is as large as the error.
        self.direction = [finite(a - b) for a, b in zip(self.given, self.right, strict=True)]
        self.squared = sum(float(np.square(d).sum()) for d in self.direction)

    def first(self) -> str:
        """The hint of the first mistake that explains the error."""
        began = time.process_time()
        with recorded_functions() as recorder:
            self.repeat(self.module)
        seconds = min(max(SECONDS, CALLS * (time.process_time() - began)), MOST)
        subject = Subject(self.module, recorder.used)
        best, left = "", EXPLAINED
        for candidate in candidates(subject):
            if left < CERTAIN or time.process_time() - began > seconds:
                break
            if isinstance(candidate, Mistake):
                text, share = candidate.text, self.share(candidate.change)
            else:
                text, share = self.solved(candidate)
            if share < left:
                best, left = text, share
        return best

    def outputs(self, change: Context) -> Arrays | None:
        """PyTorch's outputs with a change; None if the module cannot run with it or gives other shapes."""
        try:
            with change:
                found = [output.detach().cpu().numpy() for output in self.repeat(self.module)]
        except Exception:  # Flax's module ran, so this mistake is not the one in it
            return None
        return found if [a.shape for a in found] == [a.shape for a in self.given] else None

    def share(self, change: Context) -> float:
        """The share of Flax's error that a change leaves unexplained; infinite if the module cannot run with it."""
        found = self.outputs(change)
        return np.inf if found is None or not self.error else distance(found, self.given) / self.error

    def along(self, family: Family, value: float) -> float:
        """The change by a number along the error, in units of the error, minus 1: zero at the solution."""
        found = self.outputs(family.change(value))
        if found is None:
            return float("nan")
        moved = zip(found, self.right, self.direction, strict=True)
        return sum(float((finite(a - b) * d).sum()) for a, b, d in moved) / (self.squared or 1.0) - 1.0

    def solved(self, family: Family) -> tuple[str, float]:
        """The hint with the number that explains most, and the share that it leaves unexplained."""
        last: tuple[float, float] | None = None
        for value in family.grid:
            at = value, self.along(family, value)
            root = value if abs(at[1]) < 10 * EXPLAINED else None
            if last is not None and last[1] * at[1] < 0:  # False for NaN
                root = self.root(family, last[0], at[0])
            if root is not None:
                share = self.share(family.change(root))
                if share < EXPLAINED:
                    return self.rounded(family, root, share)
            last = at
        return "", np.inf

    def root(self, family: Family, low: float, high: float) -> float | None:
        """The number between two others at which the change is as large as the error."""
        try:
            if low > 0:  # numbers such as epsilons differ by orders of magnitude
                root = optimize.brentq(
                    lambda v: self.along(family, float(np.exp(v))), np.log(low), np.log(high), xtol=1e-10
                )
                return float(np.exp(root))
            return float(optimize.brentq(lambda v: self.along(family, v), low, high, xtol=1e-14, rtol=1e-10))
        except (ValueError, RuntimeError):
            return None

    def rounded(self, family: Family, value: float, share: float) -> tuple[str, float]:
        """The same with the fewest digits that explain no less."""
        for digits in range(1, 7):
            short = float(f"{value:.{digits}g}")
            left = self.share(family.change(short))
            if left < EXPLAINED and left <= max(2 * share, CERTAIN):
                return family.text(short), left
        return family.text(value), share


def finite(array: np.ndarray) -> np.ndarray:
    """The array with NaN and infinities, such as masked entries, replaced by 0."""
    return np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)


def distance(ours: Arrays, theirs: Arrays) -> float:
    """The largest difference; values that are infinite or NaN on both sides do not count."""
    found = 0.0
    for a, b in zip(ours, theirs, strict=True):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if not same.all():
            apart = np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))
            found = max(found, np.inf if np.isnan(apart).any() else float(apart.max()))
    return found
