"""Weights of 4 bits, with one scale for each group of 128 input features, as the compiled kernel reads them.

Axes: O output features, I input features, I' = I rounded up to a multiple of GROUP, with weights of zero.
"""

import jax
import jax.numpy as jnp

GROUP = 128  # input features
LARGEST = 7  # integers are -7 to 7
IN_WORD = 8  # weights of a uint32
LANES = GROUP // IN_WORD


@jax.jit
def packed(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round weights [..., O, I] to 4 bits -> uint32 [..., O, I'/8], and the values that 1 represents.

    Those are float32 [..., O, I'/GROUP], max |w| / 7 of a group. Bits 4k to 4k + 3 of a group's word l are 8 + the
    integer of its feature 16k + l: with one shift, 16 words give 16 neighboring weights.
    """
    groups = padded(weight.astype(jnp.float32))
    groups = groups.reshape(*groups.shape[:-1], -1, GROUP)  # [..., O, G, GROUP]
    scale = jnp.abs(groups).max(-1) / LARGEST  # [..., O, G]
    divisor = jnp.where(scale == 0, 1, scale)[..., None]
    integers = jnp.clip(jnp.round(groups / divisor), -LARGEST, LARGEST).astype(jnp.int32) + 8
    integers = integers.astype(jnp.uint32).reshape(*scale.shape, IN_WORD, LANES)
    words = (integers << shifts()).sum(-2, dtype=jnp.uint32)  # [..., O, G, LANES]
    return words.reshape(*words.shape[:-2], -1), scale


def unpacked(words: jax.Array, scale: jax.Array) -> jax.Array:
    """Inverse of `packed`, but for the rounding: float32 [..., O, I']."""
    integers = (words.reshape(*scale.shape, 1, LANES) >> shifts()) & 15  # [..., O, G, IN_WORD, LANES]
    weight = (integers.astype(jnp.int32) - 8).astype(jnp.float32) * scale[..., None, None]
    return weight.reshape(*scale.shape[:-1], -1)


def shifts() -> jax.Array:
    """Position of a word's weights in bits, [IN_WORD, 1]."""
    return 4 * jnp.arange(IN_WORD, dtype=jnp.uint32)[:, None]


def padded(x: jax.Array) -> jax.Array:
    """x [..., I] with zeros behind it, [..., I']."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP)])
