"""A small pair of modules with inputs, for the tests of this folder."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxmodels import layers


class TorchMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = torch.nn.Linear(5, 7), torch.nn.LayerNorm(7)
        self.down = torch.nn.Linear(7, 3, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


class FlaxMLP(nnx.Module):
    def __init__(self, *, rngs):
        self.up, self.norm = layers.Linear(5, 7, rngs=rngs), layers.LayerNorm(7, rngs=rngs)
        self.down = layers.Linear(7, 3, bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.norm(self.up(x))))


def mlp() -> tuple[TorchMLP, FlaxMLP, np.ndarray]:
    torch.manual_seed(0)
    return TorchMLP(), FlaxMLP(rngs=nnx.Rngs(0)), np.random.default_rng(0).standard_normal((11, 5))
