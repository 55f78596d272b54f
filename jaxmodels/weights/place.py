"""Between tensors under PyTorch's names, which may be lazy, and the arrays of a Flax model on its devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmodels.weights.lazy import Cast, Index, Layer, Lazy, Stacked, Transposed, bounded, copy, read
from jaxmodels.weights.names import (
    ConversionError,
    Entry,
    Model,
    Path,
    check_fit,
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
    """A model with the tensors of a checkpoint, read once: `from_torch` for tensors that are not in memory.

    `shardings` says where an array goes, from its path ("layers.attention.qkv_lin.kernel") and shape: each device's
    slice is read for itself, and one slice at a time is in the host's memory. None: the default device. Raises as
    `from_torch`, and ConversionError where the layers of one stacked array differ in dtype and none is given.
    """
    if dtype is not None and not is_floating(dtype):
        raise ValueError(f"dtype={np.dtype(dtype).name} is no floating type: weights would be cut to whole numbers")
    targets = flat_arrays(model)
    parts: dict[Path, list[Any]] = {path: [] for path in targets}
    for entry in check_fit(targets, tensors, dtype):
        tensor = tensors[entry.key]
        if dtype is not None and is_floating(tensor.dtype):
            tensor = Cast(tensor, np.dtype(dtype), entry.key)
        parts[entry.path].append(Transposed(tensor) if entry.transposed else tensor)
    mixed = [dotted(path) for path, same in parts.items() if len({np.dtype(part.dtype) for part in same}) > 1]
    if mixed:
        raise ConversionError({"of several dtypes (say which with dtype)": mixed})
    whole = {path: same[0] if stacked_at(path) is None else Stacked(same) for path, same in parts.items()}
    leaves = {}
    with progress_bar(f"reading {what}", whole.values()) as advance:
        for path, tensor in whole.items():
            sharding = None if shardings is None else shardings(dotted(path), tuple(tensor.shape))
            leaves[path] = on_devices(tensor, sharding, advance)
    return with_arrays(model, leaves)


def on_devices(tensor: Any, sharding: jax.sharding.Sharding | None, advance: Callable[[int], None]) -> jax.Array:
    """An array on its devices.

    Not `jax.make_array_from_callback`, which holds the slices of all devices in the host's memory before it sends one.
    """
    if sharding is None:
        values = read(tensor)
        advance(values.nbytes)
        return jax.device_put(values)
    slices: dict[Any, jax.Array] = {}  # by index, as several devices may hold the same
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
    """The tensors of a model under PyTorch's names, each read from its device when it is needed."""
    arrays = flat_arrays(model)
    return {entry.key: of_entry(arrays[entry.path], entry) for entry in entries(arrays)}


def flax_name(entry: Entry) -> str:
    """The name of a tensor as a Flax array, each layer for itself: layers.3.attention.qkv_lin.kernel."""
    return f"{entry.key.rpartition('.')[0]}.{entry.path[-1]}"


def from_flax_names(model: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays under Flax's names, each layer for itself, as the tensors of a model; unknown names stay as they are."""
    left, tensors = dict(stored), {}
    for entry in entries(flat_arrays(model)):
        name = flax_name(entry)
        if name in left:
            array = left.pop(name)
            tensors[entry.key] = Transposed(array) if entry.transposed else array
    return tensors | left


def of_entry(array: Any, entry: Entry) -> Any:
    on_host = isinstance(array, np.ndarray) or all(device.platform == "cpu" for device in array.devices())
    if on_host and getattr(array, "is_fully_addressable", True):
        array = np.asarray(array)  # a view, unless it is sharded
        tensor: Any = array if entry.layer is None else Layer(array, entry.layer)
    else:
        tensor = OnDevice(array, entry.layer)
    return Transposed(tensor) if entry.transposed else tensor


@dataclasses.dataclass(frozen=True, eq=False)
class OnDevice(Lazy):
    """A layer of an array, or all of it, on an accelerator; the one read last stays in the host's memory."""

    array: jax.Array
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.array.shape if self.layer is None else self.array.shape[1:]

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.array.dtype

    def fill(self, out: np.ndarray, index: Index) -> None:
        copy(out, fetched(self)[index])


@functools.lru_cache(maxsize=1)
def fetched(tensor: OnDevice) -> np.ndarray:
    array = tensor.array if tensor.layer is None else layer_of(tensor.array, tensor.layer)
    return np.asarray(array)


@jax.jit
def layer_of(array: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
