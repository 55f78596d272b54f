"""Loss of a trained model on a text: `jaxmodels evaluate`, or `python -m train.evaluate` in a checkout."""

import argparse
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optax
from jax.sharding import Mesh

from jaxmodels.convert import kinds
from jaxmodels.convert.open import open_source
from jaxmodels.io.atomic import atomic_file, check_file, recover
from jaxmodels.io.bounded import errors_naming
from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.failures import memory_naming
from jaxmodels.process.paths import local
from jaxmodels.process.texts import visible
from jaxmodels.protocols import tell_left_out
from jaxmodels.scoring import score
from jaxmodels.scoring.documents import perplexity
from jaxmodels.scoring.files import Document, read_documents, table, write_json
from jaxmodels.sharding import check_batch, make_mesh
from jaxmodels.text import TokenizerFile, Vocabulary, load_vocabulary
from jaxmodels.text.documents import Source, kind_of
from jaxmodels.text.sources import open_text
from jaxmodels.text.tokens import decoded_size, encode_whole
from jaxmodels.training.checkpoints import open_model
from jaxmodels.training.data import Example, Windows, n_predicted, without_padding
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.loop import Evaluation
from jaxmodels.training.runs.folder import check_reads_tokens_alone, is_run, open_run, read_about
from jaxmodels.training.signals import Stop
from jaxmodels.training.step import Numerics, Precision, Program, token_losses

