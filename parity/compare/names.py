"""Which array of a Flax model a PyTorch tensor becomes, for twins and for anybody's pair of models.

Twins name their parts alike: `jaxmodels.convert` carries them across. Others are told apart by *names*, from PyTorch's
to Flax's, given as one of

    a mapping   {"wte": "embed", "h.*.attn": "blocks.*.attention"}; the name of a module stands for all inside it, `*`
                for one word; the key of most words counts; None: has no counterpart
    pairs       [(r"^h\\.(\\d+)", r"blocks.\\1"), …], regular expressions replaced one after the other
    a function  of a PyTorch name, that returns Flax's or None

Several Flax names for one tensor split it along its output features (a fused query, key and value); one Flax name for
several tensors joins them. A word that is a number may be missing in Flax: that array holds all layers. What is left is
the axes, by kind of layer:

    Linear          weight [out, in]         <->  kernel [in, out], or [in, heads, d_k], or [heads, d_k, out]
    Conv            weight [out, in, *k]     <->  kernel [*k, in, out]
    ConvTranspose   weight [in, out, *k]     <->  kernel [*k, in, out], its window reversed
    BatchNorm       running_mean, running_var <-> mean, var; num_batches_tracked is dropped
    norms           weight                   <->  scale
    Embedding       weight                   <->  embedding
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

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
from parity.compare.inputs import matches

Names = Mapping[str, Any] | Sequence[tuple[str, str]] | Callable[[str], Any]

SUFFIXES = {"weight": ("kernel", "embedding", "scale"), "running_mean": ("mean",), "running_var": ("var",)}
DROPPED = "num_batches_tracked"  # how often BatchNorm averaged; evaluation does not read it


class Weights(Protocol):
    """How a PyTorch module's tensors lie in a Flax model."""

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        """A new model, in evaluation mode, with the tensors; raises ConversionError where they do not fit."""

    def read(self, state: Any, prefix: Path = ()) -> dict[str, np.ndarray]:
        """Arrays of a model, a State or gradients by PyTorch name; `prefix`: where in the model the state is from."""

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        """The paths of arrays whose PyTorch names all match a pattern."""

    def module(self, path: str) -> str | None:
        """The Flax path of a PyTorch sub-module, None where it has none of its own."""

    def carries(self, key: str) -> bool:
        """Whether a tensor of the state_dict has a place in the Flax model."""


class Twins:
    """Both sides name their parts alike, see `jaxmodels.weights.names`."""

    def load(self, model, state_dict):
        return evaluating(from_torch(model, state_dict))

    def read(self, state, prefix=()):
        start = "".join(f"{word}." for word in prefix)
        return {start + name: array for name, array in to_torch(state).items()}

    def held(self, state, frozen):
        arrays = flat_arrays(state)
        return set(arrays) - {entry.path for entry in entries(arrays) if not matches(entry.key, frozen)}

    def module(self, path):
        return path

    def carries(self, key):
        return True


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor, or one of several equal parts of its output features, and its place in a Flax array.

    part, slot: (i, n) for the i-th of n parts of the tensor, of the array; layer: of an array that stacks them.
    """

    key: str
    path: Path
    kind: str
    part: tuple[int, int] = (0, 1)
    slot: tuple[int, int] = (0, 1)
    layer: int | None = None

    def to_flax(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """This piece of the tensor, in the shape of its place; raises ValueError where it does not fit."""
        array = KINDS[self.kind][0](tensor)
        if self.part[1] > 1:
            array = np.split(array, self.part[1], axis=-1)[self.part[0]]
        if array.shape != shape and (array.ndim == len(shape) or array.size != np.prod(shape)):
            raise ValueError(f"{self.key}: {list(tensor.shape)} gives {list(array.shape)}, the model has {list(shape)}")
        return array.reshape(shape)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of its place in an array of the given shape."""
        shape = shape if self.layer is None else shape[1:]
        return (*shape[:-1], shape[-1] // self.slot[1]) if self.slot[1] > 1 else shape

    def of(self, array: np.ndarray) -> np.ndarray:
        """Its values in a Flax array."""
        array = array if self.layer is None else array[self.layer]
        return np.split(array, self.slot[1], axis=-1)[self.slot[0]] if self.slot[1] > 1 else array


def nothing(shape: tuple[int, ...]) -> np.ndarray:
    """An array of a shape that takes no memory."""
    return np.broadcast_to(np.zeros(()), shape)


def last_first(array: np.ndarray) -> np.ndarray:
    return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))


