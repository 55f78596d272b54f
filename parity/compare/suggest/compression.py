"""Write a mapping of tensors as few names: numbers become `*`, and what an enclosing part implies is left out."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from parity.compare.names import starred as renamer
from parity.compare.suggest.layers import Pair
from parity.compare.weights.owners import WORDS

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def compressed(
    pairs: Sequence[Pair], containers: Sequence[tuple[str, str]], dropped: Iterable[str], order: Sequence[str]
) -> dict[str, Any]:
    """Names from pairs of tensors and of containers, outer ones first; dropped: tensors without a counterpart.

    order: PyTorch's paths in the order of definition.
    If the short form would not map every tensor as given, the names of the tensors are returned as they are.
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
        general = None if targets is None else [NUMBER.sub("*", t) for t in targets]
        alike = [n for n in entries if NUMBER.sub("*", n) == pattern]
        trial = renamer({pattern: general})
        stars = pattern.count("*")
        if all(t.count("*") <= stars for t in general or []) and all(trial(n) == entries[n] for n in alike):
            names[pattern] = single(general)
            done.add(pattern)
        else:
            names[name] = single(targets)
        rename = renamer(names)
    if all(rename(key) == targets for key, targets in wanted.items()):
        return names
    return {key: single(targets) for key, targets in exact.items()}


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
