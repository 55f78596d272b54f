"""The conversion of a pair of modules, from the user's settings."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmodels.weights.names import ConversionError, matched
from parity.compare.names import Names
from parity.compare.weights.converter import Converted, converter_of
from parity.compare.weights.layout import Axes
from parity.compare.weights.mapped import Mapped
from parity.compare.weights.piece import Piece
from parity.compare.weights.protocol import TorchModule, Weights
from parity.compare.weights.roles import same
from parity.compare.weights.twins import Twins


def weights_of(
    torch_module: TorchModule,
    flax_module: Any,
    names: Names | Weights | None,
    layouts: Mapping[str, str] | None = None,
    flax_only: Sequence[str] = (),
    torch_only: Sequence[str] = (),
) -> Weights:
    """The conversion of a pair of modules.

    It is `names` if those are `Weights`, `Converted` if they are a converter, and `Mapped` if they are names. If
    omitted: `Twins` if all names are the same and no layer needs to be known, else `Mapped` without names. Raises
    ConversionError if the weights do not fit.
    """
    if isinstance(names, Weights):
        return names
    convert = converter_of(names, list(torch_module.state_dict()))
    if convert is not None:
        if layouts:
            raise ValueError("layouts must be omitted with a converter as names")
        return Converted(torch_module, flax_module, convert, flax_only=flax_only, torch_only=torch_only)
    if names is not None or layouts or flax_only or torch_only:
        return Mapped(
            torch_module,
            flax_module,
            {} if names is None else names,
            layouts,
            flax_only=flax_only,
            torch_only=torch_only,
        )
    try:
        with jax.enable_x64(True):  # 64-bit tensors are refused without it
            matched(flax_module, torch_module.state_dict())
    except ConversionError as error:
        try:
            return Mapped(torch_module, flax_module, {})
        except ConversionError as other:
            raise min(other, error, key=size) from None
    try:
        mapped = Mapped(torch_module, flax_module, {})
    except ConversionError:
        return Twins()
    plain = not (mapped.one_sided.found or mapped.batch_statistics or mapped.choices)
    return Twins() if plain and all(converted_alike(piece) for piece in mapped.pieces) else mapped


def converted_alike(piece: Piece) -> bool:
    """True if the converter of twins, which knows no layers, moves a tensor in the same way."""
    shape = piece.axes.torch
    rank = len(shape)
    order = (*range(rank - 2), rank - 1, rank - 2) if piece.path[-1] == "kernel" and rank > 1 else tuple(range(rank))
    return same(piece.axes, Axes(shape, shape, order, (), tuple(shape[axis] for axis in order)))


def size(error: ConversionError) -> int:
    """The number of problems of an error."""
    return sum(map(len, error.problems.values()))
