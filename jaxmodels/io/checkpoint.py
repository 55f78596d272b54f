"""Arrays in an Orbax folder, one entry per array, named by its dotted path; and the `config.json` next to it."""

import contextlib
import contextvars
import functools
import logging
import math
import operator
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.io.bounded import check_format, open_regular, read_json, read_object
from jaxmodels.io.content import STEM, holds_safetensors
from jaxmodels.io.formats import ocdbt
from jaxmodels.io.formats.safetensors import read_folder
from jaxmodels.io.shapes import check_shape
from jaxmodels.process.confined import Confined
from jaxmodels.process.failures import refusal
from jaxmodels.process.paths import below, check_utf8, resolved, walk
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.weights.names import Type, dotted, flat_arrays, listed, same_kind, with_arrays
from jaxmodels.weights.place import Shardings

FORMAT = 1
ITEM = "state"  # folder in an Orbax folder that has the arrays
VALUE_TYPES = ("jax.Array", "np.ndarray")  # of the arrays that this program saves
METADATA_BYTES = 2**26  # of a file of names, shapes and places; 500 bytes for an array
JSON_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding")
# Of the child process that reads names: processor time to start, to read, and for each byte of the folder; memory.
STARTING, SECONDS, SECONDS_PER_BYTE, MEGABYTES = 30.0, 3.0, 1e-7, 500.0
# Bytes of arrays: some, and many for each of a file. Weights in zstandard have hardly more than they take in files, but
# masks and weights of zeros have thousands of times as many.
FREE_BYTES, COMPRESSION = 2**27, 100
OTHER_PLACES, PATTERNS = re.compile(r"\\|:$|\.__lock$"), re.compile(r"[*?\[]")  # in names of folders
SETTLING = 0.5  # seconds in which other threads of a write that failed end


def save_arrays(folder: Path, module: Any) -> None:
    """Write every array of a module (a model, an optimizer) with Orbax, named by its path.

    A first interrupt is raised once Orbax has ended: its threads would write again what is removed after one. Raises
    OSError, naming the file, e.g. if the disk is full, and ValueError for a path that `checked_place` refuses.
    """
    place = checked_place(folder, "folder", written=True)
    from orbax.checkpoint import v1 as ocp

    drop_reports_of_saving()
    arrays = {dotted(path): array for path, array in flat_arrays(module).items()}
    try:
        with saving(), ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()  # from here on the thread is waited for, whenever an interrupt comes
            pool.submit(contextvars.copy_context().run, ocp.save, place, arrays).result()
    except Exception as error:  # TensorStore raises its own for a full disk
        time.sleep(SETTLING)
        refused = refusal(error, place)
        if refused is None:
            raise
        raise refused from error


