"""The Feedback Transformer (arXiv 2002.09402): every layer attends to one memory of all layers' past outputs.

Axes: S sequence, n memories, B batch, H heads, D = d_model = H·d_k features, L layers, P rows of a position table.
Lists and `torch.stack`, one step after the other, no custom autograd; `feedback_stack.py` has the originals' way.
"""

import math

import torch
from torch import nn

from torch_ref.layers import FeedForward, HeadProjection


class FeedbackAttention(nn.Module):
    """One step's attention over the memories before it, with learned relative positions.

    score(j) = (q + u)·k_j + q·E[P - n + j] + b[P - n + j], times d_k^-½; softmax over j = 0 … n-1. Row P - distance of
    the tables, zero-initialised. The query has no bias, the output has one; with `is_kv_precomputed` keys and values
    come in ready made, else they are projected here, the key without and the value with a bias.
    """

    P = 2**12

    def __init__(self, heads: int, d_model: int, dropout_prob: float = 0.1, *, is_kv_precomputed: bool = False):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"d_model={d_model} is not divisible by heads={heads}")
        self.heads = heads
        self.d_k = d_model // heads
        self.query = HeadProjection(d_model, heads, self.d_k, bias=False)
        self.key = None if is_kv_precomputed else HeadProjection(d_model, heads, self.d_k, bias=False)
        self.value = None if is_kv_precomputed else HeadProjection(d_model, heads, self.d_k, bias=True)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout_prob)
        self.scale = 1 / math.sqrt(self.d_k)
        self.key_pos_embeddings = nn.Parameter(torch.zeros(self.P, heads, self.d_k))
        self.key_pos_bias = nn.Parameter(torch.zeros(self.P, heads))
        self.query_pos_bias = nn.Parameter(torch.zeros(heads, self.d_k))

    # [feedback.attention]
    def forward(self, *, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [B, D]; key and value [n, B, D], or [n, B, H, d_k] if they are precomputed -> [B, D]."""
        n = len(key)
        if n > self.P:
            raise ValueError(f"{n} memories given, but the position tables reach back {self.P} at most")
        query = self.query(query)
        if self.key is not None and self.value is not None:
            key, value = self.key(key), self.value(value)
        content = torch.einsum("bhd,jbhd->jbh", query + self.query_pos_bias, key)
        position = torch.einsum("bhd,jhd->jbh", query, self.key_pos_embeddings[-n:])
        scores = (content + position + self.key_pos_bias[-n:, None]) * self.scale
        attn = self.dropout(scores.softmax(dim=0))
        return self.output(torch.einsum("jbh,jbhd->bhd", attn, value).flatten(1))


class FeedbackTransformerLayer(nn.Module):
    """x ← x + drop(attn(LN x, memory)), which is skipped while there is no memory; then x ← x + drop(FF(LN x))."""

    def __init__(self, attn: FeedbackAttention, d_model: int, d_ff: int, dropout_prob: float = 0.1):
        super().__init__()
        self.attn = attn
        self.feed_forward = FeedForward(d_model, d_ff, dropout_prob)
        self.norm_self_attn = nn.LayerNorm(d_model)
        self.norm_ff = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout_prob)

    # [feedback.layer]
    def forward(self, *, x: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None) -> torch.Tensor:
        """x [B, D], key and value as in the attention, or None -> [B, D]."""
        if key is not None:
            x = x + self.dropout(self.attn(query=self.norm_self_attn(x), key=key, value=value))
        return x + self.dropout(self.feed_forward(self.norm_ff(x)))


class Feedback(nn.Module):
    """Base class of both variants: layers, the mixture of their outputs into a memory, the final norm.

    Memory of a step: m = Σ_l softmax(w)_l · x^l over l = 0 … L, where x⁰ is the step's input; w starts as ones.
    `memory` M limits what a step sees to the last M of them.
    """

    shares_kv = False  # one key and one value projection for all layers

    def __init__(
        self,
        d_model: int,
        heads: int,
        d_ff: int,
        n_layers: int,
        dropout_prob: float = 0.0,
        *,
        memory: int | None = None,
    ):
        super().__init__()
        if memory is not None and memory < 1:
            raise ValueError(f"memory={memory} steps must be at least 1, or None for all")
        self.d_model = d_model
        self.memory = memory
        self.layers = nn.ModuleList(
            FeedbackTransformerLayer(
                FeedbackAttention(heads, d_model, dropout_prob, is_kv_precomputed=self.shares_kv),
                d_model,
                d_ff,
                dropout_prob,
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.weights = nn.Parameter(torch.ones(n_layers + 1))
        if self.shares_kv:
            self.key = HeadProjection(d_model, heads, d_model // heads, bias=False)
            self.value = HeadProjection(d_model, heads, d_model // heads, bias=False)

    # [feedback.step]
    def step(
        self, x: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step: x [B, D] -> the last layer's output and the step's memory, both [B, D]."""
        outputs = [x]
        for layer in self.layers:
            x = layer(x=x, key=key, value=value)
            outputs.append(x)
        return x, torch.einsum("lbd,l->bd", torch.stack(outputs), self.weights.softmax(dim=0))

    # [feedback.slots]
    def last(self, memories: list[torch.Tensor]) -> torch.Tensor | None:
        """Stack the memories that a step sees: [n, …]; None if there are none."""
        memories = memories if self.memory is None else memories[-self.memory :]
        return torch.stack(memories) if memories else None


class FeedbackTransformer(Feedback):
    """Each layer projects the memories to its own keys and values."""

    # [feedback.loop]
    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """[S, B, D] -> [S, B, D]."""
        outputs: list[torch.Tensor] = []
        memories: list[torch.Tensor] = []
        for x in x_seq:
            memory = self.last(memories)
            x, new = self.step(x, memory, memory)
            memories.append(new)
            outputs.append(x)
        return self.norm(torch.stack(outputs))


class FeedbackTransformerKV(Feedback):
    """All layers attend to the same keys and values, made by one key and one value projection without bias."""

    shares_kv = True

    # [feedback.loop]
    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """[S, B, D] -> [S, B, D]."""
        outputs: list[torch.Tensor] = []
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for x in x_seq:
            x, memory = self.step(x, self.last(keys), self.last(values))
            keys.append(self.key(memory))
            values.append(self.value(memory))
            outputs.append(x)
        return self.norm(torch.stack(outputs))


class AutoregressiveModel(nn.Module):
    """Token ids to logits of the next token, around either variant."""

    def __init__(self, n_vocab: int, transformer: Feedback):
        super().__init__()
        self.src_embed = nn.Embedding(n_vocab, transformer.d_model)
        self.transformer = transformer
        self.generator = nn.Linear(transformer.d_model, n_vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [S, B] int -> logits [S, B, V]."""
        return self.generator(self.transformer(self.src_embed(ids)))
