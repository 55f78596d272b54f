"""The Feedback Transformer: its memory, and the gradient of the memory in the reverse scan."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from docs.figures.style import BLUE, GREEN, INK, ORANGE, SOFT, arrow, figure, heat, save
from jaxmodels.feedback import FeedbackTransformerKV
from jaxmodels.feedback.recurrence import forward, last_rows, run_step
from jaxmodels.feedback.step import Memory, no_memory, reach, split_weights

STEPS, BATCH, D, HEADS, LAYERS = 12, 8, 32, 4, 3


def reverse_scan() -> np.ndarray:
    """Norm of the gradient of each slot's key once the reverse scan has passed a step, [step, slot].

    The loop does what `jaxmodels.feedback.recurrence.backward` does.
    """
    model = FeedbackTransformerKV(D, HEADS, 4 * D, LAYERS, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (STEPS, BATCH, D))
    graphdef, tables, floats, rest = split_weights(reach(model, STEPS))
    empty = no_memory(model, BATCH, 0, jnp.float32)
    (outputs, memory), _ = forward(graphdef, (tables, floats), rest, x, None, empty, jnp.int32(0))
    d_outputs = jax.random.normal(jax.random.key(2), outputs.shape)
    d_memory = jax.tree.map(jnp.zeros_like, memory)
    sums = np.zeros((STEPS, STEPS))

    @jax.jit
    def pulled(x: jax.Array, memory: Memory, d_memory: Memory, dy: jax.Array, t: jax.Array) -> Memory:
        def f(memory: Memory) -> tuple[jax.Array, Memory]:
            weights = last_rows(tables, STEPS), floats, rest
            states, new = run_step(graphdef, weights, x, memory, t, None, jnp.int32(0))
            return states[-1], new

        (added,) = jax.vjp(f, memory)[1]((dy, jax.tree.map(lambda d: d[:, :, t], d_memory)))
        return jax.tree.map(jnp.add, d_memory, added)

    for t in reversed(range(STEPS)):
        d_memory = pulled(x[t], memory, d_memory, d_outputs[t], jnp.int32(t))
        sums[t] = np.sqrt((np.asarray(d_memory[0][0]) ** 2).sum((0, 1, 3)))
    return sums


def diagram(ax: Axes) -> None:
    """Steps as columns of layers, the memory above them."""
    steps, names, top = 4, ("input", "layer 1", "layer 2", "layer 3"), 5.3
    for t in range(steps):
        ax.add_patch(FancyBboxPatch((t - 0.28, -0.2), 0.56, 3.4, "round,pad=0.04", fill=False, ec=SOFT, lw=1))
        for layer, name in enumerate(names):
            ax.text(t, layer * 0.9 + 0.15, name, ha="center", va="center", fontsize=9)
        ax.annotate("", (t, top - 0.28), (t, 3.27), arrowprops=arrow(BLUE))
        for earlier in range(t):
            ends = (t - 0.3 + 0.12 * earlier, 3.27), (earlier + 0.12, top - 0.24)
            ax.annotate("", *ends, arrowprops=arrow(ORANGE))
        ax.plot(t, top, "o", ms=21, mfc="none", mec=BLUE, mew=1.6)
        ax.text(t, top, f"$m_{t}$", ha="center", va="center", fontsize=11)
        ax.text(t, -0.65, f"step {t}", ha="center", va="center", fontsize=10)
    ax.set(xlim=(-0.5, steps - 0.5), ylim=(-0.9, top + 0.5))
    ax.axis("off")


def draw() -> None:
    """Draw `feedback.svg`."""
    drawn = figure(9, 3.5)
    left, right = drawn.subplots(1, 2, width_ratios=(1.25, 1))
    diagram(left)
    sums = reverse_scan()[::-1]  # in the order of the scan
    heat(right, np.sqrt(sums / sums.max()), GREEN, 1)
    for slot in range(STEPS):
        row = STEPS - 1 - slot
        right.add_patch(Rectangle((slot - 0.5, row - 0.5), 1, 1, fill=False, ec=INK, lw=1.2))
    right.set_yticks(range(0, STEPS, 3), [f"{STEPS - 1 - i}" for i in range(0, STEPS, 3)])
    right.set_xticks(range(0, STEPS, 3))
    right.set(xlabel="slot of the memory", ylabel="step of the reverse scan")
    right.set_title("size of the gradient of each key, so far", fontsize=11)
    save(drawn, "feedback")


if __name__ == "__main__":
    draw()
