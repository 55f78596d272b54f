"""Targets of the fuzzer: a small valid example of every kind of file that others may have made, and its reader."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0


@dataclasses.dataclass(frozen=True)
class Target:
    """make: write the example to a folder. read: read all of it. files: pattern of the files to change."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: str = "*"


def neox_config() -> Any:
    from jaxmodels.neox import NeoXConfig

    return NeoXConfig(n_vocab=21, n_hidden=12, n_layers=2, n_heads=3, rope_percentage=0.5, n_ff=20, max_len=11)


def neox_model() -> Any:
    from flax import nnx

    from jaxmodels.neox import NeoX

    return NeoX(neox_config(), rngs=nnx.Rngs(SEED))


def arrays_of(model: Any) -> list[np.ndarray]:
    """Every value of a model, in memory."""
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def load(folder: Path) -> Any:
    import jaxmodels

    return arrays_of(jaxmodels.load(folder))


def make_model(folder: Path) -> None:
    import jaxmodels

    jaxmodels.save(neox_model(), folder)


def make_streamed(folder: Path) -> None:
    from jaxmodels.convert.flax import write_flax
    from jaxmodels.convert.source import model_source

    write_flax(model_source(neox_model()), folder)


def make_hf(folder: Path, file_bytes: int = 10**9) -> None:
    from jaxmodels.convert.hf import write_hf
    from jaxmodels.convert.source import model_source

    write_hf(model_source(neox_model()), folder, file_bytes=file_bytes)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "bos_token_id": 1}))
    make_tokenizer(folder)


def make_bins(folder: Path, old: bool = False) -> None:
    """As transformers once wrote it: two files of PyTorch with an index."""
    import torch
    from safetensors.torch import load_file

    make_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({n: tensors[n] for n in part}, folder / file, _use_new_zipfile_serialization=not old)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def make_shards(folder: Path) -> None:
    from jaxmodels.convert.neox import save_neox

    save_neox(neox_model(), folder, 3)


def make_pt(folder: Path, old: bool = False) -> None:
    import torch

    tensors = {"a": torch.arange(15.0).view(3, 5), "b.c": torch.zeros(7, dtype=torch.bfloat16)}
    torch.save(tensors, folder / "model.pt", _use_new_zipfile_serialization=not old)


def read_pt(folder: Path) -> Any:
    from jaxmodels.io.torch_files import read_state_dict

    return {name: tensor.clone() for name, tensor in read_state_dict(folder / "model.pt").items()}


def make_safetensors(folder: Path) -> None:
    from jaxmodels.io.safetensors import write_file

    write_file(folder / "model.safetensors", {"a": np.arange(15.0).reshape(3, 5), "b": np.zeros(7, np.float16)})


def read_safetensors(folder: Path) -> Any:
    from jaxmodels.io.safetensors import read_file

    return {name: np.array(tensor) for name, tensor in read_file(folder / "model.safetensors").items()}


def make_run(folder: Path) -> None:
    """A training run with one checkpoint, whose model is small."""
    import jaxmodels
    from jaxmodels.io.steps import FORMAT, MARK
    from jaxmodels.text import CharVocabulary

    step = folder / "checkpoints" / "7"
    step.mkdir(parents=True)
    jaxmodels.save(neox_model(), step / "model")
    np.save(step / "losses.npy", np.zeros(7, np.float32))
    sizes = {str(file.relative_to(step)): file.stat().st_size for file in sorted(step.rglob("*")) if file.is_file()}
    (step / MARK).write_text(json.dumps({"format": FORMAT, "step": 7, "data": {}, "files": sizes}))
    about = {"format": 3, "script": "train.neox", "standalone": True, "config": {"seq_len": 11}, "sha256": "0"}
    (folder / "config.json").write_text(json.dumps(about))
    CharVocabulary("abcdefghijklmnopqrstu").save(folder / "vocabulary.json")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "validation_loss": 2.25}\n')


