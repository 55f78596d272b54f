"""Fine-tuning of folders that transformers wrote, and back: dtypes, tokenizers, adapters, runs as checkpoints."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import jaxmodels
from jaxmodels.convert.command import main as convert
from jaxmodels.models import load_saved
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.text import CharVocabulary, TokenizerFile
from jaxmodels.training import experiment
from jaxmodels.training.runs.folder import read_about
from jaxmodels.training.script import main, parse
from jaxmodels.training.tokenize import Tokens, tokenize
from jaxmodels.weights.names import flat_arrays
from tests.common import run
from tests.jaxmodels.tokenizer import byte_level_tokenizer
from tests.train_common import TEXT
from train import neox

SIZES = {"vocab_size": 307, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5}
SIZES |= {"intermediate_size": 28, "max_position_embeddings": 11, "rotary_pct": 0.5}
FLAGS = ["--preset=finetune", "--seq-len=13", "--batch-size=3", "--validation-batches=1"]


def publish(folder: Path, dtype: str) -> Path:
    """Write a model, its tokenizer with stored truncation, and its generation settings, as people publish them."""
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = [0, 299]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.add_tokens([f"<unused {i}>" for i in range(9)])  # the last two have no row
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def train(tmp_path, monkeypatch, compile_cache):
    """Function that trains on a small text with more flags; reports write only a few tokens."""
    monkeypatch.setattr(experiment, "SAMPLE_TOKENS", 2)
    (tmp_path / "sea.txt").write_text(TEXT)
    always = ["--no-tensorboard", f"--compile-cache={compile_cache}"]

    def train(*flags: object) -> None:
        new = [] if "--resume" in flags else [*FLAGS, f"--text={tmp_path / 'sea.txt'}"]
        assert main(neox.Neox, "python -m train.neox", [*always, *new, *map(str, flags)]) == 0

    return train


def companions(folder: Path) -> dict[str, bytes]:
    """Files of a Hugging Face folder other than weights and their configuration."""
    others = ("config.json", "model.safetensors")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in others}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tune"), [("float16", "all"), ("bfloat16", "lora"), ("float32", "biases")])
def test_a_published_folder_is_tuned_and_exported_in_its_dtype(tmp_path, train, capsys, dtype, tune):
    source, folder, out = publish(tmp_path / "hf", dtype), tmp_path / "run", tmp_path / "out"
    train(f"--checkpoint={source}", "--steps=3", f"--tune={tune}", f"--out={folder}")
    printed = capsys.readouterr().out
    assert "warning: seq_len=13 is beyond the 11 positions" in printed
    before, after = jaxmodels.load(source), load_saved(folder)
    total = before.settings.parameters()
    trained = {"all": total, "biases": 2 * (60 + 20 + 28), "lora": 2 * 8 * (20 + 60)}[tune]
    assert f"; {trained:,} parameters" in printed or f"; {trained:,} trained of " in printed
    for path, array in flat_arrays(after).items():
        was = flat_arrays(before).get(path)
        is_trained = neox.Neox(neox.Config(checkpoint="x", tune=tune)).trains(".".join(map(str, path)))
        assert array.dtype == (jnp.float32 if is_trained else dtype), path
        assert is_trained == (was is None or bool((was != array).any())), path
    about = json.loads((folder / "config.json").read_text())
    assert about["original"] == {"source": str(source), "dtype": dtype}
    assert about["token_ids"]["eos_token_id"] == 0

    assert convert(["neox", str(folder), str(out), "--to", "hf"]) == 0
    assert companions(out).items() >= companions(source).items()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0
    theirs, info = transformers.GPTNeoXForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert theirs.dtype == getattr(torch, dtype)
    assert not any(info.values())
    assert theirs.generation_config.eos_token_id == [0, 299]
    ids = np.random.default_rng(0).integers(0, 307, (2, 11))
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(ids)).logits.numpy()
    exported = jaxmodels.load(out, dtype="float32")
    np.testing.assert_allclose(run(exported, jnp.asarray(ids)), expected, atol=2e-5)
    rounding = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    np.testing.assert_allclose(run(jaxmodels.load(folder, dtype="float32"), jnp.asarray(ids)), expected, atol=rounding)


@pytest.mark.slow
def test_a_run_that_was_killed_as_it_began_begins_with_its_own_checkpoint_alone(tmp_path, train, monkeypatch):
    """The files of the first attempt's checkpoint are not exported with the weights of another one."""
    first, other = (publish(tmp_path / name, "float32") for name in ("first", "other"))
    folder = tmp_path / "run"
    (first / "chat_template.jinja").write_text("of the first")
    train(f"--checkpoint={other}", "--steps=1", f"--out={tmp_path / 'begun'}")

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("jaxmodels.training.trainer.Trainer.train", kill)
        with pytest.raises(Killed):
            train(f"--checkpoint={first}", "--steps=1", f"--out={folder}")
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert folder / "chat_template.jinja" in before
    for origin in ([f"--checkpoint={other}"], ["--branch", tmp_path / "begun", "--steps=2"], ["--preset=small"]):
        with pytest.raises(ValueError, match=rf"^{folder} has 'chat_template\.jinja'.* of another checkpoint"):
            train(*origin, f"--out={folder}")
        assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    train(f"--checkpoint={first}", "--steps=1", f"--out={folder}")
    assert (folder / "chat_template.jinja").read_text() == "of the first"


