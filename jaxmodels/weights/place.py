"""Conversion between tensors by PyTorch names, which may be lazy, and a Flax model's arrays on devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.process.texts import quoted
from jaxmodels.weights.lazy import Cast, Index, Layer, Stacked, Transposed, bounded, copy, read
from jaxmodels.weights.names import (
    Entry,
    Model,
    Path,
    check_fit,
    check_floating,
    dotted,
    entries,
    flat_arrays,
    is_floating,
    stacked_at,
    with_arrays,
)
from jaxmodels.weights.progress import progress_bar

Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load_tensors(
    model: Model, tensors: Mapping[str, Any], dtype: Any = None, shardings: Shardings | None = None, what: str = "model"
) -> Model:
    """Model with the tensors of a checkpoint, each read once: `from_torch` for tensors that are not in memory.

    model: may be abstract. dtype: cast floating tensors; default their own. shardings: function of an array's path
    ("encoder.layers.0.norm_ff.scale") and shape to its Sharding; each device's slice is read separately, one slice at a
    time in host memory. Default: the default device. what: name for the progress bar. Layers of different dtypes are
    stacked in the narrowest dtype that holds the values of all of them. Raises like `from_torch`.
    """
    if dtype is not None:
        check_floating(dtype)
    targets = flat_arrays(model)
    parts: dict[Path, list[Any]] = {path: [] for path in targets}
    for entry in check_fit(targets, tensors, dtype, exact=True):
        tensor = tensors[entry.key]
        if dtype is not None and is_floating(tensor.dtype):
            tensor = Cast(tensor, np.dtype(dtype), entry.key)
        parts[entry.path].append(Transposed(tensor) if entry.transposed else tensor)
    for path, same in parts.items():
        wide = functools.reduce(jnp.promote_types, {np.dtype(part.dtype) for part in same})
        parts[path] = [part if part.dtype == wide else Cast(part, np.dtype(wide), dotted(path)) for part in same]
    whole = {path: same[0] if stacked_at(path) is None else Stacked(same) for path, same in parts.items()}
    leaves = {}
    with progress_bar(f"reading {what}", whole.values()) as advance:
        for path, tensor in whole.items():
            sharding = None if shardings is None else shardings(dotted(path), tuple(tensor.shape))
            leaves[path] = on_devices(tensor, sharding, advance)
    return with_arrays(model, leaves)


def on_devices(tensor: Any, sharding: jax.sharding.Sharding | None, advance: Callable[[int], None]) -> jax.Array:
    """Read a tensor into an array on devices; `advance` is called with the bytes that were read.

    `jax.make_array_from_callback` is not used: it holds the slices of all devices in host memory before it sends one.
    """
    if sharding is None:
        values = read(tensor)
        advance(values.nbytes)
        return jax.device_put(values)
    slices: dict[Any, jax.Array] = {}  # by index, as several devices may hold the same slice
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(tuple(tensor.shape)).items():
        index = bounded(index or (), tensor.shape)
        key = tuple((part.start, part.stop) for part in index)
        if key not in slices:
            values = read(tensor, index)
            advance(values.nbytes)
            slices[key] = jax.device_put(values, device).block_until_ready()
            del values
        arrays.append(jax.device_put(slices[key], device))
    return jax.make_array_from_single_device_arrays(tuple(tensor.shape), sharding, arrays)


def tensors_of(model: Any) -> dict[str, Any]:
    """Tensors of a model by PyTorch names, each read from its device when it is used."""
    arrays = flat_arrays(model)
    return {entry.key: tensor_of(arrays[entry.path], entry) for entry in entries(arrays)}


def flax_name(entry: Entry) -> str:
    """Flax name of a tensor, with the layer number of stacked arrays: layers.3.attention.output.kernel."""
    return f"{entry.key.rpartition('.')[0]}.{entry.path[-1]}"


def from_flax_names(model: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Rename arrays from `flax_name` to PyTorch names; unknown names are kept.

    Raises ValueError if an array has the PyTorch name of another one.
    """
    left, tensors = dict(stored), {}
    for entry in entries(flat_arrays(model)):
        name = flax_name(entry)
        if name in left:
            array = left.pop(name)
            tensors[entry.key] = Transposed(array) if entry.transposed else array
    if both := sorted(tensors.keys() & left.keys()):
        raise ValueError(f"{quoted(both[0])} is the name of two arrays, in PyTorch and here; expected one")
    return tensors | left


def tensor_of(array: Any, entry: Entry) -> Any:
    """Lazy tensor of an entry of a Flax array."""
    on_host = isinstance(array, np.ndarray) or all(device.platform == "cpu" for device in array.devices())
    if on_host and getattr(array, "is_fully_addressable", True):
        array = np.asarray(array)  # a view, unless it is sharded
        tensor: Any = array if entry.layer is None else Layer(array, entry.layer)
    else:
        tensor = OnDevice(array, entry.layer)
    return Transposed(tensor) if entry.transposed else tensor


@dataclasses.dataclass(frozen=True, eq=False)
class OnDevice:
    """Array on an accelerator, or one layer of it; the last one that was read is cached in host memory."""

    array: jax.Array
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape if self.layer is None else self.array.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read_into(self, out: np.ndarray, index: Index) -> None:
        copy(out, fetched(self)[index])


@functools.lru_cache(maxsize=1)
def fetched(tensor: OnDevice) -> np.ndarray:
    """Copy a tensor to the host."""
    array = tensor.array if tensor.layer is None else layer_of(tensor.array, tensor.layer)
    return np.asarray(array)


@jax.jit
def layer_of(array: jax.Array, i: int) -> jax.Array:
    """Entry i of the leading axis; compiled once for all i."""
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
