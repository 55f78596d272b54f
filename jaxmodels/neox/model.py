"""GPT-NeoX (arXiv 2204.06745), batch-first, its layers stacked for training or one by one for decoding.

Axes: B batch, S sequence, N cache slots, H heads, D = n_hidden = H·d_k features, F hidden features of the feed-forward
network, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.attention import attend, causal_attention, dot_product_scores
from jaxmodels.cache import Cache, align_left, make_cache, unless_overrun, visible, write
from jaxmodels.layers import Embed, LayerNorm, constrain, rematerialised
from jaxmodels.neox.config import NeoXConfig
from jaxmodels.neox.names import adapted
from jaxmodels.rope import rotary_tables, turn
from jaxmodels.transformer import check_ids

Tables = tuple[jax.Array, jax.Array]  # rotary cosines and sines, [B or 1, S, 1, d_rope/2]


class Linear(nnx.Linear):
    """y = xW + b in the dtype given (None: the widest of what comes in); W drawn from N(0, std), b zero."""

    def __init__(self, d_in: int, d_out: int, std: float, dtype, bias: bool = True, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(std)
        super().__init__(d_in, d_out, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs)


def wide(config: NeoXConfig) -> float:
    """Initial deviation of what reads the residual stream: √(2/5D)."""
    return math.sqrt(2 / (5 * config.n_hidden))


def narrow(config: NeoXConfig) -> float:
    """Initial deviation of what writes into the residual stream: 2/(L·√D)."""
    return 2 / (config.n_layers * math.sqrt(config.n_hidden))


class Embedding(nnx.Module):
    """ids [B, S] -> [B, S, D]."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.emb = Embed(config.n_vocab, config.n_hidden, wide(config), rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.emb(ids)


