"""GPT-NeoX (arXiv 2204.06745), batch-first, with the attribute names of the original's layers.

Axes: B batch, S sequence, H heads, K heads of keys and values, D = n_hidden = H·d_k features, F hidden features of the
feed-forward network, V vocabulary. In einsums: b batch, i query, j key, h head, d feature. A config is any object with
the fields of `jaxmodels.neox.NeoXConfig`.
"""

import math
from typing import Any

import torch
from torch import nn

from torch_ref.rope import rotary_tables, rotary_width, rotate


class Embedding(nn.Module):
    """ids [B, S] -> [B, S, D]."""

    def __init__(self, config: Any):
        super().__init__()
        self.emb = nn.Embedding(config.n_vocab, config.n_hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.emb(ids)


def norm(config: Any) -> nn.Module:
    """LayerNorm, or RMSNorm: x / √(mean x² + ε) times a weight."""
    kind = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[config.norm]
    return kind(config.n_hidden, eps=config.layer_norm_eps)


class Attention(nn.Module):
    """Rotary attention over H heads; H/K of them share each of the K heads of keys and values.

    In `qkv_lin`'s output each of the K keys lies after the queries that share it and before its value.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.d_k = config.n_hidden // config.n_heads
        self.kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
        self.group = config.n_heads // self.kv_heads
        self.d_rope = rotary_width("rope_percentage", config.rope_percentage, self.d_k)
        self.base = config.rope_base
        d_qkv = config.n_hidden + 2 * self.kv_heads * self.d_k
        self.qkv_lin = nn.Linear(config.n_hidden, d_qkv, bias=config.attention_bias)
        self.output = nn.Linear(config.n_hidden, config.n_hidden, bias=config.attention_bias)

    # [neox.attention]
    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [B, S, D], positions [B, S], mask [B, S, S] (True = may attend) -> [B, S, D]."""
        qkv = self.qkv_lin(x).unflatten(-1, (self.kv_heads, self.group + 2, self.d_k))  # [B, S, K, H/K + 2, d_k]
        q, k, v = (a.flatten(2, 3) for a in qkv.split((self.group, 1, 1), dim=3))  # [B, S, H or K, d_k]
        k, v = (a.repeat_interleave(self.group, dim=2) for a in (k, v))  # [B, S, H, d_k]
        cos, sin = rotary_tables(positions, self.d_rope, self.base, torch.promote_types(x.dtype, torch.float32))
        q, k = (rotate(a, cos[:, :, None], sin[:, :, None]) for a in (q, k))
        dtype = torch.promote_types(x.dtype, torch.float32)  # the largest float16 is 65,504
        scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype), k.to(dtype)) / math.sqrt(self.d_k)
        weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(dim=-1).to(x.dtype)
        return self.output(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class FeedForward(nn.Module):
    """W₂ gelu(W₁ x + b₁) + b₂."""

    def __init__(self, config: Any):
        super().__init__()
        width = 4 * config.n_hidden if config.n_ff is None else config.n_ff
        self.dense_h_h4 = nn.Linear(config.n_hidden, width, bias=config.ffn_bias)
        self.dense_h4_h = nn.Linear(width, config.n_hidden, bias=config.ffn_bias)
        self.approximate = {"gelu": "none", "gelu_tanh": "tanh"}[config.activation]

    # [neox.ffn]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_h4_h(nn.functional.gelu(self.dense_h_h4(x), approximate=self.approximate))


class Block(nn.Module):
    """x + attn(LN₁ x) + ffn(LN₂ x); with the sequential residual x ← x + attn(LN₁ x), then x + ffn(LN₂ x)."""

    def __init__(self, config: Any):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.pre_ln_attn = norm(config)
        self.pre_ln_ffn = norm(config)
        self.attention = Attention(config)
        self.ffn = FeedForward(config)

    # [neox.block]
    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attended = self.attention(self.pre_ln_attn(x), positions, mask)
        if self.parallel_residual:
            return x + (attended + self.ffn(self.pre_ln_ffn(x)))
        x = x + attended
        return x + self.ffn(self.pre_ln_ffn(x))


class FinalNorm(nn.Module):
    """The last norm."""

    def __init__(self, config: Any):
        super().__init__()
        self.ln = norm(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln(x)


class Readout(nn.Module):
    """[B, S, D] -> logits [B, S, V], without a bias."""

    def __init__(self, config: Any):
        super().__init__()
        self.linear = nn.Linear(config.n_hidden, config.n_vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class NeoX(nn.Module):
    """Token ids to logits of the next token; tied, the readout is the embedding's table."""

    def __init__(self, config: Any):
        super().__init__()
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = FinalNorm(config)
        if not config.tied:
            self.readout = Readout(config)
        self.tied = config.tied
        self.initialise(config)

    @torch.no_grad()
    def initialise(self, config: Any) -> None:
        """N(0, √(2/5D)), for what writes into the residual stream N(0, 2/(L·√D)); biases 0."""
        wide, narrow = math.sqrt(2 / (5 * config.n_hidden)), 2 / (config.n_layers * math.sqrt(config.n_hidden))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                parameter.normal_(std=narrow if "attention.output" in name or "dense_h4_h" in name else wide)

    # [neox.model]
    def forward(self, ids: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """ids [B, S] -> logits [B, S, V]; start [B] counts left padding, where logits are 0."""
        s = torch.arange(ids.shape[1], device=ids.device)
        start = torch.zeros(len(ids), dtype=torch.long, device=ids.device) if start is None else start
        text = s >= start[:, None]  # [B, S]
        causal = s[:, None] >= s
        mask = (causal & text[:, None]) | (s[:, None] == s)  # padding attends to itself, so that its softmax is finite
        positions = (s - start[:, None]).clamp(min=0)
        x = self.embedding(torch.where(text, ids, 0))
        for layer in self.layers:
            x = layer(x, positions, mask)
        x = self.final_norm(x).masked_fill(~text[:, :, None], 0)
        return nn.functional.linear(x, self.embedding.emb.weight) if self.tied else self.readout(x)
