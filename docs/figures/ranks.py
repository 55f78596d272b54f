"""GPT-NeoX shards: how the tensors of two model-parallel ranks become those of four."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from docs.figures.style import BLUE, INK, ORANGE, SOFT, figure, save
from jaxmodels.convert.neox.layout import BLOCK, merged, split
from jaxmodels.neox import NeoXConfig
from jaxmodels.weights.lazy import values

CONFIG = NeoXConfig(n_vocab=10, n_hidden=8, n_layers=1, n_heads=4, rope_percentage=1.0)
BEFORE, AFTER = 2, 4
ROWS = {name.twin: name for name in BLOCK}
# Each number of a weight says which rank it comes from.
GIVEN = {
    "attention.qkv_lin.weight": [np.full((4, 4), float(rank)) for rank in range(BEFORE)],
    "attention.output.weight": [np.full((4, 4), float(rank)) for rank in range(BEFORE)],
    "attention.output.bias": [np.array([[1.0, 4, 3, 5]]), np.array([[3.0, 0, -7, 3]])],
    "pre_ln_attn.weight": [np.array([[1.0, 1, 1, 1]])] * BEFORE,
}
LABELS = {
    "attention.qkv_lin.weight": "query_key_value.weight\nrows",
    "attention.output.weight": "dense.weight\ncolumns",
    "attention.output.bias": "dense.bias\nshares of a sum",
    "pre_ln_attn.weight": "input_layernorm.weight\nreplicas",
}
COLORS = {0.0: BLUE, 1.0: ORANGE}


def draw_array(ax: Axes, x: float, y: float, array: np.ndarray, numbers: bool) -> None:
    """Draw an array with its upper left corner at (x, y): colors of ranks, or numbers."""
    if not numbers:
        for color in np.unique(array):
            i, j = np.nonzero(array == color)
            corner, size = (x + j.min(), y + i.min()), (float(np.ptp(j)) + 1, float(np.ptp(i)) + 1)
            ax.add_patch(Rectangle(corner, *size, fc=COLORS[color], alpha=0.75, ec=SOFT, lw=0.6))
        return
    for (i, j), value in np.ndenumerate(array):
        ax.add_patch(Rectangle((x + j, y + i), 1, 1, fill=False, ec=SOFT, lw=0.6))
        text = f"{value:g}".replace("-", "−")
        ax.text(x + j + 0.5, y + i + 0.55, text, ha="center", va="center", fontsize=8)


def draw() -> None:
    """Draw `ranks.svg`."""
    drawn = figure(9, 4.2)
    ax = drawn.subplots()
    y, places = 0.0, (0.0, 11.5, 22.5)
    for key, parts in GIVEN.items():
        name, numbers = ROWS[key], parts[0].shape[0] == 1
        tensors = [part[0] for part in parts] if numbers else parts
        whole = merged(name, tensors, "sum")
        after = [np.atleast_2d(values(part)) for part in split(name, values(whole), AFTER, CONFIG)]
        whole = np.atleast_2d(values(whole))
        height = max(len(whole), len(parts[0]))
        ax.text(-0.8, y + height / 2, LABELS[key], ha="right", va="center", fontsize=10)
        for place, arrays in zip(places, (parts, [whole], after), strict=True):
            x = place
            for array in arrays:
                draw_array(ax, x, y + (height - len(array)) / 2, array, numbers)
                x += array.shape[1] + 0.8
        y += height + 1.6
    for x, title in zip(places, ("2 ranks", "the model", "4 ranks"), strict=True):
        ax.text(x, -0.9, title, ha="left", va="center", fontsize=11, color=INK)
    ax.set(xlim=(-10.5, 42), ylim=(y, -1.6), aspect="equal")
    ax.axis("off")
    save(drawn, "ranks")


if __name__ == "__main__":
    draw()
