"""`Reference`: PyTorch's results in float64 with their noise, computed or recorded, and the checks against them.

This module does not import torch: recordings are compared by the same code on machines without it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jaxmodels.weights.names import as_numpy
from parity.compare import noise
from parity.compare.comparison import Comparison
from parity.compare.decoding import decoded
from parity.compare.loss import Batch, Kinds
from parity.compare.names import matches
from parity.compare.noise import HUGE, LIMIT, OWN, PREDICTED, ULPS, Noise, Noises
from parity.compare.outputs import aligned
from parity.compare.sides.jax_side import JaxSide
from parity.compare.weights.sided import listed
from parity.report.results import Check

WIDE = 4.0  # × the value in float64, where one unit in the last place is twice the rounding error

Values = Mapping[str, Mapping[str, float]]
"""Differences in units of the noise, by kind and tensor."""


def judged(
    kind: str, precision: str, values: Mapping[str, float], limits: Mapping[str, float] | float = LIMIT
) -> Check:
    """A check of the tensor that exceeds its limit most. limits: of each tensor, or of all."""
    allowed = limits if isinstance(limits, Mapping) else dict.fromkeys(values or [""], limits)
    name, _ = noise.worst({n: value / (allowed[n] or 1.0) for n, value in values.items()} or {"": 0.0})
    return Check(kind, precision, name, values.get(name, 0.0), allowed[name])


def judged_narrow(
    kind: str,
    precision: str,
    values: Mapping[str, float],
    own: Mapping[str, float],
    wide: Mapping[str, float] | None = None,
) -> Check:
    """A check in a narrower dtype: over the prediction and over twice PyTorch's own value, a tensor fails.

    wide: values in float64 that are rounding: what an algorithm loses there, such as a long sum, it loses here too.
    """
    check = judged(kind, precision, values, narrow_limits(values, own, wide))
    return dataclasses.replace(check, own=own.get(check.worst))


def narrow_limits(
    values: Mapping[str, float], own: Mapping[str, float], wide: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The limit of each value in a narrower dtype, see `judged_narrow`."""
    wide = wide or {}
    return {name: max(PREDICTED, OWN * own.get(name, 0.0), WIDE * wide.get(name, 0.0)) for name in values}


def unlimited(own: Values, dtype: str) -> list[str]:
    """Notes on results that PyTorch itself has with other NaN, infinities or masks in a narrower dtype.

    Nothing limits those of Flax there. Raises ValueError if no output is left.
    """
    lost = {kind: [name for name, value in of.items() if not math.isfinite(value)] for kind, of in own.items()}
    why = f"PyTorch has NaN, infinities or masks at other places in {dtype} than in float64"
    if lost["output"] and len(lost["output"]) == len(own["output"]):
        raise ValueError(f"{listed(lost['output'])}: {why}, so that nothing could be compared without float64")
    return [f"{kind} not compared, as {why}: {listed(names)}" for kind, names in lost.items() if names]


def round_trip(comparison: Comparison) -> Check:
    """PyTorch -> Flax -> PyTorch in the module's own dtypes: count the tensors that changed in any bit."""
    assert comparison.torch is not None, "the weights come from PyTorch"
    weights, state = comparison.weights, comparison.torch.state_dict()
    with jax.enable_x64(True):
        back = weights.read(weights.load(comparison.flax, state))
    carried = {name: as_numpy(tensor) for name, tensor in state.items() if weights.carries(name)}
    changed = {name: float(not same_bits(array, back.get(name))) for name, array in carried.items()}
    return judged("round trip", "bits", changed, 0.0)