def test_documents_in_a_folder_are_encoded_with_the_checkpoints_tokenizer(tmp_path):
    source, folder = publish(tmp_path / "hf", "float32"), tmp_path / "docs"
    folder.mkdir()
    for file in (tmp_path / "a.jsonl", folder / "a.jsonl"):
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    one, many = (
        neox.Neox(neox.Config(checkpoint=str(source), text=str(text))).tokens()
        for text in (tmp_path / "a.jsonl", folder)
    )
    assert isinstance(many.vocabulary, TokenizerFile)
    assert many.vocabulary == one.vocabulary
    np.testing.assert_array_equal(many.train, one.train)


def test_ids_are_of_the_checkpoints_tokenizer_if_it_has_one(tmp_path):
    source, text = publish(tmp_path / "hf", "float32"), tmp_path / "sea.txt"
    text.write_text(TEXT)
    tokenize(str(text), tmp_path / "own", tokenizer=source)
    tokenize(str(text), tmp_path / "other")
    written = json.loads((source / "tokenizer.json").read_text()) | {"truncation": None}
    again, without = tmp_path / "again.json", Path(shutil.copytree(source, tmp_path / "folder" / "without"))
    again.write_text(json.dumps(written, indent=2))  # of the same tokens
    tokenize(str(text), tmp_path / "again", tokenizer=again)
    for file in without.glob("*token*"):
        file.unlink()

    def tokens(name: str, checkpoint: Path = source, tokenizer: Path | None = None) -> Tokens:
        named = None if tokenizer is None else str(tokenizer)
        return neox.Neox(neox.Config(checkpoint=str(checkpoint), tokenizer=named, text=str(tmp_path / name))).tokens()

    assert len(tokens("own").train) == len(tokens("again").train)
    assert tokens("other", without).vocabulary == CharVocabulary.of(TEXT)
    for checkpoint, tokenizer in ((source, None), (source, again), (without, again)):
        with pytest.raises(ValueError, match=r"text='.*other' .* another vocabulary, of \d+ characters, .* 309 tokens"):
            tokens("other", checkpoint, tokenizer)


