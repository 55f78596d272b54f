"""Documents of any size as ids, in batches on all cores and in bounded memory."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmodels.text.documents import Place
from jaxmodels.text.pieces import Piece
from jaxmodels.text.tokenizer.files import TokenizerFile
from jaxmodels.text.vocabularies import Vocabulary

BATCH = 2**20  # characters that are encoded at once
MANY = 4096  # documents that are encoded at once
SHOWN = 10  # examples of unknown texts
SEPARATOR = "\n\n"  # between documents, if the vocabulary has no end token


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Ids of some pieces. ends: numbers of ids up to the end of each document in them; place: where reading goes on."""

    ids: np.ndarray
    ends: np.ndarray
    place: Place


@dataclasses.dataclass
class Unknown:
    """Number of unknown tokens, and examples of what they stand for with their counts."""

    count: int = 0
    examples: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, vocabulary: Vocabulary, text: str, ids: np.ndarray) -> None:
        """Count the unknown tokens of a piece; look for examples until there are more than are shown."""
        if vocabulary.unknown is None:
            return
        found = int(np.count_nonzero(ids == vocabulary.unknown))
        self.count += found
        if found and isinstance(vocabulary, TokenizerFile) and len(self.examples) <= SHOWN:
            self.examples.update(vocabulary.unknown_in(text))


def encode(vocabulary: Vocabulary, pieces: Iterable[Piece], end: np.ndarray, unknown: Unknown) -> Iterator[Encoded]:
    """Encode pieces in batches, the next one while the last one is taken; `end` follows each document.

    Raises ValueError, naming the document, if the vocabulary cannot encode a piece.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[Piece], Future[list[Any]]] | None = None
        try:
            for batch in batches(pieces):
                started = batch, pool.submit(encoded, vocabulary, batch)
                if waiting is not None:
                    yield joined(vocabulary, *waiting, end, unknown)
                waiting = started
            if waiting is not None:
                yield joined(vocabulary, *waiting, end, unknown)
        except BaseException:  # Ctrl-C: the pool waits for its thread
            vocabulary.interrupt()
            raise


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into batches of about BATCH characters."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and (size + len(piece.text) > BATCH or len(batch) >= MANY):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text)
    if batch:
        yield batch


def encoded(vocabulary: Vocabulary, batch: list[Piece]) -> list[Any]:
    try:
        return vocabulary.encode_batch([piece.text for piece in batch])
    except ValueError:
        for piece in batch:  # which one is it?
            try:
                vocabulary.encode(piece.text)
            except ValueError as error:
                raise ValueError(f"{piece.name}: {error}") from None
        raise


def joined(
    vocabulary: Vocabulary, batch: list[Piece], future: Future[list[Any]], end: np.ndarray, unknown: Unknown
) -> Encoded:
    """Ids of a batch, one after the other."""
    parts, ends, size = [], [], 0
    for piece, found in zip(batch, future.result(), strict=True):
        ids = vocabulary.ids_of(found)
        unknown.add(vocabulary, piece.text, ids)
        parts.append(ids)
        size += len(ids)
        if piece.ends:
            parts.append(end)
            size += len(end)
            ends.append(size)
    return Encoded(np.concatenate(parts), np.asarray(ends, np.int64), batch[-1].place)
