"""PyTorch files that would swell, or be read as garbage, or run code."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from jaxmodels.io.torch_files import read_pt, read_state_dict, read_tensors


@pytest.mark.parametrize("zipped", [True, False])
def test_a_value_that_is_repeated_by_strides_is_measured_first(tmp_path, zipped):
    file = tmp_path / "model.pt"
    tensors = {"a": torch.ones(3), "wide": torch.zeros(1).expand(10**6, 10**6)}
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    for read in (read_state_dict, read_tensors):
        with pytest.raises(ValueError, match=r"model\.pt has 'wide' of 4,000,000,000,000 bytes"):
            read(file)
    small = {"mask": torch.ones(1, 1).expand(100, 100)}
    torch.save(small, file, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_state_dict(file)["mask"], small["mask"])


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused(tmp_path, method):
    torch.save({"a": torch.arange(15.0)}, tmp_path / "plain.pt")
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(file, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match=r"model\.pt has compressed entries"):
        read_state_dict(file)


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["value", "key", "inside"])
def test_code_does_not_run_and_no_advice_says_how(tmp_path, monkeypatch, zipped, where):
    monkeypatch.chdir(tmp_path)
    content = {"value": {"a": Runs()}, "key": {"a": torch.ones(3), "b": [Runs()]}, "inside": {"state_dict": Runs()}}
    torch.save(content[where], "model.pt", _use_new_zipfile_serialization=zipped)
    for read in (read_state_dict, read_tensors, read_pt):
        with pytest.raises(ValueError, match=r"model\.pt is refused.*system") as error:
            read(tmp_path / "model.pt")
        assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def reconstructing(n: int) -> bytes:
    """A pickle that asks NumPy for an array of n numbers without giving any."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + pickle.dumps((n,), 2)[2:-1]
        + b"U\x01d\x87Rs."
    )


def test_an_array_of_a_pickle_takes_no_memory_before_it_is_measured(tmp_path):
    file = tmp_path / "model.pt"
    torch.save({"a": np.float64(1.0)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            content = reconstructing(10**14) if entry.filename.endswith("data.pkl") else old.read(entry)
            new.writestr(entry.filename, content)
    with pytest.raises(ValueError, match=r"model\.pt"):
        read_tensors(file)
