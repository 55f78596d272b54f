"""The Flax half: run, differentiate and train a module, at a chosen precision and on a chosen device."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from parity.compare.inputs import Inputs, matches, named_leaves
from parity.compare.names import Twins, Weights


@contextlib.contextmanager
def strict_precision(float64: bool, device: jax.Device) -> Iterator[None]:
    """Float32 matmuls in float32 (not TF32 or bfloat16), float64 allowed or not, on one device, while it is open."""
    with jax.enable_x64(float64), jax.default_matmul_precision("highest"), jax.default_device(device):
        yield


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit`; on the CPU with LLVM's optimizer off, which takes half of the time and changes no sum's meaning."""
    options = {"xla_backend_optimization_level": 0} if current_device().platform == "cpu" else None
    return jax.jit(function, compiler_options=options)


def current_device() -> jax.Device:
    """The one that `strict_precision` chose, else the first."""
    return jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]


def split(module: Any) -> tuple[Any, nnx.State, nnx.State]:
    """A module's structure, its parameters and its other variables, for nnx.merge."""
    graphdef, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states
    return graphdef, params, rest


class FlaxSide:
    """A Flax module with a PyTorch module's weights, in one dtype. Its tensors bear the PyTorch names.

    `channels_last`: patterns of inputs and outputs that have their channels last here and second in PyTorch.
    """

    def __init__(
        self,
        module: nnx.Module,
        state_dict: Mapping[str, Any],
        inputs: Inputs,
        dtype: Any,
        weights: Weights | None = None,
        channels_last: Sequence[str] = (),
    ):
        self.weights: Weights = weights or Twins()
        self.module = self.weights.load(module, state_dict)
        self.inputs, self.dtype, self.channels_last = inputs, dtype, tuple(channels_last)
        self.graphdef, self.params, self.rest = split(self.module)
        self.value_and_grad = compiled(jax.value_and_grad(self._objective, argnums=(0, 1), has_aux=True))

    def call(self, module: Any, values: dict[str, Any]) -> dict[str, jax.Array]:
        """The outputs by name, laid out as PyTorch's."""
        values = {n: jnp.moveaxis(v, 1, -1) if matches(n, self.channels_last) else v for n, v in values.items()}
        outputs = named_leaves(self.inputs.call(module, values), jax.Array)
        return {n: jnp.moveaxis(v, -1, 1) if matches(n, self.channels_last) else v for n, v in outputs.items()}

    def loaded(self, state_dict: Mapping[str, Any]) -> "FlaxSide":
        """The same with other weights; what was compiled serves both."""
        side = copy.copy(self)
        side.module = self.weights.load(self.module, state_dict)
        _, side.params, side.rest = split(side.module)
        return side

    def _objective(self, params, floats, others, labels, targets, rest):
        outputs = self.call(nnx.merge(self.graphdef, params, rest), floats | others)
        return loss(outputs, labels, targets), outputs

    def arguments(self, inputs: Inputs, labels, targets) -> tuple[dict, dict, Any, Any]:
        arrays = {name: jnp.asarray(value) for name, value in inputs.named().items()}
        floats = {n: a.astype(self.dtype) for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        others = {name: array for name, array in arrays.items() if name not in floats}
        return floats, others, labels, {name: jnp.asarray(target, self.dtype) for name, target in targets.items()}

    def evaluate(self, inputs: Inputs, labels, targets) -> dict[str, dict[str, np.ndarray]]:
        """Outputs and the loss's gradients by kind, each tensor under its PyTorch name."""
        arguments = self.arguments(inputs, labels, targets)
        (_, outputs), (gradients, input_gradients) = self.value_and_grad(self.params, *arguments, self.rest)
        kinds = {
            "output": {name: np.asarray(output) for name, output in outputs.items()},
            "parameter gradients": self.weights.read(gradients),
            "input gradients": {name: np.asarray(gradient) for name, gradient in input_gradients.items()},
        }
        return {kind: tensors for kind, tensors in kinds.items() if tensors}

    def outputs(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The outputs alone."""
        floats, others, *_ = self.arguments(inputs, None, {})
        call = compiled(lambda params, values: self.call(nnx.merge(self.graphdef, params, self.rest), values))
        outputs = call(self.params, floats | others)
        return {name: np.asarray(output) for name, output in outputs.items()}

    def decode(
        self, ids: np.ndarray, start: np.ndarray | None = None, ret: np.ndarray | None = None
    ) -> tuple[int, np.ndarray]:
        """Logits through the cache, laid out like ids, from position `first` on: (first, logits).

        A prefill, a chunk of five, single tokens, and a chunk again. ret: RETRO's neighbours, as its call takes them.
        """
        model, axis = self.module, self.module.sequence_axis
        model = model.unstacked() if hasattr(model, "unstacked") else model  # as `generate` does
        n = ids.shape[axis]
        prompt = max(1, n - 17)
        cuts = [c for c in (0, prompt, *range(prompt + 5, prompt + 13)) if c < n] + [n]
        pieces = [jnp.asarray(ids.take(range(a, b), axis)) for a, b in itertools.pairwise(cuts)]
        # Functions of this call's own: jit remembers by function, and a check must run the code as it is now.
        prefill = compiled(lambda model, ids, cache, more: model.prefill(ids, cache, **more))
        decode = compiled(lambda model, ids, cache, more: model.decode(ids, cache, **more))
        sizes = {} if ret is None else {"neighbors": ret.shape[2:]}
        read = [{}] * len(pieces) if ret is None else neighbors_of(model, jnp.asarray(ret), cuts)
        cache = model.init_cache(ids.shape[1 - axis], n, self.dtype, start, **sizes)
        last, cache = prefill(model, pieces[0], cache, read[0])
        logits = [jnp.expand_dims(last, axis)]
        for piece, neighbors in zip(pieces[1:], read[1:], strict=True):
            more, cache = decode(model, piece, cache, neighbors)
            logits.append(more)
        return prompt - 1, np.asarray(jnp.concatenate(logits, axis=axis))


def neighbors_of(model: Any, ret: jax.Array, cuts: Sequence[int]) -> list[dict[str, jax.Array]]:
    """What RETRO's prefill and decode take beside the pieces of a text between `cuts`."""
    first, *rest = itertools.pairwise(cuts)
    by_token = model.neighbors_by_token(ret, cuts[-1])
    return [{"ret": ret[:, : first[1] // model.chunk_len]}, *({"ret": by_token[:, a:b]} for a, b in rest)]


def loss(outputs: dict[str, jax.Array], labels, targets) -> jax.Array:
    """See `parity.compare.inputs`; raises ValueError where the outputs are not named as the targets."""
    if outputs.keys() != targets.keys():
        raise ValueError(f"PyTorch returns {', '.join(targets)}; the Flax module returns {', '.join(outputs)}")
    if labels is not None:
        (logits,) = outputs.values()
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()
    return sum((jnp.square(output - targets[name]).mean() for name, output in outputs.items()), jnp.zeros(()))
