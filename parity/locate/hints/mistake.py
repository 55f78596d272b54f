"""A mistake that can be made in a PyTorch sub-module: in its parameters, its attributes or the functions it calls."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Context = contextlib.AbstractContextManager[Any]
Function = Callable[..., Any]
Replacement = Callable[[Function, tuple, dict[str, Any]], Any]  # (original, args, kwargs) -> result


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A change of a module, made within a context once, and the hint that it yields if it explains an error."""

    text: str
    change: Context


@dataclasses.dataclass(frozen=True)
class Family:
    """Mistakes that differ in one number, which is solved for. `grid`: increasing values that enclose the solution."""

    text: Callable[[float], str]
    change: Callable[[float], Context]
    grid: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A copy of the sub-module, and the shapes of each torch function's calls in it, by the function's name."""

    module: nn.Module
    used: Mapping[str, list[tuple[tuple[int, ...], ...]]]

    def uses(self, *names: str) -> bool:
        """True if one of these functions, or its in-place form, is called."""
        return any(name in self.used or f"{name}_" in self.used for name in names)


class Functions(TorchFunctionMode):
    """Within the context, calls of torch functions and Tensor methods go to replacements by name.

    An in-place function ('relu_') is replaced under the name of the other ('relu').
    """

    def __init__(self, replacements: Mapping[str, Replacement]):
        super().__init__()
        self.replacements = replacements

    def __torch_function__(
        self, func: Function, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        replacement = self.replacements.get(name.removesuffix("_") if not name.startswith("__") else name)
        if replacement is None:
            return func(*args, **kwargs)
        result = replacement(func, args, kwargs)
        return args[0].copy_(result) if name.endswith("_") and not name.startswith("__") else result


@contextlib.contextmanager
def functions(replacements: Mapping[str, Replacement]) -> Iterator[None]:
    """Replace torch functions, also those that functions of torch.nn.functional are made of."""
    with contextlib.ExitStack() as stack:
        for name in [name for name in vars(functional) if name.startswith("has_torch_function")]:
            stack.enter_context(mock.patch.object(functional, name, return_value=False))
        stack.enter_context(Functions(replacements))
        yield


class Recorder(TorchFunctionMode):
    """Collect the names of the functions that are called, with the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.used: dict[str, list[tuple[tuple[int, ...], ...]]] = collections.defaultdict(list)

    def __torch_function__(
        self, func: Function, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.used[getattr(func, "__name__", "")].append(shapes)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def recorded_functions() -> Iterator[Recorder]:
    """Record the functions that are called within the block."""
    with functions({}), Recorder() as recorder:
        yield recorder


def nth(name: str, n: int, replacement: Replacement) -> Context:
    """Replace the n-th call of a function only."""
    count = iter(range(1 << 60))

    def call(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
        return replacement(function, args, kwargs) if next(count) == n else function(*args, **kwargs)

    return functions({name: call})


@contextlib.contextmanager
def values(changed: Mapping[Any, torch.Tensor]) -> Iterator[None]:
    """Give tensors other values within the block."""
    before = {tensor: tensor.detach().clone() for tensor in changed}
    with torch.no_grad():
        new = {tensor: value.detach().clone() for tensor, value in changed.items()}
        try:
            for tensor, value in new.items():
                tensor.copy_(value)
            yield
        finally:
            for tensor, value in before.items():
                tensor.copy_(value)


@contextlib.contextmanager
def attributes(changed: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Give attributes of objects other values within the block: (object, name, value)."""
    before = [(owner, name, name in vars(owner), vars(owner).get(name)) for owner, name, _ in changed]
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, existed, value in before:
            if existed:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


@contextlib.contextmanager
def together(*contexts: Context) -> Iterator[None]:
    """Several changes at once."""
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def where(name: str) -> str:
    """' of <owner>' for a dotted name of a parameter or module; empty for the sub-module's own."""
    owner = name.rpartition(".")[0]
    return f" of {owner}" if owner else ""


def features_axis(module: Any) -> int:
    """The axis of output features in a weight: transformers' Conv1D has it last."""
    return -1 if type(module).__name__ == "Conv1D" else 0


def matrices(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers and the like, those with a weight of two axes that is no embedding, by name."""
    for name, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(part, nn.Embedding):
            yield name, part
