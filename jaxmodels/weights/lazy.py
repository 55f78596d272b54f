"""Lazy tensors: shape and dtype are known, values are read slice by slice.

A tensor is a NumPy array, which may be over a memory-mapped file, or an instance of a class below, which wraps other
tensors. `fill(out, tensor, index)` reads a slice into an array of the caller. However deeply tensors are nested, values
are copied once, from the file's pages to `out`. Only `Combined`, of small vectors, and a cast of a cast allocate
intermediate arrays.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

Index = tuple[slice, ...]  # one slice for each axis, with start and stop, step 1
ALIGNMENT = 64
TILE = 256  # rows and columns that are transposed at a time, in the processor's cache


class Tensor(Protocol):
    """Array with known shape and dtype: a NumPy array, or a lazy one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


class LazyTensor(Tensor, Protocol):
    """Tensor whose values are read in slices."""

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Write a slice into `out`, an array of the slice's shape, casting to its dtype."""


def fill(out: np.ndarray, tensor: Any, index: Index) -> None:
    """Write a slice of a tensor into `out`, an array of the slice's shape, casting to its dtype."""
    read_into = getattr(tensor, "read_into", None)
    if read_into is None:
        copy(out, np.asarray(tensor[index]))
    else:
        read_into(out, index)


def read(tensor: Any, index: Index | None = None) -> np.ndarray:
    """Slice of a tensor, default all of it, as a new array."""
    index = whole(tensor.shape) if index is None else index
    out = aligned([part.stop - part.start for part in index], np.dtype(tensor.dtype))
    fill(out, tensor, index)
    return out


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialized array with JAX's alignment, which `jax.device_put` on a CPU uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def whole(shape: Sequence[int]) -> Index:
    """Index of all elements."""
    return tuple(slice(0, size) for size in shape)


