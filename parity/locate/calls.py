"""Every call of every sub-module on both sides: what went in, what came out, and how to make it again."""

import contextlib
import dataclasses
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
from parity.compare.inputs import Inputs, named_leaves
from parity.compare.jax_side import split
from parity.compare.torch_side import TorchSide
from parity.locate.store import Store

CALLS = ("__call__", "plain")
Key = tuple[str, int]  # a path, and how many times it was called before


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tensor among arguments, under its number in the store."""

    number: int


@dataclasses.dataclass
class TorchCall:
    """One call of a PyTorch sub-module. `order`: of completion; numbers in the store stand for tensors."""

    order: int
    args: tuple
    kwargs: dict
    inputs: dict[str, int]
    outputs: list[int]
    gradients: dict[int, int]  # by output, where the run was differentiated


class TorchRun:
    """One run of a PyTorch module with every call kept; with an objective, the gradients at every output too."""

    def __init__(self, side: TorchSide, inputs: Inputs, kept: Store, objective: tuple | None = None):
        self.side, self.kept = side, kept
        self.modules = dict(side.module.named_modules())
        self.calls: dict[Key, TorchCall] = {}
        self.counts: dict[str, int] = {}
        with self.hooked():
            if objective is None:
                side.outputs(inputs)
            else:
                side.evaluate(inputs, *objective)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        open_calls: list[tuple[tuple, dict]] = []
        handles = []
        for path, module in self.modules.items():
            # The arguments are taken before the call: it may write into them.
            def before(_, args, kwargs):
                open_calls.append(torch_tree.tree_map(self.keep, (args, kwargs)))

            def after(module, args, kwargs, output, path=path):
                self.record(path, module, open_calls.pop(), output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def record(self, path: str, module: torch.nn.Module, given: tuple[tuple, dict], output: Any) -> None:
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
        return Kept(self.kept.put(leaf.detach().cpu().numpy())) if isinstance(leaf, torch.Tensor) else leaf

    def keep_gradient(self, call: TorchCall, i: int, gradient: torch.Tensor) -> None:
        call.gradients[i] = self.keep(gradient).number

    def given(self, key: Key) -> dict[str, np.ndarray]:
        return {name: self.kept.get(number) for name, number in self.calls[key].inputs.items()}

    def outputs(self, key: Key) -> list[np.ndarray]:
        return [self.kept.get(number) for number in self.calls[key].outputs]

    def gradients(self, key: Key) -> dict[int, np.ndarray]:
        return {i: self.kept.get(number) for i, number in self.calls[key].gradients.items()}

    def again(self, key: Key, module: torch.nn.Module | None = None, dtype: torch.dtype = torch.float64, grad=False):
        """The same call once more, of another module or in another dtype: floating outputs, and inputs by name."""
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
    """Everything in nested arguments by name: 'x', 'states[0]', …"""
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
    """The same arguments, those of the given names replaced."""

    def walk(name: str, node: Any) -> Any:
        if isinstance(node, tuple | list):
            children = [walk(f"{name}[{i}]", child) for i, child in enumerate(node)]
            return type(node)(*children) if hasattr(node, "_fields") else type(node)(children)
        if isinstance(node, dict):
            return {key: walk(f"{name}[{key}]" if name else str(key), child) for key, child in node.items()}
        return values.get(name, node)

    return walk("", dict(arguments))


class NNXPart:
    """An NNX sub-module and which of its methods was called."""

    def __init__(self, module: nnx.Module, method: Any):
        self.method = method
        self.graphdef, self.params, self.rest = split(module)

    def call(self, params: Any, args: tuple, kwargs: dict) -> Any:
        return self.method(nnx.merge(self.graphdef, params, self.rest), *args, **kwargs)

    @staticmethod
    def state(gradients: Any) -> nnx.State:
        return gradients


class LinenPart:
    """A Linen sub-module, taken out of the model that called it."""

    def __init__(self, module: linen.Module):
        self.variables = dict(module.variables)
        self.params = self.variables.pop("params", {})
        self.module = module.clone(parent=None, name=None)

    def call(self, params: Any, args: tuple, kwargs: dict) -> Any:
        return self.module.apply({"params": params, **self.variables}, *args, **kwargs)

    @staticmethod
    def state(gradients: Any) -> nnx.State:
        return nnx.State(gradients)


@dataclasses.dataclass(frozen=True)
class FlaxCall:
    """One call of a Flax sub-module, while it is being recorded."""

    path: str
    type: str
    part: Callable[[], NNXPart | LinenPart]
    arguments: inspect.BoundArguments
    output: Any


Record = Callable[[FlaxCall], Any]  # returns the output to go on with


@contextlib.contextmanager
def recorded(model: Any, record: Record) -> Iterator[None]:
    """While open, every call of a part of the model, that is not made by `record` itself, is told to `record`."""
    busy = False

    def tell(call: FlaxCall) -> Any:
        nonlocal busy
        if busy or any(isinstance(leaf, jax.core.Tracer) and no_jvp(leaf) for leaf in jax.tree.leaves(call.output)):
            return call.output
        busy = True
        try:
            return record(call)
        finally:
            busy = False

    with contextlib.ExitStack() as stack:
        if hasattr(model, "to_nnx__module"):
            stack.enter_context(linen_calls(tell))
        else:
            stack.enter_context(nnx_calls(model, tell))
        yield


def no_jvp(leaf: Any) -> bool:
    """Whether a traced value has no concrete one behind it: inside jit or scan there is nothing to read."""
    while isinstance(leaf, jax.core.Tracer):
        if not hasattr(leaf, "primal"):
            return True
        leaf = leaf.primal
    return False


@contextlib.contextmanager
def linen_calls(tell: Record) -> Iterator[None]:
    def intercept(proceed: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        output = proceed(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        module = context.module
        arguments = inspect.signature(context.orig_method).bind(*args, **kwargs)
        return tell(
            FlaxCall(".".join(module.path), type(module).__name__, lambda: LinenPart(module), arguments, output)
        )

    # A scan over layers runs as a loop: its calls are seen, and with values.
    with linen.intercept_methods(intercept), jax.disable_jit():
        yield


@contextlib.contextmanager
def nnx_calls(model: nnx.Module, tell: Record) -> Iterator[None]:
    paths = {id(m): dotted(path) for path, m in nnx.iter_modules(model)}
    active: list[Any] = []

    def wrapped(original: Any) -> Any:
        parameters = list(inspect.signature(original).parameters.values())
        signature = inspect.Signature(parameters[1:])  # without self

        def call(self, *args, **kwargs):
            if active and active[-1] is self:  # a subclass calling super().__call__: one call, not two
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
            return tell(FlaxCall(path, type(self).__name__, lambda: NNXPart(self, original), arguments, output))

        return call

    with calls_replaced(model, wrapped):
        yield


@contextlib.contextmanager
def calls_replaced(model: Any, wrapped: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the block every class of the model's modules has wrapped(method) in the place of each of CALLS."""
    classes = {type(m) for _, m in nnx.iter_modules(model)}
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


def unstacked(model: Any) -> Any:
    """The model with its layers one by one: inside a scan no call would be seen."""
    return model.unstacked() if hasattr(model, "unstacked") else model


def numeric(leaf: Any) -> str:
    """'f', 'i' or 'b' for arrays of floats, integers, booleans; '' for anything else."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return ""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return "f"
    return {"i": "i", "u": "i", "b": "b"}.get(np.dtype(leaf.dtype).kind, "")
