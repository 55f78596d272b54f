"""`Mapped`: `Weights` of models that give their parts different names, by `names` (see `parity.compare.names`).

Several Flax names for one tensor split it along its output features (a fused query, key and value); one Flax name for
several tensors joins them. A number in a name may be absent in Flax: that array holds all layers. The axes follow from
the layers on both sides (`roles`), packed layers are known (`packed`), and `layouts` gives what no rule knows.

    layouts     {pattern of a PyTorch name: layout}, see `layout`
    flax_only   patterns of Flax arrays without a counterpart: they keep their own values
    torch_only  patterns of PyTorch tensors without a counterpart: they are not carried

A buffer on one side may be a parameter on the other. Its gradient then exists on one side only, which is a difference
unless the parameter is named in `flax_only` or `torch_only`; the values are carried all the same.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.weights.names import ConversionError, Path, as_numpy, dotted, flat_arrays, with_arrays
from parity.compare.names import Names, matches, renamer
from parity.compare.weights.layout import Layout, shown
from parity.compare.weights.owners import kind, normed_words, owner_of, parameters, place
from parity.compare.weights.packed import adds, parts
from parity.compare.weights.piece import WHOLE, Index, Options, Piece, Target, Tensor, alike, fit, joined, layout_for
from parity.compare.weights.protocol import TorchModule, aliases, submodule
from parity.compare.weights.roles import classes, flax_role, torch_role
from parity.compare.weights.sided import OneSided, check_patterns, check_values, listed
from parity.compare.weights.squares import Fitted, Kinds, consistent
from parity.compare.weights.twins import evaluating

DROPPED = "num_batches_tracked"  # BatchNorm's count of averaged batches; evaluation does not read it
MASKED = 1e3  # a constant buffer of this magnitude is a mask's, not a weight


@dataclasses.dataclass(frozen=True)
class Choice:
    """Tensors, alike in all layers, that fit their arrays in several layouts. options: these, the usual one first."""

    name: str
    options: tuple[str, ...]
    chosen: int = 0

    def __str__(self) -> str:
        why = "the outputs decide" if self.chosen else "layouts= decides"
        return f"several layouts fit {self.name}: taken as '{self.options[self.chosen]}' ({why})"


class Mapped:
    """`Weights` by names. torch_module gives the kinds of layers and which weights are tied.

    chosen: by the name of a `Choice`, the index of the layout to take (default: 0). Raises ConversionError that lists
    all tensors without a place, arrays without a tensor, and shapes that differ; ValueError for a layout that is
    malformed or does not determine its sizes, and for a pattern that matches nothing.
    """

    def __init__(
        self,
        torch_module: TorchModule,
        flax_module: Any,
        names: Names,
        layouts: Mapping[str, str] | None = None,
        *,
        flax_only: Sequence[str] = (),
        torch_only: Sequence[str] = (),
        chosen: Mapping[str, int] | None = None,
    ):
        self.rename = renamer(names)
        self.names, self.layouts = names, layouts
        self.flax_only, self.torch_only, self.chosen = flax_only, torch_only, chosen or {}
        self.values = torch_module.state_dict()
        self.torch_module, self.flax_module = torch_module, flax_module
        self.arrays = flat_arrays(flax_module)
        self.shapes = {path: tuple(array.shape) for path, array in self.arrays.items()}
        self.lookup = {dotted(path): path for path in self.shapes}
        self.parsed = {pattern: parsed(pattern, layout) for pattern, layout in (layouts or {}).items()}
        self.first = aliases(torch_module)
        self.trained = parameters(flax_module)
        self.choices: dict[str, Choice] = {}
        self.problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": [], "of another kind": []}
        self.dropped: dict[str, list[str]] = {}  # tensors that are not carried, by the reason
        self.one_sided = OneSided(flax_only, torch_only)
        self.summed: set[str] = set()
        self.misfits: set[Path] = set()  # arrays whose tensors have other shapes
        check_patterns("torch_only", torch_only, self.values)
        check_patterns("flax_only", flax_only, self.lookup)
        targets: dict[str, list[Target]] = {}
        taken: set[Path] = set()
        for key in self.values:
            spots = self.targets(key)
            tied = self.first.get(key, key) != key  # the same tensor is converted under its first name
            if spots is not None and not (tied and any(spot.path in taken for spot in spots)):
                targets[key] = spots
                taken |= {spot.path for spot in spots}
        check_patterns("layouts", list(self.parsed), targets)
        self.pieces = self.fitted(targets)
        self.carried = {path for path, size in self.coverage().items() if size == math.prod(self.shapes[path])}
        self.kept = {path for path in self.shapes if matches(dotted(path), flax_only)} - self.carried
        self.batch_statistics = self.without_statistics()
        self.kept |= {path for path in self.shapes if path[:-1] in self.batch_statistics} - self.carried
        self.tables = self.without_counterpart()
        self.kept |= self.tables
        fed = {piece.path for piece in self.pieces}
        for path in self.shapes.keys() - self.carried - self.kept - self.misfits:
            which = "tensors for a part of it only" if path in fed else "no tensor"
            self.problems["missing"].append(f"{dotted(path)}: Flax has {shown(self.shapes[path])}, PyTorch has {which}")
        self.problems["missing"].sort()
        if any(self.problems.values()):
            raise ConversionError(self.problems)
        check_values({path: self.arrays[path] for path in self.kept if path[:-1] not in self.batch_statistics})

    def choosing(self, chosen: Mapping[str, int]) -> "Mapped":
        """The same weights with other layouts, by the names of their choices."""
        declared = {"flax_only": self.flax_only, "torch_only": self.torch_only}
        return Mapped(self.torch_module, self.flax_module, self.names, self.layouts, **declared, chosen=chosen)

    def targets(self, key: str) -> list[Target] | None:
        """The places of a tensor; None if it is not carried."""
        if key.endswith(DROPPED):
            return None
        renamed = self.rename(key)
        declared = matches(key, self.torch_only)
        if renamed is None:
            self.dropped.setdefault("names: None", []).append(key)
            return None
        found = self.found(key, renamed)
        spots = [spot for spot in found if spot is not None]
        fixed = all(spot.path not in self.trained for spot in spots)
        if declared and not (spots and fixed and self.is_parameter(key)):
            self.dropped.setdefault("torch_only", []).append(key)
            return None
        if len(spots) == len(found):
            return spots
        if self.first.get(key, key) == key:
            self.unplaced(key, renamed, [i for i, spot in enumerate(found) if spot is None], len(found))
        return None

    def found(self, key: str, renamed: Sequence[str]) -> list[Target | None]:
        """The places of a tensor's parts, by its names or by those of a packed layer's arrays."""
        owner = self.owner(key)
        spots = [place(self.lookup, name) for name in renamed]
        if "NonDynamicallyQuantizableLinear" in classes(owner):  # the read-out of nn.MultiheadAttention
            spots = [place(self.lookup, n) or place(self.lookup, n.replace("out_proj.", "out.")) for n in renamed]
        if None in spots and len(renamed) == 1:
            packed = parts(classes(owner), key, renamed[0], self.lookup) or []
            if packed:
                return [self.target(self.lookup[p.name], None, p.slot) if p.name else None for p in packed]
        return [None if spot is None else self.target(*spot) for spot in spots]

    def target(self, path: Path, layer: int | None, slot: tuple[int, int] | None = None) -> Target | None:
        """A place; None if the array is declared to have no counterpart."""
        declared = matches(dotted(path), self.flax_only)
        shape = self.shapes[path] if layer is None else self.shapes[path][1:]
        role = flax_role(owner_of(self.flax_module, path), str(path[-1]))
        where: Index = WHOLE
        if slot is not None:
            i, n = slot
            size = shape[-1] // n
            where = (*[slice(None)] * (len(shape) - 1), slice(i * size, (i + 1) * size))
            shape = (*shape[:-1], size)
        target = Target(path, role, shape, layer, where)
        return None if declared and path not in self.trained else target

    def owner(self, key: str) -> Any:
        """The PyTorch layer of a tensor; that of a parametrized weight is the layer itself."""
        path = key.rpartition(".")[0]
        try:
            return submodule(self.torch_module, path.partition("parametrizations")[0].rstrip("."))
        except KeyError:  # a recording has the direct owners only
            return submodule(self.torch_module, path)

    def is_parameter(self, key: str) -> bool:
        """True for a parameter, False for a buffer."""
        return key in self.first

    def unplaced(self, key: str, renamed: Sequence[str], without: Sequence[int], n: int) -> None:
        """Record a tensor without a place: tables and masks are not carried, weights are a problem."""
        value = as_numpy(self.values[key])
        if not self.is_parameter(key) and is_table(value):
            self.dropped.setdefault("buffer without a counterpart", []).append(key)
            return
        which = f"place for part {without[0] + 1} of {n}" if len(without) < n else " or ".join(renamed)
        self.problems["unexpected"].append(f"{key}: PyTorch has {shown(value.shape)}, Flax has no {which}")

    def fitted(self, targets: Mapping[str, list[Target]]) -> list[Piece]:
        """All pieces; what does not fit is recorded."""
        users: dict[Any, list[str]] = {}
        for key, spots in targets.items():
            for spot in spots:
                users.setdefault((spot.path, spot.layer), []).append(key)
        fitting: list[Fitted] = []
        done: set[str] = set()
        for key, spots in targets.items():
            sharing = list(dict.fromkeys(k for spot in spots for k in users[spot.path, spot.layer]))
            if key in done:
                continue
            tensors = {k: self.tensor(k) for k in sharing}
            try:
                if len(sharing) == 1 or all(adds(classes(self.owner(k)), k) for k in sharing):
                    self.summed |= set(sharing) if len(sharing) > 1 else set()
                    found = fit(tensors[key], spots)
                    done.add(key)
                else:
                    found = joined(list(tensors.values()), spots[0])
                    done |= set(sharing)
            except ValueError as error:
                if "layouts[" in str(error) and "layouts={" not in str(error):
                    raise
                self.problems["misshapen"].append(str(error))
                self.misfits |= {spot.path for spot in spots}
                done |= set(sharing)
                continue
            fitting += found
        kinds = [self.kinds(piece.key, piece.path) for piece, _ in fitting]
        pieces = [self.choose(piece, options) for piece, options in consistent(fitting, kinds)]
        for piece in pieces:
            self.check_kind(piece)
        return pieces

    def kinds(self, key: str, path: Path) -> Kinds | None:
        """The classes and roles of a tensor and its array; None if the user gives its layout."""
        tensor, ours = self.tensor(key), owner_of(self.flax_module, path)
        if tensor.layout is not None:
            return None
        return Kinds(type(self.owner(key)).__name__, tensor.role, type(ours).__name__, flax_role(ours, str(path[-1])))

    def tensor(self, key: str) -> Tensor:
        """A tensor with its role and the layout that is given for it."""
        shape = tuple(self.values[key].shape)
        pattern, layout = layout_for(key, self.parsed)
        return Tensor(key, shape, torch_role(self.owner(key), key, shape), layout, pattern)

    def choose(self, piece: Piece, options: Options) -> Piece:
        """The piece in the layout that is chosen for tensors of its name."""
        if len(options) == 1:
            return dataclasses.replace(piece, axes=options[0])
        words = {piece.key.rpartition(".")[2], *normed_words(piece.key)}
        alike_named = piece.path[-1] in words - {"kernel"}  # such arrays are the same on both sides
        unmoved = [axes for axes in options if axes.torch == axes.flax and axes.order == tuple(sorted(axes.order))]
        if alike_named and unmoved:
            return dataclasses.replace(piece, axes=unmoved[0])
        name = f"{alike(piece.key)} -> {alike(dotted(piece.path))}"
        index = min(self.chosen.get(name, 0), len(options) - 1)
        self.choices[name] = Choice(name, tuple(axes.text.partition("|")[0].strip() for axes in options), index)
        return dataclasses.replace(piece, axes=options[index])

    def check_kind(self, piece: Piece) -> None:
        """Record a tensor whose array has another kind of numbers, or is trained on one side only."""
        theirs, ours = as_numpy(self.values[piece.key]).dtype, self.arrays[piece.path].dtype
        if kind(theirs) != kind(ours):
            self.problems["of another kind"].append(
                f"{piece.key}: PyTorch has {theirs}, Flax has {ours} ({dotted(piece.path)})"
            )
        parameter, trained = self.is_parameter(piece.key), piece.path in self.trained
        if parameter == trained or kind(theirs) == "integer":
            return
        if not parameter or self.requires_grad(piece.key):
            self.one_sided.add(piece.key, piece.path, parameter=parameter)

    def requires_grad(self, key: str) -> bool:
        """True if PyTorch trains a parameter."""
        named = dict(self.torch_module.named_parameters(remove_duplicate=False))
        return key in named and named[key].requires_grad

    def coverage(self) -> Counter[Path]:
        """The number of elements of each array that have a tensor."""
        places = {(p.path, p.layer, str(p.slot)): math.prod(p.axes.flax) for p in self.pieces}
        counts: Counter[Path] = Counter()
        for (path, _, _), size in places.items():
            counts[path] += size
        return counts

    def without_counterpart(self) -> set[Path]:
        """Flax arrays that are tables, masks or counters, and not parameters."""
        left = self.shapes.keys() - self.carried - self.kept - self.misfits - self.trained
        fed = {piece.path for piece in self.pieces}
        known = {path for path in left - fed if not isinstance(self.arrays[path], jax.ShapeDtypeStruct)}
        return {path for path in known if is_table(np.asarray(self.arrays[path]))}

    def without_statistics(self) -> set[Path]:
        """Paths of Flax's BatchNorms whose PyTorch counterparts have no running statistics."""
        modules = getattr(self.torch_module, "named_modules", lambda: ())()
        found = set()
        for name, module in modules:
            if getattr(module, "track_running_stats", True) or getattr(module, "running_mean", None) is not None:
                continue
            for renamed in self.rename(f"{name}.running_mean".lstrip(".")) or []:
                spot = place(self.lookup, renamed)
                if spot is not None:
                    found.add(spot[0][:-1])
        return found

    @property
    def notes(self) -> list[str]:
        """Notes on what is not carried, not compared, or was decided by convention."""
        lines = [f"not carried ({reason}): {listed(keys)}" for reason, keys in self.dropped.items()]
        if self.tables:
            names = sorted(map(dotted, self.tables))
            lines.append(f"not carried (no parameter in Flax, without a counterpart): {listed(names)}")
        lines += self.one_sided.notes
        if self.summed:
            lines.append(f"added up in one array, not trained: {listed(sorted(self.summed))}")
        if self.batch_statistics:
            where = listed([dotted(path) for path in sorted(self.batch_statistics, key=dotted)])
            lines.append(f"no running statistics in PyTorch, use_running_average is left as it is: {where}")
        return lines + [str(choice) for choice in self.choices.values()]

    @property
    def uncompared(self) -> frozenset[str]:
        """Parameters without a gradient on the other side that were declared so."""
        return self.one_sided.accepted | {k for keys in self.dropped.values() for k in keys if self.is_parameter(k)}

    @property
    def untrained(self) -> frozenset[str]:
        """Biases that add up in one array, whose step is half of the sum's, and parameters of one side alone."""
        one_sided = {key for keys in self.one_sided.found.values() for key in keys}
        return frozenset(self.summed) | one_sided

    def load(self, model: Any, state_dict: Mapping[str, Any]) -> Any:
        leaves: dict[Path, Any] = {}
        by_path: dict[Path, list[Piece]] = {}
        for piece in self.pieces:
            by_path.setdefault(piece.path, []).append(piece)
        widest: list[Any] = []
        for path, pieces in by_path.items():
            blocks = [piece.to_flax(as_numpy(state_dict[piece.key])) for piece in pieces]
            filled = np.zeros(self.shapes[path], np.result_type(*{block.dtype for block in blocks}))
            for piece, block in zip(pieces, blocks, strict=True):
                place_of = piece.of(filled)
                place_of[...] = place_of + block if piece.key in self.summed else block
            leaves[path] = jnp.array(filled, copy=True)
            widest += [leaves[path].dtype] if kind(filled.dtype) == "floating" else []
        for path in self.kept:
            array: Any = self.arrays[path]
            if isinstance(array, jax.ShapeDtypeStruct):  # statistics that are not used
                array = (jnp.ones if path[-1] == "var" else jnp.zeros)(array.shape, array.dtype)
            leaves[path] = jnp.asarray(array)  # in its own dtype: what it has rounded stays visible
        loaded = evaluating(with_arrays(model, leaves))
        for path in self.batch_statistics:
            ours, theirs = owner_of(loaded, (*path, "mean")), owner_of(self.flax_module, (*path, "mean"))
            if hasattr(theirs, "use_running_average") and type(theirs) is type(ours):
                ours.use_running_average = theirs.use_running_average
        return loaded

    def read(self, state: Any, prefix: Path = (), *, gradients: bool = False) -> dict[str, np.ndarray]:
        arrays = {(*prefix, *path): np.asarray(array) for path, array in flat_arrays(state).items()}
        found = {}
        for key, pieces in self.by_key().items():
            if any(p.path not in arrays or arrays[p.path].shape != self.shapes[p.path] for p in pieces):
                continue
            dtype = np.result_type(*{arrays[piece.path].dtype for piece in pieces})
            view = pieces[0].view
            tensor = np.empty(tuple(self.values[key].shape) if view is None else view.flax, dtype)
            for piece in pieces:
                piece.put(tensor, arrays[piece.path])
            found[key] = np.array(tensor if view is None else view.to_torch(tensor), order="C")
        return found

    def by_key(self) -> dict[str, list[Piece]]:
        """Pieces by tensor."""
        groups: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            groups.setdefault(piece.key, []).append(piece)
        return groups

    def held(self, state: Any, frozen: Sequence[str]) -> set[Path]:
        present = set(flat_arrays(state))
        return present - {piece.path for piece in self.pieces if not matches(piece.key, frozen)}

    def module(self, path: str) -> str | None:
        renamed = self.rename(path)
        return renamed[0] if renamed is not None and len(renamed) == 1 else None

    def carries(self, key: str) -> bool:
        return key not in self.summed and any(piece.key == key for piece in self.pieces)


def is_table(value: np.ndarray) -> bool:
    """True for integers, booleans, and floats that are neither an initial constant nor without values: no weights."""
    if value.size == 0 or kind(value.dtype) == "integer":
        return True
    return bool((value != value.flat[0]).any() or abs(value.flat[0]) >= MASKED)


def parsed(pattern: str, layout: Any) -> Layout:
    """A user's layout; raises ValueError that names its pattern."""
    if not isinstance(layout, str):
        raise ValueError(f"layouts[{pattern!r}]={layout!r} must be a layout such as 'o i -> i o'")
    try:
        return Layout.parse(layout)
    except ValueError as error:
        raise ValueError(f"layouts[{pattern!r}]={error}") from None
