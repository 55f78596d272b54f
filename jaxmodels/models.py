"""Models on disk: the registry of classes by name, `save` and `load`.

FOLDER/config.json   {"format": 1, "model": "AutoregressiveTransformer", "config": {constructor arguments}}
FOLDER/params/       Orbax; one entry per array, named by its path (encoder.layers.0.norm_ff.scale)

A converter that streams, and never holds the full model in memory, writes instead of params/:

FOLDER/params.safetensors, or params-00001-of-000NN.safetensors … and params.safetensors.index.json; one entry per
array and layer: layers.3.attention.output.kernel is layer 3 of the stacked layers.attention.output.kernel
"""

import importlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmodels.io.atomic import atomic_folder, recover
from jaxmodels.io.bounded import errors_naming
from jaxmodels.io.checkpoint import (
    FORMAT,
    check_same_arrays,
    checked_place,
    load_arrays,
    read_config,
    save_arrays,
    stored_arrays,
)
from jaxmodels.io.content import holds_safetensors
from jaxmodels.io.steps import latest_step
from jaxmodels.process.paths import local
from jaxmodels.process.texts import quoted, shortened, visible
from jaxmodels.sharding import placement
from jaxmodels.weights.names import check_fit, check_floating, dotted, flat_arrays, is_floating, with_arrays
from jaxmodels.weights.place import Shardings, from_flax_names, load_tensors
from jaxmodels.weights.stored import Stored
from jaxmodels.weights.stored import abstract as stored_model

# Modules of this project's models, by the name in config.json. A file cannot cause any other import.
MODULES = {
    "AutoregressiveModel": "jaxmodels.feedback",
    "AutoregressiveTransformer": "jaxmodels.transformer",
    "LoRANeoX": "jaxmodels.neox.lora",
    "NeoX": "jaxmodels.neox",
    "RetroModel": "jaxmodels.retro",
}
REGISTERED: dict[str, type] = {}
# Raised by constructors for values that no model has: a list instead of a string, a width of 0, one of 30 digits.
UNFIT = (TypeError, AttributeError, ArithmeticError, LookupError, AssertionError, RecursionError, MemoryError)
MOST_VALUES = 10_000  # of a model's configuration

Class = TypeVar("Class", bound=type)


def register(name: str) -> Callable[[Class], Class]:
    """Decorator that gives a model class the name under which it is saved and loaded.

    The class needs the members of `jaxmodels.protocols.Saved`. Raises ValueError if it has no `config`, or if the name
    belongs to another class.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} must be a non-empty string")

    def add(cls: Class) -> Class:
        if not callable(getattr(cls, "config", None)):
            raise ValueError(f"{cls.__name__} has no config(), which returns the arguments that rebuild the model")
        known = REGISTERED.get(name)
        same = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        if name in MODULES or (known is not None and not same):
            raise ValueError(f"name={name!r} belongs to another model")
        REGISTERED[name] = cls
        return cls

    return add


def names() -> list[str]:
    """Names of all models that can be loaded, sorted."""
    return sorted({*MODULES, *REGISTERED})


def model_class(name: str) -> Any:
    """Class of a model by its name; raises ValueError if the name is not registered."""
    if isinstance(name, str) and name in REGISTERED:
        return REGISTERED[name]
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f"model={quoted(name)} is not registered; registered are {', '.join(names())}")
    return getattr(importlib.import_module(MODULES[name]), name)


def name_of(model: Any) -> str:
    """Name of a model's class; raises ValueError if it is not registered."""
    cls = type(model)
    found = [name for name, known in REGISTERED.items() if known is cls]
    if found:
        return found[0]
    if cls.__name__ in MODULES and model_class(cls.__name__) is cls:
        return cls.__name__
    raise ValueError(
        f"model is a {cls.__module__}.{cls.__qualname__}, which is not registered: decorate the class with "
        f"@jaxmodels.register({cls.__name__!r})"
    )


def build(name: str, config: Mapping[str, Any], *, seed: int = 0, rngs: nnx.Rngs | None = None) -> Any:
    """Newly initialized model of a class by name; raises ValueError if `config` does not fit its arguments.

    rngs: default of the seed.
    """
    cls = model_class(name)
    make = getattr(cls, "from_config", cls)
    check_booleans(cls, config)
    try:
        return make(**config, rngs=nnx.Rngs(seed) if rngs is None else rngs)
    except UNFIT as error:
        reason = str(error).partition("\n")[0] or type(error).__name__  # without JAX's note on its traceback
        raise ValueError(f"config does not fit {name}: {shortened(reason, 300)}") from None


