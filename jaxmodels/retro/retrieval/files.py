"""Files of a chunk index, checked when they are read.

FOLDER/about.json              {"format": 2, "fingerprint": …, "chunks": …, "added": …, "index": …, "sha256": …, …}
FOLDER/tokens.npy              ids [T];  documents.npy: start of each document, and T
FOLDER/vocabulary.json         `jaxmodels.text.load_vocabulary` reads it
FOLDER/index-0000062500.faiss  FAISS's own file, after that many chunks
FOLDER/.lock                   locked while the index is built

FAISS may allocate any amount of memory for a damaged file. "sha256" binds its file to about.json, and is compared
before FAISS sees the file. Whoever wrote both may have written anything: what FAISS may allocate is limited, it opens
no other file, and what it has read is checked. Symbolic links in the folder are refused.
"""

import contextlib
import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io import manifest
from jaxmodels.io.atomic import TEMPORARY_FILE, atomic_file
from jaxmodels.io.bounded import check_format, errors_naming, open_regular, read_object, sha256_of
from jaxmodels.io.content import is_written_here
from jaxmodels.io.formats.npy import map_array
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.retro.retrieval.parts import check_finite, fit_to
from jaxmodels.text import load_vocabulary

FORMAT = 2
LOCK = ".lock"
NAME = re.compile(r"index-[0-9]{10}\.faiss")  # so that a folder can name no file outside of it, and none of others
OWN = re.compile(rf"(tokens|documents)\.npy|vocabulary\.json|(training|validation_[a-z]+)\.npz|{NAME.pattern}")
# Most bytes of FAISS's file: of its tables, and for each chunk and each of its vector's values.
HEADER_BYTES, CHUNK_BYTES, VALUE_BYTES = 2**28, 2**14, 16
LEAST_LIMIT = 2**26  # bytes that FAISS may allocate for a small file: tables that it computes
LONGEST_TEXT = 2**13  # characters in about.json; an embedder's name may be a path, which has up to 4,096 bytes
TEXTS, NUMBERS = ("fingerprint", "embedder", "factory"), ("chunk_len", "chunks", "added")


def read_about(folder: Path) -> dict[str, Any]:
    """Content of about.json; raises ValueError if the folder holds no index, or a field is not what `build` writes."""
    file = folder / "about.json"
    try:
        manifest.refuse_links(folder)
        about = read_object(file)
        check_format(file.name, about["format"], FORMAT, "; build it again")
        found = {name: about[name] for name in (*TEXTS, *NUMBERS, "index", "sha256")}
        for name in TEXTS:
            if not isinstance(found[name], str) or len(found[name]) > LONGEST_TEXT:
                raise ValueError(f"{name}={quoted(found[name])} must be text of at most {LONGEST_TEXT:,} characters")
        for name in NUMBERS:
            least = name == "chunk_len"
            if not isinstance(found[name], int) or isinstance(found[name], bool) or found[name] < least:
                raise ValueError(f"{name}={quoted(found[name])} must be an integer of at least {least:d}")
        if found["added"] > found["chunks"]:
            raise ValueError(f"added={found['added']} must be at most chunks={found['chunks']}")
        name = found["index"]
        if not (isinstance(name, str) and NAME.fullmatch(name)) and (name is not None or found["added"]):
            raise ValueError(f"index={quoted(name)} must be named index-NNNNNNNNNN.faiss")
        return {"format": FORMAT} | found
    except KeyError as error:
        raise ValueError(f"{folder} holds no chunk index: {file.name} has no {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder} holds no chunk index: {error}") from None


def is_empty(folder: Path) -> bool:
    """True if a folder is missing, or holds nothing but a lock and what a killed build left under a temporary name."""
    manifest.refuse_links(folder)
    return not folder.exists() or all(path.name == LOCK or is_temporary(path) for path in folder.iterdir())


def is_temporary(path: Path) -> bool:
    """True for a file that a killed build left under a temporary name."""
    return TEMPORARY_FILE.fullmatch(path.name) is not None and path.is_file()


def check_own(folder: Path) -> None:
    """Raises ValueError if a file that `build` or `attach` replaces begins as none that this program writes."""
    for path in folder.iterdir():
        if OWN.fullmatch(path.name) and not is_written_here(folder, path.name):
            raise ValueError(f"{path} was not written by this program: move it, or choose another folder for the index")


def remove_superseded(folder: Path, about: dict[str, Any]) -> None:
    """Remove FAISS's files that a killed build had replaced: named as such, and not the one that about.json names."""
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) and path.name != about["index"]:
            path.unlink()


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write about.json, atomically."""
    with atomic_file(folder / "about.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def begun(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Content of about.json of an index that a build continues; None if there is none.

    One to which nothing was added, as when FAISS cannot train on the corpus, may go on with another factory. Raises
    ValueError if the index is another than wanted, or if the folder holds files of others.
    """
    if not (folder / "about.json").exists():
        if not is_empty(folder):
            raise ValueError(f"{folder} is not empty and holds no chunk index; choose another folder")
        return None
    about = read_about(folder)
    if not about["added"]:
        about["factory"] = wanted["factory"]
    check_same(folder, about, wanted)
    check_own(folder)
    return about


