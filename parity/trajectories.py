"""Training on both sides from one state, compared after every step: where do the trajectories part, and in what?

A step computes, in this order, the loss, its gradients, the optimizer's moments and the new parameters. The first of
these that is past its limit tells a wrong backward pass from a wrong update.
"""

import dataclasses
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen, nnx

from parity import budgets, flax_side, torch_side
from parity.checking import as_module
from parity.divergence import plain
from parity.flax_side import FlaxSide, compiled
from parity.mapping import Names, weights_of
from parity.objective import Inputs, matches, named_leaves, random_targets, roll
from parity.report import Check
from parity.torch_side import TorchSide

Batch = tuple[Inputs, np.ndarray | None]
Kinds = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One update rule in both libraries.

    torch(parameters, learning_rate) and optax(learning_rate) make it; moments: by name, where PyTorch's state keeps a
    moment of a parameter and the field of optax's state with the same.
    """

    torch: Callable[[Any, float], torch.optim.Optimizer]
    optax: Callable[[Any], optax.GradientTransformation]
    moments: Mapping[str, tuple[str, str]]


ADAM = {"first moment": ("exp_avg", "mu"), "second moment": ("exp_avg_sq", "nu")}
MOMENTUM = {"momentum": ("momentum_buffer", "trace")}

# Where a library's defaults or its place for ε differ, both are told the same. Not here, because their equations are
# others: NAdam (PyTorch decays the momentum), AMSGrad (the maximum is of v or of v̂), Rprop (optax steps by the last
# gradient).
OPTIMIZERS = {
    "sgd": Optimizer(lambda p, lr: torch.optim.SGD(p, lr), lambda lr: optax.sgd(lr), {}),
    "momentum": Optimizer(
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), lambda lr: optax.sgd(lr, momentum=0.9), MOMENTUM
    ),
    "nesterov": Optimizer(
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
        lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
        MOMENTUM,
    ),
    "adam": Optimizer(lambda p, lr: torch.optim.Adam(p, lr), lambda lr: optax.adam(lr), ADAM),
    "adamw": Optimizer(
        lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.01),
        lambda lr: optax.adamw(lr, weight_decay=0.01),
        ADAM,
    ),
    "adamax": Optimizer(
        lambda p, lr: torch.optim.Adamax(p, lr),
        lambda lr: optax.adamax(lr),
        {"first moment": ("exp_avg", "mu"), "largest gradient": ("exp_inf", "nu")},
    ),
    "radam": Optimizer(  # PyTorch adds ε to √v, optax to √v̂
        lambda p, lr: torch.optim.RAdam(p, lr, eps=1e-30), lambda lr: optax.radam(lr, eps=1e-30), ADAM
    ),
    "rmsprop": Optimizer(
        lambda p, lr: torch.optim.RMSprop(p, lr, alpha=0.99),
        lambda lr: optax.rmsprop(lr, decay=0.99, eps_in_sqrt=False),
        {"second moment": ("square_avg", "nu")},
    ),
    "adagrad": Optimizer(  # √v + ε or √(v + ε)
        lambda p, lr: torch.optim.Adagrad(p, lr, initial_accumulator_value=0.1, eps=0.0),
        lambda lr: optax.adagrad(lr, initial_accumulator_value=0.1, eps=0.0),
        {"sum of squares": ("sum", "sum_of_squares")},
    ),
    "adadelta": Optimizer(
        lambda p, lr: torch.optim.Adadelta(p, lr),
        lambda lr: optax.adadelta(lr),
        {"second moment": ("square_avg", "e_g"), "second moment of updates": ("acc_delta", "e_x")},
    ),
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """The worst tensor of one kind after one step (counted from 0), and how far off it is."""

    step: int
    kind: str
    worst: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    @property
    def where(self) -> str:
        return self.kind if self.worst == self.kind else f"{self.kind} of {self.worst}"


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Every reading of a run, in the order in which they were computed; `losses` of both sides by step."""

    optimizer: str
    precision: str
    readings: list[Reading]
    losses: dict[str, list[float]]

    @property
    def passed(self) -> bool:
        return all(reading.passed for reading in self.readings)

    @property
    def parted(self) -> Reading | None:
        """The first reading past its limit: where both sides part."""
        return next((reading for reading in self.readings if not reading.passed), None)

    def by_kind(self) -> dict[str, list[Reading]]:
        """The readings of each kind, one per step."""
        kinds: dict[str, list[Reading]] = {}
        for reading in self.readings:
            kinds.setdefault(reading.kind, []).append(reading)
        return kinds

    def checks(self) -> list[Check]:
        """One `Check` per kind: its worst step. In float32 they only report, see `trajectory`."""
        found = []
        for kind, readings in self.by_kind().items():
            worst = max(readings, key=lambda r: np.inf if np.isnan(r.value) else r.value)
            where = f"step {worst.step}" if worst.worst == kind else f"step {worst.step}, {worst.worst}"
            limit = worst.limit if self.precision == "float64" else np.inf
            found.append(Check(f"{self.optimizer}: {kind}", self.precision, where, worst.value, limit))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinities are strings."""
        return plain(dataclasses.asdict(self) | {"passed": self.passed})

    def __str__(self) -> str:
        """A table of steps 0, 1, 2, 5, 10, … and the last, and where the sides part."""
        kinds = self.by_kind()
        steps = len(next(iter(kinds.values())))
        shown = sorted({s for s in range(steps) if str(s).strip("0") in ("", "1", "2", "5")} | {steps - 1})
        width = max(12, *map(len, kinds))
        lines = [f"{self.optimizer}, {self.precision}, {steps} steps"]
        lines.append("  step  " + "  ".join(f"{h:>{width}}" for h in ("loss (torch)", *kinds)))
        for s in shown:
            cells = [f"{self.losses['torch'][s]:.6g}", *(f"{readings[s].value:.1e}" for readings in kinds.values())]
            lines.append(f"  {s:>4}  " + "  ".join(f"{cell:>{width}}" for cell in cells))
        at = self.parted
        lines.append(
            "  the sides never part"
            if at is None
            else f"  first part at step {at.step}: {at.where}, {at.value:.1e}, at most {at.limit:g}"
        )
        return "\n".join(lines)


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
    readings, losses = [], {"torch": [], "flax": []}
    with torch_side.strict_precision(), flax_side.strict_precision(precision == "float64", chosen):
        truth = TorchSide(module, torch.float64, "cpu")
        targets = random_targets(truth.outputs(inputs), seed)
        batches = [(inputs.batch(step), None if labels is None else roll(labels, step)) for step in range(steps)]
        rates = [float(learning_rate(s) if callable(learning_rate) else learning_rate) for s in range(steps)]
        run = (batches, targets, frozen, pair, rates)
        state = truth.module.state_dict()
        if precision == "float64":
            limit, own = budgets.FLOAT64_LIMIT, None
        else:
            narrow = TorchSide(module, torch.float32, "cpu")
            limit, own, state = budgets.RATIO_LIMIT, torch_steps(narrow, *run), narrow.module.state_dict()
        ours = FlaxSide(flax_module, state, inputs, jnp.dtype(precision), weights, channels_last)
        for step, (right, result) in enumerate(zip(torch_steps(truth, *run), flax_steps(ours, *run), strict=True)):
            theirs = None if own is None else next(own)
            for kind, tensors in right.items():
                if theirs is None:
                    values = budgets.errors(result[kind], tensors)
                else:
                    values = budgets.ratios(result[kind], theirs[kind], tensors)
                readings.append(Reading(step, kind, *budgets.worst(values), limit))
            losses["torch"].append(float(right["loss"]["loss"]))
            losses["flax"].append(float(result["loss"]["loss"]))
            progress(step)
    return Trajectory(optimizer if isinstance(optimizer, str) else "own", precision, readings, losses)


def torch_steps(
    side: TorchSide,
    batches: Sequence[Batch],
    targets: Mapping[str, np.ndarray],
    frozen: Sequence[str],
    pair: Optimizer,
    rates: Sequence[float],
) -> Iterator[Kinds]:
    """What each step computed, by kind; the side itself stays as it is."""
    side = TorchSide(side.module, side.dtype, side.device)
    trained = {n: p for n, p in side.module.named_parameters() if p.requires_grad and not matches(n, frozen)}
    optimizer = pair.torch(list(trained.values()), rates[0])
    for (inputs, labels), rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = side.loss(named_leaves(inputs.call(side.module, side.tensors(inputs)), torch.Tensor), labels, targets)
        loss.backward()
        gradients = {name: side.gradient(parameter) for name, parameter in trained.items()}
        for parameter in trained.values():  # what the loss does not reach has a gradient of zero, as in JAX
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moments = {
            kind: side.numpy({name: optimizer.state[p][key] for name, p in trained.items()})
            for kind, (key, _) in pair.moments.items()
        }
        found = {
            "loss": side.numpy({"loss": loss}),
            "gradients": gradients,
            **moments,
            "parameters": side.numpy(trained),
        }
        yield {kind: {name: array.copy() for name, array in tensors.items()} for kind, tensors in found.items()}


def flax_steps(
    side: FlaxSide,
    batches: Sequence[Batch],
    targets: Mapping[str, np.ndarray],
    frozen: Sequence[str],
    pair: Optimizer,
    rates: Sequence[float],
) -> Iterator[Kinds]:
    """The same in JAX, each tensor under its PyTorch name."""
    held = side.weights.held(side.params, frozen)

    @compiled
    def update(params, state, gradients, rate):
        updates, state = pair.optax(rate).update(gradients, state, params)
        flat = nnx.to_flat_state(updates)
        still = {path: leaf.replace(jnp.zeros_like(leaf.get_value())) for path, leaf in flat if path in held}
        return optax.apply_updates(params, nnx.from_flat_state(dict(flat) | still)), state

    def read(tree: Any) -> dict[str, np.ndarray]:
        return {name: array for name, array in side.weights.read(tree).items() if not matches(name, frozen)}

    params, state = side.params, pair.optax(rates[0]).init(side.params)
    for (inputs, labels), rate in zip(batches, rates, strict=True):
        (loss, _), (gradients, _) = side.value_and_grad(params, *side.arguments(inputs, labels, targets), side.rest)
        params, state = update(params, state, gradients, jnp.asarray(rate, side.dtype))
        moments = {kind: read(optax.tree.get(state, key)) for kind, (_, key) in pair.moments.items()}
        yield {"loss": {"loss": np.asarray(loss)}, "gradients": read(gradients), **moments, "parameters": read(params)}
