"""Match the trees of two models: shapes decide what may be paired; names, inner parts and order choose among it.

A part is paired with a part only if their arrays fit, and its parts are then paired among themselves, so that layers of
equal structure are matched alike. Parts of a container that has no counterpart are compared with what is left outside.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from parity.compare.suggest.layers import Pair, cells_of, fits, fused, joined, recurrent, same_array, virtual
from parity.compare.suggest.similarity import BIAS, exchanged, meaningful, same_end, similarity, tokens
from parity.compare.suggest.tree import Node, Words, named_by_linen, numbered, unstacked

IMPOSSIBLE = -1e6
MARGIN = 0.1  # an exchange of two parts that lowers the score by less is ambiguous
PARTIAL = 0.5  # parts of the same name of which more than this share of elements fits are paired


@dataclasses.dataclass(frozen=True)
class Item:
    """A part in a pool of parts, and its path from the pool's container."""

    node: Node
    words: Words

    def parts(self) -> list["Item"]:
        """The parts inside."""
        return [Item(child, (*self.words, child.word)) for child in self.node.children]


@dataclasses.dataclass
class Doubt:
    """Parts that could be exchanged: PyTorch's, and the Flax parts (or orders of them) that fit all of these.

    chosen: the places in `options` of what was taken, one of each of `parts`.
    """

    parts: list[str]
    options: list[Any]
    chosen: list[int]


@dataclasses.dataclass
class Match:
    """The pairs of two parts: arrays, containers, what is left over, and what could be otherwise."""

    pairs: list[Pair] = dataclasses.field(default_factory=list)
    containers: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    left: list[Item] = dataclasses.field(default_factory=list)
    free: list[Item] = dataclasses.field(default_factory=list)
    doubts: list[Doubt] = dataclasses.field(default_factory=list)
    alike: list[float] = dataclasses.field(default_factory=list)

    def add(self, other: "Match") -> None:
        """Add the pairs of a part."""
        self.pairs += other.pairs
        self.containers += other.containers
        self.doubts += other.doubts
        self.alike += other.alike


@dataclasses.dataclass(frozen=True)
class Grade:
    """How well two parts fit: the share of elements that are paired (1: everything), and how alike the names are."""

    share: float
    alike: float


