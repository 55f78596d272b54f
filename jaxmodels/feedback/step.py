"""One step of a feedback transformer over slots of memory, as run by the recurrence and by decoding.

Axes: D = d_model = H·d_k features, H heads, B batch, N slots, L layers.
In einsums: b batch, h head, j slot, d feature.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.feedback.attention import FeedbackAttention, FeedbackTransformerLayer, Slots
from jaxmodels.layers import read_only, split_rng

Memory = tuple[tuple[jax.Array, jax.Array], ...]  # (key, value) [B, H, N, d_k] per layer, or once for all
Key = jax.Array | None


# [feedback.step]
@read_only
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
        key, value = of_layers[i]
        y = call(layer, i, states[-1], Slots(key, visible, position), value, layer_rng)
        states.append(pinned(y, known[i]) if known and i < len(known) else y)
    key, value = model.remember(model.mix(states))
    new = (
        [(key, value)]
        if model.shares_kv
        else [(layer.attn.key(key), layer.attn.value(value)) for layer in model.layers]
    )
    return states[1:], tuple(new)


def call(layer: Any, i: int, x: jax.Array, key: Slots, value: jax.Array, rng: Key) -> jax.Array:
    """Call layer i of a model; raises ValueError if a class of its own, or of its attention, cannot read slots."""
    try:
        return layer(x=x, key=key, value=value, rng=rng)
    except (TypeError, AttributeError) as error:
        kinds = type(layer), type(layer.attn)
        if kinds == (FeedbackTransformerLayer, FeedbackAttention) or "Slots" not in str(error):
            raise
        raise ValueError(
            f"layers.{i} is a {kinds[0].__name__} with attn a {kinds[1].__name__}; "
            f"one of them does not pass its key, a `Slots`, to the call of FeedbackAttention: {error}"
        ) from error


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


def product_of_rows(x: jax.Array, kernel: jax.Array, *others: Any, **settings: Any) -> jax.Array:
    """`product` as the `dot_general` of an nnx.Linear; [B, D_in], [D_in, D_out] -> [B, D_out].

    Other calls (more axes, a precision or a result type of their own) go to JAX's.
    """
    if x.ndim != 2 or any(setting is not None for setting in settings.values()):
        return jax.lax.dot_general(x, kernel, *others, **settings)
    return product(kernel, x.T).T


# [feedback.gradient]
@jax.custom_vjp
def pinned(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient of x: the known value of x, which is then not computed again."""
    return value


pinned.defvjp(lambda x, value: (value, None), lambda _, dy: (dy, None))


def reach(model: Any, n: int) -> Any:
    """Copy of a model for `step`: position tables of the distances n … 1 only, head-major and scaled; fast products.

    The tables become d_k^-½ · [H, n, …] of [P, H, …]. Decoding calls this for every token in a loop. XLA hoists
    loop-invariant transpositions only together with a following product: without the scale here it transposed at every
    token, a third of a token's time.
    """
    model = jax.tree.map(lambda array: array, model)
    for layer in model.layers:
        for table in (layer.attn.key_pos_embeddings, layer.attn.key_pos_bias):
            table.set_value(jnp.swapaxes(table[-n:], 0, 1) * layer.attn.scale)
        for path, module in nnx.iter_modules(layer):
            if isinstance(module, nnx.Linear) and path[:1] != ("attn",) and module.dot_general is jax.lax.dot_general:
                module.dot_general = product_of_rows
    return model


def split_weights(model: Any) -> tuple[Any, Any, Any, Any]:
    """Split a model into its graph, its position tables, its other floating arrays, and the rest.

    `nnx.merge` is the inverse. The rest has no gradient: integers and random keys.
    """

    def is_table(path: tuple[Any, ...], _: Any) -> bool:
        return path[-1] in ("key_pos_embeddings", "key_pos_bias")

    def is_float(_: tuple[Any, ...], leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.inexact)

    graphdef, *states = nnx.split(model, is_table, is_float, ...)
    tables, floats, rest = states
    return graphdef, tables, floats, rest


def no_memory(model: Any, batch: int, slots: int, dtype: Any) -> Memory:
    """Zero slots for a model's keys and values."""
    owners = [layer.attn for layer in (model.layers[:1] if model.shares_kv else model.layers)]
    shapes = [(batch, attn.heads, slots, attn.d_k) for attn in owners]
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes)


def check_layers(model: Any) -> int:
    """The number of earlier steps that all layers' tables reach back.

    Raises ValueError, naming the sub-module, if a layer has no `FeedbackAttention` as its `attn`.
    """
    for i, layer in enumerate(model.layers):
        attn = getattr(layer, "attn", None)
        if not isinstance(attn, FeedbackAttention):
            raise ValueError(f"layers.{i}.attn is a {type(attn).__name__}; it must be a FeedbackAttention")
        if (attn.key is None) is not model.shares_kv:
            kind = type(model).__name__
            raise ValueError(f"layers.{i}.attn must have is_kv_precomputed={model.shares_kv} in a {kind}")
    return min(layer.attn.P for layer in model.layers)
