"""Copies of PyTorch modules of every kind, in other dtypes; and checks of the kinds that are hard to copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity.compare.sides.torch_copy import copied, slow_paths

X = np.random.default_rng(0).standard_normal((5, 3))


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 7)
        self.phase = nn.Parameter(torch.randn(7, dtype=torch.cfloat))
        self.register_buffer("count", torch.tensor(3))
        self.tables = {"cos": [torch.arange(7.0) / 3, None], "ids": torch.arange(7)}


def test_complex_tensors_stay_complex_and_attributes_follow_to_float64_alone():
    module = Tables()
    wide, narrow = copied(module, torch.float64), copied(module, torch.bfloat16)
    assert (wide.phase.dtype, narrow.phase.dtype) == (torch.complex128, torch.complex64)
    assert torch.equal(wide.phase, module.phase.to(torch.complex128))
    assert (wide.tables["cos"][0].dtype, narrow.tables["cos"][0].dtype) == (torch.float64, torch.float32)
    assert {wide.count.dtype, wide.tables["ids"].dtype} == {torch.int64}
    assert narrow.layer.weight.dtype == torch.bfloat16
    assert module.tables["cos"][0].dtype == torch.float32
    assert copied(module).phase is not module.phase


def test_frozen_and_shared_parameters_stay_so():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    copy = copied(module, torch.float64)
    assert copy[1].weight is copy[0].weight
    assert [p.requires_grad for p in copy.parameters()] == [True, False, True]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_was_computed_is_copied():
    module = nn.utils.weight_norm(nn.Linear(3, 7))
    module(torch.zeros(1, 3)).sum().backward()
    copy = copied(module, torch.float64)
    assert torch.allclose(copy(torch.tensor(X)), module(torch.tensor(X, dtype=torch.float32)).double(), atol=1e-6)
    copy(torch.tensor(X)).sum().backward()
    assert copy.weight_g.grad.dtype == torch.float64


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x))


class FlaxTanh(nnx.Module):
    def __init__(self, scale=1.0):
        self.layer, self.scale = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), scale

    def __call__(self, x):
        return jnp.tanh(self.layer(x)) * self.scale


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")  # since 2.14
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(5, 3))])
def test_modules_of_torchscript_are_checked(compiled):
    module = compiled(Tanh())
    copied(module, torch.float64)(torch.tensor(X)).sum().backward()
    assert parity.check(module, FlaxTanh(), {"x": X}, steps=1).passed
    report = parity.check(module, FlaxTanh(1.001), X, steps=0)
    assert report.value("output", "float64") > 1e6
    assert not report.passed


def test_fused_inference_is_off_within_the_block():
    assert torch.backends.mha.get_fastpath_enabled()
    with slow_paths():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class InPlace(Tanh):
    """Writes into its input and into a buffer, and has an empty parameter."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x, state):
        x += 1
        state["h"].mul_(2)
        return super().forward(x) + state.pop("h") + self.empty.sum()


class FlaxInPlace(FlaxTanh):
    def __init__(self):
        super().__init__()
        self.empty = nnx.Param(jnp.zeros((0, 3)))

    def __call__(self, x, state):
        return super().__call__(x + 1) + 2 * state["h"] + self.empty.sum()


def test_modules_that_change_their_inputs_are_checked():
    x, state = X.copy(), {"h": X * 2}
    report = parity.check(InPlace(), FlaxInPlace(), (x, state), steps=1)
    assert report.passed, str(report)
    assert np.array_equal(x, X)
    assert np.array_equal(state["h"], X * 2)


class Lookup(nnx.Module):
    def __init__(self, shift=0):
        self.table, self.shift = nnx.Embed(7, 3, rngs=nnx.Rngs(0)), shift

    def __call__(self, ids):
        found = self.table(ids)
        return found, found.argmax(-1), ids + self.shift > 3


class TorchLookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3).requires_grad_(False)

    def forward(self, ids):
        found = self.table(ids)
        return found, found.argmax(-1), ids > 3


@pytest.mark.slow
def test_frozen_modules_of_integers_have_no_gradients_and_exact_integers():
    ids = np.arange(6).reshape(2, 3)
    report = parity.check(TorchLookup(), Lookup(), ids, steps=2)
    assert report.passed, str(report)
    assert not any("gradients" in check.kind for check in report.checks)
    wrong = parity.check(TorchLookup(), Lookup(shift=1), ids, steps=0)
    assert wrong.value("output", "float64") > 1e6


class Drawing(FlaxTanh):
    """Draws random numbers, counts its calls, sows and fills a cache, without effect on its output."""

    def __init__(self):
        super().__init__()
        self.rngs, self.cache = nnx.Rngs(0), nnx.Cache(jnp.zeros((5, 3)))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x, train):
        y = super().__call__(x)
        self.cache[...] = y + jax.random.normal(self.rngs.noise(), y.shape, y.dtype)
        self.sow(nnx.Intermediate, "y", y)
        return self.drop(y, deterministic=not train)


@pytest.mark.filterwarnings("ignore:.*Module.sow:DeprecationWarning")
def test_modules_that_change_their_state_are_checked():
    module = Drawing()
    module(jnp.asarray(X), train=False)
    report = parity.check(Tanh(), module, X, steps=1)
    assert report.passed, str(report)
    assert any("train=False" in note for note in report.notes)
