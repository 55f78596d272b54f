"""Weights between PyTorch and Flax: `from_torch`, `to_torch`, `load_into_torch`, and converters of checkpoints."""

from jaxmodels.weights.names import ConversionError, from_torch, load_into_torch, to_torch

__all__ = ["ConversionError", "from_torch", "load_into_torch", "to_torch"]
