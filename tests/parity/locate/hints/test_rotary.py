"""Hints: the known mistakes made in PyTorch's sub-module."""

import torch
from torch import nn

from parity.locate.hints.rotary import interleaved


def apply_rotary_pos_emb(q, k, cos, sin):
    """As in transformers: rotates the two halves."""

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    return rotate(q), rotate(k)


class Attention(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, *args):
        return self.attention(*args)


def test_rotary_features_are_rearranged_once_for_any_number_of_modules_in_a_file():
    q, k = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    angle = torch.rand(5, 3, dtype=torch.float64)
    cos, sin = (torch.cat([table, table], dim=-1) for table in (angle.cos(), angle.sin()))
    expected = torch.empty_like(q)
    expected[..., ::2] = q[..., ::2] * angle.cos() - q[..., 1::2] * angle.sin()
    expected[..., 1::2] = q[..., 1::2] * angle.cos() + q[..., ::2] * angle.sin()
    for module in (Attention(), Layer()):
        with interleaved(split=True)(module):
            mistaken, _ = module(q, k, cos, sin)
        torch.testing.assert_close(mistaken, expected)
        torch.testing.assert_close(module(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin))
