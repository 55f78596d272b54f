"""Patterns in the difference of two arrays: a factor, one vector everywhere, an axis moved, dropout, few bits."""

from typing import Any

import numpy as np

EXPLAINED = 1e-3  # the largest share of the error that a hint may leave unexplained


def shape_of_error(given: list[np.ndarray], right: list[np.ndarray]) -> str:
    """A pattern in the difference: a factor, one vector everywhere, an axis shifted or reversed, few features."""
    a, b = given[0], right[0]
    if len(given) > 1 or not b.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return ""
    error = float(np.abs(a - b).max())
    factor = float((a * b).sum() / ((b * b).sum() or 1.0))
    if np.abs(a - factor * b).max() < EXPLAINED * error:
        return "all zero" if abs(factor) < 1e-9 else f"PyTorch's output times {factor:.6g}"
    if a.ndim == 0:
        return ""
    return moved(a, b, error) or dropped(a, b, error) or few_or_constant(a, b, error)


def moved(a: np.ndarray, b: np.ndarray, error: float) -> str:
    """An axis reversed, shifted or exchanged with another of its length."""
    for axis in range(a.ndim):
        n = a.shape[axis]
        for other in range(axis + 1, a.ndim):
            if n > 1 and a.shape[other] == n and np.abs(b.swapaxes(axis, other) - a).max() < EXPLAINED * error:
                return f"axes {axis} and {other} exchanged"
        if n < 3:
            continue
        if np.abs(np.flip(a, axis) - b).max() < EXPLAINED * error:
            return f"reversed along axis {axis}"
        for by in (1, -1):
            rest = range(1, n) if by == 1 else range(n - 1)
            if np.abs(np.roll(b, by, axis).take(rest, axis) - a.take(rest, axis)).max() < EXPLAINED * error:
                return f"shifted by {by:+d} along axis {axis}"
    return ""


def dropped(a: np.ndarray, b: np.ndarray, error: float) -> str:
    """Dropout: some values are 0, all others multiplied by one factor above 1."""
    zero = (a == 0) & (b != 0)
    rest = ~zero & (b != 0)
    if not zero.any() or rest.sum() < 3:
        return ""
    factor = float((a[rest] * b[rest]).sum() / np.square(b[rest]).sum())
    if factor > 1 and np.abs(a[rest] - factor * b[rest]).max() < EXPLAINED * error:
        return f"dropout is active: {zero.mean():.0%} of the values are 0, the others times {factor:.4g}"
    return ""


def few_or_constant(a: np.ndarray, b: np.ndarray, error: float) -> str:
    """One vector that is added at every position, or few features that differ."""
    offset = (a - b).reshape(-1, a.shape[-1])
    if len(offset) > 2 and np.abs(offset - offset[0]).max() < EXPLAINED * error:
        return "one vector is added at every position: an extra bias, or a missing one"
    changed = (np.abs(a - b) > EXPLAINED * error).mean(axis=tuple(range(a.ndim - 1))) if a.ndim > 1 else np.ones(1)
    if 0 < (changed > 0).mean() <= 0.5:
        return f"only {int((changed > 0).sum())} of {changed.size} features differ"
    return ""


def precision(given: list[np.ndarray], right: list[np.ndarray], dtype: Any) -> str:
    """A narrower type inside, by the signal-to-noise ratio: 24, 11 and 8 bits leave about 140, 65 and 48 dB."""
    same = [(a == b) | ~np.isfinite(a) | ~np.isfinite(b) for a, b in zip(given, right, strict=True)]
    noise = sum(float(np.square(a - b)[~s].sum()) for a, b, s in zip(given, right, same, strict=True))
    signal = sum(float(np.square(b)[np.isfinite(b)].sum()) for b in right)
    if not noise or not signal:
        return ""
    snr = 10 * (np.log10(signal) - np.log10(noise))
    wide = np.dtype(dtype) == np.float64
    if wide and 120 < snr < 170:
        return f"float32 somewhere inside ({snr:.0f} dB)"
    if 35 < snr < 80 and (wide or np.dtype(dtype) == np.float32):
        return f"bfloat16 or TF32 somewhere inside, or an approximation ({snr:.0f} dB)"
    return ""
