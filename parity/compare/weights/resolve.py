"""Decide by running which of several layouts tensors have, where shapes and layers cannot tell."""

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from parity.compare.weights.mapped import Mapped

MOST = 16  # combinations of layouts that are tried
NEAR = 1e-3  # a difference of less than this needs no other layout
BETTER = 1 / 3  # a layout is taken if it brings the outputs nearer by this factor at least


def resolved(weights: Mapped, distance: Callable[[Mapped], float]) -> Mapped:
    """The weights with the layouts that bring the outputs nearest to PyTorch's; the usual ones if none stands out.

    distance: of the Flax model's outputs with these weights from PyTorch's. Nothing is tried if there are more than
    MOST combinations.
    """
    choices = list(weights.choices.values())
    if not choices or math.prod(len(choice.options) for choice in choices) > MOST:
        return weights
    candidates: list[tuple[float, Mapped]] = []
    for indices in itertools.product(*(range(len(choice.options)) for choice in choices)):
        chosen = {choice.name: index for choice, index in zip(choices, indices, strict=True)}
        candidate = weights.choosing(chosen)
        found = distance(candidate)
        if found < NEAR and not candidates:
            return weights
        candidates.append((math.inf if math.isnan(found) else found, candidate))
    usual = candidates[0][0]
    best, candidate = min(candidates, key=lambda item: item[0])
    return candidate if best < BETTER * usual else weights


def difference(outputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """The largest difference of floating outputs that both sides have, relative to the reference's magnitude."""
    found = [0.0]
    for name in outputs.keys() & reference.keys():
        ours, theirs = np.asarray(outputs[name]), np.asarray(reference[name])
        if ours.shape != theirs.shape:
            return math.inf
        if not (np.issubdtype(theirs.dtype, np.inexact) and theirs.size):
            continue
        finite = np.isfinite(theirs) & np.isfinite(ours)
        scale = np.abs(theirs[finite]).max(initial=0.0) or 1.0
        found.append(float(np.abs(ours[finite] - theirs[finite]).max(initial=0.0) / scale))
    return max(found)
