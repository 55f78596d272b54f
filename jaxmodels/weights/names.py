"""Conversion of a PyTorch state_dict to a Flax model and back, for twins whose parts have the same names.

There is no table per model. A Flax path and a PyTorch key are the same words, except for the last one:

    kernel [in, out]   <->  weight [out, in]     (Linear)
    embedding          <->  weight               (Embedding)
    scale              <->  weight               (LayerNorm)
    anything else      <->  the same name, the same array

and a stacked `layers`, one array with a leading layer axis, is `layers.0` … `layers.N-1` in PyTorch.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from jaxmodels.process import texts
from jaxmodels.weights.lazy import aligned, copy

Model = TypeVar("Model", bound=nnx.Module)
Path = tuple[str | int, ...]

RENAMED = {"kernel": "weight", "embedding": "weight", "scale": "weight"}  # last word of a path: Flax -> PyTorch
LONGEST = 300  # characters of an entry in an error
FEW = 5  # entries of a kind in an error of one line
NARROWED = "64 bits wide while jax_enable_x64 is off and no dtype is given"


class ConversionError(ValueError):
    """State_dict and model do not fit; `problems` lists every entry at fault, by kind. Nothing was converted.

    The message is one line, with a few entries of each kind; a traceback adds up to SHOWN of them, one a line. Entries
    that differ in numbers only, such as those of equal layers, are counted.
    """

    SHOWN = 20

    def __init__(self, problems: Mapping[str, list[str]]):
        self.problems = {kind: entries for kind, entries in problems.items() if entries}
        few = [f"{kind} ({len(entries)}): {listed(entries)}" for kind, entries in self.problems.items()]
        super().__init__(f"weights and model do not fit; nothing was converted: {'; '.join(few)}")
        for kind, entries in self.problems.items():
            lines = shortened(entries, self.SHOWN)
            self.add_note(f"  {kind} ({len(entries)}):\n    " + "\n    ".join(lines))


def listed(entries: list[str]) -> str:
    """FEW entries at most, in one line: if there are more, those of equal layers are counted, and the rest too."""
    if len(entries) <= FEW:
        return ", ".join(texts.shortened(entry, LONGEST) for entry in entries)
    found = [
        texts.shortened(same[0], LONGEST) + f" (and {len(same) - 1} alike)" * (len(same) > 1) for same in alike(entries)
    ]
    more = f", … and {len(found) - FEW} more" * (len(found) > FEW)
    return ", ".join(found[:FEW]) + more


def shortened(entries: list[str], most: int) -> list[str]:
    """At most so many lines for entries: if there are more, equal layers share a line, and the rest is counted."""
    if len(entries) <= most:
        return [texts.shortened(entry, LONGEST) for entry in entries]
    forms = [same[0] if len(same) == 1 else f"{form(same[0])} ({len(same)} of them)" for same in alike(entries)]
    lines = [texts.shortened(line, LONGEST) for line in forms]
    return lines if len(lines) <= most else [*lines[: most - 1], f"… and {len(lines) - most + 1} more"]


def alike(entries: list[str]) -> list[list[str]]:
    """Entries in groups of those that differ in the numbers of layers only."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        found.setdefault(form(entry), []).append(entry)
    return list(found.values())


