"""Training examples with neighbours, which are looked up once for all of them and kept in a file.

RUN/index/             the chunk index of the training text; see `jaxmodels.retro.retrieval`
RUN/index/NAME.npz     neighbours of a set of examples: fingerprint, and neighbors int32 [n, C, k], where they begin

Axes: n examples, S tokens of each, C = S // L chunks of L = chunk_len, k neighbours, M = 2·L their tokens.
"""

import contextlib
import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from jaxmodels.io.atomic import atomic_file
from jaxmodels.retro.retrieval.corpus import Corpus, sharing
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.training.data import Example, Windows
from jaxmodels.training.distributed import agree, is_first

Made = TypeVar("Made")
Kind = Literal["nearest", "filtered", "random"]
SKIPPED = 8  # fewer tokens than these are skipped before an example, so that its chunks are not those of the index


@dataclasses.dataclass(frozen=True)
class Samples(Sequence[Example]):
    """Windows of a text from each start on, with what they read besides: {"tokens": [S + 1]}, and "ret" [C, k, M].

    starts: int [n]; neighbors: int [n, C, k], where in the corpus they begin, or None for none. Raises ValueError where
    a neighbour is outside the corpus.
    """

    windows: Windows
    starts: np.ndarray
    neighbors: np.ndarray | None = None
    corpus: Corpus | None = None
    length: int = 0  # M

    def __post_init__(self):
        if self.neighbors is not None and self.corpus is not None:
            self.corpus.passages(np.array([self.neighbors.min(), self.neighbors.max()]), 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i):
        example = self.windows.at(int(self.starts[i]))
        if self.neighbors is None or self.corpus is None:
            return example
        return {**example, "ret": self.corpus.passages(self.neighbors[i], self.length)}


def with_skips(n: int, seq_len: int, passes: int, seed: int) -> np.ndarray:
    """Where examples begin in n tokens: one after the other, 0 to 7 skipped before each; so often through the text."""
    rng, starts = np.random.default_rng([seed, 4]), []
    for _ in range(passes):
        start = min(int(rng.integers(SKIPPED)), max(0, n - seq_len - 1))
        while start + seq_len < n:
            starts.append(start)
            start += seq_len + int(rng.integers(SKIPPED))
    return np.array(starts, np.int64)


def end_to_end(windows: Windows) -> Samples:
    """The windows themselves, which neighbours can be attached to."""
    return Samples(windows, np.arange(len(windows)) * windows.seq_len)


def with_index(sha256: str, index: ChunkIndex) -> str:
    """What tells a text with its index from any other, from what tells the text."""
    return hashlib.sha256(f"{sha256}|{index.fingerprint}".encode()).hexdigest()


def made_once(make: Callable[[], Made]) -> Made:
    """What the first process makes and keeps in files, and each of the others from them once it has; all must ask.

    Raises KeyboardInterrupt in all of them where making it raised that in the first.
    """
    made = None
    if is_first():
        with contextlib.suppress(KeyboardInterrupt):
            made = make()
    if agree(is_first() and made is None):
        raise KeyboardInterrupt
    return make() if made is None else made


def attach(
    samples: Samples,
    index: ChunkIndex,
    k: int,
    file: Path,
    kind: Kind = "nearest",
    *,
    own: bool = False,
    run: int = 0,
    seed: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> Samples:
    """Samples with neighbours out of an index: those in the file, where it is of the same, or new ones that it keeps.

    own: the samples are from the corpus of the index, and no neighbour may touch its own sample. filtered: nor share
    `run` tokens in a row with its chunk or the chunk after it, which it is there to predict. Of several processes the
    first looks them up. Raises KeyboardInterrupt, and keeps nothing, where interrupted() says so there.
    """
    parts = (samples.starts.astype("<i8").tobytes(), np.asarray(samples.windows.ids).astype("<i4").tobytes())
    about = f"{index.fingerprint}|{index.n_probe}|{samples.windows.seq_len}|{k}|{kind}|{own}|{run}|{seed}"
    fingerprint = hashlib.sha256(b"|".join([about.encode(), *parts])).hexdigest()

    def kept() -> np.ndarray:
        neighbors = read(file, fingerprint)
        if neighbors is None:
            found = look_up(samples, index, k, kind, own=own, run=run, seed=seed, interrupted=interrupted)
            neighbors = found.astype(np.int32)
            with atomic_file(file) as beside, open(beside, "wb") as opened:
                np.savez(opened, fingerprint=fingerprint, neighbors=neighbors)
        return neighbors

    return dataclasses.replace(samples, neighbors=made_once(kept), corpus=index.corpus, length=2 * index.chunk_len)


def look_up(
    samples: Samples,
    index: ChunkIndex,
    k: int,
    kind: Kind,
    *,
    own: bool = False,
    run: int = 0,
    seed: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """The neighbours [n, C, k] of all chunks of all samples."""
    ids, seq_len = samples.windows.ids, samples.windows.seq_len
    n, c, length = len(samples), seq_len // index.chunk_len, index.chunk_len
    if kind == "random":
        return np.random.default_rng([seed, 5]).choice(index.starts, (n, c, k))
    places = samples.starts[:, None] + length * np.arange(c)  # [n, C]
    chunks = ids[places[..., None] + np.arange(length)].reshape(n * c, length)
    spans = np.stack([samples.starts, samples.starts + seq_len + 1], axis=1) if own else None
    refuse = None
    if kind == "filtered":
        around = places.reshape(-1, 1) + np.arange(2 * length)
        known = around < len(ids)
        texts = np.where(known, ids[np.where(known, around, 0)].astype(np.int64), -1)
        refuse = sharing(index.corpus, texts, run, 2 * length)
    spans = None if spans is None else np.repeat(spans, c, axis=0)
    found = index.neighbors(chunks, k, own=spans, refuse=refuse, progress=True, interrupted=interrupted)
    return found.reshape(n, c, k)


def read(file: Path, fingerprint: str) -> np.ndarray | None:
    """The neighbours in a file; None where it is not there, not whole, or of something else."""
    try:
        with open(file, "rb") as opened, np.load(opened) as kept:
            return kept["neighbors"] if str(kept["fingerprint"]) == fingerprint else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def of_run(run: Path, settings: dict[str, Any]) -> ChunkIndex | None:
    """The index that a run was trained with, where its configuration says or beside it; None where without one.

    Raises ValueError where it is no longer there.
    """
    if not settings.get("index") or not settings.get("retrieval"):
        return None
    folder = Path(settings["index"])
    return ChunkIndex.load(folder if folder.exists() else run.absolute().parent / folder.name)


def retrieving(model: Any, run: Path, settings: dict[str, Any]) -> Any:
    """A run's model as it writes: with live retrieval, where it was trained with neighbours."""
    index = of_run(run, settings)
    if index is None:
        return model
    from jaxmodels.retro.retrieval.live import Retriever, Retrieving

    return Retrieving(model, Retriever(index, settings["neighbors"]))


def with_neighbors(windows: Windows, run: Path, settings: dict[str, Any]) -> Sequence[Example]:
    """A text's windows with the neighbours that a run's model reads, where it was trained with any.

    Raises ValueError where a window is shorter than a chunk.
    """
    index = of_run(run, settings)
    if index is None:
        return windows
    if windows.seq_len < index.chunk_len:
        raise ValueError(f"seq_len={windows.seq_len} must be at least a chunk of {index.chunk_len}")
    samples = end_to_end(windows)
    neighbors = look_up(samples, index, settings["neighbors"], "nearest")
    return dataclasses.replace(samples, neighbors=neighbors, corpus=index.corpus, length=2 * index.chunk_len)
