"""Traces of small pairs: culprits and victims, forward and backward, in a narrow dtype, from disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from jaxmodels import layers
from jaxmodels.io import manifest
from parity.compare.inputs import Inputs
from parity.compare.loss import Batch
from parity.compare.sides.torch_side import TorchSide
from parity.compare.store import store
from parity.locate.torch_calls import TorchRun
from parity.locate.tree import Errors


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.last = torch.nn.Linear(7, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


class FlaxNet(nnx.Module):
    """The same, with a function `wrong` applied to the output of its last part."""

    def __init__(self, wrong=None, *, rngs):
        self.first = layers.Linear(5, 7, rngs=rngs)
        self.norm = layers.LayerNorm(7, rngs=rngs)
        self.last = Last(wrong, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


class Last(layers.Linear):
    def __init__(self, wrong, *, rngs):
        super().__init__(7, 3, rngs=rngs)
        self.wrong = wrong

    def __call__(self, x):
        y = super().__call__(x)
        return y if self.wrong is None else self.wrong(y)


X = np.random.default_rng(0).standard_normal((11, 5))


def report_of(flax_module, **arguments):
    torch.manual_seed(0)
    return parity.check(TorchNet(), flax_module, X, steps=0, **arguments)


def verdicts(part):
    return {p.path: p.verdict for p in part.walk()}


@pytest.mark.slow
def test_two_culprits_are_both_named_and_the_victim_between_them_is_not():
    flax_module = FlaxNet(lambda y: -y, rngs=nnx.Rngs(0))
    flax_module.first = Backwards(rngs=nnx.Rngs(0))
    found = report_of(flax_module).divergence
    assert found.path == "first"
    assert found.hint == "reversed along axis 1"
    assert verdicts(found.forward) == {"": "encloses", "first": "culprit", "norm": "victim", "last": "culprit"}
    last = next(part for part in found.forward.walk() if part.path == "last")
    assert last.hint == "PyTorch's output times -1"
    assert "culprit" in found.tree()
    assert "norm  victim" in found.tree()
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["forward"]["children"]


class Backwards(layers.Linear):
    def __init__(self, *, rngs):
        super().__init__(5, 7, rngs=rngs)

    def __call__(self, x):
        return super().__call__(x)[:, ::-1]


def wrong_gradient(y):
    return 1.01 * y - jax.lax.stop_gradient(0.01 * y)


@pytest.mark.slow
def test_the_first_gradient_that_differs_is_named_if_all_outputs_agree():
    report = report_of(FlaxNet(wrong_gradient, rngs=nnx.Rngs(0)))
    found = report.divergence
    assert (found.path, found.stage) == ("last", "backward"), str(report)
    assert verdicts(found.backward) == {"": "encloses", "first": "victim", "norm": "victim", "last": "culprit"}
    assert all(part.verdict == "agrees" for part in found.forward.walk())


class Mixed(nn.Module):
    """An embedding whose row 0 is not trained, and a factor."""

    def __init__(self):
        super().__init__()
        self.emb, self.mix = nn.Embedding(11, 7, padding_idx=0), Scaled()

    def forward(self, x):
        return self.mix(self.emb(x))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(7, 5)

    def forward(self, x):
        return torch.tanh(self.lin(x)) / 7


class FlaxMixed(nnx.Module):
    def __init__(self, rngs):
        self.emb, self.mix = nnx.Embed(11, 7, rngs=rngs), FlaxScaled(rngs)

    def __call__(self, x):
        return self.mix(self.emb(x))


class FlaxScaled(nnx.Module):
    def __init__(self, rngs):
        self.lin = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.lin(x)) * np.float32(1 / 7)  # float32 inside, which the outputs' check allows


@pytest.mark.slow
def test_a_wrong_gradient_is_named_before_a_constant_in_float32():
    ids = np.array([[3, 0, 4, 5], [0, 1, 2, 9], [7, 7, 0, 2]])
    report = parity.check(Mixed(), FlaxMixed(nnx.Rngs(0)), ids, readings=("output", "gradients"))
    assert (report.divergence.path, report.divergence.stage) == ("emb", "backward"), str(report)
    assert "padding_idx=0" in report.divergence.hint
    assert any("float32 inside" in note for note in report.notes)


@pytest.mark.slow
def test_an_error_in_float32_alone_is_traced_in_float32():
    def narrow(y):
        return y if y.dtype == jnp.float64 else y.astype(jnp.bfloat16).astype(y.dtype)

    report = report_of(FlaxNet(narrow, rngs=nnx.Rngs(0)))
    assert {check.precision for check in report.checks if not check.passed} == {"float32"}
    assert (report.divergence.path, report.divergence.dtype) == ("last", "float32"), str(report)
    assert "bfloat16 or TF32" in report.divergence.hint


def test_errors_of_known_arrays():
    truth = np.array([1.0, -2.0, 4.0, 0.0])
    errors = Errors.of([truth + np.array([0, 0, 1e-3, 0])], [truth])
    assert errors.error == pytest.approx(1e-3 / 4)
    assert errors.max_relative == pytest.approx(1e-3 / 4)
    assert errors.mean_absolute == pytest.approx(1e-3 / 4)
    assert errors.snr_db == pytest.approx(10 * np.log10(21 / 1e-6), abs=1e-6)
    assert sum(errors.histogram) == 1
    one_up = np.nextafter(truth.astype(np.float32), np.float32(9)).astype(np.float64)
    assert Errors.of([one_up[:3]], [truth[:3]], np.float32).ulps == pytest.approx(1.0)
    assert Errors.of([truth], [truth]).snr_db == np.inf
    assert Errors.of([truth * np.nan], [truth]).error == np.inf
    assert Errors.of([np.zeros(3)], [np.zeros(4)]) is None


def test_beyond_its_limit_a_trace_is_on_disk_and_has_the_same_arrays():
    torch.manual_seed(0)
    side = TorchSide(TorchNet(), torch.float64, "cpu")
    with store() as memory, store(limit=1000) as disk:
        runs = [TorchRun(side, Batch(Inputs.of(X), None, {}), kept) for kept in (memory, disk)]
        assert memory.on_disk == 0
        assert disk.in_memory <= 1000 < disk.on_disk
        for key in runs[0].calls:
            for a, b in zip(*(run.outputs(key) for run in runs), strict=True):
                np.testing.assert_array_equal(a, b)
        folder = disk.folder
        assert len(list(folder.iterdir())) > 1
        assert manifest.unproven(folder) is None  # `jaxmodels clean` knows what a killed process leaves
    assert not folder.exists()


@pytest.fixture
def written(monkeypatch):
    """The names of the files that stores write."""
    names, save = [], np.save
    monkeypatch.setattr(
        "parity.compare.store.np.save", lambda file, array: (names.append(file.name), save(file, array))
    )
    return names


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 1000])
@pytest.mark.parametrize("wrong", [jnp.negative, wrong_gradient])
def test_a_check_finds_the_same_at_every_memory_limit(wrong, limit, written):
    flax_module = FlaxNet(wrong, rngs=nnx.Rngs(0))
    in_memory = report_of(flax_module)
    assert not written
    on_disk = report_of(flax_module, memory_limit=limit)
    assert written
    assert not in_memory.passed
    found, expected = on_disk.divergence, in_memory.divergence
    assert (found.path, found.stage, found.hint, found.forward) == (
        *(expected.path, expected.stage, expected.hint),
        expected.forward,
    )
    if expected.backward is not None:  # compiled in groups of other sizes: its rounding differs
        assert verdicts(found.backward) == verdicts(expected.backward)


def test_a_sweep_observes_its_memory_limit(written):
    torch.manual_seed(0)
    pair = TorchNet(), FlaxNet(rngs=nnx.Rngs(0)), X
    on_disk, in_memory = (parity.sweep(*pair, dtypes=["float32"], **limit) for limit in ({"memory_limit": 0}, {}))
    assert (on_disk.rows, on_disk.checks) == (in_memory.rows, in_memory.checks)
    assert written


@pytest.mark.parametrize("judge", [parity.check, parity.sweep])
def test_a_negative_memory_limit_is_an_error(judge):
    with pytest.raises(ValueError, match=r"memory_limit=-1\b.*0"):
        judge(TorchNet(), FlaxNet(rngs=nnx.Rngs(0)), X, memory_limit=-1)


class TorchTable(torch.nn.Module):
    """A part that returns its parameter itself, which requires a gradient."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(11, 5))

    def forward(self, x):
        return self.weight


class TorchTabled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = TorchTable()

    def forward(self, x):
        return x * self.table(x)


class FlaxTable(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.zeros((11, 5)))

    def __call__(self, x):
        return self.weight[...]


class FlaxTabled(nnx.Module):
    def __init__(self):
        self.table = FlaxTable()

    def __call__(self, x):
        return x * self.table(x)


def test_a_part_that_returns_its_parameter_is_traced_in_a_narrow_dtype():
    torch.manual_seed(0)
    swept = parity.sweep(TorchTabled(), FlaxTabled(), X, dtypes=["float32"])
    assert {part.path for part in swept.rows[0].parts.walk()} == {"", "table"}
