"""Every call of every sub-module in a run of a PyTorch model: arguments, outputs, noise, and how to repeat it."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as torch_tree

from jaxmodels.weights.names import as_numpy
from parity.compare.inputs import children, named_leaves, with_children
from parity.compare.loss import Batch
from parity.compare.noise import RUNS, ULPS, Noise, Spread
from parity.compare.sides.torch_side import TorchSide, move, tensors_of
from parity.compare.store import Store
from parity.locate.values import leaves_of

Key = tuple[str, int]  # a path, and the number of its earlier calls
Replacement = Callable[[int, Mapping[str, Any], list[torch.Tensor]], list[torch.Tensor] | None]
"""(number of the call, arguments, floating outputs) -> floating outputs to go on with."""


class Kept:
    """A tensor among arguments, replaced by its number in the store."""

    def __init__(self, number: int):
        self.number = number


@dataclasses.dataclass
class TorchCall:
    """One call of a PyTorch sub-module; tensors are numbers in the store.

    order: by the end of the call. names: of the floating outputs.
    """

    order: int
    args: tuple
    kwargs: dict
    inputs: dict[str, int]
    outputs: list[int]
    names: list[str]
    gradients: dict[int, int]  # by output, if the run was differentiated


class TorchRun:
    """One run of a PyTorch module with every call recorded; `gradients`: also the gradients at every output.

    noise: by the number of a tensor in the store.
    """

    def __init__(
        self, side: TorchSide, batch: Batch, kept: Store, *, gradients: bool = False, ulp: float = ULPS["float64"]
    ):
        self.side, self.batch, self.kept, self.differentiated = side, batch, kept, gradients
        self.ulp = ulp
        self.modules = dict(side.module.named_modules())
        self.noise: dict[int, Noise] = {}
        first = len(kept)
        self.calls, self.counts = self.recorded(batch, kept.put)
        self.measure(first, len(kept))

    def recorded(self, batch: Batch, put: Callable[[np.ndarray], int]) -> tuple[dict[Key, TorchCall], dict[str, int]]:
        """Run the model; the calls and their number by path. put: keeps an array and returns its number."""
        recorder = Recorder(put)
        with recorder.hooked(self.modules):
            if self.differentiated:
                self.side.evaluate(batch)
            else:
                self.side.outputs(batch.inputs)
        return recorder.calls, recorder.counts

    def measure(self, first: int, last: int) -> None:
        """Measure the noise of the kept arrays: runs with parameters and inputs moved keep theirs in the same order."""
        spreads: dict[int, Spread] = {}
        rng = np.random.default_rng(0)
        for _ in range(RUNS):
            count = iter(range(first, last))

            def compare(moved: np.ndarray, count: Iterator[int] = count) -> int:
                number = next(count, -1)
                truth = self.kept.get(number) if number >= 0 else moved
                if truth.shape == moved.shape and number >= 0:
                    spreads.setdefault(number, Spread(truth)).add(moved, truth)
                return number

            with self.side.moved(self.ulp, rng):
                self.recorded(self.batch.with_inputs(self.batch.inputs.moved(self.ulp, rng)), compare)
        self.noise = {number: spread.noise(self.ulp) for number, spread in spreads.items()}

    def noises(self, numbers: list[int]) -> list[Noise]:
        """The noise of some kept arrays."""
        return [self.noise.get(number, Noise(0.0)) for number in numbers]

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
        dtype: torch.dtype | None = None,
        *,
        grad: bool = False,
        rng: np.random.Generator | None = None,
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Repeat a call, optionally with another module or dtype: floating outputs, and floating inputs by name.

        rng: moves the inputs by one unit in the last place.
        """
        call = self.calls[key]
        tensors: dict[int, torch.Tensor] = {}

        def tensor(leaf: Any) -> Any:
            if not isinstance(leaf, Kept):
                return leaf
            if leaf.number not in tensors:
                value = torch.from_numpy(np.array(self.kept.get(leaf.number)))
                if rng is not None:
                    move([value], self.ulp, rng)
                if value.is_floating_point() or value.is_complex():
                    value = value if dtype is None or value.is_complex() else value.to(dtype)
                    value.requires_grad_(grad)
                tensors[leaf.number] = value
            # A module may write into its inputs.
            return tensors[leaf.number] if grad else tensors[leaf.number].clone()

        args, kwargs = torch_tree.tree_map(tensor, (call.args, call.kwargs))
        running = self.side.running() if dtype is None else contextlib.nullcontext()
        with torch.set_grad_enabled(grad), running:
            output = (module or self.modules[key[0]])(*args, **kwargs)
        return floating(output), {n: tensors[i] for n, i in call.inputs.items() if is_floating(tensors[i])}

    def isolated_noise(self, key: Key) -> list[Noise]:
        """The noise of a call's outputs when its inputs and the sub-module's parameters are moved."""
        module = self.modules[key[0]]
        outputs = self.outputs(key)
        spreads = [Spread(truth) for truth in outputs]
        rng = np.random.default_rng(0)
        held = tensors_of(module)
        before = {name: tensor.detach().clone() for name, tensor in held.items()}
        try:
            for _ in range(RUNS):
                move(held.values(), self.ulp, rng)
                for spread, moved, truth in zip(spreads, self.repeated(key, rng=rng)[0], outputs, strict=False):
                    spread.add(as_numpy(moved), truth)
                restore(held, before)
        finally:
            restore(held, before)
        return [spread.noise(self.ulp) for spread in spreads]

    def replaced(self, key: Key, replacements: Mapping[str, Replacement]) -> list[np.ndarray]:
        """The outputs of a call if sub-modules' outputs are replaced by path; the other ones run as they are."""
        with self.hooked(replacements):
            return [as_numpy(output) for output in self.repeated(key)[0]]

    @contextlib.contextmanager
    def hooked(self, replacements: Mapping[str, Replacement]) -> Iterator[None]:
        """Replace the outputs of sub-modules within the block."""
        handles = []
        counts: dict[str, int] = {}
        for path, replacement in replacements.items():

            def after(
                module: torch.nn.Module,
                args: tuple,
                kwargs: dict,
                output: Any,
                path: str = path,
                replacement: Replacement = replacement,
            ) -> Any:
                n = counts[path] = counts.get(path, -1) + 1
                found = replacement(n, arguments_of(module, args, kwargs), floating(output))
                return None if found is None else with_floating(output, found)

            handles.append(self.modules[path].register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Recorder:
    """Records the calls of modules. put: keeps an array and returns its number."""

    def __init__(self, put: Callable[[np.ndarray], int]):
        self.put = put
        self.calls: dict[Key, TorchCall] = {}
        self.counts: dict[str, int] = {}
        self.open: list[tuple[str, tuple[tuple, dict]]] = []

    @contextlib.contextmanager
    def hooked(self, modules: Mapping[str, torch.nn.Module]) -> Iterator[None]:
        """Hook every module, so that its calls within the block are recorded."""
        handles = []
        for path, module in modules.items():
            # Arguments are copied before the call, because it may write into them.
            def before(_: torch.nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
                self.open.append((path, torch_tree.tree_map(self.keep, (args, kwargs))))

            def after(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any, path: str = path) -> None:
                while self.open and self.open[-1][0] != path:  # a call that raised, and whose error was caught
                    self.open.pop()
                if self.open:
                    self.record(path, module, self.open.pop()[1], output)

            try:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
            except RuntimeError:  # compiled by torch.jit without a place for hooks
                continue
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def record(self, path: str, module: torch.nn.Module, given: tuple[tuple, dict], output: Any) -> None:
        """Record a call that has ended; its arguments are already in the store."""
        key = path, self.counts.get(path, 0)
        self.counts[path] = key[1] + 1
        arguments = leaves_of(arguments_of(module, *given))
        inputs = {name: leaf.number for name, leaf in arguments.items() if isinstance(leaf, Kept)}
        named = floating_outputs(output)
        outputs = list(named.values())
        numbers = [self.keep(tensor).number for tensor in outputs]
        call = self.calls[key] = TorchCall(len(self.calls), *given, inputs, numbers, list(named), {})
        for i, tensor in enumerate(outputs):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, i=i: self.keep_gradient(call, i, gradient))

    def keep(self, leaf: Any) -> Any:
        """Put a tensor in the store and return its number; return anything else unchanged."""
        return Kept(self.put(as_numpy(leaf))) if isinstance(leaf, torch.Tensor) else leaf

    def keep_gradient(self, call: TorchCall, i: int, gradient: torch.Tensor) -> None:
        """Record the gradient at output i of a call."""
        call.gradients[i] = self.keep(gradient).number


def arguments_of(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by the names in `forward`; by position if it does not say."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {f"input {i}": value for i, value in enumerate(args)} | dict(kwargs)
    for name, parameter in signature.parameters.items():
        if name in bound and parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name)
    return dict(bound)


def is_floating(tensor: torch.Tensor) -> bool:
    """True for a floating or complex tensor."""
    return tensor.is_floating_point() or tensor.is_complex()


def floating_outputs(output: Any) -> dict[str, torch.Tensor]:
    """The floating and complex tensors of an output, by name."""
    return {name: t for name, t in named_leaves(output, torch.Tensor).items() if is_floating(t)}


def floating(output: Any) -> list[torch.Tensor]:
    """The floating and complex tensors of an output, in order."""
    return list(floating_outputs(output).values())


def with_floating(output: Any, new: list[torch.Tensor]) -> Any:
    """The same output with other floating tensors."""
    values = iter(new)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return next(values, leaf) if is_floating(leaf) else leaf
        inner = children(leaf)  # a dataclass that PyTorch does not know as a tree
        return with_children(leaf, [torch_tree.tree_map(one, child) for _, child in inner]) if inner else leaf

    return torch_tree.tree_map(one, output)


def restore(held: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    """Give tensors their values again."""
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(before[name])
