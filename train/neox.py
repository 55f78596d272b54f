"""A small GPT-NeoX from scratch, against a 4-gram model of the same text.

    python -m train.neox --text tiny_shakespeare           # or a FILE; without --text: Python's own language reference
    python -m train.neox --text tokens/                    # what python -m train.tokenize wrote

The run's model is a checkpoint like any other: RUN/checkpoints/STEP/model loads with `jaxmodels.load`, and
`python -m jaxmodels.convert neox` writes it as GPT-NeoX's own shards or for transformers.
"""

import dataclasses

from flax import nnx

from jaxmodels.neox import NeoX, NeoXConfig
from train import experiment
from train.optimizers import OptimizerName, ScheduleName


@dataclasses.dataclass(frozen=True)
class Config(experiment.Config):
    """What decides the numbers of a run."""

    PRESETS = ("small", "pythia_70m")

    optimizer: OptimizerName = "adamw"
    """original: Adam with epsilon before the bias correction, as the original experiments; torch: after it; adamw"""
    schedule: ScheduleName = "cosine"
    """of the learning rate: noam; cosine, to a tenth at the last step; or constant"""
    learning_rate: float = 2e-3
    """factor of Noam, lr · width^-½ · min(t^-½, t · warmup^-3/2) at step t; the highest rate of the others"""
    steps: int = 1000
    """steps of the whole run; more of them make a run longer that has ended"""
    warmup: int = 100
    """steps until the schedule's peak"""
    b2: float = 0.95
    """Adam's memory of squared gradients"""
    rope_percentage: float = 0.25
    """share of a head's features that turn with their position"""

    def __post_init__(self):
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout={self.dropout}: GPT-NeoX has none, leave it at 0")

    @classmethod
    def small(cls) -> "Config":
        """Minutes on two CPU cores."""
        return cls()

    @classmethod
    def pythia_70m(cls) -> "Config":
        """The smallest published Pythia's sizes but one: meant for an accelerator."""
        sizes = {"d_model": 512, "heads": 8, "d_ff": 2048, "n_layers": 6, "seq_len": 2048, "batch_size": 32}
        return cls(**sizes, learning_rate=1e-3, steps=20_000, warmup=200, compute_dtype="bfloat16", every=1000)

    def model(self, n_vocab: int) -> NeoX:
        config = NeoXConfig(
            n_vocab=n_vocab,
            n_hidden=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.heads,
            rope_percentage=self.rope_percentage,
            activation="gelu_tanh",
            n_ff=self.d_ff,
            max_len=self.seq_len,
        )
        return NeoX(config, rngs=nnx.Rngs(self.seed))


if __name__ == "__main__":
    experiment.run_script(Config, "python -m train.neox")