def check_booleans(cls: type, config: Mapping[str, Any]) -> None:
    """Raises ValueError if an argument is true or false whose annotation has no bool; in Python they are 1 and 0."""
    for name, parameter in inspect.signature(cls.__init__).parameters.items():  # type: ignore[misc]
        value = config.get(name)
        if "bool" in str(parameter.annotation) or parameter.annotation in (parameter.empty, Any):
            continue
        pending = [value]
        while pending and not isinstance(pending[-1], bool):
            one = pending.pop()
            pending += one.values() if isinstance(one, Mapping) else one if isinstance(one, list | tuple) else []
        if pending:
            raise ValueError(f"config has {name}={quoted(value)}; true and false stand for no number")


def abstract(name: str, config: Mapping[str, Any], stored: Stored, where: str | os.PathLike) -> Any:
    """Abstract model of a configuration that comes with stored tensors.

    Raises ValueError as `build`, naming `where`, also if the model is far larger than what is stored: its parts are
    then not made.
    """
    with errors_naming(where):
        check_values(config)
        return stored_model(lambda rngs: build(name, config, rngs=rngs), stored, str(where))


def check_values(config: Mapping[str, Any]) -> None:
    """Raises ValueError if a configuration from a file has more than MOST_VALUES values, at any depth.

    Flax looks at each of them again for every module that keeps it.
    """
    left = MOST_VALUES
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        held = value.values() if isinstance(value, Mapping) else value
        left -= len(held)
        if left < 0:
            raise ValueError(f"config has more than {MOST_VALUES:,} values")
        pending += [item for item in held if isinstance(item, Mapping | list)]


class Beside(Protocol):
    """Entries of a model's config.json and files that are saved beside it."""

    def in_config(self) -> dict[str, Any]: ...
    def write(self, folder: Path) -> None: ...


def save(model: Any, folder: str | os.PathLike, *, overwrite: bool = False, companions: Beside | None = None) -> None:
    """Write a model of a registered class to a folder, atomically.

    companions: token ids and tokenizer files to save beside it, such as `jaxmodels.convert.open.open_source(source)
    .companions`.

    Raises ValueError if the class is not registered, if the folder is not empty, unless `overwrite` is set and it
    holds a checkpoint, and if Orbax would take its path for another one.
    """
    checked_place(local(os.fspath(folder), "folder"), "folder", written=True)
    config = describe(model, {} if companions is None else companions.in_config())
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        save_arrays(temporary / "params", model)
        (temporary / "config.json").write_text(config, encoding="utf-8")
        if companions is not None:
            companions.write(temporary)


def describe(model: Any, more: Mapping[str, Any] | None = None) -> str:
    """Content of config.json for a model, with further entries; raises ValueError if its class is not registered."""
    content = {"format": FORMAT, "model": name_of(model), "config": model.config(), **(more or {})}
    return json.dumps(content, indent=2) + "\n"


def load(source: str | os.PathLike, *, dtype: Any = None, shardings: Shardings | Mesh | None = None) -> Any:
    """Load a model from a folder written by `save` or by a conversion, or from a training run's last checkpoint.

    `jaxmodels.load` also loads the formats of others.
    A model with a LoRA adapter is merged: returned as a model of the plain class. The sums are rounded once, to the
    given dtype, default that of the kernels.

    source: a model's folder, or a run's folder, of which the last complete checkpoint is used.
    dtype: cast floating arrays; default the dtypes in which they were saved.
    shardings: a mesh, on which the class's own `sharding_rules` distribute the arrays; or a function of path and shape
        to a Sharding. Each device's part is read separately. Default: the default device.

    Raises ValueError if the source holds no such checkpoint or is damaged, if its arrays do not fit its configuration,
    if a value overflows in `dtype` or with its adapter, if the mesh does not fit, or if arrays are float64 and
    jax_enable_x64 is off (set it by jax.config.update: `with jax.enable_x64(True)` does not reach Orbax's threads).
    """
    model = read_model(source, dtype, shardings, merge=True)
    if not hasattr(model, "merged"):
        return model
    with errors_naming(source):  # an adapter is merged before the cast: the sum is rounded once
        own = {"dtype", "free"} <= inspect.signature(model.merged).parameters.keys()  # others take no arguments
        plain = model.merged(dtype, free=True) if own else model.merged()
        return plain if dtype is None else cast(plain, flat_arrays(plain), dtype, free=own)


