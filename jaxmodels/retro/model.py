"""RETRO (arXiv 2112.04426), batch-first: a decoder that reads chunks of other text which resemble its own.

Axes: B batch, S sequence, C = S // L chunks of L = chunk_len tokens, N neighbours of a chunk, M tokens of a neighbour,
D = d_model, H heads of d_k features, V vocabulary.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels.layers import SMALL_RULES, Embed, LayerNorm, Linear, constrain, rematerialised
from jaxmodels.retro import decode
from jaxmodels.retro.attention import ROTARY_BASE, ChunkedCrossAttention, CrossAttention, SelfAttention
from jaxmodels.retro.decode import RetroCache
from jaxmodels.transformer import check_ids
from jaxmodels.weights.names import as_numpy


class FeedForward(nnx.Module):
    """h + W₂ relu(W₁ LN(h) + b₁) + b₂."""

    def __init__(self, d_model: int, d_ff: int, *, rngs: nnx.Rngs):
        self.lin1 = Linear(d_model, d_ff, rngs=rngs)
        self.lin2 = Linear(d_ff, d_model, rngs=rngs)
        self.norm = LayerNorm(d_model, rngs=rngs)

    def __call__(self, h: jax.Array) -> jax.Array:
        return h + self.lin2(jax.nn.relu(self.lin1(self.norm(h))))


class NearestNeighborEncoder(nnx.Module):
    """Neighbours, each by itself and aware of its chunk: self-attention, cross-attention if p ∈ ca_layers, FF.

    ca_layers: any collection of layer numbers. Raises ValueError for sizes below 1 and for a layer that there is not.
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
        """The constructor's arguments."""
        names = ["chunk_len", "n_layers", "d_model", "n_heads", "d_k", "d_ff"]
        return {name: getattr(self, name) for name in names} | {"ca_layers": sorted(self.ca_layers)}

    def adapted(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What `from_torch` makes of the originals' state_dict; see `without_theta`."""
        return without_theta(state_dict, self.d_k)

    def __call__(self, e: jax.Array, h: jax.Array) -> jax.Array:
        """e [B, C, N, M, D], h [B, S, D], S ≥ C·L -> [B, C, N, M, D]."""
        b, c, *_, d = e.shape
        h = self.norm_h(h[:, : c * self.chunk_len].reshape(b, c, self.chunk_len, d))
        ca = iter(self.ca)
        for p, (attn, ffw) in enumerate(zip(self.attn, self.ffw, strict=True)):
            e = rematerialised(call)(attn, e.reshape(-1, *e.shape[3:])).reshape(e.shape)
            if p in self.ca_layers:
                e = rematerialised(call)(next(ca), e, h)
            e = constrain(rematerialised(call)(ffw, e), "BCNMD")
        return e


class RetroModel(nnx.Module):
    """Token ids to logits of the next token, with chunks of other text that resemble what was read.

    Layer p: causal self-attention; chunked cross-attention to e if p ∈ ca_layers; feed-forward. At p = min(ca_layers)
    e = LN_e(encoder(emb(ret), h)), once. No final norm; one embedding for the input and the neighbours. Without
    ca_layers it is a plain decoder. Raises ValueError for sizes below 1, for a layer that there is not, where ca_layers
    have no encoder, and for an encoder of another chunk_len or d_model.
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
            raise ValueError(f"encoder=None, but ca_layers={sorted(self.ca_layers)} attend to what it would encode")
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

    def config(self) -> dict[str, Any]:
        """The arguments of `from_config`, as `config.json` keeps them."""
        names = ["n_vocab", "d_model", "n_layers", "chunk_len", "n_heads", "d_k", "d_ff"]
        encoder = None if self.encoder is None else self.encoder.config()
        return {name: getattr(self, name) for name in names} | {"ca_layers": sorted(self.ca_layers), "encoder": encoder}

    @classmethod
    def from_config(cls, *, encoder: dict[str, Any] | None = None, rngs: nnx.Rngs, **sizes: Any) -> "RetroModel":
        """The model of a `config()`; raises ValueError for values that no model can have."""
        built = None if encoder is None else NearestNeighborEncoder(**encoder, rngs=rngs)
        return cls(**sizes, encoder=built, rngs=rngs)

    def adapted(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What `from_torch` makes of the originals' state_dict; see `without_theta`."""
        return without_theta(state_dict, self.d_k)

    def __call__(self, x: jax.Array, ret: jax.Array | None = None) -> jax.Array:
        """x int [B, S], ret int [B, C, N, M] -> logits [B, S, V]; ret=None, or C = 0, goes without retrieval.

        Raises ValueError where x has another rank, or ret is not one group of neighbours for each of the S // L chunks.
        """
        check_ids(x, "[B, S]")
        self.check_neighbors(x, ret)
        h, e = constrain(self.emb(x), "BSD"), None
        neighbors = None if ret is None or ret.shape[1] == 0 or not self.ca_layers else self.emb(ret)
        cca = iter(self.cca)
        for p, (attn, ffw) in enumerate(zip(self.attn, self.ffw, strict=True)):
            h = rematerialised(call)(attn, h)
            if p in self.ca_layers and neighbors is not None:
                e = self.encode(neighbors, h) if e is None else e
                h = rematerialised(call)(next(cca), h, e)
            h = constrain(rematerialised(call)(ffw, h), "BSD")
        return constrain(self.read(h), "BSV")

    def encode(self, neighbors: jax.Array, h: jax.Array) -> jax.Array:
        """What the chunks' layers attend to: embedded neighbours [B, C, N, M, D] and h [B, S, D] -> [B, C, N, M, D]."""
        assert self.encoder is not None, "the constructor saw to it"
        return self.norm_e(self.encoder(constrain(neighbors, "BCNMD"), h))

    def check_neighbors(self, x: jax.Array, ret: jax.Array | None) -> None:
        """Raises ValueError where ret is not int [B, C, N, M] with C = S // L."""
        if ret is None:
            return
        b, s = x.shape
        c = s // self.chunk_len
        fits = ret.ndim == 4 and ret.shape[:2] == (b, c) and (c == 0 or 0 not in ret.shape)
        if not fits or not jnp.issubdtype(ret.dtype, jnp.integer):
            raise ValueError(
                f"ret must be integers [B={b}, C={c}, N, M]: neighbours of {c} chunks of chunk_len={self.chunk_len} in "
                f"{s} tokens; got {ret.dtype}{list(ret.shape)}"
            )

    def init_cache(
        self,
        batch: int,
        max_len: int,
        dtype: Any = None,
        start: jax.Array | None = None,
        neighbors: tuple[int, int] | None = None,
    ) -> RetroCache:
        """An empty cache for up to max_len tokens of text a row; dtype None: that of the parameters.

        start: int [B], how many of the first ids of each row will be left padding. neighbors: (N, M), how many of how
        many tokens every chunk will have; None: retrieval is off. Raises ValueError where max_len, N or M are not at
        least 1, start is not one integer per row, or a model without ca_layers is to have neighbours.
        """
        dtype = self.emb.embedding.dtype if dtype is None else dtype
        return decode.init_cache(self, batch, max_len, dtype, start, neighbors)

    def prefill(self, ids: jax.Array, cache: RetroCache, ret: jax.Array | None = None) -> tuple[jax.Array, RetroCache]:
        """The first S tokens [B, S] in one pass -> the last one's logits [B, V] and the filled cache.

        ret [B, S // L, N, M], where the cache was made for neighbours; of a row with left padding they belong to the
        chunks of its own text, and those beyond it may be any tokens. Raises ValueError where the cache is not empty,
        too short, or made for others; inside a trace the logits are NaN where the ids did not fit.
        """
        check_ids(ids, "[B, S]")
        self.check_neighbors(ids, ret)
        return decode.prefill(self, ids, cache, ret)

    def decode(self, ids: jax.Array, cache: RetroCache, ret: jax.Array | None = None) -> tuple[jax.Array, RetroCache]:
        """S further tokens [B, S] -> their logits [B, S, V] and the longer cache.

        ret [B, S, N, M], where the cache was made for neighbours: of each token, those of the chunk that ends with it.
        Where none does they may be any tokens. Raises ValueError where something does not fit; inside a trace, where
        the length is unknown, the logits are NaN then.
        """
        check_ids(ids, "[B, S]")
        return decode.decode(self, ids, cache, ret)

    def neighbors_by_token(self, ret: jax.Array, s: int) -> jax.Array:
        """What `decode` takes for all s tokens of a text, from what the call takes: [B, C, N, M] -> [B, s, N, M]."""
        by_token = jnp.repeat(ret, self.chunk_len, axis=1)
        return jnp.pad(by_token, [(0, 0), (0, s - by_token.shape[1]), (0, 0), (0, 0)])

    def decoding_inputs(
        self, inputs: Mapping[str, jax.Array], cuts: Sequence[int]
    ) -> tuple[dict[str, Any], list[dict[str, jax.Array]]]:
        """Arguments for decoding a text that a call reads at once: of `init_cache`, and of `prefill` and each `decode`.

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
    return module(*arguments)


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")


def check_ca_layers(ca_layers: Iterable[int], n_layers: int) -> frozenset[int]:
    """The layers with cross-attention as a set; raises ValueError for one that there is not."""
    layers = frozenset(ca_layers)
    if not layers <= set(range(n_layers)):
        raise ValueError(f"ca_layers={sorted(layers)} must be layers from 0 to {n_layers - 1}")
    return layers


def without_theta(state_dict: Mapping[str, Any], d_k: int) -> dict[str, Any]:
    """A state_dict without the rotary frequencies that the originals keep as `rotary_pe.theta`.

    Raises ValueError where they are not those of this base and width.
    """
    expected = ROTARY_BASE ** (-np.arange(0, d_k, 2) / d_k)
    for key, tensor in state_dict.items():
        if not key.endswith("rotary_pe.theta"):
            continue
        theta = as_numpy(tensor).astype(np.float64)
        if theta.shape != expected.shape or not np.allclose(theta, expected, rtol=1e-2):  # they may be 16 bits wide
            raise ValueError(f"{key} {theta.tolist()} is not base^(-2i/d_k) with base={ROTARY_BASE}, d_k={d_k}")
    return {key: tensor for key, tensor in state_dict.items() if not key.endswith("rotary_pe.theta")}
