"""Files of torch of all ages, mapped; and files that only have their name."""

import gzip
import io
import os
import signal
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from jaxmodels.io.bounded import read_json
from jaxmodels.io.formats import torch_files
from jaxmodels.io.formats.safetensors import read_file
from jaxmodels.io.formats.torch_files import read_pt, read_tensors

TENSORS = {"a": torch.arange(35.0).view(7, 5), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(7)}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int16, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("zip_file", [True, False])
def test_every_storage(tmp_path, dtype, zip_file):
    whole = torch.arange(35).view(7, 5).to(dtype)
    content = {
        "whole": whole,
        "part": whole[2:4, 1:],
        "none": whole[:0],
        "scalar": whole[0, 1],
        "list": [{"n": 3}],
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_file)
    read = read_pt(tmp_path / "a.pt")
    for name in ("whole", "part", "none", "scalar"):
        assert read[name].dtype == dtype
        assert torch.equal(read[name], content[name])
    assert read["list"] == [{"n": 3}]
    assert read["part"].untyped_storage().data_ptr() == read["whole"].untyped_storage().data_ptr()


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("size", [0, 1, 5, 64, 200, 700, 1_300])
def test_a_truncated_file_is_named(tmp_path, zip_file, size):
    torch.save(TENSORS, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_file)
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: min(size, len(content) - 1)])
    with pytest.raises(ValueError, match=r"a\.pt is (truncated|refused)"):
        read_pt(tmp_path / "a.pt")


def test_half_a_zip_is_truncated(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.pt is truncated.*zip"):
        read_pt(tmp_path / "a.pt")


@pytest.mark.parametrize("zip_file", [True, False])
def test_a_pickle_protocol_that_torch_does_not_read_is_named(tmp_path, zip_file):
    for protocol in (3, 4):
        state = {"a": torch.ones(3)}
        torch.save(
            state, tmp_path / f"{protocol}.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zip_file
        )
    assert read_pt(tmp_path / "3.pt")["a"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"4\.pt .*protocol 4"):
        read_pt(tmp_path / "4.pt")


def test_a_whole_module_is_not_loaded(tmp_path):
    torch.save(torch.nn.Linear(3, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is refused.*more than tensors.*torch\.nn\.modules\.linear\.Linear"):
        read_pt(tmp_path / "a.pt")


def test_compressed_entries_are_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"b\.pt .*compressed"):
        read_pt(tmp_path / "b.pt")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_named(tmp_path, dtype):
    torch.save({"a": TENSORS["a"].to(dtype)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt .*'a'.*float8 weights"):
        read_tensors(tmp_path / "a.pt")


def archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    return out.getvalue()


CONTENTS = {
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n",
    "web page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "Hub's answer": b"Entry not found",
    "gzip": gzip.compress(b"weights"),
    "GGUF": b"GGUF\x03\x00\x00\x00",
    "zeros": bytes(4_096),
    "tar": archive(),
    "safetensors": safetensors.torch.save({"a": torch.ones(3)}),
    "0 bytes": b"",
}


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_what_is_no_checkpoint_says_what_it_is(tmp_path, what, suffix):
    file = tmp_path / f"model.{suffix}"
    file.write_bytes(CONTENTS[what])
    if (what, suffix) == ("safetensors", "safetensors"):
        assert read_file(file)["a"].tolist() == [1, 1, 1]
        return
    with pytest.raises(ValueError, match=rf"^\S*model\.{suffix} [^\n]*{what}[^\n]*$"):
        (read_file if suffix == "safetensors" else read_pt)(file)


@pytest.mark.parametrize("zip_file", [True, False])
def test_an_entry_with_the_state_dict_is_preferred_to_a_tensor_beside_it(tmp_path, zip_file):
    content = {"epoch": torch.tensor(3), "state_dict": {"a": torch.ones(3)}, "ema": {"a": torch.zeros(3)}}
    torch.save(content, tmp_path / "model.bin", _use_new_zipfile_serialization=zip_file)
    arrays, notes = read_tensors(tmp_path / "model.bin")
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [1, 1, 1]}
    assert "'state_dict'" in notes[0]
    del content["state_dict"]  # now a single number beside a mapping of arrays
    torch.save(content, tmp_path / "model.bin", _use_new_zipfile_serialization=zip_file)
    arrays, notes = read_tensors(tmp_path / "model.bin")
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [0, 0, 0]}
    assert "'ema'" in notes[0]
    content["b"] = torch.ones(2)  # an array beside it: the file is the state_dict
    torch.save(content, tmp_path / "model.bin", _use_new_zipfile_serialization=zip_file)
    assert list(read_tensors(tmp_path / "model.bin")[0]) == ["epoch", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("tensors", [True, False])
def test_the_name_of_an_entry_is_not_repeated_for_each_in_it(tmp_path, tensors):
    held = torch.ones(1)
    inner = {str(i): {"a": held} if tensors else {} for i in range(6_000)}
    torch.save({"n" * 1_000_000: inner}, tmp_path / "model.pt")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"model\.pt holds (several state_dicts|no tensors)") as refused:
        read_tensors(tmp_path / "model.pt")
    assert tracemalloc.get_traced_memory()[1] < 200_000_000
    tracemalloc.stop()
    assert len(str(refused.value)) < 5_000


def test_a_pointer_in_place_of_json(tmp_path):
    (tmp_path / "config.json").write_bytes(CONTENTS["git-lfs"])
    with pytest.raises(ValueError, match=r"config\.json is .*git-lfs"):
        read_json(tmp_path / "config.json")


def test_an_error_that_numpy_does_not_explain_names_the_file(tmp_path, monkeypatch):
    """NumPy's C code returns an error without an exception for some pickled states of a dtype."""
    file = tmp_path / "old.pt"
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)

    def failing(*_):
        raise SystemError("returned NULL without setting an exception")

    monkeypatch.setattr(torch_files, "read_legacy", failing)
    with pytest.raises(ValueError, match=r"old\.pt.*returned NULL"):
        read_tensors(file)


@pytest.mark.parametrize("number", [1, 2, 5, 9])
def test_ctrl_c_while_torch_writes_is_no_error_of_a_disk(tmp_path, monkeypatch, number):
    """Torch's writer loses an exception of the file that it writes to, or raises another one."""
    file, calls = tmp_path / "a.pt", []
    torch_files.write_state_dict(file, {"a": np.zeros(3)})
    before, writable = file.read_bytes(), torch_files.Recorded.write

    def write(recorded, data):
        calls.append(len(data))
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return writable(recorded, data)

    monkeypatch.setattr(torch_files.Recorded, "write", write)
    with pytest.raises(KeyboardInterrupt):
        torch_files.write_state_dict(file, {f"a{i}": np.full(1_009, i) for i in range(11)})
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]
    assert len(calls) <= number + 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
