"""Verdicts: which sub-modules cause the error of the whole model, and how much of it each explains.

Flax's sub-modules are put into PyTorch's model. If the model with those that differ has Flax's outputs, they explain
the error, and the modules around them are innocent; if it has not, the enclosing module errs too. What one of several
explains is how far the outputs move if it alone is PyTorch's again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jaxmodels.weights.names import as_numpy
from parity.compare.noise import wide
from parity.locate.forward import Forward, arranged
from parity.locate.hints.search import distance, hint
from parity.locate.torch_calls import Key, Replacement
from parity.locate.tree import MATERIAL, Part
from parity.locate.values import leaves_of

UNEXPLAINED = 0.05  # the share of a module's error that its sub-modules may leave unexplained
WEIGHED = 6  # culprits inside one module, the largest ones
HINTED = 3  # culprits for which a hint is searched


@dataclasses.dataclass
class Causes:
    """Culprits of a forward pass, by path, each with the share of the model's error that it explains."""

    forward: Forward
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    own: dict[str, float] = dataclasses.field(default_factory=dict)  # of a culprit with culprits inside: its own share

    def __post_init__(self) -> None:
        found = self.culprits("")
        self.shares = dict.fromkeys(found, 0.0)
        if found:
            self.weigh("", found, 1.0)

    def culprits(self, path: str) -> list[str]:
        """The culprits at or inside a path."""
        readings = self.forward.readings
        inner = [culprit for child in children(path, readings) for culprit in self.culprits(child)]
        if path not in readings or not readings[path].wrong:
            return inner
        if not inner:
            return [path]
        left = self.forward.guarded(self.worst(path), self.unexplained, path, inner)
        if left is None or left <= UNEXPLAINED:
            return inner
        self.own[path] = min(left, 1.0)
        return [path, *inner]

    def worst(self, path: str) -> Key:
        """The call of a path with the largest error in isolation."""
        wrong = self.forward.readings[path].wrong
        return max(wrong, key=lambda key: distance(wrong[key], self.outputs(key)))

    def outputs(self, key: Key) -> list[np.ndarray]:
        """PyTorch's outputs of a call."""
        return [wide(array) for array in self.forward.right(key)]

    def unexplained(self, path: str, inner: Sequence[str]) -> float:
        """The share of a call's error that remains if Flax's sub-modules are put into PyTorch's module."""
        key = self.worst(path)
        given = self.forward.readings[path].wrong[key]
        found = self.hybrid(key, inner)
        error = distance(given, self.outputs(key))
        return distance(found, given) / error if np.isfinite(error) and error else 1.0

    def hybrid(self, key: Key, inner: Sequence[str]) -> list[np.ndarray]:
        """PyTorch's outputs of a call with Flax's sub-modules at some paths."""
        outermost = [path for path in inner if not any(is_inside(path, other) for other in inner)]
        found = self.forward.run.replaced(key, {path: self.replacement(path) for path in outermost})
        return [wide(array) for array in self.forward.theirs(key, found)]

    def replacement(self, path: str) -> Replacement:
        """Flax's sub-module in the place of PyTorch's."""
        known = sorted(n for p, n in self.forward.pairings if p == path)

        def call(n: int, arguments: Mapping[str, Any], outputs: list[torch.Tensor]) -> list[torch.Tensor] | None:
            key = path, n if n in known else known[-1]
            named = leaves_of(dict(arguments))
            arrays = {name: as_numpy(leaf) for name, leaf in named.items() if isinstance(leaf, torch.Tensor)}
            found = self.forward.repeat(key, self.forward.pairings[key].layouts, arrays)
            right = self.forward.theirs(key, [as_numpy(output) for output in outputs])
            ours = arranged(self.forward.ours(key, [as_numpy(array) for array in found]), right)
            if [a.shape for a in ours] != [b.shape for b in right]:
                return None
            new = list(outputs)
            for (i, _), a in zip(self.forward.matches[key], ours, strict=True):
                new[i] = torch.from_numpy(np.array(a)).to(outputs[i].dtype)
            return new

        return call

    def weigh(self, path: str, culprits: Sequence[str], total: float) -> None:
        """Give each culprit inside a path, and the path itself if it is one, its share of a total."""
        inner = [culprit for culprit in culprits if is_inside(culprit, path)]
        tops = [culprit for culprit in inner if not any(is_inside(culprit, other) for other in inner)]
        if path in culprits:
            self.shares[path] = total * (self.own.get(path, 1.0) if inner else 1.0)
        readings = self.forward.readings
        sizes = {top: min(e.error, 1e300) if (e := readings[top].isolated) is not None else 0.0 for top in tops}
        tops = sorted(tops, key=sizes.__getitem__, reverse=True)[:WEIGHED]
        effects = self.effects(path, tops) or {top: sizes[top] / (max(sizes.values()) or 1.0) for top in tops}
        for top in tops:
            self.weigh(top, culprits, total * effects[top])

    def effects(self, path: str, tops: Sequence[str]) -> dict[str, float] | None:
        """The share of a path's error that vanishes if one of the culprits inside is right; None if it is unknown."""
        reading = self.forward.readings.get(path)
        if reading is None or not reading.wrong:
            agrees = reading is not None and reading.propagated is not None and not reading.off
            return dict.fromkeys(tops, 0.0) if agrees else None
        if len(tops) == 1 and path not in self.own:
            return dict.fromkeys(tops, 1.0)
        key = self.worst(path)
        error = distance(reading.wrong[key], self.outputs(key))

        def measured() -> dict[str, float]:
            together = self.hybrid(key, tops)
            without = {top: self.hybrid(key, [other for other in tops if other != top]) for top in tops}
            return {top: min(distance(found, together) / error, 1.0) for top, found in without.items()}

        return self.forward.guarded(key, measured) if np.isfinite(error) and error else None

    def hints(self) -> dict[str, str]:
        """The known mistakes that explain the errors of the culprits that matter most."""
        most = max(self.shares.values(), default=0.0)
        paths = [path for path, share in self.shares.items() if share >= MATERIAL * most]
        return {path: self.hint(path) for path in sorted(paths, key=self.shares.__getitem__, reverse=True)[:HINTED]}

    def hint(self, path: str) -> str:
        """The known mistake that explains the error of a path; empty if there is none."""
        key, run = self.worst(path), self.forward.run

        def repeat(module: torch.nn.Module) -> list[torch.Tensor]:
            return self.forward.theirs(key, run.repeated(key, module)[0])

        given = self.forward.readings[path].wrong[key]
        found = self.forward.guarded(
            key, hint, run.modules[path], repeat, given, self.outputs(key), self.forward.side.dtype
        )
        return found or ""

    def tree(self, path: str = "", hints: Mapping[str, str] | None = None) -> Part:
        """The sub-modules at and inside a path with their errors and verdicts."""
        hints = self.hints() if hints is None else hints
        readings, run = self.forward.readings, self.forward.run
        reading = readings[path]
        parts = tuple(self.tree(child, hints) for child in children(path, readings))
        inner = any(child.verdict in ("culprit", "encloses") for child in parts)
        if path in self.shares:
            verdict = "culprit"
        elif reading.off:
            verdict = "encloses" if inner else "victim"
        elif reading.propagated is None:
            verdict = "encloses" if inner else "not compared" if reading.reason else "unmatched"
        else:
            verdict = "agrees"
        return Part(
            path=path,
            flax_path=reading.flax_path,
            torch_type=type(run.modules[path]).__name__,
            flax_type=reading.flax_type,
            stage="forward",
            order=reading.order or 0,
            calls=reading.calls,
            propagated=reading.propagated,
            isolated=reading.isolated,
            limit=reading.limit,
            verdict=verdict,
            hint=hints.get(path, ""),
            share=self.shares.get(path),
            reason=reading.reason,
            children=parts,
        )


def is_inside(path: str, other: str) -> bool:
    """True if a path lies inside another one."""
    return path != other and (not other or path.startswith(f"{other}."))


def children(path: str, known: Mapping[str, Any]) -> list[str]:
    """The paths directly inside a path; those of a module that is never called (a list) belong to the enclosing one."""
    below = [p for p in known if is_inside(p, path)]
    return [p for p in below if not any(is_inside(p, q) for q in below)]
