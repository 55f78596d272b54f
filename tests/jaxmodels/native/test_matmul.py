"""Products of matrices in float32: within its rounding, in every layout and size, and where they are used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import native
from jaxmodels.layers import Linear, hooks, rematerialized
from jaxmodels.native import matmul as kernels
from jaxmodels.native.matmul import LEAST_ROWS, matmul
from jaxmodels.training.step import REMAT
from tests.common import normal
from tests.jaxmodels.native.test_products import needs_kernel

# M, N, K: beside and across the sizes of panels, strips, blocks of columns and of features.
SIZES = [(1, 1, 1), (5, 3, 7), (12, 32, 16), (13, 33, 17), (131, 67, 29), (97, 521, 31), (7, 61, 1031), (389, 263, 521)]
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


def given(matrix, transposed):
    return matrix.T if transposed else matrix


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_a_product_is_rounded_as_one_of_float32(m, n, k, layout):
    a, b = normal(1, m, k), normal(2, k, n)
    found = matmul(given(a, layout[0]), given(b, layout[1]), *layout)
    wide = np.asarray(a, np.float64), np.asarray(b, np.float64)
    bound = 2**-24 * (np.sqrt(k) + 2) * (np.abs(wide[0]) @ np.abs(wide[1]))
    assert (np.abs(np.asarray(found, np.float64) - wide[0] @ wide[1]) <= bound).all()


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_product_is_one_of_xla(layout):
    for m, n, k in ((0, 5, 7), (5, 0, 7), (5, 7, 0)):
        found = matmul(given(jnp.ones((m, k)), layout[0]), given(jnp.ones((k, n)), layout[1]), *layout)
        np.testing.assert_array_equal(found, jnp.zeros((m, n)))


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_independent_of_each_other_and_of_their_number(layout):
    a, b = normal(1, 101, 1031), normal(2, 1031, 67)
    found = matmul(given(a, layout[0]), given(b, layout[1]), *layout)
    others = a.at[0].set(jnp.inf)
    np.testing.assert_array_equal(matmul(given(others, layout[0]), given(b, layout[1]), *layout)[1:], found[1:])
    np.testing.assert_array_equal(matmul(given(a[:37], layout[0]), given(b, layout[1]), *layout), found[:37])


@needs_kernel
def test_shapes_that_do_not_fit_are_refused():
    call = jax.ffi.ffi_call("jaxmodels_matmul", jax.ShapeDtypeStruct((3, 5), jnp.float32))
    for a, b in (((3, 7), (11, 5)), ((2, 7), (7, 5)), ((3, 7), (7, 4))):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            jax.block_until_ready(call(jnp.ones(a), jnp.ones(b), a_transposed=False, b_transposed=False))


@dataclasses.dataclass
class Case:
    """Function of rows and weights, and the number of calls of the kernel in it and in its gradient."""

    product: object
    forward: int
    gradient: int

    def calls(self, x, weight):
        squares = lambda x, w: (self.product(x, w) ** 2).sum()  # noqa: E731
        texts = jax.jit(self.product).lower(x, weight), jax.jit(jax.grad(squares, (0, 1))).lower(x, weight)
        return [text.as_text().count("@jaxmodels_matmul") for text in texts]


CASES = {
    "prefill": Case(lambda x, w: native.wide_product(x, w), 1, 0),
    "training": Case(lambda x, w: native.large_product(x, w), 1, 3),
}


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_products_of_enough_rows_are_the_kernel_s_where_it_pays(name, monkeypatch):
    case, weight = CASES[name], normal(2, 13, 7)
    monkeypatch.setattr(kernels, "LEAST_WORK", LEAST_ROWS * 13 * 7)
    for pays in (True, False):
        jax.clear_caches()
        monkeypatch.setattr(kernels, "pays", lambda pays=pays: pays)
        for rows, enough in ((LEAST_ROWS - 1, False), (LEAST_ROWS, True), (101, True)):
            expected = [case.forward, case.gradient] if enough and pays else [0, 0]
            assert case.calls(normal(1, rows, 13), weight) == expected
    half = case.product(normal(1, 101, 13).astype("bfloat16"), weight.astype("bfloat16"))
    assert half.dtype == jnp.bfloat16
    jax.clear_caches()


def test_a_small_product_of_a_step_compiles_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: pytest.fail("the kernel was asked for"))
    x, weight = normal(1, 101, 13), normal(2, 13, 7)
    np.testing.assert_allclose(native.large_product(x, weight), x @ weight, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [(101, 13, 7), (101, 7, 13)])
@pytest.mark.parametrize("kernel", [True, False])
def test_derivatives_are_those_of_a_product(name, sizes, kernel, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_WORK", 1)
    monkeypatch.setattr(kernels, "pays", lambda: kernel)
    jax.clear_caches()
    rows, features, outputs = sizes
    weight, x = normal(2, features, outputs), normal(1, rows, features)
    found = jax.jit(jax.grad(lambda x, w: jnp.sin(CASES[name].product(x, w)).sum(), (0, 1)))(x, weight)
    expected = jax.grad(lambda x, w: jnp.sin(x @ w).sum(), (0, 1))(x, weight)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.clear_caches()


@needs_kernel
def test_a_product_of_the_kernel_is_kept_where_products_are(monkeypatch):
    """With "layers" the backward pass computes those of the forward pass again, with "dots" it does not."""
    monkeypatch.setattr(kernels, "LEAST_WORK", 1)
    monkeypatch.setattr(kernels, "pays", lambda: True)
    layers, x = [Linear(7, 7, rngs=nnx.Rngs(i)) for i in range(2)], normal(0, 3, 11, 7)

    def loss(layers, x):
        for layer in layers:
            x = rematerialized(lambda layer, x: jnp.sin(layer(x)))(layer, x)
        return x.sum()

    calls = {}
    for name, remat in REMAT.items():
        jax.clear_caches()
        with hooks(product=native.large_product, remat=remat):
            derivative = jax.jit(lambda layers, x: jax.grad(loss, (0, 1))(layers, x))
            calls[name] = derivative.lower(layers, x).as_text().count("@jaxmodels_matmul")
    assert 0 < calls["none"] == calls["dots"] < calls["layers"]
    jax.clear_caches()


def test_other_processors_compile_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "processor", lambda: "x86_64\nflags : fma avx2 avx512")
    monkeypatch.setattr(kernels, "available", lambda: pytest.fail("the kernel was asked for"))
    monkeypatch.setattr(kernels, "LEAST_WORK", 1)
    kernels.pays.cache_clear()
    try:
        x, weight = normal(1, 101, 13), normal(2, 13, 7)
        for product in (native.wide_product, native.large_product):
            np.testing.assert_allclose(product(x, weight), x @ weight, rtol=1e-5, atol=1e-5)
    finally:
        kernels.pays.cache_clear()
