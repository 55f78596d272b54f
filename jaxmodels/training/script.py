"""Entry point of training scripts: command line, process setup, exit code."""

import contextlib
import dataclasses
import io
import os
import shlex
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
from jaxmodels.process.paths import local
from jaxmodels.process.streams import Output, say
from jaxmodels.process.texts import visible
from jaxmodels.training.config import Config, Options
from jaxmodels.training.experiment import ConfigT, Experiment, script_of
from jaxmodels.training.reporting.trackers import Callback
from jaxmodels.training.runs.agreement import FILE
from jaxmodels.training.runs.folder import Branch, check_folder, saved_config
from jaxmodels.training.runs.unnamed import is_signed
from jaxmodels.training.signals import Stop, Stopped, interruptible
from jaxmodels.training.trainer import Result, Trainer

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
    branch: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder of a run whose checkpoint a new run begins with; the flags that differ from that run's, such as
    --learning-rate, --schedule, --steps, --batch-size and --text, apply from there on and are recorded in config.json.
    --out is then FOLDER-from-STEP by default"""
    from_step: int | None = None
    """step of --branch's checkpoint; if omitted: the latest"""
    options: Annotated[Options, tyro.conf.arg(name="execution")] = dataclasses.field(default_factory=Options)

    @property
    def run(self) -> Path:
        return self.resume or self.out

    @property
    def origin(self) -> Branch | None:
        """Checkpoint that a new run begins with; raises ValueError if there is none of that step."""
        return None if self.branch is None else Branch.at(self.branch, self.from_step)


def parse(
    kind: type[Experiment[ConfigT]], program: str, arguments: Sequence[str]
) -> tuple[Experiment[ConfigT], Command]:
    """Parse a command line; omitted flags come from the run of --resume or --branch, else from --preset.

    Raises ValueError if there is no such run, or for an unknown preset.
    """
    resume, branch, preset, out = (peek(arguments, flag) for flag in ("--resume", "--branch", "--preset", "--out"))
    if resume is not None and branch is not None:
        raise ValueError("--resume continues a run, --branch begins a new one: omit one of them")
    if resume is not None and out is not None:
        raise ValueError("--resume continues in the run's own folder; omit --out")
    if branch is None and peek(arguments, "--from-step") is not None:
        raise ValueError("--from-step needs --branch, the run whose checkpoint the new run begins with")
    for flag, value in (("out", out), ("resume", resume), ("branch", branch)):
        if value is not None:
            local(value, flag)
    source = resume if branch is None else branch
    saved = None if source is None else saved_config(kind, Path(source).expanduser())
    chosen = preset or kind.config_class.PRESETS[0]
    config: Any = saved if saved is not None and preset is None else kind.config_class.of_preset(chosen)
    folder = Path("runs") / script_of(kind).rpartition(".")[2]
    if any(argument.startswith("--tyro-") for argument in arguments):  # a shell completes the name of a file
        program = Path(sys.argv[0]).name
    command = parse_flags(with_presets(Command, kind), (config, chosen, folder), arguments, program)
    command = with_local_paths(command)
    refuse_unused(command.config, arguments)
    if branch is not None and out is None:
        origin = command.origin
        command = dataclasses.replace(command, out=Path(f"{origin.run}-from-{origin.step}"))
    experiment = kind(command.config)
    if saved is not None and config is saved and not is_signed(Path(str(source)).expanduser() / FILE):
        names = (field.name for field in dataclasses.fields(saved))
        experiment.unnamed = frozenset(n for n in names if peek(arguments, f"--{n.replace('_', '-')}") is None)
    return experiment, command


def with_local_paths(values: Any) -> Any:
    """Expand `~` in a dataclass of flags and those inside it; raises ValueError for folders that are URLs."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if isinstance(value, Path):
            changed[field.name] = local(value, field.name)
        elif isinstance(value, str) and value.startswith("~"):
            changed[field.name] = os.path.expanduser(value)
        elif dataclasses.is_dataclass(value):
            changed[field.name] = with_local_paths(value)
    return dataclasses.replace(values, **changed)


def with_presets(command: type, kind: type[Experiment[Any]]) -> Any:
    """Build a command's dataclass for an experiment, with its type of `config` and its presets in --preset's help."""
    config_class = kind.config_class
    names: Any = Literal.__getitem__(config_class.PRESETS)
    text = f"defaults of all other flags; {config_class.describe_presets()}"
    fields: list[Any] = [
        ("config", Annotated[config_class, tyro.conf.arg(name="hyperparameter")]),
        ("preset", Annotated[names, tyro.conf.arg(help=text)]),
    ]
    made = dataclasses.make_dataclass(command.__name__, fields, bases=(command,), frozen=True)
    made.__doc__ = command.__doc__
    return made


def parse_flags(command: Any, defaults: tuple[Any, ...], arguments: Sequence[str], program: str) -> Any:
    """Parse flags into a dataclass; fields of nested dataclasses are flags without a prefix.

    Raises ValueError if a dataclass refuses its values. tyro prints other errors, such as unknown flags, and exits.
    """
    # Both may repeat the values of a run of others. The help has frames if the encoding has their characters.
    shown, encoding = io.StringIO(), sys.stdout.encoding or "utf-8"
    text = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace", write_through=True)
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(text):
            return tyro.cli(
                command, default=command(*defaults), args=arguments, prog=program, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as exit:
        # tyro frames the message of a nested dataclass; its `arg` is then the field's name, otherwise a flag.
        refused = exit.__context__
        if isinstance(getattr(refused, "arg", None), str) and isinstance(getattr(refused, "message", None), str):
            raise ValueError(refused.message) from None  # type: ignore[union-attr]
        sys.stdout.write(visible(text.buffer.getvalue().decode(encoding), keep="\n"))
        sys.stderr.write(visible(shown.getvalue(), keep="\n"))
        raise


def peek(arguments: Sequence[str], flag: str) -> str | None:
    """Read one flag before the others are parsed, whose defaults depend on it; None if it is absent."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, after = argument.partition("=")
        if name.replace("_", "-") == flag:  # as tyro has it
            value = after if equals else next(iter(arguments[i + 1 :]), None)
    return value


