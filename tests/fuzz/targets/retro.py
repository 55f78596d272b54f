"""Chunk indexes of RETRO, with FAISS's files, and neighbors that were looked up."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.targets.kind import Target, commands

TEXT = "to be or not to be, that is the question: " * 5


def make_index(folder: Path, factory: str | None = None) -> None:
    """Build an index, continue one, or open a finished one."""
    from jaxmodels.retro.retrieval.corpus import Corpus
    from jaxmodels.retro.retrieval.embedders import HashedNGrams
    from jaxmodels.retro.retrieval.index import ChunkIndex
    from jaxmodels.text import CharVocabulary

    vocabulary = CharVocabulary.of(TEXT)
    corpus = Corpus.of(vocabulary.encode(TEXT), vocabulary)
    embedder = HashedNGrams(16, 1, 2)
    ChunkIndex.build(folder / "index", corpus, 5, embedder, factory=factory, progress=False)


def make_begun(folder: Path) -> None:
    """An index whose writer was killed before it had added a chunk."""
    make_index(folder)
    file = folder / "index" / "about.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added": 0, "index": None, "sha256": None}))


def read_index(folder: Path) -> Any:
    from jaxmodels.retro.retrieval.index import ChunkIndex

    index = ChunkIndex.load(folder / "index")
    chunk = np.zeros((1, index.chunk_len), np.int64)
    return index.corpus.passages(index.neighbors(chunk, 2), 3)


def seal(folder: Path) -> None:
    """Write the checksums of the changed files to about.json, so that its content is reached."""
    from jaxmodels.io.bounded import read_object, sha256_of
    from jaxmodels.io.formats.npy import map_array
    from jaxmodels.retro.retrieval.corpus import Corpus
    from jaxmodels.text import load_vocabulary

    file = folder / "index" / "about.json"
    about = read_object(file)
    faiss = folder / "index" / about["index"]
    if faiss.stat().st_size < 10**8 and faiss.is_file():
        about["sha256"] = sha256_of(faiss)
        file.write_text(json.dumps(about))
    tokens, documents = (map_array(folder / "index" / f"{name}.npy") for name in ("tokens", "documents"))
    if tokens.size < 10**6 and documents.size < 10**6:
        corpus = Corpus(tokens, load_vocabulary(folder / "index" / "vocabulary.json"), np.asarray(documents))
        about["fingerprint"] = corpus.fingerprint(about["chunk_len"], about["embedder"])
        file.write_text(json.dumps(about))


def make_neighbors(folder: Path) -> None:
    np.savez(folder / "train.npz", fingerprint="abc", neighbors=np.zeros((3, 2, 5), np.int32))


def read_neighbors(folder: Path) -> Any:
    from jaxmodels.retro.retrieval.examples import read

    return read(folder / "train.npz", "abc", (3, 2, 5))


def show(folder: Path) -> list[int]:
    return commands(["neighbors", str(folder / "index"), "--prompt", "to be, or that"])(folder)


TARGETS = (
    Target("chunk index", make_index, read_index, seal=seal),
    Target("chunk index's JSON", make_index, read_index, "*.json", seal=seal),
    Target("chunk index's arrays", make_index, read_index, "*.npy", seal=seal),
    Target("chunk index, built again", make_index, make_index, seal=seal, changes=True),
    Target("chunk index, begun", make_begun, make_index, "*.json", changes=True),
    Target("FAISS, flat", make_index, read_index, "*.faiss", seal=seal),
    Target("FAISS, IVF", lambda folder: make_index(folder, "IVF2,Flat"), read_index, "*.faiss", seal=seal),
    Target("FAISS, HNSW", lambda folder: make_index(folder, "HNSW4,Flat"), read_index, "*.faiss", seal=seal),
    Target("FAISS, PQ", lambda folder: make_index(folder, "PCA4,SQ8"), read_index, "*.faiss", seal=seal),
    Target("neighbors shown", make_index, show, seal=seal),
    Target("neighbors kept", make_neighbors, read_neighbors),
)
