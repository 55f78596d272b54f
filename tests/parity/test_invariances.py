"""Variants that must not change a model's numbers, and models that each of them changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import parity
from jaxmodels.transformer import AutoregressiveTransformer
from parity.invariance import VARIANTS
from tests.common import S, filled, language_model, token_ids
from tests.parity.pairs import FlaxMLP


@pytest.fixture(scope="module")
def ids():
    return np.asarray(token_ids(0, S, 3))


def values(found):
    return {check.kind: check for check in found.checks}


def test_a_language_model_has_every_variant_but_devices(ids):
    """A process of the suite has one device; `python -m parity --invariances` has eight."""
    found = parity.invariances(language_model("rotary", n_layers=1), ids, labels=ids)
    assert found.passed, str(found)
    assert set(values(found)) | set(found.skipped) == set(VARIANTS)
    assert set(found.skipped) <= {"1 / 8 devices"}
    assert all(check.precision == "float64" for check in found.checks)


class Forward(AutoregressiveTransformer):
    """Sees what comes later."""

    def __call__(self, ids, rng=None):
        return super().__call__(ids) + 1e-6 * ids.mean(axis=0)[:, None]


class Jitted(AutoregressiveTransformer):
    """Computes something else when it is compiled."""

    def __call__(self, ids, rng=None):
        compiled = isinstance(ids, jax.core.Tracer)
        return super().__call__(ids) * (1.001 if compiled else 1.0)


class Batched(AutoregressiveTransformer):
    """Mixes the elements of a batch."""

    def __call__(self, ids, rng=None):
        logits = super().__call__(ids)
        return logits + 1e-6 * logits.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (Forward, "padded / unpadded"),
        (Forward, "cached / full"),
        (Jitted, "jit / no jit"),
        (Batched, "accumulated / whole batch"),
    ],
)
def test_each_variant_finds_what_it_is_for(model, kind, ids):
    broken = filled(lambda: model(23, 12, 3, 17, 1, rngs=nnx.Rngs(0)))
    found = parity.invariances(broken, ids, labels=ids, only=[kind])
    assert not values(found)[kind].passed


def test_anybodys_module_needs_its_batch_axis_named(ids):
    model, x = FlaxMLP(rngs=nnx.Rngs(0)), np.random.default_rng(0).standard_normal((5, 5))
    found = parity.invariances(model, x, only=["accumulated / whole batch", "cached / full", "scanned / unrolled"])
    assert not found.checks
    assert "batch_axis" in found.skipped["accumulated / whole batch"]
    assert "plain" in found.skipped["scanned / unrolled"]
    found = parity.invariances(model, x, batch_axis=0, only=["accumulated / whole batch"])
    assert found.passed
    assert values(found)


def test_bad_arguments_are_named(ids):
    with pytest.raises(ValueError, match="jits"):
        parity.invariances(language_model("plain"), ids, only=["jits"])
    abstract = nnx.eval_shape(lambda: FlaxMLP(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="abstract"):
        parity.invariances(abstract, jnp.ones((2, 5)))
