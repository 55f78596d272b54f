"""A pre-norm transformer encoder, sequence-first, and the small autoregressive language model made of it.

Axes: S sequence, B batch, D = d_model, V vocabulary.
"""

import torch
from torch import nn

from torch_ref.attention import Attention, MultiHeadAttention, RelativeMultiHeadAttention
from torch_ref.layers import FeedForward
from torch_ref.rope import RotaryPEMultiHeadAttention, RotaryValuePEMultiHeadAttention
from torch_ref.synthesizer import SynthesizerAttention


class TransformerLayer(nn.Module):
    """x ← x + drop(attn(LN x)), then x ← x + drop(FF(LN x))."""

    def __init__(self, self_attn: Attention, d_model: int, d_ff: int, dropout_prob: float = 0.1):
        super().__init__()
        self.self_attn = self_attn
        self.feed_forward = FeedForward(d_model, d_ff, dropout_prob)
        self.norm_self_attn = nn.LayerNorm(d_model)
        self.norm_ff = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout_prob)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, cache: dict | None = None) -> torch.Tensor:
        z = self.norm_self_attn(x)
        x = x + self.dropout(self.self_attn(query=z, key=z, value=z, mask=mask, cache=cache))
        return x + self.dropout(self.feed_forward(self.norm_ff(x)))


class Encoder(nn.Module):
    """Layers one after the other, then a LayerNorm."""

    def __init__(self, layers: list[TransformerLayer], d_model: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, cache: list[dict] | None = None) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, cache[i] if cache is not None else None)
        return self.norm(x)


class Generator(nn.Module):
    """Logits of the next token: [..., D] -> [..., V]."""

    def __init__(self, n_vocab: int, d_model: int):
        super().__init__()
        self.projection = nn.Linear(d_model, n_vocab)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x)


def make_attention(attention: str, heads: int, d_model: int, dropout_prob: float, max_len: int | None) -> Attention:
    """The attention that `AutoregressiveTransformer(attention=…)` names."""
    match attention:
        case "rotary":
            return RotaryPEMultiHeadAttention(heads, d_model, 1.0, dropout_prob)
        case "rotary_value":
            return RotaryValuePEMultiHeadAttention(heads, d_model, 1.0, 1.0, dropout_prob)
        case "relative":
            return RelativeMultiHeadAttention(heads, d_model, dropout_prob)
        case "plain":
            return MultiHeadAttention(heads, d_model, dropout_prob)
    if max_len is None:
        raise ValueError(
            f"attention={attention!r} is none of rotary, rotary_value, relative, plain; "
            "a kind of SynthesizerAttention needs max_len, the longest sequence its logits reach"
        )
    return SynthesizerAttention(attention, heads, d_model, max_len, dropout_prob)


class AutoregressiveTransformer(nn.Module):
    """Token ids to logits of the next token, each position seeing itself and what came before.

    attention: 'rotary' (over all of d_k), 'rotary_value' (RoPER), 'relative', 'plain' (no positions), or a kind of
    SynthesizerAttention, which needs max_len. The embedding is not scaled.
    """

    def __init__(
        self,
        n_vocab: int,
        d_model: int,
        heads: int,
        d_ff: int,
        n_layers: int,
        attention: str = "rotary",
        dropout_prob: float = 0.0,
        *,
        max_len: int | None = None,
    ):
        super().__init__()
        self.src_embed = nn.Embedding(n_vocab, d_model)
        layers = [
            TransformerLayer(
                make_attention(attention, heads, d_model, dropout_prob, max_len), d_model, d_ff, dropout_prob
            )
            for _ in range(n_layers)
        ]
        self.encoder = Encoder(layers, d_model)
        self.generator = Generator(n_vocab, d_model)

    # [attention.causal]
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [S, B] int -> logits [S, B, V]."""
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril()[:, :, None]
        return self.generator(self.encoder(self.src_embed(ids), mask))

    def init_cache(self) -> list[dict]:
        """An empty cache: one dict of keys and values per layer, filled by `decode`."""
        return [{} for _ in self.encoder.layers]

    def decode(self, ids: torch.Tensor, cache: list[dict]) -> torch.Tensor:
        """The logits [S, B, V] of S further tokens, appended to `cache` in place."""
        past = len(cache[0]["value"]) if cache[0] else 0
        causal = torch.ones(past + len(ids), past + len(ids), dtype=torch.bool, device=ids.device).tril()
        return self.generator(self.encoder(self.src_embed(ids), causal[past:, :, None], cache))
