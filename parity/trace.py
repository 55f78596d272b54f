"""Where two models part: the activations of every sub-module on both sides, matched by path.

The culprit is the first sub-module, in the order in which PyTorch finishes them, that was given the same inputs on both
sides and gave another output. Its victims downstream were given other inputs; what encloses it finishes later.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxmodels.convert.params import from_torch
from parity.divergence import Divergence
from parity.objective import Inputs

CALLS = ("__call__", "plain")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a sub-module: the floating arrays that went in, in order, and those that came out."""

    inputs: list[np.ndarray]
    outputs: list[np.ndarray]


def first_divergence(
    torch_module: torch.nn.Module, flax_module: nnx.Module, inputs: Inputs, *, tolerance: float = 1e-10
) -> Divergence | None:
    """Runs both in float64 (call it with x64 enabled), un-jitted, and names the culprit; None where all outputs agree.

    The Flax side runs its `plain` form where it has one, so that every sub-module is called as a module.
    """
    torch_calls = trace_torch(torch_module, inputs)
    model = from_torch(flax_module, torch_module.state_dict())
    flax_calls, types = trace_flax(model, inputs)
    victims = []
    for key, ours in torch_calls.items():
        theirs = flax_calls.get(key)
        if theirs is None:
            continue
        error = distance(theirs.outputs, ours.outputs)
        if error is None or error <= tolerance:
            continue
        divergence = Divergence(key[0], types[key[0]], error)
        if (distance(theirs.inputs, ours.inputs) or 0.0) <= tolerance:
            return divergence
        victims.append(divergence)
    if victims:
        return victims[0]
    values = {name: jnp.asarray(value) for name, value in inputs.named().items()}
    fast = floating((inputs.call(jax.jit(lambda *args, **kwargs: model(*args, **kwargs)), values),), {})
    error = distance(fast, flax_calls["", 0].outputs)
    if error is None or error <= tolerance:
        return None
    return Divergence("", type(model).__name__, error, fast_path=True)


def distance(theirs: list[np.ndarray], ours: list[np.ndarray]) -> float | None:
    """The worst max|Δ| / max|ours| over pairs of arrays, infinite where a value is not finite.

    Pairs are taken as far as both sides go: an argument that one side leaves out has no counterpart. None where shapes
    do not broadcast: a dropout on weights that lie otherwise is not comparable, the module around it is.
    """
    worst = 0.0
    for a, b in zip(theirs, ours, strict=False):
        try:
            a, b = np.broadcast_arrays(a, b)
        except ValueError:
            return None
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return np.inf
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)) / (float(np.abs(b).max(initial=0.0)) or 1.0))
    return worst


def trace_torch(module: torch.nn.Module, inputs: Inputs) -> dict[tuple[str, int], Call]:
    """Every call by (path, how many times it was called before), in the order of completion."""
    calls: dict[tuple[str, int], Call] = {}
    counts: dict[str, int] = {}

    def hook(path: str):
        def record(_, args, kwargs, output):
            n = counts[path] = counts.get(path, -1) + 1
            calls[path, n] = Call(floating(args, kwargs), floating((output,), {}))

        return record

    handles = [m.register_forward_hook(hook(path), with_kwargs=True) for path, m in module.named_modules()]
    try:
        values = {name: torch.as_tensor(value) for name, value in inputs.named().items()}
        with torch.no_grad():
            inputs.call(module, {n: v.double() if v.is_floating_point() else v for n, v in values.items()})
    finally:
        for handle in handles:
            handle.remove()
    return calls


def trace_flax(model: Any, inputs: Inputs) -> tuple[dict[tuple[str, int], Call], dict[str, str]]:
    """The same for a Flax model, and the type of each path's module."""
    model = model.unstacked() if hasattr(model, "unstacked") else model  # inside a scan no call would be seen
    paths = {id(m): ".".join(map(str, path)) for path, m in nnx.iter_modules(model)}
    types = {paths[id(m)]: type(m).__name__ for _, m in nnx.iter_modules(model)}
    calls: dict[tuple[str, int], Call] = {}
    counts: dict[str, int] = {}

    def record(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        path = paths.get(id(module))
        if path is not None:
            n = counts[path] = counts.get(path, -1) + 1
            calls[path, n] = Call(floating(args, kwargs), floating((output,), {}))

    values = {name: jnp.asarray(value) for name, value in inputs.named().items()}
    with recorded_calls({type(m) for _, m in nnx.iter_modules(model)}, record):
        inputs.call(getattr(model, "plain", model), values)
    return calls, types


@contextlib.contextmanager
def recorded_calls(classes: set[type], record: Any) -> Iterator[None]:
    """While open, every call of an instance of the classes is told to record(module, args, kwargs, output)."""
    active: list[Any] = []

    def wrapped(original: Any) -> Any:
        def call(self, *args, **kwargs):
            if active and active[-1] is self:  # a subclass calling super().__call__: one call, not two
                return original(self, *args, **kwargs)
            active.append(self)
            try:
                output = original(self, *args, **kwargs)
            finally:
                active.pop()
            record(self, args, kwargs, output)
            return output

        return call

    own = {(cls, name): vars(cls).get(name) for cls in classes for name in CALLS if hasattr(cls, name)}
    wrappers = {key: wrapped(getattr(*key)) for key in own}  # all taken before any is set: they may inherit
    try:
        for key, wrapper in wrappers.items():
            setattr(*key, wrapper)
        yield
    finally:
        for key, original in own.items():
            if original is None:
                delattr(*key)
            else:
                setattr(*key, original)


def floating(args: tuple, kwargs: dict) -> list[np.ndarray]:
    """The floating arrays among arguments: positional ones, then named ones in alphabetical order."""
    leaves = jax.tree.leaves((args, sorted(kwargs.items())))
    arrays = [leaf.detach().numpy() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return [np.asarray(a, np.float64) for a in arrays if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)]
