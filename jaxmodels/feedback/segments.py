"""A text in segments, and texts of changing lengths: what training over long or growing sequences needs.

Axes: S steps of a segment, B batch, H heads, D = d_model, d_k features of a head, M steps of memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.feedback.decode import check_state
from jaxmodels.feedback.recurrence import recur
from jaxmodels.feedback.step import Memory, no_memory
from jaxmodels.transformer import check_ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a segment hands to the next: the memory of its last M steps.

    memory: (key, value) [B, H, M, d_k] for each layer, or once where layers share them, the latest step last;
    length: int32, how many of them there have been, M at most. Numbers alone: no gradient goes through it.
    """

    memory: Memory
    length: jax.Array


def init_state(model: Any, batch: int, dtype: Any) -> State:
    """The state before the first segment; raises ValueError where the model's memory is not limited."""
    if model.memory is None:
        raise ValueError("memory=None would carry on every step there has been: make the model with memory=M steps")
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    return State(no_memory(model, batch, model.memory, dtype), jnp.int32(0))


def run_segment(model: Any, x_seq: jax.Array, state: State, rng: jax.Array | None) -> tuple[jax.Array, State]:
    """[S, B, D] -> the outputs before the final norm, and the state for the next segment.

    Raises ValueError for a state of another model or batch.
    """
    check_state(model, state.memory)
    batch, _, slots, _ = state.memory[0][0].shape
    if batch != x_seq.shape[1] or slots != model.memory:
        raise ValueError(
            f"the state is of a batch of {batch} and memory={slots}, "
            f"x_seq has a batch of {x_seq.shape[1]} and the model memory={model.memory}"
        )
    outputs, memory = recur(model, x_seq, rng, jax.lax.stop_gradient(state.memory), state.length)
    last = jax.tree.map(lambda a: a[:, :, -slots:], memory)
    return outputs, State(last, jnp.minimum(state.length + len(x_seq), slots))


def bucket(n: int) -> int:
    """The length to compile for n steps: the next of 1, 2, 3, 4, 6, 8, … 2^k, 3·2^(k-1); less than 1/3 is padding."""
    if n < 1:
        raise ValueError(f"n={n} steps must be at least 1")
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power


def pad_to_bucket(ids: jax.Array) -> jax.Array:
    """ids [S, B] with zeros behind them, up to `bucket(S)` rows."""
    return jnp.pad(ids, [(0, bucket(len(ids)) - len(ids)), (0, 0)])


def logits_at_any_length(model: Any, ids: jax.Array) -> jax.Array:
    """`model(ids)`, compiled once a bucket where it would be once a length: no token sees the zeros behind it.

    ids [S, B] -> [S, B, V]; raises ValueError as the model does.
    """
    check_ids(ids)
    return _logits(model, pad_to_bucket(ids))[: len(ids)]


@jax.jit
def _logits(model: Any, ids: jax.Array) -> jax.Array:
    return model(ids)
