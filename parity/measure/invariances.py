"""What must not change a Flax model's numbers: compilation, layout in devices, caches, padding, the size of a batch.

These need no PyTorch. Each reading compares a variant with the compiled call on the whole batch, outputs and parameter
gradients, in float64 where the device has it.
"""

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmodels.weights.names import dotted, flat_arrays, with_arrays
from parity.compare.adapters import as_module, with_weights
from parity.compare.inputs import Inputs, matches, random_targets
from parity.compare.jax_side import FlaxSide, compiled, current_device, loss, strict_precision
from parity.compare.names import evaluating
from parity.measure import limits
from parity.report.results import Check, Invariances
from parity.report.stamp import environment

DEVICES = 8
FLOAT32_LIMIT = 1e-5  # where there is no float64: some hundred roundings, and no wrong term is as small
PADDING = 7

Kinds = Mapping[str, Mapping[str, np.ndarray]]


class NotApplicable(Exception):
    """Why a variant does not exist for a model."""


def invariances(
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    labels: Any = None,
    batch_axis: int | Mapping[str, int | None] | None = None,
    only: Sequence[str] | None = None,
    device: str | None = None,
    float64: bool | None = None,
    seed: int = 0,
) -> Invariances:
    """Reads every variant of VARIANTS, or those in `only`, that a Flax module has. Needs no torch.

    A Linen module has the weights that it is bound to (`module.bind(variables)`), an unbound one those that it draws
    from the seed. inputs, labels, device and float64 are those of `parity.check`. batch_axis: of all inputs and
    outputs, or by the input's name (None: it has none); language models of this project need not say it. '1 / 8
    devices' wants eight of them: on a CPU `jax.config.update('jax_num_cpu_devices', 8)` before anything runs. Raises
    ValueError for names in `only` that are no variants, for a module whose arrays are abstract, and for one that is
    bound to variables of another.
    """
    unknown = set(only or ()) - VARIANTS.keys()
    if unknown:
        raise ValueError(f"only={sorted(unknown)} are none of {', '.join(VARIANTS)}")
    inputs, labels = Inputs.of(inputs), None if labels is None else np.asarray(labels)
    if isinstance(flax_module, linen.Module):
        flax_module = with_weights(flax_module, inputs, seed)
    flax_module = as_module(flax_module, inputs)
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in flat_arrays(flax_module).values()):
        raise ValueError("flax_module is abstract: it has shapes, but no weights")
    chosen = jax.devices(device)[0]
    float64 = chosen.platform != "tpu" if float64 is None else float64
    with strict_precision(float64, chosen):
        dtype = jnp.float64 if float64 else jnp.float32
        side = FlaxSide(flax_module, {}, inputs, dtype, Itself(dtype))
        return read(side, labels, seed, batch_axis, only)


