"""Differences between two results, and their limits.

float64: for every tensor, max|Δ| ≤ 1e-10 · (the largest magnitude among all tensors of its kind).
float32, bfloat16, float16: the error against the float64 reference, on that same scale, is at most 4 × PyTorch's own
plus 1e-6.
"""

from collections.abc import Mapping

import numpy as np

FLOAT64_LIMIT = 1e-10
RATIO_LIMIT = 4.0
RATIO_FLOOR = 1e-6 / RATIO_LIMIT  # added to PyTorch's error, so that one number decides: flax / (torch + floor) ≤ 4

Tensors = Mapping[str, np.ndarray]


def scale_of(reference: Tensors) -> float:
    """The largest magnitude among tensors of one kind; 1 if they are all zero."""
    return max((float(np.abs(t).max()) for t in reference.values() if t.size), default=0.0) or 1.0


def errors(result: Tensors, reference: Tensors) -> dict[str, float]:
    """max|result - reference| by name, in units of the kind's scale.

    Infinite for a tensor that only one side has, that has another shape, or that holds a NaN or an infinity.
    """
    scale = scale_of(reference)
    return {name: error_of(result.get(name), reference.get(name), scale) for name in {**reference, **result}}


def error_of(result: np.ndarray | None, reference: np.ndarray | None, scale: float) -> float:
    """max|result - reference| / scale of one tensor."""
    if result is None or reference is None or result.shape != reference.shape:
        return np.inf
    if not (np.isfinite(result).all() and np.isfinite(reference).all()):
        return np.inf
    return float(np.abs(result.astype(np.float64) - reference).max(initial=0.0)) / scale


def ratios(flax: Tensors, torch: Tensors, reference: Tensors) -> dict[str, float]:
    """Flax's errors by name in units of PyTorch's own (plus RATIO_FLOOR), both against the reference."""
    return in_units_of(errors(flax, reference), errors(torch, reference))


def in_units_of(flax: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """Errors by name in units of PyTorch's own errors (plus RATIO_FLOOR)."""
    allowed = {name: own.get(name, 0.0) + RATIO_FLOOR for name in flax}
    return {
        name: error / allowed[name] if np.isfinite(allowed[name]) else np.inf  # a NaN in PyTorch's run must not pass
        for name, error in flax.items()
    }


def worst(values: Mapping[str, float]) -> tuple[str, float]:
    """Name and value of the largest; NaN counts as the largest."""
    return max(values.items(), key=lambda item: np.inf if np.isnan(item[1]) else item[1])
