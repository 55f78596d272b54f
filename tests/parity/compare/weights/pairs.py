"""Compare a pair by its weights alone: load them, run both sides once in float32, and read the weights back."""

from typing import Any

import numpy as np
import torch

from parity.compare.comparison import Comparison
from parity.compare.weights import Weights

EXACT = 1e-5


def distance(torch_module: torch.nn.Module, flax_module: Any, x: Any, **settings: Any) -> float:
    """The difference of the outputs, relative to the largest; all carried tensors must come back bit by bit."""
    comparison = Comparison.of(torch_module, flax_module, x, **settings)
    round_trip(comparison)
    return comparison.distances()(comparison.weights)


def weights(torch_module: torch.nn.Module, flax_module: Any, x: Any, **settings: Any) -> Weights:
    """The conversion of a pair."""
    return Comparison.of(torch_module, flax_module, x, **settings).weights


def round_trip(comparison: Comparison) -> None:
    """Assert that tensors return from Flax unchanged."""
    state = comparison.state_dict("float32")
    back = comparison.weights.read(comparison.weights.load(comparison.flax, state))
    for name, tensor in state.items():
        if comparison.weights.carries(name):
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)
