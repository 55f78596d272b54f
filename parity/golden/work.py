"""How much a Flax module computes for a fixture's inputs, known from its jaxpr before anything is computed.

A fixture of a few megabytes may have a sequence for which attention takes all memory of a machine.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

from parity.compare.inputs import Inputs
from parity.compare.sides.adapters import traced
from parity.compare.sides.widen import jaxprs_of

MOST = 2**36  # elements of all arrays that a call makes: minutes on a CPU
LARGEST = 2**28  # elements of one of them: 2 GB in float64


def check_work(module: Any, inputs: Inputs, channels_last: Sequence[str] = ()) -> None:
    """Raise ValueError if a module, whose arrays may be abstract, makes larger arrays for its inputs, or more."""
    total, largest = elements(traced(module, inputs, channels_last, jax.make_jaxpr).jaxpr)
    if total > MOST or largest > LARGEST:
        shapes = ", ".join(f"inputs/{name} {list(array.shape)}" for name, array in inputs.named().items())
        raise ValueError(
            f"the Flax module makes arrays of up to {largest:,} elements, {total:,} in all, of {shapes}; fixtures are "
            f"compared up to {LARGEST:,} and {MOST:,}"
        )


def elements(jaxpr: Any) -> tuple[int, int]:
    """Elements of all arrays that a jaxpr makes, and of the largest; those in a loop of unknown length count once."""
    total = largest = 0
    for equation in jaxpr.eqns:
        sizes = [math.prod(getattr(variable.aval, "shape", ())) for variable in equation.outvars]
        inner = [elements(getattr(one, "jaxpr", one)) for one in jaxprs_of(equation)]
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += sum(sizes) + length * sum(made for made, _ in inner)
        largest = max([largest, *sizes, *(size for _, size in inner)])
    return total, largest
