"""Attention weights of synthesizers, each trained for some seconds on the same text."""

import pydoc_data.topics
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from docs.figures.style import BLUE, figure, heat, save
from jaxmodels.transformer import AutoregressiveTransformer

KINDS = ("fixed_random", "random", "dense", "factorized_dense", "vanilla")
LENGTH, BATCH, STEPS, HEADS = 24, 16, 600, 2


def trained(kind: str, ids: jax.Array, n_vocab: int) -> AutoregressiveTransformer:
    """A model of one layer after STEPS steps."""
    model = AutoregressiveTransformer(n_vocab, 64, HEADS, 128, 1, kind, max_len=LENGTH, rngs=nnx.Rngs(0))
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states
    optimizer = optax.adam(3e-3)

    def loss(params: nnx.State, text: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params, rest)(text[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[1:]).mean()

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        starts = jax.random.randint(key, (BATCH,), 0, len(ids) - LENGTH)
        value, gradient = jax.value_and_grad(loss)(params, ids[starts + jnp.arange(LENGTH + 1)[:, None]])
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(1), STEPS)
    (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys))(params)
    return nnx.merge(graphdef, params, rest)


def weights(model: AutoregressiveTransformer, text: jax.Array) -> np.ndarray:
    """softmax(B + mask) of the first layer for one text [S, 1], [H, S, S]."""
    layer = model.encoder.layers[0]
    z = layer.norm_self_attn(model.src_embed(text))
    query, key, _ = layer.self_attn.project(z, z, z, None)
    scores = layer.self_attn.get_scores(query, key, len(text), 0)[0]
    return np.asarray(jax.nn.softmax(jnp.where(jnp.tri(len(text), dtype=bool), scores, -jnp.inf)))


def draw() -> None:
    """Draw `synthesizer.svg`."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics))
    letters = sorted(set(text))
    ids = jnp.asarray([letters.index(c) for c in text])
    prose = re.search(rf"[a-z ]{{{LENGTH}}}", text)
    assert prose is not None
    start = prose.start()
    drawn = figure(9, 4.1)
    axes = drawn.subplots(HEADS, len(KINDS), sharex=True, sharey=True)
    for column, kind in zip(axes.T, KINDS, strict=True):
        model = trained(kind, ids, len(letters))
        for ax, head in zip(column, weights(model, ids[start : start + LENGTH, None]), strict=True):
            heat(ax, np.sqrt(head), BLUE, 1)
            ax.set_xticks([])
            ax.set_yticks([])
        column[0].set_title(kind.replace("_", " "), fontsize=11)
    for i, ax in enumerate(axes[:, 0]):
        ax.set_ylabel(f"head {i}")
    save(drawn, "synthesizer")


if __name__ == "__main__":
    draw()
