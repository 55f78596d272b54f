"""Feedback attention of one step over the memories of earlier steps, and the layer around it.

Axes: B batch, H heads, D = d_model = H·d_k features, n memories, N slots, P rows of a table.
In einsums: b batch, h head, j memory or slot, d feature.

The plain path passes memories as arrays. The fast path (`step`) passes `Slots` as the key; the layer hands them to its
attention like any other key, so that both paths call the same modules.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.layers import Dropout, FeedForward, HeadProjection, LayerNorm, Linear, split_rng


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Projected keys in slots of memory, of which a step sees some; a key of `FeedbackAttention`'s call.

    key: [B, H, N, d_k]; slot j holds the latest earlier position p with p mod N = j. visible: bool [N] or [B, 1, N].
    position: int, scalar or [B]. The attention's tables must hold the rows of the distances N … 1; see `step.reach`.
    """

    key: jax.Array
    visible: jax.Array
    position: jax.Array


class FeedbackAttention(nnx.Module):
    """Attention of one step over the memories of earlier steps, with learned relative positions.

    score(j) = (q + u)·k_j + q·E[P - n + j] + b[P - n + j], times d_k^-½; softmax over j = 0 … n-1. Row P - distance of
    E = key_pos_embeddings [P, H, d_k] and b = key_pos_bias [P, H]; u = query_pos_bias [H, d_k]; all start at zero.
    The output projection has a bias, the query's has none. With `is_kv_precomputed` the call takes projected keys and
    values; else they are projected here, the value with a bias, the key without. Raises ValueError if d_model is not
    divisible by heads.
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

    def __call__(
        self, query: jax.Array, key: jax.Array | Slots, value: jax.Array, rng: jax.Array | None = None
    ) -> jax.Array:
        """query [B, D]; key and value [n, B, D], or [n, B, H, d_k] if they are precomputed -> [B, D].

        With `Slots` as key, value is [B, H, N, d_k]. Raises ValueError if ranks do not fit, or n is 0 or beyond the
        tables.
        """
        if isinstance(key, Slots):
            return attend(self, query, key.key, value, key.visible, key.position, rng)
        rank = 4 if self.key is None else 3
        if query.ndim != 2 or key.ndim != rank or value.ndim != rank or len(key) != len(value) or not len(key):
            given = ", ".join(str(list(x.shape)) for x in (query, key, value))
            expected = "[n, B, H, d_k]" if self.key is None else "[n, B, D]"
            raise ValueError(f"query must be [B, D], key and value {expected} with n of at least 1, got {given}")
        if len(key) > self.P:
            raise ValueError(f"{len(key)} memories given; the position tables reach back P={self.P} at most")
        # [feedback.attention]
        if self.key is not None:
            key, value = self.key(key), self.value(value)  # [n, B, H, d_k]
        n, q = len(value), self.query(query)  # [B, H, d_k]
        scores = jnp.einsum("bhd,jbhd->bhj", q + self.query_pos_bias, key)  # [B, H, n]
        scores += jnp.einsum("bhd,jhd->bhj", q, self.key_pos_embeddings[-n:]) + self.key_pos_bias[-n:].T
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32)) * self.scale
        weights = self.drop(jax.nn.softmax(scores, axis=-1).astype(value.dtype), rng)
        x = jnp.einsum("bhj,jbhd->bhd", weights, value)  # [B, H, d_k]
        return self.output(x.reshape(len(x), -1))

    def drop(self, weights: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Dropout on [B, H, n], drawn with the memory axis first, so that a memory's mask does not depend on n."""
        return weights if rng is None else self.dropout(weights.transpose(2, 0, 1), rng).transpose(1, 2, 0)


# [feedback.slots]
def attend(
    attn: FeedbackAttention,
    z: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    position: jax.Array,
    rng: jax.Array | None,
) -> jax.Array:
    """Attention with queries from z [B, D] over slots [B, H, N, d_k] -> [B, D]; zero if no slot is visible.

    Masked scores are finite: with -inf, a row without visible slots would have NaN outputs and gradients.
    """
    q = attn.query(z)  # [B, H, d_k]
    scores = jnp.einsum("bhd,bhjd->bhj", (q + attn.query_pos_bias) * attn.scale, key)  # [B, H, N]
    by_distance = jnp.einsum("bhd,hjd->bhj", q, attn.key_pos_embeddings[...]) + attn.key_pos_bias[...]  # [B, H, N]
    scores = scores + roll_to_slots(by_distance, position)
    scores = jnp.where(visible, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    x = jnp.einsum("bhj,bhjd->bhd", attn.drop(weights, rng), value)  # [B, H, d_k]
    return attn.output(x.reshape(z.shape)) * visible.any(axis=-1)


# [feedback.slots]
def roll_to_slots(scores: jax.Array, position: jax.Array) -> jax.Array:
    """Roll scores [B, H, N] of the distances N … 1 to the slots at those distances: (j - position) mod N."""
    if position.ndim:
        return jax.vmap(lambda row, p: jnp.roll(row, p, axis=-1))(scores, position)
    return jnp.roll(scores, position, axis=-1)


class FeedbackTransformerLayer(nnx.Module):
    """x ← x + drop(attn(LN x, memory)), skipped at the first step, which has no memory; then x ← x + drop(FF(LN x))."""

    def __init__(self, attn: FeedbackAttention, d_model: int, d_ff: int, dropout_prob: float = 0.1, *, rngs: nnx.Rngs):
        self.attn = attn
        self.feed_forward = FeedForward(d_model, d_ff, dropout_prob, rngs=rngs)
        self.norm_self_attn = LayerNorm(d_model, rngs=rngs)
        self.norm_ff = LayerNorm(d_model, rngs=rngs)
        self.dropout = Dropout(dropout_prob)

    # [feedback.layer]
    def __call__(
        self, x: jax.Array, key: jax.Array | Slots | None, value: jax.Array | None, rng: jax.Array | None = None
    ) -> jax.Array:
        """x [B, D]; key and value as in the attention, or None if there is no memory -> [B, D]."""
        attn_rng, rng = split_rng(rng, 2)
        if key is None or value is None:
            return self._residual(x, None, rng)
        return self._residual(x, self.attn(query=self.norm_self_attn(x), key=key, value=value, rng=attn_rng), rng)

    # [feedback.layer]
    def _residual(self, x: jax.Array, attended: jax.Array | None, rng: jax.Array | None) -> jax.Array:
        rng_attn, rng_hidden, rng_ff = split_rng(rng, 3)
        if attended is not None:
            x = x + self.dropout(attended, rng_attn)
        return x + self.dropout(self.feed_forward(self.norm_ff(x), rng_hidden), rng_ff)