def saving() -> Any:
    """Context in which Orbax makes folders at once: for one that cannot be made, its threads would wait 5 minutes."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context


def load_arrays(folder: Path, module: Any, shardings: Shardings | None = None) -> Any:
    """Module with the arrays that `save_arrays` wrote, in the dtypes in which they were saved.

    module: may be abstract. shardings: by path and shape; default this process's first device. Raises ValueError as
    `read_arrays`.
    """
    targets = {dotted(path): (path, array) for path, array in flat_arrays(module).items()}
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # local: there may be several processes
    place = shardings or (lambda path, shape: device)
    wanted = {
        key: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place(key, array.shape))
        for key, (_, array) in targets.items()
    }
    arrays = read_arrays(folder, wanted)
    return with_arrays(module, {path: arrays[key] for key, (path, _) in targets.items()})


def read_arrays(
    folder: Path, targets: Mapping[str, jax.ShapeDtypeStruct], *, exact: bool = False, zeros: bool = False
) -> dict[str, jax.Array]:
    """Read arrays by name from an Orbax folder, in their stored dtypes; targets have their shapes and shardings.

    exact: the stored dtypes must be the targets'. zeros: arrays of the targets' bytes may be in files of any size, as
    an optimizer's before its first step: only for targets that follow from a model that was read before.

    Raises ValueError if the folder is incomplete or damaged, if it holds other arrays, also if only one of the dtypes
    is floating or both are others and differ, or if arrays are float64 and jax_enable_x64 is off (`with
    jax.enable_x64(True)` does not reach Orbax's threads).
    """
    from orbax.checkpoint import v1 as ocp

    place = checked_place(folder, "folder")
    stored, fit = stored_types(folder, size_of(targets) if zeros else 0), operator.eq if exact else same_kind
    check_same_arrays(folder, stored, targets, fit)
    abstract = {
        key: jax.ShapeDtypeStruct(target.shape, stored[key].dtype, sharding=target.sharding)
        for key, target in targets.items()
    }
    try:
        with without_logs():
            arrays = ocp.load(place, abstract, checkpointable_name=ITEM)
    except Exception as error:  # many kinds here too
        raise ValueError(f"{folder} is damaged: {reason(error)}") from error
    narrowed = [key for key in targets if arrays[key].dtype != stored[key].dtype]
    if narrowed:
        raise ValueError(f"float64 needs jax_enable_x64, set by jax.config.update, for {', '.join(narrowed)}")
    return arrays


def check_same_arrays(
    folder: Path, stored: Mapping[str, Any], targets: Mapping[str, Any], fit: Callable[[Any, Any], bool] = same_kind
) -> None:
    """Raise ValueError if stored arrays have other names or shapes than targets, or dtypes that do not fit theirs."""
    wrong = [f"missing {key}" for key in targets if key not in stored]
    wrong += [f"unexpected {key}" for key in stored if key not in targets]
    wrong += [
        f"{key} has shape {list(stored[key].shape)}, expected {list(target.shape)}"
        for key, target in targets.items()
        if key in stored and stored[key].shape != target.shape
    ]
    wrong += [
        f"{key} has dtype {stored[key].dtype}, expected {target.dtype}"
        for key, target in targets.items()
        if key in stored and not fit(stored[key].dtype, target.dtype)
    ]
    if wrong:
        raise ValueError(f"{folder} does not hold the arrays of its configuration: {listed(wrong)}")


def checked_place(folder: Path, name: str, *, written: bool = False) -> Path:
    """Absolute path of a folder without links; TensorStore reads no path with `..`, and Orbax drops it.

    name: of the argument. written: Orbax looks there for files by a pattern, too. Raises ValueError for a path that
    Orbax or TensorStore takes for another one, and for one that is not UTF-8.
    """
    place = resolved(folder)
    check_utf8(place, name)
    odd = next((part for part in place.parts if OTHER_PLACES.search(part) or (written and PATTERNS.search(part))), None)
    if odd is not None:
        raise ValueError(
            f"{name}={folder}: {quoted(odd)} is in its path, which Orbax takes for another one or for a pattern: names "
            r"may not have \ or end in : or .__lock, nor, to be written, have * ? ["
        )
    return place


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """Context in which Orbax logs nothing: it logs the content of files that are damaged, and then raises."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def drop_reports_of_saving() -> None:
    """Drop the reports of failed writes of Orbax and its threads, hundreds of lines of tracebacks beside an error."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(is_not_about_saving)  # once: a logger keeps one of each filter
    drop_late_messages()


def is_not_about_saving(record: logging.LogRecord) -> bool:
    """False for a report of Orbax that something could not be written."""
    return record.levelno < logging.ERROR or not ("orbax" in record.pathname or "orbax" in str(record.msg))


@functools.cache
def drop_late_messages() -> None:
    """Drop what Orbax's threads and tasks print on what could not be read or written, after the first error was raised.

    It is a page of text for each array, with tracebacks, through Python's hook for exceptions that nobody can catch.
    """
    earlier = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not is_late(unraisable.exc_value):
            earlier(unraisable)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", r"coroutine 'async_serialize.*was never awaited", RuntimeWarning)
    logging.getLogger("asyncio").addFilter(
        lambda record: not is_late((record.exc_info or (None, None))[1]) and "orbax" not in record.getMessage()
    )


def reason(error: Exception) -> str:
    """First line of an error of Orbax, without TensorStore's configuration, which follows."""
    first = str(error).strip().partition("\n")[0]
    return shortened(first.partition(" See full TensorStore details")[0], 500)


def is_late(error: BaseException | None) -> bool:
    """True for an error of TensorStore, which reads arrays, and of its event loop."""
    text = str(error)
    return "tensorstore" in text.lower() or (isinstance(error, RuntimeError) and text == "Event loop is closed")


def size_of(arrays: Mapping[str, Any]) -> int:
    """Bytes of arrays that have a shape and a dtype."""
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())


