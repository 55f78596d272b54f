"""Table of GPT-NeoX's tensors: names in GPT-NeoX's and Hugging Face's files, and how shards of ranks merge.

    global_stepN/layer_XX-model_YY-model_states.pt    a state_dict each; YY is the model-parallel rank
    global_stepN/mp_rank_YY_model_states.pt           ["module"]["sequential.XX.NAME"], if there are no layer files

XX is 00 for the embedding, 02 … L+1 for the blocks, L+3 for the final norm, L+4 for the readout (absent when tied).

The rows of `query_key_value` are a query, key and value for each head. With fewer heads of keys and values they are all
queries of the rank, then all its keys, then all its values (GPT-NeoX since November 2024, when that was corrected).
"""

import functools
import re
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.neox import NeoXConfig
from jaxmodels.neox.sequential import BUFFERS
from jaxmodels.weights.lazy import Combined, Cut, Joined, read

# Ways to merge the shards of model-parallel ranks.
# [neox.layout: kinds]
VOCABULARY = "rows of the vocabulary"  # concatenated along axis 0, then cut or padded
READOUT_COLUMNS = "columns of the readout"  # with output_layer_parallelism: row; concatenated along axis 1
ROWS = "rows"  # concatenated along axis 0
QKV = "queries, keys and values"  # concatenated along axis 0; see `grouped` for fewer heads of keys and values
COLUMNS = "columns"  # concatenated along axis 1
REPLICA = "replica"  # equal on all ranks except for drift: the mean
ROW_BIAS = "row bias"  # parallel residual: ranks' biases add up in the all-reduce; sequential residual: a replica


class Name(NamedTuple):
    """Row of the table: a tensor of the twin and its names in files.

    disk: GPT-NeoX's classic name, which is written, then those of newer versions. hf: transformers' name; None in
    blocks, where it is `gpt_neox.layers.N.` and the classic name.
    """

    twin: str
    merge: str
    disk: tuple[str, ...]
    hf: str | None = None

    @property
    def ndim(self) -> int:
        """Number of dimensions: 1 of norms and biases, else 2."""
        return 1 if owner(self) == "norm" or self.twin.endswith(".bias") else 2


EMBEDDING = (Name("embedding.emb.weight", VOCABULARY, ("word_embeddings.weight",), "gpt_neox.embed_in.weight"),)
FINAL_NORM = (
    Name("final_norm.ln.weight", REPLICA, ("norm.weight",), "gpt_neox.final_layer_norm.weight"),
    Name("final_norm.ln.bias", REPLICA, ("norm.bias",), "gpt_neox.final_layer_norm.bias"),
)
READOUT = (Name("readout.linear.weight", VOCABULARY, ("final_linear.weight",), "embed_out.weight"),)
# Second names: newer GPT-NeoX; last names: TransformerEngine.
# [neox.layout: names]
BLOCK = (
    Name("pre_ln_attn.weight", REPLICA, ("input_layernorm.weight",)),
    Name("pre_ln_attn.bias", REPLICA, ("input_layernorm.bias",)),
    Name("pre_ln_ffn.weight", REPLICA, ("post_attention_layernorm.weight", "mlp.layer_norm_weight")),
    Name("pre_ln_ffn.bias", REPLICA, ("post_attention_layernorm.bias", "mlp.layer_norm_bias")),
    Name("attention.qkv_lin.weight", QKV, ("attention.query_key_value.weight", "attention.qkv.weight")),
    Name("attention.qkv_lin.bias", QKV, ("attention.query_key_value.bias", "attention.qkv.bias")),
    Name("attention.output.weight", COLUMNS, ("attention.dense.weight", "attention.proj.weight")),
    Name("attention.output.bias", ROW_BIAS, ("attention.dense.bias", "attention.proj.bias")),
    Name("ffn.dense_h_h4.weight", ROWS, ("mlp.dense_h_to_4h.weight", "mlp.linear1.weight", "mlp.fc1_weight")),
    Name("ffn.dense_h_h4.bias", ROWS, ("mlp.dense_h_to_4h.bias", "mlp.linear1.bias", "mlp.fc1_bias")),
    Name("ffn.dense_h4_h.weight", COLUMNS, ("mlp.dense_4h_to_h.weight", "mlp.linear2.weight", "mlp.fc2_weight")),
    Name("ffn.dense_h4_h.bias", ROW_BIAS, ("mlp.dense_4h_to_h.bias", "mlp.linear2.bias", "mlp.fc2_bias")),
)

BLOCK_BUFFERS = tuple(name.removeprefix(".") for name in BUFFERS)  # no parameters; compared with the configuration
SKIPPED = re.compile(r".*_extra_state")  # of TransformerEngine

HF_NAMES = {name.twin: name.hf or name.disk[0] for name in (*EMBEDDING, *BLOCK, *FINAL_NORM, *READOUT)}

Parts = Sequence[Any]  # a tensor of each rank, in order


class Form(NamedTuple):
    """Fields of NeoXConfig that decide which tensors there are."""

    norm: str
    attention_bias: bool
    ffn_bias: bool

    @classmethod
    def of(cls, config: NeoXConfig) -> "Form":
        return cls(config.norm, config.attention_bias, config.ffn_bias)

    @classmethod
    def held(cls, names: Set[str]) -> "Form":
        """Form of a model with tensors of these names on disk, of any blocks."""
        biased = {owner(name) for name in BLOCK if name.twin.endswith("bias") and not names.isdisjoint(name.disk)}
        return cls("layernorm" if "norm" in biased else "rmsnorm", "attention" in biased, "ffn" in biased)

    def rows(self, table: Sequence[Name]) -> tuple[Name, ...]:
        """Rows of a table that a model of this form has. RMSNorm's tensor is `scale` on disk, `weight` if fused."""
        has_bias = {"norm": self.norm == "layernorm", "attention": self.attention_bias, "ffn": self.ffn_bias}
        kept = [name for name in table if not name.twin.endswith(".bias") or has_bias[owner(name)]]
        return tuple(self.renamed(name) if owner(name) == "norm" else name for name in kept)

    def renamed(self, name: Name) -> Name:
        """Row of a norm with the names on disk that the kind of norm has."""
        if self.norm == "layernorm":
            return name
        return name._replace(disk=(name.disk[0].replace("weight", "scale"), *name.disk))


