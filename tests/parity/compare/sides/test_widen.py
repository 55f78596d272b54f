"""Runs with nothing narrowed: every way in which a JAX function or a PyTorch module narrows inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from jax import lax

from parity.compare.sides.wide_torch import widened
from parity.compare.sides.widen import Widened

X = np.random.default_rng(0).standard_normal((3, 5, 8))


@jax.custom_vjp
def squared(x):
    return x**2


squared.defvjp(lambda x: (x**2, x.astype(jnp.bfloat16).astype(x.dtype)), lambda x, g: (2 * x * g,))


def rms(x):
    return jax.nn.softmax(x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6), -1) * 0.3


def scanned(x):
    def step(carry, row):
        carry = jnp.tanh(carry * 0.9 + row)
        return carry, carry * 2

    return lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)[1]


def attention(x):
    x = x[:, :, None]
    weights = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), jnp.einsum("bqhd,bkhd->bhqk", x, x) * 0.25, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), x)


FUNCTIONS = {
    "norm and softmax": rms,
    "checkpoint": lambda x: jax.checkpoint(rms)(x),
    "scan": scanned,
    "while": lambda x: lax.while_loop(lambda c: jnp.sum(jnp.abs(c)) < 1e3, lambda c: c * 1.1 + 1, x),
    "fori": lambda x: lax.fori_loop(0, 3, lambda i, c: c * 1.1 + i, x),
    "cond": lambda x: lax.cond(x[0, 0, 0] > 0, lambda y: y * 0.1, lambda y: y * 0.7, x),
    "jit": lambda x: jax.jit(rms)(x),
    "vmap": lambda x: jax.vmap(rms)(x),
    "custom_jvp": lambda x: jax.nn.relu(x) + jax.nn.silu(x) + jax.nn.softplus(x),
    "masked attention": attention,
    "convolution": lambda x: lax.conv_general_dilated(
        x, jnp.ones((3, 8, 2), x.dtype), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "max pool": lambda x: nnx.max_pool(x[..., None], (2, 2), (2, 2)),
    "average pool": lambda x: nnx.avg_pool(x[..., None], (2, 2), (2, 2)),
    "embedding": lambda x: x[0][jnp.array([[0, 4, 1], [1, 1, 2]])],
    "scatter": lambda x: jnp.zeros_like(x).at[jnp.array([0, 1, 1])].add(x).at[2].mul(3.0).at[0].max(0.1),
    "sort and cumsum": lambda x: jnp.sort(jnp.cumsum(x, 1), -1),
    "top k": lambda x: lax.top_k(x, 2)[0],
    "solve": lambda x: jnp.linalg.solve(x[0, :3, :3], jnp.ones(3, x.dtype)),
    "resize": lambda x: jax.image.resize(x, (3, 10, 16), "bilinear"),
    "fft": lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * 2, n=8),
    "reduce": lambda x: lax.reduce(x, np.zeros((), x.dtype), lambda a, b: a + b * x.dtype.type(0.5), (2,)),
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("narrow", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_cast_inside_is_widened_in_outputs_and_gradients(name, narrow):
    if (name, narrow) in {("solve", "bfloat16"), ("fft", "bfloat16")}:
        pytest.skip("JAX has no such operation in bfloat16")
    function = FUNCTIONS[name]
    differentiable = name not in ("while", "reduce")

    def in_dtype(dtype):
        def objective(x):
            output = function(x.astype(dtype)).astype(x.dtype)
            return jnp.sum(output * 1.5), output

        return jax.value_and_grad(objective, has_aux=True) if differentiable else objective

    widened = Widened(in_dtype(narrow))
    for ours, right in zip(jax.tree.leaves(widened(X)), jax.tree.leaves(in_dtype("float64")(X)), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, right, rtol=1e-12, atol=1e-12)
    assert any(f"{narrow} at test_widen.py:" in where for where in widened.casts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nnx.Linear(8, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)),
        lambda: nnx.LayerNorm(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        lambda: nnx.Conv(8, 3, (3,), dtype=jnp.float32, rngs=nnx.Rngs(0)),
    ],
    ids=["linear", "norm", "convolution"],
)
def test_modules_with_a_narrow_dtype_equal_those_without(make):
    module = make()
    graphdef, state = nnx.split(module)
    state = jax.tree.map(lambda a: a.astype(jnp.float64), state)
    wide = nnx.merge(graphdef, state)
    for _, part in nnx.iter_modules(wide):
        if hasattr(part, "dtype"):
            part.dtype = jnp.dtype(jnp.float64)
    ours = Widened(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)
    np.testing.assert_allclose(ours, wide(X), rtol=1e-12, atol=1e-13)


def test_casts_of_a_custom_rule_are_widened():
    gradient = Widened(jax.grad(lambda x: jnp.sum(squared(x.astype(jnp.float32)).astype(x.dtype))))(X)
    np.testing.assert_allclose(gradient, 2 * X, rtol=1e-15)


def test_nnx_attention_which_computes_in_float32_by_default():
    module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    state = jax.tree.map(lambda a: a.astype(jnp.float64), state)
    wide = nnx.merge(graphdef, state)
    query, key, value = (np.einsum("bsi,ihd->bshd", X, part.kernel[...]) for part in (wide.query, wide.key, wide.value))
    weights = jax.nn.softmax(np.einsum("bqhd,bkhd->bhqk", query, key) / 2, -1)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, value)
    right = np.einsum("bqhd,hdo->bqo", mixed, wide.out.kernel[...])
    ours = Widened(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)
    np.testing.assert_allclose(ours, right, rtol=1e-11, atol=1e-12)


def test_a_linen_module_with_dtype_float32_runs_in_float64():
    module = linen.Dense(3, dtype=jnp.float32)
    variables = jax.tree.map(lambda a: a.astype(jnp.float64), module.init(jax.random.key(0), X))
    ours = Widened(module.apply)(variables, X)
    np.testing.assert_allclose(ours, linen.Dense(3).apply(variables, X), rtol=1e-13)


def test_tables_and_constants_that_were_rounded_before_are_named_and_can_be_moved():
    table = np.sin(np.arange(8)).astype(np.float32)
    exact = np.sin(np.arange(8)) / 7

    def function(x, scale):
        return x * table * np.float32(1 / 7) * scale

    scale = jnp.ones(8, jnp.float32)
    widened = Widened(function)
    ours = widened(X, scale)
    off = np.abs(ours - X * exact).max()
    assert 1e-9 < off < 1e-6
    assert {constant.value.shape for constant in widened.constants} == {(8,), ()}
    assert {str(c).partition(" (float32")[0].partition(":")[0] for c in widened.constants} == {
        "argument 1",
        "test_widen.py",
    }
    rng = np.random.default_rng(0)
    by_all = np.abs(widened.moved(rng, X, scale) - ours).max()
    assert off / 8 < by_all < 8 * off
    assert len(widened.known) == 1, "moving compiles nothing anew"


def test_decimal_numbers_are_exact():
    """A Python float that meets a float32 array becomes a float32 literal, 0.1 included."""
    ours = Widened(lambda x: x.astype(jnp.float32) * 0.1 + 1e-5)(X)
    np.testing.assert_allclose(ours, X * 0.1 + 1e-5, rtol=1e-15)


def test_random_numbers_are_those_of_the_narrow_run():
    def noisy(x):
        return x[0, 0, :3] + jax.random.uniform(jax.random.key(0), (3,), jnp.float32)

    np.testing.assert_array_equal(Widened(noisy)(X), noisy(X))


class Narrowing(torch.nn.Module):
    def forward(self, x):
        hidden = torch.softmax(x.to(torch.float32), -1, dtype=torch.float32)
        return (hidden * torch.ones(8)).to(x.dtype) + torch.arange(8, dtype=torch.float32) / 7


def test_pytorchs_casts_are_widened_counted_and_named():
    x = torch.tensor(X, requires_grad=True)
    with widened() as mode:
        output = Narrowing()(x)
        output.square().sum().backward()
    right = torch.tensor(X, requires_grad=True)
    expected = torch.softmax(right, -1) + torch.arange(8, dtype=torch.float64) / 7
    expected.square().sum().backward()
    np.testing.assert_allclose(output.detach(), expected.detach(), rtol=1e-14)
    np.testing.assert_allclose(x.grad, right.grad, rtol=1e-12, atol=1e-14)
    assert any(where.startswith("float32 at test_widen.py:") for where in mode.casts), mode.casts
    assert torch.get_default_dtype() == torch.float32
