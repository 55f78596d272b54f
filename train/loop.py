"""The training loop: a compiled step, evaluation, progress, and a Ctrl-C that ends between two steps.

Axes: S sequence, B batch, V vocabulary. Losses are in nats per token.
"""

import contextlib
import dataclasses
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


@dataclasses.dataclass
class State:
    """What a step changes. `losses` has one number per step taken, so its length is where the run stands."""

    model: nnx.Module
    optimizer: nnx.Optimizer
    losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)


def token_losses(model: Any, tokens: jax.Array, rng: jax.Array | None = None) -> jax.Array:
    """Cross-entropy of each next token: int [S + 1, B] -> nats [S, B]."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:-1], rng), tokens[1:])


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(model, optimizer, tokens, key):
    """One update: tokens [S + 1, B] -> (model, optimizer, loss); the given model and optimizer are used up.

    key: of the run's dropout, the same at every step; None for none.
    """
    rng = None if key is None else jax.random.fold_in(key, optimizer.step[...])
    loss, gradients = jax.value_and_grad(lambda model: token_losses(model, tokens, rng).mean())(model)
    optimizer.update(model, gradients)
    return model, optimizer, loss


@jax.jit
def window_losses(model, tokens):
    return token_losses(model, tokens).mean(axis=0)


def evaluate(model: Any, windows: np.ndarray, batch_size: int) -> float:
    """Mean loss over windows [S + 1, n], without dropout, batch_size of them at a time."""
    n = windows.shape[1]
    # the last batch is filled up with the first windows, so that every batch has the shape that is compiled
    batches = np.resize(np.arange(n), (-(-n // batch_size), batch_size))
    losses = [np.asarray(window_losses(model, windows[:, batch])) for batch in batches]
    return float(np.concatenate(losses)[:n].mean(dtype=np.float64))


def train(
    state: State,
    batches: Callable[[int], np.ndarray],
    steps: int,
    *,
    key: jax.Array | None,
    every: int,
    report: Callable[[], None],
    console: Console,
) -> bool:
    """Goes on from state.step to `steps`, calling report() every so many; True where it got there, False on Ctrl-C.

    The state is complete whenever report() is called and on return. Raises ValueError where the loss is not finite.
    """
    if state.step >= steps:
        return True
    compiled = None
    with make_progress(console) as progress, interruptible() as interrupted:
        task = progress.add_task("training", total=steps, completed=state.step, loss=float("nan"), tokens=0)
        tokens = batches(state.step)
        while state.step < steps and not interrupted.is_set():
            state.model, state.optimizer, loss = train_step(state.model, state.optimizer, tokens, key)
            next_tokens = batches(state.step + 1)  # drawn while the device works: the loss is waited for below
            state.losses.append(float(loss))
            if not np.isfinite(state.losses[-1]):
                raise ValueError(
                    f"the loss is {state.losses[-1]} at step {state.step}; a smaller learning rate may help"
                )
            compiled = compiled or train_step._cache_size()
            assert train_step._cache_size() == compiled, "the training step was compiled a second time"
            recent = float(np.mean(state.losses[-20:]))
            progress.update(task, advance=1, loss=recent, tokens=tokens[1:].size)
            tokens = next_tokens
            if state.step % every == 0 and state.step < steps:
                report()
    return state.step >= steps


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, for the block to end in its own time; a second one interrupts at once."""
    asked = threading.Event()

    def ask(signum, frame):
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


class TokensPerSecond(ProgressColumn):
    """Speed over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{(task.speed or 0) * task.fields['tokens']:,.0f} tokens/s")


def make_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TokensPerSecond(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
    )
