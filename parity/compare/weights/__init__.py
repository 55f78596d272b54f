"""Weights: PyTorch's tensors and the arrays of a Flax model, converted in both directions."""

from parity.compare.weights.choose import weights_of
from parity.compare.weights.mapped import DROPPED, Mapped
from parity.compare.weights.protocol import TorchModule, Weights, aliases
from parity.compare.weights.twins import OwnWeights, Twins

__all__ = ["DROPPED", "Mapped", "OwnWeights", "TorchModule", "Twins", "Weights", "aliases", "weights_of"]
