"""Retrieval for RETRO: the corpus, embedders, the chunk index, and generation that looks neighbors up as it goes."""

from jaxmodels.retro.retrieval.index import ChunkIndex

__all__ = ["ChunkIndex"]
