"""Batches of windows of a text, each a function of (seed, step) alone: to resume, only the step is needed.

Axes: S sequence, B batch.
"""

import dataclasses
import functools

import numpy as np


def n_windows(ids: np.ndarray, seq_len: int, name: str) -> int:
    """How many inputs of seq_len tokens, each with its next token, lie end to end in a text.

    Raises ValueError, with the text's `name`, where there is none.
    """
    if len(ids) <= seq_len:
        raise ValueError(f"the {name} text has {len(ids)} tokens, fewer than one sequence of seq_len={seq_len} and one")
    return (len(ids) - 1) // seq_len


def windows(ids: np.ndarray, seq_len: int, name: str) -> np.ndarray:
    """All windows end to end: int32 [S + 1, n], column i from token i·S on. They predict tokens 1 … n·S once each."""
    n = n_windows(ids, seq_len, name)
    return ids[np.arange(n) * seq_len + np.arange(seq_len + 1)[:, None]]


@functools.lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def epoch_starts(seed: int, epoch: int, n: int, seq_len: int, last: int) -> np.ndarray:
    """Where an epoch's windows start, in the order they are drawn: int64 [n]."""
    rng = np.random.default_rng([seed, epoch])
    first = np.arange(n) * seq_len
    offset = rng.integers(0, np.minimum(seq_len - 1, last - first), endpoint=True)
    return rng.permutation(first + offset)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Training batches without end: epoch after epoch, each window once an epoch, in an order of its own.

    Window i starts at i·S plus a random offset 0 … S-1 redrawn every epoch (less for the last window, where the text
    ends). A batch that reaches the end of an epoch goes on with the next, so no window is ever left out. Raises
    ValueError where the text is shorter than a sequence.
    """

    ids: np.ndarray
    seq_len: int
    batch_size: int
    seed: int

    def __post_init__(self):
        n_windows(self.ids, self.seq_len, "training")

    def __call__(self, step: int) -> np.ndarray:
        """Tokens of a step, counted from 0: int32 [S + 1, B]; inputs lack the last row, targets the first."""
        n = n_windows(self.ids, self.seq_len, "training")
        epochs, places = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), n)
        last = len(self.ids) - self.seq_len - 1
        starts = [
            epoch_starts(self.seed, epoch, n, self.seq_len, last)[places[epochs == epoch]]
            for epoch in range(epochs[0], epochs[-1] + 1)
        ]
        return self.ids[np.concatenate(starts) + np.arange(self.seq_len + 1)[:, None]]
