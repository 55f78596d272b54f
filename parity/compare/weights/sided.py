"""Differences in kind between the sides: parameters on one of them, arrays that keep their own values."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmodels.weights.names import Path, dotted
from parity.compare.names import matches
from parity.compare.weights.piece import alike

BUFFER = "buffer in PyTorch, parameter in Flax"
FIXED = "parameter in PyTorch, fixed in Flax"


class OneSided:
    """Parameters of one side that are a buffer, or a fixed array, on the other.

    Their gradients exist on one side only, which is a difference unless `flax_only` or `torch_only` names them.
    """

    def __init__(self, flax_only: Sequence[str], torch_only: Sequence[str]):
        self.flax_only, self.torch_only = flax_only, torch_only
        self.found: dict[tuple[str, bool], list[str]] = {}

    def add(self, key: str, path: Path, *, parameter: bool) -> None:
        """Record a tensor and its array. parameter: it is one in PyTorch."""
        accepted = matches(key, self.torch_only) if parameter else matches(dotted(path), self.flax_only)
        names = self.found.setdefault((FIXED if parameter else BUFFER, accepted), [])
        names += [key] if key not in names else []

    @property
    def accepted(self) -> frozenset[str]:
        """Tensors that the user declared."""
        return frozenset(key for (_, accepted), keys in self.found.items() if accepted for key in keys)

    @property
    def notes(self) -> list[str]:
        """A sentence for each kind."""
        lines = []
        for (what, accepted), keys in self.found.items():
            setting = "torch_only" if what == FIXED else "flax_only"
            end = f"declared in {setting}" if accepted else f"{setting} accepts it"
            lines.append(f"gradient not compared ({what}; {end}): {listed(keys)}")
        return lines


def check_patterns(argument: str, patterns: Sequence[str], names: Mapping[str, Any]) -> None:
    """Raises ValueError for a pattern that matches no name."""
    if isinstance(patterns, str):
        raise ValueError(f"{argument}={patterns!r} must be a list of patterns")
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"{argument}: {pattern!r} must match one of {listed(list(names), 10)}")


def check_values(arrays: Mapping[Path, Any]) -> None:
    """Raises ValueError if arrays that keep their own values are abstract."""
    abstract = sorted(dotted(path) for path, array in arrays.items() if isinstance(array, jax.ShapeDtypeStruct))
    if abstract:
        raise ValueError(f"flax_only: {listed(abstract)} must have values; bind the Linen module to its variables")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in a line; those that differ in numbers only are one, with their count."""
    counts = Counter(alike(name) for name in names)
    first = {alike(name): name for name in reversed(names)}
    shown = [name if counts[form] == 1 else f"{form} ({counts[form]})" for form, name in first.items()][::-1]
    more = f", … ({len(shown) - most} more)" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
