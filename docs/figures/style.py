"""Look of all figures: colors that follow the page's light or dark scheme, small SVG files with real text."""

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[1] / "annotated" / "figures"
INK, SOFT, BACK = "#24292f", "#6e7781", "#ffffff"  # replaced by the page's own colors
BLUE, ORANGE, GREEN, PURPLE = "#3b82f6", "#d97706", "#0f9d6e", "#a855f7"  # 3:1 at least on both backgrounds
COLORS = (BLUE, ORANGE, GREEN, PURPLE)
VARIABLES = {INK: "--figure-ink", SOFT: "--figure-soft", BACK: "--figure-back"}
DARK = "--figure-ink: #e6edf3; --figure-soft: #9da7b3; --figure-back: #1e2129"

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def figure(width: float, height: float) -> Figure:
    """A new figure of this size in inches, with the settings of all."""
    mpl.rcParams.update(SETTINGS)  # type: ignore[arg-type]
    return Figure(figsize=(width, height), layout="constrained")


def heat(ax: Axes, values: np.ndarray, color: str, largest: float | None = None) -> None:
    """Draw a matrix: a color whose opacity is the value over the largest, so that it suits any background."""
    shade = np.clip(np.asarray(values) / (values.max() if largest is None else largest), 0, 1)
    image = np.concatenate([np.broadcast_to(to_rgb(color), (*shade.shape, 3)), shade[..., None]], axis=-1)
    ax.imshow(image, interpolation="none", aspect="equal")
    ax.spines[["top", "right"]].set_visible(True)
    ax.tick_params(length=2)


def arrow(color: str, width: float = 1.2) -> dict[str, Any]:
    """Arguments `arrowprops` of an arrow."""
    return {
        "arrowstyle": "-|>,head_width=0.2,head_length=0.35",
        "color": color,
        "lw": width,
        "shrinkA": 0,
        "shrinkB": 0,
    }


def save(drawn: Figure, name: str, folder: Path = FOLDER) -> Path:
    """Write a figure to NAME.svg in a folder; the same arrays give the same bytes."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.svg"
    with mpl.rc_context({"svg.hashsalt": name}):
        drawn.savefig(file, transparent=True, metadata={"Date": None})
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"(font: [^;\"]*?\d+px) [^;\"]+", r"\1 system-ui, sans-serif", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable}, {color})")
    # A file on its own, as in a README, follows the scheme of the system.
    style = f"<style>@media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}</style>"
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    file.write_text(re.sub(r"(<svg[^>]*>)", rf"\1\n {style}", text, count=1), encoding="utf-8")
    return file
