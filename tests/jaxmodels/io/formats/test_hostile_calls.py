"""PyTorch files whose structure calls what it may refer to with other arguments than `torch.save` writes."""

import collections
import copyreg
import io
import pickle
import time
import warnings

import pytest
import torch

import jaxmodels
from jaxmodels.io.formats.torch_files import read_pt, read_state_dict, read_tensors
from parity.checkpoint.opened import opened
from tests.fuzz.targets import TARGETS
from tests.jaxmodels.io.formats.test_hostile_pt import FORMATS, LARGE, A, calling


class Made:
    """Stands for the result of a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class New(Made):
    """Stands for an object that is made by `__new__`."""

    __class__ = property(lambda self: self.call[0])  # pickle compares it

    def __reduce_ex__(self, protocol):
        return copyreg.__newobj__, (self.call[0], *self.call[1])


def on(storage, size=1000):
    hooks = collections.OrderedDict()
    return Made(torch._utils._rebuild_tensor_v2, storage, 0, (size,), (1,), False, hooks)


TYPED, UNTYPED, HOOKS = torch.storage.TypedStorage, torch.storage.UntypedStorage, collections.OrderedDict()
# Tensors, or storages of tensors, of memory that nothing was written to.
BLANK = {
    "a storage of a size": on(Made(TYPED, 1000)),
    "a storage without": on(Made(TYPED)),
    "an untyped storage": on(Made(UNTYPED, 4000)),
    "a new storage": on(New(TYPED, 1000)),
    "a storage alone": Made(UNTYPED, 4000),
    "a tensor": Made(torch.Tensor, 0),
    "a tensor of a size": Made(torch.FloatTensor, 1000),
    "a new tensor": New(torch.Tensor, 1000),
    "a parameter": Made(torch._utils._rebuild_parameter, Made(torch.Tensor, 5), True, HOOKS),
    "a new parameter": New(torch.nn.Parameter),
    "a subclass": Made(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, (5,), {}),
    "a storage of a subclass": Made(
        torch._tensor._rebuild_from_type_v2,
        torch._utils._rebuild_tensor_v2,
        torch.Tensor,
        (Made(TYPED, 5), 0, (5,), (1,), False, HOOKS),
        {},
    ),
    "a wrapper": Made(
        *(torch._utils._rebuild_wrapper_subclass, torch.Tensor, torch.float32, (5,), (1,), 0, torch.strided, "cpu"),
        True,
    ),
}


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("blank", BLANK)
def test_tensors_are_made_of_bytes_of_the_file_only(tmp_path, write, blank):
    write(tmp_path / "model.pt", pickle.dumps({"a": BLANK[blank]}, 2))
    for read in (read_pt, read_state_dict, read_tensors):
        with pytest.raises(ValueError, match=r"model\.pt is refused"):
            read(tmp_path / "model.pt")


def text(content):
    return b"X" + len(content.encode()).to_bytes(4, "little") + content.encode()


def often(module, name, *arguments):
    """A tuple of texts, and of 5,000 results of calls with them."""
    given = b"".join(text(argument) + b"q" + bytes([i]) for i, argument in enumerate(arguments))
    used = b"".join(b"h" + bytes([i]) for i in range(len(arguments)))
    return b"(" + given + calling(module, name, b"(" + used + b"t") * 5000 + b"t"


def nested(codec, times):
    """A text that is encoded, and the result encoded, and so on."""
    encode = b"c_codecs\nencode\n"
    return encode * (times + 1) + A + text("latin1") + b"\x86R" + (text(codec) + b"\x86R") * times


MANY = "ab" * 500_000
LETTERS = "".join(map(chr, range(0x4E00, 0x9E00)))
CALLS = {
    "hex of hex": nested("hex", 31),
    "punycode": calling(b"_codecs", b"encode", text(LETTERS) + text("punycode") + b"\x86"),
    "no codec": calling(b"_codecs", b"encode", A + text("no") + b"\x86"),
    "a wide codec": often(b"_codecs", b"encode", MANY, "utf-32"),
    "bytes": often(b"_codecs", b"encode", MANY, "latin1"),
    "an array of bytes": often(b"__builtin__", b"bytearray", MANY, "latin-1"),
    "a set of letters": often(b"__builtin__", b"set", MANY),
    "counted letters": often(b"collections", b"Counter", MANY),
    "bytes of a number": calling(b"__builtin__", b"bytearray", LARGE + b"\x85"),
    "a long shape": calling(b"torch", b"Size", LARGE + b"\x85"),
    # arguments that are no tuple: Python takes them apart
    "a dictionary's key": b"c__builtin__\nbytearray\n}" + LARGE + b"K\x00sR",
    "a size": calling(b"__builtin__", b"bytearray", calling(b"torch", b"Size", LARGE + b"\x85\x85")),
    "a set's number": calling(b"__builtin__", b"bytearray", calling(b"__builtin__", b"set", b"]" + LARGE + b"a\x85")),
}


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("call", CALLS)
def test_calls_that_swell_or_take_long_are_refused(tmp_path, write, call):
    write(tmp_path / "model.pt", b"\x80\x02" + CALLS[call] + b".")
    start = time.process_time()
    with pytest.raises(ValueError, match=r"model\.pt is refused: its structure (calls|consists of more than 50\d,)"):
        read_tensors(tmp_path / "model.pt")
    assert time.process_time() - start < 5


WIDE = torch.zeros(1).expand(*(6,) * 20)  # takes hours to print
KEYS = {
    "a tensor": WIDE,
    "a tuple": (WIDE,),
    "a storage": torch.ones(3).untyped_storage(),
    "a storage that is made": Made(TYPED),
    "a dtype": torch.float32,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", KEYS)
def test_keys_are_texts_and_numbers(tmp_path, key, zipped):
    file = tmp_path / "model.pt"
    for content in ({"a": torch.ones(3), KEYS[key]: torch.ones(2)}, {"state_dict": {"a": 1}, "b": {KEYS[key]: 2}}):
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        for read in (read_pt, read_state_dict, read_tensors, opened):
            with pytest.raises(ValueError, match=r"model\.pt is refused.*(as a key|TypedStorage)"):
                read(file)


STORAGE = torch.ones(5)._typed_storage()
PRINTED = {
    "a size": (STORAGE, 0, (WIDE,), (1,), False, HOOKS),
    "a tuple in it": (STORAGE, 0, ((WIDE,),), (1,), False, HOOKS),
    "a stride": (STORAGE, 0, (5,), (WIDE,), False, HOOKS),
    "an offset": (STORAGE, WIDE, (5,), (1,), False, HOOKS),
    "hooks": (STORAGE, 0, (5,), (1,), False, WIDE),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("printed", PRINTED)
def test_tensors_are_not_where_an_error_prints_them(tmp_path, printed, zipped):
    made = Made(torch._utils._rebuild_tensor_v2, *PRINTED[printed])
    torch.save({"a": made}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"model\.pt is refused: its structure calls torch\._utils\._rebuild_tensor_v2"
    ):
        read_tensors(tmp_path / "model.pt")


ONE = torch.zeros(1, dtype=torch.int64).expand(10**9, 2)
TABLES = {
    "nested": Made(torch._utils._rebuild_nested_tensor, torch.ones(5), ONE, ONE, ONE[:, 0]),
    "quantized": Made(
        *(torch._utils._rebuild_qtensor, STORAGE, 0, (10**9, 0), (0, 0)),
        *((torch.per_channel_affine, ONE[:, 0], ONE[:, 1], 0), False, HOOKS),
    ),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_repeats_a_row_is_not_read(tmp_path, table, zipped):
    torch.save({"a": torch.ones(3), "b": TABLES[table]}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    start = time.process_time()
    if table == "quantized":
        with pytest.raises(ValueError, match=r"model\.pt is refused: .*quantized"):
            read_tensors(tmp_path / "model.pt")
    else:
        assert list(read_tensors(tmp_path / "model.pt")[0]) == ["a"]
        with pytest.raises(ValueError, match=r"model\.pt has 'b', which is not a dense tensor"):
            read_state_dict(tmp_path / "model.pt")
    assert time.process_time() - start < 5


def colliding(tries):
    """Pairs of integers with one hash: the inverse of Python's."""
    first, second, fifth, size = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64

    def turned(x, by):
        return (x << by | x >> (64 - by)) % size

    wanted = turned((hash((5, 7)) - (2 ^ fifth ^ 3527539)) * pow(first, -1, size) % size, 33)
    found = []
    for a in range(tries):
        b = (wanted - turned((fifth + a * second) % size, 31) * first) * pow(second, -1, size) % size
        b -= size * (b >= 2**63)
        if hash(b) == b:
            found.append((a, b))
    return found


