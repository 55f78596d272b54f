"""The loss that both sides differentiate: one scalar of the outputs, written once for each framework.

With labels (int, the logits' leading shape) it is the mean cross-entropy of one output, the logits; labels of -100 are
ignored. Without, it is the mean squared distance to fixed random targets, so that every output has a gradient of its
own. Elements that are no numbers of the computation (NaN, infinities, constants that mask others) have no target and
are left out, as are outputs of integers and booleans.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.compare.inputs import Inputs, rolled
from parity.compare.outputs import correspondence, words

if TYPE_CHECKING:
    import torch

Kinds = Mapping[str, Mapping[str, np.ndarray]]
"""Results of a module: by kind ('output', 'parameter gradients', …), tensors by PyTorch's name."""

IGNORED = -100  # PyTorch's default for labels without a loss


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one call, with the labels or targets of its loss.

    targets: by output name; with labels only their names are used.
    """

    inputs: Inputs
    labels: np.ndarray | None
    targets: dict[str, np.ndarray]

    def with_inputs(self, inputs: Inputs) -> "Batch":
        """The same labels and targets with other inputs."""
        return dataclasses.replace(self, inputs=inputs)

    def varied(self, step: int) -> "Batch":
        """Other data of the same kind for a training step; the targets stay the same."""
        labels = None if self.labels is None else rolled(self.labels, step)
        return Batch(self.inputs.varied(step), labels, self.targets)


def random_targets(
    outputs: Mapping[str, np.ndarray], seed: int, ours: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Normally distributed targets of the outputs' shapes, NaN where an output has none.

    ours: Flax's outputs by Flax's names; an output that Flax lacks has no targets.
    """
    rng = np.random.default_rng(seed)
    shared = outputs.keys() if ours is None else correspondence(outputs, ours).keys()
    targets = {}
    for name, output in outputs.items():
        target = rng.standard_normal(output.shape)
        if np.iscomplexobj(output):
            target = target + 1j * rng.standard_normal(output.shape)
        targets[name] = np.where(masks(output) | (name not in shared), np.nan, target)
    return targets


def masks(array: np.ndarray) -> np.ndarray:
    """True where an array is not finite, or holds a constant that masks elements, such as -1e9 or finfo.min.

    Such constants are over 1000 times larger than all other elements and equal to each other but for those.
    """
    if array.dtype.kind in "iub":
        return np.zeros(array.shape, bool)
    size = np.abs(array.astype(np.complex128 if np.iscomplexobj(array) else np.float64))
    finite = np.isfinite(size)
    ordered = np.sort(size[finite])[::-1]
    steps = np.flatnonzero(ordered[:-1] > 1000 * np.maximum(ordered[1:], 1.0))
    if not steps.size or ordered[0] > 1.01 * ordered[steps[0]]:
        return ~finite
    return ~finite | (size >= ordered[steps[0]])


def jax_loss(outputs: Mapping[str, jax.Array], labels: Any, targets: Mapping[str, jax.Array]) -> jax.Array:
    """The loss in JAX; raises ValueError if no output has a target's name.

    Outputs without a target, or of another shape than theirs, have no part in it.
    """
    if targets and not outputs.keys() & targets.keys():
        raise ValueError(f"PyTorch returns {', '.join(targets)}; the Flax module returns {', '.join(outputs)}")
    if labels is not None:
        name, axis = logits_of(outputs, np.shape(labels))
        logits = jnp.moveaxis(outputs[name], axis, -1)
        labels = jnp.asarray(labels)
        known = labels != IGNORED
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(known, labels, 0)[..., None], axis=-1)
        return jnp.where(known, losses[..., 0], 0).sum() / known.sum()
    total = jnp.zeros(())
    for name, output in outputs.items():
        target = targets.get(name)
        if target is None or target.shape != output.shape or not jnp.issubdtype(output.dtype, jnp.inexact):
            continue
        kept = ~jnp.isnan(target)
        distance = jnp.where(kept, output - target, 0)
        # A product, because XLA adds a long sum up in one chain, which rounds more than PyTorch's sum.
        square = jnp.vdot(distance, distance).real
        total = total + square / jnp.maximum(kept.sum(), 1).astype(square.dtype)
    return total


def torch_loss(
    outputs: "Mapping[str, torch.Tensor]", labels: "torch.Tensor | None", targets: "Mapping[str, torch.Tensor]"
) -> "torch.Tensor":
    """The same loss in PyTorch."""
    import torch  # not at the top: recordings are replayed where torch is not installed

    if labels is not None:
        check_labels(labels.cpu().numpy(), outputs)
        name, axis = logits_of(outputs, tuple(labels.shape))
        logits = outputs[name].movedim(axis, -1)
        known = labels != IGNORED
        own = logits.gather(-1, torch.where(known, labels, 0)[..., None])[..., 0]
        # Not `cross_entropy`: over a large vocabulary its sum of exponentials loses many times more than logsumexp's.
        losses = torch.where(known, logits.logsumexp(-1) - own, 0)
        return losses.sum() / known.sum()
    found = []
    for name, output in outputs.items():
        target = targets.get(name)
        if target is None or not (output.is_floating_point() or output.is_complex()):
            continue
        kept = ~target.isnan()
        distance = torch.where(kept, output - target, torch.zeros_like(target))
        square = torch.view_as_real(distance).square().sum(-1) if distance.is_complex() else distance.square()
        found.append(square.sum() / kept.sum().clamp(min=1))
    return torch.stack(found).sum() if found else torch.zeros(())


def logits_of(outputs: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[str, int]:
    """The output that labels of a shape belong to, and the axis of its classes: the last one or, failing that, 1.

    It is the one called `logits` if there is one that fits, else the first by name that fits (`output[2]` comes before
    `output[10]`), as jit does not keep the order of a dict. Raises ValueError if none does.
    """
    fitting = []
    for name, output in sorted(outputs.items(), key=lambda item: [w.zfill(9) for w in words(item[0])]):
        given = tuple(output.shape)
        if "int" in str(output.dtype) or "bool" in str(output.dtype) or len(given) != len(shape) + 1:
            continue
        axes = [axis for axis in (-1, 1) if given[:axis] + given[axis:][1:] == shape]
        fitting += [(name, axis) for axis in axes[:1]]
    called = [item for item in fitting if item[0].endswith("[logits]")]
    if not fitting:
        shapes = ", ".join(f"{name} {list(output.shape)}" for name, output in outputs.items())
        raise ValueError(f"labels of shape {list(shape)} must have the leading shape of an output: {shapes}")
    return (called or fitting)[0]


def check_labels(labels: np.ndarray, outputs: Mapping[str, Any]) -> list[str]:
    """Notes on which of several outputs has the loss; raises ValueError for labels that are no classes of it."""
    name, axis = logits_of(outputs, labels.shape)
    classes = outputs[name].shape[axis]
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if wrong.size:
        raise ValueError(
            f"labels={wrong[0]} must be {IGNORED} or from 0 to {classes - 1}, as {name} has {classes} classes"
        )
    if (labels == IGNORED).all():
        raise ValueError(f"labels: all are {IGNORED}, which is ignored; at least one must be a class")
    return [f"the loss is the cross-entropy of {name}"] if len(outputs) > 1 else []
