"""`Weights`: map PyTorch tensors to the arrays of a Flax model, and convert them in both directions.

Twins give their parts the same names: `jaxmodels.weights` converts them. For other pairs of models `Mapped` renames
(see `parity.compare.names`). Several Flax names for one tensor split it along its output features (a fused query, key
and value); one Flax name for several tensors joins them. A number in a name may be absent in Flax: that array holds all
layers. The axes follow from the kind of layer:

    Linear          weight [out, in]         <->  kernel [in, out], or [in, heads, d_k], or [heads, d_k, out]
    Conv            weight [out, in, *k]     <->  kernel [*k, in, out]
    ConvTranspose   weight [in, out, *k]     <->  kernel [*k, in, out], its window reversed
    BatchNorm       running_mean, running_var <-> mean, var; num_batches_tracked is dropped
    norms           weight                   <->  scale
    Embedding       weight                   <->  embedding
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.weights.names import (
    ConversionError,
    Path,
    as_numpy,
    dotted,
    entries,
    flat_arrays,
    from_torch,
    to_torch,
    with_arrays,
)
from parity.compare.names import Names, matches, renamer

SUFFIXES = {"weight": ("kernel", "embedding", "scale"), "running_mean": ("mean",), "running_var": ("var",)}
DROPPED = "num_batches_tracked"  # BatchNorm's count of averaged batches; evaluation does not read it


class Parameter(Protocol):
    """Attributes of a `torch.nn.Parameter` that are read here."""

    @property
    def requires_grad(self) -> bool:
        """True if it is trained."""


class TorchModule(Protocol):
    """Methods of a `torch.nn.Module` that are called here; a recording has them too and needs no torch."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors by name."""

    def get_submodule(self, path: str, /) -> Any:
        """The module at a path; only its type is used."""

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterable[tuple[str, Parameter]]:
        """Parameters by name; a tied one under each of its names if remove_duplicate is False."""


@runtime_checkable
class Weights(Protocol):
    """Conversion between a PyTorch module's tensors and the arrays of a Flax model."""

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        """A new model, in evaluation mode, with the tensors; raises ConversionError if they do not fit."""

    def read(self, state: Any, prefix: Path = ()) -> dict[str, np.ndarray]:
        """Arrays of a model, a State or gradients by PyTorch's name; prefix: path of the state in the model."""

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        """The paths of arrays whose PyTorch names all match a pattern."""

    def module(self, path: str) -> str | None:
        """The Flax path of a PyTorch sub-module; None if it has no counterpart."""

    def carries(self, key: str) -> bool:
        """True if a tensor of the state_dict has a place in the Flax model."""


class Twins:
    """`Weights` of models that give their parts the same names; see `jaxmodels.weights.names`."""

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        return evaluating(from_torch(model, state_dict))

    def read(self, state: Any, prefix: Path = ()) -> dict[str, np.ndarray]:
        start = "".join(f"{word}." for word in prefix)
        return {start + name: array for name, array in to_torch(state).items()}

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        arrays = flat_arrays(state)
        return set(arrays) - {entry.path for entry in entries(arrays) if not matches(entry.key, frozen)}

    def module(self, path: str) -> str | None:
        return path

    def carries(self, key: str) -> bool:
        return True


