"""`Converted`: `Weights` by a converter of the user's own, a function from the state_dict to the Flax arrays.

The converter itself is under test. Where each number of a tensor goes is found by calling it with marked tensors:
zeros, ones, and the digits of each element's number. A converter that permutes, splits, joins, scales or shifts is
recovered in that way, and gradients are compared through its transpose. Arrays that are computed otherwise (such as the
product of a weight_norm) are loaded from the converter, and gradients of their tensors are not compared.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.weights.names import ConversionError, Path, as_numpy, as_tensor, dotted, flat_arrays, with_arrays
from parity.compare.names import matches
from parity.compare.weights.layout import shown
from parity.compare.weights.owners import kind, parameters
from parity.compare.weights.protocol import TorchModule, aliases
from parity.compare.weights.sided import OneSided, check_patterns, check_values, listed
from parity.compare.weights.twins import evaluating, in_dtype, of_width

BASE = 64  # of the digits, which 8 bits of precision hold
Converter = Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Placed:
    """Sources of an array's numbers: array = scale * numbers[index] + shift; None: 1 and 0."""

    index: np.ndarray
    scale: np.ndarray | None
    shift: np.ndarray | None


class Converted:
    """`Weights` by a converter. Raises ConversionError if its arrays are not the model's, ValueError if it raises."""

    def __init__(
        self,
        torch_module: TorchModule,
        flax_module: Any,
        convert: Converter,
        *,
        flax_only: Sequence[str] = (),
        torch_only: Sequence[str] = (),
    ):
        self.convert = convert
        self.values = dict(torch_module.state_dict())
        self.arrays = flat_arrays(flax_module)
        self.lookup = {normal(path): path for path in self.arrays}
        check_patterns("flax_only", flax_only, {dotted(path): 0 for path in self.arrays})
        check_patterns("torch_only", torch_only, self.values)
        first = aliases(torch_module)
        self.trained = {name for name, p in torch_module.named_parameters() if p.requires_grad}
        self.numbering, self.total = numbering(self.values, first)
        made = self.converted(self.values)
        self.kept = {p for p in self.arrays if matches(dotted(p), flax_only) and normal(p) not in made}
        self.check(made)
        check_values({path: self.arrays[path] for path in self.kept})
        self.constant = {self.lookup[name]: array for name, array in made.items()}
        self.placed = {self.lookup[name]: placed for name, placed in self.recovered(made).items()}
        self.keys_of = {path: self.keys(placed) for path, placed in self.placed.items()}
        self.computed = self.dependent(made)
        self.narrowed = {
            path
            for path, keys in self.keys_of.items()
            if flat(made[normal(path)]).itemsize < min(flat(self.values[key]).itemsize for key in keys)
        }
        self.sides = OneSided(flax_only, torch_only)
        self.classify(parameters(flax_module), set(first))

    def converted(self, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The converter's arrays by name; raises ValueError if it raises, or returns no arrays."""
        try:
            result = self.convert(dict(state))
        except Exception as error:
            name = getattr(self.convert, "__name__", repr(self.convert))
            raise ValueError(f"names={name} raised {type(error).__name__} for the state_dict: {error}") from error
        found = {}
        for words, leaf in leaves(result):
            name = normal(words)
            name = name if name in self.lookup else name.partition(".")[2]  # of a collection, such as params
            found[name if name in self.lookup else normal(words)] = as_numpy(leaf)
        return found

    def check(self, made: Mapping[str, np.ndarray]) -> None:
        """Raises ConversionError if the converter's arrays are not those of the model."""
        shapes = {
            name: (array.shape, tuple(self.arrays[self.lookup[name]].shape))
            for name, array in made.items()
            if name in self.lookup
        }
        problems = {
            "missing": [n for n, path in self.lookup.items() if n not in made and path not in self.kept],
            "unexpected": [f"{name} (from the converter)" for name in made if name not in self.lookup],
            "misshapen": [
                f"{name}: the converter gives {shown(given)}, Flax has {shown(ours)}"
                for name, (given, ours) in shapes.items()
                if given != ours
            ],
            "of another kind": [
                f"{name}: the converter gives {made[name].dtype}, Flax has {self.arrays[self.lookup[name]].dtype}"
                for name in shapes
                if kind(made[name].dtype) != kind(self.arrays[self.lookup[name]].dtype)
            ],
        }
        if any(problems.values()):
            raise ConversionError(problems)

    def marked(self, values: np.ndarray) -> dict[str, Any]:
        """The state_dict with other numbers in floating and complex tensors."""
        return {
            key: self.like(value, values[self.numbering[key]]) if key in self.numbering else value
            for key, value in self.values.items()
        }

    def like(self, value: Any, numbers: np.ndarray) -> Any:
        """A tensor of the same kind, shape and dtype with other numbers."""
        array = as_numpy(value)
        real = np.zeros(0, array.dtype).real.dtype
        filled = np.ascontiguousarray(numbers.astype(real)).view(array.dtype).reshape(array.shape)
        return as_tensor(filled) if hasattr(value, "detach") else filled

    def recovered(self, made: Mapping[str, np.ndarray]) -> dict[str, Placed]:
        """The sources of all arrays that depend on tensors by permutation, scale and shift."""
        digits = max(1, int(np.ceil(np.log(self.total + 1) / np.log(BASE))))
        numbers = np.arange(self.total)
        rng = np.random.default_rng(0)
        tested = rng.integers(1 - BASE, BASE, self.total).astype(np.float64)  # exact in every dtype
        try:
            zero, one, test = (
                reals(self.converted(self.marked(v))) for v in (np.zeros(self.total), np.ones(self.total), tested)
            )
            marks = [reals(self.converted(self.marked(numbers // BASE**d % BASE))) for d in range(digits)]
        except ValueError:  # the converter looks at values
            return {}
        found = {}
        with np.errstate(all="ignore"):
            for name, array in made.items():
                if (
                    kind(array.dtype) == "integer"
                    or not array.size
                    or not all(name in other for other in (zero, one, test, *marks))
                ):
                    continue
                shift, scale = zero[name], one[name] - zero[name]
                index = sum(np.rint((mark[name] - shift) / scale) * float(BASE**d) for d, mark in enumerate(marks))
                index = np.asarray(index)
                if not (np.isfinite(index).all() and ((index >= 0) & (index < self.total)).all()):
                    continue
                index = index.astype(np.int32 if self.total < 2**31 else np.int64)
                expected = scale * tested[index] + shift
                close = 16 * jnp.finfo(array.dtype).eps * (np.abs(scale) + np.abs(shift) + np.abs(expected))
                if (np.abs(expected - test[name]) <= close).all():
                    found[name] = Placed(
                        index, None if (scale == 1).all() else scale, None if (shift == 0).all() else shift
                    )
        return found

    def keys(self, placed: Placed) -> list[str]:
        """The tensors that an array consists of, each by its first name."""
        starts: dict[int, str] = {}
        for key, span in self.numbering.items():
            if span.stop > span.start:
                starts.setdefault(span.start, key)
        order = sorted(starts)
        used = np.unique(np.searchsorted(order, placed.index, side="right") - 1)
        return [starts[order[i]] for i in used]

    def dependent(self, made: Mapping[str, np.ndarray]) -> dict[Path, list[str]]:
        """Arrays that are computed otherwise, with the tensors that they depend on."""
        others = [
            name for name, a in made.items() if self.lookup[name] not in self.placed and kind(a.dtype) != "integer"
        ]
        found: dict[Path, list[str]] = {self.lookup[name]: [] for name in others}
        if not others:
            return found
        rng = np.random.default_rng(1)
        for key in self.numbering:
            moved = self.like(self.values[key], flat(self.values[key]) + rng.uniform(0.5, 1, span_of(self.values[key])))
            try:
                changed = self.converted({**self.values, key: moved})
            except ValueError:
                changed = {}
            for name in others:
                if name not in changed or not np.array_equal(changed[name], made[name], equal_nan=True):
                    found[self.lookup[name]].append(key)
        return {path: keys for path, keys in found.items() if keys}  # the others are constants

    def classify(self, trained: set[Path], torch_parameters: set[str]) -> None:
        """Record what is not carried, not compared and not trained."""
        computing = {key for keys in self.computed.values() for key in keys}
        used = {key for keys in self.keys_of.values() for key in keys} | computing
        alias_of = {span.start: key for key, span in reversed(list(self.numbering.items()))}
        left = [key for key, span in self.numbering.items() if alias_of[span.start] == key and key not in used]
        self.left_out = left
        self.computing = sorted(computing)
        self.scaled = sorted(
            {k for p, placed in self.placed.items() if placed.scale is not None for k in self.keys_of[p]}
        )
        self.shifted = {k for p, placed in self.placed.items() if placed.shift is not None for k in self.keys_of[p]}
        for path, keys in self.keys_of.items():
            for key in keys:
                parameter = key in torch_parameters
                if parameter != (path in trained) and (not parameter or key in self.trained):
                    self.sides.add(key, path, parameter=parameter)

    @property
    def notes(self) -> list[str]:
        """Notes on what the converter does beyond moving numbers."""
        lines = [f"not carried (the converter leaves them out): {listed(self.left_out)}"] if self.left_out else []
        if self.computing:
            arrays = listed([dotted(path) for path in self.computed])
            lines.append(f"gradient not compared (the converter computes {arrays} from them): {listed(self.computing)}")
        narrow = [dotted(path) for path in self.placed if path in self.narrowed]
        lines += [f"the converter's dtype is narrower than PyTorch's: {listed(narrow)}"] if narrow else []
        lines += [f"scaled by the converter, not trained: {listed(self.scaled)}"] if self.scaled else []
        return lines + self.sides.notes

    @property
    def uncompared(self) -> frozenset[str]:
        without = {*self.computing, *self.left_out, *(self.values.keys() - self.numbering.keys())}
        return self.sides.accepted | (without & self.trained)

    @property
    def untrained(self) -> frozenset[str]:
        return frozenset(self.scaled)

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        parts = {key: flat(state_dict[key]) for key in self.numbering}
        numbers = np.zeros(self.total, np.result_type(np.float16, *{part.dtype for part in parts.values()}))
        for key, part in parts.items():
            numbers[self.numbering[key]] = part
        made = self.converted(self.same_kind(state_dict)) if self.computed else {}
        arrays: dict[Path, Any] = {}
        for path, target in self.arrays.items():
            if path not in self.placed:
                own = target if path in self.kept else self.constant[path]
                arrays[path] = in_dtype(made[normal(path)] if path in self.computed else own, numbers.dtype)
                continue
            placed, width = self.placed[path], np.result_type(*{parts[key].dtype for key in self.keys_of[path]})
            values = numbers[placed.index]
            values = values if placed.scale is None else values * placed.scale
            values = values if placed.shift is None else values + placed.shift
            array = np.ascontiguousarray(values.astype(width)).view(of_width(target.dtype, width))
            arrays[path] = jnp.array(array.reshape(target.shape), copy=True)
        return evaluating(with_arrays(model, arrays))

    def same_kind(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A state_dict with torch tensors if the module's has them."""
        return {
            key: as_tensor(np.array(value))
            if hasattr(self.values[key], "detach") and not hasattr(value, "detach")
            else value
            for key, value in state_dict.items()
        }

    def read(self, state: Any, prefix: Path = (), *, gradients: bool = False) -> dict[str, np.ndarray]:
        given = {(*prefix, *path): np.asarray(array) for path, array in flat_arrays(state).items()}
        present = {p for p in self.placed if p in given and given[p].shape == tuple(self.arrays[p].shape)}
        dtypes = {flat(given[path]).dtype for path in present}
        if not present:
            return {}
        numbers = np.zeros(self.total, np.result_type(*dtypes))
        seen = np.zeros(self.total, bool)
        for path in present:
            placed, values = self.placed[path], flat(given[path])
            if gradients:
                np.add.at(numbers, placed.index, values if placed.scale is None else values * placed.scale)
            else:
                shifted = values if placed.shift is None else values - placed.shift
                numbers[placed.index] = shifted if placed.scale is None else shifted / placed.scale
            seen[placed.index] = True
        partial = {key for path, keys in self.keys_of.items() if path not in present for key in keys}
        found = {}
        for key, span in self.numbering.items():
            if key in partial or key in self.computing or not seen[span].all() or span.start == span.stop:
                continue
            array = as_numpy(self.values[key])
            width = np.result_type(*{flat(given[p]).dtype for p in present if key in self.keys_of[p]})
            part = np.ascontiguousarray(numbers[span].astype(width))
            found[key] = part.view(of_width(array.dtype, width)).reshape(array.shape)
        return found

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        present = set(flat_arrays(state))
        return {path for path in present if all(matches(key, frozen) for key in self.keys_of.get(path, ()))}

    def module(self, path: str) -> str | None:
        inside = [p for p, keys in self.sources().items() if any(k.startswith(f"{path}.") for k in keys)]
        if not path:
            return ""
        common = []
        for words in zip(*(p[:-1] for p in inside), strict=False):
            if len(set(words)) > 1:
                break
            common.append(words[0])
        beside = [p for p in self.arrays if p[: len(common)] == tuple(common) and p not in inside]
        return dotted(common) if common and not beside else None

    def sources(self) -> dict[Path, list[str]]:
        """The tensors of each array."""
        return self.keys_of | self.computed

    def carries(self, key: str) -> bool:
        used = {k for keys in self.keys_of.values() for k in keys}
        return key in used and key not in self.computing and key not in self.scaled and key not in self.shifted


def converter_of(names: Any, keys: Sequence[str]) -> Converter | None:
    """The argument `names` if it is a converter; None if it is a function from a name to names.

    A converter takes the whole state_dict, so that it raises for a name, or returns what is no name.
    """
    if not callable(names) or isinstance(names, Mapping):
        return None
    try:
        renamed = names(keys[0] if keys else "weight")
    except Exception:
        return names
    listing = isinstance(renamed, list | tuple) and all(isinstance(name, str) for name in renamed)
    return None if renamed is None or isinstance(renamed, str) or listing else names


def numbering(values: Mapping[str, Any], first: Mapping[str, str]) -> tuple[dict[str, slice], int]:
    """Consecutive numbers for the real and imaginary parts of all inexact tensors; tied ones share them."""
    spans: dict[str, slice] = {}
    total = 0
    for key, value in values.items():
        if kind(as_numpy(value).dtype) == "integer" or not as_numpy(value).size:
            continue
        tied = spans.get(first.get(key, key))
        if tied is not None:
            spans[key] = tied
            continue
        spans[key] = slice(total, total + span_of(value))
        total += span_of(value)
    return spans, total


def flat(value: Any) -> np.ndarray:
    """All real and imaginary parts of a tensor in one axis."""
    array = np.ascontiguousarray(as_numpy(value)).reshape(-1)
    return array.view(array.real.dtype)


def span_of(value: Any) -> int:
    """The number of real and imaginary parts of a tensor."""
    array = as_numpy(value)
    return array.size * (2 if kind(array.dtype) == "complex" else 1)


def reals(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Floating and complex arrays as real ones of one axis, in float64."""
    return {name: flat(a).astype(np.float64) for name, a in arrays.items() if kind(a.dtype) != "integer"}


def normal(path: Sequence[Any]) -> str:
    """A path as a name; Linen's own names may contain slashes."""
    return dotted(path).replace("/", ".")


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Arrays of nested or flat dicts, lists, NNX states and modules, by path."""
    if isinstance(tree, nnx.Module | nnx.State):
        yield from flat_arrays(tree).items()
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from leaves(child, (*path, *(key if isinstance(key, tuple) else (key,))))
    elif isinstance(tree, list | tuple):
        for i, child in enumerate(tree):
            yield from leaves(child, (*path, i))
    elif tree is not None:
        yield path, tree.get_value() if isinstance(tree, nnx.Variable) else tree
