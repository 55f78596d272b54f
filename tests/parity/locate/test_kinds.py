"""Traces of modules of every kind: nothing that a call does loses the report."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

import parity
from tests.parity.locate.traced import numbers, part_at, traced, verdicts

X = numbers(2, 5, 6)


@dataclasses.dataclass
class Output:
    y: torch.Tensor
    extra: object = None


class Inner(nn.Module):
    """Takes keywords; returns a dataclass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, *, mask=None, flag=True, **kwargs):
        return Output(self.linear(x) * (1.0 if mask is None else mask) + kwargs.get("shift", 0.0), (None, None))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(6, 6), Inner()

    def forward(self, x):
        return self.inner(self.first(x), mask=x.abs(), flag=False, shift=x).y


class FlaxInner(nnx.Module):
    def __init__(self, by, *, rngs):
        self.linear, self.by = nnx.Linear(6, 6, rngs=rngs), by

    def __call__(self, x, mask=None, **kwargs):
        return {"y": self.linear(x) * mask + self.by * kwargs["shift"], "none": None}


class FlaxOuter(nnx.Module):
    def __init__(self, by=1.0, factor=1.0, *, rngs):
        self.first, self.inner = nnx.Linear(6, 6, rngs=rngs), FlaxInner(by, rngs=rngs)
        self.factor = factor

    def __call__(self, x):
        return self.inner(self.factor * self.first(x), mask=jnp.abs(x), shift=x)["y"]


@pytest.mark.parametrize(("mistake", "path"), [({}, None), ({"by": 2.0}, "inner"), ({"factor": 2.0}, "")])
def test_keywords_dataclasses_and_none(mistake, path):
    found = traced(Outer(), FlaxOuter(**mistake, rngs=nnx.Rngs(0)), X)
    assert (found.divergence and found.divergence.path) == path, str(found)
    assert not any(part.reason for part in found.forward.walk())


class LinenBlock(linen.Module):
    """A scan over layers whose dtype is float32."""

    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x):
        layer = linen.Dense(6, dtype=jnp.float32, name="first")(x)
        return linen.LayerNorm(epsilon=self.epsilon, use_fast_variance=False, name="norm")(layer)


class TorchBlock(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.first(x))


def test_linen_modules_with_a_dtype_are_compared_with_nothing_narrowed():
    assert traced(TorchBlock(), LinenBlock(), X).divergence is None
    found = traced(TorchBlock(), LinenBlock(1e-3), X)
    assert found.divergence.path == "norm", str(found)
    assert "epsilon: Flax has 0.001" in found.divergence.hint


class Layers(linen.Module):
    """Layers stacked by a scan."""

    wrong: float = 1.0

    @linen.compact
    def __call__(self, x):
        body = linen.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return body(self.wrong, name="layers")(x, None)[0]


class Step(linen.Module):
    wrong: float

    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(self.wrong * linen.Dense(6, name="linear")(x)), None


class TorchLayers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(TorchStep() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TorchStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def test_layers_of_a_linen_scan_are_compared_one_by_one():
    assert traced(TorchLayers(), Layers(), X).divergence is None
    found = traced(TorchLayers(), Layers(1.1), X)
    assert found.divergence.path == "layers.0", str(found)
    assert verdicts(found.forward)["layers.2.linear"] == "victim"


class Jitted(nnx.Module):
    """A sub-module inside of jit, whose calls have no values outside."""

    def __init__(self, factor=1.0, *, rngs):
        self.first, self.norm = nnx.Linear(6, 6, rngs=rngs), nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.factor = factor

    def __call__(self, x):
        return self.factor * jax.jit(lambda norm, x: norm(x))(self.norm, self.first(x))


def test_calls_inside_of_jit_belong_to_the_enclosing_module():
    assert traced(TorchBlock(), Jitted(rngs=nnx.Rngs(0)), X).divergence is None
    found = traced(TorchBlock(), Jitted(1.5, rngs=nnx.Rngs(0)), X)
    assert found.divergence.path == "", str(found)
    assert found.divergence.hint == "PyTorch's output times 1.5"
    assert verdicts(found.forward)["norm"] == "unmatched"


class Fragile(nnx.Linear):
    """Cannot be called with other inputs than those of the model's run."""

    calls = 0

    def __call__(self, x):
        type(self).calls += 1
        if type(self).calls > type(self).allowed:
            raise RuntimeError("called again")
        return super().__call__(x)


def test_a_sub_module_that_cannot_be_repeated_is_marked_and_the_rest_goes_on():
    class Limited(Fragile):
        allowed = 10**9

    flax_module = FlaxNet(Limited, rngs=nnx.Rngs(0))
    report = parity.check(TorchNet(), flax_module, X, steps=0)
    assert report.divergence.path == "first"
    Limited.calls, Limited.allowed = 0, 2  # for the shapes of the outputs, and the run of the whole model
    found = traced(TorchNet(), flax_module, X)
    assert found.divergence.path == "first", str(found)
    assert part_at(found.forward, "last").reason == "RuntimeError: called again"
    assert "called again" in str(found)


class TorchNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.first(x))


