"""Hints: masks and positions among the arguments, parts of equal shape exchanged, parameters that are forgotten."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.locate.hints.probe import hint_of

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 6))
MASK = np.arange(5) < np.array([[5], [3]])


class Masked(nn.Module):
    """Attention with a mask of keys, rotated positions in a table, and two projections of one shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.pos, self.bias_table = nn.Parameter(torch.randn(5, 6)), nn.Embedding(5, 1)

    def forward(self, x, mask):
        h = self.norm(x) + self.pos
        q, k = self.query(h), self.key(h)
        scores = q @ k.mT / 6**0.5 + self.bias_table.weight.T
        scores = scores + torch.where(mask[:, None], 0.0, -1e30)
        return x + scores.softmax(-1) @ h


def port(module, *, mask=MASK, without=(), residual=True, exchanged=False):
    x = torch.as_tensor(X)
    with torch.no_grad():
        h = module.norm(x) + (0 if "pos" in without else module.pos)
        q, k = (p(h) for p in ((module.key, module.query) if exchanged else (module.query, module.key)))
        scores = q @ k.mT / 6**0.5 + (0 if "bias" in without else module.bias_table.weight.T)
        weights = (scores + torch.where(torch.as_tensor(mask)[:, None], 0.0, -1e30)).softmax(-1)
        return (x * residual + weights @ h).numpy()


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        ({"mask": np.ones_like(MASK)}, "mask ignored"),
        ({"mask": ~MASK}, "mask inverted"),
        ({"mask": np.roll(MASK, 1, -1)}, "off by +1 along its last axis"),
        ({"without": ("pos",)}, "pos is not added"),
        ({"exchanged": True}, "weights of query and key exchanged"),
        ({"residual": False}, "Flax has the second term alone"),
    ],
)
def test_mistakes_are_named(mistake, expected):
    module = Masked().double()
    assert hint_of(module, port(module), X, MASK) == ""
    assert expected in hint_of(module, port(module, **mistake), X, MASK)


def test_causal_masks_of_fused_attention():
    class Causal(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = torch.as_tensor(X)
    late = F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5).tril(1).bool())
    assert "diagonal is moved by +1" in hint_of(Causal(), late.numpy(), X)
    assert "causal mask ignored" in hint_of(Causal(), F.scaled_dot_product_attention(q, q, q).numpy(), X)
    assert "without its scale" in hint_of(
        Causal(), F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=1.0).numpy(), X
    )


def test_a_batch_norm_with_the_statistics_of_the_batch_and_groups_of_a_group_norm():
    x = RNG.standard_normal((3, 6, 7))
    norm = nn.BatchNorm1d(6).double()
    nn.init.normal_(norm.weight)
    given = F.batch_norm(torch.as_tensor(x), None, None, norm.weight, norm.bias, training=True)
    assert "statistics of the batch" in hint_of(norm, given.detach().numpy(), x)
    groups = nn.GroupNorm(2, 6).double()
    nn.init.normal_(groups.weight)
    given = F.group_norm(torch.as_tensor(x), 3, groups.weight, groups.bias)
    assert "Flax has 3 groups, PyTorch 2" in hint_of(groups, given.detach().numpy(), x)


def test_a_module_that_cannot_be_copied_has_no_hint_but_patterns():
    class Held(nn.Module):
        def __deepcopy__(self, memo):
            raise TypeError

        def forward(self, x):
            return x

    assert hint_of(Held(), 2 * X, X) == "PyTorch's output times 2"
    assert hint_of(Held(), X**2, X) == ""
