"""A trace of a pair, without the readings of a check."""

from typing import Any

import jax
import numpy as np
import torch

from parity.compare.comparison import Comparison
from parity.locate.trace import trace
from parity.locate.tree import Part, Trace


def traced(
    torch_module: torch.nn.Module, flax_module: Any, inputs: Any, *, gradients: bool = False, **settings
) -> Trace:
    """The trace of a pair in float64."""
    comparison = Comparison.of(torch_module, flax_module, inputs, **settings)
    with comparison.strict_precision(), jax.enable_x64(True):
        side = comparison.torch_side("float64")
        batch, _ = comparison.evaluated(side)
        ours = comparison.jax_side("float64", side.state_dict())
        return trace(side, ours, batch, gradients=gradients)


def verdicts(part: Part) -> dict[str, str]:
    """The verdict of each part by path."""
    return {p.path: p.verdict for p in part.walk()}


def part_at(part: Part, path: str) -> Part:
    """The part at a path."""
    return next(p for p in part.walk() if p.path == path)


def numbers(*shape: int) -> np.ndarray:
    """Normally distributed numbers, the same each time."""
    return np.random.default_rng(0).standard_normal(shape)
