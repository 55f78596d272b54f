"""One way to open every kind of checkpoint; folders of Hugging Face are written by transformers and tokenizers."""

import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from tokenizers import Tokenizer

import jaxmodels
from jaxmodels.convert.command import main
from jaxmodels.convert.companions import TokenIds
from jaxmodels.convert.flax import write_flax
from jaxmodels.convert.hf import write_hf
from jaxmodels.convert.kinds import NAMES
from jaxmodels.convert.neox.write import write_neox
from jaxmodels.convert.open import load, open_source
from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.content import is_written_here
from jaxmodels.neox import NeoX, NeoXConfig, quantize
from jaxmodels.text import SLOW_NAMES, CharVocabulary, TokenizerFile
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


@pytest.fixture(scope="module")
def folders(published, tmp_path_factory):
    """The same weights in every kind of folder."""
    tmp_path = tmp_path_factory.mktemp("kinds")
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


def test_every_kind_gives_the_same_model_tokenizer_and_token_ids(published, folders):
    expected = load(published)
    for kind, folder in folders.items():
        opened = open_source(folder)
        assert (opened.kind, opened.folder, opened.model_name) == (kind, folder, "NeoX")
        assert_same(jaxmodels.load(folder), expected)
        assert opened.companions.token_ids == TokenIds(eos=(0, 299), bos=0, pad=1)
        assert opened.source.tensors.keys() == open_source(published).source.tensors.keys()
        assert isinstance(opened.vocabulary(), TokenizerFile)
        assert opened.vocabulary().encode("text").size
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (folder / name).read_bytes() == (published / name).read_bytes(), (kind, name)


def test_parts_of_a_run(published, folders, tmp_path):
    run = shutil.copytree(folders["run"], tmp_path / "run")
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


@pytest.mark.parametrize("source", [5, ["a/b"], {"a": "b"}])
def test_the_source_of_a_run_is_a_name(source, folders, tmp_path):
    run = shutil.copytree(folders["run"], tmp_path / "run")
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(about | {"original": {"source": source, "dtype": "float32"}}))
    with pytest.raises(ValueError, match=r"run/config\.json has original source .*, must be a string$"):
        open_source(run).original  # noqa: B018


@pytest.mark.slow
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
    linked = tmp_path / "linked"
    (linked / "checkpoints" / "500").mkdir(parents=True)  # a folder of the repository's own
    for file in published.iterdir():
        (linked / file.name).symlink_to(file)
    assert open_source(linked).kind == "hf"
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
def test_arguments_that_do_not_apply(folders, kind, argument, message):
    with pytest.raises(ValueError, match=message):
        open_source(folders[kind], **argument)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json", "vocab.json", "merges.txt"])
def test_a_fifo_beside_a_tokenizer_is_refused(name, published, tmp_path):
    shutil.copy(published / "tokenizer.json", tmp_path / "tokenizer.json")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is a FIFO"):
        TokenizerFile.read(tmp_path)


def test_places_where_a_tokenizer_is_looked_for(published, tmp_path):
    folder = tmp_path / "a" / "model"
    write_flax(open_source(published).neox(), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"model/tokenizer\.json.*model/vocabulary\.json.*a/tokenizer\.json"):
        open_source(folder).vocabulary()
    shutil.copy(published / "tokenizer.json", tmp_path / "a" / "20B_tokenizer.json")
    assert isinstance(open_source(folder).vocabulary(), TokenizerFile)
    with pytest.raises(ValueError, match=r"tokenizer='nowhere'"):
        open_source(folder).vocabulary("nowhere")


