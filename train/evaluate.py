"""How well a trained model predicts a text.

    python -m train.evaluate runs/rope                     # the held-out part of the text it was trained on
    python -m train.evaluate runs/rope --text FILE         # a whole text of another file
    python -m train.evaluate MODEL --text FILE --tokenizer tokenizer.json --seq-len 2048

MODEL is what jaxmodels.save or python -m jaxmodels.convert wrote.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from jaxmodels.text import TokenizerFile, Vocabulary, load_corpus, load_vocabulary
from train import config
from train.checkpoints import latest_model, open_model
from train.command import Stop, one_line_errors
from train.data import Example, Windows
from train.loop import Evaluation
from train.mesh import check_batch, make_mesh
from train.neighbors import with_neighbors
from train.step import Numerics, Precision, Program
from train.tokenize import open_tokens

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


def open_checkpoint(command: Command, mesh: Mesh) -> tuple[Any, Vocabulary, dict[str, Any]]:
    """Model, vocabulary, and of a run its configuration, else an empty one; raises ValueError where none is."""
    folder = command.checkpoint
    if (folder / config.FILE).exists() and (folder / "checkpoints").is_dir():
        settings = config.read_about(folder)["config"]
        model, _ = latest_model(folder, mesh)
        return model, load_vocabulary(folder / "vocabulary.json"), settings
    model = open_model(folder, mesh)
    if command.tokenizer is not None:
        return model, TokenizerFile.read(command.tokenizer), {}
    return model, load_vocabulary(folder / "vocabulary.json"), {}


def judge(
    model: Any, windows: Windows, vocabulary: Vocabulary, mesh: Mesh, command: Command, settings: dict[str, Any]
) -> Judgement:
    """A model trained with neighbours reads those of its own index."""
    program = Program(lambda: model, optax.identity(), mesh, Numerics(compute_dtype=command.compute_dtype))
    examples: Sequence[Example] = with_neighbors(windows, command.checkpoint, settings)
    nats = Evaluation(program, examples, command.batch_size, Stop())(program.state_of(model))
    assert nats is not None, "nobody asked it to end"
    n = len(windows) * windows.seq_len
    written = vocabulary.decode(np.asarray(windows.ids[1 : n + 1]))
    n_bytes = n if vocabulary.unit == "byte" else len(written.encode("utf-8"))  # the first may begin in a character
    bits = n * nats / math.log(2)
    return Judgement(n, nats, bits / len(written), bits / n_bytes)


def main(arguments: Sequence[str]) -> None:
    """Prints the judgement; raises ValueError for bad input."""
    command = tyro.cli(Command, args=arguments, prog=PROGRAM)
    mesh = make_mesh(command.mesh)
    check_batch(mesh, command.batch_size)
    model, vocabulary, settings = open_checkpoint(command, mesh)
    seq_len, own_text = command.seq_len or settings.get("seq_len"), settings.get("text")
    if seq_len is None:
        raise ValueError("a model that is no run needs --seq-len")
    if command.text is not None:
        ids = vocabulary.encode(load_corpus(command.text))
    elif own_text is not None:
        ids = open_tokens(own_text).validation
    else:
        raise ValueError("a model that is no run needs --text")
    found = judge(model, Windows(ids, seq_len, "given"), vocabulary, mesh, command, settings)
    print(f"{command.text or f'held-out part of {own_text}'}: {found.tokens:,} {vocabulary.unit}s predicted")
    print(f"    loss                 {found.nats:.4f} nats per {vocabulary.unit}")
    print(f"    perplexity           {math.exp(found.nats):.4f}")
    print(f"    bits per character   {found.bits_per_character:.4f}")
    print(f"    bits per byte        {found.bits_per_byte:.4f}")


if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        main(sys.argv[1:])
