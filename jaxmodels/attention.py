"""Multi-head attention, sequence-first, in the forms that add no positions or learned relative ones.

Axes: S queries, N keys, B batch, H heads, D = d_model = H·d_k features.
Modules take and give [S, B, D]; inside, arrays are head-major, [B, H, S, d_k], which is several times faster on CPUs.
In einsums: i query, j key, b batch, h head, d feature, r table row.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.cache import visible, write
from jaxmodels.layers import Dropout, HeadProjection, Linear

Mask = jax.Array | Literal["causal"] | None

MIN_BLOCK = 64  # queries; smaller blocks spend their time in overheads
MAX_BLOCKS = 8  # bounds compile time; 8 blocks do 56 % of the work of the whole matrix, 16 would do 53 %


# Where training places the arrays of these modules; see `jaxmodels.sharding`.
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


def without_dropout(x: jax.Array, rng: jax.Array | None) -> jax.Array:
    return x


class Attention(nnx.Module):
    """What every attention here shares: scores -> mask -> softmax over keys -> dropout -> weighted values -> output.

    A subclass fills `project` (tokens to head-major queries, keys and values), `get_scores` and, where its result must
    be turned back, `restore`. `mask='causal'` (queries and keys are the same tokens) is the fast path: the queries are
    cut into blocks, and each meets only the keys up to its own end.
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

    def project(self, query, key, value, positions: jax.Array | None) -> tuple[Any, jax.Array | None, jax.Array]:
        """Queries (a pytree of [B, H, S, …]), keys (None where scores need none) and values [B, H, N, d_k].

        positions: int32 [S] or [S, B] of query, key and value alike; None means 0, 1, … for each of them.
        """
        raise NotImplementedError

    def get_scores(self, query, key, n: int, first: int | jax.Array) -> jax.Array:
        """Logits [B, H, S, N] of projected queries over n keys; `first` is the first query's place among the keys."""
        raise NotImplementedError

    def restore(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        """What is done to the weighted sum [S, B, H, d_k] before the output projection: nothing."""
        return x

    def check_length(self, n: int) -> None:
        """Raises ValueError where n keys are more than this attention's tables reach."""

    def __call__(
        self, *, query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask = None, rng: jax.Array | None = None
    ) -> jax.Array:
        """query [S, B, D], key and value [N, B, D] -> [S, B, D].

        mask: bool [S or 1, N, 1 or B], True = may attend; or 'causal'; or None. rng: dropout's key, None for none.
        Raises ValueError where shapes or mask do not fit, or N is beyond the tables.
        """
        if key.shape[:2] != value.shape[:2] or key.shape[1] != query.shape[1]:
            given = ", ".join(str(list(x.shape)) for x in (query, key, value))
            raise ValueError(f"query, key and value must be [S, B, D], [N, B, D] and [N, B, D], got {given}")
        s, n = len(query), len(key)
        self.check_length(max(s, n))
        q, k, v = self.project(query, key, value, None)
        if isinstance(mask, str):
            if mask != "causal" or s != n:
                raise ValueError(f"mask={mask!r} with {s} queries and {n} keys: 'causal' needs as many of both")
            x = self.attend_in_blocks(q, k, v, rng)
        else:
            if mask is not None:
                mask = check_mask(mask, s, n, query.shape[1]).transpose(2, 0, 1)[:, None]
            x = attend(self.get_scores(q, k, n, n - s), v, mask, self.dropout, rng)
        return self.finish(x, None)

    def attend_in_blocks(self, query, key, value, rng: jax.Array | None) -> jax.Array:
        """Causal attention [B, H, S, d_k]: each block of queries over its static prefix of keys."""
        return attend_in_blocks(query, key, value, self.get_scores, self.dropout, rng)

    def finish(self, x: jax.Array, positions: jax.Array | None) -> jax.Array:
        """[B, H, S, d_k] -> [S, B, D]: restore, join the heads, output projection."""
        x = self.restore(x.transpose(2, 0, 1, 3), positions)
        return self.output(x.reshape(*x.shape[:2], -1))

    def init_cache(self, batch: int, max_len: int, dtype) -> dict[str, jax.Array]:
        """Zeroed buffers [B, H, max_len, d_k]; raises ValueError where max_len is beyond the tables."""
        if max_len < 1:
            raise ValueError(f"max_len={max_len} must be at least 1")
        self.check_length(max_len)
        shape = (batch, self.heads, max_len, self.d_k)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}

    def decode(
        self, x: jax.Array, cache: dict[str, jax.Array], positions: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Self-attention of the next S tokens [S, B, D], over the cache and themselves.

        positions: int32 [S], or [S, B] for ragged rows; None says that the cache is empty and no row is padded: then
        the tokens meet only each other, as in a causal forward pass.
        """
        q, k, v = self.project(x, x, x, positions)
        new = {"value": v} if k is None else {"key": k, "value": v}
        cache = {name: write(cache[name], array, positions) for name, array in new.items()}
        if positions is None:
            return self.finish(self.attend_in_blocks(q, k, v, None), None), cache
        n = cache["value"].shape[2]
        scores = self.get_scores(q, cache.get("key"), n, positions[0])
        x = attend(scores, cache["value"], visible(positions, n), self.dropout, None)
        return self.finish(x, positions), cache


def attend_in_blocks(query, key, value, get_scores, dropout=without_dropout, rng: jax.Array | None = None) -> jax.Array:
    """Causal attention [B, H, S, d_k]; arguments as in `Attention.get_scores` and `attend`.

    The queries are cut into blocks, and each meets only the keys up to its own end.
    """
    s = value.shape[2]
    block = max(MIN_BLOCK, -(-s // MAX_BLOCKS))
    blocks = []
    for first in range(0, s, block):
        end = min(first + block, s)
        q = jax.tree.map(lambda a, first=first, end=end: a[:, :, first:end], query)
        scores = get_scores(q, None if key is None else key[:, :, :end], end, first)
        mask = visible(jnp.arange(first, end), end)
        block_rng = None if rng is None else jax.random.fold_in(rng, first)
        blocks.append(attend(scores, value[:, :, :end], mask, dropout, block_rng))
    return jnp.concatenate(blocks, axis=2)


def attend(
    scores: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    dropout: Callable[[jax.Array, jax.Array | None], jax.Array] = without_dropout,
    rng: jax.Array | None = None,
) -> jax.Array:
    """softmax(scores masked) · value: [B or 1, H, S, N], [B, H, N, d_k] -> [B, H, S, d_k].

    The division by the softmax's sum comes after the product, where it touches S·d_k numbers instead of S·N. Scores
    are exponentiated in float32 at least. A row that may attend to nothing is NaN, as in PyTorch.
    """
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if rng is not None:  # scores shared by the batch: every row still drops weights of its own
        weights = jnp.broadcast_to(weights, (*value.shape[:2], *weights.shape[2:]))
    x = jnp.matmul(dropout(weights, rng).astype(value.dtype), value, preferred_element_type=scores.dtype)
    return (x / total).astype(value.dtype)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention of as many queries as keys, batch-first: three [B, S, H, d_k] -> [B, S, H, d_k].

    cuDNN's fused kernel on CUDA devices where its limits allow it, else blocks of queries: on a CPU XLA has no fused
    kernel, and writing the scores that nobody may see is half of the cost.
    """
    if cudnn_serves(query):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
    scale = 1 / math.sqrt(query.shape[-1])
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (query, key, value))
    x = attend_in_blocks(q, k, v, lambda q, k, n, first: dot_product_scores(q, k, scale))
    return x.transpose(0, 2, 1, 3)


