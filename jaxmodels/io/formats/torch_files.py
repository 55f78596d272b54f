"""PyTorch checkpoint files (.pt), read without running code in them and written atomically."""

import collections
import errno
import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxmodels.io.allowance import Allowance
from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import errors_naming, open_regular
from jaxmodels.io.content import explained, is_zip
from jaxmodels.io.formats.torch_formats import made_on_cpu, read_legacy, read_zipped
from jaxmodels.io.shapes import check_shape
from jaxmodels.process.extras import require
from jaxmodels.process.programs import interrupt_held
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.weights.names import as_numpy, as_tensor
from jaxmodels.weights.pickles import BYTES_IO, RefusedError

ENTRIES = ("state_dict", "model_state_dict", "model", "module")  # names of the state_dict in a larger checkpoint
DEPTH = 2  # of an entry with the state_dict
FUNCTIONS = ("_reconstruct", "scalar")  # by which NumPy's pickles make arrays and numbers
REPEATED_BYTES = 2**24  # of a tensor that repeats its values, such as a mask, in a smaller file


def read_state_dict(file: Path, key: str | None = None) -> dict[str, Any]:
    """Tensors of a .pt file by name, memory-mapped.

    key: entry with the state_dict, if the file holds more. Raises ValueError, naming the file, if it is missing,
    truncated, not a checkpoint or not a state_dict, or if it contains code.
    """
    allowance = Allowance([file])
    return state_dict_of(file, read_pt(file, stand_ins(), allowance), allowance, key)


def state_dict_of(file: Path, content: Any, allowance: Allowance, key: str | None = None) -> dict[str, Any]:
    """Tensors of the content of a .pt file by name; see `read_state_dict`."""
    import torch

    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"{file} has no entry key={key!r}; it holds {describe(content)}")
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{file} is not a state_dict; it holds {describe(content)}; choose an entry with --key")
    if not content:
        raise ValueError(f"{file} holds no tensors")
    tensors = {name: plain(tensor) for name, tensor in content.items()}
    for name, tensor in tensors.items():
        check_tensor(file, name, tensor)
    allowance.add_tensors(file, tensors.values())
    return tensors


def read_pt(file: Path, safe_globals: Sequence[Any] = (), allowance: Allowance | None = None) -> Any:
    """Content of a .pt file, memory-mapped.

    safe_globals: classes and functions that it may refer to besides tensors. allowance: of all files of the checkpoint,
    if there are others. Raises ValueError, naming the file, if it
    is missing, truncated, compressed or not a checkpoint, or if it contains code.
    """
    require("torch", "torch")
    import torch

    if not file.is_file():
        raise ValueError(f"{file} is not a file" if not file.exists() else f"{file} is not a regular file")
    open_regular(file).close()  # refuses sparse files
    zipped = is_zip(file)
    allowance = allowance or Allowance([file])
    try:
        with torch.serialization.safe_globals(list(safe_globals)), warnings.catch_warnings(), made_on_cpu():
            warnings.simplefilter("ignore")  # torch's own use of what it deprecates, and notes on the pickle's protocol
            return without_attributes(read_zipped(file, allowance) if zipped else read_legacy(file, allowance))
    except pickle.UnpicklingError as error:
        # The rest of torch's message is dropped: it recommends weights_only=False, which runs the file's code.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        refers = f"holds more than tensors: it refers to {shortened(named[1], 100)}" if named else ""
        why = refers or "is damaged or holds more than tensors"
        raise explained(file, f"is refused, as it {why}") from None
    except RefusedError as error:
        raise ValueError(f"{file} is refused: {error}") from None
    except Exception as error:  # a damaged pickle gives any arguments to the functions that it may call
        if isinstance(error, ValueError) and str(error).startswith(f"{file} "):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise explained(file, f"is truncated or not a PyTorch checkpoint: {reason}") from None


