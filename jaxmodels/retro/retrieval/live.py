"""Generation with live retrieval: neighbors are looked up when a chunk is complete.

Axes: B batch, S tokens, L = chunk_len, N neighbors of M = 2·L tokens, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.cache import align_left
from jaxmodels.process.failures import on_host
from jaxmodels.retro.decode import RetroCache
from jaxmodels.retro.model import RetroModel
from jaxmodels.retro.retrieval.index import ChunkIndex


@dataclasses.dataclass(frozen=True, eq=False)
class Retriever:
    """Function of chunks to the tokens of their k nearest passages. Hashed by identity: jit captures the instance."""

    index: ChunkIndex
    k: int = 2

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M) of the neighbors."""
        return self.k, 2 * self.index.chunk_len

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """Chunks int [..., L] -> neighbors int32 [..., N, M]."""
        chunks = np.asarray(chunks)
        starts = self.index.neighbors(chunks.reshape(-1, chunks.shape[-1]), self.k)
        passages = self.index.corpus.passages(starts, 2 * self.index.chunk_len)
        return passages.reshape(*chunks.shape[:-1], *self.shape)


class Retrieving(nnx.Module):
    """RetroModel with an index, as a language model for `jaxmodels.generate`.

    A callback looks up neighbors on the host: once for all chunks of the prompt, then whenever a chunk is complete.
    Raises ValueError if chunk lengths or vocabularies do not fit.
    """

    sequence_axis = 1

    def __init__(self, model: RetroModel, retriever: Retriever):
        index = retriever.index
        if model.chunk_len != index.chunk_len:
            raise ValueError(f"model has chunk_len={model.chunk_len}, the index chunk_len={index.chunk_len}")
        if model.n_vocab < len(index.corpus.vocabulary):
            raise ValueError(
                f"index has {len(index.corpus.vocabulary)} different tokens, the model n_vocab={model.n_vocab}"
            )
        self.model, self.retriever = model, retriever

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, start: jax.Array | None = None) -> RetroCache:
        """Same as `RetroModel.init_cache`, for this index's neighbors."""
        cache = self.model.init_cache(batch, max_len, dtype, start, neighbors=self.retriever.shape)
        return dataclasses.replace(cache, ids=jnp.zeros((batch, self.model.chunk_len), jnp.int32))

    def prefill(self, ids: jax.Array, cache: RetroCache) -> tuple[jax.Array, RetroCache]:
        """Same as `RetroModel.prefill`, with the neighbors of the prompt's chunks."""
        (batch, n), length = ids.shape, self.model.chunk_len
        text = ids if cache.start is None else align_left(ids.T, cache.start).T
        written = n - (jnp.zeros(batch, jnp.int32) if cache.start is None else cache.start)
        chunks = text[:, : n // length * length].reshape(batch, n // length, length)  # [B, C, L]
        rows = (written // length * length)[:, None] + jnp.arange(length)  # [B, L]
        unfinished = jnp.take_along_axis(text, jnp.minimum(rows, n - 1), axis=1)
        logits, cache = self.model.prefill(ids, cache, self.look_up(chunks))
        return logits, dataclasses.replace(cache, ids=unfinished.astype(jnp.int32))

    def decode(self, ids: jax.Array, cache: RetroCache) -> tuple[jax.Array, RetroCache]:
        """Same as `RetroModel.decode`, token by token, with the neighbors of each chunk that is completed."""
        cache.check_room(ids.shape[1], ids.shape[0])

        def one(cache: RetroCache, token: jax.Array) -> tuple[RetroCache, jax.Array]:
            position = cache.positions(1)[0]
            place = jnp.broadcast_to(position % self.model.chunk_len, token.shape)
            assert cache.ids is not None, "made by init_cache"
            chunk = cache.ids.at[jnp.arange(len(token)), place].set(token.astype(jnp.int32))  # [B, L]
            nothing = jnp.zeros((len(token), *self.retriever.shape), jnp.int32)
            ends = (place == self.model.chunk_len - 1) & (position >= 0)
            ret = jax.lax.cond(ends.any(), lambda: self.look_up(chunk), lambda: nothing)
            logits, cache = self.model.decode(token[:, None], cache, ret[:, None])
            return dataclasses.replace(cache, ids=chunk), logits[:, 0]

        if ids.shape[1] == 1:
            cache, logits = one(cache, ids[:, 0])
            return logits[:, None], cache
        cache, stacked = jax.lax.scan(one, cache, ids.T)
        return stacked.swapaxes(0, 1), cache

    def look_up(self, chunks: jax.Array) -> jax.Array:
        """Retrieve on the host: chunks int [..., L] -> neighbors int32 [..., N, M]."""
        shape = jax.ShapeDtypeStruct((*chunks.shape[:-1], *self.retriever.shape), jnp.int32)
        if 0 in shape.shape:
            return jnp.zeros(shape.shape, jnp.int32)
        return jax.pure_callback(on_host(self.retriever), shape, chunks)
