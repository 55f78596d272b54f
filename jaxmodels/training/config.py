"""What every run is configured by, and its command line.

A `Config` decides the numbers of a run and is saved with it; `Options` decide where and how they are computed, and may
be others when the run goes on.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import jax
import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from jaxmodels.io.atomic import atomic_file
from jaxmodels.sharding import check_batch
from jaxmodels.text import Vocabulary
from jaxmodels.training.checkpoints import LOCK, steps
from jaxmodels.training.distributed import Processes
from jaxmodels.training.optimizers import OptimizerName, ScheduleName, adam, adamw, make_schedule
from jaxmodels.training.signals import peek
from jaxmodels.training.step import Batch, Losses, Numerics, Precision, Program, Remat, State, token_losses

FORMAT = 3
FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the numbers of a run; an experiment adds the sizes of its model."""

    PRESETS: ClassVar[tuple[str, ...]] = ("small", "original")  # classmethods; the first is the default

    text: str = "python_docs"
    """python_docs (the language reference inside every Python), tiny_shakespeare (downloaded once), a UTF-8 FILE, or a
    FOLDER that python -m train.tokenize wrote"""
    seq_len: int = 128
    """tokens of a training sequence"""
    batch_size: int = 16
    """sequences of a step, over all devices"""
    accumulate: int = 1
    """parts that a batch is computed in, one after the other, to save memory"""
    steps: int = 2000
    """steps of the whole run; more of them make a run longer that has ended, but for one with a cosine"""
    optimizer: OptimizerName = "original"
    """original: Adam with epsilon before the bias correction, as the original experiments; torch: after it; adamw"""
    schedule: ScheduleName = "noam"
    """of the learning rate: noam; cosine, to a tenth at the last step; or constant"""
    learning_rate: float = 1.0
    """factor of Noam, lr · width^-½ · min(t^-½, t · warmup^-3/2) at step t; the highest rate of the others"""
    warmup: int = 500
    """steps until the schedule's peak"""
    b2: float = 0.999
    """Adam's memory of squared gradients"""
    eps: float = 1e-8
    """Adam's epsilon"""
    weight_decay: float = 0.1
    """of matrices, with AdamW"""
    clip: float | None = 1.0
    """largest norm of all gradients together; None: any"""
    compute_dtype: Precision = "float32"
    """what a step computes in; losses, softmax and norms in float32 all the same"""
    param_dtype: Precision = "float32"
    """what parameters and the optimizer's moments are kept in"""
    remat: Remat = "none"
    """what the backward pass computes again instead of keeping it: none; layers; dots: all of a layer but products"""
    every: int = 500
    """steps from one validation, greedy sample and checkpoint to the next"""
    validation_batches: int | None = None
    """batches of a validation; None: the whole held-out text"""
    keep: int = 3
    """checkpoints kept, the latest ones"""
    keep_every: int | None = None
    """steps whose multiples are kept beside them"""
    seed: int = 0
    """of initial weights, order of the text and dropout"""

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        for name in self.positive():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be 0 or more, and less than 2³²")
        for name in ("learning_rate", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0")
        if not 0 <= self.b2 < 1:
            raise ValueError(f"b2={self.b2} must be at least 0 and below 1")
        self.transformation(1)  # a schedule may not fit the steps

    @classmethod
    def of_preset(cls, name: str) -> Self:
        """The values of a preset; raises ValueError for a name of none."""
        if name not in cls.PRESETS:
            raise ValueError(f"--preset {name} is none of {', '.join(cls.PRESETS)}")
        return getattr(cls, name)()

    def positive(self) -> list[str]:
        """The fields that count something."""
        counts = ["seq_len", "batch_size", "accumulate", "steps", "warmup", "every"]
        return [*counts, "validation_batches", "keep", "keep_every"]

    def model(self, n_vocab: int) -> Any:
        """The experiment's model, freshly initialised."""
        raise NotImplementedError

    @property
    def planned_vocab(self) -> int:
        """Tokens of the vocabulary that `train.plan` takes where it is told none: as many as there are bytes."""
        return 256

    @property
    def width(self) -> int:
        """Features of a token, which the Noam schedule scales with."""
        raise NotImplementedError

    def transformation(self, width: int) -> optax.GradientTransformation:
        """Clipping, optimizer and schedule."""
        rate = make_schedule(self.schedule, self.learning_rate, width=width, warmup=self.warmup, steps=self.steps)
        if self.optimizer == "adamw":
            return adamw(rate, self.weight_decay, self.clip, b2=self.b2, eps=self.eps)
        return adam(rate, self.optimizer, self.clip, b2=self.b2, eps=self.eps)

    def program(self, n_vocab: int, mesh: Mesh) -> Program:
        """The step of this experiment on a mesh; raises ValueError where they do not fit."""
        check_batch(mesh, self.batch_size, self.accumulate)
        return Program(
            lambda: self.model(n_vocab),
            self.transformation(self.width),
            mesh,
            self.numerics(),
            losses=self.losses(),
            trains=self.trains,
            dropout=getattr(self, "dropout", 0) > 0,
        )

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        """The state before the first step; raises ValueError where it comes from a model that does not fit."""
        return program.make_state(self.seed)

    def length_at(self, step: int) -> int:
        """Tokens of a sequence, of the seq_len that a batch has, that step `step`, from 0, computes with."""
        return self.seq_len

    def losses(self) -> Losses:
        """What is averaged and minimised: (model, batch, rng) -> nats [B, S]."""
        return token_losses

    def trains(self, path: str) -> bool:
        """Whether the optimizer changes a parameter, by its dotted path."""
        return True

    def abstract_batch(self) -> Batch:
        """Shapes and dtypes of a batch."""
        return {"tokens": jax.ShapeDtypeStruct((self.batch_size, self.seq_len + 1), np.int32)}

    def numerics(self) -> Numerics:
        return Numerics(self.accumulate, self.compute_dtype, self.param_dtype, self.remat)


ConfigType = TypeVar("ConfigType", bound=Config)
# When a run goes on. The text, and RETRO's index of it, are compared by what is in them; a longer run with a cosine
# would have had another schedule.
MAY_CHANGE = {"text", "index", "every", "validation_batches", "keep", "keep_every"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Where and how a run is computed."""

    mesh: str = ""
    """devices along the axes data, fsdp and tensor: fsdp=4,tensor=2; data takes the rest of them"""
    processes: tyro.conf.OmitArgPrefixes[Processes] = dataclasses.field(default_factory=Processes)
    compile_cache: Path | None = None
    """folder where compiled programs are kept for the next start"""
    profile: int = 0
    """steps to trace, from the second on, into the run's folder profile: TensorBoard and Perfetto show it"""
    tensorboard: bool = True
    """write TensorBoard's files beside metrics.jsonl"""

    def __post_init__(self):
        if self.profile < 0:
            raise ValueError(f"profile={self.profile} steps must be at least 0")


@dataclasses.dataclass(frozen=True)
class Command(Generic[ConfigType]):
    """Trains a model; a run that was stopped or killed goes on where it was when the same command is given again."""

    config: tyro.conf.OmitArgPrefixes[ConfigType]
    preset: str
    """which defaults all other flags have; small: for two CPU cores, original: the original experiment's sizes"""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """folder of the run, new or to go on with"""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder of a run to go on with, in its own configuration; without a cosine, --steps may be raised"""
    options: tyro.conf.OmitArgPrefixes[Options] = dataclasses.field(default_factory=Options)

    @property
    def run(self) -> Path:
        return self.resume or self.out


def parse(kind: type[ConfigType], program: str, arguments: Sequence[str]) -> Command[ConfigType]:
    """The command line; what is not given comes from --resume's run, else from --preset.

    Raises ValueError where --resume names no run, and for an unknown preset.
    """
    resume, preset = peek(arguments, "--resume"), peek(arguments, "--preset")
    if resume is not None and peek(arguments, "--out") is not None:
        raise ValueError("--resume goes on in the run's own folder: leave --out away")
    saved = None if resume is None else saved_config(kind, Path(resume))
    chosen = preset or kind.PRESETS[0]
    default = saved if saved and preset is None else kind.of_preset(chosen)
    folder = Path("runs") / program.rpartition(".")[2]
    command: Any = tyro.cli(Command[kind], default=Command(default, chosen, folder), args=arguments, prog=program)  # type: ignore[valid-type]
    return command


def check_folder(given: Config, run: Path) -> None:
    """Raises ValueError where a folder holds something else than a run, or one with other values than are given.

    A run that has saved nothing yet may begin anew with any.
    """
    if not (run / FILE).exists():
        if run.exists() and (not run.is_dir() or any(not is_beside(file) for file in run.iterdir())):
            raise ValueError(f"{run} is there and holds no training run: name another folder with --out")
        return
    if not begun(run):
        read_about(run)  # a config.json may be a model's
        return
    saved = saved_config(type(given), run)
    may = MAY_CHANGE if saved.schedule == "cosine" else MAY_CHANGE | {"steps"}
    theirs, ours = dataclasses.asdict(saved), dataclasses.asdict(given)
    changed = [name for name in theirs if name not in may and theirs[name] != ours[name]]
    if changed:
        was, now = (", ".join(f"{name}={values[name]}" for name in changed) for values in (theirs, ours))
        raise ValueError(
            f"{run} was trained with {was}, not {now}: go on with it by --resume {run}, "
            "or name another folder with --out"
        )


def begun(run: Path) -> bool:
    """Whether a run has saved a step."""
    return bool(steps(run / "checkpoints"))


def is_beside(file: Path) -> bool:
    """Whether a file is what a run that was killed as it began may have left, before there was a config.json."""
    return file.name == LOCK or file.name.startswith(f".{FILE}.")


def read_about(run: Path) -> dict[str, Any]:
    """What a run's config.json says; raises ValueError where the folder holds no training run."""
    file = run / FILE
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"{file} has format {about['format']}, this version reads {FORMAT}")
        return {name: about[name] for name in ("script", "config", "sha256")}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run} holds no training run") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a training run: {error!r}") from None


def saved_config(kind: type[ConfigType], run: Path) -> ConfigType:
    """The configuration of a run; raises ValueError where the folder holds no run of this experiment."""
    about = read_about(run)
    if about["script"] != script_of(kind):
        raise ValueError(f"{run} is a run of {about['script']}, not of {script_of(kind)}")
    try:
        return kind(**about["config"])
    except TypeError as error:
        raise ValueError(f"{run / FILE} holds another configuration than {script_of(kind)} has: {error}") from None


def script_of(kind: type[Config]) -> str:
    """The module of an experiment: train.rope, also where `python -m` runs it by the name of __main__."""
    spec = sys.modules[kind.__module__].__spec__
    return kind.__module__ if spec is None else spec.name


def write_about(run: Path, config: Config, sha256: str) -> None:
    """Saves whose run it is, the resolved configuration, and what tells the data from any other."""
    values = dataclasses.asdict(config)
    about = {"format": FORMAT, "script": script_of(type(config)), "config": values, "sha256": sha256}
    with atomic_file(run / FILE) as beside:
        beside.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
