"""A pre-norm transformer encoder, sequence-first, and the small autoregressive language model made of it.

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
    constrain,
    rematerialised,
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
        """x [S, B, D], mask as in the attention -> [S, B, D]."""
        attn_rng, rng = split_rng(rng, 2)
        z = self.norm_self_attn(x)
        return self._residual(x, self.self_attn(query=z, key=z, value=z, mask=mask, rng=attn_rng), rng)

    def decode(
        self, x: jax.Array, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The next S tokens [S, B, D], over the cache and themselves; see `Attention.decode`."""
        attended, cache = self.self_attn.decode(self.norm_self_attn(x), cache, positions)
        return self._residual(x, attended, None), cache

    def _residual(self, x: jax.Array, attended: jax.Array, rng: jax.Array | None) -> jax.Array:
        rng_attn, rng_hidden, rng_ff = split_rng(rng, 3)
        x = x + self.dropout(attended, rng_attn)
        return x + self.dropout(self.feed_forward(self.norm_ff(x), rng_hidden), rng_ff)


class Encoder(nnx.Module):
    """Layers one after the other, then a LayerNorm."""

    def __init__(self, layers: list[TransformerLayer], d_model: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List(layers)
        self.norm = LayerNorm(d_model, rngs=rngs)

    def __call__(self, x: jax.Array, mask: Mask, rng: jax.Array | None = None) -> jax.Array:
        """x [S, B, D], mask as in the attention -> [S, B, D]."""
        for layer, layer_rng in zip(self.layers, split_rng(rng, len(self.layers)), strict=True):
            # the mask is closed over: 'causal' is no array
            x = rematerialised(lambda layer, x, rng: layer(x, mask, rng))(layer, x, layer_rng)
            x = constrain(x, "SBD")
        return self.norm(x)

    def decode(
        self, x: jax.Array, cache: tuple[dict[str, jax.Array], ...], positions: jax.Array | None
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:
        """The next S tokens [S, B, D], over the cache and themselves; see `Attention.decode`."""
        new = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x, layer_cache = layer.decode(x, layer_cache, positions)
            new.append(layer_cache)
        return self.norm(x), tuple(new)


class Generator(nnx.Module):
    """Logits of the next token: [..., D] -> [..., V]."""

    def __init__(self, n_vocab: int, d_model: int, *, rngs: nnx.Rngs):
        self.projection = Linear(d_model, n_vocab, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.projection(x)


def make_attention(
    attention: str, heads: int, d_model: int, dropout_prob: float, max_len: int | None, *, rngs: nnx.Rngs
) -> Attention:
    """The attention that `AutoregressiveTransformer(attention=…)` names; raises ValueError for an unknown one."""
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
            f"attention={attention!r} is none of rotary, rotary_value, relative, plain; "
            "a kind of SynthesizerAttention needs max_len, the longest sequence its logits reach"
        )
    return SynthesizerAttention(attention, heads, d_model, max_len, dropout_prob, rngs=rngs)


class AutoregressiveTransformer(nnx.Module):
    """Token ids to logits of the next token, each position seeing itself and what came before.

    attention: 'rotary' (all of d_k turns), 'rotary_value' (RoPER), 'relative', 'plain' (no positions), or a kind of
    SynthesizerAttention, which needs max_len. The embedding is not scaled.
    """

    sequence_axis = 0
    sharding_rules = (
        *SMALL_RULES,
        *ATTENTION_RULES,
        *FEED_FORWARD_RULES,
        (r"(projection|projection_bias|table|left|right)", P("tensor")),  # a synthesizer's, by head
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
        for name, size in {"n_vocab": n_vocab, "d_model": d_model, "d_ff": d_ff, "n_layers": n_layers}.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
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
        """The constructor's arguments, as `config.json` keeps them."""
        names = ["n_vocab", "d_model", "heads", "d_ff", "n_layers", "attention", "dropout_prob", "max_len"]
        return {name: getattr(self, name) for name in names}

    def __call__(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """ids [S, B] int -> logits [S, B, V]; raises ValueError where ids have another rank or are too long."""
        check_ids(ids)
        x = constrain(self.src_embed(ids), "SBD")
        return constrain(self.generator(self.encoder(x, "causal", rng)), "SBV")

    def plain(self, ids: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """The same with the whole score matrix in each attention, as the PyTorch twin computes it.

        Dropout draws differ from the call's, which draws by block.
        """
        check_ids(ids)
        causal = jnp.tril(jnp.ones((len(ids), len(ids)), bool))[:, :, None]
        return self.generator(self.encoder(self.src_embed(ids), causal, rng))

    def init_cache(self, batch: int, max_len: int, dtype=None, start: jax.Array | None = None) -> Cache:
        """An empty cache for up to max_len tokens of text a row; dtype None: that of the parameters.

        start: int [B], how many of the first ids of each row will be left padding. Raises ValueError where max_len is
        beyond the attention's tables or start is not one integer per row.
        """
        dtype = self.src_embed.embedding.dtype if dtype is None else dtype
        layers = [layer.self_attn.init_cache(batch, max_len, dtype) for layer in self.encoder.layers]
        return make_cache(layers, batch, start)

    def prefill(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """The first S tokens [S, B] in one pass -> the last one's logits [B, V] and the filled cache.

        Raises ValueError where the cache is not empty or too short; inside a trace the logits are NaN then.
        """
        check_ids(ids)
        n, batch = ids.shape
        cache.check_room(n, batch, empty=True)
        if cache.start is not None:
            ids = align_left(ids, cache.start)
        x, layers = self.encoder.decode(self.src_embed(ids), cache.layers, None)
        last = x[-1] if cache.start is None else x[n - 1 - cache.start, jnp.arange(batch)]
        return unless_overrun(self.generator(last), cache, n, empty=True), cache.advance(layers, n)

    def decode(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """S further tokens [S, B] -> their logits [S, B, V] and the longer cache.

        Raises ValueError where they do not fit; inside a trace, where the length is unknown, the logits are NaN then.
        """
        check_ids(ids)
        cache.check_room(*ids.shape)
        x, layers = self.encoder.decode(self.src_embed(ids), cache.layers, cache.positions(len(ids)))
        return unless_overrun(self.generator(x), cache, len(ids)), cache.advance(layers, len(ids))


def check_ids(ids: jax.Array, axes: str = "[S, B]") -> None:
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be a non-empty batch of integers {axes}, got {ids.dtype}{list(ids.shape)}")
