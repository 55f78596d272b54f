"""Variants that must not change a Flax model's numbers: compilation, sharding, caches, padding, the size of a batch.

They need no PyTorch. Each compares outputs and parameter gradients of a variant with those of the compiled call on the
whole batch, in float64 if the device has it, in units of that call's rounding noise (`parity.compare.noise`).
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

from jaxmodels.weights.names import flat_arrays
from parity.compare import noise
from parity.compare.comparison import Comparison
from parity.compare.decoding import NotDecodable, decoded, decodes
from parity.compare.inputs import Inputs
from parity.compare.loss import Batch, Kinds, jax_loss
from parity.compare.noise import Noises
from parity.compare.sides.adapters import with_weights
from parity.compare.sides.jax_side import Arrays, JaxSide, compiled, current_device
from parity.compare.sides.widen import Widened
from parity.report.results import Check, Invariances
from parity.report.stamp import environment

DEVICES = 8
PADDING = 7

BatchAxis = int | Mapping[str, int | None] | None
Pairs = Iterator[tuple[Kinds, Kinds]]  # results, and the results they must equal


class NotApplicable(Exception):
    """Raised if a variant does not apply to a model; the message is the reason."""


def invariances(
    flax_module: nnx.Module | linen.Module,
    inputs: Any,
    *,
    labels: Any = None,
    batch_axis: BatchAxis = None,
    only: Sequence[str] | None = None,
    device: str | None = None,
    float64: bool | None = None,
    seed: int = 0,
) -> Invariances:
    """Compare a Flax module with its variants: all in VARIANTS that apply, or those in `only`. Needs no torch.

    A bound Linen module (`module.bind(variables)`) is used with its variables, an unbound one is initialized from the
    seed. inputs, labels, device and float64 are those of `parity.check`. batch_axis: the batch axis of all inputs and
    outputs, or a mapping by input name (None: no batch axis); not needed for models with a `sequence_axis`. '1 / 8
    devices' needs eight devices: on a CPU call `jax.config.update('jax_num_cpu_devices', 8)` before JAX starts. Raises
    ValueError for unknown variants, for abstract modules, and for bound variables that do not fit the inputs.
    """
    unknown = set(only or ()) - VARIANTS.keys()
    if unknown:
        raise ValueError(f"only={sorted(unknown)} must be among {', '.join(VARIANTS)}")
    if isinstance(flax_module, linen.Module):
        flax_module = with_weights(flax_module, Inputs.of(inputs), seed)
    comparison = Comparison.of(None, flax_module, inputs, labels=labels, device=device, float64=float64, seed=seed)
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in flat_arrays(comparison.flax).values()):
        raise ValueError(f"flax_module={type(flax_module).__name__} is abstract (shapes only); it must have arrays")
    return read_invariances(comparison, batch_axis=batch_axis, only=only)


def read_invariances(
    comparison: Comparison, *, batch_axis: BatchAxis = None, only: Sequence[str] | None = None
) -> Invariances:
    """`invariances` on a resolved comparison."""
    began = time.perf_counter()
    checks, skipped = [], {}
    with comparison.strict_precision():
        subject = Subject.of(comparison, batch_axis)
        for kind, variant in VARIANTS.items():
            if only is not None and kind not in only:
                continue
            try:
                values = worst_values(variant(subject), subject.noises)
            except (NotApplicable, NotDecodable) as reason:
                skipped[kind] = str(reason)
                continue
            checks.append(Check(kind, comparison.precision, *noise.worst(values), noise.LIMIT))
    stamp = environment(comparison.device, comparison.float64, comparison.seed)
    return Invariances(checks, skipped, time.perf_counter() - began, stamp)


def worst_values(pairs: Pairs, noises: Mapping[str, Noises]) -> dict[str, float]:
    """By tensor, the largest difference among the results of a variant, × noise."""
    values: dict[str, float] = {}
    for result, base in pairs:
        for part in result:
            largest = max(noises[part].values(), key=lambda one: one.unit)  # for parts of an output: rows, positions
            units = {name: noises[part].get(name, largest) for name in base[part]}
            for name, value in noise.errors(result[part], base[part], units).items():
                name = name if part == "output" else f"gradient of {name}"
                values[name] = max(values.get(name, 0.0), value)
    return values


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its weights, a batch, and the compiled results that its variants are compared with.

    axes: the batch axis by input name, and 'output' for outputs, labels and targets; empty if unknown. noises: of the
    results, by kind and tensor.
    """

    side: JaxSide
    batch: Batch
    axes: dict[str, int | None]
    base: Kinds
    noises: Mapping[str, Noises]

    @classmethod
    def of(cls, comparison: Comparison, batch_axis: BatchAxis) -> "Subject":
        """The subject of a comparison's Flax module."""
        side = comparison.jax_side(comparison.precision)
        batch = comparison.batch(side.outputs(comparison.inputs))
        base = parts(side.evaluate(batch))
        noises = side.noises(batch, base, noise.ULPS[comparison.precision], comparison.seed)
        return cls(side, batch, batch_axes(side, batch_axis), base, noises)

    def ids(self) -> tuple[str, np.ndarray]:
        """Name and value of a language model's token ids; raises NotApplicable if it is no language model."""
        if not hasattr(self.side.module, "sequence_axis"):
            raise NotApplicable("not a language model: it has no sequence_axis")
        name, ids = next(iter(self.batch.inputs.named().items()))
        if ids.dtype.kind not in "iu":
            raise NotApplicable("not a language model: its first input is not token ids")
        return name, ids

    def evaluate(self, function: Callable[[Any, Arrays], Arrays], *, fast: bool = True) -> Kinds:
        """Results of function(model, values) -> outputs; compiled if fast. Casts are widened as in the base."""
        side = self.side

        def objective(
            params: nnx.State, floats: Arrays, others: Arrays, labels: Any, targets: Arrays
        ) -> tuple[jax.Array, Arrays]:
            outputs = function(side.merged(params), floats | others)
            return jax_loss(outputs, labels, targets), outputs

        derive = jax.value_and_grad(objective, has_aux=True)
        prepare = compiled if fast else eager
        derive = Widened(derive, prepare) if side.casts else prepare(derive)
        (_, outputs), gradients = derive(side.params, *side.arguments(self.batch))
        return self.results(outputs, gradients)

    def results(self, outputs: Arrays, gradients: nnx.State) -> Kinds:
        """Outputs and parameter gradients as NumPy arrays."""
        arrays = {name: np.asarray(output) for name, output in outputs.items()}
        return {"output": arrays, "parameter gradients": self.side.weights.read(gradients, gradients=True)}

    def taken(self, indices: Sequence[int]) -> Batch:
        """Some elements of the batch; raises NotApplicable if its axis is unknown."""
        if not self.axes:
            raise NotApplicable("batch_axis is not known")

        def take(name: str, value: np.ndarray) -> np.ndarray:
            axis = self.axes.get(name, self.axes["output"])
            return value if axis is None else value.take(indices, axis)

        inputs = self.batch.inputs
        labels = None if self.batch.labels is None else take("output", self.batch.labels)
        targets = {name: take("output", target) for name, target in self.batch.targets.items()}
        return Batch(inputs.replaced({n: take(n, value) for n, value in inputs.named().items()}), labels, targets)

    @property
    def size(self) -> int:
        """The number of elements of the batch; raises NotApplicable if its axis is unknown."""
        name, axis = next((item for item in self.axes.items() if item[1] is not None), ("", None))
        if axis is None:
            raise NotApplicable("batch_axis is not known")
        return self.batch.inputs.named()[name].shape[axis]


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, which runs operation by operation."""
    return function


def batch_axes(side: JaxSide, given: BatchAxis) -> dict[str, int | None]:
    """`Subject.axes`: those given, or a language model's."""
    named = side.inputs.named()
    if isinstance(given, Mapping):
        first = next((axis for axis in given.values() if axis is not None), None)
        return {name: given.get(name, first) for name in named} | {"output": given.get("output", first)}
    if given is not None:
        return dict.fromkeys((*named, "output"), given)
    if not hasattr(side.module, "sequence_axis"):
        return {}
    ids, *others = named
    axis = 1 - side.module.sequence_axis
    return {ids: axis, **dict.fromkeys(others, 0), "output": axis}


