"""The training loop, one for every script: steps without waiting for their losses, and evaluation.

A step is dispatched before the loss of the one before it is fetched, so the device never waits for Python. Nothing is
saved or reported before every loss up to there has been looked at.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.training.checkpoints import Position
from jaxmodels.training.data import Batches, Example, in_batches, stack
from jaxmodels.training.distributed import agree
from jaxmodels.training.signals import Stop
from jaxmodels.training.step import Batch, Metrics, Program, stop_sharding, without_optimizer


@dataclasses.dataclass(frozen=True)
class Told:
    """What is known of a step once it is done."""

    step: int
    loss: float
    grad_norm: float
    seconds: float  # since the step before was


class Loop:
    """Takes steps from `position` on; tell(Told) is called for each in turn.

    A step is compiled once; where length_at(step), the tokens of a sequence that it computes with, changes as training
    goes on, once for each. compiled(length, seconds) is told of it.
    """

    def __init__(
        self,
        program: Program,
        position: Position,
        batches: Batches,
        stop: Stop,
        tell: Callable[[Told], None],
        length_at: Callable[[int], int | None] = lambda step: None,
        compiled: Callable[[int, float], None] = lambda length, seconds: None,
    ):
        self.program, self.position, self.batches, self.stop, self.tell = program, position, batches, stop, tell
        self.length_at, self.told_compiled = length_at, compiled
        self.batch: Batch | None = None
        self.length: int | None = None
        self.compiled: Callable[..., Any] | None = None
        size, sharding = program.mesh.size, stop_sharding(program.mesh)
        self.flags = {
            wish: jax.make_array_from_callback((size,), sharding, np.full(size, wish).__getitem__)
            for wish in (False, True)
        }

    def compile(self, batch: Batch) -> None:
        """Compiles the next step for batches of this shape, which may be abstract; another is an error from then on."""
        self.batch, self.length = batch, self.length_at(self.position.step)
        began = time.perf_counter()
        self.compiled = self.program.lower_step(batch, self.length).compile()
        self.told_compiled(self.length or batch["tokens"].shape[1] - 1, time.perf_counter() - began)

    def advance(self, until: int) -> bool:
        """Steps until so many are taken, or any process is asked to end; whether none was.

        The position is complete on return. Raises ValueError where a loss or gradient is not finite, naming the step.
        """
        assert self.batch is not None, "compile() comes first"
        while self.position.step < until:
            step = self.position.step
            if self.length_at(step) != self.length:
                self.compile(self.batch)
            change = next((later for later in range(step, until) if self.length_at(later) != self.length), until)
            if not self.advance_alike(change):
                return False
        return True

    def advance_alike(self, until: int) -> bool:
        """`advance` over steps of one length."""
        assert self.compiled is not None
        pending: Metrics | None = None
        asked = False
        state, taken = self.position.state, self.position.step
        self.clock = time.perf_counter()
        while taken < until and not asked:
            batch = next(self.batches)
            state, metrics = self.compiled(state, batch, self.flags[bool(self.stop)])
            taken += 1
            if pending is not None:
                asked = self.look_at(pending)
            pending = metrics
        if pending is not None:
            asked |= self.look_at(pending)
            self.position.state, self.position.data = state, self.batches.get_state()
        return not asked

    def look_at(self, metrics: Metrics) -> bool:
        """Waits for a step and records it; whether any process was asked to end. Raises ValueError as `advance`."""
        loss, squares, stop = (np.asarray(value) for value in (metrics.loss, metrics.squares, metrics.stop))
        step = self.position.step + 1
        norm = math.sqrt(squares.astype(np.float64).sum())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            names = sorted(self.program.trained)
            wrong = [name for name, square in zip(names, squares, strict=True) if not np.isfinite(square)]
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            gradients = f"the gradients of {', '.join(wrong[:3])}{more} are not finite" if wrong else ""
            parts = [f"the loss is {loss}", gradients] if not math.isfinite(loss) else [gradients]
            what = "; ".join(filter(None, parts))
            raise ValueError(f"step {step}: {what}; nothing of it is saved; a smaller learning rate may help")
        now = time.perf_counter()
        self.position.losses.append(float(loss))
        self.tell(Told(step, float(loss), norm, now - self.clock))
        self.clock = now
        return bool(stop)


class Evaluation:
    """Mean loss over held-out examples, without dropout, compiled at its first use."""

    def __init__(self, program: Program, examples: Sequence[Example], batch_size: int, stop: Stop):
        self.program, self.examples, self.batch_size, self.stop = program, examples, batch_size, stop
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, state: Any) -> float | None:
        """Nats per token, each counted once; None where any process was asked to end."""
        if agree(bool(self.stop)):  # before it compiles
            return None
        if self.compiled is None:
            batch = stack([self.examples[0]] * self.batch_size)
            self.compiled = self.program.lower_evaluation(batch).compile()
        state = without_optimizer(state)
        total, tokens = 0.0, 0
        pending: list[tuple[jax.Array, int]] = []
        for rows, n in in_batches(self.examples, self.batch_size, self.program.mesh):
            pending.append((self.compiled(state, rows), n))
            tokens += n * (rows["tokens"].shape[1] - 1)
            if len(pending) > 1:  # one is computed while the one before is added
                total += add(pending.pop(0))
            if agree(bool(self.stop)):
                return None
        return (total + sum(map(add, pending))) / tokens


def add(rows_and_number: tuple[jax.Array, int]) -> float:
    """The first n of the sums of a batch's rows, added in float64."""
    rows, n = rows_and_number
    return float(np.asarray(rows)[:n].sum(dtype=np.float64))
