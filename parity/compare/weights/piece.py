"""`Piece`: a tensor, or a part of one, and its place in a Flax array; and how pieces are fitted to shapes."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity.compare.names import matches
from parity.compare.weights.layout import Axes, Layout, Shape, shown
from parity.compare.weights.roles import FlaxRole, layouts_of, split_axes

Index = tuple[Any, ...]
WHOLE: Index = (...,)  # not (), by which NumPy takes a number out of an array without axes


class Misfit(ValueError):
    """A tensor and an array have shapes that no layout relates."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a tensor and its place.

    view: a layout of the whole tensor, applied first. take: the part of that. axes: the part's layout. layer, slot: the
    index into an array of all layers, and the part of the array.
    """

    key: str
    path: tuple[str | int, ...]
    axes: Axes
    view: Axes | None = None
    take: Index = WHOLE
    layer: int | None = None
    slot: Index = WHOLE

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Extract this piece of a tensor, as it lies in Flax."""
        return self.axes.to_flax((tensor if self.view is None else self.view.to_flax(tensor))[self.take])

    def of(self, array: np.ndarray) -> np.ndarray:
        """This piece of a Flax array, as a view."""
        return (array if self.layer is None else array[self.layer, ...])[self.slot]

    def put(self, tensor: np.ndarray, array: np.ndarray) -> None:
        """Write this piece of a Flax array to its part of a tensor, or of the tensor's view."""
        tensor[self.take] = self.axes.to_torch(self.of(array))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A PyTorch tensor's role, and the layout that the user gives for it."""

    key: str
    shape: Shape
    role: str
    layout: Layout | None = None
    pattern: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Target:
    """A place for a tensor or a part of it: an array, or a layer or slot of one."""

    path: tuple[str | int, ...]
    role: FlaxRole
    shape: Shape
    layer: int | None = None
    slot: Index = WHOLE

    def piece(self, tensor: Tensor, axes: Axes, view: Axes | None = None, take: Index = WHOLE) -> Piece:
        """A piece of a tensor at this place."""
        return Piece(tensor.key, self.path, axes, view, take, self.layer, self.slot)


Options = list[Axes]
"""The layouts that fit one piece, the most usual one first."""


def fit(tensor: Tensor, targets: Sequence[Target]) -> list[tuple[Piece, Options]]:
    """The pieces of a tensor, one for each target, with all layouts that fit; raises ValueError if none does."""
    if tensor.layout is not None:
        return [(piece, [piece.axes]) for piece in declared(tensor, tensor.layout, targets)]
    if len(targets) == 1:
        target = targets[0]
        options = layouts_of(tensor.role, target.role, tensor.shape, target.shape)
        if not options:
            raise Misfit(misfit(tensor, targets))
        return [(target.piece(tensor, options[0]), options)]
    sizes = [math.prod(target.shape) for target in targets]
    for axis in split_axes(tensor.role, targets[0].role, len(tensor.shape)):
        width = tensor.size // tensor.shape[axis] if tensor.size else 0
        if not width or sum(sizes) != tensor.size or any(size % width for size in sizes):
            continue
        found, start = [], 0
        for target, size in zip(targets, sizes, strict=True):
            stop = start + size // width
            shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
            options = layouts_of(tensor.role, target.role, shape, target.shape)
            if not options:
                break
            take = (*[slice(None)] * axis, slice(start, stop))
            found.append((target.piece(tensor, options[0], None, take), options))
            start = stop
        if len(found) == len(targets):
            return found
    raise Misfit(misfit(tensor, targets))


