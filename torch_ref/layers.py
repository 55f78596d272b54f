"""Layers that several systems share: the projection to heads and the feed-forward network."""

import torch
from torch import nn


class HeadProjection(nn.Module):
    """Linear map to H heads: [..., D] -> [..., H, d_k]."""

    def __init__(self, d_model: int, heads: int, d_k: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(d_model, heads * d_k, bias=bias)
        self.heads = heads
        self.d_k = d_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).view(*x.shape[:-1], self.heads, self.d_k)


class FeedForward(nn.Module):
    """W₂ drop(relu(W₁ x + b₁)) + b₂."""

    def __init__(self, d_model: int, d_ff: int, dropout_prob: float = 0.1):
        super().__init__()
        self.layer1 = nn.Linear(d_model, d_ff)
        self.layer2 = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.dropout(torch.relu(self.layer1(x))))
