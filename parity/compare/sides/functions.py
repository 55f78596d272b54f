"""Models that are a function of their parameters: Equinox, Haiku, penzai and plain functions."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.weights.names import Path


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A model for `parity.check` that is a function: apply(params, *args, **kwargs) returns the outputs.

        parity.Function(lambda model, x: jax.vmap(model)(x), eqx.nn.MLP(…))        Equinox
        parity.Function(hk.without_apply_rng(transformed).apply, params)           Haiku
        parity.Function(lambda model, x: model(wrap(x)).unwrap(…), penzai_model)   penzai
        parity.Function(forward, {"w": w, "b": b})                                 plain functions

    params: any pytree or dataclass. Its arrays are the weights, the floating ones are trained; everything else in it is
    constant. `names` maps PyTorch's names to key paths of params: `layers.0.weight`, `mlp/~/linear_0.w`.
    """

    apply: Callable[..., Any]
    params: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """How the params of a Function are put together again; hashed by identity.

    leaves: for each leaf its path among the module's attributes, or None for a constant.
    """

    apply: Callable[..., Any]
    treedef: Any
    constants: tuple[Any, ...]
    leaves: tuple[Path | None, ...]

    def params(self, module: nnx.Module) -> Any:
        """The params with the module's arrays."""
        found = [
            constant if path is None else at(module, path)
            for path, constant in zip(self.leaves, self.constants, strict=True)
        ]
        return opened(jax.tree.unflatten(self.treedef, found))


class Node(nnx.Module):
    """A part of the params: its attributes are arrays and parts."""


class FunctionModule(nnx.Module):
    """A Function as an NNX module whose attributes are the key paths of its params."""

    def __init__(self, function: Function):
        boxed = jax.tree.map(box, thawed(function.params))
        found, treedef = jax.tree_util.tree_flatten_with_path(boxed)
        arrays = {i: (path_of(path), leaf) for i, (path, leaf) in enumerate(found) if is_array(leaf)}
        paths = shortened({i: path for i, (path, _) in arrays.items()})
        for name, child in grown({paths[i]: variable(leaf) for i, (_, leaf) in arrays.items()}).items():
            setattr(self, str(name), child)
        self.function_recipe = Recipe(
            function.apply,
            treedef,
            tuple(None if i in arrays else leaf for i, (_, leaf) in enumerate(found)),
            tuple(paths.get(i) for i in range(len(found))),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function_recipe.apply(self.function_recipe.params(self), *args, **kwargs)


@jax.tree_util.register_pytree_with_keys_class
class Box:
    """A dataclass that is no pytree, as one: its fields are the children."""

    def __init__(self, instance: Any, fields: dict[str, Any]):
        self.instance, self.fields = instance, fields

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Children with their keys, and what else the box holds."""
        keys = [(jax.tree_util.GetAttrKey(name), child) for name, child in self.fields.items()]
        return keys, (self.instance, tuple(self.fields))

    @classmethod
    def tree_unflatten(cls, about: Any, children: Any) -> "Box":
        """The box with other children."""
        return cls(about[0], dict(zip(about[1], children, strict=True)))

    def whole(self) -> Any:
        """The dataclass."""
        changed = copy.copy(self.instance)
        for name, child in self.fields.items():
            object.__setattr__(changed, name, opened(child))
        return changed


def is_box(node: Any) -> bool:
    """True for a Box."""
    return isinstance(node, Box)


def opened(tree: Any) -> Any:
    """A pytree with the dataclasses of its boxes."""
    return jax.tree.map(lambda node: node.whole() if is_box(node) else node, tree, is_leaf=is_box)


def box(leaf: Any) -> Any:
    """A dataclass that is a leaf as a Box of its fields; anything else as it is."""
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type) or is_array(leaf):
        return leaf
    return Box(leaf, {f.name: jax.tree.map(box, getattr(leaf, f.name)) for f in dataclasses.fields(leaf)})


def thawed(params: Any) -> Any:
    """The params with penzai's variables replaced by their values, as only those are pytrees of arrays."""
    if any(type(leaf).__module__.startswith("penzai.") for leaf in jax.tree.leaves(params)):
        from penzai import pz

        return pz.freeze_params(params)
    return params


def is_array(leaf: Any) -> bool:
    """True for arrays of numbers; random keys are constants."""
    return isinstance(leaf, np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct) and not jnp.issubdtype(
        leaf.dtype, jax.dtypes.extended
    )


def variable(array: Any) -> nnx.Variable:
    """A trained parameter, or a variable for an array that has no gradient."""
    array = jnp.asarray(array) if isinstance(array, np.ndarray | np.generic) else array
    return nnx.Param(array) if jnp.issubdtype(array.dtype, jnp.inexact) else nnx.Variable(array)


def path_of(path: tuple[Any, ...]) -> Path:
    """The words of a pytree's key path; positions and whole numbers are ints."""
    words = [next(str(getattr(key, a)) for a in ("name", "key", "idx") if hasattr(key, a)) for key in path]
    return tuple(int(word) if word.isdigit() else word for word in words) or ("params",)


def shortened(paths: dict[int, Path]) -> dict[int, Path]:
    """The paths without the words of penzai's wrappers, `value` and `data_array`."""
    end = ("value", "data_array")
    return {i: path[:-2] if path[-2:] == end else path for i, path in paths.items()}


def grown(arrays: dict[Path, Any]) -> dict[Any, Any]:
    """Nested modules from arrays by path; whole numbers index lists."""
    groups: dict[Any, dict[Path, Any]] = {}
    for path, array in arrays.items():
        groups.setdefault(path[0], {})[path[1:]] = array
    return {word: group[()] if () in group else part(grown(group)) for word, group in groups.items()}


def part(children: dict[Any, Any]) -> nnx.Module:
    """A list of the children if they are numbered, else a node."""
    if all(isinstance(word, int) for word in children):
        return nnx.List([children.get(i, Node()) for i in range(max(children) + 1)])
    node = Node()
    for word, child in children.items():
        setattr(node, str(word), child)
    return node


def at(module: Any, path: Path) -> Any:
    """The array of a module at a path."""
    for word in path:
        module = module[word] if isinstance(word, int) and isinstance(module, nnx.List) else getattr(module, str(word))
    return module.get_value()
