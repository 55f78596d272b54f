"""Optimizers that both libraries implement, and step-by-step training of either side with one of them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from jaxmodels.weights.names import as_numpy
from parity.compare.loss import Batch, Kinds
from parity.compare.names import matches
from parity.compare.noise import Noise, Spread, of_spreads
from parity.compare.sides.jax_side import JaxSide, as_in_torch, compiled
from parity.compare.sides.torch_side import TorchSide, as_arrays, gradient, move

RUNS = 2  # of a training, to measure its noise


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One update rule in both libraries.

    torch(parameters, learning_rate) and optax(learning_rate) make it. moments: by name, the key of a moment in
    PyTorch's state of a parameter, and the corresponding field of optax's state.
    """

    torch: Callable[[Any, float], torch.optim.Optimizer]
    optax: Callable[[Any], optax.GradientTransformation]
    moments: Mapping[str, tuple[str, str]]


ADAM = {"first moment": ("exp_avg", "mu"), "second moment": ("exp_avg_sq", "nu")}
MOMENTUM = {"momentum": ("momentum_buffer", "trace")}

# Both libraries get the same hyperparameters if their defaults, or where they add ε, differ. Not included because
# the equations differ: NAdam (PyTorch decays the momentum), AMSGrad (the maximum is of v or of v̂), Rprop (optax steps
# by the last gradient).
OPTIMIZERS: dict[str, Optimizer] = {
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
class Moving:
    """A movement of every parameter and input by up to `ulp`, relative to its size, before each step."""

    ulp: float
    rng: np.random.Generator


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run for either side: a batch and a learning rate for each step; `frozen` parameters keep their values.

    frozen: patterns of parameter names.
    """

    optimizer: Optimizer
    batches: Sequence[Batch]
    rates: Sequence[float]
    frozen: tuple[str, ...]

    def steps(self, side: TorchSide | JaxSide, moving: Moving | None = None) -> Iterator[Kinds]:
        """Results of each step by kind, in the order of computation: loss, gradients, moments, parameters.

        The side itself does not change. There are no steps if no parameter is trained. moving: PyTorch's alone.
        """
        return torch_steps(side, self, moving) if isinstance(side, TorchSide) else jax_steps(side, self)

    def outcome(self, side: TorchSide | JaxSide, moving: Moving | None = None) -> Kinds:
        """The loss of every step, and the parameters after the last; empty if there are no steps.

        Trains the side itself, which is of no use afterwards: copies of a large model would fill the memory.
        """
        losses: dict[str, np.ndarray] = {}
        last: Step | None = None
        trained = (
            torch_training(side, self, moving) if isinstance(side, TorchSide) else jax_training(side, self, spent=True)
        )
        for number, last in enumerate(trained):
            losses[f"step {number}"] = last.loss
        return {} if last is None else {"training loss": losses, "trained parameters": last.parameters()}

    def noises(self, side: Callable[[], TorchSide], truth: Kinds, ulp: float, seed: int) -> dict[str, dict[str, Noise]]:
        """The rounding noise of an outcome: of runs whose parameters and inputs move by up to `ulp` in every step.

        side: makes a side for each run.
        """
        rng = np.random.default_rng(seed)
        spreads = {kind: {name: Spread(tensor) for name, tensor in tensors.items()} for kind, tensors in truth.items()}
        for _ in range(RUNS):
            found = self.outcome(side(), Moving(ulp, rng))
            for kind, spread in spreads.items():
                for name in spread:
                    spread[name].add(found[kind][name], truth[kind][name])
            del found  # or it is in memory with the next
        noises = {kind: of_spreads(of_kind, ulp) for kind, of_kind in spreads.items()}
        largest = max(noises["training loss"].values(), key=lambda noise: noise.unit)  # one number may move by chance
        return noises | {"training loss": dict.fromkeys(noises["training loss"], largest)}


@dataclasses.dataclass(frozen=True)
class Step:
    """Results of a training step; all but the loss are read when asked for, before the next step."""

    loss: np.ndarray
    gradients: Callable[[], Mapping[str, np.ndarray]]
    moments: Callable[[], Kinds]
    parameters: Callable[[], Mapping[str, np.ndarray]]

    def kinds(self) -> Kinds:
        """Copies of all results by kind, in the order of computation."""
        found = {
            "loss": {"loss": self.loss},
            "gradients": self.gradients(),
            **self.moments(),
            "parameters": self.parameters(),
        }
        return {kind: {name: np.array(array) for name, array in tensors.items()} for kind, tensors in found.items()}


def torch_steps(side: TorchSide, training: Training, moving: Moving | None = None) -> Iterator[Kinds]:
    """`Training.steps` in PyTorch."""
    return (step.kinds() for step in torch_training(side.again(), training, moving))


def jax_steps(side: JaxSide, training: Training) -> Iterator[Kinds]:
    """`Training.steps` in JAX."""
    return (step.kinds() for step in jax_training(side, training))


def torch_training(side: TorchSide, training: Training, moving: Moving | None = None) -> Iterator[Step]:
    """The steps of a PyTorch side, which is trained."""
    named = side.module.named_parameters()
    trained = {n: p for n, p in named if p.requires_grad and not matches(n, training.frozen)}
    if not (trained and training.batches):
        return
    optimizer = training.optimizer.torch(list(trained.values()), training.rates[0])

    def gradients() -> dict[str, np.ndarray]:
        return {name: gradient(parameter) for name, parameter in trained.items()}

    def moments() -> Kinds:
        return {
            kind: as_arrays({name: optimizer.state[p][key] for name, p in trained.items()})
            for kind, (key, _) in training.optimizer.moments.items()
        }

    for batch, rate in zip(training.batches, training.rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        if moving is not None:
            side.module.zero_grad(set_to_none=True)  # moving a large parameter needs memory
            move(trained.values(), moving.ulp, moving.rng)
            batch = batch.with_inputs(batch.inputs.moved(moving.ulp, moving.rng))
        loss, *_ = side.differentiate(batch, 1.0 if moving is None else moving.rng.uniform(1, 2))
        for parameter in trained.values():  # JAX's gradient is zero, not None, if the loss does not depend on it
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        yield Step(as_numpy(loss).copy(), gradients, moments, lambda: as_arrays(trained))


def jax_training(side: JaxSide, training: Training, *, spent: bool = False) -> Iterator[Step]:
    """The steps of a Flax side; each tensor has its PyTorch name. spent: the side's own arrays may be overwritten."""
    held = side.weights.held(side.params, training.frozen)
    if not training.batches or all(path in held for path, _ in nnx.to_flat_state(side.params)):
        return

    def optimizer(rate: Any) -> optax.GradientTransformation:
        # As in PyTorch, the real and imaginary part of a complex parameter are two parameters.
        return optax.contrib.split_real_and_imaginary(training.optimizer.optax(rate))

    def update(params: nnx.State, state: Any, gradients: nnx.State, rate: jax.Array) -> tuple[nnx.State, Any]:
        updates, state = optimizer(rate).update(gradients, state, params)
        flat = nnx.to_flat_state(updates)
        still = {path: leaf.replace(jnp.zeros_like(leaf.get_value())) for path, leaf in flat if path in held}
        return optax.apply_updates(params, nnx.from_flat_state(dict(flat) | still)), state

    def read(tree: Any, *, gradients: bool = False) -> dict[str, np.ndarray]:
        named = side.weights.read(tree, gradients=gradients)
        return {name: array for name, array in named.items() if not matches(name, training.frozen)}

    params: Any = taken(side) if spent else side.params
    gradients: Any = None
    state = optimizer(training.rates[0]).init(params)

    def of_gradients() -> dict[str, np.ndarray]:
        return read(gradients, gradients=True)

    def parameters() -> dict[str, np.ndarray]:
        return read(params)

    def moments() -> Kinds:
        keys = training.optimizer.moments.items()
        return {kind: read(whole(optax.tree.get(state, key))) for kind, (_, key) in keys}

    step = compiled(update, donated=(0, 1) if spent else ())
    for batch, rate in zip(training.batches, training.rates, strict=True):
        (loss, _), (gradients, _) = side.value_and_grad(params, *side.arguments(batch), side.rest)
        gradients = as_in_torch(gradients)
        params, state = step(params, state, gradients, jnp.asarray(rate, side.dtype))
        gradients = None if spent else gradients
        yield Step(np.array(loss), of_gradients, moments, parameters)


def taken(side: JaxSide) -> Any:
    """The parameters of a side, which loses them, in memory that XLA can use again; NumPy's it cannot."""
    arrays, structure = jax.tree.flatten(side.params)
    del side.params, side.module
    for i in range(len(arrays)):  # one by one, so that there are no two copies of all of them
        arrays[i] = jnp.array(arrays[i], copy=True)
    return jax.tree.unflatten(structure, arrays)


def whole(moment: Any) -> Any:
    """A moment with the real and imaginary parts of complex parameters joined."""

    def is_pair(part: Any) -> bool:
        return getattr(part, "_fields", ()) == ("real", "imaginary")

    return jax.tree.map(
        lambda part: part.real + 1j * part.imaginary if is_pair(part) else part, moment, is_leaf=is_pair
    )
