"""Arguments of a call, passed to both modules, and the names of the arrays that a call returns."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of a call, by position or by name; floating arrays are differentiated, the others only passed."""

    args: tuple[np.ndarray, ...]
    kwargs: dict[str, np.ndarray]

    @classmethod
    def of(cls, inputs: Any) -> "Inputs":
        """Inputs from one array, a sequence of positional ones, or a mapping of named ones.

        Raises ValueError if there are none, or if one is empty or not of floats, integers or booleans.
        """
        if isinstance(inputs, cls):
            return inputs
        if hasattr(inputs, "keys"):
            parts = cls((), {name: np.asarray(value) for name, value in inputs.items()})
        elif isinstance(inputs, tuple | list):
            parts = cls(tuple(np.asarray(value) for value in inputs), {})
        else:
            parts = cls((np.asarray(inputs),), {})
        bad = [name for name, value in parts.named().items() if value.dtype.kind not in "fiub" or not value.size]
        if bad or not parts.named():
            given = ", ".join(bad) or "no arrays"
            raise ValueError(f"inputs: got {given}; each must be a non-empty array of floats, integers or booleans")
        return parts

    def named(self) -> dict[str, np.ndarray]:
        """All arrays by name; positional ones are called input 0, input 1, …"""
        return {f"input {i}": value for i, value in enumerate(self.args)} | self.kwargs

    def call(self, function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
        """Call function(*args, **kwargs) with other values, named as in `named()`."""
        args = (values[f"input {i}"] for i in range(len(self.args)))
        return function(*args, **{name: values[name] for name in self.kwargs})

    def replaced(self, values: Mapping[str, np.ndarray]) -> "Inputs":
        """The same arguments with other arrays, named as in `named()`."""
        args = tuple(values[f"input {i}"] for i in range(len(self.args)))
        return Inputs(args, {name: values[name] for name in self.kwargs})

    def rounded(self, dtype: Any) -> "Inputs":
        """The same arguments with floating arrays rounded to a narrower dtype; they keep their own dtype."""
        named = self.named().items()
        return self.replaced({n: a.astype(dtype).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in named})

    def varied(self, step: int) -> "Inputs":
        """Other data of the same kind for a training step: integers rolled along their first axis, floats perturbed."""
        rng = np.random.default_rng(step)

        def vary(value: np.ndarray) -> np.ndarray:
            if value.dtype.kind == "f":
                return value + 0.1 * rng.standard_normal(value.shape)
            return rolled(value, step) if value.dtype.kind in "iu" else value

        return self.replaced({name: vary(value) for name, value in self.named().items()})


def rolled(value: np.ndarray, step: int) -> np.ndarray:
    """The array shifted cyclically by -step along its first axis."""
    return np.roll(value, -step, axis=0)


def named_leaves(tree: Any, leaf: type) -> dict[str, Any]:
    """Arrays of a nested output by name: 'output' for a single one, else 'output[0]', 'output[key]', …"""
    found: dict[str, Any] = {}

    def walk(name: str, node: Any) -> None:
        if isinstance(node, leaf):
            found[name] = node
        elif isinstance(node, tuple | list):
            for i, child in enumerate(node):
                walk(f"{name}[{i}]", child)
        elif hasattr(node, "items"):
            for key, child in node.items():
                walk(f"{name}[{key}]", child)

    walk("output", tree)
    return found
