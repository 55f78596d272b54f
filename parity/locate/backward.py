"""The backward pass: gradients at every output in the run of the model, and of every sub-module alone."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxmodels.weights.names import as_numpy
from parity.compare.loss import Batch, jax_loss
from parity.compare.noise import RUNS, Noise, Spread, of_spreads, wide
from parity.compare.outputs import aligned
from parity.compare.sides.jax_side import split
from parity.compare.sides.torch_side import move, tensors_of
from parity.locate.calls import FlaxCall, recorded
from parity.locate.causes import children
from parity.locate.forward import Forward, PathErrors
from parity.locate.layouts import layouts, nearest
from parity.locate.torch_calls import Key, restore
from parity.locate.tree import Errors, Part
from parity.locate.values import leaves_of, numeric, with_leaves

INNOCENT = 1e-3  # of an enclosing module's error: a smaller one inside does not explain it

Gradients = dict[str, np.ndarray]


class Backward:
    """Compare gradients of a Flax model with those of the PyTorch run that `forward` has compared.

    gradients: of all parameters in Flax's plain form, by PyTorch's name.
    """

    def __init__(self, forward: Forward, batch: Batch, memory_limit: int):
        run = self.run = forward.run
        self.forward, self.side, self.batch = forward, forward.side, batch
        self.gradients: Gradients = {}
        self.hints: dict[str, str] = {}
        keys = [key for key in run.calls if key in forward.keys and run.calls[key].gradients]
        self.readings = {
            path: PathErrors(reading.flax_path, reading.flax_type, reading.calls, limit=reading.limit)
            for path, reading in forward.readings.items()
        }
        for group in self.groups(keys, memory_limit):
            self.propagated(group)
        self.keys = set(keys)
        if not self.descend(""):
            self.alone("")  # the model's own code
        for path, reading in self.readings.items():
            if reading.order is None and path in run.counts:
                reading.order = self.order(path, run.counts[path] - 1)

    def descend(self, path: str) -> bool:
        """Read the sub-modules inside a path in isolation; True if one of them is off.

        A module with the right gradients of its inputs and of all parameters inside has no wrong part.
        """
        found = False
        for child in children(path, self.readings):
            off = self.alone(child)
            if off is not False:
                found |= self.descend(child)
            found |= bool(off)
        return found

    def alone(self, path: str) -> bool | None:
        """Read the calls of a path in isolation; True if one is off, None if none could be compared."""
        reading = self.readings[path]
        for n in dict.fromkeys(
            (0, self.run.counts[path] - 1) if path in self.run.counts else ()
        ):  # the calls of a recurrence in between are alike
            if (path, n) in self.keys:
                self.guarded((path, n))
        return None if reading.isolated is None else reading.isolated.noise > reading.limit

    def guarded(self, key: Key) -> None:
        """Read a call in isolation; an exception becomes the reason why it is not compared."""
        try:
            self.read(key, "isolated", self.isolated(key))
        except Exception as error:
            self.readings[key[0]].reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

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
            more = sum(array.nbytes for array in self.forward.flax.outputs_of(self.forward.keys[key]))
            if group and size + more > limit:
                yield group
                group, size = [], 0
            group.append(key)
            size += more
        yield group

    def propagated(self, group: list[Key]) -> None:
        """Compare the gradients at the outputs of some calls.

        A zero is added to every output, and the loss of the whole model is differentiated with respect to it.
        """
        floats, others, labels, targets = self.side.arguments(self.batch)
        graphdef, params, rest = split(self.forward.flax.model)
        keys = {flax: key for key, flax in self.forward.keys.items() if key in group}
        zeros = {
            f"{path} {n}": [self.zeros(array) for array in self.forward.flax.outputs_of(flax)]
            for flax, (path, n) in keys.items()
        }

        def objective(params: nnx.State, zeros: dict[str, list[jax.Array]], values: dict, rest: nnx.State) -> jax.Array:
            counts: dict[str, int] = {}

            def add(call: FlaxCall) -> Any:
                n = counts[call.path] = counts.get(call.path, -1) + 1
                key = keys.get((call.path, n))
                return call.output if key is None else added(call.output, zeros[f"{key[0]} {key[1]}"])

            model = nnx.merge(graphdef, params, rest, copy=True)
            with recorded(model, add, (params, zeros, values)):
                outputs = self.side.call(getattr(model, "plain", model), values)
            return self.loss(outputs, labels, targets)

        differentiated = self.side.prepared(jax.grad(objective, argnums=(0, 1)))
        of_params, of_outputs = differentiated(params, zeros, floats | others, rest)
        for key in group:
            right, numbers = self.run.gradients(key), self.run.calls[key].gradients
            given = of_outputs[f"{key[0]} {key[1]}"]
            found = [i for i, _ in self.forward.matches[key] if i in right]
            ours = [np.conj(given[j]) for i, j in self.forward.matches[key] if i in right]
            noises = self.run.noises([numbers[i] for i in found])
            self.read(key, "propagated", self.errors(ours, [right[i] for i in found], noises))
        self.gradients = self.side.weights.read(jax.tree.map(jnp.conj, of_params), gradients=True)

    def zeros(self, array: np.ndarray) -> jax.Array:
        """Zeros of an array's shape in the side's dtype, complex if it is."""
        return jnp.zeros(array.shape, array.dtype if array.dtype.kind == "c" else self.side.dtype)

    def loss(self, outputs: dict[str, jax.Array], labels: Any, targets: dict[str, jax.Array]) -> jax.Array:
        """The loss of the whole model."""
        return jax_loss(aligned(outputs, targets, self.side.channels_last), labels, targets)

    def isolated(self, key: Key) -> Errors | None:
        """Errors of a sub-module's gradients, of inputs and parameters, given PyTorch's inputs and output gradients."""
        theirs = self.of_torch(key)
        found = self.of_flax(key)
        if found is None:
            return None  # another layout, e.g. of attention weights; the enclosing module is compared
        names = [name for name in found if name in theirs]
        self.hints[key[0]] = self.hint(key, found, theirs)
        noises = self.noises(key, theirs)
        ours = [found[name] for name in names]
        return self.errors(ours, [theirs[name] for name in names], [noises[name] for name in names])

    def hint(self, key: Key, ours: Gradients, theirs: Gradients) -> str:
        """The known reason why gradients of a call differ; empty if there is none."""
        row, name = getattr(self.run.modules[key[0]], "padding_idx", None), f"{key[0]}.weight".lstrip(".")
        if row is None or name not in ours or theirs[name][row].any() or not ours[name][row].any():
            return ""
        return f"padding_idx={row}: PyTorch gives this row no gradient"

    def of_torch(self, key: Key, rng: np.random.Generator | None = None) -> Gradients:
        """PyTorch's gradients of a call alone, of inputs ('input x') and parameters; zero where there is none."""
        given = self.run.gradients(key)
        module = self.run.modules[key[0]]
        module.zero_grad(set_to_none=True)
        outputs, inputs = self.run.repeated(key, grad=True, rng=rng)
        cotangents = [torch.tensor(given[i]) for i in given]
        if rng is not None:
            move(cotangents, self.run.ulp, rng)
        with self.run.side.running():
            torch.autograd.backward([outputs[i] for i in given], cotangents)
        prefix = f"{key[0]}." if key[0] else ""
        tensors = {f"input {name}": tensor for name, tensor in inputs.items()}
        tensors |= {prefix + name: p for name, p in module.named_parameters() if p.requires_grad}
        gradients = {n: as_numpy(torch.zeros_like(t) if t.grad is None else t.grad).copy() for n, t in tensors.items()}
        module.zero_grad(set_to_none=True)
        return gradients

    def noises(self, key: Key, theirs: Gradients) -> dict[str, Noise]:
        """The noise of PyTorch's gradients of a call when inputs, output gradients and parameters are moved."""
        spreads = {name: Spread(gradient) for name, gradient in theirs.items()}
        held = tensors_of(self.run.modules[key[0]])
        before = {name: tensor.detach().clone() for name, tensor in held.items()}
        rng = np.random.default_rng(0)
        try:
            for _ in range(RUNS):
                move(held.values(), self.run.ulp, rng)
                for name, gradient in self.of_torch(key, rng).items():
                    spreads[name].add(gradient, theirs[name])
                restore(held, before)
        finally:
            restore(held, before)
        # Gradients that are zero in exact arithmetic are rounding noise of what they are computed from.
        scale = max((float(np.abs(g).max(initial=0.0)) for g in self.run.gradients(key).values()), default=0.0)
        found = of_spreads(spreads, self.run.ulp)
        return {n: Noise(max(noise.unit, self.run.ulp * scale), noise.masks_from) for n, noise in found.items()}

    def of_flax(self, key: Key) -> Gradients | None:
        """Flax's gradients of the same call, in PyTorch's layout and by the same names; None if shapes differ."""
        flax, flax_key, pairing = self.forward.flax, self.forward.keys[key], self.forward.pairings[key]
        call, inputs = flax.calls[flax_key], self.run.calls[key].inputs
        assert call.part is not None, "a call that is repeated has its sub-module"
        values = {
            name: flax.typed(flax_key, name, pairing.layouts[name].there(self.run.kept.get(inputs[other])))
            for name, other in pairing.theirs.items()
        }
        floats = {name: value for name, value in values.items() if numeric(value) == "f"}
        others = flax.arrays(flax_key) | {name: value for name, value in values.items() if name not in floats}
        given, rest = self.run.gradients(key), call.part.rest
        cotangents: list[jax.Array] = []
        theirs = {j: i for i, j in self.forward.matches[key]}
        for j, a in enumerate(flax.outputs_of(flax_key)):
            cotangent = np.zeros(a.shape, a.dtype)
            if theirs.get(j) in given:
                layout = nearest(a, self.run.outputs(key)[theirs[j]])
                if layout is None:
                    return None
                cotangent = layout.there(given[theirs[j]])
            cotangents.append(jnp.conj(cotangent))  # JAX's gradient of a complex array is the conjugate of PyTorch's

        def pulled(params: Any, floats: dict[str, jax.Array], cotangents: list[jax.Array]) -> Any:
            outputs, pull = jax.vjp(lambda p, x: call.call(p, rest, others | x), params, floats)
            more = [jnp.zeros_like(output) for output in outputs[len(cotangents) :]]
            return pull([c.astype(o.dtype) for c, o in zip([*cotangents, *more], outputs, strict=True)])

        of_params, of_inputs = flax.prepared(pulled)(call.part.params, floats, cotangents)
        prefix = tuple(int(word) if word.isdigit() else word for word in call.path.split(".") if word)
        gradients = self.side.weights.read(call.part.state(jax.tree.map(jnp.conj, of_params)), prefix, gradients=True)
        for name in floats:
            found = pairing.layouts[name].back(np.conj(of_inputs[name]))
            gradients[f"input {pairing.theirs[name]}"] = found
        return gradients

    def errors(self, ours: list[np.ndarray], right: list[np.ndarray], noises: list[Noise]) -> Errors | None:
        """Errors in PyTorch's layout, relative to the largest gradient among them."""
        found = []
        for a, b in zip(ours, right, strict=False):
            layout = nearest(a, b) if layouts(a.shape, b.shape) else None
            found.append(wide(a if layout is None else layout.back(a)))
        if not found or any(a.shape != b.shape for a, b in zip(found, right, strict=False)):
            return None
        scale = max(float(np.abs(b).max(initial=0.0)) for b in right)
        return Errors.of(found, right, self.side.dtype, scale, noises)

    def tree(self, path: str = "") -> Part:
        """The sub-modules with their errors and verdicts; a culprit's share is of the largest absolute error."""
        found = self.grown(path)
        culprits = [part for part in found.walk() if part.verdict == "culprit" and part.isolated is not None]
        sizes = {part.path: min(part.isolated.max_absolute, 1e300) for part in culprits if part.isolated is not None}
        most = max(sizes.values(), default=0.0) or 1.0
        return with_shares(found, {path: size / most for path, size in sizes.items()})

    def grown(self, path: str) -> Part:
        """The tree below a path."""
        reading = self.readings[path]
        parts = tuple(self.grown(child) for child in children(path, self.readings))
        past = {
            kind: errors is not None and errors.noise > reading.limit
            for kind, errors in (("propagated", reading.propagated), ("isolated", reading.isolated))
        }
        own = reading.isolated.max_absolute if reading.isolated is not None else 0.0
        inner = [p for part in parts for p in part.walk() if p.verdict == "culprit" and p.isolated is not None]
        explains = any(p.isolated.max_absolute >= INNOCENT * own for p in inner if p.isolated is not None)
        if past["isolated"]:
            verdict = "encloses" if explains else "culprit"
        elif past["propagated"]:
            verdict = "encloses" if inner else "victim"
        else:
            verdict = "encloses" if inner else "unmatched" if reading.propagated is None else "agrees"
        return Part(
            path=path,
            flax_path=reading.flax_path,
            torch_type=type(self.run.modules[path]).__name__,
            flax_type=reading.flax_type,
            stage="backward",
            order=reading.order or 0,
            calls=reading.calls,
            propagated=reading.propagated,
            isolated=reading.isolated,
            limit=reading.limit,
            verdict=verdict,
            hint=self.hints.get(path, "") if verdict == "culprit" else "",
            reason=reading.reason,
            children=parts,
        )


def with_shares(part: Part, shares: dict[str, float]) -> Part:
    """The tree with the shares of its culprits."""
    parts = tuple(with_shares(child, shares) for child in part.children)
    return dataclasses.replace(part, children=parts, share=shares.get(part.path))


def added(output: Any, zeros: list[jax.Array]) -> Any:
    """Add an array to each floating array of an output."""
    named = {n: leaf for n, leaf in leaves_of({"output": output}).items() if numeric(leaf) == "f"}
    values = {n: leaf + zero.astype(leaf.dtype) for (n, leaf), zero in zip(named.items(), zeros, strict=True)}
    return with_leaves({"output": output}, values)["output"]
