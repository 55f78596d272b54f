"""The Synthesizer family (arXiv 2005.00743): attention whose logits need no query-key products.

Axes: S queries, N keys, n tokens, B batch, H heads, D = d_model = H·d_k, l = max_len, k rank of a factorisation.
"""

import math
from typing import Any

import torch
from torch import nn

from torch_ref.attention import Attention
from torch_ref.layers import HeadProjection

RANK = 8  # k of factorized random, as in the paper


class DenseSynthesizer(nn.Module):
    """Y = softmax(B) V with B = W₂ relu(W₁ x + b₁) + b₂ for each token; W₁ d -> d, W₂ d -> l; single head.

    For n < l tokens the logits are cut to n × n before the softmax.
    """

    def __init__(self, max_len: int, d_model: int):
        super().__init__()
        self.max_len = max_len
        self.linear1 = nn.Linear(d_model, d_model)
        self.linear2 = nn.Linear(d_model, max_len)

    # [synthesizer.dense]
    def forward(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """x and v [..., n, d] -> [..., n, d]."""
        n = x.shape[-2]
        check_length(n, self.max_len)
        logits = self.linear2(torch.relu(self.linear1(x)))
        return logits[..., :n].softmax(dim=-1) @ v


def check_length(n: int, max_len: int) -> None:
    if n > max_len:
        raise ValueError(f"a sequence of {n} tokens is longer than max_len={max_len}")


class DenseLogits(nn.Module):
    """F(x) = W₂ relu(W₁ x + b₁) + b₂ by head; W₁ D -> H·d_k, W₂ [H, d_k, l]."""

    def __init__(self, heads: int, d_model: int, size: int):
        super().__init__()
        d_k = d_model // heads
        self.hidden = HeadProjection(d_model, heads, d_k, bias=True)
        bound = 1 / math.sqrt(d_k)
        self.projection = nn.Parameter(torch.empty(heads, d_k, size).uniform_(-bound, bound))
        self.projection_bias = nn.Parameter(torch.empty(heads, size).uniform_(-bound, bound))

    # [synthesizer.heads]
    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """x [S, B, D] -> [S, B, H, size]."""
        hidden = torch.relu(self.hidden(x))
        return torch.einsum("sbhd,hdl->sbhl", hidden, self.projection) + self.projection_bias


class RandomLogits(nn.Module):
    """A table R [H, l, l] that no token enters; trainable, or fixed: then a buffer."""

    def __init__(self, heads: int, max_len: int, trainable: bool):
        super().__init__()
        table = torch.randn(heads, max_len, max_len)
        if trainable:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    # [synthesizer.random]
    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        rows = self.table[:, offset : offset + len(x)]  # [H, S, l]
        return rows.transpose(0, 1)[:, None].expand(-1, x.shape[1], -1, -1)


class FactorizedDenseLogits(nn.Module):
    """Two short vectors by token, A ∈ R^a and C ∈ R^b; logits B[p·b + q] = A[p]·C[q], cut to l."""

    def __init__(self, heads: int, d_model: int, max_len: int, factors: tuple[int, int] | None):
        super().__init__()
        a, b = factors or default_factors(max_len)
        if a < 1 or b < 1 or a * b < max_len:
            raise ValueError(f"factors={(a, b)} give {a * b} logits, fewer than max_len={max_len}")
        self.max_len = max_len
        self.factor_a = DenseLogits(heads, d_model, a)
        self.factor_c = DenseLogits(heads, d_model, b)

    # [synthesizer.factorized]
    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        outer = self.factor_a(x)[..., :, None] * self.factor_c(x)[..., None, :]
        return outer.flatten(-2)[..., : self.max_len]


# [synthesizer.factorized]
def default_factors(max_len: int) -> tuple[int, int]:
    """a = ⌈√l⌉, b = ⌈l/a⌉."""
    a = math.isqrt(max_len - 1) + 1
    return a, -(-max_len // a)


class FactorizedRandomLogits(nn.Module):
    """R₁R₂ᵀ by head, both [H, l, k] and trainable; the product has unit variance at the start."""

    def __init__(self, heads: int, max_len: int):
        super().__init__()
        self.left = nn.Parameter(torch.randn(heads, max_len, RANK) * RANK**-0.25)
        self.right = nn.Parameter(torch.randn(heads, max_len, RANK) * RANK**-0.25)

    # [synthesizer.factorized]
    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        rows = torch.einsum("hsk,hlk->shl", self.left[:, offset : offset + len(x)], self.right)
        return rows[:, None].expand(-1, x.shape[1], -1, -1)


class SynthesizerAttention(Attention):
    """Multi-head attention with synthesized logits: softmax(B + mask) V.

    `kind` is one of dense, random, fixed_random, factorized_dense, factorized_random, vanilla (QKᵀ/√d_k), or a sum of
    several ('random+dense'), whose logits are added with weights softmax([α, 0]): σ(α) and 1 - σ(α) for two parts,
    α zero-initialised.
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
    ):
        super().__init__(heads, d_model, dropout_prob)
        self.kind = kind
        self.max_len = max_len
        makers = {
            "dense": lambda: DenseLogits(heads, d_model, max_len),
            "random": lambda: RandomLogits(heads, max_len, trainable=True),
            "fixed_random": lambda: RandomLogits(heads, max_len, trainable=False),
            "factorized_dense": lambda: FactorizedDenseLogits(heads, d_model, max_len, factors),
            "factorized_random": lambda: FactorizedRandomLogits(heads, max_len),
        }
        self.parts = kind.split("+")
        if len(set(self.parts)) < len(self.parts) or not {*self.parts} <= {*makers, "vanilla"}:
            allowed = ", ".join([*makers, "vanilla"])
            raise ValueError(f"kind={kind!r} must be one of {allowed}, or a sum of different ones such as random+dense")
        for part in self.parts:
            if part != "vanilla":
                setattr(self, part, makers[part]())
        if "vanilla" in self.parts:
            self.query = HeadProjection(d_model, heads, self.d_k, bias=True)
            self.key = HeadProjection(d_model, heads, self.d_k, bias=True)
        if len(self.parts) > 1:
            self.alpha = nn.Parameter(torch.zeros(len(self.parts) - 1))

    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int
    ) -> tuple[Any, Any, torch.Tensor]:
        check_length(offset + max(len(query), len(value)), self.max_len)
        rows = [None if part == "vanilla" else getattr(self, part)(query, offset) for part in self.parts]
        vanilla = "vanilla" in self.parts
        projected = (self.query(query), rows) if vanilla else (None, rows)
        return projected, self.key(key) if vanilla else None, self.value(value)

    # [synthesizer.mixture]
    def get_scores(self, query: Any, key: Any, value: torch.Tensor) -> torch.Tensor:
        query, rows = query
        logits = []
        for row in rows:
            if row is None:
                logits.append(torch.einsum("ibhd,jbhd->ijbh", query, key) * self.scale)
            else:
                logits.append(row[..., : len(value)].permute(0, 3, 1, 2))
        if len(logits) == 1:
            return logits[0]
        weights = torch.cat([self.alpha, self.alpha.new_zeros(1)]).softmax(dim=0)
        return sum(w * b for w, b in zip(weights, logits, strict=True))
