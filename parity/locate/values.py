"""Arrays in nested arguments and outputs: by name, replaced, by kind."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.compare.inputs import named_leaves


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
        elif is_dataclass(node):
            for field in dataclasses.fields(node):
                walk(f"{name}[{field.name}]", getattr(node, field.name))
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
        if is_dataclass(node):
            names = [field.name for field in dataclasses.fields(node)]
            return dataclasses.replace(node, **{n: walk(f"{name}[{n}]", getattr(node, n)) for n in names})
        return values.get(name, node)

    return walk("", dict(arguments))


def is_dataclass(node: Any) -> bool:
    """True for an instance of a dataclass that holds arrays; modules are none."""
    return dataclasses.is_dataclass(node) and not isinstance(node, type) and not hasattr(node, "__call__")  # noqa: B004


def numeric(leaf: Any) -> str:
    """'f', 'i' or 'b' for arrays of floats (and complex numbers), integers, booleans; '' for anything else."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        return ""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return "f"
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return ""
    return {"i": "i", "u": "i", "b": "b"}.get(np.dtype(leaf.dtype).kind, "")


def floating_outputs(output: Any) -> dict[str, Any]:
    """The floating arrays of an output, by name."""
    return {name: leaf for name, leaf in named_leaves(output, jax.Array).items() if numeric(leaf) == "f"}


def floating(output: Any) -> list[Any]:
    """The floating arrays of an output, in order."""
    return list(floating_outputs(output).values())
