"""Tensors that are not read yet: shape and dtype are known, values come slice by slice from where they lie.

A tensor here is anything with `shape`, `dtype` and slicing: a NumPy array over a memory-mapped file, or one of the
classes below around others. `fill(out, tensor, index)` reads a slice of it into an array that the caller owns. However
many classes lie around each other, the values move once, from the file's pages to `out`; nothing between them is
allocated, but for the small vectors of `Combined`.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import jax
import numpy as np

Index = tuple[slice, ...]  # one slice for each axis, with start and stop, step 1
ALIGNMENT = 64
TILE = 1024, 8  # of the result, when NumPy transposes: 5 times as fast as squares, which were faster than no tiles
TRANSPOSED_ROWS = 256  # of the result at a time, when JAX does


class Lazy:
    """A tensor whose values come by `fill`."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def fill(self, out: np.ndarray, index: Index) -> None:
        raise NotImplementedError


def fill(out: np.ndarray, tensor: Any, index: Index) -> None:
    """Writes a slice of a tensor into `out`, an array of the slice's shape, casting to its dtype."""
    if isinstance(tensor, Lazy):
        tensor.fill(out, index)
    else:
        copy(out, np.asarray(tensor[index]))


def read(tensor: Any, index: Index | None = None) -> np.ndarray:
    """A slice of a tensor (None: all of it) as a new array."""
    index = whole(tensor.shape) if index is None else index
    out = aligned([part.stop - part.start for part in index], np.dtype(tensor.dtype))
    fill(out, tensor, index)
    return out


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins where JAX wants its own to begin: on a CPU it is then taken over, and not copied."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def whole(shape: Sequence[int]) -> Index:
    return tuple(slice(0, size) for size in shape)


