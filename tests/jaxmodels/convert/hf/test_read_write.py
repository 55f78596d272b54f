"""GPT-NeoX as `transformers` has it: it reads what we write, and we read what it writes."""

import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from jaxmodels.convert import to_torch
from jaxmodels.convert.hf import load_hf, open_hf, save_hf, write_hf
from jaxmodels.convert.neox import load_neox
from jaxmodels.convert.neox.read import open_neox
from jaxmodels.neox import NeoXConfig
from jaxmodels.text import TokenizerFile
from tests.common import run
from tests.jaxmodels.convert.neox.test_read import TIED, assert_holds
from tests.jaxmodels.convert.neox.test_write import limited
from tests.jaxmodels.convert.originals import CONFIG, write

TANH = dataclasses.replace(CONFIG, activation="gelu_tanh", parallel_residual=False, layer_norm_eps=1e-3)
UNBIASED = dataclasses.replace(CONFIG, attention_bias=False)
FLOAT32 = {"dtype": torch.float32}


def transformers_model(folder) -> transformers.GPTNeoXForCausalLM:
    model, info = transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    "config", [CONFIG, TANH, TIED, UNBIASED], ids=["parallel", "sequential, tanh", "tied", "no biases in attention"]
)
def test_transformers_gives_the_same_logits(tmp_path, config):
    """To float32's rounding: as near to the float64 truth as theirs. Another GELU would be 1000 times as far."""
    state = write(tmp_path / "source", 2, config, **FLOAT32)
    model = load_neox(tmp_path / "source")
    save_hf(model, tmp_path / "hf")
    theirs = transformers_model(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    ids = np.random.default_rng(0).integers(0, config.n_vocab, (3, 61))
    with torch.no_grad():
        logits = theirs(torch.as_tensor(ids)).logits.numpy()
        truth = theirs.double()(torch.as_tensor(ids)).logits.numpy()
    error = np.abs(np.asarray(run(model, ids), np.float64) - truth).max()
    assert error <= 4 * np.abs(logits - truth).max() + 1e-6
    assert_holds(load_hf(tmp_path / "hf"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_several_files(tmp_path, dtype):
    state = write(tmp_path / "source", 2, dtype=dtype)
    write_hf(open_neox(tmp_path / "source"), tmp_path / "hf", file_bytes=200_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    theirs = transformers_model(tmp_path / "hf").state_dict()
    assert theirs["gpt_neox.embed_in.weight"].dtype == dtype
    assert torch.equal(theirs["gpt_neox.embed_in.weight"], state["embedding.emb.weight"])
    key = "layers.1.attention.dense.weight"
    assert torch.equal(theirs[f"gpt_neox.{key}"], state["layers.1.attention.output.weight"])
    assert_holds(load_hf(tmp_path / "hf"), state)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves(tmp_path, tied):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 9_000.0, "partial_rotary_factor": 0.4}
    said = transformers.GPTNeoXConfig(
        vocab_size=84,
        hidden_size=120,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=156,
        max_position_embeddings=77,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        hidden_act="gelu_new",
    )
    theirs = transformers.GPTNeoXForCausalLM(said)
    theirs.save_pretrained(tmp_path)
    source = open_hf(tmp_path)
    assert source.config == dataclasses.replace(CONFIG, tied=tied, activation="gelu_tanh")
    assert source.notes == ("hidden_act 'gelu_new' in config.json means gelu_tanh here",)
    given = to_torch(source.model())
    qkv = theirs.state_dict()["gpt_neox.layers.2.attention.query_key_value.weight"]
    np.testing.assert_array_equal(given["layers.2.attention.qkv_lin.weight"], qkv.numpy())


def test_the_end_of_text_is_token_0_or_what_the_source_says(tmp_path):
    folder = hf_folder(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 0)
    edit_config(folder, bos_token_id=7, eos_token_id=[5, 3], pad_token_id=1)
    write_hf(open_hf(folder), tmp_path / "again")
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert [said[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [7, [5, 3], 1]


def hf_folder(tmp_path, config=CONFIG, **write_options):
    write(tmp_path / "source", 1, config, **write_options)
    write_hf(open_neox(tmp_path / "source"), tmp_path / "hf")
    return tmp_path / "hf"


def edit_config(folder, **values):
    file = folder / "config.json"
    said = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(change({k: v.clone() for k, v in tensors.items()}), file, {"format": "pt"})


@pytest.mark.parametrize("keys", ["old", "new", "both", "neither"])
def test_older_and_newer_rotary_keys(tmp_path, keys):
    folder = hf_folder(tmp_path)
    if keys in ("old", "neither"):
        edit_config(folder, rope_parameters=None)
    if keys in ("new", "neither"):
        edit_config(folder, rotary_pct=None, rotary_emb_base=None)
    expected = (0.25, 10_000) if keys == "neither" else (0.4, 9_000)
    config = open_hf(folder).config
    assert (config.rope_percentage, config.rope_base) == expected
    theirs = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert (theirs["partial_rotary_factor"], theirs["rope_theta"]) == expected


def test_an_adapter_beside_whole_weights_is_said(tmp_path):
    """transformers adds it if peft is installed; in a folder of merged weights it is left over."""
    folder = hf_folder(tmp_path)
    assert not [note for note in open_hf(folder).notes if "adapter" in note]
    (folder / "adapter_config.json").write_text("{}")
    assert any(note.startswith("adapter_config.json is not read") for note in open_hf(folder).notes)


def test_masks_and_frequencies_of_older_files_are_skipped(tmp_path):
    state = write(tmp_path / "source", 1)
    write_hf(open_neox(tmp_path / "source"), tmp_path / "hf")
    at = "gpt_neox.layers.1.attention."
    extra = {
        f"{at}bias": torch.ones(77, 77).tril()[None, None].bool(),
        f"{at}masked_bias": torch.tensor(-1e9),
        f"{at}rotary_emb.inv_freq": 1 / 9_000.0 ** (torch.arange(0, 4, 2) / 4),
    }
    edit_tensors(tmp_path / "hf", lambda tensors: tensors | extra)
    assert_holds(load_hf(tmp_path / "hf"), state)
    edit_tensors(tmp_path / "hf", lambda tensors: tensors | {f"{at}rotary_emb.inv_freq": torch.ones(2)})
    with pytest.raises(ValueError, match=r"model\.safetensors: .*inv_freq=.*base=9000\b"):
        load_hf(tmp_path / "hf")


def test_a_tied_readout_that_is_stored_must_be_the_embedding(tmp_path):
    folder = hf_folder(tmp_path, TIED)
    edit_tensors(folder, lambda tensors: tensors | {"lm_head.weight": tensors["gpt_neox.embed_in.weight"].clone()})
    assert load_hf(folder).settings.tied
    edit_tensors(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match=r"unexpected embed_out\.weight"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "config.json has model_type 'llama'"),
        ({"vocab_size": None}, "config.json lacks vocab_size"),
        ({"hidden_act": "relu"}, "config.json has hidden_act 'relu'"),
        ({"attention_bias": False}, "unexpected gpt_neox.layers.0.attention.query_key_value.bias"),
        ({"attention_bias": "no"}, "config.json has attention_bias 'no'"),
        (
            {"num_key_value_heads": 3},
            "has num_key_value_heads 3; supported is that of num_attention_heads, 12",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "config.json has scaled rotary embeddings"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "config.json has scaled rotary embeddings"),
        ({"rope_parameters": "default"}, "config.json has rope_parameters 'default'"),
        ({"rope_parameters": {"rope_theta": "many"}}, "config.json has rope_theta 'many'"),
        ({"hidden_act": ["gelu"]}, "config.json has hidden_act ['gelu']"),
        ({"hidden_act": {"gelu": 1}}, "config.json has hidden_act {'gelu': 1}"),
        ({"hidden_size": {"a": 1}}, "config.json has hidden_size {'a': 1}"),
        ({"hidden_size": [120]}, "config.json has hidden_size [120]"),
        ({"hidden_size": "wide"}, "config.json has hidden_size 'wide'"),
        ({"num_hidden_layers": True}, "config.json has num_hidden_layers True"),
        ({"tie_word_embeddings": "false"}, "config.json has tie_word_embeddings 'false'"),
        ({"num_attention_heads": 7}, "config.json: n_hidden=120"),
        ({"num_hidden_layers": 4}, "missing gpt_neox.layers.3.attention.dense.bias"),
        ({"num_hidden_layers": 2}, "unexpected gpt_neox.layers.2.attention.dense.bias"),
        ({"vocab_size": 85}, "gpt_neox.embed_in.weight has shape [84, 120], expected [85, 120]"),
        ({"tie_word_embeddings": True}, "unexpected embed_out.weight"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path, values, message):
    folder = hf_folder(tmp_path)
    edit_config(folder, **values)
    with pytest.raises(ValueError, match=f"(?s:hf.*{re.escape(message)})"):
        open_hf(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '"gpt_neox"'])
def test_a_configuration_that_is_none(tmp_path, content):
    folder = hf_folder(tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json\b"):
        open_hf(folder)


def test_whole_numbers_are_no_weights(tmp_path):
    folder = hf_folder(tmp_path)
    edit_tensors(folder, lambda tensors: tensors | {"embed_out.weight": torch.zeros(84, 120, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"embed_out\.weight .*int8"):
        open_hf(folder)


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "ours"
    write_hf(open_hf(hf_folder(tmp_path)), folder)
    content = (folder / "model.safetensors").read_bytes()
    before = sorted(path.name for path in tmp_path.iterdir())
    with limited(100_000), pytest.raises(OSError, match=r"too large.*model\.safetensors"):
        write_hf(open_hf(folder), folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (folder / "model.safetensors").read_bytes() == content


def test_presets_are_what_the_published_configurations_say(tmp_path):
    """transformers' own defaults are 20B's."""
    transformers.GPTNeoXConfig(hidden_act="gelu_fast", architectures=["GPTNeoXForCausalLM"]).save_pretrained(tmp_path)
    from jaxmodels.convert.hf import read_config

    config, _ = read_config(tmp_path / "config.json")
    assert config == NeoXConfig.neox_20b()


@pytest.mark.parametrize("rules", ["rules of the class", "other rules", "another decoder", "no decoder"])
def test_a_tokenizer_has_the_same_ids_and_texts_in_transformers(tmp_path, rules):
    """transformers would replace the rules of a tokenizer.json by those of the model's class."""
    digits = rules == "other rules"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [tokenizers.pre_tokenizers.Digits(individual_digits=True), level]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps) if digits else level
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    if rules != "no decoder":
        own = tokenizers.decoders.Fuse if rules == "another decoder" else tokenizers.decoders.ByteLevel
        tokenizer.decoder = own()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["2026 and 2027 are 12 months each, 1234 and 2345 are not"] * 5, trainer)
    write(tmp_path / "source", 2)
    tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
    write_hf(open_neox(tmp_path / "source"), tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer_config.json").exists() is (rules != "rules of the class")
    text = "In 2026, 1234 <|endoftext|> e\u0301"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    for folder in ("source", "hf"):
        read = TokenizerFile.read(tmp_path / folder)
        assert list(read.encode(text, special=True)) == tokenizer.encode(text).ids
        decoded = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        assert theirs.decode(theirs(text)["input_ids"]) == read.decode(read.encode(text)) == decoded
