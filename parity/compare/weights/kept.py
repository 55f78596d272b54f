"""Weights of a Flax model that keeps its own, which are compared with PyTorch's like everything else."""

from collections.abc import Mapping
from typing import Any

from jaxmodels.weights.lazy import Cast
from jaxmodels.weights.names import as_numpy, is_floating
from jaxmodels.weights.place import load_tensors
from parity.compare.weights.twins import Twins, evaluating


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
