"""The fused call of a Flax model against its `plain` form, in which every sub-module is called as a module."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from parity.compare import noise
from parity.compare.inputs import Inputs
from parity.compare.loss import Kinds
from parity.compare.sides.jax_side import Arrays, JaxSide
from parity.measure.reference import Reference, judged
from parity.report.results import Check

FUSED = "fused / plain"
TOKENS = 11  # of a plain form that is a loop over tokens


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
    sub-module is replaced. A loop over tokens is compared for the first ones: it takes long to compile. Gradients are
    the call's own, which are compared with PyTorch's.
    """
    if not has_plain(ours.module):
        return
    side = PlainSide(ours.module, ours.weights, ours.inputs, ours.dtype, ours.channels_last)
    inputs = reference.batch.inputs
    called = result["output"]
    if loops_over_tokens(side, inputs):
        inputs = cut(inputs, side.module.sequence_axis, TOKENS)
        called = ours.outputs(inputs)
    units = reference.noise("output", ours.dtype.name)
    called, plain = (
        {n: tensor for n, tensor in outputs.items() if n in units} for outputs in (called, side.outputs(inputs))
    )
    yield judged(FUSED, ours.dtype.name, noise.errors(called, plain, units))


def loops_over_tokens(side: PlainSide, inputs: Inputs) -> bool:
    """True if there are more than `TOKENS` tokens, and the plain form has more operations for more of them."""
    axis = getattr(side.module, "sequence_axis", None)
    if axis is None or next(iter(inputs.named().values())).shape[axis] <= TOKENS:
        return False

    def operations(n: int) -> int:
        floats, others = side.values(cut(inputs, axis, n))
        traced = jax.make_jaxpr(lambda params, values: side.call(side.merged(params), values))
        return len(traced(side.params, floats | others).eqns)

    try:
        return operations(TOKENS // 2) < operations(TOKENS)
    except ValueError:  # other inputs need the whole text
        return False


def cut(inputs: Inputs, axis: int, n: int) -> Inputs:
    """The first n tokens of the first input, and of all others of that length."""
    named = inputs.named()
    length = next(iter(named.values())).shape[axis]
    return inputs.replaced(
        {name: a.take(range(n), axis) if a.ndim > axis and a.shape[axis] == length else a for name, a in named.items()}
    )
