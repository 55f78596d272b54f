"""A GPT-NeoX from scratch, or a converted checkpoint fine-tuned, against a 4-gram model of the same text.

    python -m train.neox --text tiny_shakespeare           # or a FILE; without --text: Python's own language reference
    python -m train.neox --text tokens/                    # written by python -m train.tokenize
    python -m train.neox --preset finetune --checkpoint SOURCE --text FILE                # all of SOURCE's weights
    python -m train.neox --preset finetune --checkpoint SOURCE --text FILE --tune lora    # a low-rank adapter
    python -m train.neox --preset finetune --checkpoint SOURCE --text FILE --tune biases  # as the original experiment

SOURCE is whatever `jaxmodels.load` takes: a Hugging Face folder or Hub id, GPT-NeoX's shards, a model folder, a run.

Hardware   2 CPU cores, shared with test runs; float32
Time       5 min 32 s by the clock, 8 min 2 s of CPU time over both cores
Training   1000 steps of 16 sequences of 128 characters (2 epochs of tiny_shakespeare), AdamW; 809,984 parameters
Result     tiny_shakespeare, seed 0, validation loss in nats per character over the same characters:
           character 4-gram 1.774, this model 1.702

A run is a checkpoint like any other: `jaxmodels.load(RUN)` reads it, with an adapter merged, and `jaxmodels convert
neox RUN DST --to hf` writes it in the original's dtype, with the original's tokenizer; `--to peft` writes the adapter.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from flax import nnx

from jaxmodels.convert.open import Opened, is_remote
from jaxmodels.io.bounded import errors_naming
from jaxmodels.io.checkpoint import read_config, stored_types
from jaxmodels.io.steps import latest_step, problem, steps
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.neox.lora import LoRA, LoRANeoX
from jaxmodels.process.texts import quoted
from jaxmodels.text import Vocabulary, load_vocabulary
from jaxmodels.text.sources import is_tokens
from jaxmodels.training.config import AdamWConfig, AttentionKernel
from jaxmodels.training.experiment import Experiment
from jaxmodels.training.runs.original import Original, open_neox, original_of, types_of, widest
from jaxmodels.training.script import run_script
from jaxmodels.training.step import Program, State
from jaxmodels.training.tokenize import Tokens
from jaxmodels.weights.names import flat_arrays, with_arrays

PUBLISHED_VOCAB = 50_432
Tune = Literal["all", "biases", "lora"]
# Paths of the trained parameters. The original experiment tunes the biases of a block's linear maps except the last.
TRAINED: dict[Tune, str] = {
    "all": r".*",
    "biases": r"layers\.(\d+\.)?(attention\.qkv_lin|attention\.output|ffn\.dense_h_h4)\.bias",
    "lora": r".*\.lora_[ab]",
}


@dataclasses.dataclass(frozen=True)
class Config(AdamWConfig):
    """Hyperparameters of a run."""

    PRESETS = ("small", "pythia_70m", "finetune", "neox_20b")

    steps: int = 1000
    """total steps; raise it to extend a finished run (not with schedule=cosine)"""
    warmup: int = 100
    """steps until the schedule's peak"""
    attention_kernel: AttentionKernel = "auto"
    """kernel of causal attention. auto: fused where it applies, otherwise blocks; fused: cuDNN on CUDA devices, splash
    attention on TPUs; blocks: each block of queries over its prefix of the keys; plain: the whole score matrix"""
    rope_percentage: float = 0.25
    """share of a head's features that are rotated"""
    checkpoint: str | None = None
    """GPT-NeoX to start from: a folder of Hugging Face, of GPT-NeoX's shards or of jaxmodels.save, a run, or a Hub id;
    the model has its sizes"""
    tokenizer: str | None = None
    """tokenizer.json to encode a text with; if omitted: the checkpoint's own"""
    tune: Tune = "all"
    """all: train all weights, in param_dtype; lora: a low-rank adapter; biases: those of queries, keys, values,
    attention output and the feed-forward network's hidden layer. Fixed weights keep the checkpoint's dtype"""
    lora_rank: int = 8
    """rank of the adapter's matrices"""
    lora_alpha: float = 8.0
    """the adapter's update is multiplied by lora_alpha / lora_rank"""
    lora_targets: tuple[str, ...] = ("query_key_value",)
    """linear maps with an update: query_key_value, dense (attention output), dense_h_to_4h, dense_4h_to_h"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout={self.dropout} must be 0: GPT-NeoX has none")
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))  # a saved run has a list
        if self.tune not in get_args(Tune):
            raise ValueError(f"tune={self.tune!r} must be one of {', '.join(get_args(Tune))}")
        if self.tune != "all" and self.checkpoint is None:
            raise ValueError(f"tune={self.tune!r} needs a trained model: name it with --checkpoint")
        try:
            lora = self.lora
        except ValueError as error:
            raise ValueError(f"lora_{error}") from None
        if self.tune != "lora" and lora != LoRA():
            raise ValueError(f"lora_rank, lora_alpha and lora_targets need tune='lora', not tune={self.tune!r}")

    def unused(self) -> dict[str, str]:
        found = super().unused()
        if self.checkpoint is None:
            found["tokenizer"] = "it is for --checkpoint; encode a new model's text with jaxmodels tokenize"
        else:
            sizes = ("d_model", "heads", "d_ff", "n_layers", "rope_percentage")
            found |= dict.fromkeys(sizes, f"the sizes of a model are those of checkpoint={self.checkpoint!r}")
        return found

    @property
    def lora(self) -> LoRA:
        """Hyperparameters of the adapter."""
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets)

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


def neox_config(fields: Mapping[str, Any]) -> NeoXConfig:
    """Configuration of a model, without those of its adapter."""
    return NeoXConfig(**{name: value for name, value in fields.items() if name not in ("stacked", "lora")})


class Neox(Experiment[Config]):
    config_class = Config
    resumed: Path | None = None  # the run, once it has a checkpoint

    @property
    def standalone(self) -> bool:
        return True  # a saved run has its vocabulary

    @functools.cached_property
    def opened(self) -> Opened:
        """The checkpoint to fine-tune; raises ValueError if it cannot be loaded or trained."""
        assert self.config.checkpoint is not None
        remote = is_remote(self.config.checkpoint)
        self.refuse_unnamed("checkpoint", would="be downloaded" if remote else "be copied into it")
        self.refuse_unnamed("tokenizer", would="be copied into it")
        return open_neox(self.config.checkpoint)

    @functools.cached_property
    def base(self) -> NeoXConfig:
        """Configuration of the checkpoint; once the run has a checkpoint of its own, that one's."""
        if self.resumed is None:
            fields = self.opened.config
        else:
            folder = latest_step(self.resumed)[0] / "model"
            kind, fields = read_config(folder)
            known = {"stacked", "lora", *(field.name for field in dataclasses.fields(NeoXConfig))}
            if kind not in (NeoX.__name__, LoRANeoX.__name__) or fields.keys() - known:
                what = ", ".join(map(quoted, sorted(fields.keys() - known)[:5])) or f"model {quoted(kind)}"
                raise ValueError(f"{folder} has {what}, which a fine-tuned GPT-NeoX does not have")
            with errors_naming(folder):
                return neox_config(fields)
        return neox_config(fields)

    @functools.cached_property
    def frozen_dtype(self) -> str:
        """Dtype of the weights that are not trained."""
        if self.resumed is None:
            return widest(types_of(self.opened))
        latest, _ = latest_step(self.resumed)
        readable = [step for step in reversed(steps(latest.parent)) if problem(latest.with_name(str(step))) is None]
        for step in readable:
            # One that cannot be read is skipped when the run is restored.
            with contextlib.suppress(OSError, ValueError, LookupError):
                types = stored_types(latest.with_name(str(step)) / "model" / "params")
                return types["embedding.emb.embedding"].dtype.name
        raise ValueError(f"{latest.parent} has no checkpoint whose arrays can be read")

    def resume(self, run: Path) -> None:
        self.resumed = run

    def original(self) -> Original | None:
        return None if self.config.checkpoint is None else original_of(self.opened, self.config.tokenizer)

    def model(self, n_vocab: int) -> NeoX:
        c = self.config
        if c.checkpoint is not None:
            return self.finetuned()
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

    def finetuned(self) -> NeoX:
        """Initialized model of the checkpoint's sizes; raises ValueError if it has no biases to tune."""
        config, rngs = self.base, nnx.Rngs(self.config.seed)
        if self.config.tune == "biases" and not (config.attention_bias or config.ffn_bias):
            raise ValueError(f"tune='biases': the linear maps of checkpoint={self.config.checkpoint!r} have no biases")
        if self.config.tune == "all":
            return NeoX(config, rngs=rngs)
        model = LoRANeoX(config, self.config.lora, rngs=rngs) if self.config.tune == "lora" else NeoX(config, rngs=rngs)
        arrays = flat_arrays(model).items()
        return with_arrays(model, {path: array.astype(self.frozen_dtype) for path, array in arrays})

    @property
    def planned_vocab(self) -> int:
        return PUBLISHED_VOCAB if self.config.d_model >= 512 else super().planned_vocab

    @property
    def width(self) -> int:
        return self.config.d_model if self.config.checkpoint is None else self.base.n_hidden

    def trains(self, path: str) -> bool:
        return re.fullmatch(TRAINED[self.config.tune], path) is not None

    def initial(self, program: Program, vocabulary: Vocabulary) -> State:
        c = self.config
        if c.checkpoint is None:
            return super().initial(program, vocabulary)
        dtype = c.param_dtype if c.tune == "all" else self.frozen_dtype
        mesh = program.mesh if program.mesh.size > 1 else None
        model = self.opened.model(dtype=dtype, shardings=mesh).stacked()
        return program.state_of(LoRANeoX.of(model, c.lora, c.seed) if c.tune == "lora" else model, c.seed)

    def tokens(self, vocabulary: Vocabulary | None = None) -> Tokens:
        c = self.config
        if c.checkpoint is None:
            return super().tokens(vocabulary)
        tokens = super().tokens(vocabulary or self.known_vocabulary())
        largest = max((int(part.max()) for part in (tokens.train, tokens.validation) if len(part)), default=0)
        if largest >= self.base.n_vocab:  # a tokenizer may have tokens without rows, if the text has none of them
            raise ValueError(
                f"text={c.text!r} has the token id {largest}; checkpoint={c.checkpoint!r} has {self.base.n_vocab} rows "
                "in its vocabulary"
            )
        return tokens

    def known_vocabulary(self) -> Vocabulary | None:
        """Vocabulary of the run, else of the checkpoint; None if it has none, and the text is ids that bring one."""
        if self.resumed is not None:
            return load_vocabulary(self.resumed / "vocabulary.json")
        tokenizer = self.config.tokenizer
        if tokenizer is None and is_tokens(self.config.text) and self.opened.vocabulary_file is None:
            return None
        return self.opened.vocabulary(tokenizer)

    def n_tokens(self, vocabulary: Vocabulary) -> int:
        size = super().n_tokens(vocabulary)
        return size if self.config.checkpoint is None else min(size, self.base.n_vocab)

    def warnings(self) -> list[str]:
        c = self.config
        if c.checkpoint is None or c.seq_len <= self.base.max_len:
            return []
        return [f"seq_len={c.seq_len} is beyond the {self.base.max_len} positions that {c.checkpoint} was trained on"]


EXPERIMENT = Neox

if __name__ == "__main__":
    run_script(Neox, "python -m train.neox")
