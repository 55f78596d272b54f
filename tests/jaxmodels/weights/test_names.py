"""Conversion between PyTorch state dicts and Flax arrays."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from jaxmodels.convert import ConversionError, from_torch, load_into_torch, to_torch
from jaxmodels.layers import FeedForward, Fixed, LayerNorm
from jaxmodels.transformer import AutoregressiveTransformer
from jaxmodels.weights.names import as_numpy, as_tensor, flat_arrays
from tests.common import (
    ATTENTIONS,
    B,
    S,
    V,
    arguments,
    assert_close,
    language_model,
    normal,
    run,
    token_ids,
    torch_language_model,
)
from torch_ref.layers import FeedForward as TorchFeedForward

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def abstract(attention):
    return nnx.eval_shape(lambda: AutoregressiveTransformer(**arguments(attention), rngs=nnx.Rngs(0)))


def bits(tensor):
    """A tensor's or an array's bytes: NaN, -0.0 and bfloat16 compare too."""
    return (tensor.contiguous().view(torch.uint8).numpy() if isinstance(tensor, torch.Tensor) else tensor).tobytes()


def assert_same_bits(a, b):
    assert sorted(a) == sorted(b)
    for key in a:
        assert tuple(a[key].shape) == tuple(b[key].shape), key
        assert bits(a[key]) == bits(b[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_round_trip_is_bit_exact(attention, dtype):
    with jax.enable_x64(dtype == "float64"):
        module = torch_language_model(attention).to(DTYPES[dtype])
        state_dict = module.state_dict()
        key = next(iter(state_dict))
        state_dict[key].view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
        model = from_torch(abstract(attention), state_dict)
        assert {str(array.dtype) for array in flat_arrays(model).values()} == {dtype}
        arrays = to_torch(model)
        assert_same_bits(arrays, state_dict)
        assert all(array.flags["C_CONTIGUOUS"] and array.flags["WRITEABLE"] for array in arrays.values())
        assert_same_bits(to_torch(from_torch(model, arrays)), state_dict)  # numpy arrays, and a model with values
        other = torch_language_model(attention, seed=1).to(DTYPES[dtype])
        load_into_torch(other, model)
        assert_same_bits(other.state_dict(), state_dict)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_converted_model_computes_the_same(attention):
    module, ids = torch_language_model(attention).double(), token_ids(0, S, B)
    model = from_torch(abstract(attention), module.state_dict())
    with torch.no_grad():
        assert_close(run(model, ids), module(torch.tensor(np.asarray(ids))).numpy(), 1e-10)


def test_fixed_arrays_are_carried_as_buffers():
    module = torch_language_model("fixed_random")
    name = "encoder.layers.1.self_attn.fixed_random.table"
    assert name in dict(module.named_buffers())
    table = from_torch(abstract("fixed_random"), module.state_dict()).encoder.layers[1].self_attn.fixed_random.table
    assert isinstance(table, Fixed)
    np.testing.assert_array_equal(table[...], module.state_dict()[name])


def test_every_misfit_in_one_error_and_nothing_changed():
    model = language_model("rotary")
    before = to_torch(model)
    state_dict = torch_language_model("rotary").state_dict()
    del state_dict["src_embed.weight"], state_dict["encoder.norm.bias"]
    state_dict["encoder.layers.2.norm_ff.weight"] = torch.zeros(12)
    state_dict["generator.projection.kernel"] = torch.zeros(3)
    state_dict["generator.projection.weight"] = torch.zeros(V, 13)
    state_dict["encoder.norm.weight"] = torch.zeros(12, dtype=torch.int32)
    with pytest.raises(ConversionError) as caught:
        from_torch(model, state_dict)
    assert caught.value.problems == {
        "missing": ["encoder.norm.bias", "src_embed.weight"],
        "unexpected": ["encoder.layers.2.norm_ff.weight", "generator.projection.kernel"],
        "misshapen": ["generator.projection.weight: got [23, 13], the model has [23, 12]"],
        "of another kind": ["encoder.norm.weight: got int32, the model has float32"],
    }
    for entries in caught.value.problems.values():
        assert all(entry in str(caught.value) for entry in entries)
    assert isinstance(caught.value, ValueError)
    assert_same_bits(to_torch(model), before)


def test_a_misfit_is_one_line_with_a_few_names_whatever_they_hold():
    names = [f"a.{i}.b" for i in range(7)] + [f"\u202e{c}\n\x1b[2J{c * 500}" for c in "cdefgh"]
    error = ConversionError({"missing": names, "unexpected": ["x\ny"], "misshapen": []})
    assert str(error).isprintable()
    assert "missing (13): a.0.b (and 6 alike), " in str(error)
    assert r"\u202ec\n\x1b[2Jcc" in str(error)
    assert str(error).count(r"\u202e") == 4
    assert r"… and 2 more; unexpected (1): x\ny" in str(error)
    assert len(str(error)) < 2_500
    notes = "\n".join(error.__notes__)
    assert notes.count(r"\u202e") == 6
    assert notes.replace("\n", "").isprintable()


def test_a_transposed_square_matrix_cannot_be_told_but_others_can():
    state_dict = torch_language_model("rotary").state_dict()
    key = "encoder.layers.0.feed_forward.layer1.weight"
    state_dict[key] = state_dict[key].T
    with pytest.raises(ConversionError, match=r"layer1\.weight: .*\[12, 17\].*\[17, 12\]"):
        from_torch(abstract("rotary"), state_dict)


def test_float64_needs_x64():
    state_dict = torch_language_model("rotary").double().state_dict()
    with pytest.raises(ConversionError, match="jax_enable_x64") as caught:
        from_torch(abstract("rotary"), state_dict)
    assert caught.value.problems == {
        "64 bits wide while jax_enable_x64 is off and no dtype is given": sorted(state_dict)
    }
    with pytest.raises(ConversionError, match="jax_enable_x64"):
        from_torch(abstract("rotary"), torch_language_model("rotary").state_dict(), dtype=np.float64)
    model = from_torch(abstract("rotary"), state_dict, dtype=jnp.float32)
    assert_same_bits(to_torch(model), {key: tensor.float() for key, tensor in state_dict.items()})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16", np.float32, np.dtype("float32")], ids=str)
def test_dtype_casts(dtype):
    state_dict = torch_language_model("rotary").state_dict()
    name = jnp.dtype(dtype).name
    expected = {key: tensor.to(DTYPES[name]) for key, tensor in state_dict.items()}
    assert_same_bits(to_torch(from_torch(abstract("rotary"), state_dict, dtype=dtype)), expected)


def test_dtype_refuses_a_value_that_overflows():
    state_dict = torch_language_model("rotary").state_dict()
    state_dict["generator.projection.bias"][3] = 1e5
    with pytest.raises(ValueError, match=r"generator\.projection\.bias has values that overflow in dtype=float16"):
        from_torch(abstract("rotary"), state_dict, dtype="float16")
    state_dict["generator.projection.bias"][3] = float("inf")
    from_torch(abstract("rotary"), state_dict, dtype="float16")


def test_the_result_is_a_copy():
    module = torch_language_model("rotary")
    model = from_torch(abstract("rotary"), module.state_dict())
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    assert_same_bits(to_torch(model), before)
    for array in to_torch(model).values():
        array.fill(7)
    assert_same_bits(to_torch(model), before)


def test_torch_layouts():
    """A state_dict may hold parameters, transposed views, tensors that want gradients."""
    module = torch_language_model("rotary")
    odd = {key: parameter.T.contiguous().T for key, parameter in module.named_parameters() if parameter.ndim == 2}
    model = from_torch(abstract("rotary"), dict(module.named_parameters()) | odd)
    assert_same_bits(to_torch(model), module.state_dict())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_and_states():
    attention = "random+vanilla"
    module, ids = torch_language_model(attention).double(), token_ids(0, S, B)
    weights = normal(1, S, B, V)
    (module(torch.tensor(np.asarray(ids))) * torch.tensor(np.asarray(weights))).sum().backward()
    model = from_torch(abstract(attention), module.state_dict())
    gradients = jax.jit(jax.grad(lambda model: (model(ids) * weights).sum()))(model)
    expected = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for key, gradient in to_torch(gradients).items():
        np.testing.assert_allclose(gradient, expected[key], rtol=0, atol=1e-11 * largest, err_msg=key)
    assert_same_bits(to_torch(nnx.state(model)), to_torch(model))
    assert set(to_torch(nnx.state(model, nnx.Param))) == set(expected)


class StackedBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = LayerNorm(5, rngs=rngs)
        self.feed_forward = FeedForward(5, 7, rngs=rngs)


class Stacked(nnx.Module):
    """`layers` as one module whose arrays have a leading axis of three layers."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda rngs: StackedBlock(rngs))(rngs.split(3))
        self.last = LayerNorm(5, rngs=rngs)


