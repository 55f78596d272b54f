"""Variants that must not change a model's numbers, and models with a mistake that one of them finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import parity
from jaxmodels.transformer import AutoregressiveTransformer
from parity.measure.invariances import VARIANTS
from tests.common import S, filled, language_model, token_ids
from tests.parity.pairs import FlaxMLP


@pytest.fixture(scope="module")
def ids():
    return np.asarray(token_ids(0, S, 3))


def values(found):
    return {check.kind: check for check in found.checks}


@pytest.mark.slow
def test_a_language_model_has_every_variant_but_devices(ids):
    """A process of the suite has one device; `parity --invariances` has eight."""
    found = parity.invariances(language_model("rotary", n_layers=1), ids, labels=ids)
    assert found.passed, str(found)
    assert set(values(found)) | set(found.skipped) == set(VARIANTS)
    assert set(found.skipped) <= {"1 / 8 devices"}
    assert all(check.precision == "float64" for check in found.checks)


class Forward(AutoregressiveTransformer):
    """Reads later tokens."""

    def __call__(self, ids, rng=None):
        return super().__call__(ids) + 1e-6 * ids.mean(axis=0)[:, None]


class Jitted(AutoregressiveTransformer):
    """Computes other numbers when it is compiled."""

    def __call__(self, ids, rng=None):
        compiled = isinstance(ids, jax.core.Tracer)
        return super().__call__(ids) * (1.001 if compiled else 1.0)


class Batched(AutoregressiveTransformer):
    """Mixes the elements of a batch."""

    def __call__(self, ids, rng=None):
        logits = super().__call__(ids)
        return logits + 1e-6 * logits.mean(axis=1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (Forward, "padded / unpadded"),
        (Forward, "cached / full"),
        (Jitted, "jit / no jit"),
        (Batched, "accumulated / whole batch"),
    ],
)
def test_each_variant_finds_its_mistake(model, kind, ids):
    broken = filled(lambda: model(23, 12, 3, 17, 1, rngs=nnx.Rngs(0)))
    found = parity.invariances(broken, ids, labels=ids, only=[kind])
    assert not values(found)[kind].passed


@pytest.mark.slow
def test_a_module_that_is_no_language_model_needs_batch_axis(ids):
    model, x = FlaxMLP(rngs=nnx.Rngs(0)), np.random.default_rng(0).standard_normal((5, 5))
    found = parity.invariances(model, x, only=["accumulated / whole batch", "cached / full", "scanned / unrolled"])
    assert not found.checks
    assert "batch_axis" in found.skipped["accumulated / whole batch"]
    assert "plain" in found.skipped["scanned / unrolled"]
    found = parity.invariances(model, x, batch_axis=0, only=["accumulated / whole batch"])
    assert found.passed
    assert values(found)


class LinenMLP(linen.Module):
    """Mixes the elements of a batch by its variable `mixing`, which is initially zero."""

    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=True)(linen.Dense(7)(x))
        mixing = self.variable("fixed", "mixing", jnp.zeros, ())
        return linen.Dense(3)(jnp.tanh(x) + mixing.value * x.mean(axis=0))


class LinenPlain(LinenMLP):
    def plain(self, x):
        return self(x) * 1.001


X = np.random.default_rng(0).standard_normal((11, 5))
LINEN = ["jit / no jit", "accumulated / whole batch"]


@pytest.mark.slow
def test_a_linen_module_has_the_variants_of_any_module():
    found = parity.invariances(LinenMLP(), {"x": X}, batch_axis=0)
    assert found.passed, str(found)
    assert set(LINEN) <= set(values(found))
    assert set(values(found)) | set(found.skipped) == set(VARIANTS)
    assert "sequence_axis" in found.skipped["cached / full"]
    assert "plain" in found.skipped["scanned / unrolled"]
    found = parity.invariances(LinenPlain(), {"x": X}, only=["scanned / unrolled"])
    assert not values(found)["scanned / unrolled"].passed


@pytest.mark.slow
def test_a_bound_linen_module_has_the_variables_that_it_is_bound_to():
    variables = LinenMLP().init(jax.random.key(0), X)
    variables["fixed"]["mixing"] = jnp.asarray(1e-6)
    found = parity.invariances(LinenMLP().bind(variables), X, batch_axis=0, only=LINEN)
    assert [check.kind for check in found.checks if not check.passed] == ["accumulated / whole batch"]
    del variables["fixed"]
    with pytest.raises(ValueError, match=r"flax_module\b.*: mixing$"):
        parity.invariances(LinenMLP().bind(variables), X)
    with pytest.raises(ValueError, match=r"flax_module\b.*: Dense_0\.kernel, mixing$"):
        parity.invariances(LinenMLP().bind(variables), X[:, :3])


def test_bad_arguments_are_named(ids):
    with pytest.raises(ValueError, match=r"only=\['jits'\]"):
        parity.invariances(language_model("plain"), ids, only=["jits"])
    abstract = nnx.eval_shape(lambda: FlaxMLP(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"flax_module=FlaxMLP\b"):
        parity.invariances(abstract, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"flax_module="):
        parity.invariances(jnp.tanh, X)
