"""Synthesizer attention (arXiv 2005.00743): logits without query-key products.

Axes: S queries, N keys, n tokens, B batch, H heads, D = d_model = H·d_k, l = max_len, k rank of a factorization.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.attention import Attention, dot_product_scores, heads_first
from jaxmodels.layers import Fixed, HeadProjection, Linear, check_sizes, definer, uniform

RANK = 8  # k of factorized_random, as in the paper


class DenseSynthesizer(nnx.Module):
    """Single-head Y = softmax(B) V with B = W₂ relu(W₁ x + b₁) + b₂ for each token; W₁ d -> d, W₂ d -> l.

    For n < l tokens the logits are cut to n × n before the softmax. Raises ValueError if max_len < 1.
    """

    def __init__(self, max_len: int, d_model: int, *, rngs: nnx.Rngs):
        check_sizes(max_len=max_len)
        self.max_len = max_len
        self.linear1 = Linear(d_model, d_model, rngs=rngs)
        self.linear2 = Linear(d_model, max_len, rngs=rngs)

    # [synthesizer.dense]
    def __call__(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """x and v [..., n, d] -> [..., n, d]; raises ValueError if n > max_len or leading axes differ."""
        if x.ndim < 2 or x.shape[:-1] != v.shape[:-1]:
            raise ValueError(f"x and v must be [..., n, d] with the same n, got {list(x.shape)} and {list(v.shape)}")
        n = x.shape[-2]
        check_length(n, self.max_len)
        logits = self.linear2(jax.nn.relu(self.linear1(x)))  # [..., n, l]
        return jax.nn.softmax(logits[..., :n], axis=-1) @ v


def check_length(n: int, max_len: int) -> None:
    """Raises ValueError if a sequence of n tokens is longer than max_len."""
    if n > max_len:
        raise ValueError(f"a sequence of {n} tokens is longer than max_len={max_len}")


class DenseLogits(nnx.Module):
    """F(x) = W₂ relu(W₁ x + b₁) + b₂ for each head; W₁ D -> H·d_k, W₂ [H, d_k, size]."""

    def __init__(self, heads: int, d_model: int, size: int, *, rngs: nnx.Rngs):
        d_k = d_model // heads
        self.hidden = HeadProjection(d_model, heads, d_k, bias=True, rngs=rngs)
        init = uniform(d_k)
        self.projection = nnx.Param(init(rngs.params(), (heads, d_k, size)))
        self.projection_bias = nnx.Param(init(rngs.params(), (heads, size)))

    # [synthesizer.heads]
    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """x [S, B, D] -> [B, H, S, size]."""
        hidden = heads_first(jax.nn.relu(self.hidden(x)))  # [B, H, S, d_k]
        return jnp.einsum("bhsd,hdl->bhsl", hidden, self.projection[...]) + self.projection_bias[:, None]


# [synthesizer.random]
def table_rows(table: jax.Array, n: int, positions: jax.Array | None) -> jax.Array:
    """Rows of a table [H, l, …] at positions [S] or [S, B], default the first n -> [1 or B, H, S, …]."""
    if positions is None:
        return table[None, :, :n]
    positions = positions[None] if positions.ndim == 1 else positions.T  # [1 or B, S]
    rows = jnp.take(table, positions, axis=1, mode="clip")  # [H, 1 or B, S, …]; padding has negative positions
    return rows.swapaxes(0, 1)


class RandomLogits(nnx.Module):
    """Logits that do not depend on the tokens: a table R [H, l, l], trained or fixed."""

    def __init__(self, heads: int, max_len: int, trainable: bool, *, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (heads, max_len, max_len), jnp.float32)
        self.table = nnx.Param(table) if trainable else Fixed(table)

    # [synthesizer.random]
    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """x [S, B, D], of which only the length is used -> [1 or B, H, S, l]."""
        table = self.table[...]
        if isinstance(self.table, Fixed):
            table = jax.lax.stop_gradient(table)
        return table_rows(table, len(x), positions)


# [synthesizer.factorized]
def default_factors(max_len: int) -> tuple[int, int]:
    """Default (a, b) of factorized_dense: a = ⌈√l⌉, b = ⌈l/a⌉."""
    a = math.isqrt(max_len - 1) + 1
    return a, -(-max_len // a)


class FactorizedDenseLogits(nnx.Module):
    """Logits from two short vectors per token, A ∈ R^a and C ∈ R^b: B[p·b + q] = A[p]·C[q], cut to l.

    Raises ValueError if `factors` are not two numbers (a, b) with a·b ≥ l.
    """

    def __init__(self, heads: int, d_model: int, max_len: int, factors: tuple[int, int] | None, *, rngs: nnx.Rngs):
        if factors is not None and len(factors) != 2:
            raise ValueError(f"factors={factors} must be two numbers, (a, b)")
        a, b = factors or default_factors(max_len)
        if a < 1 or b < 1 or a * b < max_len:
            raise ValueError(f"factors={(a, b)} give {a * b} logits, fewer than max_len={max_len}")
        self.max_len = max_len
        self.factor_a = DenseLogits(heads, d_model, a, rngs=rngs)
        self.factor_c = DenseLogits(heads, d_model, b, rngs=rngs)

    # [synthesizer.factorized]
    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """x [S, B, D] -> [B, H, S, l]."""
        outer = self.factor_a(x)[..., :, None] * self.factor_c(x)[..., None, :]  # [B, H, S, a, b]
        return outer.reshape(*outer.shape[:-2], -1)[..., : self.max_len]


class FactorizedRandomLogits(nnx.Module):
    """R₁R₂ᵀ for each head, both parameters [H, l, k], initialized so that the product has unit variance."""

    def __init__(self, heads: int, max_len: int, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(RANK**-0.25)
        self.left = nnx.Param(init(rngs.params(), (heads, max_len, RANK), jnp.float32))
        self.right = nnx.Param(init(rngs.params(), (heads, max_len, RANK), jnp.float32))

    # [synthesizer.factorized]
    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """x [S, B, D], of which only the length is used -> [1 or B, H, S, l]."""
        left = table_rows(self.left[...], len(x), positions)  # [1 or B, H, S, k]
        return jnp.einsum("bhsk,hlk->bhsl", left, self.right[...])


class SynthesizerAttention(Attention):
    """Multi-head attention with synthesized logits: softmax(B + mask) V.

    `kind` is one of dense, random, fixed_random, factorized_dense, factorized_random, vanilla (QKᵀ/√d_k), or a sum of
    several ('random+dense'), whose logits are added with weights softmax([α, 0]): σ(α) and 1 - σ(α) for two parts,
    α initialized to zero. max_len: l, the longest sequence. factors: (a, b) of factorized_dense. Raises ValueError for
    an unknown kind, or factors that do not fit it.
    """

    def __init__(
        self,
        kind: str,
        heads: int,
        d_model: int,
        max_len: int,
        dropout_prob: float = 0.0,
        *,
        factors: tuple[int, int] | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(heads, d_model, dropout_prob, rngs=rngs)
        check_sizes(max_len=max_len)
        makers: dict[str, Callable[[], nnx.Module]] = {
            "dense": lambda: DenseLogits(heads, d_model, max_len, rngs=rngs),
            "random": lambda: RandomLogits(heads, max_len, trainable=True, rngs=rngs),
            "fixed_random": lambda: RandomLogits(heads, max_len, trainable=False, rngs=rngs),
            "factorized_dense": lambda: FactorizedDenseLogits(heads, d_model, max_len, factors, rngs=rngs),
            "factorized_random": lambda: FactorizedRandomLogits(heads, max_len, rngs=rngs),
        }
        self.kind = kind
        self.max_len = max_len
        self.parts = tuple(kind.split("+"))
        if len(set(self.parts)) < len(self.parts) or not {*self.parts} <= {*makers, "vanilla"}:
            allowed = ", ".join([*makers, "vanilla"])
            raise ValueError(f"kind={kind!r} must be one of {allowed}, or a sum of different ones, as in random+dense")
        if factors is not None and "factorized_dense" not in self.parts:
            raise ValueError(f"factors={factors} are for kind='factorized_dense', not for kind={kind!r}")
        for part in self.parts:
            if part != "vanilla":
                setattr(self, part, makers[part]())
        self.vanilla = "vanilla" in self.parts
        if self.vanilla:
            self.query = HeadProjection(d_model, heads, self.d_k, bias=True, rngs=rngs)
            self.key = HeadProjection(d_model, heads, self.d_k, bias=True, rngs=rngs)
        if len(self.parts) > 1:
            self.alpha = nnx.Param(jnp.zeros(len(self.parts) - 1, jnp.float32))

    def check_length(self, n: int) -> None:
        check_length(n, self.max_len)

    def project(
        self, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array | None
    ) -> tuple[dict[str, jax.Array], jax.Array | None, jax.Array]:
        synthesized = [part for part in self.parts if part != "vanilla"]
        projected = {part: getattr(self, part)(query, positions) for part in synthesized}
        if self.vanilla:
            projected["vanilla"] = heads_first(self.query(query))
        return projected, heads_first(self.key(key)) if self.vanilla else None, heads_first(self.value(value))

    def products(self, query: Any, key: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        if self.parts != ("vanilla",) or definer(type(self), "get_scores") is not SynthesizerAttention:
            return None
        assert key is not None
        return query["vanilla"], key

    # [synthesizer.mixture]
    def get_scores(self, query: Any, key: jax.Array | None, n: int, first: int | jax.Array) -> jax.Array:
        logits = []  # one entry per part, each [1 or B, H, S, n]
        for part in self.parts:
            if part == "vanilla":
                assert key is not None
                logits.append(dot_product_scores(query[part], key, self.scale))
            else:
                logits.append(query[part][..., :n])
        if len(logits) == 1:
            return logits[0]
        weights = jax.nn.softmax(jnp.append(self.alpha[...], 0))
        return sum(w * b for w, b in zip(weights, logits, strict=True))

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> dict[str, jax.Array]:
        cache = super().init_cache(batch, max_len, dtype)
        return cache if self.vanilla else {"value": cache["value"]}
