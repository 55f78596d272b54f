"""Weights of 8 and 4 bits, activations as they are: rounding within half a step, tiles equal to the whole product."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxmodels
from jaxmodels import native
from jaxmodels.convert.hf import save_hf
from jaxmodels.generate import generate
from jaxmodels.layers import Fixed, Linear
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.neox.int8 import LINEARS, Int8Linear
from jaxmodels.neox.lora import LoRA, LoRANeoX
from jaxmodels.neox.weight_only import FEW, TILE, WeightOnlyLinear, by_tiles, four_bits, product, quantized, whole
from jaxmodels.weights.names import dotted, flat_arrays, to_torch
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


def test_four_bits_are_rounded_to_half_a_step_of_their_group():
    kernel = normal(0, 3, IN, OUT).at[1, 128:, 5].set(0).at[:, 0].multiply(100)
    words, scale = four_bits(kernel)
    assert (words.dtype, words.shape, scale.dtype, scale.shape) == (jnp.uint32, (3, OUT, 32), jnp.float32, (3, OUT, 2))
    padded = np.pad(np.asarray(kernel, np.float64).swapaxes(1, 2), [(0, 0), (0, 0), (0, 256 - IN)])
    groups = padded.reshape(3, OUT, 2, 128)
    np.testing.assert_allclose(scale, np.abs(groups).max(-1) / 7, rtol=1e-6)
    found = np.asarray(native.unpacked(words, scale), np.float64).reshape(groups.shape)
    steps = np.asarray(scale, np.float64)[..., None]
    assert (np.abs(found - groups) <= 0.5001 * steps).all()
    assert not found[1, 5, 1].any()
    integers = np.unique(np.round(found / np.where(steps == 0, 1, steps)))
    np.testing.assert_array_equal(integers, np.arange(-7, 8))


def half_steps(given, bits):
    """Half of the value that 1 represents, for each weight: [O, 1], or [O, I] with 4 bits."""
    scale = np.asarray(given.scale[...], np.float64)
    return scale[:, None] / 2 if bits == 8 else np.repeat(scale, 128, axis=1)[:, :IN] / 2


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_output_is_within_the_bound_of_its_scale(bits, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(native, "available", lambda: False)
    linear = filled(lambda: Linear(IN, OUT, rngs=nnx.Rngs(0)))
    given = WeightOnlyLinear(linear, bits)
    for rows in (1, FEW, FEW + 1):
        x = normal(1, rows, IN)
        exact = np.asarray(x, np.float64) @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...])
        bound = np.abs(np.asarray(x, np.float64)) @ np.broadcast_to(half_steps(given, bits), (OUT, IN)).T
        error = np.abs(np.asarray(given(x)) - exact)
        assert (error <= 1.001 * bound + 1e-4).all()
        assert error.max() > 0.02 * bound.max()  # the bound is of this size


@pytest.mark.parametrize("bits", [8, 4])
def test_tiles_are_the_whole_product(x64, bits):
    x = normal(1, 3, 5, IN).astype(jnp.float64)
    if bits == 8:
        weight, scale = quantized(normal(0, IN, OUT))
        wide = np.asarray(weight, np.float64) * np.asarray(scale, np.float64)[:, None]
    else:
        weight, scale = four_bits(normal(0, IN, OUT))
        wide = np.asarray(native.unpacked(weight, scale), np.float64)[:, :IN]
    expected = np.asarray(x) @ wide.T
    np.testing.assert_allclose(jax.jit(product)(x, weight, scale), expected, rtol=1e-12, atol=1e-12)
    flat = x.reshape(-1, IN)
    np.testing.assert_allclose(by_tiles(flat, weight, scale), whole(flat, weight, scale), rtol=1e-12, atol=1e-12)
    text = jax.jit(product).lower(x[0], weight, scale).compile().as_text()
    for dtype in ("f32", "f64"):  # no whole matrix of floats is made
        assert f"{dtype}[{OUT},{IN if bits == 8 else 256}]" not in text


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
        if small.bits == 8:
            values = small.weight[...] * small.scale[...][..., None]
        else:
            values = native.unpacked(small.weight[...], small.scale[...])[..., : linear.kernel[...].shape[-2]]
        linear.kernel[...] = values.swapaxes(-1, -2)

    for owner, name in LINEARS:
        put(getattr(getattr(copy.layers, owner), name), getattr(getattr(model.layers, owner), name))
    if not reference.settings.tied:
        put(copy.readout.linear, model.readout.linear)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kind"), [("parallel", "weights"), ("tied", "weights"), ("variant", "weights"), ("parallel", "weights-4")]
)
def test_a_model_computes_with_its_rounded_weights(form, kind):
    reference = neox(**FORMS[form])
    model = quantize(reference, kind=kind)
    assert (model.quantization, reference.quantization, model.int8_threshold) == (kind, None, None)
    expected = run(dequantized(model, reference), ids())
    np.testing.assert_allclose(run(model, ids()), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    error = np.abs(run(model, ids()) - run(reference, ids())).max() / np.abs(expected).max()
    assert 0 < error < (0.1 if kind == "weights" else 1)  # that of 8 bits as LLM.int8's


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "weights-4"])
def test_decoding_and_its_cache(kind):
    model = quantize(neox(stacked=False), kind=kind)
    prompt = ids()[:, :7]
    text = prompt
    for _ in range(3):
        text = jnp.concatenate([text, run(model, text)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(generate(model, prompt, 3), text[:, 7:])


@pytest.mark.parametrize(("stacked", "kind"), [(True, "weights"), (False, "weights"), (True, "weights-4")])
def test_saved_and_loaded_it_is_the_same(tmp_path, stacked, kind):
    model = quantize(neox(stacked), kind=kind)
    jaxmodels.save(model, tmp_path / "model")
    loaded = jaxmodels.load(tmp_path / "model")
    assert (loaded.quantization, loaded.is_stacked) == (kind, stacked)
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


@pytest.mark.parametrize(("kind", "dtype"), [("weights", "uint32"), ("weights", "float32"), ("weights-4", "int32")])
@pytest.mark.parametrize("streamed", [False, True])
def test_saved_weights_of_another_dtype_are_refused(tmp_path, kind, dtype, streamed):
    model = quantize(neox(stacked=False), kind=kind)
    model.readout.linear.weight = Fixed(model.readout.linear.weight[...].astype(dtype))
    jaxmodels.save(model, tmp_path / "model")
    if streamed:
        shutil.rmtree(tmp_path / "model" / "params")
        arrays = {dotted(path): np.asarray(array) for path, array in flat_arrays(model).items()}
        save_file(arrays, tmp_path / "model" / "params.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path}/model.*readout.linear.weight.*{dtype}"):
        jaxmodels.load(tmp_path / "model")


@pytest.mark.parametrize("number", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize(("kind", "name"), [("llm.int8", "absmax"), ("weights", "scale"), ("weights-4", "scale")])
def test_saved_scales_that_are_no_magnitudes_are_refused(tmp_path, kind, name, number):
    model = quantize(neox(stacked=False), kind=kind)
    linear = model.layers[1].ffn.dense_h_h4
    scale = getattr(linear, name)[...]
    setattr(linear, name, Fixed(scale.at[(0,) * scale.ndim].multiply(number)))
    jaxmodels.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match=rf"{tmp_path}/model: layers\.1\.ffn\.dense_h_h4.*{name} has numbers"):
        jaxmodels.load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["weights", "weights-4"])
def test_there_is_no_state_dict_without_scales(kind):
    with pytest.raises(ValueError, match=r"model has two arrays for '.*weight', such as quantized"):
        to_torch(quantize(neox(stacked=False), kind=kind))


def test_what_cannot_be_quantized_is_refused(tmp_path):
    model = quantize(neox(), kind="weights")
    cases = [({"kind": "int9"}, "int9")]
    cases += [({"kind": kind, "threshold": 6.0}, f"threshold=6.*{kind}") for kind in ("weights", "weights-4")]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            quantize(neox(), **arguments)
    for kind in ("llm.int8", "weights", "weights-4"):
        with pytest.raises(ValueError, match="already quantized"):
            quantize(model, kind=kind)
    with pytest.raises(ValueError, match="quantized"):
        save_hf(model, tmp_path / "hf")
    with pytest.raises(ValueError, match="quantized"):
        LoRANeoX.of(model, LoRA(3))
    wrong = neox()
    wrong.readout.linear.kernel[...] = wrong.readout.linear.kernel[...].at[1, 2].set(jnp.nan)
    for kind in ("weights", "weights-4"):
        with pytest.raises(ValueError, match="NaN"):
            quantize(wrong, kind=kind)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [jnp.nan, -jnp.nan, jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_large_weight_with_one_number_that_is_none_is_refused(bits, value, dtype):
    """XLA drops NaN from the maximum of a long float32 array on CPUs."""
    linear = nnx.Linear(256, 67, param_dtype=dtype, rngs=nnx.Rngs(0))
    linear.kernel[...] = linear.kernel[...].at[3, 5].set(value)
    with pytest.raises(ValueError, match="NaN"):
        WeightOnlyLinear(linear, bits)
    with pytest.raises(ValueError, match="NaN"):
        Int8Linear(linear, 6.0)


@pytest.mark.parametrize(("kind", "share"), [("weights", 0.26), ("weights-4", 0.135)])
def test_bytes_are_a_share_of_float32_s(kind, share):
    whole = nnx.eval_shape(lambda: NeoX(NeoXConfig.pythia_70m(), rngs=nnx.Rngs(0)))
    small = nnx.eval_shape(lambda model: quantize(model, kind=kind), whole)

    def size(model):
        parts = jax.tree.leaves((nnx.state(model.layers), nnx.state(model.readout)))
        return sum(array.size * array.dtype.itemsize for array in parts)

    assert size(small) < share * size(whole)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_beyond_float32_is_refused(x64, bits):
    linear = nnx.Linear(7, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    linear.kernel[...] = linear.kernel[...].at[3, 2].set(1e39)
    with pytest.raises(ValueError, match="infinite or NaN"):
        WeightOnlyLinear(linear, bits)
