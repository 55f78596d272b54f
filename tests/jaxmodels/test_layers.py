"""Layers against PyTorch: initial distributions, numerics, dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import torch_ref.transformer
from jaxmodels.convert import to_torch
from jaxmodels.layers import (
    UNROLLED,
    Dropout,
    Embed,
    FeedForward,
    HeadProjection,
    LayerNorm,
    Linear,
    hooks,
    in_turn,
    rematerialized,
    split_rng,
    unrolls,
)
from jaxmodels.native import large_product
from jaxmodels.transformer import AutoregressiveTransformer
from tests.common import normal


@pytest.mark.parametrize(
    "attention", ["rotary", "relative", "random+factorized_random", "fixed_random+vanilla+factorized_dense"]
)
def test_initial_weights_are_distributed_as_torchs(attention):
    sizes = {"n_vocab": 211, "d_model": 102, "heads": 3, "d_ff": 307, "n_layers": 1, "attention": attention}
    sizes["max_len"] = 53 if "random" in attention else None
    ours = to_torch(jax.jit(lambda: AutoregressiveTransformer(**sizes, rngs=nnx.Rngs(0)))())
    torch.manual_seed(0)
    theirs = torch_ref.transformer.AutoregressiveTransformer(**sizes).state_dict()
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        a, b = ours[key].ravel(), tensor.numpy().ravel()
        if np.ptp(b) == 0:  # a constant: LayerNorm, alpha, the relative tables
            np.testing.assert_array_equal(a, b, err_msg=key)
            continue
        error = 6 / np.sqrt(a.size)  # some standard errors of these statistics
        assert abs(a.mean() - b.mean()) < error * b.std(), key
        assert abs(a.std() / b.std() - 1) < error, key
        kurtosis_a, kurtosis_b = (np.mean((x - x.mean()) ** 4) / x.var() ** 2 for x in (a, b))
        assert abs(kurtosis_a - kurtosis_b) < 2 * error, key  # uniform has 1.8, normal 3


def test_linear_is_bounded_by_its_fan_in():
    linear = Linear(67, 1009, rngs=nnx.Rngs(0))
    for array in (linear.kernel[...], linear.bias[...]):
        assert 0.99 / np.sqrt(67) < jnp.abs(array).max() <= 1 / np.sqrt(67)
    assert Linear(3, 5, bias=False, rngs=nnx.Rngs(0)).bias is None


def test_layers_of_a_stack_start_independent():
    model = AutoregressiveTransformer(11, 12, 3, 17, 2, rngs=nnx.Rngs(0))
    first, second = (layer.feed_forward.layer1.kernel[...] for layer in model.encoder.layers)
    assert (first != second).all()


def test_layer_norm_far_from_zero():
    x = 30 + 0.1 * np.random.default_rng(0).normal(size=(7, 101)).astype(np.float32)
    truth = torch.nn.functional.layer_norm(torch.tensor(x, dtype=torch.float64), [101]).numpy()
    assert np.abs(LayerNorm(101, rngs=nnx.Rngs(0))(x) - truth).max() < 1e-4  # the fast variance errs by 1.6e-2


@pytest.mark.usefixtures("x64")
def test_layer_norm_has_torchs_epsilon():
    x = 1e-3 * normal(0, 7, 11)  # a variance of 1e-6, below epsilon
    truth = torch.nn.functional.layer_norm(torch.tensor(np.asarray(x)), [11]).numpy()
    np.testing.assert_allclose(LayerNorm(11, rngs=nnx.Rngs(0))(x), truth, atol=1e-13)


@pytest.mark.parametrize("n_vocab", [1, 7])
def test_embed_gives_nan_outside_its_table(n_vocab):
    embed = Embed(n_vocab, 3, rngs=nnx.Rngs(0))
    rows = jax.jit(lambda embed, ids: embed(ids))(
        embed, jnp.array([0, n_vocab - 1, n_vocab, n_vocab + 90, -1, -n_vocab])
    )
    np.testing.assert_array_equal(rows[:2], embed.embedding[...][jnp.array([0, n_vocab - 1])])
    assert jnp.isnan(rows[2:]).all()


def test_embed_sends_gradients_to_its_rows_only():
    embed = Embed(7, 3, rngs=nnx.Rngs(0))
    gradient = jax.grad(lambda embed: embed(jnp.array([[2, 5], [5, 5]])).sum())(embed).embedding[...]
    np.testing.assert_array_equal(gradient, np.outer([0, 0, 1, 0, 0, 3, 0], np.ones(3)))


def test_head_projection_cuts_features_by_head():
    projection = HeadProjection(15, 5, 3, bias=True, rngs=nnx.Rngs(0))
    x = normal(0, 7, 2, 15)
    y = projection(x)
    chex.assert_shape(y, (7, 2, 5, 3))
    np.testing.assert_array_equal(y[..., 4, 1], projection.linear(x)[..., 4 * 3 + 1])


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_dropout(rate):
    x = 1.0 + jnp.arange(100_003)
    dropout, key = Dropout(rate), jax.random.key(0)
    y = dropout(x, key)
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 0.01
    np.testing.assert_allclose(y[kept], x[kept] / (1 - rate), rtol=1e-6)
    np.testing.assert_array_equal(dropout(x, key), y)
    assert (dropout(x, jax.random.key(1)) != y).any()
    np.testing.assert_array_equal(dropout(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_dropout_refuses_what_is_no_share(rate):
    with pytest.raises(ValueError, match="dropout_prob="):
        Dropout(rate)


def test_dropout_holds_no_state():
    assert jax.tree.leaves(Dropout(0.5)) == []


def test_feed_forward_drops_hidden_features():
    n = 401
    feed_forward = FeedForward(n, n, 0.25, rngs=nnx.Rngs(0))
    feed_forward.layer2.kernel[...] = jnp.eye(n)
    x = normal(0, 1, n)
    hidden = feed_forward(x) - feed_forward.layer2.bias[...]
    dropped = feed_forward(x, jax.random.key(0)) - feed_forward.layer2.bias[...]
    active = hidden > 1e-3
    assert (hidden >= -1e-6).all()
    assert 0.3 < active.mean() < 0.7
    lost = jnp.abs(dropped[active]) < 1e-6
    assert 0.15 < lost.mean() < 0.35
    np.testing.assert_allclose(dropped[active][~lost], hidden[active][~lost] / 0.75, rtol=1e-3)


def test_split_rng():
    assert split_rng(None, 3) == (None, None, None)
    keys = split_rng(jax.random.key(0), 3)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3


def test_rematerialized_branches_are_differentiated_one_after_the_other(x64):
    weights = jnp.asarray(normal(0, 5)), jnp.asarray(normal(1, 5))
    x = jnp.asarray(normal(2, 5))

    def loss(x, first, second):
        layer = rematerialized(lambda x: in_turn(lambda x: jnp.tanh(first * x), lambda x: jnp.sin(second * x), x, "G"))
        return layer(x).sum()

    def gradients(remat):
        with hooks(remat=remat):
            return jax.grad(loss, (0, 1, 2))(x, *weights), str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, *weights))

    expected, plain = gradients(None)
    found, program = gradients(jax.checkpoint)
    chex.assert_trees_all_equal(found, expected)
    assert "optimization_barrier" not in plain
    cosine, barrier, tanh = (program.rindex(name) for name in ("= cos", "= optimization_barrier", "= tanh"))
    assert cosine < barrier < tanh


def test_few_layers_are_unrolled_without_rematerialization():
    assert not unrolls(2)
    with hooks(cpu=True):
        assert unrolls(UNROLLED)
        assert not unrolls(UNROLLED + 1)
    with hooks(cpu=True, remat=jax.checkpoint):
        assert not unrolls(2)


@pytest.mark.parametrize(("d_out", "bias"), [(5, True), (7, False), (13, True)])
def test_on_one_cpu_a_linear_map_has_rows_and_the_same_derivatives(d_out, bias):
    linear, x = Linear(7, d_out, bias, rngs=nnx.Rngs(0)), normal(0, 3, 11, 7)

    def gradients(product):
        with hooks(product=product):
            derivative = jax.value_and_grad(lambda linear, x: jnp.sin(linear(x)).sum(), (0, 1))
            return derivative(linear, x), str(jax.make_jaxpr(derivative)(linear, x))

    expected, program = gradients(None)
    found, by_rows = gradients(large_product)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    several = "(([0, 1], [0, 1]), ([], []))"
    assert several in program
    assert several not in by_rows


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (30, 0.1)])
def test_on_one_cpu_layer_norm_has_the_same_derivatives(mean, std):
    x, dy, scale = mean + std * normal(0, 3, 11, 7), normal(1, 3, 11, 7), 1 + normal(2, 7) / 10
    norm = LayerNorm(7, rngs=nnx.Rngs(0))
    norm.scale.set_value(scale)

    def gradients(cpu, dtype):
        cast = jax.tree.map(lambda a: a.astype(dtype), (norm, x, dy))
        with hooks(cpu=cpu):
            y, pull = jax.vjp(lambda norm, x: norm(x), *cast[:2])
            return y, pull(cast[2])

    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, gradients(False, jnp.float64))
    plain, found = gradients(False, jnp.float32), gradients(True, jnp.float32)

    def error(tree):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
        return [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in pairs]

    assert all(ours < 2 * theirs + 1e-7 for ours, theirs in zip(error(found), error(plain), strict=True))
