"""`Trainer` of a run: from its folder to its result, with checkpoints and reports on the way."""

import contextlib
import dataclasses
import math
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxmodels.convert.companions import Companions
from jaxmodels.io.steps import steps
from jaxmodels.process.distributed import agree, is_first
from jaxmodels.process.streams import say
from jaxmodels.process.texts import visible
from jaxmodels.sharding import check_batch, make_mesh
from jaxmodels.text import load_vocabulary
from jaxmodels.training import metrics
from jaxmodels.training.checkpoints import Checkpoints, Position
from jaxmodels.training.config import Options
from jaxmodels.training.data import Batches, Example, Task, n_predicted
from jaxmodels.training.experiment import Experiment, missing_decoding
from jaxmodels.training.loop import Diverged, Evaluation, Loop, StepMetrics
from jaxmodels.training.plan import flops
from jaxmodels.training.reporting.profile import Trace
from jaxmodels.training.reporting.progress import Line
from jaxmodels.training.reporting.trackers import Callback, Function, TensorBoard, Tracker, Trackers, WandB
from jaxmodels.training.runs.agreement import FILE, check_model
from jaxmodels.training.runs.folder import Branch, expected, has_begun, read_about, write_about
from jaxmodels.training.runs.unnamed import is_signed
from jaxmodels.training.signals import Stop, Stopped, at_once

VOCABULARY = "vocabulary.json"  # of a run
SMALL_BATCH = 2**20  # tokens of a batch for any text
LARGEST_BATCH = 2**24  # tokens of a batch of examples; GPT-NeoX-20B was trained with 3.15 million


@dataclasses.dataclass(frozen=True)
class Result:
    """Validation loss of a finished run, name and loss of its baseline, and its number of trained parameters."""

    loss: float
    baseline: tuple[str, float] | None
    parameters: int


def check_tokens(batch_size: int, seq_len: int, task: Task) -> None:
    """Raises ValueError if a batch has more tokens than its text needs; one of an unknown run could fill the memory.

    At most as many as the text has, or SMALL_BATCH; LARGEST_BATCH for data of another kind.
    """
    tokens = batch_size * seq_len
    most = LARGEST_BATCH if task.train_ids is None else max(SMALL_BATCH, len(task.train_ids))
    if tokens > most:
        raise ValueError(
            f"batch_size={batch_size:,} of seq_len={seq_len:,} are {tokens:,} tokens; at most {most:,} with this text"
        )


