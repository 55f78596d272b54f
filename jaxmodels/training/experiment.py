"""Base class of experiments: the model, data, optimizer and reports of a training script.

A script is a module with a `Config`, a subclass of `Experiment`, and `EXPERIMENT`, which is that class:

    class MyExperiment(Experiment[Config]):
        config_class = Config

        def model(self, n_vocab: int) -> MyModel:
            return MyModel(n_vocab, self.config.d_model, rngs=nnx.Rngs(self.config.seed))

    EXPERIMENT = MyExperiment

    if __name__ == "__main__":
        run_script(EXPERIMENT, "python -m my_project.experiment")

A model class has:

- `jaxmodels.register(NAME)` and `config()`: checkpoints are saved under that name. Required.
- `sequence_axis`: 0 if its calls take tokens [S, B], 1 if [B, S]. Required unless `losses` is overridden.
- `sharding_rules`: required on a mesh with an fsdp or tensor axis.
- `init_cache`, `prefill`, `decode`: for samples. Without them reports have no sample.

`jaxmodels.protocols` describes them.
"""

import contextlib
import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import jaxmodels
from jaxmodels.generate import Sampling
from jaxmodels.generate.loop import Decoding
from jaxmodels.models import build, describe, name_of
from jaxmodels.process.distributed import to_host
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.protocols import DECODING, check_decoding
from jaxmodels.sharding import check_batch
from jaxmodels.text import Vocabulary
from jaxmodels.training.config import MOST_SIZE, Config
from jaxmodels.training.data import Example, First, Task, Windows, endless, windows_of, without_padding
from jaxmodels.training.optimizers import make_optimizer, make_schedule
from jaxmodels.training.reporting.ngram import NGram
from jaxmodels.training.reporting.trackers import Tracker
from jaxmodels.training.runs.original import Original
from jaxmodels.training.runs.unnamed import ConfigT, Unnamed
from jaxmodels.training.signals import at_once
from jaxmodels.training.step import PREDICTED, Batch, Program, State, token_losses
from jaxmodels.training.tokenize import Tokens, open_tokens
from jaxmodels.weights.names import dotted, flat_arrays
from jaxmodels.weights.stored import shapes_of

# The project's own experiments, scripts of a checkout, by the name that commands take.
EXPERIMENTS = {
    "feedback": "train.feedback",
    "feedback_kv": "train.feedback_kv",
    "neox": "train.neox",
    "retro": "train.retro",
    "rope": "train.rope",
    "rope_value": "train.rope_value",
    "synthesizer": "train.synthesizer",
}
PROMPT_TOKENS, SAMPLE_TOKENS = 30, 100  # of the sample in a report
NGRAM_TOKENS = 50_000_000  # counting a longer text would take minutes

Interrupted = Callable[[], bool]


def never() -> bool:
    return False