class Itself:
    """A `Weights` that leaves a model its own, in another dtype; tensors bear the names of its paths."""

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def load(self, model, state_dict):
        arrays = flat_arrays(model)
        floats = {path for path, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
        cast = {path: jnp.asarray(a, self.dtype if path in floats else None) for path, a in arrays.items()}
        return evaluating(with_arrays(model, cast))

    def read(self, state, prefix=()):
        arrays = flat_arrays(state).items()
        return {dotted((*prefix, *path)): np.asarray(array) for path, array in arrays}

    def held(self, state, frozen):
        return {path for path in flat_arrays(state) if matches(dotted(path), frozen)}

    def module(self, path):
        return path

    def carries(self, key):
        return True


def read(
    side: FlaxSide, labels: np.ndarray | None, seed: int, batch_axis: Any = None, only: Sequence[str] | None = None
) -> Invariances:
    """The variants of a model with its weights; call it where `strict_precision` is open."""
    began, subject = time.perf_counter(), Subject.of(side, labels, seed, batch_axis)
    exact = side.dtype == jnp.float64
    limit = limits.FLOAT64_LIMIT if exact else FLOAT32_LIMIT
    checks, skipped = [], {}
    for kind, variant in VARIANTS.items():
        if only is not None and kind not in only:
            continue
        try:
            errors: dict[str, float] = {}
            for result, base in variant(subject):
                for part in result:
                    found = limits.errors(result[part], base[part])
                    for name, error in found.items():
                        name = name if part == "output" else f"gradient of {name}"
                        errors[name] = max(errors.get(name, 0.0), error)  # a variant may have several results
        except NotApplicable as reason:
            skipped[kind] = str(reason)
            continue
        checks.append(Check(kind, np.dtype(side.dtype).name, *limits.worst(errors), limit))
    stamp = environment(current_device(), exact, seed)
    return Invariances(checks, skipped, time.perf_counter() - began, stamp)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its weights, what goes in, what its loss compares with, and its compiled results: the base."""

    side: FlaxSide
    inputs: Inputs
    labels: np.ndarray | None
    targets: dict[str, np.ndarray]
    axes: dict[str, int | None]  # of the batch, by input; 'output' for outputs, labels and targets; empty: unknown
    base: Kinds

    @classmethod
    def of(cls, side: FlaxSide, labels: np.ndarray | None, seed: int, batch_axis: Any = None) -> "Subject":
        outputs = side.outputs(side.inputs)
        targets = random_targets(outputs, seed)
        axes = batch_axes(side, batch_axis)
        return cls(side, side.inputs, labels, targets, axes, parts(side.evaluate(side.inputs, labels, targets)))

    @property
    def ids(self) -> tuple[str, np.ndarray]:
        """Name and value of a language model's token ids; raises NotApplicable for another model."""
        if not hasattr(self.side.module, "sequence_axis"):
            raise NotApplicable("no language model of this project")
        return next(iter(self.inputs.named().items()))

    def evaluate(self, function: Callable, *, fast: bool = True) -> Kinds:
        """As the base, of a function (model, values) -> outputs, compiled unless not `fast`."""
        side = self.side

        def objective(params, floats, others, labels, targets):
            outputs = function(nnx.merge(side.graphdef, params, side.rest), floats | others)
            return loss(outputs, labels, targets), outputs

        derive = jax.value_and_grad(objective, has_aux=True)
        derive = compiled(derive) if fast else derive
        (_, outputs), gradients = derive(side.params, *side.arguments(self.inputs, self.labels, self.targets))
        outputs = {name: np.asarray(output) for name, output in outputs.items()}
        return {"output": outputs, "parameter gradients": side.weights.read(gradients)}

    def taken(self, indices: Sequence[int]) -> tuple[Inputs, np.ndarray | None, dict[str, np.ndarray]]:
        """Inputs, labels and targets of some elements of the batch; raises NotApplicable where its axis is unknown."""
        if not self.axes:
            raise NotApplicable("batch_axis is not known")

        def take(name: str, value: np.ndarray) -> np.ndarray:
            axis = self.axes.get(name, self.axes["output"])
            return value if axis is None else value.take(indices, axis)

        named = {name: take(name, value) for name, value in self.inputs.named().items()}
        args = tuple(named.pop(f"input {i}") for i in range(len(self.inputs.args)))
        labels = None if self.labels is None else take("output", self.labels)
        return Inputs(args, named), labels, {name: take("output", target) for name, target in self.targets.items()}

    @property
    def batch(self) -> int:
        name, axis = next((item for item in self.axes.items() if item[1] is not None), ("", None))
        if axis is None:
            raise NotApplicable("batch_axis is not known")
        return self.inputs.named()[name].shape[axis]


def batch_axes(side: FlaxSide, given: Any) -> dict[str, int | None]:
    named = side.inputs.named()
    if isinstance(given, Mapping):
        first = next((axis for axis in given.values() if axis is not None), None)
        return {name: given.get(name, first) for name in named} | {"output": given.get("output", first)}
    if given is not None:
        return dict.fromkeys((*named, "output"), given)
    if not hasattr(side.module, "sequence_axis"):
        return {}
    ids, *others = named
    return {ids: 1 - side.module.sequence_axis} | dict.fromkeys(others, 0) | {"output": 1 - side.module.sequence_axis}


def parts(kinds: Kinds) -> Kinds:
    return {kind: kinds[kind] for kind in ("output", "parameter gradients") if kind in kinds}


Pairs = Iterator[tuple[Kinds, Kinds]]  # results, and what they must equal


def uncompiled(subject: Subject) -> Pairs:
    """Operation by operation."""
    yield subject.evaluate(subject.side.call, fast=False), subject.base


def unrolled(subject: Subject) -> Pairs:
    """Layers and steps in Python loops, nothing fused: the model's `plain` form, or its `unstacked` one."""
    module = subject.side.module
    if hasattr(module, "plain"):
        yield subject.evaluate(lambda model, values: subject.side.call(model.plain, values)), subject.base
    elif hasattr(module, "unstacked"):
        yield subject.evaluate(lambda model, values: subject.side.call(model.unstacked(), values)), subject.base
    else:
        raise NotApplicable("no plain form")


def sharded(subject: Subject) -> Pairs:
    """The batch over half of the devices, four times as large where it must be, and every array over pairs of them."""
    side, devices = subject.side, jax.devices(current_device().platform)[:DEVICES]
    if len(devices) < DEVICES:
        raise NotApplicable(f"JAX has {len(devices)} device(s); jax_num_cpu_devices gives a CPU more")
    data = DEVICES // 2
    inputs, labels, targets = subject.taken(list(range(subject.batch)) * data)
    mesh = jax.make_mesh((data, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)

    def over(axis: int | None, name: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name))

    def halved(array: jax.Array) -> jax.Array:
        axis = next((i for i in reversed(range(array.ndim)) if array.shape[i] % 2 == 0), None)
        return jax.device_put(array, over(axis, "model"))

    floats, others, labels, targets = side.arguments(inputs, labels, targets)
    named = [
        {name: jax.device_put(value, over(subject.axes[name], "data")) for name, value in group.items()}
        for group in (floats, others)
    ]
    whole = parts(side.evaluate(inputs, labels, targets))
    params, rest = (jax.tree.map(halved, state) for state in (side.params, side.rest))
    (_, outputs), (gradients, _) = side.value_and_grad(params, *named, labels, targets, rest)
    outputs = {name: np.asarray(output) for name, output in outputs.items()}
    yield {"output": outputs, "parameter gradients": side.weights.read(gradients)}, whole


def cached(subject: Subject) -> Pairs:
    """Logits through the cache."""
    _, ids = subject.ids
    if not hasattr(subject.side.module, "prefill"):
        raise NotApplicable("no cache")
    first, logits = subject.side.decode(ids, **subject.inputs.for_decoding())
    yield {"output": {"logits": logits}}, {"output": {"logits": from_position(subject, first)}}


def padded(subject: Subject) -> Pairs:
    """Rows pushed to the right behind other ids, through the cache and a call that takes `start`; and cut off."""
    name, ids = subject.ids
    if len(subject.inputs.named()) > 1:
        raise NotApplicable("the inputs are more than ids")
    side, axis = subject.side, subject.side.module.sequence_axis
    n, batch = ids.shape[axis], ids.shape[1 - axis]
    (logits,) = subject.base["output"].values()
    start = np.array([(3 * b + 2) % min(PADDING, n) for b in range(batch)])
    rows = np.moveaxis(ids, axis, 0)
    moved = np.stack([np.concatenate([rows[n - start[b] :, b], rows[: n - start[b], b]]) for b in range(batch)], 1)
    moved = np.moveaxis(moved, 0, axis)
    right = np.moveaxis(logits, axis, 0)

    def compared(result: np.ndarray, first: int) -> tuple[Kinds, Kinds]:
        """Of each row, the positions that hold text."""
        result = np.moveaxis(result, axis, 0)
        ours, base = {}, {}
        for b in range(batch):
            begin = max(first, start[b])
            ours[f"row {b}"], base[f"row {b}"] = result[begin - first :, b], right[begin - start[b] : n - start[b], b]
        return {"output": ours}, {"output": base}

    if hasattr(side.module, "prefill"):
        first, decoded = side.decode(moved, start)
        yield compared(decoded, first)
    if "start" in inspect.signature(side.module).parameters:
        more = dataclasses.replace(subject.inputs, args=(), kwargs={name: moved, "start": start})
        if name in subject.inputs.kwargs:
            call = compiled(lambda model, values: model(**values))
            yield compared(np.asarray(call(side.module, {k: jnp.asarray(v) for k, v in more.kwargs.items()})), 0)
    cut = ids.take(range(n - n // 3), axis)
    shorter = compiled(lambda model, ids: model(ids))(side.module, jnp.asarray(cut))
    yield {"output": {"cut": np.asarray(shorter)}}, {"output": {"cut": logits.take(range(n - n // 3), axis)}}


def accumulated(subject: Subject) -> Pairs:
    """One element of the batch at a time, their gradients averaged."""
    results = [parts(subject.side.evaluate(*subject.taken([i]))) for i in range(subject.batch)]
    axis = subject.axes["output"]
    if axis is None:
        raise NotApplicable("the outputs have no batch axis")

    def gathered(kind: str, join: Callable) -> dict[str, np.ndarray]:
        return {name: join([result[kind][name] for result in results]) for name in results[0].get(kind, {})}

    joined = {"output": gathered("output", lambda arrays: np.concatenate(arrays, axis))}
    joined["parameter gradients"] = gathered("parameter gradients", lambda arrays: np.mean(arrays, axis=0))
    yield {kind: joined[kind] for kind in subject.base}, subject.base


def from_position(subject: Subject, first: int) -> np.ndarray:
    """The base's logits from a position of the text on."""
    (logits,), axis = subject.base["output"].values(), subject.side.module.sequence_axis
    return logits.take(range(first, logits.shape[axis]), axis)


VARIANTS: dict[str, Callable[[Subject], Pairs]] = {
    "jit / no jit": uncompiled,
    "scanned / unrolled": unrolled,
    "1 / 8 devices": sharded,
    "cached / full": cached,
    "padded / unpadded": padded,
    "accumulated / whole batch": accumulated,
}
