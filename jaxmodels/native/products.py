"""Products of float32 rows with narrow weights: by the compiled kernel on a CPU, else by XLA.

Axes: R rows (all leading axes), I input features, O outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.native.build import library, log

TARGET = "jaxmodels_products"
NARROW = ("float16", "bfloat16")  # dtypes of floating weights that the kernel takes; besides int8


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
    except Exception as error:  # of jaxlib: another version of the interface
        log(f"weights in 16 and 8 bits are multiplied by XLA, as the compiled kernel was refused: {error}")
        return False
    return True


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def product(x: jax.Array, weight: jax.Array, scale: jax.Array | None = None, by_output: bool = False) -> jax.Array:
    """x [..., I] times weights -> float32 [..., O].

    x: float32. weight: float16 or bfloat16 [I, O], or [O, I] with `by_output`; int8 [O, I] with `by_output` and a
    scale, float32 [O], the value that 1 represents. Each product is exact in float32 or rounded once, and sums are
    float32's. Rows are independent of each other. Derivatives are those of `plain`, computed by XLA.
    """
    if x.dtype != jnp.float32 or weight.dtype.name not in (*NARROW, "int8") or not available():
        return plain(by_output, x, weight, scale)
    return jax.lax.platform_dependent(
        x, weight, scale, cpu=functools.partial(kernel, by_output), default=functools.partial(plain, by_output)
    )


@product.defjvp
def _(by_output: bool, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(plain, by_output), primals, tangents)


def kernel(by_output: bool, x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The same by the compiled kernel."""
    rows, outputs = x.reshape(-1, x.shape[-1]), weight.shape[0 if by_output else 1]  # [R, I]
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((len(rows), outputs), jnp.float32), vmap_method="sequential")
    y = call(rows, weight, jnp.zeros(0, jnp.float32) if scale is None else scale, by_output=by_output)
    return y.reshape(*x.shape[:-1], outputs)


def plain(by_output: bool, x: jax.Array, weight: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The same by XLA, with the weights widened."""
    wide = weight.astype(x.dtype)
    y = x @ (wide.T if by_output else wide)
    return y if scale is None else y * scale.astype(y.dtype)