def torch_stack(n=3):
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList()
    for _ in range(n):
        block = torch.nn.Module()
        block.norm, block.feed_forward = torch.nn.LayerNorm(5), TorchFeedForward(5, 7)
        torch.nn.init.normal_(block.norm.weight)
        module.layers.append(block)
    module.last = torch.nn.LayerNorm(5)
    return module


def test_stacked_layers():
    module = torch_stack()
    model = from_torch(Stacked(nnx.Rngs(0)), module.state_dict())
    chex.assert_shape(model.layers.feed_forward.layer1.kernel, (3, 5, 7))
    for i in range(3):
        weight = module.state_dict()[f"layers.{i}.feed_forward.layer1.weight"]
        np.testing.assert_array_equal(model.layers.feed_forward.layer1.kernel[i], weight.T)
    assert_same_bits(to_torch(model), module.state_dict())
    other = torch_stack()
    load_into_torch(other, model)
    assert_same_bits(other.state_dict(), module.state_dict())


@pytest.mark.parametrize(("n", "kind"), [(2, "missing"), (4, "unexpected")])
def test_stacked_layers_of_another_depth(n, kind):
    with pytest.raises(ConversionError) as caught:
        from_torch(nnx.eval_shape(lambda: Stacked(nnx.Rngs(0))), torch_stack(n).state_dict())
    parts = ["feed_forward.layer1", "feed_forward.layer2", "norm"]
    entries = [f"layers.{min(n, 3)}.{part}.{name}" for part in parts for name in ("bias", "weight")]
    assert {kind: sorted(entries)} == {kind: sorted(found) for kind, found in caught.value.problems.items()}


