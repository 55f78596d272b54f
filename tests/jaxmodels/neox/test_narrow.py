"""A NeoX with weights in 16 bits and float32 arithmetic: the numbers of the float32 model, without its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import native
from jaxmodels.generate import generate
from jaxmodels.neox import NeoX, quantize
from jaxmodels.neox.lora import LoRA, LoRANeoX
from jaxmodels.weights.precision import for_inference
from tests.common import run
from tests.jaxmodels.neox.common import FORMS, ids, neox

needs_kernel = pytest.mark.skipif(not native.available(), reason="the kernel cannot be compiled here")


def cast(model, dtype):
    return jax.tree.map(lambda array: array.astype(dtype), model)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(("form", "dtype"), [("parallel", "float16"), ("tied", "bfloat16"), ("variant", "bfloat16")])
def test_logits_and_tokens_are_those_of_the_float32_model(form, dtype):
    model = cast(neox(**FORMS[form]), dtype)
    small, wide = model.narrowed(), cast(model, "float32")
    expected = run(wide, ids())
    np.testing.assert_allclose(run(small, ids()), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(generate(model, ids()[:, :7], 5), generate(wide, ids()[:, :7], 5))
    assert small.init_cache(2, 7).layers[0]["key"].dtype == jnp.float32
    assert small.narrowed() is small
    assert for_inference(small) is small
    assert for_inference(small, "float32").readout.linear.weight.dtype == jnp.float32 if form != "tied" else True
    assert not model.settings.dtype  # the given one is as it was


@needs_kernel
def test_the_weights_stay_in_16_bits():
    model = cast(neox(stacked=False), "float16")
    small = model.narrowed()
    before, after = model.layers[1].ffn.dense_h_h4, small.layers[1].ffn.dense_h_h4
    np.testing.assert_array_equal(after.weight[...], before.kernel[...].T)
    assert (after.weight.dtype, small.readout.linear.weight.dtype) == (jnp.float16, jnp.float16)
    assert small.embedding.emb.embedding[...] is model.embedding.emb.embedding[...]
    assert (after.bias.dtype, small.layers[0].pre_ln_attn.scale.dtype) == (jnp.float32, jnp.float32)


def test_models_without_one():
    narrow = cast(neox(), "float16")
    mixed = cast(neox(stacked=False), "float16")
    mixed.layers[1].attention.output.kernel = nnx.Param(mixed.layers[1].attention.output.kernel[...].astype("float32"))
    adapted = LoRANeoX.of(cast(neox(stacked=False), "float16"), LoRA(3))
    for model in (neox(), mixed, quantize(narrow), quantize(narrow, kind="weights"), adapted):
        assert model.narrowed() is None
    assert cast(neox(dtype="float16"), "float16").narrowed() is None


def test_without_the_kernel_the_weights_are_cast(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    model = cast(neox(), "float16")
    assert model.narrowed() is None
    prepared = for_inference(model)
    assert type(prepared) is NeoX
    assert {array.dtype for array in jax.tree.leaves(prepared)} == {jnp.dtype("float32")}


@needs_kernel
def test_the_training_step_and_the_call_of_the_model_do_not_use_it():
    model = cast(neox(), "float16")
    assert "jaxmodels_products" not in jax.jit(lambda model, ids: model(ids)).lower(model, ids()).as_text()
    small = model.narrowed()
    assert "jaxmodels_products" in jax.jit(lambda model, ids: model(ids)).lower(small, ids()).as_text()