def cudnn_serves(query: jax.Array) -> bool:
    """Whether cuDNN's kernel takes these: 16 bits, d_k up to 128 in steps of 8, on CUDA."""
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0
    return fits and "cuda" in jax.extend.backend.get_backend().platform_version


def check_mask(mask: jax.Array, s: int, n: int, batch: int) -> jax.Array:
    """The mask itself; raises ValueError where it is not bool [S or 1, N, 1 or B]."""
    mask = jnp.asarray(mask)
    fits = mask.ndim == 3 and mask.shape[0] in (1, s) and mask.shape[1] == n and mask.shape[2] in (1, batch)
    if not fits or mask.dtype != bool:
        raise ValueError(
            f"mask must be bool [{s} or 1, {n}, 1 or {batch}] (True = may attend), got {mask.dtype}{list(mask.shape)}"
        )
    return mask


class MultiHeadAttention(Attention):
    """softmax(QKᵀ/√d_k) V over H heads; value and output always have a bias, `bias` is the query's and the key's."""

    def __init__(self, heads: int, d_model: int, dropout_prob: float = 0.1, bias: bool = True, *, rngs: nnx.Rngs):
        super().__init__(heads, d_model, dropout_prob, rngs=rngs)
        self.query = HeadProjection(d_model, heads, self.d_k, bias=bias, rngs=rngs)
        self.key = HeadProjection(d_model, heads, self.d_k, bias=bias, rngs=rngs)

    def project(self, query, key, value, positions):
        return heads_first(self.query(query)), heads_first(self.key(key)), heads_first(self.value(value))

    def get_scores(self, query, key, n, first):
        return dot_product_scores(query, key, self.scale)


