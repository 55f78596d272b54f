"""Incremental decoding of RETRO with neighbors: the cache, and the steps that extend it.

In addition to the keys and values of self-attention, the cache holds h of the current chunk, which the encoder reads
when the chunk is complete, and the encoded neighbors of the last complete chunk. Earlier neighbors are not needed.

Axes: B batch, S new tokens, L = chunk_len, N neighbors of M tokens, D = d_model, H heads of d_k features, V
vocabulary.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxmodels.cache import Cache, align_left, make_cache, unless_overrun
from jaxmodels.layers import check_sizes
from jaxmodels.retro.attention import ChunkedCrossAttention


class Decoder(Protocol):
    """Attributes of a RetroModel that decoding uses."""

    n_heads: int
    d_k: int
    d_model: int
    n_layers: int
    chunk_len: int
    ca_layers: frozenset[int]
    emb: Any
    attn: Any  # list of SelfAttention
    cca: Any  # list of ChunkedCrossAttention
    ffw: Any  # list of FeedForward
    read: Any

    def encode(self, neighbors: jax.Array, h: jax.Array) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetroCache(Cache):
    """Cache of a RetroModel; `shape` is (N, M), or None if retrieval is off."""

    chunk: jax.Array | None = None  # [B, L, D]: h at layer min(ca_layers) of the current chunk
    neighbors: tuple[dict[str, jax.Array], ...] = ()  # of each chunked cross-attention, [B, H, N·M, d_k]
    ids: jax.Array | None = None  # int32 [B, L]: ids of that chunk, if its neighbors are retrieved live
    shape: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})


def init_cache(
    model: Decoder, batch: int, max_len: int, dtype: Any, start: jax.Array | None, shape: tuple[int, int] | None
) -> RetroCache:
    """Empty cache; see `RetroModel.init_cache`."""
    check_sizes(max_len=max_len)
    layers = [pair(batch, model.n_heads, max_len, model.d_k, dtype) for _ in range(model.n_layers)]
    plain = make_cache(layers, batch, start)
    cache = RetroCache(plain.layers, plain.length, plain.start)
    if shape is None:
        return cache
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"neighbors={shape} must be (N, M): neighbors of a chunk and tokens of each, both at least 1")
    if not model.ca_layers:
        raise ValueError(f"neighbors={shape}, but the model has no ca_layers")
    n, m = shape
    neighbors = tuple(pair(batch, model.n_heads, n * m, model.d_k, dtype) for _ in model.cca)
    chunk = jnp.zeros((batch, model.chunk_len, model.d_model), dtype)
    return dataclasses.replace(cache, chunk=chunk, neighbors=neighbors, shape=(n, m))


def pair(batch: int, heads: int, n: int, d_k: int, dtype: Any) -> dict[str, jax.Array]:
    """Zero keys and values [B, H, n, d_k]."""
    return {name: jnp.zeros((batch, heads, n, d_k), dtype) for name in ("key", "value")}


def prefill(model: Decoder, ids: jax.Array, cache: RetroCache, ret: jax.Array | None) -> tuple[jax.Array, RetroCache]:
    """Fill an empty cache; see `RetroModel.prefill`."""
    batch, n = ids.shape
    cache.check_room(n, batch, empty=True)
    check_neighbors(cache, ret)
    start = jnp.zeros(batch, jnp.int32) if cache.start is None else cache.start
    if cache.start is not None:
        ids = align_left(ids.T, cache.start).T
    length = n - start  # [B], tokens of each row without padding
    h, e = model.emb(ids), None  # [B, S, D]
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
                last = jnp.maximum(length // model.chunk_len - 1, 0)  # rows without a complete chunk do not read it
                neighbors.append(encoded_pair(cross, e[jnp.arange(batch), last]))
        h = ffw(h)
    logits = unless_overrun(model.read(h[jnp.arange(batch), length - 1]), cache, n, empty=True)
    kept = like(cache.neighbors, tuple(neighbors)) if neighbors else cache.neighbors
    filled = dataclasses.replace(cache.advance(tuple(layers), n), chunk=chunk, neighbors=kept)
    return logits, filled


def decode(model: Decoder, ids: jax.Array, cache: RetroCache, ret: jax.Array | None) -> tuple[jax.Array, RetroCache]:
    """Extend a cache; see `RetroModel.decode`."""
    batch, n = ids.shape
    cache.check_room(n, batch)
    check_neighbors(cache, ret)
    if ret is not None and ret.shape[:2] != ids.shape:
        raise ValueError(f"ret must be [B={batch}, S={n}, N, M], neighbors of every token, got {list(ret.shape)}")
    if ret is None or n == 1:
        return step(model, ids, cache, ret)

    def one(cache: RetroCache, token: tuple[jax.Array, jax.Array]) -> tuple[RetroCache, jax.Array]:
        logits, cache = step(model, token[0][:, None], cache, token[1][:, None])
        return cache, logits[:, 0]

    cache, logits = jax.lax.scan(one, cache, (ids.T, ret.swapaxes(0, 1)))
    return logits.swapaxes(0, 1), cache


def step(model: Decoder, ids: jax.Array, cache: RetroCache, ret: jax.Array | None) -> tuple[jax.Array, RetroCache]:
    """Decode S tokens [B, S] without neighbors, or one token with neighbors [B, 1, N, M]."""
    n = ids.shape[1]
    positions = cache.positions(n)
    h, layers, chunk, neighbors = model.emb(ids), [], cache.chunk, cache.neighbors
    served = 0
    for p, (attn, ffw, layer) in enumerate(zip(model.attn, model.ffw, cache.layers, strict=True)):
        h, layer = attn.decode(h, layer, positions)
        layers.append(layer)
        if p in model.ca_layers and ret is not None:
            if served == 0:
                chunk, neighbors = extend_chunk(model, h, ret, positions, cache)
            h = model.cca[served].decode(h, neighbors[served], positions)
            served += 1
        h = ffw(h)
    logits = unless_overrun(model.read(h).swapaxes(0, 1), cache, n).swapaxes(0, 1)
    return logits, dataclasses.replace(cache.advance(tuple(layers), n), chunk=chunk, neighbors=neighbors)


def extend_chunk(
    model: Decoder, h: jax.Array, ret: jax.Array, positions: jax.Array, cache: RetroCache
) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:
    """Add a token h [B, 1, D] to the chunk; encode its neighbors `ret` in rows in which the token completes it."""
    length = model.chunk_len
    assert cache.chunk is not None, "made by init_cache if there are neighbors"
    place = jnp.broadcast_to(positions[0] % length, len(h))  # [B]; padding is overwritten before the chunk is complete
    chunk = cache.chunk.at[jnp.arange(len(h)), place].set(h[:, 0].astype(cache.chunk.dtype))
    ends = (place == length - 1) & (positions[0] >= 0)  # [B]

    def encoded() -> tuple[dict[str, jax.Array], ...]:
        e = model.encode(model.emb(ret), chunk.astype(h.dtype))[:, 0]  # [B, N, M, D]
        new = like(cache.neighbors, tuple(encoded_pair(cross, e) for cross in model.cca))
        return jax.tree.map(lambda a, b: jnp.where(ends[:, None, None, None], a, b), new, cache.neighbors)

    return chunk, jax.lax.cond(ends.any(), encoded, lambda: cache.neighbors)


def encoded_pair(cross: ChunkedCrossAttention, e: jax.Array) -> dict[str, jax.Array]:
    """Keys and values of one chunk's encoded neighbors: e [B, N, M, D] -> [B, H, N·M, d_k] each."""
    key, value = cross.keys_and_values_of_neighbors(e)
    return {"key": key, "value": value}


def like(old: Any, new: Any) -> Any:
    """Cast new buffers to the dtypes of the cache's."""
    return jax.tree.map(lambda a, b: b.astype(a.dtype), old, new)


def take(h: jax.Array, first: jax.Array, n: int) -> jax.Array:
    """n rows of h [B, S, D] from `first` [B] on -> [B, n, D]; rows beyond S are unspecified."""
    rows = jnp.minimum(first[:, None] + jnp.arange(n), h.shape[1] - 1)
    return jnp.take_along_axis(h, rows[..., None], axis=1)


def check_neighbors(cache: RetroCache, ret: jax.Array | None) -> None:
    """Raises ValueError if the (N, M) of `ret` is not that of the cache."""
    given = None if ret is None or ret.ndim != 4 else tuple(ret.shape[2:])
    if given != cache.shape:
        raise ValueError(f"ret has (N, M) = {given}, the cache was made for neighbors={cache.shape}")
