"""Chunk index: search for the chunks of a corpus that are nearest to a chunk.

The documents of a corpus are cut into chunks of L = chunk_len tokens. Chunks are compared by embeddings of their texts;
a neighbor consists of a chunk's L tokens and the L that follow, its continuation (arXiv 2112.04426, section 2.2). FAISS
does the search: exact for small corpora, inverted lists of product-quantized vectors (IVF-PQ) for larger ones.

An interrupted build continues after the last batch that was saved. One process at a time builds in a folder.
`jaxmodels.retro.retrieval.files` describes the folder.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import errors_naming, exclusive, sha256_of
from jaxmodels.process.texts import quoted
from jaxmodels.retro.retrieval.corpus import Corpus, Refuse
from jaxmodels.retro.retrieval.embedders import Embedder, HashedNGrams, embedder_of
from jaxmodels.retro.retrieval.factory import default_factory, make_searcher
from jaxmodels.retro.retrieval.files import (
    FORMAT,
    LOCK,
    begun,
    check_same,
    read_about,
    read_corpus,
    read_searcher,
    reason,
    remove_superseded,
    search,
    write_about,
    write_corpus,
    write_searcher,
)
from jaxmodels.retro.retrieval.parts import rotated

BATCH = 4096  # chunks that are embedded and added, or searched for, at a time
SAVE_EVERY = 64  # batches
TRAIN_PER_CELL = 64  # vectors for k-means per cell of an IVF index


class ChunkIndex:
    """Corpus with an index of its chunks; `build` makes one in a folder, `load` opens it.

    n_probe: number of cells of an IVF index that a query searches.
    """

    def __init__(self, corpus: Corpus, chunk_len: int, embedder: Embedder, searcher: Any, about: dict[str, Any]):
        self.corpus, self.chunk_len, self.embedder = corpus, chunk_len, embedder
        self.searcher, self.about = searcher, about
        self.starts = corpus.chunks(chunk_len)
        self.n_probe = 8

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of everything that neighbors depend on: corpus, chunk_len, embedder and FAISS's index."""
        return f"{self.about['fingerprint']}:{self.about['factory']}"

    @staticmethod
    def fingerprint_of(corpus: Corpus, chunk_len: int, embedder: Embedder, factory: str | None = None) -> str:
        """Fingerprint of the index that `build` makes of these."""
        factory = factory or default_factory(len(corpus.chunks(chunk_len)), embedder.width)
        return f"{corpus.fingerprint(chunk_len, embedder.name)}:{factory}"

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike,
        corpus: Corpus,
        chunk_len: int = 16,
        embedder: Embedder | None = None,
        *,
        factory: str | None = None,
        progress: bool = True,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> "ChunkIndex":
        """Build the index in a folder, continue an interrupted build, or open a finished one.

        embedder: default HashedNGrams. factory: FAISS's factory string; default `default_factory`. progress: show a
        progress bar. interrupted: checked between batches; if it returns True, the chunks added so far are saved and
        KeyboardInterrupt is raised. Raises ValueError if the corpus is shorter than a chunk, if the folder holds
        another index or other files, if another process builds in it, or if FAISS refuses the factory.
        """
        folder, embedder = Path(folder), embedder or HashedNGrams()
        starts = corpus.chunks(chunk_len)
        fingerprint = corpus.fingerprint(chunk_len, embedder.name)
        factory = factory or default_factory(len(starts), embedder.width)
        wanted = {"fingerprint": fingerprint, "chunk_len": chunk_len, "embedder": embedder.name, "factory": factory}
        wanted["chunks"] = len(starts)
        about = begun(folder, wanted)
        searcher = make_searcher(factory, embedder.width)  # raises if FAISS refuses it, before anything is written
        if about is not None and about["added"] == len(starts):  # perhaps in a folder that cannot be written
            remove_superseded(folder, about)
            return cls(corpus, chunk_len, embedder, read_searcher(folder, about, searcher), about)
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / LOCK):
            about = begun(folder, wanted)  # another process may have gone on with it
            if about is None:
                about = {"format": FORMAT, **wanted, "added": 0, "index": None, "sha256": None}
                write_about(folder, about)
            remove_superseded(folder, about)
            if about["added"]:
                searcher = read_searcher(folder, about, searcher)
            else:
                write_corpus(folder, corpus)
                train(searcher, corpus, starts, chunk_len, embedder, factory)
            index = cls(corpus, chunk_len, embedder, searcher, about)
            index.complete(folder, progress, interrupted)
        return index

    def complete(self, folder: Path, progress: bool, interrupted: Callable[[], bool]) -> None:
        """Add the chunks that are missing, and save them; see `build`."""
        batches = range(self.about["added"], len(self.starts), BATCH)
        for number, first in enumerate(shown(batches, "indexing", progress), start=1):
            passages = self.corpus.passages(self.starts[first : first + BATCH], self.chunk_len)
            vectors = self.embed(passages)
            try:
                self.searcher.add(vectors)
            except (RuntimeError, MemoryError) as error:
                factory = quoted(self.about["factory"])
                raise ValueError(f"factory={factory} cannot add {len(vectors)} chunks: {reason(error)}") from None
            ended = interrupted()
            if ended or number % SAVE_EVERY == 0 or number == len(batches):
                self.save(folder)
            if ended:
                raise KeyboardInterrupt

    def save(self, folder: Path) -> None:
        """Save the chunks added so far, atomically."""
        added = self.searcher.ntotal
        name = f"index-{added:010}.faiss"
        with atomic_file(folder / name) as temporary:
            write_searcher(self.searcher, temporary)
        self.about |= {"added": added, "index": name, "sha256": sha256_of(folder / name)}
        write_about(folder, self.about)
        remove_superseded(folder, self.about)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        corpus: Corpus | None = None,
        chunk_len: int | None = None,
        embedder: Embedder | None = None,
    ) -> "ChunkIndex":
        """Open the finished index in a folder.

        embedder: required unless the index was built with hashed n-grams: others read a model that the folder names,
        from a network or from anywhere on the disk. Raises ValueError if there is no index, if its files do not fit its
        fingerprint, or if a given corpus, chunk_len or embedder is not the one it was built with.
        """
        folder = Path(folder)
        about = read_about(folder)
        own = read_corpus(folder)
        if own.fingerprint(about["chunk_len"], about["embedder"]) != about["fingerprint"]:
            raise ValueError(f"{folder} is stale: its tokens or vocabulary are not those of its index")
        wanted: dict[str, Any] = {"chunk_len": chunk_len or about["chunk_len"]}
        wanted["embedder"] = about["embedder"] if embedder is None else embedder.name
        wanted["fingerprint"] = (corpus or own).fingerprint(wanted["chunk_len"], wanted["embedder"])
        check_same(folder, about, wanted)
        if about["added"] < about["chunks"]:
            raise ValueError(f"{folder} has {about['added']} of {about['chunks']} chunks; build it again to continue")
        if embedder is None:
            with errors_naming(folder):
                embedder = embedder_of(about["embedder"])
            if not isinstance(embedder, HashedNGrams):
                raise ValueError(
                    f"{folder} was built with the embedder {embedder.name}, which loads a model by that name; if you "
                    "trust it, name it yourself: embedder=embedder_of(NAME), on command lines --embedder NAME"
                )
        with errors_naming(folder):
            chunks = len(own.chunks(about["chunk_len"]))
            if chunks != about["chunks"]:
                raise ValueError(f"about.json has {about['chunks']:,} chunks, the corpus {chunks:,}")
            searcher = read_searcher(folder, about, make_searcher(about["factory"], embedder.width))
            return cls(own, about["chunk_len"], embedder, searcher, about)

    def embed(self, chunks: np.ndarray) -> np.ndarray:
        """Embed chunks of ids [n, L] to float32 [n, width]."""
        return np.ascontiguousarray(self.embedder.embed([self.corpus.vocabulary.decode(c) for c in chunks]), np.float32)

    def check_k(self, k: int, name: str, where: str | os.PathLike) -> None:
        """Raise ValueError with the argument's name and the index's folder, unless k is from 1 to its chunks."""
        if not 1 <= k <= len(self):
            raise ValueError(f"{name}={quoted(k)} must be from 1 to the {len(self):,} chunks of {where}")

    def neighbors(
        self,
        chunks: np.ndarray,
        k: int = 2,
        *,
        own: np.ndarray | None = None,
        refuse: Refuse | None = None,
        progress: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """Starts of the k nearest passages, nearest first: chunks int [n, L] -> int64 [n, k].

        own: int [n, 2], the span of the corpus that each chunk belongs to; passages of 2·L tokens that overlap it are
        not returned. refuse: function of rows of `chunks` [r] and candidate starts [r, f] to bool [r, f], the
        candidates not to return. More candidates are fetched until k are left. If the corpus has fewer, the nearest is
        repeated; a single one, repeated, has the same effect on the model. If it has none, they are -1. interrupted:
        checked before each batch; if it returns True, KeyboardInterrupt is raised. Raises ValueError if chunks have
        another length or k < 1.
        """
        chunks = np.asarray(chunks)
        if chunks.ndim != 2 or chunks.shape[1] != self.chunk_len or k < 1:
            raise ValueError(
                f"chunks {list(chunks.shape)} must be [n, chunk_len={self.chunk_len}], and k={k} at least 1"
            )
        found = np.full((len(chunks), k), -1, np.int64)
        for first in shown(range(0, len(chunks), BATCH), "looking up", progress):
            if interrupted():
                raise KeyboardInterrupt
            rows = np.arange(first, min(first + BATCH, len(chunks)))
            self.look_up(found, chunks, rows, own, refuse)
        return np.where(found < 0, found[:, :1], found)

    def look_up(
        self, found: np.ndarray, chunks: np.ndarray, rows: np.ndarray, own: np.ndarray | None, refuse: Refuse | None
    ) -> None:
        """Fill some rows of `found`."""
        k = found.shape[1]
        vectors = self.embed(chunks[rows])
        set_n_probe(self.searcher, self.n_probe)
        fetch = min(4 * k + 8, len(self))
        while True:
            with errors_naming(self.about["index"]):
                places = search(self.searcher, vectors, fetch)
            low, high = places.min(initial=-1), places.max(initial=-1)
            if low < -1 or high >= len(self):
                raise ValueError(f"the index names chunks {low} to {high} of {len(self)}: it is of another corpus")
            starts = np.where(places < 0, -1, self.starts[places])  # FAISS returns -1 for none
            good = starts >= 0
            if own is not None:
                good &= (starts + 2 * self.chunk_len <= own[rows, :1]) | (starts >= own[rows, 1:])
            if refuse is not None:
                good &= ~refuse(rows, starts)
            rank = good.cumsum(axis=1)  # [r, f], from 1
            row, column = np.nonzero(good & (rank <= k))
            found[rows[row], rank[row, column] - 1] = starts[row, column]
            short = rank[:, -1] < k
            if fetch == len(self) or not short.any():
                return
            rows, vectors, fetch = rows[short], vectors[short], min(4 * fetch, len(self))


def train(searcher: Any, corpus: Corpus, starts: np.ndarray, chunk_len: int, embedder: Embedder, factory: str) -> None:
    """Train an index that needs k-means on a sample of the chunks; raises ValueError if they are too few."""
    if searcher.is_trained:
        return
    cells = getattr(searcher, "nlist", 256)
    n = min(len(starts), TRAIN_PER_CELL * max(cells, 256))
    if n < (least := rotated(searcher)):
        raise ValueError(f"factory={factory!r} rotates to {least:,} features, for which {n:,} chunks are too few")
    sample = np.sort(np.random.default_rng(0).choice(starts, n, replace=False))
    texts = [corpus.vocabulary.decode(chunk) for chunk in corpus.passages(sample, chunk_len)]
    try:
        searcher.train(np.ascontiguousarray(embedder.embed(texts), np.float32))
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"factory={factory!r} cannot be trained on {n} chunks: {reason(error)}") from None


def set_n_probe(searcher: Any, n_probe: int) -> None:
    """Set the number of cells to search, if the index has cells."""
    if hasattr(searcher, "nprobe"):
        searcher.nprobe = n_probe


def shown(batches: Iterable[int], what: str, progress: bool) -> Iterator[int]:
    """Iterate over batches with a progress bar, if standard error is a terminal and `rich` is installed."""
    if not progress or not sys.stderr.isatty():
        return iter(batches)
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return iter(batches)
    return iter(track(batches, description=what, transient=True, console=Console(stderr=True)))
