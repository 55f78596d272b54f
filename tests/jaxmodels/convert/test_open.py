"""One way to open every kind of checkpoint; folders of Hugging Face are written by transformers and tokenizers."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import jaxmodels
from jaxmodels.convert.companions import TokenIds
from jaxmodels.convert.flax import write_flax
from jaxmodels.convert.hf import write_hf
from jaxmodels.convert.neox.write import write_neox
from jaxmodels.convert.open import load, open_source
from jaxmodels.io.atomic import atomic_file
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.text import CharVocabulary, TokenizerFile
from jaxmodels.weights.names import flat_arrays
from tests.jaxmodels.mlp import mlp
from tests.jaxmodels.tokenizer import byte_level_tokenizer

SIZES = {"vocab_size": 307, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5}
SIZES |= {"intermediate_size": 28, "max_position_embeddings": 77}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as on the Hub: weights, configurations and tokenizer as transformers saves them."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SIZES, bos_token_id=0, eos_token_id=0)
    model = transformers.GPTNeoXForCausalLM(config)
    model.generation_config.eos_token_id = [0, 299]
    model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), eos_token="<|endoftext|>", chat_template="{{ messages }}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def kinds_of(published, tmp_path):
    """The same weights in every kind of folder."""
    source = open_source(published).neox()
    write_flax(source, tmp_path / "flax")
    write_neox(source, tmp_path / "shards", 1)
    write_hf(source, tmp_path / "hf")
    run = tmp_path / "run"
    step(run, 7, source.model())
    source.companions.write(run)
    about = {"format": 3, "script": "train.neox", "config": {}, "sha256": "", **source.companions.in_config()}
    (run / "config.json").write_text(json.dumps(about))
    return {"model": tmp_path / "flax", "neox": tmp_path / "shards", "hf": tmp_path / "hf", "run": run}


def step(run, number, model):
    """A complete checkpoint of a run."""
    folder = run / "checkpoints" / str(number)
    jaxmodels.save(model, folder / "model")
    files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    with atomic_file(folder / "complete.json") as new:
        new.write_text(json.dumps({"format": 2, "step": number, "data": {}, "files": files}))


def assert_same(model, other):
    ours, theirs = flat_arrays(model), flat_arrays(other)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path])


def test_every_kind_gives_the_same_model_tokenizer_and_token_ids(published, tmp_path):
    expected = load(published)
    for kind, folder in kinds_of(published, tmp_path).items():
        opened = open_source(folder)
        assert (opened.kind, opened.folder, opened.model_name) == (kind, folder, "NeoX")
        assert_same(jaxmodels.load(folder), expected)
        assert opened.companions.token_ids == TokenIds(eos=(0, 299), bos=0, pad=1)
        assert opened.source.tensors.keys() == open_source(published).source.tensors.keys()
        assert isinstance(opened.vocabulary(), TokenizerFile)
        assert opened.vocabulary().encode("text").size
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (folder / name).read_bytes() == (published / name).read_bytes(), (kind, name)


def test_parts_of_a_run(published, tmp_path):
    run = kinds_of(published, tmp_path)["run"]
    step(run, 12, load(published, dtype="bfloat16"))
    dtypes = {array.dtype for array in jax.tree.leaves(load(run))}
    assert dtypes == {np.dtype("bfloat16")}
    for folder in (run / "checkpoints" / "7", run / "checkpoints" / "7" / "model"):
        opened = open_source(folder)
        assert opened.companions.token_ids == TokenIds(eos=(0, 299), bos=0, pad=1)
        assert opened.weights == run / "checkpoints" / "7" / "model"
        assert_same(opened.model(), load(published))
    CharVocabulary("abc").save(run / "vocabulary.json")  # what the run was trained with comes first
    assert open_source(run).vocabulary() == CharVocabulary("abc")
    assert isinstance(open_source(run).vocabulary(run / "tokenizer.json"), TokenizerFile)


def test_other_models_and_quantized_ones(published, tmp_path):
    jaxmodels.save(mlp(), tmp_path / "mlp")
    opened = open_source(tmp_path / "mlp")
    assert (opened.kind, opened.source) == ("model", None)
    assert_same(opened.model(), mlp())
    with pytest.raises(ValueError, match=rf"mlp holds a {opened.model_name}, not a NeoX"):
        opened.neox()
    config = NeoXConfig(31, 12, 2, 3, rope_percentage=0.5, n_ff=10)
    jaxmodels.save(quantize(NeoX(config, rngs=nnx.Rngs(0), stacked=False)), tmp_path / "int8")
    opened = open_source(tmp_path / "int8")
    assert opened.is_quantized
    assert opened.source is None
    assert opened.model().int8_threshold is not None
    with pytest.raises(ValueError, match=r"int8 is quantized"):
        opened.neox()


def test_a_repository_in_the_cache_of_the_hub(published, tmp_path):
    repository = tmp_path / "models--org--name"
    for commit in ("aaa", "bbb"):
        shutil.copytree(published, repository / "snapshots" / commit)
        for folder in (repository, repository / "snapshots"):
            if commit == "aaa":
                assert open_source(folder).folder == repository / "snapshots" / "aaa"
    with pytest.raises(ValueError, match=r"models--org--name .*2 snapshots.*aaa.*bbb"):
        load(repository)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    assert open_source(repository).folder.name == "bbb"


@pytest.mark.parametrize(
    ("kind", "argument", "message"),
    [
        ("hf", {"row_bias": "sum"}, r"row_bias \(--row-bias\) is for GPT-NeoX shards"),
        ("model", {"config": NeoXConfig(31, 24, 2, 3)}, r"config \(--config\) is for GPT-NeoX"),
        ("model", {"strip_prefix": "module."}, r"strip_prefix .*Hugging Face"),
        ("hf", {"revision": "main"}, r"revision='main' is for ids of the Hub"),
    ],
)
def test_arguments_that_do_not_apply(published, tmp_path, kind, argument, message):
    folder = kinds_of(published, tmp_path)[kind]
    with pytest.raises(ValueError, match=message):
        open_source(folder, **argument)


def test_places_where_a_tokenizer_is_looked_for(published, tmp_path):
    folder = tmp_path / "a" / "model"
    write_flax(open_source(published).neox(), folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"model/tokenizer\.json.*model/vocabulary\.json.*a/tokenizer\.json"):
        open_source(folder).vocabulary()
    shutil.copy(published / "tokenizer.json", tmp_path / "a" / "20B_tokenizer.json")
    assert isinstance(open_source(folder).vocabulary(), TokenizerFile)
    with pytest.raises(ValueError, match=r"tokenizer='nowhere'"):
        open_source(folder).vocabulary("nowhere")
