"""Which of several sub-modules that differ is named: the one that explains the error of the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from tests.parity.locate.traced import numbers, part_at, traced, verdicts

X = numbers(2, 5, 6)


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT / 6**0.5).softmax(-1) @ v)


class TorchBlock(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attention = nn.LayerNorm(6), TorchAttention()
        self.feed = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.feed(x)


class Attention(nnx.Module):
    def __init__(self, scale=6**-0.5, *, rngs):
        self.qkv, self.out = nnx.Linear(6, 18, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.scale = scale

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        return self.out(jax.nn.softmax(self.scale * q @ k.swapaxes(-1, -2), -1) @ v)


class Feed(nnx.Module):
    def __init__(self, activation, *, rngs):
        self.first, self.last = nnx.Linear(6, 7, rngs=rngs), nnx.Linear(7, 6, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.last(self.activation(self.first(x)))


class Block(nnx.Module):
    def __init__(self, *, epsilon=1e-5, residual=1.0, scale=6**-0.5, activation=nnx.relu, rngs):
        self.norm = nnx.LayerNorm(6, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
        self.attention, self.feed = Attention(scale, rngs=rngs), Feed(activation, rngs=rngs)
        self.residual = residual

    def __call__(self, x):
        x = self.residual * x + self.attention(self.norm(x))
        return x + self.feed(x)


NAMES = {"feed.0": "feed.first", "feed.2": "feed.last"}


def block(**mistakes):
    return traced(TorchBlock(), Block(**mistakes, rngs=nnx.Rngs(0)), X, names=NAMES)


@pytest.mark.slow
def test_a_correct_block_agrees_everywhere():
    found = block()
    assert found.divergence is None, str(found)
    assert set(verdicts(found.forward).values()) <= {"agrees", "unmatched"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "path", "hint"),
    [
        ({"scale": 1.0}, "attention", "without its scale"),
        ({"activation": nnx.silu}, "feed", "Flax has silu, PyTorch relu"),
        ({"epsilon": 2e-3}, "norm", "epsilon: Flax has 0.002, PyTorch 1e-05"),
        ({"residual": 0.0}, "", "Flax has the second term alone"),
    ],
)
def test_a_mistake_is_named_where_it_is_made(mistake, path, hint):
    found = block(**mistake)
    assert found.divergence.path == path, str(found)
    assert hint in found.divergence.hint
    assert part_at(found.forward, path).share == pytest.approx(1.0)


def test_a_small_difference_before_a_large_one_is_listed_as_a_lesser_one():
    found = block(epsilon=1.0001e-5, scale=1.0)
    assert found.divergence.path == "attention", str(found)
    assert verdicts(found.forward)["norm"] == "culprit"
    assert part_at(found.forward, "norm").share < 1e-3 < 0.9 < part_at(found.forward, "attention").share
    assert [part.path for part in found.forward.culprits()] == ["attention", "norm"]


def test_a_mistake_between_sub_modules_is_the_enclosing_ones_though_one_inside_differs_a_little():
    found = block(epsilon=1.0001e-5, residual=0.9)
    assert found.divergence.path == "", str(found)
    assert verdicts(found.forward)["norm"] == "culprit"
    assert verdicts(found.forward)["attention"] == "victim"


def test_of_two_mistakes_of_one_size_the_first_is_named():
    found = block(scale=1.0, activation=nnx.silu)
    assert found.divergence.path == "attention", str(found)
    assert {path for path, verdict in verdicts(found.forward).items() if verdict == "culprit"} == {"attention", "feed"}
    assert all(part.share > 0.1 for part in found.forward.culprits())


class TorchScaled(nn.Module):
    """The scale is applied to the scores."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return (self.query(x) @ self.key(x).mT / 6**0.5).softmax(-1)


class Scaled(nnx.Module):
    """The same with the scale applied to the query, inside of its projection."""

    def __init__(self, *, rngs):
        self.query, self.key = ScaledLinear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return jax.nn.softmax(self.query(x) @ self.key(x).swapaxes(-1, -2), -1)


class ScaledLinear(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) * 6**-0.5


def test_a_part_that_differs_without_consequence_is_not_named():
    found = traced(TorchScaled(), Scaled(rngs=nnx.Rngs(0)), X)
    assert found.divergence is None, str(found)
    assert part_at(found.forward, "query").share == 0.0
    assert verdicts(found.forward)[""] == "agrees"


class TorchImages(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.norm = nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.norm(self.last(torch.relu(self.first(x))))


class Images(nnx.Module):
    def __init__(self, epsilon=1e-5, *, rngs):
        self.first, self.last = nnx.Conv(5, 5, (3, 3), padding=1, rngs=rngs), nnx.Conv(5, 5, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(5, epsilon=epsilon, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.last(nnx.relu(self.first(x))))


@pytest.mark.slow
def test_as_many_channels_as_rows_and_columns():
    images = numbers(2, 5, 5, 5)
    settings = {"channels_last": ("input 0", "output")}
    assert traced(TorchImages(), Images(rngs=nnx.Rngs(0)), images, **settings).divergence is None
    found = traced(TorchImages(), Images(1e-2, rngs=nnx.Rngs(0)), images, **settings)
    assert found.divergence.path == "norm", str(found)
    assert "epsilon: Flax has 0.01" in found.divergence.hint
    assert verdicts(found.forward) == {"": "encloses", "first": "agrees", "last": "agrees", "norm": "culprit"}


class TorchRecurrent(nn.Module):
    """A cell that is called at every step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 6)
        for t in x.unbind(1):
            h = torch.tanh(self.cell(t + h))
        return self.out(h)


class Recurrent(nnx.Module):
    def __init__(self, wrong=lambda y: y, *, rngs):
        self.cell, self.out, self.wrong = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs), wrong

    def __call__(self, x):
        h = jnp.zeros((len(x), 6), x.dtype)
        for t in jnp.unstack(x, axis=1):
            h = jnp.tanh(self.wrong(self.cell(t + h)))
        return self.out(h)


class WrongLinear(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) + 0.01


def test_a_cell_that_is_called_at_every_step():
    wrong = Recurrent(rngs=nnx.Rngs(0))
    wrong.cell = WrongLinear(6, 6, rngs=nnx.Rngs(0))
    found = traced(TorchRecurrent(), wrong, X)
    assert found.divergence.path == "cell", str(found)
    assert verdicts(found.forward) == {"": "encloses", "cell": "culprit", "out": "victim"}
    between = traced(TorchRecurrent(), Recurrent(lambda y: 1.01 * y, rngs=nnx.Rngs(0)), X)
    assert between.divergence.path == "", str(between)


def test_constants_in_masks_and_infinities_do_not_hide_an_error():
    class Torch(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(x).masked_fill(x > 1, float("-inf"))

    class Flax(nnx.Module):
        def __init__(self, by, *, rngs):
            self.layer, self.by = nnx.Linear(6, 6, rngs=rngs), by

        def __call__(self, x):
            return jnp.where(x > 1, -jnp.inf, self.by * self.layer(x))

    assert traced(Torch(), Flax(1.0, rngs=nnx.Rngs(0)), X).divergence is None
    found = traced(Torch(), Flax(1.01, rngs=nnx.Rngs(0)), X)
    assert found.divergence.path == ""
    assert np.isfinite(found.divergence.error)
