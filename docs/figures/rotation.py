"""Rotary position embeddings: how pairs of features rotate, and the scores that follow."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.patches import Circle

from docs.figures.style import BLUE, COLORS, INK, SOFT, figure, save
from jaxmodels.rope import rotary_tables, rotate

D, BASE, POSITIONS = 8, 100, 8
FIRST = (0, 50, 1000)  # positions of the query


def pairs() -> np.ndarray:
    """The pairs (feature i, feature i + d/2) of one vector at each position [positions, pair, 2]."""
    x = jnp.concatenate([jnp.ones(D // 2), jnp.zeros(D // 2)])
    rotated = rotate(jnp.tile(x, (POSITIONS, 1)), *rotary_tables(jnp.arange(POSITIONS), D, BASE, jnp.float32))
    return np.stack(np.split(np.asarray(rotated), 2, axis=-1), axis=-1)


def scores(first: int, distances: np.ndarray) -> np.ndarray:
    """Product of one query at position `first` with one key that stands at each distance after it."""
    query, key = jax.random.normal(jax.random.key(1), (2, 16))
    query = rotate(query, *rotary_tables(jnp.int32(first), 16, BASE, jnp.float32))
    keys = rotate(
        jnp.broadcast_to(key, (len(distances), 16)),
        *rotary_tables(jnp.asarray(first + distances), 16, BASE, jnp.float32),
    )
    return np.asarray(keys @ query)


def draw() -> None:
    """Draw `rotation.svg`."""
    drawn = figure(9, 3.1)
    grid = drawn.add_gridspec(2, 4, width_ratios=(1, 1, 0.12, 2.6))
    vectors = pairs()
    for i in range(D // 2):
        ax = drawn.add_subplot(grid[i // 2, i % 2])
        ax.add_patch(Circle((0, 0), 1, fill=False, color=SOFT, lw=0.6))
        for m, (a, b) in enumerate(vectors[:, i]):
            shade = 1 - 0.8 * m / (POSITIONS - 1)
            ax.plot([0, a], [0, b], color=COLORS[i], lw=1.8, alpha=shade)
            ax.plot(a, b, "o", ms=3.5, color=COLORS[i], alpha=shade)
        ax.set_title(f"features {i} and {i + D // 2}", fontsize=10)
        ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        ax.axis("off")
    ax = drawn.add_subplot(grid[:, 3])
    distances = np.arange(61)
    for first, marker, size in zip(FIRST, ("-", "o", "x"), (0, 6, 4), strict=True):
        step = 1 if marker == "-" else 3
        ax.plot(
            distances[::step],
            scores(first, distances)[::step],
            marker,
            ms=size,
            mfc="none",
            color=BLUE if marker == "-" else INK,
            label=f"query at {first:,}",
            lw=1.5,
        )
    ax.set_xlabel("distance from query to key")
    ax.set_ylabel("score")
    ax.legend(fontsize=10, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    save(drawn, "rotation")


if __name__ == "__main__":
    draw()
