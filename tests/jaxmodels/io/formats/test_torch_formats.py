"""PyTorch files of every kind are read; those whose entries are not what the tensors refer to are refused."""

import collections
import io
import os
import re
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch

import jaxmodels
from jaxmodels.io.content import is_torch_file
from jaxmodels.io.formats.torch_files import read_pt, read_state_dict, read_tensors, stand_ins
from tests.fuzz.targets import TARGETS

SHARED = torch.arange(35.0).view(7, 5)


def parameter():
    """A parameter with a hook, an attribute and a gradient."""
    made = torch.nn.Parameter(torch.ones(3, 2))
    made.register_hook(lambda gradient: gradient)
    made.note = "text"
    made.grad = torch.ones(3, 2)
    return made


def optimizer():
    """State of an optimizer after a step."""
    layer = torch.nn.Linear(3, 2)
    made = torch.optim.Adam(layer.parameters())
    layer(torch.ones(5, 3)).sum().backward()
    made.step()
    return made.state_dict()


DTYPES = ("bfloat16", "float16", "float64", "int8", "uint8", "int16", "int64", "bool", "complex64", "complex128")
DTYPES += ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
KINDS = {
    "views": lambda: [SHARED, SHARED.t(), SHARED[2:4, 1:], SHARED[:0], SHARED[3, 2], SHARED[::3]],
    "empty": lambda: [torch.empty(0, 3), torch.empty(0), torch.tensor([], dtype=torch.bool)],
    "no axes": lambda: [torch.tensor(1.5), torch.tensor(7), torch.tensor(True)],
    "dtypes": lambda: [torch.arange(7).to(getattr(torch, name)) for name in DTYPES],
    "conjugated": lambda: [torch.arange(3).to(torch.complex64).conj(), torch._neg_view(torch.ones(3))],
    "parameters": lambda: [parameter(), parameter()],
    "module": lambda: torch.nn.Linear(3, 2).state_dict(keep_vars=True),
    "optimizer": optimizer,
    "sparse": lambda: [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()],
    "storage": lambda: [torch.ones(3).untyped_storage(), torch.arange(5).untyped_storage()],
    "others": lambda: {"rng": torch.get_rng_state(), "at": torch.device("cpu"), "is": torch.float16, 3: {"n": {1}}},
}


