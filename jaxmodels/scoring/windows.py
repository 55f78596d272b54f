"""Windows over a long document: each token is scored once, with as much context as the window allows."""

from collections.abc import Iterator

import numpy as np

from jaxmodels.scoring.rows import Row


def windows(n: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first) of the windows over n tokens: tokens first … end-1 are scored after tokens begin … .

    A window has at most max_length tokens and begins `stride` tokens after the one before. Token 0 is never scored.
    Each token after the first window has at least max_length - stride tokens of context.
    """
    scored = 1
    for begin in range(0, max(0, n - 1), stride):
        end = min(begin + max_length, n)
        yield begin, end, scored
        scored = end
        if end == n:
            return


def rows_of(ids: np.ndarray, max_length: int, stride: int) -> Iterator[Row]:
    """Rows that score ids[1:] once each."""
    for begin, end, first in windows(len(ids), max_length, stride):
        yield Row(ids[begin : end - 1], np.arange(first - 1 - begin, end - 1 - begin), ids[first:end])
