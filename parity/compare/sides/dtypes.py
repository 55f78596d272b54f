"""`dtype` fields of Flax modules: the type that a module computes in, whatever that of its parameters."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx


def computing_in(module: nnx.Module, dtype: Any) -> nnx.Module:
    """The module, changed so that its parts with a `dtype` field of float32 compute in another dtype.

    A field that is None follows the parameters, and one of another type was chosen by the port; both are left alone.
    """
    parts: list[Any] = [part for _, part in nnx.iter_modules(module)]
    for part in parts:
        if is_float32(getattr(part, "dtype", None)):
            part.dtype = jnp.dtype(dtype)
        if hasattr(part, "to_nnx__module"):
            part.to_nnx__module = linen_in(part.to_nnx__module, dtype)
    return module


def linen_in(module: linen.Module, dtype: Any) -> linen.Module:
    """A copy of a Linen module, and of the modules among its fields, that computes in a dtype."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        if field.name == "dtype" and is_float32(value):
            changes["dtype"] = jnp.dtype(dtype)
        elif isinstance(value, linen.Module) and field.name != "parent":
            changes[field.name] = linen_in(value, dtype)
    return module.clone(**changes) if changes else module


def is_float32(value: Any) -> bool:
    """True for float32 as a dtype or as a type."""
    try:
        return value is not None and np.dtype(value) == np.float32
    except TypeError:  # another attribute of that name
        return False
