"""RETRO's three attentions, batch-first, each with its norm and its residual.

Axes: B batch, S sequence, C chunks, L = chunk_len, N neighbors of a chunk, M tokens of a neighbor, D = d_model, H
heads of d_k features (H·d_k need not be D). G is any batch axis of attention: rows, chunks or neighbors.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.attention import attend, causal_attention, dot_product_scores, transpose_heads
from jaxmodels.cache import visible, write
from jaxmodels.layers import LayerNorm, Linear, check_sizes
from jaxmodels.rope import rotary_tables, rotate

ROTARY_BASE = 10_000


class Attention(nnx.Module):
    """Base class: LayerNorm of the queries' input, and projections with biases to heads and back.

    Raises ValueError if a size is below 1.
    """

    def __init__(self, d_model: int, n_heads: int, d_k: int, *, rngs: nnx.Rngs):
        check_sizes(d_model=d_model, n_heads=n_heads, d_k=d_k)
        self.n_heads, self.d_k = n_heads, d_k
        self.query = Linear(d_model, n_heads * d_k, rngs=rngs)
        self.key = Linear(d_model, n_heads * d_k, rngs=rngs)
        self.value = Linear(d_model, n_heads * d_k, rngs=rngs)
        self.norm = LayerNorm(d_model, rngs=rngs)
        self.output = Linear(n_heads * d_k, d_model, rngs=rngs)

    def split_heads(self, x: jax.Array) -> jax.Array:
        """[G, S, H·d_k] -> [G, S, H, d_k]."""
        return x.reshape(*x.shape[:-1], self.n_heads, self.d_k)

    def keys_and_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [G, N, D] -> keys and values, each [G, H, N, d_k]."""
        key, value = (transpose_heads(self.split_heads(linear(x))) for linear in (self.key, self.value))
        return key, value

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """W_o softmax(QKᵀ/√d_k) V: [G, S, H, d_k], [G, H, N, d_k] twice -> [G, S, D]."""
        scores = dot_product_scores(transpose_heads(query), key, 1 / math.sqrt(self.d_k))  # [G, H, S, N]
        x = transpose_heads(attend(scores, value, mask)).astype(query.dtype)  # a cache may have another dtype
        return self.join_heads(x)

    def join_heads(self, x: jax.Array) -> jax.Array:
        """Output projection: [G, S, H, d_k] -> [G, S, D]."""
        return self.output(x.reshape(*x.shape[:2], -1))


