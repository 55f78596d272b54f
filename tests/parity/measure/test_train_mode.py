"""Training mode: a step's outputs and averages, settings in the report, and what is not compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from parity import check
from parity.measure.train_settings import unseen_updates

X = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)  # [batch, features, positions]
LAST = ("input 0", "output")
FAST = {"steps": 0, "channels_last": LAST}


class Torch(torch.nn.Module):
    def __init__(self, norm=None, p=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.BatchNorm1d(5) if norm is None else norm
        self.drop = torch.nn.Dropout(p)

    def forward(self, x):
        return self.drop(self.norm(x))


class Flax(nnx.Module):
    def __init__(self, norm=nnx.BatchNorm, momentum=0.9, rate=0.3, **more):
        self.norm = norm(5, momentum=momentum, epsilon=1e-5, rngs=nnx.Rngs(0), **more)
        self.drop = nnx.Dropout(rate, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.drop(self.norm(x))


class Linen(linen.Module):
    momentum: float = 0.9

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.BatchNorm(use_running_average=not train, momentum=self.momentum, epsilon=1e-5, name="norm")(x)
        return linen.Dropout(0.3, deterministic=not train, name="drop")(x)


class WrongVariance(nnx.BatchNorm):
    """Averages the standard deviation."""

    def __call__(self, x, **more):
        old = self.var[...]
        y = super().__call__(x, **more)
        if not self.use_running_average:
            new = (self.var[...] - self.momentum * old) / (1 - self.momentum)
            self.var[...] = self.momentum * old + (1 - self.momentum) * new**0.5
        return y


class Unbiased(nnx.BatchNorm):
    """Averages the unbiased variance, as PyTorch does."""

    def __call__(self, x, **more):
        old, n = self.var[...], x.size / x.shape[-1]
        y = super().__call__(x, **more)
        if not self.use_running_average:
            self.var[...] = old + (self.var[...] - self.momentum * old) * n / (n - 1) - (1 - self.momentum) * old
        return y


def failed(report):
    return {one.kind: one.worst for one in report.checks if not one.passed}


@pytest.mark.slow
@pytest.mark.parametrize("make", [Flax, Linen, lambda: Flax(Unbiased)], ids=["nnx", "linen", "unbiased"])
def test_a_step_of_a_correct_port_agrees(make):
    flax = make()
    report = check(Torch(), flax, X, **FAST)
    assert report.passed, str(report)
    kinds = {one.kind: one.value for one in report.checks}
    assert kinds["training settings"] == 0
    assert "averages after a step" in kinds, report.skipped
    assert kinds["averages after a step"] < 3
    assert kinds["output in training"] < 3
    assert any("n / (n - 1)" in note for note in report.notes) is not isinstance(getattr(flax, "norm", None), Unbiased)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flax", "kind", "worst", "path"),
    [
        (lambda: Flax(momentum=0.1), "training settings", ["norm", "momentum=0.9", "momentum=0.1"], "norm"),
        (lambda: Flax(rate=0.7), "training settings", ["drop", "p=0.3", "rate=0.7"], "drop"),
        (lambda: Linen(momentum=0.5), "training settings", ["norm", "momentum=0.9", "momentum=0.5"], "norm"),
        (lambda: Flax(WrongVariance), "averages after a step", ["norm.running_var"], "norm"),
    ],
)
def test_what_differs_in_training_only_is_named(flax, kind, worst, path):
    report = check(Torch(), flax(), X, **FAST)
    found = failed(report)
    assert list(found) == [kind]
    assert all(word in found[kind] for word in worst)
    assert (report.divergence.stage, report.divergence.path) == ("training", path)
    assert found[kind].split(":")[-1] in report.divergence.hint


class Train(nnx.Module):
    """Training is an argument of the call."""

    def __init__(self):
        self.norm = nnx.BatchNorm(5, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))

    def __call__(self, x, training=False):
        return self.norm(x, use_running_average=not training)


class Inference(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=True, momentum=0.9, epsilon=1e-5, name="norm")(x)


class Noisy(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x + torch.rand_like(x) if self.training else x)


class Frozen(torch.nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize(
    ("theirs", "flax", "reason"),
    [
        (torch.nn.BatchNorm1d(5), Inference(), "do not change"),
        (Noisy(5), Flax(), "random"),
        (Frozen(5), Flax(), "norm stays in evaluation"),
    ],
)
def test_a_step_that_cannot_be_compared_is_listed_with_the_reason(theirs, flax, reason):
    report = check(Torch(theirs), flax, X, **FAST)
    assert report.passed, str(report)
    assert reason in report.skipped["a step in training mode"]


def test_a_flag_of_the_call_selects_training():
    report = check(Torch(p=0.0), Train(), X, **FAST)
    assert report.passed, str(report)
    assert "averages after a step" in {one.kind for one in report.checks}


class Twice(torch.nn.Module):
    """A norm that is called twice averages twice."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.norm(x))


class FlaxTwice(Flax):
    def __call__(self, x):
        return self.norm(self.norm(x))


class OwnNorm(nnx.Module):
    """A norm of a user's own, with PyTorch's momentum."""

    def __init__(self, _, momentum, epsilon, rngs):
        self.scale, self.bias = nnx.Param(jnp.ones(5)), nnx.Param(jnp.zeros(5))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(5)), nnx.BatchStat(jnp.ones(5))
        self.share, self.epsilon, self.use_running_average = 1 - momentum, epsilon, False

    def __call__(self, x):
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            mean, var = x.mean((0, 1)), x.var((0, 1))
            self.mean[...] += self.share * (jax.lax.stop_gradient(mean) - self.mean[...])
            self.var[...] += self.share * (jax.lax.stop_gradient(var) - self.var[...])
        return (x - mean) / jnp.sqrt(var + self.epsilon) * self.scale + self.bias


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "flax", "passes"),
    [
        (Twice(), lambda: FlaxTwice(), True),
        (Torch(), lambda: Flax(OwnNorm), True),
        (Torch(), lambda: Flax(OwnNorm, momentum=0.1), False),
    ],
)
def test_averages_of_repeated_calls_and_of_own_norms(theirs, flax, passes):
    report = check(theirs, flax(), X, **FAST)
    assert list(failed(report)) == ([] if passes else ["averages after a step"])
    assert "averages after a step" in {one.kind for one in report.checks}


def test_an_exception_in_training_loses_no_reading():
    class Raises(Flax):
        def __call__(self, x):
            if not self.norm.use_running_average:
                raise KeyError("training")
            return super().__call__(x)

    report = check(Torch(), Raises(), X, **FAST)
    assert report.passed, str(report)
    assert "KeyError" in report.skipped["a step in training mode"]


def test_spectral_norm_is_listed():
    class Spectral(Torch):
        def __init__(self):
            super().__init__(p=0.0)
            self.last = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 3))

    assert unseen_updates(Spectral()) == ["spectral norm of last"]


def test_an_algorithm_that_loses_precision_is_no_mistake():
    report = check(Torch(), Flax(use_fast_variance=True), X + 300, **FAST)
    assert "averages after a step" not in failed(report)
    assert any("loses more precision" in note for note in report.notes)


def test_a_module_without_such_parts_has_no_such_readings():
    class Model(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(7, 5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.linear(x)

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(7, 5)

        def forward(self, x):
            return self.linear(x)

    report = check(Twin(), Model(), X, steps=0)
    assert not {"training settings", "averages after a step"} & {one.kind for one in report.checks}
    assert "a step in training mode" not in report.skipped
