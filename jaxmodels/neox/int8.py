"""LLM.int8 (arXiv 2208.07339): a model's blocks with 8-bit weights, their outlier features apart in 16 bits.

Axes: R rows of a call (all its leading axes), I features in, O features out; a stacked layer's weights have a leading
layer axis.

What becomes smaller is memory. Whether it also becomes faster is the compiler's matter: int8 products are for hardware
that has them.

For inference only: integer weights have no gradient. `jax.grad` over the model's arrays raises TypeError, and so does
whatever differentiates through one of the products.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.layers import Fixed
from jaxmodels.neox.model import Block, NeoX

LINEARS = (("attention", "qkv_lin"), ("attention", "output"), ("ffn", "dense_h_h4"), ("ffn", "dense_h4_h"))
GATHERED = 64  # outlier features that a call computes apart at the cost of so many columns; beyond them, of all


class Int8Linear(nnx.Module):
    """y = s_x s_w / 127² · (q_x q_w) + Σ_outliers x ŵ + b, where q = round(127 x / s) and s is max |x| of a row.

    kernel: q_w, int8 [I, O]; absmax: s_w, float16 [O], which is exact: it is one of the weights; bias [O].
    Rows of x are quantised as they come, from float16, and q_x q_w is summed in int32. Input features in which any row
    of the call reaches the threshold are outliers: they are left out of q_x and computed apart in float16, with
    ŵ = q_w s_w / 127. A row's s_x is over its elements below the threshold. Threshold 0: there are no outliers.
    The rest is in float32. What leaves float16 (beyond 65,504) gives infinite or NaN outputs in its row.

    Which features are outliers depends on the call's rows: with a threshold, a token decoded alone is rounded otherwise
    than in a forward pass over the text, and than beside other texts. At threshold 0 each row is on its own.
    """

    def __init__(self, linear: nnx.Linear, threshold: float):
        """Raises ValueError where the linear map's weights are not finite in float16."""
        kernel, absmax = quantised(linear.kernel[...])
        if not isinstance(absmax, jax.core.Tracer) and not jnp.isfinite(absmax).all():
            raise ValueError("a linear map has weights beyond float16's ±65,504, or NaN: it cannot be quantised")
        self.kernel, self.absmax = Fixed(kernel), Fixed(absmax)
        assert linear.bias is not None
        self.bias = linear.bias
        self.dtype = linear.dtype
        self.threshold = threshold

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> [..., O], in the dtype that the linear map computed in."""
        dtype = self.dtype or jnp.promote_types(x.dtype, self.bias.dtype)
        y = product(x, self.kernel[...], self.absmax[...], self.threshold)
        return (y + self.bias[...]).astype(dtype)


@jax.jit
def quantised(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [..., I, O] as int8, and the largest magnitude [..., O] that stands for 127, float16."""
    return rounded(kernel.astype(jnp.float16), axis=-2)


def rounded(x: jax.Array, axis: int, counted: jax.Array | bool = True) -> tuple[jax.Array, jax.Array]:
    """float16 x as int8, and the largest magnitude along the axis; elements that are not counted become 0."""
    x = jnp.where(counted, x, 0)
    absmax = jnp.abs(x).max(axis)
    scale = jnp.expand_dims(jnp.where(absmax == 0, 1, absmax), axis).astype(jnp.float32)
    # The product of 127 and a float16 is exact, so that the quotient is rounded once, and ties are ties everywhere.
    return jnp.round(127 * x.astype(jnp.float32) / scale).astype(jnp.int8), absmax


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def product(x: jax.Array, kernel: jax.Array, absmax: jax.Array, threshold: float) -> jax.Array:
    """x [..., I] times the quantised weights [I, O] -> float32 [..., O]."""
    x = x.astype(jnp.float16)
    if not threshold:
        return whole_numbers(*rounded(x, -1), kernel, absmax)
    large = jnp.abs(x).astype(jnp.float32) >= threshold
    features = large.any(range(x.ndim - 1))
    q, row_absmax = rounded(x, -1, ~large)
    q = jnp.where(features, 0, q)
    return whole_numbers(q, row_absmax, kernel, absmax) + outliers(x, features, kernel, absmax)


@product.defjvp
def _(*_: Any) -> Any:
    raise TypeError("an int8 model has no gradients: rounding is flat; train the model before it is quantised")


def whole_numbers(q: jax.Array, row_absmax: jax.Array, kernel: jax.Array, absmax: jax.Array) -> jax.Array:
    """int8 q [..., I] times int8 weights [I, O], summed in int32 -> float32 [..., O]."""
    y = jax.lax.dot_general(q, kernel, (((q.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * (row_absmax.astype(jnp.float32)[..., None] * (absmax.astype(jnp.float32) / 127**2))


def outliers(x: jax.Array, features: jax.Array, kernel: jax.Array, absmax: jax.Array) -> jax.Array:
    """The outlier features' part of the product: x float16 [..., I], features bool [I] -> float32 [..., O].

    Their number is known on the device alone, so one of three programs runs there: nothing where there are none, the
    common case of small models; where they are few, as in the large ones (some 0.1 % of all), their columns alone,
    brought into a buffer of GATHERED; and where they are more, the whole weights, which is right but slow.
    """
    n, size = features.sum(), min(GATHERED, features.size)

    def none() -> jax.Array:
        return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), jnp.float32)

    def few() -> jax.Array:
        (chosen,) = jnp.nonzero(features, size=size, fill_value=0)
        return sixteen_bits(jnp.where(jnp.arange(size) < n, x[..., chosen], 0), kernel[chosen])

    def many() -> jax.Array:
        return sixteen_bits(jnp.where(features, x, 0), kernel)

    def sixteen_bits(x: jax.Array, kernel: jax.Array) -> jax.Array:
        weights = (kernel * (absmax.astype(jnp.float32) / 127)).astype(jnp.float16)
        return jnp.matmul(x, weights, preferred_element_type=jnp.float32)

    return jax.lax.switch((n > 0).astype(jnp.int32) + (n > size), [none, few, many])


def quantize(model: NeoX, threshold: float = 6.0) -> NeoX:
    """A model whose blocks' linear maps are `Int8Linear`; everything else is shared with the one given.

    threshold: input features of this magnitude are computed apart, 0 for none. Stacked layers stay so. Raises
    ValueError for another kind of model, for one that is quantised already, for a threshold that is no number from 0
    on, and for weights that are not finite in float16.
    """
    if not isinstance(model, NeoX):
        raise ValueError(f"model is a {type(model).__name__}: quantize is for NeoX")
    if model.int8_threshold is not None:
        raise ValueError(f"the model is quantised already, with threshold={model.int8_threshold}")
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold} must be 0 (no outliers) or more, and finite")
    layers = [model.layers] if model.is_stacked else model.blocks()
    new = [with_int8(layer, float(threshold)) for layer in layers]
    return model.with_layers(new[0] if model.is_stacked else nnx.List(new))


def with_int8(block: Block, threshold: float) -> Block:
    """A copy of a block, or of stacked ones, around int8 linear maps."""
    block = jax.tree.map(lambda array: array, block)
    for owner, name in LINEARS:
        part = getattr(block, owner)
        setattr(part, name, Int8Linear(getattr(part, name), threshold))
    return block
