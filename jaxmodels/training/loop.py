"""Training loop with asynchronous dispatch, evaluation, and the `Trainer` of a run.

A step is dispatched before the loss of the previous one is fetched, so that the device never waits for Python. All
losses are checked before a checkpoint is saved or a report is printed.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console

from jaxmodels.process.distributed import agree, is_first
from jaxmodels.process.signals import Stop
from jaxmodels.process.texts import visible
from jaxmodels.sharding import check_batch, make_mesh
from jaxmodels.training import metrics
from jaxmodels.training.checkpoints import Checkpoints, Position
from jaxmodels.training.config import Options
from jaxmodels.training.data import Batches, Example, Task, in_batches, stack
from jaxmodels.training.experiment import Experiment, missing_decoding
from jaxmodels.training.plan import flops
from jaxmodels.training.run import has_begun, read_about, write_about
from jaxmodels.training.step import Batch, Metrics, Program, State, stop_sharding, without_optimizer


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


class Loop:
    """Loop that takes steps from `position` on and updates it.

    length_at(step): number of leading tokens of each sequence that a step uses; None for all. A step is compiled when
    its length changes.
    """

    def __init__(
        self,
        program: Program,
        position: Position,
        batches: Batches,
        stop: Stop,
        callbacks: Callbacks,
        length_at: Callable[[int], int | None] = lambda step: None,
    ):
        self.program, self.position, self.batches = program, position, batches
        self.stop, self.callbacks, self.length_at = stop, callbacks, length_at
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
        self.compiled = self.program.lower_step(batch, self.length).compile()
        self.callbacks.on_compile(self.length or batch["tokens"].shape[1] - 1, time.perf_counter() - began)

    def advance(self, until: int) -> bool:
        """Take steps until `until` are taken or any process is signaled to stop; returns False if one was.

        The position is complete on return. Raises ValueError that names the step if a loss or gradient is not finite.
        """
        assert self.batch is not None, "compile() comes first"
        while self.position.step < until:
            step = self.position.step
            if self.length_at(step) != self.length:
                self.compile(self.batch)
            change = next((later for later in range(step, until) if self.length_at(later) != self.length), until)
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
            state, metrics = self.compiled(state, batch, self.flags[bool(self.stop)])
            taken += 1
            if pending is not None:
                stopping = self.record(pending)
            pending = metrics
        if pending is not None:
            stopping |= self.record(pending)
            self.position.state, self.position.data = state, self.batches.get_state()
        return not stopping

    def record(self, metrics: Metrics) -> bool:
        """Wait for a step and record its loss; returns True if any process was signaled to stop.

        Raises ValueError like `advance`.
        """
        loss, squares, stop = (np.asarray(value) for value in (metrics.loss, metrics.squares, metrics.stop))
        step = self.position.step + 1
        norm = math.sqrt(squares.astype(np.float64).sum())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = self.not_finite(loss, squares)
            raise ValueError(f"step {step}: {what}; the step is not saved; try a smaller learning rate")
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

    def __call__(self, state: State) -> float | None:
        """Nats per token, each counted once; None if any process was signaled to stop."""
        if agree(bool(self.stop)):  # before compiling
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
            if len(pending) > 1:  # add up one batch while the next is computed
                total += sum_of_rows(*pending.pop(0))
            if agree(bool(self.stop)):
                return None
        return (total + sum(sum_of_rows(*rows) for rows in pending)) / tokens


def sum_of_rows(rows: jax.Array, n: int) -> float:
    """Sum of the first n rows' losses, in float64."""
    return float(np.asarray(rows)[:n].sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Result:
    """Validation loss of a finished run, name and loss of its baseline, and its number of trained parameters."""

    loss: float
    baseline: tuple[str, float] | None
    parameters: int


class Trainer:
    """A run, new or resumed from its folder: its task, program, checkpoints, batches and position.

    Raises ValueError before any work if the configuration, data, mesh and folder do not fit together, or if the model
    lacks what the run needs. `train` closes it.
    """

    def __init__(self, experiment: Experiment[Any], folder: Path, options: Options):
        self.experiment, self.config, self.folder, self.options = experiment, experiment.config, folder, options
        mesh = make_mesh(options.mesh)
        check_batch(mesh, self.config.batch_size, self.config.accumulate)
        resumed = has_begun(folder)
        if resumed:
            experiment.resume(folder)
        self.task: Task = experiment.task()
        self.program = experiment.program(len(self.task.vocabulary), mesh)
        experiment.check(self.program.abstract)
        if resumed and read_about(folder).sha256 != self.task.sha256:
            raise ValueError(
                f"{folder} was trained on another text than {self.config.text}: resume with its own --text"
            )
        with contextlib.ExitStack() as stack:
            self.checkpoints = Checkpoints(folder, self.program, self.config.keep, self.config.keep_every)
            stack.callback(self.checkpoints.close)
            self.batches = Batches(self.task.train, self.config.batch_size, mesh)
            stack.callback(self.batches.close)
            position = self.checkpoints.restore()
            if position is None:
                initial = experiment.initial(self.program, self.task.vocabulary)
                position = Position(initial, self.batches.get_state())
            self.position = position
            self.batches.set_state(position.data)
            original = None if resumed else experiment.original()
            agree(False)  # a barrier: every process reads before one writes
            if is_first():
                about = read_about(folder).original if resumed else original.about() if original else {}
                write_about(folder, experiment, self.task.sha256, about)
                if original is not None:
                    original.companions.write(folder)
                self.task.vocabulary.save(folder / "vocabulary.json")
            self.stack = stack.pop_all()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and release the run's lock."""
        self.stack.close()

    def held_out(self) -> Sequence[Example]:
        """Examples of a validation."""
        return self.experiment.validation_subset(self.task.validation)

    def train(self, stop: Stop, console: Console) -> float | None:
        """Train to the last step, saving and reporting: returns the last validation loss, or None if it was stopped.

        Raises ValueError if a loss is not finite.
        """
        with self.stack:
            self.stop, self.console = stop, console
            self.evaluation = Evaluation(self.program, self.held_out(), self.config.batch_size, stop)
            self.log: metrics.Log | None = None
            if is_first():
                self.log = metrics.Log(self.folder, self.position.losses, tensorboard=self.options.tensorboard)
                self.stack.callback(self.log.close)
            flops_per_step = flops.of_step(self.program, self.experiment.abstract_batch())
            self.line = self.stack.enter_context(self.progress_line(flops_per_step))
            if self.position.step and self.is_due():
                self.report()  # the run was stopped between saving and reporting
            loop = Loop(self.program, self.position, self.batches, stop, self, self.experiment.length_at)
            if not self.is_done() and not agree(bool(stop)):
                console.print(f"{flops_per_step / 1e9:,.3g} GFLOP in a step's matrix products")
                loop.compile(self.experiment.abstract_batch())
            trace = metrics.Trace(self.folder / "profile", self.position.step, self.options.profile)
            self.stack.callback(trace.close)
            while not self.is_done() and not agree(bool(stop)):
                due = self.next_report()
                finished = loop.advance(trace.until(due))
                trace.at(self.position.step)
                if finished and self.position.step < due:
                    continue
                self.checkpoints.save(self.position)
                if self.is_due():
                    self.report()
            self.checkpoints.wait()
            return self.report() if self.is_done() else None

    def progress_line(self, flops_per_step: int) -> metrics.Line:
        known = flops.peak(jax.devices()[0].device_kind)
        peak = None if known is None else known[0] * self.program.mesh.size
        tokens = self.config.batch_size * self.config.seq_len
        return metrics.Line(self.console, self.config.steps, self.position.step, tokens, flops_per_step, peak)

    def is_done(self) -> bool:
        return self.position.step >= self.config.steps

    def is_due(self) -> bool:
        """True if a report is due at this step; the one of the last step is made by `train`."""
        return not self.is_done() and self.position.step % self.config.every == 0

    def next_report(self) -> int:
        """Step after which the next report is due."""
        every = self.config.every
        return min(self.config.steps, self.position.step - self.position.step % every + every)

    def report(self) -> float | None:
        """Validate, sample, print and log; returns the validation loss, or None if it was stopped."""
        loss = self.evaluation(self.position.state)
        if loss is None:
            return None
        model = self.program.model(self.position.state, self.config.compute_dtype)
        text, numbers = self.experiment.report(model, self.task, lambda: agree(bool(self.stop)))
        recent = np.mean(self.position.losses[-100:])
        sample = f", written greedily:\n{visible(text, keep=chr(10))}".replace("\n", "\n    ") if text else ""
        self.console.print(f"step {self.position.step}: loss {recent:.3f}, validation loss {loss:.3f}{sample}")
        if self.log is not None:
            self.log.write(self.position.step, {"validation_loss": loss, **numbers})
        return loss

    def on_step(self, metrics: StepMetrics) -> None:
        self.line.advance(
            metrics.loss, metrics.seconds, self.experiment.length_at(metrics.step - 1) / self.config.seq_len
        )
        if self.log is not None:
            self.log.step(metrics.step, metrics.loss, metrics.grad_norm, metrics.seconds)

    def on_compile(self, length: int, seconds: float) -> None:
        part = "" if length == self.config.seq_len else f" for {length} tokens"
        self.console.print(f"the step{part} compiled in {seconds:.1f} s")

    def run(self, stop: Stop, console: Console, resume: str) -> Result | None:
        """Train to the last step and print the result; None if stopped, after printing `resume`, the command to go on.

        Raises ValueError if a loss is not finite.
        """
        unit, parameters, total = self.task.vocabulary.unit, self.program.parameters, self.program.all_parameters
        of_all = "" if parameters == total else f"trained of {total:,} "
        console.print(f"{self.task.about}; {parameters:,} {of_all}parameters")
        for sentence in self.experiment.warnings():
            console.print(f"warning: {sentence}")
        if self.position.step:
            console.print(f"resuming at step {self.position.step}")
        if type(self.experiment).report is Experiment.report and missing_decoding(self.program.abstract):
            missing = ", ".join(missing_decoding(self.program.abstract))
            console.print(f"reports have no sample: {type(self.program.abstract).__name__} has no {missing}")
        predicted = len(self.held_out()) * self.config.seq_len
        baseline = self.experiment.baseline(self.task, predicted)
        if baseline is not None:
            console.print(f"{baseline[0]}: validation loss {baseline[1]:.3f} nats per {unit}")
        loss = self.train(stop, console)
        if loss is None:
            console.print(f"stopped at step {self.position.step}; continue with: {resume}")
            return None
        console.print(f"\nvalidation loss, nats per {unit}, over the same {predicted:,}")
        if baseline is not None:
            console.print(f"    {baseline[1]:.3f}  {baseline[0]}")
        console.print(f"    {loss:.3f}  this model after {self.position.step:,} steps")
        return Result(loss, baseline, parameters)
