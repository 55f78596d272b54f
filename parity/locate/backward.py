"""The backward pass: gradients at every output in the run of the model, and of every sub-module alone."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity.compare.jax_side import split
from parity.compare.loss import Batch, jax_loss
from parity.locate.calls import FlaxCall, Key, leaves_of, numeric, recorded, with_leaves
from parity.locate.forward import Forward, arranged, arranged_back, grown
from parity.locate.tree import Errors, Part


class Backward:
    """Compare gradients of a Flax model with those of the PyTorch run that `forward` has compared."""

    def __init__(self, forward: Forward, batch: Batch, memory_limit: int):
        run = self.run = forward.run
        self.forward, self.side, self.batch = forward, forward.side, batch
        keys = [key for key in run.calls if key in forward.repeatable and run.calls[key].gradients]
        self.scale = max((float(np.abs(g).max()) for k in keys for g in run.gradients(k).values()), default=0.0)
        self.readings = {
            path: dataclasses.replace(reading, propagated=None, isolated=None, order=None, evidence=None)
            for path, reading in forward.readings.items()
        }
        for group in self.groups(keys, memory_limit):
            self.gradients = self.propagated(group)
        for key in keys:
            if key[1] in (0, run.counts[key[0]] - 1):  # the calls of a recurrence in between are alike
                self.read(key, "isolated", self.isolated(key))
        for path, reading in self.readings.items():
            reading.order = self.order(path, run.counts[path] - 1) if reading.order is None else reading.order

    def order(self, *key: Any) -> int:
        """The order of a call in the backward pass: the last call comes first."""
        return len(self.run.calls) - 1 - self.run.calls[key].order

    def read(self, key: Key, kind: str, errors: Errors | None) -> None:
        """Record the errors of a call if they are the worst of its path."""
        reading = self.readings[key[0]]
        if reading.worst(kind, errors) and (reading.order is None or self.order(*key) < reading.order):
            reading.order = self.order(*key)

    def groups(self, keys: list[Key], limit: int) -> Iterator[list[Key]]:
        """The calls in groups whose outputs have at most `limit` bytes."""
        group: list[Key] = []
        size = 0
        for key in keys:
            more = sum(a.size * a.dtype.itemsize for a in self.forward.repeatable[key].outputs)
            if group and size + more > limit:
                yield group
                group, size = [], 0
            group.append(key)
            size += more
        yield group

    def propagated(self, group: list[Key]) -> dict[str, np.ndarray]:
        """Compare the gradients at the outputs of some calls; return those of all parameters by PyTorch's name.

        A zero is added to every output, and the loss of the whole model is differentiated with respect to it.
        """
        floats, others, labels, targets = self.side.arguments(self.batch)
        graphdef, params, rest = split(self.forward.model)
        keys = {flax: key for flax, key in self.forward.pairs.items() if key in group}

        def objective(params: nnx.State, zeros: dict[Key, list[jax.Array]]) -> jax.Array:
            counts: dict[str, int] = {}

            def add(call: FlaxCall) -> Any:
                n = counts[call.path] = counts.get(call.path, -1) + 1
                key = keys.get((call.path, n))
                return call.output if key is None else added(call.output, zeros[key])

            model = nnx.merge(graphdef, params, rest)
            with recorded(model, add):
                return jax_loss(self.side.call(getattr(model, "plain", model), floats | others), labels, targets)

        zeros = {key: [jnp.zeros(a.shape, a.dtype) for a in self.forward.repeatable[key].outputs] for key in group}
        of_params, of_outputs = jax.grad(objective, argnums=(0, 1))(params, zeros)
        for key in group:
            right = self.run.gradients(key)
            ours = [np.asarray(of_outputs[key][i], np.float64) for i in right if i < len(of_outputs[key])]
            self.read(key, "propagated", self.errors(ours, list(right.values()), self.scale))
        return self.side.weights.read(of_params)

    def isolated(self, key: Key) -> Errors | None:
        """Errors of a sub-module's gradients, of inputs and parameters, given PyTorch's inputs and output gradients."""
        given = self.run.gradients(key)
        module = self.run.modules[key[0]]
        module.zero_grad(set_to_none=True)
        outputs, inputs = self.run.repeated(key, grad=True)
        torch.autograd.backward([outputs[i] for i in given], [torch.tensor(g) for g in given.values()])
        call, path = self.forward.repeatable[key], self.readings[key[0]].flax_path
        values = call.values(self.run)
        floats = {name: value for name, value in values.items() if numeric(value) == "f"}
        ours, pull = jax.vjp(lambda params, floats: call.call(params, values | floats), call.part.params, floats)
        cotangents = [
            jnp.asarray(arranged(given[i], a.shape), a.dtype) if i in given else jnp.zeros_like(a)
            for i, a in enumerate(ours)
        ]
        if any(np.shape(cotangent) != a.shape for cotangent, a in zip(cotangents, ours, strict=True)):
            return None  # another layout, e.g. of attention weights; the enclosing module is compared
        of_params, of_inputs = pull(cotangents)
        names = {number: name for name, number in self.run.calls[key].inputs.items()}
        found: list[tuple[Any, torch.Tensor | None]] = []
        found += [(of_inputs[name], inputs[names[call.paired[name][0]]].grad) for name in floats]
        prefix = tuple(int(word) if word.isdigit() else word for word in path.split(".") if word)
        gradients = self.side.weights.read(call.part.state(of_params), prefix)
        theirs = {".".join(filter(None, (key[0], n))): p.grad for n, p in module.named_parameters() if p.requires_grad}
        found += [(gradients[name], gradient) for name, gradient in theirs.items() if name in gradients]
        module.zero_grad(set_to_none=True)
        pairs = [(np.asarray(a, np.float64), np.zeros(np.shape(a)) if b is None else b.numpy()) for a, b in found]
        # A gradient that is zero in exact arithmetic is rounding noise, relative to the gradients it is computed from.
        scale = max(float(np.abs(b).max(initial=0.0)) for b in [*(b for _, b in pairs), *given.values()])
        return self.errors([a for a, _ in pairs], [b for _, b in pairs], scale)

    def errors(self, ours: list[np.ndarray], right: list[np.ndarray], scale: float) -> Errors | None:
        """Errors in PyTorch's layout, relative to a scale."""
        ours = [arranged_back(a, b.shape) for a, b in zip(ours, right, strict=False)]
        return Errors.of(ours, right, self.side.dtype, scale)

    def tree(self) -> Part:
        """The sub-modules with their errors and verdicts."""
        return grown("", self.readings, self.run, "backward", lambda path: "")


def added(output: Any, zeros: list[jax.Array]) -> Any:
    """Add an array to each floating array of an output."""
    named = {n: leaf for n, leaf in leaves_of({"output": output}).items() if numeric(leaf) == "f"}
    values = {name: leaf + zero for (name, leaf), zero in zip(named.items(), zeros, strict=True)}
    return with_leaves({"output": output}, values)["output"]