def same(a, b):
    """Equal values of every type in two structures."""
    if isinstance(b, torch.UntypedStorage):  # torch.load too returns a typed one
        return bytes(a.untyped()) == bytes(b)
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, torch.Tensor):
        return a == b
    assert (a.dtype, a.shape, a.layout, a.requires_grad) == (b.dtype, b.shape, b.layout, b.requires_grad)
    assert (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
    assert a.layout != torch.strided or a.stride() == b.stride()
    if a.layout == torch.strided and not a.is_quantized and not a.is_conj():
        a, b = (x.detach().resolve_neg().contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return bool((a.to_dense() == b.to_dense()).all()) if a.layout != torch.strided else torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_hold_what_was_written(tmp_path, kind, zipped):
    file, content = tmp_path / "model.pt", KINDS[kind]()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert same(read_pt(file), content)
    assert not torch._utils._sparse_tensors_to_validate


@pytest.mark.parametrize("name", [b"p\xff", b"p q", "é漢".encode()])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_path_may_be_of_any_bytes(tmp_path, name, zipped):
    (tmp_path / os.fsdecode(name)).mkdir()
    torch.save({"a": SHARED}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    file = (tmp_path / "model.pt").rename(tmp_path / os.fsdecode(name) / "model.pt")
    assert torch.equal(read_state_dict(file)["a"], SHARED)
    assert np.array_equal(read_tensors(file)[0]["a"], SHARED.numpy())


def with_zip_inside(inside):
    """Content that holds another file in memory, as TransformerEngine's state."""
    held = io.BytesIO()
    torch.save({"a": torch.zeros(5)}, held)
    return {"a": SHARED, "_extra_state": held if inside == "a file" else torch.frombuffer(held.getvalue(), dtype=U8)}


U8 = torch.uint8


@pytest.mark.parametrize("inside", ["a file", "a tensor", "at the end"])
def test_an_old_file_that_ends_as_a_zip_is_none(tmp_path, inside):
    """The first bytes decide, as in torch.load."""
    file = tmp_path / "model.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.save(with_zip_inside(inside), file, _use_new_zipfile_serialization=False)
    assert not is_torch_file(file)
    if inside == "at the end":
        torch.save({"a": torch.zeros(5)}, tmp_path / "zip.pt")
        file.write_bytes(file.read_bytes() + (tmp_path / "zip.pt").read_bytes())
        with pytest.raises(ValueError, match=r"model\.pt is truncated or not a PyTorch checkpoint: values up to byte"):
            read_tensors(file)
    else:
        assert np.array_equal(read_tensors(file)[0]["a"], SHARED.numpy())


@pytest.mark.parametrize("options", ["aligned", "no checksums", "in memory"])
def test_every_way_to_write_a_zip_is_read(tmp_path, options):
    from torch.utils.serialization import config

    file = tmp_path / "model.pt"
    if options == "aligned":
        with config.patch({"save.storage_alignment": 4096}):
            torch.save({"a": SHARED, "b": torch.ones(3)}, file)
    elif options == "no checksums":
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        torch.save({"a": SHARED, "b": torch.ones(3)}, file)
        torch.serialization.set_crc32_options(before)
    else:
        with file.open("wb") as opened:
            torch.save({"a": SHARED, "b": torch.ones(3)}, opened)
    found = read_state_dict(file)
    assert torch.equal(found["a"], SHARED)
    assert found["b"].tolist() == [1, 1, 1]


def rewrite(file, **changes):
    """Write a .pt file anew with other entries, by the last word of their names; None removes one."""
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    for word, data in changes.items():
        (name,) = [name for name in entries if name.rpartition("/")[2].partition(".")[0] == word.removeprefix("_")]
        entries[name] = data(entries[name]) if callable(data) else data
    with zipfile.ZipFile(file, "w") as new:
        for name, data in entries.items():
            if data is not None:
                new.writestr(name, data)


def test_numbers_of_a_machine_of_the_other_byte_order_are_read(tmp_path):
    file = tmp_path / "model.pt"
    torch.save({"a": SHARED, "b": SHARED.t(), "c": torch.arange(3)}, file)
    swapped = {"_0": lambda data: np.frombuffer(data, "<f4").astype(">f4").tobytes()}
    swapped["_1"] = lambda data: np.frombuffer(data, "<i8").astype(">i8").tobytes()
    rewrite(file, byteorder=b"big", **swapped)
    found = read_state_dict(file)
    assert torch.equal(found["b"], SHARED.t())
    assert found["c"].tolist() == [0, 1, 2]
    rewrite(file, byteorder=b"middle")
    with pytest.raises(ValueError, match=r"model\.pt is .*byteorder"):
        read_state_dict(file)


WRONG = {
    "cut": {"_0": lambda data: data[:-4]},
    "enlarged": {"_0": lambda data: data + bytes(4)},
    "emptied": {"_1": b""},
    "removed": {"_0": None},
    "of another dtype": {"data": lambda data: data.replace(b"FloatStorage", b"DoubleStorage")},
    "of more numbers": {"data": lambda data: data.replace(b"K\x23tq", b"K\x24tq")},
    "of fewer numbers": {"data": lambda data: data.replace(b"K\x23tq", b"K\x22tq")},
    "of a fraction": {"data": lambda data: data.replace(b"K\x23tq", b"G" + struct.pack(">d", 35.0) + b"tq")},
    "without a structure": {"data": None},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_entry_holds_the_numbers_that_its_tensors_refer_to(tmp_path, monkeypatch, wrong):
    file = tmp_path / "model.pt"
    torch.save({"a": SHARED, "b": torch.ones(3)}, file)
    rewrite(file)
    assert torch.equal(read_state_dict(file)["a"], SHARED)
    before = file.read_bytes()
    rewrite(file, **WRONG[wrong])
    assert file.read_bytes() != before
    for read in (read_state_dict, read_tensors):
        with pytest.raises(ValueError, match=r"model\.pt is ") as refused:
            read(file)
        assert str(refused.value).isprintable()


class Rebuilt:
    """Stands for a tensor of other sizes than its storage's."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def tensor(storage, offset, size, stride):
    return Rebuilt(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())


PLACES = {
    "too long": (0, (36,), (1,)),
    "too far": (30, (2, 3), (3, 1)),
    "too wide": (0, (3, 5), (16, 1)),
    "before": (-1, (3,), (1,)),
    "backwards": (9, (3,), (-1,)),
    "absurd": (0, (2**62, 2**62), (2**62, 2**62)),
    "far away": (2**62, (3,), (1,)),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_lies_in_its_storage(tmp_path, place, zipped):
    file = tmp_path / "model.pt"
    held = tensor(SHARED._typed_storage(), *PLACES[place])
    torch.save({"a": held, "b": torch.ones(300)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt is "):
        read_state_dict(file)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", ["converted", "made", "a copy"])
def test_nothing_is_computed_while_a_file_is_read(tmp_path, how, zipped):
    """One number, repeated a trillion times, would fill the memory with numbers of another dtype."""
    file, wide = tmp_path / "model.pt", torch.zeros(1).expand(10**6, 10**6)
    convert = torch._utils._rebuild_device_tensor_from_cpu_tensor
    with_state = torch._utils._rebuild_parameter_with_state
    made = {
        "converted": Rebuilt(convert, wide, torch.float64, "cpu", False),
        "made": Rebuilt(torch.Tensor, 10**12),
        "a copy": Rebuilt(with_state, wide, False, collections.OrderedDict(), {"real": wide}),
    }
    torch.save({"a": made[how]}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt (is|has) "):
        read_state_dict(file)
    torch.save({"a": Rebuilt(convert, torch.ones(3), torch.float32, "xla:0", False)}, file)  # of a TPU
    assert read_state_dict(file)["a"].tolist() == [1, 1, 1]


def central(content, name, offset, value):
    """Zip file with another number in the directory's entry of a name."""
    at = content.index(b"PK\x01\x02")
    while not content[at + 46 :].startswith(name):
        at = content.index(b"PK\x01\x02", at + 1)
    return content[: at + offset] + struct.pack("<I", value) + content[at + offset + 4 :]


def test_entries_have_no_bytes_or_names_in_common(tmp_path):
    file = tmp_path / "model.pt"
    torch.save({"a": torch.ones(7), "b": torch.ones(300)}, file)
    rewrite(file)
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        places = {entry.filename: entry.header_offset for entry in archive.infolist()}
    grown = content.replace(b"K\x07tq", b"K\x27tq")
    for offset in (20, 24):  # compressed and uncompressed size
        grown = central(grown, b"model/data/0", offset, 39 * 4)
    file.write_bytes(grown)
    with pytest.raises(ValueError, match=r"model\.pt is a damaged zip file: 'model/data/0' overlaps"):
        read_state_dict(file)
    file.write_bytes(central(content, b"model/data/0", 42, places["model/data/1"]))
    with pytest.raises(ValueError, match=r"model\.pt is a damaged zip file: the header of 'model/data/0'"):
        read_state_dict(file)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("model/DATA/0", bytes(28))
    with pytest.raises(ValueError, match=r"model\.pt is a damaged zip file: two entries"):
        read_state_dict(file)


@pytest.mark.parametrize("target", ["shards", "shards of ranks", "Hugging Face, .bin"])
def test_files_of_models_are_compared_too(tmp_path, target):
    TARGETS[target].make(tmp_path)
    file = sorted(file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".bin"))[0]
    jaxmodels.load(tmp_path)
    rewrite(file, _0=lambda data: data[:-2])
    with pytest.raises(ValueError, match=rf"{file.name} is .*storage '0' has [\d,]+ bytes where .* [\d,]+$"):
        jaxmodels.load(tmp_path)


def test_values_of_numpy_are_left_out_as_before(tmp_path):
    torch.save({"a": SHARED, "rng": np.random.RandomState(0).get_state()}, tmp_path / "model.pt")
    assert np.array_equal(read_tensors(tmp_path / "model.pt")[0]["a"], SHARED.numpy())
    assert "a" in read_pt(tmp_path / "model.pt", stand_ins())


NAMES = ("numel", "numpy", "detach", "cpu", "element_size", "untyped_storage", "data_ptr", "view", "stride")


@pytest.mark.parametrize("zipped", [True, False])
def test_attributes_of_a_tensor_do_not_replace_its_methods(tmp_path, zipped):
    file = tmp_path / "model.pt"
    attributes = dict.fromkeys(NAMES, 5)
    made = Rebuilt(torch._utils._rebuild_parameter_with_state, SHARED, False, collections.OrderedDict(), attributes)
    torch.save({"a": made}, file, _use_new_zipfile_serialization=zipped)
    assert read_pt(file)["a"].numel == 5
    assert torch.equal(read_state_dict(file)["a"], SHARED)
    assert np.array_equal(read_tensors(file)[0]["a"], SHARED.numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_attributes_of_a_mapping_do_not_replace_its_methods(tmp_path, zipped):
    file = tmp_path / "model.pt"
    state = collections.OrderedDict(a=SHARED)
    inner = collections.OrderedDict(model=state)
    for mapping in (state, inner):
        vars(mapping).update(dict.fromkeys(("Items", "Values", "Keys", "Get", "_metadata"), 5))
    torch.save([inner, (inner, {"b": [state]})], file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(lower(file.read_bytes()))
    first, (second, third) = read_pt(file)
    for mapping in (first, first["model"], second, third["b"][0]):
        assert type(mapping) is collections.OrderedDict
        assert not vars(mapping)
    torch.save(inner, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(lower(file.read_bytes()))
    assert np.array_equal(read_tensors(file)[0]["a"], SHARED.numpy())


def lower(content):
    """With the names of methods; `torch.save` itself calls them."""
    return re.sub(rb"Items|Values|Keys|Get", lambda match: match[0].lower(), content)


@pytest.mark.parametrize("entry", [True, False])
def test_verify_measures_tensors_in_an_entry_too(tmp_path, entry):
    from parity.checkpoint.opened import opened

    file, tensors = tmp_path / "model.pt", {"wide": torch.zeros(1).expand(10**6, 10**6)}
    torch.save({"state_dict": tensors, "step": 3} if entry else tensors, file)
    with pytest.raises(ValueError, match=r"model\.pt has 'wide' of 4,000,000,000,000 bytes"):
        opened(file)
