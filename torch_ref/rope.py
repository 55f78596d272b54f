"""Rotary position embeddings (arXiv 2104.09864) and the attentions that use them: on queries and keys, and on values.

Axes: S sequence, B batch, H heads, d_k features of a head, d ≤ d_k rotated features.
"""

from typing import Any

import torch
from torch import nn

from torch_ref.attention import MultiHeadAttention


# [rope.tables]
def rotary_tables(
    positions: torch.Tensor, d: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of m·θ_i for positions m of any shape [...] -> [..., d/2]; dtype float32 or wider."""
    theta = base ** (-torch.arange(0, d, 2, dtype=dtype, device=positions.device) / d)
    angle = positions.to(dtype)[..., None] * theta
    return angle.cos(), angle.sin()


# [rope.rotate]
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first d features of x [..., d_k] by cos/sin, which broadcast to [..., d/2]; leave the rest."""
    d = 2 * cos.shape[-1]
    x1, x2, rest = x.to(cos.dtype).tensor_split((d // 2, d), dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1).to(x.dtype)


class RotaryPositionalEmbeddings(nn.Module):
    """Rotates feature i together with feature i + d/2 by the angle m·θ_i, θ_i = base^(-2i/d), at position m.

    Only the first d features are rotated. The tables are float32, or wider if x is wider.
    """

    def __init__(self, d: int, base: int = 10_000):
        super().__init__()
        if d < 2 or d % 2:
            raise ValueError(f"d={d} rotated features: must be even and at least 2")
        self.d = d
        self.base = base

    # [rope.positions]
    def forward(self, x: torch.Tensor, offset: int = 0, inverse: bool = False) -> torch.Tensor:
        """x [S, B, H, d_k] -> the same shape; the first token stands at position `offset`; `inverse` rotates back."""
        if self.d > x.shape[-1]:
            raise ValueError(f"x has {x.shape[-1]} features, fewer than the d={self.d} rotated ones")
        positions = torch.arange(offset, offset + len(x), device=x.device)
        cos, sin = rotary_tables(positions, self.d, self.base, torch.promote_types(x.dtype, torch.float32))
        return rotate(x, cos[:, None, None], -sin[:, None, None] if inverse else sin[:, None, None])


def rotary_width(name: str, share: float, d_k: int) -> int:
    """Number of rotated features: int(d_k · share); raises ValueError if it is odd, zero or more than d_k."""
    d = int(d_k * share)
    if d < 2 or d % 2 or d > d_k:
        raise ValueError(
            f"{name}={share} rotates {d} of d_k={d_k} features; must be an even number from 2 to d_k = d_model / heads"
        )
    return d


class RotaryPEMultiHeadAttention(MultiHeadAttention):
    """Multi-head attention whose queries and keys are rotated by position, so that scores depend on distance alone."""

    def __init__(self, heads: int, d_model: int, rope_percentage: float = 0.5, dropout_prob: float = 0.0):
        super().__init__(heads, d_model, dropout_prob)
        d_rope = rotary_width("rope_percentage", rope_percentage, self.d_k)
        self.query_rotary_pe = RotaryPositionalEmbeddings(d_rope)
        self.key_rotary_pe = RotaryPositionalEmbeddings(d_rope)

    # [rope.attention]
    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int
    ) -> tuple[Any, Any, torch.Tensor]:
        query, key, value = super().project(query, key, value, offset)
        return self.query_rotary_pe(query, offset), self.key_rotary_pe(key, offset), value


class RotaryValuePEMultiHeadAttention(RotaryPEMultiHeadAttention):
    """RoPER: o_n = Σ_i a_ni R((i - n)θ) v_i. Values are rotated before the sum, the sum is rotated back."""

    def __init__(
        self,
        heads: int,
        d_model: int,
        rope_percentage: float = 0.5,
        rope_value_percentage: float = 0.5,
        dropout_prob: float = 0.0,
    ):
        super().__init__(heads, d_model, rope_percentage, dropout_prob)
        d_rope_value = rotary_width("rope_value_percentage", rope_value_percentage, self.d_k)
        self.value_rotary_pe = RotaryPositionalEmbeddings(d_rope_value)

    # [rope.values]
    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int
    ) -> tuple[Any, Any, torch.Tensor]:
        query, key, value = super().project(query, key, value, offset)
        return query, key, self.value_rotary_pe(value, offset)

    # [rope.values]
    def restore(self, x: torch.Tensor, offset: int) -> torch.Tensor:
        return self.value_rotary_pe(x, offset, inverse=True)