class Matcher:
    """Matches two trees; forced: Flax's paths (or lists of them) of PyTorch's parts that are decided."""

    def __init__(self, torch: Node, flax: Node, forced: Mapping[str, Any] | None = None):
        self.torch, self.flax, self.forced = torch, flax, forced or {}
        self.taken = {path for path in self.forced.values() if isinstance(path, str)}
        self.grades: dict[Any, Grade] = {}
        self.cross = all(any("cross" in tokens((n.word,)) for n in root.walk()) for root in (torch, flax))

    def run(self) -> Match:
        """The match of the whole models."""
        match = self.matched(self.torch, self.flax)
        match.containers.insert(0, (self.torch.path, self.flax.path))
        return match

    def matched(self, a: Node, b: Node) -> Match:
        """The match of two parts."""
        if a.shape is not None or b.shape is not None:
            return self.array_match(a, b)
        if pairs := recurrent(a, [b]):
            return Match(pairs=pairs, alike=[1.0])
        layers = layer_count(a)
        if layers > 1 and (stack := unstacked(b, layers)) is not None:
            b = stack
        return self.aligned(Item(virtual(a), ()).parts(), Item(b, ()).parts())

    def array_match(self, a: Node, b: Node) -> Match:
        """The match of two arrays, or of an array and a module that owns only one."""
        ours = [n for n in a.arrays if not n.optional or a.optional or a.shape is not None]
        theirs = b.arrays
        if len(ours) == len(theirs) == 1 and (fit := fits(ours[0], theirs[0])):
            pair = Pair(ours[0].path, (theirs[0].path,))
            left = [Item(n, (n.word,)) for n in a.arrays if n is not ours[0]]
            return Match([pair], left=left, alike=[4 * fit - 3])  # -1 for a matrix that fits only transposed
        return Match(left=[Item(a, ())], free=[Item(b, ())])

    def grade(self, a: Node, b: Node) -> Grade:
        """The grade of a pair, remembered for all parts of the same structure."""
        key = a.key, b.key
        if key not in self.grades:
            self.grades[key] = self.graded(a, b)
        return self.grades[key]

    def graded(self, a: Node, b: Node) -> Grade:
        required, elements = a.required or a.elements, b.elements
        smaller, larger = min(a.elements, elements), max(required, elements)
        if not larger or smaller / larger <= PARTIAL:
            return Grade(0.0, 0.0)
        match = self.matched(a, b)
        missing = sum(item.node.required for item in match.left) if a.required else 0
        missing = max(missing, sum(item.node.elements for item in match.free))
        if not match.pairs:
            return Grade(0.0, 0.0)
        return Grade(max(0.0, 1 - missing / larger), sum(match.alike) / max(1, len(match.alike)))

    def aligned(self, left: list[Item], free: list[Item]) -> Match:
        """Pair the items of two pools; containers without a counterpart are replaced by their parts."""
        match, loose = Match(), False
        left, free = stacked_cells(match, left, free)
        while True:
            pool = Pool(self, left, free)
            left, free, found = pool.named(match)
            if found:
                continue
            larger = pool.larger()
            if larger:
                left, free = expanded(left, larger), expanded(free, larger)
                continue
            left, free, found = pool.unnamed(match, loose)
            if found:
                continue
            larger = [item for item in (*left, *free) if item.node.container]
            if larger:
                left, free = expanded(left, larger), expanded(free, larger)
                continue
            left, free, found = self.packed(match, left, free)
            if found:
                continue
            owners = [item for item in (*left, *free) if item.node.shape is None]
            if not owners:
                break
            left, free, loose = expanded(left, owners), expanded(free, owners), True
        match.left += left
        match.free += free
        return match

    def packed(self, match: Match, left: list[Item], free: list[Item]) -> tuple[list[Item], list[Item], bool]:
        """Pair one layer with the two or three that hold its parts, on either side."""
        for find in (fused, joined):
            for ours, theirs, orders in find([(i.node, i.words) for i in left], [(i.node, i.words) for i in free]):
                chosen = self.forced.get(ours[0].path) if find is fused else None
                order = next((o for o in orders if [n.path for n in o] == chosen), orders[0])
                match.pairs += pack(ours, order, find is fused)
                match.alike += [1.0] * len(ours)
                if len(orders) > 1 and chosen is None:
                    options = [[n.path for n in o] for o in orders]
                    match.doubts.append(Doubt([ours[0].path], options, [0]))
                used = {id(n) for n in (*ours, *theirs)}
                return (
                    [i for i in left if id(i.node) not in used],
                    [i for i in free if id(i.node) not in used],
                    True,
                )
        return left, free, False


def stacked_cells(match: Match, left: list[Item], free: list[Item]) -> tuple[list[Item], list[Item]]:
    """Pair a recurrent layer of several levels or directions with as many Flax parts; returns what remains."""
    for item in left:
        cells = cells_of(item.node, [other.node for other in free])
        if len(cells) > 1 and (pairs := recurrent(item.node, cells)):
            match.pairs += pairs
            match.alike.append(1.0)
            used = {id(node) for node in (item.node, *cells)}
            left = [other for other in left if id(other.node) not in used]
            free = [other for other in free if id(other.node) not in used]
    return left, free


def pack(ours: Sequence[Node], theirs: Sequence[Node], split: bool) -> list[Pair]:
    """The pairs of a layer's arrays with those of its parts."""
    pairs = []
    for mine in ours:
        for array in mine.arrays:
            targets = tuple(t.path for part in theirs for t in part.arrays if fits_name(array, t))
            pairs.append(Pair(array.path, targets))
    return pairs


def fits_name(array: Node, other: Node) -> bool:
    """True if two arrays are both biases, or both not."""
    return bias(array) == bias(other)


def bias(node: Node) -> bool:
    """True if a name is that of a bias."""
    return node.word in BIAS or node.word.endswith("bias")


def starred(path: str) -> str:
    """A path with `*` for every number."""
    return ".".join("*" if word.isdigit() else word for word in path.split("."))


def layer_count(node: Node) -> int:
    """The number of layers if all parts are layers of one structure, else 0."""
    children = node.children
    alike = {(c.shape, tuple(n.key for n in c.children)) for c in children}
    return len(children) if len(alike) == 1 and all(c.word.isdigit() for c in children) else 0


