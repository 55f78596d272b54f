"""GPT-NeoX's tensors on disk: names, and how the shards of model-parallel ranks make one tensor.

    global_stepN/layer_XX-model_YY-model_states.pt    a state_dict each; YY is the model-parallel rank
    global_stepN/mp_rank_YY_model_states.pt           ["module"]["sequential.XX.NAME"], where there are no layer files

XX is 00 for the embedding, 02 … L+1 for the blocks, L+3 for the final norm, L+4 for the readout (absent when tied).
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.weights.lazy import Combined, Cut, Joined, read

# How shards merge.
VOCABULARY = "rows of the vocabulary"  # joined, then cut or padded
READOUT_COLUMNS = "columns of the readout"  # the same with output_layer_parallelism: row; joined along dim 1
ROWS = "rows"  # joined along dim 0
COLUMNS = "columns"  # joined along dim 1
REPLICA = "replica"  # the same on every rank, but for drift: the mean
ROW_BIAS = "row bias"  # parallel residual: each rank adds its own before the ranks are summed; sequential: a replica


class Name(NamedTuple):
    """A tensor of the twin; `disk` has the classic name, which is written, then those of newer versions."""

    twin: str
    merge: str
    disk: tuple[str, ...]


EMBEDDING = (Name("embedding.emb.weight", VOCABULARY, ("word_embeddings.weight",)),)
FINAL_NORM = (
    Name("final_norm.ln.weight", REPLICA, ("norm.weight",)),
    Name("final_norm.ln.bias", REPLICA, ("norm.bias",)),
)
READOUT = (Name("readout.linear.weight", VOCABULARY, ("final_linear.weight",)),)
# Second names: newer GPT-NeoX; last names: TransformerEngine.
BLOCK = (
    Name("pre_ln_attn.weight", REPLICA, ("input_layernorm.weight",)),
    Name("pre_ln_attn.bias", REPLICA, ("input_layernorm.bias",)),
    Name("pre_ln_ffn.weight", REPLICA, ("post_attention_layernorm.weight", "mlp.layer_norm_weight")),
    Name("pre_ln_ffn.bias", REPLICA, ("post_attention_layernorm.bias", "mlp.layer_norm_bias")),
    Name("attention.qkv_lin.weight", ROWS, ("attention.query_key_value.weight", "attention.qkv.weight")),
    Name("attention.qkv_lin.bias", ROWS, ("attention.query_key_value.bias", "attention.qkv.bias")),
    Name("attention.output.weight", COLUMNS, ("attention.dense.weight", "attention.proj.weight")),
    Name("attention.output.bias", ROW_BIAS, ("attention.dense.bias", "attention.proj.bias")),
    Name("ffn.dense_h_h4.weight", ROWS, ("mlp.dense_h_to_4h.weight", "mlp.linear1.weight", "mlp.fc1_weight")),
    Name("ffn.dense_h_h4.bias", ROWS, ("mlp.dense_h_to_4h.bias", "mlp.linear1.bias", "mlp.fc1_bias")),
    Name("ffn.dense_h4_h.weight", COLUMNS, ("mlp.dense_4h_to_h.weight", "mlp.linear2.weight", "mlp.fc2_weight")),
    Name("ffn.dense_h4_h.bias", ROW_BIAS, ("mlp.dense_4h_to_h.bias", "mlp.linear2.bias", "mlp.fc2_bias")),
)
FREQUENCIES = "attention.rotary_emb.inv_freq"  # no parameter: compared with the configuration
SKIPPED = re.compile(r".*_extra_state$")  # TransformerEngine's own

Parts = Sequence[Any]  # a tensor of each rank, in order


def merged(name: Name, parts: Parts, row_bias: str) -> Any:
    """One tensor out of the ranks' own. `row_bias`: 'sum', 'mean' or 'first'."""
    if len(parts) == 1:
        return parts[0]
    how = {REPLICA: "mean", ROW_BIAS: row_bias}.get(name.merge)
    if how is not None:
        return parts[0] if how == "first" else Combined(parts, COMBINE[how])
    return Joined(parts, 1 if name.merge in (COLUMNS, READOUT_COLUMNS) else 0)


def mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    first = vectors[0]
    if all(np.array_equal(vector, first) for vector in vectors):
        return first
    return np.mean([vector.astype(np.float64) for vector in vectors], axis=0).astype(first.dtype)


def total(vectors: Sequence[np.ndarray]) -> np.ndarray:
    wide = vectors[0].astype(np.float64)
    for vector in vectors[1:]:
        wide = wide + vector.astype(np.float64)
    return wide.astype(vectors[0].dtype)


COMBINE: dict[str, Callable[[Sequence[np.ndarray]], np.ndarray]] = {"sum": total, "mean": mean}


def split(name: Name, tensor: Any, ranks: int, parallel_residual: bool) -> Parts:
    """The inverse of `merged`: what each rank holds. The tensor's sizes must be divisible by `ranks`.

    Bit for bit, but for row biases in float64 under the parallel residual: from 6 ranks on their sum may be rounded.
    """
    if ranks == 1 or name.merge == REPLICA or (name.merge == ROW_BIAS and not parallel_residual):
        return [tensor] * ranks
    if name.merge == ROW_BIAS:
        return [Combined([tensor], functools.partial(share, rank=rank, ranks=ranks)) for rank in range(ranks)]
    axis = 1 if name.merge == COLUMNS else 0
    size = tensor.shape[axis] // ranks
    return [Cut(tensor, axis, rank * size, (rank + 1) * size) for rank in range(ranks)]


def share(biases: Sequence[np.ndarray], rank: int, ranks: int) -> np.ndarray:
    """bias / ranks, rounded; where these would not sum to the bias again, the last rank takes what is left."""
    bias = biases[0]
    wide = bias.astype(np.float64)
    each = (wide / ranks).astype(bias.dtype).astype(np.float64)
    if rank == ranks - 1:
        each = np.where(each * ranks == wide, each, wide - (ranks - 1) * each)
    return each.astype(bias.dtype)


@np.errstate(invalid="ignore")  # a difference of infinities is NaN, and counts as drift
def drift(parts: Parts) -> float:
    """The largest difference between ranks that should hold the same; NaN where one holds it."""
    values = np.stack([read(part) for part in parts]).astype(np.float64)
    return float(np.abs(values - values[0]).max(initial=0))
