"""The compiled kernel: products within float32's rounding, in every layout, dtype and number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import native
from jaxmodels.native.products import kernel, plain
from tests.common import normal

needs_kernel = pytest.mark.skipif(not native.available(), reason="the kernel cannot be compiled here")
SIZES = [(1, 1), (7, 5), (16, 32), (131, 67), (517, 2053)]  # features, outputs; more than a part of the work
ROWS = [1, 2, 3, 5, 8, 9, 13, 101]  # below and above those that are multiplied without a widened copy


def weights(dtype, inputs, outputs):
    """Weights [O, I] and their scales; uint32: those of `packed`."""
    if dtype == "uint32":
        return native.packed(normal(2, outputs, inputs))
    if dtype == "int8":
        integers = jax.random.randint(jax.random.key(2), (outputs, inputs), -127, 128).astype(jnp.int8)
        return integers, jax.random.uniform(jax.random.key(3), (outputs,), minval=0.01)
    return normal(2, outputs, inputs).astype(dtype), None


def check(y, x, weight, scale):
    """y [R, O] is x [R, I] times weight [O, I], each sum of I products within the bound of its roundings."""
    x, wide = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    if weight.dtype == jnp.uint32:
        wide = np.asarray(native.unpacked(weight, scale), np.float64)[:, : x.shape[-1]]
    else:
        wide = wide if scale is None else wide * np.asarray(scale, np.float64)[:, None]
    bound = 2**-24 * (np.sqrt(x.shape[-1]) + 2) * (np.abs(x) @ np.abs(wide).T)
    assert (np.abs(np.asarray(y, np.float64) - x @ wide.T) <= bound).all()


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "uint32"])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_product_is_rounded_as_one_of_float32(dtype, inputs, outputs):
    weight, scale = weights(dtype, inputs, outputs)
    for rows in ROWS:
        x = normal(1, rows, inputs)
        check(kernel(native.padded(x) if dtype == "uint32" else x, weight, scale), x, weight, scale)


@needs_kernel
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits_is_widened_exactly(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).reshape(1, -1)  # NaN, float16's subnormal ones too
    for rows in (1, 9):
        with np.errstate(all="ignore"):
            found = np.asarray(kernel(jnp.ones((rows, 1)), jnp.asarray(every.T), None))
        wide = every.astype(np.float32)
        wide[np.abs(wide) < np.finfo(np.float32).tiny] = 0  # of bfloat16: XLA's threads take them for zeros
        np.testing.assert_array_equal(found, np.broadcast_to(wide, found.shape))


@needs_kernel
@pytest.mark.parametrize("rows", [3, 11])
def test_rows_are_independent_of_each_other(rows):
    weight, _ = weights("float16", 131, 67)
    x = normal(1, rows, 131)
    others = x.at[0].set(jnp.inf)
    np.testing.assert_array_equal(kernel(others, weight, None)[1:], kernel(x, weight, None)[1:])


@needs_kernel
def test_derivatives_are_those_of_xla_s_product():
    weight, x = normal(2, 7, 13).astype("float16"), normal(1, 2, 3, 13)
    found = jax.grad(lambda x, w: (native.product(x, w) ** 2).sum(), (0, 1))(x, weight)
    expected = jax.grad(lambda x, w: (plain(x, w, None) ** 2).sum(), (0, 1))(x, weight)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), rtol=2e-3, atol=1e-4)
    integers, scale = weights("int8", 13, 7)
    grad = jax.grad(lambda x: native.product(x, integers, scale).sum())(x)
    np.testing.assert_allclose(grad, jnp.broadcast_to(scale @ integers, x.shape), rtol=1e-5, atol=1e-4)


@needs_kernel
def test_it_is_called_in_jit_vmap_and_for_leading_axes():
    weight, x = normal(2, 7, 13).astype("float16"), normal(1, 2, 3, 13)
    expected = plain(x, weight, None)
    np.testing.assert_allclose(jax.jit(native.product)(x, weight), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: native.product(x, weight))(x), expected, rtol=1e-5, atol=1e-5)
    assert "jaxmodels_products" in jax.jit(native.product).lower(x, weight).as_text()


@needs_kernel
@pytest.mark.parametrize(
    ("features", "weight", "scale", "message"),
    [
        (7, jnp.ones((5, 13), "float16"), 5, "do not fit"),
        (7, jnp.ones((5, 7), "float16"), 3, "scale"),
        (7, jnp.ones((5, 7, 1), "float16"), 5, "matrices"),
        (128, jnp.ones((5, 17), "uint32"), 5, "do not fit"),
        (8, jnp.ones((5, 1), "uint32"), 5, "128"),
        (256, jnp.ones((5, 32), "uint32"), 5, "scale"),
        (256, jnp.ones((5, 32), "uint32"), 0, "scale"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(features, weight, scale, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(kernel(jnp.ones((3, features)), weight, jnp.ones(scale)))


@needs_kernel
@pytest.mark.parametrize("dtype", ["int8", "uint32"])
def test_scales_of_16_bits_are_widened(dtype):
    weight, scale = weights(dtype, 131, 67)
    x, scale = native.padded(normal(1, 3, 131)), scale.astype("bfloat16")
    x = x if dtype == "uint32" else x[:, :131]
    check(kernel(x, weight, scale), x, weight, scale)


def test_without_the_kernel_xla_computes_the_same(monkeypatch):
    monkeypatch.setattr("jaxmodels.native.products.available", lambda: False)
    x = normal(1, 3, 131)
    for dtype in ("float16", "bfloat16", "int8", "uint32"):
        weight, scale = weights(dtype, 131, 67)
        check(native.product(x, weight, scale), x, weight, scale)


def test_other_dtypes_are_left_to_xla(x64):
    weight, x = normal(2, 7, 13).astype("float16"), normal(1, 3, 13)
    assert native.product(x.astype("float64"), weight).dtype == jnp.float64
    assert native.product(x.astype("float32"), weight.astype("float32")).dtype == jnp.float32
