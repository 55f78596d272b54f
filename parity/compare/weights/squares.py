"""Square matrices, whose layout no shape tells: they lie as the other matrices of the same layers do.

A layer of the port may hold its kernel as [out, in] and transpose it in the call. Its matrices that are not square then
fit only transposed, and the square ones of the same classes, which would fit either way, are transposed as well.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from parity.compare.weights.layout import Layout
from parity.compare.weights.piece import Piece
from parity.compare.weights.roles import FlaxRole, tiers


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The class of a layer on each side, and how it uses the array; equal for all layers of a kind."""

    torch: str
    torch_role: str
    flax: str
    flax_role: FlaxRole


def consistent(pieces: Sequence[tuple[Piece, Kinds | None]]) -> list[Piece]:
    """The pieces, square matrices laid out as others of their kind; None: a layout that was given."""
    usual: dict[Kinds, set[bool]] = {}
    for piece, kinds in pieces:
        if kinds is not None and matrix(piece) and not square(piece):
            usual.setdefault(kinds, set()).add(is_usual(piece, kinds))
    turn = {kinds for kinds, found in usual.items() if found == {False}}
    return [turned(piece) if kinds in turn and matrix(piece) and square(piece) else piece for piece, kinds in pieces]


def matrix(piece: Piece) -> bool:
    """True for a matrix that stays one."""
    return piece.view is None and len(piece.axes.torch) == len(piece.axes.flax) == 2


def square(piece: Piece) -> bool:
    """True for a matrix with equal sides."""
    return len(set(piece.axes.torch)) == 1


def is_usual(piece: Piece, kinds: Kinds) -> bool:
    """True if the layout is among the first that the layers' rules give."""
    first = next(tiers(kinds.torch_role, kinds.flax_role, piece.axes.torch, piece.axes.flax))
    return piece.axes.text in [text.strip() for text in first]


def turned(piece: Piece) -> Piece:
    """The piece in the other order of its two axes."""
    numbers = np.arange(math.prod(piece.axes.torch)).reshape(piece.axes.torch)
    same_order = np.array_equal(piece.axes.to_flax(numbers), numbers)
    layout = Layout.parse("a b -> b a" if same_order else "a b -> a b")
    return dataclasses.replace(piece, axes=layout.fit(piece.axes.torch, piece.axes.flax))
