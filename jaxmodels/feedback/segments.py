"""Training on long or growing sequences: texts in segments, and lengths padded to buckets.

Axes: S steps of a segment, B batch, H heads, D = d_model, d_k features of a head, M steps of memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.feedback.decode import check_state
from jaxmodels.feedback.recurrence import recur
from jaxmodels.feedback.step import Memory, no_memory
from jaxmodels.layers import check_ids, check_sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """State passed from one segment to the next: the memory of the last M steps.

    memory: (key, value) [B, H, M, d_k] per layer, or once if layers share them, the latest step last.
    length: int32 scalar, number of valid memories, at most M. The state carries no gradient.
    """

    memory: Memory
    length: jax.Array


def init_state(model: Any, batch: int, dtype: Any) -> State:
    """State before the first segment; raises ValueError if the model's memory is not limited."""
    if model.memory is None:
        raise ValueError("memory=None attends to all earlier steps; segments need a model with memory=M")
    check_sizes(batch=batch)
    return State(no_memory(model, batch, model.memory, dtype), jnp.int32(0))


def run_segment(model: Any, x_seq: jax.Array, state: State, rng: jax.Array | None) -> tuple[jax.Array, State]:
    """x_seq [S, B, D] -> outputs [S, B, D] before the final norm, and the state for the next segment.

    Raises ValueError if the state does not fit the model or the batch.
    """
    check_state(model, state.memory)
    batch, _, slots, _ = state.memory[0][0].shape
    if batch != x_seq.shape[1] or slots != model.memory:
        raise ValueError(
            f"the state has batch={batch} and memory={slots}; x_seq has batch={x_seq.shape[1]}, "
            f"the model memory={model.memory}"
        )
    outputs, memory = recur(model, x_seq, rng, jax.lax.stop_gradient(state.memory), state.length)
    last = jax.tree.map(lambda a: a[:, :, -slots:], memory)
    return outputs, State(last, jnp.minimum(state.length + len(x_seq), slots))


def bucket(n: int) -> int:
    """Length to compile for n steps: the next of 1, 2, 3, 4, 6, 8, … 2^k, 3·2^(k-1); less than 1/3 is padding."""
    check_sizes(n=n)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power


def pad_to_bucket(ids: jax.Array) -> jax.Array:
    """Pad ids [S, B] with zeros to `bucket(S)` rows."""
    return jnp.pad(ids, [(0, bucket(len(ids)) - len(ids)), (0, 0)])


def logits_at_any_length(model: Any, ids: jax.Array) -> jax.Array:
    """`model(ids)`, compiled once per bucket instead of once per length; for causal models.

    ids [S, B] -> [S, B, V]; raises ValueError like the model.
    """
    check_ids(ids)
    return _logits(model, pad_to_bucket(ids))[: len(ids)]


@jax.jit
def _logits(model: Any, ids: jax.Array) -> jax.Array:
    return model(ids)
