"""Configuration of a GPT-NeoX model, with the published models as presets."""

import dataclasses
import math
from collections.abc import Callable

from jaxmodels.process.texts import quoted
from jaxmodels.rope import rotary_width

ACTIVATIONS = ("gelu", "gelu_tanh")
NORMS = ("layernorm", "rmsnorm")
LARGEST = 1e30  # of a number; integers beyond a float's range cannot be computed with
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class NeoXConfig:
    """Hyperparameters of a model; the defaults are GPT-NeoX-20B's, but with the exact GELU.

    activation: 'gelu' (exact) or 'gelu_tanh'.
    parallel_residual: attention and feed-forward network read the same input.
    n_ff: hidden width of the feed-forward network; default 4 · n_hidden, which is stored as None.
    tied: use the embedding table as the readout.
    max_len: sequence length of training. Not a limit, as rotary tables are computed for any position.
    dtype: compute dtype; default that of the parameters.
    remat: store only each layer's input, and recompute the rest in the backward pass.
    norm: 'layernorm', or 'rmsnorm', x / √(mean x² + ε) times a scale; layer_norm_eps is the ε of either.
    n_kv_heads: number of heads of keys and values (grouped-query attention), a divisor of n_heads; default n_heads,
        which is stored as None.
    attention_bias, ffn_bias: biases of the linear maps of attention and feed-forward network.
    Raises ValueError if a value is out of range.

    The presets use the tanh GELU, with which 20B and Pythia were trained (`bias_gelu_fusion`). Pythia's config.json in
    transformers' format names the exact GELU, which differs by up to 4.7e-4 per activation.
    """

    n_vocab: int = 50_432
    n_hidden: int = 6_144
    n_layers: int = 44
    n_heads: int = 64
    rope_percentage: float = 0.25
    rope_base: float = 10_000.0
    activation: str = "gelu"
    parallel_residual: bool = True
    layer_norm_eps: float = 1e-5
    n_ff: int | None = None
    tied: bool = False
    max_len: int = 2_048
    dtype: str | None = None
    remat: bool = False
    norm: str = "layernorm"
    n_kv_heads: int | None = None
    attention_bias: bool = True
    ffn_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("n_vocab", "n_hidden", "n_layers", "n_heads", "max_len", "n_ff", "n_kv_heads"):
            size = getattr(self, name)
            if size is None and name in ("n_ff", "n_kv_heads"):
                continue
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LARGEST:
                raise ValueError(f"{name}={quoted(size)} must be an integer from 1 to {LARGEST:g}")
        for name in ("parallel_residual", "tied", "remat", "attention_bias", "ffn_bias"):
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise ValueError(f"{name}={quoted(flag)} must be True or False")
        if self.n_ff == 4 * self.n_hidden:
            object.__setattr__(self, "n_ff", None)  # so that equal models have equal configurations
        if self.n_kv_heads == self.n_heads:
            object.__setattr__(self, "n_kv_heads", None)
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        if self.n_hidden % self.n_heads:
            raise ValueError(f"n_hidden={self.n_hidden} is not divisible by n_heads={self.n_heads}")
        for name in ("rope_percentage", "rope_base", "layer_norm_eps"):
            number = getattr(self, name)
            if not isinstance(number, int | float) or isinstance(number, bool) or abs(number) > LARGEST:
                raise ValueError(f"{name}={quoted(number)} must be a number")
        rotary_width("rope_percentage", self.rope_percentage, self.d_k)
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base={self.rope_base} must be above 1 and finite")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={quoted(self.activation)} must be one of {', '.join(ACTIVATIONS)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm={quoted(self.norm)} must be one of {', '.join(NORMS)}")
        if not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} must be between 0 and 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={quoted(self.dtype)} must be one of {', '.join(DTYPES)}")

    @property
    def d_k(self) -> int:
        """Number of features of a head."""
        return self.n_hidden // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def d_qkv(self) -> int:
        """Number of features of all queries, keys and values of a token."""
        return self.n_hidden + 2 * self.kv_heads * self.d_k

    @property
    def d_rope(self) -> int:
        """Number of features of a head that are rotated."""
        return rotary_width("rope_percentage", self.rope_percentage, self.d_k)

    @property
    def d_ff(self) -> int:
        """Hidden width of the feed-forward network."""
        return 4 * self.n_hidden if self.n_ff is None else self.n_ff

    def parameters(self) -> int:
        """Number of parameters."""
        d, d_ff, d_qkv = self.n_hidden, self.d_ff, self.d_qkv
        norm = 2 * d if self.norm == "layernorm" else d
        attention = d * d_qkv + d * d + (d_qkv + d if self.attention_bias else 0)
        ffn = 2 * d * d_ff + (d_ff + d if self.ffn_bias else 0)
        return self.n_layers * (2 * norm + attention + ffn) + norm + (1 if self.tied else 2) * self.n_vocab * d

    def tensors(self) -> int:
        """Number of tensors in a state_dict."""
        norm = 2 if self.norm == "layernorm" else 1
        linear = 4 + 2 * self.attention_bias + 2 * self.ffn_bias
        return self.n_layers * (2 * norm + linear) + norm + (1 if self.tied else 2)

    @classmethod
    def pythia_14m(cls) -> "NeoXConfig":
        return cls._pythia(6, 128, 4)

    @classmethod
    def pythia_31m(cls) -> "NeoXConfig":
        return cls._pythia(6, 256, 8)

    @classmethod
    def pythia_70m(cls) -> "NeoXConfig":
        return cls._pythia(6, 512, 8)

    @classmethod
    def pythia_160m(cls) -> "NeoXConfig":
        return cls._pythia(12, 768, 12)

    @classmethod
    def pythia_410m(cls) -> "NeoXConfig":
        return cls._pythia(24, 1024, 16)

    @classmethod
    def pythia_1b(cls) -> "NeoXConfig":
        return cls._pythia(16, 2048, 8)

    @classmethod
    def pythia_1_4b(cls) -> "NeoXConfig":
        return cls._pythia(24, 2048, 16)

    @classmethod
    def pythia_2_8b(cls) -> "NeoXConfig":
        return cls._pythia(32, 2560, 32)

    @classmethod
    def pythia_6_9b(cls) -> "NeoXConfig":
        return cls._pythia(32, 4096, 32, n_vocab=50_432)

    @classmethod
    def pythia_12b(cls) -> "NeoXConfig":
        return cls._pythia(36, 5120, 40, n_vocab=50_688)

    @classmethod
    def neox_20b(cls) -> "NeoXConfig":
        return cls(activation="gelu_tanh")

    @classmethod
    def _pythia(cls, n_layers: int, n_hidden: int, n_heads: int, n_vocab: int = 50_304) -> "NeoXConfig":
        # 50,277 tokens, padded to a multiple of 128 times the model-parallel degree of the training run
        return cls(n_vocab=n_vocab, n_hidden=n_hidden, n_layers=n_layers, n_heads=n_heads, activation="gelu_tanh")


PRESETS: dict[str, Callable[[], NeoXConfig]] = {
    name: getattr(NeoXConfig, name)
    for name in (
        "pythia_14m",
        "pythia_31m",
        "pythia_70m",
        "pythia_160m",
        "pythia_410m",
        "pythia_1b",
        "pythia_1_4b",
        "pythia_2_8b",
        "pythia_6_9b",
        "pythia_12b",
        "neox_20b",
    )
}
