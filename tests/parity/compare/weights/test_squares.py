"""Square matrices lie as the other matrices of the same layers do."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.compare.weights import Mapped


class Conv1D(torch.nn.Module):
    """A layer whose weight is [in, out], as that of transformers."""

    def __init__(self, i, o):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(float(i * o)).reshape(i, o))


class Turned(nnx.Module):
    """A layer whose kernel is [out, in]."""

    def __init__(self, i, o):
        self.kernel = nnx.Param(jnp.zeros((o, i)))


class Model(nnx.Module):
    def __init__(self, sizes):
        self.wide, self.square = (Turned(i, o) for i, o in sizes)


@pytest.mark.parametrize(("wide", "transposed"), [((3, 5), True), ((3, 3), False)])
def test_a_square_matrix_is_turned_with_the_others_of_its_layers(wide, transposed):
    module = torch.nn.ModuleDict({"wide": Conv1D(*wide), "square": Conv1D(3, 3)})
    model = Model([wide, (3, 3)])
    weights = Mapped(module, model, {})
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    square = np.asarray(weights.load(model, state).square.kernel[...])
    assert np.array_equal(square, state["square.weight"].T if transposed else state["square.weight"])
    assert np.array_equal(weights.read(nnx.state(weights.load(model, state)))["square.weight"], state["square.weight"])


def test_a_layout_that_is_given_stays():
    module = torch.nn.ModuleDict({"wide": Conv1D(3, 5), "square": Conv1D(3, 3)})
    model = Model([(3, 5), (3, 3)])
    weights = Mapped(module, model, {}, {"square.weight": "i o -> i o"})
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    assert np.array_equal(np.asarray(weights.load(model, state).square.kernel[...]), state["square.weight"])


def test_a_parameter_without_axes_is_carried():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.5))

    class Flax(nnx.Module):
        def __init__(self):
            self.factor = nnx.Param(jnp.zeros(()))

    module = Scaled()
    weights = Mapped(module, Flax(), {"scale": "factor"})
    loaded = weights.load(Flax(), module.state_dict())
    assert loaded.factor[...] == 2.5
    assert weights.read(nnx.state(loaded))["scale"] == 2.5
