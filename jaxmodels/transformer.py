"""Pre-norm transformer, sequence-first: layer, encoder, and the autoregressive language model around them.

Axes: S sequence, B batch, D = d_model, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.attention import ATTENTION_RULES, Attention, Mask, MultiHeadAttention, RelativeMultiHeadAttention
from jaxmodels.cache import Cache, align_left, make_cache, unless_overrun
from jaxmodels.layers import (
    FEED_FORWARD_RULES,
    SMALL_RULES,
    Dropout,
    Embed,
    FeedForward,
    LayerNorm,
    Linear,
    check_decodes,
    check_ids,
    check_sizes,
    constrain,
    float_dtype,
    rematerialized,
    split_rng,
)
from jaxmodels.rope import RotaryPEMultiHeadAttention, RotaryValuePEMultiHeadAttention
from jaxmodels.synthesizer import SynthesizerAttention

__all__ = [
    "AutoregressiveTransformer",
    "Encoder",
    "FeedForward",
    "Generator",
    "MultiHeadAttention",
    "RelativeMultiHeadAttention",
    "TransformerLayer",
]


class TransformerLayer(nnx.Module):
    """x ← x + drop(attn(LN x)), then x ← x + drop(FF(LN x))."""

    def __init__(self, self_attn: Attention, d_model: int, d_ff: int, dropout_prob: float = 0.1, *, rngs: nnx.Rngs):
        self.self_attn = self_attn
        self.feed_forward = FeedForward(d_model, d_ff, dropout_prob, rngs=rngs)
        self.norm_self_attn = LayerNorm(d_model, rngs=rngs)
        self.norm_ff = LayerNorm(d_model, rngs=rngs)
        self.dropout = Dropout(dropout_prob)

    def __call__(self, x: jax.Array, mask: Mask, rng: jax.Array | None = None) -> jax.Array:
        """x [S, B, D] -> [S, B, D]; mask: see `Attention`."""
        attn_rng, rng = split_rng(rng, 2)
        z = self.norm_self_attn(x)
        return self._residual(x, self.self_attn(query=z, key=z, value=z, mask=mask, rng=attn_rng), rng)

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> dict[str, jax.Array]:
        """Empty buffers; see `Attention.init_cache`."""
        return self.self_attn.init_cache(batch, max_len, dtype)

    def decode(
        self, x: jax.Array, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The next S tokens [S, B, D] over the cache and themselves; see `Attention.decode`."""
        attended, cache = self.self_attn.decode(self.norm_self_attn(x), cache, positions)
        return self._residual(x, attended, None), cache

    def _residual(self, x: jax.Array, attended: jax.Array, rng: jax.Array | None) -> jax.Array:
        rng_attn, rng_hidden, rng_ff = split_rng(rng, 3)
        x = x + self.dropout(attended, rng_attn)
        return x + self.dropout(self.feed_forward(self.norm_ff(x), rng_hidden), rng_ff)


