"""Weights between PyTorch and Flax: `from_torch`, `to_torch`, `load_into_torch`, and the command line over them."""

from jaxmodels.weights.names import ConversionError, from_torch, load_into_torch, to_torch

__all__ = ["ConversionError", "from_torch", "load_into_torch", "to_torch"]
