"""Files of a chunk index, checked when they are read.

FOLDER/about.json              {"format": 2, "fingerprint": …, "chunks": …, "added": …, "index": …, "sha256": …, …}
FOLDER/tokens.npy              ids [T];  documents.npy: start of each document, and T
FOLDER/vocabulary.json         `jaxmodels.text.load_vocabulary` reads it
FOLDER/index-0000062500.faiss  FAISS's own file, after that many chunks

FAISS checks little of what it reads: a damaged file may end the process. "sha256" binds its file to about.json, and is
compared before FAISS sees the file.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import read_object, sha256_of
from jaxmodels.io.npy import map_array
from jaxmodels.process.texts import quoted
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.text import load_vocabulary

FORMAT = 2
NAME = re.compile(r"index-\d{10}\.faiss")  # so that a folder can name no file outside of it, and none of others
# Most bytes of FAISS's file: of its tables, and for each chunk and each of its vector's values.
HEADER_BYTES, CHUNK_BYTES, VALUE_BYTES = 2**28, 2**14, 16
TEXTS, NUMBERS = ("fingerprint", "embedder", "factory"), ("chunk_len", "chunks", "added")


def read_about(folder: Path) -> dict[str, Any]:
    """Content of about.json; raises ValueError if the folder holds no index, or a field is not what `build` writes."""
    file = folder / "about.json"
    try:
        about = read_object(file)
        if about["format"] != FORMAT:
            raise ValueError(f"format {quoted(about['format'])}, this version reads {FORMAT}; build it again")
        found = {name: about[name] for name in (*TEXTS, *NUMBERS, "index", "sha256")}
        for name in TEXTS:
            if not isinstance(found[name], str):
                raise ValueError(f"{name}={quoted(found[name])} must be a string")
        for name in NUMBERS:
            least = name == "chunk_len"
            if not isinstance(found[name], int) or isinstance(found[name], bool) or found[name] < least:
                raise ValueError(f"{name}={quoted(found[name])} must be an integer of at least {least:d}")
        if found["added"] > found["chunks"]:
            raise ValueError(f"added={found['added']} must be at most chunks={found['chunks']}")
        if found["added"] and not (isinstance(found["index"], str) and NAME.fullmatch(found["index"])):
            raise ValueError(f"index={quoted(found['index'])} must be named index-NNNNNNNNNN.faiss")
        return {"format": FORMAT} | found
    except KeyError as error:
        raise ValueError(f"{folder} holds no chunk index: {file.name} has no {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder} holds no chunk index: {error}") from None


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write about.json, atomically."""
    with atomic_file(folder / "about.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def check_same(folder: Path, about: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError, with both values, if an index was built with other settings or another corpus than wanted."""
    differing = [name for name in wanted if name != "fingerprint" and wanted[name] != about[name]]
    if differing:
        was, now = (", ".join(f"{name}={values[name]}" for name in differing) for values in (about, wanted))
        raise ValueError(
            f"{folder} is stale: its index was built with {was}, not {now}; delete it or choose another folder"
        )
    if wanted["fingerprint"] != about["fingerprint"]:
        raise ValueError(f"{folder} is stale: its index is of another corpus; delete it or choose another folder")


def read_corpus(folder: Path) -> Corpus:
    """Corpus of an index, with memory-mapped tokens; raises ValueError if it is incomplete or has unknown tokens."""
    try:
        tokens, documents = (map_array(folder / f"{name}.npy") for name in ("tokens", "documents"))
        vocabulary = load_vocabulary(folder / "vocabulary.json")
        corpus = Corpus(tokens, vocabulary, np.asarray(documents))
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= len(vocabulary):
            raise ValueError(f"tokens from {low} to {high} must be from 0 to {len(vocabulary) - 1}")
        return corpus
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no corpus of a chunk index: {error}") from None


def read_searcher(folder: Path, about: dict[str, Any], width: int) -> Any:
    """FAISS index of a folder, of vectors of a width; raises ValueError if it is damaged or contradicts about.json."""
    faiss, file = import_faiss(), folder / str(about["index"])
    most = HEADER_BYTES + about["added"] * (CHUNK_BYTES + VALUE_BYTES * width)
    try:
        if sha256_of(file, most) != about["sha256"]:
            raise ValueError(f"{file} has another sha256 than about.json: it is damaged or of another index")
        with lengths_limited(faiss, file.stat().st_size):
            searcher = faiss.read_index(str(file))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{file} cannot be read: {reason(error)}") from None
    if (searcher.ntotal, searcher.d) != (about["added"], width):
        raise ValueError(
            f"{file} has {searcher.ntotal} chunks of width {searcher.d}, about.json {about['added']} of width {width}"
        )
    return searcher


@contextlib.contextmanager
def lengths_limited(faiss: Any, size: int) -> Iterator[None]:
    """Context in which FAISS refuses lengths that a file of `size` bytes cannot hold, before it allocates memory."""
    limits = ("vector_byte_limit", "loop_limit")
    before = {name: getattr(faiss, f"get_deserialization_{name}")() for name in limits}
    for name in limits:
        getattr(faiss, f"set_deserialization_{name}")(size)
    try:
        yield
    finally:
        for name, value in before.items():
            getattr(faiss, f"set_deserialization_{name}")(value)


def import_faiss() -> Any:
    """Module faiss; raises ValueError, naming the extra, if it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise ValueError("a chunk index needs FAISS: pip install 'jaxmodels[retro]'") from None
    return faiss


def reason(error: Exception) -> str:
    """FAISS's message without the C++ expression."""
    return str(error).strip().splitlines()[0].rpartition(": ")[2] or "no reason given"
