"""Adapt Flax modules to NNX, the only kind that the harness runs."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.traverse_util import flatten_dict

from jaxmodels.weights.names import Path, dotted, flat_arrays, with_arrays
from parity.compare.inputs import Inputs
from parity.compare.names import matches

# Added in Flax 0.12; older versions do not shard arrays eagerly.
eager_sharding = getattr(nnx, "use_eager_sharding", contextlib.nullcontext)


def as_module(flax_module: Any, inputs: Inputs | None, channels_last: Sequence[str] = ()) -> nnx.Module:
    """Convert a Flax module to NNX. Raises ValueError if it is neither an NNX nor a Linen module.

    A Linen module needs inputs: its arrays have no shapes before the first call.
    """
    if isinstance(flax_module, linen.Module):
        if inputs is None:
            raise ValueError(
                "inputs=None: a Linen module needs inputs; its arrays have no shapes before the first call"
            )
        return as_nnx(flax_module, inputs, tuple(channels_last))
    if not isinstance(flax_module, nnx.Module):
        kind = type(flax_module).__name__
        raise ValueError(f"flax_module={kind} must be a flax.nnx.Module or a flax.linen.Module")
    return flax_module


def as_nnx(module: linen.Module, inputs: Inputs, channels_last: tuple[str, ...] = ()) -> nnx.Module:
    """Wrap a Linen module as an abstract NNX module; variables keep their Linen names.

    The module is called with the inputs only: evaluation flags (train=False, deterministic=True) must be defaults or
    fields.
    """

    def make() -> nnx.Module:
        values = {n: jnp.moveaxis(v, 1, -1) if matches(n, channels_last) else v for n, v in inputs.named().items()}
        model: Any = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))
        inputs.call(functools.partial(nnx.bridge.lazy_init, model), values)
        model.to_nnx__rngs = None  # only needed for the initial values
        return model

    # Eager sharding would place `with_partitioning` arrays on a mesh with their axes, and no mesh is set here.
    with eager_sharding(False):
        return nnx.eval_shape(make)


def with_weights(module: linen.Module, inputs: Inputs, seed: int) -> nnx.Module:
    """`as_nnx` with arrays: the bound variables of the module or, if it is unbound, initial values from a seed.

    Raises ValueError if bound variables differ in name or shape from those of a call with the inputs.
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
    expected, given = ({path: a.shape for path, a in group.items()} for group in (flat_arrays(model), arrays))
    wrong = sorted({dotted(path) for path, _ in expected.items() ^ given.items()})
    if wrong:
        raise ValueError(
            f"flax_module: bound variables must equal those of a call with the inputs; different: {', '.join(wrong)}"
        )
    return with_arrays(model, arrays)