def expanded(items: list[Item], which: Iterable[Item]) -> list[Item]:
    """The items, some of them replaced by their parts."""
    chosen = {id(item.node) for item in which}
    return [part for item in items for part in (item.parts() if id(item.node) in chosen else [item])]


def compared(a: Item, b: Item) -> tuple[Words, Words]:
    """The words of two items, without numbers that do not count alike.

    norm1 is not LayerNorm_1 if there are norm1 and norm2 on one side, LayerNorm_0 and LayerNorm_1 on the other.
    """
    one, other = a.node, b.node
    alike = one.family == other.family and named_by_linen(one.word) == named_by_linen(other.word)
    if alike or not (numbered(one.word)[1] and numbered(other.word)[1]):
        return a.words, b.words
    return unnumbered(a.words), unnumbered(b.words)


def same_rank(a: Node, b: Node) -> bool:
    """True if both are containers in numbered rows of equal length, at the same place, as layer1 and stages.0 are."""
    alike = a.container and b.container and len(a.family) == len(b.family) > 1
    if not alike or "" in a.family | b.family:
        return False
    rows = [sorted(map(int, node.family)) for node in (a, b)]
    if any(row[-1] - row[0] >= len(row) for row in rows):
        return False
    return rows[0].index(int(numbered(a.word)[1])) == rows[1].index(int(numbered(b.word)[1]))


def unnumbered(words: Words) -> Words:
    """A path without the number at its end."""
    stem = numbered(words[-1])[0].rstrip("_") if words else ""
    return (*words[:-1], stem) if stem else words[:-1]


