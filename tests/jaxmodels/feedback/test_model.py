"""The Feedback Transformer and its language model: fast path, PyTorch twin, dropout, causality, conversion."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxmodels
import torch_ref.feedback
from jaxmodels.convert import from_torch, to_torch
from jaxmodels.feedback import AutoregressiveModel, FeedbackAttention, FeedbackTransformer, FeedbackTransformerKV
from jaxmodels.weights.names import flat_arrays
from tests.common import B, V, assert_close, filled, normal, randomised_torch, run, token_ids
from tests.jaxmodels.feedback.common import SIZES, VARIANTS, transformer


def language_model(variant, **others):
    def make():
        return AutoregressiveModel(V, variant(**SIZES | others, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))

    return filled(make, scale=0.3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", [None, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_path_equals_plain_and_the_torch_twin(variant, memory):
    twin = randomised_torch(getattr(torch_ref.feedback, variant.__name__)(**SIZES, memory=memory).double(), 0.3)
    model = from_torch(nnx.eval_shape(lambda: variant(**SIZES, memory=memory, rngs=nnx.Rngs(0))), twin.state_dict())
    x, direction = normal(0, 7, 5, 6), normal(1, 7, 5, 6)
    gradients = jax.jit(jax.grad(lambda m, x: (m(x) * direction).sum(), (0, 1)))(model, x)
    x_torch = torch.tensor(np.asarray(x), requires_grad=True)
    y_torch = twin(x_torch)
    (y_torch * torch.tensor(np.asarray(direction))).sum().backward()
    assert_close(jax.jit(lambda m, x: m(x))(model, x), y_torch.detach().numpy())
    assert_close(jax.jit(lambda m, x: m.plain(x))(model, x), y_torch.detach().numpy())
    assert_close(gradients[1], x_torch.grad.numpy(), 1e-10)
    assert_close(to_torch(gradients[0]), {n: p.grad.numpy() for n, p in twin.named_parameters()}, 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_dropout_draws_the_same_in_both_paths(variant):
    model, x, rng = transformer(variant, dropout_prob=0.3), normal(0, 5, 3, 6), jax.random.key(1)
    drawn = run(model, x, rng)
    assert_close(drawn, jax.jit(lambda m, x, rng: m.plain(x, rng))(model, x, rng))
    assert (drawn != run(model, x, jax.random.key(2))).all()
    assert_close(run(model, x), run(transformer(variant), x))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
def test_language_model_sees_no_later_token(variant):
    model, ids = language_model(variant, n_layers=1), token_ids(0, 37, B)
    forward = jax.jit(lambda model, ids: model(ids))
    logits = forward(model, ids)
    chex.assert_shape(logits, (37, B, V))
    assert_close(logits[:7], jax.jit(lambda model, ids: model.plain(ids))(model, ids[:7]))
    changed = forward(model, ids.at[33].add(1) % V)
    np.testing.assert_array_equal(changed[:33], logits[:33])
    assert (jnp.abs(changed[33:] - logits[33:]).max(axis=-1) > 1e-9).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_limited_memory_still_feeds_back_from_further():
    """A step sees the last two alone; what those saw reaches it through them."""
    model, x = transformer(FeedbackTransformerKV, memory=2), normal(0, 9, 2, 6)
    assert (run(model, x)[8] != run(model, x.at[0].add(1.0))[8]).any()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_config_and_checkpoint_give_the_model_back(variant, tmp_path):
    model = language_model(variant, memory=5, dropout_prob=0.25)
    config = json.loads(json.dumps(model.config()))
    assert config == {"n_vocab": V, "variant": variant.__name__, **SIZES, "dropout_prob": 0.25, "memory": 5}
    jaxmodels.save(model, tmp_path / "model")
    again = jaxmodels.load(tmp_path / "model")
    assert nnx.graphdef(again) == nnx.graphdef(model)
    chex.assert_trees_all_equal(flat_arrays(again), flat_arrays(model))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_float32_whatever_jaxs_default_is(variant):
    model = nnx.eval_shape(lambda: variant(**SIZES, rngs=nnx.Rngs(0)))
    assert {str(array.dtype) for array in flat_arrays(model).values()} == {"float32"}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: FeedbackTransformer(7, 3, 5, 1, rngs=nnx.Rngs(0)), "d_model=7 .*heads=3"),
        (lambda: FeedbackTransformerKV(6, 3, 5, 1, memory=0, rngs=nnx.Rngs(0)), "memory=0"),
        (lambda: FeedbackTransformerKV(6, 3, 5, 0, rngs=nnx.Rngs(0)), "n_layers=0"),
        (lambda: transformer(FeedbackTransformerKV)(jnp.zeros((3, 6))), r"x_seq .*d_model=6.*\[3, 6\]"),
        (lambda: transformer(FeedbackTransformerKV)(jnp.zeros((3, 2, 5))), r"x_seq .*d_model=6.*\[3, 2, 5\]"),
        (lambda: transformer(FeedbackTransformerKV).plain(jnp.zeros((0, 2, 6))), r"x_seq .*\[0, 2, 6\]"),
        (lambda: transformer(FeedbackTransformer)(jnp.zeros((4097, 2, 6))), r"\b4097 .*\b4096\b"),
        (lambda: language_model(FeedbackTransformerKV)(jnp.zeros((3, 2))), "^ids .*float"),
        (lambda: language_model(FeedbackTransformerKV)(jnp.zeros(3, int)), "^ids "),
        (lambda: AutoregressiveModel.from_config(V, "Other", rngs=nnx.Rngs(0)), "variant='Other'"),
        (lambda: attend(jnp.zeros((2, 6)), jnp.zeros((4097, 2, 6))), r"\b4097 .*\b4096\b"),
        (lambda: attend(jnp.zeros((2, 6)), jnp.zeros((0, 2, 6))), r"\[0, 2, 6\]"),
        (lambda: attend(jnp.zeros((2, 6)), jnp.zeros((3, 2, 3, 2))), r"\[n, B, D\]"),
    ],
)
def test_refuses_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def attend(query, memory):
    attention = filled(lambda: FeedbackAttention(3, 6, rngs=nnx.Rngs(0)))
    return attention(query=query, key=memory, value=memory)
