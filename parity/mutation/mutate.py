"""Plant porting mistakes in the Flax models, one at a time, and judge each as `parity.check` does in float64.

A mutant is an operator at one sub-module of one case. It is *found* if a reading exceeds its limit, and *named* if the
first divergence is at its path. A mutant that changes no output and no gradient of the Flax model does not count.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from parity.cases import Make
from parity.cases.suite import comparison_of, pair_of
from parity.compare import noise
from parity.compare.sides.jax_side import JaxSide
from parity.compare.weights import Weights
from parity.locate.trace import trace
from parity.locate.tree import Divergence
from parity.measure.check import Readings, located
from parity.measure.reference import judged, judged_narrow
from parity.mutation.operators import CALLED, OPERATORS, Operator, planted_calls
from parity.report.results import Check

PRECISIONS = ("float64", "float32")
EFFECT = 4.0  # × noise: a mutant whose results are nearer to the unbroken model's changes nothing


class Planted:
    """`Weights` that plant a mistake in one sub-module when they are loaded."""

    def __init__(self, inner: Weights, path: tuple[Any, ...], operator: Operator):
        self.inner, self.path, self.operator = inner, path, operator
        self.read, self.held, self.module, self.carries = inner.read, inner.held, inner.module, inner.carries
        self.notes, self.uncompared, self.untrained = inner.notes, inner.uncompared, inner.untrained

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        """The model with its weights and the mistake."""
        model = self.inner.load(model, state_dict)
        make = self.operator.change(dict(nnx.iter_modules(model))[self.path])
        assert make is not None, "a mutant has an operator that applies to its sub-module"
        make()
        return model


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One operator at one sub-module of a case.

    culprit: PyTorch's path of the sub-module or, if that is never called, of the nearest enclosing one that is. stack:
    place of the layer's number in it, if the mistake is in all of a stack's layers.
    """

    case: str
    path: tuple[Any, ...]
    culprit: str
    operator: Operator
    stack: int | None = None

    @property
    def key(self) -> str:
        """Text that no other mutant has."""
        return f"{self.case} | {'.'.join(map(str, self.path))} | {self.operator.name}"

    def at(self, path: str) -> bool:
        """True if the mistake is at PyTorch's path; in a stack, at that of any layer."""
        ours, theirs = self.culprit.split("."), path.split(".")
        if self.stack is not None and self.stack < min(len(ours), len(theirs)):
            theirs[self.stack] = ours[self.stack]
        return ours == theirs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The harness's result for a mutant: the readings that exceed their limits, and the first divergence."""

    mutant: Mutant
    failed: list[Check]
    divergence: Divergence | None

    @property
    def found(self) -> bool:
        """True if a reading exceeds its limit."""
        return bool(self.failed)

    @property
    def value(self) -> float:
        """The largest difference, in units of the noise; 0 if no reading exceeds its limit."""
        return max((check.value for check in self.failed), default=0.0)

    @property
    def named(self) -> bool:
        """True if the first divergence is at the mutant's place."""
        return self.divergence is not None and self.mutant.at(self.divergence.path)


class Subject:
    """A case in which mistakes are planted, with the results of its unbroken Flax model."""

    def __init__(self, case: str, make: Make):
        self.case = case
        self.comparison = comparison_of(pair_of(make, 0))
        self.readings = Readings(self.comparison)
        side = self.comparison.jax_side("float64")
        self.batch = self.readings.reference.batch
        self.unbroken = side.evaluate(self.batch)
        tree = trace(self.readings.side, side, self.batch).forward
        self.called = {part.path for part in tree.walk() if part.propagated is not None}

    def mutants(self) -> Iterator[Mutant]:
        """Every operator at every sub-module that it applies to; stacked layers are one sub-module."""
        comparison = self.comparison
        model = comparison.jax_side("float64").module
        torch_paths = {comparison.weights.module(path): path for path, _ in self.readings.side.module.named_modules()}
        for path, module in nnx.iter_modules(model):
            words = [str(word) for word in path]
            name, stack = torch_paths.get(".".join(words)), None
            for i, word in enumerate(words):
                if name is None and word == "layers":
                    name, stack = torch_paths.get(".".join([*words[: i + 1], "0", *words[i + 1 :]])), i + 1
            if name is None:
                continue
            called = name in self.called
            while name not in self.called:
                name = name.rpartition(".")[0]
            for operator in OPERATORS.values():
                if (called or operator.name not in CALLED) and operator.change(module) is not None:
                    yield Mutant(self.case, path, name, operator, stack)

    def judge(self, mutant: Mutant) -> Outcome | None:
        """The outcome of a mutant; None if it changes nothing."""
        planted = Planted(self.comparison.weights, mutant.path, mutant.operator)
        comparison = dataclasses.replace(self.comparison, weights=planted)
        with planted_calls(self.comparison.flax):
            result = comparison.jax_side("float64").evaluate(self.batch)
            reference = self.readings.reference
            effects = dataclasses.replace(reference, kinds=self.unbroken).values(result)
            if max(noise.worst(effect)[1] for effect in effects.values()) < EFFECT:
                return None
            checks = [judged(kind, "float64", values) for kind, values in reference.values(result).items()]
            failed = [check for check in checks if not check.passed]
            where = located(comparison, self.readings.side, self.batch, failed) if failed else None
            return Outcome(mutant, failed, where)


def unbroken(make: Make, seeds: int) -> list[tuple[int, Check]]:
    """Readings of an unbroken pair, each with its seed; each of the two precisions compiles once."""
    readings: list[tuple[int, Check]] = []
    sides: dict[str, JaxSide] = {}
    for seed in range(seeds):
        comparison = comparison_of(pair_of(make, seed), seed=seed)
        sides = sides or {dtype: comparison.jax_side(dtype) for dtype in PRECISIONS}
        readings += [(seed, check) for check in compared(Readings(comparison), sides)]
    return readings


def compared(readings: Readings, sides: Mapping[str, JaxSide]) -> Iterator[Check]:
    """Outputs and gradients in float64 and float32, on sides that were compiled with other weights."""
    reference = readings.reference
    theirs = readings.comparison.torch_side("float32")
    wide = sides["float64"].loaded(readings.side.state_dict()).evaluate(reference.batch)
    narrow = sides["float32"].loaded(theirs.state_dict()).evaluate(reference.batch)
    own = reference.values(theirs.evaluate(reference.batch), "float32")
    in_wide, in_narrow, own = readings.refined(reference.values(wide), reference.values(narrow, "float32"), own)
    for kind, values in in_wide.items():
        yield judged(kind, "float64", values)
    for kind, values in in_narrow.items():
        yield judged_narrow(kind, "float32", values, own[kind], in_wide.get(kind))
    yield from reference.zeros(wide)
