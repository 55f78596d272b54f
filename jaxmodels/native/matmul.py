"""Products of matrices in float32 by the compiled kernel, where it is faster than XLA.

Axes: R rows (all leading axes), I input features, O outputs.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.native.build import processor
from jaxmodels.native.kernels import MATMUL, available

LEAST_ROWS = 16  # of a product that is computed by the kernel; fewer are limited by the speed of memory
LEAST_WORK = 1 << 27  # multiplications of a `large_product`; small models compile no kernel


@functools.lru_cache(maxsize=1)
def pays() -> bool:
    """True for a processor on which the kernel is known to multiply faster than XLA does."""
    return re.search(r"\bavx512f\b", processor()) is not None


def is_faster(x: jax.Array, weight: jax.Array) -> bool:
    """True if the kernel multiplies x [R, I] by weights [I, O], on one CPU and for float32; compiles it if needed."""
    some = x.dtype == weight.dtype == jnp.float32 and len(x) >= LEAST_ROWS and weight.size > 0
    return some and pays() and available()


def matmul(a: jax.Array, b: jax.Array, a_transposed: bool = False, b_transposed: bool = False) -> jax.Array:
    """a [M, K] times b [K, N] -> [M, N] by the kernel, in float32. Transposed ones are [K, M] and [N, K]."""
    shape = a.shape[a_transposed], b.shape[not b_transposed]
    call = jax.ffi.ffi_call(MATMUL, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return call(a, b, a_transposed=a_transposed, b_transposed=b_transposed)


@jax.custom_jvp
def wide_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [R, I] times weights [I, O], of any dtype, by the kernel where that is faster. Derivatives are XLA's."""
    return by_kernel(x, weight) if is_faster(x, weight) else x @ weight


@wide_product.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jax.jvp(jnp.matmul, primals, tangents)


def by_kernel(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same by the kernel if the program is compiled for a CPU."""
    return jax.lax.platform_dependent(x, weight, cpu=matmul, default=jnp.matmul)


@jax.custom_vjp
def large_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [R, I] times weights [I, O] for training and scoring on one CPU; without forward derivatives.

    The kernel computes products of at least LEAST_WORK where it is faster, and the two of their derivatives. XLA
    computes the gradient of other weights in the order that is faster on a CPU, the narrower matrix first.
    """
    return by_kernel(x, weight) if is_work(x, weight) else x @ weight


def is_work(x: jax.Array, weight: jax.Array) -> bool:
    """True if the kernel computes a `large_product`."""
    return x.size * weight.shape[-1] >= LEAST_WORK and is_faster(x, weight)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return large_product(x, weight), (x, weight)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    if is_work(x, weight):
        return matmul(dy, weight, b_transposed=True), matmul(x, dy, a_transposed=True)
    # The barrier keeps XLA from exchanging the two.
    narrow = x.shape[-1] < dy.shape[-1]
    return dy @ weight.T, x.T @ dy if narrow else jax.lax.optimization_barrier(dy.T @ x).T


large_product.defvjp(_forward, _backward)