class Attention(nnx.Module):
    """Rotary attention over H heads; each head's query, key and value lie side by side in `qkv_lin`'s output."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        d = config.n_hidden
        self.heads, self.d_k = config.n_heads, config.d_k
        self.qkv_lin = Linear(d, 3 * d, wide(config), config.dtype, rngs=rngs)
        self.output = Linear(d, d, narrow(config), config.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rotary: Tables, plain: bool = False) -> jax.Array:
        """x [B, S, D] -> [B, S, D]; `plain` computes the whole score matrix."""
        query, key, value = self.project(x, rotary)
        y = plain_attention(query, key, value) if plain else causal_attention(query, key, value)
        return self.output(y.reshape(x.shape))

    def project(self, x: jax.Array, rotary: Tables) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, S, D] -> query and key, turned, and value, each [B, S, H, d_k]."""
        qkv = self.qkv_lin(x).reshape(*x.shape[:2], self.heads, 3 * self.d_k)
        query, key, value = jnp.split(constrain(qkv, "BSHK"), 3, axis=-1)
        return turn(query, *rotary), turn(key, *rotary), value

    def decode(
        self, x: jax.Array, rotary: Tables, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The next S tokens [B, S, D] over the cache and themselves; keys are cached after they were turned.

        positions: as `Cache.positions` gives them; None says that the cache is empty.
        """
        query, key, value = self.project(x, rotary)
        new = {"key": heads_first(key), "value": heads_first(value)}
        cache = {name: write(cache[name], array, positions) for name, array in new.items()}
        if positions is None:
            y = causal_attention(query, key, value)
        else:
            scores = dot_product_scores(heads_first(query), cache["key"], 1 / math.sqrt(self.d_k))
            y = attend(scores, cache["value"], visible(positions, scores.shape[-1]))
            y = heads_first(y).astype(x.dtype)  # the cache may be kept in another
        return self.output(y.reshape(x.shape)), cache


def plain_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`causal_attention` with the whole score matrix.

    `jax.nn.dot_product_attention` without cuDNN would not do: its softmax is in float32 even for float64, and on CPUs
    it refuses float16.
    """
    query, key, value = (heads_first(a) for a in (query, key, value))
    scores = dot_product_scores(query, key, 1 / math.sqrt(query.shape[-1]))
    return heads_first(attend(scores, value, visible(jnp.arange(scores.shape[2]), scores.shape[3])))


def heads_first(x: jax.Array) -> jax.Array:
    """[B, S, H, d_k] -> [B, H, S, d_k], and back."""
    return x.swapaxes(1, 2)


class FeedForward(nnx.Module):
    """W₂ gelu(W₁ x + b₁) + b₂."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.dense_h_h4 = Linear(config.n_hidden, config.d_ff, wide(config), config.dtype, rngs=rngs)
        self.dense_h4_h = Linear(config.d_ff, config.n_hidden, narrow(config), config.dtype, rngs=rngs)
        self.approximate = config.activation == "gelu_tanh"

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = constrain(self.dense_h_h4(x), "BSF")
        wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))  # x³ leaves float16 at x = 40
        return self.dense_h4_h(jax.nn.gelu(wide, approximate=self.approximate).astype(hidden.dtype))


class Block(nnx.Module):
    """x + attn(LN₁ x) + ffn(LN₂ x); with the sequential residual x ← x + attn(LN₁ x), then x + ffn(LN₂ x).

    The four linear maps (attention.qkv_lin, attention.output, ffn.dense_h_h4, ffn.dense_h4_h) are only ever called:
    other modules may take their place.
    """

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.parallel_residual = config.parallel_residual
        self.pre_ln_attn = LayerNorm(config.n_hidden, config.layer_norm_eps, config.dtype, rngs=rngs)
        self.pre_ln_ffn = LayerNorm(config.n_hidden, config.layer_norm_eps, config.dtype, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array, rotary: Tables, plain: bool = False) -> jax.Array:
        """x [B, S, D] -> [B, S, D]."""
        return self.residual(x, self.attention(self.pre_ln_attn(x), rotary, plain))

    def decode(
        self, x: jax.Array, rotary: Tables, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The next S tokens [B, S, D], over the cache and themselves; see `Attention.decode`."""
        attended, cache = self.attention.decode(self.pre_ln_attn(x), rotary, cache, positions)
        return self.residual(x, attended), cache

    def residual(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        if self.parallel_residual:
            return x + (attended + self.ffn(self.pre_ln_ffn(x)))
        x = x + attended
        return x + self.ffn(self.pre_ln_ffn(x))


class FinalNorm(nnx.Module):
    """The last LayerNorm."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.ln = LayerNorm(config.n_hidden, config.layer_norm_eps, config.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ln(x)


class Readout(nnx.Module):
    """[..., D] -> logits [..., V], without a bias."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.linear = Linear(config.n_hidden, config.n_vocab, wide(config), config.dtype, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


LAYER_RULES = (
    (r"(attention\.qkv_lin|ffn\.dense_h_h4)\.kernel", P("fsdp", "tensor")),
    (r"(attention\.qkv_lin|ffn\.dense_h_h4)\.bias", P("tensor")),
    (r"(attention\.output|ffn\.dense_h4_h)\.kernel", P("tensor", "fsdp")),
    (r"(attention\.output|ffn\.dense_h4_h)\.bias", P()),
)


class NeoX(nnx.Module):
    """Token ids to logits of the next token; tied, the readout is the embedding's table.

    `layers` is one Block whose arrays have a leading layer axis: the call is a scan over it, and compile time does not
    grow with L. With `stacked=False`, or after `unstacked()`, it is a list of L blocks: decoding needs it so, as a scan
    copies each layer's slice of the weights for every token.
    """

    sequence_axis = 1
    # A list of layers has paths with their numbers; a stacked layer's arrays have an axis more.
    sharding_rules = (
        (r"embedding\.emb\.embedding", P("tensor", "fsdp")),
        *((rf"layers\.\d+\.{name}", spec) for name, spec in LAYER_RULES),
        *((rf"layers\.{name}", P(None, *spec)) for name, spec in LAYER_RULES),
        (r"(pre_ln_attn|pre_ln_ffn|final_norm\.ln)\.(scale|bias)", P()),
        (r"readout\.linear\.kernel", P("fsdp", "tensor")),
    )

    def __init__(self, config: NeoXConfig, *, stacked: bool = True, rngs: nnx.Rngs):
        self.settings = config
        self.embedding = Embedding(config, rngs=rngs)
        self.layers: Any
        if stacked:
            make = nnx.vmap(lambda rngs: Block(config, rngs=rngs))
            self.layers = make(rngs.split(config.n_layers))
        else:
            self.layers = nnx.List(Block(config, rngs=rngs) for _ in range(config.n_layers))
        self.final_norm = FinalNorm(config, rngs=rngs)
        if not config.tied:
            self.readout = Readout(config, rngs=rngs)

    def config(self) -> dict[str, Any]:
        """The arguments of `from_config`, as `config.json` keeps them."""
        config = dataclasses.asdict(self.settings) | {"stacked": self.is_stacked}
        return config if self.int8_threshold is None else config | {"int8_threshold": self.int8_threshold}

    @classmethod
    def from_config(
        cls, *, stacked: bool = True, int8_threshold: float | None = None, rngs: nnx.Rngs, **fields: Any
    ) -> "NeoX":
        """The model of a `config()`; raises ValueError for values that no model can have."""
        model = cls(NeoXConfig(**fields), stacked=stacked, rngs=rngs)
        if int8_threshold is None:
            return model
        from jaxmodels.neox.int8 import quantize  # which is about models, and so imports this file

        return quantize(model, int8_threshold)

    def adapted(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What `from_torch` makes of the original's own names; see `names`."""
        return adapted(state_dict, self.settings)

    @property
    def is_stacked(self) -> bool:
        return isinstance(self.layers, Block)

    @property
    def int8_threshold(self) -> float | None:
        """What a quantised model counts as outliers, see `quantize`; None for any other model."""
        layer = self.layers if self.is_stacked else self.layers[0]
        return getattr(layer.attention.qkv_lin, "threshold", None)

    def unstacked(self) -> "NeoX":
        """The model with a list of layers, each array a copy of its slice; itself where it has one already."""
        return self.with_layers(nnx.List(self.blocks())) if self.is_stacked else self

    def blocks(self) -> list[Block]:
        """The layers, one by one."""
        return unstack(self.layers, self.settings.n_layers) if self.is_stacked else list(self.layers)

    def stacked(self) -> "NeoX":
        """The inverse of `unstacked`."""
        return self if self.is_stacked else self.with_layers(stack(self.blocks()))

    def with_layers(self, layers: Any) -> "NeoX":
        """The model around other layers; everything else is shared with this one."""
        model = jax.tree.map(lambda array: array, self)  # a new module, and one of this trace where there is one
        model.layers = layers
        return model

    def __call__(self, ids: jax.Array, start: jax.Array | None = None) -> jax.Array:
        """ids [B, S] int -> logits [B, S, V]; start int [B] counts left padding, where logits are 0.

        Raises ValueError where ids have another rank, or start leaves a row without a token.
        """
        return self.forward(ids, start, plain=False)

    def plain(self, ids: jax.Array, start: jax.Array | None = None) -> jax.Array:
        """The same, one layer after the other, with the whole score matrix in each attention."""
        return self.unstacked().forward(ids, start, plain=True)

    def forward(self, ids: jax.Array, start: jax.Array | None, plain: bool) -> jax.Array:
        check_ids(ids, "[B, S]")
        s = ids.shape[1]
        if start is not None:  # rows begin at 0: causality alone then hides what is no text
            start = checked_start(start, *ids.shape)
            ids = align_left(ids.T, start).T
        x, rotary = self.embed(ids, jnp.arange(s))

        def body(x: jax.Array, layer: Block) -> tuple[jax.Array, None]:
            return constrain(layer(x, rotary, plain), "BSD"), None

        if not plain:  # what is traced must not be hidden
            body = jax.checkpoint(body, prevent_cse=False) if self.settings.remat else rematerialised(body)
        if self.is_stacked:
            x, _ = jax.lax.scan(body, x, self.layers)
        else:
            for layer in self.layers:
                x, _ = body(x, layer)
        x = self.final_norm(x)
        return self.read(x if start is None else move_right(x, start))

    def embed(self, ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, Tables]:
        """x [B, S, D] in the dtype that is computed in, and the rotary tables of positions [S] or [S, B]."""
        x = constrain(self.embedding(ids), "BSD")
        x = x if self.settings.dtype is None else x.astype(self.settings.dtype)
        positions = positions[None] if positions.ndim == 1 else positions.T
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        cos, sin = rotary_tables(positions, self.settings.d_rope, self.settings.rope_base, dtype)
        return x, (cos[:, :, None], sin[:, :, None])

    def read(self, x: jax.Array) -> jax.Array:
        """Logits [..., V] of what the final norm gave."""
        if not self.settings.tied:
            return self.readout(x)
        return x @ self.embedding.emb.embedding[...].astype(x.dtype).T

    def init_cache(self, batch: int, max_len: int, dtype=None, start: jax.Array | None = None) -> Cache:
        """An empty cache for up to max_len tokens of text a row; dtype None: the one that is computed in.

        start: int [B], how many of the first ids of each row will be left padding. Raises ValueError where max_len is
        not at least 1 or start is not one integer per row.
        """
        if max_len < 1:
            raise ValueError(f"max_len={max_len} must be at least 1")
        dtype = dtype or self.settings.dtype or self.embedding.emb.embedding.dtype
        shape = (batch, self.settings.n_heads, max_len, self.settings.d_k)
        layers = [
            {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)} for _ in range(self.settings.n_layers)
        ]
        return make_cache(layers, batch, start)

    def prefill(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The first S tokens [B, S] in one pass -> the last one's logits [B, V] and the filled cache.

        Raises ValueError where the cache is not empty or too short; inside a trace the logits are NaN then.
        """
        check_ids(ids, "[B, S]")
        batch, n = ids.shape
        cache.check_room(n, batch, empty=True)
        if cache.start is not None:
            ids = align_left(ids.T, cache.start).T
        x, layers = self.through_cache(ids, cache, None)
        last = x[:, -1] if cache.start is None else x[jnp.arange(batch), n - 1 - cache.start]
        return unless_overrun(self.read(self.final_norm(last)), cache, n, empty=True), cache.advance(layers, n)

    def decode(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """S further tokens [B, S] -> their logits [B, S, V] and the longer cache.

        Raises ValueError where they do not fit; inside a trace, where the length is unknown, the logits are NaN then.
        """
        check_ids(ids, "[B, S]")
        batch, n = ids.shape
        cache.check_room(n, batch)
        x, layers = self.through_cache(ids, cache, cache.positions(n))
        logits = self.read(self.final_norm(x)).swapaxes(0, 1)
        return unless_overrun(logits, cache, n).swapaxes(0, 1), cache.advance(layers, n)

    def through_cache(self, ids: jax.Array, cache: Cache, positions: jax.Array | None):
        """The next tokens [B, S] through all layers -> x [B, S, D] before the final norm, and the layers' caches."""
        x, rotary = self.embed(ids, jnp.arange(ids.shape[1]) if positions is None else positions)
        new = []
        for layer, layer_cache in zip(self.blocks(), cache.layers, strict=True):
            x, layer_cache = layer.decode(x, rotary, layer_cache, positions)
            new.append(layer_cache)
        return x, tuple(new)


@functools.partial(jax.jit, static_argnames="n")
def unstack(layers: Block, n: int) -> list[Block]:
    """n layers, one by one, out of a block whose arrays have a leading layer axis."""
    return [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(n)]


@jax.jit
def stack(layers: list[Block]) -> Block:
    """The inverse of `unstack`."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def checked_start(start: jax.Array, batch: int, s: int) -> jax.Array:
    """start as int32 [B]; raises ValueError where it is something else, or leaves a row without a token."""
    checked = make_cache([], batch, start).start
    assert checked is not None
    if not isinstance(checked, jax.core.Tracer) and np.asarray(checked).max() >= s:
        raise ValueError(f"start={checked.tolist()} must leave at least one of the {s} tokens of each row")
    return checked


def move_right(x: jax.Array, start: jax.Array) -> jax.Array:
    """Rows of x [B, S, D] moved back from 0 to where the text begins; zeros before it."""
    rows = jnp.arange(x.shape[1]) - start[:, None]
    moved = jnp.take_along_axis(x, jnp.maximum(rows, 0)[..., None], axis=1)
    return jnp.where(rows[..., None] >= 0, moved, 0)
