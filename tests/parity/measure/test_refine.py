"""The noise measured again for values that are over their limits by little."""

import numpy as np
import pytest
import torch
from torch import nn

from parity.cases import load_cases
from parity.cases.suite import comparison_of, pair_of
from parity.compare.inputs import Inputs
from parity.compare.loss import Batch
from parity.compare.noise import ULPS, Noise
from parity.compare.sides.torch_side import TorchSide
from parity.measure.check import Readings
from parity.measure.reference import Reference
from parity.measure.refine import doubtful, ratio

PAIR = load_cases()["synthesizer.random+vanilla"][0]
SEED = 7  # here four runs underestimate the noise of the gradient of `alpha`, a single number, tenfold


class Gate(nn.Module):
    """A sum of 4099 terms that cancel, times a parameter; masked and changed in place on the way."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        scores = torch.where(x > 2, torch.finfo(x.dtype).min, x)
        y = x * x.sin()
        return self.gate * (y - y.mean()).add_(1e-3), scores.softmax(-1), scores


def noises(side, *, operations):
    inputs = Inputs.of(np.random.default_rng(0).standard_normal(4099))
    side.outputs(inputs)
    batch = Batch(inputs, None, {"output[0]": np.ones(4099)})
    truth = side.evaluate(batch)
    return truth, side.noises(batch, truth, ULPS["float64"], 0, operations=operations)


def test_every_operation_moves_the_results_and_nothing_stays_changed():
    side = TorchSide(Gate(), torch.float64, "cpu")
    before = {name: tensor.clone() for name, tensor in side.state_dict().items()}
    truth, plain = noises(side, operations=False)
    again, moved = noises(side, operations=True)
    assert {n: t.item() for n, t in side.state_dict().items()} == {n: t.item() for n, t in before.items()}
    for kind, tensors in truth.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, again[kind][name])
            assert plain[kind][name].unit / 4 < moved[kind][name].unit < 1e3 * plain[kind][name].unit


def test_the_doubtful_are_over_their_limits_but_not_by_orders_of_magnitude():
    wide = {"output": {"a": 2.0, "b": 40.0, "c": 4000.0, "d": float("inf")}}
    narrow = {"output": {"a": 7.0, "b": 9.0, "c": 7.0}, "parameter gradients": {"w": 9.0, "v": 17.0, "u": 9e3}}
    own = {"output": {}, "parameter gradients": {"w": 5.0, "v": 1.0, "u": 1.0}}
    assert doubtful(wide, narrow, own) == {"output": ["b"], "parameter gradients": ["v"]}
    assert doubtful({}, {"output": {"a": float("nan")}}, {"output": {}}) == {}


def test_a_tensor_without_noise_keeps_its_value():
    before = Reference(None, None, {}, {"output": {"a": Noise(0.0), "b": Noise(2.0)}})
    after = before.with_noises({"output": {"a": Noise(0.0), "b": Noise(8.0)}})
    assert [ratio(before, after, "output", name) for name in ("a", "b", "c")] == [1.0, 0.25, 1.0]
    assert before.with_noises({"output": {"b": Noise(1.0)}}).noises == before.noises


@pytest.mark.slow
def test_the_gradient_of_one_number_raises_no_false_alarm():
    comparison = comparison_of(pair_of(PAIR, SEED), seed=SEED)
    with comparison.strict_precision():
        readings = Readings(comparison, readings=("output", "gradients"))
        checks = list(readings.all())
    assert all(check.passed for check in checks), [str(check) for check in checks]
    (check,) = (c for c in checks if (c.kind, c.precision) == ("parameter gradients", "float32"))
    assert check.value < check.limit == 8.0
    assert any("parameter gradients of alpha" in note for note in readings.notes)
