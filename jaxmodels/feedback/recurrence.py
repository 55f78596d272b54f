"""The recurrence of the Feedback Transformer over its steps, with a backward pass that needs linear memory.

Axes: T steps, C slots carried in, B batch, H heads, D = d_model, d_k features of a head, N slots of a bucket, L layers.

Forward. Step t reads the keys and values K, V of the steps before it, and adds its own:

    x_t¹ … x_t^L, k_t, v_t = f(θ, x_t, K_<t, V_<t)        K[t] ← k_t,  V[t] ← v_t

θ are all weights, the position tables' rows that T steps can reach among them. What is kept: the layers' outputs, and
the final K and V.

Backward. With a bar for the loss's gradient: K̄[t] and V̄[t] are complete when the reverse scan reaches step t, since
only later steps read slot t, so for t = T-1 … 0

    θ̄', x̄_t, K̄', V̄' = ∂f(θ, x_t, K_<t, V_<t)ᵀ · (x̄_t^L, K̄[t], V̄[t])        θ̄ += θ̄',  K̄_<t += K̄',  V̄_<t += V̄'

where f is run again, on the final K and V: a slot never changes once it is written, and those after t are masked. Each
layer starts from the kept output of the one before it, so the last product of each layer is not computed again.

Why so. Plain autodiff keeps what each step's derivative needs, and that includes the buffer the step was given: T
buffers of T slots. Rematerialising the step does not help, as the buffer is the step's input. The price here is most
of one more forward pass.

Buckets. A step that masks its way through T slots does twice the work it must. The steps are cut into buckets, each a
scan of its own over the static prefix of slots that ends with it: 3/4 of the whole buffer's work with two of them. A
third would save another 1/12: 6 to 8 % of a step at 512 steps, for half as long again to compile.

Segments. A text may come in pieces: each starts with the last C memories of the one before. They are read like any
other; no gradient goes into them (truncated backpropagation).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.feedback.step import Key, Memory, reach, split_weights, step

MIN_BUCKET = 64  # steps; smaller buckets cost compile time and save nothing
MAX_BUCKETS = 2  # bounds compile time


def recur(model: Any, x_seq: jax.Array, rng: Key, carried: Memory, known: jax.Array) -> tuple[jax.Array, Memory]:
    """All steps of a feedback transformer: x_seq [T, B, D] -> outputs [T, B, D] before the final norm, and the memory.

    carried: memory of C earlier steps, of which the last `known` exist; C + T is at most P. The returned memory of all
    C + T steps carries no gradient.
    """
    graphdef, tables, floats, rest = split_weights(reach(model, slots_of(carried) + len(x_seq)))
    outputs, memory = scan(graphdef, (tables, floats), rest, x_seq, rng, carried, known)
    return outputs, jax.lax.stop_gradient(memory)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    graphdef: Any, weights: Any, rest: Any, x_seq: jax.Array, rng: Key, carried: Memory, known: jax.Array
) -> tuple[jax.Array, Memory]:
    """x_seq [T, B, D] -> outputs [T, B, D] of the last layer, and the memory of all steps.

    weights: position tables and other floating arrays; rest: the model's arrays without a gradient.
    """
    return forward(graphdef, weights, rest, x_seq, rng, carried, known)[0]


# [feedback.recurrence]
def run_step(
    graphdef: Any,
    weights: Any,
    x: jax.Array,
    memory: Memory,
    t: jax.Array,
    rng: Key,
    first: jax.Array,
    kept: list[jax.Array] | None = None,
) -> tuple[list[jax.Array], Memory]:
    """The function f above for the step in slot t, over the slots from `first` on."""
    model = nnx.merge(graphdef, *jax.tree.map(lambda array: array, weights))  # Variables of this trace: see `read_only`
    slots = jnp.arange(slots_of(memory))
    visible = (slots < t) & (slots >= (first if model.memory is None else jnp.maximum(first, t - model.memory)))
    return step(model, x, memory, visible, t, rng, kept)


def at_step(rng: Key, t: int | jax.Array) -> Key:
    """Dropout key of step t, the same in the forward and the backward pass."""
    return None if rng is None else jax.random.fold_in(rng, t)


# [feedback.recurrence]
def forward(
    graphdef: Any, weights: Any, rest: Any, x_seq: jax.Array, rng: Key, carried: Memory, known: jax.Array
) -> tuple[tuple[jax.Array, Memory], Any]:
    """Results of `scan`, and the residuals for the backward pass."""
    c, memory, outputs, states = slots_of(carried), carried, [], []
    for begin, end in buckets(len(x_seq)):
        tables = last_rows(weights[0], c + end)

        def body(memory: Memory, inputs: tuple[jax.Array, jax.Array]) -> tuple[Memory, list[jax.Array]]:
            t, x = inputs
            model = tables, weights[1], rest  # noqa: B023
            states, new = run_step(graphdef, model, x, memory, c + t, at_step(rng, t), c - known)
            return jax.tree.map(lambda slots, k: slots.at[:, :, c + t].set(k.astype(slots.dtype)), memory, new), states

        more = [(0, 0), (0, 0), (0, end - begin), (0, 0)]
        memory = jax.tree.map(lambda slots, more=more: jnp.pad(slots, more), memory)
        memory, (*first_layers, last) = jax.lax.scan(body, memory, (jnp.arange(begin, end), x_seq[begin:end]))
        states.append(first_layers)  # left in buckets: joining them would be another copy
        outputs.append(last)
    return (jnp.concatenate(outputs), memory), (weights, rest, x_seq, rng, known, memory, states)


# [feedback.gradient]
def backward(graphdef: Any, residuals: Any, d_results: Any) -> tuple[Any, None, jax.Array, None, None, None]:
    """Gradients of weights and x_seq, accumulated in float32 at least; the carried memory gets none."""
    (tables, floats), rest, x_seq, rng, known, memory, states = residuals
    d_outputs, _ = d_results
    c = slots_of(memory) - len(x_seq)
    d_tables, d_floats, d_memory = jax.tree.map(wide_zeros, (tables, floats, memory))
    d_inputs = []
    for (begin, end), bucket_states in zip(reversed(buckets(len(x_seq))), reversed(states), strict=True):
        prefix = jax.tree.map(lambda slots, end=end: slots[:, :, : c + end], memory)
        weights = last_rows(tables, c + end), floats

        def body(sums: tuple[Any, Memory], inputs: tuple[Any, ...]) -> tuple[tuple[Any, Memory], jax.Array]:
            t, x, known_states, dy = inputs
            d_weights, d_memory = sums

            def f(floats: Any, x: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
                model = *floats, rest
                states, new = run_step(graphdef, model, x, memory, c + t, at_step(rng, t), c - known, known_states)
                return states[-1], new

            d_new = jax.tree.map(lambda d, slots: d[:, :, c + t].astype(slots.dtype), d_memory, memory)
            _, pull = jax.vjp(f, weights, x, prefix)  # noqa: B023
            dw, dx, dm = pull((dy, d_new))
            return jax.tree.map(jnp.add, (d_weights, d_memory), (dw, dm)), dx

        sums = (
            (jax.tree.map(wide_zeros, weights[0]), d_floats),
            jax.tree.map(lambda d, n=c + end: d[:, :, :n], d_memory),
        )
        steps = (jnp.arange(begin, end), x_seq[begin:end], bucket_states, d_outputs[begin:end])
        ((d_rows, d_floats), d_memory), dx = jax.lax.scan(body, sums, steps, reverse=True)
        d_tables = jax.tree.map(lambda d, rows: d.at[:, -rows.shape[1] :].add(rows), d_tables, d_rows)
        d_inputs.append(dx)
    d_weights = jax.tree.map(lambda d, a: d.astype(a.dtype), (d_tables, d_floats), (tables, floats))
    return d_weights, None, jnp.concatenate(d_inputs[::-1]), None, None, None


scan.defvjp(forward, backward)


def buckets(n: int) -> list[tuple[int, int]]:
    """(begin, end) of each bucket of n steps."""
    size = max(MIN_BUCKET, -(-n // MAX_BUCKETS))
    return [(begin, min(begin + size, n)) for begin in range(0, n, size)]


def slots_of(memory: Memory) -> int:
    """Number of slots."""
    return memory[0][0].shape[2]


def last_rows(tables: Any, n: int) -> Any:
    """Rows of the distances n … 1 of tables [H, N, …]."""
    return jax.tree.map(lambda table: table[:, -n:], tables)


def wide_zeros(a: jax.Array) -> jax.Array:
    """Zeros of the shape of a, in its dtype or float32 if that is wider."""
    return jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
