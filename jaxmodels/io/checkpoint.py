"""A model on disk: an Orbax checkpoint of its arrays beside the `config.json` that rebuilds the model.

FOLDER/config.json   {"format": 1, "model": "AutoregressiveTransformer", "config": {constructor arguments}}
FOLDER/params/       Orbax; one entry per array, named by its path (encoder.layers.0.norm_ff.scale)

A model that was converted without ever being in memory has, instead of params/, files that can be written as a stream:

FOLDER/params.safetensors, or params-00001-of-000NN.safetensors … and params.safetensors.index.json; one entry per
array and layer (layers.3.attention.qkv_lin.kernel, where the model has layers.attention.qkv_lin.kernel)
"""

import contextlib
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxmodels.io.safetensors import is_folder, read_folder
from jaxmodels.weights.names import dotted, flat_arrays, with_arrays
from jaxmodels.weights.place import Shardings, from_flax_names, placed

FORMAT = 1
STEM = "params"
# By one of these a folder is known as a checkpoint, of this project or another, which may be overwritten.
CHECKPOINT = ("config.json", "latest", "params", "*.safetensors", "global_step*", "layer_*-model_*.pt")

# Classes that a config.json may name, and where they are. Nothing else is ever imported on a file's word.
MODELS = {
    "AutoregressiveModel": "jaxmodels.feedback",
    "AutoregressiveTransformer": "jaxmodels.transformer",
    "NeoX": "jaxmodels.neox",
    "RetroModel": "jaxmodels.retro",
}


def model_class(name: str) -> Any:
    """The class that `name` stands for; raises ValueError for one that this version does not know."""
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"model={name!r} is not known here; known are {', '.join(sorted(MODELS))}")
    return getattr(importlib.import_module(MODELS[name]), name)


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

    Raises ValueError where the folder is not empty and `overwrite` is not set, or the model's class is not in MODELS.
    """
    config = describe(model)
    with written_beside(folder, overwrite=overwrite) as beside:
        save_arrays(beside / "params", model)
        (beside / "config.json").write_text(config, encoding="utf-8")


def describe(model: Any) -> str:
    """What config.json says of a model; raises ValueError where its class is not in MODELS."""
    name = type(model).__name__
    if type(model) is not model_class(name):
        raise ValueError(f"model is a {type(model).__module__}.{name}, not the {name} of this project")
    return json.dumps({"format": FORMAT, "model": name, "config": model.config()}, indent=2) + "\n"


def load(folder: str | os.PathLike, shardings: Shardings | None = None) -> Any:
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
        return placed(model, tensors, shardings=shardings, what=folder.name)
    return load_arrays(folder / "params", model, shardings)


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


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Raises ValueError where a folder cannot be written.

    That is a file; a folder that is not empty, unless `overwrite` is set and it holds a checkpoint; and one that is
    `source`, which is yet to be read, or around it: both would be deleted together.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder to write to")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} is not empty; name another folder, or allow overwriting")
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} holds the source {source}, which would be deleted with it; name another folder")
    if not any(any(target.glob(pattern)) for pattern in CHECKPOINT):
        raise ValueError(
            f"{target} is not overwritten: it holds no checkpoint ({', '.join(CHECKPOINT)}), and all of it would go"
        )


@contextlib.contextmanager
def written_beside(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill, which takes the target's place once it is complete and vanishes if filling it fails.

    A symbolic link stays one: what it leads to is replaced. The disk has all of the new folder before the old one goes.
    Raises ValueError before anything is written where `check_target` does, and OSError that names the target where the
    new folder cannot take its place.
    """
    target = Path(target).resolve()
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    old = beside.with_name(beside.name + ".old")
    beside.mkdir()
    try:
        yield beside
        for path in (*beside.rglob("*"), beside):
            flush(path)
        replace(target, beside, old)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush(target.parent)
    if old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def file_beside(target: str | os.PathLike) -> Iterator[Path]:
    """A path to write a file to, which takes the target's place once it is complete and vanishes if writing it fails.

    It has the name of no other, so that several processes may write one target: it is the whole file of one of them.
    """
    target = Path(target)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield beside
        flush(beside)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace(target: Path, new: Path, old: Path) -> None:
    """Puts `new` at the target, and what was there at `old`; or nothing changes, and an OSError names the target."""
    try:
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        where = f"; its former content is in {old}" if old.exists() else ""
        raise OSError(error.errno, f"{error.strerror}: it could not be replaced{where}", str(target)) from error


def flush(path: Path) -> None:
    """Returns when the disk has a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
