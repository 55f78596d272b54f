"""A small character model with rotary attention, against a character 4-gram model of the same text.

    python -m train.rope --text tiny_shakespeare       # or a FILE; without --text: Python's own language reference

Hardware   2 CPU cores, which other programs were using too; float32
Time       21 min 10 s by the clock, 14 min 39 s of CPU time over both cores
Training   2000 steps of 16 sequences of 128 characters (4.1 epochs of tiny_shakespeare); 810,049 parameters
Result     validation loss in nats per character, over the same characters for both models, seed 0:
                                    character 4-gram    this model
           tiny_shakespeare                    1.774         1.592
           python_docs (Python 3.11)           1.404         1.240

The same again goes on from its checkpoint: python -m train.rope --resume runs/rope --steps 3000
"""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from flax import nnx
from rich.console import Console

from jaxmodels.text import CharVocabulary, load_corpus, split
from jaxmodels.transformer import AutoregressiveTransformer
from train import checkpoints, loop
from train.command import one_line_errors, peek
from train.data import Batches, windows
from train.ngram import NGram
from train.optimizers import AdamForm, adam, noam
from train.sample import continue_text

PROGRAM = "python -m train.rope"


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the numbers of a run."""

    text: str = "python_docs"
    """python_docs (the language reference inside every Python), tiny_shakespeare (downloaded once), or a UTF-8 FILE"""
    attention: Literal["rotary", "rotary_value"] = "rotary"
    """rotary: queries and keys turn with their positions; rotary_value: values too (RoPER)"""
    d_model: int = 128
    """features of a token"""
    heads: int = 4
    """attention heads; each has d_model / heads features"""
    d_ff: int = 512
    """features of the hidden layer of a feed-forward network"""
    n_layers: int = 4
    """transformer layers"""
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

    @classmethod
    def small(cls) -> "Config":
        """Minutes on two CPU cores."""
        return cls()

    @classmethod
    def original(cls) -> "Config":
        """The sizes of the original experiment: meant for an accelerator."""
        return cls(heads=16, n_layers=6, seq_len=512, batch_size=4, steps=30_000, warmup=2000)

    def model(self, n_vocab: int) -> AutoregressiveTransformer:
        sizes = (self.d_model, self.heads, self.d_ff, self.n_layers)
        return AutoregressiveTransformer(n_vocab, *sizes, self.attention, self.dropout, rngs=nnx.Rngs(self.seed))


PRESETS = {"small": Config.small, "original": Config.original}
MAY_CHANGE = {"text", "steps", "every"}  # on --resume; the text is compared by what is in it


@dataclasses.dataclass(frozen=True)
class Command:
    """Trains a small character model with rotary attention and compares it with a character 4-gram model."""

    config: tyro.conf.OmitArgPrefixes[Config]
    preset: Literal["small", "original"] = "small"
    """sets the defaults of all other flags: small is minutes on two CPU cores, original the sizes of the original"""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/rope")
    """folder of a new run"""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder of a run to go on with, in its own configuration; --steps may be raised"""


def saved_config(run: Path) -> Config:
    """The configuration of a run; raises ValueError where the folder holds no run of this script."""
    try:
        return Config(**checkpoints.read_about(run)["config"])
    except TypeError as error:
        raise ValueError(f"{run} is no run of {PROGRAM}: {error}") from None


def parse(arguments: Sequence[str]) -> Command:
    """The command line; what is not given comes from --resume's run, else from --preset.

    Raises ValueError where --resume names no run, or other flags contradict it.
    """
    resume, preset = peek(arguments, "--resume"), peek(arguments, "--preset")
    saved = None if resume is None else saved_config(Path(resume))
    default = saved if saved and preset is None else PRESETS.get(preset or "small", Config.small)()
    command = tyro.cli(Command, default=Command(default), args=arguments, prog=PROGRAM)
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


def main(arguments: Sequence[str]) -> int:
    """Trains; the exit code: 0, or 130 where Ctrl-C ended it early. Raises ValueError for bad input."""
    command = parse(arguments)
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
        console.print(f"stopped at step {state.step} and saved; go on with: {PROGRAM} --resume {run}")
        return 130
    loss = report()
    console.print(
        f"\nvalidation loss, nats per character, the same {predicted:,} characters for both"
        f"\n    {ngram:.3f}  character 4-gram (Witten-Bell)"
        f"\n    {loss:.3f}  transformer after {state.step:,} steps"
    )
    console.print(f"saved; write text with: python -m train.sample {run}")
    return 0


if __name__ == "__main__":
    with one_line_errors(PROGRAM):
        sys.exit(main(sys.argv[1:]))
