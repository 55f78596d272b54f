"""Training examples: endless, random by position, so that a run goes on where it stopped on any number of processes.

Axes: B batch, S sequence. An example is a dict of arrays, "tokens" int [S + 1] among them; a batch stacks them.
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

Example = Mapping[str, np.ndarray]
PREFETCHED = 8  # batches; they are small, and the two threads that make them share the interpreter with the loop


@dataclasses.dataclass(frozen=True)
class Windows(Sequence[Example]):
    """A text cut end to end into inputs of S tokens, each with its next token: they predict tokens 1 … n·S once each.

    ids: int [N], in memory or memory-mapped. Raises ValueError, with the text's `name`, where not one window fits.
    """

    ids: np.ndarray
    seq_len: int
    name: str

    def __post_init__(self):
        if len(self.ids) <= self.seq_len:
            raise ValueError(
                f"the {self.name} text has {len(self.ids)} tokens, fewer than one sequence of seq_len={self.seq_len} "
                "and one"
            )

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.seq_len

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.at(i * self.seq_len)

    def at(self, start: int) -> Example:
        return {"tokens": np.asarray(self.ids[start : start + self.seq_len + 1], np.int32)}

    def shifted(self, i: int, rng: np.random.Generator) -> Example:
        """Window i, a random 0 … S-1 tokens later; less for the last one, where the text ends."""
        start = i * self.seq_len
        room = len(self.ids) - self.seq_len - 1 - start
        return self.at(start + int(rng.integers(0, min(self.seq_len - 1, room), endpoint=True)))


def endless(windows: Windows, seed: int) -> grain.MapDataset:
    """Epoch after epoch, each window once an epoch, in an order and with offsets of its own; the originals' rule."""
    dataset = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()
    return dataset.random_map(windows.shifted)


@dataclasses.dataclass(frozen=True)
class Task:
    """What an experiment trains on."""

    train: grain.MapDataset  # endless examples
    validation: Sequence[Example]
    vocabulary: Vocabulary
    sha256: str  # of everything above; a run goes on with its own data only
    about: str  # one line
    train_ids: np.ndarray | None = None  # the text itself, where it is one
    validation_ids: np.ndarray | None = None


class Batches(Iterator[dict[str, jax.Array]]):
    """Batches of examples 0 … B-1, B … 2B-1, …, each a global array with its rows over the mesh.

    A process makes the rows that its devices hold and no other. `get_state` counts batches, so it means the same to
    any number of processes and devices. Examples are made ahead, in threads.
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
    """A global batch, of which this process has the rows `own`, sorted: every block that one of its devices holds."""

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index, "every array has an axis of rows"
            start, stop, _ = index[0].indices(batch_size)
            place = int(np.searchsorted(own, start))
            return array[place : place + stop - start]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in arrays.items()}


def stack(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def in_batches(examples: Sequence[Example], batch_size: int, mesh: Mesh) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """A finite sequence in batches of one size, each with how many of its rows count: the last is filled up."""
    for first in range(0, len(examples), batch_size):
        rows = stack([examples[i % len(examples)] for i in range(first, first + batch_size)])
        placed = place_rows(rows, np.arange(batch_size), batch_size, batch_sharding(mesh))
        yield placed, min(batch_size, len(examples) - first)
