"""LLM.int8 (arXiv 2208.07339): linear maps with 8-bit weights, and outlier features computed in 16 bits.

Axes: R rows of a call (all leading axes), I input features, O output features; stacked layers' weights have a leading
layer axis.

Quantization saves memory. It saves time only on hardware with fast int8 matrix products.

For inference only, as integer weights have no gradient. `jax.grad` over the model's arrays raises TypeError, and so
does differentiating through one of the products.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.layers import Fixed
from jaxmodels.neox.block import Block, Linear

LINEARS = (("attention", "qkv_lin"), ("attention", "output"), ("ffn", "dense_h_h4"), ("ffn", "dense_h4_h"))
GATHERED = 64  # up to this many outlier features are gathered for the 16-bit product; with more it takes all features


class Int8Linear(nnx.Module):
    """y = s_x s_w / 127² · (q_x q_w) + Σ_outliers x ŵ + b, where q = round(127 x / s) and s is max |x| of a row.

    kernel: q_w, int8 [I, O]; absmax: s_w, float16 [O], exact because it is one of the weights; bias [O].
    Each row of x is quantized in the call, from float16, and q_x q_w is summed in int32. An input feature is an outlier
    if any row of the call reaches the threshold in it: outliers are left out of q_x and computed in float16, with
    ŵ = q_w s_w / 127. s_x is taken over the elements below the threshold. Threshold 0: no outliers. The rest is
    computed in float32. Inputs beyond float16's range (65,504) give infinite or NaN outputs in their row.

    Outliers depend on all rows of a call: with a threshold, a token is rounded differently if it is decoded alone, in a
    forward pass over its text, or in a batch with other texts. At threshold 0 rows are independent.

    Raises ValueError if a weight is not finite in float16.
    """

    def __init__(self, linear: nnx.Linear, threshold: float):
        given = linear.kernel[...]
        if not isinstance(given, jax.core.Tracer) and not finite(given, jnp.float16):
            raise ValueError("a linear map has weights beyond float16's ±65,504, or NaN: it cannot be quantized")
        kernel, absmax = quantized(given)
        self.kernel, self.absmax = Fixed(kernel), Fixed(absmax)
        self.bias = linear.bias
        self.dtype = linear.dtype
        self.threshold = threshold

    def check_loaded(self) -> None:
        """Raises ValueError if a scale, which is a magnitude, is negative or not finite."""
        check_magnitudes("absmax", self.absmax[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> [..., O], in the compute dtype of the linear map; by default the widest of x and bias."""
        y = product(x, self.kernel[...], self.absmax[...], self.threshold)  # [..., O]
        if self.bias is None:
            return y.astype(self.dtype or x.dtype)
        return (y + self.bias[...]).astype(self.dtype or jnp.promote_types(x.dtype, self.bias.dtype))


def check_magnitudes(name: str, array: jax.Array) -> None:
    """Raises ValueError if an array has a number that is negative or not finite."""
    if not ((array >= 0) & jnp.isfinite(array)).all():
        raise ValueError(f"{name} has numbers that are negative, infinite or NaN; it holds magnitudes of weights")


@functools.partial(jax.jit, static_argnums=1)
def finite(kernel: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """True if all weights are finite in a dtype. The maximum would not tell: XLA drops NaN from a long one on CPUs."""
    return jnp.isfinite(kernel.astype(dtype)).all()


@jax.jit
def quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [..., I, O] -> int8 [..., I, O], and float16 [..., O], the magnitude that 127 represents."""
    return rounded(kernel.astype(jnp.float16), axis=-2)


def rounded(x: jax.Array, axis: int, counted: jax.Array | bool = True) -> tuple[jax.Array, jax.Array]:
    """Round float16 x to int8, scaled by the largest magnitude along an axis; returns both.

    counted: mask of the elements to use; the others become 0.
    """
    x = jnp.where(counted, x, 0)
    absmax = jnp.abs(x).max(axis)
    scale = jnp.expand_dims(jnp.where(absmax == 0, 1, absmax), axis).astype(jnp.float32)
    # 127 times a float16 is exact in float32, so that the quotient is rounded once and ties are the same everywhere.
    return jnp.round(127 * x.astype(jnp.float32) / scale).astype(jnp.int8), absmax


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def product(x: jax.Array, kernel: jax.Array, absmax: jax.Array, threshold: float) -> jax.Array:
    """x [..., I] times the quantized weights [I, O] -> float32 [..., O]."""
    x = x.astype(jnp.float16)
    if not threshold:
        return int8_product(*rounded(x, -1), kernel, absmax)
    large = jnp.abs(x).astype(jnp.float32) >= threshold  # [..., I]
    features = large.any(range(x.ndim - 1))  # [I]
    q, row_absmax = rounded(x, -1, ~large)
    q = jnp.where(features, 0, q)
    return int8_product(q, row_absmax, kernel, absmax) + outliers(x, features, kernel, absmax)


@product.defjvp
def _(*_: Any) -> Any:
    raise TypeError("an int8 model has no gradients, because rounding is flat; train the model before quantizing it")


def int8_product(q: jax.Array, row_absmax: jax.Array, kernel: jax.Array, absmax: jax.Array) -> jax.Array:
    """int8 q [..., I] times int8 weights [I, O], summed in int32 -> float32 [..., O]."""
    y = jax.lax.dot_general(q, kernel, (((q.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * (row_absmax.astype(jnp.float32)[..., None] * (absmax.astype(jnp.float32) / 127**2))


def outliers(x: jax.Array, features: jax.Array, kernel: jax.Array, absmax: jax.Array) -> jax.Array:
    """Contribution of the outlier features: x float16 [..., I], features bool [I] -> float32 [..., O].

    Their number is known on the device only, which selects one of three branches. None: common in small models. Few, as
    in large models (about 0.1 %): gathered into a buffer of GATHERED features. Many: a product with all weights, which
    is slow.
    """
    n, size = features.sum(), min(GATHERED, features.size)

    def none() -> jax.Array:
        return jnp.zeros((*x.shape[:-1], kernel.shape[-1]), jnp.float32)

    def few() -> jax.Array:
        (chosen,) = jnp.nonzero(features, size=size, fill_value=0)
        return float16_product(jnp.where(jnp.arange(size) < n, x[..., chosen], 0), kernel[chosen])

    def many() -> jax.Array:
        return float16_product(jnp.where(features, x, 0), kernel)

    def float16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        weights = (kernel * (absmax.astype(jnp.float32) / 127)).astype(jnp.float16)
        return jnp.matmul(x, weights, preferred_element_type=jnp.float32)

    return jax.lax.switch((n > 0).astype(jnp.int32) + (n > size), [none, few, many])


def with_linears(block: Block, make: Callable[[nnx.Linear], nnx.Module]) -> Block:
    """Copy of a block, or of stacked ones, with `make` applied to its linear maps.

    Raises ValueError if a linear map is of another class: what it adds (LoRA) would be lost.
    """
    block = jax.tree.map(lambda array: array, block)
    for owner, name in LINEARS:
        part = getattr(block, owner, None)
        setattr(part, name, make(plain_linear(getattr(part, name, None), f"{owner}.{name}", part is None)))
    return block


def plain_linear(linear: Any, name: str, absent: bool = False) -> nnx.Linear:
    """The linear map; raises ValueError with its name in the model if it is of another class."""
    if type(linear) not in (Linear, nnx.Linear):
        kind = type(None if absent else linear).__name__
        raise ValueError(f"{name} is a {kind}; it must be a Linear to be quantized")
    assert isinstance(linear, nnx.Linear)
    return linear
