"""Bounds of shapes that a file of unknown origin names.

The size of a file bounds the numbers in it, but neither the number of dimensions nor what an empty tensor is wide: a
mask of shape [0, 60000, 60000] has no bytes, and its comparison with a causal mask takes 3.6 GB.
"""

import math
from collections.abc import Sequence

from jaxmodels.process.texts import quoted

DIMENSIONS = 64  # as NumPy
EMPTY = 2**24  # product of the other dimensions of a tensor that has one of size 0


def check_shape(shape: Sequence[int]) -> None:
    """Raise ValueError for a shape of more than 64 dimensions, or of an empty tensor with very large other ones."""
    if len(shape) > DIMENSIONS:
        raise ValueError(f"a shape of {len(shape):,} dimensions; at most {DIMENSIONS} are read")
    if 0 in shape and math.prod(filter(None, shape)) > EMPTY:
        raise ValueError(
            f"shape {quoted(list(shape))} of an empty tensor; its other dimensions may be at most {EMPTY:,} together"
        )
