"""Transformer layers, encoder and language model."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.attention import MultiHeadAttention, RelativeMultiHeadAttention
from jaxmodels.transformer import AutoregressiveTransformer, Encoder, TransformerLayer
from jaxmodels.weights.names import flat_arrays
from tests.common import (
    ATTENTIONS,
    MAX_LEN,
    SYNTHESIZERS,
    B,
    S,
    V,
    arguments,
    assert_close,
    causal_mask,
    filled,
    language_model,
    normal,
    run,
    token_ids,
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_fast_path_equals_plain_and_sees_no_later_token(attention, monkeypatch):
    monkeypatch.setattr("jaxmodels.attention.MIN_BLOCK", 4)  # 13 tokens make four blocks
    model, ids = language_model(attention), token_ids(0, S, B)
    forward = jax.jit(lambda model, ids: model(ids))
    logits = forward(model, ids)
    chex.assert_shape(logits, (S, B, V))
    assert_close(logits, jax.jit(lambda model, ids: model.plain(ids))(model, ids))
    changed = forward(model, ids.at[8].add(1) % V)
    assert_close(changed[:8], logits[:8], 1e-14)
    assert (jnp.abs(changed[8:] - logits[8:]).max(axis=-1) > 1e-9).all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_config_rebuilds_the_model(attention):
    def make():
        return AutoregressiveTransformer(**arguments(attention), dropout_prob=0.25, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(make)
    config = json.loads(json.dumps(model.config()))
    again = nnx.eval_shape(lambda: AutoregressiveTransformer(**config, rngs=nnx.Rngs(0)))
    assert config == arguments(attention) | {"dropout_prob": 0.25}
    assert nnx.graphdef(again) == nnx.graphdef(model)
    chex.assert_trees_all_equal_shapes_and_dtypes(flat_arrays(again), flat_arrays(model))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_parameters_are_float32_whatever_jaxs_default_is(attention):
    model = nnx.eval_shape(lambda: AutoregressiveTransformer(**arguments(attention), rngs=nnx.Rngs(0)))
    assert {str(array.dtype) for array in flat_arrays(model).values()} == {"float32"}


@pytest.mark.usefixtures("x64")
def test_layer_and_encoder_are_pre_norm():
    def make():
        rngs = nnx.Rngs(0)
        layers = [TransformerLayer(MultiHeadAttention(3, 12, rngs=rngs), 12, 17, rngs=rngs) for _ in range(2)]
        return Encoder(layers, 12, rngs=rngs)

    encoder, x = filled(make), normal(0, 7, 2, 12)

    @jax.jit
    def by_hand(encoder, x):
        for layer in encoder.layers:
            z = layer.norm_self_attn(x)
            x = x + layer.self_attn(query=z, key=z, value=z, mask=causal_mask(7))
            x = x + layer.feed_forward(layer.norm_ff(x))
        return encoder.norm(x)

    assert_close(run(encoder, x, mask="causal"), by_hand(encoder, x))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["rotary", "random+vanilla"])
def test_dropout(attention):
    model, ids = language_model(attention, dropout_prob=0.3), token_ids(0, S, B)
    forward = jax.jit(lambda model, ids, rng: model(ids, rng))
    key = jax.random.key(0)
    certain, drawn = forward(model, ids, None), forward(model, ids, key)
    np.testing.assert_array_equal(drawn, forward(model, ids, key))
    assert (drawn != certain).all()
    assert (drawn != forward(model, ids, jax.random.key(1))).all()
    np.testing.assert_allclose(certain, forward(language_model(attention), ids, None), atol=1e-6)
    np.testing.assert_array_equal(
        forward(language_model(attention), ids, key), forward(language_model(attention), ids, None)
    )


def test_every_dropout_draws_its_own():
    """With all else the identity, the two residual branches and the hidden layer still drop different features."""
    model = language_model("rotary", dropout_prob=0.5)
    keys = []

    def record(x, rng):
        keys.append(tuple(jax.random.key_data(rng).tolist()))
        return x

    for layer in model.encoder.layers:
        for dropout in (layer, layer.feed_forward, layer.self_attn):
            dropout.dropout = nnx.static(record)
    model(token_ids(0, 3, 2), jax.random.key(0))
    assert len(keys) == 2 * 4
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("others", "match"),
    [
        ({"attention": "sparse"}, r"attention='sparse' .*rotary_value.*max_len"),
        ({"attention": "sparse", "max_len": 7}, r"'sparse'.*factorized_dense"),
        ({"attention": "dense"}, r"attention='dense'.*max_len"),
        ({"attention": "dense", "max_len": 0}, r"max_len=0"),
        ({"heads": 5}, r"d_model=12 .*heads=5"),
        ({"heads": 4}, r"rope_percentage=1\.0 .*3 .*d_k=3\b"),
        ({"n_vocab": 0}, r"n_vocab=0"),
        ({"d_model": 0}, r"d_model=0"),
        ({"d_ff": -1}, r"d_ff=-1"),
        ({"n_layers": 0}, r"n_layers=0"),
        ({"dropout_prob": 1.5}, r"dropout_prob=1.5"),
    ],
)
def test_refuses_bad_arguments(others, match):
    with pytest.raises(ValueError, match=match):
        AutoregressiveTransformer(**arguments("rotary") | others, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "ids",
    [
        np.zeros(7, int),
        np.zeros((7, 2, 1), int),
        np.zeros((7, 2), np.float32),
        np.zeros((7, 2), bool),
        np.zeros((0, 2), int),
        np.zeros((7, 0), int),
    ],
    ids=lambda ids: f"{ids.dtype}{list(ids.shape)}",
)
def test_refuses_what_are_no_ids(ids):
    model = language_model("rotary")
    cache = model.init_cache(2, 7)
    for call in (model, model.plain, lambda ids: model.prefill(ids, cache), lambda ids: model.decode(ids, cache)):
        with pytest.raises(ValueError, match=r"^ids "):
            call(ids)


def test_numpy_ids():
    model, ids = language_model("rotary"), token_ids(0, S, B)
    np.testing.assert_array_equal(run(model, np.asarray(ids)), run(model, ids))


def test_an_id_outside_the_vocabulary_spoils_its_row_and_no_other():
    model, ids = language_model("rotary"), token_ids(0, S, B)
    for wrong in (V, -1):
        logits = np.asarray(run(model, ids.at[6, 2].set(wrong)))
        assert np.isnan(logits[6:, 2]).all()
        assert np.isfinite(np.delete(logits, 2, axis=1)).all()


@pytest.mark.parametrize("attention", ["relative", *SYNTHESIZERS])
def test_refuses_more_tokens_than_the_tables_reach(attention, monkeypatch):
    monkeypatch.setattr(RelativeMultiHeadAttention, "P", MAX_LEN)
    model, ids = language_model(attention), token_ids(0, MAX_LEN + 1, 2)
    for call in (model, model.plain, lambda ids: model.init_cache(2, len(ids))):
        with pytest.raises(ValueError, match=f"{MAX_LEN + 1} .*{MAX_LEN}"):
            call(ids)
    assert jax.eval_shape(model, ids[:-1]).shape == (MAX_LEN, 2, V)


@pytest.mark.parametrize("attention", ["rotary_value", "relative", "random+vanilla"])
def test_bfloat16(attention):
    model, ids = language_model(attention), token_ids(0, S, B)
    half = jax.jit(lambda model: jax.tree.map(lambda a: a.astype(jnp.bfloat16), model))(model)
    logits = run(half, ids)
    assert logits.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(np.asarray(logits, np.float32))
