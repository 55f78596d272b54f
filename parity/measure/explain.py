"""Why results of the same mathematics may be off by more than the noise: the two reasons that let a port pass.

rounding        the port's algorithm is less stable, such as a variance from a mean of squares. Rounding shrinks by
                2²⁸ from float32 to float64; the error of a wrong formula does not.
float32 inside  a side holds a constant or table in a narrow float. Moving these constants by one rounding must move
                the results about as far as they are off.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.compare import noise
from parity.compare.comparison import Comparison
from parity.compare.loss import Kinds
from parity.compare.noise import LIMIT, ULPS
from parity.compare.sides.jax_side import JaxSide
from parity.measure.reference import Reference, Values

if TYPE_CHECKING:
    from parity.compare.sides.torch_side import TorchSide  # recordings are explained without torch

RUNS = 2
SHRINKS = 4.0  # a value in float64 is rounding if it is at most this multiple of the value in float32
NAMED = 6  # constants are named up to this number

Limits = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The limit of each tensor in float64, by kind, and the notes on those above `LIMIT`.

    rounding: the values that are rounding. allowed: the largest value that passes for either reason, at least 1.
    """

    limits: Limits
    rounding: Limits
    notes: tuple[str, ...] = ()
    allowed: float = 1.0


def allowed_by(comparison: Comparison, torch: "TorchSide") -> tuple[float, tuple[str, ...]]:
    """The largest value of outputs and gradients in float64 that passes, at least 1, and the notes on the reason."""
    batch, kinds = comparison.evaluated(torch)
    reference = Reference(comparison, batch, kinds, torch.noises(batch, kinds, ULPS["float64"], comparison.seed))
    flax = comparison.jax_side("float64")
    why = explained_alone(reference, torch, flax, flax.evaluate(batch))
    return why.allowed, why.notes


def explained_alone(reference: Reference, torch: "TorchSide", flax: JaxSide, result: Kinds) -> Explanation:
    """`explained`, with a float32 run of its own if a value exceeds `LIMIT`. torch and flax: in float64."""
    comparison, values = reference.comparison, reference.values(result)
    narrow: Values = {}
    if not all(value <= LIMIT for of_kind in values.values() for value in of_kind.values()):
        with comparison.strict_precision(False):
            narrow = reference.values(comparison.jax_side("float32").evaluate(reference.batch), "float32")
    constants = functools.partial(add_torch_constants, reference=reference, torch=torch)
    return explained(reference, constants, flax, result, values, narrow)


@dataclasses.dataclass
class Changes:
    """How far results move with narrow constants, in units of the noise, and the names of the constants that matter."""

    largest: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    named: list[str] = dataclasses.field(default_factory=list)

    def add(self, found: Values) -> float:
        """Add the changes of a run; return the largest of them."""
        for kind, of_kind in found.items():
            known = self.largest.setdefault(kind, {})
            for name, value in of_kind.items():
                known[name] = max(known.get(name, 0.0), value)
        return max((value for of_kind in found.values() for value in of_kind.values()), default=0.0)


def explained(
    reference: Reference,
    torch: Callable[[Changes], None],
    flax: JaxSide,
    result: Kinds,
    values: Values,
    narrow: Values,
) -> Explanation:
    """The limits for the values of a result in float64, given those of a float32 run.

    If no value exceeds `LIMIT`, nothing is run. torch: adds the changes by the narrow constants of PyTorch's side.
    """
    limits = {kind: dict.fromkeys(of_kind, LIMIT) for kind, of_kind in values.items()}
    over = {(kind, name): v for kind, of_kind in values.items() for name, v in of_kind.items() if not v <= LIMIT}
    ordinary = {kind: {n: v for n, v in of_kind.items() if v <= LIMIT} for kind, of_kind in values.items()}
    if not over:
        return Explanation(limits, ordinary)
    notes: list[str] = []
    rounding = {at: v for at, v in over.items() if v <= SHRINKS * narrow.get(at[0], {}).get(at[1], 0.0) < np.inf}
    if rounding:
        kind, name = max(rounding, key=rounding.__getitem__)
        notes.append(
            f"rounding: the Flax module loses {rounding[kind, name]:.2g} × noise, most in {kind} of {name}: it agrees, "
            "by an algorithm that is less stable than PyTorch's"
        )
        for (kind, name), value in rounding.items():
            limits[kind][name] = ordinary[kind][name] = value
    most = LIMIT * ULPS["float32"] / ULPS["float64"]  # what float32 costs
    left = {at: v for at, v in over.items() if at not in rounding and v <= most}
    if left:
        changes = Changes()
        add_flax_constants(changes, reference, flax, result)
        torch(changes)
        inside = {at: v for at, v in left.items() if v <= LIMIT * (1 + changes.largest.get(at[0], {}).get(at[1], 0.0))}
        if inside:
            kind, name = max(inside, key=inside.__getitem__)
            notes.append(
                f"float32 inside: {', '.join(changes.named)}; the rounding of these constants explains differences of "
                f"up to {inside[kind, name]:.2g} × noise, most in {kind} of {name}"
            )
            for (kind, name), value in inside.items():
                limits[kind][name] = value
    passing = [v for (kind, name), v in over.items() if v <= limits[kind][name]]
    return Explanation(limits, ordinary, tuple(notes), max(passing, default=1.0))


def add_flax_constants(changes: Changes, reference: Reference, flax: JaxSide, result: Kinds) -> None:
    """Add how far results move with the narrow constants of the port."""
    rng = np.random.default_rng(reference.comparison.seed)
    gradients = reference.kinds.keys() != {"output"}

    def moved(only: int | None = None) -> Values:
        found = flax.with_moved_constants(reference.batch, rng, only, gradients=gradients)
        return differences(reference, found, result)

    for _ in range(RUNS if flax.constants else 0):
        changes.add(moved())
    changes.named += [
        f"{constant} in Flax" for i, constant in enumerate(flax.constants[:NAMED]) if changes.add(moved(i)) > 1
    ]


def add_torch_constants(changes: Changes, reference: Reference, torch: "TorchSide") -> None:
    """Add how far results move with the narrow constants of PyTorch's side in float64."""
    constants = torch.narrow_constants(reference.comparison.weights.carries)
    for i, (name, tensor) in enumerate(constants.items()):
        most = max(map(changes.add, moves_by(reference, torch, name, tensor, RUNS if i < NAMED else 1)))
        if most > 1 and i < NAMED:
            changes.named.append(f"{name} ({list(tensor.shape)}) in PyTorch")


def moves_by(reference: Reference, torch: "TorchSide", name: str, tensor: Any, runs: int = RUNS) -> Iterator[Values]:
    """How far PyTorch's results move with one of its narrow constants, in each of some runs."""
    rng = np.random.default_rng([reference.comparison.seed, *name.encode()])
    gradients = reference.kinds.keys() != {"output"}
    for _ in range(runs):
        with torch.moved_constants({name: tensor}, rng):
            moved = torch.evaluate(reference.batch, gradients=gradients)
        yield differences(reference, moved, reference.kinds)


def differences(reference: Reference, moved: Kinds, base: Kinds) -> Values:
    """Differences of two results of one side, in units of the noise; tensors without a noise are left out."""
    found = {}
    for kind, of_kind in base.items():
        noises = reference.noise(kind) if kind in reference.kinds else {}
        both = {name: tensor for name, tensor in of_kind.items() if name in noises}
        found[kind] = noise.errors({name: moved[kind][name] for name in both}, both, noises)
    return found
