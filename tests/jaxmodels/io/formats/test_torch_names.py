"""Names in PyTorch files: each entry, and each part of a storage, is the one that torch.load takes for it."""

import pickle
import struct
import zlib

import numpy as np
import pytest
import torch

from jaxmodels.io.formats.torch_files import read_state_dict, read_tensors

VALUES = np.arange(1, 5, dtype="<f4").tobytes()
OTHERS = np.arange(5, 9, dtype="<f4").tobytes()
UTF8 = 0x800  # flag of an entry


def text(word: str) -> bytes:
    """Instruction for a text."""
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def tensors(**of) -> bytes:
    """Pickle of tensors: name to instructions for a storage, and number of elements."""
    made = b"".join(
        text(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0K%b\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR" % bytes([count])
        for name, (storage, count) in of.items()
    )
    return b"\x80\x02}(" + made + b"u."


def storage(key: str, count: int, part: tuple | None = None, ends: bytes = b"N") -> bytes:
    """Instructions for the reference to a storage of floats, or to a part of it."""
    view = ends
    if part is not None:
        numbers = b"".join(b"J" + struct.pack("<i", number) for number in part[1:])
        view = b"(" + text(part[0]) + numbers + b"t"
    head = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    return head + b"K" + bytes([count]) + view + b"tQ"


def write_zip(file, entries, count=None, flags=None):
    """A .pt file of entries, whose end may say another number of them."""
    content, directory = b"", b""
    for i, (name, data) in enumerate(entries):
        flag = (flags or {}).get(i, 0)
        shared = struct.pack("<HHHHIIIHH", flag, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), 0)
        place = struct.pack("<HHHII", 0, 0, 0, 0, len(content))
        directory += b"PK\1\2" + struct.pack("<HH", 20, 20) + shared + place + name
        content += b"PK\3\4" + struct.pack("<H", 20) + shared + name + data
    said = len(entries) if count is None else count
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, said, said, len(directory), len(content), 0)
    file.write_bytes(content + directory + end)


def entries(root=b"archive", key="0", name=b"data/0", more=()):
    """Entries of a file with one tensor."""
    structure = tensors(a=(storage(key, 4, ends=b""), 4))
    held = [(b"data.pkl", structure), (b"version", b"3\n"), (name, VALUES), *more]
    return [(root + b"/" + last, data) for last, data in held]


