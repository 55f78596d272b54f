"""One pair in every floating dtype: what PyTorch itself loses there is the yardstick for what Flax loses.

The truth of a dtype is PyTorch in float64 with the weights and inputs that dtype can hold: rounding them is no error of
computing. The worst tensor of Flax is held to the worst of PyTorch: in 16 bits a single bias's gradient is off by where
its sum was rounded, which each library does elsewhere. A language model is also judged by its distributions: KL(truth ‖
model) and the best tokens.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from jaxmodels.weights.names import as_numpy
from parity.compare import jax_side, torch_side
from parity.compare.adapters import as_module
from parity.compare.inputs import Inputs, random_targets
from parity.compare.jax_side import FlaxSide
from parity.compare.names import Names, weights_of
from parity.compare.torch_side import TorchSide
from parity.locate.store import DEFAULT_LIMIT, check_limit
from parity.locate.tree import Part
from parity.measure import limits
from parity.report.results import Agreement, Check, Cost, FastPath, Row, Sweep
from parity.report.stamp import environment

DTYPES = ("float64", "float32", "bfloat16", "float16")
KINDS = ("output", "parameter gradients")


def sweep(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    labels: Any = None,
    dtypes: Sequence[str] = DTYPES,
    layers: bool = True,
    names: Names | None = None,
    channels_last: Sequence[str] = (),
    device: str | None = None,
    randomize: bool = True,
    seed: int = 0,
    memory_limit: int = DEFAULT_LIMIT,
    progress: Callable[[str], None] = lambda dtype: None,
) -> Sweep:
    """Outputs and parameter gradients of both sides in every dtype, each against the float64 truth of that dtype.

    `layers` traces every sub-module in each dtype as well. With labels, a single output counts as logits over the whole
    vocabulary. The other arguments are those of `parity.check`. Raises ValueError for a dtype that is not in DTYPES and
    for a negative memory_limit.
    """
    check_limit(memory_limit)
    began = time.perf_counter()
    if set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes={list(dtypes)} must be among {', '.join(DTYPES)}")
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    module = torch_side.randomized(torch_module, seed) if randomize else torch_module
    chosen = jax.devices(device)[0]
    if chosen.platform == "tpu":
        dtypes = [dtype for dtype in dtypes if dtype != "float64"]
    flax_module = as_module(flax_module, inputs, channels_last)
    weights = weights_of(module, flax_module, names)
    rows, checks = [], []
    for name in dtypes:
        progress(name)
        with torch_side.strict_precision(), jax_side.strict_precision(name == "float64", chosen):
            dtype = getattr(torch, name)
            rounded = inputs.rounded(as_numpy(torch.empty(0, dtype=dtype)).dtype)
            theirs = TorchSide(module, dtype, "cpu")
            truth = TorchSide(theirs.module, torch.float64, "cpu")
            state = theirs.module.state_dict()
            ours = FlaxSide(flax_module, state, rounded, jnp.dtype(name), weights, channels_last)
            targets = random_targets(truth.outputs(rounded), seed)
            arguments = (rounded, labels, targets)
            right, own, result = (side.evaluate(*arguments) for side in (truth, theirs, ours))
            found = {}
            for kind in KINDS:
                if kind not in right:
                    continue
                frozen = result[kind].keys() - right[kind].keys() if kind != "output" else set()
                held = {key: tensor for key, tensor in result[kind].items() if key not in frozen}
                where, value = limits.worst(limits.errors(held, right[kind]))
                found[kind] = value, limits.worst(limits.errors(own[kind], right[kind]))[1]
                if name != "float64":
                    value /= found[kind][1] + limits.RATIO_FLOOR
                limit = limits.FLOAT64_LIMIT if name == "float64" else limits.RATIO_LIMIT
                checks.append(Check(f"sweep: {kind}", name, where, value, limit))
            agreement = yardstick = None
            if labels is not None and len(right["output"]) == 1:
                ((key, logits),) = right["output"].items()
                agreement, yardstick = (Agreement.of(side["output"][key], logits) for side in (result, own))
                checks.append(divergence_check(name, agreement, yardstick))
            parts = traced(truth, ours, rounded, chosen, memory_limit) if layers else None
            rows.append(Row(name, found, agreement, yardstick, parts))
    stamp = environment(chosen, chosen.platform != "tpu", seed)
    return Sweep(rows, checks, time.perf_counter() - began, stamp)


def divergence_check(name: str, ours: Agreement, theirs: Agreement) -> Check:
    """√KL grows as the error of logits does (KL ≈ half its variance): so it has the same limits."""
    value, own = (float(np.sqrt(agreement.kl_mean)) for agreement in (ours, theirs))
    if name == "float64":
        return Check("sweep: √KL", name, "logits", value, 1e-7)  # KL itself is rounded at 1e-16
    return Check("sweep: √KL", name, "logits", value / (own + limits.RATIO_FLOOR), limits.RATIO_LIMIT)


def traced(truth: TorchSide, side: FlaxSide, inputs: Inputs, device: jax.Device, memory_limit: int) -> Part | None:
    """The errors of every sub-module's outputs; None on a device, where only whole programs are run."""
    from parity.locate.trace import trace

    if device.platform != "cpu":
        return None
    return trace(truth, side, inputs, memory_limit=memory_limit).forward


