"""`Reference`: PyTorch's results in float64, computed or recorded, and the checks that compare Flax with them.

This module does not import torch: recordings are compared by the same code on machines without it.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jaxmodels.weights.names import as_numpy
from parity.compare import limits
from parity.compare.comparison import Comparison
from parity.compare.decoding import decoded
from parity.compare.jax_side import JaxSide
from parity.compare.loss import Batch, Kinds
from parity.compare.names import matches
from parity.report.results import Check

OwnErrors = Mapping[str, Mapping[str, float]]
"""PyTorch's errors in a narrower dtype against float64, by kind and tensor."""


def limited(kind: str, precision: str, values: Mapping[str, float]) -> Check:
    """A check of the worst tensor: by error in float64, by ratio to PyTorch's error in narrower dtypes."""
    limit = limits.FLOAT64_LIMIT if precision == "float64" else limits.RATIO_LIMIT
    return Check(kind, precision, *limits.worst(values), limit)


def round_trip(comparison: Comparison) -> Check:
    """PyTorch -> Flax -> PyTorch in the module's own dtypes: count the tensors that changed in any bit."""
    assert comparison.torch is not None, "the weights come from PyTorch"
    weights, state = comparison.weights, comparison.torch.state_dict()
    with jax.enable_x64(True):
        back = weights.read(weights.load(comparison.flax, state))
    carried = {name: as_numpy(tensor) for name, tensor in state.items() if weights.carries(name)}
    changed = {name: float(not same_bits(array, back.get(name))) for name, array in carried.items()}
    return Check("round trip", "bits", *limits.worst(changed or {"": 0.0}), 0.0)


def same_bits(a: np.ndarray, b: np.ndarray | None) -> bool:
    """True if shape, dtype and every bit are equal."""
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@dataclasses.dataclass(frozen=True)
class Reference:
    """Results of PyTorch in float64 on a batch, by kind."""

    comparison: Comparison
    batch: Batch
    kinds: Kinds

    def agreement(self, result: Kinds, precision: str, own_errors: OwnErrors | None = None) -> Iterator[Check]:
        """A check of each kind. own_errors: PyTorch's errors in a narrower dtype, the units of Flax's errors."""
        for kind, tensors in self.kinds.items():
            errors = limits.errors(self.compared(result, kind), tensors)
            values = errors if own_errors is None else limits.in_units_of(errors, own_errors[kind])
            yield limited(kind, precision, values)

    def own_errors(self, result: Kinds) -> OwnErrors:
        """Errors of PyTorch's own results in a narrower dtype."""
        return {kind: limits.errors(result[kind], tensors) for kind, tensors in self.kinds.items()}

    def compared(self, result: Kinds, kind: str) -> dict[str, np.ndarray]:
        """Flax's tensors of a kind, without gradients of parameters that PyTorch does not train."""
        return {n: tensor for n, tensor in result.get(kind, {}).items() if n not in self.comparison.untrained}

    def zeros(self, result: Kinds) -> Iterator[Check]:
        """Gradients declared to be zero, on both sides, in units of the largest gradient.

        Raises ValueError if a declaration matches no parameter.
        """
        zero = self.comparison.zero_gradients
        if not zero:
            return
        gradients = self.kinds["parameter gradients"]
        scale = limits.scale_of(gradients)
        both = {**{f"torch {n}": g for n, g in gradients.items()}, **result["parameter gradients"]}
        declared = {n: g for n, g in both.items() if matches(n.removeprefix("torch "), zero)}
        if not declared:
            raise ValueError(f"zero_gradients={list(zero)} must match a parameter: {', '.join(sorted(gradients))}")
        yield limited("zero gradients", "float64", {n: float(np.abs(g).max()) / scale for n, g in declared.items()})

    def decoding(
        self, side: JaxSide, own_errors: OwnErrors | None = None, own_outputs: Mapping[str, np.ndarray] | None = None
    ) -> Check:
        """Logits through the cache against PyTorch's full forward pass; raises NotDecodable.

        In a narrower dtype the unit is PyTorch's own error: that of own_outputs at the decoded positions, or a recorded
        one, which is of all positions.
        """
        first, logits = decoded(side.module, self.batch.inputs, side.dtype)
        (name, output), axis = next(iter(self.kinds["output"].items())), side.module.sequence_axis
        positions = range(first, output.shape[axis])
        reference = {name: output.take(positions, axis)}
        values = limits.errors({name: logits}, reference)
        if own_outputs is not None:
            own = limits.errors({name: own_outputs[name].take(positions, axis)}, reference)
            values = limits.in_units_of(values, own)
        elif own_errors is not None:
            values = limits.in_units_of(values, own_errors["output"])
        return limited("cached decoding", side.dtype.name, values)