def parts(kinds: Kinds) -> Kinds:
    """Outputs and parameter gradients, the kinds that are compared."""
    return {kind: kinds[kind] for kind in ("output", "parameter gradients") if kind in kinds}


def uncompiled(subject: Subject) -> Pairs:
    """Without jit, operation by operation."""
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
    """The batch, repeated to be large enough, over half of the devices, and every array over pairs of devices."""
    side = subject.side
    devices = jax.devices(current_device().platform)[:DEVICES]
    if len(devices) < DEVICES:
        raise NotApplicable(f"JAX has {len(devices)} device(s); jax_num_cpu_devices gives a CPU more")
    data = DEVICES // 2
    batch = subject.taken(list(range(subject.size)) * data)
    mesh = jax.make_mesh((data, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)

    def over(axis: int | None, name: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, name))

    def halved(array: jax.Array) -> jax.Array:
        axis = next((i for i in reversed(range(array.ndim)) if array.shape[i] % 2 == 0), None)
        return jax.device_put(array, over(axis, "model"))

    floats, others, labels, targets = side.arguments(batch)
    named = [
        {name: jax.device_put(value, over(subject.axes[name], "data")) for name, value in group.items()}
        for group in (floats, others)
    ]
    whole = parts(side.evaluate(batch))
    params, rest = (jax.tree.map(halved, state) for state in (side.params, side.rest))
    (_, outputs), (gradients, _) = side.value_and_grad(params, *named, labels, targets, rest)
    yield subject.results(outputs, gradients), whole