class Pool:
    """Two lists of items and their possible pairs."""

    def __init__(self, matcher: Matcher, left: list[Item], free: list[Item]):
        self.matcher, self.left, self.free = matcher, left, free
        self.grades = {
            (i, j): g for i, a in enumerate(left) for j, b in enumerate(free) if (g := self.grade(a, b)).share
        }

    def grade(self, a: Item, b: Item) -> Grade:
        nothing = Grade(0.0, 0.0)
        one, other = a.node, b.node
        if exchanged(one.path, other.path, self.matcher.cross):
            return nothing
        single = one.shape is not None or other.shape is not None
        if single and len(one.arrays) == len(other.arrays) == 1 and not fits_name(one.arrays[0], other.arrays[0]):
            return nothing
        decided = self.matcher.forced.get(one.path)
        if isinstance(decided, str) and decided != other.path:
            return nothing
        if decided != other.path and other.path in self.matcher.taken:
            return nothing
        return self.matcher.grade(one, other)

    def same_name(self, i: int, j: int) -> bool:
        """True if the last words of two items mean the same."""
        a, b = self.left[i], self.free[j]
        arrays = a.node.shape is not None and b.node.shape is not None and a.words[:-1] == b.words[:-1]
        one, other = compared(a, b)
        return same_end(meaningful(one), meaningful(other)) or (arrays and same_array(a.node, b.node))

    def score(self, i: int, j: int) -> float:
        """The evidence that two items belong together, without their order."""
        a, b = self.left[i], self.free[j]
        ordinal = (a.node.ordinal is not None and a.node.ordinal == b.node.ordinal) or same_rank(a.node, b.node)
        optional = not a.node.required
        return similarity(*compared(a, b)) + 0.5 * self.grades[i, j].alike + 0.5 * ordinal - optional

    def named(self, match: Match) -> tuple[list[Item], list[Item], bool]:
        """Pair items of the same name: first those that fit wholly, then those that fit in most parts."""
        for least in (1.0, PARTIAL):
            pairs = {
                (i, j)
                for (i, j), grade in self.grades.items()
                if (grade.share >= 1 or (grade.share > least and self.left[i].node.shape is None))
                and self.same_name(i, j)
            }
            if pairs:
                return self.accept(match, pairs, least)
        return self.left, self.free, False

    def unnamed(self, match: Match, loose: bool) -> tuple[list[Item], list[Item], bool]:
        """Pair items that fit wholly, whatever their names; a doubt if they are arrays of layers that did not fit."""
        pairs = {
            (i, j) for (i, j), g in self.grades.items() if g.share >= 1 and not (loose and bias(self.left[i].node))
        }
        if not pairs:
            return self.left, self.free, False
        before = len(match.pairs)
        result = self.accept(match, pairs, 1.0)
        if loose:
            match.doubts += [Doubt([p.key], [p.targets[0]], [0]) for p in match.pairs[before:]]
        return result

    def accept(self, match: Match, pairs: set[tuple[int, int]], least: float) -> tuple[list[Item], list[Item], bool]:
        """Choose the best of the possible pairs, add them to the match, and return what remains."""
        n, m = len(self.left), len(self.free)
        scores = np.full((n, m), IMPOSSIBLE)
        for i, j in pairs:
            order = 1 - (i / max(1, n - 1) - j / max(1, m - 1)) ** 2
            scores[i, j] = self.score(i, j) + 0.01 * order
        rows, columns = linear_sum_assignment(scores, maximize=True)
        chosen = {int(i): int(j) for i, j in zip(rows, columns, strict=True) if scores[i, j] > IMPOSSIBLE}
        match.doubts += self.doubts(chosen, least)
        left = [item for i, item in enumerate(self.left) if i not in chosen]
        free = [item for j, item in enumerate(self.free) if j not in chosen.values()]
        for i, j in chosen.items():
            a, b = self.left[i], self.free[j]
            inner = self.matcher.matched(a.node, b.node)
            match.add(inner)
            match.alike.append(min(2.5, similarity(a.words, b.words)))
            if a.node.shape is None and b.node.shape is None:
                match.containers.append((a.node.path, b.node.path))
            left += [Item(item.node, (*a.words, *item.words)) for item in inner.left]
            free += [Item(item.node, (*b.words, *item.words)) for item in inner.free]
        return left, free, True

    def doubts(self, chosen: Mapping[int, int], least: float) -> list[Doubt]:
        """Groups of chosen pairs that could be exchanged among themselves, or with what is free."""
        links: dict[int, set[int]] = {i: {j} for i, j in chosen.items()}
        taken = {j: i for i, j in chosen.items()}
        possible = {pair for pair, grade in self.grades.items() if grade.share >= least}
        for i, j in chosen.items():
            for k in range(len(self.free)):
                if k == j or (i, k) not in possible:
                    continue
                loss = self.score(i, j) - self.score(i, k)
                other = taken.get(k)
                if other is not None:
                    if (other, j) not in possible:
                        continue
                    loss += self.score(other, k) - self.score(other, j)
                if loss < MARGIN:
                    links[i].add(k)
                    if other is not None:
                        links[other].add(j)
            for other in range(len(self.left)):
                unused = other not in chosen and (other, j) in possible and self.left[other].node.required
                if unused and self.score(i, j) - self.score(other, j) < MARGIN:
                    links.setdefault(-1 - other, set()).add(j)
        return [self.doubt(group, chosen) for group in groups(links)]

    def doubt(self, group: tuple[set[int], set[int]], chosen: Mapping[int, int]) -> Doubt:
        rows, columns = sorted(i for i in group[0] if i >= 0), sorted(group[1])
        options = [self.free[j].node.path for j in columns]
        return Doubt([self.left[i].node.path for i in rows], options, [columns.index(chosen[i]) for i in rows])

    def larger(self) -> list[Item]:
        """The largest containers among the items that fit nothing wholly."""
        fitting = {side: {p[side] for p, g in self.grades.items() if g.share >= 1} for side in (0, 1)}
        items = [
            item
            for side, pool in enumerate((self.left, self.free))
            for i, item in enumerate(pool)
            if i not in fitting[side] and item.node.container
        ]
        largest = max((len(item.node.arrays) for item in items), default=0)
        return [item for item in items if len(item.node.arrays) == largest]


def groups(links: Mapping[int, set[int]]) -> list[tuple[set[int], set[int]]]:
    """Connected groups of rows and columns in which a row has more than one column, or a column more than one row."""
    found: list[tuple[set[int], set[int]]] = []
    for row, columns in links.items():
        rows, wide = {row}, set(columns)
        rest = []
        for group in found:
            if group[1] & wide:
                rows |= group[0]
                wide |= group[1]
            else:
                rest.append(group)
        found = [*rest, (rows, wide)]
    return [group for group in found if len(group[0]) > 1 or len(group[1]) > 1]
