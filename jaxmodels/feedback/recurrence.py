"""The recurrence of the Feedback Transformer over its steps, with a backward pass that needs linear memory.

Axes: T steps, B batch, H heads, D = d_model, d_k features of a head, N slots of a bucket, L layers.

Forward. Step t reads the keys and values K, V of the steps before it, and adds its own:

    y_t, k_t, v_t = f(θ, E_t, x_t, K_<t, V_<t)        K[t] ← k_t,  V[t] ← v_t

θ are all weights but the position tables, E_t the tables' rows for the distances t … 1. Nothing is kept but y and the
final K and V.

Backward. With a bar for the loss's gradient: K̄[t] and V̄[t] are complete when the reverse scan reaches step t, since
only later steps read slot t, so for t = T-1 … 0

    θ̄', Ē', x̄_t, K̄', V̄' = ∂f(θ, E_t, x_t, K_<t, V_<t)ᵀ · (ȳ_t, K̄[t], V̄[t])
    θ̄ += θ̄',  Ē_t += Ē',  K̄_<t += K̄',  V̄_<t += V̄'

where f is run again, on the final K and V: a slot never changes once it is written, and those after t are masked.

Why so. Plain autodiff keeps what each step's derivative needs, and that includes the buffer the step was given: T
buffers of T slots. Rematerialising the step does not help, as the buffer is the step's input. The price here is one
more forward pass. Position tables are differentiated by the rows a step reads: adding a gradient of the whole table
at every step would cost more than the step.

Buckets. A step that masks its way through T slots does twice the work it must. The steps are cut into buckets, each a
scan of its own over the static prefix of slots that ends with it: 5/8 of the whole buffer's work with four of them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

MIN_BUCKET = 32  # steps; smaller buckets cost compile time and save nothing
MAX_BUCKETS = 4  # bounds compile time
TABLES = ("key_pos_embeddings", "key_pos_bias")

Memory = tuple[tuple[jax.Array, jax.Array], ...]  # (key, value) [B, H, N, d_k] for each layer, or once for all of them


def recur(model: Any, x_seq: jax.Array, rng: jax.Array | None) -> jax.Array:
    """All steps of a feedback transformer, before its final norm: [T, B, D] -> [T, B, D]; T is at most P.

    The model has `step(x, memory, visible, rng) -> (output [B, D], (key, value) [B, H, d_k] for each entry of memory)`
    and `memory`, the number of steps that a step sees at most, or None.
    """
    n = len(x_seq)
    graphdef, *states = nnx.split(model, lambda path, _: path[-1] in TABLES, ...)
    tables, weights = states
    # Slot j of step t reads row T - t + j. The zeros behind are for slots that hold no memory yet.
    tables = jax.tree.map(lambda table: jnp.pad(table[-n:], [(0, n)] + [(0, 0)] * (table.ndim - 1)), tables)
    return scan(graphdef, weights, tables, x_seq, rng)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(graphdef: Any, weights: Any, tables: Any, x_seq: jax.Array, rng: jax.Array | None) -> jax.Array:
    return forward(graphdef, weights, tables, x_seq, rng)[0]


def step(graphdef: Any, weights: Any, rows: Any, x: jax.Array, memory: Memory, t: jax.Array, rng: jax.Array | None):
    """f above: the model's own step, with tables that hold just the rows of this one."""
    model = nnx.merge(graphdef, rows, weights)
    slots = jnp.arange(memory[0][0].shape[2])
    visible = slots < t if model.memory is None else (slots < t) & (slots >= t - model.memory)
    return model.step(x, memory, visible, at_step(rng, t))


def at_step(rng: jax.Array | None, t: int | jax.Array) -> jax.Array | None:
    """The key of step t, forwards and backwards."""
    return None if rng is None else jax.random.fold_in(rng, t)


