"""Corpus of retrieval: token ids, the chunks of its documents, and the passages that begin at chunks.

Axes: T tokens of the corpus, n texts, r rows with f candidates each.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from jaxmodels.process.texts import quoted
from jaxmodels.text import Vocabulary

Refuse = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (rows, starts [r, f]) -> bool [r, f]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids [T] and document boundaries: the start of each document, then T.

    Raises ValueError if there are no tokens, or the starts do not increase from 0 to T.
    """

    tokens: np.ndarray
    vocabulary: Vocabulary
    documents: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, vocabulary: Vocabulary, documents: Sequence[int] | None = None) -> "Corpus":
        """Corpus of tokens int [T]; documents: start of each, the first at 0; default one document."""
        return cls(tokens, vocabulary, np.asarray([*([0] if documents is None else documents), len(tokens)], np.int64))

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or not len(self.tokens) or self.tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be non-empty integers [T], got {self.tokens.dtype}{list(self.tokens.shape)}")
        starts = self.documents
        if starts.ndim != 1 or len(starts) < 2 or starts.dtype.kind not in "iu":
            raise ValueError(f"documents must be integers, two at least, got {starts.dtype}{list(starts.shape)}")
        if starts[0] != 0 or starts[-1] != len(self.tokens) or (starts[1:] <= starts[:-1]).any():
            raise ValueError(
                f"documents={self.documents[:-1].tolist()[:10]} must increase from 0 and stay below the number of "
                f"tokens, {len(self.tokens)}"
            )

    def chunks(self, chunk_len: int) -> np.ndarray:
        """Starts of the complete chunks of all documents, int64 [n]; raises ValueError if there are none."""
        if chunk_len < 1:
            raise ValueError(f"chunk_len={chunk_len} must be at least 1")
        longest = int(np.diff(self.documents).max())
        if chunk_len > longest:
            raise ValueError(f"no document has chunk_len={quoted(chunk_len)} tokens; the longest has {longest}")
        counts = np.diff(self.documents).astype(np.int64) // chunk_len
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # number of each in its document
        return np.repeat(self.documents[:-1].astype(np.int64), counts) + chunk_len * within

    def passages(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens from each start on, int32 [..., length]; 0 beyond the end of the document, and for start -1.

        Raises ValueError if a start is outside the corpus.
        """
        starts = np.asarray(starts)
        if starts.size and not -1 <= starts.min() <= starts.max() < len(self.tokens):
            raise ValueError(
                f"starts from {starts.min()} to {starts.max()} must be from 0 to {len(self.tokens) - 1}, or -1"
            )
        ends = self.documents[np.searchsorted(self.documents[:-1], np.maximum(starts, 0), side="right")]
        places = starts[..., None] + np.arange(length)
        inside = (places < ends[..., None]) & (starts[..., None] >= 0)
        return np.where(inside, self.tokens[np.where(inside, places, 0)], 0).astype(np.int32)

    def text(self, start: int, length: int) -> str:
        """Text of `length` tokens from a start on, to the end of the document at most."""
        end = int(self.documents[np.searchsorted(self.documents[:-1], start, side="right")])
        return self.vocabulary.decode(np.asarray(self.tokens[start : min(start + length, end)]))

    def fingerprint(self, chunk_len: int, embedder: str) -> str:
        """SHA-256 of everything that an index depends on."""
        sha256 = hashlib.sha256(f"1|{chunk_len}|{embedder}|{self.vocabulary!r}|".encode())
        sha256.update(self.documents.astype("<i8").tobytes())
        for first in range(0, len(self.tokens), 2**22):
            sha256.update(np.asarray(self.tokens[first : first + 2**22]).astype("<i4").tobytes())
        return sha256.hexdigest()


def sharing(corpus: Corpus, texts: np.ndarray, run: int, length: int) -> Refuse:
    """Function that refuses passages of `length` tokens that share `run` consecutive tokens with the row's text.

    texts: int [n, W]. Raises ValueError if run is not from 1 to W.
    """
    if not 1 <= run <= texts.shape[1]:
        raise ValueError(f"run={run} must be from 1 to the {texts.shape[1]} tokens of a text")

    def refuse(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
        passages = corpus.passages(starts, length)  # [r, f, length]
        shared = np.zeros(starts.shape, bool)
        for shift in range(run - length, texts.shape[1] - run + 1):  # offset of the passage in the text
            text = texts[rows, max(0, shift) : shift + length]
            passage = passages[..., max(0, -shift) :][..., : text.shape[1]]
            # A shared run is a window of `run` positions that are all equal: compare windowed sums with `run`.
            equal = np.cumsum(passage == text[:, None], axis=-1, dtype=np.int32)
            counts = equal[..., run - 1 :] - np.pad(equal, [(0, 0), (0, 0), (1, 0)])[..., : equal.shape[-1] - run + 1]
            shared |= (counts == run).any(axis=-1)
        return shared

    return refuse
