"""Write a mapping of tensors as few names: numbers become `*`, and what an enclosing part implies is left out."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from parity.compare.names import starred as renamer
from parity.compare.suggest.layers import Pair
from parity.compare.weights.owners import WORDS

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
IN_WORD = re.compile(r"(?<!\d)\d+(?![^.])")  # at the end of a word, as in block_0
MOST = 6  # numbers of a Flax name that may be those of PyTorch's


def compressed(
    pairs: Sequence[Pair], containers: Sequence[tuple[str, str]], dropped: Iterable[str], order: Sequence[str]
) -> dict[str, Any]:
    """Names from pairs of tensors and of containers, outer ones first; dropped: tensors without a counterpart.

    order: PyTorch's paths in the order of definition. If the short form would not map every tensor as given, the names
    of the tensors are returned as they are.
    """
    exact: dict[str, list[str] | None] = {p.key: list(p.targets) for p in pairs} | dict.fromkeys(dropped)
    wanted = {key: implied(key, targets) for key, targets in exact.items()}
    entries: dict[str, list[str] | None] = {a: [b] for a, b in reversed(containers) if a}
    entries |= owners(pairs) | wanted
    names: dict[str, Any] = {}
    rename = renamer(names)
    done: set[str] = set()
    places = {path: i for i, path in enumerate(order)}
    for name in sorted(entries, key=lambda n: (n.count("."), places.get(n, len(places)))):
        pattern = NUMBER.sub("*", name)
        targets = entries[name]
        if pattern in done or rename(name) == targets:
            continue
        alike = [n for n in entries if NUMBER.sub("*", n) == pattern]
        general = next((g for g in generals(name, targets) if covers(pattern, g, alike, entries)), None)
        dropped_all = targets is None and all(entries[n] is None for n in alike)
        if general is not None or dropped_all:
            names[pattern] = single(general)
            done.add(pattern)
        else:
            names[name] = single(targets)
        rename = renamer(names)
    if all(rename(key) == targets for key, targets in wanted.items()):
        return names
    return {key: single(targets) for key, targets in exact.items()}


def generals(name: str, targets: list[str] | None) -> Iterator[list[str]]:
    """Flax's names with `*` for numbers of PyTorch's name, the leftmost that are equal."""
    stars = len(NUMBER.findall(name))
    for numbers in itertools.combinations(range(MOST), stars) if targets is not None else ():
        found = []
        for target in targets or []:
            places = [m.span() for m in IN_WORD.finditer(target)]
            if any(i >= len(places) for i in numbers):
                break
            for i in reversed(numbers):
                target = target[: places[i][0]] + "*" + target[places[i][1] :]
            found.append(target)
        else:
            yield found
    if targets is not None and stars:
        yield targets  # one array for all layers


def covers(pattern: str, general: list[str], alike: Sequence[str], entries: Mapping[str, list[str] | None]) -> bool:
    """True if a general entry maps every name of its form as wanted."""
    rename = renamer({pattern: general})
    return all(rename(name) == entries[name] for name in alike)


def implied(key: str, targets: list[str] | None) -> list[str] | None:
    """Flax's names with PyTorch's last word where the one stands for the other: kernel is weight."""
    if targets is None:
        return None
    last = key.rpartition(".")[2]
    words = WORDS.get(last, ())
    return [".".join([*t.split(".")[:-1], last]) if t.rpartition(".")[2] in words else t for t in targets]


def owners(pairs: Sequence[Pair]) -> dict[str, list[str] | None]:
    """Names of layers: those whose tensors all are in the same Flax layers, under the same names."""
    found: dict[str, set[tuple[str, ...] | None]] = {}
    for pair in pairs:
        owner, _, last = pair.key.rpartition(".")
        flax = implied(pair.key, list(pair.targets)) or []
        same = all(t.rpartition(".")[2] == last for t in flax)
        found.setdefault(owner, set()).add(tuple(t.rpartition(".")[0] for t in flax) if same else None)
    return {owner: list(places) for owner, kinds in found.items() if len(kinds) == 1 and (places := next(iter(kinds)))}


def single(targets: list[str] | None) -> Any:
    """One name instead of a list of one."""
    return targets[0] if targets is not None and len(targets) == 1 else targets