def form(entry: str) -> str:
    """Entry with * for the numbers between its dots."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", entry)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Correspondence of a PyTorch tensor and a Flax array: key, path, layer of a stacked array, transposed or not."""

    key: str
    path: Path
    layer: int | None
    transposed: bool

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor from that of the Flax array."""
        shape = shape if self.layer is None else shape[1:]
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Values of the tensor from the Flax array."""
        array = array if self.layer is None else array[self.layer]
        return array.swapaxes(-1, -2) if self.transposed else array

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Values of the Flax array, or of its layer, from the tensor."""
        return tensor.swapaxes(-1, -2) if self.transposed else tensor


def entries(arrays: Mapping[Path, Any]) -> Iterator[Entry]:
    """Entries of all PyTorch tensors of a model, from its arrays by Flax path, in the order of the paths."""
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


def stacked_at(path: Path) -> int | None:
    """Index of `layers` in the path of a stacked array (no layer number follows it); None for other arrays."""
    for i, word in enumerate(path[:-1]):
        if word == "layers" and not isinstance(path[i + 1], int):
            return i
    return None


def dotted(path: Iterable[Any]) -> str:
    """Path as one word: layers.0.attention.kernel."""
    return ".".join(map(str, path))


def flat_arrays(model: nnx.Pytree | nnx.State) -> dict[Path, Any]:
    """All arrays of a model, its gradients or a State by path, sorted; abstract arrays stay abstract."""
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    # Random state of nnx.Dropout(rngs=…), and what calls leave behind, are no weights.
    _, state = nnx.split_state(state, (nnx.RngState, nnx.Intermediate, nnx.Cache), ...)
    flat: Any = nnx.to_flat_state(state)
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in flat}


def from_torch(model: Model, state_dict: Mapping[str, Any], dtype: Any = None) -> Model:
    """New model with the weights of a PyTorch state_dict.

    model: gives the structure; may be abstract. If it has a method `adapted(state_dict)`, that is called first, to
    rename the keys of an original implementation and drop entries that are not parameters. state_dict: torch tensors or
    arrays, which are copied. dtype: cast floating tensors; default their own.

    Raises ConversionError listing every missing, unexpected and misshapen entry, and every 64-bit one if jax_enable_x64
    is off, as JAX would narrow it; ValueError if dtype is not floating, or if a finite value overflows in it.
    """
    if dtype is not None:
        check_floating(dtype)
    state_dict, targets, wanted = matched(model, state_dict, dtype)
    places: dict[Path, list[Entry]] = {path: [] for path in targets}
    for entry in wanted:
        places[entry.path].append(entry)
    leaves = {}
    for path, parts_of in places.items():  # one array at a time: a state_dict may make its tensors when asked
        parts = (entry.to_flax(as_numpy(state_dict[entry.key])) for entry in parts_of)
        leaves[path] = placed(parts, len(parts_of), stacked_at(path) is not None, dtype, dotted(path))
    return with_arrays(model, leaves)


def placed(parts: Iterator[np.ndarray], n: int, stacked: bool, dtype: Any, name: str) -> jax.Array:
    """The array of n parts that are made one at a time, or of one; dtype: cast floating values.

    Raises ValueError with the array's name if a finite value overflows.
    """
    whole: np.ndarray | None = None
    infinite = 0
    for i, part in enumerate(parts):
        cast = dtype is not None and is_floating(part.dtype)
        wanted = np.dtype(dtype) if cast else part.dtype
        infinite += int(np.isinf(part).sum()) if cast else 0
        if whole is None:
            whole = aligned((n, *part.shape), wanted)
        elif wanted != whole.dtype:
            whole = whole.astype(np.promote_types(wanted, whole.dtype))
        copy(whole[i, ...], part)  # an array also of one without an axis
    assert whole is not None, "an array has at least one part"
    if dtype is not None and is_floating(whole.dtype) and np.isinf(whole).sum() > infinite:
        raise ValueError(f"{name} has values that overflow in dtype={np.dtype(dtype).name}")
    # JAX uses aligned memory as it is: it is not PyTorch's, and nobody else's.
    return jax.device_put(whole if stacked else whole[0])


class Renamed(Mapping[str, Any]):
    """A state_dict's tensors under other keys; each is read when it is asked for, as the state_dict may make it then.

    keys: the state_dict's key of each.
    """

    def __init__(self, state_dict: Mapping[str, Any], keys: Mapping[str, str]):
        self.state_dict, self.keys_of = state_dict, keys

    def __getitem__(self, key: str) -> Any:
        return self.state_dict[self.keys_of[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def matched(
    model: nnx.Module, state_dict: Mapping[str, Any], dtype: Any = None
) -> tuple[Mapping[str, Any], dict[Path, Any], list[Entry]]:
    """The state_dict with the model's keys, the model's arrays by path, and their entries; nothing is converted.

    Raises ConversionError like `from_torch`.
    """
    if hasattr(model, "adapted"):
        state_dict = model.adapted(state_dict)
    targets = flat_arrays(model)
    keys = {entry.key for entry in entries(targets)}
    given = {key: Type.of(as_numpy(state_dict[key])) if key in keys else None for key in state_dict}
    return state_dict, targets, check_fit(targets, given, dtype)


class Type(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, array: np.ndarray) -> "Type":
        return cls(array.shape, array.dtype)


def check_fit(targets: Mapping[Path, Any], given: Mapping[str, Any], dtype: Any, *, exact: bool = False) -> list[Entry]:
    """Entries of all tensors of a model, after comparing the given shapes and dtypes with the model's.

    exact: integers must have the model's dtype, as those of a saved model. Raises ConversionError like `from_torch`.
    """
    wanted = list(entries(targets))
    keys = collections.Counter(entry.key for entry in wanted)
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
        alike_kinds = is_floating(tensor.dtype) == is_floating(target.dtype)
        if not alike_kinds or (exact and not same_kind(tensor.dtype, target.dtype)):
            problems["of another kind"].append(f"{entry.key}: got {tensor.dtype}, the model has {target.dtype}")
        wide = np.dtype(dtype) if dtype is not None and is_floating(tensor.dtype) else tensor.dtype
        if wide in (np.float64, np.complex128, np.int64, np.uint64) and not jax.config.read("jax_enable_x64"):
            problems[NARROWED].append(entry.key)
    if any(problems.values()):
        raise ConversionError(problems)
    return wanted


def with_arrays(model: Any, arrays: Mapping[Path, Any]) -> Any:
    """Copy of a model with other arrays at the given paths."""
    graphdef, state = nnx.split(model)
    flat: dict[Any, Any] = dict(nnx.to_flat_state(state))
    for path, array in arrays.items():  # a module's plain arrays are leaves themselves
        flat[path] = flat[path].replace(array) if isinstance(flat[path], nnx.Variable) else array
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def to_torch(model: nnx.Module | nnx.State) -> dict[str, np.ndarray]:
    """State_dict of a model, of its gradients from `jax.grad`, or of an nnx.State, bit-exact.

    Arrays are copies, contiguous and writable, in their own dtype (bfloat16 as that of ml_dtypes). Raises ValueError if
    two arrays have one name in PyTorch, as weights of 8 or 4 bits and their scales.
    """
    arrays = {path: np.asarray(array) for path, array in flat_arrays(model).items()}
    names = collections.Counter(entry.key for entry in entries(arrays))
    if several := [name for name, n in names.items() if n > 1]:
        raise ValueError(
            f"model has two arrays for {texts.quoted(several[0])}, such as quantized weights: it has no state_dict"
        )
    return {entry.key: np.array(entry.to_torch(arrays[entry.path]), order="C") for entry in entries(arrays)}


def load_into_torch(module: Any, model: nnx.Module | nnx.State) -> None:
    """Copy a model's weights into a PyTorch module, bit-exact.

    Raises ConversionError, before anything is copied, listing every missing, unexpected and misshapen entry, and every
    entry of another dtype (as a cast would lose bits; call `module.to(dtype)` first).
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
    """Convert a torch tensor or any array to a NumPy array, bit-exact; bfloat16 through a view as integers.

    Raises ValueError if NumPy cannot represent the tensor: quantized, 8-bit floating, without values (meta).
    """
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()  # of a view that conjugates or negates
        return bfloat16_as_numpy(tensor) if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"a tensor of {tensor.dtype} on {tensor.device} cannot be read: {reason}") from None


