"""FLOPs of a function's matrix products, counted in its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxmodels.training.step import Batch, Program, without_mask

# Vendors' figures per chip or GPU: dense bfloat16 FLOP/s; memory bandwidth in bytes/s; for TPUs, bytes/s over all
# interconnect links together. A key is a prefix of `device_kind`.
PEAKS = {
    "TPU v4": (275e12, 1228e9, 300e9),
    "TPU v5 lite": (197e12, 819e9, 200e9),
    "TPU v5e": (197e12, 819e9, 200e9),
    "TPU v5": (459e12, 2765e9, 600e9),
    "TPU v6 lite": (918e12, 1640e9, 448e9),
    "TPU v6e": (918e12, 1640e9, 448e9),
    "NVIDIA A100": (312e12, 2039e9, None),
    "NVIDIA H100": (989e12, 3350e9, None),
    "NVIDIA H200": (989e12, 4800e9, None),
}


def peak(kind: str) -> tuple[float, float, float | None] | None:
    """(FLOP/s, memory bytes/s, interconnect bytes/s) of a kind of device; None if it is unknown."""
    return next((numbers for name, numbers in PEAKS.items() if kind.startswith(name)), None)


def count(function: Callable[..., Any], *arguments: Any) -> int:
    """Count multiplications and additions in the matrix products of one call; arguments may be abstract.

    The body of a scan counts once per iteration; that of a while-loop, whose number of iterations is unknown, once.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_forward(program: Program, batch: Batch) -> int:
    """Count the FLOPs of a step's forward pass, over all devices."""
    arguments = program.abstract_state(), program.abstract_batch(without_mask(batch))
    return count(lambda state, batch: program.losses(program.model(state), batch, None), *arguments)


def of_step(program: Program, batch: Batch) -> int:
    """Count the FLOPs of a step without rematerialization, over all devices.

    Backward takes twice the forward pass if every parameter is trained; otherwise its products are counted.
    """
    if program.parameters == program.all_parameters:
        return 3 * of_forward(program, batch)
    return count(program.gradients, program.abstract_state(), program.abstract_batch(batch))


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
            continue
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [_count(sub) for sub in _jaxprs(equation.params)]
        # Only one branch of a cond runs: count the largest.
        total += trips * (max(inner, default=0) if equation.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """Jaxprs among a primitive's parameters; those of a custom derivative are only the function's own."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                found.append(item)
            elif hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                found.append(item.jaxpr)
    return found