def test_two_arrays_for_one_tensor_are_refused():
    model = FeedForward(3, 5, rngs=nnx.Rngs(0))
    model.layer1.scale = nnx.Param(jnp.ones((5, 3)))
    with pytest.raises(ConversionError) as caught:
        from_torch(model, TorchFeedForward(3, 5).state_dict())
    assert caught.value.problems["ambiguous in the model"] == ["layer1.weight"]


def test_load_into_torch_refuses_what_does_not_fit():
    model = language_model("rotary")
    module = torch_language_model("rotary")
    module.generator.projection = torch.nn.Linear(12, V + 1)
    module.encoder.norm.half()
    module.extra = torch.nn.Linear(2, 3, bias=False)
    module.src_embed = torch.nn.Identity()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(ConversionError) as caught:
        load_into_torch(module, model)
    assert caught.value.problems == {
        "missing in the model": ["extra.weight"],
        "unexpected by the module": ["src_embed.weight"],
        "misshapen": [
            "generator.projection.bias: the model gives [23], the module has [24]",
            "generator.projection.weight: the model gives [23, 12], the module has [24, 12]",
        ],
        "of another dtype": [
            "encoder.norm.bias: the model gives float32, the module has torch.float16",
            "encoder.norm.weight: the model gives float32, the module has torch.float16",
        ],
    }
    assert_same_bits(module.state_dict(), before)


def test_bfloat16_arrays_are_ml_dtypes():
    model = from_torch(abstract("rotary"), torch_language_model("rotary").bfloat16().state_dict())
    assert {array.dtype for array in to_torch(model).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_floats_of_8_bits_are_named_in_both_directions():
    array = np.zeros((2, 3), ml_dtypes.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"float8_e4m3fn \[2, 3\]"):
        as_tensor(array)
    with pytest.raises(ValueError, match=r"float8_e4m3fn"):
        as_numpy(torch.zeros(2, 3, dtype=torch.float8_e4m3fn))


def test_a_view_that_conjugates_or_negates_has_its_values():
    numbers = torch.tensor([[1 + 2j, 3 - 5j]])
    for view in (numbers.conj(), numbers.conj().imag, torch._neg_view(numbers.real)):
        np.testing.assert_array_equal(as_numpy(view), view.clone().resolve_conj().resolve_neg().numpy())
    assert as_numpy(numbers.conj().imag).tolist() == [[-2.0, 5.0]]
