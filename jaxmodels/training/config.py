"""Hyperparameters (`Config`) and execution options (`Options`) of a run.

A `Config` determines the numbers of a run and is saved with it. `Options` may differ when a run is resumed. The string
below a field is its text in --help.
"""

import dataclasses
import itertools
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import tyro

from jaxmodels.attention_kernels import Kernel, check_kernel
from jaxmodels.process.distributed import Processes
from jaxmodels.process.paths import check_utf8
from jaxmodels.process.seeds import seed_32
from jaxmodels.process.texts import quoted
from jaxmodels.text.sources import names_documents
from jaxmodels.training.optimizers import OptimizerName, ScheduleName, check_momentum, make_schedule, without_effect
from jaxmodels.training.step import Numerics, Precision, Remat

# Each layer is a module of its own when a model is built; published ones have up to 1,000.
MOST_LAYERS = 2_000
MOST_SIZE = 2**20  # of a batch, a sequence, a vocabulary, a width: larger ones take minutes, or end the compiler
MOST = 2**31 - 1  # of what is counted: steps have 32-bit numbers
COUNTED = ("accumulate", "steps", "warmup", "every", "loss_chunk", "validation_batches", "keep", "keep_every")
# For scripts whose flag --attention does not name a kind of attention.
AttentionKernel = Annotated[Kernel, tyro.conf.arg(aliases=("--attention",))]


