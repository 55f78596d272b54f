"""Errors and run-to-run determinism of Flax at the device's default matmul precision."""

import time
from typing import Any, Unpack

import numpy as np
import torch
from flax import linen, nnx

from parity.compare import noise
from parity.compare.arguments import modules
from parity.compare.comparison import Comparison, Settings
from parity.compare.loss import Kinds
from parity.compare.noise import ULPS
from parity.compare.sides import torch_side
from parity.compare.sides.jax_side import default_precision
from parity.measure.reference import Reference, judged
from parity.report.results import Cost, FastPath
from parity.report.stamp import environment


def fast_path(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    matmul_precision: str | None = None,
    **settings: Unpack[Settings],
) -> FastPath:
    """Run the Flax module twice at the device's default matmul precision (TF32, bfloat16).

    matmul_precision: a precision of `jax.default_matmul_precision` to use instead. The checks compare the two runs: 0
    if every bit is equal. The settings are those of `parity.check`.
    """
    modules(torch_module, flax_module, both=True)
    comparison = Comparison.of(torch_module, flax_module, inputs, **settings)
    return read_fast_path(comparison, matmul_precision=matmul_precision)


def read_fast_path(comparison: Comparison, *, matmul_precision: str | None = None) -> FastPath:
    """`fast_path` on a resolved comparison."""
    began = time.perf_counter()
    with torch_side.strict_precision():
        side = comparison.torch_side("float64")
        batch, truth = comparison.evaluated(side)
        noises = side.noises(batch, truth, ULPS["float64"], comparison.seed)
        theirs = comparison.torch_side("float32")
        own = theirs.evaluate(batch)
    reference = Reference(comparison, batch, truth, noises)

    def run(precision: str | None) -> Kinds:
        with default_precision(precision, comparison.device):  # a new side, so that each run compiles anew
            return comparison.jax_side("float32", theirs.state_dict()).evaluate(batch)

    results = [run("highest"), run(matmul_precision), run(matmul_precision)]
    strict, fast, torch = (reference.values(result, "float32") for result in (*results[:2], own))
    costs, checks = [], []
    for kind, values in fast.items():
        name, default = noise.worst(values)
        costs.append(Cost(kind, name, noise.worst(strict[kind])[1], default, noise.worst(torch[kind])[1]))
        once, again = (reference.compared(result, kind) for result in results[1:])
        apart = noise.errors({name: again[name] for name in values}, once, reference.noise(kind, "float32"))
        checks.append(judged(f"two runs: {kind}", "float32", apart, np.inf))
    stamp = environment(comparison.device, comparison.float64, comparison.seed)
    return FastPath(costs, checks, time.perf_counter() - began, stamp)
