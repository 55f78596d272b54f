"""The recurrence with its custom backward pass against a plain scan."""

import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.feedback import FeedbackTransformer, FeedbackTransformerKV
from jaxmodels.feedback.recurrence import buckets
from jaxmodels.weights.names import flat_arrays
from tests.common import assert_close, normal
from tests.jaxmodels.feedback.common import VARIANTS, naive, transformer


def evaluate(function, model, x, direction):
    """Outputs, and the gradients along a direction of every parameter and of the input."""

    def loss(model, x):
        y = function(model, x)
        return (y * direction).sum(), y

    (_, y), (gradients, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(model, x)
    return y, flat_arrays(gradients), dx


def assert_equal_evaluations(ours, oracle, tolerance=1e-10):
    """Each kind against its largest number."""
    for kind, truth in zip(ours, oracle, strict=True):
        scale = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(truth))
        assert_close(*jax.tree.map(lambda a, scale=scale: a / scale, (kind, truth)), tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 101, pytest.param(257, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_the_naive_scans(variant, n):
    model = transformer(variant, n_layers=2 if n == 7 else 1)  # compiling is what takes time
    x, direction = normal(0, n, 2, 6), normal(1, n, 2, 6)
    function = lambda model, x: model(x)  # noqa: E731
    ours = evaluate(function, model, x, direction)
    assert_equal_evaluations(ours, evaluate(naive, model, x, direction))
    if n > 2:  # all of them are seen; a softmax over one memory has no gradient
        assert all((gradient != 0).any() for gradient in ours[1].values())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", [1, 5, 36])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_memory_limit(variant, memory):
    model = transformer(variant, memory=memory, n_layers=1)
    x, direction = normal(0, 41, 2, 6), normal(1, 41, 2, 6)
    ours = evaluate(lambda model, x: model(x), model, x, direction)
    assert_equal_evaluations(ours, evaluate(naive, model, x, direction))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_with_dropout_is_that_of_the_same_draws(variant):
    """Against finite differences: a backward pass that drew anew would give another slope."""
    model, x = transformer(variant, dropout_prob=0.3, n_layers=1), normal(0, 35, 2, 6)
    rng, along = jax.random.key(3), normal(1, 35, 2, 6)
    line = jax.jit(lambda s: jnp.sin(model(x + s * along, rng)).sum())
    slope = (line(1e-5) - line(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(line))(0.0), slope, rtol=1e-6)
    loss = jax.jit(jax.value_and_grad(lambda model: jnp.sin(model(x, rng)).sum()))
    weights = loss(model)[1]
    up, down = (loss(jax.tree.map(lambda a, g, s=s: a + s * g, model, weights))[0] for s in (1e-6, -1e-6))
    np.testing.assert_allclose((up - down) / 2e-6, sum((g**2).sum() for g in jax.tree.leaves(weights)), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_vmap_and_checkpoint_change_nothing():
    model, xs = transformer(FeedbackTransformer, n_layers=1), normal(0, 3, 35, 2, 6)
    gradient = jax.grad(lambda model, x: jnp.sin(model(x)).sum(), (0, 1))
    compiled = jax.jit(gradient)
    one_by_one = [compiled(model, x) for x in xs]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *one_by_one)
    assert_close(jax.jit(jax.vmap(gradient, (None, 0)))(model, xs), stacked)
    remat = jax.grad(lambda model, x: jnp.sin(jax.checkpoint(lambda m, x: m(x))(model, x)).sum(), (0, 1))
    assert_close(jax.jit(remat)(model, xs[0]), one_by_one[0])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_near_float32(variant):
    model, x = transformer(variant, n_layers=1), normal(0, 37, 2, 6)
    loss = lambda model, x: jnp.sin(model(x)).sum()  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    low = gradient(*jax.tree.map(lambda a: a.astype(jnp.bfloat16), (model, x)))
    assert {a.dtype for a in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_tree_all_finite(low)
    flat = [
        jnp.concatenate([a.astype(jnp.float32).ravel() for a in jax.tree.leaves(g[1])])
        for g in (low, gradient(model, x))
    ]
    assert jnp.dot(*flat) > 0.97 * jnp.linalg.norm(flat[0]) * jnp.linalg.norm(flat[1])


@pytest.mark.slow
def test_memory_grows_linearly():
    """Temporaries of the gradient: with twice the steps less than two and a half times as much."""
    model = transformer(FeedbackTransformerKV, d_model=24, n_layers=1)

    def temporaries(n):
        gradient = jax.jit(jax.grad(lambda model, x: model(x).sum(), (0, 1)))
        return gradient.lower(model, jnp.zeros((n, 8, 24))).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(512) < 2.5 * temporaries(256)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 101, 128, 257, 4096])
def test_buckets_cover_every_step_once(n):
    cuts = buckets(n)
    assert [t for first, end in cuts for t in range(first, end)] == list(range(n))
    assert len(cuts) <= 4


SHARDED = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxmodels.feedback import FeedbackTransformerKV
from tests.common import normal
from tests.jaxmodels.feedback.common import transformer

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
model, x = transformer(FeedbackTransformerKV, n_layers=1), normal(0, 37, 16, 6).astype(jnp.float32)
gradient = jax.jit(jax.grad(lambda model, x: jnp.sin(model(x)).sum(), (0, 1)))
alone = gradient(model, x)
batch = NamedSharding(mesh, PartitionSpec(None, "data"))
model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
sharded = gradient(model, jax.device_put(x, batch))
assert sharded[1].sharding.is_equivalent_to(batch, 3), sharded[1].sharding
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded)):
    np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, float(abs(a).max())))
"""


@pytest.mark.slow
def test_a_batch_sharded_over_eight_devices():
    root = Path(__file__).parents[3]
    eight = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    flags = {"XLA_FLAGS": eight, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", SHARDED], cwd=root, env=os.environ | flags, check=True)
