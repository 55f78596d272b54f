"""An experiment from its configuration to its result: a language model trained on a text, saved, judged, sampled from.

Every script of this kind is a `Config` with sizes of its own and a `model`; what happens is here.
"""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxmodels.allocator import keep_freed_memory
from jaxmodels.sharding import check_batch, make_mesh
from jaxmodels.training import config, metrics
from jaxmodels.training.checkpoints import Checkpoints, Position
from jaxmodels.training.config import Options, begun, check_folder, parse, read_about, write_about
from jaxmodels.training.data import Batches, Example, Task, Windows, endless
from jaxmodels.training.distributed import agree, is_first
from jaxmodels.training.loop import Evaluation, Loop, Told
from jaxmodels.training.ngram import NGram
from jaxmodels.training.optimizers import OptimizerName, ScheduleName
from jaxmodels.training.plan import flops
from jaxmodels.training.sample import continue_text
from jaxmodels.training.signals import Stop, interruptible, one_line_errors
from jaxmodels.training.step import Program
from jaxmodels.training.tokenize import Tokens, open_tokens

SAMPLE_FROM, SAMPLE = 30, 100  # tokens of the held-out text, and how many the model writes on
NGRAM_TOKENS = 50_000_000  # a longer text is not counted: it would take minutes


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """What decides the numbers of a run of a small transformer language model."""

    d_model: int = 128
    """features of a token"""
    heads: int = 4
    """attention heads; each has d_model / heads features"""
    d_ff: int = 512
    """features of the hidden layer of a feed-forward network"""
    n_layers: int = 4
    """layers"""
    dropout: float = 0.0
    """share of features and attention weights dropped in training"""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    def positive(self) -> list[str]:
        return [*super().positive(), "d_model", "heads", "d_ff", "n_layers"]

    @property
    def width(self) -> int:
        return self.d_model

    def tokens(self) -> Tokens:
        """The text as ids; raises ValueError where it cannot be read."""
        return open_tokens(self.text)

    def task(self) -> Task:
        """The text in windows; raises ValueError where it is shorter than a sequence."""
        tokens = self.tokens()
        train = Windows(tokens.train, self.seq_len, "training")
        validation = Windows(tokens.validation, self.seq_len, "validation")
        n, unit = len(tokens.vocabulary), tokens.vocabulary.unit
        about = (
            f"{self.text}: {len(tokens.train):,} {unit}s to train on, {len(tokens.validation):,} to validate, "
            f"{n:,} different ones"
        )
        return Task(
            endless(train, self.seed),
            validation,
            tokens.vocabulary,
            tokens.sha256,
            about,
            tokens.train,
            tokens.validation,
        )

    def judged(self, found: Sequence[Example]) -> Sequence[Example]:
        """Of held-out examples, those that a validation looks at."""
        n = self.validation_batches
        return found if n is None else [found[i] for i in range(min(len(found), n * self.batch_size))]

    def baseline(self, task: Task, predicted: int) -> tuple[str, float] | None:
        """A bar to clear: its name and its loss over the first so many tokens of the validation, or None."""
        if task.train_ids is None or task.validation_ids is None or len(task.train_ids) > NGRAM_TOKENS:
            return None
        nats = NGram(task.train_ids, len(task.vocabulary)).nats(np.asarray(task.validation_ids[: predicted + 1]))
        return f"{task.vocabulary.unit} 4-gram (Witten-Bell)", float(nats[1:].mean())

    def show(self, model: Any, task: Task, interrupted: Callable[[], bool]) -> tuple[str, dict[str, float]]:
        """What a report prints beside the loss, what the model writes greedily, and numbers for the log."""
        ids = task.validation[0]["tokens"][:SAMPLE_FROM]
        n_tokens = len(task.vocabulary)  # a checkpoint's may be padded
        written = continue_text(model, ids, SAMPLE, self.seq_len, interrupted=interrupted, n_tokens=n_tokens)
        return f"{task.vocabulary.decode(ids)}|{task.vocabulary.decode(written)}", {}


