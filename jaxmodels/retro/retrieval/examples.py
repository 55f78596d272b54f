"""Training examples with neighbors, which are looked up once and cached in a file.

RUN/index/             the chunk index of the training text; see `jaxmodels.retro.retrieval`
RUN/index/NAME.npz     neighbors of a set of examples: fingerprint, and their positions, neighbors int32 [n, C, k]

Axes: n examples of S tokens, C = S // L chunks of L = chunk_len tokens, k neighbors of M = 2·L tokens.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import open_regular
from jaxmodels.process.distributed import agree, is_first
from jaxmodels.retro.retrieval.corpus import Corpus, sharing
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.training.data import Example, Windows

Made = TypeVar("Made")
Kind = Literal["nearest", "filtered", "random"]
HEADER = 1024  # bytes of a .npy header, and of the fingerprint
SKIPPED = 8  # before each example, 0 to 7 tokens are skipped, so that its chunks are not those of the index


@dataclasses.dataclass(frozen=True)
class Samples(Sequence[Example]):
    """Windows of a text and the neighbors of their chunks: {"tokens": [S + 1], "ret": [C, k, M]}.

    starts: int [n], positions in the text; neighbors: int [n, C, k], positions in the corpus, or None for examples
    without "ret". Raises ValueError if a neighbor is outside the corpus.
    """

    windows: Windows
    starts: np.ndarray
    neighbors: np.ndarray | None = None
    corpus: Corpus | None = None
    length: int = 0  # M

    def __post_init__(self) -> None:
        if self.neighbors is not None and self.corpus is not None:
            self.corpus.passages(np.array([self.neighbors.min(), self.neighbors.max()]), 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: Any) -> Any:
        example = self.windows.at(int(self.starts[i]))
        if self.neighbors is None or self.corpus is None:
            return example
        return {**example, "ret": self.corpus.passages(self.neighbors[i], self.length)}


def start_positions(n: int, seq_len: int, passes: int, seed: int) -> np.ndarray:
    """Start of each example in n tokens, int64: consecutive, 0 to 7 tokens skipped before each, `passes` times."""
    rng, starts = np.random.default_rng([seed, 4]), []
    for _ in range(passes):
        start = min(int(rng.integers(SKIPPED)), max(0, n - seq_len - 1))
        while start + seq_len < n:
            starts.append(start)
            start += seq_len + int(rng.integers(SKIPPED))
    return np.array(starts, np.int64)


def samples_of(windows: Windows) -> Samples:
    """Convert windows to samples, to which neighbors can be attached."""
    return Samples(windows, np.arange(len(windows)) * windows.seq_len)


def index_checksum(sha256: str, fingerprint: str) -> str:
    """SHA-256 of a text with its index, from that of the text and the index's fingerprint."""
    return hashlib.sha256(f"{sha256}|{fingerprint}".encode()).hexdigest()


