"""`trajectory`: train both sides from the same state and compare them after every step.

A step computes, in this order, the loss, its gradients, the optimizer's moments and the new parameters. The first of
these that exceeds its limit distinguishes a wrong backward pass from a wrong update.
"""

import time
from collections.abc import Callable
from typing import Any, Unpack

import numpy as np
import torch
from flax import linen, nnx

from parity.compare import noise
from parity.compare.arguments import modules
from parity.compare.comparison import Comparison, Settings
from parity.compare.names import matches
from parity.compare.noise import LIMIT, ULPS
from parity.measure.explain import allowed_by
from parity.measure.optimizers import OPTIMIZERS, RUNS, Moving, Optimizer, Training
from parity.report.results import Reading, Trajectory
from parity.report.stamp import environment


def trajectory(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    optimizer: str | Optimizer = "adam",
    learning_rate: float | Callable[[int], float] = 1e-3,
    steps: int = 100,
    precision: str = "float64",
    progress: Callable[[int], None] = lambda step: None,
    **settings: Unpack[Settings],
) -> Trajectory:
    """Train both modules from the same weights on the same batches, and compare them after every step.

    Batches are variations of the inputs (see `Inputs.varied`). optimizer: a name in OPTIMIZERS, or an `Optimizer`;
    learning_rate may be a function of the step. Every value is in units of the noise that moving all
    parameters by one unit in the last place of `precision` before each step makes: two runs that round differently
    drift apart. 'float32' also shows differences between the libraries: optax computes Adam's 1 - β₂ᵗ in float32 (an
    error of 1.3e-5 at the first step), PyTorch in float64. The settings are
    those of `parity.check`. Raises ValueError for an optimizer, precision or number of steps out of range, and if no
    parameter is trained.
    """
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} must be one of {', '.join(OPTIMIZERS)}")
    if precision not in ("float64", "float32"):
        raise ValueError(f"precision={precision!r} must be float64 or float32")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    modules(torch_module, flax_module, both=True)
    comparison = Comparison.of(torch_module, flax_module, inputs, **settings)
    return read_trajectory(
        comparison,
        optimizer=optimizer,
        learning_rate=learning_rate,
        steps=steps,
        precision=precision,
        progress=progress,
    )


def read_trajectory(
    comparison: Comparison,
    *,
    optimizer: str | Optimizer = "adam",
    learning_rate: float | Callable[[int], float] = 1e-3,
    steps: int = 100,
    precision: str = "float64",
    progress: Callable[[int], None] = lambda step: None,
) -> Trajectory:
    """`trajectory` on a resolved comparison; raises ValueError if no parameter is trained."""
    began = time.perf_counter()
    assert comparison.torch is not None, "a recording does not train"
    if all(matches(name, comparison.frozen) for name, _ in comparison.torch.named_parameters()):
        raise ValueError(
            f"torch_module={type(comparison.torch).__name__} has no trained parameter; at least one must require "
            "gradients and not match zero_gradients"
        )
    name, rule = (optimizer, OPTIMIZERS[optimizer]) if isinstance(optimizer, str) else ("own", optimizer)
    readings: list[Reading] = []
    losses: dict[str, list[float]] = {"torch": [], "flax": []}
    with comparison.strict_precision(precision == "float64"):
        reference = comparison.torch_side("float64")
        batch = comparison.batch(reference.outputs(comparison.inputs))
        rates = [float(learning_rate(s) if callable(learning_rate) else learning_rate) for s in range(steps)]
        training = Training(rule, [batch.varied(step) for step in range(steps)], rates, comparison.frozen)
        allowed, notes = allowed_by(comparison, reference) if precision == "float64" else (1.0, ())
        rng, ulp = np.random.default_rng(comparison.seed), ULPS[precision] * allowed
        moving = [training.steps(reference, Moving(ulp, rng)) for _ in range(RUNS)]
        both = zip(training.steps(reference), training.steps(comparison.jax_side(precision)), strict=True)
        largest = noise.Largest()
        for step, (right, result) in enumerate(both):
            others = [next(run) for run in moving]
            for kind, tensors in right.items():
                noises = largest.of(kind, noise.noises_of(tensors, (run[kind] for run in others), ulp))
                values = noise.errors(result[kind], tensors, noises)
                readings.append(Reading(kind, precision, *noise.worst(values), LIMIT, None, step))
            losses["torch"].append(float(right["loss"]["loss"]))
            losses["flax"].append(float(result["loss"]["loss"]))
            progress(step)
    stamp = environment(comparison.device, comparison.float64, comparison.seed)
    return Trajectory(name, precision, readings, losses, time.perf_counter() - began, stamp, notes)
