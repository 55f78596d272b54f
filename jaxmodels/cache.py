"""Key-value cache of incremental decoding: a pytree that is passed to a call and returned by it.

Keys and values are stored by position: slot p of row b holds token p of the text of row b. Left padding is not stored,
so that rows of different lengths need no masks of their own, and tables indexed by position (rotary, relative,
synthesized logits) work for ragged batches unchanged.

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

    layers: one dict per layer, arrays [B, H, N, d_k].
    length: int32 scalar, number of tokens so far, padding included.
    start: int32 [B], number of left-padding tokens in each row; None if no row is padded.
    limit: number of last tokens that the model attends to; None if all. A cache with `limit` slots is a ring: token p
        is stored in slot p mod N, and a text of any length fits.
    """

    layers: tuple[dict[str, jax.Array], ...]
    length: jax.Array
    start: jax.Array | None = None
    limit: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def max_len(self) -> int:
        """Number of slots."""
        return jax.tree.leaves(self.layers)[0].shape[2]

    @property
    def is_ring(self) -> bool:
        """True if old tokens are overwritten; see `limit`."""
        return self.max_len == self.limit

    def grown(self, max_len: int) -> "Cache":
        """Cache padded to min(max_len, limit) slots; unchanged if it has as many or more."""
        more = min(max_len, self.limit or max_len) - self.max_len
        pads = [(0, 0), (0, 0), (0, max(0, more)), (0, 0)]
        return dataclasses.replace(self, layers=jax.tree.map(lambda a: jnp.pad(a, pads), self.layers))

    def repeated(self, copies: int) -> "Cache":
        """Cache with each row repeated, the repetitions of a row next to each other."""
        return self if copies == 1 else jax.tree.map(lambda a: jnp.repeat(a, copies, axis=0) if a.ndim else a, self)

    def packed(self) -> "Cache":
        """Cache to carry through a loop: without the batch axis if the batch is one row without padding.

        With that axis, XLA on a CPU copies every buffer four times per token instead of updating it in place.
        """
        if self.start is not None or len(jax.tree.leaves(self.layers)[0]) > 1:
            return self
        return dataclasses.replace(self, layers=jax.tree.map(without_batch, self.layers))

    def unpacked(self) -> "Cache":
        """Inverse of `packed`."""
        return dataclasses.replace(self, layers=jax.tree.map(lambda a: a[None] if a.ndim == 3 else a, self.layers))

    def positions(self, n: int) -> jax.Array:
        """Positions of the next n tokens: int32 [S], or [S, B] with padding; negative for padding."""
        positions = self.length + jnp.arange(n, dtype=jnp.int32)
        return positions if self.start is None else positions[:, None] - self.start

    def advance(self, layers: tuple[dict[str, jax.Array], ...], n: int) -> Self:
        """Cache with new buffers and n more tokens."""
        return dataclasses.replace(self, layers=layers, length=self.length + n)

    def check_room(self, n: int, batch: int, *, empty: bool = False) -> None:
        """Raises ValueError if n more tokens do not fit; inside a trace only shapes are checked.

        empty: also raise if the cache is not empty, or a row would hold padding only.
        """
        rows = jax.tree.leaves(self.layers)[0].shape[0]
        if batch != rows:
            raise ValueError(f"ids have batch={batch}, the cache has batch={rows}")
        room = math.inf if self.is_ring else self.max_len
        if n > room:
            raise ValueError(f"{n} tokens do not fit a cache with max_len={self.max_len}")
        if isinstance(self.length, jax.core.Tracer) or isinstance(self.start, jax.core.Tracer):
            return
        length = int(self.length)
        if empty and length:
            raise ValueError(f"prefill needs an empty cache, this one holds {length} tokens; continue it with decode()")
        text = length + n - (0 if self.start is None else int(self.start.min()))
        if text > room:
            raise ValueError(f"{text} tokens do not fit a cache with max_len={self.max_len}")
        if self.start is not None and empty and int(self.start.max()) >= n:
            raise ValueError(f"start={self.start.tolist()} must leave at least one of the {n} tokens of each row")


def unless_overrun(logits: jax.Array, cache: Cache, n: int, *, empty: bool = False) -> jax.Array:
    """Set logits [..., B, V] to NaN in rows whose n tokens do not fit; inside a trace `check_room` cannot raise."""
    text = cache.length + n if cache.start is None else cache.length + n - cache.start
    fits = jnp.logical_or(cache.is_ring, text <= cache.max_len)
    if empty:
        fits = fits & (cache.length == 0) & (text > 0)
    return jnp.where(fits[..., None], logits, jnp.nan)


def make_cache(
    layers: list[dict[str, jax.Array]], batch: int, start: jax.Array | None, limit: int | None = None
) -> Cache:
    """Empty cache with the given buffers; raises ValueError if `start` is not one integer ≥ 0 per row."""
    if start is not None:
        start = jnp.asarray(start)
        if start.shape != (batch,) or not jnp.issubdtype(start.dtype, jnp.integer):
            raise ValueError(f"start must be integers [batch={batch}], got {start.dtype}{list(start.shape)}")
        if not isinstance(start, jax.core.Tracer) and (np.asarray(start) < 0).any():
            raise ValueError(f"start={start.tolist()} counts left padding and must not be negative")
        start = jnp.array(start, jnp.int32)  # a copy: donating the cache must not donate the caller's array
    return Cache(tuple(layers), jnp.zeros((), jnp.int32), start, limit)


def without_batch(buffer: jax.Array) -> jax.Array:
    """[1, H, N, d_k] -> [H, N, d_k] by a reshape, which XLA cancels with its inverse."""
    return buffer.reshape(buffer.shape[1:])


def write(buffer: jax.Array, new: jax.Array, positions: jax.Array | None) -> jax.Array:
    """Write new [B, H, S, d_k] into buffer [B, H, N, d_k] at `positions` -> buffer.

    positions: int [S] (consecutive) or [S, B], whose negative ones are dropped; None for 0 … S-1.
    """
    new = new.astype(buffer.dtype)
    if positions is None:
        return buffer.at[:, :, : new.shape[2]].set(new)
    if positions.ndim == 1:
        single = len(buffer) == 1  # see Cache.packed
        buffer, new = (without_batch(a) if single else a for a in (buffer, new))
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, new, positions[0], axis=buffer.ndim - 2)
        buffer = jax.lax.optimization_barrier(buffer)  # keep XLA from repeating the update for each reader
        return buffer[None] if single else buffer
    slots = jnp.where(positions < 0, buffer.shape[2], positions).T  # [B, S]; N is out of range and dropped
    return jax.vmap(lambda b, n, s: b.at[:, s].set(n, mode="drop"))(buffer, new, slots)


def visible(positions: jax.Array, n_slots: int) -> jax.Array:
    """Causal mask bool [1 or B, 1, S, N] of positions [S] or [S, B]; padding attends to slot 0, which avoids NaN."""
    rows = positions[None] if positions.ndim == 1 else positions.T  # [1 or B, S]
    return (jnp.arange(n_slots) <= jnp.maximum(rows, 0)[..., None])[:, None]


def align_left(ids: jax.Array, start: jax.Array) -> jax.Array:
    """Shift left-padded ids [S, B] to position 0; ids after the end of a row's text are unspecified."""
    rows = jnp.arange(ids.shape[0])[:, None] + start  # [S, B]
    return jnp.take_along_axis(ids, jnp.minimum(rows, ids.shape[0] - 1), axis=0)
