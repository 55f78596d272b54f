"""Linen modules as NNX ones, so that everything else knows one kind."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.traverse_util import flatten_dict

from jaxmodels.weights.names import Path, dotted, flat_arrays, with_arrays
from parity.compare.inputs import Inputs, matches

# Flax 0.12 has it; where it is missing, nothing is laid out before it is asked for.
eager_sharding = getattr(nnx, "use_eager_sharding", contextlib.nullcontext)


def as_module(flax_module: Any, inputs: Inputs, channels_last: Sequence[str] = ()) -> nnx.Module:
    """The module, a Linen one as an NNX one; raises ValueError for anything else."""
    if isinstance(flax_module, linen.Module):
        return as_nnx(flax_module, inputs, tuple(channels_last))
    if not isinstance(flax_module, nnx.Module):
        kind = type(flax_module).__name__
        raise ValueError(f"flax_module must be a flax.nnx.Module or a flax.linen.Module, got a {kind}")
    return flax_module


def as_nnx(module: linen.Module, inputs: Inputs, channels_last: tuple[str, ...] = ()) -> nnx.Module:
    """An abstract NNX module that calls a Linen one; its variables are under the names that Linen gives them.

    The module is called as it is, with the inputs alone: what an evaluation needs (train=False, deterministic=True) has
    to be its default, or one of its fields.
    """

    def make() -> nnx.Module:
        values = {n: jnp.moveaxis(v, 1, -1) if matches(n, channels_last) else v for n, v in inputs.named().items()}
        model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))
        inputs.call(lambda *args, **kwargs: nnx.bridge.lazy_init(model, *args, **kwargs), values)
        model.to_nnx__rngs = None  # drawn once; a call needs none
        return model

    with eager_sharding(False):  # what `with_partitioning` annotates wants a mesh with its axes, and needs none here
        return nnx.eval_shape(make)


def with_weights(module: linen.Module, inputs: Inputs, seed: int) -> nnx.Module:
    """`as_nnx` with arrays: the variables that the module is bound to; unbound, those that it draws from a seed.

    Raises ValueError where the bound variables differ, in name or shape, from those that a call with the inputs has.
    """
    if module.scope is None:
        values = {name: jnp.asarray(value) for name, value in inputs.named().items()}
        variables = inputs.call(functools.partial(module.init, jax.random.key(seed)), values)
    else:
        module, variables = module.unbind()
    model = as_nnx(module, inputs)
    arrays: dict[Path, Any] = {}
    for collection in linen.meta.unbox(variables).values():
        arrays |= flatten_dict(collection)
    wanted, given = ({path: a.shape for path, a in group.items()} for group in (flat_arrays(model), arrays))
    wrong = sorted({dotted(path) for path, _ in wanted.items() ^ given.items()})
    if wrong:
        raise ValueError(f"flax_module is bound to other variables than a call with the inputs has: {', '.join(wrong)}")
    return with_arrays(model, arrays)
