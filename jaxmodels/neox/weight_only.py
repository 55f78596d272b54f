"""Linear maps with weights of 8 or 4 bits and activations as they are (weight-only quantization).

Axes: R rows of a call (all leading axes), I input features, O output features; stacked layers' weights have a leading
layer axis.

A decoded token reads every weight once, so that its time is that of reading them: 8 bits take a quarter of float32's
memory traffic, 4 bits an eighth, provided that no whole matrix of float32 is made on the way. On a CPU the compiled
kernel of `jaxmodels.native` computes products of float32 rows; without it, for few rows, TILE outputs at a time are
converted and multiplied by XLA.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels import native
from jaxmodels.layers import Fixed
from jaxmodels.neox.int8 import check_magnitudes, finite

TILE = 256  # outputs: 1 MB of float32 with 1,024 features, which a core's cache holds
FEW = 16  # rows; with more, the conversion of the whole matrix is a small part of the product


class WeightOnlyLinear(nnx.Module):
    """y = s (x q) + b, where q = round(w / s).

    8 bits: s is max |w| / 127 of an output's weights. weight: q, int8 [O, I]: an output's weights are contiguous.
    scale: s, float32 [O]. 4 bits: s is max |w| / 7 of 128 input features of an output. weight: uint32, eight of q in
    one, and scale: float32 [O, groups], as `jaxmodels.native.packed` makes them. bias: [O].

    A weight differs from the given one by s/2 at most, hence an output by Σ s/2 |x|, besides rounding noise of the
    product. Rows are independent of each other.

    Raises ValueError if a weight is not finite.
    """

    def __init__(self, linear: nnx.Linear, bits: int = 8):
        kernel = linear.kernel[...]
        if not isinstance(kernel, jax.core.Tracer) and not finite(kernel, jnp.float32):
            raise ValueError("a linear map has weights that are infinite or NaN: it cannot be quantized")
        weight, scale = (quantized if bits == 8 else four_bits)(kernel)
        self.weight, self.scale = Fixed(weight), Fixed(scale)
        self.bias = linear.bias
        self.dtype = linear.dtype
        self.bits = bits

    def check_loaded(self) -> None:
        """Raises ValueError if a scale, which is a magnitude, is negative or not finite."""
        check_magnitudes("scale", self.scale[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> [..., O], in the compute dtype of the linear map; by default the widest of x and bias."""
        dtype = self.dtype or (x.dtype if self.bias is None else jnp.promote_types(x.dtype, self.bias.dtype))
        y = product(x.astype(dtype), self.weight[...], self.scale[...])  # [..., O]
        return (y if self.bias is None else y + self.bias[...]).astype(dtype)


@jax.jit
def quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [..., I, O] -> int8 [..., O, I], and float32 [..., O], the value that 1 represents."""
    weight = kernel.swapaxes(-1, -2).astype(jnp.float32)
    scale = jnp.abs(weight).max(-1) / 127
    divisor = jnp.where(scale == 0, 1, scale)[..., None]
    return jnp.clip(jnp.round(weight / divisor), -127, 127).astype(jnp.int8), scale


def four_bits(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [..., I, O] -> those of `native.packed`, and their scales."""
    return native.packed(kernel.swapaxes(-1, -2))


def product(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., I] times the quantized weights [O, I] -> [..., O], in float32 at least."""
    if x.dtype == jnp.float32 and native.available():
        return native.product(x, weight, scale)
    rows = x.reshape(-1, x.shape[-1])  # [R, I]
    if len(rows) <= FEW and len(weight) > TILE:
        y = jax.lax.platform_dependent(rows, weight, scale, cpu=by_tiles, default=whole)
    else:
        y = whole(rows, weight, scale)
    return y.reshape(*x.shape[:-1], len(weight))


def whole(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """x [R, I] times the quantized weights [O, I] -> [R, O], summed in float32 at least.

    int8 is exact in every dtype of x; 4 bits are rounded to it with their scales.
    """
    grouped = weight.dtype == jnp.uint32
    x = native.padded(x) if grouped else x
    weight = (native.unpacked(weight, scale) if grouped else weight).astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    return y if grouped else y * scale.astype(wide)


def by_tiles(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """The same as `whole`, TILE outputs after each other; the last O mod TILE ones by themselves."""
    n = len(weight) // TILE
    tiles = [part[: n * TILE].reshape(n, TILE, *part.shape[1:]) for part in (weight, scale)]
    y = jax.lax.map(lambda tile: whole(x, *tile), tiles)  # [n, R, TILE]
    y = y.swapaxes(0, 1).reshape(len(x), n * TILE)
    if n * TILE == len(weight):
        return y
    return jnp.concatenate([y, whole(x, weight[n * TILE :], scale[n * TILE :])], axis=1)
