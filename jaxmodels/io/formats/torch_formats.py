"""The two formats of PyTorch files. The numbers are views of the mapped file.

Since torch 1.6, a zip of entries that are not compressed:

    NAME/data.pkl     the content; tensors refer to storages by key
    NAME/data/KEY     values of a storage
    NAME/byteorder    little or big

Before, a file of pickles:

    a pickle each: magic number, protocol, system, the content (tensors refer to storages by key), list of keys
    for each key: number of elements, 8 bytes, then the values

`torch.load` maps a zip without comparing the entries with the sizes that the pickle names, and reads an old file as a
whole. It looks up an entry by its name up to a NUL, without regard to case, among as many entries as the end of the zip
says, and a part of a storage in an old file by its key alone. A file in which it would find other values is refused.
"""

import contextlib
import io
import mmap
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxmodels.io.allowance import Allowance
from jaxmodels.io.bounded import open_regular
from jaxmodels.io.content import explained
from jaxmodels.process.texts import quoted

COUNT_BYTES = 8
END, END64 = 22, 98  # bytes of the end of a zip file without a comment, and of one of 64-bit sizes
LOCAL = struct.Struct("<4s2x2H16x2H")  # of an entry's own header: signature, flags, method, lengths of name and rest
UTF8 = 0x800  # flag of a name in UTF-8
NAME = re.compile(rb"[^\0/]*(/[ -~]*)?")  # of an entry: the name of the file as it was saved, and one of torch's own
MANY = 0xFFFF  # entries: the 64-bit end of the zip has their number
PICKLE_BYTES = 2**26  # of the structure, without the numbers
# Operations by which tensors are made of storages or of other tensors. None of them fills memory.
MAKING = {f"aten.{name}" for name in ("set_.source_Storage_storage_offset", "empty_strided.default", "detach.default")}
MAKING |= {"aten.alias.default", "aten._sparse_coo_tensor_with_dims_and_tensors.default"}
MAKING |= {"aten.sparse_compressed_tensor.comp_plain_value_size"}
EMPTY = "aten.empty.memory_format"  # without values, until it gets a storage
NESTED = "aten._nested_view_from_buffer.default"  # looks at each of its tables' rows, which may be one that is repeated
Storage = Callable[[str, Any, int], Any]  # of a key, a dtype and a number of bytes


class Entry(NamedTuple):
    """Place of the values of an entry in a zip file, in bytes."""

    name: bytes
    offset: int
    size: int


def read_zipped(file: Path, allowance: Allowance) -> Any:
    """Content of a zip file, whose tensors are views of the mapped file.

    Raises ValueError if it is damaged or has compressed entries, pickle.UnpicklingError if it contains code, and
    RuntimeError if an entry has not the size of the storage that tensors refer to.
    """
    with open_regular(file) as opened:
        entries = entries_of(file, opened)

        root = next((entry.name for entry in entries.values()), b"").partition(b"/")[0]

        def entry_of(name: str) -> Entry | None:
            wanted = root + b"/" + name.encode()
            entry = entries.get(wanted.lower())
            if entry is not None and entry.name != wanted:
                raise RuntimeError(f"its {quoted(name)} has the name {quoted(entry.name.decode(errors='replace'))}")
            return entry

        def content(name: str) -> bytes:
            entry = entry_of(name)
            if entry is None:
                raise RuntimeError(f"it has no {quoted(name)}")
            opened.seek(entry.offset)
            return opened.read(entry.size)

        order = content("byteorder") if entry_of("byteorder") else b"little"
        if order not in (b"little", b"big"):
            raise RuntimeError(f"its byteorder is {quoted(order)}")
        structure = io.BytesIO(content("data.pkl"))
        mapped = storage_of(opened)

    def storage(key: str, dtype: Any, size: int) -> Any:
        entry = entry_of(f"data/{key}")
        if entry is None:
            raise RuntimeError(f"it has no entry of the storage {quoted(key)}")
        if entry.size != size:
            raise RuntimeError(f"storage {quoted(key)} has {entry.size:,} bytes where its tensors refer to {size:,}")
        part = mapped[entry.offset : entry.offset + size]
        if order.decode() != sys.byteorder:
            part.byteswap(dtype)  # in memory: the map is private
        return part

    allowance.add_structure(structure)
    return unpickler(structure, storage, parts=False).load()


def storage_of(opened: BinaryIO) -> Any:
    """Storage of an open file's bytes, mapped; what is changed in it stays in memory.

    PyTorch's own function takes only names that are UTF-8.
    """
    import torch

    return torch.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8).untyped_storage()


