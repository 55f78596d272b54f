"""Rotary position embeddings (arXiv 2104.09864), and multi-head attention that applies them.

Axes: S sequence, B batch, H heads, d_k features of a head, d ≤ d_k features that are rotated.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.attention import MultiHeadAttention, heads_first
from jaxmodels.process.texts import quoted


# [rope.tables]
def rotary_tables(positions: jax.Array, d: int, base: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of m·θ_i for positions m of any shape [...] -> two arrays [..., d/2].

    θ_i = base^(-2i/d), computed in float64 and rounded once. dtype must be float32 or wider: bfloat16 rounds position
    257 to 256.
    """
    theta = jnp.asarray(base ** (-np.arange(0, d, 2) / d), dtype)  # θ [d/2]
    angle = positions.astype(dtype)[..., None] * theta  # [..., d/2]
    return jnp.cos(angle), jnp.sin(angle)


# [rope.rotate]
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the first d features of x [..., d_k] by cos/sin; leave the rest unchanged.

    cos and sin broadcast to [..., d/2]. Computed in their dtype, returned in that of x.
    """
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x.astype(cos.dtype), [half, 2 * half], axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1).astype(x.dtype)


class RotaryPositionalEmbeddings(nnx.Module):
    """Rotate feature i with feature i + d/2 by the angle m·θ_i, θ_i = base^(-2i/d), at position m.

    Features from d on are left unchanged. The tables are float32, or wider if x is wider. No parameters. Raises
    ValueError if d is odd or below 2.
    """

    def __init__(self, d: int, base: float = 10_000):
        if d < 2 or d % 2:
            raise ValueError(f"d={d} features to rotate must be even and at least 2")
        self.d = d
        self.base = base

    # [rope.positions]
    def __call__(self, x: jax.Array, positions: jax.Array | None = None, inverse: bool = False) -> jax.Array:
        """x [S, B, H, d_k] -> the same shape.

        positions: int [S] or [S, B]; default 0 … S-1. inverse: rotate by -m·θ_i. Raises ValueError if d_k < d.
        """
        if x.shape[-1] < self.d:
            raise ValueError(f"x has {x.shape[-1]} features, fewer than the d={self.d} to rotate")
        if positions is None:
            positions = jnp.arange(len(x))
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        cos, sin = rotary_tables(positions, self.d, self.base, dtype)
        shape = (*positions.shape, *[1] * (3 - positions.ndim), self.d // 2)  # [S, B or 1, 1, d/2]
        return rotate(x, cos.reshape(shape), (-sin if inverse else sin).reshape(shape))


def rotary_width(name: str, share: float, d_k: int) -> int:
    """Number of features to rotate, int(d_k · share); raises ValueError if it is odd, below 2 or above d_k.

    name: the argument that gave `share`, for the error message.
    """
    d = int(d_k * share) if 0 < share < math.inf else 0
    if d < 2 or d % 2 or d > d_k:
        raise ValueError(
            f"{name}={share} rotates {d} of d_k={d_k} features; must be an even number from 2 to d_k = d_model / heads"
        )
    return d


def check_frequencies(key: str, theta: np.ndarray, d: int, base: float) -> None:
    """Raises ValueError, naming the key, if frequencies stored in a checkpoint are not base^(-2i/d).

    The tolerance is 1e-2, as checkpoints may hold them in 16 bits, or float16's smallest step.
    """
    expected = base ** (-np.arange(0, d, 2) / d)
    same = (
        theta.shape == expected.shape and theta.dtype.kind != "c"
    )  # before any values are converted: a file may hold any number of them
    if not same or not np.allclose(theta.astype(np.float64), expected, rtol=1e-2, atol=2.0**-24):
        shown = f"{quoted(theta.flat[:10].tolist())} of shape {list(theta.shape)}"
        raise ValueError(f"{key}={shown} must be base^(-2i/d) with base={base}, d={d}")


class RotaryPEMultiHeadAttention(MultiHeadAttention):
    """Multi-head attention with rotated queries and keys, so that scores depend on distances only.

    rope_percentage: share of d_k that is rotated. Raises ValueError as `rotary_width`.
    """

    def __init__(
        self, heads: int, d_model: int, rope_percentage: float = 0.5, dropout_prob: float = 0.0, *, rngs: nnx.Rngs
    ):
        super().__init__(heads, d_model, dropout_prob, rngs=rngs)
        d_rope = rotary_width("rope_percentage", rope_percentage, self.d_k)
        self.query_rotary_pe = RotaryPositionalEmbeddings(d_rope)
        self.key_rotary_pe = RotaryPositionalEmbeddings(d_rope)

    # [rope.attention]
    def project(
        self, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        query = self.query_rotary_pe(self.query(query), positions)  # [S, B, H, d_k]
        key = self.key_rotary_pe(self.key(key), positions)  # [N, B, H, d_k]
        return heads_first(query), heads_first(key), heads_first(self.value(value))


class RotaryValuePEMultiHeadAttention(RotaryPEMultiHeadAttention):
    """RoPER: o_n = Σ_i a_ni R((i - n)θ) v_i; values are rotated before the sum, and the sum is rotated back.

    rope_value_percentage: share of d_k that is rotated in values. Raises ValueError as `rotary_width`.
    """

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

    # [rope.values]
    def project(
        self, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        query = self.query_rotary_pe(self.query(query), positions)  # [S, B, H, d_k]
        key = self.key_rotary_pe(self.key(key), positions)  # [N, B, H, d_k]
        value = self.value_rotary_pe(self.value(value), positions)
        return heads_first(query), heads_first(key), heads_first(value)

    # [rope.values]
    def restore(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        return self.value_rotary_pe(x, positions, inverse=True)
