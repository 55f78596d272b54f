"""Relative attention: scores by table row become scores by key with a pad and a reshape."""

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from docs.figures.style import BLUE, INK, ORANGE, SOFT, figure, save
from jaxmodels.attention import shear

S, N = 4, 6  # queries are the last of the keys


def cells(ax: Axes, distances: np.ndarray, used: np.ndarray, title: str) -> None:
    """Draw a matrix of distances; orange: used, and at or before the query."""
    for (i, j), distance in np.ndenumerate(distances):
        color = SOFT if not used[i, j] else BLUE if distance < 0 else ORANGE
        if used[i, j]:
            ax.add_patch(Rectangle((j, i), 1, 1, fc=color, ec="none", alpha=0.35))
        ax.add_patch(Rectangle((j, i), 1, 1, fill=False, ec=SOFT, lw=0.8))
        ax.text(
            j + 0.5,
            i + 0.52,
            f"{distance}".replace("-", "−"),
            ha="center",
            va="center",
            fontsize=11,
            color=INK if used[i, j] else SOFT,
        )
    ax.set(xlim=(0, distances.shape[1]), ylim=(S, 0), aspect="equal")
    ax.set_yticks(np.arange(S) + 0.5, [f"query {i}" for i in range(S)])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=11)


def draw() -> None:
    """Draw `shear.svg`."""
    width = S + N - 1
    rows = jnp.broadcast_to(N - 1 - jnp.arange(width), (S, width))  # the distance that each table row stands for
    columns = jnp.broadcast_to(jnp.arange(width), (S, width))
    kept = np.asarray(shear(columns, N))  # which columns are left, by key
    used = np.stack([np.isin(np.arange(width), row) for row in kept])
    drawn = figure(9, 2.6)
    left, right = drawn.subplots(1, 2, width_ratios=(width, N))
    cells(left, np.asarray(rows), used, f"product with {width} table rows, by distance")
    cells(right, np.asarray(shear(rows, N)), np.ones((S, N), bool), f"after the shear: {N} keys")
    save(drawn, "shear")


if __name__ == "__main__":
    draw()