class Encoder(nnx.Module):
    """Stack of layers with a final LayerNorm."""

    def __init__(self, layers: list[TransformerLayer], d_model: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List(layers)
        self.norm = LayerNorm(d_model, rngs=rngs)

    def __call__(self, x: jax.Array, mask: Mask, rng: jax.Array | None = None) -> jax.Array:
        """x [S, B, D] -> [S, B, D]; mask: see `Attention`."""
        for layer, layer_rng in zip(self.layers, split_rng(rng, len(self.layers)), strict=True):
            # The mask is captured, not passed: jax.checkpoint takes arrays only, and 'causal' is a string.
            x = rematerialized(lambda layer, x, rng: layer(x, mask, rng))(layer, x, layer_rng)
            x = constrain(x, "SBD")
        return self.norm(x)

    def decode(
        self, x: jax.Array, cache: tuple[dict[str, jax.Array], ...], positions: jax.Array | None
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:
        """The next S tokens [S, B, D] over the cache and themselves; see `Attention.decode`."""
        new = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = layer.decode(x, layer_cache, positions)
            new.append(layer_cache)
        return self.norm(x), tuple(new)


class Generator(nnx.Module):
    """Readout to logits: [..., D] -> [..., V]."""

    def __init__(self, n_vocab: int, d_model: int, *, rngs: nnx.Rngs):
        self.projection = Linear(d_model, n_vocab, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(x)


def make_attention(
    attention: str, heads: int, d_model: int, dropout_prob: float, max_len: int | None, *, rngs: nnx.Rngs
) -> Attention:
    """Build an attention by its name in `AutoregressiveTransformer`; raises ValueError if the name is unknown."""
    match attention:
        case "rotary":
            return RotaryPEMultiHeadAttention(heads, d_model, 1.0, dropout_prob, rngs=rngs)
        case "rotary_value":
            return RotaryValuePEMultiHeadAttention(heads, d_model, 1.0, 1.0, dropout_prob, rngs=rngs)
        case "relative":
            return RelativeMultiHeadAttention(heads, d_model, dropout_prob, rngs=rngs)
        case "plain":
            return MultiHeadAttention(heads, d_model, dropout_prob, rngs=rngs)
    if max_len is None:
        raise ValueError(
            f"attention={attention!r} must be one of rotary, rotary_value, relative, plain; "
            "a kind of SynthesizerAttention needs max_len, its longest sequence"
        )
    return SynthesizerAttention(attention, heads, d_model, max_len, dropout_prob, rngs=rngs)


class AutoregressiveTransformer(nnx.Module):
    """Causal language model: token ids to logits of the next token.

    attention: 'rotary' (all d_k features are rotated), 'rotary_value' (RoPER), 'relative', 'plain' (no positions), or a
    kind of SynthesizerAttention, which needs max_len. The embedding is not scaled. Raises ValueError if a size is below
    1, or for an unknown attention.
    """

    sequence_axis = 0
    cache_by_position = True
    sharding_rules = (
        *SMALL_RULES,
        *ATTENTION_RULES,
        *FEED_FORWARD_RULES,
        (r"(projection|projection_bias|table|left|right)", P("tensor")),  # of a synthesizer, by head
        (r"alpha", P()),
        (r"generator\.projection\.kernel", P("fsdp")),
        (r"generator\.projection\.bias", P()),
    )

    def __init__(
        self,
        n_vocab: int,
        d_model: int,
        heads: int,
        d_ff: int,
        n_layers: int,
        attention: str = "rotary",
        dropout_prob: float = 0.0,
        *,
        max_len: int | None = None,
        rngs: nnx.Rngs,
    ):
        check_sizes(n_vocab=n_vocab, d_model=d_model, heads=heads, d_ff=d_ff, n_layers=n_layers)
        check_sizes(**({} if max_len is None else {"max_len": max_len}))
        self.n_vocab, self.d_model, self.heads, self.d_ff, self.n_layers = n_vocab, d_model, heads, d_ff, n_layers
        self.attention, self.dropout_prob, self.max_len = attention, dropout_prob, max_len
        self.src_embed = Embed(n_vocab, d_model, rngs=rngs)
        layers = [
            TransformerLayer(
                make_attention(attention, heads, d_model, dropout_prob, max_len, rngs=rngs),
                d_model,
                d_ff,
                dropout_prob,
                rngs=rngs,
            )
            for _ in range(n_layers)
        ]
        self.encoder = Encoder(layers, d_model, rngs=rngs)
        self.generator = Generator(n_vocab, d_model, rngs=rngs)

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values."""
        names = ["n_vocab", "d_model", "heads", "d_ff", "n_layers", "attention", "dropout_prob", "max_len"]
        return {name: getattr(self, name) for name in names}

    def __call__(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """ids int [S, B] -> logits [S, B, V]; raises ValueError if ids have another rank or exceed the tables."""
        return constrain(self.read(self.features(ids, rng)), "SBV")

    def features(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """ids int [S, B] -> output [S, B, D] of the encoder, of which `read` makes the logits; as the call."""
        check_ids(ids)
        return self.encoder(constrain(self.src_embed(ids), "SBD"), "causal", rng)

    def read(self, x: jax.Array) -> jax.Array:
        """Logits [..., V] from the output [..., D] of the encoder."""
        return self.generator(x)

    def plain(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Same as the call, with the whole score matrix in each attention, as in the PyTorch twin.

        Dropout masks differ from the call's, which are drawn by block.
        """
        check_ids(ids)
        causal = jnp.tril(jnp.ones((len(ids), len(ids)), bool))[:, :, None]
        return self.generator(self.encoder(self.src_embed(ids), causal, rng))

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, start: jax.Array | None = None) -> Cache:
        """Empty cache for up to max_len tokens per row.

        dtype: of keys and values; default that of the parameters. start: int [B], number of left-padding ids in each
        row. Raises ValueError if max_len is beyond the attention's tables, start is not one integer per row, or a
        sub-module was replaced by one that cannot decode.
        """
        check_decodes(self, r"encoder\.layers\.\d+(\.self_attn)?", ("init_cache", "decode"))
        dtype = float_dtype(self.src_embed) if dtype is None else dtype
        layers = [layer.init_cache(batch, max_len, dtype) for layer in self.encoder.layers]
        return make_cache(layers, batch, start)

    def prefill(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The first S tokens [S, B] in one pass -> logits [B, V] of the last one, and the filled cache.

        Raises ValueError if the cache is not empty or too short; inside a trace the logits are NaN instead.
        """
        check_ids(ids)
        n, batch = ids.shape
        cache.check_room(n, batch, empty=True)
        if cache.start is not None:
            ids = align_left(ids, cache.start)
        x, layers = self.encoder.decode(self.src_embed(ids), cache.layers, None)  # [S, B, D]
        last = x[-1] if cache.start is None else x[n - 1 - cache.start, jnp.arange(batch)]
        return unless_overrun(self.generator(last), cache, n, empty=True), cache.advance(layers, n)

    def decode(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The next S tokens [S, B] -> logits [S, B, V], and the extended cache.

        Raises ValueError if they do not fit; inside a trace, where the length is unknown, the logits are NaN instead.
        """
        check_ids(ids)
        cache.check_room(*ids.shape)
        x, layers = self.encoder.decode(self.src_embed(ids), cache.layers, cache.positions(len(ids)))
        return unless_overrun(self.generator(x), cache, len(ids)), cache.advance(layers, len(ids))