ODD_KEYS = {
    "pairs": dict.fromkeys(colliding(12_000)),
    "large integers": dict.fromkeys(range(2**27, 2**27 + 3_000)),
    "negative integers": dict.fromkeys(range(-3_000, -1)),
    "fractions": {i / 7: None for i in range(3_000)},
    "members": {i / 7 for i in range(3_000)},
    "pairs of an OrderedDict": Made(collections.OrderedDict, [[i / 7, None] for i in range(3_000)]),
    "counted": [Made(collections.Counter, {i / 7: 1 for i in range(900)}) for _ in range(2)],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("odd", ODD_KEYS)
def test_keys_whose_hashes_a_file_knows_are_few(tmp_path, odd, zipped):
    keys = ODD_KEYS[odd]
    torch.save({"a": torch.ones(3), "b": keys}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt is refused: .*more than 2,000 keys"):
        read_tensors(tmp_path / "model.pt")


def test_hashes_of_pairs_repeat():
    pairs = colliding(1_000)
    assert len(pairs) > 100
    assert len({hash(pair) for pair in pairs}) == 1


@pytest.mark.parametrize("zipped", [True, False])
def test_many_texts_and_numbers_in_order_are_keys(tmp_path, zipped):
    """Keys of an optimizer, of losses by step, and of epochs."""
    content = {
        "state": {i: {"step": 1} for i in range(5_000)},
        "losses": {1_000_000 + i: 0.5 for i in range(1_500)},
        "names": {f"name {i}" for i in range(5_000)},
        "a": torch.ones(3),
    }
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert read_pt(tmp_path / "model.pt")["losses"] == content["losses"]
    assert list(read_tensors(tmp_path / "model.pt")[0]) == ["a"]


GROWING = {
    "a list of arguments": b"]q\x00\x85q\x01h\x00(" + b"K\x01" * 9_000 + b"ec__builtin__\nset\nh\x01Rt",
    "a list that waits": b"]q\x00(" + b"h\x00" * 9_000 + b"(K\x01et",
    "a dictionary in itself": b"}q\x00K\x01h\x00st",
    "a mapping in itself": b"ccollections\nOrderedDict\n)Rq\x00K\x01h\x00st",
    "its state": b"ccollections\nOrderedDict\n)Rq\x00h\x00}bt",
}


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("growing", GROWING)
def test_what_was_used_grows_no_more(tmp_path, write, growing):
    """It would consist of more values than were counted where it was used."""
    write(tmp_path / "model.pt", b"\x80\x02(" + GROWING[growing] + b".")
    with pytest.raises(ValueError, match=r"model\.pt is refused: its structure has a (list|dict|ordered) that grows"):
        read_tensors(tmp_path / "model.pt")


@pytest.mark.parametrize("write", FORMATS)
def test_values_are_numbered_in_order(tmp_path, write):
    write(tmp_path / "model.pt", b"\x80\x02}r\x00\x00\x00\x10.")
    with pytest.raises(ValueError, match=r"model\.pt is refused: .*268,435,456"):
        read_tensors(tmp_path / "model.pt")


@pytest.mark.parametrize("made", [collections.Counter, set, collections.OrderedDict])
def test_only_a_tensor_is_of_another_type(tmp_path, made):
    """The state that comes with the type would replace methods."""
    typed = Made(torch._tensor._rebuild_from_type_v2, made, made, (), {"items": 5})
    torch.save({"a": torch.ones(3), "b": typed}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt is refused: its structure gives a \w+ a type"):
        read_tensors(tmp_path / "model.pt")


@pytest.mark.parametrize("pairs", [[(WIDE, 1)], [[(1, (2,)), 3]], [((WIDE, 1), 1)]])
def test_keys_of_pairs_and_members_of_a_set_are_texts_and_numbers(tmp_path, pairs):
    for function, given in ((collections.OrderedDict, pairs), (set, [pairs[0][0]])):
        torch.save({"a": torch.ones(3), "b": Made(function, given)}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"model\.pt is refused: .*as a key"):
            read_pt(tmp_path / "model.pt")


@pytest.mark.parametrize("value", [b"K\x05", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n"])
@pytest.mark.parametrize("made", ["Counter", "set", "bytearray"])
def test_only_a_mapping_has_attributes(tmp_path, value, made):
    module = b"collections" if made == "Counter" else b"__builtin__"
    built = calling(module, made.encode(), b")") + b"}" + text("items") + value + b"sb"
    for write in FORMATS:
        write(tmp_path / "model.pt", b"\x80\x02" + built + b".")
        with pytest.raises(ValueError, match=r"model\.pt is refused: .*a (counter|set|bytes) a state"):
            read_tensors(tmp_path / "model.pt")


def test_what_python_2_and_older_versions_write_is_read(tmp_path):
    """Mappings of lists of pairs, large ids of parameters as keys, and bytes by each of their spellings."""
    shared = torch.arange(5.0)
    content = {
        "state_dict": Made(collections.OrderedDict, [["a", shared], ["b", shared]]),
        "optimizer": {"state": {140234567890123: {"step": 3}}, "param_groups": [{"betas": (0.9, 0.99), None: True}]},
        ("a", 1): {("b", None)},
        "bytes": [b"\xff", bytearray(b"ab"), Made(bytearray, "ab", "latin-1"), collections.Counter({30: 1}), {"x"}, 1j],
        "seed": 2**64 - 1,
    }
    torch.save(content, tmp_path / "model.pt")
    found = read_pt(tmp_path / "model.pt")
    assert list(found["state_dict"]) == ["a", "b"]
    assert found["bytes"] == [b"\xff", b"ab", b"ab", {30: 1}, {"x"}, 1j]
    assert found["optimizer"] == content["optimizer"]
    assert found["a", 1] == {("b", None)}
    assert found["seed"] == 2**64 - 1
    assert read_tensors(tmp_path / "model.pt")[0]["b"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("target", ["shards", "shards of ranks", "Hugging Face, .bin"])
def test_a_file_in_memory_in_the_place_of_a_tensor_is_left_out(tmp_path, target):
    """As TransformerEngine saves its state."""
    TARGETS[target].make(tmp_path)
    expected = jaxmodels.load(tmp_path)
    file = sorted(file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".bin"))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(file, weights_only=False)
    held = content.get("module", content)
    name = next(name for name in held if name.endswith("weight"))
    held[name.replace("weight", "_extra_state")] = io.BytesIO(b"abc")
    torch.save(content, file)
    assert jaxmodels.load(tmp_path).settings == expected.settings
