"""Embedders of text chunks: hashed n-grams, BERT, sentence-transformers."""

import json
import os
import re
import shutil
import sys
import types
from typing import Any

import numpy as np
import pytest

from jaxmodels.retro.retrieval.embedder_files import check_modules, confined_tokenizers
from jaxmodels.retro.retrieval.embedders import (
    BertMean,
    HashedNGrams,
    SentenceTransformer,
    embedder_of,
    loading,
    whole_words,
)

TEXTS = ["the sea was calm", "the sea was calmer", "kings and queens", "the sea was calm"]


def test_ngrams_are_the_same_always_and_near_where_texts_are():
    vectors = HashedNGrams().embed(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((4, 512), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[3])
    assert vectors[0] @ vectors[1] > 0.8 > 0.3 > vectors[0] @ vectors[2]
    np.testing.assert_array_equal(HashedNGrams().embed([""])[0], 0)
    # the same on every machine: the hash is MurmurHash3 with a fixed seed
    np.testing.assert_allclose(HashedNGrams(7, 1, 1).embed(["abc"])[0] * 3**0.5, [0, 0, -1, -1, 1, 0, 0], atol=1e-6)


def test_a_bert_in_a_folder_gives_the_mean_of_its_states_without_cut_words(bert):
    folder, model = bert
    embedder = embedder_of(f"bert:{folder}")
    assert embedder == BertMean(folder)
    assert embedder.width == 6
    together = embedder.embed(["e the sea was c", "kings"])  # the shorter one is padded
    ids = model.embeddings.word_embeddings.weight.new_tensor([[2, 5, 6, 7, 3]]).long()  # [CLS] the sea was [SEP]
    expected = model(ids).last_hidden_state[0].mean(dim=0).detach().numpy()
    np.testing.assert_allclose(together[0], expected / np.linalg.norm(expected), atol=1e-5)
    np.testing.assert_allclose(together[1], embedder.embed(["kings"])[0], atol=1e-5)


def test_sentence_transformers_embed_texts_from_a_folder(bert):
    pytest.importorskip("sentence_transformers")
    embedder = embedder_of(f"sentence:{bert[0]}")
    found = embedder.embed(TEXTS)
    assert (found.shape, found.dtype) == ((len(TEXTS), embedder.width), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(embedder.embed(TEXTS[2:3])[0], found[2], atol=1e-5)


def test_words_that_may_be_cut_are_left_out():
    assert whole_words("rds of the se") == "of the"
    assert whole_words("two words") == "two words"
    assert whole_words(" \n") == ""


@pytest.mark.parametrize("name", ["ngrams:64:1:3", "sentence:some/model", "bert:some/model"])
def test_a_name_says_all_of_an_embedder(name):
    assert embedder_of(name).name == name


def test_the_defaults_by_name():
    assert embedder_of("ngrams") == HashedNGrams()
    assert (embedder_of("bert"), embedder_of("sentence")) == (BertMean(), SentenceTransformer())


@pytest.mark.parametrize(
    "name",
    ["ngram", "ngrams:64", "ngrams:a:b:c", "", "ngrams:64:3:2", "ngrams:16385:2:3", "ngrams:64:2:33"],
)
def test_other_names_and_sizes_are_refused(name):
    with pytest.raises(ValueError, match=r"embedder=|shortest="):
        embedder_of(name)


@pytest.mark.parametrize(
    ("missing", "embedder", "advice"),
    [
        ("sklearn.feature_extraction.text", HashedNGrams(), r"jaxmodels\[retro\]"),
        ("sentence_transformers", SentenceTransformer(), "pip install sentence-transformers"),
        ("transformers", BertMean(), "pip install transformers torch"),
    ],
)
def test_a_missing_package_is_named(missing, embedder, advice, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=advice):
        embedder.embed(TEXTS)


def test_weights_that_are_not_there_are_a_value_error(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"embedder bert:.*nothing\b"):
        BertMean(str(tmp_path / "nothing")).embed(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BertMean, SentenceTransformer])
def test_code_in_the_folder_of_an_embedder_neither_runs_nor_is_asked_about(kind, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    if kind is SentenceTransformer:
        pytest.importorskip("sentence_transformers")
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asks"))
    classes = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.A", "evil.A"]}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass AutoConfig: pass\n")
    with pytest.raises(ValueError, match=r"embedder (bert|sentence):.* cannot be loaded"):
        kind(str(tmp_path)).embed(["a"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "named",
    [
        "evil.Model",
        "os.system",
        "sentence_transformers.models.Asym",
        "sentence_transformers.models.Pooling\n",
        None,
        ["sentence_transformers.models.Pooling"],
    ],
)
def test_no_class_that_a_folder_names_is_imported_by_sentence_transformers(named, tmp_path, monkeypatch):
    """The package before version 6 imports them from the folder, or from anywhere."""
    package = types.SimpleNamespace(SentenceTransformer=lambda *given, **named: pytest.fail("loads it"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}, {"idx": 1, "type": named}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json names the class .*, which is not imported from a folder"):
        SentenceTransformer(str(tmp_path)).embed(["a"])


@pytest.mark.parametrize("kind", [BertMean, SentenceTransformer])
def test_a_folder_that_names_another_model_uses_no_network(kind, tmp_path, monkeypatch):
    """transformers, with peft, loads the model on the Hub that adapter_config.json names: that file is refused."""
    hub = pytest.importorskip("huggingface_hub")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("socket.socket.connect", lambda *given: pytest.fail("opens a connection"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *given, **named: pytest.fail("looks up a host"))
    found = []

    def load(model, **settings):
        found.append((hub.constants.is_offline_mode(), settings["trust_remote_code"]))
        return transformers.AutoModel.from_pretrained(model, trust_remote_code=False)

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=load))
    about = {"base_model_name_or_path": "nobody/nothing", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"cannot be loaded: \S*adapter_config\.json is of an adapter of PEFT"):
        kind(str(tmp_path)).embed(["a"])
    assert found == []
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"embedder (bert|sentence):.* cannot be loaded"):
        kind(str(tmp_path)).embed(["a"])
    assert found == ([(True, False)] if kind is SentenceTransformer else [])
    assert not hub.constants.is_offline_mode()


DAMAGED = {
    "model.safetensors": b'\x08\0\0\0\0\0\0\0{"a": 1}',
    "model-00001-of-00002.safetensors": b"",
    "2_Dense/model.safetensors": (10**9).to_bytes(8, "little"),
    "pytorch_model.bin": b"PK\x03\x04",
    "2_Dense/pytorch_model.bin": b"\x80\x02",
    "config.json": b"{",
    "1_Pooling/config.json": b"[" * 10**5,
    "0_Transformer/config.json": b'{"num_hidden_layers": 1000000000}',
    "tokenizer.json": b"\xff",
}


@pytest.mark.parametrize("kind", [BertMean, SentenceTransformer])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_in_the_folder_of_an_embedder_is_named(kind, name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(DAMAGED[name])
    with (
        pytest.raises(ValueError, match=rf"^embedder .* cannot be loaded: .*{name} ") as refused,
        loading(kind(str(tmp_path))),
    ):
        pytest.fail("it is read by the library")
    assert str(refused.value).isprintable()


LARGE = 10**12
REFUSED: dict[str, tuple[str, Any, str]] = {
    "labels": ("config.json", {"num_labels": LARGE}, "more than 100,000 values"),
    "channels": ("config.json", {"num_channels": LARGE}, "'num_channels' of 1000000000000, must be at most 1,048,576"),
    "labels in parts": (
        "config.json",
        {"a": {"num_labels": 60_000}, "b": {"num_labels": 60_000}},
        "more than 100,000 v",
    ),
    "another configuration": (
        "config.json",
        {"configuration_files": ["config.4.0.0.json"]},
        "'configuration_files', wh",
    ),
    "another index": (
        "config.json",
        {"transformers_weights": "x.safetensors.index.json"},
        "'x.safetensors.index.json'",
    ),
    "other weights": ("config.json", {"transformers_weights": "adapter_model.bin"}, "of 'adapter_model.bin', must be"),
    "weights further down": ("config.json", {"transformers_weights": "a/b/x.safetensors"}, "of 'a/b/x.safetensors'"),
    "weights of no name": ("config.json", {"transformers_weights": ".safetensors"}, "of '.safetensors', must be"),
    "weights of two lines": (
        "config.json",
        {"transformers_weights": "a\nb.safetensors"},
        "of 'a\\nb.safetensors'",
    ),
    "renamed keys": (
        "config.json",
        {"attribute_map": {"f": "num_labels"}, "f": 10**6},
        "'attribute_map', which renames",
    ),
    "keys renamed in a part": ("config.json", {"a": {"attribute_map": {"f": "b"}}}, "'attribute_map', which"),
    "no weights": ("config.json", {"transformers_weights": "x.safetensors"}, "of 'x.safetensors', must be"),
    "nested layers": ("config.json", {"text_config": {"n_layer": 2_001}}, "'n_layer' of 2001, must be at most 2,000"),
    "numbers in a list": ("config.json", {"depths": [1, LARGE]}, "'depths' of 1000000000000"),
    "a kernel": ("config.json", {"_attn_implementation": "evil/kernel"}, "'evil/kernel', which is code of the Hub"),
    "a kernel for a part": ("config.json", {"_attn_implementation": {"": "evil/kernel"}}, "code of the Hub"),
    "a kernel by another name": ("config.json", {"attn_implementation": {"a": {"b": "x/y"}}}, "code of the Hub"),
    "weights above": ("model.safetensors.index.json", {"weight_map": {"a": "../b.safetensors"}}, "weight_map"),
    "a device": ("pytorch_model.bin.index.json", {"weight_map": {"a": "/dev/zero"}}, "'/dev/zero' in weight_map"),
    "a tokenizer above": ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.json"]}, "fast_tok"),
    "a vocabulary": (
        "tokenizer_config.json",
        {"vocab": "/dev/zero"},
        "'vocab' of '/dev/zero', which",
    ),
    "merges": ("special_tokens_map.json", {"merges": "../merges.txt"}, "'merges' of '../merges.txt', which"),
    "positional": (
        "tokenizer_config.json",
        {"init_inputs": ["/dev/zero"]},
        "'init_inputs' of ['/dev/zero'], which",
    ),
    "an adapter": ("adapter_config.json", {"target_modules": "(a+)+$", "r": LARGE}, "is of an adapter of PEFT"),
    "an adapter in a part": ("0_Transformer/adapter_config.json", {}, "is of an adapter of PEFT"),
    "arguments": ("sentence_bert_config.json", {"model_args": {"subfolder": "../.."}}, "'model_args' of {"),
    "a tokenizer": ("sentence_bert_config.json", {"tokenizer_name_or_path": "../b"}, "'tokenizer_name_or_path' of"),
    "a cache": ("sentence_bert_config.json", {"cache_dir": "../b"}, "'cache_dir' of '../b', which"),
    "a template": (
        "sentence_bert_config.json",
        {"modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}}},
        "'modality_config' of",
    ),
    "images": (
        "sentence_bert_config.json",
        {"modality_config": {"text": {}, "image": {"method": "get_image_features"}}},
        "'modality_config' of",
    ),
    "a head": ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "'transformer_task' of 'fill-mask'"),
    "no length": ("sentence_bert_config.json", {"max_seq_length": True}, "'max_seq_length' of True"),
    "a processor": ("preprocessor_config.json", {"feature_size": 600}, "of a model of more than texts"),
    "a long prompt": (
        "config_sentence_transformers.json",
        {"prompts": {"a": "a" * 2_001}},
        "of up to 2,001 characters",
    ),
    "prompts": ("config_sentence_transformers.json", {"prompts": {f"{i}": "" for i in range(101)}}, "101 prompts"),
    "a prompt's name": ("config_sentence_transformers.json", {"default_prompt_name": "\x1b[2J"}, "none of its prompts"),
    "another package": ("config_sentence_transformers.json", {"model_type": "\x1b[2J"}, "'model_type' of"),
    "many tokens": ("tokenizer_config.json", {"extra_special_tokens": ["a"] * 5_001}, "5,001 tokens"),
    "a GGUF file": ("tokenizer_config.json", {"gguf_file": "../b.gguf"}, "'gguf_file' of '../b.gguf', which"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_of_other_places_and_numbers_that_no_model_has_are_refused(case, tmp_path):
    name, content, said = REFUSED[case]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    for weights in (".safetensors", "a\nb.safetensors"):
        (tmp_path / weights).touch()
    with (
        pytest.raises(ValueError, match=rf"^embedder bert:.* cannot be loaded: \S*{name} .*{re.escape(said)}"),
        loading(BertMean(str(tmp_path))),
    ):
        pytest.fail("it is read by the library")


@pytest.mark.parametrize("place", ["../other", "/", "a/b", 5])
def test_a_module_in_another_folder_is_refused(place, tmp_path):
    entry = {"type": "sentence_transformers.models.Transformer", "path": place}
    (tmp_path / "modules.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"modules\.json names the folder .*, which is not one beside it"):
        check_modules(str(tmp_path))


def test_a_fifo_in_the_folder_of_an_embedder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "vocab.txt")
    with (
        pytest.raises(ValueError, match=r"vocab\.txt is a FIFO; expected a regular file"),
        loading(BertMean(str(tmp_path))),
    ):
        pytest.fail("it is read by the library")


SIZES = {
    "hidden_size": 60_000,
    "vocab_size": 1_000_000,
    "max_position_embeddings": 1_000_000,
    "intermediate_size": 1_000_000,
    "type_vocab_size": 1_000_000,
    "num_hidden_layers": 2_000,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_configuration_that_is_far_larger_than_the_weights_is_refused(name, bert, tmp_path):
    """The library would make what the weights lack, as random numbers."""
    folder = shutil.copytree(bert[0], tmp_path / "bert")
    with loading(BertMean(str(folder))):
        pass
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: SIZES[name]}))
    with (
        pytest.raises(ValueError, match=r"^embedder bert:.* cannot be loaded: \S*config\.json describes a model of "),
        loading(BertMean(str(folder))),
    ):
        pytest.fail("it is read by the library")


def test_a_tokenizer_for_a_version_of_transformers_is_confined_too(bert, tmp_path):
    folder = shutil.copytree(bert[0], tmp_path / "bert")
    content = json.loads((folder / "tokenizer.json").read_text())
    rule = {"type": "Split", "pattern": {"Regex": "(?:-|-){22}~|-"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.4.0.0.json").write_text(json.dumps(content | {"pre_tokenizer": rule}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    assert [found.file for found in confined_tokenizers(folder)] == [str(folder / "tokenizer.4.0.0.json")]


def test_an_error_of_several_lines_becomes_one(tmp_path):
    with (
        pytest.raises(ValueError, match=r"^embedder bert:.* cannot be loaded: wrong size$"),
        loading(BertMean(str(tmp_path))),
    ):
        raise RuntimeError("\nwrong size\nsize mismatch for a: …")
    with (
        pytest.raises(
            ValueError, match=r"^embedder bert:.* cannot be loaded: its weights are not PyTorch files of tens"
        ),
        loading(BertMean(str(tmp_path))),
    ):
        raise RuntimeError("Weights only load failed. Re-running with weights_only set to False will likely succeed")


def test_weights_in_a_file_beside_its_configuration_are_read(bert, tmp_path, capfd):
    folder = shutil.copytree(bert[0], tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"transformers_weights": "other.safetensors"}))
    capfd.readouterr()
    np.testing.assert_array_equal(BertMean(str(folder)).embed(["the sea"]), BertMean(bert[0]).embed(["the sea"]))
    assert capfd.readouterr().err == ""


def test_a_text_that_the_tokenizer_of_an_embedder_cannot_encode_is_refused(bert, tmp_path, monkeypatch):
    """The library would encode it for minutes."""
    monkeypatch.setattr("jaxmodels.text.tokenizer.files.SECONDS", 0.25)
    folder = shutil.copytree(bert[0], tmp_path / "bert")
    content = json.loads((folder / "tokenizer.json").read_text())
    rule = {"type": "Split", "pattern": {"Regex": "(?:-|-){22}~|-"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": rule}))
    embedder = BertMean(str(folder))
    assert embedder.embed(["a sea b"]).shape == (1, 6)
    with pytest.raises(ValueError, match=r"^tokenizer=.*tokenizer\.json cannot encode the text: it takes more than"):
        embedder.embed(["a " + "-" * 3_000 + " b"])
    (folder / "tokenizer.json").write_text(json.dumps(content | {"normalizer": [rule]}))
    with pytest.raises(ValueError, match=r"^embedder bert:.* cannot be loaded: .*tokenizer\.json"):
        BertMean(str(folder)).embed(["a"])


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_weights_that_are_not_those_of_the_configuration_are_not_made_up(bert, change, tmp_path, capfd):
    """transformers makes random ones, and prints a table."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "bert"
    shutil.copytree(bert[0], folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layer.0.output.dense.weight"))
    tensors = {key: value for key, value in tensors.items() if key != name or change == "misshapen"}
    if change == "misshapen":
        tensors[name] = tensors[name][1:].clone()
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(ValueError, match=rf"^embedder bert:.*not those of its config\.json: {change} \S*layer\.0\."):
        BertMean(str(folder)).embed(["a"])
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", [BertMean, SentenceTransformer])
def test_a_configuration_that_repeats_a_stored_layer_is_refused(kind, bert, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind is SentenceTransformer:
        pytest.importorskip("sentence_transformers")
    folder = shutil.copytree(bert[0], tmp_path / "funnel")
    sizes = {"d_model": 6, "n_head": 2, "d_head": 3, "d_inner": 5}
    config = transformers.FunnelConfig(
        vocab_size=10, block_sizes=[1, 1], block_repeats=[2, 1], num_decoder_layers=1, **sizes
    )
    transformers.FunnelModel(config).save_pretrained(folder)
    assert kind(str(folder)).embed(["the sea was calm"] * 70).shape == (70, 6)
    about = json.loads((folder / "config.json").read_text()) | {"block_repeats": [1_000_000, 1]}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"^embedder .* cannot embed the texts: .*modules more than 100,000 times$"):
        kind(str(folder)).embed(["the sea was calm"] * 70)


def test_a_text_of_too_many_ngrams_is_refused():
    embedder = HashedNGrams(64, 1, 32)
    assert embedder.embed(["a" * 9_000]).shape == (1, 64)
    with pytest.raises(ValueError, match=r"^embedder ngrams:64:1:32 .*90,000 characters has 2,880,000"):
        embedder.embed(["a", "a" * 90_000])


def test_a_model_that_fails_on_texts_or_gives_no_numbers_is_refused(bert):
    embedder = BertMean(bert[0])
    weight = embedder.loaded[1].embeddings.word_embeddings.weight
    kept = weight.data
    weight.data = kept * float("inf")
    with pytest.raises(ValueError, match=r"^embedder bert:.* gives vectors with NaN"):
        embedder.embed(["a"])
    weight.data = kept[:1]
    with pytest.raises(ValueError, match=r"^embedder bert:.* cannot embed the texts: index out of range in self$"):
        embedder.embed(["a b c d"])