class FlaxNet(nnx.Module):
    def __init__(self, last, *, rngs):
        self.first, self.last = nnx.LayerNorm(6, epsilon=1e-2, rngs=rngs), last(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.first(x))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Doubled(), nn.Linear(6, 6)
        self.ids = Ids()

    def forward(self, x):
        y = self.first(x * 1.0)
        return self.second(y) + self.ids(y)


class Doubled(nn.Module):
    """Changes its input."""

    def forward(self, x):
        return x.mul_(2).add_(1)


class Ids(nn.Module):
    """Returns integers, and complex numbers inside."""

    def forward(self, x):
        return (torch.fft.rfft(x).abs().argmax(-1, keepdim=True)).clamp(0, 3)


class FlaxInPlace(nnx.Module):
    def __init__(self, by=1.0, *, rngs):
        self.first, self.second, self.ids = FlaxDoubled(by), nnx.Linear(6, 6, rngs=rngs), FlaxIds()

    def __call__(self, x):
        y = self.first(x)
        return self.second(y) + self.ids(y)


class FlaxDoubled(nnx.Module):
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return 2 * x + self.by


class FlaxIds(nnx.Module):
    def __call__(self, x):
        return jnp.clip(jnp.abs(jnp.fft.rfft(x)).argmax(-1, keepdims=True), 0, 3)


def test_modules_that_change_their_inputs_or_return_integers():
    assert traced(InPlace(), FlaxInPlace(rngs=nnx.Rngs(0)), X).divergence is None
    found = traced(InPlace(), FlaxInPlace(1.5, rngs=nnx.Rngs(0)), X)
    assert found.divergence.path == "first", str(found)


class TorchSpectrum(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mix = nn.Linear(6, 6), TorchMix()

    def forward(self, x):
        return torch.fft.irfft(self.mix(torch.fft.rfft(self.first(x))), n=6)


class TorchMix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.cfloat))

    def forward(self, x):
        return x * self.weight


class Spectrum(nnx.Module):
    def __init__(self, conjugated, *, rngs):
        self.first, self.mix = nnx.Linear(6, 6, rngs=rngs), Mix(conjugated)

    def __call__(self, x):
        return jnp.fft.irfft(self.mix(jnp.fft.rfft(self.first(x))), n=6)


class Mix(nnx.Module):
    def __init__(self, conjugated):
        self.weight, self.conjugated = nnx.Param(jnp.ones(4, jnp.complex64)), conjugated

    def __call__(self, x):
        return x * (jnp.conj(self.weight[...]) if self.conjugated else self.weight[...])


def test_complex_outputs_of_sub_modules():
    assert traced(TorchSpectrum(), Spectrum(False, rngs=nnx.Rngs(0)), X).divergence is None
    found = traced(TorchSpectrum(), Spectrum(True, rngs=nnx.Rngs(0)), X)
    assert found.divergence.path == "mix", str(found)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*grad attribute")
def test_a_sub_module_compiled_by_torch_jit():
    module = TorchNet()
    module.last = torch.jit.script(module.last)
    found = traced(module, FlaxNet(nnx.Linear, rngs=nnx.Rngs(0)), X)
    assert found.divergence.path == "first", str(found)
    assert np.isfinite(found.divergence.error)


class TorchTwo(nn.Module):
    """Returns more than Flax does, and in another order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.two = nn.Linear(6, 6), TorchPair()

    def forward(self, x):
        found = self.two(self.first(x))
        return found["a"] + found["b"]


class TorchPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return {"a": self.linear(x), "more": x[0], "b": x * x}


class Two(nnx.Module):
    def __init__(self, by=1.0, *, rngs):
        self.first, self.two = nnx.Linear(6, 6, rngs=rngs), Pair(by, rngs=rngs)

    def __call__(self, x):
        found = self.two(self.first(x))
        return found["a"] + found["b"]


class Pair(nnx.Module):
    def __init__(self, by, *, rngs):
        self.linear, self.by = nnx.Linear(6, 6, rngs=rngs), by

    def __call__(self, x):
        return {"b": self.by * x * x, "a": self.linear(x)}


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True])
def test_outputs_correspond_by_name(gradients):
    found = traced(TorchTwo(), Two(rngs=nnx.Rngs(0)), X, gradients=gradients)
    assert found.divergence is None, str(found)
    assert verdicts(found.forward)["two"] == "agrees"
    found = traced(TorchTwo(), Two(1.5, rngs=nnx.Rngs(0)), X, gradients=gradients)
    assert found.divergence.path == "two", str(found)


def test_gradients_of_complex_parameters():
    found = traced(TorchSpectrum(), Spectrum(False, rngs=nnx.Rngs(0)), X, gradients=True)
    assert found.divergence is None, str(found)
    assert "culprit" not in verdicts(found.backward).values()


def test_a_trace_that_fails_does_not_lose_the_readings(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no trace")

    monkeypatch.setattr("parity.measure.check.trace", fails)
    report = parity.check(TorchNet(), FlaxNet(nnx.Linear, rngs=nnx.Rngs(0)), X, steps=0)
    assert not report.passed
    assert report.divergence is None
    assert report.skipped["first divergence"] == "the trace failed: RuntimeError: no trace"
