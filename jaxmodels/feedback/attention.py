"""One step's attention over the memories of the steps before it, and the layer around it.

Axes: B batch, H heads, D = d_model = H·d_k features, n memories, P rows of a table.
In einsums: b batch, h head, j memory, d feature. These calls are the plain path; the fast one is in `step`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.layers import Dropout, FeedForward, HeadProjection, LayerNorm, Linear, split_rng


class FeedbackAttention(nnx.Module):
    """One step's attention over the memories before it, with learned relative positions.

    score(j) = (q + u)·k_j + q·E[P - n + j] + b[P - n + j], times d_k^-½; softmax over j = 0 … n-1. Row P - distance of
    E = key_pos_embeddings [P, H, d_k] and b = key_pos_bias [P, H]; u = query_pos_bias [H, d_k]; all zero-initialised.
    The query has no bias, the output has one; with `is_kv_precomputed` keys and values come in ready made, else they
    are projected here, the key without and the value with a bias.
    """

    P = 2**12

    def __init__(
        self,
        heads: int,
        d_model: int,
        dropout_prob: float = 0.1,
        *,
        is_kv_precomputed: bool = False,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or d_model % heads:
            raise ValueError(f"d_model={d_model} is not divisible by heads={heads}")
        self.heads = heads
        self.d_k = d_model // heads
        self.query = HeadProjection(d_model, heads, self.d_k, bias=False, rngs=rngs)
        self.key: Any = None if is_kv_precomputed else HeadProjection(d_model, heads, self.d_k, bias=False, rngs=rngs)
        self.value: Any = None if is_kv_precomputed else HeadProjection(d_model, heads, self.d_k, bias=True, rngs=rngs)
        self.output = Linear(d_model, d_model, rngs=rngs)
        self.dropout = Dropout(dropout_prob)
        self.scale = 1 / math.sqrt(self.d_k)
        self.key_pos_embeddings = nnx.Param(jnp.zeros((self.P, heads, self.d_k), jnp.float32))
        self.key_pos_bias = nnx.Param(jnp.zeros((self.P, heads), jnp.float32))
        self.query_pos_bias = nnx.Param(jnp.zeros((heads, self.d_k), jnp.float32))

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """query [B, D]; key and value [n, B, D], or [n, B, H, d_k] where they are precomputed -> [B, D].

        Raises ValueError where ranks do not fit or n is none or beyond the tables.
        """
        rank = 4 if self.key is None else 3
        if query.ndim != 2 or key.ndim != rank or value.ndim != rank or len(key) != len(value) or not len(key):
            given = ", ".join(str(list(x.shape)) for x in (query, key, value))
            expected = "[n, B, H, d_k]" if self.key is None else "[n, B, D]"
            raise ValueError(f"query must be [B, D], key and value {expected} with n of at least 1, got {given}")
        if len(key) > self.P:
            raise ValueError(f"{len(key)} memories given, but the position tables reach back {self.P} at most")
        if self.key is not None:
            key, value = self.key(key), self.value(value)
        n, q = len(key), self.query(query)
        scores = jnp.einsum("bhd,jbhd->bhj", q + self.query_pos_bias, key)
        scores += jnp.einsum("bhd,jhd->bhj", q, self.key_pos_embeddings[-n:]) + self.key_pos_bias[-n:].T
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32)) * self.scale
        weights = self.drop(jax.nn.softmax(scores, axis=-1).astype(value.dtype), rng)
        x = jnp.einsum("bhj,jbhd->bhd", weights, value)
        return self.output(x.reshape(len(x), -1))

    def drop(self, weights: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Dropout on [B, H, n], drawn memory by memory: a memory's draw does not depend on how many slots follow it."""
        return weights if rng is None else self.dropout(weights.transpose(2, 0, 1), rng).transpose(1, 2, 0)


class FeedbackTransformerLayer(nnx.Module):
    """x ← x + drop(attn(LN x, memory)), left out whole where there is no memory yet; then x ← x + drop(FF(LN x))."""

    def __init__(self, attn: FeedbackAttention, d_model: int, d_ff: int, dropout_prob: float = 0.1, *, rngs: nnx.Rngs):
        self.attn = attn
        self.feed_forward = FeedForward(d_model, d_ff, dropout_prob, rngs=rngs)
        self.norm_self_attn = LayerNorm(d_model, rngs=rngs)
        self.norm_ff = LayerNorm(d_model, rngs=rngs)
        self.dropout = Dropout(dropout_prob)

    def __call__(
        self, x: jax.Array, key: jax.Array | None, value: jax.Array | None, rng: jax.Array | None = None
    ) -> jax.Array:
        """x [B, D]; key and value as in the attention, or None -> [B, D]."""
        attn_rng, rng = split_rng(rng, 2)
        if key is None or value is None:
            return self._residual(x, None, rng)
        return self._residual(x, self.attn(query=self.norm_self_attn(x), key=key, value=value, rng=attn_rng), rng)

    def _residual(self, x: jax.Array, attended: jax.Array | None, rng: jax.Array | None) -> jax.Array:
        rng_attn, rng_hidden, rng_ff = split_rng(rng, 3)
        if attended is not None:
            x = x + self.dropout(attended, rng_attn)
        return x + self.dropout(self.feed_forward(self.norm_ff(x), rng_hidden), rng_ff)
