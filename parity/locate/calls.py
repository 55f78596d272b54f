"""Pass every call of every sub-module of a Flax model to a function, within a block."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen, nnx
from flax.core.scope import DenyList

from jaxmodels.weights.names import dotted
from parity.compare.sides.jax_side import split

CALLS = ("__call__", "plain")


class NNXPart:
    """An NNX sub-module and the method that was called."""

    def __init__(self, module: nnx.Module, method: Any):
        self.method = method
        self.graphdef, self.params, self.rest = split(module)

    def call(self, params: Any, rest: Any, args: tuple, kwargs: dict) -> Any:
        """Call the method with other variables."""
        return self.method(nnx.merge(self.graphdef, params, rest, copy=True), *args, **kwargs)

    @staticmethod
    def state(gradients: Any) -> nnx.State:
        """Gradients of the parameters as a State."""
        return gradients


class LinenPart:
    """A Linen sub-module with its variables, outside the model that called it."""

    def __init__(self, module: linen.Module):
        self.rest = dict(module.variables)
        self.params = self.rest.pop("params", {})
        self.module = module.clone(parent=None, name=None)

    def call(self, params: Any, rest: Any, args: tuple, kwargs: dict) -> Any:
        """Call the module with other variables."""
        written = DenyList(("params", "intermediates"))
        return self.module.apply({"params": params, **rest}, *args, mutable=written, **kwargs)[0]

    @staticmethod
    def state(gradients: Any) -> nnx.State:
        """Gradients of the parameters as a State."""
        return nnx.State(gradients)


@dataclasses.dataclass(frozen=True)
class FlaxCall:
    """One call of a Flax sub-module that is being recorded."""

    path: str
    type: str
    part: Callable[[], NNXPart | LinenPart]
    signature: inspect.Signature
    args: tuple
    kwargs: dict
    output: Any


Record = Callable[[FlaxCall], Any]  # returns the output that the model continues with


@contextlib.contextmanager
def recorded(model: Any, record: Record, within: Any) -> Iterator[None]:
    """Pass every call of a sub-module within the block to `record`, except those that `record` itself makes.

    within: arrays of the trace that the block belongs to. Calls inside another one, of jit or scan, have no values here
    and are not recorded.
    """
    busy = False
    allowed = traces(within)

    def record_once(call: FlaxCall) -> Any:
        nonlocal busy
        arrays = jax.tree.leaves((call.args, call.kwargs, call.output))
        if busy or not traces(arrays) <= allowed:
            return call.output
        busy = True
        try:
            return record(call)
        finally:
            busy = False

    with contextlib.ExitStack() as stack:
        if hasattr(model, "to_nnx__module"):
            stack.enter_context(linen_calls(record_once))
        else:
            stack.enter_context(nnx_calls(model, record_once))
        yield


def traces(tree: Any) -> set[int]:
    """The traces of the tracers in a tree, and those around them."""
    found = set()
    for leaf in jax.tree.leaves(tree):
        trace = getattr(leaf, "_trace", None) if isinstance(leaf, jax.core.Tracer) else None
        while trace is not None:
            found.add(id(trace))
            trace = getattr(trace, "parent_trace", None)
    return found


@contextlib.contextmanager
def linen_calls(record: Record) -> Iterator[None]:
    """Pass calls of Linen modules within the block to `record`."""

    def intercept(proceed: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        output = proceed(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        module = context.module
        signature = inspect.signature(context.orig_method)
        path = ".".join(module.path)
        return record(FlaxCall(path, type(module).__name__, lambda: LinenPart(module), signature, args, kwargs, output))

    # Without jit a scan over layers runs as a loop, so that its calls have values.
    with linen.intercept_methods(intercept), jax.disable_jit():
        yield


@contextlib.contextmanager
def nnx_calls(model: nnx.Module, record: Record) -> Iterator[None]:
    """Pass calls of the sub-modules of an NNX model within the block to `record`."""
    paths = {id(m): dotted(path) for path, m in nnx.iter_modules(model)}
    active: list[Any] = []

    def wrapped(original: Any) -> Any:
        parameters = list(inspect.signature(original).parameters.values())
        signature = inspect.Signature(parameters[1:])  # without self

        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if active and active[-1] is self:  # a subclass calls super().__call__: one call, not two
                return original(self, *args, **kwargs)
            active.append(self)
            try:
                output = original(self, *args, **kwargs)
            finally:
                active.pop()
            path = paths.get(id(self))
            if path is None:
                return output
            part = lambda: NNXPart(self, original)  # noqa: E731
            return record(FlaxCall(path, type(self).__name__, part, signature, args, kwargs, output))

        return call

    with calls_replaced(model, wrapped):
        yield


@contextlib.contextmanager
def calls_replaced(model: Any, wrapped: Callable[[Any], Any]) -> Iterator[None]:
    """Replace each method in CALLS of the classes of the model's modules by wrapped(method) within the block."""
    classes = {type(m) for _, m in nnx.iter_modules(model)}
    own = {(cls, name): vars(cls).get(name) for cls in classes for name in CALLS if hasattr(cls, name)}
    wrappers = {
        key: wrapped(getattr(*key)) for key in own
    }  # read all before setting any: classes may inherit from each other
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


def unstacked(model: Any) -> Any:
    """The model with its layers in a list: calls inside a scan have no concrete values."""
    return model.unstacked() if hasattr(model, "unstacked") else model
