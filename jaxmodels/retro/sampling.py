"""Public name of `jaxmodels.retro.retrieval.live`."""

from jaxmodels.retro.retrieval.live import Retriever, Retrieving

__all__ = ["Retriever", "Retrieving"]
