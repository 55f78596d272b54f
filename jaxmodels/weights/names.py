"""Weights across: a PyTorch state_dict to a Flax model and back, for every model whose twins name their parts alike.

There is no table per model. A Flax path and a PyTorch key are the same words, but for the last one:

    kernel [in, out]   <->  weight [out, in]     (Linear)
    embedding          <->  weight               (Embedding)
    scale              <->  weight               (LayerNorm)
    anything else      <->  the same name, the same array

and a stacked `layers`, one array with a leading layer axis, is `layers.0` … `layers.N-1` in PyTorch.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)
Path = tuple[str | int, ...]


class ConversionError(ValueError):
    """A state_dict and a model do not fit together; lists every entry that does not, by kind, and none was used."""

    def __init__(self, problems: Mapping[str, list[str]]):
        self.problems = {kind: entries for kind, entries in problems.items() if entries}
        lines = [f"{kind} ({len(entries)}):\n    " + "\n    ".join(entries) for kind, entries in self.problems.items()]
        super().__init__("the weights do not fit the model, nothing was converted\n  " + "\n  ".join(lines))


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one PyTorch tensor lives in a Flax model: its key, the Flax path, and the layer of a stacked array."""

    key: str
    path: Path
    layer: int | None
    transposed: bool

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from that of the Flax array."""
        shape = shape if self.layer is None else shape[1:]
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The tensor's values, out of the Flax array."""
        array = array if self.layer is None else array[self.layer]
        return array.swapaxes(-1, -2) if self.transposed else array

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """The Flax array's values, or those of its layer, out of the tensor."""
        return tensor.swapaxes(-1, -2) if self.transposed else tensor


def entries(arrays: Mapping[Path, Any]) -> Iterator[Entry]:
    """The PyTorch tensors that a model's arrays (by Flax path) correspond to, in the order of the paths."""
    for path, array in arrays.items():
        *owner, name = path
        words = [str(word) for word in owner] + [RENAMED.get(str(name), str(name))]
        transposed = name == "kernel"
        stack = stacked_at(path)
        if stack is None:
            yield Entry(".".join(words), path, None, transposed)
            continue
        for layer in range(array.shape[0]):
            yield Entry(".".join([*words[: stack + 1], str(layer), *words[stack + 1 :]]), path, layer, transposed)


NARROWED = "64 bits wide while jax_enable_x64 is off"
RENAMED = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def stacked_at(path: Path) -> int | None:
    """Where `layers` stands in a path without a layer number behind it: that array holds all layers."""
    for i, word in enumerate(path[:-1]):
        if word == "layers" and not isinstance(path[i + 1], int):
            return i
    return None


def dotted(path: Iterable[Any]) -> str:
    """A path as one word: layers.0.attention.kernel."""
    return ".".join(map(str, path))


