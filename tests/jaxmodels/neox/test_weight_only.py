"""8-bit weights with activations as they are: rounding within half a step, tiles equal to the whole product."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.convert.hf import save_hf
from jaxmodels.generate import generate
from jaxmodels.layers import Linear
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.neox.int8 import LINEARS
from jaxmodels.neox.lora import LoRA, LoRANeoX
from jaxmodels.neox.weight_only import FEW, TILE, WeightOnlyLinear, by_tiles, product, quantized, whole
from tests.common import filled, normal, run
from tests.jaxmodels.neox.common import FORMS, ids, neox

IN, OUT = 131, 2 * TILE + 17


def test_weights_are_rounded_to_half_a_step():
    kernel = normal(0, 3, IN, OUT).at[1, :, 5].set(0)
    weight, scale = quantized(kernel)
    assert (weight.dtype, weight.shape, scale.dtype, scale.shape) == (jnp.int8, (3, OUT, IN), jnp.float32, (3, OUT))
    kernel, weight, scale = (np.asarray(a, np.float64) for a in (kernel, weight, scale))
    np.testing.assert_allclose(scale, np.abs(kernel).max(1) / 127, rtol=1e-6)
    assert (np.abs(weight * scale[..., None] - kernel.swapaxes(1, 2)) <= 0.5001 * scale[..., None]).all()
    assert np.delete(np.abs(weight[1]), 5, axis=0).max(1).tolist() == [127] * (OUT - 1)
    assert not weight[1, 5].any()


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_an_output_is_within_the_bound_of_its_scale(rows):
    linear = filled(lambda: Linear(IN, OUT, rngs=nnx.Rngs(0)))
    x = normal(1, rows, IN)
    given = WeightOnlyLinear(linear)
    exact = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...])
    bound = np.abs(x).sum(1, keepdims=True) * np.asarray(given.scale[...]) / 2
    error = np.abs(np.asarray(run(given, x)) - exact)
    assert (error <= 1.001 * bound + 1e-4).all()
    assert error.max() > 0.02 * bound.max()  # the bound is of this size


def test_tiles_are_the_whole_product(x64):
    weight, scale = quantized(normal(0, IN, OUT))
    x = normal(1, 3, 5, IN).astype(jnp.float64)
    expected = np.asarray(x) @ (np.asarray(weight, np.float64) * np.asarray(scale, np.float64)[:, None]).T
    np.testing.assert_allclose(jax.jit(product)(x, weight, scale), expected, rtol=1e-12, atol=1e-12)
    flat = x.reshape(-1, IN)
    np.testing.assert_allclose(by_tiles(flat, weight), whole(flat, weight), rtol=1e-12, atol=1e-12)
    text = jax.jit(product).lower(x[0], weight, scale).compile().as_text()
    assert f"f64[{OUT},{IN}]" not in text  # no whole matrix of floats is made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bias", [True, False])
def test_dtypes_are_those_of_the_linear_map(dtype, bias):
    linear = nnx.Linear(IN, OUT, use_bias=bias, rngs=nnx.Rngs(0))
    x = normal(1, 2, IN).astype(dtype)
    assert WeightOnlyLinear(linear)(x).dtype == linear(x).dtype if bias else x.dtype
    linear.dtype = jnp.dtype("bfloat16")
    assert WeightOnlyLinear(linear)(x).dtype == jnp.bfloat16


def dequantized(model, reference):
    """The float model with the values of the quantized one's weights."""
    copy = jax.tree.map(lambda array: array, reference)

    def put(linear, small):
        values = small.weight[...] * small.scale[...][..., None]
        linear.kernel[...] = values.swapaxes(-1, -2)

    for owner, name in LINEARS:
        put(getattr(getattr(copy.layers, owner), name), getattr(getattr(model.layers, owner), name))
    if not reference.settings.tied:
        put(copy.readout.linear, model.readout.linear)
    return copy


@pytest.mark.parametrize("form", ["parallel", "tied", "variant"])
def test_a_model_computes_with_its_rounded_weights(form):
    reference = neox(**FORMS[form])
    model = quantize(reference, kind="weights")
    assert (model.quantization, reference.quantization, model.int8_threshold) == ("weights", None, None)
    expected = run(dequantized(model, reference), ids())
    np.testing.assert_allclose(run(model, ids()), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    error = np.abs(run(model, ids()) - run(reference, ids())).max() / np.abs(expected).max()
    assert 0 < error < 0.1  # as LLM.int8's


def test_decoding_and_its_cache():
    model = quantize(neox(stacked=False), kind="weights")
    prompt = ids()[:, :7]
    text = prompt
    for _ in range(3):
        text = jnp.concatenate([text, run(model, text)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(generate(model, prompt, 3), text[:, 7:])


@pytest.mark.parametrize("stacked", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path, stacked):
    model = quantize(neox(stacked), kind="weights")
    jaxmodels.save(model, tmp_path / "model")
    loaded = jaxmodels.load(tmp_path / "model")
    assert (loaded.quantization, loaded.is_stacked) == ("weights", stacked)
    chex.assert_trees_all_equal_dtypes(nnx.state(loaded), nnx.state(model))
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))


@pytest.mark.parametrize("more", [{"quantization": "weights4"}, {"quantization": 8}, {"int8_threshold": 6.0}])
def test_a_saved_kind_that_is_none_is_refused(tmp_path, more):
    jaxmodels.save(quantize(neox(), kind="weights"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    content["config"] |= more
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="quantization"):
        jaxmodels.load(tmp_path / "model")


def test_what_cannot_be_quantized_is_refused(tmp_path):
    model = quantize(neox(), kind="weights")
    for arguments, message in (({"kind": "int9"}, "int9"), ({"kind": "weights", "threshold": 6.0}, "threshold=6")):
        with pytest.raises(ValueError, match=message):
            quantize(neox(), **arguments)
    for kind in ("llm.int8", "weights"):
        with pytest.raises(ValueError, match="already quantized"):
            quantize(model, kind=kind)
    with pytest.raises(ValueError, match="quantized"):
        save_hf(model, tmp_path / "hf")
    with pytest.raises(ValueError, match="quantized"):
        LoRANeoX.of(model, LoRA(3))
    wrong = neox()
    wrong.readout.linear.kernel[...] = wrong.readout.linear.kernel[...].at[1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN"):
        quantize(wrong, kind="weights")


def test_bytes_are_a_quarter_of_float32_s():
    whole = nnx.eval_shape(lambda: NeoX(NeoXConfig.pythia_70m(), rngs=nnx.Rngs(0)))
    small = nnx.eval_shape(lambda model: quantize(model, kind="weights"), whole)

    def size(model):
        parts = jax.tree.leaves((nnx.state(model.layers), nnx.state(model.readout)))
        return sum(array.size * array.dtype.itemsize for array in parts)

    assert size(small) < 0.26 * size(whole)