def command(capsys, *arguments):
    """Exit code, standard output and standard error of `jaxmodels convert`."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_inspect_names_every_kind(folders, tmp_path, capsys):
    for kind, name in NAMES.items():
        code, out, _ = command(capsys, "inspect", folders[kind])
        assert code == 0
        assert out.startswith(f"{folders[kind]}: {name} (")
        for line in ("n_hidden +40", "token ids +eos 0, 299; bos 0; pad 1", "files beside +tokenizer.json, .*json"):
            assert re.search(rf"^  {line}", out, re.MULTILINE), (kind, line)
    assert re.search(r"step +7\n", command(capsys, "inspect", folders["run"])[1])
    jaxmodels.save(mlp(), tmp_path / "mlp")
    code, out, _ = command(capsys, "inspect", tmp_path / "mlp")
    assert code == 0
    assert "model of this project, tests.MLPLanguageModel, " in out
    assert re.search(rf"d_ff +{mlp().config()['d_ff']}\n", out)


def test_a_conversion_and_back_keeps_what_lies_beside_the_weights(published, folders, tmp_path, capsys):
    """config.json and generation_config.json name different end tokens; both stay as they are."""
    before = json.loads((published / "config.json").read_text())
    for kind in ("model", "neox", "run"):
        back = tmp_path / f"{kind} back"
        assert command(capsys, "neox", folders[kind], back, "--to", "hf")[0] == 0
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (back / name).read_bytes() == (published / name).read_bytes()
        after = transformers.AutoConfig.from_pretrained(back)
        assert (after.eos_token_id, after.bos_token_id) == (before["eos_token_id"], before["bos_token_id"])
        generation = transformers.GenerationConfig.from_pretrained(back)
        assert (generation.eos_token_id, generation.pad_token_id) == ([0, 299], 1)
        tokenizer = transformers.AutoTokenizer.from_pretrained(back)
        assert tokenizer("text").input_ids == open_source(published).vocabulary().encode("text").tolist()
        assert tokenizer.chat_template == "{{ messages }}"
        assert command(capsys, "verify", published, back)[0] == 0


@pytest.mark.parametrize("name", SLOW_NAMES)
def test_a_tokenizer_of_any_kind_is_written_beside_the_weights_again(published, tmp_path, name):
    """Published models of GPT-NeoX's form have tokenizers of T5 or Llama, too, in a spiece.model."""
    folder = shutil.copytree(published, tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    content = b"{}" if name.endswith(".json") else b"a tokenizer"
    (folder / name).write_bytes(content)
    source, target = open_source(folder).neox(), tmp_path / "written"
    for write in (write_flax, lambda *given, **options: write_neox(*given, 1, **options), write_hf):
        write(source, target, overwrite=True)
        assert (target / name).read_bytes() == content


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({}, {"bos_token_id": 0, "eos_token_id": 2}),  # transformers' defaults of absent keys
        ({"bos_token_id": None, "eos_token_id": [5, 3], "pad_token_id": 1}, None),
        ({"bos_token_id": 7, "eos_token_id": 5, "pad_token_id": None}, None),
    ],
)
def test_token_ids_of_a_configuration_alone(published, tmp_path, ids, expected):
    folder = shutil.copytree(published, tmp_path / "hf")
    (folder / "generation_config.json").unlink()
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in content.items() if not key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(content | ids))
    write_flax(open_source(folder).neox(), tmp_path / "flax")
    write_neox(open_source(tmp_path / "flax").neox(), tmp_path / "shards", 1)
    write_hf(open_source(tmp_path / "shards").neox(), tmp_path / "back")
    assert not (tmp_path / "back" / "generation_config.json").exists()
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    found = {key: value for key, value in written.items() if key.endswith("_token_id")}
    assert found == (expected or ids)
    theirs = [transformers.AutoConfig.from_pretrained(path) for path in (folder, tmp_path / "back")]
    assert theirs[0].eos_token_id == theirs[1].eos_token_id
    assert theirs[0].bos_token_id == theirs[1].bos_token_id


@pytest.mark.parametrize("content", ['{"eos_token_id": "</s>"}', '{"bos_token_id": [1]}', "[]", "{"])
def test_token_ids_that_are_none(published, tmp_path, content):
    folder = shutil.copytree(published, tmp_path / "hf")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"hf.*"):
        open_source(folder)


def test_ids_as_texts_and_minus_one():
    ids = {"eos_token_id": ["0", 5.0, -1, "-1", None, 5], "bos_token_id": " 7", "pad_token_id": -1}
    assert TokenIds.of(ids, "config.json") == TokenIds(eos=(0, 5), bos=7)


