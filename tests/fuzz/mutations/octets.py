"""Changes of bytes, and of numbers and words in them, whatever the format."""

import re
from collections.abc import Callable

from tests.fuzz.mutations.values import INTEGERS, NUMBERS, STRINGS, Rng, choose

GROWTH = 10**7  # bytes that a change may add


def mutated_bytes(content: bytes, rng: Rng) -> bytes:
    """Content with one change."""
    return bytes(choose(rng, CHANGES)(bytearray(content), rng))


def place(content: bytearray, rng: Rng) -> int:
    """Random position, near the beginning in half of the cases: headers are there."""
    near = min(len(content), 256) if rng.random() < 0.5 else len(content)
    return int(rng.integers(near + 1))


def span(content: bytearray, rng: Rng, longest: int = 64) -> slice:
    """Random range of bytes."""
    first = place(content, rng)
    return slice(first, first + int(rng.integers(1, longest)))


def flipped(content: bytearray, rng: Rng) -> bytearray:
    """A few bits are inverted."""
    for _ in range(int(rng.integers(1, 9)) if content else 0):
        content[min(place(content, rng), len(content) - 1)] ^= 1 << int(rng.integers(8))
    return content


def cut(content: bytearray, rng: Rng) -> bytearray:
    """The end is missing."""
    return content[: int(rng.integers(len(content) + 1))]


def removed(content: bytearray, rng: Rng) -> bytearray:
    """Some bytes are missing."""
    del content[span(content, rng)]
    return content


def doubled(content: bytearray, rng: Rng) -> bytearray:
    """Some bytes are repeated elsewhere."""
    part = content[span(content, rng)]
    first = place(content, rng)
    content[first:first] = part * int(rng.integers(1, 5))
    return content


def inserted(content: bytearray, rng: Rng) -> bytearray:
    """Random bytes are added."""
    first = place(content, rng)
    content[first:first] = rng.bytes(int(rng.integers(1, 64)))
    return content


def zeroed(content: bytearray, rng: Rng) -> bytearray:
    """Some bytes become 0 or 255."""
    part = span(content, rng)
    content[part] = bytes([choose(rng, (0, 255))]) * len(content[part])
    return content


def extended(content: bytearray, rng: Rng) -> bytearray:
    """Zeros are appended."""
    return content + bytes(int(rng.integers(1, 4096)))


def counted(content: bytearray, rng: Rng) -> bytearray:
    """Four or eight bytes become a number that a length or an offset may have."""
    width = choose(rng, (4, 8))
    first = max(0, min(place(content, rng), len(content) - width))
    content[first : first + width] = (choose(rng, INTEGERS) % 2 ** (8 * width)).to_bytes(width, "little")
    return content


def renumbered(content: bytearray, rng: Rng) -> bytes:
    """A decimal number in a text becomes another."""
    return replaced(content, rb"\d+", str(choose(rng, NUMBERS)).encode(), rng)


def renamed(content: bytearray, rng: Rng) -> bytes:
    """A word becomes an odd one."""
    return replaced(content, rb"[A-Za-z_][\w.]{2,}", choose(rng, STRINGS).encode("utf-8", "surrogatepass"), rng)


def replaced(content: bytearray, pattern: bytes, new: bytes, rng: Rng) -> bytes:
    """One match of a pattern is replaced, if there is any."""
    found = list(re.finditer(pattern, content))
    if not found:
        return bytes(content)
    start, end = choose(rng, found).span()
    return bytes(content[:start]) + new + bytes(content[end:])


def relined(content: bytes, rng: Rng) -> bytes:
    """A line of a text is removed, repeated, moved or made long; at most `GROWTH` bytes are added."""
    lines = content.split(b"\n")
    i = int(rng.integers(len(lines)))
    most = GROWTH // (len(lines[i]) + 1)
    change = int(rng.integers(4))
    if change == 0:
        del lines[i]
    elif change == 1:
        lines[i:i] = [lines[i]] * min(int(rng.integers(1, 1000)), most)
    elif change == 2:
        lines.insert(int(rng.integers(len(lines))), lines.pop(i))
    else:
        lines[i] = lines[i] * min(int(rng.integers(2, 10_000)), 1 + most)
    return b"\n".join(lines)


CHANGES: tuple[Callable[[bytearray, Rng], bytes | bytearray], ...] = (
    *(flipped, cut, removed, doubled, inserted, zeroed, extended, counted, renumbered, renamed),
)
