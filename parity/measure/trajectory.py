"""Training on both sides from one state, compared after every step: where do the trajectories part, and in what?

A step computes, in this order, the loss, its gradients, the optimizer's moments and the new parameters. The first of
these that is past its limit tells a wrong backward pass from a wrong update.
"""

import glob
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from parity.compare import jax_side, torch_side
from parity.compare.adapters import as_module
from parity.compare.inputs import Inputs, matches, random_targets, roll
from parity.compare.jax_side import FlaxSide
from parity.compare.names import Names, weights_of
from parity.compare.torch_side import TorchSide
from parity.measure import limits
from parity.measure.optimizers import OPTIMIZERS, Optimizer, flax_steps, torch_steps
from parity.report.results import Reading, Trajectory
from parity.report.stamp import environment


def trajectory(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    labels: Any = None,
    optimizer: str | Optimizer = "adam",
    learning_rate: float | Callable[[int], float] = 1e-3,
    steps: int = 100,
    precision: str = "float64",
    names: Names | None = None,
    channels_last: Sequence[str] = (),
    zero_gradients: Sequence[str] = (),
    device: str | None = None,
    randomize: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] = lambda step: None,
) -> Trajectory:
    """Trains both modules from the same weights on the same batches, and compares them after every step.

    Batches are variations of the inputs (see `Inputs.batch`). optimizer: a name in OPTIMIZERS, or an `Optimizer`;
    learning_rate may be a function of the step. precision 'float64' holds errors against float64's limit; 'float32'
    holds Flax's distance from PyTorch in float64 against PyTorch's own distance in float32, step by step: two runs that
    round differently drift apart, and how fast is PyTorch's to say. That blames libraries too: optax computes Adam's
    1 - β₂ᵗ in float32 (1.3e-5 off at the first step), PyTorch in float64. The other arguments are those of
    `parity.check`. Raises ValueError for another name, precision or number of steps, and where nothing is trained.
    """
    began = time.perf_counter()
    pair = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if pair is None:
        raise ValueError(f"optimizer={optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    if precision not in ("float64", "float32"):
        raise ValueError(f"precision={precision!r} must be float64 or float32")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    module = torch_side.randomized(torch_module, seed) if randomize else torch_module
    still = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    frozen = (*zero_gradients, *map(glob.escape, still))
    if all(matches(name, frozen) for name, _ in module.named_parameters()):
        raise ValueError("torch_module has no parameter that is trained")
    chosen = jax.devices(device)[0]
    flax_module = as_module(flax_module, inputs, channels_last)
    weights = weights_of(module, flax_module, names)
    readings: list[Reading] = []
    losses: dict[str, list[float]] = {"torch": [], "flax": []}
    with torch_side.strict_precision(), jax_side.strict_precision(precision == "float64", chosen):
        truth = TorchSide(module, torch.float64, "cpu")
        targets = random_targets(truth.outputs(inputs), seed)
        batches = [(inputs.batch(step), None if labels is None else roll(labels, step)) for step in range(steps)]
        rates = [float(learning_rate(s) if callable(learning_rate) else learning_rate) for s in range(steps)]
        run = (batches, targets, frozen, pair, rates)
        state = truth.module.state_dict()
        if precision == "float64":
            limit, own = limits.FLOAT64_LIMIT, None
        else:
            narrow = TorchSide(module, torch.float32, "cpu")
            limit, own, state = limits.RATIO_LIMIT, torch_steps(narrow, *run), narrow.module.state_dict()
        ours = FlaxSide(flax_module, state, inputs, jnp.dtype(precision), weights, channels_last)
        for step, (right, result) in enumerate(zip(torch_steps(truth, *run), flax_steps(ours, *run), strict=True)):
            theirs = None if own is None else next(own)
            for kind, tensors in right.items():
                if theirs is None:
                    values = limits.errors(result[kind], tensors)
                else:
                    values = limits.ratios(result[kind], theirs[kind], tensors)
                readings.append(Reading(kind, precision, *limits.worst(values), limit, step))
            losses["torch"].append(float(right["loss"]["loss"]))
            losses["flax"].append(float(result["loss"]["loss"]))
            progress(step)
    stamp = environment(chosen, chosen.platform != "tpu", seed)
    name = optimizer if isinstance(optimizer, str) else "own"
    return Trajectory(name, precision, readings, losses, time.perf_counter() - began, stamp)