class Trainer:
    """A run, new or resumed from its folder: its task, program, checkpoints, batches and position.

    branch: checkpoint of another run that a new run begins with. program: the command that trains, for advice.
    callback: called with each step's and validation's numbers.
    Raises ValueError before any work if the configuration, data, mesh and folder do not fit together, or if the model
    lacks what the run needs. `train` closes it.
    """

    def __init__(
        self,
        experiment: Experiment[Any],
        folder: Path,
        options: Options,
        branch: Branch | None = None,
        program: str | None = None,
        callback: Callback | None = None,
    ):
        self.experiment, self.config, self.folder, self.options = experiment, experiment.config, folder, options
        self.command, self.callback = program, callback
        mesh = make_mesh(options.mesh)
        check_batch(mesh, self.config.batch_size, self.config.accumulate)
        resumed, source = has_begun(folder), folder if branch is None else branch.run
        if (source / FILE).exists():
            experiment.recorded = read_about(source).sha256
        recorded = read_about(folder).branches if (folder / FILE).exists() else []
        if resumed:
            branch = None
            experiment.resume(folder)
        elif branch is None and recorded:  # killed before its first checkpoint
            origin, step = recorded[-1]["run"], recorded[-1]["step"]
            if experiment.unnamed or not is_signed(folder / FILE):
                raise ValueError(
                    f"{folder} was branched from {origin}, which would be copied into it; if you trust it, name it "
                    f"yourself, with the flags that it changes: --branch {shlex.quote(origin)} --from-step {step}"
                )
            branch = Branch.of(recorded[-1])
        if branch is not None:
            branch.check(experiment)
            experiment.resume(branch.run)
        known = (folder if branch is None else branch.run) / VOCABULARY
        is_known = branch is not None or (resumed and known.exists())
        vocabulary = load_vocabulary(known) if is_known else None
        if branch is not None or recorded:  # another text is encoded in the first run's vocabulary
            experiment.vocabulary = vocabulary
        self.task: Task = experiment.task()
        check_tokens(self.config.batch_size, self.config.seq_len, self.task)
        if resumed and read_about(folder).sha256 != self.task.sha256:
            raise ValueError(
                f"{folder} was trained on another text than {self.config.text}: resume with its own --text"
            )
        experiment.refuse_unnamed_data(self.task.sha256)
        if vocabulary is not None and not vocabulary.same_tokens(self.task.vocabulary):  # ids may be equal
            raise ValueError(
                f"text={self.config.text!r} has another vocabulary than the run that is continued, whose is {known}"
            )
        if resumed:
            check_model(experiment, folder, len(self.task.vocabulary))
        elif branch is not None:
            check_model(branch.source(experiment), branch.run, len(self.task.vocabulary), branch.step)
        self.program = experiment.program(len(self.task.vocabulary), mesh)
        experiment.refuse_unnamed_size(self.program, stored=resumed or branch is not None)
        experiment.check(self.program.abstract)
        with contextlib.ExitStack() as stack:
            kept = self.config.keep, self.config.keep_every
            self.checkpoints = Checkpoints(folder, self.program, *kept, expected(folder, experiment))
            stack.callback(self.checkpoints.close)
            original = None if resumed or branch is not None else experiment.original()
            companions = Companions()
            if branch is not None:
                companions = branch.companions()
            elif original is not None:
                companions = original.companions
            if not resumed:
                companions.refuse_others(folder)
            self.batches = Batches(self.task.train, self.config.batch_size, mesh)
            stack.callback(self.batches.close)
            position = self.checkpoints.restore()
            if branch is not None:
                position = branch.position(self.checkpoints, experiment, self.task.sha256, self.batches.get_state())
            if position is None:
                initial = experiment.initial(self.program, self.task.vocabulary)
                position = Position(initial, self.batches.get_state())
                if names := self.checkpoints.not_finite(initial):
                    raise ValueError(f"parameters before the first step are not finite: {names}")
            self.position, self.branch = position, branch
            self.batches.set_state(position.data)
            agree(False)  # a barrier: every process reads before one writes
            if is_first():
                if branch is not None:
                    about = branch.about(experiment)
                elif resumed:
                    about = read_about(folder).kept
                else:
                    about = {} if original is None else original.about()
                write_about(folder, experiment, self.task.sha256, about, sign=not experiment.unnamed)
                companions.write(folder)
                if branch is not None:
                    branch.copy_metrics(folder)
                if vocabulary is None or branch is not None:
                    self.task.vocabulary.save(folder / VOCABULARY)
            self.stack = stack.pop_all()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and release the run's lock."""
        self.stack.close()

    def held_out(self) -> Sequence[Example]:
        """Examples of a validation."""
        return self.experiment.validation_subset(self.task.validation)

    def train(self, stop: Stop, console: Console) -> float | None:
        """Train to the last step, saving and reporting: returns the last validation loss, or None if it was stopped.

        Raises ValueError, with advice, if a loss or parameter is not finite; the last finite checkpoint is left.
        """
        try:
            return self.train_or_diverge(stop, console)
        except Diverged as error:
            raise ValueError(f"{error}; {self.advice()}") from None

    def advice(self) -> str:
        """How to go on after the run has diverged."""
        saved = steps(self.folder / "checkpoints")
        if not saved:
            return "no checkpoint was saved before: start again with a smaller learning_rate"
        rate = f"{self.config.learning_rate / 10:.3g}"
        where = f"checkpoint {saved[-1]} is the last one before"
        if self.command is None:
            return f"{where}: continue from it in a new folder with branch=Branch.at({str(self.folder)!r}, {saved[-1]})"
        folder = shlex.quote(str(self.folder))
        return (
            f"{where}: continue from it in a new folder with another rate, e.g. {self.command} --branch {folder} "
            f"--from-step {saved[-1]} --learning-rate {rate}"
        )

    def train_or_diverge(self, stop: Stop, console: Console) -> float | None:
        """Body of `train`; raises Diverged."""
        with self.stack:
            self.stop, self.console = stop, console
            self.evaluation = Evaluation(self.program, self.held_out(), self.config.batch_size, stop)
            self.trackers = Trackers(self.make_trackers() if is_first() else [], self.folder)
            self.stack.callback(self.trackers.close)
            flops_per_step = flops.of_step(self.program, self.experiment.abstract_batch())
            self.line = self.stack.enter_context(self.progress_line(flops_per_step))
            if self.branch is not None:
                self.checkpoints.save(self.position)
            if self.position.step and self.is_due():
                self.report()  # the run was stopped between saving and reporting
            loop = Loop(
                self.program,
                self.position,
                self.batches,
                stop,
                self,
                self.experiment.length_at,
                lambda: self.checkpoints.failed,
            )
            if not self.is_done() and not agree(bool(stop)):
                self.say(f"{flops_per_step / 1e9:,.3g} GFLOP in a step's matrix products")
                with self.line.doing("compiling"):
                    loop.compile(self.experiment.abstract_batch())
            trace = Trace(self.folder / "profile", self.position.step, self.options.profile)
            self.stack.callback(trace.close)
            loss = self.report() if self.is_done() else None
            while not self.is_done() and not agree(bool(stop)):
                due = self.next_report()
                finished = loop.advance(trace.until(due))
                trace.at(self.position.step)
                if finished and self.position.step < due:
                    continue
                self.check_finite()
                self.checkpoints.save(self.position)
                if self.is_due() or self.is_done():
                    loss = self.report()
            self.checkpoints.finish(self.position)
            return loss if self.is_done() else None

    def check_finite(self) -> None:
        """Raise Diverged if a parameter is not finite, or if the loss of the first held-out batch is not."""
        step = self.position.step
        if names := self.checkpoints.not_finite(self.position.state):
            raise Diverged(f"step {step}: parameters are not finite after it: {names}; the step is not saved")
        if self.is_due() or self.is_done():
            loss = self.evaluation(self.position.state, batches=1)  # None if a signal has come: there is no time for it
            if loss is not None and not math.isfinite(loss):
                raise Diverged(f"step {step}: the validation loss is {loss}; the step is not saved")

    def make_trackers(self) -> list[Tracker]:
        """Trackers that the options, the experiment and the caller name."""
        made: list[Tracker] = [metrics.Log(self.folder, self.position.losses)]
        if self.options.tensorboard:
            made.append(TensorBoard(self.folder, self.position.step))
        if self.options.wandb is not None:
            made.append(WandB(self.folder, self.options.wandb, dataclasses.asdict(self.config)))
        made += self.experiment.trackers(self.folder)
        return made if self.callback is None else [*made, Function(self.callback)]

    def progress_line(self, flops_per_step: int) -> Line:
        known = flops.peak(jax.devices()[0].device_kind)
        peak = None if known is None else known[0] * self.program.mesh.size
        tokens = self.config.batch_size * self.config.seq_len
        return Line(self.console, self.config.steps, self.position.step, tokens, flops_per_step, peak)

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
        with self.line.doing("validating"):
            loss = self.evaluation(self.position.state)
        if loss is None:
            return None
        if not math.isfinite(loss):
            self.checkpoints.discard(self.position.step)
            raise Diverged(f"step {self.position.step}: the validation loss is {loss}; its checkpoint is deleted")
        self.checkpoints.accept()
        model = self.program.model(self.position.state, self.config.compute_dtype)
        with self.line.doing("sampling"):
            text, numbers = self.experiment.report(model, self.task, lambda: agree(bool(self.stop)))
        recent = self.position.losses[-100:]
        mean = f"loss {np.mean(recent):.3f} (mean of {len(recent)} steps), " if recent else ""
        sample = f", written greedily:\n{text}".replace("\n", "\n    ") if text else ""
        self.say(f"step {self.position.step}: {mean}validation loss {loss:.3f}{sample}")
        self.trackers.write(self.position.step, {"validation_loss": loss, **numbers})
        return loss

    def say(self, text: str) -> None:
        """Print a text, with control characters of files and names as escapes."""
        self.console.print(visible(text, keep="\n"))

    def on_step(self, metrics: StepMetrics) -> None:
        self.line.advance(
            metrics.loss, metrics.seconds, self.experiment.length_at(metrics.step - 1) / self.config.seq_len
        )
        values = {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "seconds": round(metrics.seconds, 6)}
        self.trackers.step(metrics.step, values)

    def on_compile(self, length: int, seconds: float) -> None:
        part = "" if length == self.config.seq_len else f" for {length} tokens"
        self.say(f"the step{part} compiled in {seconds:.1f} s")

    def run(self, stop: Stop, console: Console, resume: str) -> Result | None:
        """Train to the last step and print the result; None if stopped, after printing `resume`, the command to go on.

        Raises ValueError like `train`.
        """
        self.console = console
        unit, parameters, total = self.task.vocabulary.unit, self.program.parameters, self.program.all_parameters
        of_all = "" if parameters == total else f"trained of {total:,} "
        self.say(f"{self.task.about}; {parameters:,} {of_all}parameters")
        for sentence in self.experiment.warnings():
            self.say(f"warning: {sentence}")
        if self.branch is not None:
            self.say(self.branch.sentence(self.experiment))
        elif self.position.step:
            self.say(f"resuming at step {self.position.step}")
        if type(self.experiment).report is Experiment.report and missing_decoding(self.program.abstract):
            missing = ", ".join(missing_decoding(self.program.abstract))
            self.say(f"reports have no sample: {type(self.program.abstract).__name__} has no {missing}")
        predicted = n_predicted(self.held_out())
        baseline: tuple[str, float] | None = None
        with contextlib.suppress(Stopped), at_once():  # `train` then takes no step
            baseline = self.experiment.baseline(self.task, predicted)
        if baseline is not None:
            self.say(f"{baseline[0]}: validation loss {baseline[1]:.3f} nats per {unit}")
        loss = self.train(stop, console)
        if loss is None:
            stopped = f"stopped at step {self.position.step}; continue with: {resume}"
            self.say(stopped)
            if stop.signal == signal.SIGPIPE:
                say(f"standard output was closed: {stopped}")
            return None
        self.say(f"\nvalidation loss, nats per {unit}, over the same {predicted:,}")
        if baseline is not None:
            self.say(f"    {baseline[1]:.3f}  {baseline[0]}")
        self.say(f"    {loss:.3f}  this model after {self.position.step:,} steps")
        return Result(loss, baseline, parameters)
