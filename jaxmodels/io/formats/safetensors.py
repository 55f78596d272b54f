"""Safetensors files, read through a memory map and written as a stream.

    8 bytes   N, little-endian
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [start, stop]}, ..., "__metadata__": {}}
    the rest  values of the tensors, row-major, one after the other

A folder holds STEM.safetensors, or STEM-00001-of-000NN.safetensors … and STEM.safetensors.index.json, which maps
tensors to files, as in transformers. The `safetensors` package is not used: it writes a file only from tensors in
memory, and copies what it reads.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.io.allowance import check_distinct
from jaxmodels.io.bounded import open_regular, read_object, without_collection, without_repetition
from jaxmodels.io.content import explained
from jaxmodels.io.pipeline import Progress, run_in_threads, write_at
from jaxmodels.io.shapes import check_shape
from jaxmodels.process.paths import is_plain
from jaxmodels.process.texts import quoted, shortened
from jaxmodels.weights.lazy import Index, nbytes, row_slices, values

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # limit of the format
# Lists and objects, of which a tensor has 3, and commas in a header: others of that size take 3 GB as Python objects.
MAX_OPENED, MAX_COMMAS = 3_000_001, 10_000_000
FILE_BYTES = 5_000_000_000
PIECE_BYTES = 1_000_000  # small enough to be in the processor's cache when it is written


@without_collection()
def read_file(file: Path) -> dict[str, np.ndarray]:
    """Tensors of one file by name, memory-mapped and read-only.

    Raises ValueError, naming the file, if it is missing, truncated or not a safetensors file, or, naming the tensor
    too, if a dtype is not one of DTYPES. As the reference implementation, refuses a header with a name twice, and
    values that overlap, leave a gap, or do not end with the file.
    """
    try:
        with open_regular(file) as opened:
            data = np.asarray(np.memmap(opened, mode="r", dtype=np.uint8))  # a view of a memmap takes 10 times as long
        size = int.from_bytes(data[:8].tobytes(), "little")
        if len(data) < 8 or size > min(len(data) - 8, MAX_HEADER):
            raise ValueError(f"header of {size} bytes in a file of {len(data)}")
        text = data[8 : 8 + size].tobytes()
        if text.count(b"[") + text.count(b"{") > MAX_OPENED or text.count(b",") > MAX_COMMAS:
            raise ValueError("a header of more values than a million tensors have")
        header = json.loads(text.decode(), object_pairs_hook=without_repetition)  # of bytes, it takes UTF-16 too
        "".join(header).encode()  # a name may not hold half of a character
        about = header.pop("__metadata__", None)
        if about is not None and not all(isinstance(text, str) for text in about.values()):
            raise ValueError("__metadata__ must be an object of strings")
        unknown = [
            f"{quoted(name)} of {quoted(entry['dtype'])}"
            for name, entry in header.items()
            if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES
        ]
        values = data[8 + size :]
        tensors = {} if unknown else {name: view(values, entry) for name, entry in header.items()}
        check_places(header, len(values))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise explained(file, f"is truncated or not a safetensors file: {shortened(str(error), 300)}") from None
    if unknown:
        raise ValueError(f"{file} has tensors of dtypes that are not supported: {', '.join(unknown[:3])}")
    return tensors


def check_places(header: Mapping[str, Any], size: int) -> None:
    """Raises ValueError unless the tensors' values follow each other from 0 to `size`, in any order."""
    end, before = 0, "the beginning"
    for start, stop, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
        if start != end:
            problem = "overlap" if start < end else f"have {start - end} bytes between them"
            raise ValueError(f"{quoted(before)} and {quoted(name)} {problem}")
        end, before = stop, name
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, the file {size}")


