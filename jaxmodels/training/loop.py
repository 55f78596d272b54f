"""Training loop with asynchronous dispatch, and evaluation.

A step is dispatched before the loss of the previous one is fetched, so that the device never waits for Python. All
losses are checked before a checkpoint is saved or a report is printed.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxmodels.process.distributed import agree
from jaxmodels.training.checkpoints import Position
from jaxmodels.training.data import Batches, Example, in_batches
from jaxmodels.training.signals import Stop
from jaxmodels.training.step import Batch, Metrics, Program, State, stop_sharding, without_optimizer

AHEAD = 1_000  # steps that are taken without looking for a change of the texts' length


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Host-side metrics of a finished step."""

    step: int
    loss: float
    grad_norm: float
    seconds: float  # since the previous step


class Callbacks(Protocol):
    """Receiver of a loop's events."""

    def on_step(self, metrics: StepMetrics) -> None:
        """Called after each step, in order."""

    def on_compile(self, length: int, seconds: float) -> None:
        """Called when a step for sequences of `length` tokens was compiled."""


class Diverged(ValueError):
    """A loss, gradient or parameter of a run is not finite."""


class Loop:
    """Loop that takes steps from `position` on and updates it.

    length_at(step): number of leading tokens of each sequence that a step uses; None for all. A step is compiled when
    its length changes. paused(): asked at each step; the loop then stops as at a signal.
    """

    def __init__(
        self,
        program: Program,
        position: Position,
        batches: Batches,
        stop: Stop,
        callbacks: Callbacks,
        length_at: Callable[[int], int | None] = lambda step: None,
        paused: Callable[[], bool] = lambda: False,
    ):
        self.program, self.position, self.batches = program, position, batches
        self.stop, self.callbacks, self.length_at, self.paused = stop, callbacks, length_at, paused
        self.batch: Batch | None = None
        self.length: int | None = None
        self.compiled: Callable[..., Any] | None = None
        size, sharding = program.mesh.size, stop_sharding(program.mesh)
        self.flags = {
            stopping: jax.make_array_from_callback((size,), sharding, np.full(size, stopping).__getitem__)
            for stopping in (False, True)
        }

    def compile(self, batch: Batch) -> None:
        """Compile the next step for batches of these shapes, which may be abstract; the step then accepts no others."""
        self.batch, self.length = batch, self.length_at(self.position.step)
        began = time.perf_counter()
        self.compiled = self.program.compile(self.program.lower_step(batch, self.length))
        self.callbacks.on_compile(self.length or batch["tokens"].shape[1] - 1, time.perf_counter() - began)

    def advance(self, until: int) -> bool:
        """Take steps until `until` are taken or any process is signaled or paused; returns False if one was.

        The position is complete on return. Raises Diverged that names the step if a loss or gradient is not finite.
        """
        assert self.batch is not None, "compile() comes first"
        while self.position.step < until:
            step = self.position.step
            if self.length_at(step) != self.length:
                self.compile(self.batch)
            ahead = min(until, step + AHEAD)
            change = next((later for later in range(step, ahead) if self.length_at(later) != self.length), ahead)
            if not self.advance_same_length(change):
                return False
        return True

    def advance_same_length(self, until: int) -> bool:
        """Body of `advance` for steps of one length."""
        assert self.compiled is not None
        pending: Metrics | None = None
        stopping = False
        state, taken = self.position.state, self.position.step
        self.clock = time.perf_counter()
        while taken < until and not stopping:
            batch = next(self.batches)
            state, metrics = self.compiled(state, batch, self.flags[bool(self.stop) or self.paused()])
            taken += 1
            if pending is not None:
                stopping = self.record(pending)
            pending = metrics
        if pending is not None:
            stopping |= self.record(pending)
            self.position.state, self.position.data = state, self.batches.get_state()
        return not stopping

    def record(self, metrics: Metrics) -> bool:
        """Wait for a step and record its loss; returns True if any process was signaled or paused.

        Raises Diverged like `advance`.
        """
        loss, squares, stop = (np.asarray(value) for value in (metrics.loss, metrics.squares, metrics.stop))
        step = self.position.step + 1
        norm = math.sqrt(squares.astype(np.float64).sum())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = self.not_finite(loss, squares)
            raise Diverged(f"step {step}: {what}; the step is not saved")
        now = time.perf_counter()
        self.position.losses.append(float(loss))
        self.callbacks.on_step(StepMetrics(step, float(loss), norm, now - self.clock))
        self.clock = now
        return bool(stop)

    def not_finite(self, loss: np.ndarray, squares: np.ndarray) -> str:
        """Describe the values of a step that are not finite: the loss, and the first three gradients."""
        names = sorted(self.program.trained)
        wrong = [name for name, square in zip(names, squares, strict=True) if not np.isfinite(square)]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        parts = [] if math.isfinite(loss) else [f"the loss is {loss}"]
        parts += [f"the gradients of {', '.join(wrong[:3])}{more} are not finite"] if wrong else []
        return "; ".join(parts)


class Evaluation:
    """Mean loss over held-out examples, without dropout. Compiled at its first call."""

    def __init__(self, program: Program, examples: Sequence[Example], batch_size: int, stop: Stop):
        self.program, self.examples, self.batch_size, self.stop = program, examples, batch_size, stop
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, state: State, batches: int | None = None) -> float | None:
        """Nats per token, each counted once; None if any process was signaled to stop.

        batches: number of leading batches to evaluate; default all.
        """
        if agree(bool(self.stop)):  # before compiling
            return None
        if self.compiled is None:
            example = self.examples[0].items()
            batch = {name: jax.ShapeDtypeStruct((self.batch_size, *a.shape), a.dtype) for name, a in example}
            self.compiled = self.program.compile(self.program.lower_evaluation(batch))
        state = without_optimizer(state)
        total, tokens = 0.0, 0
        pending: list[tuple[jax.Array, int]] = []
        placed = in_batches(self.examples, self.batch_size, self.program.mesh)
        for rows, n, predicted in itertools.islice(placed, batches):
            pending.append((self.compiled(state, rows), n))
            tokens += predicted
            if len(pending) > 1:  # add up one batch while the next is computed
                total += sum_of_rows(*pending.pop(0))
            if agree(bool(self.stop)):
                return None
        return (total + sum(sum_of_rows(*rows) for rows in pending)) / tokens


def sum_of_rows(rows: jax.Array, n: int) -> float:
    """Sum of the first n rows' losses, in float64."""
    return float(np.asarray(rows)[:n].sum(dtype=np.float64))
