"""Every call of every sub-module in a run of a Flax model that has a counterpart in PyTorch, and how to repeat it.

In float64 the model runs with nothing narrowed: its calls are recorded while it is traced, and their arrays are further
results of that trace. Repeated calls run likewise, operation by operation: layers of the same shapes share them.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.compare.inputs import Inputs
from parity.compare.sides.jax_side import JaxSide, split
from parity.compare.sides.widen import Widened
from parity.compare.store import Store
from parity.locate.calls import FlaxCall, LinenPart, NNXPart, recorded, unstacked
from parity.locate.torch_calls import Key
from parity.locate.values import floating, floating_outputs, leaves_of, numeric, with_leaves


@dataclasses.dataclass
class Recorded:
    """A call with its arrays in the store: the floating outputs, and the array arguments by name.

    dtypes: of the array arguments; the store has narrower floats than float32 as float32. keys: random keys.
    results: names of the outputs.
    """

    path: str
    type: str
    part: NNXPart | LinenPart | None
    signature: inspect.Signature
    args: tuple
    kwargs: dict
    inputs: dict[str, int] = dataclasses.field(default_factory=dict)
    outputs: list[int] = dataclasses.field(default_factory=list)
    dtypes: dict[str, Any] = dataclasses.field(default_factory=dict)
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: list[str] = dataclasses.field(default_factory=list)

    def names(self) -> dict[str, Any]:
        """The leaves of all arguments by name."""
        return leaves_of(self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Arguments by the names of parameters."""
        return dict(self.signature.bind(*self.args, **self.kwargs).arguments)

    def call(self, params: Any, rest: Any, arrays: dict[str, Any]) -> list[jax.Array]:
        """Repeat the call with other variables and arrays; returns its floating outputs."""
        assert self.part is not None, "a call that is repeated has its sub-module"
        arguments: Any = with_leaves(self.arguments(), arrays)
        bound = inspect.BoundArguments(self.signature, arguments)
        return floating(self.part.call(params, rest, bound.args, bound.kwargs))


class FlaxRun:
    """One run of a Flax model: its outputs, and its calls by path and number. wanted: the calls that are recorded.

    failed: by path, why a call could not be recorded.
    """

    def __init__(self, side: JaxSide, inputs: Inputs, wanted: Collection[Key], kept: Store):
        self.side, self.kept, self.wanted = side, kept, set(wanted)
        self.model = unstacked(side.module)
        self.graphdef, params, rest = split(self.model)
        self.modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(self.model)}
        self.calls: dict[Key, Recorded] = {}
        self.failed: dict[str, str] = {}
        floats, others = side.values(inputs)
        outputs, arrays = side.prepared(self.traced)(params, floats | others, rest)
        self.outputs = {name: np.asarray(output) for name, output in outputs.items()}
        for call, (given, found, variables) in zip(self.calls.values(), arrays, strict=True):
            call.keys = {name: array for name, array in given.items() if not numeric(array)}
            call.dtypes = {name: array.dtype for name, array in given.items() if numeric(array)}
            call.inputs = {name: kept.put(as_numpy(given[name])) for name in call.dtypes}
            call.outputs = [kept.put(as_numpy(array)) for array in found]
            if call.part is not None and variables is not None:
                call.part.params, call.part.rest = variables

    def traced(self, params: nnx.State, values: dict[str, jax.Array], rest: nnx.State) -> tuple[dict, list]:
        """The model's outputs; and of each call its array arguments, its floating outputs and its variables."""
        self.calls = {}
        counts: dict[str, int] = {}
        arrays: list[tuple[dict[str, Any], list[Any], Any]] = []
        model = nnx.merge(self.graphdef, params, rest, copy=True)

        def record(call: FlaxCall) -> Any:
            n = counts[call.path] = counts.get(call.path, -1) + 1
            if (call.path, n) in self.wanted:
                try:
                    found, *of_call = self.packed(call)
                except Exception as error:
                    self.failed[call.path] = f"{type(error).__name__}: {error}"
                else:
                    self.calls[call.path, n] = found
                    arrays.append((of_call[0], of_call[1], of_call[2]))
            return call.output

        with recorded(model, record, (params, values)):
            outputs = self.side.call(getattr(model, "plain", model), values)
        return outputs, arrays

    def packed(self, call: FlaxCall) -> tuple[Recorded, dict[str, Any], list[Any], Any]:
        """A call without its arrays; its array arguments, floating outputs and, if they are traced, variables."""
        bound = call.signature.bind(*call.args, **call.kwargs)
        arrays = {n: leaf for n, leaf in leaves_of(dict(bound.arguments)).items() if isinstance(leaf, jax.Array)}
        arguments: Any = with_leaves(dict(bound.arguments), dict.fromkeys(arrays))
        bound = inspect.BoundArguments(call.signature, arguments)
        part = call.part()
        variables = None
        if isinstance(part, LinenPart):
            variables = part.params, part.rest
        elif call.path in self.modules:
            part = NNXPart(self.modules[call.path], part.method)
        found = Recorded(call.path, call.type, part, call.signature, bound.args, bound.kwargs)
        outputs = floating_outputs(call.output)
        found.results = list(outputs)
        return found, arrays, list(outputs.values()), variables

    def repeat(self, key: Key, values: dict[str, jax.Array]) -> list[jax.Array]:
        """Repeat a call with other arrays by name; the others are those of the run."""
        call = self.calls[key]
        assert call.part is not None, "a call that is repeated has its sub-module"
        return self.prepared(call.call)(call.part.params, call.part.rest, self.arrays(key) | values)

    def arrays(self, key: Key) -> dict[str, Any]:
        """The array arguments of a call in the run."""
        call = self.calls[key]
        stored = {n: jnp.asarray(self.kept.get(number), call.dtypes[n]) for n, number in call.inputs.items()}
        return stored | call.keys

    def prepared(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs as the side does, operation by operation."""
        return Widened(function, lambda evaluate: evaluate) if self.side.dtype == np.float64 else function

    def outputs_of(self, key: Key) -> list[np.ndarray]:
        """The floating outputs of a call."""
        return [self.kept.get(number) for number in self.calls[key].outputs]

    def inputs_of(self, key: Key) -> dict[str, np.ndarray]:
        """The array arguments of a call by name, NumPy constants included."""
        call = self.calls[key]
        constants = {name: leaf for name, leaf in call.names().items() if numeric(leaf)}
        return constants | {name: self.kept.get(number) for name, number in call.inputs.items()}

    def typed(self, key: Key, name: str, array: np.ndarray) -> jax.Array:
        """Another array for an argument, in its dtype; a float of at least the run's precision."""
        call = self.calls[key]
        dtype = call.dtypes.get(name, array.dtype)
        return jnp.asarray(array, jnp.promote_types(dtype, self.side.dtype) if numeric(array) == "f" else dtype)


def as_numpy(array: Any) -> np.ndarray:
    """The array in NumPy; floats that NumPy does not know as float32."""
    return np.asarray(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array)
