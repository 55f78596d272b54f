"""Rotary embeddings and the attentions that use them."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxmodels.rope import (
    RotaryPEMultiHeadAttention,
    RotaryPositionalEmbeddings,
    RotaryValuePEMultiHeadAttention,
    rotary_width,
)
from tests.common import assert_close, causal_mask, filled, normal, run


def turned(x, d, positions=None, base=10_000.0):
    """The definition in complex numbers, float64: feature i and feature i + d/2 are one number, turned by e^(imθ_i)."""
    x = np.asarray(x, np.float64)
    m = np.arange(len(x)) if positions is None else np.asarray(positions)
    m = m.reshape(*m.shape, *[1] * (4 - m.ndim))
    z = x[..., : d // 2] + 1j * x[..., d // 2 : d]
    z = z * np.exp(1j * m * base ** (-2 * np.arange(d // 2) / d))
    return np.concatenate([z.real, z.imag, x[..., d:]], axis=-1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("d", [2, 6, 14])
@pytest.mark.parametrize("base", [10_000, 97])
def test_turns_as_complex_numbers_do(d, base):
    x = normal(0, 11, 3, 5, 14)
    assert_close(run(RotaryPositionalEmbeddings(d, base), x), turned(x, d, base=base), 1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(11,), (11, 3)])
def test_positions(shape):
    x = normal(0, 11, 3, 5, 10)
    positions = jnp.asarray(np.random.default_rng(1).integers(-5, 3000, shape))
    assert_close(run(RotaryPositionalEmbeddings(6), x, positions), turned(x, 6, positions), 1e-11)


@pytest.mark.usefixtures("x64")
def test_inverse_turns_back():
    x, rotary = normal(0, 601, 2, 3, 10), RotaryPositionalEmbeddings(6)
    y = run(rotary, x)
    assert_close(jax.jit(lambda y: rotary(y, inverse=True))(y), x, 1e-14)
    assert (np.asarray(y)[1:, ..., :6] != np.asarray(x)[1:, ..., :6]).all()


@pytest.mark.usefixtures("x64")
def test_products_depend_on_distance_alone():
    q, k = (np.broadcast_to(normal(i, 1, 2, 3, 10), (31, 2, 3, 10)) for i in (0, 1))
    rotary = RotaryPositionalEmbeddings(10)
    scores = np.einsum("ibhd,jbhd->bhij", run(rotary, q), run(rotary, k))
    for distance in (-7, 0, 1, 13):
        diagonal = np.diagonal(scores, distance, axis1=-2, axis2=-1)
        assert_close(diagonal, np.broadcast_to(diagonal[..., :1], diagonal.shape), 1e-13)
    assert np.abs(scores[..., 0, 7] - scores[..., 0, 6]).min() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(ml_dtypes.bfloat16, 2**-8), (np.float16, 2**-11), (np.float32, 601 * 2**-24)]
)
def test_tables_are_float32_at_least(dtype, rounding):
    x = np.random.default_rng(0).normal(size=(601, 1, 2, 8)).astype(dtype)
    y = run(RotaryPositionalEmbeddings(8), x)
    assert y.dtype == dtype
    # Tables in bfloat16 would be off by 1.0 at position 512.
    np.testing.assert_allclose(np.asarray(y, np.float64), turned(x, 8), rtol=rounding, atol=4 * rounding)


@pytest.mark.usefixtures("x64")
def test_tables_are_float64_where_x_is():
    x = normal(0, 2053, 1, 1, 8)
    assert_close(run(RotaryPositionalEmbeddings(8), x), turned(x, 8), 1e-12)  # float32 tables are off by 5.7e-5


def test_numpy_and_empty_inputs():
    x = np.ones((3, 2, 1, 4), np.float32)
    np.testing.assert_array_equal(RotaryPositionalEmbeddings(4)(x), RotaryPositionalEmbeddings(4)(jnp.asarray(x)))
    chex.assert_shape(RotaryPositionalEmbeddings(4)(x[:0]), (0, 2, 1, 4))


def test_has_no_arrays():
    assert jax.tree.leaves(RotaryPositionalEmbeddings(4)) == []


@pytest.mark.parametrize("d", [-2, 0, 1, 7])
def test_refuses_an_odd_or_empty_width(d):
    with pytest.raises(ValueError, match=rf"d={d}\b"):
        RotaryPositionalEmbeddings(d)


def test_refuses_fewer_features_than_turn():
    with pytest.raises(ValueError, match=r"\b4\b.*d=6\b"):
        RotaryPositionalEmbeddings(6)(jnp.zeros((3, 1, 1, 4)))


@pytest.mark.parametrize(("share", "d_k"), [(0.5, 6), (0.3, 10), (1.0, 7), (0.0, 8), (0.1, 8), (1.5, 8), (-0.5, 8)])
def test_refuses_a_share_that_gives_no_even_width(share, d_k):
    with pytest.raises(ValueError, match=f"rope_percentage={share} .*d_k={d_k}"):
        RotaryPEMultiHeadAttention(3, 3 * d_k, share, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"rope_value_percentage={share} .*d_k={d_k}"):
        RotaryValuePEMultiHeadAttention(3, 3 * d_k, 1.0 if d_k % 2 == 0 else 0.3, share, rngs=nnx.Rngs(0))


def test_rotary_width():
    assert [rotary_width("", share, 96) for share in (0.25, 0.5, 1.0)] == [24, 48, 96]


def brute_force(attention, x, mask, d_rope, d_value):
    """o_n = Σ_i a_ni R((i - n)θ) v_i, pair by pair; d_value 0: values as they are."""
    q, k, v = (np.asarray(project(x)) for project in (attention.query, attention.key, attention.value))
    s, b, h, d_k = q.shape
    q, k = turned(q, d_rope), turned(k, d_rope)
    out = np.zeros_like(v)
    for n in range(s):
        scores = np.einsum("bhd,jbhd->jbh", q[n], k) / np.sqrt(d_k)
        scores = np.where(np.broadcast_to(mask, (s, s, b))[n][..., None], scores, -np.inf)
        a = np.exp(scores) / np.exp(scores).sum(axis=0)
        for i in range(s):
            value = turned(v[i : i + 1], d_value, [i - n])[0] if d_value else v[i]
            out[n] += a[i, ..., None] * value
    return attention.output(jnp.asarray(out.reshape(s, b, h * d_k)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("d_rope", "d_value"), [(4, 0), (10, 0), (4, 6), (10, 10)])
def test_attention_by_its_definition(d_rope, d_value):
    heads, d_k = 3, 10
    kind, shares = RotaryPEMultiHeadAttention, [d_rope / d_k]
    if d_value:
        kind, shares = RotaryValuePEMultiHeadAttention, [d_rope / d_k, d_value / d_k]
    attention, x = filled(lambda: kind(heads, 30, *shares, rngs=nnx.Rngs(0)), scale=0.3), normal(0, 7, 2, 30)
    expected = brute_force(attention, x, causal_mask(7), d_rope, d_value)
    assert_close(run(attention, query=x, key=x, value=x, mask=causal_mask(7)), expected)
    assert_close(run(attention, query=x, key=x, value=x, mask="causal"), expected)
    everything = jnp.ones((1, 7, 1), bool)
    assert_close(run(attention, query=x, key=x, value=x), brute_force(attention, x, everything, d_rope, d_value))
