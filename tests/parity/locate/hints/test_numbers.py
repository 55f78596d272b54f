"""Hints: numbers that are solved for, norms, parameters."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.parity.locate.hints.probe import hint_of

X = np.random.default_rng(0).standard_normal((3, 5))


def norm(module, x, *, eps=1e-5, outside=False, ddof=0, centred=True):
    """LayerNorm in NumPy."""
    mean = x.mean(-1, keepdims=True) if centred else 0.0
    variance = np.square(x - mean).sum(-1, keepdims=True) / (x.shape[-1] - ddof)
    y = (x - mean) / (np.sqrt(variance) + eps if outside else np.sqrt(variance + eps))
    return y * module.weight.detach().numpy() + module.bias.detach().numpy()


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ({"eps": 1e-6}, "epsilon: Flax has 1e-06, PyTorch 1e-05"),
        ({"eps": 3.7e-4}, "epsilon: Flax has 0.00037, PyTorch 1e-05"),
        ({"eps": 0.0}, "epsilon: Flax has 0, PyTorch 1e-05"),
        ({"outside": True}, "epsilon is added outside the root"),
        ({"ddof": 1}, "divides by n - 1"),
        ({"centred": False}, "the mean is not subtracted"),
    ],
)
def test_norms(mistake, expected):
    module = nn.LayerNorm(5)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    module.double()
    assert expected in hint_of(module, lambda x: norm(module, x, **mistake), X)


class Sloped(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.scale = nn.Embedding(11, 5), 2.5
        self.activation = nn.LeakyReLU(0.2)
        self.register_buffer("shift", torch.arange(5.0))

    def forward(self, x):
        return self.activation(self.scale * self.table(x) - self.shift)


def sloped(module, ids, *, slope=0.2, shift=1.0, scale=2.5):
    table = module.table.weight.detach().numpy()
    y = scale * table[ids] - shift * np.arange(5.0)
    return np.where(y > 0, y, slope * y)


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ({"slope": 0.07}, "negative_slope of activation: Flax has 0.07, PyTorch 0.2"),
        ({"scale": 0.4}, "scale: Flax has 0.4, PyTorch 2.5"),
        ({"shift": 0.0}, "buffer shift taken for 0"),
        ({"shift": -1.0}, "buffer shift with the opposite sign"),
    ],
)
def test_attributes_and_buffers(mistake, expected):
    module = Sloped().double()
    ids = np.array([[1, 2, 3], [4, 10, 0]])
    assert hint_of(module, lambda ids: sloped(module, ids), ids) == ""
    assert expected in hint_of(module, lambda ids: sloped(module, ids, **mistake), ids)


class Standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma, self.eps = nn.Parameter(torch.rand(5) + 1), 1e-4

    def forward(self, x):
        return self.gamma * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)


def standardised(module, x, *, ddof=1, eps=1e-4, inside=False, scaled=True):
    s = np.sqrt(x.var(-1, ddof=ddof, keepdims=True) + eps) if inside else x.std(-1, ddof=ddof, keepdims=True) + eps
    return (module.gamma.detach().numpy() if scaled else 1.0) * (x - x.mean(-1, keepdims=True)) / s


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ({"ddof": 0}, "the other of n and n - 1"),
        ({"eps": 1e-2}, "epsilon: Flax has 0.01, PyTorch 0.0001"),
        ({"inside": True}, "Flax adds it inside the root"),
        ({"scaled": False}, "missing scale gamma"),
    ],
)
def test_a_norm_that_is_written_out(mistake, expected):
    module = Standardised().double()
    assert expected in hint_of(module, lambda x: standardised(module, x, **mistake), X)


def test_patterns_of_arrays():
    square = np.random.default_rng(1).standard_normal((4, 5, 5))
    identity = nn.Identity()
    assert "axes 1 and 2 exchanged" in hint_of(identity, square.swapaxes(1, 2), square)
    kept = np.random.default_rng(2).random(square.shape) > 0.3
    assert "dropout is active" in hint_of(identity, np.where(kept, square / 0.7, 0.0), square)
    assert "times 1.25" in hint_of(identity, 1.25 * square, square)
    assert hint_of(identity, square * np.nan, square) == "not finite"


def test_embeddings_that_are_scaled():
    table = nn.Embedding(11, 5).double()
    ids = np.array([3, 7, 10])
    given = table.weight.detach().numpy()[ids]
    assert "scaled by √d in Flax alone" in hint_of(table, given * 5**0.5, ids)
    assert "embeddings are 3.5 times PyTorch's" in hint_of(table, given * 3.5, ids)