def entries_of(file: Path, opened: BinaryIO) -> dict[bytes, Entry]:
    """Places of the entries of a zip file by their names in lower case, in its order.

    Raises ValueError, naming the file, if entries are compressed or encrypted, if two have a name or bytes in common,
    if their names or their number are not what PyTorch takes them for, or if the pickle is too large.
    """
    said = number_of_entries(file)
    try:
        with zipfile.ZipFile(opened) as archive:
            entries, end = archive.infolist(), archive.start_dir
    except Exception as error:  # from damaged ones come BadZipFile, NotImplementedError, struct.error and others
        raise ValueError(f"{file} is a damaged zip file: {error}") from None
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(f"{file} has compressed entries ({quoted(compressed[0])}); save it again with torch.save")
    size = max((entry.file_size for entry in entries if entry.filename.lower().endswith(".pkl")), default=0)
    if size > PICKLE_BYTES:
        raise ValueError(f"{file} has a pickle of {size:,} bytes; at most {PICKLE_BYTES:,} are read")
    if len(entries) != said:
        raise ValueError(f"{file} is a damaged zip file: it has {len(entries):,} entries where its end says {said:,}")
    names = [name_of(entry) for entry in entries]
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{file} has an entry {quoted(name.decode(errors='replace'))}, which is not a name in ASCII"
            )
    if len({name.lower() for name in names}) < len(names):
        raise ValueError(f"{file} is a damaged zip file: two entries have the same name")
    places = {name.lower(): place_of(file, opened, entry) for name, entry in zip(names, entries, strict=True)}
    for entry in sorted(entries, key=lambda entry: entry.header_offset, reverse=True):
        place = places[name_of(entry).lower()]
        if place.offset + place.size > end:
            raise ValueError(f"{file} is a damaged zip file: {quoted(entry.orig_filename)} overlaps what follows it")
        end = entry.header_offset
    return places


def name_of(entry: zipfile.ZipInfo) -> bytes:
    """Name of an entry as it stands in the file."""
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & UTF8 else "cp437")


def place_of(file: Path, opened: BinaryIO, entry: zipfile.ZipInfo) -> Entry:
    """Place of an entry's values; raises ValueError, naming the file, if its own header is not that of the directory.

    Sizes may be missing there: they may follow the values.
    """
    opened.seek(entry.header_offset)
    header = opened.read(LOCAL.size)
    name = name_of(entry)
    signature, flags, method, length, rest = LOCAL.unpack(header.ljust(LOCAL.size, b"\0"))
    same = (signature, method, opened.read(length)) == (b"PK\x03\x04", zipfile.ZIP_STORED, name)
    if not same or flags & 1 or entry.compress_size != entry.file_size:
        raise ValueError(f"{file} is a damaged zip file: the header of {quoted(entry.orig_filename)} differs")
    return Entry(name, entry.header_offset + LOCAL.size + length + rest, entry.file_size)


def number_of_entries(file: Path) -> int:
    """Number of entries by the end of a zip; raises ValueError unless its directory of entries ends where that begins.

    Of two directories, one that ends there and one that lies where the end says, Python reads the first, PyTorch the
    second.
    """
    size = file.stat().st_size
    with open_regular(file) as content:
        content.seek(max(0, size - END64))
        tail = content.read()
    end = len(tail) - END
    if tail[max(0, end) : end + 4] != b"PK\x05\x06":
        raise explained(file, f"is a damaged zip file: its last {END} bytes are not the end of one")
    here, entries, held, offset = struct.unpack("<HHII", tail[end + 8 : end + 20])
    start = size - END
    if (
        len(tail) == END64 and tail[end - 20 : end - 16] == b"PK\x06\x07"
    ):  # the end of a zip of 64-bit sizes is before it
        (place,) = struct.unpack("<Q", tail[end - 12 : end - 4])
        short = {here, entries} - {MANY}
        here, entries, held, offset = struct.unpack("<4Q", tail[24:56])
        start = place if short <= {entries} else -1
        if place != size - END64 or tail[:4] != b"PK\x06\x06":
            start = -1
    if offset + held != start or here != entries:
        raise explained(file, f"is a damaged zip file: its directory is not what its last {END} bytes say")
    return int(entries)


def read_legacy(file: Path, allowance: Allowance) -> Any:
    """Content of a file of the old format, whose tensors are views of the mapped file.

    Raises pickle.UnpicklingError if it contains code, and RuntimeError, EOFError and others if it is damaged.
    """
    with open_regular(file) as content:
        offsets = storage_offsets(content, file.stat().st_size, allowance)
        mapped = storage_of(content)

        def storage(key: str, dtype: Any, size: int) -> Any:
            return mapped[offsets[key] : offsets[key] + size]

        return read_pickles(content, storage, None)[0]