def owner(name: Name) -> str:
    """Part that a tensor belongs to: 'norm', 'attention', 'ffn', or 'embedding' or 'readout'."""
    first = name.twin.split(".")[0]
    return "norm" if first in ("pre_ln_attn", "pre_ln_ffn", "final_norm") else first


def hf_name(key: str) -> str:
    """Name of a twin's tensor in transformers' files."""
    if key in HF_NAMES:
        return HF_NAMES[key]
    _, layer, twin = key.split(".", 2)
    return f"gpt_neox.layers.{layer}.{HF_NAMES[twin]}"


# [neox.ranks: merge]
def merged(name: Name, parts: Parts, row_bias: str, key: str = "a tensor") -> Any:
    """Merge the ranks' tensors into one. row_bias: 'sum', 'mean' or 'first'. key: its name in errors on reading."""
    if len(parts) == 1:
        return parts[0]
    how = {REPLICA: "mean", ROW_BIAS: row_bias}.get(name.merge)
    if how is not None:
        return parts[0] if how == "first" else Combined(parts, COMBINE[how], key)
    return Joined(parts, 1 if name.merge in (COLUMNS, READOUT_COLUMNS) else 0)


# [neox.ranks: merge]
def mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Mean in float64, rounded once; exact if all vectors are equal."""
    first = vectors[0]
    if all(np.array_equal(vector, first) for vector in vectors):
        return first
    return np.mean([vector.astype(np.float64) for vector in vectors], axis=0).astype(first.dtype)


# [neox.ranks: merge]
def total(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Sum in float64, rounded once."""
    wide = vectors[0].astype(np.float64)
    for vector in vectors[1:]:
        wide = wide + vector.astype(np.float64)
    return wide.astype(vectors[0].dtype)


COMBINE: dict[str, Callable[[Sequence[np.ndarray]], np.ndarray]] = {"sum": total, "mean": mean}


def grouped(parts: Parts, config: NeoXConfig) -> Any:
    """Merge the ranks' [all queries, all keys, all values] into the twin's [key-value head, (queries, key, value)].

    The sizes must be those of the configuration, whose n_kv_heads must be divisible by the number of ranks.
    """
    d_k, group, heads = config.d_k, config.n_heads // config.kv_heads, config.kv_heads // len(parts)
    rows = []
    for part in parts:
        for i in range(heads):
            query, key = i * group * d_k, (heads * group + i) * d_k
            starts = (query, group * d_k), (key, d_k), (key + heads * d_k, d_k)
            rows += [Cut(part, 0, start, start + size) for start, size in starts]
    return Joined(rows, 0)


def ungrouped(tensor: Any, ranks: int, config: NeoXConfig) -> Parts:
    """Inverse of `grouped`."""
    d_k, group, heads = config.d_k, config.n_heads // config.kv_heads, config.kv_heads // ranks
    sections = (0, group), (group, group + 1), (group + 1, group + 2)  # queries, key and value of a head
    return [
        Joined(
            [
                Cut(tensor, 0, (i * (group + 2) + start) * d_k, (i * (group + 2) + stop) * d_k)
                for start, stop in sections
                for i in range(rank * heads, (rank + 1) * heads)
            ],
            0,
        )
        for rank in range(ranks)
    ]


# [neox.ranks: split]
def split(name: Name, tensor: Any, ranks: int, config: NeoXConfig) -> Parts:
    """Inverse of `merged` and `grouped`: the tensors of each rank. Sizes must be divisible by `ranks`.

    Exact, except for float64 row biases with the parallel residual, whose sum may be rounded from 6 ranks on.
    """
    if name.merge == QKV and config.n_kv_heads is not None:
        return ungrouped(tensor, ranks, config)
    if ranks == 1 or name.merge == REPLICA or (name.merge == ROW_BIAS and not config.parallel_residual):
        return [tensor] * ranks
    if name.merge == ROW_BIAS:
        return [Combined([tensor], functools.partial(share, rank=rank, ranks=ranks)) for rank in range(ranks)]
    axis = 1 if name.merge == COLUMNS else 0
    size = tensor.shape[axis] // ranks
    return [Cut(tensor, axis, rank * size, (rank + 1) * size) for rank in range(ranks)]


# [neox.ranks: split]
def share(biases: Sequence[np.ndarray], rank: int, ranks: int) -> np.ndarray:
    """Share of a rank of a row bias: bias / ranks, rounded; the last rank takes the remainder to make the sum exact."""
    bias = biases[0]
    wide = bias.astype(np.float64)
    each = (wide / ranks).astype(bias.dtype).astype(np.float64)
    if rank == ranks - 1:
        each = np.where(each * ranks == wide, each, wide - (ranks - 1) * each)
    return each.astype(bias.dtype)


@np.errstate(invalid="ignore")  # the difference of infinities is NaN, which counts as drift
def drift(parts: Parts) -> float:
    """Largest difference between tensors that should be equal on all ranks; NaN if one of them holds NaN."""
    values = np.stack([read(part) for part in parts]).astype(np.float64)
    return float(np.abs(values - values[0]).max(initial=0))