@pytest.mark.parametrize(
    "value", [-2, [0, -2], 1.5, "</s>", [[0]], {}, True, 2**31, "9" * 99, [0] * 1001, float("nan")]
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_ids_that_are_none_are_refused_by_file(published, tmp_path, name, value):
    folder = shutil.copytree(published, tmp_path / "hf")
    content = json.loads((folder / name).read_text()) | {"eos_token_id": value}
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{folder / name} has .*eos_token_id") as error:
        open_source(folder)
    assert len(str(error.value)) < 400


def test_a_tokenizer_inside_a_runs_vocabulary_is_written_for_transformers(folders, tmp_path):
    run = shutil.copytree(folders["run"], tmp_path / "run")
    content = (run / "tokenizer.json").read_text()
    TokenizerFile(content).save(run / "vocabulary.json")
    write_hf(open_source(run).neox(), tmp_path / "same")
    other = Tokenizer.from_str(content)
    other.add_tokens(["another"])
    other.save(str(run / "tokenizer.json"))  # not the one that the run was trained with
    write_hf(open_source(run).neox(), tmp_path / "other")
    (run / "tokenizer.json").unlink()
    write_hf(open_source(run).neox(), tmp_path / "none")
    for name in ("same", "other", "none"):
        assert (tmp_path / name / "tokenizer.json").read_text() == content
        assert not (tmp_path / name / "vocabulary.json").exists()


def test_a_tokenizer_of_two_files(published, tmp_path):
    """vocab.json and merges.txt, as transformers before 4 saved GPT-NeoX's tokenizer."""
    folder = shutil.copytree(published, tmp_path / "hf")
    tokenizer = byte_level_tokenizer()
    tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer_class='TokenizersBackend'"):
        open_source(folder).vocabulary()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTNeoXTokenizer"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|pad|>": 300}))
    vocabulary = open_source(folder).vocabulary()
    text = "The assert<|endoftext|> statement:\n  ärger<|pad|>"
    assert vocabulary.encode(text)[-1] == 300
    assert vocabulary.encode(text)[:-1].tolist() == tokenizer.encode(text.removesuffix("<|pad|>")).ids
    assert vocabulary.decode(vocabulary.encode(text)) == text
    (folder / "merges.txt").write_text("#version: 0.2\nbroken")
    with pytest.raises(ValueError, match=r"hf/vocab\.json .*merges\.txt"):
        open_source(folder).vocabulary()


def test_verify_compares_tensors_of_different_configurations(published, tmp_path, capsys):
    source = open_source(published).neox()
    changed = dataclasses.replace(source, config=dataclasses.replace(source.config, layer_norm_eps=1e-3))
    write_flax(changed, tmp_path / "eps")
    code, out, _ = command(capsys, "verify", published, tmp_path / "eps")
    assert code == 1
    assert "different configurations: layer_norm_eps: 1e-05 and 0.001\n" in out
    assert "all 40 tensors are equal" in out
    write_flax(source.with_layers([0, 1]), tmp_path / "two")
    code, out, _ = command(capsys, "verify", published, tmp_path / "two")
    assert code == 1
    assert "n_layers: 3 and 2\n" in out
    assert "of the tensors that both have, all 28 tensors are equal" in out
    assert re.search(r"only in SRC: layers\.2\..* and 2 more", out)
    write_flax(source.with_vocabulary(293), tmp_path / "vocab")
    code, out, _ = command(capsys, "verify", published, tmp_path / "vocab")
    assert code == 1
    assert "embedding.emb.weight: shape [307, 40] and [293, 40]" in out
    jaxmodels.save(mlp(), tmp_path / "mlp")
    assert command(capsys, "verify", tmp_path / "mlp", tmp_path / "mlp")[0] == 0
    code, out, _ = command(capsys, "verify", published, tmp_path / "mlp")
    assert code == 1
    assert "a NeoX" in out