def same_bits(a: np.ndarray, b: np.ndarray | None) -> bool:
    """True if shape, dtype and every bit are equal."""
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@dataclasses.dataclass(frozen=True)
class Reference:
    """Results of PyTorch in float64 on a batch, and their rounding noise in `measured`, by kind and tensor."""

    comparison: Comparison
    batch: Batch
    kinds: Kinds
    noises: Mapping[str, Noises]
    measured: str = "float64"

    def noise(self, kind: str, precision: str = "float64") -> dict[str, Noise]:
        """The noise of a kind's tensors in a dtype; in another one than was measured it is predicted."""
        ulps = ULPS[precision] / ULPS[self.measured]
        return {name: noise.scaled(ulps) for name, noise in self.noises[kind].items()}

    @property
    def notes(self) -> Iterator[str]:
        """A note on each kind with elements that are not compared in units of noise, with their number."""
        for kind, truth in self.kinds.items():
            found = []
            for name in self.comparison.shared(truth) if kind == "output" else truth:
                array = truth[name]
                if without := array.size - noise.counted(array):
                    found.append(f"{name} ({without:,} of {array.size:,} elements)")
            if found:
                yield f"{kind}: NaN, infinities and masks beyond {HUGE:g}, compared by place only: {listed(found)}"

    def with_noises(self, noises: Mapping[str, Noises]) -> "Reference":
        """The same results with other noise for some tensors, by kind, where it is larger."""
        merged = {kind: dict(of_kind) for kind, of_kind in self.noises.items()}
        for kind, of_kind in noises.items():
            for name, found in of_kind.items():
                merged[kind][name] = max(merged[kind][name], found, key=lambda one: one.unit)
        return dataclasses.replace(self, noises=merged)

    def values(self, result: Kinds, precision: str = "float64") -> Values:
        """Differences of results from PyTorch's in units of the noise in a dtype."""
        found = {}
        for kind, truth in self.kinds.items():
            compared = self.compared(result, kind)
            if kind == "output":
                truth = {name: tensor for name, tensor in truth.items() if name in compared}
            if kind == "parameter gradients":
                truth = {name: tensor for name, tensor in truth.items() if name in self.trained}
            found[kind] = noise.errors(compared, truth, self.noise(kind, precision))
        return {kind: values for kind, values in found.items() if values}

    def compared(self, result: Kinds, kind: str) -> dict[str, np.ndarray]:
        """Flax's tensors of a kind that have a counterpart.

        Outputs that only one side returns are left out, and gradients of parameters that PyTorch does not train. A
        gradient of what is a buffer in PyTorch is kept: it is a difference unless it is declared.
        """
        tensors = result.get(kind, {})
        if kind == "output":
            return aligned(tensors, self.kinds[kind], self.comparison.channels_last)
        if kind == "parameter gradients":
            return {name: t for name, t in tensors.items() if name not in self.comparison.untrained}
        return dict(tensors)

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        """Names of the gradients that are compared."""
        return frozenset(self.kinds.get("parameter gradients", {})) - self.comparison.untrained

    def zeros(self, result: Kinds) -> Iterator[Check]:
        """Gradients declared to be zero, on both sides, in units of their noise.

        Raises ValueError if a declaration matches no parameter.
        """
        zero = self.comparison.zero_gradients
        if not zero:
            return
        gradients, noises = self.kinds["parameter gradients"], self.noise("parameter gradients")
        declared = [name for name in gradients if matches(name, zero)]
        if not declared:
            raise ValueError(f"zero_gradients={list(zero)} must match a parameter: {', '.join(sorted(gradients))}")
        values = {}
        for name in declared:
            nothing = np.zeros(gradients[name].shape)
            values[f"torch {name}"] = noises[name].error(gradients[name], nothing)
            values[name] = noises[name].error(result["parameter gradients"].get(name), nothing)
        yield judged("zero gradients", "float64", values)

    def decoding(
        self,
        side: JaxSide,
        *,
        own_outputs: Mapping[str, np.ndarray] | None = None,
        own: Mapping[str, float] | None = None,
        limit: float = LIMIT,
    ) -> Check:
        """Logits through the cache against PyTorch's full forward pass; raises NotDecodable.

        If the side's dtype is narrower than float64, own_outputs are PyTorch's outputs in it, or `own` their values.
        """
        first, logits = decoded(side.module, self.batch.inputs, side.dtype)
        (name, output), axis = next(iter(self.kinds["output"].items())), side.module.sequence_axis
        positions = range(first, output.shape[axis])
        unit = self.noise("output", side.dtype.name)[name]
        truth = output.take(positions, axis)
        value = {name: unit.error(logits, truth)}
        if side.dtype == np.float64:
            return judged("cached decoding", "float64", value, limit)
        if own_outputs is not None:
            own = {name: unit.error(own_outputs[name].take(positions, axis), truth)}
        return judged_narrow("cached decoding", side.dtype.name, value, own or {})
