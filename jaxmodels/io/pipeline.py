"""Writing of large files: a few tasks at a time in threads, and disk writes that begin while they run.

A task reads one part of a file's content and writes it. While one thread waits for the file system, the other reads or
transposes. Nothing is flushed here: `jaxmodels.io.atomic` flushes a file or folder before it gets its name.
"""

import collections
import concurrent.futures
import ctypes
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Progress = Callable[[int], None]

THREADS = 2
BLOCK_BYTES = 1 << 23  # written to disk together; a multiple of the page size
SYNC_FILE_RANGE_WRITE = 2  # of Linux's sync_file_range


def run_in_threads(tasks: Iterable[Callable[[], int]], progress: Progress) -> None:
    """Call functions in two threads; at most four have begun or wait.

    progress is called with the number of bytes that each returns, in order. What one raises is raised here, once those
    that have begun have ended; no other begins.
    """
    running: collections.deque[concurrent.futures.Future[int]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        try:
            for task in tasks:
                running.append(threads.submit(task))
                if len(running) >= 2 * THREADS:
                    progress(running.popleft().result())
            while running:
                progress(running.popleft().result())
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def write_at(descriptor: int, offset: int, values: np.ndarray) -> int:
    """Write contiguous values to a position in a file; returns their number of bytes."""
    rest, position = values.reshape(-1).view(np.uint8).data, offset
    while rest:  # a write may be partial, e.g. on a disk that is almost full
        written = os.pwrite(descriptor, rest, position)
        rest, position = rest[written:], position + written
    first, last = offset // BLOCK_BYTES, position // BLOCK_BYTES
    if first < last:
        start_writeback(descriptor, first * BLOCK_BYTES, (last - first) * BLOCK_BYTES)
    return values.nbytes


def start_writeback(descriptor: int, offset: int = 0, n_bytes: int = 0) -> None:
    """Have the kernel begin to write a range of a file to disk, default all of it; without effect if it cannot.

    Otherwise it begins when the file is flushed, and the disk is idle until then.
    """
    function = sync_file_range()
    if function is not None:
        function(descriptor, ctypes.c_int64(offset), ctypes.c_int64(n_bytes), SYNC_FILE_RANGE_WRITE)


@functools.cache
def sync_file_range() -> Any:
    """Function of the C library; None if it has none."""
    return getattr(ctypes.CDLL(None), "sync_file_range", None)
