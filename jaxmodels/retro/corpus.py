"""Public name of `jaxmodels.retro.retrieval.corpus`."""

from jaxmodels.retro.retrieval.corpus import Corpus

__all__ = ["Corpus"]
