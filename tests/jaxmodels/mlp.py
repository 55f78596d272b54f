"""Language model of somebody else: an MLP over the last tokens, with rules and names of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxmodels
from jaxmodels.cache import Cache, align_left, make_cache, unless_overrun, write


@jaxmodels.register("tests.MLPLanguageModel")
class MLPLanguageModel(nnx.Module):
    """W₂ silu(W₁ [x_t, …, x_{t-k+1}]) of the last k token embeddings, zero before the first token.

    Axes: S sequence, B batch, N cache slots, D features, V vocabulary. The cache holds embeddings, as one head.
    """

    sequence_axis = 0
    sharding_rules = (
        (r"embed\.embedding", P(None, "fsdp")),
        (r"hidden\.kernel", P("fsdp", "tensor")),
        (r"hidden\.bias", P("tensor")),
        (r"out\.kernel", P("tensor")),
        (r"out\.bias", P()),
    )

    def __init__(self, n_vocab: int, d_model: int, d_ff: int, k: int = 3, *, rngs: nnx.Rngs):
        self.sizes = (n_vocab, d_model, d_ff, k)
        self.k = k
        self.embed = nnx.Embed(n_vocab, d_model, rngs=rngs)
        self.hidden = nnx.Linear(k * d_model, d_ff, rngs=rngs)
        self.out = nnx.Linear(d_ff, n_vocab, rngs=rngs)

    def config(self) -> dict[str, Any]:
        return dict(zip(("n_vocab", "d_model", "d_ff", "k"), self.sizes, strict=True))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids [S, B] -> logits [S, B, V]."""
        x = jnp.moveaxis(self.embed(ids), 0, 1)  # [B, S, D]
        return self.read(x, jnp.arange(len(ids)))

    def read(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Logits [S, B, V] at positions [S] or [S, B] of embeddings x [B, N, D]."""
        rows = positions[:, None] if positions.ndim == 1 else positions
        rows = jnp.broadcast_to(rows, (len(positions), len(x))).T  # [B, S]
        last = rows[..., None] - jnp.arange(self.k)  # [B, S, k]
        window = jax.vmap(lambda row, at: row[jnp.maximum(at, 0)])(x, last)  # [B, S, k, D]
        window = jnp.where(last[..., None] >= 0, window, 0)
        logits = self.out(jax.nn.silu(self.hidden(window.reshape(*window.shape[:2], -1))))
        return jnp.moveaxis(logits, 0, 1)

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, start: jax.Array | None = None) -> Cache:
        slots = jnp.zeros((batch, 1, max_len, self.sizes[1]), dtype or self.embed.embedding.dtype)
        return make_cache([{"x": slots}], batch, start)

    def prefill(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        n, batch = ids.shape
        cache.check_room(n, batch, empty=True)
        ids = ids if cache.start is None else align_left(ids, cache.start)
        ends = jnp.full((1, batch), n - 1) if cache.start is None else n - 1 - cache.start[None]
        x = jnp.moveaxis(self.embed(ids), 0, 1)
        layers = ({"x": write(cache.layers[0]["x"], x[:, None], None)},)
        return unless_overrun(self.read(x, ends)[0], cache, n, empty=True), cache.advance(layers, n)

    def decode(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        cache.check_room(*ids.shape)
        positions = cache.positions(len(ids))
        x = jnp.moveaxis(self.embed(ids), 0, 1)
        slots = write(cache.layers[0]["x"], x[:, None], positions)
        return unless_overrun(self.read(slots[:, 0], positions), cache, len(ids)), cache.advance(
            ({"x": slots},), len(ids)
        )


def mlp(n_vocab: int = 23, d_model: int = 16, d_ff: int = 40, seed: int = 0) -> MLPLanguageModel:
    return MLPLanguageModel(n_vocab, d_model, d_ff, rngs=nnx.Rngs(seed))
