"""Compute dtype of weights that are stored in 16 bits, on CPUs.

XLA's products of bfloat16 and float16 on a CPU take about 20 times as long as those of float32. Every number of these
dtypes is a float32, so that a cast of the weights is exact, and activations are then rounded less. A model may compute
in float32 without a cast, with a method `narrowed`: see `jaxmodels.protocols.Narrow`.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.weights.names import check_floating, is_floating

Model = TypeVar("Model")

NARROW = ("bfloat16", "float16")
WIDE = "float32"
SCALES = "absmax"  # float16 scales of 8-bit weights: used in float32 anyway


def wide_dtype(stored: Mapping[str, Any], platform: str) -> str | None:
    """Name of the dtype to cast stored weights to for inference; None to keep their own.

    stored: arrays by name, or other objects with a dtype. platform: of the device, such as "cpu". It is float32 on a
    CPU if some weights are in 16 bits and none in 64.
    """
    found = floating(array.dtype for name, array in stored.items() if not str(name).endswith(SCALES))
    return WIDE if platform == "cpu" and found & {*NARROW} and "float64" not in found else None


def floating(dtypes: Iterable[Any]) -> set[str]:
    """Names of the floating ones of some dtypes."""
    return {np.dtype(dtype).name for dtype in dtypes if is_floating(dtype)}


def choice(dtypes: Iterable[Any], override: str, *, kept: bool = False) -> str:
    """Sentence on weights that are computed in float32.

    override: how to choose another dtype, such as "--dtype". kept: the weights stay in 16 bits, as by `narrowed`.
    """
    names = " and ".join(sorted(floating(dtypes) & {*NARROW}))
    if kept:
        return f"{names} weights are kept and computed in {WIDE} by a compiled kernel; {override} overrides"
    return f"{names} weights are computed in {WIDE}, exactly and faster on a CPU; {override} overrides"


def say(message: str) -> None:
    """Print a note as a line on standard error."""
    print(f"note: {message}", file=sys.stderr)


@functools.lru_cache(maxsize=16)
def log(message: str) -> None:
    """Log a message once; without a logging configuration it is a line on standard error."""
    logging.getLogger("jaxmodels").warning(message)


def for_inference(
    model: Model, dtype: Any = None, *, override: str = "generate(…, dtype=…)", tell: Callable[[str], None] = log
) -> Model:
    """Model with its floating weights cast to the dtype to compute in; itself if there is nothing to cast.

    model: a pytree. dtype: default float32 for 16-bit weights on CPUs, else that of each weight. A model with a module
    that names 16 bits as its own compute dtype is left as it is by default; one whose method `narrowed` returns a model
    is replaced by that one. override, tell: how to choose another dtype, and where the default is told; logged once if
    omitted. Raises ValueError if dtype is not floating.
    """
    if dtype is None and callable(getattr(model, "narrowed", None)):
        small = cast(Any, model).narrowed()
        if small is not None:
            if small is not model:
                tell(choice([leaf.dtype for leaf in jax.tree.leaves(model)], override, kept=True))
            return small
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    arrays = {i: leaf for i, (path, leaf) in enumerate(leaves) if SCALES not in jax.tree_util.keystr(path)}
    arrays = {i: leaf for i, leaf in arrays.items() if isinstance(leaf, jax.Array) and is_floating(leaf.dtype)}
    if dtype is not None:
        check_floating(dtype)
        wanted = jnp.dtype(dtype)
    else:
        on_cpu = all(device.platform == "cpu" for leaf in arrays.values() for device in leaf.devices())
        found = wide_dtype({str(i): leaf for i, leaf in arrays.items()}, "cpu" if on_cpu else "other")
        if found is None or names_compute_dtype(model):
            return model
        wanted = jnp.dtype(found)
        tell(choice([leaf.dtype for leaf in arrays.values()], override))
    if all(leaf.dtype == wanted for leaf in arrays.values()):
        return model
    new = [arrays[i].astype(wanted) if i in arrays else leaf for i, (_, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(structure, new)


def names_compute_dtype(model: Any) -> bool:
    """True if a module's `dtype` is one of 16 bits: its products are computed in it, whatever the weights are."""
    if not isinstance(model, nnx.Module):
        return False
    given = [getattr(module, "dtype", None) for _, module in nnx.iter_modules(model)]
    return any(is_narrow(dtype) for dtype in given if dtype is not None)


def is_narrow(dtype: Any) -> bool:
    """True for the names and types of 16-bit floating dtypes."""
    try:
        return np.dtype(dtype).name in NARROW
    except TypeError:  # another attribute of that name
        return False
