"""Training either side of a pair step by step, with one update rule stated in both libraries."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from parity.compare.inputs import Inputs, matches, named_leaves
from parity.compare.jax_side import FlaxSide, compiled
from parity.compare.torch_side import TorchSide

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


def torch_steps(
    side: TorchSide,
    batches: Sequence[Batch],
    targets: Mapping[str, np.ndarray],
    frozen: Sequence[str],
    pair: Optimizer,
    rates: Sequence[float],
) -> Iterator[Kinds]:
    """What each step computed, by kind, in the order in which it did; the side itself stays as it is.

    frozen: patterns of parameters that are not trained. Where none is left there are no steps.
    """
    side = TorchSide(side.module, side.dtype, side.device)
    trained = {n: p for n, p in side.module.named_parameters() if p.requires_grad and not matches(n, frozen)}
    if not (trained and batches):
        return
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
    if not batches or all(path in held for path, _ in nnx.to_flat_state(side.params)):
        return

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


def outcome(steps: Iterable[Kinds]) -> Kinds:
    """What all steps came to: the loss of each, and the parameters after the last; nothing where there were none."""
    losses: dict[str, np.ndarray] = {}
    parameters: dict[str, np.ndarray] = {}
    for number, kinds in enumerate(steps):
        losses[f"step {number}"], parameters = kinds["loss"]["loss"], kinds["parameters"]
    return {"training loss": losses, "trained parameters": parameters} if losses else {}