@dataclasses.dataclass(frozen=True)
class AdamWConfig(Config):
    """What decides the numbers of a run that trains as one would today, where the originals have Adam with Noam."""

    optimizer: OptimizerName = "adamw"
    """original: Adam with epsilon before the bias correction, as the original experiments; torch: after it; adamw"""
    schedule: ScheduleName = "cosine"
    """of the learning rate: noam; cosine, to a tenth at the last step; or constant"""
    learning_rate: float = 2e-3
    """factor of Noam, lr · width^-½ · min(t^-½, t · warmup^-3/2) at step t; the highest rate of the others"""
    b2: float = 0.95
    """Adam's memory of squared gradients"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that stands where its folder says, or at its beginning, ready to go on."""

    settings: Config
    folder: Path
    task: Task
    program: Program
    checkpoints: Checkpoints
    batches: Batches
    position: Position

    @classmethod
    def open(cls, settings: Config, folder: Path, options: Options) -> "Run":
        """Raises ValueError where configuration, data, mesh and what is in the folder do not fit, before any work."""
        mesh = make_mesh(options.mesh)
        check_batch(mesh, settings.batch_size, settings.accumulate)
        task = settings.task()
        program = settings.program(len(task.vocabulary), mesh)
        if begun(folder) and read_about(folder)["sha256"] != task.sha256:
            raise ValueError(f"{folder} was trained on another text than {settings.text}: go on with its own --text")
        checkpoints = Checkpoints(folder, program, settings.keep, settings.keep_every)
        with contextlib.ExitStack() as stack:
            stack.callback(checkpoints.close)
            batches = Batches(task.train, settings.batch_size, mesh)
            stack.callback(batches.close)
            position = checkpoints.restore()
            if position is None:
                position = Position(settings.initial(program, task.vocabulary), batches.get_state())
            batches.set_state(position.data)
            agree(False)  # all have looked before one writes
            if is_first():
                write_about(folder, settings, task.sha256)
                task.vocabulary.save(folder / "vocabulary.json")
            stack.pop_all()  # `train` closes them
        return cls(settings, folder, task, program, checkpoints, batches, position)

    @property
    def parameters(self) -> int:
        return sum(array.size for array in self.program.abstract_state().params.values())

    def held_out(self) -> Sequence[Example]:
        """What the loss is judged on."""
        return self.settings.judged(self.task.validation)

    def flops(self) -> int:
        """Of a step's matrix products: those of the forward pass three times, whatever is computed again."""
        return 3 * flops.of_forward(self.program, self.settings.abstract_batch())

    def next_report(self) -> int:
        """The step after which the next report is due."""
        every = self.settings.every
        return min(self.settings.steps, self.position.step - self.position.step % every + every)


