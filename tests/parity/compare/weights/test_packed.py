"""Fused projections, attention with packed weights, and recurrent layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from jaxmodels.convert import ConversionError
from tests.parity.compare.weights.pairs import EXACT, distance, weights

RNG = np.random.default_rng(0)
ROWS, TOKENS, SEQUENCES = (RNG.standard_normal(shape) for shape in ((4, 6), (2, 5, 12), (2, 5, 3)))


class TorchFused(torch.nn.Module):
    """24 outputs: query, key and value of 2 heads of 4, in one of three orders."""

    def __init__(self, order):
        super().__init__()
        self.qkv, self.order = torch.nn.Linear(6, 24), order

    def forward(self, x):
        split = {"three h d": (3, 2, 4), "h three d": (2, 3, 4), "h d three": (2, 4, 3)}[self.order]
        parts = self.qkv(x).unflatten(-1, split).unbind(1 + self.order.split().index("three"))
        q, k, v = (part.flatten(1) for part in parts)
        return torch.tanh(q) * k + v


class Split(nnx.Module):
    def __init__(self, shape):
        self.q, self.k, self.v = (nnx.LinearGeneral(6, shape, rngs=nnx.Rngs(0)) for _ in range(3))

    def __call__(self, x):
        q, k, v = (part(x).reshape(len(x), 8) for part in (self.q, self.k, self.v))
        return jnp.tanh(q) * k + v


def fused(order, heads="h d"):
    return {"qkv.weight": f"({order}) i -> three i {heads}", "qkv.bias": f"({order}) -> three {heads}"}


NAMES = {"qkv": ["q", "k", "v"]}


def test_a_fused_projection_is_split_block_by_block():
    assert distance(TorchFused("three h d"), Split((2, 4)), ROWS, names=NAMES) < EXACT
    assert distance(TorchFused("h three d"), Split((2, 4)), ROWS, names=NAMES) > 0.1


@pytest.mark.parametrize("order", ["h three d", "h d three"])
def test_a_layout_splits_it_in_any_other_order(order):
    assert distance(TorchFused(order), Split((2, 4)), ROWS, names=NAMES, layouts=fused(order)) < EXACT
    with pytest.raises(ValueError, match=r"layouts\['qkv.weight'\].*h, d"):
        weights(TorchFused(order), Split(8), ROWS, names=NAMES, layouts=fused(order, "(h d)"))
    given = {name: f"{layout} | h=2" for name, layout in fused(order, "(h d)").items()}
    assert distance(TorchFused(order), Split(8), ROWS, names=NAMES, layouts=given) < EXACT


@pytest.mark.parametrize(
    ("layouts", "named"),
    [
        ({"qkw.weight": "o i -> i o"}, "qkw.weight"),
        ({"qkv.weight": "o i -> i"}, "qkv.weight"),
        ({"qkv.weight": 3}, "=3"),
    ],
)
def test_layouts_of_nothing_and_no_layouts_are_refused(layouts, named):
    with pytest.raises(ValueError, match=rf"layouts.*{named}"):
        weights(TorchFused("three h d"), Split(8), ROWS, names=NAMES, layouts=layouts)


class Uneven(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(6, 8 + 4 + 4)

    def forward(self, x):
        q, k, v = self.qkv(x).split([8, 4, 4], -1)
        return torch.tanh(q) * k.repeat(1, 2) + v.repeat(1, 2)


class FlaxUneven(nnx.Module):
    def __init__(self):
        self.q, self.k, self.v = (nnx.Linear(6, n, rngs=nnx.Rngs(0)) for n in (8, 4, 4))

    def __call__(self, x):
        return jnp.tanh(self.q(x)) * jnp.tile(self.k(x), 2) + jnp.tile(self.v(x), 2)


def test_parts_have_the_sizes_of_their_arrays():
    assert distance(Uneven(), FlaxUneven(), ROWS, names=NAMES) < EXACT


class TorchParts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(6, 8) for _ in range(3))

    def forward(self, x):
        return torch.tanh(self.q(x)) * self.k(x) + self.v(x)


class Joined(nnx.Module):
    def __init__(self, shape):
        self.qkv = nnx.LinearGeneral(6, shape, rngs=nnx.Rngs(0))

    def __call__(self, x):
        q, k, v = self.qkv(x).reshape(len(x), 3, 8).swapaxes(0, 1)
        return jnp.tanh(q) * k + v


@pytest.mark.parametrize("shape", [24, (3, 8), (3, 2, 4)])
def test_several_tensors_are_joined_or_stacked(shape):
    names = dict.fromkeys(("q", "k", "v"), "qkv")
    assert distance(TorchParts(), Joined(shape), ROWS, names=names) < EXACT


class TorchAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


class Attention(nnx.Module):
    def __init__(self):
        self.attn = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.attn(x)


class LinenAttention(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.MultiHeadDotProductAttention(3, name="attn")(x, x, x)


@pytest.mark.parametrize("make", [Attention, LinenAttention])
def test_packed_attention(make):
    assert distance(TorchAttention(), make(), TOKENS) < EXACT


class TorchRecurrent(torch.nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.rnn = getattr(torch.nn, kind)(3, 7, batch_first=True, **settings)

    def forward(self, x):
        return self.rnn(x)[0]


class LinenRecurrent(linen.Module):
    cell: linen.RNNCellBase

    @linen.compact
    def __call__(self, x):
        return linen.RNN(self.cell)(x)


def scanned(make, size):
    """An NNX cell over time, without the random carry of nnx.RNN."""

    class Recurrent(nnx.Module):
        def __init__(self):
            self.cell = make(size, 7, rngs=nnx.Rngs(0))

        def __call__(self, x):
            zero = jnp.zeros((len(x), 7), x.dtype)
            carry = zero if make in (nnx.GRUCell, nnx.SimpleCell) else (zero, zero)
            graph, state = nnx.split(self.cell)
            _, ys = jax.lax.scan(lambda c, x_t: nnx.merge(graph, state)(c, x_t), carry, x.swapaxes(0, 1))
            return ys.swapaxes(0, 1)

    return Recurrent()


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("LSTM", linen.LSTMCell(7)),
        ("LSTM", linen.OptimizedLSTMCell(7)),
        ("GRU", linen.GRUCell(7)),
        ("RNN", linen.SimpleCell(7)),
    ],
)
def test_recurrent_layers_of_linen(kind, cell):
    assert distance(TorchRecurrent(kind), LinenRecurrent(cell), SEQUENCES, names={"rnn": "cell"}) < EXACT


@pytest.mark.parametrize(
    ("kind", "cell"), [("LSTM", nnx.LSTMCell), ("LSTM", nnx.OptimizedLSTMCell), ("RNN", nnx.SimpleCell)]
)
def test_recurrent_layers_of_nnx_with_biases_added_up(kind, cell):
    pair = TorchRecurrent(kind), scanned(cell, 3), SEQUENCES
    assert distance(*pair, names={"rnn": ""}) < EXACT
    found = weights(*pair, names={"rnn": ""})
    assert found.untrained == {"rnn.bias_ih_l0", "rnn.bias_hh_l0"}
    assert any("rnn.bias_ih_l0" in note for note in found.notes)


def test_a_bias_inside_of_the_reset_gate_has_no_place_in_nnx():
    with pytest.raises(ConversionError, match=r"rnn.bias_hh_l0.*part 3 of 3"):
        weights(TorchRecurrent("GRU"), scanned(nnx.GRUCell, 3), SEQUENCES, names={"rnn": ""})


NAMED = {"rnn.weight_ih_l0": "cell.dense_i.kernel", "rnn.weight_hh_l0": "cell.dense_h.kernel"}


def test_biases_by_names_and_a_dropped_one():
    pair = TorchRecurrent("LSTM"), scanned(nnx.OptimizedLSTMCell, 3), SEQUENCES
    both = NAMED | dict.fromkeys(("rnn.bias_ih_l0", "rnn.bias_hh_l0"), "cell.dense_h.bias")
    assert distance(*pair, names=both) < EXACT
    assert distance(*pair, names=both | {"rnn.bias_ih_l0": None}) > 0.01


class Tower(nnx.Module):
    def __init__(self):
        self.first, self.second = scanned(nnx.OptimizedLSTMCell, 3), scanned(nnx.OptimizedLSTMCell, 7)

    def __call__(self, x):
        return self.second(self.first(x))


def test_layers_by_the_names_of_their_cells():
    names = {
        f"rnn.{array}_{side}_l{i}": f"{name}.cell"
        for i, name in enumerate(("first", "second"))
        for array in ("weight", "bias")
        for side in ("ih", "hh")
    }
    assert distance(TorchRecurrent("LSTM", num_layers=2), Tower(), SEQUENCES, names=names) < EXACT
