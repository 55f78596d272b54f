"""Settings of training: what is paired, what differs, and what is not judged."""

import pytest
import torch
from flax import linen, nnx

from parity.compare.weights import Twins
from parity.measure.train_settings import Setting, by_order, compared, flax_settings, in_flax, torch_settings


class DropPath(torch.nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


class Torch(torch.nn.Module):
    def __init__(self, momentum=0.1, p=0.3, attention=0.2, path=0.15):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5, momentum=momentum)
        self.fixed = torch.nn.BatchNorm1d(5, track_running_stats=False)
        self.layers = torch.nn.ModuleList([torch.nn.Dropout(p), torch.nn.Dropout2d(p)])
        self.attn = torch.nn.MultiheadAttention(6, 3, attention)
        self.lstm = torch.nn.LSTM(3, 5, num_layers=3, dropout=0.25)
        self.branch = DropPath(path)


class FlaxDropPath(nnx.Module):
    def __init__(self, rate):
        self.rate = rate


FlaxDropPath.__name__ = "DropPath"


class Flax(nnx.Module):
    def __init__(self, momentum=0.9, rate=0.3, attention=0.2, path=0.15, lstm=(0.25, 0.25)):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(5, momentum=momentum, rngs=rngs)
        self.layers = nnx.List([nnx.Dropout(rate), nnx.Dropout(rate)])
        self.attn = nnx.MultiHeadAttention(3, 6, dropout_rate=attention, rngs=rngs)
        self.between = nnx.List([nnx.Dropout(rate) for rate in lstm])
        self.branch = FlaxDropPath(path)


def judged(theirs, ours):
    found = compared(torch_settings(theirs), flax_settings(ours), Twins(), lambda: ([], []))
    return [(d.torch.path, d.torch.value, d.flax.value) for d in found.differences], found


def test_equal_settings_of_every_kind_are_paired():
    differences, found = judged(Torch(), Flax())
    assert not differences
    assert not found.notes
    assert sorted(a.path for a, _ in found.pairs) == ["attn", "branch", "layers.0", "layers.1", "lstm", "lstm", "norm"]


@pytest.mark.parametrize(
    ("flax", "difference"),
    [
        ({"momentum": 0.1}, ("norm", 0.1, 0.1)),
        ({"rate": 0.7}, ("layers.0", 0.3, 0.7)),
        ({"attention": 0.3}, ("attn", 0.2, 0.3)),
        ({"path": 0.85}, ("branch", 0.15, 0.85)),
        ({"lstm": (0.25, 0.5)}, ("lstm", 0.25, 0.5)),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(flax, difference):
    differences, found = judged(Torch(), Flax(**flax))
    assert differences[0] == difference
    path, theirs, ours = difference
    text = str(found.differences[0])
    assert path in text
    assert f"={theirs:g}" in text
    assert f"={ours:g}" in text


def test_a_momentum_that_nobody_chose_is_a_note():
    differences, found = judged(Torch(), Flax(momentum=0.99))
    assert not differences
    assert "momentum=0.9 " in found.notes[0]
    assert "momentum=0.99" in found.notes[0]
    assert judged(Torch(momentum=0.2), Flax(momentum=0.99))[0] == [("norm", 0.2, 0.99)]
    assert len(judged(Torch(momentum=None), Flax(momentum=0.9))[0]) == 1


def test_dropout_that_a_port_leaves_out_is_not_judged():
    class Inference(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=nnx.Rngs(0))
            self.attn = nnx.MultiHeadAttention(3, 6, rngs=nnx.Rngs(0))

    differences, found = judged(Torch(), Inference())
    assert not differences
    assert ["attn" in found.notes[-1], *("p=0.3" in note for note in found.notes)].count(True) == 2


def test_parts_of_linen_modules_are_those_that_are_called():
    class Recorded:
        def __init__(self, modules):
            self.modules = modules

    flax = Recorded(None)
    flax.to_nnx__parts = Recorded({("Dropout_0",): linen.Dropout(0.4), ("Norm_0",): linen.BatchNorm(momentum=0.9)})
    assert [(s.path, s.value) for s in flax_settings(flax)] == [("Dropout_0", 0.4), ("Norm_0", 0.9)]


def rates(*values, side="flax"):
    return [Setting(f"{side}.{i}", "Dropout", "dropout", "p", value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("theirs", "ours", "pairs"),
    [
        ([0.1, 0.2], [0.1, 0.2], [(0.1, 0.1), (0.2, 0.2)]),
        ([0.1, 0.2], [0.2, 0.1], [(0.1, 0.1), (0.2, 0.2)]),  # another order of calls, the same rates
        ([0.1, 0.2], [0.1, 0.3], [(0.1, 0.1), (0.2, 0.3)]),
        ([0.1, 0.0], [0.1], [(0.1, 0.1)]),
        ([0.1, 0.2, 0.1, 0.2], [0.1, 0.2], [(0.1, 0.1), (0.2, 0.2)]),  # scanned layers are called once
        ([0.1, 0.1, 0.1], [0.3], [(0.1, 0.3)]),
        ([0.1, 0.2], [0.1], None),
        ([0.1], [], None),
    ],
)
def test_pairs_without_names(theirs, ours, pairs):
    found = by_order(rates(*theirs, side="torch"), rates(*ours))
    assert (None if found is None else sorted((in_flax(a), b.value) for a, b in found)) == pairs
