"""Parts of a port that are float32 inside pass in every function with the same note; a wrong formula beside fails."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity

IDS = np.random.default_rng(0).integers(0, 11, (2, 5))
NAMES = {"table": "embed", "out": "out"}


class TorchScaled(torch.nn.Module):
    """Embeddings times a root, as many language models have them."""

    def __init__(self):
        super().__init__()
        self.table, self.out = torch.nn.Embedding(11, 7), torch.nn.Linear(7, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.table(ids) * 7**0.5))


class FlaxScaled(nnx.Module):
    """nnx.Embed returns float32 whatever its table, so the root is a constant in float32."""

    off = 0.0

    def __init__(self, *, rngs):
        self.embed, self.out = nnx.Embed(11, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, ids):
        return self.out(jnp.tanh(self.embed(ids) * 7**0.5) * (1 + self.off))


class FlaxWrong(FlaxScaled):
    off = 1e-4


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return TorchScaled(), FlaxScaled(rngs=nnx.Rngs(0)), {"ids": IDS}


@pytest.mark.slow
def test_trajectory_and_sweep_explain_what_a_check_explains(pair):
    check = parity.check(*pair, names=NAMES, steps=0)
    assert check.passed, str(check)
    assert check.value("output", "float64") > 1e4
    (inside,) = [note for note in check.notes if note.startswith("float32 inside")]
    sweep = parity.sweep(*pair, names=NAMES, dtypes=["float64", "float32"], layers=False)
    run = parity.trajectory(*pair, names=NAMES, steps=5)
    report = parity.Report.of("scaled", sweep, run)
    assert report.passed, str(report)
    assert any(note.startswith(inside.split(";")[0]) for note in report.notes)
    assert "float32 inside" in str(run)


def test_a_wrong_formula_fails_in_each(pair):
    torch_module, _, inputs = pair
    wrong = FlaxWrong(rngs=nnx.Rngs(0))
    sweep = parity.sweep(torch_module, wrong, inputs, names=NAMES, dtypes=["float64"], layers=False)
    assert not sweep.passed
    assert not parity.trajectory(torch_module, wrong, inputs, names=NAMES, steps=5).passed


@pytest.mark.slow
def test_variants_of_a_port_with_casts_are_widened_alike(pair):
    checks = parity.invariances(
        pair[1], pair[2], batch_axis=0, only=["jit / no jit", "accumulated / whole batch"]
    ).checks
    assert [check.kind for check in checks] == ["jit / no jit", "accumulated / whole batch"]
    assert all(check.value <= 32 for check in checks), checks