def bounded(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """Index with every start and stop as a number."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


@np.errstate(over="ignore", invalid="ignore")  # `Cast` reports overflows by tensor; NaN is not an error
def copy(out: np.ndarray, values: np.ndarray) -> None:
    """Copy values into an array of the same shape, casting to its dtype."""
    if out.ndim == 2 and (out.strides[0] < out.strides[1]) != (values.strides[0] < values.strides[1]):
        if out.strides[0] < out.strides[1]:
            out, values = out.T, values.T
        transpose(out, values)
    else:
        np.copyto(out, values, casting="unsafe")


def transpose(out: np.ndarray, values: np.ndarray) -> None:
    """Copy column-major values into row-major `out`, tile by tile.

    Each tile is first copied as it is into a small buffer, whose rows do not have the source's distance: a multiple of
    4 KB would map all of them to the same few places of the processor's cache. As fast as JAX's transfer to a device,
    which would also initialize a backend.
    """
    buffer = np.empty((TILE, TILE + ALIGNMENT // values.itemsize), values.dtype)
    for j in range(0, out.shape[1], TILE):
        for i in range(0, out.shape[0], TILE):
            tile = slice(i, i + TILE), slice(j, j + TILE)
            source = values[tile].T
            rows = buffer[: source.shape[0], : source.shape[1]]
            np.copyto(rows, source)
            np.copyto(out[tile], rows.T, casting="unsafe")


def slice_view(tensor: Any, index: Index) -> np.ndarray | None:
    """Slice of a tensor without a copy, row-major; None if only `read` can make it."""
    found = tensor[index] if isinstance(tensor, np.ndarray) else getattr(tensor, "slice_view", no_view)(index)
    return found if isinstance(found, np.ndarray) and found.flags.c_contiguous else None


def no_view(index: Index) -> None:
    """`slice_view` of a tensor that has none."""


def values(tensor: Any, index: Index | None = None) -> np.ndarray:
    """Slice of a tensor, default all of it, row-major: without a copy if possible."""
    index = whole(tensor.shape) if index is None else index
    found = slice_view(tensor, index)
    return read(tensor, index) if found is None else found


def row_slices(tensor: Any, n_bytes: int) -> Iterator[Index]:
    """Indices of a tensor's values in order, whole rows: about n_bytes each, at most 4 times that, or one row."""
    if not tensor.shape:
        yield ()
        return
    row = max(1, nbytes(tensor) // max(1, tensor.shape[0]))
    # Rows of a transposed matrix are columns on disk: reading few at a time would touch every page of the file.
    step = max(1, n_bytes // row, min(512, 4 * n_bytes // row))
    for i in range(0, tensor.shape[0], step):
        yield (slice(i, min(i + step, tensor.shape[0])), *whole(tensor.shape[1:]))


def pieces(tensor: Any, n_bytes: int) -> Iterator[np.ndarray]:
    """Iterate over all values in order, as arrays of the sizes of `row_slices`."""
    return (read(tensor, index) for index in row_slices(tensor, n_bytes))


def equal(a: Any, b: Any, rows: int = 256) -> bool:
    """True if two tensors, also of different dtypes, have the same shape and values; compares `rows` rows at a time."""
    if tuple(a.shape) != tuple(b.shape) or 0 in a.shape:
        return tuple(a.shape) == tuple(b.shape)
    if not a.shape:
        return bool(read(a) == read(b))
    parts = (slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows))
    indices = ((part, *whole(a.shape[1:])) for part in parts)
    return all(np.array_equal(read(a, index), read(b, index)) for index in indices)


def nbytes(tensor: Tensor) -> int:
    """Size of a tensor in bytes."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Concatenation of tensors along an axis; other axes and dtypes must be equal."""

    parts: Sequence[Any]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.axis], sum(part.shape[self.axis] for part in self.parts), *first[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.parts[0].dtype)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        wanted = index[self.axis]
        begin = 0
        for part in self.parts:
            size = part.shape[self.axis]
            start, stop = max(wanted.start, begin), min(wanted.stop, begin + size)
            if start < stop:
                target = replaced(whole(out.shape), self.axis, slice(start - wanted.start, stop - wanted.start))
                fill(out[target], part, replaced(index, self.axis, slice(start - begin, stop - begin)))
            begin += size

    def slice_view(self, index: Index) -> np.ndarray | None:
        wanted, begin = index[self.axis], 0
        for part in self.parts:
            start, stop = wanted.start - begin, wanted.stop - begin
            begin += part.shape[self.axis]
            if start >= 0 and wanted.stop <= begin:
                return slice_view(part, replaced(index, self.axis, slice(start, stop)))
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """Slice of a tensor from `start` to `stop` along an axis, zero beyond the tensor's end."""

    tensor: Any
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.tensor.shape[: self.axis], self.stop - self.start, *self.tensor.shape[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.tensor.dtype)

    def read_into(self, out: np.ndarray, index: Index) -> None:
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

    def slice_view(self, index: Index) -> np.ndarray | None:
        start, stop = (self.start + end for end in (index[self.axis].start, index[self.axis].stop))
        beyond = stop > self.tensor.shape[self.axis]
        return None if beyond else slice_view(self.tensor, replaced(index, self.axis, slice(start, stop)))


@dataclasses.dataclass(frozen=True, eq=False)
class Combined:
    """Function of small vectors of the same shape, such as their mean; every read loads all of them.

    Reading raises ValueError, naming it, if a value is not finite though it is in each of the parts.
    """

    parts: Sequence[Any]
    function: Callable[[Sequence[np.ndarray]], np.ndarray]
    name: str = "a tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.parts[0].dtype)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        parts = [read(part) for part in self.parts]
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.function(parts)
        if (~np.isfinite(values) & np.all([np.isfinite(part) for part in parts], axis=0)).any():
            raise ValueError(f"{self.name} has values that overflow in dtype={self.dtype.name} when ranks are merged")
        copy(out, values[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Transposed:
    """Transpose of a matrix."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[::-1])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.tensor.dtype)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        fill(out.T, self.tensor, index[::-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked:
    """Tensors of one shape and dtype, stacked along a new leading axis."""

    parts: Sequence[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.parts[0].dtype)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        for i, part in enumerate(self.parts[index[0]]):
            fill(out[i], part, index[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """Entry i along a tensor's leading axis."""

    tensor: Any
    i: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.tensor.dtype)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        fill(out[None], self.tensor, (slice(self.i, self.i + 1), *index))

    def slice_view(self, index: Index) -> np.ndarray | None:
        found = slice_view(self.tensor, (slice(self.i, self.i + 1), *index))
        return None if found is None else found[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Cast:
    """Tensor cast to a dtype; reading raises ValueError, naming it, if a finite value becomes infinite."""

    tensor: Any
    dtype: np.dtype
    name: str = "a tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        if out.dtype != self.dtype:  # of another cast around this one: values are rounded to this dtype first
            copy(out, read(self, index))
            return
        fill(out, self.tensor, index)
        with np.errstate(invalid="ignore"):
            self.check(out, index)

    def slice_view(self, index: Index) -> np.ndarray | None:
        return slice_view(self.tensor, index) if self.tensor.dtype == self.dtype else None

    def check(self, out: np.ndarray, index: Index) -> None:
        """Raises ValueError if the cast made a value infinite."""
        if np.isinf(out).any() and np.isinf(out).sum() > np.isinf(read(self.tensor, index)).sum():
            raise ValueError(f"{self.name} has values that overflow in dtype={np.dtype(self.dtype).name}")


def replaced(index: Index, axis: int, part: slice) -> Index:
    """Index with another slice along one axis."""
    return (*index[:axis], part, *index[axis + 1 :])
