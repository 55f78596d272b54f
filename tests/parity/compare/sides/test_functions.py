"""Models that are functions of their parameters: any pytree, its key paths, and the constants in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity
from jaxmodels.weights.names import dotted, flat_arrays
from parity.compare.sides.adapters import as_module

RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 3))


@dataclasses.dataclass
class Affine:
    weight: object
    bias: object
    scale: float = 2.0

    def __call__(self, x):
        return (x @ self.weight.T + self.bias) * self.scale


PARAMS = {
    "layers": [{"w": np.ones((3, 7))}, None, Affine(jnp.ones((5, 7)), jnp.ones(5))],
    "mlp/~/b": jnp.zeros(7),
    "steps": jnp.arange(2),
    "activation": jnp.tanh,
}


def apply(params, x):
    x = params["activation"](x @ params["layers"][0]["w"] + params["mlp/~/b"])
    return params["layers"][2](x) + params["steps"].sum()


def test_arrays_have_the_key_paths_of_the_params():
    module = as_module(parity.Function(apply, PARAMS), None)
    assert {dotted(path): array.shape for path, array in flat_arrays(module).items()} == {
        "layers.0.w": (3, 7),
        "layers.2.weight": (5, 7),
        "layers.2.bias": (5,),
        "mlp/~/b": (7,),
        "steps": (2,),
    }
    trained = {dotted(path) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert trained == {"layers.0.w", "layers.2.weight", "layers.2.bias", "mlp/~/b"}


def test_the_call_is_that_of_the_function_with_the_modules_arrays():
    module = as_module(parity.Function(apply, PARAMS), None)
    np.testing.assert_allclose(module(X), apply(PARAMS, X), rtol=1e-6)
    graphdef, state = nnx.split(module)
    doubled = nnx.merge(graphdef, jax.tree.map(lambda a: 2 * a, state))
    assert not np.array_equal(doubled(X), apply(PARAMS, X))
    assert hash(graphdef) == hash(nnx.split(module)[0])
    assert PARAMS["layers"][2].scale == 2.0


@pytest.mark.parametrize("params", [{}, jnp.ones(3), [jnp.ones(2)], np.float32(3)])
def test_any_pytree_is_taken(params):
    module = as_module(parity.Function(lambda p, x: p, params), None)
    assert jax.tree.all(jax.tree.map(np.array_equal, module(X), params))


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 7), torch.nn.Linear(7, 5)

    def forward(self, x, gain):
        return self.down(torch.tanh(self.up(x))) * gain


NAMES = {"up.weight": "layers.0.w", "up.bias": "mlp/~/b", "down": "layers.2"}


@pytest.mark.slow
def test_a_function_is_checked_and_a_wrong_one_found():
    torch.manual_seed(0)

    def port(params, x, gain, power=1.0):
        return (apply(params, x) - params["steps"].sum()) / 2 * gain**power

    inputs = {"x": X, "gain": 3.0}
    report = parity.check(Torch(), parity.Function(port, PARAMS), inputs, names=NAMES, flax_only=["steps"], steps=1)
    assert report.passed, str(report)
    assert {check.kind for check in report.checks} >= {"parameter gradients", "input gradients"}
    settings = {"names": NAMES, "flax_only": ["steps"], "steps": 0, "flax_kwargs": {"power": 1.001}}
    report = parity.check(Torch(), parity.Function(port, PARAMS), inputs, **settings)
    assert report.value("output", "float64") > 1e6