BIG = (b"byteorder", b"big")
WRONG = {
    "byteorder in other letters": ({"entries": entries(more=[(b"ByteOrder", b"big")])}, "byteorder.*ByteOrder"),
    "data.pkl in other letters": ({"entries": [(n.replace(b".pkl", b".PKL"), d) for n, d in entries()]}, "data.PKL"),
    "a storage in other letters": ({"entries": entries(key="A", name=b"data/a")}, "data/A.*data/a"),
    "an entry beyond the number": ({"entries": entries(more=[BIG]), "count": 3}, "4 entries.* 3"),
    "fewer than the number": ({"entries": entries(), "count": 4}, "3 entries.* 4"),
    "NUL in a name": ({"entries": entries(key="0\0x", name=b"data/0\0x", more=[(b"data/0", OTHERS)])}, r"data/0\\x00x"),
    "NUL in a key": ({"entries": entries(key="0\0x")}, r"0\\x00x"),
    "NUL in the root": ({"entries": entries(root=b"a\0b")}, r"a\\x00b"),
    "two code pages": ({"entries": entries(key="é", name="data/é".encode(), more=[(b"data/\x82", OTHERS)])}, "data/é"),
    "a flag": ({"entries": entries(name="data/é".encode()), "flags": {2: UTF8}}, "data/é"),
    "one name twice": ({"entries": entries(more=[(b"data/0", OTHERS)]), "flags": {3: UTF8}}, "two entries"),
    "one name of a root twice": (
        {"entries": entries("é".encode(), more=[(b"data/0", OTHERS)]), "flags": {3: UTF8}},
        "two entries",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_entries_are_found_by_the_names_and_number_that_pytorch_sees(tmp_path, wrong):
    arguments, said = WRONG[wrong]
    write_zip(tmp_path / "model.pt", **arguments)
    for read in (read_state_dict, read_tensors):
        with pytest.raises(ValueError, match=rf"model\.pt (is|has) .*{said}"):
            read(tmp_path / "model.pt")


@pytest.mark.parametrize("root", [b"archive", "modèle".encode(), "漢".encode(), b"a b\n"])
@pytest.mark.parametrize("flag", [0, UTF8])
def test_the_root_of_entries_is_any_name_of_a_file(tmp_path, root, flag):
    """Versions of PyTorch write the name of the file there."""
    held = entries(root)
    write_zip(tmp_path / "model.pt", held, flags=dict.fromkeys(range(len(held)), flag))
    assert read_state_dict(tmp_path / "model.pt")["a"].tolist() == [1, 2, 3, 4]
    assert torch.load(tmp_path / "model.pt", weights_only=True)["a"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["modèle.pt", "漢.pt", "a b\n.pt", "A.B.pt"])
def test_what_torch_saves_under_any_name_is_read(tmp_path, name):
    torch.save({"a": torch.arange(5.0)}, tmp_path / name)
    assert read_state_dict(tmp_path / name)["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("place", [-12, -74, -66])
def test_each_number_of_entries_is_that_of_the_directory(tmp_path, place):
    """That of the end, and the two of its 64-bit part."""
    torch.save({"a": torch.arange(5.0)}, tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    content[place] -= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt is a damaged zip file"):
        read_state_dict(tmp_path / "model.pt")


def write_old(file, structure):
    """A file of the old format with one storage "k" of 8 numbers."""
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    numbers = struct.pack("<q", 8) + np.arange(8, dtype="<f4").tobytes()
    file.write_bytes(b"".join(pickle.dumps(one, 2) for one in head) + structure + pickle.dumps(["k"], 2) + numbers)


def test_parts_of_a_storage_in_an_old_file_are_read(tmp_path):
    """PyTorch before 0.4 wrote storages that are views of others."""
    parts = {"a": ("v", 0, 3), "b": ("w", 5, 3), "c": ("v", 0, 3), "d": None}
    of = {name: (storage("k", 8, part), 3) for name, part in parts.items()}
    write_old(tmp_path / "model.pt", tensors(**of))
    found = read_state_dict(tmp_path / "model.pt")
    assert {name: value.tolist() for name, value in found.items()} == {
        "a": [0, 1, 2],
        "b": [5, 6, 7],
        "c": [0, 1, 2],
        "d": [0, 1, 2],
    }
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(found[name], loaded[name]) for name in parts)


PARTS = {
    "two by one key": ([("v", 0, 3), ("v", 5, 3)], "different values by the key 'v'"),
    "one by the key of a storage": ([("k", 5, 3)], "different values by the key 'k'"),
    "before": ([("v", -1, 3)], "a part of the storage 'k'"),
    "beyond": ([("v", 6, 3)], "a part of the storage 'k'"),
    "backwards": ([("v", 5, -3)], "a part of the storage 'k'"),
    "without a place": ([("v",)], "a part of the storage 'k'"),
}


@pytest.mark.parametrize("wrong", PARTS)
def test_a_part_of_a_storage_is_one_by_its_key(tmp_path, wrong):
    parts, said = PARTS[wrong]
    write_old(tmp_path / "model.pt", tensors(**{f"t{i}": (storage("k", 8, part), 3) for i, part in enumerate(parts)}))
    with pytest.raises(ValueError, match=rf"model\.pt is .*{said}"):
        read_state_dict(tmp_path / "model.pt")


def test_a_zip_has_no_parts_of_storages(tmp_path):
    held = entries()
    held[0] = held[0][0], tensors(a=(storage("0", 4, ("v", 0, 3)), 3))
    write_zip(tmp_path / "model.pt", held)
    with pytest.raises(ValueError, match=r"model\.pt is .*a part of the storage '0'"):
        read_state_dict(tmp_path / "model.pt")
