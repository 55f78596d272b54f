"""Multi-head attention, sequence-first, without positions and with learned relative positions.

Axes: S queries, N keys, B batch, H heads, D = d_model = H·d_k features.
Modules take and return [S, B, D]; inside, arrays are head-major, [B, H, S, d_k], which is several times faster on CPUs.
In einsums: i query, j key, b batch, h head, d feature, r table row.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.attention_kernels import chosen_kernel, fused_attention
from jaxmodels.cache import visible, write
from jaxmodels.layers import Dropout, HeadProjection, Linear, check_sizes, definer

Mask = jax.Array | Literal["causal"] | None

MIN_BLOCK = 64  # queries; in smaller blocks overhead dominates
MAX_BLOCKS = 8  # bounds compile time; 8 blocks do 56 % of the work of the whole matrix, 16 would do 53 %

# Sharding rules of these modules; see `jaxmodels.sharding`.
ATTENTION_RULES = [
    (r"(query|key|value|hidden)\.linear\.kernel", P("fsdp", "tensor")),
    (r"(query|key|value|hidden)\.linear\.bias", P("tensor")),
    (r"(attn|self_attn)\.output\.kernel", P("tensor", "fsdp")),
    (r"(attn|self_attn)\.output\.bias", P()),
    (r"key_pos_(embeddings|bias)", P(None, "tensor")),
    (r"query_pos_bias", P("tensor")),
]


def heads_first(x: jax.Array) -> jax.Array:
    """[S, B, H, d] -> [B, H, S, d]."""
    return x.transpose(1, 2, 0, 3)


def transpose_heads(x: jax.Array) -> jax.Array:
    """[B, S, H, d] <-> [B, H, S, d]."""
    return x.swapaxes(1, 2)


def without_dropout(x: jax.Array, rng: jax.Array | None) -> jax.Array:
    """Identity with the signature of `Dropout`."""
    return x


class Attention(nnx.Module):
    """Base class: scores -> mask -> softmax over keys -> dropout -> weighted values -> output projection.

    A subclass defines `project` (tokens to head-major queries, keys and values), `get_scores` and, if the weighted sum
    must be rotated back, `restore`. `mask='causal'` (queries and keys are the same tokens) is the fast path, see
    `jaxmodels.attention_kernels`; it is fused only if the subclass defines `products` and there is no dropout of
    weights. Raises ValueError if d_model is not divisible by heads.
    """

    def __init__(self, heads: int, d_model: int, dropout_prob: float, *, rngs: nnx.Rngs):
        if heads < 1 or d_model % heads:
            raise ValueError(f"d_model={d_model} is not divisible by heads={heads}")
        self.heads = heads
        self.d_k = d_model // heads
        self.value = HeadProjection(d_model, heads, self.d_k, bias=True, rngs=rngs)
        self.output = Linear(d_model, d_model, rngs=rngs)
        self.dropout = Dropout(dropout_prob)
        self.scale = 1 / math.sqrt(self.d_k)

    def project(
        self, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array | None
    ) -> tuple[Any, jax.Array | None, jax.Array]:
        """[S, B, D] and twice [N, B, D] -> queries (a pytree of [B, H, S, …]), keys and values [B, H, N, d_k].

        Keys are None if scores need none. positions: int32 [S] or [S, B] of query, key and value; default 0, 1, ….
        """
        raise NotImplementedError

    def get_scores(self, query: Any, key: jax.Array | None, n: int, first: int | jax.Array) -> jax.Array:
        """Logits [B, H, S, N] of projected queries over n keys; `first` is the first query's position in the keys."""
        raise NotImplementedError

    def products(self, query: Any, key: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        """Queries and keys [B, H, S, d_k] whose products times `scale` are the scores; None if they are others."""
        return None

    def restore(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        """Transform the weighted sum [S, B, H, d_k] before the output projection; the identity by default."""
        return x

    def check_length(self, n: int) -> None:
        """Raises ValueError if this attention's tables are shorter than n keys."""

    def __call__(
        self, *, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask = None, rng: jax.Array | None = None
    ) -> jax.Array:
        """query [S, B, D], key and value [N, B, D] -> [S, B, D].

        mask: bool [S or 1, N, 1 or B], True = may attend; or 'causal'; or None. rng: key of dropout; default no
        dropout. Raises ValueError if shapes or mask do not fit, or N is beyond the tables.
        """
        if key.shape[:2] != value.shape[:2] or key.shape[1] != query.shape[1]:
            given = ", ".join(str(list(x.shape)) for x in (query, key, value))
            raise ValueError(f"query, key and value must be [S, B, D], [N, B, D] and [N, B, D], got {given}")
        s, n = len(query), len(key)
        self.check_length(max(s, n))
        q, k, v = self.project(query, key, value, None)  # [B, H, S, …], [B, H, N, d_k] twice
        if isinstance(mask, str):
            if mask != "causal" or s != n:
                raise ValueError(f"mask={mask!r} with {s} queries and {n} keys; 'causal' needs equal numbers")
            x = self.attend_causally(q, k, v, rng)
        else:
            if mask is not None:
                mask = check_mask(mask, s, n, query.shape[1]).transpose(2, 0, 1)[:, None]  # [1 or B, 1, S or 1, N]
            x = attend(self.get_scores(q, k, n, n - s), v, mask, self.dropout, rng)
        return self.finish(x, None)

    def attend_causally(self, query: Any, key: jax.Array | None, value: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Causal attention [B, H, S, d_k] by the kernel that is set; raises ValueError as `chosen_kernel`."""
        products, drops = self.products(query, key), rng is not None and getattr(self.dropout, "rate", 1.0) > 0
        unfused = None
        if products is None:
            unfused = f"needs scores that are products of queries and keys, which {type(self).__name__}'s are not"
        elif drops or type(self.dropout) is not Dropout:
            unfused = f"has no dropout of attention weights, which is {getattr(self.dropout, 'rate', self.dropout)}"
        kernel = chosen_kernel(value, unfused)
        if products is not None and kernel in ("cudnn", "splash"):
            return fused_attention(*products, value, self.scale, kernel)
        return attend_unfused(query, key, value, self.get_scores, self.dropout, rng, whole=kernel == "plain")

    # [attention.softmax]
    def finish(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        """[B, H, S, d_k] -> [S, B, D]: restore, concatenate the heads, output projection."""
        x = self.restore(x.transpose(2, 0, 1, 3), positions)  # [S, B, H, d_k]
        return self.output(x.reshape(*x.shape[:2], -1))

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> dict[str, jax.Array]:
        """Zero buffers [B, H, max_len, d_k]; raises ValueError if max_len is below 1 or beyond the tables."""
        check_sizes(max_len=max_len)
        self.check_length(max_len)
        shape = (batch, self.heads, max_len, self.d_k)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    # [attention.cache]
    def decode(
        self, x: jax.Array, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Self-attention of the next S tokens [S, B, D] over the cache and themselves.

        positions: int32 [S], or [S, B] for ragged rows; None if the cache is empty and no row is padded: then the
        tokens attend only to each other, as in a causal forward pass.
        """
        q, k, v = self.project(x, x, x, positions)
        new = {"value": v} if k is None else {"key": k, "value": v}
        cache = {name: write(cache[name], array, positions) for name, array in new.items()}
        if positions is None:
            return self.finish(self.attend_causally(q, k, v, None), None), cache
        n = cache["value"].shape[2]
        first = positions[0]  # scalar, or [B] for ragged rows
        scores = self.get_scores(q, cache.get("key"), n, first)  # [B, H, S, N]
        x = attend(scores, cache["value"], visible(positions, n), self.dropout, None)
        return self.finish(x, positions), cache


# [attention.causal]
def attend_unfused(
    query: Any,
    key: jax.Array | None,
    value: jax.Array,
    get_scores: Callable[[Any, Any, int, int], jax.Array],
    dropout: Callable[[jax.Array, jax.Array | None], jax.Array] = without_dropout,
    rng: jax.Array | None = None,
    *,
    whole: bool = False,
) -> jax.Array:
    """Causal attention [B, H, S, d_k]; arguments as in `Attention.get_scores` and `attend`.

    Queries are cut into blocks, and each block attends only to the keys up to its own end. whole: compute the whole
    score matrix instead.
    """
    s = value.shape[2]
    block = s if whole else max(MIN_BLOCK, -(-s // MAX_BLOCKS))
    blocks = []
    for first in range(0, s, block):
        end = min(first + block, s)
        q = jax.tree.map(lambda a, first=first, end=end: a[:, :, first:end], query)
        scores = get_scores(q, None if key is None else key[:, :, :end], end, first)
        mask = visible(jnp.arange(first, end), end)
        block_rng = None if rng is None else jax.random.fold_in(rng, first)
        blocks.append(attend(scores, value[:, :, :end], mask, dropout, block_rng))
    return jnp.concatenate(blocks, axis=2)


# [attention.softmax]
def attend(
    scores: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    dropout: Callable[[jax.Array, jax.Array | None], jax.Array] = without_dropout,
    rng: jax.Array | None = None,
) -> jax.Array:
    """softmax(masked scores) · value: [B or 1, H, S, N], [B, H, N, d_k] -> [B, H, S, d_k].

    The division by the softmax's sum comes after the product, where it takes S·d_k operations instead of S·N. Scores
    are exponentiated in float32 at least. A row that may attend to nothing is NaN, as in PyTorch.
    """
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if rng is not None:  # rows that share scores still need dropout masks of their own
        weights = jnp.broadcast_to(weights, (*value.shape[:2], *weights.shape[2:]))
    x = jnp.matmul(dropout(weights, rng).astype(value.dtype), value, preferred_element_type=scores.dtype)
    return (x / total).astype(value.dtype)


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, kernel: Literal["plain"] | None = None
) -> jax.Array:
    """Causal self-attention, batch-first: three [B, S, H, d_k] -> [B, S, H, d_k].

    By the kernel that is set, see `jaxmodels.attention_kernels`; raises ValueError as `chosen_kernel`. kernel: 'plain'
    for the whole score matrix whatever is set.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    q, k, v = (transpose_heads(a) for a in (query, key, value))  # [B, H, S, d_k]
    chosen = kernel or chosen_kernel(q)
    if chosen in ("cudnn", "splash"):
        return transpose_heads(fused_attention(q, k, v, scale, chosen))
    scores = functools.partial(causal_scores, scale=scale)
    return transpose_heads(attend_unfused(q, k, v, scores, whole=chosen == "plain"))


def causal_scores(query: jax.Array, key: jax.Array, n: int, first: int, scale: float) -> jax.Array:
    """`dot_product_scores` with the arguments of `Attention.get_scores`."""
    return dot_product_scores(query, key, scale)


def check_mask(mask: jax.Array, s: int, n: int, batch: int) -> jax.Array:
    """Convert a mask to an array; raises ValueError if it is not bool [S or 1, N, 1 or B]."""
    mask = jnp.asarray(mask)
    fits = mask.ndim == 3 and mask.shape[0] in (1, s) and mask.shape[1] == n and mask.shape[2] in (1, batch)
    if not fits or mask.dtype != bool:
        raise ValueError(
            f"mask must be bool [{s} or 1, {n}, 1 or {batch}] (True = may attend), got {mask.dtype}{list(mask.shape)}"
        )
    return mask


class MultiHeadAttention(Attention):
    """softmax(QKᵀ/√d_k) V over H heads.

    bias: of the query and key projections; those of value and output always have one.
    """

    def __init__(self, heads: int, d_model: int, dropout_prob: float = 0.1, bias: bool = True, *, rngs: nnx.Rngs):
        super().__init__(heads, d_model, dropout_prob, rngs=rngs)
        self.query = HeadProjection(d_model, heads, self.d_k, bias=bias, rngs=rngs)
        self.key = HeadProjection(d_model, heads, self.d_k, bias=bias, rngs=rngs)

    def project(
        self, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return heads_first(self.query(query)), heads_first(self.key(key)), heads_first(self.value(value))

    def products(self, query: Any, key: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        assert key is not None
        own = definer(type(self), "get_scores") is MultiHeadAttention  # a subclass may define other scores
        return (query, key) if own else None

    def get_scores(self, query: Any, key: jax.Array | None, n: int, first: int | jax.Array) -> jax.Array:
        assert key is not None
        return dot_product_scores(query, key, self.scale)


# [attention.scores]
def dot_product_scores(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """scale · q_i·k_j: [B, H, S, d_k], [B, H, N, d_k] -> [B, H, S, N]; accumulated in float32 at least."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    return jnp.einsum("bhid,bhjd->bhij", query * scale, key, preferred_element_type=dtype)


class RelativeMultiHeadAttention(MultiHeadAttention):
    """Attention with learned relative positions (Transformer-XL, arXiv 1901.02860).

    score(i, j) = (q_i + u)·k_j + q_i·E[P - distance] + b[P - distance], times d_k^-½, where distance = i - j and the
    queries are the last of the keys. E = key_pos_embeddings [2P, H, d_k], b = key_pos_bias [2P, H],
    u = query_pos_bias [H, d_k], all initialized to zero.
    """

    P = 2**12

    def __init__(self, heads: int, d_model: int, dropout_prob: float = 0.1, *, rngs: nnx.Rngs):
        super().__init__(heads, d_model, dropout_prob, bias=False, rngs=rngs)
        self.key_pos_embeddings = nnx.Param(jnp.zeros((2 * self.P, heads, self.d_k), jnp.float32))
        self.key_pos_bias = nnx.Param(jnp.zeros((2 * self.P, heads), jnp.float32))
        self.query_pos_bias = nnx.Param(jnp.zeros((heads, self.d_k), jnp.float32))

    def check_length(self, n: int) -> None:
        if n > self.P:
            raise ValueError(f"{n} keys given; the relative position tables reach back P={self.P} at most")

    # [relative.scores]
    def get_scores(self, query: Any, key: jax.Array | None, n: int, first: int | jax.Array) -> jax.Array:
        assert key is not None
        content = dot_product_scores(query + self.query_pos_bias[:, None], key, self.scale)
        return content + self.position_scores(query, n, first) * self.scale

    # [relative.rows]
    def position_scores(self, query: jax.Array, n: int, first: int | jax.Array) -> jax.Array:
        """q_i·E[P - distance] + b[P - distance], unscaled: [B, H, S, N]; `first` an int, a scalar or one per row [B].

        One product with the S + N - 1 table rows that any pair needs, then a shear: row r of the slice has distance
        first + S - 1 - r, so that query i finds key j at r = S - 1 - i + j.
        """
        if isinstance(first, jax.Array) and first.ndim:
            return jax.vmap(lambda q, f: self.position_scores(q[None], n, f)[0])(query, first)
        s = query.shape[2]
        low = self.P - first - s + 1
        if isinstance(low, int):
            # [S + N - 1, H, d_k] and [S + N - 1, H]
            table, bias = (t[low : low + s + n - 1] for t in (self.key_pos_embeddings, self.key_pos_bias))
        else:  # clipped rows belong to keys after the query, which are masked
            rows = low + jnp.arange(s + n - 1)
            table, bias = (jnp.take(t[...], rows, 0, mode="clip") for t in (self.key_pos_embeddings, self.key_pos_bias))
        return shear(jnp.einsum("bhid,rhd->bhir", query, table) + bias.T[:, None], n)


# [relative.rows]
def shear(x: jax.Array, n: int) -> jax.Array:
    """out[…, i, j] = x[…, i, S-1-i+j] for j < n: [..., S, S+n-1] -> [..., S, n], by a pad and a reshape."""
    *lead, s, width = x.shape
    flat = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*lead, s * (width + 1))
    return flat[..., s - 1 : s - 1 + s * width].reshape(*lead, s, width)[..., :n]
