"""A small character model with a Feedback Transformer whose layers each have their own keys and values.

    python -m train.feedback --text tiny_shakespeare       # or a FILE; without --text: Python's own language reference

Hardware   2 CPU cores, shared with test runs; float32
Time       6 min 4 s by the clock, 5 min 39 s of CPU time over both cores
Training   1200 steps of 32 sequences of 64 characters (2.4 epochs of tiny_shakespeare); 1,494,596 parameters
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
           character 4-gram 1.774, this model 1.655

The same command resumes the run; --steps 3000 extends it. To start from a parallel transformer's weights, with
sequences that grow:

    python -m train.rope --attention relative --n-layers 2 --out runs/parallel
    python -m train.feedback --from-parallel runs/parallel --start-len 16 --double-every 200
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

import tyro
from flax import nnx

from jaxmodels.attention_kernels import Kernel
from jaxmodels.feedback import AutoregressiveModel
from jaxmodels.feedback.parallel import from_parallel
from jaxmodels.text import Vocabulary, load_vocabulary
from jaxmodels.training.checkpoints import latest_model
from jaxmodels.training.config import TransformerConfig
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.script import run_script
from jaxmodels.training.step import Program, State


@dataclasses.dataclass(frozen=True)
class Config(TransformerConfig):
    """Hyperparameters of a run."""

    PRESETS = ("small", "original")

    n_layers: int = 2
    """layers"""
    seq_len: int = 64
    """tokens per training sequence"""
    batch_size: int = 32
    """sequences per step, over all devices"""
    steps: int = 1200
    """total steps; raise it to extend a finished run (not with schedule=cosine)"""
    warmup: int = 300
    """steps until the schedule's peak"""
    every: int = 400
    """validate, sample and checkpoint every N steps"""
    memory: int | None = None
    """a position attends to this many previous ones; None: to all of them"""
    start_len: int | None = None
    """curriculum of lengths: the first steps compute with this many tokens of each sequence; None: with seq_len"""
    double_every: int = 300
    """double the curriculum's length every N steps, up to seq_len"""
    attention_kernel: tyro.conf.Suppress[Kernel] = "auto"  # the recurrence has one implementation
    from_parallel: str | None = None
    """start from the weights of this run of python -m train.rope --attention relative, with these sizes on this text"""

    variant: ClassVar[str] = "FeedbackTransformer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_len is not None and not 1 <= self.start_len <= self.seq_len:
            raise ValueError(f"start_len={self.start_len} must be from 1 to seq_len={self.seq_len}")

    def positive(self) -> list[str]:
        return [*super().positive(), "memory", "double_every"]

    def unused(self) -> dict[str, str]:
        found = super().unused()
        if self.start_len is None:
            found["double_every"] = "start_len=None begins with whole sequences"
        if self.remat != "none":
            found["remat"] = "the backward pass of a Feedback Transformer always recomputes its layers"
        return found

    @classmethod
    def small(cls) -> "Config":
        """Minutes on two CPU cores."""
        return cls()

    @classmethod
    def original(cls) -> "Config":
        """The sizes of the original experiment, for an accelerator."""
        return cls(
            d_model=512,
            heads=8,
            d_ff=2048,
            n_layers=6,
            seq_len=128,
            batch_size=64,
            steps=30_000,
            warmup=2000,
            every=1000,
        )


class Feedback(Experiment[Config]):
    config_class = Config

    def model(self, n_vocab: int) -> AutoregressiveModel:
        c = self.config
        sizes = {name: getattr(c, name) for name in ("d_model", "heads", "d_ff", "n_layers", "memory")}
        return AutoregressiveModel.from_config(
            n_vocab, c.variant, **sizes, dropout_prob=c.dropout, rngs=nnx.Rngs(c.seed)
        )

    def length_at(self, step: int) -> int:
        c = self.config
        return c.seq_len if c.start_len is None else min(c.seq_len, c.start_len << min(step // c.double_every, 32))

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        c = self.config
        if c.from_parallel is None:
            return super().initial(program, vocabulary)
        self.refuse_unnamed("from_parallel", would="be copied into it")
        run = Path(c.from_parallel)
        model, _ = latest_model(run)
        if load_vocabulary(run / "vocabulary.json") != vocabulary:
            raise ValueError(f"from_parallel={c.from_parallel!r} was trained on a text with other tokens")
        return program.state_of(from_parallel(model, c.variant, memory=c.memory), c.seed)


EXPERIMENT = Feedback

if __name__ == "__main__":
    run_script(Feedback, "python -m train.feedback")
