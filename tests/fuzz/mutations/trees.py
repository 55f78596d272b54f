"""Changes of JSON, JSON lines and YAML texts as trees: values, keys, containers."""

import json
from collections.abc import Iterator
from typing import Any

from tests.fuzz.mutations.octets import relined
from tests.fuzz.mutations.values import RAW, STRINGS, Rng, alike, choose, odd_value

MARKER = "\ue000raw\ue000"  # stands for a text that json.dumps would not write

YAML: tuple[str, ...] = (
    '!!python/object/apply:os.system ["touch ../beside/run"]',
    "!!python/name:os.system",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!timestamp 2001-99-99",
    "2001-99-99",
    "2001-01-01T25:61:61Z",
    "1:60:" + "59:" * 2_000 + "1",
    "0x" + "f" * 5_000,
    "9" * 5_000,
    "1" + "0" * 400,
    "." + "9" * 400 + "e999999",
    "1e999999999",
    ".nan",
    ".inf",
    "-.inf",
    "~",
    "yes",
    '"\\x1b[2J\\x07"',
    '"\\0"',
    "\x1b[2J",
    "&a [*a]",
    "&a {a: *a}",
    "[&a [1, 1], *a, *a]",
    "*unknown",
    "{" + "a: {" * 500 + "}" * 501,
    "[" * 5_000,
    "[" * 400 + "]" * 400,
    "|\n  text\n  more",
    ">-\n" + "  folded\n" * 500,
    "? complex\n: key",
    "<<: {hidden_size: 1}",
    "[a, b, {c: d}]",
    "{[1, 2]: 3}",
    "--- \n---\na: 1",
    "%YAML 9.9",
    "\tindented",
    "@at",
    "- item",
    "''",
    "'" + "b" * 100_000 + "'",
    "[" + "1, " * 40_000 + "1]",
)


def mutated_json(content: bytes, rng: Rng) -> bytes:
    """JSON text with one value or key changed, added, removed or repeated; raises ValueError if it is not JSON."""
    tree = {"": json.loads(content)}
    holder, key = choose(rng, list(places(tree)))
    raw, change = "", int(rng.integers(9))
    if change == 0 and holder is not tree:
        del holder[key]
    elif change == 1 and isinstance(holder, dict) and holder is not tree:
        holder[choose(rng, STRINGS)] = holder[key]
    elif change == 2 and isinstance(holder, dict) and holder is not tree:  # another key of the same name
        raw, holder[MARKER] = json.dumps(key), odd_value(rng)
    elif change == 3 and isinstance(holder, list):
        holder.extend([holder[key]] * int(rng.integers(1, 1000)))
    elif change in (4, 5):
        raw, holder[key] = choose(rng, RAW), MARKER
    elif change == 8 and isinstance(holder[key], int):
        holder[key] = alike(holder[key], rng)
    elif change == 6 and holder is not tree:
        other, other_key = choose(rng, list(places(tree[""])))
        holder[key] = json.loads(json.dumps(other[other_key]))
    else:
        holder[key] = odd_value(rng)
    text = json.dumps(tree[""], ensure_ascii=bool(rng.integers(2)))
    marker = json.dumps(MARKER) if json.dumps(MARKER) in text else json.dumps(MARKER, ensure_ascii=False)
    return text.replace(marker, raw).encode("utf-8", "surrogatepass")


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key of a tree of objects and arrays, a holder's before those in its values."""
    left = [tree]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
        left += [holder[key] for key in keys]


def mutated_lines(content: bytes, rng: Rng) -> bytes:
    """JSON lines, of which one is changed as JSON or as a line."""
    if rng.random() < 0.3:
        return relined(content, rng)
    lines = content.split(b"\n")
    i = choose(rng, [i for i, line in enumerate(lines) if line] or [0])
    lines[i] = mutated_json(lines[i], rng)
    return b"\n".join(lines)


def mutated_yaml(content: bytes, rng: Rng) -> bytes:
    """YAML text of settings, of which one is changed, repeated or added."""
    lines = content.decode("utf-8").split("\n")
    i = choose(rng, [i for i, line in enumerate(lines) if ":" in line] or [0])
    name = lines[i].partition(":")[0]
    change = int(rng.integers(5))
    if change == 0:
        lines.insert(i, f"{name}: {choose(rng, YAML)}")
    elif change == 1:
        lines.insert(i, choose(rng, YAML))
    elif change == 2:
        lines[i] = f"{json.dumps(choose(rng, STRINGS))}: {lines[i].partition(':')[2]}"
    elif change == 3:
        value = odd_value(rng)
        lines[i] = f"{name}: {json.dumps(value) if isinstance(value, str | list | dict) else value}"
    else:
        lines[i] = f"{name}: {choose(rng, YAML)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def is_lines(content: bytes) -> bool:
    """True for JSON lines: a text of several lines that each look like an object."""
    lines = content.removesuffix(b"\n").split(b"\n")
    return len(lines) > 1 and all(line.startswith(b"{") and line.endswith(b"}") for line in lines)
