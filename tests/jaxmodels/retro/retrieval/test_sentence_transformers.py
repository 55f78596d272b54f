"""Folders of sentence-transformers: what is read of them, and what is not made up or run."""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.retro.retrieval.embedder_settings import TEXT
from jaxmodels.retro.retrieval.embedders import SentenceTransformer, check_text_alone


def with_modules(bert, folder: Path, width: object = 6) -> Path:
    """Folder of sentence-transformers as published before version 6, with a width of its Pooling."""
    shutil.copytree(bert[0], folder)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    entries = [{"idx": i, "name": str(i), **module} for i, module in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    about = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("width", [6, 7, -1, 0, 2**20])
def test_the_width_of_sentence_transformers_is_that_of_the_vectors(bert, width, tmp_path):
    pytest.importorskip("sentence_transformers")
    embedder = SentenceTransformer(str(with_modules(bert, tmp_path / "model", width)))
    assert embedder.width == embedder.embed(["the sea"]).shape[1] == 6


def test_what_sentence_transformers_saves_is_read(bert, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    folder = with_modules(bert, tmp_path / "model")
    package.SentenceTransformer(str(folder), device="cpu").save(str(tmp_path / "saved"))
    found = [SentenceTransformer(str(place)).embed(["the sea was calm"]) for place in (folder, tmp_path / "saved")]
    np.testing.assert_array_equal(*found)


def test_an_encoder_alone_is_complete(bert, tmp_path):
    """sentence-transformers takes the encoder of T5 and others, whose folders have no decoder."""
    pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    folder = with_modules(bert, tmp_path / "model")
    sizes = {"vocab_size": 10, "d_model": 6, "d_kv": 3, "d_ff": 5, "num_layers": 1, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(**sizes)).save_pretrained(folder)
    prompts = {"prompts": {"query": None}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert SentenceTransformer(str(folder)).embed(["the sea", "was calm"]).shape == (2, 6)


def test_weights_of_sentence_transformers_are_not_made_up(bert, tmp_path, capfd):
    pytest.importorskip("sentence_transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    folder = with_modules(bert, tmp_path / "model")
    tensors = safetensors.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layer.0.output.dense.weight"))
    kept = {key: value for key, value in tensors.items() if key != name} | {"\x1b[2J": tensors[name]}
    safetensors.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"^embedder sentence:.*not those of its config\.json: missing \S*layer\.0\."):
        SentenceTransformer(str(folder)).embed(["a"])
    assert "\x1b" not in "".join(capfd.readouterr())


def test_sentence_transformers_renders_no_text_by_a_template(bert, tmp_path):
    """Version 6 does so for each text, without limits, if it infers that a model takes messages."""
    package = pytest.importorskip("sentence_transformers")
    folder = with_modules(bert, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    about = {"modality_config": TEXT, "module_output_name": "token_embeddings"}
    (folder / "sentence_bert_config.json").write_text(json.dumps(about))
    assert SentenceTransformer(str(folder)).embed(["a"]).shape == (1, 6)
    loaded = package.SentenceTransformer(str(folder), device="cpu")
    check_text_alone(loaded[0])
    with pytest.raises(ValueError, match="other inputs than texts: image, message,"):
        check_text_alone(types.SimpleNamespace(modality_config=TEXT | {"message": {}, "image": {}}))
