"""A checkpoint takes the place of PyTorch's module, of Flax's, or of both."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx

import jaxmodels
import parity
import torch_ref.feedback
import torch_ref.neox
import torch_ref.retro
import torch_ref.transformer
from jaxmodels.convert import from_torch, to_torch
from jaxmodels.convert.hf import save_hf
from jaxmodels.convert.neox import save_neox
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.transformer import AutoregressiveTransformer
from parity.checkpoint import reference
from parity.checkpoint.gpt_neox import Transformers
from parity.checkpoint.pair import opened_pair
from parity.compare.comparison import Comparison
from parity.golden.fixture import SHIPPED, read
from parity.golden.replay import rebuilt
from tests.parity.pairs import mlp

CONFIG = NeoXConfig(13, 3 * 4, 1, 3, n_ff=17, rope_percentage=0.5, activation="gelu_tanh", max_len=29)
IDS = np.random.default_rng(0).integers(0, 13, (2, 7))


def neox(config=CONFIG, seed=0, dtype=jnp.float32) -> NeoX:
    return NeoX(config, rngs=nnx.Rngs(seed)) if dtype is None else cast(NeoX(config, rngs=nnx.Rngs(seed)), dtype)


def cast(model, dtype):
    return from_torch(model, to_torch(model), dtype)


def transformer() -> AutoregressiveTransformer:
    return AutoregressiveTransformer(13, 12, 3, 17, 1, rngs=nnx.Rngs(0))


def state_of(module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def assert_same(module, tensors):
    state = state_of(module)
    assert state.keys() == tensors.keys()
    for name, array in tensors.items():
        assert np.array_equal(state[name], array), name


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("synthesizer.random+vanilla", torch_ref.transformer.AutoregressiveTransformer),
        ("feedback.shared", torch_ref.feedback.AutoregressiveModel),
        ("retro.neighbors", torch_ref.retro.RetroModel),
        ("neox.sequential", torch_ref.neox.NeoX),
    ],
)
def test_a_state_dict_is_loaded_into_the_twin_of_every_model(name, twin):
    fixture = read(SHIPPED / name)
    flax_module = rebuilt(fixture)
    opened = opened_pair(fixture.state, flax_module)
    assert type(opened.torch) is twin
    assert_same(opened.torch, fixture.state)
    assert all(parameter.requires_grad for parameter in opened.torch.parameters())
    assert opened.flax is flax_module
    assert opened.kept is None
    inputs = [torch.tensor(value) for value in fixture.inputs.named().values()]
    with torch.no_grad():
        (output,) = fixture.results["output"].values()
        assert np.allclose(opened.torch.eval()(*inputs).numpy(), output, atol=1e-4)


@pytest.mark.slow
def test_both_sides_of_a_file_compute_the_same(tmp_path):
    flax_module = transformer()
    comparison = Comparison.of(save_file(tmp_path / "model.pt", flax_module), flax_module, IDS.T)
    with comparison.strict_precision(False):
        theirs = comparison.torch_side("float32")
        (expected,) = theirs.outputs(comparison.inputs).values()
        (found,) = comparison.jax_side("float32", theirs.state_dict()).outputs(comparison.inputs).values()
    assert np.allclose(found, expected, atol=1e-5)
    assert any("torch_ref" in note and "model.pt" in note for note in comparison.notes)
    constant = theirs.state_dict()["encoder.norm.bias"]  # zero in the file, and perturbed as in every check
    assert constant.abs().min() > 0


def test_files_and_state_dicts_of_transformers_and_of_the_original_have_other_names(tmp_path):
    model = neox()
    save_hf(model, tmp_path / "hf")
    published = {name: t.clone() for name, t in Transformers(CONFIG, str(tmp_path / "hf")).model.state_dict().items()}
    assert "gpt_neox.embed_in.weight" in published
    published["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    safetensors.torch.save_file(published, tmp_path / "model.safetensors")
    assert_same(opened_pair(tmp_path / "model.safetensors", model).torch, to_torch(model))
    flat = {"embedding": "0", "layers.0": "1", "final_norm": "2", "readout": "3"}
    original = {}
    for name, array in to_torch(model).items():
        part = next(part for part in flat if name.startswith(part))
        original[name.replace(part, flat[part])] = torch.tensor(array)
    assert_same(opened_pair(original, model).torch, to_torch(model))


def test_every_tensor_that_does_not_fit_is_named():
    tensors = to_torch(transformer())
    del tensors["src_embed.weight"], tensors["encoder.norm.bias"]
    tensors["other.weight"] = np.zeros(3, np.float32)
    tensors["encoder.norm.weight"] = np.zeros(5, np.float32)
    with pytest.raises(ValueError, match=r"the state_dict") as error:
        parity.check(tensors, transformer(), IDS.T)
    for name in ("src_embed.weight", "encoder.norm.bias", "other.weight", "encoder.norm.weight"):
        assert name in str(error.value)


def test_a_hugging_face_folder_runs_in_transformers_if_it_is_installed(tmp_path, monkeypatch):
    model = neox(dtype=jnp.bfloat16)
    save_hf(model, tmp_path / "hf")
    content = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"torch_dtype": "float16"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content))
    opened = opened_pair(tmp_path / "hf", model)
    assert type(opened.torch) is Transformers
    assert {tensor.dtype for tensor in opened.torch.state_dict().values()} == {torch.bfloat16}  # as stored
    assert any(f"transformers {transformers.__version__}" in note for note in opened.notes)
    monkeypatch.setattr(reference, "available", lambda module: module != "transformers")
    other = opened_pair(tmp_path / "hf", model)
    assert type(other.torch) is torch_ref.neox.NeoX
    assert any("torch_ref" in note and "not installed" in note for note in other.notes)
    theirs, ours = opened.torch.state_dict(), other.torch.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_what_a_configuration_says_otherwise_is_noted(tmp_path):
    save_hf(neox(), tmp_path / "hf")
    model = neox(dataclasses.replace(CONFIG, activation="gelu"))
    assert any("activation: gelu_tanh and gelu" in note for note in opened_pair(tmp_path / "hf", model).notes)


def test_a_folder_as_the_flax_module_keeps_its_own_weights_and_gives_its_dtype(tmp_path):
    model = neox(dtype=jnp.bfloat16)
    wide = {name: array.astype(np.float32) for name, array in to_torch(model).items()}
    wide["final_norm.ln.weight"] = wide["final_norm.ln.weight"] + np.float32(1 / 4)
    jaxmodels.save(model, tmp_path / "ours")
    comparison = Comparison.of(wide, tmp_path / "ours", IDS)
    assert comparison.torch.state_dict()["final_norm.ln.weight"].dtype == torch.bfloat16
    assert comparison.torch.state_dict()["final_norm.ln.weight"][0] == 1.25
    with comparison.strict_precision(False):
        held = comparison.jax_side("float32").module.final_norm.ln.scale[...]
    assert held[0] == 1
    assert wide["final_norm.ln.weight"].dtype == np.float32


def test_shards_without_a_configuration_have_that_of_the_other_side(tmp_path):
    model = neox()
    save_neox(model, tmp_path / "shards", 1)
    for file in (tmp_path / "shards").rglob("*.yml"):
        file.unlink()
    opened = opened_pair(tmp_path / "shards", model)
    assert_same(opened.torch, to_torch(model))
    assert any("no configuration" in note for note in opened.notes)
    save_hf(model, tmp_path / "hf")
    assert_same(opened_pair(tmp_path / "shards", tmp_path / "hf").torch, to_torch(model))


def test_another_model_and_files_that_do_not_exist_are_refused(tmp_path):
    jaxmodels.save(neox(), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"NeoX.*AutoregressiveTransformer"):
        opened_pair(tmp_path / "ours", transformer())
    with pytest.raises(ValueError, match=r"nothing\.pt does not exist"):
        parity.check(tmp_path / "nothing.pt", transformer(), IDS)
    with pytest.raises(ValueError, match=r"torch_module=dict\b.*state_dict.*; a is not"):
        opened_pair({"a": 3}, transformer())
    with pytest.raises(ValueError, match=r"must be a folder"):
        opened_pair(to_torch(neox()), save_file(tmp_path / "x.pt", neox()))
    with pytest.raises(ValueError, match=r"names.*flax_module"):
        parity.check(to_torch(neox()), tmp_path / "ours", IDS, names={"a": "b"})


def test_a_file_may_hold_the_state_dict_as_one_entry(tmp_path):
    tensors = torch.load(save_file(tmp_path / "model.pt", neox()))
    torch.save({"step": 3, "model": tensors, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}, tmp_path / "run.pt")
    opened = opened_pair(tmp_path / "run.pt", neox())
    assert_same(opened.torch, to_torch(neox()))
    assert any("'model'" in note for note in opened.notes)
    torch.save({"model": tensors, "average": tensors}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"two\.pt.*'model', 'average'"):
        opened_pair(tmp_path / "two.pt", neox())


def test_sides_in_the_wrong_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"torch_module=NeoX, flax_module=dict"):
        parity.check(neox(), to_torch(neox()), IDS)


def save_file(file, model):
    torch.save({name: torch.tensor(array) for name, array in to_torch(model).items()}, file)
    return file


def test_a_model_without_a_twin_needs_a_module():
    torch_module, flax_module, x = mlp()
    with pytest.raises(ValueError, match=r"torch_module must be a torch\.nn\.Module for flax_module=FlaxMLP"):
        parity.check(torch_module.state_dict(), flax_module, x)
    with pytest.raises(ValueError, match=r"torch_module=OrderedDict"):
        parity.suggest(torch_module.state_dict(), flax_module)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "nobody/nothing"}, "adapter_config"),
        ("config.json", {"dtype": "\x1b[31m"}, r"hf cannot be loaded by transformers: .*'\\x1b\[31m'"),
    ],
)
def test_what_transformers_alone_reads_in_a_folder_is_a_value_error_too(file, content, match, tmp_path):
    save_hf(neox(), tmp_path / "hf")
    path = tmp_path / "hf" / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
    with pytest.raises(ValueError, match=match):
        opened_pair(tmp_path / "hf", neox())
