"""Arrays that are kept in memory up to a limit, and past it in a temporary folder."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

DEFAULT_LIMIT = 2**30


class Store:
    """Keeps arrays under growing numbers; `limit`: bytes in memory. Open it with `store(limit)`."""

    def __init__(self, limit: int, folder: Path):
        self.limit, self.folder = limit, folder
        self.kept: list[np.ndarray | Path] = []
        self.in_memory = self.on_disk = 0  # bytes

    def put(self, array: np.ndarray) -> int:
        """The number under which a copy of the array is kept."""
        if self.in_memory + array.nbytes <= self.limit:
            self.kept.append(np.array(array, copy=True))
            self.in_memory += array.nbytes
        else:
            file = self.folder / f"{len(self.kept)}.npy"
            np.save(file, array)
            self.kept.append(file)
            self.on_disk += array.nbytes
        return len(self.kept) - 1

    def get(self, number: int) -> np.ndarray:
        """The array, read-only; from disk it is mapped, not read."""
        kept = self.kept[number]
        array = np.load(kept, mmap_mode="r") if isinstance(kept, Path) else kept.view()
        array.flags.writeable = False
        return array


def check_limit(memory_limit: int) -> None:
    """Raises ValueError where it is no number of bytes."""
    if memory_limit < 0:
        raise ValueError(f"memory_limit={memory_limit} must be at least 0 bytes")


@contextlib.contextmanager
def store(limit: int = DEFAULT_LIMIT) -> Iterator[Store]:
    """A Store whose folder goes when it closes."""
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        yield Store(limit, Path(folder))