def load_saved(source: str | os.PathLike, *, dtype: Any = None, shardings: Shardings | Mesh | None = None) -> Any:
    """Load a model as `load` does, with an adapter that is not merged."""
    return read_model(source, dtype, shardings, merge=False)


def read_model(source: str | os.PathLike, dtype: Any, shardings: Shardings | Mesh | None, *, merge: bool) -> Any:
    """Model of a folder. merge: a model with an adapter is to be merged, and not cast before."""
    if dtype is not None:
        check_floating(dtype)
    folder = model_folder(Path(source))
    name, config = read_config(folder)
    with errors_naming(folder / "config.json"):
        cls = model_class(name)
    dtype = None if merge and hasattr(cls, "merged") else dtype
    place = placement(cls, shardings) if isinstance(shardings, Mesh) else shardings
    stored = stored_arrays(folder)
    model = abstract(name, config, Stored.of(stored), folder / "config.json")
    if holds_safetensors(folder):
        with errors_naming(folder):
            found = load_tensors(model, from_flax_names(model, stored), dtype, place, folder.name)
    elif dtype is None:
        found = load_arrays(folder / "params", model, place)
    else:
        found = cast(model, flat_arrays(load_arrays(folder / "params", model, place)), dtype)
    for path, module in nnx.iter_modules(found):
        if hasattr(module, "check_loaded"):
            with errors_naming(f"{folder}: {dotted(path)}"):
                module.check_loaded()
    return found


def check_arrays(folder: Path, model: Any, stored: Mapping[str, Any]) -> None:
    """Raise ValueError if the stored arrays of a model's folder are not those of an abstract model, as `load` does."""
    if holds_safetensors(folder):
        with errors_naming(folder):
            check_fit(flat_arrays(model), from_flax_names(model, stored), None, exact=True)
    else:
        targets = {dotted(path): array for path, array in flat_arrays(model).items()}
        check_same_arrays(folder / "params", stored, targets)


def model_folder(source: Path) -> Path:
    """Folder with the config.json of a model, from the argument of `load`; raises ValueError if there is none.

    Warns if later checkpoints of a run are skipped because they are incomplete.
    """
    recover(source)
    if not source.is_dir():
        raise ValueError(f"source={str(source)!r} is not a folder")
    if (source / "checkpoints").is_dir():
        step, skipped = latest_step(source)
        for number, reason in skipped.items():
            warnings.warn(visible(f"skipped checkpoint {number} of {source}: {reason}"), stacklevel=3)
        return step / "model"
    return source


def cast(model: Any, arrays: dict[Any, Any], dtype: Any, *, free: bool = False) -> Any:
    """Model with the given arrays, whose floating ones are cast one by one, on their devices, and dropped.

    free: delete the arrays that are cast, which the model has. Raises ValueError if a finite value overflows, or for
    float64 if jax_enable_x64 is off.
    """
    dtype = np.dtype(dtype)
    if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("dtype=float64 needs jax_enable_x64, set by jax.config.update")
    for path in list(arrays):
        array = arrays[path]
        if is_floating(array.dtype) and array.dtype != dtype:
            arrays[path] = cast_array(array, dtype)
            if jnp.isinf(arrays[path]).sum() > jnp.isinf(array).sum():
                raise ValueError(f"{dotted(path)} has values that overflow in dtype={dtype.name}")
            if free:
                array.delete()
    return with_arrays(model, arrays)


def cast_array(array: jax.Array, dtype: np.dtype) -> jax.Array:
    """Array of another dtype, in its place; narrowed by NumPy on CPUs, where XLA takes subnormal numbers for 0."""
    narrowed = dtype.itemsize <= array.dtype.itemsize
    if narrowed and array.is_fully_addressable and {device.platform for device in array.devices()} == {"cpu"}:
        with np.errstate(over="ignore", invalid="ignore"):
            return jax.device_put(np.asarray(array).astype(dtype), array.sharding)
    return array.astype(dtype).block_until_ready()  # so that few arrays are in memory twice
