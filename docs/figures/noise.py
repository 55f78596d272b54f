"""Rounding noise: one network and its ports, element by element; the same in four dtypes; all measured cases."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from matplotlib.figure import Figure

from docs.figures.style import BLUE, GREEN, INK, ORANGE, PURPLE, SOFT, figure, save

DOCS = Path(__file__).parents[1]
WIDTH, HIDDEN, ROWS = 13, 53, 7
LIMIT, TOLERANCE = 32, 1e-3
EPSILON = 1e-5
SMALLEST = 1e-18  # where a difference of zero is drawn
Parameters = dict[str, np.ndarray]


def parameters(rng: np.random.Generator) -> Parameters:
    """Weights of a norm and two linear layers, as PyTorch has them."""
    shapes = {"up": (HIDDEN, WIDTH), "up_bias": (HIDDEN,), "down": (WIDTH, HIDDEN), "down_bias": (WIDTH,)}
    return {name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}


def original(p: Parameters, x: np.ndarray, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """down(gelu(up(norm(x)))) in PyTorch."""
    t = {name: torch.tensor(value, dtype=dtype) for name, value in (p | {"x": x}).items()}
    normed = torch.nn.functional.layer_norm(t["x"], (WIDTH,), eps=EPSILON)
    hidden = torch.nn.functional.gelu(normed @ t["up"].T + t["up_bias"])
    return (hidden @ t["down"].T + t["down_bias"]).double().numpy()


def port(p: Parameters, x: np.ndarray, *, epsilon: float = EPSILON, tanh: bool = False) -> np.ndarray:
    """The same in JAX, in float64."""
    with jax.enable_x64(True):
        a = jnp.asarray(x)
        normed = (a - a.mean(-1, keepdims=True)) / jnp.sqrt(a.var(-1, keepdims=True) + epsilon)
        hidden = jax.nn.gelu(normed @ p["up"].T + p["up_bias"], approximate=tanh)
        return np.asarray(hidden @ p["down"].T + p["down_bias"])


def moved(rng: np.random.Generator, value: np.ndarray) -> np.ndarray:
    """Each number moved by one unit in the last place, up or down."""
    return np.nextafter(value, np.where(rng.random(value.shape) < 0.5, -np.inf, np.inf))


class Example:
    """The arrays of both figures of one network."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.p, self.x = parameters(rng), rng.normal(size=(ROWS, WIDTH))
        self.truth = original(self.p, self.x)
        runs = [
            original({name: moved(rng, value) for name, value in self.p.items()}, moved(rng, self.x)) for _ in range(4)
        ]
        self.noise = np.abs(np.stack(runs) - self.truth)  # [runs, rows, features]
        self.ports: dict[str, np.ndarray] = {
            "correct port": self.away(port(self.p, self.x)),
            "epsilon 1e-6, not 1e-5": self.away(port(self.p, self.x, epsilon=1e-6)),
            "tanh GELU, not exact": self.away(port(self.p, self.x, tanh=True)),
        }

    def away(self, output: np.ndarray) -> np.ndarray:
        """Absolute differences from PyTorch's output."""
        return np.abs(output - self.truth)

    def rounding(self, dtype: torch.dtype) -> float:
        """Largest difference of PyTorch in a dtype from float64 with the same, rounded, weights and inputs."""
        rounded = {name: torch.tensor(value).to(dtype).double().numpy() for name, value in self.p.items()}
        x = torch.tensor(self.x).to(dtype).double().numpy()
        return float(np.abs(original(rounded, x, dtype) - original(rounded, x)).max())


