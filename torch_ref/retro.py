"""RETRO (arXiv 2112.04426), batch-first, with the attribute names of the original's layers.

Axes: B batch, S sequence, C = S // chunk_len chunks, N neighbors of a chunk, M tokens of a neighbor, D = d_model, H
heads of d_k features (H·d_k need not be D), V vocabulary. In einsums: b batch, c chunk, n neighbor, i query, j key, h
head, d feature.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from torch_ref.rope import rotary_tables, rotate

ROTARY_BASE = 10_000


class Attention(nn.Module):
    """Base class of the three attentions: a norm of the queries' input, biased projections to heads and back."""

    def __init__(self, d_model: int, n_heads: int, d_k: int):
        super().__init__()
        self.n_heads = n_heads
        self.d_k = d_k
        self.scale = 1 / math.sqrt(d_k)
        self.query = nn.Linear(d_model, n_heads * d_k)
        self.key = nn.Linear(d_model, n_heads * d_k)
        self.value = nn.Linear(d_model, n_heads * d_k)
        self.norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(n_heads * d_k, d_model)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H·d_k] -> [..., H, d_k]."""
        return x.unflatten(-1, (self.n_heads, self.d_k))


class SelfAttention(Attention):
    """h + W_o softmax(QKᵀ/√d_k) V of LN(h), all d_k features rotated by the positions; causal or not.

    The originals' checkpoints have the rotary frequencies as `rotary_pe.theta`: they are compared and dropped.
    """

    def __init__(self, d_model: int, n_heads: int, d_k: int, is_causal: bool):
        super().__init__(d_model, n_heads, d_k)
        if d_k < 2 or d_k % 2:
            raise ValueError(f"d_k={d_k} must be even and at least 2: all of it is rotated")
        self.is_causal = is_causal
        self.register_load_state_dict_pre_hook(drop_theta)

    # [retro.attention]
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, S, D] -> the same shape."""
        s, z = h.shape[1], self.norm(h)
        dtype = torch.promote_types(h.dtype, torch.float32)
        cos, sin = rotary_tables(torch.arange(s, device=h.device), self.d_k, ROTARY_BASE, dtype)
        q, k = (rotate(self.heads(linear(z)), cos[:, None], sin[:, None]) for linear in (self.query, self.key))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
        if self.is_causal:
            later = torch.ones(s, s, dtype=torch.bool, device=h.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        x = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), self.heads(self.value(z)))
        return h + self.output(x.flatten(2))


