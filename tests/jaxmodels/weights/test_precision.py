"""Weights in 16 bits are computed in float32 on a CPU, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.generate import generate, stream
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.weights.precision import for_inference, log, wide_dtype
from tests.common import filled, language_model

IDS = jnp.asarray([[3, 1, 4, 1, 5]])


def narrow(model, dtype="bfloat16"):
    return jax.tree.map(lambda array: array.astype(dtype), model)


def neox(**settings):
    return filled(lambda: NeoX(NeoXConfig(23, 3 * 10, 2, 3, n_ff=18, **settings), rngs=nnx.Rngs(0), stacked=False))


@pytest.mark.parametrize(
    ("stored", "platform", "dtype"),
    [
        (["float32", "bfloat16"], "cpu", "float32"),
        (["float16", "int8"], "cpu", "float32"),
        (["float16"], "gpu", None),
        (["bfloat16"], "tpu", None),
        (["float32", "int8"], "cpu", None),
        (["float16", "float64"], "cpu", None),
        ([], "cpu", None),
    ],
)
def test_the_dtype_for_stored_ones(stored, platform, dtype):
    arrays = {f"layers.{i}.kernel": np.zeros(2, jnp.dtype(name)) for i, name in enumerate(stored)}
    assert wide_dtype(arrays, platform) == dtype
    assert wide_dtype({"absmax": np.zeros(2, np.float16)}, platform) is None


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_tokens_are_those_of_the_float32_model(stored):
    model = narrow(neox(), stored)
    wide = narrow(model, "float32")
    expected = generate(wide, IDS, 7)
    np.testing.assert_array_equal(generate(model, IDS, 7), expected)
    np.testing.assert_array_equal(np.stack(list(stream(model, IDS, 7)), axis=1), expected)
    assert {array.dtype for array in jax.tree.leaves(model)} == {jnp.dtype(stored)}  # the given one is as it was


def test_a_given_dtype_is_used():
    model = narrow(neox())
    assert for_inference(model, "bfloat16") is model
    assert {array.dtype for array in jax.tree.leaves(for_inference(model, jnp.float16))} == {jnp.dtype("float16")}
    with pytest.raises(ValueError, match="dtype=int8"):
        generate(model, IDS, 2, dtype="int8")


def test_models_that_are_left_as_they_are():
    wide, named = neox(), narrow(neox(dtype="bfloat16"))
    for model in (wide, named, quantize(wide), language_model("rotary")):
        assert for_inference(model) is model


def test_of_a_quantized_model_the_other_weights_are_cast():
    model = for_inference(quantize(narrow(neox(), "float16")))
    linear = model.layers[0].ffn.dense_h_h4
    found = (linear.kernel.dtype, linear.absmax.dtype, linear.bias.dtype, model.readout.linear.kernel.dtype)
    assert found == tuple(map(jnp.dtype, ("int8", "float16", "float32", "float32")))


def test_it_is_logged_once(caplog):
    log.cache_clear()
    for _ in range(2):
        for_inference(narrow(neox()))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("jaxmodels", "WARNING")
    assert "bfloat16" in record.message
