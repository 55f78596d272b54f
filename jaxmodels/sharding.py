"""Devices in a mesh, and where every array of a model lies on it.

data: each device has its own rows of the batch; fsdp: the same, and parameters and optimizer state lie in shards that
are gathered when a layer needs them; tensor: heads and hidden features are divided, and the work on them.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.weights.place import Shardings

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # both divide the rows of a batch
# What the flags of these names are where they are not given; JAX itself reads the first alone.
VARIABLES = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}

# Which mesh axes divide an axis of an activation, by its letter in `constrain`: batch, heads, hidden features.
# Letters not named lie whole on every device.
ACTIVATIONS = {"B": BATCH, "H": "tensor", "F": "tensor"}

# Vocabularies of characters have any size, 65 for one, so no axis of theirs is divided; that of NeoX is padded for it.
ATTENTION = [
    (r"(query|key|value|hidden)\.linear\.kernel", P("fsdp", "tensor")),
    (r"(query|key|value|hidden)\.linear\.bias", P("tensor")),
    (r"(attn|self_attn)\.output\.kernel", P("tensor", "fsdp")),
    (r"(attn|self_attn)\.output\.bias", P()),
    (r"key_pos_(embeddings|bias)", P(None, "tensor")),
    (r"query_pos_bias", P("tensor")),
]
FEED_FORWARD = [
    (r"layer1\.kernel", P("fsdp", "tensor")),
    (r"layer1\.bias", P("tensor")),
    (r"layer2\.kernel", P("tensor", "fsdp")),
    (r"layer2\.bias", P()),
]
SMALL = [(r"norm\w*\.(scale|bias)", P()), (r"src_embed\.embedding", P(None, "fsdp"))]
RULES: dict[str, list[tuple[str, PartitionSpec]]] = {
    "AutoregressiveTransformer": [
        *SMALL,
        *ATTENTION,
        *FEED_FORWARD,
        (r"(projection|projection_bias|table|left|right)", P("tensor")),  # a synthesizer's, by head
        (r"alpha", P()),
        (r"generator\.projection\.kernel", P("fsdp")),
        (r"generator\.projection\.bias", P()),
    ],
    "AutoregressiveModel": [
        *SMALL,
        *ATTENTION,
        *FEED_FORWARD,
        (r"transformer\.weights", P()),
        (r"generator\.kernel", P("fsdp")),
        (r"generator\.bias", P()),
    ],
    "RetroModel": [
        *SMALL,
        (r"emb\.embedding", P(None, "fsdp")),
        (r"(query|key|value|lin1)\.kernel", P("fsdp", "tensor")),
        (r"(query|key|value|lin1)\.bias", P("tensor")),
        (r"(output|lin2)\.kernel", P("tensor", "fsdp")),
        (r"(output|lin2)\.bias", P()),
        (r"read\.kernel", P("fsdp")),
        (r"read\.bias", P()),
    ],
    "NeoX": [
        (r"embedding\.emb\.embedding", P("tensor", "fsdp")),
        (r"layers\.(attention\.qkv_lin|ffn\.dense_h_h4)\.kernel", P(None, "fsdp", "tensor")),
        (r"layers\.(attention\.qkv_lin|ffn\.dense_h_h4)\.bias", P(None, "tensor")),
        (r"layers\.(attention\.output|ffn\.dense_h4_h)\.kernel", P(None, "tensor", "fsdp")),
        (r"layers\.(attention\.output|ffn\.dense_h4_h)\.bias", P()),
        (r"(pre_ln_attn|pre_ln_ffn|final_norm\.ln)\.(scale|bias)", P()),
        (r"readout\.linear\.kernel", P("fsdp", "tensor")),
    ],
}


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


def parameter_specs(model_name: str, shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> dict[str, PartitionSpec]:
    """Where each array of a model lies, by its dotted path; whole, whatever the model, on one device.

    Raises ValueError for a model without a table, a path without a rule, and for sizes that the mesh does not divide.
    """
    if mesh.size == 1:
        return dict.fromkeys(shapes, P())
    if model_name not in RULES:
        raise ValueError(f"train/mesh.py has no table for {model_name}; it has {', '.join(RULES)}")
    rules = [(re.compile(rf"(.*\.)?{pattern}"), spec) for pattern, spec in RULES[model_name]]
    specs, uneven = {}, []
    for path, shape in shapes.items():
        spec = next((spec for pattern, spec in rules if pattern.fullmatch(path)), None)
        if spec is None or len(spec) > len(shape):
            raise ValueError(f"the table of {model_name} in train/mesh.py has no rule for {path} {list(shape)}")
        for size, axis in zip(shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                uneven.append(f"{axis}={mesh.shape[axis]} does not divide {size} of {path} {list(shape)}")
        specs[path] = spec
    if uneven:
        more = f", nor {len(uneven) - 1} more" if len(uneven) > 1 else ""
        raise ValueError(f"this mesh does not fit the model: {uneven[0]}{more}")
    return specs


def shardings(model_name: str, mesh: Mesh) -> Shardings:
    """What `jaxmodels.load` takes to put a model's arrays where training has them; raises as `parameter_specs`."""

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, parameter_specs(model_name, {path: shape}, mesh)[path])

    return place


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


@dataclasses.dataclass(frozen=True)
class Processes:
    """How several processes find each other; nothing to say where there is one."""

    distributed: bool = False
    """this is one of several processes, and a TPU pod, Slurm or another that JAX can ask knows the others"""
    coordinator: str | None = None
    """HOST:PORT of process 0, with --processes and --process, where nothing knows it; none: JAX_COORDINATOR_ADDRESS"""
    processes: int | None = None
    """how many processes there are; none: JAX_NUM_PROCESSES"""
    process: int | None = None
    """which of them this is, from 0; none: JAX_PROCESS_ID"""
    peer_timeout: int = 60
    """seconds of silence after which a process counts as dead, and the others end with an error"""

    def initialize(self) -> None:
        """Joins the others, where flags or variables name any; raises ValueError for what `named` refuses."""
        if self.peer_timeout < 1:
            raise ValueError(f"peer_timeout={self.peer_timeout} must be at least 1")
        coordinator, processes, process = self.named()
        if coordinator is None and not self.distributed:
            return
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=self.peer_timeout)

    def named(self) -> tuple[str, int, int] | tuple[None, None, None]:
        """Coordinator, number and index, each from its flag or else its variable; or none of them.

        With --distributed the variables are left to JAX. Raises ValueError where only a part of the three is given, or
        one of them can't be right.
        """
        flags = {"coordinator": self.coordinator, "processes": self.processes, "process": self.process}
        ask = not self.distributed or any(value is not None for value in flags.values())
        given = {
            name: os.environ.get(VARIABLES[name]) or None if value is None and ask else value
            for name, value in flags.items()
        }
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None, None, None
        if missing:
            either = " and ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
            raise ValueError(f"--coordinator, --processes and --process belong together: {either} not given")
        coordinator = str(given["coordinator"])
        processes, process = (as_number(name, given[name]) for name in ("processes", "process"))
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT, such as 10.0.0.2:8476")
        if not 0 <= process < processes:
            raise ValueError(f"process={process} must be from 0 to processes={processes} less one")
        return coordinator, processes, process


def as_number(name: str, given: str | int | None) -> int:
    """Of a flag, which is one, or of its variable, which is text."""
    if not str(given).removeprefix("-").isdecimal():
        raise ValueError(f"{VARIABLES[name]}={given!r} must be a whole number")
    return int(str(given))


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether any process says so; all must ask. At once where there is one process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