def flat_arrays(model: nnx.Pytree | nnx.State) -> dict[Path, Any]:
    """Every array of a model (or of its gradients, or of a State) by path, sorted; abstract arrays stay abstract."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    _, state = nnx.split_state(state, nnx.RngState, ...)  # an nnx.Dropout(rngs=…) of somebody's: no weights
    flat = nnx.to_flat_state(state)
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in flat}  # type: ignore[misc]


def from_torch(model: Model, state_dict: Mapping[str, Any], dtype: Any = None) -> Model:
    """A new model with the weights of a PyTorch state_dict; `model` gives the structure and may be abstract.

    Values are torch tensors or arrays; they are copied. dtype None keeps each tensor's own; a dtype casts the floating
    ones. All or nothing: raises ConversionError that lists every missing, unexpected and misshapen entry at once, and
    every 64-bit one where JAX would narrow it (jax_enable_x64 is off). Raises ValueError for a dtype that is no float.
    A model whose originals used other names, or kept what is no parameter, brings them into line with `adapted`.
    """
    if dtype is not None and not is_floating(dtype):
        raise ValueError(f"dtype={np.dtype(dtype).name} is no floating type: weights would be cut to whole numbers")
    if hasattr(model, "adapted"):
        state_dict = model.adapted(state_dict)
    targets = flat_arrays(model)
    keys = {entry.key for entry in entries(targets)}
    given = {key: as_numpy(tensor) if key in keys else tensor for key, tensor in state_dict.items()}
    wanted = check_fit(targets, given, dtype)
    converted: dict[Path, list[np.ndarray]] = {path: [] for path in targets}
    for entry in wanted:
        converted[entry.path].append(entry.to_flax(given[entry.key]))
    leaves = {}
    for path, parts in converted.items():
        array = parts[0] if stacked_at(path) is None else np.stack(parts)
        cast = dtype is not None and is_floating(array.dtype)
        leaves[path] = jnp.array(array, dtype if cast else None, copy=True)  # never an alias of torch's memory
    return with_arrays(model, leaves)


def check_fit(targets: Mapping[Path, Any], given: Mapping[str, Any], dtype: Any) -> list[Entry]:
    """Where each tensor belongs; they and the model's arrays need only have shapes and dtypes.

    Raises ConversionError that lists all that does not fit, as `from_torch` says.
    """
    wanted = list(entries(targets))
    keys = count(entry.key for entry in wanted)
    problems: dict[str, list[str]] = {
        "ambiguous in the model": [key for key, n in keys.items() if n > 1],
        "missing": [entry.key for entry in wanted if entry.key not in given],
        "unexpected": [key for key in given if key not in keys],
        "misshapen": [],
        "of another kind": [],
        NARROWED: [],
    }
    for entry in wanted:
        if entry.key not in given:
            continue
        tensor, target = given[entry.key], targets[entry.path]
        shape = entry.torch_shape(target.shape)
        if tensor.shape != shape:
            problems["misshapen"].append(f"{entry.key}: got {list(tensor.shape)}, the model has {list(shape)}")
        if is_floating(tensor.dtype) != is_floating(target.dtype):
            problems["of another kind"].append(f"{entry.key}: got {tensor.dtype}, the model has {target.dtype}")
        wide = np.dtype(dtype) if dtype is not None and is_floating(tensor.dtype) else tensor.dtype
        if wide in (np.float64, np.int64, np.uint64) and not jax.config.read("jax_enable_x64"):
            problems[NARROWED].append(entry.key)
    if any(problems.values()):
        raise ConversionError(problems)
    return wanted


def with_arrays(model: Any, arrays: Mapping[Path, Any]) -> Any:
    """The model again, with other arrays at the given paths; what the model itself holds is left as it is."""
    graphdef, state = nnx.split(model)
    flat: dict[Any, Any] = dict(nnx.to_flat_state(state))
    flat |= {path: flat[path].replace(array) for path, array in arrays.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def to_torch(model: nnx.Module | nnx.State) -> dict[str, np.ndarray]:
    """The state_dict of a model, of its gradients (as `jax.grad` gives them) or of an nnx.State, bit-exact.

    Arrays are copies, contiguous and writable, in their own dtype (bfloat16 as ml_dtypes has it).
    """
    arrays = {path: np.asarray(array) for path, array in flat_arrays(model).items()}
    return {entry.key: np.array(entry.to_torch(arrays[entry.path]), order="C") for entry in entries(arrays)}


def load_into_torch(module: Any, model: nnx.Module | nnx.State) -> None:
    """Copies a model's weights into a PyTorch module, bit-exact.

    All or nothing: raises ConversionError that lists every missing, unexpected and misshapen entry, and every one whose
    dtype differs (a silent cast would lose bits; `module.to(dtype)` first).
    """
    import torch

    arrays = to_torch(model)
    target = module.state_dict()
    shared = [key for key in arrays if key in target]
    dtypes = {key: torch_dtype(torch, arrays[key].dtype) for key in shared}
    problems = {
        "missing in the model": [key for key in target if key not in arrays],
        "unexpected by the module": [key for key in arrays if key not in target],
        "misshapen": [
            f"{key}: the model gives {list(arrays[key].shape)}, the module has {list(target[key].shape)}"
            for key in shared
            if arrays[key].shape != tuple(target[key].shape)
        ],
        "of another dtype": [
            f"{key}: the model gives {arrays[key].dtype}, the module has {target[key].dtype}"
            for key in shared
            if dtypes[key] != target[key].dtype
        ],
    }
    if any(problems.values()):
        raise ConversionError(problems)
    with torch.no_grad():
        for key, tensor in target.items():
            tensor.copy_(as_tensor(arrays[key]))


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor or any array as a numpy array, bit for bit; bfloat16 goes through a view as integers.

    Raises ValueError for a tensor that NumPy has no form of: quantised, 8-bit floating, without values (meta).
    """
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    try:
        tensor = tensor.detach().cpu()
        return bfloat16_as_numpy(tensor) if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"a tensor of {tensor.dtype} on {tensor.device} cannot be read: {reason}") from None


def bfloat16_as_numpy(tensor: Any) -> np.ndarray:
    import torch

    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def as_tensor(array: np.ndarray) -> Any:
    """A writable numpy array as a torch tensor over the same memory; bfloat16 goes through a view as integers."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_dtype(torch: Any, dtype: np.dtype) -> Any:
    """torch's name of a numpy dtype, None where it has none."""
    return getattr(torch, dtype.name, None)


def is_floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def count(items: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts
