"""PyTorch files that would swell, or be read as garbage, or run code."""

import contextlib
import io
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch

import jaxmodels
from jaxmodels.command import main as command
from jaxmodels.io.formats.torch_files import read_pt, read_state_dict, read_tensors
from jaxmodels.weights.pickles import check_pickle
from tests.fuzz.targets import TARGETS


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


OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00002-of-00002.bin", "mp_rank_01_model_states.pt"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_of_a_model_does_not_run_and_no_advice_says_how(tmp_path, monkeypatch, name, zipped):
    """Files that a folder names, beside good ones, opened by everything that opens a folder."""
    monkeypatch.chdir(tmp_path)
    TARGETS["Hugging Face, .bin" if name.endswith(".bin") else "shards of ranks"].make(tmp_path)
    if name == "pytorch_model.bin":
        for part in tmp_path.glob("pytorch_model*"):
            part.unlink()
    file = next(tmp_path.rglob(name), tmp_path / name)
    torch.save({"module": Runs(), "a": torch.ones(3)}, file, _use_new_zipfile_serialization=zipped)
    torch.save({"state": Runs()}, file.with_name(OPTIMIZER), _use_new_zipfile_serialization=zipped)
    for read in (jaxmodels.load, describe, lambda folder: describe(folder / OPTIMIZER)):
        with pytest.raises(ValueError, match=r"(bin|pt) is refused.*system|optim_states\.pt") as error:
            read(tmp_path)
        assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_the_optimizer_state_of_a_good_checkpoint_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TARGETS["shards of ranks"].make(tmp_path)
    torch.save({"optimizer": Runs()}, next(tmp_path.rglob("mp_rank_00_model_states.pt")).with_name(OPTIMIZER))
    jaxmodels.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def describe(path):
    """`jaxmodels inspect` and `verify`."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = command(["inspect", str(path)]) | command(["verify", str(path), str(path)])
    if code:
        raise ValueError(said.getvalue())


def zip_with(file, structure):
    """A .pt file of a pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", structure)
        archive.writestr("archive/version", "3")


def legacy_with(file, structure):
    """A .pt file of PyTorch before 1.6 of a pickle."""
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}]
    file.write_bytes(b"".join(pickle.dumps(one, 2) for one in head) + structure + pickle.dumps([], 2))


FORMATS = [zip_with, legacy_with]


def doubled(times: int) -> bytes:
    """Instructions for a tuple of twice the same tuple of twice the same …"""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))