def read_tensors(file: Path, allowance: Allowance | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays of a checkpoint file by name, memory-mapped, and a note if they are in an entry of it.

    The state_dict is the file's content, or its entry of mappings to tensors: `state_dict` of Lightning, `model`,
    `module`. What is no tensor in it is left out. allowance: of all files of the checkpoint, if there are others.
    Raises ValueError, naming the file, if there is none or several.
    """
    allowance = allowance or Allowance([file])
    path, state = state_dict_in(file, read_pt(file, stand_ins(), allowance))
    arrays = {name: array for name, array in as_arrays(file, state, allowance).items() if array is not None}
    return arrays, [f"the tensors are in entry {quoted(path)} of {file.name}"] if path else []


def state_dict_in(file: Path, content: Any) -> tuple[str, Mapping[Any, Any]]:
    """State_dict in a file's content, and the dotted keys that lead to it; raises ValueError like `read_tensors`.

    An entry of ENTRIES is preferred to tensors beside it, and any entry to single numbers, such as that of a step.
    """
    level: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)] if isinstance(content, Mapping) else []
    if holds_tensors(content):
        inner = {name for name, value in content.items() if holds_tensors(value)}
        if not inner or not (inner & set(ENTRIES) or holds_only_numbers(content)):
            return "", content
    for _ in range(DEPTH):
        level = [
            ((*path, key), value)
            for path, mapping in level
            for key, value in mapping.items()
            if isinstance(key, str) and isinstance(value, Mapping)
        ]
        found = [(path, value) for path, value in level if holds_tensors(value)]
        chosen = [(path, value) for path, value in found if path[-1] in ENTRIES] or found
        top = {path[0]: value for path, value in chosen if len(path) == 1 and path[0] in ENTRIES}
        if len(chosen) > 1 and not top:
            names = ", ".join(quoted(".".join(path)) for path, _ in chosen[:10])
            raise ValueError(f"{file} holds several state_dicts, in entries {names}")
        if top:
            return next((name, top[name]) for name in ENTRIES if name in top)
        if chosen:
            return ".".join(chosen[0][0]), chosen[0][1]
    raise ValueError(f"{file} holds no tensors by name; it holds {describe(content)}")


def holds_tensors(content: Any) -> bool:
    """True for a mapping of names to tensors, with or without other values."""
    import torch

    if not isinstance(content, Mapping):
        return False
    return any(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())


def holds_only_numbers(content: Mapping[Any, Any]) -> bool:
    """True if all tensors of a mapping are single numbers."""
    import torch

    return all(value.dim() == 0 for value in content.values() if isinstance(value, torch.Tensor))


def as_arrays(file: Path, content: Any, allowance: Allowance) -> dict[str, np.ndarray | None]:
    """Arrays of a state_dict, which share the file's memory; None for what is not a dense tensor.

    Raises ValueError, naming the file, if it is not a state_dict, or if NumPy cannot represent a tensor.
    """
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file} is not a state_dict; it holds {describe(content)}")
    arrays: dict[str, np.ndarray | None] = {}
    tensors = {name: plain(tensor) for name, tensor in content.items()}
    for name, tensor in tensors.items():
        if is_dense(tensor):
            check_size(file, name, tensor)
        try:
            arrays[str(name)] = as_numpy(tensor) if is_dense(tensor) else None
        except ValueError as error:
            narrow = "; float8 weights are not supported" if "float8" in str(tensor.dtype) else ""
            raise ValueError(f"{file} has {quoted(name)}: {error}{narrow}") from None
    allowance.add_tensors(file, filter(is_dense, tensors.values()))
    return arrays


def without_attributes(content: Any) -> Any:
    """The same content, whose OrderedDicts have no attributes of their own, such as _metadata of a state_dict.

    A file may give them the names of their methods, and have lists that hold themselves.
    """
    left, seen = [content], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, collections.OrderedDict):
            vars(value).clear()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return content


def plain(value: Any) -> Any:
    """A dense tensor without attributes of its own, which shares its memory; any other value as it is.

    A file may give a tensor attributes with the names of its methods.
    """
    import torch

    return torch.Tensor.detach(value) if is_dense(value) else value


def check_tensor(file: Path, name: Any, tensor: Any) -> None:
    """Raises ValueError if a tensor has no name, is not dense, holds no values, or is larger than its file."""
    if not isinstance(name, str):
        raise ValueError(f"{file} has a tensor under {quoted(name)}; expected a name")
    if not is_dense(tensor) or tensor.is_quantized or tensor.device.type == "meta":
        raise ValueError(f"{file} has {quoted(name)}, which is not a dense tensor with values")
    check_size(file, name, tensor)


def is_dense(value: Any) -> bool:
    """True for a tensor whose values lie in memory at the distances of its strides: neither sparse nor nested."""
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested


def check_size(file: Path, name: Any, tensor: Any) -> None:
    """Raises ValueError if a tensor has more bytes than its file: with strides of 0, one value may fill the memory.

    Also for a shape that `check_shape` refuses.
    """
    try:
        check_shape(tensor.shape)
    except ValueError as error:
        raise ValueError(f"{file} has {quoted(name)}: {error}") from None
    n_bytes = tensor.numel() * tensor.element_size()
    if n_bytes > max(file.stat().st_size, REPEATED_BYTES):
        raise ValueError(
            f"{file} has {quoted(name)} of {n_bytes:,} bytes in shape {list(tensor.shape)}, more than the file: its "
            "values are repeated by strides of 0; save a contiguous copy"
        )


def describe(content: Any) -> str:
    """Short description of a file's content for error messages."""
    if isinstance(content, Mapping):
        return "entries " + ", ".join(quoted(key) for key in list(content)[:10])
    return f"a {type(content).__name__}"


def write_state_dict(file: Path, arrays: Mapping[str, np.ndarray], check: Callable[[], None] = lambda: None) -> None:
    """Write arrays as a state_dict for `torch.load`, atomically; raises OSError, naming the file, for a full disk.

    check: see `atomic_file`. Raises ValueError, naming the file, for a dtype that `as_tensor` refuses.
    """
    require("torch", "torch")
    import torch

    with errors_naming(file):
        tensors = {name: as_tensor(array) for name, array in arrays.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file, check) as temporary, open(temporary, "wb") as opened, interrupt_held() as interrupted:
        recorded: Any = Recorded(opened, interrupted)
        try:
            torch.save(tensors, recorded)
        except RuntimeError:  # torch's writer raises it about its own position in the file
            raise recorded.error or OSError(errno.EIO, "torch could not write it", str(file)) from None
        if recorded.error is not None:
            raise recorded.error


class Recorded(io.RawIOBase):
    """File to write that keeps the first OSError: the writer of a library raises another exception for it, or none.

    interrupted(): whether nothing more is to be written.
    """

    def __init__(self, file: BinaryIO, interrupted: Callable[[], bool] = lambda: False):
        self.file, self.interrupted = file, interrupted
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            if self.interrupted():
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        if not self.file.closed:  # Python flushes again when this object is dropped, and since 3.13 reports an error
            self.file.flush()


class NotRead:
    """Stands for an array, number or dtype of NumPy in a pickle, or for a file in memory, which are not read.

    NumPy takes whatever state a pickle gives its dtypes and arrays, so that a file could make it read anywhere.
    """

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def stand_ins() -> list[Any]:
    """Stand-ins for NumPy's random state and numbers in a pickle, under names of older and newer NumPy, and for
    files in memory: TransformerEngine saves its state in them.
    """
    functions = [f"{module}.multiarray.{name}" for module in ("numpy.core", "numpy._core") for name in FUNCTIONS]
    dtypes = [f"numpy.dtypes.{name}" for name in np.dtypes.__all__]
    names = [BYTES_IO, "numpy.ndarray", "numpy.dtype", *functions, *dtypes]
    return [(NotRead, name) for name in names]
