"""Arrays of .npy files of others."""

import os
import warnings

import numpy as np
import pytest

from jaxmodels.io.formats.npy import map_array


def test_an_array_is_mapped(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(15).reshape(3, 5))
    array = map_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(array, np.arange(15).reshape(3, 5))
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x93NUMPY",
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",), }\n"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }}\n"),
        header("{'descr': '|u1', cr': '|u1', 'for False, 'shape': (18,), }\n"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (3,), }\n") + bytes(99),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n") + bytes(8),
        header("{'descr': '|S0', 'fortran_order': False, 'shape': (-1,), }\n") + bytes(8),
        header("{'descr': '<U0', 'fortran_order': True, 'shape': (0, -3), }\n") + bytes(8),
        b"\x93NUMPY\x03" + header("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }\n")[7:] + bytes(8),
        header("\x00\n"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 4611686018427387904, 5), }\n") + bytes(8),
        header("(" * 5000),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (0, 1000000000000), }\n"),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "1, " * 65 + "), }\n") + bytes(1),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }\n") + bytes(4),
    ],
)
def test_other_content_is_one_line(tmp_path, content):
    file = tmp_path / "a.npy"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=str(file)) as error:
        map_array(file)
    assert len(str(error.value)) < 400


def test_a_shape_that_overflows_prints_no_warning(tmp_path):
    content = header("{'descr': '<u2', 'fortran_order': False, 'shape': (9223372036854775807,), }\n") + bytes(8)
    (tmp_path / "a.npy").write_bytes(content)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"a\.npy.* ends at byte 18,446,744,073,709,551,"):
            map_array(tmp_path / "a.npy")
    assert found == []


def test_a_fifo_and_a_missing_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a\.npy.*FIFO"):
        map_array(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"b\.npy does not exist"):
        map_array(tmp_path / "b.npy")
