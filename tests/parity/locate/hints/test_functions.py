"""Hints: activations, softmax, masks, sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.locate.hints.probe import hint_of

X = np.random.default_rng(0).standard_normal((3, 5))


class Feed(nn.Module):
    """Two layers with an activation that is called as a function."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.activation = nn.Linear(5, 7), nn.Linear(7, 3), activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu (tanh approximation)": jax.nn.gelu,
    "gelu (exact)": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu (x·sigmoid(1.702 x))": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "hardswish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
}
TORCH = {
    "relu": nn.ReLU(),
    "gelu (exact)": F.gelu,
    "gelu (tanh approximation)": nn.GELU("tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("flax", ACTIVATIONS)
@pytest.mark.parametrize("theirs", TORCH)
def test_an_activation_exchanged_is_named(flax, theirs):
    if flax == theirs:
        return
    module = Feed(TORCH[theirs])

    def port(x):
        with jax.enable_x64(True):
            weights = {n: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}
            hidden = ACTIVATIONS[flax](x @ weights["up.weight"].T + weights["up.bias"])
            return hidden @ weights["down.weight"].T + weights["down.bias"]

    assert f"Flax has {flax}" in hint_of(module, port, X)


class Attention(nn.Module):
    """Softmax attention written out, causal."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = 2
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x, mask=None):
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.num_heads, 3).permute(2, 0, 3, 1, 4)  # [B, H, S, d_k]
        scores = q @ k.mT / 3**0.5
        scores = scores.masked_fill(~torch.ones(s, s).tril().bool(), float("-inf"))
        scores = scores if mask is None else scores.masked_fill(~mask[:, None, None], -1e30)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, d))


def attention(module, x, *, scale=3**-0.5, order="bsthd", diagonal=0, axis=-1, merged="bqhd", mask=None):
    """The same in NumPy, with mistakes."""
    w = {n: p.detach().numpy() for n, p in module.named_parameters()}
    b, s, d = x.shape
    sizes = {"b": b, "s": s, "t": 3, "h": 2, "d": 3}
    qkv = (x @ w["qkv.weight"].T + w["qkv.bias"]).reshape([sizes[c] for c in order])
    q, k, v = np.einsum(f"{order}->tbhsd", qkv)
    scores = scale * q @ k.swapaxes(-1, -2)
    visible = np.tril(np.ones((s, s), bool), diagonal)
    scores = np.where(visible if mask is None else visible & mask[:, None, None], scores, -1e30)
    weights = np.exp(scores - scores.max(axis, keepdims=True))
    weights = weights / weights.sum(axis, keepdims=True)
    y = np.einsum(f"bhqk,bhkd->{merged}", weights, v).reshape(b, s, d)
    return y @ w["out.weight"].T + w["out.bias"]


SEQUENCE = np.random.default_rng(1).standard_normal((2, 5, 6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ({"scale": 1.0}, "without its scale"),
        ({"scale": 1 / 3}, "1/d instead of 1/√d"),
        ({"scale": 0.7 / 3**0.5}, "scores are 0.7 times"),
        ({"order": "bshtd"}, "Flax splits [heads, 3, features], PyTorch [3, heads, features]"),
        ({"order": "bshdt"}, "Flax splits [heads, features, 3], PyTorch [3, heads, features]"),
        ({"merged": "bqdh"}, "Flax has [3, 2], PyTorch [2, 3]"),
        ({"diagonal": 1}, "diagonal is moved by +1"),
        ({"diagonal": 9}, "mask ignored"),
        ({"axis": -2}, "along axis -2"),
    ],
)
def test_mistakes_in_attention_are_named(mistake, expected):
    module = Attention()
    assert hint_of(module, lambda x: attention(module, x), SEQUENCE) == ""
    assert expected in hint_of(module, lambda x: attention(module, x, **mistake), SEQUENCE)
