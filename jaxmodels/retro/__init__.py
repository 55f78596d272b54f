"""RETRO (arXiv 2112.04426): the model, and the retrieval of neighbors in `jaxmodels.retro.retrieval`."""

from jaxmodels.retro.model import NearestNeighborEncoder, RetroModel

__all__ = ["NearestNeighborEncoder", "RetroModel"]