def make_once(make: Callable[[], Made]) -> Made:
    """Call make() in the first process, which writes files, then in the others, which read them. All must call this.

    Raises KeyboardInterrupt in all processes if make() raised it in the first.
    """
    made = None
    if is_first():
        with contextlib.suppress(KeyboardInterrupt):
            made = make()
    if agree(is_first() and made is None):
        raise KeyboardInterrupt
    return make() if made is None else made


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Neighbors to look up for each chunk: the k nearest, the k nearest that pass a filter, or k random ones.

    own: the samples are from the index's corpus; exclude neighbors that overlap their own sample. run: of kind
    "filtered", exclude neighbors that share this many consecutive tokens with the chunk or the next one, which they
    help to predict. seed: of kind "random".
    """

    k: int
    kind: Kind = "nearest"
    own: bool = False
    run: int = 0
    seed: int = 0


def attach(
    samples: Samples,
    index: ChunkIndex,
    lookup: Lookup,
    file: Path,
    interrupted: Callable[[], bool] = lambda: False,
    *,
    save: bool = True,
    most_bytes: int | None = None,
) -> Samples:
    """Attach neighbors to samples, from the file if its fingerprint fits; otherwise look them up and save them there.

    The first process looks them up; each of them, unless they are to be saved. Raises KeyboardInterrupt without writing
    if interrupted() during the lookup, and ValueError before it if they take more than most_bytes.
    """
    parts = (samples.starts.astype("<i8").tobytes(), np.asarray(samples.windows.ids).astype("<i4").tobytes())
    searched = "|".join(map(str, dataclasses.astuple(lookup)))
    about = f"{index.fingerprint}|{index.n_probe}|{samples.windows.seq_len}|{searched}"
    fingerprint = hashlib.sha256(b"|".join([about.encode(), *parts])).hexdigest()

    shape = (len(samples), samples.windows.seq_len // index.chunk_len, lookup.k)

    def kept() -> np.ndarray:
        neighbors = read(file, fingerprint, shape)
        if neighbors is None or not np.isin(neighbors, np.append(index.starts, -1)).all():  # damaged
            check_size(shape, most_bytes)
            neighbors = look_up(samples, index, lookup, interrupted).astype(np.int32)
            if save:
                with atomic_file(file) as new, open(new, "wb") as opened:
                    np.savez(opened, fingerprint=fingerprint, neighbors=neighbors)
        return neighbors

    return dataclasses.replace(samples, neighbors=make_once(kept), corpus=index.corpus, length=2 * index.chunk_len)


def check_size(shape: tuple[int, int, int], most_bytes: int | None) -> None:
    """Raise ValueError if neighbors of a shape [n, C, k] take more than most_bytes while they are looked up."""
    size = math.prod(shape) * np.dtype(np.int64).itemsize
    if most_bytes is not None and size > most_bytes:
        raise ValueError(
            f"neighbors={shape[2]:,} of {shape[0] * shape[1]:,} chunks take {size:,} bytes, must be at most "
            f"{most_bytes:,} in a run whose files alone name them; if you trust it, name them yourself: --neighbors "
            f"{shape[2]}"
        )


def look_up(
    samples: Samples, index: ChunkIndex, lookup: Lookup, interrupted: Callable[[], bool] = lambda: False
) -> np.ndarray:
    """Look up the neighbors [n, C, k] of all chunks of all samples."""
    ids, seq_len = samples.windows.ids, samples.windows.seq_len
    n, c, length = len(samples), seq_len // index.chunk_len, index.chunk_len
    if lookup.kind == "random":
        return np.random.default_rng([lookup.seed, 5]).choice(index.starts, (n, c, lookup.k))
    places = samples.starts[:, None] + length * np.arange(c)  # [n, C]
    chunks = ids[places[..., None] + np.arange(length)].reshape(n * c, length)
    own = refuse = None
    if lookup.own:
        spans = np.stack([samples.starts, samples.starts + seq_len + 1], axis=1)  # [n, 2]
        own = np.repeat(spans, c, axis=0)  # [n·C, 2]
    if lookup.kind == "filtered":
        around = places.reshape(-1, 1) + np.arange(2 * length)  # [n·C, 2·L]
        known = around < len(ids)
        texts = np.where(known, ids[np.where(known, around, 0)].astype(np.int64), -1)
        refuse = sharing(index.corpus, texts, lookup.run, 2 * length)
    found = index.neighbors(chunks, lookup.k, own=own, refuse=refuse, progress=True, interrupted=interrupted)
    return found.reshape(n, c, lookup.k)


def read(file: Path, fingerprint: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Read neighbors int32 of a shape from a file; None if it is missing, damaged, or of other samples."""
    room = HEADER + 4 * math.prod(shape)
    try:
        with open_regular(file) as opened:
            # zipfile would look for its directory in all of a large one; a small one holds them only if compressed.
            if not room - HEADER <= os.fstat(opened.fileno()).st_size <= 2 * room:
                return None
            archive = zipfile.ZipFile(opened)
            if any(entry.file_size > room for entry in archive.infolist()):  # a small file may hold terabytes of zeros
                return None
            with np.load(opened) as kept:
                neighbors = kept["neighbors"] if str(kept["fingerprint"]) == fingerprint else None
    except Exception:  # headers are parsed as Python: from damaged ones come tokenize.TokenError, SyntaxError, others
        return None
    if not isinstance(neighbors, np.ndarray):  # of an entry that is no array, NumPy returns the bytes
        return None
    return neighbors if (neighbors.shape, neighbors.dtype) == (shape, np.int32) else None


def nearest_neighbors(samples: Samples, index: ChunkIndex, k: int, most_bytes: int | None = None) -> Samples:
    """Attach the k nearest neighbors to samples, without a file.

    Raises ValueError if samples are shorter than a chunk, or if the neighbors take more than most_bytes.
    """
    seq_len = samples.windows.seq_len
    if seq_len < index.chunk_len:
        raise ValueError(f"seq_len={seq_len} must be at least chunk_len={index.chunk_len}")
    check_size((len(samples), seq_len // index.chunk_len, k), most_bytes)
    neighbors = look_up(samples, index, Lookup(k))
    return dataclasses.replace(samples, neighbors=neighbors, corpus=index.corpus, length=2 * index.chunk_len)
