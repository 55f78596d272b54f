"""The loss that both sides differentiate: one scalar of the outputs, written once for each framework.

With labels (int, the outputs' leading shape) it is the mean cross-entropy of the logits; without, the mean squared
distance to fixed random targets, so that every output has a gradient of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parity.compare.inputs import Inputs, rolled

if TYPE_CHECKING:
    import torch

Kinds = dict[str, dict[str, np.ndarray]]
"""Results of a module: by kind ('output', 'parameter gradients', …), tensors by PyTorch's name."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one call, with the labels or targets of its loss.

    targets: by output name; with labels only their names are used.
    """

    inputs: Inputs
    labels: np.ndarray | None
    targets: dict[str, np.ndarray]

    def varied(self, step: int) -> "Batch":
        """Other data of the same kind for a training step; the targets stay the same."""
        labels = None if self.labels is None else rolled(self.labels, step)
        return Batch(self.inputs.varied(step), labels, self.targets)


def random_targets(outputs: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Normally distributed targets of the outputs' shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(output.shape) for name, output in outputs.items()}


def jax_loss(outputs: Mapping[str, jax.Array], labels: Any, targets: Mapping[str, jax.Array]) -> jax.Array:
    """The loss in JAX; raises ValueError if the names of outputs and targets differ."""
    if outputs.keys() != targets.keys():
        raise ValueError(f"PyTorch returns {', '.join(targets)}; the Flax module returns {', '.join(outputs)}")
    if labels is not None:
        (logits,) = outputs.values()
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()
    return sum((jnp.square(output - targets[name]).mean() for name, output in outputs.items()), jnp.zeros(()))


def torch_loss(
    outputs: "Mapping[str, torch.Tensor]", labels: "torch.Tensor | None", targets: "Mapping[str, torch.Tensor]"
) -> "torch.Tensor":
    """The same loss in PyTorch."""
    import torch  # not at the top: recordings are replayed where torch is not installed

    if labels is not None:
        (logits,) = outputs.values()
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return torch.stack([(output - targets[name]).square().mean() for name, output in outputs.items()]).sum()
