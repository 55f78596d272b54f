"""One step of a feedback transformer over slots of memory, as run by the recurrence and by decoding.

Axes: D = d_model = H·d_k features, H heads, B batch, N slots, L layers.
In einsums: b batch, h head, j slot, d feature.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.feedback.attention import FeedbackAttention, FeedbackTransformerLayer
from jaxmodels.layers import FeedForward, Linear, split_rng

Memory = tuple[tuple[jax.Array, jax.Array], ...]  # (key, value) [B, H, N, d_k] per layer, or once for all
Key = jax.Array | None


def step(
    model: Any,
    x: jax.Array,
    memory: Memory,
    visible: jax.Array,
    position: jax.Array,
    rng: Key = None,
    known: list[jax.Array] | None = None,
) -> tuple[list[jax.Array], Memory]:
    """One step x [B, D] -> outputs x¹ … x^L of all layers, each [B, D], and the step's keys and values [B, H, d_k].

    model: from `reach`. memory: slot j holds the latest earlier position p with p mod N = j.
    visible: bool [N] or [B, 1, N]. position: int, scalar or [B]. known: outputs of the first layers if they have been
    computed before; they are not computed again, but gradients flow through them.
    """
    states = [x]
    of_layers = memory * (len(model.layers) // len(memory))  # one entry per layer, also if they share one
    for i, (layer, layer_rng) in enumerate(zip(model.layers, split_rng(rng, len(model.layers)), strict=True)):
        y = run_layer(layer, states[-1], of_layers[i], visible, position, layer_rng)
        states.append(pinned(y, known[i]) if known and i < len(known) else y)
    m = model.mix(states)
    owners = [model] if model.shares_kv else [layer.attn for layer in model.layers]
    return states[1:], tuple((owner.key(m), owner.value(m)) for owner in owners)


def run_layer(
    layer: FeedbackTransformerLayer,
    x: jax.Array,
    memory: tuple[jax.Array, jax.Array],
    visible: jax.Array,
    position: jax.Array,
    rng: Key,
) -> jax.Array:
    """x ← x + drop(attn(LN x)), then x ← x + drop(FF(LN x)); [B, D] -> [B, D]."""
    attn_rng, rng = split_rng(rng, 2)
    rng_attn, rng_hidden, rng_ff = split_rng(rng, 3)
    x = x + layer.dropout(attend(layer.attn, layer.norm_self_attn(x), *memory, visible, position, attn_rng), rng_attn)
    return x + layer.dropout(feed_forward(layer.feed_forward, layer.norm_ff(x), rng_hidden), rng_ff)


def attend(
    attn: FeedbackAttention,
    z: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    position: jax.Array,
    rng: Key,
) -> jax.Array:
    """Attention with queries from z [B, D] over slots [B, H, N, d_k] -> [B, D]; zero if no slot is visible.

    Masked scores are finite: with -inf, a row without visible slots would have NaN outputs and gradients.
    """
    q = attn.query(z)  # [B, H, d_k]
    scores = jnp.einsum("bhd,bhjd->bhj", (q + attn.query_pos_bias) * attn.scale, key)  # [B, H, N]
    by_distance = jnp.einsum("bhd,hjd->bhj", q, attn.key_pos_embeddings[...]) + attn.key_pos_bias[...]  # [B, H, N]
    scores = scores + roll_to_slots(by_distance, position)
    scores = jnp.where(visible, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    x = jnp.einsum("bhj,bhjd->bhd", attn.drop(weights, rng), value)  # [B, H, d_k]
    return attn.output(x.reshape(z.shape)) * visible.any(axis=-1)


def roll_to_slots(scores: jax.Array, position: jax.Array) -> jax.Array:
    """Roll scores [B, H, N] of the distances N … 1 to the slots at those distances: (j - position) mod N."""
    if position.ndim:
        return jax.vmap(lambda row, p: jnp.roll(row, p, axis=-1))(scores, position)
    return jnp.roll(scores, position, axis=-1)


def feed_forward(layer: FeedForward, z: jax.Array, rng: Key) -> jax.Array:
    """Call of the feed-forward layer with tokens in columns; see `product`."""
    hidden = jax.nn.relu(linear(layer.layer1, z.T))  # [D_ff, B]
    hidden = hidden if rng is None else layer.dropout(hidden.T, rng).T
    return linear(layer.layer2, hidden).T


def linear(layer: Linear, x: jax.Array) -> jax.Array:
    """Linear map of columns: [D_in, B] -> [D_out, B]."""
    assert layer.bias is not None
    return product(layer.kernel[...], x) + layer.bias[...][:, None]


barrier = jax.lax.optimization_barrier


@jax.custom_vjp
def product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """kernelᵀ x: [D_in, D_out], [D_in, B] -> [D_out, B].

    A step consists mostly of products of large kernels with a few tokens, which run two to three times faster on CPUs
    with tokens in columns. The barriers keep XLA from folding transpositions into the products, which would cost more
    than that: the kernel's transposition is the same at every step and is hoisted out of the loop, those of the tokens
    are small. The gradients are written out for the same reason.
    """
    return barrier(barrier(kernel.T) @ barrier(x))


def product_forward(kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(kernel, x), (kernel, x)


def product_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel, x = residuals
    dy = barrier(dy)
    return x @ dy.T, barrier(kernel @ dy)


product.defvjp(product_forward, product_backward)


@jax.custom_vjp
def pinned(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient of x: the known value of x, which is then not computed again."""
    return value


pinned.defvjp(lambda x, value: (value, None), lambda _, dy: (dy, None))


def reach(model: Any, n: int) -> Any:
    """Model with position tables of the distances n … 1 only, head-major and scaled: d_k^-½ · [H, n, …] of [P, H, …].

    Decoding calls this for every token in a loop. XLA hoists loop-invariant transpositions only together with a
    following product: without the scale here it transposed at every token, a third of a token's time.
    """
    graphdef, tables, rest = split_tables(model)
    scale = model.layers[0].attn.scale
    return nnx.merge(graphdef, jax.tree.map(lambda table: jnp.swapaxes(table[-n:], 0, 1) * scale, tables), rest)


def split_tables(model: Any) -> tuple[Any, Any, Any]:
    """Split a model into its graph, its position tables and its other arrays; `nnx.merge` is the inverse."""

    def is_table(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1] in ("key_pos_embeddings", "key_pos_bias")

    graphdef, *states = nnx.split(model, is_table, ...)
    tables, rest = states
    return graphdef, tables, rest


def no_memory(model: Any, batch: int, slots: int, dtype: Any) -> Memory:
    """Zero slots for a model's keys and values."""
    shape = (batch, model.heads, slots, model.d_model // model.heads)
    entries = 1 if model.shares_kv else len(model.layers)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(entries))
