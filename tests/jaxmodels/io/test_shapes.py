"""Shapes that a file has, in every format of tensors."""

import json
import time

import numpy as np
import pytest
import torch

from jaxmodels.io.checkpoint import stored_types
from jaxmodels.io.formats.npy import map_array
from jaxmodels.io.formats.safetensors import read_file
from jaxmodels.io.formats.torch_files import read_state_dict, read_tensors
from jaxmodels.io.shapes import check_shape


def write_safetensors(file, shape):
    header = json.dumps({"w": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def write_pt(file, shape):
    torch.save({"w": torch.empty(shape)}, file)


def write_npy(file, shape):
    np.save(file, np.empty(shape, np.float32))


READERS = {
    "w.safetensors": (write_safetensors, read_file),
    "w.pt": (write_pt, read_state_dict),
    "w.bin": (write_pt, read_tensors),
    "w.npy": (write_npy, map_array),
}


@pytest.mark.parametrize("name", READERS)
def test_an_empty_tensor_of_a_large_shape_is_refused(tmp_path, name):
    """It has no bytes, and work in proportion to its other dimensions."""
    write, read = READERS[name]
    write(tmp_path / name, (0, 3))
    read(tmp_path / name)
    for shape in [(10**12, 0), (0, 60_000, 60_000)]:
        write(tmp_path / name, shape)
        with pytest.raises(ValueError, match=rf"{name}.*of an empty tensor"):
            read(tmp_path / name)


def test_an_empty_array_of_a_large_shape_in_orbax_s_format_is_refused(tmp_path, monkeypatch):
    found = {"w": type("Array", (), {"shape": (10**12, 0), "dtype": np.float32})()}
    monkeypatch.setattr("jaxmodels.io.checkpoint.chunked_shapes", lambda folder, held: {"w": (10**12, 0)})
    monkeypatch.setattr("jaxmodels.io.checkpoint.check_format_of_arrays", lambda folder: None)
    monkeypatch.setattr(
        "orbax.checkpoint.v1.metadata", lambda folder, item: type("Metadata", (), {"metadata": found})()
    )
    with pytest.raises(ValueError, match=r"not a complete Orbax checkpoint: shape \[1000000000000, 0\]"):
        stored_types(tmp_path)


def test_a_shape_of_many_dimensions_is_refused_before_they_are_multiplied(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", [2**62] * 400_000)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"w\.safetensors.*400,000 dimensions; at most 64"):
        read_file(tmp_path / "w.safetensors")
    assert time.process_time() - start < 10
    torch.save({"w": torch.empty((1,) * 65)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt has 'w': a shape of 65 dimensions"):
        read_state_dict(tmp_path / "w.pt")
    check_shape((1,) * 64)
