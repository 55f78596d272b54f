"""Both models as trees of named nodes: modules, and the arrays that they own."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from jaxmodels.weights.names import Path, flat_arrays
from parity.compare.weights import DROPPED, aliases
from parity.compare.weights.owners import owner_of

Words = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A module or an array of a model.

    word: its name in its parent. path: the whole name. children: parts in the order of definition. shape: of an array,
    None for a module. module: the module itself or the array's owner. optional: needs no counterpart, as a buffer, a
    frozen parameter or another name of a tied one. ordinal: its place among the parts of its kind in an ordered
    container, if it is in one.
    family: the numbers with which parts of its name, as norm1 and norm2, end.
    """

    word: str
    path: str
    children: tuple["Node", ...] = ()
    shape: tuple[int, ...] | None = None
    module: Any = None
    optional: bool = False
    ordinal: int | None = None
    family: frozenset[str] = frozenset()

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for nodes that match alike: all of the above except the path."""
        children = tuple(child.key for child in self.children)
        kind = type(self.module).__name__
        return self.word, self.shape, kind, self.optional, self.ordinal, self.family, children

    @functools.cached_property
    def arrays(self) -> tuple["Node", ...]:
        """All arrays of this part."""
        return (self,) if self.shape is not None else tuple(a for child in self.children for a in child.arrays)

    @functools.cached_property
    def required(self) -> int:
        """Elements of the arrays that need a counterpart."""
        return sum(math.prod(a.shape or ()) for a in self.arrays if not a.optional)

    @functools.cached_property
    def elements(self) -> int:
        """Elements of all arrays."""
        return sum(math.prod(a.shape or ()) for a in self.arrays)

    @property
    def container(self) -> bool:
        """True for a module with sub-modules."""
        return any(child.shape is None for child in self.children)

    def walk(self) -> Iterator["Node"]:
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()


def torch_tree(module: Any) -> Node:
    """The tree of a PyTorch module; BatchNorm's counts of batches are left out."""
    first = aliases(module)
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    shapes: dict[Path, tuple[int, ...]] = {}
    for key, tensor in module.state_dict().items():
        if not key.endswith(DROPPED):
            shapes[tuple(key.split("."))] = tuple(tensor.shape)
    optional = {p for p in shapes if (key := ".".join(map(str, p))) not in trained or first.get(key, key) != key}
    owners = dict(module.named_modules(remove_duplicate=False))
    ordered = {path for path, owner in owners.items() if type(owner).__name__ in ("ModuleList", "Sequential")}

    def owner_of_tensor(path: Path) -> Any:
        return owners.get(".".join(map(str, path[:-1])).partition("parametrizations")[0].rstrip("."))

    return tree(shapes, owner_of_tensor, optional, ordered, {})


def flax_tree(module: nnx.Module, order: Mapping[str, int]) -> Node:
    """The tree of a Flax module; order: the place of each path, see `definition_order`."""
    shapes = {path: tuple(array.shape) for path, array in flat_arrays(module).items()}
    ordered = {path for path, node in submodules(module) if is_list(node)}
    return tree(shapes, functools.partial(owner_of, module), set(), ordered, order)


def tree(
    shapes: Mapping[Path, tuple[int, ...]],
    owner: Callable[[Path], Any],
    optional: set[Path],
    ordered: set[str],
    order: Mapping[str, int],
) -> Node:
    """A tree from the shapes of arrays by path; the other arguments are by path, too.

    owner: the module that holds an array.
    """

    def built(path: Path, parts: list[Path], ordinal: int | None) -> Node:
        name = ".".join(map(str, path))
        word = str(path[-1]) if path else ""
        if parts == [path]:
            return Node(word, name, (), shapes[path], owner(path), path in optional)
        groups: dict[str | int, list[Path]] = {}
        for part in parts:
            groups.setdefault(part[len(path)], []).append(part)
        places = sorted(groups, key=lambda w: order.get(".".join(map(str, (*path, w))), len(order)))
        children: list[Node] = []
        families: dict[str, set[str]] = {}
        for below in groups:
            stem, number = numbered(str(below))
            families.setdefault(stem, set()).add(number)
        counts: dict[frozenset[Any], int] = {}
        for below in places:
            kind = frozenset(tuple(map(str, part[len(path) + 1 :])) for part in groups[below])
            ordinal_of = None
            if in_sequence(str(below), name in ordered, groups[below] == [(*path, below)]):
                ordinal_of = counts[kind] = counts.get(kind, -1) + 1
            child = built((*path, below), groups[below], ordinal_of)
            children.append(dataclasses.replace(child, family=frozenset(families[numbered(child.word)[0]])))
        return Node(word, name, tuple(children), None, owner((*path, "")), False, ordinal)

    return built((), list(shapes), None)


def in_sequence(word: str, in_list: bool, array: bool) -> bool:
    """True if a part's number says its place: an element of a list, or named by Linen, as Dense_1."""
    return not array and ((in_list and word.isdigit()) or named_by_linen(word))


def named_by_linen(word: str) -> bool:
    """True for a name that Linen gives, as Dense_1."""
    return re.fullmatch(r"[A-Z]\w*_\d+", word) is not None


def numbered(word: str) -> tuple[str, str]:
    """A word without the number at its end, and the number: ('norm', '1')."""
    stem = word.rstrip("0123456789")
    return stem, word[len(stem) :]


def submodules(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The path of every module, list and dict inside an NNX module, in the order in which attributes were set."""

    def walk(path: tuple[str, ...], node: Any) -> Iterator[tuple[str, Any]]:
        yield ".".join(path), node
        children = node.items() if isinstance(node, dict) else enumerate(node) if is_list(node) else vars(node).items()
        for name, child in children:
            if isinstance(child, nnx.Module | dict) or is_list(child):
                yield from walk((*path, str(name)), child)
            elif isinstance(child, nnx.Variable):
                yield ".".join((*path, str(name))), child

    return walk((), module)


def is_list(node: Any) -> bool:
    """True for a list of modules."""
    return isinstance(node, list | tuple | nnx.List)


def unstacked(node: Node, layers: int) -> Node | None:
    """A part whose arrays all have a leading layer axis as a list of layers; None if it is none."""
    if node.shape is not None or not node.arrays or any(child.word.isdigit() for child in node.children):
        return None
    if any(len(a.shape or ()) < 1 or (a.shape or (0,))[0] != layers for a in node.arrays):
        return None

    def layer(part: Node, i: int) -> Node:
        shape = None if part.shape is None else part.shape[1:]
        path = f"{node.path}.{i}{part.path[len(node.path) :]}" if node.path else f"{i}.{part.path}".rstrip(".")
        return dataclasses.replace(part, path=path, shape=shape, children=tuple(layer(c, i) for c in part.children))

    children = tuple(dataclasses.replace(layer(node, i), word=str(i), ordinal=i) for i in range(layers))
    return dataclasses.replace(node, children=children)