def fast_path(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    labels: Any = None,
    names: Names | None = None,
    channels_last: Sequence[str] = (),
    device: str | None = None,
    matmul_precision: str | None = None,
    randomize: bool = True,
    seed: int = 0,
) -> FastPath:
    """A second pass as users run it: matmuls at the device's default precision (TF32, bfloat16), and twice.

    matmul_precision names another precision of `jax.default_matmul_precision` to be the fast one. The checks are of
    determinism: 0 where every bit is equal.
    """
    began = time.perf_counter()
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    module = torch_side.randomized(torch_module, seed) if randomize else torch_module
    chosen = jax.devices(device)[0]
    flax_module = as_module(flax_module, inputs, channels_last)
    weights = weights_of(module, flax_module, names)
    with torch_side.strict_precision():
        truth_side, own_side = (TorchSide(module, dtype, "cpu") for dtype in (torch.float64, torch.float32))
        targets = random_targets(truth_side.outputs(inputs), seed)
        arguments = (inputs, labels, targets)
        truth, own = truth_side.evaluate(*arguments), own_side.evaluate(*arguments)
    state = own_side.module.state_dict()

    def run(precision: str | None) -> dict[str, dict[str, np.ndarray]]:
        with default_precision(precision, chosen):  # a new side: a new compilation
            side = FlaxSide(flax_module, state, inputs, jnp.float32, weights, channels_last)
            return side.evaluate(*arguments)

    strict, fast, again = run("highest"), run(matmul_precision), run(matmul_precision)
    costs, checks = [], []
    for kind, tensors in truth.items():
        pairs = [{key: a for key, a in side[kind].items() if key in tensors} for side in (strict, fast, again)]
        name, default = limits.worst(limits.errors(pairs[1], tensors))
        others = [limits.worst(limits.errors(side, tensors))[1] for side in (pairs[0], own[kind])]
        costs.append(Cost(kind, name, others[0], default, others[1]))
        apart = limits.worst(limits.errors(pairs[2], {key: a.astype(np.float64) for key, a in pairs[1].items()}))
        checks.append(Check(f"two runs: {kind}", "float32", *apart, np.inf))
    stamp = environment(chosen, chosen.platform != "tpu", seed)
    return FastPath(costs, checks, time.perf_counter() - began, stamp)


@contextlib.contextmanager
def default_precision(precision: str | None, device: jax.Device) -> Iterator[None]:
    """Float32 at a matmul precision (None: the device's default) on a device, while it is open."""
    with jax.enable_x64(False), jax.default_matmul_precision(precision), jax.default_device(device):
        yield