def view(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """Tensor of a header's entry, as a view of the bytes after the header; raises ValueError if it does not fit."""
    dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(entry["shape"], list):
        raise ValueError(f"shape {quoted(entry['shape'])} must be a list")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (start, stop, *shape)):
        raise ValueError(
            f"offsets {quoted([start, stop])} and shape {quoted(list(shape))} must be whole numbers of 63 bits"
        )
    check_shape(shape)
    if not start <= stop <= len(data):
        raise ValueError(f"values at {start} to {stop} of {len(data)} bytes")
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"{stop - start} bytes for {entry['dtype']}{quoted(list(shape))}")
    return data[start:stop].view(dtype).reshape(shape)


def read_folder(folder: Path, stem: str = "model") -> dict[str, np.ndarray]:
    """Tensors of a folder by name, from one file or from all files of the index.

    Raises ValueError, naming the file, if one is missing or damaged or contradicts the index.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return read_file(folder / f"{stem}.safetensors")
    try:
        weight_map: dict[str, str] = read_object(index)["weight_map"]
        files = sorted(set(weight_map.values()))
        outside = [name for name in files if not is_plain(name) or not name.isprintable()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not the index of a safetensors folder: {shortened(repr(error), 300)}") from None
    if outside:
        raise ValueError(f"{index} names {quoted(outside[0])}, which is not a file name in this folder")
    for name in files:
        if not (folder / name).exists():  # at once: an index may name any number of them
            raise ValueError(f"{index} names {quoted(name)}, which does not exist in this folder")
    check_distinct(folder / name for name in files)
    tensors: dict[str, np.ndarray] = {}
    listed: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        listed.setdefault(name, set()).add(tensor)
    for name in files:
        held = read_file(folder / name)
        if held.keys() != listed[name]:
            different = ", ".join(shortened(tensor, 100) for tensor in sorted(held.keys() ^ listed[name])[:5])
            raise ValueError(f"{folder / name} differs from {index.name} in the tensors {different}")
        tensors |= held
    return tensors


def write_folder(
    folder: Path,
    tensors: Mapping[str, Any],
    stem: str = "model",
    *,
    file_bytes: int = FILE_BYTES,
    progress: Progress = lambda n: None,
) -> None:
    """Write tensors, which may be lazy, in order; in several files with an index if they exceed file_bytes.

    A few pieces of 1 MB, or of one row, are in memory at a time. progress is called with numbers of bytes written.
    """
    groups: list[dict[str, Any]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + nbytes(tensor) > file_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += nbytes(tensor)
    if len(groups) == 1:
        write_file(folder / f"{stem}.safetensors", groups[0], progress)
        return
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        name = f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors"
        write_file(folder / name, group, progress)
        weight_map |= dict.fromkeys(group, name)
    index = {"metadata": {"total_size": sum(map(nbytes, tensors.values()))}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, tensors: Mapping[str, Any], progress: Progress = lambda n: None) -> None:
    """Write one file, which the caller flushes to disk.

    Raises ValueError if the format lacks a dtype, and OSError, naming the file, e.g. if the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    offset = 0
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in NAMES:
            raise ValueError(f"{name} has dtype={tensor.dtype}, which safetensors files do not support")
        ends = [offset, offset + nbytes(tensor)]
        header[name] = {"dtype": NAMES[np.dtype(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # align the tensors

    def tasks(descriptor: int) -> Iterator[Callable[[], int]]:
        start = 8 + len(text)
        for tensor in tensors.values():
            for index in row_slices(tensor, PIECE_BYTES):
                yield functools.partial(write_piece, descriptor, start, tensor, index)
                start += math.prod(part.stop - part.start for part in index) * np.dtype(tensor.dtype).itemsize

    try:
        with file.open("xb", buffering=0) as out:
            write_at(out.fileno(), 0, np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8))
            run_in_threads(tasks(out.fileno()), progress)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_piece(descriptor: int, start: int, tensor: Any, index: Index) -> int:
    """Write a slice of a tensor to a position in a file; returns its number of bytes."""
    return write_at(descriptor, start, values(tensor, index))
