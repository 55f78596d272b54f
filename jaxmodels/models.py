"""A model on disk: an Orbax checkpoint of its arrays beside the `config.json` that rebuilds the model.

FOLDER/config.json   {"format": 1, "model": "AutoregressiveTransformer", "config": {constructor arguments}}
FOLDER/params/       Orbax; one entry per array, named by its path (encoder.layers.0.norm_ff.scale)

A model that was converted without ever being in memory has, instead of params/, files that can be written as a stream:

FOLDER/params.safetensors, or params-00001-of-000NN.safetensors … and params.safetensors.index.json; one entry per
array and layer (layers.3.attention.qkv_lin.kernel, where the model has layers.attention.qkv_lin.kernel)
"""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx

from jaxmodels.io.atomic import atomic_folder
from jaxmodels.io.checkpoint import FORMAT, STEM, load_arrays, read_config, save_arrays
from jaxmodels.io.safetensors import is_folder, read_folder
from jaxmodels.weights.place import Shardings, from_flax_names, load_tensors

# Modules of the models of this project, by the name in config.json. Nothing else is imported on a file's word.
MODULES = {
    "AutoregressiveModel": "jaxmodels.feedback",
    "AutoregressiveTransformer": "jaxmodels.transformer",
    "NeoX": "jaxmodels.neox",
    "RetroModel": "jaxmodels.retro",
}
REGISTERED: dict[str, type] = {}

Class = TypeVar("Class", bound=type)


def register(name: str) -> Callable[[Class], Class]:
    """Decorator that gives a model class the name under which it is saved and loaded.

    The class needs `config()`, which returns the arguments of `from_config` (or of its constructor) as JSON values;
    both also take `rngs`. Raises ValueError if the class has no `config`, or if the name belongs to another class.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} must be a non-empty string")

    def add(cls: Class) -> Class:
        if not callable(getattr(cls, "config", None)):
            raise ValueError(f"{cls.__name__} has no config(), which returns the arguments that rebuild the model")
        known = REGISTERED.get(name)
        same = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
        if name in MODULES or (known is not None and not same):
            raise ValueError(f"name={name!r} is taken by another model")
        REGISTERED[name] = cls
        return cls

    return add


def names() -> list[str]:
    """Names of all models that can be loaded, sorted."""
    return sorted({*MODULES, *REGISTERED})


def model_class(name: str) -> Any:
    """Class of a model by its name; raises ValueError for a name that is not registered."""
    if isinstance(name, str) and name in REGISTERED:
        return REGISTERED[name]
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f"model={name!r} is not registered; known are {', '.join(names())}")
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


def build(name: str, config: dict[str, Any], *, seed: int = 0) -> Any:
    """A freshly initialised model of a class by name; raises ValueError where the arguments are not the class's."""
    cls = model_class(name)
    make = getattr(cls, "from_config", cls)  # a model around another model is not made of its configuration alone
    try:
        return make(**config, rngs=nnx.Rngs(seed))
    except (TypeError, AttributeError) as error:  # the second: a list where a name belongs
        raise ValueError(f"the configuration does not fit {name}: {error}") from None


def save(model: Any, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a language model (anything with a `config()`) to a folder, all of it or nothing.

    Raises ValueError where the folder is not empty and `overwrite` is not set, or the model's class is not registered.
    """
    config = describe(model)
    with atomic_folder(folder, overwrite=overwrite) as beside:
        save_arrays(beside / "params", model)
        (beside / "config.json").write_text(config, encoding="utf-8")


def describe(model: Any) -> str:
    """Content of config.json for a model; raises ValueError if its class is not registered."""
    return json.dumps({"format": FORMAT, "model": name_of(model), "config": model.config()}, indent=2) + "\n"


def load(folder: str | os.PathLike, *, shardings: Shardings | None = None) -> Any:
    """The model that `save` or a conversion wrote, each array in the dtype it was saved in.

    shardings: where an array goes, by its path and shape; each device's part is read for itself. None: all of it on the
    default device. Raises ValueError where the folder holds no such checkpoint, where its arrays are not those of its
    configuration, and where they are float64 while jax_enable_x64 is off (Orbax reads in threads of its own, which
    `with jax.enable_x64(True)` does not reach).
    """
    folder = Path(folder)
    name, config = read_config(folder)
    model = nnx.eval_shape(lambda: build(name, config))
    if is_folder(folder, STEM):
        tensors = from_flax_names(model, read_folder(folder, STEM))
        return load_tensors(model, tensors, shardings=shardings, what=folder.name)
    return load_arrays(folder / "params", model, shardings)
