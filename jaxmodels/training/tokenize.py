"""Encode a text once, to memory-mapped tokens: `jaxmodels tokenize`, or `python -m train.tokenize` in a checkout.

The folder that it writes is described in `jaxmodels.text.tokens`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxmodels.io.atomic import check_target
from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.paths import local
from jaxmodels.process.texts import visible
from jaxmodels.text import TokenizerFile
from jaxmodels.text.sources import CORPORA, names_documents, open_sources
from jaxmodels.text.tokens import Tokens, open_tokens, vocabulary_of, write, write_sources

__all__ = ["Tokens", "main", "open_tokens", "parser", "tokenize", "write"]

PROGRAM = "python -m train.tokenize"
EXAMPLES = """\
examples:
  jaxmodels tokenize FILE TOKENS --kind bytes
  jaxmodels tokenize FILE TOKENS --tokenizer tokenizer.json
  jaxmodels tokenize DOCUMENTS.jsonl TOKENS --tokenizer pythia-70m/ --field text
  jaxmodels tokenize DATASET TOKENS --tokenizer pythia-70m/       # a folder of datasets, or of Parquet files
  python -m train.rope --text TOKENS

A file is read in pieces that are encoded on all cores, in memory that does not grow with it. A piece ends only where
the tokenizer's ids are the same as those of the whole text. If the command is killed, the same command continues.

JSONL, Arrow and Parquet files hold documents: each is encoded by itself and followed by the end token; with --kind
chars or bytes, which have none, by an empty line. In a folder, files whose path names validation data are validated on,
and those of test data are left out; else the last tenth of the documents is for validation.
"""


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    arguments = Parser(
        prog=prog,
        description="Encode a text to a folder of tokens, which --text of the training scripts takes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "text",
        metavar="TEXT",
        help=f"{', '.join(CORPORA)}, a UTF-8 file, a .jsonl, .parquet or .arrow file, or a folder of such files, as "
        "datasets.save_to_disk writes",
    )
    arguments.add_argument("out", type=Path, metavar="TOKENS", help="folder to create")
    arguments.add_argument(
        "--kind",
        choices=("chars", "bytes", "tokenizer"),
        help="tokens: characters of the text, bytes of its UTF-8, or those of --tokenizer (default chars)",
    )
    arguments.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.json of the tokenizers package, or its folder; sets --kind tokenizer",
    )
    arguments.add_argument(
        "--field",
        metavar="NAME",
        help="field or column of JSONL, Arrow and Parquet files that holds the text (default text)",
    )
    arguments.add_argument(
        "--end-token",
        metavar="TOKEN",
        help="token that follows each document (default: the one that the files beside the tokenizer name)",
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: tokenize(**vars(options)), prog)


def tokenize(
    text: str,
    out: Path,
    kind: str | None = None,
    tokenizer: Path | None = None,
    field: str | None = None,
    end_token: str | None = None,
) -> None:
    """Write a folder of tokens and print its sizes; raises ValueError for bad input."""
    text, out = os.path.expanduser(text), local(out, "TOKENS")
    tokenizer = None if tokenizer is None else local(tokenizer, "tokenizer")
    if kind == "tokenizer" and tokenizer is None:
        raise ValueError("--kind tokenizer needs --tokenizer FILE")
    if tokenizer is not None and kind not in (None, "tokenizer"):
        raise ValueError(f"--kind {kind} and --tokenizer {tokenizer} name two vocabularies: omit one of them")
    if field is not None and not names_documents(text):
        raise ValueError(f"--field {field}: {text} has no fields or columns; .jsonl, .parquet and .arrow files have")
    check_target(out, overwrite=None)  # before the work
    given = None if tokenizer is None else TokenizerFile.read(tokenizer)
    sources = open_sources(text, field or "text")
    for note in sources.notes:
        print(visible(note), file=sys.stderr)
    tokens = write_sources(out, sources, vocabulary_of(sources, given or kind or "chars"), end_token)
    for note in tokens.notes[len(sources.notes) :]:
        print(visible(note), file=sys.stderr)
    counts = tokens.documents
    documents = "" if counts is None else f" in {counts['train']:,} and {counts['validation']:,} documents,"
    where = visible(str(out))
    print(
        f"{where}: {len(tokens.train):,} tokens to train on, {len(tokens.validation):,} to validate,{documents} "
        f"of {len(tokens.vocabulary):,} {tokens.vocabulary.unit}s"
    )
