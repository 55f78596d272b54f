"""Helpers shared by test files. Sizes are prime, or at least unequal, so that a transposed axis cannot pass."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import torch_ref.transformer
from jaxmodels.transformer import AutoregressiveTransformer
from jaxmodels.weights.names import flat_arrays, with_arrays

# Every attention of the language model; the sums have two and three parts, with and without query-key products.
SYNTHESIZERS = [
    "dense",
    "random",
    "fixed_random",
    "factorized_dense",
    "factorized_random",
    "random+dense",
    "random+vanilla",
    "fixed_random+vanilla+factorized_dense",
]
ATTENTIONS = ["rotary", "rotary_value", "relative", "plain", *SYNTHESIZERS]

S, B, V = 13, 5, 23
SIZES = {"n_vocab": V, "d_model": 12, "heads": 3, "d_ff": 17, "n_layers": 2}
MAX_LEN = 19


def arguments(attention: str) -> dict:
    return SIZES | {"attention": attention, "max_len": MAX_LEN if attention in SYNTHESIZERS else None}


def language_model(attention: str, **others) -> AutoregressiveTransformer:
    return filled(lambda: AutoregressiveTransformer(**arguments(attention) | others, rngs=nnx.Rngs(0)))


def torch_language_model(attention: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomised_torch(torch_ref.transformer.AutoregressiveTransformer(**arguments(attention)))


def filled(make, seed: int = 7, scale: float = 0.5):
    """The module that `make` builds, each array drawn anew: zero-initialised tables and biases would hide errors.

    Nothing is compiled, and the dtype is JAX's default: float64 under the x64 fixture.
    """
    abstract = nnx.eval_shape(make)
    arrays = {}
    for i, (path, array) in enumerate(flat_arrays(abstract).items()):
        arrays[path] = scale * normal(seed + i, *array.shape) + (path[-1] == "scale")  # LayerNorm's: around 1
    return with_arrays(abstract, arrays)


@torch.no_grad()
def randomised_torch(module: torch.nn.Module, scale: float = 0.5) -> torch.nn.Module:
    for tensor in module.state_dict().values():
        tensor.add_(scale * torch.randn_like(tensor))
    return module


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def token_ids(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, shape))


def run(module, *args, **kwargs) -> jax.Array:
    """The module's call, compiled as a whole: op by op, every operation would be compiled for itself."""
    names = {name: kwargs.pop(name) for name in list(kwargs) if isinstance(kwargs[name], str)}  # mask='causal'
    return jax.jit(lambda module, args, kwargs: module(*args, **kwargs, **names))(module, args, kwargs)


def assert_close(a, b, tolerance: float = 1e-11) -> None:
    """Equal trees but for float64's rounding; also refuses a NaN on either side."""
    chex.assert_tree_all_finite((a, b))
    chex.assert_trees_all_equal_shapes(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(np.abs(y).max(initial=0)))
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=tolerance * scale)


def causal_mask(n: int) -> jax.Array:
    return jnp.asarray(np.tril(np.ones((n, n), bool))[:, :, None])
