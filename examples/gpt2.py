"""A port of GPT-2 checked against transformers: `python examples/gpt2.py`; `--bug` restores its first bug.

The port has its own names, separate projections for query, key and value instead of transformers' fused one, and no
readout of its own, because that is tied to the embedding. Weights are random: nothing is downloaded.

Axes: B batch, S sequence, H heads, D = H·d_k features, V vocabulary.
"""

import argparse
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import parity

HEADS, WIDTH, LAYERS, VOCABULARY, LONGEST = 3, 3 * 8, 2, 37, 64


class Embed(nnx.Embed):
    """ids [...] -> [..., D], in the table's dtype; nnx.Embed returns the dtype it was constructed with."""

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]


class Attention(nnx.Module):
    """Causal attention, [B, S, D] -> [B, S, D]."""

    def __init__(self, *, rngs: nnx.Rngs):
        def project() -> nnx.LinearGeneral:
            return nnx.LinearGeneral(WIDTH, (HEADS, WIDTH // HEADS), rngs=rngs)

        self.query, self.key, self.value = project(), project(), project()
        self.out = nnx.LinearGeneral((HEADS, WIDTH // HEADS), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self.query(x), self.key(x), self.value(x)  # [B, S, H, d_k]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + down(gelu(up(norm(x))))."""

    def __init__(self, norm: Callable[..., nnx.LayerNorm], *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = norm(rngs=rngs), norm(rngs=rngs)
        self.attention = Attention(rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        hidden = jax.nn.gelu(self.up(self.norm2(x)), approximate=True)  # GPT-2's "gelu_new" is the tanh approximation
        return x + self.down(hidden)


class GPT2(nnx.Module):
    """ids [B, S] -> logits [B, S, V]."""

    def __init__(self, bug: bool, *, rngs: nnx.Rngs):
        def norm(rngs: nnx.Rngs) -> nnx.LayerNorm:
            if bug:  # Flax's default epsilon, 1e-6
                return nnx.LayerNorm(WIDTH, rngs=rngs)
            return nnx.LayerNorm(WIDTH, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

        self.embed = Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = Embed(LONGEST, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(norm, rngs=rngs) for _ in range(LAYERS)])
        self.norm = norm(rngs=rngs)

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


# PyTorch names to Flax names. `*` matches one word; a list splits a fused tensor; the tied readout needs no entry.
NAMES = {
    "model.transformer.wte": "embed",
    "model.transformer.wpe": "positions",
    "model.transformer.h.*": "blocks.*",
    "model.transformer.h.*.ln_1": "blocks.*.norm1",
    "model.transformer.h.*.ln_2": "blocks.*.norm2",
    "model.transformer.h.*.attn": "blocks.*.attention",
    "model.transformer.h.*.attn.c_attn": [f"blocks.*.attention.{name}" for name in ("query", "key", "value")],
    "model.transformer.h.*.attn.c_proj": "blocks.*.attention.out",
    "model.transformer.h.*.mlp.c_fc": "blocks.*.up",
    "model.transformer.h.*.mlp.c_proj": "blocks.*.down",
    "model.transformer.ln_f": "norm",
}


def main(argv: list[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument(
        "--bug", action="store_true", help="use Flax's default epsilon in the norms: the port's first bug"
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
