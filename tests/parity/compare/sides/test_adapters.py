"""Linen modules whose parameters name the axes of a mesh: they are compared without one."""

import contextlib
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import parity
import parity.compare.sides.adapters
from parity.compare.inputs import Inputs
from tests.parity.pairs import mlp

KERNEL = linen.initializers.lecun_normal()


class Partitioned(linen.Module):
    """The MLP of `pairs`; each kernel is annotated in one of Linen's two ways."""

    scale: float = 1.0

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(7, kernel_init=linen.with_partitioning(KERNEL, ("data", "model")), name="up")(x)
        x = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x) * self.scale
        logical = linen.with_logical_partitioning(KERNEL, ("embed", "mlp"))
        return linen.Dense(3, use_bias=False, kernel_init=logical, name="down")(jnp.tanh(x))


@pytest.mark.slow
def test_partitioned_parameters_are_compared_and_the_culprit_is_named():
    torch_module, _, x = mlp()
    parity.check(torch_module, Partitioned(), x, steps=2).raise_if_failed()
    report = parity.check(torch_module, Partitioned(scale=1.001), x, steps=0)
    assert {check.kind for check in report.checks if not check.passed} >= {"output", "parameter gradients"}
    assert report.name == "Partitioned"


@pytest.mark.slow
def test_a_bound_and_an_unbound_module_are_compared():
    x = mlp()[2]
    only = ["jit / no jit", "accumulated / whole batch"]
    for module in (Partitioned(), Partitioned().bind(Partitioned().init(jax.random.key(0), x))):
        found = parity.invariances(module, x, batch_axis=0, only=only)
        assert found.passed, str(found)
        assert len(found.checks) == 2


@pytest.fixture
def linen_side_of_an_older_flax(monkeypatch):
    """A second copy of the module: reloading it would replace its classes for all tests that follow."""
    monkeypatch.delattr(nnx, "use_eager_sharding")
    spec = importlib.util.spec_from_file_location("older_adapters", parity.compare.sides.adapters.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_older_flax_has_no_eager_sharding_to_switch_off(linen_side_of_an_older_flax):
    assert linen_side_of_an_older_flax.eager_sharding is contextlib.nullcontext
    x = mlp()[2]
    model = linen_side_of_an_older_flax.as_module(linen.Dense(3), Inputs.of(x))
    assert model.kernel.shape == (5, 3)
