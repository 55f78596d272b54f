"""Log-probabilities of given tokens in many sequences of different lengths, in a few compiled shapes.

Sequences are sorted by length and padded on the right, where a causal model does not see it. Logits are computed at
the scored positions alone.

Axes: B rows of a batch, S tokens of a row, N scored positions, V vocabulary.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import native
from jaxmodels.cross_entropy import chunks, token_log_probs
from jaxmodels.layers import hooks
from jaxmodels.protocols import has_divided_readout

Programs = dict[tuple[tuple[int, int], int], Future[Any]]  # by shape and number of scored positions
BATCH_TOKENS = 4096  # tokens of a batch by default
WORKERS = 2  # batches computed, and programs compiled, at a time on one device


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
class Settings:
    """Settings of a compiled batch: as in `score_rows`, and as in `jaxmodels.cross_entropy.chunks`."""

    greedy: bool
    chunk: int | None
    platform: str
    devices: int


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
    chunk: int | None = None,
    programs: Programs | None = None,
) -> list[RowScores]:
    """Log-probabilities of the rows' targets, in the order given.

    batch_size: rows of a batch; default as many as have BATCH_TOKENS tokens. longest: most tokens that the model takes.
    greedy: also find where the target is the most likely token. chunk: tokens whose logits are computed together; see
    `jaxmodels.cross_entropy`. programs: compiled programs of earlier calls with the same model and settings, to which
    this one's are added.
    """
    found: list[RowScores | None] = [None] * len(rows)
    planned = list(batches([len(row.ids) for row in rows], batch_size, longest))
    devices = devices_of(model)
    # Two batches at a time on one device: what runs on one core in one of them, as compilation, leaves a core to the
    # other. On several devices, concurrent programs would wait for each other's collectives.
    workers = WORKERS if len(devices) == 1 else 1
    settings = Settings(greedy, chunk, devices[0].platform, len(devices))
    programs = {} if programs is None else programs

    def run(batch: Batch, program: Future[Any], arguments: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        return [np.asarray(array) for array in program.result()(model, *arguments) if array is not None]

    with pool(workers) as compiling, pool(workers) as running:
        pending = []
        for batch in planned:
            arguments = inputs(model, [rows[i] for i in batch.rows], batch.shape)
            key = batch.shape, len(arguments[1])
            if key not in programs:  # traced here: settings such as enable_x64 are this thread's
                programs[key] = compiling.submit(_compute.lower(model, *arguments, settings).compile)
            pending.append((batch, running.submit(run, batch, programs[key], arguments)))
        for batch, future in pending:
            log_probs, *first = future.result()
            at = 0
            for i in batch.rows:
                part = slice(at, at := at + len(rows[i].positions))
                found[i] = RowScores(log_probs[part], first[0][part] if first else None)
    return [scores for scores in found if scores is not None]


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that, if the block raises, finish only what they have begun."""
    executor = ThreadPoolExecutor(workers)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def devices_of(model: Any) -> list[Any]:
    """Devices that hold a model's arrays."""
    arrays = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
    found = {device for array in arrays for device in array.devices()}
    return sorted(found, key=lambda device: device.id) or jax.devices()[:1]


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


def inputs(model: Any, rows: Sequence[Row], shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Arguments of `_compute`: ids; positions and targets, at least as many as the rows have; their number."""
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
    return ids, positions, targets, np.asarray(n, np.int32)


@functools.partial(jax.jit, static_argnames="settings")
def _compute(
    model: Any, ids: jax.Array, positions: jax.Array, targets: jax.Array, n: jax.Array, settings: Settings
) -> tuple[jax.Array, jax.Array | None]:
    divided = has_divided_readout(model)
    product = native.large_product if settings.platform == "cpu" and settings.devices == 1 else None
    with (
        hooks(product=product),
        chunks(settings.chunk, settings.platform, settings.devices, forward_only=True),
    ):
        x = model.features(ids) if divided else model(ids)  # [B, S, D] or the logits; by sequence_axis [S, B, …]
        return token_log_probs(
            model.read if divided else lambda logits: logits,
            x.reshape(-1, x.shape[-1]),
            positions,
            targets,
            n,
            greedy=settings.greedy,
        )