class SelfAttention(Attention):
    """h + W_o softmax(QKᵀ/√d_k) V of LN(h), causal or not; all d_k features of Q and K are rotated by position.

    Raises ValueError if a size is below 1 or d_k is odd.
    """

    def __init__(self, d_model: int, n_heads: int, d_k: int, is_causal: bool, *, rngs: nnx.Rngs):
        super().__init__(d_model, n_heads, d_k, rngs=rngs)
        if d_k % 2:
            raise ValueError(f"d_k={d_k} must be even and at least 2, as all of it is rotated by position")
        self.is_causal = is_causal

    # [retro.attention]
    def __call__(self, h: jax.Array) -> jax.Array:
        """h [B, S, D] -> [B, S, D]."""
        query, key, value = self.project(h, jnp.arange(h.shape[1]))
        if not self.is_causal:
            return h + self.attend(query, transpose_heads(key), transpose_heads(value))
        return h + self.join_heads(causal_attention(query, key, value))

    # [retro.attention]
    def project(self, h: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query and key, rotated by positions [S] or [S, B], and value, each [B, S, H, d_k]."""
        z = self.norm(h)
        positions = positions[None] if positions.ndim == 1 else positions.T  # [1 or B, S]
        cos, sin = rotary_tables(positions, self.d_k, ROTARY_BASE, jnp.promote_types(h.dtype, jnp.float32))
        query, key = (
            rotate(self.split_heads(linear(z)), cos[:, :, None], sin[:, :, None]) for linear in (self.query, self.key)
        )
        return query, key, self.split_heads(self.value(z))

    def decode(
        self, h: jax.Array, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attention of the next S tokens [B, S, D] over the cache and themselves; rotated keys are cached.

        positions: from `Cache.positions`; None if the cache is empty.
        """
        query, key, value = self.project(h, jnp.arange(h.shape[1]) if positions is None else positions)
        new = {"key": transpose_heads(key), "value": transpose_heads(value)}  # [B, H, S, d_k]
        cache = {name: write(cache[name], array, positions) for name, array in new.items()}
        if positions is None:
            return h + self.join_heads(causal_attention(query, key, value)), cache
        mask = visible(positions, cache["key"].shape[2])
        return h + self.attend(query, cache["key"], cache["value"], mask), cache


class CrossAttention(Attention):
    """e + W_o softmax(QKᵀ/√d_k) V, Q of LN(e): a neighbor's tokens attend to the chunk that it was retrieved for."""

    # [retro.cross]
    def __call__(self, e: jax.Array, h: jax.Array) -> jax.Array:
        """e [B, C, N, M, D], h [B, C, L, D] (already normalized) -> [B, C, N, M, D]."""
        b, c, n, m, d = e.shape
        query = self.split_heads(self.query(self.norm(e).reshape(b * c, n * m, d)))  # [B·C, N·M, H, d_k]
        key, value = self.keys_and_values(h.reshape(b * c, *h.shape[2:]))  # [B·C, H, L, d_k]
        return e + self.attend(query, key, value).reshape(e.shape)


class ChunkedCrossAttention(Attention):
    """Attention of each position to all neighbors' tokens of the last chunk that ends at or before the position.

    h + W_o softmax(QKᵀ/√d_k) V, Q of LN(h), the softmax over neighbors and their tokens together. The neighbors of
    chunk u serve positions (u+1)·L - 1 … (u+2)·L - 2; positions before the first of them are left unchanged.
    """

    def __init__(self, d_model: int, n_heads: int, d_k: int, chunk_len: int, *, rngs: nnx.Rngs):
        super().__init__(d_model, n_heads, d_k, rngs=rngs)
        self.chunk_len = chunk_len

    # [retro.chunked]
    def __call__(self, h: jax.Array, e: jax.Array) -> jax.Array:
        """h [B, S, D], e [B, C, N, M, D] -> [B, S, D]."""
        b, s, d = h.shape
        c, shift = e.shape[1], self.chunk_len - 1
        if c == 0:
            return h
        z = self.norm(h[:, shift:])
        z = jnp.pad(z, [(0, 0), (0, c * self.chunk_len - z.shape[1]), (0, 0)])  # [B, C·L, D]
        query = self.split_heads(self.query(z.reshape(b * c, self.chunk_len, d)))  # [B·C, L, H, d_k]
        x = self.attend(query, *self.keys_and_values_of_neighbors(e.reshape(b * c, *e.shape[2:])))  # [B·C, L, D]
        return h + jnp.pad(x.reshape(b, c * self.chunk_len, d), [(0, 0), (shift, 0), (0, 0)])[:, :s]

    # [retro.chunked]
    def keys_and_values_of_neighbors(self, e: jax.Array) -> tuple[jax.Array, jax.Array]:
        """e [G, N, M, D] -> keys and values, each [G, H, N·M, d_k]."""
        return self.keys_and_values(e.reshape(len(e), -1, e.shape[-1]))

    def decode(self, h: jax.Array, neighbors: dict[str, jax.Array], positions: jax.Array) -> jax.Array:
        """One more token [B, 1, D] at positions [1] or [1, B], over the last chunk's neighbors [B, H, N·M, d_k]."""
        x = self.attend(self.split_heads(self.query(self.norm(h))), neighbors["key"], neighbors["value"])
        served = (positions[0] >= self.chunk_len - 1).reshape(-1, 1, 1)  # [1 or B, 1, 1]
        return h + jnp.where(served, x, 0)
