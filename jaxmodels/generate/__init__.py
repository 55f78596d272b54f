"""Sampling from a language model, for every model with the members of `jaxmodels.protocols.LanguageModel`."""

from jaxmodels.generate.api import generate, generate_many, stream
from jaxmodels.generate.sampling import Sampling

__all__ = ["Sampling", "generate", "generate_many", "stream"]