def storage_offsets(content: BinaryIO, size: int, allowance: Allowance) -> dict[str, int]:
    """Position of the values of each storage; raises RuntimeError if they do not fill the rest of the file."""
    import torch

    sizes: dict[str, tuple[int, int]] = {}

    def storage(key: str, dtype: Any, n_bytes: int) -> Any:
        sizes[key] = n_bytes, torch._utils._element_size(dtype)
        return torch.UntypedStorage(n_bytes, device="meta")

    _, keys = read_pickles(content, storage, allowance)
    if sorted(keys) != sorted(sizes):
        raise RuntimeError("it does not hold the storages that its tensors refer to")
    offsets, position = {}, content.tell()
    for key in keys:
        n_bytes, width = sizes[key]
        content.seek(position)
        held = int.from_bytes(content.read(COUNT_BYTES), "little")
        if held * width != n_bytes:
            raise RuntimeError(f"a storage of {held} numbers where its tensors refer to {n_bytes // width}")
        offsets[key] = position + COUNT_BYTES
        position = offsets[key] + n_bytes
    if position != size:
        raise RuntimeError(f"values up to byte {position} in a file of {size}")
    content.seek(0)
    return offsets


def read_pickles(content: BinaryIO, storage: Storage, allowance: Allowance | None) -> tuple[Any, list[str]]:
    """Content and keys of the storages of a file of the old format, without running code.

    allowance: None if the pickles were checked before. Raises the errors of `check_pickle`.
    """
    import torch
    from torch import _weights_only_unpickler

    def checked() -> BinaryIO:
        if allowance is not None:
            allowance.add_structure(content)
        return content

    def load() -> Any:
        return _weights_only_unpickler.load(checked(), encoding="utf-8")

    magic, protocol = load(), load()
    if (magic, protocol) != (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION):
        raise RuntimeError("it begins with other bytes")
    load()  # the system
    return unpickler(checked(), storage, parts=True).load(), load()


def unpickler(content: BinaryIO, storage: Storage, parts: bool) -> Any:
    """PyTorch's unpickler, which runs no code, at the position of a file, with storages of a function.

    The function is called once for each key. parts: whether tensors may refer to a part of a storage, which has a key
    of its own. `load` raises RuntimeError if they refer to a storage with different sizes or dtypes, or to different
    parts by one key.
    """
    import torch
    from torch import _weights_only_unpickler

    storages: dict[str, tuple[Any, int, Any]] = {}
    places: dict[str, tuple[str, int, int]] = {}  # of parts: key of the storage, first element, number of elements

    def persistent_load(saved: Any) -> Any:
        _, kind, key, _, count, *view = saved
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if type(count) is not int or count < 0:
            raise RuntimeError(f"storage {quoted(key)} has a number of elements of {quoted(count)}")
        width = torch._utils._element_size(dtype)
        if key in places:
            raise RuntimeError(f"its tensors refer to different values by the key {quoted(key)}")
        if key not in storages:
            storages[key] = dtype, count, storage(key, dtype, count * width)
        if storages[key][:2] != (dtype, count):
            raise RuntimeError(f"its tensors refer to different sizes or dtypes of the storage {quoted(key)}")
        held = storages[key][2]
        if view and view[0] is not None:
            known = parts and [*map(type, view[0])] == [str, int, int]
            part, start, length = view[0] if known else ("", -1, 0)
            if not 0 <= start <= start + length <= count:
                raise RuntimeError(f"its tensors refer to {quoted(view[0])} as a part of the storage {quoted(key)}")
            place = key, start, length
            if part in storages or places.setdefault(part, place) != place:
                raise RuntimeError(f"its tensors refer to different values by the key {quoted(part)}")
            held = part_of(held, start * width, length * width)
        return torch.storage.TypedStorage(wrap_storage=held, dtype=dtype, _internal=True)

    reader = _weights_only_unpickler.Unpickler(content, encoding="utf-8")
    reader.persistent_load = persistent_load  # type: ignore[method-assign]
    return reader


def part_of(storage: Any, start: int, size: int) -> Any:
    """Bytes of a storage, which share its memory; without values if it has none."""
    import torch

    if storage.device.type == "meta":
        return torch.UntypedStorage(size, device="meta")
    return storage[start : start + size]


@contextlib.contextmanager
def made_on_cpu() -> Iterator[None]:
    """Context in which PyTorch's unpickler makes tensors in the CPU's memory, and computes nothing.

    A pickle may have tensors of one number, repeated, converted to another dtype, which fills the memory. Raises
    RuntimeError for such operations. A nested tensor becomes an empty sparse one, which is no tensor of a model either.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Making(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # otherwise PyTorch imports its compiler with the first tensor, 20 MB

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            if name == NESTED:
                return torch.empty(0, layout=torch.sparse_coo)
            if name not in MAKING and not (name == EMPTY and 0 in args[0]):
                raise RuntimeError(f"its structure asks for the operation {name}")
            return func(*args, **(kwargs or {}))

    place: Any = torch.serialization._serialization_tls
    before, place.map_location = place.map_location, "cpu"  # as torch.load does for tensors of other devices
    sparse: list[Any] = torch._utils._sparse_tensors_to_validate  # the next torch.load would validate all of them
    validated = len(sparse)
    try:
        with Making():
            yield
    finally:
        place.map_location = before
        del sparse[validated:]
