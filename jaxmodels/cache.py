"""The key-value cache of incremental decoding: a pytree that goes into a call and comes out of it.

A row's keys and values lie at their own positions: slot p of row b holds token p of the text of row b. Left padding
is never stored, so rows of different lengths need no mask of their own, and tables indexed by position (rotary,
relative, synthesized logits) serve ragged batches as they are.

Axes: S new tokens, N = max_len slots, B batch, H heads, d_k features of a head.
"""

import dataclasses
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of a batch of texts between calls.

    layers: one dict per layer, arrays [B, H, N, d_k]; length: int32 scalar, tokens fed so far, padding included;
    start: int32 [B], how many of them are left padding, or None where no row is padded; limit: of a model that sees
    its last tokens only, how many. A cache of that many slots is a ring: token p lies at slot p mod N, and a text of
    any length fits.
    """

    layers: tuple[dict[str, jax.Array], ...]
    length: jax.Array
    start: jax.Array | None = None
    limit: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def max_len(self) -> int:
        return jax.tree.leaves(self.layers)[0].shape[2]

    @property
    def is_ring(self) -> bool:
        return self.max_len == self.limit

    def grown(self, max_len: int) -> "Cache":
        """The same with max_len slots, or with `limit` of them where that is less; never with fewer than before."""
        more = min(max_len, self.limit or max_len) - self.max_len
        pads = [(0, 0), (0, 0), (0, max(0, more)), (0, 0)]
        return dataclasses.replace(self, layers=jax.tree.map(lambda a: jnp.pad(a, pads), self.layers))

    def packed(self) -> "Cache":
        """The same, a batch of one without its axis: what a loop should carry.

        With that axis XLA copies every buffer four times a token on a CPU, instead of updating it in place.
        """
        if self.start is not None or len(jax.tree.leaves(self.layers)[0]) > 1:
            return self
        return dataclasses.replace(self, layers=jax.tree.map(without_batch, self.layers))

    def unpacked(self) -> "Cache":
        """The inverse of `packed`."""
        return dataclasses.replace(self, layers=jax.tree.map(lambda a: a[None] if a.ndim == 3 else a, self.layers))

    def positions(self, n: int) -> jax.Array:
        """Positions of the next n tokens: int32 [S], or [S, B] with padding; negative where a token is padding."""
        positions = self.length + jnp.arange(n, dtype=jnp.int32)
        return positions if self.start is None else positions[:, None] - self.start

    def advance(self, layers: tuple[dict[str, jax.Array], ...], n: int) -> Self:
        return dataclasses.replace(self, layers=layers, length=self.length + n)

    def check_room(self, n: int, batch: int, *, empty: bool = False) -> None:
        """Raises ValueError where n more tokens do not fit, as far as that can be known outside a trace."""
        rows = jax.tree.leaves(self.layers)[0].shape[0]
        if batch != rows:
            raise ValueError(f"ids have a batch of {batch}, the cache was made for batch={rows}")
        room = math.inf if self.is_ring else self.max_len
        if n > room:
            raise ValueError(f"{n} tokens do not fit a cache with max_len={self.max_len}")
        if isinstance(self.length, jax.core.Tracer) or isinstance(self.start, jax.core.Tracer):
            return
        length = int(self.length)
        if empty and length:
            raise ValueError(f"prefill starts an empty cache, this one holds {length} tokens: decode() continues it")
        text = length + n - (0 if self.start is None else int(self.start.min()))
        if text > room:
            raise ValueError(f"{text} tokens do not fit a cache with max_len={self.max_len}")
        if self.start is not None and empty and int(self.start.max()) >= n:
            raise ValueError(f"start={self.start.tolist()} must leave at least one of the {n} tokens of each row")


def unless_overrun(logits: jax.Array, cache: Cache, n: int, *, empty: bool = False) -> jax.Array:
    """logits [..., B, V] of n more tokens, NaN where they did not fit: inside a trace `check_room` cannot know."""
    text = cache.length + n if cache.start is None else cache.length + n - cache.start
    fits = jnp.logical_or(cache.is_ring, text <= cache.max_len)
    if empty:
        fits = fits & (cache.length == 0) & (text > 0)
    return jnp.where(fits[..., None], logits, jnp.nan)


def make_cache(
    layers: list[dict[str, jax.Array]], batch: int, start: jax.Array | None, limit: int | None = None
) -> Cache:
    """An empty cache over the given buffers; raises ValueError where `start` is not one integer ≥ 0 per row."""
    if start is not None:
        start = jnp.asarray(start)
        if start.shape != (batch,) or not jnp.issubdtype(start.dtype, jnp.integer):
            raise ValueError(f"start must be integers [batch={batch}], got {start.dtype}{list(start.shape)}")
        if not isinstance(start, jax.core.Tracer) and (np.asarray(start) < 0).any():
            raise ValueError(f"start={start.tolist()} counts left padding, it cannot be negative")
        start = jnp.array(start, jnp.int32)  # a copy: whoever donates the cache must not donate the caller's array
    return Cache(tuple(layers), jnp.zeros((), jnp.int32), start, limit)


def without_batch(buffer: jax.Array) -> jax.Array:
    """[1, H, N, d_k] -> [H, N, d_k]; a reshape, which cancels out against its inverse."""
    return buffer.reshape(buffer.shape[1:])


def write(buffer: jax.Array, new: jax.Array, positions: jax.Array | None) -> jax.Array:
    """buffer [B, H, N, d_k] with new [B, H, S, d_k] at `positions`; None: at 0 … S-1, negative ones are dropped."""
    new = new.astype(buffer.dtype)
    if positions is None:
        return buffer.at[:, :, : new.shape[2]].set(new)
    if positions.ndim == 1:
        alone = len(buffer) == 1  # see Cache.packed
        buffer, new = (without_batch(a) if alone else a for a in (buffer, new))
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, new, positions[0], axis=buffer.ndim - 2)
        buffer = jax.lax.optimization_barrier(buffer)  # what reads it must not repeat the update on a copy of its own
        return buffer[None] if alone else buffer
    slots = jnp.where(positions < 0, buffer.shape[2], positions).T  # [B, S]; N is out of range: dropped
    return jax.vmap(lambda b, n, s: b.at[:, s].set(n, mode="drop"))(buffer, new, slots)


def visible(positions: jax.Array, n_slots: int) -> jax.Array:
    """Mask [1 or B, 1, S, N]: a token sees its own slot and those before; padding sees slot 0, to stay finite."""
    rows = positions[None] if positions.ndim == 1 else positions.T
    return (jnp.arange(n_slots) <= jnp.maximum(rows, 0)[..., None])[:, None]


def align_left(ids: jax.Array, start: jax.Array) -> jax.Array:
    """Left-padded ids [S, B] moved to begin at 0; what follows a row's text is unspecified."""
    rows = jnp.arange(ids.shape[0])[:, None] + start
    return jnp.take_along_axis(ids, jnp.minimum(rows, ids.shape[0] - 1), axis=0)