PROGRAM = "python -m train.evaluate"
SOME = 1024  # sequences that are decoded at once
EXAMPLES = """\
examples:
  jaxmodels evaluate runs/rope                    # the held-out part of the text it was trained on
  jaxmodels evaluate runs/rope --text FILE        # the whole text of another file
  jaxmodels evaluate EleutherAI/pythia-70m --text a.txt b.txt
  jaxmodels evaluate MODEL --text documents.jsonl --jsonl-field text --stride 512 --json scores.json

SOURCE is a folder of jaxmodels.save or jaxmodels convert, a training run, GPT-NeoX shards, a Hugging Face folder, or an
id of the Hub. A run's own text, and one text with --seq-len, are cut into sequences of that length, and tokens after
the last whole one are left out. Otherwise each file, or each line of JSONL, is a document that is scored by itself and
whole, long ones in windows that overlap; see jaxmodels.scoring.score.
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
    arguments = Parser(
        prog=prog,
        description="Print loss, perplexity, and bits per character and byte of a model on a text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("checkpoint", type=Path, metavar="SOURCE", help="a model, a run (its latest checkpoint), or an id of the Hub")
    add(
        "--text",
        nargs="+",
        metavar="TEXT",
        help="python_docs, tiny_shakespeare, UTF-8 files or JSONL, evaluated whole (default: the held-out part of the "
        "run's own text)",
    )
    add("--jsonl-field", metavar="NAME", help="field of a JSONL file's objects that holds the text")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json or vocabulary.json (default: the source's own)")
    add("--revision", metavar="NAME", help="branch, tag or commit of an id of the Hub")
    add(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens per sequence, each predicted from those before it in the same sequence (default: as in training; "
        "of a model, the length that it names, but at most 4,096)",
    )
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window of a long document to the next, at most seq_len (default: half of it)",
    )
    add("--bos", action="store_true", help="begin each document with the bos token, and predict its first token too")
    add("--json", type=Path, metavar="FILE", help="also write the scores of all documents to a file")
    add("--batch-size", type=int, metavar="N", help="sequences per batch (default 16; of documents, by their length)")
    add(
        "--loss-chunk",
        type=int,
        metavar="N",
        help="tokens whose logits are computed together (default: as many as have 2²⁵ logits on a CPU, of documents "
        "2²³, and 2²⁶ on each other device)",
    )
    add("--mesh", default="", help="devices along the axes data, fsdp and tensor, as in training (default: data=all)")
    add("--compute-dtype", choices=get_args(Precision), default="float32", help="dtype to compute in (default float32)")
    add(
        "--experiment",
        metavar="MODULE",
        help="module or .py file of the run's experiment, such as my_project.experiment; it is imported, and registers "
        "its model",
    )
    add(
        "--embedder",
        metavar="NAME",
        help="embedder of a run's chunk index, such as bert:MODEL; required if it loads a model (default: n-grams)",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: memory_naming(options.checkpoint)(print_scores)(options), prog)


def print_scores(options: argparse.Namespace) -> None:
    """Evaluate a checkpoint with the flags of `parser` and print the scores; raises ValueError for bad input."""
    options.checkpoint = local(options.checkpoint, "SOURCE")
    options.text = None if options.text is None else [os.path.expanduser(text) for text in options.text]
    for name in ("tokenizer", "json"):
        if getattr(options, name) is not None:
            setattr(options, name, local(getattr(options, name), name))
    for name in ("seq_len", "batch_size", "stride", "loss_chunk"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    mesh = make_mesh(options.mesh)
    batch_size = options.batch_size or 16
    check_batch(mesh, batch_size)
    recover(options.checkpoint)
    if not in_sequences(options):
        print_table(options, mesh)
        return
    opened = open_checkpoint(options, mesh)
    examples, unit = examples_of(options, opened), opened.vocabulary.unit
    numerics = Numerics(compute_dtype=options.compute_dtype, loss_chunk=options.loss_chunk)
    with errors_naming(options.checkpoint):
        found = evaluate(opened, examples, mesh, batch_size, numerics)
    text = only_text(options) or f"held-out part of {opened.experiment.config.text if opened.experiment else ''}"
    print(f"{visible(text)}: {found.tokens:,} {unit}s predicted")
    print(f"    loss                 {found.nats:.4f} nats per {unit}")
    print(f"    perplexity           {perplexity(found.nats):.4f}")
    print(f"    bits per character   {found.bits_per_character:.4f}")
    print(f"    bits per byte        {found.bits_per_byte:.4f}")


def in_sequences(options: argparse.Namespace) -> bool:
    """True if one text is cut into sequences of one length, False if documents are scored by themselves."""
    of_documents = (options.stride, options.jsonl_field, options.json, options.revision, options.bos or None)
    if any(value is not None for value in of_documents) or len(options.text or ()) > 1:
        return False
    if kind_of(Path(only_text(options) or "")) == "jsonl":
        return False
    return is_run(options.checkpoint) or (options.seq_len is not None and read_kind(options.checkpoint) == "model")


def read_kind(source: Path) -> str:
    """Kind of a folder, as in `jaxmodels.convert.kinds`; "model" if it is none, for the error of opening it."""
    try:
        return kinds.find(source).kind
    except ValueError:
        return "model"


def only_text(options: argparse.Namespace) -> str | None:
    """The text if one is given."""
    return options.text[0] if options.text else None


def print_table(options: argparse.Namespace, mesh: Mesh) -> None:
    """Score each document by itself, print a table, and write the scores to --json.

    Raises ValueError if there is no text, or if a run's model reads something besides the tokens.
    """
    opened = open_source(options.checkpoint, revision=options.revision)
    if options.embedder is not None:
        raise ValueError("--embedder is for a run with a chunk index, evaluated on one text without --stride")
    if not options.text:
        raise ValueError("--text is required: python_docs, tiny_shakespeare, UTF-8 files or JSONL")
    if options.jsonl_field is not None and not any(kind_of(Path(name)) == "jsonl" for name in options.text):
        texts_given = ", ".join(options.text)
        raise ValueError(f"--jsonl-field {options.jsonl_field} is for .jsonl and .ndjson files, not for {texts_given}")
    if options.json is not None:
        check_file(options.json)
    for name in options.text:  # errors come before the work
        for _ in read_documents(name, options.jsonl_field):
            pass
    if opened.kind == "run":
        check_reads_tokens_alone(opened.folder, options.experiment, opened.model_name)
    vocabulary = opened.vocabulary(options.tokenizer)
    bos = opened.companions.token_ids.bos
    if options.bos and bos is None:
        raise ValueError(f"--bos: {opened.name} names no bos token")
    dtype = opened.compute_dtype("--compute-dtype") if opened.is_quantized else options.compute_dtype
    model = opened.model(dtype=dtype, shardings=mesh if mesh.size > 1 else None)
    tell_left_out(model, opened.name)
    window = None if options.seq_len is None else options.seq_len + 1
    documents: list[Document] = []

    def texts() -> Iterator[str | Source]:
        for name in options.text:
            for document in read_documents(name, options.jsonl_field):
                documents.append(document._replace(text=""))
                yield document.text

    with errors_naming(opened.name):
        scores = score(
            model,
            texts(),
            tokenizer=vocabulary,
            max_length=window,
            stride=options.stride,
            batch_size=options.batch_size,
            bos=bos if options.bos else None,
            loss_chunk=options.loss_chunk,
        )
    try:
        print(visible(table(documents, scores, vocabulary.unit), keep="\n"), flush=True)
    finally:  # either is kept if the other fails, as on a full disk or for a closed pipe
        if options.json is not None:
            with atomic_file(options.json) as temporary:
                write_json(temporary, documents, scores)


def open_checkpoint(options: argparse.Namespace, mesh: Mesh) -> Checkpoint:
    """Open a run's latest checkpoint or a model; raises ValueError if the folder holds neither."""
    folder = options.checkpoint
    if is_run(folder):
        experiment, model, vocabulary = open_run(folder, options.experiment, mesh)
        if options.embedder is not None:
            experiment.use_embedder(options.embedder)
        if options.seq_len is not None:
            experiment.config = dataclasses.replace(experiment.config, seq_len=options.seq_len)
            experiment.unnamed -= {"seq_len"}
        return Checkpoint(model, vocabulary, experiment)
    if options.embedder is not None:
        raise ValueError(f"--embedder is for training runs; {folder} is not one")
    model = open_model(folder, mesh)
    tell_left_out(model, str(folder))
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
        return Windows(encode_whole(open_text(options.text[0]), opened.vocabulary), options.seq_len, "given")
    if options.text is None:
        return experiment.held_out(run, opened.vocabulary, read_about(run).sha256)
    return experiment.examples(encode_whole(open_text(options.text[0]), opened.vocabulary), run)


