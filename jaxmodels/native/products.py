"""Products of float32 rows with weights of 16, 8, 4 or 32 bits: by the compiled kernel on a CPU, else by XLA.

Axes: R rows (all leading axes), I input features, O outputs.
"""

import ctypes
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.native.build import library, log
from jaxmodels.native.groups import padded, unpacked

TARGET, WIDE_TARGET = "jaxmodels_products", "jaxmodels_wide_products"
LEAST, MOST = 16, 512  # rows of a float32 product for which the kernel is faster than XLA
NARROW = (
    "float16",
    "bfloat16",
)  # dtypes of floating weights that the kernel takes; besides int8, and uint32 for 4 bits


def available() -> bool:
    """True if products on this process's device are computed by the kernel; compiles it if needed.

    That is on CPUs, with one device: XLA would gather the weights of several for a call that it cannot divide.
    """
    return jax.default_backend() == "cpu" and jax.local_device_count() == 1 and registered()


@functools.lru_cache(maxsize=1)
def registered() -> bool:
    """Register the kernel with XLA; False if there is none, or if its results are wrong, which is logged."""
    found = library()
    if found is None:
        return False
    try:
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(found.Products), platform="cpu")
        jax.ffi.register_ffi_target(WIDE_TARGET, jax.ffi.pycapsule(found.WideProducts), platform="cpu")
    except Exception as error:  # of jaxlib: another version of the interface
        log(f"weights in 16 and 8 bits are multiplied by XLA, as the compiled kernel was refused: {error}")
        return False
    return True


@functools.lru_cache(maxsize=1)
def wide_pays() -> bool:
    """True if the kernel was compiled for a processor on which it multiplies float32 faster than XLA does."""
    found = library()
    return found is not None and bool(ctypes.c_int32.in_dll(found, "kWideProductsPay").value)


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


@jax.custom_jvp
def wide_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., I] times weights [I, O] -> [..., O], of any dtype.

    In float32, LEAST to MOST rows are multiplied by the kernel where it is `available` and pays, all else by XLA, and
    so are derivatives.
    """
    some = x.dtype == weight.dtype == jnp.float32 and LEAST <= x.size // max(1, x.shape[-1]) <= MOST
    if not some or not available() or not wide_pays():
        return x @ weight
    return jax.lax.platform_dependent(x, weight, cpu=wide_kernel, default=jnp.matmul)


@wide_product.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jax.jvp(jnp.matmul, primals, tangents)


def wide_kernel(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same by the compiled kernel."""
    rows = x.reshape(-1, x.shape[-1])  # [R, I]
    shape = jax.ShapeDtypeStruct((len(rows), weight.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(WIDE_TARGET, shape, vmap_method="sequential")
    return call(rows, weight).reshape(*x.shape[:-1], -1)


def kernel(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The same by the compiled kernel."""
    rows = x.reshape(-1, x.shape[-1])  # [R, I]
    shape = jax.ShapeDtypeStruct((len(rows), len(weight)), jnp.float32)
    call = jax.ffi.ffi_call(TARGET, shape, vmap_method="sequential")
    scale = jnp.zeros(0) if scale is None else scale
    return call(rows, weight, scale.astype(jnp.float32)).reshape(*x.shape[:-1], -1)  # a cast model's is narrower


def plain(x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The same by XLA, with the weights widened."""
    if weight.dtype == jnp.uint32:
        assert scale is not None
        return padded(x) @ unpacked(weight, scale).astype(x.dtype).T
    y = x @ weight.astype(x.dtype).T
    return y if scale is None else y * scale.astype(y.dtype)