def check_same(folder: Path, about: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError, with both values, if an index was built with other settings or another corpus than wanted."""
    differing = [name for name in wanted if name != "fingerprint" and wanted[name] != about[name]]
    if differing:
        was, now = (", ".join(f"{n}={shortened(str(values[n]), 200)}" for n in differing) for values in (about, wanted))
        raise ValueError(
            f"{folder} is stale: its index was built with {was}, not {now}; ask for the same, delete it, or choose "
            "another folder"
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


def write_corpus(folder: Path, corpus: Corpus) -> None:
    """Write what `read_corpus` reads."""
    for name, array in (("tokens", corpus.tokens), ("documents", corpus.documents)):
        with atomic_file(folder / f"{name}.npy") as temporary, open(temporary, "wb") as opened:
            np.save(opened, array)
    corpus.vocabulary.save(folder / "vocabulary.json")


def read_searcher(folder: Path, about: dict[str, Any], empty: Any) -> Any:
    """FAISS index of a folder. empty: one without vectors, of its factory string.

    Raises ValueError if it is damaged, contradicts about.json, or has other parts than the empty one.
    """
    faiss, file, width = import_faiss(), folder / str(about["index"]), empty.d
    most = HEADER_BYTES + about["added"] * (CHUNK_BYTES + VALUE_BYTES * width)
    try:
        if sha256_of(file, most) != about["sha256"]:
            raise ValueError(f"{file} has another sha256 than about.json: it is damaged or of another index")
        with lengths_limited(faiss, file.stat().st_size), open_regular(file) as opened:
            # Inverted lists may lie in another file, of any name, which FAISS would open for writing. A flag has it
            # look beside the file that it reads, which is none that it knows, and so refuse them. The other has it skip
            # the table of 4^bits distances between codes that a graph of another metric has.
            flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_PQ_SKIP_SDC_TABLE
            searcher = faiss.read_index(faiss.PyCallbackIOReader(opened.read), flags)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except (RuntimeError, MemoryError) as error:
        elsewhere = "IO_FLAG_ONDISK_SAME_DIR" in str(error)
        why = "its inverted lists lie in another file" if elsewhere else reason(error)
        raise ValueError(f"{file} cannot be read: {why}") from None
    if (searcher.ntotal, searcher.d) != (about["added"], width):
        raise ValueError(
            f"{file} has {searcher.ntotal} chunks of width {searcher.d}, about.json {about['added']} of width {width}"
        )
    if searcher.metric_type != faiss.METRIC_INNER_PRODUCT or not searcher.is_trained:
        raise ValueError(f"{file} has metric {searcher.metric_type} and is_trained={searcher.is_trained}")
    with errors_naming(file):
        fit_to(searcher, empty)
        check_finite(searcher)
    ids = stored_ids(searcher)
    if ids is not None and not np.array_equal(np.sort(ids), np.arange(about["added"])):
        raise ValueError(f"{file} does not hold each chunk from 0 to {about['added'] - 1} once")
    with errors_naming(file):
        # Generation searches where an error is hard to read. A search in an IVF index may look in empty lists alone.
        found = search(searcher, np.ones((1, width), np.float32), 1)
        if about["added"] and (found < 0).all() and "IVF" not in str(about["factory"]):
            raise ValueError("a search in it finds none of its chunks")
    return searcher


def search(searcher: Any, vectors: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k nearest chunks [n, k], -1 for none; raises ValueError if FAISS fails."""
    try:
        return np.asarray(searcher.search(vectors, k)[1])
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"it cannot be searched: {reason(error)}") from None


@contextlib.contextmanager
def lengths_limited(faiss: Any, size: int) -> Iterator[None]:
    """Context in which FAISS refuses lengths far beyond the `size` bytes of a file, before it allocates memory."""
    limits = {"vector_byte_limit": max(LEAST_LIMIT, size), "loop_limit": size}
    before = {name: getattr(faiss, f"get_deserialization_{name}")() for name in limits}
    for name, limit in limits.items():
        getattr(faiss, f"set_deserialization_{name}")(limit)
    try:
        yield
    finally:
        for name, value in before.items():
            getattr(faiss, f"set_deserialization_{name}")(value)


def stored_ids(searcher: Any) -> np.ndarray | None:
    """Numbers of the chunks as an index stores them, int64 [n]; None if they are the order in which they were added."""
    faiss = import_faiss()
    searcher = faiss.downcast_index(searcher)
    if isinstance(searcher, faiss.IndexPreTransform):
        return stored_ids(searcher.index)
    if not isinstance(searcher, faiss.IndexIVF):
        return None

    def lists() -> Iterator[np.ndarray]:
        inverted = searcher.invlists
        for number in range(inverted.nlist):
            if size := inverted.list_size(number):
                yield faiss.rev_swig_ptr(inverted.get_ids(number), size)

    return np.concatenate([np.empty(0, np.int64), *lists()])


def write_searcher(searcher: Any, file: Path) -> None:
    """Write FAISS's index to a file; raises OSError, as of a full disk, which FAISS's own writer does not see."""
    faiss = import_faiss()
    with open(file, "wb") as opened:
        try:
            faiss.write_index(searcher, faiss.PyCallbackIOWriter(opened.write))
        except RuntimeError as error:
            raise OSError(errno.EIO, reason(error), str(file)) from None


def import_faiss() -> Any:
    """Module faiss; raises ValueError, naming the extra, if it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise ValueError("a chunk index needs FAISS: pip install 'jaxmodels[retro]'") from None
    return faiss


def reason(error: Exception) -> str:
    """FAISS's message without the C++ expression."""
    if "read error in" in str(error):  # followed by the number of items read, and an errno of another call
        return "it ends too early: it is truncated or damaged"
    return str(error).strip().partition("\n")[0].rpartition(": ")[2] or "no reason given"
