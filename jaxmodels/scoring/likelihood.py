"""Log-likelihood of continuations after contexts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.scoring.documents import check_document, checked_vocabulary, encoded
from jaxmodels.scoring.rows import Row, score_rows


class Likelihood(NamedTuple):
    """Log-probability of a continuation in nats, and whether greedy decoding would write it."""

    log_prob: float
    greedy: bool


def loglikelihood(
    model: Any,
    contexts: Sequence[Sequence[int]] | Sequence[np.ndarray],
    continuations: Sequence[Sequence[int]] | Sequence[np.ndarray],
    *,
    max_length: int | None = None,
    batch_size: int | None = None,
) -> list[Likelihood]:
    """Score continuations, sequences of ids, after contexts, sequences of at least one id; in the order given.

    max_length: most tokens that the model reads; longer pairs lose the beginning of the context. batch_size: rows that
    are computed together; default as many as have 4,096 tokens.

    Pairs that differ in the last token of the continuation alone, as those of many multiple-choice questions, are
    computed once. Raises ValueError if a context is empty, a continuation does not fit max_length, an id is outside the
    model's vocabulary, or a log-probability is NaN.
    """
    if len(contexts) != len(continuations):
        raise ValueError(f"{len(contexts)} contexts and {len(continuations)} continuations must be equally many")
    pairs = [
        (encoded(a, i, None), encoded(b, i, None)) for i, (a, b) in enumerate(zip(contexts, continuations, strict=True))
    ]
    n_vocab = checked_vocabulary(model, None)
    for i, pair in enumerate(pairs):
        check_document(i, np.concatenate(pair), n_vocab)
    shared: dict[tuple[bytes, int], int] = {}  # input and length of the continuation -> index of a row
    inputs: list[np.ndarray] = []
    targets: list[list[np.ndarray]] = []
    places: list[tuple[int, int]] = []  # of each pair: its row, and its number among those of the row
    for i, (context, continuation) in enumerate(pairs):
        if not len(context):
            raise ValueError(f"context {i} is empty; begin it with a token such as bos")
        if max_length is not None and len(continuation) > max_length:
            raise ValueError(f"continuation {i} has {len(continuation)} tokens, more than max_length={max_length}")
        ids = np.concatenate([context, continuation])[:-1]
        ids = ids if max_length is None else ids[-max_length:]
        row = shared.setdefault((ids.tobytes(), len(continuation)), len(inputs))
        if row == len(inputs):
            inputs.append(ids)
            targets.append([])
        places.append((row, len(targets[row])))
        targets[row].append(continuation)
    rows = []
    for ids, wanted in zip(inputs, targets, strict=True):
        k = len(wanted[0])
        rows.append(Row(ids, np.tile(np.arange(len(ids) - k, len(ids)), len(wanted)), np.concatenate(wanted)))
    found = score_rows(model, rows, batch_size=batch_size, longest=max_length, greedy=True)
    likelihoods: list[Likelihood] = []
    for (row, number), (_, continuation) in zip(places, pairs, strict=True):
        part = slice(number * len(continuation), (number + 1) * len(continuation))
        first = found[row].greedy
        assert first is not None, "greedy=True"
        log_prob = found[row].log_probs[part].sum(dtype=np.float64)
        if np.isnan(log_prob):
            i = len(likelihoods)
            raise ValueError(f"log-probability of continuation {i} is nan; the model's weights must be finite")
        likelihoods.append(Likelihood(float(log_prob), bool(first[part].all())))
    return likelihoods
