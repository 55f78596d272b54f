"""RETRO (arXiv 2112.04426), batch-first: a decoder that attends to retrieved neighbors of the chunks of its text.

Axes: B batch, S sequence, C = S // L chunks of L = chunk_len tokens, N neighbors of a chunk, M tokens of a neighbor,
D = d_model, H heads of d_k features, V vocabulary.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.layers import (
    SMALL_RULES,
    Embed,
    LayerNorm,
    Linear,
    check_decodes,
    check_ids,
    check_sizes,
    constrain,
    float_dtype,
    rematerialized,
)
from jaxmodels.retro import decode
from jaxmodels.retro.attention import ROTARY_BASE, ChunkedCrossAttention, CrossAttention, SelfAttention
from jaxmodels.retro.decode import RetroCache
from jaxmodels.rope import check_frequencies
from jaxmodels.weights.names import Renamed, as_numpy


class FeedForward(nnx.Module):
    """h + W₂ relu(W₁ LN(h) + b₁) + b₂."""

    def __init__(self, d_model: int, d_ff: int, *, rngs: nnx.Rngs):
        self.lin1 = Linear(d_model, d_ff, rngs=rngs)
        self.lin2 = Linear(d_ff, d_model, rngs=rngs)
        self.norm = LayerNorm(d_model, rngs=rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        """h [..., D] -> [..., D]."""
        return h + self.lin2(jax.nn.relu(self.lin1(self.norm(h))))


class NearestNeighborEncoder(nnx.Module):
    """Encoder of each neighbor: self-attention, cross-attention to the chunk if p ∈ ca_layers, feed-forward.

    ca_layers: layer numbers from 0 to n_layers - 1. Raises ValueError for another layer or a size below 1.
    """

    def __init__(
        self,
        chunk_len: int,
        n_layers: int,
        ca_layers: Iterable[int],
        d_model: int,
        n_heads: int,
        d_k: int,
        d_ff: int,
        *,
        rngs: nnx.Rngs,
    ):
        check_sizes(chunk_len=chunk_len, n_layers=n_layers, d_ff=d_ff)
        self.chunk_len, self.n_layers, self.ca_layers = chunk_len, n_layers, check_ca_layers(ca_layers, n_layers)
        self.d_model, self.n_heads, self.d_k, self.d_ff = d_model, n_heads, d_k, d_ff
        sizes = (d_model, n_heads, d_k)
        self.ca = nnx.List(CrossAttention(*sizes, rngs=rngs) for _ in self.ca_layers)
        self.attn = nnx.List(SelfAttention(*sizes, is_causal=False, rngs=rngs) for _ in range(n_layers))
        self.ffw = nnx.List(FeedForward(d_model, d_ff, rngs=rngs) for _ in range(n_layers))
        self.norm_h = LayerNorm(d_model, rngs=rngs)

    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values."""
        names = ["chunk_len", "n_layers", "d_model", "n_heads", "d_k", "d_ff"]
        return {name: getattr(self, name) for name in names} | {"ca_layers": sorted(self.ca_layers)}

    def adapted(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Prepare a state_dict of the original implementation for `from_torch`; see `without_theta`."""
        return without_theta(state_dict, self.d_k)

    # [retro.encoder]
    def __call__(self, e: jax.Array, h: jax.Array) -> jax.Array:
        """e [B, C, N, M, D], h [B, S, D], S ≥ C·L -> [B, C, N, M, D]."""
        b, c, *_, d = e.shape
        h = self.norm_h(h[:, : c * self.chunk_len].reshape(b, c, self.chunk_len, d))  # [B, C, L, D]
        ca = iter(self.ca)
        for p, (attn, ffw) in enumerate(zip(self.attn, self.ffw, strict=True)):
            e = rematerialized(call)(attn, e.reshape(-1, *e.shape[3:])).reshape(e.shape)
            if p in self.ca_layers:
                e = rematerialized(call)(next(ca), e, h)
            e = constrain(rematerialized(call)(ffw, e), "BCNMD")
        return e


class RetroModel(nnx.Module):
    """Causal language model with retrieval: token ids and their chunks' neighbors to logits of the next token.

    Layer p: causal self-attention; chunked cross-attention to e if p ∈ ca_layers; feed-forward. e = LN_e(encoder(
    emb(ret), h)) is computed once, at p = min(ca_layers). No final norm; input and neighbors share one embedding.
    Without ca_layers it is a plain decoder. Raises ValueError for a size below 1, a layer outside 0 … n_layers - 1,
    ca_layers without an encoder, or an encoder with another chunk_len or d_model.
    """

    sequence_axis = 1
    sharding_rules = (
        *SMALL_RULES,
        (r"emb\.embedding", P(None, "fsdp")),
        (r"(query|key|value|lin1)\.kernel", P("fsdp", "tensor")),
        (r"(query|key|value|lin1)\.bias", P("tensor")),
        (r"(output|lin2)\.kernel", P("tensor", "fsdp")),
        (r"(output|lin2)\.bias", P()),
        (r"read\.kernel", P("fsdp")),
        (r"read\.bias", P()),
    )

    def __init__(
        self,
        n_vocab: int,
        d_model: int,
        n_layers: int,
        ca_layers: Iterable[int],
        chunk_len: int,
        n_heads: int,
        d_k: int,
        d_ff: int,
        encoder: NearestNeighborEncoder | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        check_sizes(n_vocab=n_vocab, n_layers=n_layers, chunk_len=chunk_len, d_ff=d_ff)
        self.n_vocab, self.d_model, self.n_layers, self.chunk_len = n_vocab, d_model, n_layers, chunk_len
        self.ca_layers = check_ca_layers(ca_layers, n_layers)
        self.n_heads, self.d_k, self.d_ff = n_heads, d_k, d_ff
        if encoder is None and self.ca_layers:
            raise ValueError(f"encoder=None, but ca_layers={sorted(self.ca_layers)} need an encoder")
        for name, own in {"chunk_len": chunk_len, "d_model": d_model}.items():
            if encoder is not None and getattr(encoder, name) != own:
                raise ValueError(f"{name}={own}, but the encoder has {name}={getattr(encoder, name)}")
        self.encoder = encoder
        sizes = (d_model, n_heads, d_k)
        self.emb = Embed(n_vocab, d_model, rngs=rngs)
        self.cca = nnx.List(ChunkedCrossAttention(*sizes, chunk_len, rngs=rngs) for _ in self.ca_layers)
        self.attn = nnx.List(SelfAttention(*sizes, is_causal=True, rngs=rngs) for _ in range(n_layers))
        self.ffw = nnx.List(FeedForward(d_model, d_ff, rngs=rngs) for _ in range(n_layers))
        self.read = Linear(d_model, n_vocab, rngs=rngs)
        self.norm_e = LayerNorm(d_model, rngs=rngs)

    @property
    def reads_neighbors(self) -> bool:
        """True unless it is a plain decoder."""
        return bool(self.ca_layers)

    def config(self) -> dict[str, Any]:
        """Arguments of `from_config`, as JSON values."""
        names = ["n_vocab", "d_model", "n_layers", "chunk_len", "n_heads", "d_k", "d_ff"]
        encoder = None if self.encoder is None else self.encoder.config()
        return {name: getattr(self, name) for name in names} | {"ca_layers": sorted(self.ca_layers), "encoder": encoder}

    @classmethod
    def from_config(cls, *, encoder: dict[str, Any] | None = None, rngs: nnx.Rngs, **sizes: Any) -> "RetroModel":
        """Build the model of a `config()`; raises ValueError if a value is out of range."""
        built = None if encoder is None else NearestNeighborEncoder(**encoder, rngs=rngs)
        return cls(**sizes, encoder=built, rngs=rngs)

    def adapted(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Prepare a state_dict of the original implementation for `from_torch`; see `without_theta`."""
        return without_theta(state_dict, self.d_k)

    def __call__(self, x: jax.Array, ret: jax.Array | None = None) -> jax.Array:
        """x int [B, S], ret int [B, C, N, M] -> logits [B, S, V].

        ret: token ids of the neighbors of each chunk; None, or C = 0, for no retrieval. Raises ValueError if x or ret
        has another shape.
        """
        return constrain(self.read(self.features(x, ret)), "BSV")

    def features(self, x: jax.Array, ret: jax.Array | None = None) -> jax.Array:
        """x int [B, S] -> output [B, S, D] of the last layer, of which `read` makes the logits; as the call."""
        check_ids(x, "[B, S]")
        self.check_neighbors(x, ret)
        # [retro.model]
        h, e = constrain(self.emb(x), "BSD"), None  # [B, S, D]
        neighbors = None if ret is None or ret.shape[1] == 0 or not self.ca_layers else self.emb(ret)  # [B, C, N, M, D]
        cca = iter(self.cca)
        for p, (attn, ffw) in enumerate(zip(self.attn, self.ffw, strict=True)):
            h = rematerialized(call)(attn, h)
            if p in self.ca_layers and neighbors is not None:
                e = self.encode(neighbors, h) if e is None else e
                h = rematerialized(call)(next(cca), h, e)
            h = constrain(rematerialized(call)(ffw, h), "BSD")
        return h

    # [retro.model]
    def encode(self, neighbors: jax.Array, h: jax.Array) -> jax.Array:
        """Encode embedded neighbors [B, C, N, M, D] with h [B, S, D] -> e [B, C, N, M, D]."""
        assert self.encoder is not None, "checked by the constructor"
        return self.norm_e(self.encoder(constrain(neighbors, "BCNMD"), h))

    def check_neighbors(self, x: jax.Array, ret: jax.Array | None) -> None:
        """Raises ValueError if ret is not int [B, C, N, M] with C = S // L."""
        if ret is None:
            return
        b, s = x.shape
        c = s // self.chunk_len
        fits = ret.ndim == 4 and ret.shape[:2] == (b, c) and (c == 0 or 0 not in ret.shape)
        if not fits or not jnp.issubdtype(ret.dtype, jnp.integer):
            raise ValueError(
                f"ret must be integers [B={b}, C={c}, N, M], as {s} tokens have {c} chunks of "
                f"chunk_len={self.chunk_len}; got {ret.dtype}{list(ret.shape)}"
            )

    def init_cache(
        self,
        batch: int,
        max_len: int,
        dtype: Any = None,
        start: jax.Array | None = None,
        neighbors: tuple[int, int] | None = None,
    ) -> RetroCache:
        """Empty cache for up to max_len tokens per row.

        dtype: of keys and values; default that of the parameters. start: int [B], number of left-padding ids in each
        row. neighbors: (N, M), number of neighbors of a chunk and tokens of a neighbor; None for no retrieval. Raises
        ValueError if max_len, N or M is below 1, start is not one integer per row, the model has no ca_layers for
        neighbors, or a sub-module was replaced by one that cannot decode.
        """
        check_decodes(self, r"(attn|cca)\.\d+")
        dtype = float_dtype(self.emb) if dtype is None else dtype
        return decode.init_cache(self, batch, max_len, dtype, start, neighbors)

    def prefill(self, ids: jax.Array, cache: RetroCache, ret: jax.Array | None = None) -> tuple[jax.Array, RetroCache]:
        """The first S tokens [B, S] in one pass -> logits [B, V] of the last one, and the filled cache.

        ret: int [B, S // L, N, M], required if the cache was made for neighbors. In a row with left padding, chunks are
        counted from the first token after it; entries beyond its last chunk are ignored. Raises ValueError if the cache
        is not empty, too short, or was made for another (N, M); inside a trace the logits are NaN if the ids do not
        fit.
        """
        check_ids(ids, "[B, S]")
        self.check_neighbors(ids, ret)
        return decode.prefill(self, ids, cache, ret)

    def decode(self, ids: jax.Array, cache: RetroCache, ret: jax.Array | None = None) -> tuple[jax.Array, RetroCache]:
        """The next S tokens [B, S] -> logits [B, S, V], and the extended cache.

        ret: int [B, S, N, M], required if the cache was made for neighbors: for each token, the neighbors of the chunk
        that it completes; ignored for a token that completes none. Raises ValueError if ids or ret do not fit; inside a
        trace, where the length is unknown, the logits are NaN instead.
        """
        check_ids(ids, "[B, S]")
        return decode.decode(self, ids, cache, ret)

    def neighbors_by_token(self, ret: jax.Array, s: int) -> jax.Array:
        """Convert the call's `ret` [B, C, N, M] to that of `decode` for all s tokens of a text: [B, s, N, M]."""
        by_token = jnp.repeat(ret, self.chunk_len, axis=1)  # [B, C·L, N, M]
        return jnp.pad(by_token, [(0, 0), (0, s - by_token.shape[1]), (0, 0), (0, 0)])

    def decoding_inputs(
        self, inputs: Mapping[str, jax.Array], cuts: Sequence[int]
    ) -> tuple[dict[str, Any], list[dict[str, jax.Array]]]:
        """Keyword arguments of `init_cache`, and those of `prefill` and of each `decode`, from the call's.

        inputs: the call's arguments other than the ids, {"ret": [B, C, N, M]} or nothing. cuts: 0, the length of the
        prefill, the end of each further piece, the length of the text.
        """
        first, *rest = itertools.pairwise(cuts)
        ret = inputs.get("ret")
        if ret is None:
            return {}, [{} for _ in (first, *rest)]
        by_token = self.neighbors_by_token(ret, cuts[-1])  # [B, S, N, M]
        prefill = {"ret": ret[:, : first[1] // self.chunk_len]}
        return {"neighbors": ret.shape[2:]}, [prefill, *({"ret": by_token[:, a:b]} for a, b in rest)]


def call(module: Any, *arguments: jax.Array) -> jax.Array:
    """Call a module: a function for `rematerialized` to wrap, with the weights as arguments."""
    return module(*arguments)


def check_ca_layers(ca_layers: Iterable[int], n_layers: int) -> frozenset[int]:
    """Convert layer numbers to a frozenset; raises ValueError if one is outside 0 … n_layers - 1."""
    layers = frozenset(ca_layers)
    if not all(0 <= layer < n_layers for layer in layers):
        raise ValueError(f"ca_layers={sorted(layers)} must be layers from 0 to {n_layers - 1}")
    return layers


# [retro.theta]
def without_theta(state_dict: Mapping[str, Any], d_k: int) -> Mapping[str, Any]:
    """State_dict without the rotary frequencies that the original implementation stores as `rotary_pe.theta`.

    Raises ValueError if they are not those of this base and width.
    """
    stored = {key for key in state_dict if key.endswith("rotary_pe.theta")}
    for key in stored:
        check_frequencies(key, as_numpy(state_dict[key]), d_k, ROTARY_BASE)
    return Renamed(state_dict, {key: key for key in state_dict if key not in stored})
