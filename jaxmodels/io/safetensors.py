"""Safetensors files: read through the memory map, written as a stream.

    8 bytes   N, little-endian
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [start, stop]}, ..., "__metadata__": {}}
    the rest  the tensors' values, row-major, one after the other

A folder holds STEM.safetensors, or STEM-00001-of-000NN.safetensors … and STEM.safetensors.index.json, which says
which tensor is in which file: the convention of transformers. The `safetensors` package is not used: it wants a whole
file's tensors in memory to write one, and copies what it reads.
"""

import concurrent.futures
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.weights.lazy import nbytes, pieces

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # what the format allows
FILE_BYTES = 5_000_000_000
PIECE_BYTES = 1_000_000  # small enough that the disk's copy of a piece still finds it in the processor's cache
FLUSH_BYTES = 256_000_000

Progress = Callable[[int], None]


def read_file(file: Path) -> dict[str, np.ndarray]:
    """The tensors of one file by name, memory-mapped and read-only.

    Raises ValueError, naming the file, where it is missing, truncated or no safetensors file.
    """
    try:
        data = np.memmap(file, mode="r", dtype=np.uint8)
        size = int.from_bytes(data[:8].tobytes(), "little")
        if len(data) < 8 or size > min(len(data) - 8, MAX_HEADER):
            raise ValueError(f"a header of {size} bytes in a file of {len(data)}")
        header = json.loads(data[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        tensors = {name: view(data[8 + size :], entry) for name, entry in header.items()}
        places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        for (_, stop, name), (start, end, other) in itertools.pairwise(places):
            if start < min(stop, end):
                raise ValueError(f"{name} and {other} overlap")
        return tensors
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from None


def view(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"values at {start} to {stop} of {len(data)} bytes")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"a shape of {list(shape)}")
    return data[start:stop].view(dtype).reshape(shape)


def is_folder(folder: Path, stem: str) -> bool:
    return any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))


def read_folder(folder: Path, stem: str = "model") -> dict[str, np.ndarray]:
    """The tensors of a folder by name, from one file or from all that the index names.

    Raises ValueError, naming the file, where one is missing or damaged or does not hold what the index says.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return read_file(folder / f"{stem}.safetensors")
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not the index of a safetensors folder: {error!r}") from None
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is no file of this folder")
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        held = read_file(folder / name)
        said = {tensor for tensor, place in weight_map.items() if place == name}
        if held.keys() != said:
            different = ", ".join(sorted(held.keys() ^ said)[:5])
            raise ValueError(f"{folder / name} does not hold the tensors that {index.name} says: {different}")
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
    """Writes tensors, which may be lazy, in their order; more than one file, and an index, above `file_bytes`.

    Memory holds a few pieces of 1 MB, or of one row. `progress` is told of bytes as they are written.
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
    """Writes one file, and returns when the disk has it. Raises ValueError for a dtype that the format lacks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    offset = 0
    for name, tensor in tensors.items():
        if np.dtype(tensor.dtype) not in NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files do not have")
        ends = [offset, offset + nbytes(tensor)]
        header[name] = {"dtype": NAMES[np.dtype(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor of whole words is aligned

    def stream(readers: concurrent.futures.Executor) -> Iterator[np.ndarray]:
        yield np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
        for tensor in tensors.values():
            for piece in pieces(tensor, PIECE_BYTES, readers):
                yield piece.reshape(-1).view(np.uint8)
                progress(piece.nbytes)

    with concurrent.futures.ThreadPoolExecutor(2) as readers:
        write_stream(file, stream(readers))


def write_stream(file: Path, stream: Iterable[np.ndarray]) -> None:
    """Writes pieces to a file and flushes it to the disk, in threads: the next piece is made meanwhile.

    Raises OSError that names the file where the disk is full.
    """
    try:
        with file.open("xb", buffering=0) as out, concurrent.futures.ThreadPoolExecutor(2) as threads:
            write_to(out, threads, stream)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_to(out: io.FileIO, threads: concurrent.futures.Executor, stream: Iterable[np.ndarray]) -> None:
    def write(piece: np.ndarray) -> int:
        rest = piece.data
        while rest:  # a disk that fills up takes a part first, and then raises
            rest = rest[out.write(rest) :]
        return piece.nbytes

    writing = threads.submit(int)
    flushing: concurrent.futures.Future[None] = threads.submit(os.fsync, out.fileno())
    unflushed = 0
    for piece in stream:
        unflushed += writing.result()
        writing = threads.submit(write, piece)
        if unflushed > FLUSH_BYTES and flushing.done():  # the disk works from the beginning on, not only at the end
            flushing.result()
            flushing = threads.submit(os.fsync, out.fileno())
            unflushed = 0
    writing.result()
    flushing.result()
    os.fsync(out.fileno())
