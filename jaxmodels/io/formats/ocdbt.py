"""Names and shapes of the arrays in an Orbax folder, read by TensorStore in a child process of `process.confined`.

Orbax's key-value store is a tree whose nodes are compressed: a kilobyte may stand for 32 MB of keys, and one value of a
megabyte for those of a thousand keys. What a child with limits has read, the process that started it can read too.

Then the arrays: their chunks are read by the process itself. Each is of the one kind that Orbax writes, a shard with a
single chunk in it that is compressed once, so that a byte of it is decompressed once, and is in the store; and all
values of the store together are no larger than its files, so that no byte of them is read for many chunks.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels.process.texts import quoted, shortened

ZARR, OLDER_ZARR = "zarr.json", (".zarray", ".zgroup")  # ends of the keys with the descriptions of arrays
ZARR_BYTES = 2**16  # of one; 500 for an array of two axes
NAMES_BYTES = 2**26  # of all keys
# Names of codecs: of an array, of the chunks in its shards, and of a shard's index. zstd after zstd may grow a
# milliardfold, and blosc takes what its header says.
CODECS, INNER_CODECS, INDEX_CODECS = ["sharding_indexed"], ["bytes", "zstd"], ["bytes", "crc32c"]
CHUNKS, BYTES_PER_CHUNK = 10_000, 500  # so many take 2 seconds; one more for so many bytes of files
INLINE_BYTES = 2**26  # of all values in nodes, which are compressed; Orbax stores those of at most 100 bytes there
# Threads of TensorStore, each of which takes memory for its stack.
CONTEXT = {name: {"limit": 1} for name in ("file_io_concurrency", "data_copy_concurrency")}


def operations() -> Mapping[str, Callable[..., Any]]:
    """Operation `shapes`."""
    import tensorstore

    def shapes(place: str, held: int) -> dict[str, list[int]]:
        """Shapes by name of the arrays in a folder whose files have `held` bytes.

        Raises ValueError as `grid_of`, for an older format, and for chunks that are many, absent or shared.
        """
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{place}/"}}
        store = tensorstore.KvStore.open(spec, context=tensorstore.Context(CONTEXT)).result()
        found = store.list().result()
        if sum(map(len, found)) > NAMES_BYTES:
            raise ValueError(f"its {len(found):,} keys have more than {NAMES_BYTES:,} bytes")
        if len(found) > (most := CHUNKS + held // BYTES_PER_CHUNK):
            raise ValueError(f"it has {len(found):,} keys in files of {held:,} bytes; at most {most:,} are read")
        keys = [key.decode() for key in found]
        if older := [key for key in keys if key.endswith(OLDER_ZARR)]:
            raise ValueError(f"{quoted(older[0])} is of zarr's second version, which is not read")
        names = [key.removesuffix(f"/{ZARR}") for key in keys if key.endswith(f"/{ZARR}")]
        texts = [store.read(f"{name}/{ZARR}") for name in names]
        grids = {name: grid_of(name, text.result().value) for name, text in zip(names, texts, strict=True)}
        if (chunks := sum(count for _, count in grids.values())) > len(keys) - len(names):
            raise ValueError(f"its arrays have {chunks:,} chunks, of which {len(keys) - len(names):,} are stored")
        if (size := size_of_values(store.base)) > held + INLINE_BYTES:
            raise ValueError(f"its values have {size:,} bytes in files of {held:,}")
        return {name: shape for name, (shape, _) in grids.items()}

    def size_of_values(base: Any) -> int:
        """Bytes of all values of the store in a folder."""
        size = 0
        version = tensorstore.ocdbt.dump(base).result()["versions"][-1]  # the last one is read
        nodes = [version["root"]["location"]] if "location" in version["root"] else []
        while nodes:
            for entry in tensorstore.ocdbt.dump(base, nodes.pop()).result()["entries"]:
                if "location" in entry:
                    nodes.append(entry["location"])
                elif "inline_value" in entry:
                    size += len(entry["inline_value"])
                else:
                    size += int(entry["indirect_value"].rpartition(":")[2])
        return size

    return {"shapes": shapes}


def grid_of(name: str, text: bytes) -> tuple[list[int], int]:
    """Shape of an array and number of its chunks, from its zarr.json.

    Raises ValueError if it has chunks that are larger than the array, in other chunks or in codecs other than Orbax's.
    """
    if len(text) > ZARR_BYTES:
        raise ValueError(f"{ZARR} of {quoted(name)} has {len(text):,} bytes; at most {ZARR_BYTES:,} are read")
    try:
        about = json.loads(text)
        shape, chunk = whole(about["shape"]), whole(about["chunk_grid"]["configuration"]["chunk_shape"])
        check_codecs(name, names_of(about["codecs"]), CODECS)
        sharding = about["codecs"][0]["configuration"]
        check_codecs(name, names_of(sharding["codecs"]), INNER_CODECS)
        check_codecs(name, names_of(sharding["index_codecs"]), INDEX_CODECS)
        inner = whole(sharding["chunk_shape"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{ZARR} of {quoted(name)} is damaged: {shortened(repr(error), 200)}") from None
    if len(chunk) != len(shape) or any(not 0 < n <= max(1, most) for n, most in zip(chunk, shape, strict=True)):
        raise ValueError(f"{quoted(name)} has chunks of {quoted(chunk)} in shape {quoted(shape)}")
    if inner != chunk:
        raise ValueError(f"{quoted(name)} has chunks of {quoted(inner)} in chunks of {quoted(chunk)}")
    return shape, math.prod(-(-n // size) for n, size in zip(shape, chunk, strict=True))


def names_of(codecs: Any) -> list[Any]:
    """Names of codecs in their order."""
    return [codec["name"] for codec in codecs]


def check_codecs(name: str, found: list[Any], allowed: list[str]) -> None:
    """Raise ValueError unless an array has the codecs that Orbax writes."""
    if found != allowed:
        raise ValueError(f"{quoted(name)} has codecs={quoted(found)}, must be {allowed}")


def whole(numbers: Any) -> list[int]:
    """Shape from a value of a JSON text; raises TypeError if it is not a list of whole numbers."""
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError(f"a shape of {quoted(numbers)}")
    return numbers
