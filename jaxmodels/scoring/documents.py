"""Loss, perplexity, and bits per byte and character of documents."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxmodels.process.streams import warn
from jaxmodels.scoring.rows import Programs, Row, check_model, score_rows, vocabulary_size
from jaxmodels.scoring.windows import rows_of
from jaxmodels.text import Vocabulary, as_vocabulary
from jaxmodels.text.documents import Source
from jaxmodels.text.tokens import encode_whole

GROUP = 2**21  # tokens of windows that are held, sorted and computed together
LEAST = 32  # tokens that a window counts as, at least: each takes 500 bytes besides them
LONGEST = 2048  # tokens of a window if the model names no length
WINDOW = (
    4096  # tokens of a window that is not given, at most: a model may name any length, and attention takes its square
)


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Score of a document, or of several together.

    tokens: number of predicted tokens. nats: their negative log-likelihood. characters, n_bytes: size in UTF-8 of the
    text that they stand for; None if ids were scored, not text.
    """

    tokens: int
    nats: float
    characters: int | None = None
    n_bytes: int | None = None

    @property
    def loss(self) -> float | None:
        """Nats per predicted token; None if there is none."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None if no token was predicted."""
        return None if self.loss is None else perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of the predicted tokens per byte of their text; None if there is no text."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else None

    @property
    def bits_per_character(self) -> float | None:
        """Bits of the predicted tokens per character of their text; None if there is no text."""
        return self.nats / math.log(2) / self.characters if self.characters else None


def perplexity(loss: float) -> float:
    """exp(loss), infinite if it is larger than floats are."""
    return math.exp(loss) if loss < 709 else math.inf


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of documents in the order given, and of all their tokens together."""

    documents: tuple[Score, ...]
    total: Score


def score(
    model: Any,
    texts: Iterable[str | Source | np.ndarray | Sequence[int]],
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    bos: int | None = None,
    loss_chunk: int | None = None,
) -> Scores:
    """Score documents with a language model: loss, perplexity, bits per byte and character of each and of all.

    texts: strings or sources of `jaxmodels.text.documents`, which need the tokenizer, or sequences of token ids. Those
        of an iterator are taken one after the other; a source is read in pieces.
    tokenizer: vocabulary of texts: one of `jaxmodels.text`, of tokenizers or of transformers, or the path of a
        tokenizer.json or of its folder. Special tokens are not added.
    max_length: tokens of a window, of which the first is not predicted; default the model's max_len, or 2,048, but
        at most 4,096. Longer documents are scored in windows that overlap.
    stride: tokens from the beginning of a window to that of the next, below max_length; default half of it. Each token
        is scored once, after at least max_length - stride others or all that precede it.
    batch_size: windows that are computed together; default as many as have 4,096 tokens.
    bos: id that is put before each document, so that its first token is predicted too; by default it is not.
    loss_chunk: tokens whose logits are computed together; default as many as have 2²³ logits on a CPU, 2²⁶ on another
        device.

    Windows are computed by length, the longest of GROUP tokens first, padded to a few compiled shapes; a document's
    score does not depend on the others but for rounding. A document without a predicted token has tokens=0 and
    loss=None. Raises ValueError if the model is not a language model, a setting is out of range, a document has ids
    outside the model's vocabulary, or a loss is NaN.
    """
    check_model(model)
    max_length, stride = checked_window(model, max_length, stride)
    for name, value in (("batch_size", batch_size), ("loss_chunk", loss_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if isinstance(texts, str):
        raise ValueError("texts is one string; pass a list of documents")
    vocabulary = None if tokenizer is None else as_vocabulary(tokenizer)
    n_vocab = checked_vocabulary(model, bos)
    group, programs = Group(), Programs()
    nats: list[float] = []
    tokens: list[int] = []
    sizes: list[tuple[int | None, int | None]] = []

    def compute() -> None:
        settings: Any = {"batch_size": batch_size, "longest": max_length - 1, "chunk": loss_chunk}
        found = score_rows(model, group.rows, programs=programs, **settings)
        for i, row in zip(group.owners, found, strict=True):
            nats[i] -= float(row.log_probs.sum(dtype=np.float64))
            tokens[i] += len(row.log_probs)
            if math.isnan(nats[i]):
                raise ValueError(f"loss of document {i} is nan; the model's weights must be finite")
        group.clear()

    begin = () if bos is None else (bos,)
    pairs: Iterable[Any] = ((text, encoded(text, i, vocabulary, begin)) for i, text in enumerate(texts))
    if isinstance(texts, Sequence):  # all of them are in memory, so that bad ones are found before the work
        pairs = list(pairs)
        for i, (_, ids) in enumerate(pairs):
            check_document(i, ids, n_vocab)
    for i, (text, ids) in enumerate(pairs):
        check_document(i, ids, n_vocab)
        nats.append(0.0)
        tokens.append(0)
        sizes.append(text_sizes(text, ids, vocabulary, bos is None) if isinstance(text, str | Source) else (None, None))
        for row in rows_of(ids, max_length, stride):
            group.add(row, i)
            if group.size >= GROUP:
                compute()
    compute()
    scores = [Score(n, loss, *size) for n, loss, size in zip(tokens, nats, sizes, strict=True)]
    return Scores(tuple(scores), total_of(scores))


@dataclasses.dataclass
class Group:
    """Windows that are computed together, each with the index of its document. size: their tokens, LEAST of each."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    owners: list[int] = dataclasses.field(default_factory=list)
    size: int = 0

    def add(self, row: Row, owner: int) -> None:
        self.rows.append(row)
        self.owners.append(owner)
        self.size += max(LEAST, len(row.ids))

    def clear(self) -> None:
        self.rows, self.owners, self.size = [], [], 0


