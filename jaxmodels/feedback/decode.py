"""Incremental decoding of a feedback transformer, step by step.

Axes: S new tokens, B batch, H heads, D = d_model, d_k features of a head, N slots.

The state is a `Cache` of the memories' keys and values: one entry per layer, or one in total if layers share them. A
step reads all N slots, so its cost is proportional to the cache, and `generate` grows the cache with the text. With
memory limited to M steps the cache stops growing at M slots, and a new memory overwrites the oldest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.cache import Cache, make_cache, write
from jaxmodels.feedback.step import check_layers, no_memory, reach, step
from jaxmodels.layers import check_sizes


def init_cache(model: Any, batch: int, max_len: int, dtype: Any, start: jax.Array | None = None) -> Cache:
    """Empty cache for max_len tokens per row; for any number of tokens if max_len is at least the model's memory.

    Raises ValueError if max_len is below 1 or beyond the position tables, or start is not one integer per row.
    """
    check_sizes(max_len=max_len)
    slots = max_len if model.memory is None else min(max_len, model.memory)
    reach_back = check_layers(model)
    if slots > reach_back:
        raise ValueError(f"max_len={max_len}; the position tables reach back P={reach_back} at most")
    layers = [{"key": key, "value": value} for key, value in no_memory(model, batch, slots, dtype)]
    return make_cache(layers, batch, start, model.memory)


def advance(model: Any, x_seq: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """The next S tokens [S, B, D] -> outputs [S, B, D] before the final norm, and the extended cache.

    Left padding writes no memory, and its outputs are unspecified. Raises ValueError if the cache does not fit the
    model.
    """
    if cache.limit != model.memory:
        raise ValueError(f"the cache was made for memory={cache.limit}, the model has memory={model.memory}")
    check_state(model, [tuple(layer.get(name) for name in ("key", "value")) for layer in cache.layers])
    graphdef, state = nnx.split(reach(model, cache.max_len))
    slots = jnp.arange(cache.max_len)

    def body(cache: Cache, x: jax.Array) -> tuple[Cache, jax.Array]:
        positions = cache.positions(1)
        position = positions[0]  # scalar, or [B] with left padding
        memory = tuple((layer["key"], layer["value"]) for layer in cache.layers)
        visible = slots < (position[:, None, None] if position.ndim else position)  # [N] or [B, 1, N]
        model = nnx.merge(
            graphdef, jax.tree.map(lambda array: array, state)
        )  # Variables of this trace: see `read_only`
        states, new = step(model, x, memory, visible, position)
        at = jnp.where(positions < 0, positions, positions % cache.max_len)
        layers = tuple(
            {name: write(layer[name], k[:, :, None], at) for name, k in zip(("key", "value"), pair, strict=True)}
            for layer, pair in zip(cache.layers, new, strict=True)
        )
        return cache.advance(layers, 1), states[-1]

    cache, outputs = jax.lax.scan(body, cache, x_seq)
    return outputs, cache


def check_state(model: Any, memory: Any) -> None:
    """Raises ValueError if keys and values [B, H, N, d_k] do not fit the model."""
    expected = jax.eval_shape(lambda: no_memory(model, 1, 1, jnp.float32))
    if len(memory) != len(expected):
        raise ValueError(f"the state has keys and values of {len(memory)} layers, the model has {len(expected)}")
    for layer, (right, _) in zip(memory, expected, strict=True):
        _, heads, _, d_k = right.shape
        for array in jax.tree.leaves(layer):
            if array.ndim != 4 or (array.shape[1], array.shape[3]) != (heads, d_k):
                shape = list(array.shape)
                raise ValueError(f"the state has arrays {shape}, the model needs [B, heads={heads}, slots, d_k={d_k}]")