class OwnWeights:
    """`Weights` of a Flax model that is compared with itself: it keeps its arrays, cast to a dtype, and its names."""

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        arrays = flat_arrays(model)
        floats = {path for path, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
        cast = {path: jnp.asarray(a, self.dtype if path in floats else None) for path, a in arrays.items()}
        return evaluating(with_arrays(model, cast))

    def read(self, state: Any, prefix: Path = ()) -> dict[str, np.ndarray]:
        arrays = flat_arrays(state).items()
        return {dotted((*prefix, *path)): np.asarray(array) for path, array in arrays}

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        return {path for path in flat_arrays(state) if matches(dotted(path), frozen)}

    def module(self, path: str) -> str | None:
        return path

    def carries(self, key: str) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor, or one of several equal parts of its output features, and its place in a Flax array.

    part: (i, n) for part i of n of the tensor; slot: the same of the array; layer: index into an array of all layers.
    """

    key: str
    path: Path
    kind: str
    part: tuple[int, int] = (0, 1)
    slot: tuple[int, int] = (0, 1)
    layer: int | None = None

    def to_flax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Extract this piece of a tensor, in the shape of its place; raises ValueError if it does not fit."""
        array = KINDS[self.kind][0](tensor)
        if self.part[1] > 1:
            array = np.split(array, self.part[1], axis=-1)[self.part[0]]
        if array.shape != shape and (array.ndim == len(shape) or array.size != np.prod(shape)):
            raise ValueError(
                f"{self.key}: {list(tensor.shape)} becomes {list(array.shape)}; the model has {list(shape)}"
            )
        return array.reshape(shape)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of its place in an array of a given shape."""
        shape = shape if self.layer is None else shape[1:]
        return (*shape[:-1], shape[-1] // self.slot[1]) if self.slot[1] > 1 else shape

    def of(self, array: np.ndarray) -> np.ndarray:
        """Extract this piece of a Flax array."""
        array = array if self.layer is None else array[self.layer]
        return np.split(array, self.slot[1], axis=-1)[self.slot[0]] if self.slot[1] > 1 else array


def placeholder(shape: tuple[int, ...]) -> np.ndarray:
    """An array of a given shape that takes no memory."""
    return np.broadcast_to(np.zeros(()), shape)


def last_first(array: np.ndarray) -> np.ndarray:
    """[*k, in, out] -> [out, in, *k]."""
    return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))


def first_last(array: np.ndarray) -> np.ndarray:
    """[out, in, *k] -> [*k, in, out]."""
    return array.transpose(*range(2, array.ndim), 1, 0)


def reversed_window(array: np.ndarray) -> np.ndarray:
    """The array with the axes of a convolution's window, those after the first two, reversed."""
    return np.flip(array, tuple(range(2, array.ndim)))


Rearrange = Callable[[np.ndarray], np.ndarray]
KINDS: dict[str, tuple[Rearrange, Rearrange]] = {  # to Flax's axes, and back
    "same": (np.asarray, np.asarray),
    "linear": (np.transpose, np.transpose),
    "conv": (first_last, last_first),
    "transposed conv": (
        lambda a: first_last(reversed_window(a)).swapaxes(-1, -2),
        lambda a: reversed_window(last_first(a.swapaxes(-1, -2))),
    ),
}


class Mapped:
    """`Weights` of models that give their parts different names, by `names`.

    torch_module gives the kinds of layers and which weights are tied. Raises ConversionError that lists all tensors
    without a place, arrays without a tensor, and shapes that differ.
    """

    def __init__(self, torch_module: TorchModule, flax_module: Any, names: Names):
        self.rename = renamer(names)
        tensors = torch_module.state_dict()
        self.tensors = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        self.shapes = {path: tuple(array.shape) for path, array in flat_arrays(flax_module).items()}
        lookup = {dotted(path): path for path in self.shapes}
        first = aliases(torch_module)
        pieces: list[Piece] = []
        unexpected = []
        for key, tensor in tensors.items():
            renamed = self.rename(key)
            if renamed is None or key.endswith(DROPPED):
                continue
            found = [place(lookup, name) for name in renamed]
            places = [spot for spot in found if spot is not None]
            tied = first.get(key, key) != key  # the same tensor is converted under its first name
            if tied and (len(places) < len(found) or any(p.path == path for p in pieces for path, _ in places)):
                continue
            if len(places) < len(found):
                unexpected.append(f"{key} (as {', '.join(renamed)})")
                continue
            owner = torch_module.get_submodule(key.rpartition(".")[0])
            pieces += [
                Piece(key, path, kind_of(owner, tensor, path), (i, len(places)), layer=layer)
                for i, (path, layer) in enumerate(places)
            ]
        self.pieces = slotted(pieces)
        carried = {piece.path for piece in self.pieces}
        misshapen = []
        for piece in self.pieces:
            try:
                piece.to_flax(placeholder(self.tensors[piece.key]), piece.shape(self.shapes[piece.path]))
            except ValueError as error:
                misshapen.append(str(error) if piece.key in str(error) else f"{piece.key}: {error}")
        problems = {
            "missing": [dotted(path) for path in self.shapes if path not in carried],
            "unexpected": unexpected,
            "misshapen": misshapen,
        }
        if any(problems.values()):
            raise ConversionError(problems)

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        leaves = {}
        for path, pieces in grouped(self.pieces, "path").items():
            shape = self.shapes[path]
            layers = []
            for _, group in sorted(grouped(pieces, "layer").items(), key=lambda item: item[0] or 0):
                parts = [piece.to_flax(as_numpy(state_dict[piece.key]), piece.shape(shape)) for piece in group]
                layers.append(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1))
            leaves[path] = jnp.array(layers[0] if pieces[0].layer is None else np.stack(layers), copy=True)
        return evaluating(with_arrays(model, leaves))

    def read(self, state: Any, prefix: Path = ()) -> dict[str, np.ndarray]:
        arrays = {(*prefix, *path): np.asarray(array) for path, array in flat_arrays(state).items()}
        found = {}
        for key, pieces in grouped(self.pieces, "key").items():
            if all(p.path in arrays and arrays[p.path].shape == self.shapes[p.path] for p in pieces):
                parts = [piece.of(arrays[piece.path]) for piece in pieces]
                found[key] = np.array(self.joined(pieces, parts), order="C")
        return found

    def joined(self, pieces: list[Piece], parts: list[np.ndarray]) -> np.ndarray:
        """The PyTorch tensor, joined from its parts."""
        there, back = KINDS[pieces[0].kind]
        *outer, features = there(placeholder(self.tensors[pieces[0].key])).shape or (1,)
        if len(parts) > 1:
            parts = [part.reshape(*outer, features // len(parts)) for part in parts]
            return back(np.concatenate(parts, axis=-1))
        return back(parts[0].reshape(there(placeholder(self.tensors[pieces[0].key])).shape))

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        present = set(flat_arrays(state))
        return present - {piece.path for piece in self.pieces if not matches(piece.key, frozen)}

    def module(self, path: str) -> str | None:
        renamed = self.rename(path)
        return renamed[0] if renamed is not None and len(renamed) == 1 else None

    def carries(self, key: str) -> bool:
        return any(piece.key == key for piece in self.pieces)


def place(lookup: Mapping[str, Path], name: str) -> tuple[Path, int | None] | None:
    """Look up a name, also with Flax's word for the array or as one layer of a stack: (path, layer)."""
    owner, _, last = name.rpartition(".")
    options = [name] + [f"{owner}.{word}" if owner else word for word in SUFFIXES.get(last, ())]
    for option in options:
        if option in lookup:
            return lookup[option], None
    for option in options:
        words = option.split(".")
        for i, word in enumerate(words):
            stacked = ".".join(words[:i] + words[i + 1 :])
            if word.isdigit() and stacked in lookup:
                return lookup[stacked], int(word)
    return None


def kind_of(owner: Any, tensor: Any, path: Path) -> str:
    """The key in `KINDS` for a tensor of a PyTorch module and a Flax array."""
    if path[-1] != "kernel" or type(owner).__name__ == "Conv1D":  # of transformers: a Linear stored as [in, out]
        return "same"
    if type(owner).__name__.startswith("ConvTranspose"):
        return "transposed conv"
    return "conv" if tensor.ndim > 2 else "linear" if tensor.ndim == 2 else "same"


def slotted(pieces: list[Piece]) -> list[Piece]:
    """The pieces with `slot` set: numbered among those that share a place."""
    counts = collections.Counter((piece.path, piece.layer) for piece in pieces)
    used: collections.Counter[tuple[Path, int | None]] = collections.Counter()
    result = []
    for piece in pieces:
        where = piece.path, piece.layer
        result.append(dataclasses.replace(piece, slot=(used[where], counts[where])))
        used[where] += 1
    return result


def grouped(pieces: Sequence[Piece], attribute: str) -> dict[Any, list[Piece]]:
    """Pieces by the value of an attribute."""
    groups: dict[Any, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(getattr(piece, attribute), []).append(piece)
    return groups


def aliases(torch_module: TorchModule) -> dict[str, str]:
    """Every name of every parameter, with the first of its names: tied weights have several."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in torch_module.named_parameters(remove_duplicate=False)
    }


def evaluating(model: Any) -> Any:
    """The model with dropout off and running statistics in use."""
    if isinstance(model, nnx.Module):
        model.eval()
    return model


def weights_of(torch_module: TorchModule, flax_module: Any, names: Names | Weights | None) -> Weights:
    """The conversion of a pair of modules.

    It is `names` if those are `Weights`, and `Mapped` if they are names. If omitted: `Twins` if all names are the same,
    else `Mapped` without names if only axes differ. Raises ConversionError if the weights do not fit.
    """
    if isinstance(names, Weights):
        return names
    if names is not None:
        return Mapped(torch_module, flax_module, names)
    try:
        with jax.enable_x64(True):  # 64-bit tensors are refused without it
            from_torch(flax_module, torch_module.state_dict())
    except ConversionError as error:
        try:
            return Mapped(torch_module, flax_module, {})
        except ConversionError:
            raise error from None
    return Twins()