@pytest.mark.slow
def test_a_lora_run_resumes_exactly_without_its_source_and_is_a_source_itself(tmp_path, train, capsys):
    source = publish(tmp_path / "hf", "float16")
    flags = [f"--checkpoint={source}", "--tune=lora", "--lora-rank=2", "--lora-targets", "dense", "dense_4h_to_h"]
    train(*flags, "--steps=4", f"--out={tmp_path / 'straight'}")
    train(*flags, "--steps=2", f"--out={tmp_path / 'run'}")
    about = read_about(tmp_path / "run").original
    source.rename(tmp_path / "moved")
    train("--resume", tmp_path / "run", "--steps=4")
    assert read_about(tmp_path / "run").original == about
    straight, resumed = (flat_arrays(load_saved(tmp_path / name)) for name in ("straight", "run"))
    assert straight.keys() == resumed.keys()
    for path, array in straight.items():
        assert array.dtype == resumed[path].dtype
        np.testing.assert_array_equal(array, resumed[path])
    losses = [np.load(tmp_path / name / "checkpoints" / "4" / "losses.npy") for name in ("straight", "run")]
    np.testing.assert_array_equal(*losses)

    assert convert(["inspect", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^ +original +float16, {source}$", shown, re.M)
    assert re.search(r"^ +merged adapter +rank 2, alpha 8, dense, dense_4h_to_h$", shown, re.M)

    damaged = Path(shutil.copytree(tmp_path / "run", tmp_path / "damaged"))
    stored = damaged / "checkpoints" / "4" / "model" / "params" / "state" / "manifest.ocdbt"
    stored.write_bytes(bytes(stored.stat().st_size))
    train("--resume", damaged, "--steps=4")
    assert "checkpoint 4 is skipped" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(damaged / "checkpoints" / "4" / "losses.npy"), losses[0])

    train(f"--checkpoint={tmp_path / 'run'}", "--steps=1", f"--out={tmp_path / 'again'}")
    again = read_about(tmp_path / "again").original
    assert again["original"] == {"source": str(tmp_path / "run"), "dtype": "float16"}
    assert again["token_ids"] == about["token_ids"]
    merged = flat_arrays(jaxmodels.load(tmp_path / "run"))
    for path, array in flat_arrays(load_saved(tmp_path / "again")).items():
        assert np.abs(array - merged[path].astype(jnp.float32)).max() < 1e-3  # one step of Adam at a rate of 3e-4
    assert convert(["neox", str(tmp_path / "again"), str(tmp_path / "back"), "--to", "neox", "--model-parallel=1"]) == 0
    found = {array.dtype for array in flat_arrays(jaxmodels.load(tmp_path / "back")).values()}
    assert found == {jnp.dtype("float16")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"foo": 1}}, "has 'foo', which"),
        ({"config": {"n_hidden": [1]}}, "n_hidden"),
        ({"model": "RetroModel"}, "has model 'RetroModel', which"),
    ],
)
def test_a_model_of_another_kind_in_a_run_is_refused(tmp_path, monkeypatch, change, message):
    from train import neox

    about = {"model": "NeoX", "config": {"n_vocab": 13, "n_hidden": 8, "n_layers": 1, "n_heads": 2}}
    changed = {name: {**value, **change.get(name, {})} if name == "config" else value for name, value in about.items()}
    changed |= {name: value for name, value in change.items() if name != "config"}
    monkeypatch.setattr(neox, "latest_step", lambda run: (run, {}))
    monkeypatch.setattr(neox, "read_config", lambda folder: (changed["model"], changed["config"]))
    experiment = neox.Neox(neox.Config(tune="all", checkpoint=str(tmp_path)))
    experiment.resume(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        _ = experiment.base


@pytest.mark.slow
def test_an_adapter_is_not_larger_than_what_it_changes():
    from jaxmodels.neox import NeoX, NeoXConfig
    from jaxmodels.neox.lora import LoRA, LoRANeoX

    config = NeoXConfig(n_vocab=13, n_hidden=8, n_layers=1, n_heads=2, rope_percentage=1.0)
    model = NeoX(config, rngs=nnx.Rngs(0))
    assert LoRANeoX.of(model, LoRA(rank=8)).lora.rank == 8
    with pytest.raises(ValueError, match="rank=9 must be at most n_hidden=8"):
        LoRANeoX.of(model, LoRA(rank=9))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tune": "lora"}, r"tune='lora' .*--checkpoint"),
        ({"tune": "lora", "checkpoint": "x", "lora_rank": 0}, "lora_rank=0 .*1"),
        ({"tune": "lora", "checkpoint": "x", "lora_alpha": -1.0}, "lora_alpha=-1.0 .*0"),
        ({"tune": "lora", "checkpoint": "x", "lora_targets": ("query",)}, "lora_targets='query' .*query_key_value"),
        ({"tune": "biases", "checkpoint": "x", "lora_rank": 4}, r"lora_rank.*tune='lora'.*tune='biases'"),
        ({"tune": "some", "checkpoint": "x"}, "tune='some' .*all, biases, lora"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        neox.Config(**flags)


@pytest.mark.slow
def test_biases_of_a_checkpoint_without_any_are_not_tuned(tmp_path):
    config = NeoXConfig(307, 20, 2, 5, rope_percentage=0.5, n_kv_heads=1, attention_bias=False, ffn_bias=False)
    jaxmodels.save(NeoX(config, rngs=nnx.Rngs(0)), tmp_path / "model")
    experiment = neox.Neox(neox.Config(checkpoint=str(tmp_path / "model"), tune="biases"))
    with pytest.raises(ValueError, match=r"tune='biases'.*model' have no biases"):
        experiment.model(5)


def test_a_command_line_with_values_that_do_not_fit_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^lora_targets='query' [^\n]*query_key_value[^\n]*$"):
        parse(neox.Neox, "python -m train.neox", ["--tune=lora", "--checkpoint=x", "--lora-targets", "query"])
    with pytest.raises(SystemExit):
        parse(neox.Neox, "python -m train.neox", ["--seq-len=some"])
