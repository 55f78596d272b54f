"""What both sides differentiate: one scalar of the outputs, stated once for each framework.

With labels (int, the output's leading shape) it is the mean cross-entropy of the logits; without, the mean squared
distance to fixed random targets, so that every output gets a gradient of its own.
"""

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of a call, by position or by name; floating arrays are differentiated, the others only passed."""

    args: tuple[np.ndarray, ...]
    kwargs: dict[str, np.ndarray]

    @classmethod
    def of(cls, inputs: Any) -> "Inputs":
        """From one array, a sequence of positional ones, or a mapping of named ones; raises ValueError for the rest."""
        if hasattr(inputs, "keys"):
            parts = cls((), {name: np.asarray(value) for name, value in inputs.items()})
        elif isinstance(inputs, tuple | list):
            parts = cls(tuple(np.asarray(value) for value in inputs), {})
        else:
            parts = cls((np.asarray(inputs),), {})
        bad = [name for name, value in parts.named().items() if value.dtype.kind not in "fiub" or not value.size]
        if bad or not parts.named():
            raise ValueError(
                f"inputs must be non-empty arrays of floats, integers or booleans; not so: {bad or 'none given'}"
            )
        return parts

    def named(self) -> dict[str, np.ndarray]:
        """All of them; positional ones are called input 0, input 1, …"""
        return {f"input {i}": value for i, value in enumerate(self.args)} | self.kwargs

    def call(self, function: Any, values: dict[str, Any]) -> Any:
        """function(*args, **kwargs) with the values of `named()` replaced."""
        args = (values[f"input {i}"] for i in range(len(self.args)))
        return function(*args, **{name: values[name] for name in self.kwargs})

    def rounded(self, dtype: Any) -> "Inputs":
        """The same with floating arrays rounded to a narrower dtype, kept in their own."""
        arrays = {n: a.astype(dtype).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in self.named().items()}
        args = tuple(arrays[f"input {i}"] for i in range(len(self.args)))
        return Inputs(args, {name: arrays[name] for name in self.kwargs})

    def for_decoding(self) -> dict[str, np.ndarray]:
        """What decoding reads beside the ids: left padding, and RETRO's neighbours."""
        return {name: self.kwargs[name] for name in ("start", "ret") if name in self.kwargs}

    def batch(self, step: int) -> "Inputs":
        """Other data of the same kind for a training step: integers rolled along their first axis, floats perturbed."""
        rng = np.random.default_rng(step)

        def vary(value: np.ndarray) -> np.ndarray:
            if value.dtype.kind == "f":
                return value + 0.1 * rng.standard_normal(value.shape)
            return roll(value, step) if value.dtype.kind in "iu" else value

        return Inputs(tuple(map(vary, self.args)), {name: vary(value) for name, value in self.kwargs.items()})


def roll(value: np.ndarray, step: int) -> np.ndarray:
    return np.roll(value, -step, axis=0)


def random_targets(outputs: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(output.shape) for name, output in outputs.items()}


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


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is one of the patterns; `*` is any text."""
    return any(fnmatch(name, pattern) for pattern in patterns)
