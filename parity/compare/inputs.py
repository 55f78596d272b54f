"""Arguments of a call, passed to both modules.

An input is an array (NumPy, JAX or PyTorch), a constant (None, bool, int, float, complex, str), or a tuple, list, dict
or dataclass of inputs. Floating and complex arrays are differentiated; all other arrays and all constants are only
passed. A list of numbers is an array, a tuple of numbers stays a tuple: `kernel=(3, 3)`, `ids=[[1, 2, 3]]`.

Arrays have names: positional ones are `input 0`, `input 1`, …, named ones keep their names, and arrays inside of others
are called by their path, as in `state[0]` or `cache[keys]`.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.weights.names import as_numpy
from parity.compare.noise import moved, wide
from parity.compare.outputs import named_leaves as named_leaves

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, slice, type(...))
Side = Literal["torch", "flax"]
Place = int | str
"""How one side takes an input: by position, or by the name of a parameter."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of a call, by position or by name, and constants that only one side takes.

    places: by side and input, how the side takes it if not as given; see `parity.compare.arguments`. notes: what was
    decided about the calls, for the report.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    torch_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    flax_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    places: dict[str, dict[str, Place]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        inputs: Any,
        torch_kwargs: Mapping[str, Any] | None = None,
        flax_kwargs: Mapping[str, Any] | None = None,
    ) -> "Inputs":
        """Inputs from one array, a sequence of positional ones, or a mapping of named ones.

        torch_kwargs, flax_kwargs: constants that only that side's call takes. Raises ValueError if there is no array,
        if an array is empty or not of numbers, and for an object that is neither an array nor a constant.
        """
        if isinstance(inputs, cls):
            return inputs
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if hasattr(inputs, "keys"):
            kwargs = {str(name): tree_of(inputs[name], str(name)) for name in inputs.keys()}  # noqa: SIM118
        elif isinstance(inputs, tuple | list):
            args = tuple(tree_of(value, f"input {i}") for i, value in enumerate(inputs))
        else:
            args = (tree_of(inputs, "input 0"),)
        for argument, values in (("torch_kwargs", torch_kwargs), ("flax_kwargs", flax_kwargs)):
            if values is not None and not isinstance(values, Mapping):
                raise ValueError(f"{argument}={type(values).__name__} must be a mapping of constants by name")
        theirs, ours = dict(torch_kwargs or {}), dict(flax_kwargs or {})
        for argument, values in (("torch_kwargs", theirs), ("flax_kwargs", ours)):
            if twice := sorted(values.keys() & kwargs.keys()):
                raise ValueError(f"{argument}: {', '.join(twice)} must not be in inputs too")
        parts = cls(args, kwargs, theirs, ours)
        if not parts.named():
            raise ValueError(f"inputs: got no arrays; {ALLOWED}")
        return parts

    def items(self) -> dict[str, Any]:
        """All inputs, arrays and others, by name."""
        return {f"input {i}": value for i, value in enumerate(self.args)} | self.kwargs

    def named(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        found: dict[str, np.ndarray] = {}
        for name, tree in self.items().items():
            mapped(tree, name, found.__setitem__)
        return found

    def call(
        self, function: Callable[..., Any], values: Mapping[str, Any], side: Side | None = None, dtype: Any = None
    ) -> Any:
        """Call a function with other arrays, named as in `named()`.

        side: the side whose constants and parameter names are used. PyTorch gets clones of its tensors: a module may
        write into its inputs. dtype: that of floating arrays among the side's constants; default their own.
        """
        values = {name: value.clone() for name, value in values.items()} if side == "torch" else values
        places = self.places.get(side or "", {})
        positional: dict[int, Any] = {}
        keywords: dict[str, Any] = {}
        for i, (name, tree) in enumerate(self.items().items()):
            place = places.get(name, i if i < len(self.args) else name)
            value = mapped(tree, name, lambda name, _: values[name])
            if isinstance(place, int):
                positional[place] = value
            elif place:
                keywords[place] = value
        if side == "torch":
            device = next((value.device for value in values.values()), None)
            keywords |= {
                n: mapped(v, n, lambda _, a: torch_constant(a, dtype, device)) for n, v in self.torch_kwargs.items()
            }
        if side == "flax":
            keywords |= {name: flax_constant(value, dtype) for name, value in self.flax_kwargs.items()}
        return function(*(positional[i] for i in sorted(positional)), **keywords)

    def replaced(self, values: Mapping[str, np.ndarray]) -> "Inputs":
        """The same arguments with other arrays, named as in `named()`."""
        trees = {name: mapped(tree, name, lambda name, _: values[name]) for name, tree in self.items().items()}
        args = tuple(trees[f"input {i}"] for i in range(len(self.args)))
        return dataclasses.replace(self, args=args, kwargs={name: trees[name] for name in self.kwargs})

    def rounded(self, dtype: Any) -> "Inputs":
        """The same arguments with floating arrays rounded to a narrower dtype; they keep their own dtype."""
        return self.replaced({name: np.asarray(cast(a, dtype)).astype(a.dtype) for name, a in self.named().items()})

    def moved(self, ulp: float, rng: np.random.Generator) -> "Inputs":
        """The same arguments in float64, every floating element moved by up to `ulp` relative to its size."""
        return self.replaced(
            {name: moved(wide(a), ulp, rng) if a.dtype.kind in "fc" else a for name, a in self.named().items()}
        )

    def varied(self, step: int) -> "Inputs":
        """Other data of the same kind for a training step: integers rolled along their first axis, floats perturbed."""
        rng = np.random.default_rng(step)

        def vary(value: np.ndarray) -> np.ndarray:
            if value.dtype.kind == "f":
                return value + 0.1 * rng.standard_normal(value.shape)
            if value.dtype.kind == "c":
                return value + 0.1 * (rng.standard_normal(value.shape) + 1j * rng.standard_normal(value.shape))
            return rolled(value, step) if value.dtype.kind in "iu" and value.ndim else value

        return self.replaced({name: vary(value) for name, value in self.named().items()})


ALLOWED = "each must be a non-empty array of numbers, a constant, or a tuple, list, dict or dataclass of those"


def tree_of(value: Any, name: str) -> Any:
    """An input with its arrays as NumPy copies; raises ValueError that names what is no input."""
    if isinstance(value, np.generic | np.ndarray | jax.Array) or hasattr(value, "detach"):
        return array_of(value, name)
    if isinstance(value, CONSTANTS):
        return value
    if isinstance(value, list) and value and only_numbers(value):
        return array_of(value, name)
    if hasattr(value, "keys"):
        value = {key: value[key] for key in value.keys()}  # noqa: SIM118
    elif not isinstance(value, tuple | list) and not is_dataclass(value):
        if hasattr(value, "__array__"):
            return array_of(value, name)
        raise ValueError(f"inputs: got {name}, a {type(value).__name__}; {ALLOWED}")
    return with_children(value, [tree_of(child, f"{name}[{key}]") for key, child in children(value)])


def array_of(value: Any, name: str) -> np.ndarray:
    """A NumPy copy of an array; 16-bit floats that NumPy does not know become float32."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.extended):
        raise ValueError(f"inputs: got {name}, a {value.dtype}; a random key must be in flax_kwargs")
    try:
        array = np.array(as_numpy(value))
    except ValueError as error:
        raise ValueError(f"inputs: got {name}: {error}") from None
    if array.dtype.kind == "V" and jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float32)
    if array.dtype.kind not in "fciub" or not array.size:
        raise ValueError(f"inputs: got {name} of dtype {array.dtype} and shape {list(array.shape)}; {ALLOWED}")
    return array


def only_numbers(value: Any) -> bool:
    """True for a list of numbers or of equally long lists of numbers."""
    if not isinstance(value, list):
        return isinstance(value, int | float | complex)
    lengths = {len(child) if isinstance(child, list) else -1 for child in value}
    return len(lengths) <= 1 and all(only_numbers(child) for child in value)


def is_dataclass(value: Any) -> bool:
    """True for an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def children(node: Any) -> list[tuple[Any, Any]]:
    """Key and child of each child of a tuple, list, dict or dataclass."""
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, tuple | list):
        return list(enumerate(node))
    return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)] if is_dataclass(node) else []


