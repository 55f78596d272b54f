"""A GPT-NeoX from scratch, or a converted checkpoint trained on, against a 4-gram model of the same text.

    python -m train.neox --text tiny_shakespeare           # or a FILE; without --text: Python's own language reference
    python -m train.neox --text tokens/                    # what python -m train.tokenize wrote
    python -m train.neox --preset finetune --checkpoint MODEL --text FILE                 # all of MODEL's weights
    python -m train.neox --preset finetune --checkpoint MODEL --text FILE --tune biases   # as the original experiment

MODEL is what `python -m jaxmodels.convert neox SHARDS MODEL --to flax` wrote, with its tokenizer.json in or beside it.

Hardware   2 CPU cores, which test runs were using too; float32
Time       5 min 32 s by the clock, 8 min 2 s of CPU time over both cores
Training   1000 steps of 16 sequences of 128 characters (2 epochs of tiny_shakespeare), AdamW; 809,984 parameters
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
           character 4-gram 1.774, this model 1.702

The run's model is a checkpoint like any other: RUN/checkpoints/STEP/model loads with `jaxmodels.load`, and
`python -m jaxmodels.convert neox` writes it as GPT-NeoX's own shards or for transformers.
"""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from flax import nnx

from jaxmodels.io.checkpoint import read_config
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.generate import find_tokenizer
from jaxmodels.text import TokenizerFile, Vocabulary
from jaxmodels.training import experiment
from jaxmodels.training.checkpoints import open_model
from jaxmodels.training.step import Program, State
from jaxmodels.training.tokenize import Tokens, open_tokens

PUBLISHED_VOCAB = 50_432
# What the original experiment tunes: the biases of all of a block's linear maps but the last.
BIASES = re.compile(r"layers\.(\d+\.)?(attention\.qkv_lin|attention\.output|ffn\.dense_h_h4)\.bias")


@dataclasses.dataclass(frozen=True)
class Config(experiment.AdamWConfig):
    """What decides the numbers of a run."""

    PRESETS = ("small", "pythia_70m", "finetune", "neox_20b")

    steps: int = 1000
    """steps of the whole run"""
    warmup: int = 100
    """steps until the schedule's peak"""
    rope_percentage: float = 0.25
    """share of a head's features that turn with their position"""

    checkpoint: str | None = None
    """folder of a GPT-NeoX that jaxmodels.save or python -m jaxmodels.convert wrote, to begin with; the model's own
    sizes take the place of these flags'"""
    tokenizer: str | None = None
    """tokenizer.json of the checkpoint, for a text that is not in tokens yet; none: the one in or beside its folder"""
    tune: Literal["all", "biases"] = "all"
    """what is trained: all weights; or, of a checkpoint, the biases of queries, keys, values, attention's output and
    the feed-forward network's hidden layer alone"""

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
        return cls(
            d_model=512,
            heads=8,
            d_ff=2048,
            n_layers=6,
            seq_len=2048,
            batch_size=32,
            learning_rate=1e-3,
            steps=20_000,
            warmup=200,
            every=1000,
            compute_dtype="bfloat16",
        )

    @classmethod
    def finetune(cls) -> "Config":
        """The original experiment's fine-tuning, of a --checkpoint: Adam at a constant rate."""
        return cls(
            seq_len=128,
            batch_size=64,
            optimizer="original",
            schedule="constant",
            learning_rate=3e-4,
            b2=0.999,
            eps=1e-16,
            steps=1000,
            warmup=1,
            every=200,
        )

    @classmethod
    def neox_20b(cls) -> "Config":
        """GPT-NeoX-20B's sizes with AdamW: meant for a TPU pod."""
        return cls(
            d_model=6144,
            heads=64,
            d_ff=24_576,
            n_layers=44,
            seq_len=2048,
            batch_size=256,
            learning_rate=9.7e-5,
            steps=150_000,
            warmup=1500,
            every=1000,
            compute_dtype="bfloat16",
            remat="layers",
        )

    @property
    def planned_vocab(self) -> int:
        return PUBLISHED_VOCAB if self.d_model >= 512 else super().planned_vocab

    def tokens(self) -> Tokens:
        if self.tune == "biases" and self.checkpoint is None:
            raise ValueError("tune='biases' tunes a trained model: name it with --checkpoint")
        if self.checkpoint is None or Path(self.text).is_dir():
            return open_tokens(self.text)
        file = find_tokenizer(None if self.tokenizer is None else Path(self.tokenizer), Path(self.checkpoint))
        return open_tokens(self.text, TokenizerFile.read(file))

    def trains(self, path: str) -> bool:
        return self.tune == "all" or BIASES.fullmatch(path) is not None

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        if self.checkpoint is None:
            return super().initial(program, vocabulary)
        stacked = read_config(Path(self.checkpoint))[1].get("stacked", True)  # else it has no table of shardings
        model = open_model(Path(self.checkpoint), program.mesh if stacked else None)
        return program.state_of(model.stacked(), self.seed)

    @property
    def width(self) -> int:
        return self.d_model if self.checkpoint is None else self.loaded().n_hidden

    def loaded(self) -> NeoXConfig:
        """The checkpoint's configuration; raises ValueError where it holds another model."""
        assert self.checkpoint is not None
        name, fields = read_config(Path(self.checkpoint))
        if name != "NeoX" or fields.get("int8_threshold") is not None:
            kind = "a quantised NeoX" if name == "NeoX" else f"a {name}"
            raise ValueError(f"checkpoint={self.checkpoint!r} holds {kind}, not a NeoX to train")
        return NeoXConfig(**{name: value for name, value in fields.items() if name != "stacked"})

    def model(self, n_vocab: int) -> NeoX:
        if self.checkpoint is not None:
            config = self.loaded()
            if n_vocab > config.n_vocab:
                raise ValueError(f"the text has {n_vocab} different tokens, the checkpoint {config.n_vocab}")
            return NeoX(config, rngs=nnx.Rngs(self.seed))
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
