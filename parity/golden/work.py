"""How much a Flax module computes for its inputs, known from its jaxpr before anything is computed.

A fixture of a few megabytes may have a sequence, and a configuration numbers of heads or tokens, for which attention
takes all memory of a machine.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

from parity.compare.inputs import Inputs
from parity.compare.sides.adapters import traced
from parity.compare.sides.widen import jaxprs_of

# Elements of all arrays that a call makes, and of one of them, 134 MB in float64, whatever the size of the model; and
# more for each byte of its weights and results. The shipped fixtures make up to 8,712, and 6 for each byte.
MOST, LARGEST = 2**30, 2**24
MOST_FOR_BYTE, LARGEST_FOR_BYTE = 64, 0.5  # a cast of weights of 16 bits makes as many


def check_work(module: Any, inputs: Inputs, channels_last: Sequence[str] = (), *, nbytes: int) -> None:
    """Raise ValueError if a module, whose arrays may be abstract, makes larger arrays for its inputs, or more.

    nbytes: of the weights and, if they are stored, the results, with which the limits grow.
    """
    total, largest = elements(traced(module, inputs, channels_last, jax.make_jaxpr).jaxpr)
    most, largest_allowed = MOST + MOST_FOR_BYTE * nbytes, LARGEST + int(LARGEST_FOR_BYTE * nbytes)
    if total > most or largest > largest_allowed:
        shapes = ", ".join(f"inputs/{name} {list(array.shape)}" for name, array in inputs.named().items())
        raise ValueError(
            f"the Flax module makes arrays of up to {largest:,} elements, {total:,} in all, of {shapes}; at most "
            f"{largest_allowed:,} and {most:,} are computed for {nbytes:,} bytes of arrays"
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
