"""Layers of GPT-NeoX: embedding, attention, feed-forward network, the block around them, readout.

Axes: B batch, S sequence, N cache slots, H heads, K heads of keys and values, D = n_hidden = H·d_k features, F hidden
features of the feed-forward network, V vocabulary, L layers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.attention import attend, causal_attention, dot_product_scores, transpose_heads
from jaxmodels.cache import visible, write
from jaxmodels.layers import Embed, LayerNorm, RowLinear, constrain, in_turn
from jaxmodels.neox.config import NeoXConfig
from jaxmodels.rope import rotate

Tables = tuple[jax.Array, jax.Array]  # rotary cosines and sines, [B or 1, S, 1, d_rope/2]

# Sharding rules of a block; see `jaxmodels.sharding`.
BLOCK_RULES = (
    (r"(attention\.qkv_lin|ffn\.dense_h_h4)\.kernel", P("fsdp", "tensor")),
    (r"(attention\.qkv_lin|ffn\.dense_h_h4)\.bias", P("tensor")),
    (r"(attention\.output|ffn\.dense_h4_h)\.kernel", P("tensor", "fsdp")),
    (r"(attention\.output|ffn\.dense_h4_h)\.bias", P()),
    (r"(attention\.qkv_lin|ffn\.dense_h_h4)\.weight", P("tensor", "fsdp")),  # of `WeightOnlyLinear`, [O, I]
    (r"(attention\.output|ffn\.dense_h4_h)\.weight", P("fsdp", "tensor")),
)


class Linear(RowLinear):
    """y = xW + b; W is drawn from N(0, std), b is zero.

    dtype: compute dtype; default the widest of input and parameters.
    """

    def __init__(self, d_in: int, d_out: int, std: float, dtype: Any, bias: bool = True, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(std)
        super().__init__(d_in, d_out, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs)


class RMSNorm(nnx.RMSNorm):
    """x / √(mean x² + ε) times a scale, over the last axis, as `torch.nn.RMSNorm`.

    dtype: of the result; by default the widest of input and parameters. The mean square is float32 at least.
    """

    def __init__(self, d_model: int, epsilon: float, dtype: Any = None, *, rngs: nnx.Rngs):
        super().__init__(d_model, epsilon=epsilon, dtype=dtype, rngs=rngs)


def norm(config: NeoXConfig, *, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    """The kind of norm that a configuration names."""
    kind = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[config.norm]
    return kind(config.n_hidden, config.layer_norm_eps, config.dtype, rngs=rngs)


def input_std(config: NeoXConfig) -> float:
    """Initial standard deviation of weights that read the residual stream: √(2/5D)."""
    return math.sqrt(2 / (5 * config.n_hidden))


def output_std(config: NeoXConfig) -> float:
    """Initial standard deviation of weights that write to the residual stream: 2/(L·√D)."""
    return 2 / (config.n_layers * math.sqrt(config.n_hidden))


class Embedding(nnx.Module):
    """Token embedding: ids [B, S] -> [B, S, D]."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.emb = Embed(config.n_vocab, config.n_hidden, input_std(config), rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.emb(ids)

    def attend(self, x: jax.Array) -> jax.Array:
        """Tied readout: x [..., D] -> logits [..., V]; raises ValueError if `emb` has no such method."""
        if not hasattr(self.emb, "attend"):
            raise ValueError(f"embedding.emb is a {type(self.emb).__name__}; a tied readout needs its method attend")
        return self.emb.attend(x)


