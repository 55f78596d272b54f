"""Loss of a trained model on a text: `jaxmodels evaluate`, or `python -m train.evaluate` in a checkout."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optax
from jax.sharding import Mesh

from jaxmodels.process import programs
from jaxmodels.sharding import check_batch, make_mesh
from jaxmodels.text import TokenizerFile, Vocabulary, load_corpus, load_vocabulary
from jaxmodels.training.checkpoints import open_model
from jaxmodels.training.data import Example, Windows
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.loop import Evaluation
from jaxmodels.training.run import is_run, open_run, read_about
from jaxmodels.training.signals import Stop
from jaxmodels.training.step import Numerics, Precision, Program, token_losses

PROGRAM = "python -m train.evaluate"
EXAMPLES = """\
examples:
  jaxmodels evaluate runs/rope                    # the held-out part of the text it was trained on
  jaxmodels evaluate runs/rope --text FILE        # the whole text of another file
  jaxmodels evaluate MODEL --text FILE --tokenizer tokenizer.json --seq-len 2048

MODEL is a folder written by jaxmodels.save or jaxmodels convert.
"""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a model on a text: number of predicted tokens; nats per token, bits per character and byte."""

    tokens: int
    nats: float
    bits_per_character: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with its vocabulary, and its experiment if it comes from a run."""

    model: Any
    vocabulary: Vocabulary
    experiment: Experiment[Any] | None = None


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog=prog,
        description="Print loss, perplexity, and bits per character and byte of a model on a text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("checkpoint", type=Path, metavar="FOLDER", help="folder of a run (its latest checkpoint), or of a model")
    add(
        "--text",
        help="python_docs, tiny_shakespeare or a UTF-8 file, evaluated whole (default: the held-out part of the "
        "run's own text)",
    )
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json of a model (default: its vocabulary.json)")
    add(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens per sequence, each predicted from those before it in the same sequence (default: as in training)",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="sequences per batch (default 16)")
    add("--mesh", default="", help="devices along the axes data, fsdp and tensor, as in training (default: data=all)")
    add("--compute-dtype", choices=get_args(Precision), default="float32", help="dtype to compute in (default float32)")
    add(
        "--experiment",
        metavar="MODULE",
        help="module of the run's experiment, such as my_project.experiment; it is imported, and registers its model",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: print_scores(options), prog)


def print_scores(options: argparse.Namespace) -> None:
    """Evaluate a checkpoint with the flags of `parser` and print the scores; raises ValueError for bad input."""
    for name in ("seq_len", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    mesh = make_mesh(options.mesh)
    check_batch(mesh, options.batch_size)
    opened = open_checkpoint(options, mesh)
    examples, unit = examples_of(options, opened), opened.vocabulary.unit
    found = evaluate(opened, examples, mesh, options.batch_size, options.compute_dtype)
    text = options.text or f"held-out part of {opened.experiment.config.text if opened.experiment else ''}"
    print(f"{text}: {found.tokens:,} {unit}s predicted")
    print(f"    loss                 {found.nats:.4f} nats per {unit}")
    print(f"    perplexity           {math.exp(found.nats):.4f}")
    print(f"    bits per character   {found.bits_per_character:.4f}")
    print(f"    bits per byte        {found.bits_per_byte:.4f}")


def open_checkpoint(options: argparse.Namespace, mesh: Mesh) -> Checkpoint:
    """Open a run's latest checkpoint or a model; raises ValueError if the folder holds neither."""
    folder = options.checkpoint
    if is_run(folder):
        experiment, model, vocabulary = open_run(folder, options.experiment, mesh)
        if options.seq_len is not None:
            config = dataclasses.replace(experiment.config, seq_len=options.seq_len)
            experiment = type(experiment)(config)
        return Checkpoint(model, vocabulary, experiment)
    model = open_model(folder, mesh)
    if options.tokenizer is not None:
        return Checkpoint(model, TokenizerFile.read(options.tokenizer))
    return Checkpoint(model, load_vocabulary(folder / "vocabulary.json"))


def examples_of(options: argparse.Namespace, opened: Checkpoint) -> Sequence[Example]:
    """Cut the text into examples; a run's experiment adds the model's inputs other than tokens.

    Raises ValueError if there is no text or length, or if the run's own text has changed since it was trained.
    """
    experiment, run = opened.experiment, options.checkpoint
    if experiment is None:
        for flag, value in (("--seq-len", options.seq_len), ("--text", options.text)):
            if value is None:
                raise ValueError(f"{flag} is required for a model folder that is not a training run")
        return Windows(opened.vocabulary.encode(load_corpus(options.text)), options.seq_len, "given")
    if options.text is None:
        return experiment.held_out(run, opened.vocabulary, read_about(run).sha256)
    return experiment.examples(opened.vocabulary.encode(load_corpus(options.text)), run)


def evaluate(
    opened: Checkpoint, examples: Sequence[Example], mesh: Mesh, batch_size: int, compute_dtype: Precision
) -> Scores:
    """Score a model on every token of the examples except their first; raises ValueError if the loss is NaN."""
    model, vocabulary = opened.model, opened.vocabulary
    losses = token_losses if opened.experiment is None else opened.experiment.losses
    numerics = Numerics(compute_dtype=compute_dtype)
    program = Program(lambda: model, optax.identity(), mesh, numerics, losses=losses)
    nats = Evaluation(program, examples, batch_size, Stop())(program.state_of(model))
    assert nats is not None, "this Stop is never set"
    if math.isnan(nats):
        raise ValueError(
            f"loss is nan over {len(examples)} sequences; weights must be finite, and the model's vocabulary must "
            f"have at least the {len(vocabulary)} {vocabulary.unit}s of the given one"
        )
    ids = np.concatenate([examples[i]["tokens"][1:] for i in range(len(examples))])
    written, n = vocabulary.decode(ids), len(ids)
    # For bytes, count the tokens: the text may begin inside a character, which does not decode.
    n_bytes = n if vocabulary.unit == "byte" else len(written.encode("utf-8"))
    bits = n * nats / math.log(2)
    return Scores(n, nats, bits / len(written), bits / n_bytes)
