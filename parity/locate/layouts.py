"""Layouts: how an array of a Flax sub-module corresponds to PyTorch's array.

An array has the same axes, or its channels last, or some of its axes in another order, or axes joined or split such as
separate heads. Several layouts may fit two shapes, for instance of an image with as many channels as rows: the one in
which the arrays differ least is taken, because a wrong one does not agree by chance.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

MOST_AXES = 5  # permutations of more axes are not tried


@dataclasses.dataclass(frozen=True)
class Layout:
    """PyTorch's array, transposed by `axes` and reshaped, is Flax's array."""

    axes: tuple[int, ...]
    theirs: tuple[int, ...]  # the shape in PyTorch
    ours: tuple[int, ...]  # the shape in Flax

    def there(self, array: np.ndarray) -> np.ndarray:
        """PyTorch's array as Flax has it."""
        return array.transpose(self.axes).reshape(self.ours)

    def back(self, array: np.ndarray) -> np.ndarray:
        """Flax's array as PyTorch has it."""
        transposed = array.reshape([self.theirs[axis] for axis in self.axes])
        return transposed.transpose(np.argsort(self.axes))


def layouts(ours: Sequence[int], theirs: Sequence[int]) -> list[Layout]:
    """The layouts that fit the shape in Flax and the shape in PyTorch, the most likely first."""
    ours, theirs = tuple(ours), tuple(theirs)
    if math.prod(ours) != math.prod(theirs):
        return []
    n = len(theirs)
    same = tuple(range(n))
    known = [same, (0, *range(2, n), 1)] if n > 2 else [same]
    found = [axes for axes in known if tuple(theirs[axis] for axis in axes) == ours]
    if not found and len(ours) == n <= MOST_AXES:
        found = [p for p in itertools.permutations(same) if tuple(theirs[axis] for axis in p) == ours]
    if not found:  # axes are joined or split
        found = known
    return [Layout(axes, theirs, ours) for axes in dict.fromkeys(found)]


def nearest(ours: np.ndarray, theirs: np.ndarray) -> Layout | None:
    """The layout in which two arrays differ least; None if none fits their shapes."""
    fitting = layouts(ours.shape, theirs.shape)
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    return min(fitting, key=lambda layout: difference(layout.back(ours), theirs))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The mean magnitude of the difference of two arrays where it is finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a.astype(np.complex128 if a.dtype.kind == "c" else np.float64) - b)
    apart = apart[np.isfinite(apart)]
    return float(apart.mean()) if apart.size else math.inf
