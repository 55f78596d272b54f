"""Tensors that are read by slices, against NumPy."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmodels.weights.lazy import Cast, Combined, Cut, Joined, Layer, Stacked, Transposed, equal, pieces, read, values

RNG = np.random.default_rng(0)


def array(*shape, dtype=np.float16):
    return RNG.normal(size=shape).astype(dtype)


def cases():
    a, b, c = array(7, 5), array(3, 5), array(7, 2)
    vectors = [array(11) for _ in range(3)]
    stack = array(4, 7, 5)
    yield "joined rows", Joined([a, b], 0), np.concatenate([a, b])
    yield "joined columns", Joined([a, c], 1), np.concatenate([a, c], axis=1)
    yield "cut", Cut(a, 0, 2, 5), a[2:5]
    yield "cut columns", Cut(a, 1, 1, 4), a[:, 1:4]
    yield "padded", Cut(a, 0, 0, 9), np.concatenate([a, np.zeros((2, 5), np.float16)])
    yield "beyond its end", Cut(a, 0, 8, 11), np.zeros((3, 5), np.float16)
    yield "combined", Combined(vectors, lambda v: v[0] + v[1] * v[2]), vectors[0] + vectors[1] * vectors[2]
    yield "transposed", Transposed(a), a.T
    yield "stacked", Stacked([a, 2 * a, 3 * a]), np.stack([a, 2 * a, 3 * a])
    yield "layer", Layer(stack, 2), stack[2]
    yield "cast", Cast(a, np.dtype(ml_dtypes.bfloat16)), a.astype(ml_dtypes.bfloat16)
    nested = Transposed(Cut(Joined([Joined([a, c], 1), array(2, 7)], 0), 0, 0, 11))
    yield "nested", Stacked([nested, nested]), np.stack([read(nested)] * 2)
    large = array(1031, 37)
    yield "larger than a tile", Transposed(large), large.T
    yield "larger than a tile, twice transposed", Stacked([Transposed(large)]), large.T[None]
    wide = array(1031, 37, dtype=np.float64)
    yield "eight bytes", Transposed(wide), wide.T
    square = array(521, 523, dtype=np.float32)
    yield "several tiles both ways, cast", Transposed(Cast(square, np.dtype(np.float16))), square.T.astype(np.float16)
    rounded = square.astype(ml_dtypes.bfloat16)
    inner = Transposed(Cast(square, rounded.dtype))
    yield "a cast of a cast", Cast(Stacked([inner, inner]), square.dtype), np.stack([rounded.T] * 2).astype(np.float32)
    yield "from columns", Transposed(np.asfortranarray(large)), large.T


@pytest.mark.parametrize(("tensor", "expected"), [pytest.param(t, e, id=name) for name, t, e in cases()])
def test_every_slice_is_numpys(tensor, expected):
    assert tuple(tensor.shape) == expected.shape
    assert tensor.dtype == expected.dtype
    np.testing.assert_array_equal(read(tensor), expected)
    for _ in range(29):
        ends = [sorted(RNG.integers(0, size + 1, 2)) for size in expected.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in ends)
        np.testing.assert_array_equal(read(tensor, index), expected[index])


@pytest.mark.parametrize(("tensor", "expected"), [pytest.param(t, e, id=name) for name, t, e in cases()])
def test_values_to_write_are_row_major_whether_they_are_copied_or_not(tensor, expected):
    for index in (None, tuple(slice(size // 3, size) for size in expected.shape)):
        found = values(tensor, index)
        assert found.flags.c_contiguous
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected if index is None else expected[index])


def test_rows_in_memory_are_not_copied():
    a, b, stack = array(7, 5), array(3, 5), array(4, 7, 5)
    rows = slice(1, 3), slice(0, 5)
    same = Cast(Cut(Joined([a, b], 0), 0, 5, 10), np.dtype(np.float16))
    for tensor, index, owner in (
        (a, rows, a),
        (Layer(stack, 2), rows, stack),
        (same, (slice(2, 5), slice(0, 5)), b),
        (same, (slice(0, 2), slice(0, 5)), a),
    ):
        assert np.shares_memory(values(tensor, index), owner)
    over_both = slice(0, 5), slice(0, 5)
    columns = slice(0, 7), slice(1, 3)
    for tensor, index in ((same, over_both), (a, columns), (Transposed(a), None), (Cut(a, 0, 5, 9), None)):
        assert not np.shares_memory(values(tensor, index), a)


@pytest.mark.parametrize("n_bytes", [1, 10, 64, 10_000])
@pytest.mark.parametrize("values", [array(13, 5), array(23), array(1, 3), array()], ids=lambda a: str(a.shape))
def test_pieces_are_all_values_in_order(values, n_bytes):
    found = list(pieces(values, n_bytes))
    np.testing.assert_array_equal(np.concatenate([piece.reshape(-1) for piece in found]), values.reshape(-1))
    row = values.nbytes // max(1, values.shape[0] if values.shape else 1)
    assert all(piece.nbytes <= max(4 * n_bytes, row) for piece in found)


@pytest.mark.parametrize("shape", [(), (1,), (7, 5)])
def test_what_is_read_begins_where_jax_wants_it(shape):
    values = read(array(*shape))
    assert values.shape == shape
    assert values.ctypes.data % 64 == 0
    assert jax.device_put(values, jax.devices()[0]).unsafe_buffer_pointer() == values.ctypes.data


def test_a_value_that_does_not_fit_is_an_error_and_infinity_is_not():
    values = np.array([1.0, 7e4, 3.0], np.float32)
    with pytest.raises(ValueError, match=r"^readout\b.*float16"):
        read(Cast(values, np.dtype(np.float16), "readout"))
    with pytest.raises(ValueError, match=r"^readout\b.*float16"):
        read(Cast(Cast(values, np.dtype(np.float16), "readout"), np.dtype(np.float32)))
    values[1] = np.inf
    assert np.isinf(read(Cast(values, np.dtype(np.float16))))[1]


def test_empty_tensors_are_compared_by_shape():
    assert equal(np.empty((10**12, 0)), np.empty((10**12, 0)))
    assert not equal(np.empty((3, 0)), np.empty((0, 3)))
