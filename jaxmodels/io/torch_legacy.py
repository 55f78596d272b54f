"""PyTorch files in the format before torch 1.6, which is no zip, memory-mapped.

    a pickle each: magic number, protocol, system, the content (tensors refer to storages by key), list of keys
    for each key: number of elements, 8 bytes, then the values

`torch.load` reads such a file as a whole.
"""

from pathlib import Path
from typing import Any, BinaryIO

from jaxmodels.weights.pickles import check_work

COUNT_BYTES = 8


def read_legacy(file: Path) -> Any:
    """Content of a file, whose tensors are views of the mapped file.

    Raises pickle.UnpicklingError if it contains code, and RuntimeError, EOFError and others if it is damaged.
    """
    import torch

    with file.open("rb") as content:
        offsets = storage_offsets(content, file.stat().st_size)
        mapped = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)

        def storage(key: str, count: int, width: int) -> Any:
            return mapped[offsets[key] : offsets[key] + count * width]

        return read_pickles(content, storage)[0]


def storage_offsets(content: BinaryIO, size: int) -> dict[str, int]:
    """Position of the values of each storage; raises RuntimeError if they do not fill the rest of the file."""
    import torch

    sizes: dict[str, tuple[int, int]] = {}

    def storage(key: str, count: int, width: int) -> Any:
        sizes[key] = count, width
        return torch.UntypedStorage(count * width, device="meta")

    _, keys = read_pickles(content, storage)
    if sorted(keys) != sorted(sizes):
        raise RuntimeError("it does not hold the storages that its tensors refer to")
    offsets, position = {}, content.tell()
    for key in keys:
        count, width = sizes[key]
        content.seek(position)
        held = int.from_bytes(content.read(COUNT_BYTES), "little")
        if held != count:
            raise RuntimeError(f"a storage of {held} numbers where its tensors refer to {count}")
        offsets[key] = position + COUNT_BYTES
        position = offsets[key] + count * width
    if position != size:
        raise RuntimeError(f"values up to byte {position} in a file of {size}")
    content.seek(0)
    return offsets


def read_pickles(content: BinaryIO, storage: Any) -> tuple[Any, list[str]]:
    """Content and keys of the storages, without running code.

    storage: function of a key, a number of values and the bytes of each.
    """
    import torch
    from torch import _weights_only_unpickler as unpickler

    storages: dict[Any, Any] = {}

    def persistent_load(saved: Any) -> Any:
        _, kind, key, _, count, view = saved
        width = torch._utils._element_size(kind.dtype)
        if key not in storages:
            storages[key] = storage(key, count, width)
        held = storages[key]
        if view is not None:  # a part of the storage
            _, start, length = view
            held = held[start * width : (start + length) * width]
        return torch.storage.TypedStorage(wrap_storage=held, dtype=kind.dtype, _internal=True)

    def load() -> Any:
        return unpickler.load(counted(content), encoding="utf-8")

    magic, protocol = load(), load()
    if (magic, protocol) != (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION):
        raise RuntimeError("it begins with other bytes")
    load()  # the system
    reader = unpickler.Unpickler(counted(content), encoding="utf-8")
    reader.persistent_load = persistent_load  # type: ignore[method-assign]
    return reader.load(), load()


def counted(content: BinaryIO) -> BinaryIO:
    """The same file, if the pickle at its position asks for a bounded amount of work; raises TooMuchError otherwise."""
    position = content.tell()
    check_work(content)
    content.seek(position)
    return content
