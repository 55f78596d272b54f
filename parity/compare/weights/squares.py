"""Square matrices lie as the other matrices of their layers.

The shapes of a square matrix do not tell if it is transposed. Other matrices of the same kind, of the same classes of
layers on both sides, do: transformers' FlaxConv1D keeps [out, in] where PyTorch's Conv1D has [in, out].
"""

import dataclasses
from collections.abc import Sequence

from parity.compare.weights.layout import Layout
from parity.compare.weights.piece import Options, Piece
from parity.compare.weights.roles import FlaxRole


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The class of a layer on each side, and how it uses the array; equal for all layers of a kind."""

    torch: str
    torch_role: str
    flax: str
    flax_role: FlaxRole


Fitted = tuple[Piece, Options]


def consistent(found: Sequence[Fitted], kinds: Sequence[Kinds | None]) -> list[Fitted]:
    """The pieces with their layouts; for square matrices only the one that others of their kind have.

    kinds: None for a layout that was given.
    """
    orders: dict[Kinds, set[tuple[int, ...]]] = {}
    for (piece, _), of_piece in zip(found, kinds, strict=True):
        if of_piece is not None and is_matrix(piece) and not is_square(piece):
            orders.setdefault(of_piece, set()).add(piece.axes.order)
    result: list[Fitted] = []
    for (piece, options), of_piece in zip(found, kinds, strict=True):
        known = orders.get(of_piece, set()) if of_piece is not None else set()
        if len(known) == 1 and is_matrix(piece) and is_square(piece):
            layout = Layout.parse("a b -> a b" if known == {(0, 1)} else "a b -> b a")
            options = [layout.fit(piece.axes.torch, piece.axes.flax)]
        result.append((piece, options))
    return result


def is_matrix(piece: Piece) -> bool:
    """True for a matrix that stays one."""
    return piece.view is None and len(piece.axes.torch) == len(piece.axes.flax) == len(piece.axes.split) == 2


def is_square(piece: Piece) -> bool:
    """True for a matrix with equal sides."""
    return len(set(piece.axes.torch)) == 1
