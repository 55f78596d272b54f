"""Layouts: where the axes of a PyTorch tensor lie in a Flax array, in einops notation.

    o i -> i o                      a Linear's weight as a kernel
    (h three d) i -> three h i d    a fused projection, head by head, as three arrays of heads
    (h d) i -> h i d | h=4          a size that the shapes do not determine
    o i ... -> ... i o              ... stands for any number of axes
    i o k -> ~k i o                 ~ reverses an axis
    1 1 e -> e                      axes of length 1

Each side lists the axes of its array; parentheses join axes, the last one varies fastest. Both sides have the same
names, each once: a layout moves numbers; it neither repeats nor drops any.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmodels.process.texts import quoted

LONGEST = 1_000  # characters of a layout
SHOWN = 300  # of them in an error
Shape = tuple[int, ...]
Group = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """A layout for arrays of known shapes: split the axes, permute and reverse them, join them."""

    torch: Shape
    split: Shape
    order: tuple[int, ...]
    reversed: tuple[int, ...]
    flax: Shape
    text: str = dataclasses.field(default="", compare=False)

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Rearrange a PyTorch tensor of shape `torch` to the Flax array of shape `flax`."""
        return np.flip(tensor.reshape(self.split).transpose(self.order), self.reversed).reshape(self.flax)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_flax`."""
        permuted = np.flip(array.reshape([self.split[axis] for axis in self.order]), self.reversed)
        return permuted.transpose(np.argsort(self.order)).reshape(self.torch)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parsed layout: groups of axis names on both sides, given sizes, and the axes to reverse."""

    text: str
    torch: tuple[Group, ...]
    flax: tuple[Group, ...]
    sizes: Mapping[str, int]
    reversed: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Parse a layout; raises ValueError if it is malformed or no permutation."""
        if len(text) > LONGEST:
            raise ValueError(f"{quoted(text)} has {len(text):,} characters; a layout has at most {LONGEST:,}")
        pattern, _, given = text.partition("|")
        left, arrow, right = pattern.partition("->")
        if not arrow:
            raise ValueError(f"{quoted(text, SHOWN)} must be two sides with -> between them, as in 'o i -> i o'")
        sizes = {}
        for part in given.replace(",", " ").split():
            name, _, size = part.partition("=")
            if not name.isidentifier() or not size.isdigit() or int(size) < 1:
                raise ValueError(f"{quoted(text, SHOWN)}: {quoted(part)} must be a size such as h=4")
            sizes[name] = int(size)
        torch, backwards = groups(left, text)
        flax, reverse = groups(right, text)
        names = [[name for group in side for name in group] for side in (torch, flax)]
        if backwards:
            raise ValueError(f"{quoted(text, SHOWN)}: ~ must be on the right side of ->")
        for side in names:
            twice = sorted({name for name in side if side.count(name) > 1})
            if twice:
                raise ValueError(f"{quoted(text, SHOWN)}: {', '.join(twice)} must be once on each side")
        alone = sorted(set(names[0]) ^ set(names[1]))
        unknown = sorted(set(sizes) - set(names[0]))
        if alone or unknown:
            raise ValueError(f"{quoted(text, SHOWN)}: {', '.join(alone or unknown)} must be on both sides of ->")
        return cls(text.strip(), torch, flax, sizes, frozenset(reverse))

    def fit(self, torch: Shape, flax: Sequence[int | None]) -> Axes:
        """The layout for these two shapes; None: a size that the tensor determines.

        Raises ValueError if an axis has two sizes, or one that the shapes and given sizes do not determine.
        """
        rest = [f"...{i}" for i in range(len(torch) - len(self.torch) + 1)]  # the axes that ... stands for
        sides = [expanded(side, rest) for side in (self.torch, self.flax)]
        for side, groups_of, shape in zip(("PyTorch", "Flax"), sides, (torch, flax), strict=True):
            if len(groups_of) != len(shape):
                raise ValueError(
                    f"{quoted(self.text, SHOWN)} has {len(groups_of)} axes for {side}, which has {shown(shape)}"
                )
        sizes = dict(self.sizes)
        equations = [*zip(sides[0], torch, strict=True), *zip(sides[1], flax, strict=True)]
        progress = True
        while progress:
            progress = False
            for group, size in equations:
                unknown = [name for name in group if name not in sizes]
                known = math.prod(sizes[name] for name in group if name in sizes)
                if size is None or len(unknown) > 1:
                    continue
                if size % max(known, 1) or (not unknown and known != size):
                    raise ValueError(
                        f"{quoted(self.text, SHOWN)}: PyTorch has {shown(torch)}, Flax has {shown(flax)}; "
                        f"({' '.join(group)}) is {known}{'' if not unknown else ' × ' + unknown[0]}, not {size}"
                    )
                if unknown:
                    sizes[unknown[0]], progress = size // known, True
        names = [name for group in sides[0] for name in group]
        unknown = [name for name in names if name not in sizes]
        if unknown:
            raise ValueError(
                f"{quoted(self.text, SHOWN)}: PyTorch has {shown(torch)}, Flax has {shown(flax)}, which leaves the "
                f"size of {', '.join(unknown)} open; give it: "
                f"{quoted(self.text.partition('|')[0].strip(), SHOWN)} + ' | {unknown[0]}=…'"
            )
        order = [name for group in sides[1] for name in group]
        return Axes(
            torch,
            tuple(sizes[name] for name in names),
            tuple(names.index(name) for name in order),
            tuple(i for i, name in enumerate(order) if name in self.reversed or name[:3] in self.reversed),
            tuple(math.prod(sizes[name] for name in group) for group in sides[1]),
            self.text,
        )


def groups(side: str, text: str) -> tuple[tuple[Group, ...], set[str]]:
    """One side of a layout: its groups of axis names, and the names after ~."""
    found: list[Group] = []
    reverse: set[str] = set()
    inside: list[str] | None = None
    for token in re.findall(r"[()]|~?[A-Za-z_]\w*|~?\.\.\.|\S+?(?=[\s()]|$)", side):
        name = token.removeprefix("~")
        if token == "(" and inside is None:
            inside = []
        elif token == ")" and inside is not None:
            found.append(tuple(inside))
            inside = None
        elif name == "1":
            found += [()] if inside is None else []
        elif name.isidentifier() or (name == "..." and inside is None):
            reverse |= {name} if token != name else set()
            if inside is None:
                found.append((name,))
            else:
                inside.append(name)
        else:
            raise ValueError(
                f"{quoted(text, SHOWN)}: {quoted(token)} must be the name of an axis, 1, ~, ... or parentheses around "
                "names"
            )
    if inside is not None:
        raise ValueError(f"{quoted(text, SHOWN)}: ( must be closed")
    return tuple(found), reverse


def expanded(side: Sequence[Group], rest: Sequence[str]) -> list[Group]:
    """Groups with ... replaced by axes."""
    return [part for group in side for part in ([(name,) for name in rest] if group == ("...",) else [group])]


def shown(shape: Sequence[int | None]) -> str:
    """A shape as text."""
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
