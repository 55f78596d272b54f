"""A comparison is resolved once: what its sides share, and what each of them is in a dtype."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import parity
from jaxmodels.process.seeds import seed_32
from parity.compare.comparison import Comparison
from parity.compare.weights import OwnWeights, Twins
from parity.measure.check import read_check
from parity.measure.dtypes import read_sweep
from parity.measure.trajectory import read_trajectory
from tests.parity.pairs import FlaxMLP, mlp


@pytest.fixture
def comparison():
    return Comparison.of(*mlp(), seed=3)


@pytest.mark.slow
def test_its_readings_are_those_of_the_public_functions(comparison):
    assert read_check(comparison, steps=2).checks == parity.check(*mlp(), steps=2, seed=3).checks
    assert (
        read_sweep(comparison, dtypes=["bfloat16"]).checks == parity.sweep(*mlp(), dtypes=["bfloat16"], seed=3).checks
    )
    assert read_trajectory(comparison, steps=2).readings == parity.trajectory(*mlp(), steps=2, seed=3).readings


def test_the_reference_of_a_dtype_has_weights_and_inputs_that_the_dtype_holds(comparison):
    with comparison.strict_precision(False):
        sides = comparison.sides("bfloat16")
        state = sides.reference.state_dict()
        assert {tensor.dtype for tensor in state.values()} == {torch.float64}
        for name, tensor in sides.torch.state_dict().items():
            assert torch.equal(tensor.double(), state[name])
        (x,) = sides.inputs.named().values()
        assert x.dtype == np.float64
        assert np.array_equal(x, x.astype(jax.numpy.bfloat16).astype(np.float64))
        assert sides.jax.dtype == jax.numpy.bfloat16


def test_untrained_parameters_and_declared_zeros_are_frozen():
    torch_module, flax_module, x = mlp()
    torch_module.up.bias.requires_grad_(False)
    comparison = Comparison.of(torch_module, flax_module, x, zero_gradients=["down.*"])
    assert comparison.untrained == {"up.bias"}
    assert comparison.frozen == ("down.*", "up.bias")


def test_without_a_pytorch_module_flax_keeps_its_weights():
    _, flax_module, x = mlp()
    alone = Comparison.of(None, flax_module, x, float64=False)
    assert isinstance(alone.weights, OwnWeights)
    side = alone.jax_side("float32")
    assert np.array_equal(side.module.up.kernel[...], flax_module.up.kernel[...])
    assert alone.state_dict("float32") == {}


def test_modules_of_another_kind_are_named():
    torch_module, flax_module, x = mlp()
    assert isinstance(Comparison.of(torch_module, None, x).weights, Twins)
    with pytest.raises(ValueError, match=r"torch_module=FlaxMLP\b"):
        Comparison.of(FlaxMLP(rngs=nnx.Rngs(0)), flax_module, x)
    with pytest.raises(ValueError, match=r"flax_module=TorchMLP\b"):
        Comparison.of(torch_module, torch_module, x)


def test_a_seed_may_be_of_any_size_but_not_negative():
    with pytest.raises(ValueError, match="seed=-1"):
        Comparison.of(*mlp(), seed=-1)
    assert Comparison.of(*mlp(), seed=10**40).seed == seed_32(10**40)
