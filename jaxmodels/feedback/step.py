"""One step of a feedback transformer over slots of memory, as the recurrence and the decoder run it.

Axes: D = d_model = H·d_k features, H heads, B batch, N slots, L layers.
In einsums: b batch, h head, j slot, d feature.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.feedback.attention import FeedbackAttention, FeedbackTransformerLayer
from jaxmodels.layers import FeedForward, Linear, split_rng

Memory = tuple[tuple[jax.Array, jax.Array], ...]  # (key, value) [B, H, N, d_k] for each layer, or once for all of them
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
    """One step [B, D] -> the outputs x¹ … x^L of all layers, and its own key and value [B, H, d_k].

    The model is one of `reach`. Slot j holds the memory of the last position before this one that is j
    modulo N; visible: bool [N] or [B, 1, N]; position: int, a scalar or [B]. `known` has the outputs of the first
    layers where they were computed before: they are not computed again, but differentiated all the same.
    """
    states = [x]
    of_layers = memory * (len(model.layers) // len(memory))
    for i, (layer, layer_rng) in enumerate(zip(model.layers, split_rng(rng, len(model.layers)), strict=True)):
        y = run_layer(layer, states[-1], of_layers[i], visible, position, layer_rng)
        states.append(pinned(y, known[i]) if known and i < len(known) else y)
    m = model.mix(states)
    owners = [model] if model.shares_kv else [layer.attn for layer in model.layers]
    return states[1:], tuple((owner.key(m), owner.value(m)) for owner in owners)


def run_layer(layer: FeedbackTransformerLayer, x, memory: tuple[jax.Array, jax.Array], visible, position, rng: Key):
    """x ← x + drop(attn(LN x)), then x ← x + drop(FF(LN x)); [B, D] -> [B, D]."""
    attn_rng, rng = split_rng(rng, 2)
    rng_attn, rng_hidden, rng_ff = split_rng(rng, 3)
    x = x + layer.dropout(attend(layer.attn, layer.norm_self_attn(x), *memory, visible, position, attn_rng), rng_attn)
    return x + layer.dropout(feed_forward(layer.feed_forward, layer.norm_ff(x), rng_hidden), rng_ff)


def attend(attn: FeedbackAttention, z, key, value, visible, position, rng: Key) -> jax.Array:
    """Queries from z [B, D] over slots [B, H, N, d_k] -> [B, D]; zero where no slot is visible.

    The mask is finite, so that neither the value nor the gradient of what is thrown away can be NaN.
    """
    q = attn.query(z)
    scores = jnp.einsum("bhd,bhjd->bhj", (q + attn.query_pos_bias) * attn.scale, key)
    by_distance = jnp.einsum("bhd,hjd->bhj", q, attn.key_pos_embeddings[...]) + attn.key_pos_bias[...]
    scores = scores + turned(by_distance, position)
    scores = jnp.where(visible, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    x = jnp.einsum("bhj,bhjd->bhd", attn.drop(weights, rng), value)
    return attn.output(x.reshape(z.shape)) * visible.any(axis=-1)


def turned(scores: jax.Array, position: jax.Array) -> jax.Array:
    """Scores [B, H, N] of the distances N … 1, moved to the slots where those distances are: (j - position) mod N."""
    if position.ndim:
        return jax.vmap(lambda row, p: jnp.roll(row, p, axis=-1))(scores, position)
    return jnp.roll(scores, position, axis=-1)


def feed_forward(layer: FeedForward, z: jax.Array, rng: Key) -> jax.Array:
    """The layer's own call, in columns."""
    hidden = jax.nn.relu(linear(layer.layer1, z.T))
    hidden = hidden if rng is None else layer.dropout(hidden.T, rng).T
    return linear(layer.layer2, hidden).T


def linear(layer: Linear, x: jax.Array) -> jax.Array:
    """[D_in, B] -> [D_out, B]."""
    return product(layer.kernel[...], x) + layer.bias[...][:, None]  # type: ignore[index]


apart = jax.lax.optimization_barrier


@jax.custom_vjp
def product(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """kernelᵀ x: [D_in, D_out], [D_in, B] -> [D_out, B].

    A step is little else than products of large kernels with a few tokens, and with the tokens in columns these run
    at two to three times the speed on CPUs. XLA must be kept from folding transpositions into them, where they cost
    more than that: the kernel's is the same at every step and made once, before the loop; those of the tokens are
    small. For the same reason the gradients are spelled out.
    """
    return apart(apart(kernel.T) @ apart(x))


def product_forward(kernel: jax.Array, x: jax.Array):
    return product(kernel, x), (kernel, x)


def product_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array):
    kernel, x = kept
    dy = apart(dy)
    return x @ dy.T, apart(kernel @ dy)


product.defvjp(product_forward, product_backward)


@jax.custom_vjp
def pinned(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient of x: where x's value is known, nothing computes it again."""
    return value


pinned.defvjp(lambda x, value: (value, None), lambda _, dy: (dy, None))


def reach(model: Any, n: int) -> Any:
    """The model with tables of the distances n … 1 alone, head-major and scaled: d_k^-½ · [H, n, …] of [P, H, …].

    A token's decoding calls this in a loop. XLA takes out of it what the loop does not change, but transpositions only
    with the product that they lead to: without the scale here it transposed at every token, a third of a token's time.
    """
    graphdef, tables, rest = nnx.split(model, is_table, ...)  # type: ignore[misc]
    scale = model.layers[0].attn.scale
    return nnx.merge(graphdef, jax.tree.map(lambda table: jnp.swapaxes(table[-n:], 0, 1) * scale, tables), rest)


def is_table(path: Any, _: Any) -> bool:
    """Of an array by its path: is it a position table?"""
    return path[-1] in ("key_pos_embeddings", "key_pos_bias")


def no_memory(model: Any, batch: int, slots: int, dtype: Any) -> Memory:
    """Zeroed slots for a model's keys and values."""
    shape = (batch, model.heads, slots, model.d_model // model.heads)
    entries = 1 if model.shares_kv else len(model.layers)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(entries))