def stored_types(folder: Path, known: int = 0) -> dict[str, Type]:
    """Shapes and dtypes of the arrays in an Orbax folder by name.

    known: bytes that its arrays may have in files of any size. Raises ValueError if it cannot be read, or if its
    files are too few bytes for its arrays: a kilobyte of zstandard may stand for 32 MB of zeros.
    """
    from orbax.checkpoint import v1 as ocp

    drop_late_messages()
    check_files(folder)
    place = checked_place(folder, "folder")
    held = max(sum(file.stat().st_size for file in below(folder) if file.is_file()), -(-known // COMPRESSION))
    try:
        with without_logs():
            shapes = chunked_shapes(place, held)
            check_format_of_arrays(folder)
            stored = ocp.metadata(place, ITEM).metadata
        if stored is None:  # Orbax logs the reason and returns None
            raise ValueError("its metadata cannot be read")
        if nested := [name for name, array in stored.items() if not hasattr(array, "shape")]:
            raise ValueError(f"{quoted(nested[0])} is no array; a tree within the tree is not read")
        types = {name: Type(tuple(array.shape), np.dtype(array.dtype)) for name, array in stored.items()}
        if other := [name for name, found in types.items() if shapes.get(name) != found.shape]:
            raise ValueError(f"{quoted(other[0])} has another shape than its {ocdbt.ZARR}")
        for found in types.values():
            check_shape(found.shape)
    except Exception as error:  # Orbax raises many kinds, from FileNotFoundError to its own
        raise ValueError(f"{folder} is not a complete Orbax checkpoint: {reason(error)}") from error
    if (claimed := size_of(types)) > FREE_BYTES + COMPRESSION * held:
        raise ValueError(
            f"{folder} is not a complete Orbax checkpoint: {claimed:,} bytes of arrays in files of {held:,}"
        )
    return types


@functools.cache
def reader() -> Confined:
    """Child process that reads names and shapes; another one if it was ended."""
    return Confined(ocdbt.__name__, seconds=STARTING, megabytes=MEGABYTES)


def chunked_shapes(folder: Path, held: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an Orbax folder by name, whose chunks are as Orbax writes them.

    held: bytes of its files, on which the time and the number of chunks depend. They are read in a child process with
    limited time and memory (`jaxmodels.io.formats.ocdbt`). A part of an array, however small, takes the memory of a
    whole chunk; what a chunk has beyond its shape is not decompressed. Raises ValueError for other chunks, for arrays
    in another format than Orbax writes today, and for names that take too much time or memory.
    """
    seconds = SECONDS + SECONDS_PER_BYTE * held
    found = reader().call("shapes", str(folder / ITEM), held, seconds=seconds, megabytes=MEGABYTES)
    return {name: tuple(shape) for name, shape in found.items()}


def check_format_of_arrays(folder: Path) -> None:
    """Raise ValueError, naming the file, unless Orbax reads the arrays from the store of `chunked_shapes`.

    Its _METADATA may lead to other files and other kinds of values, and may have absent chunks read as zeros.
    """
    file = folder / ITEM / "_METADATA"
    content = read_object(file, METADATA_BYTES)
    for name in ("use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value"):
        if content.get(name) is not True:
            raise ValueError(f"{file} has {name}={quoted(content.get(name))}, must be true")
    for name, entry in content["tree_metadata"].items():
        if (kind := entry["value_metadata"]["value_type"]) not in VALUE_TYPES:
            allowed = " or ".join(VALUE_TYPES)
            raise ValueError(f"{file} has value_type={quoted(kind)} of {quoted(name)}, must be {allowed}")


def check_files(folder: Path) -> None:
    """Raise ValueError, naming the file, for what Orbax would wait for without end, read whole or not survive.

    Objects nested a thousand deep overflow the stack of TensorStore, which ends the process.
    """
    for path, folders, files in walk(folder):
        for name in folders:
            if (path / name).is_symlink():
                raise ValueError(f"{path / name} is a symbolic link; expected a folder")
        for name in files:
            file = path / name
            with open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
            if path.name != "d" and size > METADATA_BYTES:
                raise ValueError(f"{file} has {size:,} bytes; at most {METADATA_BYTES:,} are read")
            if name in JSON_FILES or path.name == "array_metadatas":
                read_json(file, METADATA_BYTES)


def stored_arrays(folder: Path) -> dict[str, Any]:
    """Arrays of a model's folder by name, each with shape and dtype: its safetensors, else `stored_types` of Orbax's.

    Raises ValueError if they are missing or damaged.
    """
    return dict(read_folder(folder, STEM)) if holds_safetensors(folder) else dict(stored_types(folder / STEM))


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Model name and configuration from a folder's config.json; raises ValueError if it is missing or damaged."""
    file = folder / "config.json"
    if not file.is_file():
        what = "holds no config.json written by jaxmodels.save" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {what}")
    content = read_object(file)
    try:
        check_format(file, content["format"], FORMAT)
        name, config = content["model"], content["config"]
    except KeyError as error:
        raise ValueError(f"{file} is not a config.json written by jaxmodels.save: it has no {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} has config={quoted(config)}, must be an object")
    return name, config