def refuse_unused(config: Config, arguments: Sequence[str]) -> None:
    """Raise ValueError if a flag of a command line has no effect with the others."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    given = {flag[2:].removeprefix("no-").replace("-", "_") for flag in flags}
    for name, reason in config.unused().items():
        if name in given:
            raise ValueError(f"{name}={getattr(config, name)} has no effect: {reason}")


class Session:
    """Training process, connected to the other processes if there are any. Only the first process prints.

    resume: command that continues a stopped run. program: the script, e.g. "python -m train.rope".
    callback: called with each step's and validation's numbers; nothing is printed then.
    """

    def __init__(
        self,
        options: Options,
        stop: Stop,
        resume: str,
        program: str | None = None,
        callback: Callback | None = None,
    ):
        self.options, self.stop, self.resume, self.program, self.callback = options, stop, resume, program, callback
        if options.tensorboard:
            require("train", "tensorboardX")
        if options.wandb is not None:
            require("wandb", "wandb")
        options.processes.initialize()
        agree(False)  # connects the processes: some backends wait at most 30 seconds for the first connection
        if options.compile_cache is not None:
            jax.config.update("jax_compilation_cache_dir", str(options.compile_cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        quiet = callback is not None or not is_first()
        output: Any = Output(sys.stdout, stop.pipe_closed)
        # force_jupyter: in a notebook, too, the output goes to sys.stdout, which a user can redirect.
        self.console = Console(
            file=output, highlight=False, markup=False, soft_wrap=True, quiet=quiet, force_jupyter=False
        )

    def train(self, experiment: Experiment[Any], folder: Path, branch: Branch | None = None) -> Result | None:
        """Train a run to its result; None if it was stopped. Raises ValueError for bad input, before any work."""
        try:
            with contextlib.closing(
                Trainer(experiment, folder, self.options, branch, self.program, self.callback)
            ) as trainer:
                return trainer.run(self.stop, self.console, self.resume)
        except Stopped:
            how = self.resume if (folder / FILE).exists() else "the same command"
            self.console.print(visible(f"stopped while the text was read; continue with: {how}"))
            return None


def main(
    kind: type[Experiment[Any]], program: str, arguments: Sequence[str] | None = None, caught: Stop | None = None
) -> int:
    """Train one run; returns the exit code: 0, or 130 if Ctrl-C stopped it. Raises ValueError for bad input.

    caught: the caller's Stop, if it handles signals itself.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with interruptible() if caught is None else contextlib.nullcontext(caught) as stop:
        experiment, command = parse(kind, program, arguments)
        folder, origin = command.run, command.origin
        check_folder(experiment, folder, origin)
        shown = shlex.quote(str(folder))
        session = Session(command.options, stop, f"{program} --resume {shown}", program)
        if session.train(experiment, folder, origin) is None:
            return stop.exit_code
        session.console.print(visible(f"saved; write text with: {sampling(kind, program, folder)}"))
        return 0


def train(
    experiment: Experiment[Any],
    folder: Path | str,
    *,
    callback: Callback | None = None,
    options: Options | None = None,
    branch: Branch | None = None,
) -> Result | None:
    """Train a run from Python, for example in a notebook; the same call resumes a run that was interrupted.

    callback(step, values): called after each step with loss, grad_norm and seconds, and after each validation with
    validation_loss; nothing is printed then. branch: checkpoint of another run to begin with. Returns None if a signal,
    such as a notebook's interrupt, stopped it; it is saved then. Raises ValueError for bad input, before any work, and
    if the run diverges.
    """
    run = local(folder, "folder")
    check_folder(experiment, run, branch)
    with interruptible() as stop:
        return Session(options or Options(), stop, "the same call", None, callback).train(experiment, run, branch)


def sampling(kind: type[Experiment[Any]], program: str, folder: Path) -> str:
    """Command that writes text with a run of an experiment."""
    folder_as_typed = shlex.quote(str(folder))
    if program.startswith("python -m train."):
        return f"python -m train.sample {folder_as_typed}"
    return f"jaxmodels sample {folder_as_typed} --experiment {script_of(kind)}"


def run_script(kind: type[Experiment[Any]], program: str | None = None) -> None:
    """Run `main` as a program. program: how it was started, for messages; default from the interpreter's arguments."""
    program = program or started_as()
    as_program(lambda arguments: main(kind, program, arguments), program)


def started_as() -> str:
    """How this program was started: "python FILE" or "python -m MODULE"."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return f"python {shlex.quote(os.path.relpath(sys.argv[0]))}"


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
        say(f"{program}: process {jax.process_index()}: {message}")
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
