"""Rotary position embeddings (arXiv 2104.09864) and the attentions that use them: on queries and keys, and on values.

Axes: S sequence, B batch, H heads, d_k features of a head, d ≤ d_k features that turn.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.attention import MultiHeadAttention, heads_first


def rotary_tables(positions: jax.Array, d: int, base: float, dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of m·θ_i for positions m of any shape [...] -> [..., d/2]; dtype float32 or wider.

    θ_i = base^(-2i/d) is rounded once, from float64. In bfloat16 position 257 would already be 256: the callers ask
    for float32 at least, whatever the features are.
    """
    theta = jnp.asarray(base ** (-np.arange(0, d, 2) / d), dtype)
    angle = positions.astype(dtype)[..., None] * theta
    return jnp.cos(angle), jnp.sin(angle)


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [..., d_k] with its first d features turned by tables that broadcast to [..., d/2]; the rest pass."""
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x.astype(cos.dtype), [half, 2 * half], axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1).astype(x.dtype)


class RotaryPositionalEmbeddings(nnx.Module):
    """Turns feature i together with feature i + d/2 by the angle m·θ_i, θ_i = base^(-2i/d), at position m.

    Only the first d features turn, the rest pass. The tables are float32, or wider when x is wider. No parameters.
    """

    def __init__(self, d: int, base: float = 10_000):
        if d < 2 or d % 2:
            raise ValueError(f"d={d}: the number of features that turn must be even and at least 2")
        self.d = d
        self.base = base

    def __call__(self, x: jax.Array, positions: jax.Array | None = None, inverse: bool = False) -> jax.Array:
        """x [S, B, H, d_k] -> the same shape; positions [S] or [S, B], None for 0 … S-1; `inverse` turns back.

        Raises ValueError where x has fewer features than turn.
        """
        if x.shape[-1] < self.d:
            raise ValueError(f"x has {x.shape[-1]} features, fewer than the d={self.d} that turn")
        if positions is None:
            positions = jnp.arange(len(x))
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        cos, sin = rotary_tables(positions, self.d, self.base, dtype)
        shape = (*positions.shape, *[1] * (3 - positions.ndim), self.d // 2)  # [S, B or 1, 1, d/2]
        return turn(x, cos.reshape(shape), (-sin if inverse else sin).reshape(shape))


def rotary_width(name: str, share: float, d_k: int) -> int:
    """How many of d_k features turn: int(d_k · share); raises ValueError when odd, zero or more than there are."""
    d = int(d_k * share)
    if d < 2 or d % 2 or d > d_k:
        raise ValueError(
            f"{name}={share} turns {d} of d_k={d_k} features; it must be an even number from 2 to d_k = d_model / heads"
        )
    return d


class RotaryPEMultiHeadAttention(MultiHeadAttention):
    """Multi-head attention whose queries and keys are turned by their positions, so scores depend on distance alone."""

    def __init__(
        self, heads: int, d_model: int, rope_percentage: float = 0.5, dropout_prob: float = 0.0, *, rngs: nnx.Rngs
    ):
        super().__init__(heads, d_model, dropout_prob, rngs=rngs)
        d_rope = rotary_width("rope_percentage", rope_percentage, self.d_k)
        self.query_rotary_pe = RotaryPositionalEmbeddings(d_rope)
        self.key_rotary_pe = RotaryPositionalEmbeddings(d_rope)

    def project(self, query, key, value, positions):
        query = self.query_rotary_pe(self.query(query), positions)
        key = self.key_rotary_pe(self.key(key), positions)
        return heads_first(query), heads_first(key), heads_first(self.value(value))


class RotaryValuePEMultiHeadAttention(RotaryPEMultiHeadAttention):
    """RoPER: o_n = Σ_i a_ni R((i - n)θ) v_i. Values are turned forwards before the sum, the result backwards after."""

    def __init__(
        self,
        heads: int,
        d_model: int,
        rope_percentage: float = 0.5,
        rope_value_percentage: float = 0.5,
        dropout_prob: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(heads, d_model, rope_percentage, dropout_prob, rngs=rngs)
        d_rope_value = rotary_width("rope_value_percentage", rope_value_percentage, self.d_k)
        self.value_rotary_pe = RotaryPositionalEmbeddings(d_rope_value)

    def project(self, query, key, value, positions):
        query = self.query_rotary_pe(self.query(query), positions)
        key = self.key_rotary_pe(self.key(key), positions)
        value = self.value_rotary_pe(self.value(value), positions)
        return heads_first(query), heads_first(key), heads_first(value)

    def restore(self, x, positions):
        return self.value_rotary_pe(x, positions, inverse=True)
