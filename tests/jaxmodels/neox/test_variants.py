"""RMSNorm, fewer heads of keys and values, linear maps without biases: Flax against PyTorch, the cache, int8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AbstractMesh

import jaxmodels
import torch_ref.neox
from jaxmodels.convert import to_torch
from jaxmodels.convert.peft import write_peft
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.neox.block import RMSNorm
from jaxmodels.neox.lora import LoRA, LoRANeoX
from jaxmodels.sharding import parameter_specs
from jaxmodels.weights.names import as_tensor, dotted, flat_arrays
from tests.common import B, S, V, assert_close, filled, normal, run
from tests.jaxmodels.neox.common import START, ids

CONFIG = NeoXConfig(V, 6 * 10, 2, 6, rope_percentage=0.4, n_ff=17, n_kv_heads=2)
FORMS = {
    "rmsnorm": {"norm": "rmsnorm", "layer_norm_eps": 0.1, "n_kv_heads": None},
    "grouped": {"n_kv_heads": 2},
    "one head of keys": {"n_kv_heads": 1, "tied": True, "attention_bias": False},
    "no biases": {"n_kv_heads": 3, "attention_bias": False, "ffn_bias": False, "parallel_residual": False},
}


def neox(**fields) -> NeoX:
    config = dataclasses.replace(CONFIG, **fields)
    return filled(lambda: NeoX(config, rngs=nnx.Rngs(0)), scale=0.3)


@pytest.mark.parametrize("form", FORMS)
def test_flax_computes_what_pytorch_computes(x64, form):
    model = neox(**FORMS[form])
    reference = torch_ref.neox.NeoX(model.settings).double()
    reference.load_state_dict({name: as_tensor(array) for name, array in to_torch(model).items()})
    with torch.no_grad():
        expected = reference(torch.as_tensor(np.array(ids())), torch.as_tensor(np.array(START))).numpy()
    assert_close(run(model, ids(), START), expected)


@pytest.mark.slow
def test_grouped_queries_share_keys_and_values():
    """The same as a model with a head of keys and values for each query, in copies."""
    model, whole = neox(), neox(n_kv_heads=None)
    for name in ("kernel", "bias"):
        own = getattr(model.layers.attention.qkv_lin, name)[...]
        heads = own.reshape(*own.shape[:-1], 2, 5, 10)  # K heads of keys and values; 3 queries, key, value; d_k
        copies = jnp.stack([jnp.stack([heads[..., i // 3, j, :] for j in (i % 3, 3, 4)], -2) for i in range(6)], -3)
        getattr(whole.layers.attention.qkv_lin, name)[...] = copies.reshape(*own.shape[:-1], 180)
    whole.layers.attention.output, whole.layers.ffn = model.layers.attention.output, model.layers.ffn
    whole.layers.pre_ln_attn, whole.layers.pre_ln_ffn = model.layers.pre_ln_attn, model.layers.pre_ln_ffn
    whole.embedding, whole.final_norm, whole.readout = model.embedding, model.final_norm, model.readout
    np.testing.assert_allclose(run(model, ids()), run(whole, ids()), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, jnp.minimum(START, 6)], ids=["whole", "ragged"])
def test_the_cache_has_the_heads_of_the_keys_and_equals_the_full_forward(x64, start):
    model = neox().unstacked()
    cache = model.init_cache(B, S, start=start)
    assert {array.shape for array in jax.tree.leaves(cache.layers)} == {(B, 2, S, 10)}
    full = run(model, ids(), start)
    last, cache = jax.jit(lambda m, i, c: m.prefill(i, c))(model, ids()[:, :7], cache)
    assert_close(last, full[:, 6])
    several, cache = jax.jit(lambda m, i, c: m.decode(i, c))(model, ids()[:, 7:11], cache)
    assert_close(several, full[:, 7:11])
    one, _ = jax.jit(lambda m, i, c: m.decode(i, c))(model, ids()[:, 11:12], cache)
    assert_close(one, full[:, 11:12])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rmsnorm_is_pytorch_s(dtype):
    norm = RMSNorm(31, 0.05, rngs=nnx.Rngs(0))
    norm.scale[...] = 1 + 0.3 * normal(3, 31)
    x = (300 * normal(4, 7, 31)).astype(dtype)  # the sum of squares is beyond float16
    theirs = torch.nn.RMSNorm(31, eps=0.05).double()
    with torch.no_grad():
        theirs.weight.copy_(as_tensor(np.array(norm.scale[...])))
        expected = theirs(torch.as_tensor(np.array(x, np.float64))).numpy()
    given = norm(x)
    assert given.dtype == jnp.float32  # as the scale
    np.testing.assert_allclose(given, expected, rtol=1e-6, atol=1e-6)
    half = RMSNorm(31, 0.05, dtype, rngs=nnx.Rngs(0))(x)
    assert half.dtype == dtype
    assert jnp.isfinite(half).all()


def test_int8_without_biases(tmp_path):
    model = neox(**FORMS["no biases"])
    linear = model.layers.attention.qkv_lin
    assert linear.bias is None
    expected, given = run(model, ids()), run(quantize(model, 0.0), ids())
    assert given.dtype == expected.dtype
    error = jnp.abs(given - expected).max() / jnp.abs(expected).max()
    assert 0 < error < 0.1
    jaxmodels.save(quantize(model, 0.0), tmp_path / "int8")
    np.testing.assert_array_equal(run(jaxmodels.load(tmp_path / "int8"), ids()), given)


def test_an_adapter_without_biases(tmp_path):
    model = LoRANeoX.of(neox(**FORMS["no biases"]), LoRA(3, targets=("query_key_value", "dense_4h_to_h")))
    for linear in (model.layers.attention.qkv_lin, model.layers.ffn.dense_h4_h):
        linear.lora_b[...] = 0.1 * normal(5, *linear.lora_b.shape)
    merged = model.merged()
    assert type(merged) is NeoX
    assert merged.settings == model.settings
    np.testing.assert_allclose(run(model, ids()), run(merged, ids()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="n_kv_heads=3"):
        write_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("stacked", [True, False])
def test_every_array_has_a_sharding_rule(stacked):
    config = dataclasses.replace(CONFIG, norm="rmsnorm", attention_bias=False, n_ff=18, n_vocab=24)
    model = nnx.eval_shape(lambda: NeoX(config, stacked=stacked, rngs=nnx.Rngs(0)))
    shapes = {dotted(path): array.shape for path, array in flat_arrays(model).items()}
    specs = parameter_specs(NeoX, shapes, AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor")))
    assert specs.keys() == shapes.keys()
    kernel = specs["layers.attention.qkv_lin.kernel" if stacked else "layers.1.attention.qkv_lin.kernel"]
    assert kernel[-2:] == ("fsdp", "tensor")


def test_gradients_reach_every_parameter():
    model = neox(norm="rmsnorm", attention_bias=False)
    loss = jax.jit(jax.grad(lambda model, ids: jnp.square(model(ids)).mean()))
    for name, gradient in to_torch(loss(model, ids())).items():
        assert np.abs(gradient).max() > 0, name