def declared(tensor: Tensor, layout: Layout, targets: Sequence[Target]) -> list[Piece]:
    """The pieces of a tensor by the user's layout; of several targets each gets its part of the first axis."""
    shapes = [target.shape for target in targets]
    try:
        if len(targets) == 1:
            (target,), (shape,) = targets, shapes
            # One of several tensors that are stacked in one array has a leading axis of length 1 there.
            stacked = len(layout.flax) == len(shape) - 1 and shape[0] == 1
            axes = layout.fit(tensor.shape, shape[1:] if stacked else shape)
            return [target.piece(tensor, dataclasses.replace(axes, flax=shape))]
        alike = len({shape[1:] for shape in shapes}) == 1 and all(shapes)
        if len(layout.flax) == len(shapes[0]) + 1 and len(set(shapes)) == 1:
            lengths, view = [1] * len(targets), layout.fit(tensor.shape, (len(targets), *shapes[0]))
        elif len(layout.flax) == len(shapes[0]) and alike:
            lengths = [shape[0] for shape in shapes]
            view = layout.fit(tensor.shape, (sum(lengths), *shapes[0][1:]))
        else:
            raise ValueError(
                f"{layout.text!r} has {len(layout.flax)} axes for Flax; {len(targets)} arrays of "
                f"{', '.join(map(shown, shapes))} need one more, of that length, as the first"
            )
    except ValueError as error:
        raise ValueError(f"layouts[{tensor.pattern!r}]={error} ({tensor.key})") from None
    stops = np.cumsum(lengths).tolist()
    return [
        target.piece(tensor, reshape((length, *view.flax[1:]), target.shape), view, (slice(stop - length, stop),))
        for target, length, stop in zip(targets, lengths, stops, strict=True)
    ]


def joined(tensors: Sequence[Tensor], target: Target) -> list[tuple[Piece, Options]]:
    """The pieces of several tensors that make up one array.

    They are stacked along an axis of their number, or else joined along the last axis or any other.
    """
    shape = target.shape
    for axis in sorted(range(len(shape)), key=lambda axis: (shape[axis] != len(tensors), axis != len(shape) - 1)):
        width = math.prod(shape) // shape[axis]
        if any(tensor.size % width for tensor in tensors) or sum(t.size for t in tensors) != math.prod(shape):
            continue
        found, start = [], 0
        for tensor in tensors:
            stop = start + tensor.size // width
            part = (*shape[:axis], stop - start, *shape[axis + 1 :])
            slot = (*[slice(None)] * axis, slice(start, stop))
            try:
                found += fit(tensor, [dataclasses.replace(target, shape=part, slot=slot)])
            except ValueError:
                break
            start = stop
        if len(found) == len(tensors):
            return found
    raise Misfit(
        f"{', '.join(f'{tensor.key} {shown(tensor.shape)}' for tensor in tensors)} do not make up "
        f"{name_of(target.path)} {shown(shape)}"
    )


def reshape(shape: Shape, other: Shape) -> Axes:
    """The layout of shapes that differ in axes of length 1 only."""
    return Axes(shape, shape, tuple(range(len(shape))), (), other)


def misfit(tensor: Tensor, targets: Sequence[Target]) -> str:
    """Shapes of both sides and, if the sizes are equal, how to say how they are related."""
    shapes = ", ".join(shown(target.shape) for target in targets)
    line = f"{tensor.key}: PyTorch has {shown(tensor.shape)}, Flax has {shapes} ({name_of(targets[0].path)})"
    if tensor.size == sum(math.prod(target.shape) for target in targets):
        line += f"; the order of axes is not known: layouts={{{alike(tensor.key)!r}: '… -> …'}} gives it"
    return line


def name_of(path: Sequence[str | int]) -> str:
    """A path as a dotted name."""
    return ".".join(map(str, path))


def alike(name: str) -> str:
    """A name with its numbers replaced by `*`, which equal parts of all layers have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def layout_for(key: str, layouts: Mapping[str, Layout]) -> tuple[str, Layout | None]:
    """The longest pattern that a name matches, and its layout."""
    found = sorted((pattern for pattern in layouts if matches(key, [pattern])), key=len)
    return (found[-1], layouts[found[-1]]) if found else ("", None)