def read_run(folder: Path) -> Any:
    from jaxmodels.training import metrics
    from jaxmodels.training.run import open_run

    metrics.read(folder)
    metrics.Log.lines_until(folder, [2.5])
    return open_run(folder)


def make_tokens(folder: Path) -> None:
    from jaxmodels.text import CharVocabulary
    from jaxmodels.training.tokenize import write

    text = "to be or not to be " * 9
    write(folder / "tokens", text, CharVocabulary.of(text))


def read_tokens(folder: Path) -> Any:
    from jaxmodels.training.tokenize import open_tokens

    tokens = open_tokens(str(folder / "tokens"))
    return tokens.vocabulary.decode(np.array(tokens.train)), np.array(tokens.validation)


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(["<|endoftext|>", *"abcdefghijklmnopqrst"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")] if "ab" in vocabulary else []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def read_tokenizer(folder: Path) -> Any:
    from jaxmodels.text import TokenizerFile

    vocabulary = TokenizerFile.read(folder / "tokenizer.json")
    return len(vocabulary), vocabulary.decode(vocabulary.encode("abc"))


def make_index(folder: Path) -> None:
    from jaxmodels.retro.retrieval.corpus import Corpus
    from jaxmodels.retro.retrieval.embedders import HashedNGrams
    from jaxmodels.retro.retrieval.index import ChunkIndex
    from jaxmodels.text import CharVocabulary

    text = "to be or not to be, that is the question: " * 5
    vocabulary = CharVocabulary.of(text)
    corpus = Corpus.of(vocabulary.encode(text), vocabulary)
    ChunkIndex.build(folder / "index", corpus, 5, HashedNGrams(16, 1, 2), progress=False)


def read_index(folder: Path) -> Any:
    from jaxmodels.retro.retrieval.index import ChunkIndex

    index = ChunkIndex.load(folder / "index")
    chunk = np.zeros((1, index.chunk_len), np.int64)
    return index.corpus.passages(index.neighbors(chunk, 2), 3)


def make_fixture(folder: Path) -> None:
    import torch
    from flax import nnx

    import parity
    from jaxmodels.layers import Linear

    parity.record(
        torch.nn.Linear(3, 5), {"input": np.ones((2, 3), np.float32)}, folder / "one",
        flax_module=nnx.eval_shape(lambda: Linear(3, 5, rngs=nnx.Rngs(0))),
    )  # fmt: skip


def read_fixture(folder: Path) -> Any:
    from parity.golden.fixture import read

    fixture = read(folder / "one")
    return list(fixture.named_parameters()), fixture.get_submodule("")


TARGETS = {
    target.name: target
    for target in (
        Target("pt", make_pt, read_pt),
        Target("pt of torch < 1.6", lambda folder: make_pt(folder, old=True), read_pt),
        Target("safetensors", make_safetensors, read_safetensors),
        Target("model", make_model, load),
        Target("model, streamed", make_streamed, load),
        Target("Hugging Face", make_hf, load),
        Target("Hugging Face, in parts", lambda folder: make_hf(folder, 3000), load),
        Target("Hugging Face, .bin", make_bins, load),
        Target("Hugging Face, old .bin", lambda folder: make_bins(folder, old=True), load),
        Target("shards", make_shards, load),
        Target("shards' YAML", make_shards, load, "*.yml"),
        Target("config.json", make_hf, load, "config.json"),
        Target("run", make_run, read_run),
        Target("run's JSON", make_run, read_run, "*.json*"),
        Target("tokens", make_tokens, read_tokens),
        Target("tokenizer", make_tokenizer, read_tokenizer),
        Target("chunk index", make_index, read_index),
        Target("chunk index's JSON", make_index, read_index, "*.json"),
        Target("fixture", make_fixture, read_fixture),
        Target("fixture's JSON", make_fixture, read_fixture, "*.json"),
    )
}
