"""Prefixes that wrappers of PyTorch add to the names of tensors: found, proposed, and removed on request.

`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` of Lightning, `base_model.model.` of PEFT, or any
other; in front of the names, or inside of them if a part of the model was wrapped.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxmodels.process.texts import quoted, shortened

LONGEST = 200  # characters of a name in a text
SAMPLE = 1000  # names that are looked at, evenly spaced in their order: each takes a moment
MOST_WORDS, LONGEST_NAME = 30, 1000  # of a name; those of wrapped models have up to 15 words and 100 characters


def prefix_of(names: Iterable[str], known: Callable[[str], bool]) -> str | None:
    """Words to remove from names to make them known ones, e.g. 'module.'; None if most of the others do not have them.

    known: True for the name of a tensor of the model.
    """
    names = set(names)
    unknown = sorted(name for name in names if not known(name))
    unknown = unknown[:: 1 + len(unknown) // SAMPLE]

    def missing(name: str) -> bool:
        return known(name) and name not in names

    found = collections.Counter(words for words in (removable(name, missing) for name in unknown) if words is not None)
    if not found:
        return None
    prefix, count = found.most_common(1)[0]
    return prefix if 2 * count >= len(unknown) else None


def removable(name: str, known: Callable[[str], bool]) -> str | None:
    """Shortest run of words of a name, the first one if possible, without which it is known."""
    words = name.split(".", MOST_WORDS)
    if len(words) > MOST_WORDS or len(name) > LONGEST_NAME:
        return None
    for length in range(1, len(words)):
        for start in range(len(words) - length):
            if known(".".join(words[:start] + words[start + length :])):
                return ".".join(words[start : start + length]) + "."
    return None


def proposal(names: Iterable[str], prefix: str) -> str:
    """Text for an error: how many names have a prefix, and how to remove it."""
    names = list(names)
    count = sum(without(name, prefix) is not None for name in names)
    begin = all(name.startswith(prefix) for name in names if without(name, prefix) is not None)
    which = f"all {count}" if count == len(names) else f"{count} of {len(names)}"
    has = "begin with" if begin else "contain"
    return (
        f"the names of {which} tensors {has} {quoted(prefix)}; `jaxmodels convert neox`, inspect, verify and generate "
        f"remove it with --strip-prefix {shortened(prefix, LONGEST)}"
    )


def stripped(
    tensors: Mapping[str, Any], prefix: str, known: Callable[[str], bool], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Tensors without a prefix in their names, and notes.

    Names that do not have it are kept if they are known, else left out. Raises ValueError, beginning with `where`, if
    none has it, or if two names become equal.
    """
    prefix = prefix.rstrip(".") + "."
    changed = {name: without(name, prefix) for name in tensors}
    if prefix == "." or not any(new is not None for new in changed.values()):
        raise ValueError(
            f"{where} has no tensor with strip_prefix={quoted(prefix)} in its name; it has {shown(tensors)}"
        )
    held: dict[str, Any] = {}
    left = []
    for name, tensor in tensors.items():
        new = changed[name] or name
        if new in held:
            raise ValueError(f"{where} has two tensors that are {quoted(new)} without {quoted(prefix)}")
        if changed[name] is None and not known(name):
            left.append(name)
        else:
            held[new] = tensor
    notes = [f"{quoted(prefix)} was removed from the names of {sum(map(bool, changed.values()))} tensors"]
    if left:
        notes.append(f"{len(left)} tensors without {quoted(prefix)} in their names were left out: {shown(left)}")
    return held, notes


def shown(names: Iterable[str]) -> str:
    """First of some names."""
    names = list(names)
    return ", ".join(shortened(str(name), LONGEST) for name in names[:3]) + (", …" if len(names) > 3 else "")


def without(name: str, prefix: str) -> str | None:
    """Name without a prefix, also inside of it; None if it does not have it."""
    new = f".{name}".replace(f".{prefix}", ".")
    return new[1:] if len(new) <= len(name) else None
