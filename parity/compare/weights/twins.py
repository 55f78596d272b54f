"""Weights of models whose parts have the same names, and of a model that is compared with itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.weights.lazy import Cast
from jaxmodels.weights.names import Path, as_numpy, dotted, entries, flat_arrays, from_torch, is_floating, with_arrays
from jaxmodels.weights.place import load_tensors
from parity.compare.names import matches


class Twins:
    """`Weights` of models that give their parts the same names; see `jaxmodels.weights.names`."""

    notes: tuple[str, ...] = ()
    uncompared: frozenset[str] = frozenset()
    untrained: frozenset[str] = frozenset()

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        return evaluating(from_torch(model, state_dict))

    def read(self, state: Any, prefix: Path = (), *, gradients: bool = False) -> dict[str, np.ndarray]:
        start = "".join(f"{word}." for word in prefix)
        arrays = {path: np.asarray(array) for path, array in flat_arrays(state).items()}
        return {start + entry.key: entry.to_torch(arrays[entry.path]) for entry in entries(arrays)}

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        arrays = flat_arrays(state)
        return set(arrays) - {entry.path for entry in entries(arrays) if not matches(entry.key, frozen)}

    def module(self, path: str) -> str | None:
        return path

    def carries(self, key: str) -> bool:
        return True


class OwnWeights:
    """`Weights` of a Flax model that is compared with itself: it keeps its arrays, cast to a dtype, and its names."""

    notes: tuple[str, ...] = ()
    uncompared: frozenset[str] = frozenset()
    untrained: frozenset[str] = frozenset()

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        arrays = flat_arrays(model)
        return evaluating(with_arrays(model, {path: in_dtype(array, self.dtype) for path, array in arrays.items()}))

    def read(self, state: Any, prefix: Path = (), *, gradients: bool = False) -> dict[str, np.ndarray]:
        arrays = flat_arrays(state).items()
        return {dotted((*prefix, *path)): np.asarray(array) for path, array in arrays}

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        return {path for path in flat_arrays(state) if matches(dotted(path), frozen)}

    def module(self, path: str) -> str | None:
        return path

    def carries(self, key: str) -> bool:
        return True


def in_dtype(array: Any, dtype: Any) -> jax.Array:
    """An array in a floating dtype's width; see `of_width`."""
    return jnp.asarray(array, of_width(array.dtype, dtype))


def of_width(dtype: Any, floating: Any) -> np.dtype:
    """For floating dtypes the given one, for complex ones that of its width (at least complex64), others unchanged."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128 if jnp.dtype(floating) == np.float64 else np.complex64)
    return jnp.dtype(floating) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def evaluating(model: Any) -> Any:
    """The model with dropout off and running statistics in use."""
    if isinstance(model, nnx.Module):
        model.eval()
    return model


class Kept(Twins):
    """`Weights` of a Flax model with stored weights, by the names of its twin, in the dtypes of PyTorch's.

    tensors: its own, which may be read when they are used. PyTorch's values are not carried to it: a round trip
    compares the two, and so does every other reading.
    """

    def __init__(self, tensors: Mapping[str, Any], notes: tuple[str, ...] = ()):
        self.tensors, self.notes = tensors, notes

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        own = {name: in_dtype_of(tensor, state_dict.get(name), name) for name, tensor in self.tensors.items()}
        return evaluating(load_tensors(model, own))


def in_dtype_of(tensor: Any, other: Any, name: str) -> Any:
    """A floating tensor in another's dtype, cast when it is read."""
    if other is None or not is_floating(tensor.dtype) or as_numpy(other).dtype == tensor.dtype:
        return tensor
    return Cast(tensor, as_numpy(other).dtype, name)


def kept_or(names: Any, kept: Kept | None) -> Any:
    """The weights that Flax keeps, if it does, else the names; raises ValueError if both are given."""
    if kept is not None and names is not None:
        raise ValueError("names must be omitted if flax_module is a checkpoint, which has the names of its twin")
    return names if kept is None else kept
