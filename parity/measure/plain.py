"""The fused call of a Flax model against its `plain` form, in which every sub-module is called as a module."""

from collections.abc import Iterator, Mapping
from typing import Any

from parity.compare import noise
from parity.compare.jax_side import Arrays, JaxSide
from parity.compare.loss import Kinds
from parity.measure.reference import Reference, judged
from parity.report.results import Check

FUSED = "fused / plain"


class PlainSide(JaxSide):
    """The side's model, run in its plain form."""

    def call(self, module: Any, values: Mapping[str, Any]) -> Arrays:
        return super().call(module.plain, values)


def has_plain(module: Any) -> bool:
    """True if a model has a plain form."""
    return callable(getattr(type(module), "plain", None))


def fused(ours: JaxSide, reference: Reference, result: Kinds) -> Iterator[Check]:
    """A check of the call's outputs (`result`) against the plain form's, in units of the noise.

    Nothing for models without a plain form. A fused path that does a sub-module's work itself parts from it if the
    sub-module is replaced. Gradients are the call's own, which are compared with PyTorch's: those of an unrolled loop
    would take longer to compile than all else.
    """
    if not has_plain(ours.module):
        return
    side = PlainSide(ours.module, ours.weights, ours.inputs, ours.dtype, ours.channels_last)
    units = reference.noise("output", ours.dtype.name)
    called, plain = (
        {n: tensor for n, tensor in outputs.items() if n in units}
        for outputs in (result["output"], side.outputs(reference.batch.inputs))
    )
    yield judged(FUSED, ours.dtype.name, noise.errors(called, plain, units))