def calling(module: bytes, name: bytes, arguments: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n" + arguments + b"R"


LARGE = b"\x8a\x05" + (4 * 10**9).to_bytes(5, "little")
A = b"X\x01\x00\x00\x00a"
WORK = {
    "a key that is hashed 2⁶⁰ times": b"}" + doubled(60) + b"K\x01s",
    "a set that is": b"}" + A + calling(b"builtins", b"set", b"]" + doubled(60) + b"a\x85") + b"s",
    "a key of larger tuples": b"}" + doubled(18) + b"".join(b"q\x20h\x20h\x20\x87" for _ in range(20)) + b"K\x01s",
    "a key that is nested deeply": b"}" + b")" + b"\x85" * 900_000 + b"Ns",
    "lists that are": b"}" + A + b"]" * 100_000 + b"a" * 99_999 + b"s",
    "arguments that are": b"}" + A + b"ccollections\nOrderedDict\n" * 500 + b")R" + b"\x85R" * 499 + b"s",
    "bytes that are filled": b"}" + A + calling(b"builtins", b"bytearray", LARGE + b"\x85") + b"s",
}


# Dtypes that say that their numbers are Python objects, and arrays of any size and element.
UINT32 = calling(b"numpy", b"dtype", b"X\x02\x00\x00\x00u4\x89\x88\x87")
FLAGGED = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
NUMPY = {
    "a dtype with flags": UINT32 + FLAGGED,
    "an array of such a dtype": calling(b"numpy", b"ndarray", b"K\x05" + UINT32 + FLAGGED + b"\x86"),
    "an array of objects": calling(b"numpy", b"ndarray", LARGE + b"X\x01\x00\x00\x00O\x86"),
    "an array that is made later": calling(
        b"numpy.core.multiarray", b"_reconstruct", b"cnumpy\nndarray\n" + LARGE + b"U\x01d\x87"
    ),
    "a number": calling(b"numpy.core.multiarray", b"scalar", UINT32 + b"U\x01d\x86"),
}


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("value", NUMPY)
def test_values_of_numpy_are_not_made(tmp_path, write, value):
    write(tmp_path / "model.pt", b"\x80\x02}" + A + NUMPY[value] + b"s.")
    with pytest.raises(ValueError, match=r"model\.pt holds no tensors by name; it holds entries 'a'"):
        read_tensors(tmp_path / "model.pt")
    assert np.zeros(2, np.uint32).dtype.hasobject is False


def test_a_zip_of_several_disks_is_refused(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    at = content.rindex(b"PK\x06\x07")  # the locator of the 64-bit directory; its last number is that of the disks
    (tmp_path / "model.pt").write_bytes(content[: at + 16] + b"\x07" + content[at + 17 :])
    with pytest.raises(ValueError, match=r"model\.pt is "):
        read_tensors(tmp_path / "model.pt")


ODD = {
    "a number for a name": ({5: torch.ones(2)}, "under 5; expected a name"),
    "no values": ({"b": torch.empty(3, device="meta")}, "'b', which is not a dense tensor"),
    "sparse": ({"b": torch.eye(3).to_sparse()}, "'b', which is not a dense tensor"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_named_dense_tensor_is_refused(tmp_path, odd):
    held, said = ODD[odd]
    torch.save({"a": torch.ones(3), **held}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt has .*{said}"):
        read_state_dict(tmp_path / "model.pt")


def test_many_tensors_that_repeat_a_value_are_counted_together(tmp_path):
    held = {f"mask {i}": torch.ones(1).expand(2048, 2047) for i in range(17)}
    torch.save(held, tmp_path / "model.pt")
    for read in (read_state_dict, read_tensors):
        with pytest.raises(ValueError, match=r"model\.pt has tensors of 285,0\d\d,\d{3} bytes"):
            read(tmp_path / "model.pt")


def test_a_zip_of_two_directories_is_refused(tmp_path):
    """Python reads the one before the end, PyTorch the one at the offset that the end names."""
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    content = file.read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    directory = bytearray(content[start:end])
    directory[10:12] = bytes(2)  # stored
    file.write_bytes(content[:end] + directory + content[end:])
    with zipfile.ZipFile(file) as archive:
        assert archive.infolist()[0].compress_type == zipfile.ZIP_STORED
    with pytest.raises(ValueError, match=r"model\.pt is a damaged zip file: its directory"):
        read_tensors(file)


@pytest.mark.parametrize("change", ["count", "shift", "more"])
def test_old_files_hold_the_numbers_that_their_tensors_refer_to(tmp_path, change):
    file = tmp_path / "model.pt"
    torch.save({"a": torch.arange(7.0)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert read_tensors(file)[0]["a"].tolist() == [*range(7)]
    at = len(content) - 28 - 8
    parts = {
        "count": content[:at] + b"\x09" + content[at + 1 :],
        "shift": content[: at + 8] + b"abc" + content[at + 8 :],
        "more": content + b"x",
    }
    file.write_bytes(parts[change])
    with pytest.raises(ValueError, match=r"model\.pt is truncated or not a PyTorch checkpoint"):
        read_tensors(file)


@pytest.mark.parametrize("old", [True, False])
def test_a_file_of_which_nothing_was_written_is_refused(tmp_path, old):
    file = tmp_path / "model.pt"
    torch.save({"a": torch.arange(7.0)}, file, _use_new_zipfile_serialization=not old)
    os.truncate(file, 10**12)
    with pytest.raises(ValueError, match=r"model\.pt"):
        read_tensors(file)


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("work", WORK)
def test_a_structure_that_takes_unbounded_work_is_refused(tmp_path, write, work):
    write(tmp_path / "model.pt", b"\x80\x02" + WORK[work] + b".")
    with pytest.raises(ValueError, match=r"model\.pt is refused: .*(500,\d{3} values|100 deep|calls [\w.]+ with)"):
        read_tensors(tmp_path / "model.pt")


def test_instructions_are_counted():
    check_pickle(io.BytesIO(b"\x80\x02" + b"]" * 36 + b"."), most=37)
    with pytest.raises(ValueError, match="more than 37 values"):
        check_pickle(io.BytesIO(b"\x80\x02" + b"]" * 37 + b"."), most=37)


def test_the_product_of_many_integers_takes_no_time(tmp_path):
    zip_with(tmp_path / "model.pt", b"\x80\x02(" + b"J\xff\xff\xff\x7f" * 400_000 + b"t.")
    start = time.process_time()
    with pytest.raises(ValueError, match=r"model\.pt .*holds a tuple"):
        read_tensors(tmp_path / "model.pt")
    assert time.process_time() - start < 10  # 100 s if they are multiplied exactly


def test_a_pickle_larger_than_any_checkpoints_is_not_read(tmp_path):
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/DATA.pkl", bytes(2**26 + 1))
    with pytest.raises(ValueError, match=r"model\.pt has a pickle of 67,108,865 bytes"):
        read_pt(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_structure_of_many_kinds_is_read_as_before(tmp_path, zipped):
    shared = torch.arange(6.0)
    content = {
        "state_dict": {
            "a": shared,
            "b": shared[2:5],
            "mask": torch.ones(1).expand(7, 5),
            "half": torch.zeros(3).half(),
        },
        "step": 70_000_000_000,
        "shape": [(3, 5), 1.5, None, True, b"x", {2}, torch.Size([2, 3])],
    }
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    found = read_pt(tmp_path / "model.pt")
    assert found["step"] == content["step"]
    assert found["shape"][:-1] == content["shape"][:-1]
    assert torch.equal(found["state_dict"]["b"], shared[2:5])


STAND_INS = {
    "states": lambda times: calling(b"numpy", b"dtype", b")") + b"Nb" * times,
    "calls": lambda times: b"cnumpy\ndtype\nq\x00)R" + b"h\x00)R" * times,
    "names": lambda times: b"cnumpy\ndtype\n" * times,
}


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("kind", STAND_INS)
def test_stand_ins_are_few(tmp_path, write, kind):
    """PyTorch lists all of them for each state, call or name: 10 µs."""
    for times, refused in ((10_000, "holds no tensors"), (25_000, "is refused: .* 500,\\d{3} values")):
        write(tmp_path / "model.pt", b"\x80\x02}" + A + b"(" + STAND_INS[kind](times) + b"ts.")
        start = time.process_time()
        with pytest.raises(ValueError, match=rf"model\.pt {refused}"):
            read_tensors(tmp_path / "model.pt")
        assert time.process_time() - start < 5
