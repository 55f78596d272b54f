import io
import os
import signal

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from jaxmodels.layers import Dropout, Embed
from train import loop
from train.data import Batches, windows

V, S, B = 7, 11, 3
IDS = np.tile(np.array([0, 1, 2, 3, 4, 5, 6, 3, 1], np.int32), 30)
CONSOLE = Console(file=io.StringIO())
BATCHES = Batches(IDS, S, B, seed=0)


ADAM, FROZEN = optax.adam(0.1), optax.sgd(0.0)  # once: a step is compiled for the very transformation


class Bigrams(nnx.Module):
    """The least that the loop can train: the token itself decides the logits of the next."""

    def __init__(self):
        self.logits = Embed(V, V, rngs=nnx.Rngs(0))
        self.dropout = Dropout(0.3)

    def __call__(self, ids, rng=None):
        return self.dropout(self.logits(ids), rng)


def state(transformation: optax.GradientTransformation = ADAM) -> loop.State:
    model = Bigrams()
    return loop.State(model, nnx.Optimizer(model, transformation, wrt=nnx.Param))


def train(state: loop.State, steps: int, *, every: int = 100, report=lambda: None) -> bool:
    return loop.train(state, BATCHES, steps, key=None, every=every, report=report, console=CONSOLE)


def test_training_lowers_the_loss_of_the_next_token():
    run, held_out = state(), windows(IDS[5:], S, "validation")
    before = loop.evaluate(run.model, held_out, B)
    assert train(run, 60)
    after = loop.evaluate(run.model, held_out, B)
    assert before > 1.5
    assert after < 0.6 * before
    assert run.step == 60
    assert int(run.optimizer.step[...]) == 60
    assert np.mean(run.losses[-5:]) < 0.6 * np.mean(run.losses[:5])


def test_evaluation_is_the_mean_over_all_windows():
    model, held_out = state().model, windows(IDS[S:], S, "validation")
    assert held_out.shape[1] % B  # the last batch is not full
    expected = np.asarray(loop.token_losses(model, held_out), np.float64).mean()
    assert loop.evaluate(model, held_out, B) == pytest.approx(expected, rel=1e-6)


def test_reports_come_in_their_intervals_with_a_complete_state():
    run, seen = state(), []
    train(run, 7, every=3, report=lambda: seen.append((run.step, int(run.optimizer.step[...]))))
    assert seen == [(3, 3), (6, 6)]


def test_dropout_is_another_at_each_step_and_the_same_again_for_the_same_key():
    def losses(seed: int) -> list[float]:
        """Of three steps over one batch, without learning from it."""
        run = state(FROZEN)
        loop.train(run, lambda step: BATCHES(0), 3, key=jax.random.key(seed), every=5, report=print, console=CONSOLE)
        return run.losses

    assert len(set(losses(seed=0) + losses(seed=1))) == 6
    assert losses(seed=0) == losses(seed=0)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(ValueError, match="the loss is nan at step 2"):
        train(state(optax.sgd(float("nan"))), 5)


def test_ctrl_c_ends_between_two_steps():
    run = state()
    assert not train(run, 1000, every=2, report=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run.step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_interrupts_at_once():
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(state(), 1000, every=2, report=twice)
