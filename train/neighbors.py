"""Training examples with neighbours, which are looked up once for all of them and kept in a file.

RUN/index/             the chunk index of the training text; see `jaxmodels.retro.retrieval`
RUN/index/NAME.npz     neighbours of a set of examples: fingerprint, and neighbors int32 [n, C, k], where they begin

Axes: n examples, S tokens of each, C = S // L chunks of L = chunk_len, k neighbours, M = 2·L their tokens.
"""

import dataclasses
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmodels.retro.corpus import Corpus, sharing
from jaxmodels.retro.retrieval import ChunkIndex
from train.data import Example, Windows

Kind = Literal["nearest", "filtered", "random"]
SKIPPED = 8  # fewer tokens than these are skipped before an example, so that its chunks are not those of the index


@dataclasses.dataclass(frozen=True)
class Samples(Sequence[Example]):
    """Inputs of S tokens with their next ones, from each start on: {"tokens": [S + 1]}, and "ret" [C, k, M].

    ids: int [N]; starts: int [n]; neighbors: int [n, C, k], where in the corpus they begin, or None for none. Raises
    ValueError, with the text's `name`, where there is no example, or a neighbour outside the corpus.
    """

    ids: np.ndarray
    starts: np.ndarray
    seq_len: int
    name: str
    neighbors: np.ndarray | None = None
    corpus: Corpus | None = None
    length: int = 0  # M

    def __post_init__(self):
        if not len(self.starts):
            raise ValueError(
                f"the {self.name} text has {len(self.ids)} tokens, fewer than one sequence of seq_len={self.seq_len} "
                "and one"
            )
        if self.neighbors is not None and self.corpus is not None:
            self.corpus.passages(np.array([self.neighbors.min(), self.neighbors.max()]), 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i):
        start = int(self.starts[i])
        tokens = np.asarray(self.ids[start : start + self.seq_len + 1], np.int32)
        if self.neighbors is None or self.corpus is None:
            return {"tokens": tokens}
        return {"tokens": tokens, "ret": self.corpus.passages(self.neighbors[i], self.length)}


def with_skips(n: int, seq_len: int, passes: int, seed: int) -> np.ndarray:
    """Where examples begin in n tokens: one after the other, 0 to 7 skipped before each; so often through the text."""
    rng, starts = np.random.default_rng([seed, 4]), []
    for _ in range(passes):
        start = min(int(rng.integers(SKIPPED)), max(0, n - seq_len - 1))
        while start + seq_len < n:
            starts.append(start)
            start += seq_len + int(rng.integers(SKIPPED))
    return np.array(starts, np.int64)


def end_to_end(n: int, seq_len: int) -> np.ndarray:
    """Where examples begin that cover n tokens once."""
    return np.arange((n - 1) // seq_len) * seq_len


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
) -> Samples:
    """Samples with neighbours out of an index: those in the file, where it is of the same, or new ones that it keeps.

    own: the samples are from the corpus of the index, and no neighbour may touch its own sample. filtered: nor share
    `run` tokens in a row with its chunk or the chunk after it, which it is there to predict.
    """
    parts = (samples.starts.astype("<i8").tobytes(), np.asarray(samples.ids).astype("<i4").tobytes())
    about = f"{index.fingerprint}|{index.n_probe}|{samples.seq_len}|{k}|{kind}|{own}|{run}|{seed}"
    fingerprint = hashlib.sha256(b"|".join([about.encode(), *parts])).hexdigest()
    length = 2 * index.chunk_len
    neighbors = read(file, fingerprint)
    if neighbors is None:
        neighbors = look_up(samples, index, k, kind, own=own, run=run, seed=seed).astype(np.int32)
        beside = file.with_name(f".{file.name}")
        with open(beside, "wb") as opened:
            np.savez(opened, fingerprint=fingerprint, neighbors=neighbors)
        beside.replace(file)
    return dataclasses.replace(samples, neighbors=neighbors, corpus=index.corpus, length=length)


def look_up(
    samples: Samples, index: ChunkIndex, k: int, kind: Kind, *, own: bool = False, run: int = 0, seed: int = 0
) -> np.ndarray:
    """The neighbours [n, C, k] of all chunks of all samples."""
    n, c, length = len(samples), samples.seq_len // index.chunk_len, index.chunk_len
    if kind == "random":
        return np.random.default_rng([seed, 5]).choice(index.starts, (n, c, k))
    places = samples.starts[:, None] + length * np.arange(c)  # [n, C]
    chunks = samples.ids[places[..., None] + np.arange(length)].reshape(n * c, length)
    spans = np.stack([samples.starts, samples.starts + samples.seq_len + 1], axis=1) if own else None
    refuse = None
    if kind == "filtered":
        around = places.reshape(-1, 1) + np.arange(2 * length)
        known = around < len(samples.ids)
        texts = np.where(known, samples.ids[np.where(known, around, 0)].astype(np.int64), -1)
        refuse = sharing(index.corpus, texts, run, 2 * length)
    spans = None if spans is None else np.repeat(spans, c, axis=0)
    return index.neighbors(chunks, k, own=spans, refuse=refuse, progress=True).reshape(n, c, k)


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
    from jaxmodels.retro.sampling import Retriever, Retrieving

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
    samples = Samples(windows.ids, end_to_end(len(windows.ids), windows.seq_len), windows.seq_len, windows.name)
    neighbors = look_up(samples, index, settings["neighbors"], "nearest")
    return dataclasses.replace(samples, neighbors=neighbors, corpus=index.corpus, length=2 * index.chunk_len)
