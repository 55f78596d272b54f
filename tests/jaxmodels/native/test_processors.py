"""The kernels compiled for processors with narrower vectors than this one's."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import native
from jaxmodels.native import build
from tests.common import normal
from tests.jaxmodels.native.test_matmul import LAYOUTS, SIZES, given
from tests.jaxmodels.native.test_products import check, needs_kernel, weights

pytestmark = [
    pytest.mark.slow,
    needs_kernel,
    pytest.mark.skipif(build.platform.machine() != "x86_64", reason="flags of x86-64"),
]


@pytest.fixture(scope="module", params=["-march=x86-64", "-march=x86-64-v3"])
def library(request, tmp_path_factory):
    """Without F16C and AVX2; with those, but without AVX-512."""
    file = tmp_path_factory.mktemp("native") / "kernels.so"
    rest = [flag for flag in build.FLAGS if not flag.startswith("-march")]
    sources = map(str, build.SOURCES)
    headers = jax.ffi.include_dir()
    build.run([*build.find_compiler(), *rest, request.param, "-isystem", headers, *sources, "-o", str(file)])
    return ctypes.CDLL(str(file)), request.param.replace("-", "_").replace("=", "_")


def test_products_of_narrow_weights(library):
    loaded, name = library
    name = f"jaxmodels_test_products{name}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(loaded.Products), platform="cpu")
    for dtype in ("float16", "bfloat16", "int8", "uint32"):
        weight, scale = weights(dtype, 131, 67)
        for rows in (1, 3, 8, 13):
            x = normal(1, rows, 131)
            call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((rows, 67), jnp.float32))
            taken = native.padded(x) if dtype == "uint32" else x
            check(call(taken, weight, jnp.zeros(0) if scale is None else scale), x, weight, scale)
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)[:, None]
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((1, 2**16), jnp.float32))
    found = call(jnp.ones((1, 1)), jnp.asarray(every), jnp.zeros(0))
    np.testing.assert_array_equal(np.asarray(found)[0], every[:, 0].astype(np.float32))


def test_products_in_float32(library):
    loaded, name = library
    name = f"jaxmodels_test_matmul{name}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(loaded.Matmuls), platform="cpu")
    for m, n, k in SIZES:
        a, b = normal(1, m, k), normal(2, k, n)
        call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((m, n), jnp.float32))
        for left, right in LAYOUTS:
            y = call(given(a, left), given(b, right), a_transposed=left, b_transposed=right)
            check(y, a, b.T, None)
