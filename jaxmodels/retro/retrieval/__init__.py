"""Retrieval for RETRO: corpus, embedders, chunk index, and generation with live retrieval."""

from jaxmodels.retro.retrieval.index import ChunkIndex

__all__ = ["ChunkIndex"]
