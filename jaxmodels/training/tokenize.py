"""Text into tokens, once, for training to map into memory.

    python -m train.tokenize FILE TOKENS --kind bytes      # or chars, or --tokenizer tokenizer.json
    python -m train.rope --text TOKENS

TOKENS/tokens.json                {"format": 1, "train": …, "validation": …, "sha256": …}
TOKENS/vocabulary.json            characters, bytes or the whole tokenizer; `load_vocabulary` reads it
TOKENS/train.npy, validation.npy  ids [n], the first 90 % of the text and the rest, in the least unsigned integer
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from jaxmodels.io.atomic import atomic_folder, check_target
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
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text as ids [n], in memory or mapped, in its two parts; sha256 tells ids and vocabulary from all others."""

    train: np.ndarray
    validation: np.ndarray
    vocabulary: Vocabulary
    sha256: str


def open_tokens(text: str, vocabulary: Vocabulary | None = None) -> Tokens:
    """A corpus by name, a UTF-8 file (both in `vocabulary`, or as characters), or a folder that this program wrote.

    Raises ValueError where it is none of them.
    """
    if Path(text).is_dir():
        return read(Path(text))
    content = load_corpus(text)
    vocabulary = vocabulary or CharVocabulary.of(content)
    train, validation = map(vocabulary.encode, split(content))
    return Tokens(train, validation, vocabulary, fingerprint(train, validation, vocabulary))


def fingerprint(train: np.ndarray, validation: np.ndarray, vocabulary: Vocabulary) -> str:
    """SHA-256 of a text as ids, in whatever dtype, and of what they stand for."""
    about = [type(vocabulary).__name__, dataclasses.asdict(vocabulary)]
    found = hashlib.sha256(json.dumps(about).encode())
    for part in (train, validation):
        found.update(len(part).to_bytes(8, "little"))
        for first in range(0, len(part), 2**20):
            found.update(part[first : first + 2**20].astype("<i4").tobytes())
    return found.hexdigest()


def write(folder: Path, text: str, vocabulary: Vocabulary) -> Tokens:
    """Encodes a text and writes it to a new folder, all of it or nothing."""
    dtype = np.min_scalar_type(len(vocabulary) - 1)
    train, validation = (vocabulary.encode(part).astype(dtype) for part in split(text))
    sha256 = fingerprint(train, validation, vocabulary)
    about = {"format": FORMAT, "train": len(train), "validation": len(validation), "sha256": sha256}
    with atomic_folder(folder) as beside:
        np.save(beside / "train.npy", train)
        np.save(beside / "validation.npy", validation)
        vocabulary.save(beside / "vocabulary.json")
        (beside / "tokens.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return Tokens(train, validation, vocabulary, sha256)


def read(folder: Path) -> Tokens:
    """What `write` wrote, the ids mapped into memory; raises ValueError where it is not complete."""
    file = folder / "tokens.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, this version reads {FORMAT}")
        ids = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "validation")]
        if [len(part) for part in ids] != [about["train"], about["validation"]]:
            raise ValueError("its arrays have other lengths than it says")
        return Tokens(ids[0], ids[1], load_vocabulary(folder / "vocabulary.json"), about["sha256"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"text={str(folder)!r} is no folder that {PROGRAM} wrote: {error}") from None


@dataclasses.dataclass(frozen=True)
class Command:
    """Turns a text into a folder of tokens, which --text of the training scripts takes."""

    text: Annotated[str, tyro.conf.Positional]
    """python_docs, tiny_shakespeare, or a UTF-8 FILE; it is read and encoded in memory"""
    out: Annotated[Path, tyro.conf.Positional]
    """folder to make"""
    kind: Literal["chars", "bytes", "tokenizer"] = "chars"
    """what a token is: a character of the text, a byte of its UTF-8, or what --tokenizer says"""
    tokenizer: Path | None = None
    """a tokenizer.json of the tokenizers package; implies --kind tokenizer"""


def main(arguments: Sequence[str]) -> None:
    """Writes the folder and says what is in it; raises ValueError for bad input."""
    command = tyro.cli(Command, args=arguments, prog=PROGRAM)
    if command.kind == "tokenizer" and command.tokenizer is None:
        raise ValueError("--kind tokenizer needs --tokenizer FILE")
    check_target(command.out, overwrite=False)  # before the work
    text = load_corpus(command.text)
    vocabulary: Vocabulary
    if command.tokenizer is not None:
        vocabulary = TokenizerFile.read(command.tokenizer)
    else:
        vocabulary = ByteVocabulary() if command.kind == "bytes" else CharVocabulary.of(text)
    tokens = write(command.out, text, vocabulary)
    print(
        f"{command.out}: {len(tokens.train):,} tokens to train on, {len(tokens.validation):,} to validate, "
        f"of {len(vocabulary):,} {vocabulary.unit}s"
    )
