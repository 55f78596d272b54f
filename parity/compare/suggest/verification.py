"""Resolve ambiguities by running: of the few candidates the one whose outputs agree with PyTorch's is kept."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.weights.names import ConversionError
from parity.compare.comparison import Comparison
from parity.compare.noise import counted
from parity.compare.outputs import aligned
from parity.compare.suggest.matching import Doubt, starred
from parity.compare.weights import Mapped

MOST = 64  # candidates that are run
CLEAR = 1e3  # the best candidate's error must be smaller than any other's by this factor
ORDERS = 24  # ways to assign one group that are all run

Forced = dict[str, Any]
Names = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Decided pairs, the names that follow from them, and the layouts that are chosen where several fit."""

    forced: Forced
    names: Names
    chosen: Mapping[str, int]


class Runs:
    """Outputs of a Flax module under different names, compared with those of the PyTorch module.

    weights: the conversion of a candidate; raises ConversionError if it does not fit.
    """

    def __init__(self, comparison: Comparison, weights: Callable[[Candidate], Mapped]):
        self.comparison, self.weights = comparison, weights
        with comparison.strict_precision(float64=True):
            self.truth = comparison.torch_side("float64").outputs(comparison.inputs)
        self.state = comparison.state_dict("float32")
        self.side: Any = None
        self.count = 0

    def error(self, candidate: Candidate) -> float:
        """The largest relative difference of an output; infinite if the candidate does not fit."""
        self.count += 1
        try:
            weights = self.weights(candidate)
        except ConversionError:
            return math.inf
        comparison = dataclasses.replace(self.comparison, weights=weights)
        with comparison.strict_precision(float64=False):
            if self.side is None:  # compiled once for all candidates
                self.side = comparison.jax_side("float32", self.state)
            side = copy.copy(self.side)
            side.weights = weights
            outputs = side.loaded(self.state).outputs(comparison.inputs)
        found = aligned(outputs, self.truth, comparison.channels_last)
        errors = (difference(found[name], self.truth[name]) for name in found if counted(self.truth[name]))
        return max(errors, default=math.inf)


def difference(found: Any, truth: np.ndarray) -> float:
    """The relative difference of two arrays where both are finite, and infinity for other shapes."""
    found = np.asarray(found)
    if found.shape != truth.shape or found.dtype.kind not in "fc":
        return math.inf if found.shape != truth.shape else float((found != truth).any())
    finite = np.isfinite(found) & np.isfinite(truth)
    if not finite.any():
        return math.inf
    a, b = found[finite].astype(truth.dtype), truth[finite]
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def options(doubts: Sequence[Doubt]) -> list[list[Forced]]:
    """For each group of parts in doubt its possible decisions, the present one first.

    Equal layers are decided alike.
    """
    groups: dict[tuple[Any, ...], list[Doubt]] = {}
    for doubt in doubts:
        if len(doubt.options) > 1:
            key = tuple(map(starred, doubt.parts)), len(doubt.options), tuple(doubt.chosen)
            groups.setdefault(key, []).append(doubt)
    return [decisions(group) for group in groups.values()]


def decisions(group: Sequence[Doubt]) -> list[Forced]:
    """Ways to assign the options of equal groups of parts, the present one first.

    All of them if there are few, else those that differ from the present one in one exchange.
    """
    first = group[0]
    present, count = tuple(first.chosen), len(first.options)
    if math.perm(count, len(present)) <= ORDERS:
        others = list(itertools.permutations(range(count), len(present)))
    else:
        others = [exchange(present, i, j) for i in range(len(present)) for j in range(count) if j != present[i]]
    ways = dict.fromkeys([present, *others])
    return [{p: d.options[i] for d in group for p, i in zip(d.parts, way, strict=True)} for way in ways]


def exchange(way: tuple[int, ...], i: int, j: int) -> tuple[int, ...]:
    """The same choice with option j for part i, whose own option goes to the part that had j."""
    return tuple(j if k == i else way[i] if option == j else option for k, option in enumerate(way))


def resolved(runs: Runs, propose: Callable[[Forced], Names], groups: Sequence[list[Forced]]) -> Candidate | None:
    """The candidate that agrees; None if none stands out.

    All combinations are run if they are few, else one group after the other until nothing improves. Then the layouts
    are tried where several fit.
    """
    if math.prod(map(len, groups)) <= MOST:
        tries = tried(runs, [Candidate(forced, propose(forced), {}) for forced in combinations(groups)])
    else:
        tries = descent(runs, propose, groups)
    error, best = min(tries, key=lambda item: item[0])
    if not math.isfinite(error):
        return None
    layouts = list(itertools.islice(choices(runs.weights(best)), 1, MOST))
    tries += tried(runs, [dataclasses.replace(best, chosen=chosen) for chosen in layouts])
    return clear(tries)


def descent(
    runs: Runs, propose: Callable[[Forced], Names], groups: Sequence[list[Forced]]
) -> list[tuple[float, Candidate]]:
    """Candidates of one group after the other, the others at their best so far."""
    best = [group[0] for group in groups]
    tries: list[tuple[float, Candidate]] = []
    improved = True
    while improved and runs.count < 2 * MOST:
        improved = False
        for i, group in enumerate(groups):
            trials = [merged([*best[:i], decision, *best[i + 1 :]]) for decision in group]
            found = tried(runs, [Candidate(forced, propose(forced), {}) for forced in trials])
            tries += found
            j = min(range(len(found)), key=lambda j: found[j][0])
            if group[j] != best[i]:
                best[i], improved = group[j], True
    return tries


def tried(runs: Runs, candidates: Sequence[Candidate]) -> list[tuple[float, Candidate]]:
    """The error of each candidate."""
    return [(runs.error(candidate), candidate) for candidate in candidates]


def combinations(groups: Sequence[list[Forced]]) -> list[Forced]:
    """All combinations of one decision of each group."""
    return [merged(chosen) for chosen in itertools.product(*groups)]


def merged(decisions: Sequence[Forced]) -> Forced:
    """Several decisions as one."""
    return {part: flax for decision in decisions for part, flax in decision.items()}


def clear(tries: Sequence[tuple[float, Candidate]]) -> Candidate | None:
    """The candidate with the smallest error, if those with other names have much larger ones."""
    error, best = min(tries, key=lambda item: item[0])
    others = [e for e, other in tries if (other.names, other.chosen) != (best.names, best.chosen)]
    if not math.isfinite(error) or any(e < CLEAR * error for e in others) or not others:
        return None
    return best


def choices(weights: Mapped) -> Iterator[dict[str, int]]:
    """Each way to choose one of several layouts that fit, the usual one first."""
    names = list(weights.choices)
    for picked in itertools.product(*(range(len(weights.choices[name].options)) for name in names)):
        yield dict(zip(names, picked, strict=True))