def evaluate(
    opened: Checkpoint, examples: Sequence[Example], mesh: Mesh, batch_size: int, numerics: Numerics
) -> Scores:
    """Score a model on every token of the examples except their first; raises ValueError if the loss is NaN."""
    model, vocabulary = opened.model, opened.vocabulary
    losses = token_losses if opened.experiment is None else opened.experiment.losses
    program = Program(lambda: model, optax.identity(), mesh, numerics, losses=losses)
    nats = Evaluation(program, examples, batch_size, Stop())(program.state_of(model))
    assert nats is not None, "this Stop is never set"
    if not math.isfinite(nats):
        raise ValueError(
            f"loss is {nats} over {len(examples)} sequences; weights must be finite, and the model's vocabulary must "
            f"have at least the {len(vocabulary)} {vocabulary.unit}s of the given one"
        )
    some = [range(first, min(first + SOME, len(examples))) for first in range(0, len(examples), SOME)]
    parts = (np.concatenate([without_padding(examples[i])[1:] for i in part]) for part in some)
    n = n_predicted(examples)
    characters, n_bytes = decoded_size(vocabulary, parts)
    # For bytes, count the tokens: the text may begin inside a character, which does not decode.
    n_bytes = n if vocabulary.unit == "byte" else n_bytes
    bits = n * nats / math.log(2)
    # A vocabulary of others may decode to nothing.
    return Scores(n, nats, *(bits / size if size else math.inf for size in (characters, n_bytes)))
