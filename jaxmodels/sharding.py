"""Devices in a mesh, and where every array of a model lies on it.

data: each device has its own rows of the batch; fsdp: the same, and parameters and optimizer state lie in shards that
are gathered when a layer needs them; tensor: heads and hidden features are divided, and the work on them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.weights.names import Model, dotted, flat_arrays, with_arrays
from jaxmodels.weights.place import Shardings

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # both divide the rows of a batch

# Which mesh axes divide an axis of an activation, by its letter in `constrain`: batch, heads, hidden features.
# Letters not named lie whole on every device.
ACTIVATIONS = {"B": BATCH, "H": "tensor", "F": "tensor"}

Rules = Sequence[tuple[str, PartitionSpec]]


def parse_sizes(text: str, n_devices: int) -> dict[str, int]:
    """ "fsdp=4,tensor=2" -> devices along each axis; data, where it is not named, takes the rest of them.

    Raises ValueError for another form, and where the product is not the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh={text!r} must name axes of {', '.join(AXES)} with sizes, such as fsdp=4,tensor=2")
        sizes[axis] = int(size)
    named = math.prod(sizes.values())
    if n_devices % named or ("data" in sizes and named != n_devices):
        raise ValueError(f"mesh={text!r} takes {named} devices, which does not divide the {n_devices} there are")
    return {axis: sizes.get(axis, n_devices // named if axis == "data" else 1) for axis in AXES}


def make_mesh(text: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `parse_sizes` over the devices given, or all there are."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(parse_sizes(text, len(devices)).values())
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_specs(model: Any, shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> dict[str, PartitionSpec]:
    """PartitionSpec of each array of a model, by its dotted path.

    model: a class or an instance. Its `sharding_rules` are pairs of a regular expression and a PartitionSpec; the first
    expression that matches a path, or the path's last words, decides. On a mesh whose fsdp and tensor axes have size 1
    every array is replicated and no rules are needed. Raises ValueError if the class has no rules, if none of them
    matches a path, and for sizes that the mesh does not divide.
    """
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return dict.fromkeys(shapes, P())
    cls = model if isinstance(model, type) else type(model)
    if not hasattr(cls, "sharding_rules"):
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        raise ValueError(f"{cls.__name__} has no sharding_rules, which a mesh of {sizes} needs; data=N needs none")
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
        more = f", nor {len(uneven) - 1} more" if len(uneven) > 1 else ""
        raise ValueError(f"this mesh does not fit the model: {uneven[0]}{more}")
    return specs


def placement(model: Any, mesh: Mesh) -> Shardings:
    """Sharding of each array by path and shape, as `jaxmodels.load` takes it; raises like `parameter_specs`.

    model: a class or an instance with `sharding_rules`.
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, parameter_specs(model, {path: shape}, mesh)[path])

    return place


def shardings(model: Model, mesh: Mesh) -> Model:
    """The model's tree with a NamedSharding in place of each array; raises like `parameter_specs`.

    model: abstract or not. `jax.device_put(model, shardings(model, mesh))` distributes a model; as the `out_shardings`
    of a jitted constructor each device creates its own part.
    """
    place = placement(model, mesh)
    return with_arrays(model, {path: place(dotted(path), array.shape) for path, array in flat_arrays(model).items()})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, for arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(BATCH))


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises ValueError where a batch does not split evenly over accumulation and devices."""
    if batch_size % accumulate:
        raise ValueError(f"batch_size={batch_size} does not split into accumulate={accumulate} parts")
    n, rows = math.prod(mesh.shape[axis] for axis in BATCH), batch_size // accumulate
    if rows % n:
        part = f" / accumulate={accumulate}" if accumulate > 1 else ""
        raise ValueError(f"batch_size={batch_size}{part} does not split over data·fsdp = {n} devices; see --mesh")


def place(mesh: Mesh):
    """What `jaxmodels.layers.constrain` does to an activation on this mesh."""

    def constrain(x: jax.Array, name: str) -> jax.Array:
        if len(name) != x.ndim:
            raise ValueError(f"{name!r} names {len(name)} axes, the array has {list(x.shape)}")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*map(ACTIVATIONS.get, name))))

    return constrain
