"""Layers whose arrays are packed differently: fused projections, `nn.MultiheadAttention`, recurrent cells."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from parity.compare.suggest.similarity import tokens
from parity.compare.suggest.tree import Node, Words
from parity.compare.weights.owners import WORDS as FLAX_WORDS
from parity.compare.weights.packed import GATES
from parity.compare.weights.roles import classes, flax_role, layouts_of, split_axes, tiers, torch_role

PARAMETRIZED = {"original": "{}", "original0": "{}_g", "original1": "{}_v"}  # as the older weight_norm names them
Pool = Sequence[tuple[Node, Words]]
Group = tuple[list[Node], list[Node], list[list[Node]]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A PyTorch tensor and the Flax arrays that it becomes."""

    key: str
    targets: tuple[str, ...]


def fits(array: Node, other: Node, parts: int = 1) -> float:
    """How well a tensor, or one of equal parts of its output features, fits a Flax array: 1 by the rules of its layer.

    0 if it does not; 0.5 if it fits only in a less usual order of its axes.
    """
    shape, target = array.shape or (), other.shape or ()
    torch, flax = torch_role(array.module, array.path, shape), flax_role(other.module, other.word)
    if parts > 1:
        axis = split_axes(torch, flax, len(shape))[0] if shape else 0
        if not shape or shape[axis] % parts:
            return 0.0
        shape = (*shape[:axis], shape[axis] // parts, *shape[axis + 1 :])
    options = layouts_of(torch, flax, shape, target)
    usual = [text.strip() for text in next(tiers(torch, flax, shape, target))]
    return 0.0 if not options else 1.0 if options[0].text in usual else 0.5


def by_name(array: Node, owner: Node) -> Node | None:
    """The array of a Flax layer that has the name of a PyTorch tensor."""
    return next((n for n in owner.children if n.shape is not None and same_array(array, n)), None)


def same_array(array: Node, other: Node) -> bool:
    """True if Flax's layers call a PyTorch layer's tensor so."""
    return other.word in (array.word, *FLAX_WORDS.get(array.word, ()))


def virtual(node: Node) -> Node:
    """`nn.MultiheadAttention` with its packed projections as a layer, a parametrized layer with its own arrays."""
    parametrized = next((child for child in node.children if child.word == "parametrizations"), None)
    if parametrized is not None:
        own = [
            dataclasses.replace(a, word=PARAMETRIZED.get(a.word, "{}_" + a.word).format(part.word))
            for part in parametrized.children
            for a in part.arrays
        ]
        return dataclasses.replace(node, children=(*own, *(c for c in node.children if c is not parametrized)))
    if type(node.module).__name__ != "MultiheadAttention":
        return node
    packed = [child for child in node.children if child.word in ("in_proj_weight", "in_proj_bias")]
    if not packed:
        return node
    arrays = tuple(dataclasses.replace(a, word=a.word.rpartition("_")[2]) for a in packed)
    layer = Node("in_proj", f"{node.path}.in_proj".lstrip("."), arrays, None, node.module)
    return dataclasses.replace(node, children=(layer, *(c for c in node.children if c not in packed)))


def plain(node: Node) -> bool:
    """True for a layer: a module that owns arrays and no modules."""
    return node.shape is None and not node.container


def siblings(pool: Pool, sizes: Sequence[int]) -> Iterator[list[Node]]:
    """Groups of equal layers in one container."""
    groups: dict[Any, list[Node]] = {}
    for node, words in pool:
        if plain(node):
            arrays = tuple(sorted((a.word, a.shape or ()) for a in node.arrays))
            groups.setdefault((words[:-1], node.path.rpartition(".")[0], arrays), []).append(node)
    yield from (group for group in groups.values() if len(group) in sizes)


def in_order(group: list[Node]) -> list[Node]:
    """Query, key and value in this order; others as they stand."""
    roles = ("query", "key", "value")
    return sorted(group, key=lambda n: roles.index(t) if (t := tokens((n.word,))[-1]) in roles else len(roles))


def fused(left: Pool, free: Pool) -> Iterator[Group]:
    """PyTorch layers that hold two or three Flax layers: (the layer, the Flax layers, their possible orders)."""
    for node, words in left:
        if not plain(node):
            continue
        for group in siblings(free, (2, 3)):
            if numbers(words) != numbers(words_of(free, group[0])) or not holds(node, group[0], len(group)):
                continue
            first = in_order(group)
            known = type(node.module).__name__ == "MultiheadAttention"
            known = known and [tokens((n.word,))[-1] for n in first] == ["query", "key", "value"]
            orders = (
                [first] if known else [first, *(list(o) for o in itertools.permutations(first) if list(o) != first)]
            )
            yield [node], group, orders


def joined(left: Pool, free: Pool) -> Iterator[Group]:
    """Two or three PyTorch layers that one Flax layer holds; Flax's features are in PyTorch's order."""
    for node, words in free:
        if not plain(node):
            continue
        for group in siblings(left, (2, 3)):
            if numbers(words) != numbers(words_of(left, group[0])):
                continue
            arrays = [(a, by_name(a, node)) for a in group[0].arrays]
            if len(arrays) == len(node.arrays) and all(
                b is not None and holds_part(a, b, len(group)) for a, b in arrays
            ):
                yield group, [node], [[node], [node]]  # two orders: PyTorch's order may not be Flax's


def words_of(pool: Pool, node: Node) -> Words:
    """The words of a node in a pool."""
    return next(words for other, words in pool if other is node)


def numbers(words: Words) -> list[str]:
    """The numbers in a path without its last word."""
    return [word for word in tokens(words[:-1]) if word.isdigit()]


def holds(node: Node, part: Node, parts: int) -> bool:
    """True if each array of a PyTorch layer is the given number of arrays of a Flax layer."""
    found = [(a, by_name(a, part)) for a in node.arrays]
    return len(found) == len(part.arrays) and all(b is not None and fits(a, b, parts) > 0 for a, b in found)


def holds_part(array: Node, other: Node, parts: int) -> bool:
    """True if a PyTorch tensor is one of equal parts of a Flax array's last axis."""
    shape = other.shape or ()
    if not shape or shape[-1] % parts:
        return False
    return fits(array, dataclasses.replace(other, shape=(*shape[:-1], shape[-1] // parts))) == 1


def recurrent(a: Node, others: Sequence[Node]) -> list[Pair]:
    """The pairs of an `nn.LSTM`, `nn.GRU` or `nn.RNN`, or a cell of them, and the Flax cells of its layers in order.

    A tensor is named by its cell, which `weights.packed` takes apart. Empty for other modules, and if the others are
    not as many cells of that kind.
    """
    kind = recurrent_kind(a)
    if kind is None:
        return []
    layers = [child.word.removeprefix("weight_ih") for child in a.children if child.word.startswith("weight_ih")]
    cells = [node for other in others for node in other.walk() if is_cell(node, GATES[kind])]
    if len(cells) != len(layers) or sum(len(c.arrays) for c in cells) != sum(len(other.arrays) for other in others):
        return []
    pairs = []
    for layer, cell in zip(layers, cells, strict=True):
        for node in a.children:
            if re.fullmatch(rf"(weight|bias)_[ih]h{layer}", node.word):
                name = f"{cell.path}.{node.word}".lstrip(".") if len(layers) == 1 else cell.path
                pairs.append(Pair(node.path, (name,)))
    return pairs


def recurrent_kind(node: Node) -> str | None:
    """LSTM, GRU or RNN for such a layer or cell of PyTorch, else None."""
    if node.shape is not None:
        return None
    return next((name for name in GATES if classes(node.module) & {name, f"{name}Cell"}), None)


def cells_of(node: Node, others: Sequence[Node]) -> list[Node]:
    """Flax parts that consist of cells of a PyTorch layer's kind."""
    kind = recurrent_kind(node)
    if kind is None:
        return []
    found = []
    for other in others:
        cells = [part for part in other.walk() if is_cell(part, GATES[kind])]
        if cells and sum(len(cell.arrays) for cell in cells) == len(other.arrays):
            found.append(other)
    return found


def is_cell(node: Node, gates: str) -> bool:
    """True if the parts of a Flax module are those of a recurrent cell."""
    words = {child.word.rstrip("_") for child in node.children}
    separate = {side + gate for side in "ih" for gate in gates or [""]}
    return node.shape is None and words in (separate, {"dense_i", "dense_h"})