def train(run: Run, options: Options, stop: Stop, console: Console) -> float | None:
    """Goes on to the last step, saving and reporting as it goes: the last validation loss, or None where it was ended.

    Raises ValueError where a loss is not finite.
    """
    settings, position, program = run.settings, run.position, run.program
    with contextlib.ExitStack() as stack:
        stack.callback(run.batches.close)
        stack.callback(run.checkpoints.close)
        log = None
        if is_first():
            log = metrics.Log(run.folder, position.losses, tensorboard=options.tensorboard)
            stack.callback(log.close)
        known, flops_per_step = flops.peak(jax.devices()[0].device_kind), run.flops()
        peak = None if known is None else known[0] * program.mesh.size
        tokens = settings.batch_size * settings.seq_len
        line = stack.enter_context(metrics.Line(console, settings.steps, position.step, tokens, flops_per_step, peak))
        evaluation = Evaluation(program, run.held_out(), settings.batch_size, stop)

        def tell(told: Told) -> None:
            line.advance(told.loss, told.seconds, settings.length_at(told.step - 1) / settings.seq_len)
            if log is not None:
                log.step(told.step, told.loss, told.grad_norm, told.seconds)

        def report() -> float | None:
            loss = evaluation(position.state)
            if loss is None:
                return None
            model = program.model(position.state, settings.compute_dtype)
            text, numbers = settings.show(model, run.task, lambda: agree(bool(stop)))
            recent = np.mean(position.losses[-100:])
            console.print(f"step {position.step}: loss {recent:.3f}, validation loss {loss:.3f}, written greedily:")
            console.print("    " + text.replace("\n", "\n    "))
            if log is not None:
                log.write(position.step, {"validation_loss": loss, **numbers})
            return loss

        if 0 < position.step < settings.steps and position.step % settings.every == 0:
            report()  # a run that is ended after it has saved has not made it

        def compiled(length: int, seconds: float) -> None:
            part = "" if length == settings.seq_len else f" for {length} tokens"
            console.print(f"the step{part} compiled in {seconds:.1f} s")

        loop = Loop(program, position, run.batches, stop, tell, settings.length_at, compiled)
        if position.step < settings.steps and not agree(bool(stop)):
            console.print(f"{flops_per_step / 1e9:,.3g} GFLOP in a step's matrix products")
            loop.compile(settings.abstract_batch())
        trace = metrics.Trace(run.folder / "profile", position.step, options.profile)
        stack.callback(trace.close)
        while position.step < settings.steps and not agree(bool(stop)):
            due = run.next_report()
            goes_on = loop.advance(trace.until(due))
            trace.at(position.step)
            if goes_on and position.step < due:
                continue
            run.checkpoints.save(position)
            if position.step < settings.steps and position.step % settings.every == 0:
                report()
        run.checkpoints.wait()
        return report() if position.step >= settings.steps else None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to: its validation loss, that of a baseline, and how many parameters it trained."""

    loss: float
    baseline: tuple[str, float] | None
    parameters: int


def carry_out(
    settings: Config, folder: Path, options: Options, stop: Stop, console: Console, go_on: str
) -> Result | None:
    """A run from where its folder stands to its result; None where it was ended, having said how to go on.

    Raises ValueError for bad input, before any work, and where a loss is not finite.
    """
    run = Run.open(settings, folder, options)
    unit = run.task.vocabulary.unit
    console.print(f"{run.task.about}; {run.parameters:,} parameters")
    if run.position.step:
        console.print(f"going on from step {run.position.step}")
    predicted = len(run.held_out()) * settings.seq_len
    baseline = settings.baseline(run.task, predicted)
    if baseline is not None:
        console.print(f"{baseline[0]}: validation loss {baseline[1]:.3f} nats per {unit}")
    loss = train(run, options, stop, console)
    if loss is None:
        console.print(f"stopped at step {run.position.step}; go on with: {go_on}")
        return None
    console.print(f"\nvalidation loss, nats per {unit}, over the same {predicted:,}")
    if baseline is not None:
        console.print(f"    {baseline[1]:.3f}  {baseline[0]}")
    console.print(f"    {loss:.3f}  this model after {run.position.step:,} steps")
    return Result(loss, baseline, run.parameters)


def main(kind: type[Config], program_name: str, arguments: Sequence[str], caught: Stop | None = None) -> int:
    """Trains; the exit code: 0, or 130 where Ctrl-C ended it early. Raises ValueError for bad input.

    `caught` is what signals are noted in already, where the caller sees to them.
    """
    with interruptible() if caught is None else contextlib.nullcontext(caught) as stop:
        command = parse(kind, program_name, arguments)
        folder = command.run
        check_folder(command.config, folder)
        console = start(command.options)
        go_on = f"{program_name} --resume {folder}"
        if carry_out(command.config, folder, command.options, stop, console, go_on) is None:
            return stop.exit_code
        console.print(f"saved; write text with: python -m train.sample {folder}")
        return 0


def start(options: Options) -> Console:
    """Joins the other processes and sets JAX up; what is printed, the first process prints."""
    options.processes.initialize()
    agree(False)  # they connect to each other: the first time, some backends wait no longer than 30 seconds for that
    if options.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(options.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    output = sys.stdout if is_first() else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end)
    return Console(file=output, highlight=False, markup=False, soft_wrap=True)


def run_script(kind: type[Config], program_name: str) -> None:
    """`main` as a program."""
    as_program(lambda arguments: main(kind, program_name, arguments), program_name)


def as_program(function: Callable[[Sequence[str]], int], program_name: str) -> None:
    """Ends with the code of a function of the arguments; bad input is one line on standard error."""
    with one_line_errors(program_name), together(program_name):
        sys.exit(function(sys.argv[1:]))


@contextlib.contextmanager
def together(program_name: str) -> Iterator[None]:
    """Where one of several processes fails, it ends at once: waiting for the others, as JAX would at exit, can hang."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, ValueError | OSError | KeyboardInterrupt):  # a mistake of the program's
            traceback.print_exc()
        said = "interrupted" if isinstance(error, KeyboardInterrupt) else error
        print(f"{program_name}: process {jax.process_index()}: {said}", file=sys.stderr, flush=True)
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
