"""Sweeps over dtypes, and the distributions of language models."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import parity
from parity.report.results import Agreement
from tests.parity.pairs import FlaxMLP, mlp


@pytest.mark.slow
def test_every_dtype_is_compared_with_torchs_own_error():
    swept = parity.sweep(*mlp(), layers=False)
    assert swept.passed, str(swept.checks)
    assert [row.dtype for row in swept.rows] == ["float64", "float32", "bfloat16", "float16"]
    flax = [row.errors["output"][0] for row in swept.rows]
    assert all(0 < value <= 4 for value in flax), "in units of each dtype's noise"
    assert json.loads(json.dumps(swept.to_json(), allow_nan=False))["rows"][1]["dtype"] == "float32"


class Narrow(FlaxMLP):
    """Rounds its input to 8 bits if that is bfloat16."""

    def __call__(self, x):
        narrow = jnp.float8_e5m2 if x.dtype == jnp.bfloat16 else x.dtype
        return super().__call__(x.astype(narrow).astype(x.dtype))


def test_an_error_in_one_dtype_fails_there_alone():
    torch_module, _, x = mlp()
    swept = parity.sweep(torch_module, Narrow(rngs=nnx.Rngs(0)), x, dtypes=["float32", "bfloat16"], layers=False)
    assert {check.precision for check in swept.checks if not check.passed} == {"bfloat16"}


def test_layers_are_traced_in_each_dtype():
    swept = parity.sweep(*mlp(), dtypes=["float64", "bfloat16"])
    parts = {row.dtype: {part.path: part.propagated.error for part in row.parts.walk()} for row in swept.rows}
    assert parts["float64"].keys() == parts["bfloat16"].keys() == {"", "up", "norm", "down"}
    assert all(parts["float64"][path] < 1e-14 < 1e-4 < parts["bfloat16"][path] for path in parts["float64"])


def test_agreement_is_the_divergence_over_the_whole_vocabulary():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((3, 500, 1009))
    same = Agreement.of(truth + 7.0, truth)  # the softmax does not see a constant
    assert same.kl_max < 1e-12
    assert (same.top_1, same.top_k) == (1.0, 1.0)
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (truth, 0.5 * truth))
    flatter = Agreement.of(0.5 * truth, truth)
    assert flatter.kl_mean == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert flatter.top_1 == 1.0
    reversed_ = Agreement.of(-truth, truth)
    assert reversed_.top_1 == 0.0
    assert reversed_.top_k == 0.0


def test_unknown_dtypes_are_named():
    with pytest.raises(ValueError, match=r"dtypes=\['float8'\].*float16"):
        parity.sweep(*mlp(), dtypes=["float8"])


class Fields(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(5, 7, dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.LayerNorm(7, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.down = nnx.Linear(7, 3, use_bias=False, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x):
        hidden = self.up(x)
        SEEN.append(hidden.dtype.name)
        return self.down(jnp.tanh(self.norm(hidden)))


class LinenFields(linen.Module):
    dtype: object = jnp.float32

    @linen.compact
    def __call__(self, x):
        hidden = linen.Dense(7, dtype=self.dtype, name="up")(x)
        SEEN.append(hidden.dtype.name)
        hidden = linen.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(hidden)
        return linen.Dense(3, use_bias=False, dtype=self.dtype, name="down")(jnp.tanh(hidden))


SEEN = []


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Fields(rngs=nnx.Rngs(0)), LinenFields], ids=["nnx", "linen"])
def test_a_module_with_dtype_fields_really_runs_in_each_dtype(make):
    torch_module, _, x = mlp()
    SEEN.clear()
    swept = parity.sweep(torch_module, make(), x, dtypes=["bfloat16"], layers=False)
    assert swept.passed, str(swept.checks)
    assert SEEN[-1] == "bfloat16"
