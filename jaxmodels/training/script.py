"""Entry point of training scripts: command line, process setup, exit code."""

import contextlib
import dataclasses
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from rich.console import Console

from jaxmodels.process import programs
from jaxmodels.process.allocator import keep_freed_memory
from jaxmodels.process.distributed import agree, is_first
from jaxmodels.process.extras import require
from jaxmodels.process.signals import Stop, interruptible
from jaxmodels.training.config import Config, Options
from jaxmodels.training.experiment import ConfigT, Experiment
from jaxmodels.training.loop import Result, Trainer
from jaxmodels.training.run import check_folder, saved_config

require("train", "tyro")
import tyro  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Command:
    """Train a model. The same command resumes a run that was stopped or killed."""

    config: Config
    preset: str
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """folder of the run, new or to be resumed"""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder of a run to resume with its own hyperparameters; --steps may be raised (not with schedule=cosine)"""
    options: Options = dataclasses.field(default_factory=Options)

    @property
    def run(self) -> Path:
        return self.resume or self.out


def parse(
    kind: type[Experiment[ConfigT]], program: str, arguments: Sequence[str]
) -> tuple[Experiment[ConfigT], Command]:
    """Parse a command line; omitted flags come from --resume's run, else from --preset.

    Raises ValueError if --resume names no run, or for an unknown preset.
    """
    resume, preset = peek(arguments, "--resume"), peek(arguments, "--preset")
    if resume is not None and peek(arguments, "--out") is not None:
        raise ValueError("--resume continues in the run's own folder; omit --out")
    saved = None if resume is None else saved_config(kind, Path(resume))
    chosen = preset or kind.config_class.PRESETS[0]
    config: Any = saved if saved is not None and preset is None else kind.config_class.of_preset(chosen)
    folder = Path("runs") / program.rpartition(".")[2]
    command = parse_flags(with_presets(Command, kind), (config, chosen, folder), arguments, program)
    return kind(command.config), command


def with_presets(command: type, kind: type[Experiment[Any]]) -> Any:
    """Build a command's dataclass for an experiment, with its type of `config` and its presets in --preset's help."""
    config_class = kind.config_class
    names: Any = Literal.__getitem__(config_class.PRESETS)
    text = f"defaults of all other flags; {config_class.describe_presets()}"
    fields: list[Any] = [("config", config_class), ("preset", Annotated[names, tyro.conf.arg(help=text)])]
    made = dataclasses.make_dataclass(command.__name__, fields, bases=(command,), frozen=True)
    made.__doc__ = command.__doc__
    return made


def parse_flags(command: Any, defaults: tuple[Any, ...], arguments: Sequence[str], program: str) -> Any:
    """Parse flags into a dataclass; fields of nested dataclasses are flags without a prefix.

    Raises ValueError if a dataclass refuses its values. tyro prints other errors, such as unknown flags, and exits.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                command, default=command(*defaults), args=arguments, prog=program, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as exit:
        # tyro frames the message of a nested dataclass; its `arg` is then the field's name, otherwise a flag.
        refused = exit.__context__
        if isinstance(getattr(refused, "arg", None), str) and isinstance(getattr(refused, "message", None), str):
            raise ValueError(refused.message) from None  # type: ignore[union-attr]
        sys.stderr.write(shown.getvalue())
        raise


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """Read one flag before the others are parsed, whose defaults depend on it; None if it is absent."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, after = argument.partition("=")
        if name == flag:
            value = after if equals else next(iter(arguments[i + 1 :]), None)
    return value


class Session:
    """Training process, connected to the other processes if there are any. Only the first process prints.

    resume: command that continues a stopped run.
    """

    def __init__(self, options: Options, stop: Stop, resume: str):
        self.options, self.stop, self.resume = options, stop, resume
        options.processes.initialize()
        agree(False)  # connects the processes: some backends wait at most 30 seconds for the first connection
        if options.compile_cache is not None:
            jax.config.update("jax_compilation_cache_dir", str(options.compile_cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        output = sys.stdout if is_first() else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end)
        self.console = Console(file=output, highlight=False, markup=False, soft_wrap=True)

    def train(self, experiment: Experiment[Any], folder: Path) -> Result | None:
        """Train a run to its result; None if it was stopped. Raises ValueError for bad input, before any work."""
        with contextlib.closing(Trainer(experiment, folder, self.options)) as trainer:
            return trainer.run(self.stop, self.console, self.resume)


def main(
    kind: type[Experiment[Any]], program: str, arguments: Sequence[str] | None = None, caught: Stop | None = None
) -> int:
    """Train one run; returns the exit code: 0, or 130 if Ctrl-C stopped it. Raises ValueError for bad input.

    caught: the caller's Stop, if it handles signals itself.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with interruptible() if caught is None else contextlib.nullcontext(caught) as stop:
        experiment, command = parse(kind, program, arguments)
        folder = command.run
        check_folder(experiment, folder)
        session = Session(command.options, stop, f"{program} --resume {folder}")
        if session.train(experiment, folder) is None:
            return stop.exit_code
        session.console.print(f"saved; write text with: python -m train.sample {folder}")
        return 0


def run_script(kind: type[Experiment[Any]], program: str) -> None:
    """Run `main` as a program."""
    as_program(lambda arguments: main(kind, program, arguments), program)


def as_program(function: Callable[[Sequence[str]], int], program: str) -> None:
    """Exit with the code that a function of the arguments returns; bad input is one line on standard error."""

    def joined() -> int:
        with together(program):
            return function(sys.argv[1:])

    sys.exit(programs.run(joined, program))


@contextlib.contextmanager
def together(program: str) -> Iterator[None]:
    """Exit at once if one of several processes fails: JAX waits for the others at exit, which can hang."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, ValueError | OSError | KeyboardInterrupt):  # a bug, not bad input
            traceback.print_exc()
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else error
        print(f"{program}: process {jax.process_index()}: {message}", file=sys.stderr, flush=True)
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
