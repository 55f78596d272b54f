"""Protocols of models: attributes and methods with which a class of any origin is decoded, saved and sharded.

A class need not inherit from these; it needs their members. Functions that require them check before any work.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax.sharding import PartitionSpec


class LanguageModel(Protocol):
    """Model that `jaxmodels.generate.generate` can decode.

    sequence_axis: 0 if ids are [S, B], 1 if they are [B, S]. Caches are `jaxmodels.cache.Cache` or a subclass.
    """

    sequence_axis: int

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, start: jax.Array | None = None) -> Any:
        """Empty cache for up to max_len tokens per row; start int [B] counts left padding."""

    def prefill(self, ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """First tokens of each row -> logits [B, V] of the last one, and the filled cache."""

    def decode(self, ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Next tokens of each row -> logits with the axes of ids and V, and the extended cache."""


class Saved(Protocol):
    """Model that can be registered with `jaxmodels.register`, saved and loaded.

    It is rebuilt by `cls.from_config(**config, rngs=rngs)` if there is such a classmethod, else by `cls(**config,
    rngs=rngs)`.
    """

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild the model, as JSON values."""


class Sharded(Protocol):
    """Model whose parameters can be divided over the fsdp and tensor axes of a mesh.

    sharding_rules: pairs of a regular expression and a PartitionSpec; the first expression that matches the path of an
    array, or the last words of its path, decides.
    """

    sharding_rules: Sequence[tuple[str, PartitionSpec]]


DECODING = ("sequence_axis", "init_cache", "prefill", "decode")  # members of LanguageModel


def check_decoding(model: Any) -> None:
    """Raises ValueError, naming what is missing, if a model does not have the members of `LanguageModel`."""
    missing = [name for name in DECODING if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"model is a {type(model).__name__} without {', '.join(missing)}; decoding needs {', '.join(DECODING)}"
        )
