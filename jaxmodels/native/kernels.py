"""The compiled kernels as functions that XLA calls."""

import functools

import jax

from jaxmodels.native.build import library, log

PRODUCTS, MATMUL = "jaxmodels_products", "jaxmodels_matmul"


def available() -> bool:
    """True if products on this process's device are computed by the kernel; compiles it if needed.

    That is on CPUs, with one device: XLA would gather the weights of several for a call that it cannot divide.
    """
    return jax.default_backend() == "cpu" and jax.local_device_count() == 1 and registered()


@functools.lru_cache(maxsize=1)
def registered() -> bool:
    """Register the kernels with XLA; False if there are none, or if XLA refuses them, which is logged."""
    found = library()
    if found is None:
        return False
    try:
        for target, function in ((PRODUCTS, found.Products), (MATMUL, found.Matmuls)):
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    except Exception as error:  # of jaxlib: another version of the interface
        log(f"XLA computes all products on this CPU, as the compiled kernels were refused: {error}")
        return False
    return True