def forward(graphdef: Any, weights: Any, tables: Any, x_seq: jax.Array, rng: jax.Array | None):
    """The outputs [T, B, D], and what the backward pass needs."""
    n = len(x_seq)
    memory = empty_memory(graphdef, weights, tables, x_seq[0])
    outputs = []
    for first, end in buckets(n):

        def body(memory: Memory, inputs):
            t, x = inputs
            y, new = step(graphdef, weights, rows_at(tables, t, memory), x, memory, t, rng)
            return jax.tree.map(lambda slots, k: slots.at[:, :, t].set(k.astype(slots.dtype)), memory, new), y

        memory = jax.tree.map(lambda a, end=end: jnp.pad(a, [(0, 0), (0, 0), (0, end - a.shape[2]), (0, 0)]), memory)
        memory, y = jax.lax.scan(body, memory, (jnp.arange(first, end), x_seq[first:end]))
        outputs.append(y)
    return jnp.concatenate(outputs), (weights, tables, x_seq, rng, memory)


def backward(graphdef: Any, kept: Any, d_outputs: jax.Array):
    """The gradients of weights, tables and x_seq, summed in float32 at least."""
    weights, tables, x_seq, rng, memory = kept
    sums = jax.tree.map(wide_zeros, (weights, tables, memory))
    d_inputs = []
    for first, end in reversed(buckets(len(x_seq))):
        prefix = jax.tree.map(lambda slots, end=end: slots[:, :, :end], memory)

        def body(sums, inputs):
            d_weights, d_tables, d_memory = sums
            t, x, dy = inputs
            d_new = jax.tree.map(lambda d, slots: d[:, :, t].astype(slots.dtype), d_memory, memory)
            rows = rows_at(tables, t, prefix)  # noqa: B023
            _, pull = jax.vjp(lambda w, r, x, m: step(graphdef, w, r, x, m, t, rng), weights, rows, x, prefix)  # noqa: B023
            dw, d_rows, dx, dm = pull((dy, d_new))
            start = len(x_seq) - t
            add = partial(jax.tree.map, jnp.add)
            d_tables = jax.tree.map(
                lambda table, d: jax.lax.dynamic_update_slice_in_dim(
                    table, jax.lax.dynamic_slice_in_dim(table, start, len(d)) + d, start, 0
                ),
                d_tables,
                d_rows,
            )
            return (add(d_weights, dw), d_tables, add(d_memory, dm)), dx

        sums = (*sums[:2], jax.tree.map(lambda d, end=end: d[:, :, :end], sums[2]))
        steps = (jnp.arange(first, end), x_seq[first:end], d_outputs[first:end])
        sums, dx = jax.lax.scan(body, sums, steps, reverse=True)
        d_inputs.append(dx)
    d_weights, d_tables = jax.tree.map(lambda d, a: d.astype(a.dtype), sums[:2], (weights, tables))
    return d_weights, d_tables, jnp.concatenate(d_inputs[::-1]), None


scan.defvjp(forward, backward)


def buckets(n: int) -> list[tuple[int, int]]:
    """(first, end) of each bucket of n steps."""
    size = max(MIN_BUCKET, -(-n // MAX_BUCKETS))
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def rows_at(tables: Any, t: jax.Array, memory: Memory) -> Any:
    """The tables' rows for step t: as many as there are slots, row T - t + j for slot j."""
    slots = memory[0][0].shape[2]
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, len(a) // 2 - t, slots), tables)


def empty_memory(graphdef: Any, weights: Any, tables: Any, x: jax.Array) -> Memory:
    """Buffers of no slots, in the dtype that x [B, D] and the weights come to."""
    dtype = jnp.result_type(x, *jax.tree.leaves(weights))
    new = jax.eval_shape(lambda: nnx.merge(graphdef, tables, weights).project(x))
    return jax.tree.map(lambda k: jnp.zeros((*k.shape[:2], 0, k.shape[2]), dtype), new)


def wide_zeros(a: jax.Array) -> jax.Array:
    return jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
