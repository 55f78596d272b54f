"""Protocols of model classes: members needed for decoding, saving and sharding.

A class need not inherit from these. Functions that require a member check for it before any work.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import PartitionSpec

from jaxmodels.layers import definer
from jaxmodels.process.streams import warn


@runtime_checkable
class LanguageModel(Protocol):
    """Model that `jaxmodels.generate.generate` can decode.

    sequence_axis: 0 if ids are [S, B], 1 if they are [B, S]. Caches are `jaxmodels.cache.Cache` or a subclass.

    A class may also have `cache_by_position = True`, which `jaxmodels.generate.generate_many` needs: all that a row
    reads of the cache is in `layers`, by `Cache.positions`, and nothing depends on `Cache.length` itself.
    """

    sequence_axis: int

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, start: jax.Array | None = None) -> Any:
        """Empty cache for up to max_len tokens per row; start int [B] counts left padding."""

    def prefill(self, ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """First tokens of each row -> logits [B, V] of the last one, and the filled cache."""

    def decode(self, ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Next tokens of each row -> logits with the axes of ids and V, and the extended cache."""


@runtime_checkable
class ReadsMoreThanIds(Protocol):
    """Language model whose `prefill` and `decode` take more than ids and cache."""

    def decoding_inputs(
        self, inputs: Mapping[str, jax.Array], cuts: Sequence[int]
    ) -> tuple[dict[str, Any], Sequence[Mapping[str, jax.Array]]]:
        """Keyword arguments of `init_cache`, and those of `prefill` and of each `decode`.

        inputs: arguments of the call besides ids, by the names of its parameters. cuts: positions at which the text is
        divided, from 0 to its length; the first piece is the prefill.
        """


@runtime_checkable
class Narrow(Protocol):
    """Language model that can decode in float32 with weights that stay in 16 bits; see `jaxmodels.native`."""

    def narrowed(self) -> Any | None:
        """Such a model, or None if its weights or this process's device do not allow it; itself if it is one."""


@runtime_checkable
class DividedReadout(Protocol):
    """Language model whose logits are `read(features(ids))`, so that those of some positions are computed alone."""

    def features(self, ids: jax.Array) -> jax.Array:
        """Token ids -> output of the last layer [S, B, D] or [B, S, D], with the axes of ids."""

    def read(self, x: jax.Array) -> jax.Array:
        """Output [..., D] of the last layer -> logits [..., V]."""


def has_divided_readout(model: Any) -> bool:
    """True if a model's logits are `read(features(ids))`: not if a subclass of it overrides the call alone."""
    kind = type(model)
    return isinstance(model, DividedReadout) and issubclass(definer(kind, "features"), definer(kind, "__call__"))


class Saved(Protocol):
    """Model that can be registered with `jaxmodels.register`, saved and loaded.

    It is rebuilt by `cls.from_config(**config, rngs=rngs)` if there is such a classmethod, else by `cls(**config,
    rngs=rngs)`. If it has a method `merged()`, `jaxmodels.load` returns the result of that: a model without adapters.
    """

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild the model, as JSON values."""


class Sharded(Protocol):
    """Model whose parameters can be divided over the fsdp and tensor axes of a mesh.

    sharding_rules: pairs of a regular expression and a PartitionSpec. An array gets the spec of the first expression
    that matches its dotted path or a suffix of it.
    """

    sharding_rules: Sequence[tuple[str, PartitionSpec]]


DECODING = ("sequence_axis", "init_cache", "prefill", "decode")  # members of LanguageModel


def tell_left_out(model: Any, name: str) -> None:
    """Warn, naming a checkpoint, that its model reads neighbors besides ids, and is given ids alone."""
    if getattr(model, "reads_neighbors", False):
        warn(f"{name} is read without neighbors, which only its training run has an index of; name the run for them")


def check_decoding(model: Any) -> None:
    """Raises ValueError, naming what is missing, if a model does not have the members of `LanguageModel`."""
    missing = [name for name in DECODING if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"model is a {type(model).__name__} without {', '.join(missing)}; decoding needs {', '.join(DECODING)}"
        )
