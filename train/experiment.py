"""A character-level experiment: a language model trained on a text, beside a character 4-gram model of the same text.

Every script of this kind is a `Config` with sizes of its own and a `model`; what happens is here.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from jaxmodels.text import CharVocabulary, load_corpus, split
from train import checkpoints, loop
from train.command import one_line_errors, peek
from train.data import Batches, windows
from train.ngram import NGram
from train.optimizers import AdamForm, adam, noam
from train.sample import continue_text


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the numbers of a run; an experiment adds the sizes of its model."""

    PRESETS: ClassVar[tuple[str, ...]] = ("small", "original")  # classmethods; the first is the default

    text: str = "python_docs"
    """python_docs (the language reference inside every Python), tiny_shakespeare (downloaded once), or a UTF-8 FILE"""
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
    seq_len: int = 128
    """characters of a training sequence"""
    batch_size: int = 16
    """sequences of a step"""
    steps: int = 2000
    """steps of the whole run; on --resume, more of them make it longer"""
    learning_rate: float = 1.0
    """factor of the Noam schedule: lr · d_model^-½ · min(t^-½, t · warmup^-3/2) at step t"""
    warmup: int = 500
    """steps until the schedule's peak"""
    adam: AdamForm = "original"
    """where Adam adds epsilon: before the bias correction, as the original experiments do, or after, as torch does"""
    every: int = 500
    """steps from one validation, greedy sample and checkpoint to the next"""
    seed: int = 0
    """of initial weights, order of the text and dropout"""

    def __post_init__(self):
        """Raises ValueError for a value out of range."""
        for name in ("d_model", "heads", "d_ff", "n_layers", "seq_len", "batch_size", "steps", "warmup", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    def model(self, n_vocab: int) -> Any:
        """The experiment's language model, freshly initialised."""
        raise NotImplementedError


ConfigType = TypeVar("ConfigType", bound=Config)
MAY_CHANGE = {"text", "steps", "every"}  # on --resume; the text is compared by what is in it


@dataclasses.dataclass(frozen=True)
class Command(Generic[ConfigType]):
    """Trains a small character model and compares it with a character 4-gram model."""

    config: tyro.conf.OmitArgPrefixes[ConfigType]
    preset: str
    """small or original, the defaults of all other flags: for two CPU cores, or the original experiment's sizes"""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """folder of a new run"""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder of a run to go on with, in its own configuration; --steps may be raised"""


def saved_config(kind: type[ConfigType], run: Path) -> ConfigType:
    """The configuration of a run; raises ValueError where the folder holds no run of this experiment."""
    try:
        return kind(**checkpoints.read_about(run)["config"])
    except TypeError as error:
        raise ValueError(f"{run} is a run of another script: {error}") from None


def parse(kind: type[ConfigType], program: str, arguments: Sequence[str]) -> Command[ConfigType]:
    """The command line; what is not given comes from --resume's run, else from --preset.

    Raises ValueError where --resume names no run, where other flags contradict it, and for an unknown preset.
    """
    resume, preset = peek(arguments, "--resume"), peek(arguments, "--preset")
    if preset is not None and preset not in kind.PRESETS:
        raise ValueError(f"--preset {preset} is none of {', '.join(kind.PRESETS)}")
    saved = None if resume is None else saved_config(kind, Path(resume))
    chosen = preset or kind.PRESETS[0]
    default = saved if saved and preset is None else getattr(kind, chosen)()
    folder = Path("runs") / program.rpartition(".")[2]
    command = tyro.cli(Command[kind], default=Command(default, chosen, folder), args=arguments, prog=program)  # type: ignore[valid-type]
    if saved:
        changed = {
            name: value
            for name, value in dataclasses.asdict(saved).items()
            if name not in MAY_CHANGE and value != getattr(command.config, name)
        }
        if changed:
            theirs = ", ".join(f"{name}={value}" for name, value in changed.items())
            ours = ", ".join(f"{name}={getattr(command.config, name)}" for name in changed)
            raise ValueError(f"{resume} was trained with {theirs}, not {ours}: resume it as it is or start a new run")
        if peek(arguments, "--out") is not None:
            raise ValueError("--resume goes on in the run's own folder: leave --out away")
    return command


def main(kind: type[Config], program: str, arguments: Sequence[str]) -> int:
    """Trains; the exit code: 0, or 130 where Ctrl-C ended it early. Raises ValueError for bad input."""
    command = parse(kind, program, arguments)
    config, run = command.config, command.resume or command.out
    if not command.resume and run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"{run} is there already: go on with it by --resume {run}, or name another folder with --out")

    console = Console(highlight=False, markup=False, soft_wrap=True)
    text = load_corpus(config.text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    vocabulary = CharVocabulary.of(text)
    train_ids, validation_ids = map(vocabulary.encode, split(text))
    batches = Batches(train_ids, config.seq_len, config.batch_size, config.seed)
    validation = windows(validation_ids, config.seq_len, "validation")

    transformation = adam(noam(config.learning_rate, config.d_model, config.warmup), config.adam)
    if command.resume:
        if sha256 != checkpoints.read_about(run)["text_sha256"]:
            raise ValueError(f"{run} was trained on another text than {config.text}: resume it with its own --text")
        state = checkpoints.load(run, transformation)
        if state.step >= config.steps:
            raise ValueError(f"{run} has taken {state.step} steps already: ask for more with --steps")
    else:
        model = config.model(len(vocabulary))
        state = loop.State(model, nnx.Optimizer(model, transformation, wrt=nnx.Param))

    run.mkdir(parents=True, exist_ok=True)  # fails now where it can't be written, not at the first checkpoint
    parameters = sum(array.size for array in jax.tree.leaves(nnx.state(state.model, nnx.Param)))
    console.print(
        f"{config.text}: {len(train_ids):,} characters to train on, {len(validation_ids):,} to validate, "
        f"{len(vocabulary)} different ones; {parameters:,} parameters"
    )
    predicted = validation[1:].size
    ngram = NGram(train_ids, len(vocabulary)).nats(validation_ids)[1 : predicted + 1].mean()
    console.print(f"4-gram model: validation loss {ngram:.3f} nats per character")

    def save() -> None:
        checkpoints.save(run, state, vocabulary, dataclasses.asdict(config), sha256)

    def report() -> float:
        loss = loop.evaluate(state.model, validation, config.batch_size)
        recent = np.mean(state.losses[-100:])
        console.print(f"step {state.step}: loss {recent:.3f}, validation loss {loss:.3f}, greedy sample:")
        prompt = validation_ids[:30]
        continuation = continue_text(state.model, prompt, 100, config.seq_len)
        sample = f"{vocabulary.decode(prompt)}|{vocabulary.decode(continuation)}"
        console.print("    " + sample.replace("\n", "\n    "))
        return loss

    def save_and_report() -> None:
        save()
        report()

    finished = loop.train(
        state,
        batches,
        config.steps,
        key=jax.random.key(config.seed) if config.dropout else None,
        every=config.every,
        report=save_and_report,
        console=console,
    )
    save()
    if not finished:
        console.print(f"stopped at step {state.step} and saved; go on with: {program} --resume {run}")
        return 130
    loss = report()
    console.print(
        f"\nvalidation loss, nats per character, the same {predicted:,} characters for both"
        f"\n    {ngram:.3f}  character 4-gram (Witten-Bell)"
        f"\n    {loss:.3f}  this model after {state.step:,} steps"
    )
    console.print(f"saved; write text with: python -m train.sample {run}")
    return 0


def run_script(kind: type[Config], program: str) -> None:
    """`main` as a program: bad input is one line on standard error."""
    with one_line_errors(program):
        sys.exit(main(kind, program, sys.argv[1:]))
