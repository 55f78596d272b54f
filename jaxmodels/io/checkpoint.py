"""Arrays on disk: an Orbax folder with an entry per array, named by its dotted path, and `config.json` beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmodels.weights.names import dotted, flat_arrays, with_arrays
from jaxmodels.weights.place import Shardings

FORMAT = 1
STEM = "params"


def save_arrays(folder: Path, module: Any) -> None:
    """Writes every array of a module (a model, an optimizer) with Orbax, each named by its path."""
    from orbax.checkpoint import v1 as ocp

    ocp.save(folder.absolute(), {dotted(path): array for path, array in flat_arrays(module).items()})


def load_arrays(folder: Path, module: Any, shardings: Shardings | None = None) -> Any:
    """The module, which may be abstract, with the arrays that `save_arrays` wrote, in the dtypes they were saved in.

    Raises ValueError where the folder is damaged or holds other arrays, and for float64 as `load` does.
    """
    targets = {dotted(path): (path, array) for path, array in flat_arrays(module).items()}
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # of several processes, this one's
    place = shardings or (lambda path, shape: device)
    arrays = read_arrays(folder, {key: (array.shape, place(key, array.shape)) for key, (_, array) in targets.items()})
    return with_arrays(module, {path: arrays[key] for key, (path, _) in targets.items()})


def read_arrays(
    folder: Path, targets: Mapping[str, tuple[tuple[int, ...], jax.sharding.Sharding]]
) -> dict[str, jax.Array]:
    """Arrays by name out of an Orbax checkpoint: targets are their shapes and where they shall lie.

    Raises ValueError as `load_arrays` does.
    """
    from orbax.checkpoint import v1 as ocp

    folder = folder.absolute()  # Orbax takes no other
    try:
        stored = ocp.metadata(folder).metadata
        if stored is None:  # Orbax only logs what is wrong
            raise ValueError("its metadata cannot be read")
    except Exception as error:  # Orbax raises many kinds, from FileNotFoundError to its own
        raise ValueError(f"{folder} is not a complete Orbax checkpoint: {error}") from error
    wrong = [f"missing {key}" for key in targets if key not in stored]
    wrong += [f"unexpected {key}" for key in stored if key not in targets]
    wrong += [
        f"{key} has shape {list(stored[key].shape)}, expected {list(shape)}"
        for key, (shape, _) in targets.items()
        if key in stored and stored[key].shape != shape
    ]
    if wrong:
        raise ValueError(f"{folder} does not hold the arrays of its configuration:\n  " + "\n  ".join(wrong))
    abstract = {
        key: jax.ShapeDtypeStruct(shape, stored[key].dtype, sharding=sharding)
        for key, (shape, sharding) in targets.items()
    }
    try:
        arrays = ocp.load(folder, abstract)
    except Exception as error:  # of many kinds here too
        raise ValueError(f"{folder} is damaged: {error}") from error
    narrowed = [key for key in targets if arrays[key].dtype != stored[key].dtype]
    if narrowed:
        raise ValueError(f"float64 needs jax_enable_x64, set by jax.config.update, for {', '.join(narrowed)}")
    return arrays


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Class name and constructor arguments from a folder's config.json; raises ValueError where it is not one."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"{file} has format {content['format']}, this version reads {FORMAT}")
        return content["model"], content["config"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} holds no config.json: it is no checkpoint that jaxmodels.save wrote") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the config.json of a checkpoint: {error!r}") from None
