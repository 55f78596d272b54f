"""Outputs of a call: the names of their arrays, and which output of one side is which of the other.

    name                        structure
    output                      a single array
    output[0], output[1][k]     in a tuple or list, or in a dict inside of one
    output[logits]              in a dict, a dataclass, a flax.struct, a NamedTuple or a Hugging Face ModelOutput

Two structures correspond if they have keys in common, or by order: a tuple corresponds to the dataclass of the same
fields. An array corresponds to the only array of a structure, to the first one, or to the only one of its shape.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.process.texts import quoted
from parity.compare.names import matches

ROOT = "output"


def named_leaves(tree: Any, leaf: type) -> dict[str, Any]:
    """Arrays of a nested output by name: 'output' for a single one, else 'output[0]', 'output[key]', …"""
    found: dict[str, Any] = {}

    def walk(name: str, node: Any) -> None:
        if isinstance(node, leaf):
            found[name] = node
            return
        for key, child in parts(node, leaf):
            walk(f"{name}[{key}]", child)

    walk(ROOT, tree)
    return found


def returned_leaves(tree: Any, leaf: type, side: str) -> dict[str, Any]:
    """`named_leaves` of what a module returns; raises ValueError, naming its side and the type, if there are none."""
    found = named_leaves(tree, leaf)
    if not found:
        kind = quoted(type(tree).__name__)
        raise ValueError(f"the {side} module returns {kind} without an array; expected an array, or several by name")
    return found


def others_in(tree: Any, leaf: type) -> list[str]:
    """Names and types of what is among a nested output's arrays and is none, such as 'output[1] (float)', but None."""
    found: list[str] = []

    def walk(name: str, node: Any) -> None:
        inside = parts(node, leaf)
        for key, child in () if isinstance(node, leaf) else inside:
            walk(f"{name}[{key}]", child)
        empty = node is None or isinstance(node, tuple | list) or hasattr(node, "items")
        if not inside and not empty and not isinstance(node, leaf):
            found.append(f"{name} ({type(node).__name__})")

    walk(ROOT, tree)
    return found


def parts(node: Any, leaf: type) -> list[tuple[Any, Any]]:
    """Key and child of each part of a structure; empty for anything that is none."""
    if isinstance(node, type) or node is None or isinstance(node, str):
        return []
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, tuple | list):
        return list(enumerate(node))
    if hasattr(node, "items"):
        return list(node.items())
    if dataclasses.is_dataclass(node):
        return [(field.name, getattr(node, field.name, None)) for field in dataclasses.fields(node)]
    if issubclass(leaf, jax.Array):  # another registered pytree
        found, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
        return [(jax.tree_util.keystr(path, simple=True, separator="."), child) for path, child in found if path]
    return []


def aligned(outputs: Mapping[str, Any], like: Mapping[str, Any], channels_last: Sequence[str] = ()) -> dict[str, Any]:
    """Flax's outputs under PyTorch's names, without those that PyTorch lacks.

    like: PyTorch's outputs, or arrays of their shapes. channels_last: patterns of PyTorch's names whose arrays have
    their channels last in Flax; names that match under Flax's name have been moved already. Raises ValueError if no
    output of one side is one of the other.
    """
    found = {}
    for theirs, ours in correspondence(like, outputs).items():
        array = outputs[ours]
        if matches(theirs, channels_last) and not matches(ours, channels_last):
            array = jnp.moveaxis(array, -1, 1)
        found[theirs] = array
    if like and not found:
        raise ValueError(
            f"PyTorch returns {', '.join(like)}; the Flax module returns {', '.join(outputs) or 'no array'}"
        )
    return found


def unmatched(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Notes on the outputs that only one side returns, and on those that are called differently."""
    pairs = correspondence(theirs, ours)
    lost = [name for name in theirs if name not in pairs]
    extra = [name for name in ours if name not in pairs.values()]
    return left_out(lost, extra)


def left_out(theirs: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Notes on what PyTorch and Flax return that is not compared."""
    sides = (("PyTorch", theirs), ("the Flax module", ours))
    return [f"{side} also returns {', '.join(names)}; not compared" for side, names in sides if names]


def correspondence(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """The names of PyTorch's outputs, each with that of the same output of Flax's."""
    if theirs.keys() == ours.keys():
        return {name: name for name in theirs}
    shapes = {
        **{f"torch {n}": shape_of(v) for n, v in theirs.items()},
        **{f"flax {n}": shape_of(v) for n, v in ours.items()},
    }
    found: dict[str, str] = {}

    def single(one: str, several: list[str], one_side: str, other_side: str) -> str:
        """The array among several that a single one corresponds to."""
        same = [name for name in several if shapes[f"{other_side} {name}"] == shapes[f"{one_side} {one}"]]
        return several[0] if several[0] in same or len(same) != 1 else same[0]

    def walk(torch_names: list[list[str]], flax_names: list[list[str]], depth: int) -> None:
        """Match two sub-structures, given as the names of their arrays split into words."""
        left, right = (list(map(joined, names)) for names in (torch_names, flax_names))
        if not left or not right:
            return
        if len(left) == 1 or len(right) == 1:
            whole = [len(names) == 1 and len(names[0]) <= depth for names in (torch_names, flax_names)]
            if len(left) == len(right) or any(whole):
                one = single(left[0], right, "torch", "flax") if len(left) == 1 else right[0]
                found[left[0] if len(left) == 1 else single(right[0], left, "flax", "torch")] = one
                return
        a, b = (grouped(names, depth) for names in (torch_names, flax_names))
        numbered = [all(key.isdigit() for key in group) for group in (a, b)]
        # Positions of a tuple count without its Nones, if both sides return as many arrays.
        if numbered[0] != numbered[1] or (all(numbered) and len(a) == len(b)):
            pairs = list(zip(a.values(), b.values(), strict=False))
        else:
            pairs = [(a[key], b[key]) for key in a if key in b]
        for left_group, right_group in pairs:
            walk(left_group, right_group, depth + 1)

    walk([words(name) for name in theirs], [words(name) for name in ours], 1)
    return found


def words(name: str) -> list[str]:
    """'output[a][0]' -> ['output', 'a', '0']."""
    keys = name.removeprefix(ROOT)
    return [ROOT, *(keys[1:-1].split("][") if keys.startswith("[") and keys.endswith("]") else [])]


def joined(path: Sequence[str]) -> str:
    """['output', 'a', '0'] -> 'output[a][0]'."""
    return path[0] + "".join(f"[{word}]" for word in path[1:])


def grouped(names: list[list[str]], depth: int) -> dict[str, list[list[str]]]:
    """Names by their word at a depth."""
    groups: dict[str, list[list[str]]] = collections.defaultdict(list)
    for name in names:
        groups[name[depth] if len(name) > depth else ""].append(name)
    return dict(groups)


def shape_of(array: Any) -> tuple[int, ...]:
    """The sizes of an array's axes, sorted: a side may have its channels elsewhere."""
    return tuple(sorted(getattr(array, "shape", ())))
