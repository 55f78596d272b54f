"""Device meshes, and the placement of a model's arrays on them.

data: divides the rows of a batch. fsdp: divides them too, and shards parameters and optimizer state, which are gathered
when a layer needs them. tensor: divides heads and hidden features, with the computation on them.

`shardings(model, mesh)` places a model; `jaxmodels.load(folder, shardings=mesh)` reads one from disk, each device its
own part. The rules are the attribute `sharding_rules` of the model's class.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.layers import rows_of
from jaxmodels.weights.names import Model, dotted, flat_arrays, with_arrays
from jaxmodels.weights.place import Shardings

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # both divide the rows of a batch
LANES = 128  # a TPU pads the last axis of an array to a multiple of it
FILLED = 0.9  # least share of a device's part of the vocabulary that is not padding

# Mesh axes that divide an axis of an activation, by its letter in `constrain`: batch, heads, hidden features, and
# features of the residual stream. Saved between layers for the backward pass, it would take most of the memory; the
# price is communication, as layers gather their inputs, in rings that overlap with products. Axes with other letters
# are not divided.
ACTIVATIONS: dict[str, str | tuple[str, ...]] = {"B": BATCH, "H": "tensor", "F": "tensor", "D": "tensor"}


def parse_sizes(text: str, n_devices: int) -> dict[str, int]:
    """Parse "fsdp=4,tensor=2" to the number of devices along each axis; by default `data` takes the remaining devices.

    Raises ValueError if the text has another form or the product is not the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh={text!r} must name axes of {', '.join(AXES)} with sizes, such as fsdp=4,tensor=2")
        sizes[axis] = int(size)
    named = math.prod(sizes.values())
    if n_devices % named or ("data" in sizes and named != n_devices):
        raise ValueError(f"mesh={text!r} needs {named} devices, which does not divide the {n_devices} available")
    return {axis: sizes.get(axis, n_devices // named if axis == "data" else 1) for axis in AXES}


def make_mesh(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over devices, by default all, with the sizes in `text`; raises ValueError as `parse_sizes`."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(parse_sizes(text, len(devices)).values())
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_specs(model: Any, shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> dict[str, PartitionSpec]:
    """PartitionSpec of each array of a model, by its dotted path.

    model: a class or an instance with the `sharding_rules` of `jaxmodels.protocols.Sharded`. On a mesh whose fsdp and
    tensor axes have size 1 every array is replicated and no rules are needed. Raises ValueError if the class has no
    rules, if no rule matches a path, or if the mesh does not divide a size.
    """
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return dict.fromkeys(shapes, P())
    cls = model if isinstance(model, type) else type(model)
    if not hasattr(cls, "sharding_rules"):
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        raise ValueError(f"{cls.__name__} has no sharding_rules, which mesh {sizes} needs; data=N needs none")
    rules = [(re.compile(rf"(.*\.)?{pattern}"), spec) for pattern, spec in cls.sharding_rules]
    specs, uneven = {}, []
    for path, shape in shapes.items():
        spec = next((spec for pattern, spec in rules if pattern.fullmatch(path)), None)
        if spec is None or len(spec) > len(shape):
            raise ValueError(f"{cls.__name__}.sharding_rules has no rule for {path} {list(shape)}")
        for size, axis in zip(shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                uneven.append(f"{axis}={mesh.shape[axis]} does not divide {size} of {path} {list(shape)}")
        specs[path] = spec
    if uneven:
        more = f" (and {len(uneven) - 1} more)" if len(uneven) > 1 else ""
        raise ValueError(f"the mesh does not fit the model: {uneven[0]}{more}")
    return specs


def placement(model: Any, mesh: Mesh) -> Shardings:
    """Function of path and shape to the Sharding of an array, as `jaxmodels.load` takes it.

    model: a class or an instance with `sharding_rules`. The function raises ValueError as `parameter_specs`.
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, parameter_specs(model, {path: shape}, mesh)[path])

    return place


def shardings(model: Model, mesh: Mesh) -> Model:
    """Tree of a model, abstract or not, with a NamedSharding in place of each array.

    `jax.device_put(model, shardings(model, mesh))` distributes a model. As `out_shardings` of a jitted constructor, it
    makes each device create its own part. Raises ValueError as `parameter_specs`.
    """
    place = placement(model, mesh)
    return with_arrays(model, {path: place(dotted(path), array.shape) for path, array in flat_arrays(model).items()})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch: rows are divided over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises ValueError if a batch does not split evenly over accumulation steps and devices."""
    if batch_size % accumulate:
        raise ValueError(f"batch_size={batch_size} is not divisible by accumulate={accumulate}")
    n, rows = math.prod(mesh.shape[axis] for axis in BATCH), batch_size // accumulate
    if rows % n:
        part = f" / accumulate={accumulate}" if accumulate > 1 else ""
        raise ValueError(f"batch_size={batch_size}{part} is not divisible by data·fsdp = {n} devices; see --mesh")


def activation_placement(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """Function that places activations on a mesh: the `placement` of `jaxmodels.layers.hooks`.

    An axis whose size the mesh does not divide stays whole.
    """

    def axes_of(letter: str, size: int) -> str | tuple[str, ...] | None:
        axes = ACTIVATIONS.get(letter)
        names = (axes,) if isinstance(axes, str) else axes or ()
        return None if size % math.prod(mesh.shape[name] for name in names) else axes

    def constrain(x: jax.Array, name: str) -> jax.Array:
        if len(name) != x.ndim:
            raise ValueError(f"name={name!r} has {len(name)} axes, the array has shape {list(x.shape)}")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*map(axes_of, name, x.shape))))

    return constrain


def divided_lookup(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`rows_of` of an embedding table that is divided over a mesh: the `lookup` of `jaxmodels.layers.hooks`.

    On a mesh of fsdp alone, each device looks up all ids of the batch in its part of the features, and the result is
    then redistributed to the rows of each device: neither the table nor its gradient is ever whole. With other axes, if
    fsdp does not divide D, or if the rows of all ids take more memory than the table, each device gathers the table.
    """
    fsdp = mesh.shape["fsdp"]

    def place(array: jax.Array, *spec: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P(*spec)))

    def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        n_vocab, d = table.shape
        stored = -(-(d // fsdp) // LANES) * LANES  # of each row on a device
        if mesh.size > fsdp or d % fsdp or ids.size * stored >= n_vocab * d:
            return rows_of(place(table), ids)
        rows = rows_of(place(table, None, "fsdp"), place(ids))
        return place(rows, *(None,) * ids.ndim, "fsdp")

    return look_up


class DividedVocabulary:
    """Placement of a read-out in chunks of tokens: each device computes the logits of its part of the vocabulary.

    The tokens of a chunk are gathered over fsdp, and the gradient by their features is reduce-scattered. Otherwise the
    weights are gathered for each chunk, and their gradient is reduce-scattered. The rows along `data` stay apart.

    Axes: B batch, C positions of a chunk, D features, V vocabulary.
    """

    PARTS = ("fsdp", "tensor")  # divide the vocabulary

    def __init__(self, mesh: Mesh):
        self.mesh, self.parts = mesh, mesh.shape["fsdp"] * mesh.shape["tensor"]

    def applies(self, n_vocab: int, tokens: int, chunks: int) -> bool:
        """True if it takes less communication than to gather the weights for each of so many chunks of the tokens."""
        size = n_vocab // self.parts
        stored = -(-size // LANES) * LANES
        if self.mesh.shape["fsdp"] == 1 or n_vocab % self.parts or size < FILLED * stored:
            return False
        # In rows of D features: the tokens and their gradient; the weights twice and their gradient for each chunk.
        return 2 * tokens // self.mesh.shape["data"] <= 3 * chunks * n_vocab // self.mesh.shape["tensor"]

    def weight(self, array: jax.Array, n_vocab: int) -> jax.Array | None:
        """Divide an array of the read-out along its axis V; None if it has not exactly one such axis."""
        if array.shape.count(n_vocab) != 1:
            return None
        return self.place(array, *(self.PARTS if size == n_vocab else None for size in array.shape))

    def logits(self, array: jax.Array, batch_axis: int) -> jax.Array:
        """Divide the logits of a chunk, [B, C, V] or [C, B, V], along V."""
        return self.place(array, *self.batch("data", batch_axis), self.PARTS)

    def tokens(self, array: jax.Array, batch_axis: int) -> jax.Array:
        """Gather a chunk's tokens, [B, C, D] or [C, B, D]."""
        return self.place(array, *self.batch("data", batch_axis), None)

    def rows(self, array: jax.Array, batch_axis: int) -> jax.Array:
        """Divide a chunk's gradient, [B, C, D] or [C, B, D], as the batch is."""
        features = None if array.shape[-1] % self.mesh.shape["tensor"] else "tensor"
        return self.place(array, *self.batch(BATCH, batch_axis), features)

    def batch(self, axes: str | tuple[str, ...], batch_axis: int) -> tuple[Any, Any]:
        return (axes, None) if batch_axis == 0 else (None, axes)

    def place(self, array: jax.Array, *spec: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, P(*spec)))
