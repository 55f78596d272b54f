"""Record every call of every sub-module on both sides: its arguments, its outputs, and how to repeat it."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from torch.utils import _pytree as torch_tree

from jaxmodels.weights.names import dotted
from parity.compare.inputs import named_leaves
from parity.compare.jax_side import split
from parity.compare.loss import Batch
from parity.compare.torch_side import TorchSide
from parity.locate.store import Store

CALLS = ("__call__", "plain")
Key = tuple[str, int]  # a path, and the number of its earlier calls


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tensor among arguments, replaced by its number in the store."""

    number: int


@dataclasses.dataclass
class TorchCall:
    """One call of a PyTorch sub-module; tensors are numbers in the store. order: by the end of the call."""

    order: int
    args: tuple
    kwargs: dict
    inputs: dict[str, int]
    outputs: list[int]
    gradients: dict[int, int]  # by output, if the run was differentiated


class TorchRun:
    """One run of a PyTorch module with every call recorded; `gradients`: also the gradients at every output."""

    def __init__(self, side: TorchSide, batch: Batch, kept: Store, *, gradients: bool = False):
        self.side, self.kept = side, kept
        self.modules = dict(side.module.named_modules())
        self.calls: dict[Key, TorchCall] = {}
        self.counts: dict[str, int] = {}
        with self.hooked():
            if gradients:
                side.evaluate(batch)
            else:
                side.outputs(batch.inputs)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook every sub-module, so that its calls within the block are recorded."""
        open_calls: list[tuple[tuple, dict]] = []
        handles = []
        for path, module in self.modules.items():
            # Arguments are copied before the call, because it may write into them.
            def before(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
                open_calls.append(torch_tree.tree_map(self.keep, (args, kwargs)))

            def after(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any, path: str = path) -> None:
                self.record(path, module, open_calls.pop(), output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def record(self, path: str, module: torch.nn.Module, given: tuple[tuple, dict], output: Any) -> None:
        """Record a call that has ended; its arguments are already in the store."""
        key = path, self.counts.get(path, 0)
        self.counts[path] = key[1] + 1
        args, kwargs = given
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        inputs = {name: leaf.number for name, leaf in leaves_of(arguments).items() if isinstance(leaf, Kept)}
        outputs = [t for t in named_leaves(output, torch.Tensor).values() if t.is_floating_point()]
        numbers = [self.keep(tensor).number for tensor in outputs]
        call = self.calls[key] = TorchCall(len(self.calls), *given, inputs, numbers, {})
        for i, tensor in enumerate(outputs):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, i=i: self.keep_gradient(call, i, gradient))

    def keep(self, leaf: Any) -> Any:
        """Put a tensor in the store and return its number; return anything else unchanged."""
        return Kept(self.kept.put(leaf.detach().cpu().numpy())) if isinstance(leaf, torch.Tensor) else leaf

    def keep_gradient(self, call: TorchCall, i: int, gradient: torch.Tensor) -> None:
        """Record the gradient at output i of a call."""
        call.gradients[i] = self.keep(gradient).number

    def outputs(self, key: Key) -> list[np.ndarray]:
        """The floating outputs of a call."""
        return [self.kept.get(number) for number in self.calls[key].outputs]

    def gradients(self, key: Key) -> dict[int, np.ndarray]:
        """The gradients at the outputs of a call, by the output's number."""
        return {i: self.kept.get(number) for i, number in self.calls[key].gradients.items()}

    def repeated(
        self,
        key: Key,
        module: torch.nn.Module | None = None,
        dtype: torch.dtype = torch.float64,
        *,
        grad: bool = False,
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Repeat a call, optionally with another module or dtype: floating outputs, and floating inputs by name."""
        call = self.calls[key]
        tensors: dict[int, torch.Tensor] = {}

        def tensor(leaf: Any) -> Any:
            if not isinstance(leaf, Kept):
                return leaf
            value = torch.from_numpy(np.array(self.kept.get(leaf.number)))
            value = value.to(dtype).requires_grad_(grad) if value.is_floating_point() else value
            return tensors.setdefault(leaf.number, value)

        args, kwargs = torch_tree.tree_map(tensor, (call.args, call.kwargs))
        with torch.set_grad_enabled(grad):
            output = (module or self.modules[key[0]])(*args, **kwargs)
        outputs = [t for t in named_leaves(output, torch.Tensor).values() if t.is_floating_point()]
        return outputs, {n: tensors[i] for n, i in call.inputs.items() if tensors[i].is_floating_point()}


def leaves_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Leaves of nested arguments by name: 'x', 'states[0]', …"""
    found: dict[str, Any] = {}

    def walk(name: str, node: Any) -> None:
        if isinstance(node, tuple | list):
            for i, child in enumerate(node):
                walk(f"{name}[{i}]", child)
        elif isinstance(node, dict):
            for key, child in node.items():
                walk(f"{name}[{key}]" if name else str(key), child)
        else:
            found[name] = node

    walk("", dict(arguments))
    return found


def with_leaves(arguments: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with the named leaves replaced."""

    def walk(name: str, node: Any) -> Any:
        if isinstance(node, tuple | list):
            children = [walk(f"{name}[{i}]", child) for i, child in enumerate(node)]
            return type(node)(*children) if hasattr(node, "_fields") else type(node)(children)
        if isinstance(node, dict):
            return {key: walk(f"{name}[{key}]" if name else str(key), child) for key, child in node.items()}
        return values.get(name, node)

    return walk("", dict(arguments))


class NNXPart:
    """An NNX sub-module and the method that was called."""

    def __init__(self, module: nnx.Module, method: Any):
        self.method = method
        self.graphdef, self.params, self.rest = split(module)

    def call(self, params: Any, args: tuple, kwargs: dict) -> Any:
        """Call the method with other parameters."""
        return self.method(nnx.merge(self.graphdef, params, self.rest), *args, **kwargs)

    @staticmethod
    def state(gradients: Any) -> nnx.State:
        """Gradients of the parameters as a State."""
        return gradients


class LinenPart:
    """A Linen sub-module with its variables, outside the model that called it."""

    def __init__(self, module: linen.Module):
        self.variables = dict(module.variables)
        self.params = self.variables.pop("params", {})
        self.module = module.clone(parent=None, name=None)

    def call(self, params: Any, args: tuple, kwargs: dict) -> Any:
        """Call the module with other parameters."""
        return self.module.apply({"params": params, **self.variables}, *args, **kwargs)

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
    arguments: inspect.BoundArguments
    output: Any


Record = Callable[[FlaxCall], Any]  # returns the output that the model continues with


@contextlib.contextmanager
def recorded(model: Any, record: Record) -> Iterator[None]:
    """Pass every call of a sub-module within the block to `record`, except those that `record` itself makes."""
    busy = False

    def record_once(call: FlaxCall) -> Any:
        nonlocal busy
        if busy or any(is_abstract(leaf) for leaf in jax.tree.leaves(call.output)):
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


def is_abstract(leaf: Any) -> bool:
    """True for a tracer without a value, as inside jit or scan; a tracer of `jax.grad` has one."""
    while isinstance(leaf, jax.core.Tracer):
        if not hasattr(leaf, "primal"):
            return True
        leaf = leaf.primal
    return False


@contextlib.contextmanager
def linen_calls(record: Record) -> Iterator[None]:
    """Pass calls of Linen modules within the block to `record`."""

    def intercept(proceed: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        output = proceed(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        module = context.module
        arguments = inspect.signature(context.orig_method).bind(*args, **kwargs)
        path = ".".join(module.path)
        return record(FlaxCall(path, type(module).__name__, lambda: LinenPart(module), arguments, output))

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
            arguments = signature.bind(*args, **kwargs)
            return record(FlaxCall(path, type(self).__name__, lambda: NNXPart(self, original), arguments, output))

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


def numeric(leaf: Any) -> str:
    """'f', 'i' or 'b' for arrays of floats, integers, booleans; '' for anything else."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return ""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return "f"
    return {"i": "i", "u": "i", "b": "b"}.get(np.dtype(leaf.dtype).kind, "")
