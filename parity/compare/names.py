"""Names of a PyTorch module's parts, translated to Flax's: the argument `names` of `parity.check`.

It has one of these forms:

    mapping     {"wte": "embed", "h.*.attn": "blocks.*.attention"}. The name of a module applies to everything inside;
                `*` matches one word, and may be a part of one in the value, as in "block_*"; the matching key with the
                most words applies; None: no counterpart
    pairs       [(r"^h\\.(\\d+)", r"blocks.\\1"), …]: regular expressions and replacements, applied one after the other
    function    from a PyTorch name to Flax's name or None
    converter   a function from the state_dict to the Flax arrays: nested dicts, dicts by path or dotted name, an NNX
                State, or Linen's variables. It is then itself under test, see `parity.compare.weights.converter`

A list of Flax names instead of one splits a tensor; `parity.compare.weights` says how.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

Names = Mapping[str, Any] | Sequence[tuple[str, str]] | Callable[[str], Any]


def renamer(names: Names) -> Callable[[str], list[str] | None]:
    """A function from a PyTorch name to its Flax names, or None if it has no counterpart.

    Raises ValueError for names of another form, and for a mapping with more `*` in a value than in its key.
    """
    if callable(names):
        return lambda name: listed(names(name))
    if isinstance(names, Mapping):
        return starred(names)
    if isinstance(names, Sequence) and not isinstance(names, str) and all(len(pair) == 2 for pair in names):
        pairs = [(re.compile(pattern), replacement) for pattern, replacement in names]

        def replaced(name: str) -> list[str]:
            for pattern, replacement in pairs:
                name = pattern.sub(replacement, name)
            return [name]

        return replaced
    raise ValueError(f"names={names!r} must be a mapping, pairs (regular expression, replacement), or a function")


def starred(names: Mapping[str, Any]) -> Callable[[str], list[str] | None]:
    """`renamer` of a mapping."""
    rules = []
    for given, values in names.items():
        for value in listed(values) or []:
            if value.count("*") > given.count("*"):
                raise ValueError(f"names[{given!r}]={value!r} must not have more * than its key")
        words = given.split(".") if given else []
        pattern = r"\.".join(r"([^.]+)" if word == "*" else re.escape(word) for word in words)
        rules.append((len(words), re.compile(rf"{pattern}(?:\.|$)" if words else ""), listed(values)))
    rules.sort(key=lambda rule: -rule[0])

    def rename(name: str) -> list[str] | None:
        for _, pattern, values in rules:
            match = pattern.match(name)
            if match is None:
                continue
            if values is None:
                return None
            rest = name[match.end() :]
            filled = [fill(value, match.groups()) for value in values]
            return [".".join(part for part in (start, rest) if part) for start in filled]
        return [name]

    return rename


def fill(value: str, words: Sequence[str]) -> str:
    """Replace each `*` of a Flax name, also inside a word, by the word that the `*` of the PyTorch name matched."""
    given = iter(words)
    return re.sub(r"\*", lambda _: next(given), value)


def listed(value: Any) -> list[str] | None:
    """A name or several as a list; None stays None."""
    return value if value is None else [value] if isinstance(value, str) else list(value)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """True if a name is one of the patterns, such as `output[0]`, or matches one; `*` matches any text."""
    return any(name == pattern or fnmatch(name, pattern) for pattern in patterns)
