"""Reader and writer of safetensors files, compared with the package `safetensors`."""

import json
import re
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from jaxmodels.io.formats.safetensors import read_file, read_folder, write_file, write_folder
from jaxmodels.io.pretrained import read_pretrained
from jaxmodels.weights.lazy import Transposed
from jaxmodels.weights.names import as_tensor
from tests.fuzz.mutations.tensors import mutated_safetensors

DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
ARRAYS = {
    f"{np.dtype(dtype).name}.{shape}": np.random.default_rng(3).normal(size=shape).astype(dtype)
    for dtype in DTYPES
    for shape in [(7, 5), (3,), (2, 3, 5)]
}


def test_the_package_reads_what_we_write(tmp_path):
    write_file(tmp_path / "a.safetensors", ARRAYS | {"turned": Transposed(np.arange(6.0).reshape(2, 3))})
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert read.keys() == ARRAYS.keys() | {"turned"}
    for name, array in ARRAYS.items():
        assert torch.equal(read[name], as_tensor(array)), name
    assert read["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_every_byte_is_the_package_s(tmp_path, monkeypatch):
    """Written in pieces of a few rows, in two threads; the package orders tensors by the size of their dtype."""
    monkeypatch.setattr("jaxmodels.io.formats.safetensors.PIECE_BYTES", 300)
    rng = np.random.default_rng(0)
    arrays = {f"tensor {i:02}": rng.normal(size=(31, 11 + i)).astype(np.float16) for i in range(20)}
    lazy = {
        name: Transposed(np.ascontiguousarray(array.T)) if i % 2 else array
        for i, (name, array) in enumerate(arrays.items())
    }
    write_file(tmp_path / "ours", lazy)
    tensors = {name: as_tensor(array) for name, array in arrays.items()}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    start = [8 + int.from_bytes(content[:8], "little") for content in (ours, theirs)]
    assert json.loads(ours[8 : start[0]]) == json.loads(theirs[8 : start[1]])
    assert ours[start[0] :] == theirs[start[1] :]


def test_we_read_what_the_package_writes(tmp_path):
    tensors = {name: as_tensor(array) for name, array in ARRAYS.items()} | {"mask": torch.tensor([[True, False]])}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    read = read_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    assert read["mask"].tolist() == [[True, False]]


def test_large_folders_have_an_index(tmp_path):
    written = []
    write_folder(tmp_path, ARRAYS, file_bytes=300, progress=written.append)
    names = sorted(file.name for file in tmp_path.iterdir())
    n = len(names) - 1
    assert n > 2
    assert names[:-1] == [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(written) == sum(array.nbytes for array in ARRAYS.values())
    for name, array in read_folder(tmp_path).items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def damaged(content, how):
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    match how:
        case "truncated":
            return content[:-7]
        case "empty":
            return b""
        case "header too long":
            return (2**63).to_bytes(8, "little") + content[8:]
        case "no json":
            return content[:8] + b"x" * size + content[8 + size :]
        case "offsets":
            header[name]["data_offsets"] = [-8, 4]
        case "shape":
            header[name]["shape"] = [1, 1]
        case "negative":
            header[name]["shape"] = [-1, 5]
        case "overlap":
            other = next(n for n in header if n.endswith(".(3,)"))
            start = header[name]["data_offsets"][0] + 2
            header[other]["data_offsets"] = [start, start + 6]
        case "dtype":
            header[name]["dtype"] = "F7"
        case "hole":
            return with_header(header, b"\0" * 8, content[8 + size :])
        case "more at the end":
            return content + b"\0"
        case "a name twice":
            text = json.dumps(header).encode()
            double = text[:-1] + b", " + json.dumps({name: header[name]}).encode()[1:]
            return len(double).to_bytes(8, "little") + double + content[8 + size :]
        case "a fraction":
            header[name]["shape"] = [35.0]
        case "true":
            header[name]["shape"] = [True, 35]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def with_header(header, before, values):
    """A file whose values begin after some bytes that belong to no tensor."""
    moved = {
        name: entry
        if name == "__metadata__"
        else entry | {"data_offsets": [offset + len(before) for offset in entry["data_offsets"]]}
        for name, entry in header.items()
    }
    text = json.dumps(moved).encode()
    return len(text).to_bytes(8, "little") + text + before + values


HOW = ["truncated", "empty", "header too long", "no json", "offsets", "shape", "negative", "overlap", "dtype"]
HOW += ["hole", "more at the end", "a name twice", "a fraction", "true"]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_file_is_named(tmp_path, how):
    file = tmp_path / "a.safetensors"
    write_file(file, ARRAYS)
    read_file(file)
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(ValueError, match=r"a\.safetensors\b"):
        read_file(file)


def test_a_folder_that_is_not_what_its_index_says(tmp_path):
    write_folder(tmp_path, ARRAYS, file_bytes=300)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    second = content["weight_map"][list(ARRAYS)[-1]]
    (tmp_path / second).unlink()
    with pytest.raises(ValueError, match=re.escape(second)):
        read_folder(tmp_path)
    write_file(tmp_path / second, {"other": np.zeros(3)})
    with pytest.raises(ValueError, match=rf"{re.escape(second)}\b.*\bother\b"):
        read_folder(tmp_path)
    content["weight_map"]["a"] = "../a.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index\.json .*'\.\./a\.safetensors'"):
        read_folder(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json"):
        read_folder(tmp_path)


def test_names_of_files_in_an_index_do_not_reach_a_terminal(tmp_path):
    """Names of a checkpoint's files are printable; others are refused, whether such a file exists or not."""
    write_folder(tmp_path, ARRAYS, file_bytes=300)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "\x9b31m\r\n.safetensors"
    content["weight_map"]["a"] = name
    index.write_text(json.dumps(content))
    for read in (read_folder, read_pretrained):
        for there in (False, True):
            (tmp_path / name).unlink(missing_ok=True)
            if there:
                (tmp_path / name).write_bytes(b"{")
            with pytest.raises(ValueError, match=r"index\.json .*\\x9b31m\\r\\n") as error:
                read(tmp_path)
            assert str(error.value).isprintable()


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"^a .*complex128"):
        write_file(tmp_path / "a.safetensors", {"a": np.zeros(3, np.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_what_the_package_reads(tmp_path):
    """A changed file is read by both or refused by both, and both read the same."""
    file, both = tmp_path / "a.safetensors", 0
    tensors = {"a": np.arange(15.0).reshape(3, 5), "b": np.zeros((0, 3), np.float16), "c": np.arange(7, dtype=np.int8)}
    write_file(file, tensors)
    whole = file.read_bytes()
    for seed in range(400):
        file.write_bytes(mutated_safetensors(whole, np.random.default_rng(seed)))
        try:
            theirs = safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, ValueError, RuntimeError, OSError, TypeError):
            theirs = None
        try:
            ours = read_file(file)
        except ValueError:
            ours = None
        assert (ours is None) >= (theirs is None), seed  # what the package refuses is refused
        if ours is not None:
            both += 1
            assert ours.keys() == theirs.keys()
            for name, array in ours.items():
                assert array.shape == tuple(theirs[name].shape)
                assert array.tobytes() == theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert both > 20


ENTRY = '{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}'


@pytest.mark.parametrize(
    "text",
    [
        ENTRY.replace("[]", '""').encode(),
        ENTRY.replace("[]", "{}").encode(),
        ENTRY.replace('"a"', '"\\ud800"').encode(),
        ENTRY.encode("utf-16"),
        ENTRY.encode("utf-16-le"),
        ENTRY.encode("utf-8-sig"),
    ],
)
def test_a_header_is_utf8_and_a_shape_is_a_list(tmp_path, text):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=r"a\.safetensors\b"):
        read_file(file)
    text = ENTRY.encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert read_file(file)["a"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("part", [b"[],", b'{"":[]},', b'"ab",'])
def test_a_header_of_far_more_values_than_tensors_have_is_refused(tmp_path, part):
    text = b'{"a":[' + part * (90_000_000 // len(part)) + b"0]}"
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=r"a\.safetensors .*a million tensors"):
        read_file(file)


@pytest.mark.slow
def test_the_largest_header_takes_seconds(tmp_path):
    """93 MB for a million empty tensors, as the format allows."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"layers.{i:09}.attention.output.weight": entry for i in range(930_000)}).encode()
    assert 90e6 < len(text) < 100e6
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    began = time.monotonic()
    assert len(read_file(file)) == 930_000
    ours = time.monotonic() - began
    began = time.monotonic()
    json.loads(text)
    assert ours < 10 * (time.monotonic() - began) + 5