def strips(drawn: Figure, rows: Sequence[tuple[str, np.ndarray, str]], smallest: float) -> None:
    """One row of dots per array, on a logarithmic axis; smaller values are drawn at `smallest`."""
    ax = drawn.add_subplot()
    rng = np.random.default_rng(1)
    for i, (_, values, color) in enumerate(rows):
        values = np.maximum(values.ravel(), smallest)
        ax.scatter(values, -i + rng.uniform(-0.28, 0.28, values.shape), s=5, color=color, alpha=0.6, lw=0)
    ax.set_xscale("log")
    ax.set_yticks([-i for i in range(len(rows))], [label for label, _, _ in rows])
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def noise(example: Example) -> None:
    """Differences of every element of the output: the noise, a correct port, and two wrong ones."""
    drawn = figure(8.5, 3.1)
    colors = (GREEN, ORANGE, PURPLE)
    rows = [("PyTorch, inputs moved\nby one unit", example.noise, BLUE)]
    rows += [(name, values, color) for (name, values), color in zip(example.ports.items(), colors, strict=True)]
    strips(drawn, rows, SMALLEST)
    ax = drawn.axes[0]
    limit = LIMIT * example.noise.max()
    ax.axvline(limit, color=INK, lw=1)
    ax.annotate(f"limit: {LIMIT} × noise", (limit, 0.55), xytext=(4, 0), textcoords="offset points", color=INK, size=10)
    ax.axvline(TOLERANCE, color=SOFT, lw=1, ls="--")
    ax.annotate("tolerance 10⁻³", (TOLERANCE, 0.55), xytext=(4, 0), textcoords="offset points", color=INK, size=10)
    exponents = range(-16, 0, 2)
    ax.set_xticks([SMALLEST, *(10.0**e for e in exponents)], ["0", *(f"$10^{{{e}}}$" for e in exponents)])
    ax.set_xticks([], minor=True)
    ax.set_xlim(5e-19, 1)
    ax.set_ylim(-3.5, 0.9)
    ax.set_xlabel("difference of an element of the output from PyTorch in float64")
    save(drawn, "noise", DOCS / "parity" / "figures")


def dtypes(example: Example) -> None:
    """Rounding of PyTorch itself in each dtype, beside the errors of the two wrong ports."""
    drawn = figure(8.5, 3.3)
    ax = drawn.add_subplot()
    names = ("float64", "float32", "float16", "bfloat16")
    values = [example.noise.max(), *(example.rounding(getattr(torch, name)) for name in names[1:])]
    ax.bar(names, values, width=0.5, color=BLUE)
    errors = list(example.ports.items())[1:]
    for (name, away), color in zip(errors, (ORANGE, PURPLE), strict=True):
        ax.axhline(away.max(), color=color, lw=1.5)
        ax.text(-0.6, away.max() * 1.4, name, color=INK, size=10)
    ax.set_xlim(-0.65, 3.4)
    ax.set_yscale("log")
    ax.set_ylim(1e-17, 1)
    ax.set_ylabel("largest difference in the output")
    save(drawn, "dtypes", DOCS / "parity" / "figures")


def agreement() -> np.ndarray:
    """Values in float64 of all cases of the page on agreement."""
    text = (DOCS / "agreement.md").read_text(encoding="utf-8")
    head, _, *rows = [line.split("|")[2:-1] for line in re.findall(r"^\|.*\|$", text[text.index("| case |") :], re.M)]
    columns = [i for i, title in enumerate(head) if "float64" in title]
    values = [row[i].strip().removesuffix("×") for row in rows for i in columns]
    return np.array([float(value) for value in values if value != "–"])


def planted() -> np.ndarray:
    """Values of all planted errors of the page on mutations."""
    text = (DOCS / "mutations.md").read_text(encoding="utf-8")
    return np.array([float(value) for value in re.findall(r"^\|[^|]+\|[^|]+\|[^|]+\| [\w ]+ (\d\S*) \|", text, re.M)])


def limits() -> None:
    """Every measured value of the project's cases and of its planted errors, in units of the noise."""
    correct, wrong = agreement(), planted()
    drawn = figure(8.5, 2.4)
    rows = [
        (f"{len(correct)} values\nof correct pairs", correct, GREEN),
        (f"{len(wrong)} planted\nerrors", wrong, ORANGE),
    ]
    strips(drawn, rows, 0.1)
    ax = drawn.axes[0]
    ax.axvline(LIMIT, color=INK, lw=1)
    ax.annotate(f"limit: {LIMIT}", (LIMIT, 0.5), xytext=(4, 0), textcoords="offset points", color=INK, size=10)
    ax.set_xlim(0.05, 1e17)
    ax.set_ylim(-1.5, 0.85)
    ax.set_xlabel("difference / rounding noise, in float64")
    save(drawn, "limits", DOCS / "parity" / "figures")


def draw() -> None:
    """Draw `noise.svg`, `dtypes.svg` and `limits.svg`."""
    example = Example()
    steps: list[Callable[[], None]] = [lambda: noise(example), lambda: dtypes(example), limits]
    for step in steps:
        step()