def first_last(array: np.ndarray) -> np.ndarray:
    return array.transpose(*range(2, array.ndim), 1, 0)


def reversed_window(array: np.ndarray) -> np.ndarray:
    return np.flip(array, tuple(range(2, array.ndim)))


KINDS: dict[str, tuple[Callable, Callable]] = {  # to Flax's axes, and back
    "same": (np.asarray, np.asarray),
    "linear": (np.transpose, np.transpose),
    "conv": (first_last, last_first),
    "transposed conv": (
        lambda a: first_last(reversed_window(a)).swapaxes(-1, -2),
        lambda a: reversed_window(last_first(a.swapaxes(-1, -2))),
    ),
}


class Mapped:
    """Both sides name their parts differently; `names` says how. `torch_module` gives kinds of layers and tied weights.

    Raises ConversionError that lists all tensors without a place, arrays without a tensor, and shapes that differ.
    """

    def __init__(self, torch_module: Any, flax_module: Any, names: Names):
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
            tied = first.get(key, key) != key  # the same tensor under another name, carried there
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
                piece.to_flax(nothing(self.tensors[piece.key]), piece.shape(self.shapes[piece.path]))
            except ValueError as error:
                misshapen.append(str(error) if piece.key in str(error) else f"{piece.key}: {error}")
        problems = {
            "missing": [dotted(path) for path in self.shapes if path not in carried],
            "unexpected": unexpected,
            "misshapen": misshapen,
        }
        if any(problems.values()):
            raise ConversionError(problems)

    def load(self, model, state_dict):
        leaves = {}
        for path, pieces in grouped(self.pieces, "path").items():
            shape = self.shapes[path]
            layers = []
            for _, group in sorted(grouped(pieces, "layer").items(), key=lambda item: item[0] or 0):
                parts = [piece.to_flax(as_numpy(state_dict[piece.key]), piece.shape(shape)) for piece in group]
                layers.append(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1))
            leaves[path] = jnp.array(layers[0] if pieces[0].layer is None else np.stack(layers), copy=True)
        return evaluating(with_arrays(model, leaves))

    def read(self, state, prefix=()):
        arrays = {(*prefix, *path): np.asarray(array) for path, array in flat_arrays(state).items()}
        found = {}
        for key, pieces in grouped(self.pieces, "key").items():
            if all(p.path in arrays and arrays[p.path].shape == self.shapes[p.path] for p in pieces):
                parts = [piece.of(arrays[piece.path]) for piece in pieces]
                found[key] = np.array(self.joined(pieces, parts), order="C")
        return found

    def joined(self, pieces: list[Piece], parts: list[np.ndarray]) -> np.ndarray:
        """The PyTorch tensor of its parts."""
        there, back = KINDS[pieces[0].kind]
        *outer, features = there(nothing(self.tensors[pieces[0].key])).shape or (1,)
        if len(parts) > 1:
            parts = [part.reshape(*outer, features // len(parts)) for part in parts]
            return back(np.concatenate(parts, axis=-1))
        return back(parts[0].reshape(there(nothing(self.tensors[pieces[0].key])).shape))

    def held(self, state, frozen):
        present = set(flat_arrays(state))
        return present - {piece.path for piece in self.pieces if not matches(piece.key, frozen)}

    def module(self, path):
        renamed = self.rename(path)
        return renamed[0] if renamed is not None and len(renamed) == 1 else None

    def carries(self, key):
        return any(piece.key == key for piece in self.pieces)


def renamer(names: Names) -> Callable[[str], list[str] | None]:
    """A function from a PyTorch name to its Flax names; None for what has no counterpart.

    Raises ValueError for names that are none of the three forms, or a mapping whose stars do not match.
    """
    if callable(names):
        return lambda name: listed(names(name))
    if isinstance(names, Mapping):
        return starred(names)
    if isinstance(names, Sequence) and not isinstance(names, str) and all(len(pair) == 2 for pair in names):
        pairs = [(re.compile(pattern), replacement) for pattern, replacement in names]

        def replaced(name: str) -> list[str]:
            for pattern, replacement in pairs:
                name = pattern.sub(replacement, name)
            return [name]

        return replaced
    raise ValueError(
        f"names must be a mapping, pairs of regular expression and replacement, or a function; got {names!r}"
    )


def starred(names: Mapping[str, Any]) -> Callable[[str], list[str] | None]:
    rules = []
    for given, values in names.items():
        for value in listed(values) or []:
            if value.count("*") > given.count("*"):
                raise ValueError(f"names[{given!r}] = {value!r} has more stars than the name it stands for")
        words = given.split(".") if given else []
        pattern = r"\.".join(r"([^.]+)" if word == "*" else re.escape(word) for word in words)
        rules.append((len(words), re.compile(rf"{pattern}(?:\.|$)" if words else ""), listed(values)))
    rules.sort(key=lambda rule: -rule[0])

    def rename(name: str) -> list[str] | None:
        for _, pattern, values in rules:
            match = pattern.match(name)
            if match is None:
                continue
            if values is None:
                return None
            rest = name[match.end() :]
            filled = [fill(value, match.groups()) for value in values]
            return [".".join(part for part in (start, rest) if part) for start in filled]
        return [name]

    return rename


def fill(value: str, words: Sequence[str]) -> str:
    """The stars of a Flax name, replaced by the words that PyTorch's stood for."""
    given = iter(words)
    return ".".join(next(given) if word == "*" else word for word in value.split("."))


def listed(value: Any) -> list[str] | None:
    return value if value is None else [value] if isinstance(value, str) else list(value)


def place(lookup: Mapping[str, Path], name: str) -> tuple[Path, int | None] | None:
    """Where a name is among Flax paths: itself, with Flax's word for the array, or as one layer of a stack."""
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
    """Which rule of `KINDS` carries a tensor of a PyTorch module to a Flax array."""
    if path[-1] != "kernel" or type(owner).__name__ == "Conv1D":  # transformers' Conv1D is a Linear stored [in, out]
        return "same"
    if type(owner).__name__.startswith("ConvTranspose"):
        return "transposed conv"
    return "conv" if tensor.ndim > 2 else "linear" if tensor.ndim == 2 else "same"


def slotted(pieces: list[Piece]) -> list[Piece]:
    """The pieces, those that share a place numbered."""
    counts = collections.Counter((piece.path, piece.layer) for piece in pieces)
    used: collections.Counter = collections.Counter()
    result = []
    for piece in pieces:
        where = piece.path, piece.layer
        result.append(dataclasses.replace(piece, slot=(used[where], counts[where])))
        used[where] += 1
    return result


def grouped(pieces: Sequence[Piece], attribute: str) -> dict[Any, list[Piece]]:
    groups: dict[Any, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(getattr(piece, attribute), []).append(piece)
    return groups


def aliases(torch_module: Any) -> dict[str, str]:
    """Of every parameter that has several names, each name and the first."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in torch_module.named_parameters(remove_duplicate=False)
    }


def evaluating(model: Any) -> Any:
    """The model with its dropouts off and its running statistics in use; a model of one's own need not know of it."""
    if isinstance(model, nnx.Module):
        model.eval()
    return model


def weights_of(torch_module: Any, flax_module: Any, names: Names | Weights | None) -> Weights:
    """The way across: what is given; else `Twins` where all names are alike, and the rules where only axes differ."""
    if hasattr(names, "load"):
        return names  # type: ignore[return-value]
    if names is not None:
        return Mapped(torch_module, flax_module, names)
    try:
        with jax.enable_x64(True):  # so that no dtype is in the way
            from_torch(flax_module, torch_module.state_dict())
    except ConversionError as error:
        try:
            return Mapped(torch_module, flax_module, {})
        except ConversionError:
            raise error from None
    return Twins()