# [retro.theta]
def drop_theta(module: SelfAttention, state_dict: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    """Remove the originals' frequencies from a state_dict; raises ValueError if they have another base."""
    key = f"{prefix}rotary_pe.theta"
    if key not in state_dict:
        return
    theta = state_dict.pop(key)
    expected = ROTARY_BASE ** (-torch.arange(0, module.d_k, 2, dtype=torch.float64) / module.d_k)
    if theta.shape != expected.shape or not torch.allclose(theta.double().cpu(), expected, rtol=1e-2):
        raise ValueError(f"{key} {theta.tolist()} is not base^(-2i/d_k) with base={ROTARY_BASE}, d_k={module.d_k}")


class CrossAttention(Attention):
    """Neighbors' tokens attend to the chunk that they were retrieved for: e + W_o softmax(QKᵀ/√d_k) V, Q of LN(e)."""

    # [retro.cross]
    def forward(self, e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """e [B, C, N, M, D], h [B, C, chunk_len, D] (normed already) -> [B, C, N, M, D]."""
        q = self.heads(self.query(self.norm(e)))
        k, v = self.heads(self.key(h)), self.heads(self.value(h))
        weights = (torch.einsum("bcnihd,bcjhd->bcnhij", q, k) * self.scale).softmax(dim=-1)
        return e + self.output(torch.einsum("bcnhij,bcjhd->bcnihd", weights, v).flatten(-2))


class ChunkedCrossAttention(Attention):
    """Each position attends to all tokens of the neighbors of the last chunk that ends at it or before it.

    h + W_o softmax(QKᵀ/√d_k) V, Q of LN(h), the softmax over neighbors and their tokens together. The neighbors of
    chunk u serve positions (u+1)·chunk_len - 1 … (u+2)·chunk_len - 2; before the first of them h passes.
    """

    def __init__(self, d_model: int, n_heads: int, d_k: int, chunk_len: int):
        super().__init__(d_model, n_heads, d_k)
        self.chunk_len = chunk_len

    # [retro.chunked]
    def forward(self, h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """h [B, S, D], e [B, C, N, M, D] -> [B, S, D]."""
        chunks, shift = e.shape[1], self.chunk_len - 1
        if chunks == 0:
            return h
        z = self.norm(h[:, shift:])  # [B, S - shift, D]
        z = nn.functional.pad(z, (0, 0, 0, chunks * self.chunk_len - z.shape[1]))
        q = self.heads(self.query(z.unflatten(1, (chunks, self.chunk_len))))  # [B, C, chunk_len, H, d_k]
        e = e.flatten(2, 3)  # [B, C, N·M, D]
        k, v = self.heads(self.key(e)), self.heads(self.value(e))
        weights = (torch.einsum("bcihd,bcjhd->bchij", q, k) * self.scale).softmax(dim=-1)
        x = self.output(torch.einsum("bchij,bcjhd->bcihd", weights, v).flatten(-2)).flatten(1, 2)
        return h + nn.functional.pad(x, (0, 0, shift, 0))[:, : h.shape[1]]


class FeedForward(nn.Module):
    """h + W₂ relu(W₁ LN(h) + b₁) + b₂."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.lin1 = nn.Linear(d_model, d_ff)
        self.lin2 = nn.Linear(d_ff, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.lin2(torch.relu(self.lin1(self.norm(h))))


class NearestNeighborEncoder(nn.Module):
    """Encoder of neighbors, each seeing itself and its chunk: self-attention, cross-attention if p ∈ ca_layers, FF."""

    def __init__(
        self, chunk_len: int, n_layers: int, ca_layers: Iterable[int], d_model: int, n_heads: int, d_k: int, d_ff: int
    ):
        super().__init__()
        self.chunk_len = chunk_len
        self.ca_layers = check_ca_layers(ca_layers, n_layers)
        self.ca = nn.ModuleList(CrossAttention(d_model, n_heads, d_k) for _ in self.ca_layers)
        self.attn = nn.ModuleList(SelfAttention(d_model, n_heads, d_k, is_causal=False) for _ in range(n_layers))
        self.ffw = nn.ModuleList(FeedForward(d_model, d_ff) for _ in range(n_layers))
        self.norm_h = nn.LayerNorm(d_model)

    # [retro.encoder]
    def forward(self, e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """e [B, C, N, M, D], h [B, S, D], S ≥ C·chunk_len -> [B, C, N, M, D]."""
        chunks = e.shape[1]
        h = self.norm_h(h[:, : chunks * self.chunk_len].unflatten(1, (chunks, self.chunk_len)))
        ca = iter(self.ca)
        for p, (attn, ffw) in enumerate(zip(self.attn, self.ffw, strict=True)):
            e = attn(e.flatten(0, 2)).view(e.shape)
            if p in self.ca_layers:
                e = next(ca)(e, h)
            e = ffw(e)
        return e


class RetroModel(nn.Module):
    """Token ids to logits of the next token, with chunks of other text that resemble what was read.

    Layer p: causal self-attention; chunked cross-attention to e if p ∈ ca_layers; feed-forward. At p = min(ca_layers)
    e = LN_e(encoder(emb(ret), h)), once. No final norm; one embedding for the input and the neighbors.
    """

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
    ):
        super().__init__()
        self.chunk_len = chunk_len
        self.ca_layers = check_ca_layers(ca_layers, n_layers)
        if encoder is None and self.ca_layers:
            raise ValueError(f"encoder=None, but ca_layers={sorted(self.ca_layers)} attend to what it would encode")
        if encoder is not None and encoder.chunk_len != chunk_len:
            raise ValueError(f"chunk_len={chunk_len}, but the encoder has chunk_len={encoder.chunk_len}")
        self.encoder = encoder
        self.emb = nn.Embedding(n_vocab, d_model)
        self.cca = nn.ModuleList(ChunkedCrossAttention(d_model, n_heads, d_k, chunk_len) for _ in self.ca_layers)
        self.attn = nn.ModuleList(SelfAttention(d_model, n_heads, d_k, is_causal=True) for _ in range(n_layers))
        self.ffw = nn.ModuleList(FeedForward(d_model, d_ff) for _ in range(n_layers))
        self.read = nn.Linear(d_model, n_vocab)
        self.norm_e = nn.LayerNorm(d_model)

    def forward(self, x: torch.Tensor, ret: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, S], ret [B, C, N, M] of ids -> logits [B, S, V]; ret=None, or C = 0, goes without retrieval.

        Raises ValueError unless ret has C = S // chunk_len chunks of neighbors.
        """
        if ret is not None and (ret.ndim != 4 or ret.shape[1] != x.shape[1] // self.chunk_len):
            raise ValueError(
                f"ret must be [B, C, N, M], C = {x.shape[1] // self.chunk_len} chunks of chunk_len={self.chunk_len} in "
                f"{x.shape[1]} tokens; got {list(ret.shape)}"
            )
        # [retro.model]
        h, e = self.emb(x), None
        neighbors = None if ret is None or ret.shape[1] == 0 else self.emb(ret)
        cca = iter(self.cca)
        for p, (attn, ffw) in enumerate(zip(self.attn, self.ffw, strict=True)):
            h = attn(h)
            if p in self.ca_layers and neighbors is not None and self.encoder is not None:
                if e is None:
                    e = self.norm_e(self.encoder(neighbors, h))
                h = next(cca)(h, e)
            h = ffw(h)
        return self.read(h)


def check_ca_layers(ca_layers: Iterable[int], n_layers: int) -> frozenset[int]:
    """The layers with cross-attention as a set; raises ValueError for a layer that does not exist."""
    layers = frozenset(ca_layers)
    if not layers <= set(range(n_layers)):
        raise ValueError(f"ca_layers={sorted(layers)} must be layers from 0 to {n_layers - 1}")
    return layers
