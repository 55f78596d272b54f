"""Files that stand for far more than they hold, alone and together."""

import os
import sys
import warnings

import pytest
import torch

import jaxmodels
from jaxmodels.io import allowance
from jaxmodels.io.allowance import Allowance, check_distinct
from jaxmodels.io.formats.safetensors import read_folder
from jaxmodels.io.formats.torch_files import read_state_dict, read_tensors
from jaxmodels.io.pretrained import read_pretrained
from jaxmodels.retro.retrieval import embedder_files
from tests.jaxmodels.convert.hf.folders import write_index
from tests.jaxmodels.convert.originals import layer_file, write, write_rank_files

STRUCTURE = {"none": dict.fromkeys(range(9_000))}  # 18,000 values in 50 kB


@pytest.fixture
def less(monkeypatch):
    """A tenth of the values that are read, for files that are read fast."""
    monkeypatch.setattr(allowance, "MOST", allowance.MOST // 10)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("read", [read_state_dict, read_tensors])
def test_tensors_that_share_a_storage_are_counted_together(tmp_path, read, zipped):
    file = tmp_path / "model.pt"
    weight = torch.zeros(1_000, 1_000)
    held = {f"layers.{i}.weight": weight for i in range(68)}  # 272 MB; the limit is 268 and twice the file's 4
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    assert len(read(file) if read is read_state_dict else read(file)[0]) == 68
    torch.save(held | {"a": weight, "b": weight}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"model\.pt has tensors of 280,000,000 bytes, in 4,0\d\d,\d{3} bytes of files:"
    ):
        read(file)


def test_tied_tensors_of_any_size_are_read(tmp_path, monkeypatch):
    """The embedding and the readout, in files of any number, and views of a fused matrix."""
    monkeypatch.setattr(allowance, "REPEATED_BYTES", 0)
    table = torch.zeros(60_000)
    for name in ("a.bin", "b.bin"):
        torch.save({f"{name}.{i}": part for i, part in enumerate([table, table[:20], table[20:]])}, tmp_path / name)
    write_index(tmp_path, {"x": "a.bin", "y": "b.bin"}, "pytorch_model.bin.index.json")
    assert len(read_pretrained(tmp_path).tensors) == 6


def test_tensors_of_several_files_are_counted_together(tmp_path):
    weight = torch.zeros(1_000, 1_000)
    for i in range(3):
        torch.save({f"{i}.{k}": weight for k in range(33)}, tmp_path / f"p{i}.bin")
    write_index(tmp_path, {f"x{i}": f"p{i}.bin" for i in range(3)}, "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match=r"p2\.bin has tensors of 396,000,000 bytes, with the files before it, in 12,"):
        read_pretrained(tmp_path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_two_names_of_one_file_in_an_index_are_refused(tmp_path, kind, link):
    (tmp_path / f"a.{kind}").write_bytes(b"not read")
    link(tmp_path / f"a.{kind}", tmp_path / f"b.{kind}")
    stem = "pytorch_model" if kind == "bin" else "model"
    write_index(tmp_path, {"x": f"a.{kind}", "y": f"b.{kind}"}, f"{stem}.{kind}.index.json")
    with pytest.raises(ValueError, match=rf"b\.{kind} and a\.{kind} are the same file"):
        read_pretrained(tmp_path)


@pytest.mark.parametrize("read", [read_pretrained, read_folder])
def test_an_index_of_many_absent_files_is_refused_at_the_first(tmp_path, read):
    write_index(tmp_path, {f"x{i}": f"y{i:06}.safetensors" for i in range(100_000)}, "model.safetensors.index.json")
    looked = []

    def look(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.endswith("pathlib.py"):
            looked.append(frame.f_code.co_name)

    sys.setprofile(look)
    try:
        with pytest.raises(ValueError, match=r"y000000\.safetensors\S* .*not exist"):
            read(tmp_path)
    finally:
        sys.setprofile(None)
    assert len(looked) < 1_000


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_layers_that_are_one_file_are_refused(tmp_path, link):
    write(tmp_path, 2)
    second = layer_file(tmp_path, 3, 1)
    second.unlink()
    link(layer_file(tmp_path, 2, 1), second)
    with pytest.raises(ValueError, match=r"layer_03-model_01-model_states\.pt and layer_02-\S+ are the same file"):
        jaxmodels.load(tmp_path)


def test_ranks_that_are_one_file_are_refused(tmp_path):
    write_rank_files(tmp_path, 2)
    first, second = sorted(tmp_path.rglob("mp_rank_*.pt"))
    second.unlink()
    second.symlink_to(first.name)
    with pytest.raises(ValueError, match=r"mp_rank_01_model_states\.pt and mp_rank_00_model_states\.pt are the same"):
        jaxmodels.load(tmp_path)


def test_equal_files_in_the_cache_of_the_hub_are_read(tmp_path):
    """There a file is a link to one that is named by its content: ranks may have it in common, as of a norm."""
    state = write(tmp_path, 2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in sorted(tmp_path.rglob("layer_*.pt")):
        norm = file.name.startswith(f"layer_{max_layer(tmp_path) - 1:02}")
        blob = blobs / ("norm" if norm else file.name)
        file.rename(blob)
        file.symlink_to(blob)
    assert jaxmodels.load(tmp_path).settings.n_layers == sum(name.endswith("qkv_lin.bias") for name in state)


def max_layer(folder) -> int:
    return max(int(file.name[6:8]) for file in folder.rglob("layer_*.pt"))


def test_structures_of_several_files_are_counted_together(tmp_path, less):
    for i in range(4):
        torch.save({"a": torch.ones(3)} | STRUCTURE, tmp_path / f"p{i}.bin")
    write_index(tmp_path, {f"x{i}": f"p{i}.bin" for i in range(4)}, "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match=r"p2\.bin is refused: its structure .* more than 50,\d{3} values, with what"):
        read_pretrained(tmp_path)


def test_structures_of_shards_are_counted_together(tmp_path, less):
    write(tmp_path)
    for i in (2, 3, 4):
        file = layer_file(tmp_path, i, 0)
        torch.save(torch.load(file) | STRUCTURE, file)
    with pytest.raises(ValueError, match=r"layer_04-\S+ is refused: its structure .* values, with what was read"):
        jaxmodels.load(tmp_path)


def test_structures_in_the_folder_of_an_embedder_are_counted_together(tmp_path, less):
    torch.save({"a": torch.ones(3)} | STRUCTURE, tmp_path / "pytorch_model.bin")
    for i in range(3):
        (tmp_path / f"{i}_Dense").mkdir()
        (tmp_path / f"{i}_Dense" / "pytorch_model.bin").symlink_to(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused: its structure .* values, with what was read"):
        embedder_files.check_files(tmp_path)


def test_a_file_that_is_missing_is_named_by_its_reader(tmp_path):
    assert Allowance([tmp_path / "a", tmp_path]).stored == tmp_path.stat().st_size
    check_distinct([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("kind", ["bin", "shards"])
def test_a_nested_tensor_is_no_tensor_of_a_model(tmp_path, kind):
    with warnings.catch_warnings(action="ignore"):  # PyTorch's, when one is made
        nested = {"nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)}
    if kind == "bin":
        torch.save({"a": torch.ones(3)} | nested, tmp_path / "pytorch_model.bin")
        assert set(read_pretrained(tmp_path).tensors) == {"a"}
    else:
        write(tmp_path)
        file = layer_file(tmp_path, 2, 0)
        torch.save(torch.load(file) | nested, file)
        jaxmodels.load(tmp_path)