class Experiment(Unnamed[ConfigT]):
    """A language model trained on a text. A subclass gives `config_class` and `model`; the rest has defaults."""

    config_class: ClassVar[type[Config]] = Config
    vocabulary: Vocabulary | None = None  # of the run that is continued, to encode another text with

    def __init__(self, config: ConfigT):
        if config.within_documents and type(self).task is not Experiment.task:
            raise ValueError(f"within_documents: {type(self).__name__} makes its own examples, which are not documents")
        self.config = config

    @property
    def standalone(self) -> bool:
        """True if saved runs can be evaluated and sampled without this class. Saved with each run."""
        own = ("losses", "tokens", "task", "held_out", "examples", "generator")
        return all(getattr(type(self), name) is getattr(Experiment, name) for name in own)

    # The model and its training step.

    def model(self, n_vocab: int) -> Any:
        """Build the initialized model for a vocabulary of n_vocab tokens. Called inside jit."""
        raise NotImplementedError

    @property
    def planned_vocab(self) -> int:
        """Vocabulary size that `train.plan` assumes by default: that of bytes."""
        return 256

    @property
    def width(self) -> int:
        """Features per token, by which the Noam schedule scales; raises ValueError if the config has no d_model."""
        width = getattr(self.config, "d_model", None)
        if width is None:
            raise ValueError("schedule='noam' needs a d_model in the config; other schedules are cosine and constant")
        return width

    @property
    def transformation(self) -> optax.GradientTransformation:
        """Gradient clipping, optimizer and learning rate schedule."""
        config = self.config
        width = self.width if config.schedule == "noam" else 1
        rate = make_schedule(
            config.schedule, config.learning_rate, width=width, warmup=config.warmup, steps=config.steps
        )
        return make_optimizer(
            config.optimizer,
            rate,
            weight_decay=config.weight_decay,
            max_norm=config.clip,
            b2=config.b2,
            eps=config.eps,
            momentum_dtype=config.momentum_dtype,
        )

    def losses(self, model: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Loss of each predicted token, whose mean is minimized: nats [B, S]. rng: key for dropout, or None.

        With within_documents the mean is over the tokens that are not padding; it is taken by the caller.
        """
        return token_losses(model, batch, rng)

    def trains(self, path: str) -> bool:
        """True if the optimizer updates the parameter with this dotted path."""
        return True

    def length_at(self, step: int) -> int:
        """Number of leading tokens of each sequence that a step, counted from 0, uses."""
        return self.config.seq_len

    def abstract_batch(self) -> Batch:
        """Shapes and dtypes of a batch."""
        rows, length = self.config.batch_size, self.config.seq_len
        batch = {"tokens": jax.ShapeDtypeStruct((rows, length + 1), np.int32)}
        if self.config.within_documents:
            batch[PREDICTED] = jax.ShapeDtypeStruct((rows, length), np.bool_)
        return batch

    def program(self, n_vocab: int, mesh: Mesh) -> Program:
        """Build the training step for a mesh; raises ValueError if they do not fit."""
        config = self.config
        check_batch(mesh, config.batch_size, config.accumulate)
        program = Program(
            lambda: self.model(n_vocab),
            self.transformation,
            mesh,
            config.numerics,
            losses=token_losses if type(self).losses is Experiment.losses else self.losses,
            trains=self.trains,
            dropout=getattr(config, "dropout", 0) > 0,
        )
        program.check_kernel(self.abstract_batch())
        return program

    def check(self, model: Any) -> None:
        """Raise ValueError if a model, which may be abstract, lacks what a run needs. Called before the first step."""
        check_config(model)
        if type(self).losses is Experiment.losses and getattr(model, "sequence_axis", None) not in (0, 1):
            raise ValueError(
                f"{type(model).__name__} has sequence_axis={getattr(model, 'sequence_axis', None)}, must be 0 "
                "(tokens [S, B]) or 1 (tokens [B, S])"
            )

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        """Build the state before the first step; raises ValueError if a given model does not fit."""
        return program.make_state(self.config.seed)

    # The checkpoint that a run starts from, if it does.

    def original(self) -> Original | None:
        """Describe the checkpoint that `initial` starts from; None if there is none. Saved with the run."""
        return None

    def resume(self, run: Path) -> None:
        """Prepare to continue a run that has a checkpoint; called before anything else of this class."""

    def warnings(self) -> list[str]:
        """Sentences to print before the first step about settings that are allowed and probably not intended."""
        return []

    # The data.

    def tokens(self, vocabulary: Vocabulary | None = None) -> Tokens:
        """Read the text as token ids, in a saved run's vocabulary if given.

        Raises ValueError if it cannot be read, or if the vocabulary has too many tokens for a model.
        """
        self.refuse_unnamed_text()
        try:
            with at_once():
                tokens = open_tokens(self.config.text, vocabulary or self.vocabulary, self.config.text_field)
        except ValueError:
            if not self.reads_unnamed:
                raise
            text = self.config.text  # the reason may repeat some of it
            raise ValueError(
                f"text={quoted(text)} of the run cannot be read in the run's vocabulary; if you trust it, name the "
                f"text yourself for the reason: --text {shlex.quote(text)}"
            ) from None
        if len(tokens.vocabulary) > MOST_SIZE:
            n, unit = len(tokens.vocabulary), tokens.vocabulary.unit
            raise ValueError(f"text={self.config.text!r} has a vocabulary of {n:,} {unit}s; at most {MOST_SIZE:,}")
        return tokens

    def task(self) -> Task:
        """Cut the text into examples; raises ValueError if it is shorter than a sequence."""
        tokens, seq_len, within = self.tokens(), self.config.seq_len, self.config.within_documents
        if within and tokens.documents is None:
            raise ValueError(f"within_documents: text={self.config.text!r} is one text, not several documents")
        train = windows_of(tokens.train, seq_len, "training", tokens.train_documents, within_documents=within)
        held_out = windows_of(
            tokens.validation, seq_len, "validation", tokens.validation_documents, within_documents=within
        )
        share = train.n_predicted / (len(train) * seq_len)
        filled = f"; {len(train):,} sequences within documents, {share:.0%} of their places filled"
        return Task(
            endless(train, self.config.seed),
            held_out,
            tokens.vocabulary,
            tokens.sha256,
            self.summary(tokens) + (filled if within else ""),
            None if within else tokens.train,  # for the baseline, which predicts the whole text
            None if within else tokens.validation,
        )

    def summary(self, tokens: Tokens) -> str:
        """One line about the text."""
        n, unit = len(tokens.vocabulary), tokens.vocabulary.unit
        return (
            f"{self.config.text}: {len(tokens.train):,} {unit}s to train on, {len(tokens.validation):,} to validate, "
            f"{n:,} different ones{''.join(f'; {note}' for note in tokens.notes)}"
        )

    # Reports while training.

    def validation_subset(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Select the held-out examples that a validation uses."""
        n = self.config.validation_batches
        return examples if n is None else First(examples, min(len(examples), n * self.config.batch_size))

    def baseline(self, task: Task, predicted: int) -> tuple[str, float] | None:
        """Name and validation loss of a baseline, over the first `predicted` tokens; None if there is none."""
        if task.train_ids is None or task.validation_ids is None or len(task.train_ids) > NGRAM_TOKENS:
            return None
        nats = NGram(task.train_ids, len(task.vocabulary)).nats(np.asarray(task.validation_ids[: predicted + 1]))
        return f"{task.vocabulary.unit} 4-gram (Witten-Bell)", float(nats[1:].mean())

    def report(self, model: Any, task: Task, interrupted: Interrupted) -> tuple[str, dict[str, float]]:
        """Sample greedily for a report: returns text ("" if the model cannot decode), and numbers for the log.

        Stops early if interrupted().
        """
        if missing_decoding(model):
            return "", {}
        ids = without_padding(task.validation[0])[:PROMPT_TOKENS]
        n_tokens = self.n_tokens(task.vocabulary)
        written = continue_text(
            model, ids, SAMPLE_TOKENS, self.config.seq_len, interrupted=interrupted, n_tokens=n_tokens
        )
        return f"{task.vocabulary.decode(ids)}|{task.vocabulary.decode(written)}", {}

    def n_tokens(self, vocabulary: Vocabulary) -> int:
        """Number of ids that a sample may consist of: a checkpoint's embedding may have more rows."""
        return len(vocabulary)

    def trackers(self, run: Path) -> list[Tracker]:
        """Further receivers of a run's numbers, such as a tracking service; called when training begins."""
        return []

    # Saved runs: for `evaluate` and `sample`.

    def held_out(self, run: Path, vocabulary: Vocabulary, sha256: str) -> Sequence[Example]:
        """Examples from the part of its text that a run did not train on.

        sha256: of the data that the run was trained on. Raises ValueError if the text has changed since then: its
        held-out part may contain training data.
        """
        if type(self).task is not Experiment.task:  # the experiment makes its own data
            task = self.task()
            check_unchanged(f"text={self.config.text!r}", run, now=task.sha256, then=sha256)
            return task.validation
        tokens = self.tokens(vocabulary)
        check_unchanged(f"text={self.config.text!r}", run, now=tokens.sha256, then=sha256)
        if self.config.within_documents:
            starts = tokens.validation_documents
            return windows_of(tokens.validation, self.config.seq_len, "validation", starts, within_documents=True)
        return self.examples(tokens.validation, run)

    def examples(self, ids: np.ndarray, run: Path) -> Sequence[Example]:
        """Cut a text, int [N], into the examples that a run's model is evaluated on."""
        return Windows(ids, self.config.seq_len, "given")

    @property
    def reads_tokens_alone(self) -> bool:
        """True if the model's only inputs are the tokens, so that any text of tokens can be scored with it."""
        return type(self).losses is Experiment.losses and type(self).examples is Experiment.examples

    def use_embedder(self, name: str) -> None:
        """Name the embedder of a saved run's chunk index, which may load a model from a network.

        Raises ValueError if the run has no index.
        """
        raise ValueError(f"embedder={name!r} (--embedder) is for runs with a chunk index, such as train.retro's")

    def generator(self, model: Any, run: Path) -> Any:
        """Wrap a run's model for generating text, if it needs something besides the tokens."""
        return model


def check_config(model: Any) -> None:
    """Raise ValueError if a model is not registered, or if its `config()` does not rebuild it."""
    name = name_of(model)
    try:
        describe(model)
    except TypeError as error:
        raise ValueError(f"{name}.config() has values that JSON cannot hold: {error}") from None
    rebuilt = shapes_of(lambda rngs: build(name, model.config(), rngs=rngs))
    ours, theirs = ({dotted(path): a.shape for path, a in flat_arrays(m).items()} for m in (model, rebuilt))
    differing = sorted(path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path))
    if differing:
        path = differing[0]
        raise ValueError(
            f"{name}.config() rebuilds another model: {path} is {theirs.get(path, 'missing')} in it and "
            f"{ours.get(path, 'missing')} in this one"
        )


