"""Multi-head attention, sequence-first, in the three forms that add no positions or learned relative ones.

Axes: S queries, N keys, B batch, H heads, D = d_model = H·d_k features.
In einsums: i query, j key, b batch, h head, d feature.
"""

import math
from typing import Any

import torch
from torch import nn

from torch_ref.layers import HeadProjection


class Attention(nn.Module):
    """Base class of the attentions: scores -> mask -> softmax over keys -> dropout -> weighted values -> output.

    A subclass fills `project` (tokens to per-head queries, keys and values) and `get_scores`.
    """

    def __init__(self, heads: int, d_model: int, dropout_prob: float):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"d_model={d_model} is not divisible by heads={heads}")
        self.heads = heads
        self.d_k = d_model // heads
        self.value = HeadProjection(d_model, heads, self.d_k, bias=True)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout_prob)
        self.scale = 1 / math.sqrt(self.d_k)

    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int
    ) -> tuple[Any, Any, torch.Tensor]:
        """Queries, keys and values by head, as `get_scores` takes them; `offset`: position of the first token."""
        raise NotImplementedError

    def get_scores(self, query: Any, key: Any, value: torch.Tensor) -> torch.Tensor:
        """Logits [S, N, B, H] before the mask."""
        raise NotImplementedError

    def restore(self, x: torch.Tensor, offset: int) -> torch.Tensor:
        """Undo what `project` did to the values, on the weighted sum [S, B, H, d_k]; the identity by default."""
        return x

    def forward(
        self,
        *,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """query [S, B, D], key and value [N, B, D] -> [S, B, D].

        mask [S or 1, N, 1 or B] bool, True = may attend. `cache` is a dict that keeps this layer's keys
        and values between calls: the tokens given are appended to it, and all of it is attended to.
        """
        # [attention.cache]
        offset = len(cache["value"]) if cache else 0
        query, key, value = self.project(query, key, value, offset)
        if cache is not None:
            if cache:
                key = None if key is None else torch.cat([cache["key"], key])
                value = torch.cat([cache["value"], value])
            cache.update(key=key, value=value)

        # [attention.softmax]
        scores = self.get_scores(query, key, value)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-1), float("-inf"))
        attn = self.dropout(scores.softmax(dim=1))
        x = self.restore(torch.einsum("ijbh,jbhd->ibhd", attn, value), offset)
        return self.output(x.reshape(*x.shape[:2], -1))


class MultiHeadAttention(Attention):
    """softmax(QKᵀ/√d_k) V over H heads; value and output always have a bias, `bias` is the query's and the key's."""

    def __init__(self, heads: int, d_model: int, dropout_prob: float = 0.1, bias: bool = True):
        super().__init__(heads, d_model, dropout_prob)
        self.query = HeadProjection(d_model, heads, self.d_k, bias=bias)
        self.key = HeadProjection(d_model, heads, self.d_k, bias=bias)

    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int
    ) -> tuple[Any, Any, torch.Tensor]:
        return self.query(query), self.key(key), self.value(value)

    # [attention.scores]
    def get_scores(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ibhd,jbhd->ijbh", query, key) * self.scale


class RelativeMultiHeadAttention(MultiHeadAttention):
    """Attention with learned relative positions (Transformer-XL, arXiv 1901.02860).

    score(i, j) = (q_i + u)·k_j + q_i·E[P - distance] + b[P - distance], times d_k^-½, where distance = i - j and the
    queries stand at the end of the keys. Tables of 2P rows, zero-initialised.
    """

    P = 2**12

    def __init__(self, heads: int, d_model: int, dropout_prob: float = 0.1):
        super().__init__(heads, d_model, dropout_prob, bias=False)
        self.key_pos_embeddings = nn.Parameter(torch.zeros(2 * self.P, heads, self.d_k))
        self.key_pos_bias = nn.Parameter(torch.zeros(2 * self.P, heads))
        self.query_pos_bias = nn.Parameter(torch.zeros(heads, self.d_k))

    def get_scores(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        s, n = len(query), len(key)
        if n > self.P:
            raise ValueError(f"{n} keys given, but the relative position tables reach back {self.P} at most")
        # [relative.rows]
        device = query.device
        distance = torch.arange(n - s, n, device=device)[:, None] - torch.arange(n, device=device)[None, :]
        row = self.P - distance  # [S, N]
        # [relative.scores]
        content = torch.einsum("ibhd,jbhd->ijbh", query + self.query_pos_bias, key)
        position = torch.einsum("ibhd,ijhd->ijbh", query, self.key_pos_embeddings[row])
        return (content + position + self.key_pos_bias[row][:, :, None, :]) * self.scale