def bounded(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """The index with every start and stop as a number."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


@np.errstate(over="ignore", invalid="ignore")  # `Cast` names the tensor that overflows; NaN is no error
def copy(out: np.ndarray, values: np.ndarray) -> None:
    if out.ndim == 2 and (out.strides[0] < out.strides[1]) != (values.strides[0] < values.strides[1]):
        if out.strides[0] < out.strides[1]:
            out, values = out.T, values.T
        transpose(out, values)
    else:
        np.copyto(out, values, casting="unsafe")


def transpose(out: np.ndarray, values: np.ndarray) -> None:
    """Copies columns into rows: through JAX's way to a device, which is twice as fast as NumPy's best, where it can."""
    host = cpu() if values.dtype.itemsize <= 4 else None  # JAX would narrow 8 bytes
    if host is not None:
        for i in range(0, out.shape[0], TRANSPOSED_ROWS):
            rows = slice(i, i + TRANSPOSED_ROWS)
            np.copyto(out[rows], np.asarray(jax.device_put(values[rows], host)), casting="unsafe")
        return
    for i in range(0, out.shape[0], TILE[0]):
        for j in range(0, out.shape[1], TILE[1]):
            tile = slice(i, i + TILE[0]), slice(j, j + TILE[1])
            np.copyto(out[tile], values[tile], casting="unsafe")


@functools.cache
def cpu() -> jax.Device | None:
    """JAX's device on this process's own host; None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def pieces(tensor: Any, n_bytes: int, readers: Executor | None = None, ahead: int = 2) -> Iterator[np.ndarray]:
    """All values in order, as arrays of whole rows: about n_bytes each, at most 4 times that, or one row.

    `readers`, where given, are threads that read up to `ahead` pieces while one is used.
    """
    if not tensor.shape:
        yield read(tensor)
        return
    row = max(1, nbytes(tensor) // max(1, tensor.shape[0]))
    # Rows of a transposed matrix are columns on disk: few at a time would touch every page of the file for a few bytes.
    step = max(1, n_bytes // row, min(512, 4 * n_bytes // row))
    starts = range(0, tensor.shape[0], step)
    indices = ((slice(i, min(i + step, tensor.shape[0])), *whole(tensor.shape[1:])) for i in starts)
    if readers is None:
        yield from (read(tensor, index) for index in indices)
        return
    reading: collections.deque[Future[np.ndarray]] = collections.deque()
    for index in indices:
        reading.append(readers.submit(read, tensor, index))
        if len(reading) > ahead:
            yield reading.popleft().result()
    while reading:
        yield reading.popleft().result()


def nbytes(tensor: Any) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Joined(Lazy):
    """Tensors one after the other along an axis; all other axes are equal, and so are the dtypes."""

    parts: Sequence[Any]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        first = self.parts[0].shape
        return (*first[: self.axis], sum(part.shape[self.axis] for part in self.parts), *first[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(self.parts[0].dtype)

    def fill(self, out: np.ndarray, index: Index) -> None:
        wanted = index[self.axis]
        begin = 0
        for part in self.parts:
            size = part.shape[self.axis]
            start, stop = max(wanted.start, begin), min(wanted.stop, begin + size)
            if start < stop:
                there = replaced(whole(out.shape), self.axis, slice(start - wanted.start, stop - wanted.start))
                fill(out[there], part, replaced(index, self.axis, slice(start - begin, stop - begin)))
            begin += size


@dataclasses.dataclass(frozen=True, eq=False)
class Cut(Lazy):
    """A tensor from `start` to `stop` along an axis; what lies behind its end is zero."""

    tensor: Any
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.tensor.shape[: self.axis], self.stop - self.start, *self.tensor.shape[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(self.tensor.dtype)

    def fill(self, out: np.ndarray, index: Index) -> None:
        size = self.tensor.shape[self.axis]
        start, stop = (min(self.start + end, size) for end in (index[self.axis].start, index[self.axis].stop))
        inside = whole(out.shape)
        if start < stop:
            fill(
                out[replaced(inside, self.axis, slice(0, stop - start))],
                self.tensor,
                replaced(index, self.axis, slice(start, stop)),
            )
        out[replaced(inside, self.axis, slice(stop - start, out.shape[self.axis]))] = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Combined(Lazy):
    """One vector out of several of the same shape, by a function; each is read whole: for biases and norms."""

    parts: Sequence[Any]
    function: Callable[[Sequence[np.ndarray]], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(self.parts[0].dtype)

    def fill(self, out: np.ndarray, index: Index) -> None:
        copy(out, self.function([read(part) for part in self.parts])[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Transposed(Lazy):
    """A matrix with its axes exchanged."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.tensor.shape[::-1])

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(self.tensor.dtype)

    def fill(self, out: np.ndarray, index: Index) -> None:
        fill(out.T, self.tensor, index[::-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(Lazy):
    """Tensors of one shape and dtype along a new leading axis."""

    parts: Sequence[Any]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(self.parts[0].dtype)

    def fill(self, out: np.ndarray, index: Index) -> None:
        for i, part in enumerate(self.parts[index[0]]):
            fill(out[i], part, index[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Layer(Lazy):
    """Entry i of a tensor's leading axis."""

    tensor: Any
    i: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.tensor.shape[1:])

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(self.tensor.dtype)

    def fill(self, out: np.ndarray, index: Index) -> None:
        fill(out[None], self.tensor, (slice(self.i, self.i + 1), *index))


@dataclasses.dataclass(frozen=True, eq=False)
class Cast(Lazy):
    """A tensor in another dtype; a finite value that becomes infinite in it is a ValueError when it is read."""

    tensor: Any
    dtype: np.dtype
    name: str = "a tensor"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.tensor.shape)

    def fill(self, out: np.ndarray, index: Index) -> None:
        fill(out, self.tensor, index)
        with np.errstate(invalid="ignore"):
            self.check(out, index)

    def check(self, out: np.ndarray, index: Index) -> None:
        if np.isinf(out).any() and np.isinf(out).sum() > np.isinf(read(self.tensor, index)).sum():
            raise ValueError(f"{self.name} holds values that are infinite in {np.dtype(self.dtype).name}")


def replaced(index: Index, axis: int, part: slice) -> Index:
    return (*index[:axis], part, *index[axis + 1 :])
