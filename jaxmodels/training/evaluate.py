"""How well a trained model predicts a text.

    python -m train.evaluate runs/rope                     # the held-out part of the text it was trained on
    python -m train.evaluate runs/rope --text FILE         # a whole text of another file
    python -m train.evaluate MODEL --text FILE --tokenizer tokenizer.json --seq-len 2048

MODEL is what jaxmodels.save or python -m jaxmodels.convert wrote.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from jaxmodels.io.checkpoint import read_config
from jaxmodels.retro.retrieval.examples import of_run, with_index, with_neighbors
from jaxmodels.sharding import check_batch, make_mesh
from jaxmodels.text import TokenizerFile, Vocabulary, load_corpus, load_vocabulary
from jaxmodels.training import config
from jaxmodels.training.checkpoints import latest_model, open_model
from jaxmodels.training.data import Example, Windows
from jaxmodels.training.loop import Evaluation
from jaxmodels.training.signals import Stop
from jaxmodels.training.step import Numerics, Precision, Program
from jaxmodels.training.tokenize import open_tokens
from train import rope_value

PROGRAM = "python -m train.evaluate"


@dataclasses.dataclass(frozen=True)
class Command:
    """Loss, perplexity and bits per character and byte of a model on a text."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """folder of a run, whose latest checkpoint is taken, or of a model"""
    text: str | None = None
    """python_docs, tiny_shakespeare or a UTF-8 FILE, all of it; none: the held-out part of the run's own text"""
    tokenizer: Path | None = None
    """tokenizer.json of a model that is no run; none: the vocabulary.json beside it"""
    seq_len: int | None = None
    """tokens of a sequence, each predicted from those before it in its own; none: as in training"""
    batch_size: int = 16
    """sequences at a time"""
    mesh: str = ""
    """devices along the axes data, fsdp and tensor, as in training"""
    compute_dtype: Precision = "float32"
    """what the model computes in"""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """tokens are those predicted; the rates are per token, and per character and byte of the text they write."""

    tokens: int
    nats: float
    bits_per_character: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is judged, and of a run its script, its configuration and what tells its data from any other."""

    model: Any
    vocabulary: Vocabulary
    script: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str | None = None


def open_checkpoint(command: Command, mesh: Mesh) -> Checkpoint:
    """The latest of a run, or a model; raises ValueError where the folder holds neither."""
    folder = command.checkpoint
    if (folder / config.FILE).exists() and (folder / "checkpoints").is_dir():
        about = config.read_about(folder)
        model, _ = latest_model(folder, mesh)
        vocabulary = load_vocabulary(folder / "vocabulary.json")
        return Checkpoint(model, vocabulary, about["script"], about["config"], about["sha256"])
    if mesh.size > 1 and read_config(folder)[1].get("stacked") is False:
        model = open_model(folder).stacked()  # the tables of train/mesh.py are for stacked layers
    else:
        model = open_model(folder, mesh)
    if command.tokenizer is not None:
        return Checkpoint(model, TokenizerFile.read(command.tokenizer))
    return Checkpoint(model, load_vocabulary(folder / "vocabulary.json"))


def examples_of(command: Command, opened: Checkpoint) -> Sequence[Example]:
    """What the model is to predict, in windows; one trained with neighbours reads those of its own index.

    Raises ValueError where no text or length is known, and where a run's own text is no longer the one it had.
    """
    settings = opened.settings
    seq_len = settings.get("seq_len") if command.seq_len is None else command.seq_len
    if seq_len is None:
        raise ValueError("a model that is no run needs --seq-len")
    if command.text is not None:
        ids = opened.vocabulary.encode(load_corpus(command.text))
    elif opened.script == "train.rope_value":  # which has no text, it makes its problems
        return rope_value.Config(**{**settings, "seq_len": seq_len}).task().validation
    elif settings:
        ids = held_out(command.checkpoint, opened)
    else:
        raise ValueError("a model that is no run needs --text")
    return with_neighbors(Windows(ids, seq_len, "given"), command.checkpoint, settings)


def held_out(run: Path, opened: Checkpoint) -> np.ndarray:
    """The part of its own text that a run did not train on, in the run's own vocabulary.

    Raises ValueError where the text has changed since: what is held out of it now may have been trained on.
    """
    text = opened.settings["text"]
    tokens, index = open_tokens(text, opened.vocabulary), of_run(run, opened.settings)
    found = tokens.sha256 if index is None else with_index(tokens.sha256, index)
    if found != opened.sha256:
        what = f"text={text!r}" if index is None else f"text={text!r} with its index"
        raise ValueError(
            f"{what} has changed since {run} was trained on it: sha256 {found} now, {opened.sha256} then; "
            "name a text with --text"
        )
    return tokens.validation


def judge(model: Any, examples: Sequence[Example], vocabulary: Vocabulary, mesh: Mesh, command: Command) -> Judgement:
    """How well a model predicts each example's tokens but the first."""
    program = Program(lambda: model, optax.identity(), mesh, Numerics(compute_dtype=command.compute_dtype))
    nats = Evaluation(program, examples, command.batch_size, Stop())(program.state_of(model))
    assert nats is not None, "nobody asked it to end"
    ids = np.concatenate([examples[i]["tokens"][1:] for i in range(len(examples))])
    written, n = vocabulary.decode(ids), len(ids)
    n_bytes = n if vocabulary.unit == "byte" else len(written.encode("utf-8"))  # the first may begin in a character
    bits = n * nats / math.log(2)
    return Judgement(n, nats, bits / len(written), bits / n_bytes)


def main(arguments: Sequence[str]) -> None:
    """Prints the judgement; raises ValueError for bad input."""
    command = tyro.cli(Command, args=arguments, prog=PROGRAM)
    for name in ("seq_len", "batch_size"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    mesh = make_mesh(command.mesh)
    check_batch(mesh, command.batch_size)
    opened = open_checkpoint(command, mesh)
    vocabulary, examples = opened.vocabulary, examples_of(command, opened)
    found = judge(opened.model, examples, vocabulary, mesh, command)
    what = command.text or f"held-out part of {opened.settings['text']}"
    print(f"{what}: {found.tokens:,} {vocabulary.unit}s predicted")
    print(f"    loss                 {found.nats:.4f} nats per {vocabulary.unit}")
    print(f"    perplexity           {math.exp(found.nats):.4f}")
    print(f"    bits per character   {found.bits_per_character:.4f}")
    print(f"    bits per byte        {found.bits_per_byte:.4f}")
