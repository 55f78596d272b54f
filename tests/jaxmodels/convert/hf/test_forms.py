"""Every form in which transformers and torch write the weights of a folder."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxmodels import command
from jaxmodels.convert import to_torch
from jaxmodels.convert.hf import load_hf, open_hf
from jaxmodels.convert.neox.layout import hf_name
from jaxmodels.process import extras
from jaxmodels.weights.lazy import read
from jaxmodels.weights.names import as_numpy
from tests.jaxmodels.convert.hf.folders import (
    buffers,
    edit_config,
    model,
    published,
    write_bin,
    write_config,
    write_index,
    write_safetensors,
    write_shards,
)


@pytest.fixture(scope="module")
def made():
    return model()


def held(folder, **options):
    """Tensors under the published names, as the converter reads them."""
    return {hf_name(key): read(tensor) for key, tensor in open_hf(folder, **options).tensors.items()}


def assert_equal(found, state):
    parameters = {name: tensor for name, tensor in state.items() if name in found}
    assert found.keys() == parameters.keys()
    assert len(found) in (39, 40)
    for name, tensor in parameters.items():
        expected = as_numpy(tensor)
        assert found[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


@pytest.mark.parametrize("shard", ["50KB", "5GB"])
def test_what_transformers_saves(tmp_path, made, shard):
    made.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
    assert_equal(held(tmp_path), published(made))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "safetensors shards", "bin shards"])
def test_files_single_and_in_shards(tmp_path, made, kind, variant):
    write_config(tmp_path, made)
    state, infix = published(made) | buffers(), f".{variant}" if variant else ""
    if kind == "safetensors":
        write_safetensors(tmp_path, state, f"model{infix}.safetensors")
    elif kind == "bin":
        write_bin(tmp_path, state, f"pytorch_model{infix}.bin")
    else:
        write_shards(tmp_path, state, kind.split()[0], infix)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, variant=variant, dtype="auto")
    assert torch.equal(theirs.lm_head.weight, state["embed_out.weight"])
    assert_equal(held(tmp_path, variant=variant), state)
    assert_equal(held(tmp_path), state)  # the only variant, too
    assert any("'fp16'" in note for note in open_hf(tmp_path).notes) == (variant is not None)


def test_variants_are_named(tmp_path, made):
    write_config(tmp_path, made)
    state = published(made)
    for variant in ("fp16", "bf16"):
        write_safetensors(tmp_path, state, f"model.{variant}.safetensors")
    with pytest.raises(ValueError, match=r"'bf16'.*'fp16'"):
        open_hf(tmp_path)
    assert_equal(held(tmp_path, variant="bf16"), state)
    with pytest.raises(ValueError, match=r"variant='fp32'.*'bf16'.*'fp16'"):
        open_hf(tmp_path, variant="fp32")


def test_files_are_chosen_as_transformers_chooses(tmp_path, made):
    """Each file holds another embedding; one after the other is removed."""
    write_config(tmp_path, made)
    states = [{**published(made), "embed_out.weight": torch.full((84, 60), i).half()} for i in range(4)]
    write_safetensors(tmp_path, states[0])
    map_1 = write_shards(tmp_path, states[1], "safetensors")
    write_bin(tmp_path, states[2])
    write_shards(tmp_path, states[3], "bin")
    for i, remove in enumerate(["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", None]):
        theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype="auto").lm_head.weight
        assert (theirs == i).all()
        assert (held(tmp_path)["embed_out.weight"] == i).all()
        assert any("index.json is ignored" in note for note in open_hf(tmp_path).notes) == (i in (0, 2))
        if remove is not None:
            (tmp_path / remove).unlink()
    assert set(map_1.values()) <= {file.name for file in tmp_path.iterdir()}  # shards without an index are not read


def test_an_index_of_other_files_is_stale(tmp_path, made):
    write_config(tmp_path, made)
    write_safetensors(tmp_path, published(made))
    write_index(
        tmp_path, {"gpt_neox.embed_in.weight": "model-00001-of-00009.safetensors"}, "model.safetensors.index.json"
    )
    assert_equal(held(tmp_path), published(made))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensors_that_the_index_does_not_name(tmp_path, made, kind):
    write_config(tmp_path, made)
    weight_map = write_shards(tmp_path, published(made), kind)
    index = tmp_path / ("pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json")
    write_index(tmp_path, {k: v for k, v in weight_map.items() if "layers.1." not in k}, index.name)
    assert_equal(held(tmp_path), published(made))
    assert any(re.search(r"\b12 tensors .*gpt_neox\.layers\.1\.", note) for note in open_hf(tmp_path).notes)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), made.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_tensor_that_its_file_lacks(tmp_path, made, kind):
    write_config(tmp_path, made)
    state, name = published(made), "gpt_neox.final_layer_norm.bias"
    weight_map = write_shards(tmp_path, {k: v for k, v in state.items() if k != name}, kind)
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    second = weight_map["embed_out.weight"]
    write_index(tmp_path, weight_map | {name: second}, index)
    with pytest.raises(ValueError, match=rf"^\S*{second} lacks {name}\b.*$"):
        open_hf(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(ValueError, match=rf"^\S*{index} names '{second}', which does not exist.*$"):
        open_hf(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{"])
def test_an_index_that_is_none(tmp_path, made, content):
    write_config(tmp_path, made)
    (tmp_path / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin\.index\.json\b"):
        open_hf(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path, made):
    write_config(tmp_path / "a", made)
    write_safetensors(tmp_path, published(made))
    write_index(tmp_path / "a", {"embed_out.weight": "../model.safetensors"}, "model.safetensors.index.json")
    with pytest.raises(ValueError, match=r"index\.json .*'\.\./model\.safetensors'"):
        open_hf(tmp_path / "a")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("spelling", ["./{}", ".//{}", "./././{}", "{}/"])
def test_an_index_has_one_name_for_a_file(tmp_path, made, kind, spelling):
    write_config(tmp_path, made)
    weight_map = write_shards(tmp_path, published(made), kind)
    (index,) = tmp_path.glob("*.index.json")
    write_index(tmp_path, {key: spelling.format(name) for key, name in weight_map.items()}, index.name)
    with pytest.raises(ValueError, match=rf"{index} names '.*', which is not a file in this folder"):
        open_hf(tmp_path)


def test_a_folder_without_weights_says_what_it_has(tmp_path, made):
    write_config(tmp_path, made)
    with pytest.raises(ValueError, match=r"model\.safetensors nor pytorch_model\.bin"):
        open_hf(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"tf_model\.h5"):
        open_hf(tmp_path)


def test_the_configuration_may_name_the_file(tmp_path, made):
    write_config(tmp_path, made, transformers_weights="tuned.safetensors")
    write_safetensors(tmp_path, published(made), "tuned.safetensors")
    assert_equal(held(tmp_path), published(made))
    assert transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (84, 60)


WRONG_KINDS = {
    "transformers_weights": (["tuned.safetensors"], 3, {}, True, "tuned\0.safetensors", "\x1b[31m.bin"),
    "architectures": ("GPTNeoXForCausalLM", 3, [["GPTNeoXForCausalLM"]], {}),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in WRONG_KINDS for value in WRONG_KINDS[key]], ids=str)
def test_a_name_in_the_configuration_that_is_none_is_refused(key, value, tmp_path, made, capsys):
    write_config(tmp_path, made)
    edit_config(tmp_path, **{key: value})
    write_safetensors(tmp_path, published(made), "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as refused:
        open_hf(tmp_path)
    assert str(refused.value).isprintable()
    assert command.main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


LAYOUTS = {
    "new": lambda state: state,
    "parameters": lambda state: {k: torch.nn.Parameter(v) for k, v in state.items()},
    "transposed in memory": lambda state: {
        k: v.t().contiguous().t() if v.ndim == 2 else torch.stack([v, v], -1)[..., 1] for k, v in state.items()
    },
    "views of one storage": lambda state: views(state),
    "one storage, expanded": lambda state: state | {"gpt_neox.final_layer_norm.bias": torch.ones(1).half().expand(60)},
}


def views(state):
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    return {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layouts_in_memory(tmp_path, layout, zip_file, dtype):
    made = model(dtype)
    write_config(tmp_path, made)
    state = LAYOUTS[layout](published(made))
    write_bin(tmp_path, state, _use_new_zipfile_serialization=zip_file)
    assert_equal(held(tmp_path), state)


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "before torch 1.6"])
def test_files_are_mapped_and_read_in_slices(tmp_path, made, zip_file):
    write_config(tmp_path, made)
    write_bin(tmp_path, published(made), _use_new_zipfile_serialization=zip_file)
    source = open_hf(tmp_path)
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    at = content.index(as_numpy(published(made)["embed_out.weight"]).tobytes())
    content[at : at + 2] = np.float16(7).tobytes()
    with (tmp_path / "pytorch_model.bin").open("r+b") as file:
        file.write(content)
    assert read(source.tensors["readout.linear.weight"], (slice(0, 1), slice(0, 1))) == 7


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_mix_of_dtypes_is_kept(tmp_path, suffix):
    made = model(torch.float32)
    write_config(tmp_path, made)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    state = {k: v.to(dtypes[i % 4]) for i, (k, v) in enumerate(published(made).items())} | buffers()
    (write_bin if suffix == "bin" else write_safetensors)(tmp_path, state)
    assert_equal(held(tmp_path), state)
    assert load_hf(tmp_path, dtype="bfloat16").readout.linear.kernel.dtype == jnp.bfloat16


def test_layers_of_different_dtypes_are_widened(tmp_path):
    made = model(torch.float16)
    write_config(tmp_path, made)
    state = published(made)
    name = "gpt_neox.layers.{}.attention.dense.weight"
    state[name.format(1)] = state[name.format(1)].bfloat16()
    write_safetensors(tmp_path, state)
    found = to_torch(load_hf(tmp_path))
    for i in range(3):
        kept = found[f"layers.{i}.attention.output.weight"]
        assert kept.dtype == np.float32
        np.testing.assert_array_equal(kept, as_numpy(state[name.format(i)].float()))
    assert found["layers.0.ffn.dense_h_h4.weight"].dtype == np.float16


@pytest.mark.parametrize(
    ("mask", "frequencies", "size"),
    [
        (torch.uint8, torch.float16, 77),
        (torch.bool, torch.bfloat16, 2),
        (torch.float16, torch.float32, 77),
        (torch.int64, torch.float64, 2_048),
    ],
)
def test_buffers_of_any_type(tmp_path, made, mask, frequencies, size):
    write_config(tmp_path, made)
    write_bin(tmp_path, published(made) | buffers(mask, frequencies, size))
    assert_equal(held(tmp_path), published(made))


def test_some_buffers_and_those_of_other_versions(tmp_path, made):
    write_config(tmp_path, made)
    some = dict(list(buffers().items())[:4])
    inverse = 1 / 9_000.0 ** (torch.arange(0, 4, 2) / 4)
    others = {f"gpt_neox.rotary_emb.{name}": inverse.half() for name in ("inv_freq", "original_inv_freq")}
    others["gpt_neox.layers.0.attention.norm_factor"] = torch.ones(())
    write_safetensors(tmp_path, published(made) | some | others)
    assert_equal(held(tmp_path), published(made))


@pytest.mark.parametrize("name", ["inv_freq", "original_inv_freq"])
def test_frequencies_of_all_layers_are_compared(tmp_path, made, name):
    write_config(tmp_path, made)
    inverse = 1 / 10_000.0 ** (torch.arange(0, 4, 2) / 4)
    write_safetensors(tmp_path, published(made) | {f"gpt_neox.rotary_emb.{name}": inverse})
    with pytest.raises(ValueError, match=rf"rotary_emb\.{name}=.*base=9000"):
        open_hf(tmp_path)


def test_low_frequencies_in_half_precision(tmp_path, made):
    """float16 holds 1e-6 to a third: that is rounding, no contradiction."""
    base = 5e9
    write_config(tmp_path, made, rope_parameters={"rope_theta": base, "partial_rotary_factor": 0.4})
    inverse = (1 / base ** (torch.arange(0, 4, 2) / 4)).half()
    write_bin(tmp_path, published(made) | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": inverse})
    assert open_hf(tmp_path).config.rope_base == base


def test_both_names_of_the_readout(tmp_path, made):
    write_config(tmp_path, made)
    state = published(made)
    write_bin(tmp_path, state | {"lm_head.weight": state["embed_out.weight"]})
    assert_equal(held(tmp_path), state)
    write_bin(tmp_path, state | {"lm_head.weight": state["embed_out.weight"] + 1})
    with pytest.raises(ValueError, match=r"unexpected lm_head\.weight"):
        open_hf(tmp_path)


@pytest.mark.parametrize("stored", [(), ("embed_out",), ("lm_head",), ("embed_out", "lm_head")], ids=str)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tied_with_and_without_the_tensor(tmp_path, stored, suffix):
    made = model(tie_word_embeddings=True)
    write_config(tmp_path, made)
    table = made.gpt_neox.embed_in.weight.detach()
    state = {k: v for k, v in published(made).items() if k != "embed_out.weight"} | {
        f"{name}.weight": table for name in stored
    }
    (write_bin if suffix == "bin" else write_safetensors)(tmp_path, state)
    source = open_hf(tmp_path)
    assert source.config.tied
    assert_equal(held(tmp_path), published(made))


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_without_its_readout(tmp_path, tied):
    made = model(tie_word_embeddings=tied)
    made.gpt_neox.save_pretrained(tmp_path)
    assert "embed_in.weight" in transformers.modeling_utils.load_state_dict(tmp_path / "model.safetensors")
    if tied:
        assert_equal(held(tmp_path), published(made))
    else:
        with pytest.raises(ValueError, match=r"model\.safetensors .*embed_out\.weight.*GPTNeoXModel"):
            open_hf(tmp_path)


def test_another_head_is_named(tmp_path):
    made = transformers.GPTNeoXForSequenceClassification(model().config)
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"GPTNeoXForSequenceClassification.*GPTNeoXForCausalLM"):
        open_hf(tmp_path)


def test_weights_are_those_that_transformers_computes_with(tmp_path):
    """The same logits, from a file in shards, in bfloat16 and without its configuration's dtype."""
    made = model(torch.bfloat16)
    write_config(tmp_path, made, dtype=None)
    write_shards(tmp_path, published(made), "bin")
    ids = np.random.default_rng(0).integers(0, 84, (2, 13))
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.as_tensor(ids)).logits.numpy()
    found = np.asarray(load_hf(tmp_path, dtype="float32")(jnp.asarray(ids)))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_pytorch_files_without_torch_name_the_extra(tmp_path, made, monkeypatch):
    write_config(tmp_path, made)
    write_bin(tmp_path, published(made))
    monkeypatch.setattr(extras, "available", lambda module: module != "torch")
    with pytest.raises(extras.MissingExtra, match=r"torch: pip install 'jaxmodels\[torch\]'"):
        open_hf(tmp_path)
