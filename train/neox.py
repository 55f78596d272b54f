"""A GPT-NeoX from scratch, or a converted checkpoint fine-tuned, against a 4-gram model of the same text.

    python -m train.neox --text tiny_shakespeare           # or a FILE; without --text: Python's own language reference
    python -m train.neox --text tokens/                    # written by python -m train.tokenize
    python -m train.neox --preset finetune --checkpoint MODEL --text FILE                 # all of MODEL's weights
    python -m train.neox --preset finetune --checkpoint MODEL --text FILE --tune biases   # as the original experiment

MODEL is written by `python -m jaxmodels.convert neox SHARDS MODEL --to flax`; its tokenizer.json lies in or next to it.

Hardware   2 CPU cores, shared with test runs; float32
Time       5 min 32 s by the clock, 8 min 2 s of CPU time over both cores
Training   1000 steps of 16 sequences of 128 characters (2 epochs of tiny_shakespeare), AdamW; 809,984 parameters
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
           character 4-gram 1.774, this model 1.702

RUN/checkpoints/STEP/model is a checkpoint like any other: `jaxmodels.load` reads it, and `python -m jaxmodels.convert
neox` writes it as GPT-NeoX's own shards or for transformers.
"""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from flax import nnx

from jaxmodels.io.checkpoint import read_config
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.text import TokenizerFile, Vocabulary, find_tokenizer
from jaxmodels.training.checkpoints import open_model
from jaxmodels.training.config import AdamWConfig
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.script import run_script
from jaxmodels.training.step import Program, State
from jaxmodels.training.tokenize import Tokens, open_tokens

PUBLISHED_VOCAB = 50_432
# Parameters that the original experiment tunes: the biases of a block's linear maps except the last.
BIASES = re.compile(r"layers\.(\d+\.)?(attention\.qkv_lin|attention\.output|ffn\.dense_h_h4)\.bias")


@dataclasses.dataclass(frozen=True)
class Config(AdamWConfig):
    """Hyperparameters of a run."""

    PRESETS = ("small", "pythia_70m", "finetune", "neox_20b")

    steps: int = 1000
    """total steps; raise it to extend a finished run (not with schedule=cosine)"""
    warmup: int = 100
    """steps until the schedule's peak"""
    rope_percentage: float = 0.25
    """share of a head's features that are rotated"""
    checkpoint: str | None = None
    """folder of a GPT-NeoX written by jaxmodels.save or python -m jaxmodels.convert, to start from; its sizes override
    the flags"""
    tokenizer: str | None = None
    """tokenizer.json of the checkpoint, to encode a text; if omitted: the one in or next to its folder"""
    tune: Literal["all", "biases"] = "all"
    """train all weights, or only a checkpoint's biases of queries, keys, values, attention output and the feed-forward
    network's hidden layer"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout={self.dropout} must be 0: GPT-NeoX has none")

    @classmethod
    def small(cls) -> "Config":
        """Minutes on two CPU cores."""
        return cls()

    @classmethod
    def pythia_70m(cls) -> "Config":
        """The sizes of Pythia-70M, for an accelerator."""
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
        """The original experiment's fine-tuning of a --checkpoint, with Adam at a constant rate."""
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
        """The sizes of GPT-NeoX-20B with AdamW, for a TPU pod."""
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


class Neox(Experiment[Config]):
    config_class = Config

    @property
    def standalone(self) -> bool:
        return True  # a saved run has its vocabulary

    def model(self, n_vocab: int) -> NeoX:
        c = self.config
        if c.checkpoint is not None:
            config = self.loaded()
            if n_vocab > config.n_vocab:
                raise ValueError(
                    f"text has {n_vocab} different tokens; checkpoint={c.checkpoint!r} has {config.n_vocab}"
                )
            return NeoX(config, rngs=nnx.Rngs(c.seed))
        config = NeoXConfig(
            n_vocab=n_vocab,
            n_hidden=c.d_model,
            n_layers=c.n_layers,
            n_heads=c.heads,
            rope_percentage=c.rope_percentage,
            activation="gelu_tanh",
            n_ff=c.d_ff,
            max_len=c.seq_len,
        )
        return NeoX(config, rngs=nnx.Rngs(c.seed))

    def loaded(self) -> NeoXConfig:
        """Read the checkpoint's configuration; raises ValueError if it holds another model."""
        assert self.config.checkpoint is not None
        name, fields = read_config(Path(self.config.checkpoint))
        if name != "NeoX" or fields.get("int8_threshold") is not None:
            kind = "a quantized NeoX" if name == "NeoX" else f"a {name}"
            raise ValueError(f"checkpoint={self.config.checkpoint!r} holds {kind}, must be a NeoX to train")
        return NeoXConfig(**{name: value for name, value in fields.items() if name != "stacked"})

    @property
    def planned_vocab(self) -> int:
        return PUBLISHED_VOCAB if self.config.d_model >= 512 else super().planned_vocab

    @property
    def width(self) -> int:
        return self.config.d_model if self.config.checkpoint is None else self.loaded().n_hidden

    def trains(self, path: str) -> bool:
        return self.config.tune == "all" or BIASES.fullmatch(path) is not None

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        if self.config.checkpoint is None:
            return super().initial(program, vocabulary)
        model = open_model(Path(self.config.checkpoint), program.mesh)
        return program.state_of(model.stacked(), self.config.seed)

    def tokens(self, vocabulary: Vocabulary | None = None) -> Tokens:
        c = self.config
        if c.tune == "biases" and c.checkpoint is None:
            raise ValueError("tune='biases' needs a trained model: name it with --checkpoint")
        if c.checkpoint is None or vocabulary is not None or Path(c.text).is_dir():
            return open_tokens(c.text, vocabulary)
        file = find_tokenizer(None if c.tokenizer is None else Path(c.tokenizer), Path(c.checkpoint))
        return open_tokens(c.text, TokenizerFile.read(file))


EXPERIMENT = Neox

if __name__ == "__main__":
    run_script(Neox, "python -m train.neox")