@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters of a run. An experiment adds the sizes of its model.

    PRESETS are names of classmethods, each with a docstring of one line; the first is the default. If a subclass names
    none, its only preset is `default`, the fields' own defaults.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("default",)

    text: str = "python_docs"
    """python_docs (the language reference inside every Python), tiny_shakespeare (downloaded once), a UTF-8 FILE, a
    FOLDER written by python -m train.tokenize, or documents: a .jsonl, .parquet or .arrow file, or a folder of them"""
    text_field: str = "text"
    """field or column of .jsonl, .parquet and .arrow files that holds the text"""
    within_documents: bool = False
    """train and validate on sequences that do not cross documents; their ends are padded, and padding is in no loss"""
    seq_len: int = 128
    """tokens per training sequence"""
    batch_size: int = 16
    """sequences per step, over all devices"""
    accumulate: int = 1
    """compute each batch in this many parts, one after the other, to save memory"""
    steps: int = 2000
    """total steps; raise it to extend a finished run (not with schedule=cosine)"""
    optimizer: OptimizerName = "original"
    """original: Adam with epsilon added before bias correction, as the original experiments; torch: after it; adamw;
    adafactor; lion; muon: for matrices of layers, AdamW for the rest. --learning-rate is the preset's for each of them;
    common peak rates: adamw and muon 1e-3, lion 1e-4 (with --weight-decay 1), adafactor 1e-2 (relative to the root
    mean square of a parameter)"""
    schedule: ScheduleName = "noam"
    """learning rate schedule: noam; cosine, down to a tenth at the last step; or constant"""
    learning_rate: float = 1.0
    """noam: factor lr of lr · d_model^-½ · min(t^-½, t · warmup^-3/2) at step t; otherwise the peak rate"""
    warmup: int = 500
    """steps until the peak of schedule=noam or cosine"""
    b2: float = 0.999
    """decay rate of squared gradients with optimizer=original, torch, adamw or muon"""
    eps: float = 1e-8
    """epsilon of optimizer=original, torch, adamw or muon"""
    weight_decay: float = 0.1
    """decay of matrices with optimizer=adamw, adafactor, lion or muon"""
    clip: float | None = 1.0
    """clip gradients to this global norm; None: no clipping"""
    compute_dtype: Precision = "float32"
    """dtype of the step's computation; losses, softmax and norms are always computed in float32"""
    param_dtype: Precision = "float32"
    """dtype of parameters and optimizer moments"""
    momentum_dtype: Precision | None = None
    """dtype of the optimizer's first moments; None: that of the parameters. bfloat16 halves their memory; averages of
    squared gradients keep the parameters' dtype. Not for optimizer=adafactor, which has no momentum"""
    remat: Remat = "none"
    """recompute in the backward pass instead of storing: none; layers; dots (everything in a layer but its matrix
    products)"""
    loss_chunk: int | None = None
    """tokens of a batch whose logits are computed together; None: as many as have 2²⁵ logits on a CPU, 2²⁶ on each
    other device, or 2²⁴ if it computes those of a part of the vocabulary"""
    every: int = 500
    """validate, sample and checkpoint every N steps"""
    validation_batches: int | None = None
    """batches per validation; None: the whole held-out text"""
    keep: int = 3
    """number of latest checkpoints to keep"""
    keep_every: int | None = None
    """also keep checkpoints whose step is a multiple of this"""
    seed: int = 0
    """seed of initial weights, order of the examples and dropout; one of 2³² or more is hashed to 32 bits"""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        for name in self.positive():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
            most = MOST_LAYERS if name.endswith("layers") else MOST if name in COUNTED else MOST_SIZE
            if value is not None and value > most:
                raise ValueError(f"{name}={value} must be at most {most:,}")
        object.__setattr__(self, "seed", seed_32(self.seed))
        kinds = hints(type(self))
        for field in dataclasses.fields(self):
            value = with_tuples(getattr(self, field.name), kinds.get(field.name))
            object.__setattr__(self, field.name, value)
            if isinstance(value, str):
                check_utf8(value, field.name)
            if type(value) is int and may_be_float(kinds.get(field.name)):
                try:
                    object.__setattr__(self, field.name, float(value))
                except OverflowError:
                    raise ValueError(f"{field.name}={quoted(value)} must be a finite number") from None
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name}={value} must be a finite number")
        for name in ("learning_rate", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0")
        if not 0 <= self.b2 < 1:
            raise ValueError(f"b2={self.b2} must be at least 0 and below 1")
        check_momentum(self.optimizer, self.momentum_dtype)
        # Raises if a cosine does not fit the steps; any width will do, as it only scales the rates.
        make_schedule(self.schedule, self.learning_rate, width=1, warmup=self.warmup, steps=self.steps)

    def positive(self) -> list[str]:
        """Names of the fields that must be at least 1, if set: layers, sizes, and those of COUNTED."""
        return ["seq_len", "batch_size", *COUNTED]

    def unused(self) -> dict[str, str]:
        """Fields that have no effect with the values of the others, each with the reason.

        A command refuses such a flag if it is given. The fields themselves may have any value, such as a preset's.
        """
        found = without_effect(self.optimizer)
        if self.schedule == "constant":
            found["warmup"] = "schedule=constant has no warmup; noam and cosine have"
        if not names_documents(self.text):
            found["text_field"] = f"text={self.text!r} has no fields or columns; .jsonl, .parquet and .arrow files have"
        return found

    @property
    def numerics(self) -> Numerics:
        return Numerics(self.accumulate, self.compute_dtype, self.param_dtype, self.remat, self.loss_chunk)

    @classmethod
    def default(cls) -> Self:
        """Defaults of all flags."""
        return cls()

    @classmethod
    def of_preset(cls, name: str) -> Self:
        """Build the config of a preset; raises ValueError for an unknown name."""
        if name not in cls.PRESETS:
            raise ValueError(f"preset={name!r} must be one of {', '.join(cls.PRESETS)}")
        return getattr(cls, name)()

    @classmethod
    def describe_presets(cls) -> str:
        """One line that lists the presets with their docstrings."""
        described = (f"{name}: {(getattr(cls, name).__doc__ or '').rstrip('.')}" for name in cls.PRESETS)
        return "; ".join(described)

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> Self:
        """Build from a run's saved values, ignoring fields that this class does not have; raises as `check_types`."""
        names = {field.name for field in dataclasses.fields(cls)}
        cls.check_types(values)
        return cls(**{name: value for name, value in values.items() if name in names})

    @classmethod
    def check_types(cls, values: dict[str, Any]) -> None:
        """Raise ValueError for a value of a field that is not of its type, as a file of others may have.

        Fields of other types than numbers, strings, truth values, None, and choices and tuples of these are not read.
        """
        for name, kind in hints(cls).items():
            if name in values and not fits(values[name], kind):
                raise ValueError(f"{name}={quoted(values[name])} must be {described(kind)}")


def hints(kind: type) -> dict[str, Any]:
    """Types of a class's fields; none of a class inside a function, whose module postpones annotations."""
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return {}


def may_be_float(kind: Any) -> bool:
    """True for float, and for a union with it."""
    return kind is float or float in typing.get_args(kind)


def with_tuples(value: Any, kind: Any) -> Any:
    """Value of a JSON text with lists as tuples, where its type says so."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for one in kinds:
        if isinstance(value, list) and tuple in (one, typing.get_origin(one)):
            given = typing.get_args(one)
            inner = given[:1] * len(value) if given[1:] == (...,) else given[: len(value)]
            return tuple(itertools.starmap(with_tuples, itertools.zip_longest(value, inner)))
    return value


def fits(value: Any, kind: Any) -> bool:
    """True if a value of a JSON text may stand for one of a type, or if nothing is known of the type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return any(type(value) is type(one) and value == one for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,):
        return isinstance(value, list | tuple) and all(fits(one, typing.get_args(kind)[0]) for one in value)
    if kind is float:
        return type(value) in (int, float)
    if kind in (int, str, bool, types.NoneType):
        return type(value) is kind
    return True


def described(kind: Any) -> str:
    """A type as in its annotation."""
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Config):
    """Hyperparameters of a small transformer language model."""

    d_model: int = 128
    """features per token"""
    heads: int = 4
    """attention heads of d_model / heads features each"""
    d_ff: int = 512
    """hidden features of a feed-forward network"""
    n_layers: int = 4
    """layers"""
    dropout: float = 0.0
    """dropout rate of features and attention weights"""
    attention_kernel: Kernel = "auto"
    """kernel of causal attention. auto: fused where it applies, otherwise blocks; fused: cuDNN on CUDA devices, splash
    attention on TPUs; blocks: each block of queries over its prefix of the keys; plain: the whole score matrix"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.attention_kernel)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    @property
    def numerics(self) -> Numerics:
        return dataclasses.replace(super().numerics, attention_kernel=self.attention_kernel)

    def positive(self) -> list[str]:
        return [*super().positive(), "d_model", "heads", "d_ff", "n_layers"]


@dataclasses.dataclass(frozen=True)
class AdamWConfig(TransformerConfig):
    """Hyperparameters of a run with AdamW and a cosine schedule, instead of the originals' Adam and Noam schedule."""

    optimizer: OptimizerName = "adamw"
    """original: Adam with epsilon added before bias correction, as the original experiments; torch: after it; adamw;
    adafactor; lion; muon: for matrices of layers, AdamW for the rest. --learning-rate is the preset's for each of them;
    common peak rates: adamw and muon 1e-3, lion 1e-4 (with --weight-decay 1), adafactor 1e-2 (relative to the root
    mean square of a parameter)"""
    schedule: ScheduleName = "cosine"
    """learning rate schedule: noam; cosine, down to a tenth at the last step; or constant"""
    learning_rate: float = 2e-3
    """noam: factor lr of lr · d_model^-½ · min(t^-½, t · warmup^-3/2) at step t; otherwise the peak rate"""
    b2: float = 0.95
    """decay rate of squared gradients with optimizer=original, torch, adamw or muon"""


MULTI_PROCESS = tyro.conf.arg(name="multi-process", prefix_name=False)


@dataclasses.dataclass(frozen=True)
class Options:
    """Execution options of a run: devices, processes, compile cache, profile, logs."""

    mesh: str = ""
    """devices along the axes data, fsdp and tensor, e.g. fsdp=4,tensor=2; data takes the remaining ones"""
    processes: Annotated[Processes, MULTI_PROCESS] = dataclasses.field(default_factory=Processes)
    compile_cache: Path | None = None
    """folder that keeps compiled programs for the next start"""
    profile: int = 0
    """trace N steps, beginning with the second, into RUN/profile, for TensorBoard and Perfetto"""
    tensorboard: bool = True
    """write TensorBoard files in addition to metrics.jsonl"""
    wandb: str | None = None
    """project of Weights & Biases to log to as well (pip install 'jaxmodels[wandb]')"""

    def __post_init__(self) -> None:
        if self.profile < 0:
            raise ValueError(f"profile={self.profile} must be at least 0")