@pytest.mark.parametrize("changed", [{"d_ff": 128}, {"n_vocab": 33}])
def test_inspect_refuses_a_configuration_of_other_arrays(tmp_path, capsys, changed):
    jaxmodels.save(mlp(), tmp_path / "mlp")
    file = tmp_path / "mlp" / "config.json"
    content = json.loads(file.read_text())
    assert changed.keys() <= content["config"].keys()
    content["config"] |= changed
    file.write_text(json.dumps(content))
    code, out, error = command(capsys, "inspect", tmp_path / "mlp")
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'mlp'}" in error
    assert "does not hold the arrays of its configuration" in error


def test_verify_casts_first_as_it_was_asked_to(published, tmp_path, capsys):
    """A cast of SRC to --dtype, and then to the dtype of DST, is two casts: the first one rounds."""
    rounded = tmp_path / "rounded"
    opened = open_source(published).neox()
    write_flax(opened.cast("bfloat16").cast("float32"), rounded)
    code, out, _ = command(capsys, "verify", published, rounded, "--dtype", "bfloat16")
    assert (code, "after the cast of SRC from bfloat16 to float32" in out) == (0, True)
    code, out, _ = command(capsys, "verify", published, published, "--dtype", "bfloat16")
    assert (code, "values differ" in out) == (1, True)


@pytest.mark.parametrize("content", ["[1]", "", "not JSON"])
def test_a_companion_that_is_no_object_is_not_copied(published, tmp_path, capsys, content):
    """`jaxmodels clean` would not find the folder of a conversion that was killed."""
    shutil.copytree(published, tmp_path / "model")
    (tmp_path / "model" / "chat_template.json").write_text(content)
    code, _, error = command(capsys, "neox", tmp_path / "model", tmp_path / "out", "--to", "flax")
    assert code == 2
    assert "chat_template.json holds no JSON object" in error
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "model" / "chat_template.json").write_text('\ufeff {"chat_template": ""}')
    assert command(capsys, "neox", tmp_path / "model", tmp_path / "out", "--to", "flax")[0] == 0
    assert is_written_here(tmp_path / "out", "chat_template.json")


def test_quantize(published, tmp_path, capsys):
    code, out, _ = command(capsys, "quantize", published, tmp_path / "int8", "--dtype", "bfloat16", "--threshold", 3)
    assert (code, "int8" in out) == (0, True)
    opened = open_source(tmp_path / "int8")
    assert opened.model().int8_threshold == 3
    assert opened.companions.token_ids == TokenIds(eos=(0, 299), bos=0, pad=1)
    assert (tmp_path / "int8" / "tokenizer.json").is_file()
    assert command(capsys, "inspect", tmp_path / "int8")[1].count("int8") == 3
    for arguments in (
        ["neox", tmp_path / "int8", tmp_path / "out", "--to", "hf"],
        ["quantize", tmp_path / "int8", "x"],
    ):
        code, _, error = command(capsys, *arguments)
        assert code == 2
        assert re.search(r"int8 is quantized", error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "weights-4"])
def test_quantize_weights(kind, published, tmp_path, capsys):
    arguments = ("quantize", published, tmp_path / "int8", "--kind", kind)
    code, _, error = command(capsys, *arguments, "--threshold", 3)
    assert (code, "--threshold=3" in error, (tmp_path / "int8").exists()) == (2, True, False)
    assert command(capsys, *arguments)[0] == 0
    opened = open_source(tmp_path / "int8")
    assert (opened.is_quantized, opened.model().quantization) == (True, kind)
    shown = command(capsys, "inspect", tmp_path / "int8")[1]
    assert re.search(rf"quantization +{kind}\n", shown)
    assert ("4 bits" in shown) == (kind == "weights-4")
    assert f"{open_source(published).neox().config.parameters():,} parameters" in shown


def test_a_folder_of_hugging_face_as_a_state_dict(published, tmp_path, capsys):
    assert command(capsys, "torch", published, tmp_path / "model.pt")[0] == 0
    state = torch.load(tmp_path / "model.pt")
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(published).state_dict()
    assert torch.equal(state["embedding.emb.weight"], theirs["gpt_neox.embed_in.weight"])
