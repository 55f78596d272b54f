"""Decoding with neighbours: what RETRO keeps between calls, and how it goes on from there.

Beside the keys and values of self-attention that is little: h of the chunk that is being written, which the encoder
will read once it is complete, and the encoded neighbours of the last complete one. Older ones are not looked at again.

Axes: B batch, S new tokens, L = chunk_len, N neighbours of M tokens, D = d_model, H heads of d_k features, V
vocabulary.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxmodels.cache import Cache, align_left, make_cache, unless_overrun

if TYPE_CHECKING:
    from jaxmodels.retro.model import RetroModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetroCache(Cache):
    """A Cache, and what retrieval adds to it; `shape` (N, M) is None where retrieval is off."""

    chunk: jax.Array | None = None  # [B, L, D]: h at layer min(ca_layers) of the chunk being written
    neighbors: tuple[dict[str, jax.Array], ...] = ()  # of each chunked cross-attention, [B, H, N·M, d_k]
    ids: jax.Array | None = None  # int32 [B, L]: of that chunk, where its neighbours are looked up as it is written
    shape: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})


def init_cache(
    model: "RetroModel", batch: int, max_len: int, dtype: Any, start: jax.Array | None, shape: tuple[int, int] | None
) -> RetroCache:
    if max_len < 1:
        raise ValueError(f"max_len={max_len} must be at least 1")
    layers = [pair(batch, model.n_heads, max_len, model.d_k, dtype) for _ in range(model.n_layers)]
    plain = make_cache(layers, batch, start)
    cache = RetroCache(plain.layers, plain.length, plain.start)
    if shape is None:
        return cache
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"neighbors={shape} must be how many, and of how many tokens, both at least 1")
    if not model.ca_layers:
        raise ValueError(f"neighbors={shape}, but this model has no ca_layers to read them")
    n, m = shape
    neighbors = tuple(pair(batch, model.n_heads, n * m, model.d_k, dtype) for _ in model.cca)
    chunk = jnp.zeros((batch, model.chunk_len, model.d_model), dtype)
    return dataclasses.replace(cache, chunk=chunk, neighbors=neighbors, shape=(n, m))


def pair(batch: int, heads: int, n: int, d_k: int, dtype: Any) -> dict[str, jax.Array]:
    return {name: jnp.zeros((batch, heads, n, d_k), dtype) for name in ("key", "value")}


def prefill(
    model: "RetroModel", ids: jax.Array, cache: RetroCache, ret: jax.Array | None
) -> tuple[jax.Array, RetroCache]:
    batch, n = ids.shape
    cache.check_room(n, batch, empty=True)
    check_made_for(cache, ret)
    start = jnp.zeros(batch, jnp.int32) if cache.start is None else cache.start
    if cache.start is not None:
        ids = align_left(ids.T, cache.start).T
    length = n - start  # [B] tokens of text in each row
    h, e = model.emb(ids), None
    layers, chunk, neighbors = [], cache.chunk, []
    cca = iter(model.cca)
    for p, (attn, ffw, layer) in enumerate(zip(model.attn, model.ffw, cache.layers, strict=True)):
        h, layer = attn.decode(h, layer, None)
        layers.append(layer)
        if p in model.ca_layers and ret is not None:
            if p == min(model.ca_layers):
                chunk = like(chunk, take(h, length // model.chunk_len * model.chunk_len, model.chunk_len))
            cross = next(cca)
            if ret.shape[1]:
                e = model.encode(model.emb(ret), h) if e is None else e
                h = cross(h, e)
                last = jnp.maximum(length // model.chunk_len - 1, 0)  # where there is none, nobody looks
                neighbors.append(read(cross, e[jnp.arange(batch), last]))
        h = ffw(h)
    logits = unless_overrun(model.read(h[jnp.arange(batch), length - 1]), cache, n, empty=True)
    kept = like(cache.neighbors, tuple(neighbors)) if neighbors else cache.neighbors
    filled = dataclasses.replace(cache.advance(tuple(layers), n), chunk=chunk, neighbors=kept)
    return logits, filled


def decode(
    model: "RetroModel", ids: jax.Array, cache: RetroCache, ret: jax.Array | None
) -> tuple[jax.Array, RetroCache]:
    batch, n = ids.shape
    cache.check_room(n, batch)
    check_made_for(cache, ret)
    if ret is not None and ret.shape[:2] != ids.shape:
        raise ValueError(f"ret must be [B={batch}, S={n}, N, M], neighbours for every token, got {list(ret.shape)}")
    if ret is None or n == 1:
        return step(model, ids, cache, ret)

    def one(cache: RetroCache, token: tuple[jax.Array, jax.Array]) -> tuple[RetroCache, jax.Array]:
        logits, cache = step(model, token[0][:, None], cache, token[1][:, None])
        return cache, logits[:, 0]

    cache, logits = jax.lax.scan(one, cache, (ids.T, ret.swapaxes(0, 1)))
    return logits.swapaxes(0, 1), cache


def step(model: "RetroModel", ids: jax.Array, cache: RetroCache, ret: jax.Array | None) -> tuple[jax.Array, RetroCache]:
    """S further tokens [B, S]; with neighbours [B, 1, N, M], one."""
    n = ids.shape[1]
    positions = cache.positions(n)
    h, layers, chunk, neighbors = model.emb(ids), [], cache.chunk, cache.neighbors
    served = 0
    for p, (attn, ffw, layer) in enumerate(zip(model.attn, model.ffw, cache.layers, strict=True)):
        h, layer = attn.decode(h, layer, positions)
        layers.append(layer)
        if p in model.ca_layers and ret is not None:
            if served == 0:
                chunk, neighbors = complete(model, h, ret, positions, cache)
            h = model.cca[served].decode(h, neighbors[served], positions)
            served += 1
        h = ffw(h)
    logits = unless_overrun(model.read(h).swapaxes(0, 1), cache, n).swapaxes(0, 1)
    return logits, dataclasses.replace(cache.advance(tuple(layers), n), chunk=chunk, neighbors=neighbors)


def complete(
    model: "RetroModel", h: jax.Array, ret: jax.Array, positions: jax.Array, cache: RetroCache
) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:
    """The chunk with one more token h [B, 1, D], and the neighbours to read: new ones where the token ends it."""
    length = model.chunk_len
    place = jnp.broadcast_to(positions[0] % length, len(h))  # padding, before position 0, is overwritten in time
    chunk = cache.chunk.at[jnp.arange(len(h)), place].set(h[:, 0].astype(cache.chunk.dtype))  # type: ignore[union-attr]
    ends = (place == length - 1) & (positions[0] >= 0)

    def encoded() -> tuple[dict[str, jax.Array], ...]:
        e = model.encode(model.emb(ret), chunk.astype(h.dtype))[:, 0]
        new = like(cache.neighbors, tuple(read(cross, e) for cross in model.cca))
        return jax.tree.map(lambda a, b: jnp.where(ends[:, None, None, None], a, b), new, cache.neighbors)

    return chunk, jax.lax.cond(ends.any(), encoded, lambda: cache.neighbors)


def read(cross: Any, e: jax.Array) -> dict[str, jax.Array]:
    """Keys and values of one chunk's encoded neighbours: e [B, N, M, D] -> [B, H, N·M, d_k] of each."""
    key, value = cross.keys_and_values_of_neighbors(e)
    return {"key": key, "value": value}


def like(old: Any, new: Any) -> Any:
    """New buffers in the dtype that the cache is kept in."""
    return jax.tree.map(lambda a, b: b.astype(a.dtype), old, new)


def take(h: jax.Array, first: jax.Array, n: int) -> jax.Array:
    """n rows of h [B, S, D] from `first` [B] on; what lies beyond S is unspecified."""
    rows = jnp.minimum(first[:, None] + jnp.arange(n), h.shape[1] - 1)
    return jnp.take_along_axis(h, rows[..., None], axis=1)


def check_made_for(cache: RetroCache, ret: jax.Array | None) -> None:
    """Raises ValueError where neighbours come to a cache that was made for none, or for others, or none come."""
    given = None if ret is None or ret.ndim != 4 else tuple(ret.shape[2:])
    if given != cache.shape:
        raise ValueError(f"ret has (N, M) = {given}, the cache was made for neighbors={cache.shape}")
