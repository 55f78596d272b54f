"""Changes of zip files, such as those of torch.save and np.savez: entries, their order, and the central directory."""

import io
import lzma
import struct
import warnings
import zipfile
import zlib

from tests.fuzz.mutations.octets import mutated_bytes
from tests.fuzz.mutations.pickles import mutated_pickle
from tests.fuzz.mutations.values import INTEGERS, STRINGS, Rng, choose

# Offset and width of the fields in an entry of the central directory, in a local header, and in the last record.
CENTRAL = ((4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4))
LOCAL = ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))
LAST = ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))
RECORDS = ((b"PK\x01\x02", CENTRAL), (b"PK\x03\x04", LOCAL), (b"PK\x05\x06", LAST))


def mutated_zip(content: bytes, rng: Rng) -> bytes:
    """Zip file with one entry or field changed; raises zipfile.BadZipFile if it is none."""
    if rng.random() < 0.3:
        return mutated_record(content, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except (lzma.LZMAError, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise zipfile.BadZipFile(str(error)) from None  # it was changed before
    i = int(rng.integers(len(entries)))
    pickles = [j for j, (name, _) in enumerate(entries) if name.endswith("data.pkl")]
    if pickles and rng.random() < 0.5:
        i = pickles[0]
    name, data = entries[i]
    method, change = zipfile.ZIP_STORED, int(rng.integers(8))
    if change == 0:
        method = choose(rng, (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif change == 1:
        del entries[i]
    elif change == 2:
        entries[i] = (f"{name.partition('/')[0]}/{choose(rng, STRINGS)[:200]}", data)
    elif change == 3:
        entries[i] = (name, bytes(int(rng.integers(1, 10**6))))
    elif change == 4:
        entries.insert(int(rng.integers(len(entries))), (name, choose(rng, entries)[1]))
    elif change == 5:
        entries[i] = (name, choose(rng, entries)[1])
    elif name.endswith("data.pkl"):
        entries[i] = (name, mutated_pickle(data, rng))
    else:
        entries[i] = (name, mutated_bytes(data, rng))
    return zipped(entries, method)


def zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """Zip file of entries, whose names may be repeated."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # of a repeated name
        for name, data in entries:
            archive.writestr(name.encode("utf-8", "replace").decode().replace("\x00", "0") or "empty", data)
    return out.getvalue()


def mutated_record(content: bytes, rng: Rng) -> bytes:
    """Zip file with one field of its directory or of a header changed: sizes, offsets, methods, flags."""
    signature, fields = choose(rng, RECORDS)
    starts = [i for i in range(len(content) - 4) if content[i : i + 4] == signature]
    if not starts:
        return content
    offset, width = choose(rng, fields)
    first = choose(rng, starts) + offset
    changed = bytearray(content)
    near = int.from_bytes(content[first : first + width], "little") + int(rng.integers(-64, 65))
    value = choose(rng, (near, near, int(rng.integers(20)), len(content), *INTEGERS[:10])) % 2 ** (8 * width)
    changed[first : first + width] = struct.pack("<Q", value)[:width]
    return bytes(changed)