def check_unchanged(what: str, run: Path, *, now: str, then: str) -> None:
    """Raise ValueError if the checksum of a run's data is not that of its training."""
    if now != then:
        before = shortened(then, 80)
        raise ValueError(
            f"{what} has changed since {run} was trained: sha256 {now} now, {before} then; name a text with --text"
        )


def missing_decoding(model: Any) -> list[str]:
    """Names of the members that `generate` needs and a model lacks."""
    return [name for name in DECODING if not hasattr(model, name)]


def continue_text(
    model: Any,
    ids: np.ndarray,
    length: int,
    seq_len: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    n_tokens: int | None = None,
    seed: int = 0,
    interrupted: Interrupted = never,
) -> np.ndarray:
    """Generate the next `length` tokens of a text: ids int [n] -> int32 [length], greedily at temperature 0.

    A model's text degrades beyond the seq_len positions that it was trained on: see `window` of `generate`. Returns
    fewer tokens if interrupted() between two passes over the text so far. top_k, top_p, n_tokens: as in `generate`;
    raises ValueError like `generate`.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    check_decoding(model)
    prompt = np.expand_dims(np.asarray(ids), 1 - model.sequence_axis)  # [n, 1] or [1, n]
    sampling = Sampling(temperature, top_k, top_p)
    key = jax.random.key(seed)
    decoding = Decoding(model, prompt, length, sampling, n_tokens=n_tokens, key=key, window=max(2, seq_len))
    while decoding.written < length and not interrupted():
        decoding.advance_segment()
    return to_host(decoding.tokens())[:, 0]


def script_of(kind: type[Experiment]) -> str:
    """Module name that an experiment is saved under, e.g. train.rope, also if `python -m` runs it as __main__."""
    module = sys.modules[kind.__module__]
    if module.__spec__ is not None:
        return module.__spec__.name
    return Path(module.__file__ or kind.__module__).stem  # python FILE.py


def experiment_class(name: str) -> type[Experiment]:
    """Import an experiment by a name of EXPERIMENTS, or by a module or a .py file that the user named.

    Raises ValueError if there is no such module or it has no EXPERIMENT.
    """
    module_name, file = EXPERIMENTS.get(name, name), Path(os.path.expanduser(name))
    if file.suffix == ".py" and file.is_file():  # as `python FILE` finds modules beside it
        sys.path.insert(0, str(file.absolute().parent))
        module_name = file.stem
    elif module_name in EXPERIMENTS.values():
        check_checkout(module_name)
    elif os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # `python -m` finds modules there, a console command does not
    try:
        if module_name.startswith("."):
            raise ModuleNotFoundError("it is no name of a module", name=module_name)
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its imports does not
        raise ValueError(
            f"experiment={name!r} must be one of {', '.join(EXPERIMENTS)}, or a module that can be imported, such as "
            f"my_project.experiment, or its file, such as folder/my_experiment.py: {error}"
        ) from None
    kind = getattr(module, "EXPERIMENT", None)
    if not (isinstance(kind, type) and issubclass(kind, Experiment)):
        raise ValueError(f"{module_name} has EXPERIMENT={kind!r}, must be a subclass of {Experiment.__name__}")
    return kind


def check_checkout(module: str) -> None:
    """Raise ValueError unless the package `train` is the one in this package's checkout.

    Many projects have a train.py or a package of that name; a run's config.json must not cause it to be imported.
    """
    expected, found = Path(jaxmodels.__file__).parents[1] / "train", None
    with contextlib.suppress(ModuleNotFoundError, ValueError):
        found = importlib.util.find_spec("train")
    if found is None or str(expected) not in map(str, found.submodule_search_locations or ()):
        raise ValueError(f"{module} must be importable: it is a script of the repository, run this from its checkout")
