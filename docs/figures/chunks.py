"""RETRO: the positions that the neighbors of each chunk reach, found by changing them."""

import jax
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from docs.figures.style import COLORS, INK, SOFT, figure, save
from jaxmodels.retro import NearestNeighborEncoder, RetroModel
from jaxmodels.retro.attention import ChunkedCrossAttention

L, S, N, M, D = 4, 19, 2, 6, 16
C = S // L


def reached_by_attention() -> np.ndarray:
    """True where chunked cross-attention changes if the neighbors of a chunk do, [C, S]."""
    attention = ChunkedCrossAttention(D, 2, 8, L, rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(0), (1, S, D))
    e = jax.random.normal(jax.random.key(1), (1, C, N, M, D))
    attend = jax.jit(lambda e: attention(h, e))
    changed = [attend(e.at[:, u].add(1.0)) - attend(e) for u in range(C)]
    return np.abs(np.stack(changed)[:, 0]).max(axis=-1) > 0


def reached_by_model() -> np.ndarray:
    """True where the logits of a model of three layers change if the neighbors of a chunk do, [C, S]."""
    rngs = nnx.Rngs(0)
    encoder = NearestNeighborEncoder(L, 1, {0}, D, 2, 8, 32, rngs=rngs)
    model = RetroModel(11, D, 3, {1}, L, 2, 8, 32, encoder, rngs=rngs)
    ids = jax.random.randint(jax.random.key(2), (1, S), 0, 11)
    ret = jax.random.randint(jax.random.key(3), (1, C, N, M), 0, 11)
    logits = jax.jit(lambda ret: model(ids, ret))
    changed = [logits(ret.at[:, u].set((ret[:, u] + 1) % 11)) - logits(ret) for u in range(C)]
    return np.abs(np.stack(changed)[:, 0]).max(axis=-1) > 1e-5


def rows(ax: Axes, reached: np.ndarray, title: str) -> None:
    """Draw the text in chunks, and a row for each chunk's neighbors."""
    for position in range(S):
        chunk = position // L
        color = COLORS[chunk] if chunk < C else SOFT
        ax.add_patch(Rectangle((position, -1.5), 0.92, 0.9, fc=color, alpha=0.35, ec="none"))
        ax.text(position + 0.46, -1.04, f"{position}", ha="center", va="center", fontsize=9)
    for (u, position), is_reached in np.ndenumerate(reached):
        fill = {"fc": COLORS[u]} if is_reached else {"fill": False}
        ax.add_patch(Rectangle((position, u), 0.92, 0.9, ec=COLORS[u] if is_reached else SOFT, lw=0.6, **fill))
    ax.set(xlim=(0, S), ylim=(C + 0.1, -1.6))
    ax.set_yticks([-1.05, *(u + 0.45 for u in range(C))], ["position", *(f"neighbors of chunk {u}" for u in range(C))])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=11, color=INK)


def draw() -> None:
    """Draw `chunks.svg`."""
    drawn = figure(9, 2.4)
    left, right = drawn.subplots(1, 2, sharey=True)
    rows(left, reached_by_attention(), "chunked cross-attention")
    rows(right, reached_by_model(), "logits of the whole model")
    right.tick_params(labelleft=False)
    save(drawn, "chunks")


if __name__ == "__main__":
    draw()