class Attention(nnx.Module):
    """Rotary attention over H heads; H/K of them share each of the K heads of keys and values.

    The output of `qkv_lin` is [K, (H/K queries, key, value), d_k], flattened; with K = H, the default, [H, (query, key,
    value), d_k].
    """

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        d, bias = config.n_hidden, config.attention_bias
        self.heads, self.kv_heads, self.d_k = config.n_heads, config.kv_heads, config.d_k
        self.qkv_lin = Linear(d, config.d_qkv, input_std(config), config.dtype, bias, rngs=rngs)
        self.output = Linear(d, d, output_std(config), config.dtype, bias, rngs=rngs)

    # [neox.attention]
    def __call__(self, x: jax.Array, rotary: Tables, plain: bool = False) -> jax.Array:
        """x [B, S, D] -> [B, S, D]. plain: compute the whole score matrix."""
        query, key, value = self.project(x, rotary)
        key, value = self.repeat(key), self.repeat(value)  # [B, S, H, d_k]
        y = causal_attention(query, key, value, kernel="plain" if plain else None)  # [B, S, H, d_k]
        return self.output(y.reshape(x.shape))

    # [neox.attention]
    def project(self, x: jax.Array, rotary: Tables) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, S, D] -> rotated query [B, S, H, d_k]; rotated key and value, each [B, S, K, d_k]."""
        group = self.heads // self.kv_heads
        qkv = self.qkv_lin(x).reshape(*x.shape[:2], self.kv_heads, (group + 2) * self.d_k)  # [B, S, K, (H/K + 2)·d_k]
        query, key, value = jnp.split(constrain(qkv, "BSHK"), (group * self.d_k, (group + 1) * self.d_k), axis=-1)
        query = query.reshape(*x.shape[:2], self.heads, self.d_k)  # [B, S, H, d_k]
        return rotate(query, *rotary), rotate(key, *rotary), value

    def repeat(self, x: jax.Array) -> jax.Array:
        """Keys or values [B, S, K, d_k] -> [B, S, H, d_k], a copy for each of the heads that share them."""
        return x if self.kv_heads == self.heads else jnp.repeat(x, self.heads // self.kv_heads, axis=2)

    def decode(
        self, x: jax.Array, rotary: Tables, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attention of the next S tokens [B, S, D] over the cache and themselves; rotated keys are cached.

        positions: from `Cache.positions`; None if the cache is empty.
        """
        query, key, value = self.project(x, rotary)
        new = {"key": transpose_heads(key), "value": transpose_heads(value)}  # [B, K, S, d_k]
        cache = {name: write(cache[name], array, positions) for name, array in new.items()}
        if positions is None:
            y = causal_attention(query, self.repeat(key), self.repeat(value))  # [B, S, H, d_k]
        else:
            # The queries that share a key are rows of one product, so that the cache is read once.
            query, group = transpose_heads(query), self.heads // self.kv_heads  # [B, H, S, d_k]
            rows = query.reshape(len(x), self.kv_heads, -1, self.d_k)  # [B, K, H/K·S, d_k]
            scores = dot_product_scores(rows, cache["key"], 1 / math.sqrt(self.d_k))  # [B, K, H/K·S, N]
            mask = jnp.tile(visible(positions, scores.shape[-1]), (group, 1))  # [1 or B, 1, H/K·S, N]
            y = attend(scores, cache["value"], mask).reshape(query.shape)  # [B, H, S, d_k]
            y = transpose_heads(y).astype(x.dtype)  # the cache may have another dtype
        return self.output(y.reshape(x.shape)), cache


class FeedForward(nnx.Module):
    """W₂ gelu(W₁ x + b₁) + b₂, or without biases."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        d, d_ff, bias = config.n_hidden, config.d_ff, config.ffn_bias
        self.dense_h_h4 = Linear(d, d_ff, input_std(config), config.dtype, bias, rngs=rngs)
        self.dense_h4_h = Linear(d_ff, d, output_std(config), config.dtype, bias, rngs=rngs)
        self.approximate = config.activation == "gelu_tanh"

    # [neox.ffn]
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, D] -> [B, S, D]."""
        hidden = constrain(self.dense_h_h4(x), "BSF")
        wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))  # the GELU's x³ overflows float16 at x = 41
        return self.dense_h4_h(jax.nn.gelu(wide, approximate=self.approximate).astype(hidden.dtype))


class Block(nnx.Module):
    """x + attn(LN₁ x) + ffn(LN₂ x); with the sequential residual x ← x + attn(LN₁ x), then x + ffn(LN₂ x).

    LN is LayerNorm or RMSNorm. The four linear maps (attention.qkv_lin, attention.output, ffn.dense_h_h4,
    ffn.dense_h4_h) are only called, so that other modules may replace them.
    """

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.parallel_residual = config.parallel_residual
        self.pre_ln_attn = norm(config, rngs=rngs)
        self.pre_ln_ffn = norm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    # [neox.block]
    def __call__(self, x: jax.Array, rotary: Tables, plain: bool = False) -> jax.Array:
        """x [B, S, D] -> [B, S, D]. plain: compute the whole score matrix."""
        if self.parallel_residual and not plain:
            return x + in_turn(
                lambda x: self.attention(self.pre_ln_attn(x), rotary), lambda x: self.ffn(self.pre_ln_ffn(x)), x, "BSG"
            )
        return self.residual(x, self.attention(self.pre_ln_attn(x), rotary, plain))

    def decode(
        self, x: jax.Array, rotary: Tables, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The next S tokens [B, S, D] over the cache and themselves; see `Attention.decode`."""
        attended, cache = self.attention.decode(self.pre_ln_attn(x), rotary, cache, positions)
        return self.residual(x, attended), cache

    # [neox.block]
    def residual(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Add attention and feed-forward network to the residual stream x [B, S, D]."""
        if self.parallel_residual:
            return x + (attended + self.ffn(self.pre_ln_ffn(x)))
        x = x + attended
        return x + self.ffn(self.pre_ln_ffn(x))


class FinalNorm(nnx.Module):
    """Norm after the last block."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.ln = norm(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ln(x)


class Readout(nnx.Module):
    """Linear map without bias to logits: [..., D] -> [..., V]."""

    def __init__(self, config: NeoXConfig, *, rngs: nnx.Rngs):
        self.linear = Linear(config.n_hidden, config.n_vocab, input_std(config), config.dtype, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


@functools.partial(jax.jit, static_argnames="n")
def unstack(layers: Block, n: int) -> list[Block]:
    """Split a block whose arrays have a leading layer axis into n blocks."""
    return [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(n)]


@jax.jit
def stack(layers: list[Block]) -> Block:
    """Inverse of `unstack`."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
