"""Log-probabilities of given tokens in many sequences of different lengths, in a few compiled shapes.

Sequences are sorted by length and padded on the right, where a causal model does not see it. Logits are computed at
the scored positions alone.

Axes: B rows of a batch, S tokens of a row, N scored positions, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.cross_entropy import token_log_probs
from jaxmodels.protocols import DividedReadout

BATCH_TOKENS = 4096  # tokens of a batch by default


@dataclasses.dataclass(frozen=True)
class Row:
    """A sequence and the tokens to score in it.

    ids: int [n], the model's input. positions: int [k], indices into ids. targets: int [k], the token whose
    probability after ids[: position + 1] is asked for.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class RowScores:
    """log_probs: float [k], of a row's targets. greedy: bool [k], True where the target is the most likely token."""

    log_probs: np.ndarray
    greedy: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are computed together. rows: their indices. shape: (B, S)."""

    rows: list[int]
    shape: tuple[int, int]


def check_model(model: Any) -> None:
    """Raises ValueError if a model is not a language model."""
    if getattr(model, "sequence_axis", None) not in (0, 1):
        raise ValueError(f"model is a {type(model).__name__} without sequence_axis (0 or 1); scoring needs it")


def vocabulary_size(model: Any) -> int:
    """Number of logits of a language model; raises ValueError if it is not one."""
    check_model(model)
    ids = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    return jax.eval_shape(lambda model, ids: model(ids), model, ids).shape[-1]


def score_rows(
    model: Any,
    rows: Sequence[Row],
    *,
    batch_size: int | None = None,
    longest: int | None = None,
    greedy: bool = False,
) -> list[RowScores]:
    """Log-probabilities of the rows' targets, in the order given.

    batch_size: rows of a batch; default as many as have BATCH_TOKENS tokens. longest: most tokens that the model takes.
    greedy: also find where the target is the most likely token.
    """
    found: list[RowScores | None] = [None] * len(rows)
    pending: list[tuple[Batch, Any]] = []

    def finish(batch: Batch, arrays: Any) -> None:
        log_probs, first = np.asarray(arrays[0]), None if arrays[1] is None else np.asarray(arrays[1])
        at = 0
        for i in batch.rows:
            part = slice(at, at := at + len(rows[i].positions))
            found[i] = RowScores(log_probs[part], None if first is None else first[part])

    for batch in batches([len(row.ids) for row in rows], batch_size, longest):
        pending.append((batch, compute(model, [rows[i] for i in batch.rows], batch.shape, greedy)))
        if len(pending) > 1:  # fetch one batch while the next is computed
            finish(*pending.pop(0))
    for item in pending:
        finish(*item)
    return [scores for scores in found if scores is not None]


def batches(lengths: Sequence[int], batch_size: int | None, longest: int | None) -> Iterator[Batch]:
    """Divide rows of these lengths into batches, the longest first; each shape compiles another program."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        s = padded_length(lengths[order[0]])
        s = s if longest is None else min(s, longest)
        b = batch_size or max(1, BATCH_TOKENS // s)
        b = min(b, 1 << (len(order) - 1).bit_length())  # few rows do not fill a batch
        yield Batch(order[:b], (b, s))
        order = order[b:]


def padded_length(n: int) -> int:
    """Round a length up to one of four sizes per power of two, 16 at least: 16, 20, 24, 28, 32, 40, …"""
    if n <= 16:
        return 16
    step = 1 << ((n - 1).bit_length() - 3)
    return -(-n // step) * step


def compute(model: Any, rows: Sequence[Row], shape: tuple[int, int], greedy: bool) -> Any:
    """Start the computation of a batch: arrays of at least as many scored positions as the rows have together."""
    b, s = shape
    ids = np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
    if model.sequence_axis == 0:
        ids, step, jump = ids.T, b, 1
    else:
        step, jump = 1, s
    n = sum(len(row.positions) for row in rows)
    size = b * s if n <= b * s else 1 << (n - 1).bit_length()
    positions, targets = np.zeros((2, size), np.int32)
    positions[:n] = np.concatenate([i * jump + row.positions * step for i, row in enumerate(rows)])
    targets[:n] = np.concatenate([row.targets for row in rows])
    return _compute(model, ids, positions, targets, np.int32(n), greedy)


@functools.partial(jax.jit, static_argnames="greedy")
def _compute(
    model: Any, ids: jax.Array, positions: jax.Array, targets: jax.Array, n: jax.Array, greedy: bool
) -> tuple[jax.Array, jax.Array | None]:
    divided = isinstance(model, DividedReadout)
    x = model.features(ids) if divided else model(ids)  # [B, S, D] or the logits; by sequence_axis [S, B, …]
    return token_log_probs(
        model.read if divided else lambda logits: logits,
        x.reshape(-1, x.shape[-1]),
        positions,
        targets,
        n,
        greedy=greedy,
    )
