"""Arrays kept in memory up to a limit, and beyond it in a temporary folder."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxmodels.io.atomic import temporary_folder
from jaxmodels.process.failures import naming

DEFAULT_LIMIT = 2**30


class Store:
    """Arrays by number, counted from 0; at most `limit` bytes are in memory. `store(limit)` opens one."""

    def __init__(self, limit: int, folder: Path):
        self.limit, self.folder = limit, folder
        self.kept: list[np.ndarray | Path] = []
        self.in_memory = self.on_disk = 0  # bytes

    def put(self, array: np.ndarray) -> int:
        """Store a copy of the array; returns its number."""
        if self.in_memory + array.nbytes <= self.limit:
            self.kept.append(np.array(array, copy=True))
            self.in_memory += array.nbytes
        else:
            file = self.folder / f"array-{len(self.kept)}.npy"
            with naming(file):
                np.save(file, array)
            self.kept.append(file)
            self.on_disk += array.nbytes
        return len(self.kept) - 1

    def __len__(self) -> int:
        return len(self.kept)

    def get(self, number: int) -> np.ndarray:
        """The array, read-only; if on disk it is memory-mapped."""
        kept = self.kept[number]
        array = np.load(kept, mmap_mode="r") if isinstance(kept, Path) else kept.view()
        array.flags.writeable = False
        return array


class Stored(Mapping[str, np.ndarray]):
    """Arrays by name in a Store; each is read when it is asked for."""

    def __init__(self, store: Store, arrays: Mapping[str, np.ndarray]):
        self.store = store
        self.numbers = {name: store.put(array) for name, array in arrays.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.store.get(self.numbers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def check_limit(memory_limit: int) -> None:
    """Raise ValueError for a negative number of bytes."""
    if memory_limit < 0:
        raise ValueError(f"memory_limit={memory_limit} must be at least 0 bytes")


@contextlib.contextmanager
def store(limit: int = DEFAULT_LIMIT) -> Iterator[Store]:
    """A Store whose folder is deleted when it closes."""
    with temporary_folder("parity") as folder:
        yield Store(limit, folder)