def bfloat16_as_numpy(tensor: Any) -> np.ndarray:
    """Convert a bfloat16 tensor to an array of ml_dtypes.bfloat16."""
    import torch

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def as_tensor(array: np.ndarray) -> Any:
    """Torch tensor that shares the memory of a writable NumPy array; bfloat16 through a view as integers.

    Raises ValueError if PyTorch does not take the dtype from NumPy: other floats of ml_dtypes, as those of 8 bits.
    """
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise ValueError(f"an array of {array.dtype} {list(array.shape)} has no tensor in PyTorch; cast it") from None


def torch_dtype(torch: Any, dtype: np.dtype) -> Any:
    """Torch dtype of a NumPy dtype; None if there is none."""
    return getattr(torch, dtype.name, None)


def check_floating(dtype: Any) -> None:
    """Raises ValueError if a dtype to cast weights to is none, or not floating."""
    try:
        np.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype={texts.quoted(dtype)} must be a floating type, such as float32") from None
    if not is_floating(dtype):
        raise ValueError(f"dtype={np.dtype(dtype).name} must be a floating type, as weights are fractions")


def is_floating(dtype: Any) -> bool:
    """True for floating dtypes, those of ml_dtypes included."""
    return jnp.issubdtype(dtype, jnp.floating)


def same_kind(stored: Any, wanted: Any) -> bool:
    """True if both dtypes are floating, or both are the same: of integers each bit has its meaning."""
    return stored == wanted or (is_floating(stored) and is_floating(wanted))
