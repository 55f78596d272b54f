"""The training loop: steps, evaluation, curriculum, signals."""

import os
import signal
import threading

import jax
import numpy as np
import optax
import pytest

from jaxmodels.training.checkpoints import Position
from jaxmodels.training.data import Batches, Windows, endless
from jaxmodels.training.loop import Evaluation, Loop, StepMetrics
from jaxmodels.training.signals import Stopped, at_once, interruptible
from jaxmodels.training.step import token_losses
from tests.train_common import IDS, B, S, program

TRAIN, HELD_OUT = Windows(IDS, S, "training"), Windows(IDS[5:], S, "validation")


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """A shell ignores SIGINT for processes that it started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Recorder:
    """Callbacks that record their calls, and call a function after each step."""

    def __init__(self, after_step):
        self.after_step = after_step
        self.steps: list[StepMetrics] = []
        self.compiled: list[int] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        self.after_step(metrics)

    def on_compile(self, length: int, seconds: float) -> None:
        self.compiled.append(length)


@pytest.fixture
def make():
    """Makes compiled loops, whose callbacks are Recorders."""
    opened = []

    def loop(transformation=None, after_step=lambda metrics: None, stop=None, **options) -> Loop:
        made = program(transformation, **options)
        batches = Batches(endless(TRAIN, 0), B, made.mesh)
        opened.append(batches)
        position = Position(made.make_state(0), batches.get_state())
        loop = Loop(made, position, batches, stop, Recorder(after_step))
        loop.compile({"tokens": np.zeros((B, S + 1), np.int32)})
        return loop

    yield loop
    for batches in opened:
        batches.close()


def test_a_far_goal_is_not_counted_to_before_the_first_step(make):
    asked = []
    loop = make(after_step=lambda metrics: setattr(loop, "paused", lambda: True))
    loop.length_at = lambda step: asked.append(step)
    assert not loop.advance(2**31 - 1)
    assert len(loop.callbacks.steps) < 10
    assert len(asked) < 10_000


def test_training_lowers_the_loss_of_the_next_token(make):
    loop = make()
    evaluation = Evaluation(loop.program, HELD_OUT, B, None)
    before = evaluation(loop.position.state)
    assert loop.advance(60)
    after = evaluation(loop.position.state)
    assert before > 1.5
    assert after < 0.6 * before
    losses = loop.position.losses
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert [(m.step, m.loss) for m in loop.callbacks.steps] == list(enumerate(losses, start=1))
    assert loop.position.step == int(loop.position.state.step) == 60


def test_advancing_in_pieces_takes_the_same_steps_without_compiling(make):
    whole, pieces = make(), make()
    whole.advance(7)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    for until in (1, 3, 3, 7):
        assert pieces.advance(until)
        assert pieces.position.step == int(pieces.position.state.step) == until
    assert compilations == []
    assert pieces.position.losses == whole.position.losses
    assert pieces.position.data == whole.position.data


def test_a_curriculum_uses_the_first_tokens_and_compiles_once_per_length(make):
    lengths = [3, 3, 5, S, S]
    loop, by_hand = make(), make()
    loop.length_at, loop.callbacks.compiled = lengths.__getitem__, []
    assert loop.advance(4)
    assert loop.advance(5)
    assert loop.callbacks.compiled == [3, 5, S]
    state = by_hand.position.state
    for length, loss in zip(lengths, loop.position.losses, strict=True):
        batch = {"tokens": np.asarray(next(by_hand.batches)["tokens"])[:, : length + 1]}
        state, metrics = by_hand.program.lower_step(batch).compile()(state, batch, np.zeros(1, bool))
        assert float(metrics.loss) == loss


def test_evaluation_is_the_mean_over_all_windows():
    made = program()
    state = made.make_state(0)
    assert len(HELD_OUT) % B  # the last batch is not full
    tokens = np.stack([window["tokens"] for window in HELD_OUT])
    expected = np.asarray(token_losses(made.model(state), {"tokens": tokens}), np.float64).mean()
    assert Evaluation(made, HELD_OUT, B, None)(state) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_not_finite_is_an_error_that_names_step_and_gradients(make):
    loop = make(optax.sgd(float("nan")))
    with pytest.raises(ValueError, match=r"^step 2: .*nan.*src_embed\.embedding"):
        loop.advance(5)
    assert len(loop.position.losses) == 1


def test_a_gradient_that_is_not_finite_is_found_with_a_finite_loss(make):
    def losses(model, batch, rng):
        nats = token_losses(model, batch, rng)
        return nats + (0 * jax.numpy.sqrt(0 * nats.sum()))  # d√x/dx is infinite at 0

    loop = make(losses=losses)
    with pytest.raises(ValueError, match=r"^step 1: .*src_embed\.embedding"):
        loop.advance(5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_stops_the_loop_between_two_steps(make, number, code):
    with interruptible() as stop:
        loop = make(stop=stop, after_step=lambda metrics: os.kill(os.getpid(), number) if metrics.step == 5 else None)
        assert not loop.advance(1000)
        assert stop
        assert stop.exit_code == code
    assert 5 < loop.position.step < 10
    assert loop.position.step == int(loop.position.state.step) == loop.position.data["next_index"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_stops_an_evaluation():
    with interruptible() as stop:
        made = program()
        evaluation = Evaluation(made, HELD_OUT, B, stop)
        os.kill(os.getpid(), signal.SIGTERM)
        assert evaluation(made.make_state(0)) is None
        assert evaluation.compiled is None


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), interruptible():  # noqa: PT012 (the first must not)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(1)


def test_work_that_asks_no_stop_ends_at_once_and_its_end_is_not_interrupted():
    ended = False
    with interruptible() as stop, pytest.raises(Stopped), at_once():  # noqa: PT012 (how it ends is tested)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.01)
            ended = True
    assert ended
    assert stop.exit_code == 0
    with interruptible() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), at_once():
            pytest.fail("the signal came before")
    with at_once():  # without effect
        pass
