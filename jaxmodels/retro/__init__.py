"""RETRO (arXiv 2112.04426): the model, and the retrieval that it reads with."""

from jaxmodels.retro.attention import ChunkedCrossAttention, CrossAttention, SelfAttention
from jaxmodels.retro.model import FeedForward, NearestNeighborEncoder, RetroModel

__all__ = [
    "ChunkedCrossAttention",
    "CrossAttention",
    "FeedForward",
    "NearestNeighborEncoder",
    "RetroModel",
    "SelfAttention",
]
