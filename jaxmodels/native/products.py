"""Products of float32 rows with weights of 16, 8 or 4 bits: by the compiled kernel on a CPU, else by XLA.

Axes: R rows (all leading axes), I input features, O outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.native.groups import padded, unpacked
from jaxmodels.native.kernels import PRODUCTS, available

NARROW = ("float16", "bfloat16")  # floating weights that the kernel takes; besides int8, and uint32 for 4 bits


@jax.custom_jvp
def product(x: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """x [..., I] times weights [O, I] -> float32 [..., O].

    x: float32. weight: float16, bfloat16 or int8. scale: float32 [O], the value that 1 represents; default 1. Weights
    of 4 bits and their scales are those of `packed`. Sums are float32's; rows do not depend on each other's values.
    Other dtypes are multiplied by XLA, and so are all where the kernel is not `available`. Derivatives are computed by
    XLA.
    """
    x = padded(x) if weight.dtype == jnp.uint32 else x
    if x.dtype != jnp.float32 or weight.dtype.name not in (*NARROW, "int8", "uint32") or not available():
        return plain(x, weight, scale)
    return jax.lax.platform_dependent(x, weight, scale, cpu=kernel, default=plain)


@product.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jax.jvp(plain, primals, tangents)


def kernel(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The same by the compiled kernel."""
    rows = x.reshape(-1, x.shape[-1])  # [R, I]
    shape = jax.ShapeDtypeStruct((len(rows), len(weight)), jnp.float32)
    call = jax.ffi.ffi_call(PRODUCTS, shape, vmap_method="sequential")
    scale = jnp.zeros(0) if scale is None else scale
    return call(rows, weight, scale.astype(jnp.float32)).reshape(*x.shape[:-1], -1)  # a cast model's is narrower


def plain(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The same by XLA, with the weights widened."""
    if weight.dtype == jnp.uint32:
        assert scale is not None
        return padded(x) @ unpacked(weight, scale).astype(x.dtype).T
    y = x @ weight.astype(x.dtype).T
    return y if scale is None else y * scale.astype(y.dtype)
