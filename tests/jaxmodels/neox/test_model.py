"""GPT-NeoX: scanned, listed and plain layers, gradients, rematerialization, conversion."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.convert import from_torch, to_torch
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.weights.names import dotted, flat_arrays, with_arrays
from tests.common import B, S, V, assert_close, normal, run
from tests.jaxmodels.neox.common import CONFIG, FORMS, START, ids, neox


def plain(model, *args):
    return jax.jit(lambda model, args: model.plain(*args))(model, args)


def gradients(model, call=lambda model, ids: model(ids)):
    """Gradients by PyTorch name, so that stacked and listed layers compare."""
    loss = jax.jit(jax.grad(lambda model, ids: jnp.square(call(model, ids) - jnp.sin(ids)[..., None]).mean()))
    return dict(sorted(to_torch(loss(model, ids())).items()))


@pytest.mark.parametrize("start", [None, START], ids=["whole", "padded"])
@pytest.mark.parametrize("form", FORMS)
def test_scanned_listed_and_plain_layers_agree(x64, form, start):
    model = neox(**FORMS[form])
    expected = plain(model, ids(), start)
    chex.assert_shape(expected, (B, S, V))
    assert_close(run(model, ids(), start), expected)
    assert_close(run(model.unstacked(), ids(), start), expected)


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["norm", "bias", "embedding", "attention", "readout", "layers"])
@pytest.mark.parametrize("narrow", [jnp.float16, jnp.bfloat16])
def test_tensors_of_different_dtypes_are_computed_with(narrow, wide):
    model = neox()
    arrays = flat_arrays(model)
    mixed = {path: array if wide in dotted(path) else array.astype(narrow) for path, array in arrays.items()}
    model = with_arrays(model, mixed)
    float32 = with_arrays(model, {path: array.astype(jnp.float32) for path, array in mixed.items()})
    expected = run(float32, ids())
    limit = 0.1 * float(jnp.sqrt(jnp.square(expected).mean()))
    for form in (model, model.unstacked()):
        assert float(jnp.abs(run(form, ids()).astype(jnp.float32) - expected).max()) < limit


@pytest.mark.slow
def test_gradients_of_scanned_listed_and_rematerialized_layers_agree(x64):
    expected = gradients(neox(), lambda model, ids: model.plain(ids))
    assert_close(gradients(neox()), expected)
    assert_close(gradients(neox(stacked=False)), expected)
    assert_close(gradients(neox(remat=True)), expected)


@pytest.mark.parametrize("stacked", [True, False])
def test_remat_is_there_where_it_is_asked_for(stacked):
    def program(remat):
        model = neox(stacked, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda model: model(ids()).sum()))(model))

    assert "remat" in program(True)
    assert "remat" not in program(False)


def test_the_program_does_not_grow_with_depth():
    def lines(n_layers):
        model = nnx.eval_shape(lambda: NeoX(dataclasses.replace(CONFIG, n_layers=n_layers), rngs=nnx.Rngs(0)))
        step = jax.jit(jax.grad(lambda model, ids: model(ids).sum()))
        return len(step.lower(model, ids()).as_text().splitlines())

    assert lines(2) == lines(7)


def test_unstacked_and_stacked_are_inverses():
    model = neox()
    listed = model.unstacked()
    assert model.is_stacked
    assert not listed.is_stacked
    assert listed.unstacked() is listed
    assert model.stacked() is model
    chex.assert_trees_all_equal(nnx.state(listed.stacked()), nnx.state(model))
    assert to_torch(listed).keys() == to_torch(model).keys()
    abstract = nnx.eval_shape(lambda: NeoX(CONFIG, stacked=False, rngs=nnx.Rngs(0)))
    chex.assert_trees_all_equal(nnx.state(from_torch(abstract, to_torch(model))), nnx.state(listed))


def test_no_token_sees_a_later_one():
    model, later = neox(), ids().at[:, 8:].set(ids(1)[:, 8:])
    a, b = run(model, ids()), run(model, later)
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert (a[:, 8:] != b[:, 8:]).any()


@pytest.mark.slow
def test_padded_rows_equal_the_rows_alone(x64):
    model = neox()
    logits = run(model, ids(), START)
    for row, start in enumerate(START.tolist()):
        assert_close(logits[row, start:], run(model, ids()[row : row + 1, start:])[0])
        assert not logits[row, :start].any()


@pytest.mark.slow
def test_what_stands_in_the_padding_is_never_read():
    model = neox()
    padding = jnp.arange(S) < START[:, None]
    np.testing.assert_array_equal(run(model, jnp.where(padding, V + 99, ids()), START), run(model, ids(), START))
    loss = jax.jit(jax.grad(lambda model, start: jnp.square(model(jnp.where(padding, -1, ids()), start)).sum()))
    grads = loss(model, START)
    chex.assert_tree_all_finite(nnx.state(grads))


def test_an_id_outside_the_vocabulary_is_nan():
    logits = run(neox(), ids().at[2, 4].set(V))
    assert jnp.isnan(logits[2, 4:]).all()
    assert jnp.isfinite(logits[jnp.asarray([0, 1, 3, 4])]).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((jnp.zeros(3, int),), r"\[B, S\]"),
        ((jnp.zeros((2, 0), int),), r"ids .*\[2, 0\]"),
        ((jnp.zeros((2, 3)),), r"ids .*float"),
        ((ids(), START[1:]), "start"),
        ((ids(), START.at[1].set(S)), r"start=\["),
        ((ids(), START.at[1].set(-1)), r"start=\[.*-1"),
        ((ids(), START.astype(jnp.float32)), "start"),
    ],
)
def test_refuses_bad_input(arguments, match):
    model = neox()
    for call in (model, model.plain):
        with pytest.raises(ValueError, match=match):
            call(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kept_in", ["float32", "the same"])
def test_16_bits_compute_near_float32(dtype, kept_in):
    expected = run(neox(), ids())
    model = neox(dtype=dtype)
    if kept_in == "the same":
        model = jax.tree.map(lambda array: array.astype(dtype), model)
    for call in (run, plain):
        logits = call(model, ids())
        assert logits.dtype == dtype
        error = jnp.abs(logits.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()
        assert error < 16 * float(jnp.finfo(dtype).eps)
    assert model.init_cache(B, S).layers[0]["key"].dtype == dtype


def test_parameters_alone_say_what_is_computed_in_where_the_config_does_not():
    model = jax.tree.map(lambda array: array.astype(jnp.bfloat16), neox())
    assert run(model, ids()).dtype == jnp.bfloat16
    assert model.init_cache(B, S).layers[0]["key"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("dtype", "tables"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")])
def test_rotary_tables_are_never_narrower_than_float32(x64, dtype, tables):
    x, (cos, sin) = neox(dtype=dtype).embed(ids(), jnp.arange(S) + 2_000)
    assert x.dtype == dtype
    assert cos.dtype == sin.dtype == tables
    angle = (2_000 + np.arange(S))[:, None] * 10_000.0 ** (-np.arange(0, 4, 2) / 4)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), atol=3e-4)  # bfloat16 would miss by up to 2
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angle), atol=3e-4)


def test_float16_survives_scores_and_activations_beyond_its_range():
    wide = neox()
    wide.layers.attention.qkv_lin.kernel[...] *= 400  # scores of some 1e6, where float16 ends at 65,504
    wide.layers.ffn.dense_h_h4.kernel[...] *= 30  # x³ beyond it too
    half = jax.tree.map(lambda array: array.astype(jnp.float16), wide)
    query, key, _ = half.blocks()[0].attention.project(*half.embed(ids(), jnp.arange(S)))
    assert not jnp.isfinite(jnp.einsum("bihd,bjhd->bhij", query, key)).all()
    for call in (run, plain):
        assert jnp.isfinite(call(half, ids())).all()


def test_initial_weights_are_drawn_as_the_original_draws_them():
    config = NeoXConfig(211, 6 * 16, 3, 6, tied=False)
    model = NeoX(config, rngs=nnx.Rngs(0))
    wide, narrow = (2 / (5 * 96)) ** 0.5, 2 / (3 * 96**0.5)
    deviations = {
        wide: (
            model.embedding.emb.embedding,
            model.layers.attention.qkv_lin.kernel,
            model.layers.ffn.dense_h_h4.kernel,
            model.readout.linear.kernel,
        ),
        narrow: (model.layers.attention.output.kernel, model.layers.ffn.dense_h4_h.kernel),
    }
    for deviation, weights in deviations.items():
        for weight in weights:
            assert abs(float(weight.std()) / deviation - 1) < 5 / (2 * weight.size) ** 0.5
            assert abs(float(weight.mean())) < 5 * deviation / weight.size**0.5
    for bias in (model.layers.attention.qkv_lin.bias, model.layers.ffn.dense_h4_h.bias, model.final_norm.ln.bias):
        assert not bias[...].any()
    kernels = model.layers.attention.qkv_lin.kernel
    assert (kernels[0] != kernels[1]).all()


class Doubled(nnx.Module):
    """A linear map that does not look like nnx.Linear."""

    def __init__(self, kernel):
        self.twice = nnx.Param(2 * kernel)

    def __call__(self, x):
        return x @ self.twice[...]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention.qkv_lin", "attention.output", "ffn.dense_h_h4", "ffn.dense_h4_h"])
def test_each_of_the_four_linear_maps_can_be_replaced(part):
    owner, name = part.split(".")
    model, changed = neox(), neox()
    linear = getattr(getattr(model.layers, owner), name)
    linear.bias[...] = jnp.zeros_like(linear.bias)
    setattr(getattr(changed.layers, owner), name, Doubled(linear.kernel[...]))
    linear.kernel[...] *= 2
    expected = run(model, ids())
    np.testing.assert_allclose(run(changed, ids()), expected, rtol=2e-5, atol=2e-5)
    _, cache = changed.unstacked().prefill(ids()[:, :-1], changed.init_cache(B, S))
    logits, _ = changed.unstacked().decode(ids()[:, -1:], cache)
    np.testing.assert_allclose(logits[:, 0], expected[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stacked", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path, stacked):
    model = neox(stacked, **FORMS["sequential"], dtype="bfloat16")
    jaxmodels.save(model, tmp_path / "model")
    loaded = jaxmodels.load(tmp_path / "model")
    assert loaded.settings == model.settings
    assert loaded.is_stacked is stacked
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))


def test_a_config_that_no_model_can_have_is_refused_by_load(tmp_path):
    model = neox()
    jaxmodels.save(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"gelu"', '"relu"'))
    with pytest.raises(ValueError, match="activation='relu'"):
        jaxmodels.load(tmp_path / "model")


def test_gradients_reach_every_parameter():
    for name, gradient in gradients(neox()).items():
        assert np.abs(gradient).max() > 0, name


@pytest.mark.slow
def test_positions_matter():
    model = neox()
    twice = jnp.concatenate([ids()[:, :6], ids()[:, :6]], axis=1)
    logits = run(model, twice)
    assert_far(logits[:, :6], logits[:, 6:])
    swapped = run(model, ids()[:, jnp.asarray([1, 0, *range(2, S)])])
    assert_far(swapped[:, -1], run(model, ids())[:, -1])


def assert_far(a, b):
    assert float(jnp.abs(a - b).max()) > 1e-3 * float(jnp.abs(normal(0, 7)).max())