def cached(subject: Subject) -> Pairs:
    """Logits through the cache."""
    subject.ids()
    if not decodes(subject.side.module):
        raise NotApplicable("no cache")
    first, logits = decoded(subject.side.module, subject.batch.inputs, subject.side.dtype)
    (right,), axis = subject.base["output"].values(), subject.side.module.sequence_axis
    yield {"output": {"logits": logits}}, {"output": {"logits": right.take(range(first, right.shape[axis]), axis)}}


def padded(subject: Subject) -> Pairs:
    """Rows with left padding of other ids, through the cache and a call with `start`; and truncated rows."""
    name, ids = subject.ids()
    if len(subject.batch.inputs.named()) > 1:
        raise NotApplicable("it has inputs other than ids")
    module, axis = subject.side.module, subject.side.module.sequence_axis
    n, batch = ids.shape[axis], ids.shape[1 - axis]
    (logits,) = subject.base["output"].values()
    start = np.array([(3 * b + 2) % min(PADDING, n) for b in range(batch)])
    rows = np.moveaxis(ids, axis, 0)
    moved = np.stack([np.concatenate([rows[n - start[b] :, b], rows[: n - start[b], b]]) for b in range(batch)], 1)
    moved = np.moveaxis(moved, 0, axis)
    right = np.moveaxis(logits, axis, 0)

    def compared(result: np.ndarray, first: int) -> tuple[Kinds, Kinds]:
        """Results and references at the positions of each row that are not padding."""
        result = np.moveaxis(result, axis, 0)
        ours, base = {}, {}
        for b in range(batch):
            begin = max(first, start[b])
            ours[f"row {b}"], base[f"row {b}"] = result[begin - first :, b], right[begin - start[b] : n - start[b], b]
        return {"output": ours}, {"output": base}

    if decodes(module):
        first, logits_of_moved = decoded(module, Inputs((), {name: moved, "start": start}), subject.side.dtype)
        yield compared(logits_of_moved, first)
    if "start" in inspect.signature(module).parameters and name in subject.batch.inputs.kwargs:
        call = compiled(lambda model, values: model(**values))
        values = {name: jnp.asarray(moved), "start": jnp.asarray(start)}
        yield compared(np.asarray(call(module, values)), 0)
    cut = ids.take(range(n - n // 3), axis)
    shorter = compiled(lambda model, ids: model(ids))(module, jnp.asarray(cut))
    yield {"output": {"cut": np.asarray(shorter)}}, {"output": {"cut": logits.take(range(n - n // 3), axis)}}


def accumulated(subject: Subject) -> Pairs:
    """One element of the batch at a time, gradients averaged."""
    results = [parts(subject.side.evaluate(subject.taken([i]))) for i in range(subject.size)]
    axis = subject.axes["output"]
    if axis is None:
        raise NotApplicable("the outputs have no batch axis")

    def gathered(kind: str, join: Callable[[list[np.ndarray]], np.ndarray]) -> dict[str, np.ndarray]:
        return {name: join([result[kind][name] for result in results]) for name in results[0].get(kind, {})}

    joined = {"output": gathered("output", lambda arrays: np.concatenate(arrays, axis))}
    joined["parameter gradients"] = gathered("parameter gradients", lambda arrays: np.mean(arrays, axis=0))
    yield {kind: joined[kind] for kind in subject.base}, subject.base


VARIANTS: dict[str, Callable[[Subject], Pairs]] = {
    "jit / no jit": uncompiled,
    "scanned / unrolled": unrolled,
    "1 / 8 devices": sharded,
    "cached / full": cached,
    "padded / unpadded": padded,
    "accumulated / whole batch": accumulated,
}
