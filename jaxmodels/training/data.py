"""Training examples: an endless random sequence, indexed by position, so that a run resumes on any number of processes.

Axes: B batch, S sequence. An example is a dict of arrays with "tokens", int [S + 1], and if some of them are padding,
"predicted", bool [S]; a batch stacks examples.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from jaxmodels.sharding import batch_sharding
from jaxmodels.text import Vocabulary
from jaxmodels.training.step import PREDICTED

Example = Mapping[str, np.ndarray]
PREFETCHED = 8  # batches; they take little memory, and the loader threads compete with the loop for the GIL


@dataclasses.dataclass(frozen=True)
class Windows(Sequence[Example]):
    """A text cut into consecutive inputs of S tokens, each with its next token: tokens 1 … n·S are predicted once.

    ids: int [N], in memory or memory-mapped. Raises ValueError with the text's `name` if not one window fits.
    """

    ids: np.ndarray
    seq_len: int
    name: str

    def __post_init__(self) -> None:
        if len(self.ids) <= self.seq_len:
            raise ValueError(
                f"{self.name} text has {len(self.ids)} tokens; seq_len={self.seq_len} needs at least {self.seq_len + 1}"
            )

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.seq_len

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.at(*self.place(i))

    @property
    def n_predicted(self) -> int:
        """Number of tokens that the windows predict."""
        return len(self) * self.seq_len

    def place(self, i: int) -> tuple[int, int]:
        """Beginning of window i, and the end of the text."""
        return i * self.seq_len, len(self.ids)

    def at(self, start: int, stop: int | None = None) -> Example:
        """Window that begins at a token of a text, or of a document that ends before token `stop`."""
        return {"tokens": np.asarray(self.ids[start : start + self.seq_len + 1], np.int32)}

    def shifted(self, i: int, rng: np.random.Generator) -> Example:
        """Window i moved by a random 0 … S-1 tokens; by fewer near the end of the text or document."""
        start, stop = self.place(i)
        room = max(0, stop - self.seq_len - 1 - start)
        return self.at(start + int(rng.integers(0, min(self.seq_len - 1, room), endpoint=True)), stop)


class DocumentWindows(Windows):
    """Documents cut into inputs of S tokens that do not cross from one document to the next.

    The end of a document, and a shorter one, is padded on the right, where a causal model does not see it, and examples
    have "predicted", bool [S]: False for targets that are padding. starts: where each document begins, and the end,
    int [D + 1]. Raises ValueError with the text's `name` if no document has two tokens.
    """

    def __init__(self, ids: np.ndarray, seq_len: int, name: str, starts: np.ndarray):
        lengths = np.diff(starts)
        used = -(-np.maximum(lengths - 1, 0) // seq_len)  # windows of each document
        if not used.sum():
            raise ValueError(f"{name} text has no document of at least 2 tokens, as within_documents needs")
        documents = np.flatnonzero(used)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "seq_len", seq_len)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "starts", np.asarray(starts[:-1])[documents])
        object.__setattr__(self, "stops", np.asarray(starts[1:])[documents])
        object.__setattr__(self, "firsts", np.concatenate([[0], np.cumsum(used[documents])]))

    starts: np.ndarray
    stops: np.ndarray
    firsts: np.ndarray  # number of the first window of each document, and of all

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def n_predicted(self) -> int:
        return int((self.stops - self.starts - 1).sum())

    def place(self, i: int) -> tuple[int, int]:
        """Beginning of window i, and the end of its document."""
        document = int(np.searchsorted(self.firsts, i, side="right")) - 1
        start = int(self.starts[document]) + (i - int(self.firsts[document])) * self.seq_len
        return start, int(self.stops[document])

    def at(self, start: int, stop: int | None = None) -> Example:
        stop = len(self.ids) if stop is None else stop
        ids = np.asarray(self.ids[start : min(start + self.seq_len + 1, stop)], np.int32)
        padding = self.seq_len + 1 - len(ids)
        return {"tokens": np.pad(ids, (0, padding)), PREDICTED: np.arange(self.seq_len) < len(ids) - 1}


@dataclasses.dataclass(frozen=True)
class First(Sequence[Example]):
    """The first n of some examples, made when they are used: with neighbors they are far larger than a text."""

    examples: Sequence[Example]
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return self.examples[i]


def n_predicted(examples: Sequence[Example]) -> int:
    """Number of tokens that examples predict, without padding."""
    if isinstance(examples, Windows):
        return examples.n_predicted
    if not len(examples) or PREDICTED not in examples[0]:
        return len(examples) * (len(examples[0]["tokens"]) - 1) if len(examples) else 0
    return sum(int(examples[i][PREDICTED].sum()) for i in range(len(examples)))


def without_padding(example: Example) -> np.ndarray:
    """Tokens of an example, int [n + 1], of which the last n are predicted."""
    tokens = example["tokens"]
    return tokens[: 1 + int(example[PREDICTED].sum())] if PREDICTED in example else tokens


def windows_of(
    ids: np.ndarray, seq_len: int, name: str, documents: np.ndarray | None, *, within_documents: bool
) -> Windows:
    """Windows of a text, which may cross documents unless `within_documents`; raises ValueError if none fits."""
    if not within_documents or documents is None:
        return Windows(ids, seq_len, name)
    return DocumentWindows(ids, seq_len, name, documents)


def endless(windows: Windows, seed: int) -> grain.MapDataset:
    """Endless epochs: each window once per epoch, in a new order and at new offsets, as in the original experiments."""
    dataset = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()
    return dataset.random_map(windows.shifted)


@dataclasses.dataclass(frozen=True)
class Task:
    """Data of an experiment."""

    train: grain.MapDataset  # endless examples
    validation: Sequence[Example]
    vocabulary: Vocabulary
    sha256: str  # of the data and vocabulary; a run resumes only with its own data
    about: str  # one line to print
    train_ids: np.ndarray | None = None  # ids of the text, if there is one
    validation_ids: np.ndarray | None = None


class Batches(Iterator[dict[str, jax.Array]]):
    """Iterator over batches of examples 0 … B-1, B … 2B-1, …: global arrays whose rows are divided over the mesh.

    A process makes only the rows that its devices hold. `get_state` counts batches, so that it has the same meaning
    for any number of processes and devices. Examples are made ahead, in threads.
    """

    def __init__(self, examples: grain.MapDataset, batch_size: int, mesh: Mesh):
        self.sharding = batch_sharding(mesh)
        self.batch_size = batch_size
        indices = self.sharding.addressable_devices_indices_map((batch_size,)).values()
        own = self.own = np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))

        def batch(number: int) -> Example:
            return stack([examples[number * batch_size + int(row)] for row in own])

        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCHED)
        numbers = grain.MapDataset.range(2**62 // batch_size)
        self.iterator = iter(numbers.map(batch).to_iter_dataset(options))

    def __next__(self) -> dict[str, jax.Array]:
        return place_rows(next(self.iterator), self.own, self.batch_size, self.sharding)

    def get_state(self) -> dict[str, Any]:
        return self.iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.iterator.set_state(state)

    def close(self) -> None:
        self.iterator.close()


def place_rows(
    arrays: Example, own: np.ndarray, batch_size: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
    """Build a global batch from this process's rows; own: their sorted indices in the batch."""

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index, "every array has an axis of rows"
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(own, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in arrays.items()}


def stack(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}  # [B, ...]


def in_batches(
    examples: Sequence[Example], batch_size: int, mesh: Mesh
) -> Iterator[tuple[dict[str, jax.Array], int, int]]:
    """Iterate over a finite sequence in equal batches, each with its numbers of valid rows and of predicted tokens.

    The last batch is padded with rows that are not valid.
    """
    for first in range(0, len(examples), batch_size):
        chosen = [examples[i % len(examples)] for i in range(first, first + batch_size)]
        placed = place_rows(stack(chosen), np.arange(batch_size), batch_size, batch_sharding(mesh))
        valid = chosen[: len(examples) - first]
        yield placed, len(valid), n_predicted(valid)
