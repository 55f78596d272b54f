"""Errors and run-to-run determinism of Flax at the device's default matmul precision."""

import time
from typing import Any, Unpack

import numpy as np
import torch
from flax import linen, nnx

from parity.compare import limits, torch_side
from parity.compare.comparison import Comparison, Settings
from parity.compare.jax_side import default_precision
from parity.compare.loss import Kinds
from parity.report.results import Check, Cost, FastPath
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
    comparison = Comparison.of(torch_module, flax_module, inputs, **settings)
    return read_fast_path(comparison, matmul_precision=matmul_precision)


def read_fast_path(comparison: Comparison, *, matmul_precision: str | None = None) -> FastPath:
    """`fast_path` on a resolved comparison."""
    began = time.perf_counter()
    with torch_side.strict_precision():
        batch, reference = comparison.evaluated(comparison.torch_side("float64"))
        theirs = comparison.torch_side("float32")
        own = theirs.evaluate(batch)

    def run(precision: str | None) -> Kinds:
        with default_precision(precision, comparison.device):  # a new side, so that each run compiles anew
            return comparison.jax_side("float32", theirs.state_dict()).evaluate(batch)

    strict, fast, again = run("highest"), run(matmul_precision), run(matmul_precision)
    costs, checks = [], []
    for kind, tensors in reference.items():
        runs = [{key: a for key, a in side[kind].items() if key in tensors} for side in (strict, fast, again)]
        name, default = limits.worst(limits.errors(runs[1], tensors))
        others = [limits.worst(limits.errors(side, tensors))[1] for side in (runs[0], own[kind])]
        costs.append(Cost(kind, name, others[0], default, others[1]))
        apart = limits.worst(limits.errors(runs[2], {key: a.astype(np.float64) for key, a in runs[1].items()}))
        checks.append(Check(f"two runs: {kind}", "float32", *apart, np.inf))
    stamp = environment(comparison.device, comparison.float64, comparison.seed)
    return FastPath(costs, checks, time.perf_counter() - began, stamp)