def checked_window(model: Any, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride with their defaults; raises ValueError if they are out of range."""
    if max_length is None:
        max_length = default_window(model)
    if not is_integer(max_length) or max_length < 2:
        raise ValueError(f"max_length={max_length} must be an integer of at least 2")
    if stride is None:
        stride = max_length // 2
    if not is_integer(stride) or not 1 <= stride < max_length:
        raise ValueError(f"stride={stride} must be an integer from 1 to max_length - 1 = {max_length - 1}")
    return int(max_length), int(stride)


def is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def model_length(model: Any) -> int | None:
    """Longest sequence that a model names in its configuration as max_len; None if it names none."""
    config = getattr(model, "config", None)
    length = config().get("max_len") if callable(config) else None
    return length if isinstance(length, int) else None


def default_window(model: Any) -> int:
    """Tokens of a window if none are given; warns if the model names more than WINDOW."""
    length = model_length(model) or LONGEST
    if length > WINDOW:
        warn(f"windows have {WINDOW:,} tokens, not the max_len={length:,} of the model; pass a length for longer ones")
    return min(length, WINDOW)


def encoded(text: Any, i: int, tokenizer: Vocabulary | None, begin: Sequence[int] = ()) -> np.ndarray:
    """Ids of document i after those of `begin`, int [n]; raises ValueError if it is neither a text nor ids.

    A text needs a tokenizer. The ids of a source, which is read in pieces, are memory-mapped.
    """
    if isinstance(text, str | Source):
        if tokenizer is None:
            raise ValueError("tokenizer=None, but the documents are text; pass the model's tokenizer, or ids")
        try:
            if isinstance(text, str):
                text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON may have half of a surrogate pair
            raise ValueError(f"document {i} is not valid Unicode: {error}") from None
        return encode_whole(text, tokenizer, begin)
    ids = np.asarray(text)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"document {i} must be a string or a sequence of ids, got {ids.dtype}{list(ids.shape)}")
    return np.concatenate([np.asarray(begin, np.int64), ids.astype(np.int64)])


def checked_vocabulary(model: Any, bos: int | None) -> int:
    """Number of ids of a model; raises ValueError if `bos` is not one of them."""
    n_vocab = vocabulary_size(model)
    if bos is not None and not (is_integer(bos) and 0 <= bos < n_vocab):
        raise ValueError(f"bos={bos} must be an id from 0 to {n_vocab - 1}")
    return n_vocab


def check_document(i: int, ids: np.ndarray, n_vocab: int) -> None:
    """Raises ValueError if document i has an id outside the model's vocabulary."""
    for first in range(0, len(ids), GROUP):
        part = ids[first : first + GROUP]
        if part.min() < 0 or part.max() >= n_vocab:
            outside = part[(part < 0) | (part >= n_vocab)][0]
            raise ValueError(
                f"document {i} has id {outside}, outside of the model's vocabulary of {n_vocab}; the tokenizer must be "
                "the model's own"
            )


def text_sizes(text: str | Source, ids: np.ndarray, tokenizer: Vocabulary | None, but_first: bool) -> tuple[int, int]:
    """Number of characters and bytes of a text, without those of its first token if that was not predicted.

    A character that the first token begins and others end counts with the others.
    """
    assert tokenizer is not None, "a text was encoded"
    n, n_bytes, beginning = 0, 0, ""
    for chunk in [text] if isinstance(text, str) else text.chunks():
        beginning = beginning or chunk
        n, n_bytes = n + len(chunk), n_bytes + len(chunk.encode("utf-8"))
    if not but_first or not len(ids):
        return n, n_bytes
    if tokenizer.unit == "byte":
        return n - int(ids[0] < 128), n_bytes - 1
    first = tokenizer.decode(ids[:1])
    if not beginning.startswith(first):
        first = beginning[: len(first.rstrip("\N{REPLACEMENT CHARACTER}"))]  # a decoder may make any text of a token
    return n - len(first), n_bytes - len(first.encode("utf-8"))


def total_of(scores: Sequence[Score]) -> Score:
    """Score of all documents together."""
    sizes = [[s.characters for s in scores], [s.n_bytes for s in scores]]
    sums = [None if any(size is None for size in column) else sum(column) for column in sizes]  # type: ignore[arg-type]
    return Score(sum(s.tokens for s in scores), math.fsum(s.nats for s in scores), *sums)
