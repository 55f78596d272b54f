"""Comparison of two opened checkpoints, bit for bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.process.texts import shortened
from jaxmodels.weights.lazy import Cast, nbytes, pieces
from jaxmodels.weights.progress import progress_bar

PIECE_BYTES = 8_000_000
SHOWN = 10  # tensors that are listed by name
LONGEST = 100  # characters of a setting
NOT_OF_THE_MODEL = ("dtype", "remat", "stacked")  # settings of how a model is run


def different_settings(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Settings that two configurations both have and that differ, a text for each; not how a model is run."""
    return [
        f"{name}: {shortened(str(config[name]), LONGEST)} and {shortened(str(value), LONGEST)}"
        for name, value in other.items()
        if name in config and config[name] != value and name not in NOT_OF_THE_MODEL
    ]


def compare_tensors(tensors: Mapping[str, Any], others: Mapping[str, Any]) -> tuple[bool, str]:
    """Compare tensors, cast to the dtypes of others of the same names, bit for bit.

    Tensors that only one side has, or that have other shapes, are listed; the rest is compared. Returns True if
    everything is equal, and the text to print. Raises ValueError if a value overflows in the cast.
    """
    lines, compared = [], 0
    casts: dict[str, None] = {}
    both = [name for name in tensors if name in others]
    with progress_bar("comparing", [tensors[name] for name in both]) as advance:
        for name in both:
            tensor, other = tensors[name], others[name]
            size = int(np.prod(tensor.shape))
            if tuple(tensor.shape) != tuple(other.shape):
                lines.append(f"  {name}: shape {list(tensor.shape)} and {list(other.shape)}")
                continue
            if tensor.dtype != other.dtype:
                casts[f"{np.dtype(tensor.dtype).name} to {np.dtype(other.dtype).name}"] = None
                tensor = Cast(tensor, np.dtype(other.dtype), name)
            count, largest = difference(tensor, other)
            compared += size
            advance(nbytes(tensor))
            if count:
                lines.append(f"  {name}: {count:,} of {size:,} values differ, by up to {largest:.3g}")
    absent = listed("only in SRC", [name for name in tensors if name not in others])
    absent += listed("only in DST", [name for name in others if name not in tensors])
    if lines:
        return False, "\n".join([f"{len(lines)} of {len(both)} tensors differ:", *lines, *absent])
    equal = f"all {len(both)} tensors are equal, {compared:,} values bit for bit"
    if casts:
        equal += f", after the cast of SRC from {', '.join(casts)}"
    if absent:
        return False, "\n".join(
            [f"of the tensors that both have, {equal}" if both else "no tensor is in both", *absent]
        )
    return True, equal


def listed(what: str, names: list[str]) -> list[str]:
    """One line with the first names, if there are any."""
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"  {what}: {', '.join(names[:SHOWN])}{more}"]


def difference(a: Any, b: Any) -> tuple[int, float]:
    """Number of values of two tensors of one shape and dtype that differ in any bit, and the largest difference."""
    count, largest = 0, 0.0
    for x, y in zip(pieces(a, PIECE_BYTES), pieces(b, PIECE_BYTES), strict=True):
        integer = np.dtype(f"u{x.dtype.itemsize}")
        unequal = x.view(integer) != y.view(integer)
        if unequal.any():
            count += int(unequal.sum())
            far = np.abs(x[unequal].astype(np.float64) - y[unequal].astype(np.float64))
            largest = float(np.maximum(largest, far.max()))  # NaN if one of the values is
    return count, largest
