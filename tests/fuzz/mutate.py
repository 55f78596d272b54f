"""Mutations of files: bytes, numbers and names in them, JSON values, entries of zip files, kinds of files.

Every function takes a random generator, so that a seed gives the same file again.
"""

import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator

INTEGERS = (0, 1, -1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**9)
NUMBERS: tuple[Any, ...] = (*INTEGERS, 10**300, 0.5, -0.0, 1e308, float("nan"), float("inf"))
STRINGS = (
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "\x1b]0;title\x07\x1b[2J",
    "\u202egnp.exe",
    "a" * 20_000,
    "\x00",
    "NaN",
    "1e400",
    "-1",
    "float8_e4m3fn",
    "layers.9999999999.attention.output.weight",
    "__class__",
    "name",
)


def mutated_bytes(content: bytes, rng: Rng) -> bytes:
    """Content with one change of bytes, of a number or of a name."""
    changes: tuple[Callable[[bytearray, Rng], bytes | bytearray], ...] = (
        flipped,
        cut,
        removed,
        doubled,
        inserted,
        extended,
        counted,
        renumbered,
        renamed,
    )
    return bytes(choose(rng, changes)(bytearray(content), rng))


def choose(rng: Rng, values: Any) -> Any:
    """One of several values, of any type."""
    return values[int(rng.integers(len(values)))]


def span(content: bytearray, rng: Rng, longest: int = 64) -> slice:
    """A random range of bytes."""
    first = int(rng.integers(len(content) + 1))
    return slice(first, first + int(rng.integers(1, longest)))


def flipped(content: bytearray, rng: Rng) -> bytearray:
    for _ in range(int(rng.integers(1, 9)) if content else 0):
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    return content


def cut(content: bytearray, rng: Rng) -> bytearray:
    return content[: int(rng.integers(len(content) + 1))]


def removed(content: bytearray, rng: Rng) -> bytearray:
    del content[span(content, rng)]
    return content


def doubled(content: bytearray, rng: Rng) -> bytearray:
    part = content[span(content, rng)]
    place = int(rng.integers(len(content) + 1))
    content[place:place] = part * int(rng.integers(1, 5))
    return content


def inserted(content: bytearray, rng: Rng) -> bytearray:
    place = int(rng.integers(len(content) + 1))
    content[place:place] = rng.bytes(int(rng.integers(1, 64)))
    return content


def extended(content: bytearray, rng: Rng) -> bytearray:
    return content + bytes(int(rng.integers(1, 4096)))


def counted(content: bytearray, rng: Rng) -> bytearray:
    """Eight bytes become a number that a length or an offset may have."""
    place = int(rng.integers(max(1, len(content) - 8)))
    content[place : place + 8] = (choose(rng, INTEGERS) % 2**64).to_bytes(8, "little")
    return content


def renumbered(content: bytearray, rng: Rng) -> bytes:
    """A decimal number in a text becomes another."""
    return replaced(content, rb"\d+", str(choose(rng, NUMBERS)).encode(), rng)


def renamed(content: bytearray, rng: Rng) -> bytes:
    """A quoted or plain word becomes an odd one."""
    return replaced(content, rb"[A-Za-z_][\w.]{2,}", choose(rng, STRINGS).encode(), rng)


def replaced(content: bytearray, pattern: bytes, new: bytes, rng: Rng) -> bytes:
    found = list(re.finditer(pattern, content))
    if not found:
        return bytes(content)
    start, end = choose(rng, found).span()
    return bytes(content[:start]) + new + bytes(content[end:])


def mutated_json(content: bytes, rng: Rng) -> bytes:
    """A JSON text with one value changed, added, removed or doubled."""
    tree = {"": json.loads(content)}
    holder, key = choose(rng, list(places(tree)))
    change = int(rng.integers(6))
    if change == 0 and holder is not tree:
        del holder[key]
    elif change == 1:
        holder[key] = nested(int(rng.integers(1, 2000)))
    elif change == 2 and isinstance(holder, dict) and holder is not tree:
        holder[choose(rng, STRINGS)] = holder[key]
    elif change == 3 and isinstance(holder, list):
        holder.extend([holder[key]] * int(rng.integers(1, 1000)))
    else:
        holder[key] = choose(rng, (*NUMBERS, *STRINGS, None, True, [], {}, [[]], {"": {}}))
    return json.dumps(tree[""]).encode("utf-8", "backslashreplace")


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = 1
    for _ in range(min(depth, 400)):
        value = [value]
    return value


def places(tree: Any) -> Any:
    """Every (holder, key) of a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def mutated_safetensors(content: bytes, rng: Rng) -> bytes:
    """A safetensors file whose header is changed as JSON, with the right length."""
    size = int.from_bytes(content[:8], "little")
    header = mutated_json(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def mutated_zip(content: bytes, rng: Rng) -> bytes:
    """A zip file, such as a .pt, with one entry changed, compressed, doubled, renamed or left out."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    i = int(rng.integers(len(entries)))
    name, data = entries[i]
    out, method, change = io.BytesIO(), zipfile.ZIP_STORED, int(rng.integers(6))
    if change == 0:
        method = zipfile.ZIP_DEFLATED
    elif change == 1:
        del entries[i]
    elif change == 2:
        entries[i] = (f"{name.partition('/')[0]}/{choose(rng, STRINGS)[:200]}", data)
    elif change == 3:
        entries[i] = (name, bytes(int(rng.integers(1, 10**6))))
    else:
        entries[i] = (name, mutated_bytes(data, rng))
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name.replace("\x00", "0") or "empty", data)
    return out.getvalue()


def exchanged(file: Path, rng: Rng) -> None:
    """The file becomes a FIFO, a folder, a sparse file, empty, or a link to a device, to nothing or to itself."""
    file.unlink()
    kind = int(rng.integers(7))
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        with file.open("wb") as opened:
            opened.truncate(10**12)
    elif kind == 3:
        file.touch()
    else:
        file.symlink_to(("/dev/zero", "nowhere", file.name)[kind - 4])


def mutate(folder: Path, pattern: str, rng: Rng) -> None:
    """Change one file of a folder in one to three ways."""
    files = sorted(file for file in folder.rglob(pattern) if file.is_file())
    file = choose(rng, files)
    if rng.random() < 0.05:
        exchanged(file, rng)
        return
    for _ in range(int(rng.integers(1, 4))):
        content = file.read_bytes()
        try:
            file.write_bytes(choose(rng, fitting(content))(content, rng))
        except (ValueError, zipfile.BadZipFile, UnicodeError, RecursionError, NotImplementedError):
            file.write_bytes(mutated_bytes(content, rng))  # it is no longer of that format


def fitting(content: bytes) -> list[Callable[[bytes, Rng], bytes]]:
    """Mutations that a content allows."""
    found: list[Callable[[bytes, Rng], bytes]] = [mutated_bytes]
    if content[:4] == b"PK\x03\x04":
        found += [mutated_zip] * 2
    elif content[:1] in (b"{", b"["):
        found += [mutated_json] * 2
    elif content[8:9] == b"{":
        found += [mutated_safetensors] * 2
    return found


def copied(template: Path, folder: Path) -> Path:
    """A fresh copy of a template."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)
    return folder
