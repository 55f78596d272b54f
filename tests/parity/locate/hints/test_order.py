"""Hints: order of features, of gates and of heads."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.locate.hints.probe import hint_of

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(2, 3, 1), nn.Linear(3 * 5 * 7, 4)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).flatten(1))


def test_an_image_that_is_flattened_with_channels_last_is_named():
    module = Flattened().double()

    def port(x):
        with torch.no_grad():
            hidden = F.relu(module.conv(torch.as_tensor(x))).permute(0, 2, 3, 1).flatten(1)
            return module.fc(hidden).numpy()

    assert "input features of fc: Flax has [35, 3], PyTorch [3, 35]" in hint_of(
        module, port, RNG.standard_normal((2, 2, 5, 7))
    )


def lstm(module, x, order=(0, 1, 2, 3), b_ih=True):
    """An LSTM's outputs [B, T, H]; gates i, f, g, o are taken from blocks `order`."""
    w = {n.removesuffix("_l0"): p.detach().numpy() for n, p in module.named_parameters()}
    h = c = np.zeros((len(x), module.hidden_size))
    outputs = []
    for t in x.swapaxes(0, 1):
        gates = t @ w["weight_ih"].T + h @ w["weight_hh"].T + w["bias_hh"] + (w["bias_ih"] if b_ih else 0)
        i, f, g, o = (np.split(gates, 4, -1)[k] for k in order)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, 1)


class Outputs(nn.Module):
    """A recurrent layer without its last state."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(3, 5, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ({"order": (0, 1, 3, 2)}, "Flax takes i, f, g, o from i, f, o, g"),
        ({"order": (1, 0, 2, 3)}, "Flax takes i, f, g, o from f, i, g, o"),
        ({"b_ih": False}, "missing bias bias_ih_l0"),
    ],
)
def test_gates_of_an_lstm(mistake, expected):
    module = Outputs(nn.LSTM)
    x = RNG.standard_normal((2, 7, 3))
    assert hint_of(module, lambda x: lstm(module.rnn, x), x) == ""
    assert expected in hint_of(module, lambda x: lstm(module.rnn, x, **mistake), x)


def gru(module, x, *, order=(0, 1, 2), before=False, b_hn=True):
    """A GRU's outputs [B, T, H]."""
    w = {n.removesuffix("_l0"): p.detach().numpy() for n, p in module.named_parameters()}
    split = lambda a: [np.split(a, 3, -1)[k] for k in order]  # noqa: E731
    whh = [np.split(w["weight_hh"], 3)[k] for k in order]
    bih, bhh = split(w["bias_ih"]), split(w["bias_hh"])
    h, outputs = np.zeros((len(x), module.hidden_size)), []
    for t in x.swapaxes(0, 1):
        i = [a + b for a, b in zip(split(t @ w["weight_ih"].T), bih, strict=True)]
        r, z = (sigmoid(i[k] + h @ whh[k].T + bhh[k]) for k in range(2))
        last = bhh[2] * b_hn
        n = np.tanh(i[2] + ((r * h) @ whh[2].T + last if before else r * (h @ whh[2].T + last)))
        h = (1 - z) * n + z * h
        outputs.append(h)
    return np.stack(outputs, 1)


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ({"order": (1, 0, 2)}, "Flax takes r, z, n from z, r, n"),
        ({"before": True}, "reset gate before the product"),
        ({"b_hn": False}, "bias_hh of gate n is not added"),
    ],
)
def test_gates_of_a_gru(mistake, expected):
    module = Outputs(nn.GRU)
    x = RNG.standard_normal((2, 7, 3))
    assert hint_of(module, lambda x: gru(module.rnn, x), x) == ""
    assert expected in hint_of(module, lambda x: gru(module.rnn, x, **mistake), x)


class Grouped(nn.Module):
    """Attention whose 6 query heads share 2 keys; rotary embeddings rotate the two halves of each head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.head_dim = 6, 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(7, 24), nn.Linear(7, 8), nn.Linear(7, 8)
        self.o_proj = nn.Linear(24, 7, bias=False)

    def forward(self, x, repeat=torch.repeat_interleave, split=True):
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
        q, k = (rotated(a, angle, split) for a in (q, k))
        y = F.scaled_dot_product_attention(q, *(repeat(a, 3, 1) for a in (k, v)), is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotated(x, angle, split):
    a, b = x.chunk(2, -1) if split else (x[..., ::2], x[..., 1::2])
    pair = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return torch.cat(pair, -1) if split else torch.stack(pair, -1).flatten(-2)


def tiled(x, n, axis):
    return torch.cat([x] * n, axis)


def test_shared_keys_and_rotary_pairs():
    module = Grouped().double()
    x = RNG.standard_normal((2, 5, 7))

    def port(**mistake):
        with torch.no_grad():
            return module(torch.as_tensor(x), **mistake).numpy()

    assert hint_of(module, port(), x) == ""
    assert "Flax tiles them" in hint_of(module, port(repeat=tiled), x)
    assert "Flax rotates adjacent features" in hint_of(module, port(split=False), x)


class FusedKeys(nn.Module):
    """Groups of three heads that share keys, whose layer is one with the values', and with the queries' too."""

    def __init__(self, *, queries):
        super().__init__()
        self.num_heads, self.head_dim = 6, 4
        if queries:
            self.qkv_proj = nn.Linear(7, 40)
        else:
            self.wq, self.wkv = nn.Linear(7, 24, bias=False), nn.Linear(7, 16)
        self.wo = nn.Linear(24, 7)

    def forward(self, x, repeat=torch.repeat_interleave):
        qkv = self.qkv_proj(x) if hasattr(self, "qkv_proj") else torch.cat([self.wq(x), self.wkv(x)], -1)
        q, k, v = (p.unflatten(-1, (-1, 4)).transpose(1, 2) for p in qkv.split([24, 8, 8], -1))
        y = F.scaled_dot_product_attention(q, *(repeat(a, 3, 1) for a in (k, v)), is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


def test_a_slow_machine_searches_as_far(monkeypatch):
    """The time for a search grows with that of a call: the factors are the last of about a hundred candidates."""

    class Products(FusedKeys):
        def forward(self, x, factor=1.0):
            q, k, v = (a.unflatten(-1, (-1, 4)).transpose(1, 2) for a in (self.wq(x), *self.wkv(x).chunk(2, -1)))
            k, v = (factor * a.repeat_interleave(3, 1) for a in (k, v))
            return self.wo((((q @ k.mT) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))

    module = Products(queries=False).double()
    x = RNG.standard_normal((2, 5, 7))
    with torch.no_grad():
        wrong = module(torch.as_tensor(x), 1.01).numpy()
    monkeypatch.setattr("parity.locate.hints.search.SECONDS", 0.0)
    assert "matrix products are 1.01 times" in hint_of(module, wrong, x)


@pytest.mark.parametrize("queries", [False, True])
def test_shared_keys_in_fused_layers(queries):
    module = FusedKeys(queries=queries).double()
    x = RNG.standard_normal((2, 5, 7))
    with torch.no_grad():
        wrong = module(torch.as_tensor(x), tiled).numpy()
    assert "shared by 3 heads: Flax tiles them" in hint_of(module, wrong, x)