def dot_product_scores(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """scale · q_i·k_j: [B, H, S, d_k], [B, H, N, d_k] -> [B, H, S, N]; accumulated in float32 at least."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    return jnp.einsum("bhid,bhjd->bhij", query * scale, key, preferred_element_type=dtype)


class RelativeMultiHeadAttention(MultiHeadAttention):
    """Attention with learned relative positions (Transformer-XL, arXiv 1901.02860).

    score(i, j) = (q_i + u)·k_j + q_i·E[P - distance] + b[P - distance], times d_k^-½, where distance = i - j and the
    queries stand at the end of the keys. E = key_pos_embeddings [2P, H, d_k], b = key_pos_bias [2P, H],
    u = query_pos_bias [H, d_k], zero-initialised.
    """

    P = 2**12

    def __init__(self, heads: int, d_model: int, dropout_prob: float = 0.1, *, rngs: nnx.Rngs):
        super().__init__(heads, d_model, dropout_prob, bias=False, rngs=rngs)
        self.key_pos_embeddings = nnx.Param(jnp.zeros((2 * self.P, heads, self.d_k), jnp.float32))
        self.key_pos_bias = nnx.Param(jnp.zeros((2 * self.P, heads), jnp.float32))
        self.query_pos_bias = nnx.Param(jnp.zeros((heads, self.d_k), jnp.float32))

    def check_length(self, n: int) -> None:
        if n > self.P:
            raise ValueError(f"{n} keys given, but the relative position tables reach back {self.P} at most")

    def get_scores(self, query, key, n, first):
        content = dot_product_scores(query + self.query_pos_bias[:, None], key, self.scale)
        return content + self.position_scores(query, n, first) * self.scale

    def position_scores(self, query: jax.Array, n: int, first: int | jax.Array) -> jax.Array:
        """q_i·E[P - distance] + b[P - distance], unscaled: [B, H, S, N]; `first` an int, a scalar or one per row [B].

        One product with the S + N - 1 rows that any pair needs, and a shear that brings each row to its place:
        row r of the slice is distance first + S - 1 - r, so query i finds key j at r = S - 1 - i + j.
        """
        if isinstance(first, jax.Array) and first.ndim:
            return jax.vmap(lambda q, f: self.position_scores(q[None], n, f)[0])(query, first)
        s = query.shape[2]
        low = self.P - first - s + 1
        if isinstance(low, int):
            table, bias = (t[low : low + s + n - 1] for t in (self.key_pos_embeddings, self.key_pos_bias))
        else:  # clipped rows are later than the query, and masked
            rows = low + jnp.arange(s + n - 1)
            table, bias = (jnp.take(t[...], rows, 0, mode="clip") for t in (self.key_pos_embeddings, self.key_pos_bias))
        return shear(jnp.einsum("bhid,rhd->bhir", query, table) + bias.T[:, None], n)


def shear(x: jax.Array, n: int) -> jax.Array:
    """out[…, i, j] = x[…, i, S-1-i+j] for j < n: [..., S, S+n-1] -> [..., S, n]; a pad and a reshape, no gather."""
    *lead, s, width = x.shape
    flat = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*lead, s * (width + 1))
    return flat[..., s - 1 : s - 1 + s * width].reshape(*lead, s, width)[..., :n]
