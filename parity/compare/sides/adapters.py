"""Adapt Flax modules and functions to NNX, the only kind that the harness runs."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core.scope import DenyList
from flax.traverse_util import flatten_dict

from jaxmodels.weights.names import Path, dotted, flat_arrays, with_arrays
from parity.compare.arguments import modules
from parity.compare.inputs import Inputs, cast
from parity.compare.names import matches
from parity.compare.outputs import returned_leaves
from parity.compare.sides.functions import Function, FunctionModule

# Added in Flax 0.12; older versions do not shard arrays eagerly.
eager_sharding = getattr(nnx, "use_eager_sharding", contextlib.nullcontext)


class LinenParts:
    """Called sub-modules of a Linen module, unbound, by path. Hashed by identity: jit captures the instance."""

    def __init__(self) -> None:
        self.modules: dict[Path, linen.Module] = {}

    def record(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """An interceptor for `linen.intercept_methods`."""
        module = context.module
        if module.path not in self.modules:
            self.modules[module.path] = module.clone(parent=None)
        return call(*args, **kwargs)


class LinenModule(nnx.bridge.ToNNX):
    """A Linen module as an NNX module; its variables keep their Linen names.

    A call may write into every collection but the parameters, and sow; none of it is kept, so that calls can be
    repeated. rngs: a key, an nnx.Rngs or keys by name; default a constant key.
    """

    to_nnx__parts: LinenParts | None = None
    to_nnx__seed: int = 0

    def __call__(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        if isinstance(rngs, Mapping):
            rngs = nnx.Rngs(self.to_nnx__seed, **rngs)
        rngs = nnx.Rngs(self.to_nnx__seed) if rngs is None else rngs
        if self._pytree__state.initializing:
            return super().__call__(*args, rngs=rngs, **kwargs)
        used = nnx.merge(*nnx.split(self), copy=True)  # keeps what the call writes
        kept = DenyList(("params", "intermediates"))
        return super(LinenModule, used).__call__(*args, rngs=rngs, mutable=kept, **kwargs)

    def initial(
        self, inputs: Inputs, paths: Sequence[Any], channels_last: Sequence[str] = (), seed: int = 0
    ) -> dict[Any, Any]:
        """Initial values of some variables; no others are computed."""
        module = self.to_nnx__module

        @jax.jit
        def make() -> list[Any]:
            flat: Any = dict(nnx.to_flat_state(nnx.state(initialized(module, inputs, channels_last, seed))))
            return [flat[path].get_value() for path in paths]

        with eager_sharding(False):
            return dict(zip(paths, make(), strict=True))


def as_module(flax_module: Any, inputs: Inputs | None, channels_last: Sequence[str] = ()) -> nnx.Module:
    """Convert a Flax module or a Function to NNX. Raises ValueError for anything else.

    A Linen module needs inputs: its arrays have no shapes before the first call.
    """
    _, flax_module = modules(None, flax_module)
    if isinstance(flax_module, Function):
        return FunctionModule(flax_module)
    if isinstance(flax_module, linen.Module):
        if inputs is None:
            raise ValueError(
                "inputs=None: a Linen module needs inputs; its arrays have no shapes before the first call"
            )
        return as_nnx(flax_module, inputs, tuple(channels_last))
    return flax_module


def as_nnx(module: linen.Module, inputs: Inputs, channels_last: tuple[str, ...] = ()) -> nnx.Module:
    """Wrap a Linen module as an NNX module; variables keep their Linen names.

    It is abstract unless the module is bound to variables. Variables that are neither parameters nor running
    statistics, such as counters and caches, have initial values.
    """
    if module.scope is not None:
        module, variables = module.unbind()
        return with_variables(as_nnx(module, inputs, channels_last), variables)
    parts = LinenParts()
    # Eager sharding would place `with_partitioning` arrays on a mesh with their axes, and no mesh is set here.
    with eager_sharding(False), linen.intercept_methods(parts.record):
        model = nnx.eval_shape(lambda: initialized(module, inputs, channels_last))
    model.to_nnx__parts = parts
    states = nnx.split_state(nnx.state(model), (nnx.Param, nnx.BatchStat), ...)
    others = [path for path, _ in nnx.to_flat_state(states[1])]
    return with_arrays(model, model.initial(inputs, others, channels_last)) if others else model


def initialized(module: linen.Module, inputs: Inputs, channels_last: Sequence[str], seed: int = 0) -> LinenModule:
    """A Linen module as an NNX module, with initial values."""
    named = inputs.named().items()
    values = {n: jnp.moveaxis(jnp.asarray(v), 1, -1) if matches(n, channels_last) else v for n, v in named}
    model = LinenModule(module)
    model.to_nnx__seed = seed
    inputs.call(functools.partial(nnx.bridge.lazy_init, model), values, "flax")
    return model


def returned(module: nnx.Module, inputs: Inputs, channels_last: Sequence[str] = ()) -> dict[str, Any]:
    """Shapes and dtypes of a module's outputs in evaluation mode, by Flax's names; its arrays may be abstract."""
    found: dict[str, Any] = traced(module, inputs, channels_last, lambda call: functools.partial(jax.eval_shape, call))
    return found


def traced(
    module: nnx.Module, inputs: Inputs, channels_last: Sequence[str], trace: Callable[[Callable[..., Any]], Any]
) -> Any:
    """Return value of a transformation such as `jax.make_jaxpr`, for a module's call in evaluation mode."""
    graphdef, state = nnx.split(module)

    def call(state: nnx.State, values: dict[str, Any]) -> dict[str, Any]:
        model: Any = nnx.merge(graphdef, state)
        model.eval()
        return returned_leaves(inputs.call(model, values, "flax"), jax.Array, "Flax")

    own = [array.dtype for array in flat_arrays(module).values() if jnp.issubdtype(array.dtype, jnp.floating)]
    dtype = max(own, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32))
    # As the port runs by itself: mixed dtypes are an error to some operations, and x64 changes the defaults of others.
    with jax.enable_x64(dtype.itemsize == 8):
        values = {n: jnp.asarray(cast(v, dtype)) for n, v in inputs.named().items()}
        values = {n: jnp.moveaxis(v, 1, -1) if matches(n, channels_last) else v for n, v in values.items()}
        return trace(call)(state, values)


def with_weights(module: linen.Module, inputs: Inputs, seed: int) -> nnx.Module:
    """`as_nnx` with arrays: the bound variables of the module or, if it is unbound, initial values from a seed."""
    model: Any = as_nnx(module, inputs)
    if module.scope is not None:
        return model
    return with_arrays(model, model.initial(inputs, list(flat_arrays(model)), seed=seed))


def with_variables(model: nnx.Module, variables: Mapping[str, Any]) -> nnx.Module:
    """The NNX form of a Linen module with the arrays of its variables.

    Raises ValueError if they differ in name or shape from those of a call with the inputs.
    """
    arrays: dict[Path, Any] = {}
    for collection, values in linen.meta.unbox(variables).items():
        arrays |= flatten_dict(values) if collection not in ("intermediates", "cache") else {}
    expected, given = ({path: a.shape for path, a in group.items()} for group in (flat_arrays(model), arrays))
    wrong = sorted({dotted(path) for path, _ in expected.items() ^ given.items()})
    if wrong:
        raise ValueError(
            f"flax_module: bound variables must equal those of a call with the inputs; different: {', '.join(wrong)}"
        )
    return with_arrays(model, arrays)
