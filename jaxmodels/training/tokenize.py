"""Encode a text once, to memory-mapped tokens: `jaxmodels tokenize`, or `python -m train.tokenize` in a checkout.

TOKENS/tokens.json                {"format": 2, "train": …, "validation": …, "sha256": …}
TOKENS/vocabulary.json            characters, bytes or the whole tokenizer; read by `load_vocabulary`
TOKENS/train.npy, validation.npy  ids [n], the first 90 % of the text and the rest, in the smallest unsigned integer
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxmodels.io import manifest
from jaxmodels.io.atomic import atomic_folder, check_target, recover
from jaxmodels.io.bounded import read_object
from jaxmodels.io.npy import map_array
from jaxmodels.process import programs
from jaxmodels.process.texts import quoted
from jaxmodels.text import (
    ByteVocabulary,
    CharVocabulary,
    TokenizerFile,
    Vocabulary,
    load_corpus,
    load_vocabulary,
    split,
)

PROGRAM = "python -m train.tokenize"
EXAMPLES = """\
examples:
  jaxmodels tokenize FILE TOKENS --kind bytes
  jaxmodels tokenize FILE TOKENS --tokenizer tokenizer.json
  python -m train.rope --text TOKENS
"""
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text as ids [n], in memory or memory-mapped, in two parts; sha256 is of the ids and the vocabulary."""

    train: np.ndarray
    validation: np.ndarray
    vocabulary: Vocabulary
    sha256: str


def open_tokens(text: str, vocabulary: Vocabulary | None = None) -> Tokens:
    """Open a corpus by name, a UTF-8 file, or a folder written by this command.

    vocabulary: of a corpus or file; default its characters. Raises ValueError if the text is none of these.
    """
    recover(Path(text))
    if Path(text).is_dir():
        return read(Path(text))
    content = load_corpus(text)
    vocabulary = vocabulary or CharVocabulary.of(content)
    train, validation = map(vocabulary.encode, split(content))
    return Tokens(train, validation, vocabulary, fingerprint(train, validation, vocabulary))


def fingerprint(train: np.ndarray, validation: np.ndarray, vocabulary: Vocabulary) -> str:
    """SHA-256 of ids, independent of their dtype, and of their vocabulary."""
    about = [type(vocabulary).__name__, vocabulary.described()]
    found = hashlib.sha256(json.dumps(about).encode())
    for part in (train, validation):
        found.update(len(part).to_bytes(8, "little"))
        for first in range(0, len(part), 2**20):
            found.update(part[first : first + 2**20].astype("<i4").tobytes())
    return found.hexdigest()


def write(folder: Path, text: str, vocabulary: Vocabulary) -> Tokens:
    """Encode a text and write it to a new folder atomically."""
    dtype = np.min_scalar_type(len(vocabulary) - 1)
    train, validation = (vocabulary.encode(part).astype(dtype) for part in split(text))
    sha256 = fingerprint(train, validation, vocabulary)
    about = {"format": FORMAT, "train": len(train), "validation": len(validation), "sha256": sha256}
    with atomic_folder(folder) as new:
        np.save(new / "train.npy", train)
        np.save(new / "validation.npy", validation)
        vocabulary.save(new / "vocabulary.json")
        (new / "tokens.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return Tokens(train, validation, vocabulary, sha256)


def read(folder: Path) -> Tokens:
    """Open a folder that `write` wrote, the ids memory-mapped; raises ValueError if it is not complete."""
    file = folder / "tokens.json"
    try:
        manifest.refuse_links(folder)
        about = read_object(file)
        if about.get("format") != FORMAT:
            raise ValueError(f"{file} has format {quoted(about.get('format'))}, this version reads {FORMAT}")
        parts = {name: map_array(folder / f"{name}.npy") for name in ("train", "validation")}
        vocabulary = load_vocabulary(folder / "vocabulary.json")
        for name, part in parts.items():
            check_part(folder / f"{name}.npy", part, about.get(name), len(vocabulary))
        sha256 = about.get("sha256")
        if not isinstance(sha256, str):
            raise ValueError(f"{file} has sha256={quoted(sha256)}, must be a string")
        return Tokens(parts["train"], parts["validation"], vocabulary, sha256)
    except (OSError, ValueError) as error:
        raise ValueError(f"text={str(folder)!r} is not a folder written by train.tokenize: {error}") from None


def check_part(file: Path, ids: np.ndarray, length: object, n_vocab: int) -> None:
    """Raise ValueError if an array does not hold as many ids as tokens.json says, or an id is not in the vocabulary."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{file} has {ids.dtype}{list(ids.shape)}, must be integers [n]")
    if len(ids) != length:
        raise ValueError(f"{file} has {len(ids)} tokens, tokens.json says {quoted(length)}")
    if n_vocab - 1 > np.iinfo(ids.dtype).max:
        raise ValueError(
            f"{file} has {ids.dtype}, which cannot hold ids up to {n_vocab - 1}, as its vocabulary has; tokenize the "
            "text again"
        )
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or high >= n_vocab:
        raise ValueError(f"{file} has ids from {low} to {high}, must be from 0 to {n_vocab - 1}")


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog=prog,
        description="Encode a text to a folder of tokens, which --text of the training scripts takes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("text", metavar="TEXT", help="python_docs, tiny_shakespeare, or a UTF-8 file; read whole")
    arguments.add_argument("out", type=Path, metavar="TOKENS", help="folder to create")
    arguments.add_argument(
        "--kind",
        choices=("chars", "bytes", "tokenizer"),
        default="chars",
        help="tokens: characters of the text, bytes of its UTF-8, or those of --tokenizer (default chars)",
    )
    arguments.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json of the tokenizers package; sets --kind tokenizer"
    )
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: tokenize(options.text, options.out, options.kind, options.tokenizer), prog)


def tokenize(text: str, out: Path, kind: str = "chars", tokenizer: Path | None = None) -> None:
    """Write a folder of tokens and print its sizes; raises ValueError for bad input."""
    if kind == "tokenizer" and tokenizer is None:
        raise ValueError("--kind tokenizer needs --tokenizer FILE")
    check_target(out, overwrite=False)  # before the work
    content = load_corpus(text)
    vocabulary: Vocabulary
    if tokenizer is not None:
        vocabulary = TokenizerFile.read(tokenizer)
    else:
        vocabulary = ByteVocabulary() if kind == "bytes" else CharVocabulary.of(content)
    tokens = write(out, content, vocabulary)
    print(
        f"{out}: {len(tokens.train):,} tokens to train on, {len(tokens.validation):,} to validate, "
        f"of {len(vocabulary):,} {vocabulary.unit}s"
    )