def with_children(node: Any, new: list[Any]) -> Any:
    """The same tuple, list, dict or dataclass with other children."""
    if isinstance(node, dict):
        return dict(zip(node, new, strict=True))
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*new)
    if isinstance(node, tuple | list):
        return tuple(new) if isinstance(node, tuple) else list(new)
    changed = copy.copy(node)
    for (name, _), value in zip(children(node), new, strict=True):
        object.__setattr__(changed, name, value)  # also if it is frozen
    return changed


def mapped(node: Any, name: str, change: Callable[[str, np.ndarray], Any]) -> Any:
    """An input with change(name, array) for each of its arrays."""
    if isinstance(node, np.ndarray):
        return change(name, node)
    found = children(node)
    return with_children(node, [mapped(child, f"{name}[{key}]", change) for key, child in found]) if found else node


def cast(array: Any, dtype: Any) -> Any:
    """A NumPy or JAX array in a floating dtype; a complex one in the complex dtype of that width, others unchanged."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(dtype)
    if not jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    wide = np.dtype(dtype) == np.float64
    if not wide and isinstance(array, np.ndarray):  # there are no complex numbers of 16-bit parts
        narrow = array.real.astype(dtype).astype(np.float32) + 1j * array.imag.astype(dtype).astype(np.float32)
        return narrow.astype(np.complex64)
    return array.astype(np.complex128 if wide else np.complex64)


def torch_constant(array: np.ndarray, dtype: Any, device: Any) -> Any:
    """A tensor of an array among `torch_kwargs`."""
    import torch

    tensor = torch.tensor(array, device=device)
    return tensor.to(dtype) if tensor.is_floating_point() and dtype is not None else tensor


def flax_constant(value: Any, dtype: Any) -> Any:
    """A value among `flax_kwargs` for one call; NNX objects such as Rngs are copied, as calls change them."""
    if isinstance(value, nnx.Pytree):
        return nnx.merge(*nnx.split(value), copy=True)

    def leaf(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        return jnp.asarray(leaf if dtype is None else cast(leaf, dtype))

    return jax.tree.map(leaf, value)


def rolled(value: np.ndarray, step: int) -> np.ndarray:
    """The array shifted cyclically by -step along its first axis."""
    return np.roll(value, -step, axis=0)
