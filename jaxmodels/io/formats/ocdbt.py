"""Names and shapes of the arrays in an Orbax folder, read by TensorStore in a child process of `process.confined`.

Orbax's key-value store is a tree whose nodes are compressed: a kilobyte may stand for 32 MB of keys, and one value of a
megabyte for those of a thousand keys. What a child with limits has read, the process that started it can read too.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels.process.texts import quoted, shortened

ZARR, OLDER_ZARR = "zarr.json", (".zarray", ".zgroup")  # ends of the keys with the descriptions of arrays
ZARR_BYTES = 2**16  # of one; 500 for an array of two axes
NAMES_BYTES = 2**26  # of all keys
SHARDING = "sharding_indexed"  # the codec of chunks in chunks
# Threads of TensorStore, each of which takes memory for its stack.
CONTEXT = {name: {"limit": 1} for name in ("file_io_concurrency", "data_copy_concurrency")}


def operations() -> Mapping[str, Callable[..., Any]]:
    """Operation `shapes`."""
    import tensorstore

    def shapes(place: str) -> dict[str, list[int]]:
        """Shapes by name of the arrays in a folder; raises ValueError as `shape_of`, or for an older format."""
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{place}/"}}
        store = tensorstore.KvStore.open(spec, context=tensorstore.Context(CONTEXT)).result()
        found = store.list().result()
        if sum(map(len, found)) > NAMES_BYTES:
            raise ValueError(f"its {len(found):,} keys have more than {NAMES_BYTES:,} bytes")
        keys = [key.decode() for key in found]
        if older := [key for key in keys if key.endswith(OLDER_ZARR)]:
            raise ValueError(f"{quoted(older[0])} is of zarr's second version, which is not read")
        names = [key.removesuffix(f"/{ZARR}") for key in keys if key.endswith(f"/{ZARR}")]
        texts = [store.read(f"{name}/{ZARR}") for name in names]
        return {name: shape_of(name, text.result().value) for name, text in zip(names, texts, strict=True)}

    return {"shapes": shapes}


def shape_of(name: str, text: bytes) -> list[int]:
    """Shape of an array from its zarr.json; raises ValueError if its chunks are larger than the array."""
    if len(text) > ZARR_BYTES:
        raise ValueError(f"{ZARR} of {quoted(name)} has {len(text):,} bytes; at most {ZARR_BYTES:,} are read")
    try:
        about = json.loads(text)
        shape = whole(about["shape"])
        inner = [codec["configuration"] for codec in about["codecs"] if codec["name"] == SHARDING]
        chunks = [whole(part["chunk_shape"]) for part in (about["chunk_grid"]["configuration"], *inner)]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{ZARR} of {quoted(name)} is damaged: {shortened(repr(error), 200)}") from None
    for chunk in chunks:
        if len(chunk) != len(shape) or any(n > max(1, most) for n, most in zip(chunk, shape, strict=True)):
            raise ValueError(f"{quoted(name)} has chunks of {quoted(chunk)} in shape {quoted(shape)}")
    return shape


def whole(numbers: Any) -> list[int]:
    """Shape from a value of a JSON text; raises TypeError if it is not a list of whole numbers."""
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError(f"a shape of {quoted(numbers)}")
    return numbers
