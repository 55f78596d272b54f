"""A port of GPT-2 checked against transformers: `python examples/gpt2.py`; `--bug NAME` restores one of its bugs.

The port has its own names, and no readout of its own, because that is tied to the embedding. Query, key and value are
one fused projection, as in transformers. Weights are random: nothing is downloaded.

Axes: B batch, S sequence, H heads, D = H·d_k features, V vocabulary.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import parity

HEADS, WIDTH, LAYERS, VOCABULARY, LONGEST = 3, 3 * 8, 2, 37, 64


class Attention(nnx.Module):
    """Causal attention, [B, S, D] -> [B, S, D]."""

    def __init__(self, bug: str, *, rngs: nnx.Rngs):
        self.bug = bug
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, s, _ = x.shape
        if self.bug == "heads":  # as GPT-NeoX has it: query, key and value of one head after the other
            q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, s, HEADS, 3, -1), 3, 0)
        else:
            q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, s, 3, HEADS, -1), 2, 0)  # each [B, S, H, d_k]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, s, WIDTH))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + down(gelu(up(norm(x))))."""

    def __init__(self, bug: str, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = norm(bug, rngs), norm(bug, rngs)
        self.attention = Attention(bug, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        hidden = jax.nn.gelu(self.up(self.norm2(x)), approximate=True)  # GPT-2's "gelu_new" is the tanh approximation
        return x + self.down(hidden)


def norm(bug: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """The norm; Flax's default epsilon is 1e-6."""
    return nnx.LayerNorm(WIDTH, rngs=rngs) if bug == "norm" else nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)


class GPT2(nnx.Module):
    """ids [B, S] -> logits [B, S, V]."""

    def __init__(self, bug: str = "", *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LONGEST, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(bug, rngs=rngs) for _ in range(LAYERS)])
        self.norm = norm(bug, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids) + self.positions(jnp.arange(ids.shape[1])[None])
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.embedding[...].T


class Logits(torch.nn.Module):
    """transformers' model, returning only logits, as the Flax model does."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LONGEST,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            bos_token_id=None,
            eos_token_id=None,
        )
        config.use_cache = False
        self.model = GPT2LMHeadModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


# PyTorch names to Flax names. `*` matches one word; the tied readout needs no entry.
NAMES = {
    "model.transformer.wte": "embed",
    "model.transformer.wpe": "positions",
    "model.transformer.h.*": "blocks.*",
    "model.transformer.h.*.ln_1": "blocks.*.norm1",
    "model.transformer.h.*.ln_2": "blocks.*.norm2",
    "model.transformer.h.*.attn": "blocks.*.attention",
    "model.transformer.h.*.attn.c_attn": "blocks.*.attention.qkv",
    "model.transformer.h.*.attn.c_proj": "blocks.*.attention.out",
    "model.transformer.h.*.mlp.c_fc": "blocks.*.up",
    "model.transformer.h.*.mlp.c_proj": "blocks.*.down",
    "model.transformer.ln_f": "norm",
}


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument(
        "--bug",
        choices=("heads", "norm"),
        default="",
        help="heads: split the fused projection head by head; norm: use Flax's default epsilon",
    )
    arguments.add_argument(
        "--suggest", action="store_true", help="print the mapping of names that parity.suggest infers, and exit"
    )
    options = arguments.parse_args(argv)
    torch.manual_seed(0)
    theirs, ours = Logits(), GPT2(options.bug, rngs=nnx.Rngs(0))
    if options.suggest:
        print(parity.suggest(theirs, ours))
        return 0
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 30))
    report = parity.check(theirs, ours, {"ids": ids[:, :-1]}, names=NAMES, labels=ids[:, 1:], steps=3, name="GPT-2")
    print(report)
    if report.divergence:
        print(report.divergence.tree())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
