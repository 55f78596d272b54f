"""A small character model with a Feedback Transformer, each layer with keys and values of its own.

    python -m train.feedback --text tiny_shakespeare       # or a FILE; without --text: Python's own language reference

Hardware   2 CPU cores, which test runs were using too; float32
Time       6 min 4 s by the clock, 5 min 39 s of CPU time over both cores
Training   1200 steps of 32 sequences of 64 characters (2.4 epochs of tiny_shakespeare); 1,494,596 parameters
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
           character 4-gram 1.774, this model 1.655

The same command again goes on with the run; --steps 3000 makes it longer. Sequences that grow, and a parallel
transformer's weights to begin with:

    python -m train.rope --attention relative --n-layers 2 --out runs/parallel
    python -m train.feedback --from-parallel runs/parallel --start-len 16 --double-every 200
"""

import dataclasses
from pathlib import Path

from flax import nnx

from jaxmodels.feedback import AutoregressiveModel, from_parallel
from jaxmodels.text import Vocabulary, load_vocabulary
from jaxmodels.training import experiment
from jaxmodels.training.checkpoints import latest_model
from jaxmodels.training.step import Program, State


@dataclasses.dataclass(frozen=True)
class Config(experiment.Config):
    """What decides the numbers of a run."""

    n_layers: int = 2
    """layers"""
    seq_len: int = 64
    """characters of a training sequence"""
    batch_size: int = 32
    """sequences of a step"""
    steps: int = 1200
    """steps of the whole run; more of them make a run longer that has ended"""
    warmup: int = 300
    """steps until the schedule's peak"""
    every: int = 400
    """steps from one validation, greedy sample and checkpoint to the next"""
    memory: int | None = None
    """a step sees the memory of so many steps before it; None: of all of them"""

    start_len: int | None = None
    """a curriculum of lengths: the first steps compute with so many tokens of each sequence; None: with all of them"""
    double_every: int = 300
    """steps from one doubling of the curriculum's length to the next, until it is seq_len"""
    from_parallel: str | None = None
    """folder of a run of python -m train.rope --attention relative, of these sizes and on this text: its weights are
    where training begins"""

    variant = "FeedbackTransformer"

    def __post_init__(self):
        super().__post_init__()
        if self.start_len is not None and not 1 <= self.start_len <= self.seq_len:
            raise ValueError(f"start_len={self.start_len} must be from 1 to seq_len={self.seq_len}")

    def positive(self) -> list[str]:
        return [*super().positive(), "memory", "double_every"]

    def length_at(self, step: int) -> int:
        if self.start_len is None:
            return self.seq_len
        return min(self.seq_len, self.start_len << min(step // self.double_every, 32))

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        if self.from_parallel is None:
            return super().initial(program, vocabulary)
        run = Path(self.from_parallel)
        model, _ = latest_model(run)
        if load_vocabulary(run / "vocabulary.json") != vocabulary:
            raise ValueError(f"from_parallel={self.from_parallel!r} was trained on a text with other tokens")
        return program.state_of(from_parallel(model, self.variant, memory=self.memory), self.seed)

    @classmethod
    def small(cls) -> "Config":
        """Minutes on two CPU cores."""
        return cls()

    @classmethod
    def original(cls) -> "Config":
        """The sizes of the original experiment: meant for an accelerator."""
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

    def model(self, n_vocab: int) -> AutoregressiveModel:
        sizes = {name: getattr(self, name) for name in ("d_model", "heads", "d_ff", "n_layers", "memory")}
        return AutoregressiveModel.from_config(
            n_vocab, self.variant, **sizes, dropout_prob=self.dropout, rngs=nnx.Rngs(self.seed)
        )


if __name__ == "__main__":
    experiment.run_script(Config, "python -m train.feedback")
