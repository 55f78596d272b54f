"""The forward pass: compare a Flax model's calls with PyTorch's, as made and repeated with PyTorch's inputs."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

from jaxmodels.weights.names import as_numpy
from parity.compare.noise import LIMIT, OWN, PREDICTED, Noise, wide
from parity.compare.outputs import correspondence
from parity.compare.sides.jax_side import JaxSide
from parity.compare.store import Store
from parity.locate.flax_calls import FlaxRun
from parity.locate.layouts import Layout, layouts, nearest
from parity.locate.torch_calls import Key, TorchRun
from parity.locate.tree import Errors
from parity.locate.values import numeric

RERUNS = 3  # of one path in isolation, at most: a recurrence calls its parts at every step


@dataclasses.dataclass
class PathErrors:
    """The worst errors of one path so far, over its calls.

    off: calls beyond the limit in the run. wrong: those beyond it in isolation, with Flax's outputs there in PyTorch's
    layout. reason: why the path, or a part of its reading, could not be compared.
    """

    flax_path: str = ""
    flax_type: str = ""
    calls: int = 0
    order: int | None = None  # of the first call beyond the limit
    propagated: Errors | None = None
    isolated: Errors | None = None
    isolations: int = 0
    limit: float = LIMIT
    off: list[Key] = dataclasses.field(default_factory=list)
    wrong: dict[Key, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    reason: str = ""

    def worst(self, kind: str, errors: Errors | None) -> bool:
        """Record errors if they are the worst; returns True if they exceed the limit."""
        known = getattr(self, kind)
        if errors is not None and (known is None or errors.noise > known.noise):
            setattr(self, kind, errors)
        return errors is not None and errors.noise > self.limit


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The arguments of a call that both sides have: Flax's names with PyTorch's, and how their axes lie."""

    theirs: dict[str, str]
    layouts: dict[str, Layout]
    agree: bool


class Forward:
    """Compare the calls of one run of a Flax model with those of PyTorch's."""

    def __init__(self, run: TorchRun, side: JaxSide, kept: Store):
        self.run, self.side = run, side
        self.exact = side.dtype == np.float64
        self.pairs = counterparts(run, side)
        self.readings = {"": PathErrors(reason="its calls cannot be recorded")}  # as of a module of TorchScript
        self.readings |= {path: PathErrors() for path, _ in run.calls}
        self.flax = FlaxRun(side, run.batch.inputs, self.pairs, kept)
        self.keys = {key: flax for flax, key in self.pairs.items() if flax in self.flax.calls}
        self.pairings: dict[Key, Pairing] = {}
        self.matches: dict[Key, list[tuple[int, int]]] = {}
        for path, why in self.flax.failed.items():
            for key in (key for flax, key in self.pairs.items() if flax[0] == path):
                self.readings[key[0]].reason = why
        for key in run.calls:  # in the order in which they ended
            if key in self.keys:
                self.guarded(key, self.compare, key)
        for path, reading in self.readings.items():
            if reading.order is None and (path, 0) in run.calls:
                reading.order = run.calls[path, 0].order

    def guarded(self, key: Key, read: Callable[..., Any], *args: Any) -> Any:
        """Read something of a call; an exception becomes the reason why it is not compared."""
        try:
            return read(*args)
        except Exception as error:
            reading = self.readings[key[0]]
            reading.reason = reading.reason or f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return None

    def compare(self, key: Key) -> None:
        """Compare one call as it was made and, if it is off because of its inputs, repeated with PyTorch's."""
        flax_key, reading = self.keys[key], self.readings[key[0]]
        call = self.flax.calls[flax_key]
        reading.flax_path, reading.flax_type = call.path, call.type
        reading.calls += 1
        self.matches[key] = self.matched(key)
        right = self.right(key)
        given = arranged(self.ours(key, self.flax.outputs_of(flax_key)), right)
        noises = self.theirs(key, self.run.noises(self.run.calls[key].outputs))
        if not self.exact:
            reading.limit = max(reading.limit if reading.limit != LIMIT else 0.0, self.narrow_limit(key))
        off = reading.worst("propagated", self.errors(given, right, noises))
        if off:
            reading.off.append(key)
            reading.order = self.run.calls[key].order if reading.order is None else reading.order
        pairing = self.pairings[key] = self.pair(key)
        if pairing.agree:
            reading.worst("isolated", self.errors(given, right, noises))
            if off:
                reading.wrong[key] = given
        elif (off or not self.exact) and pairing.theirs and reading.isolations < RERUNS:
            reading.isolations += 1
            given = self.isolated(key)
            if (
                reading.worst("isolated", self.errors(given, right, self.theirs(key, self.run.isolated_noise(key))))
                and off
            ):
                reading.wrong[key] = given

    def matched(self, key: Key) -> list[tuple[int, int]]:
        """The outputs that both sides return, by number: PyTorch's, Flax's."""
        call, flax = self.run.calls[key], self.flax.calls[self.keys[key]]
        theirs = dict(zip(call.names, self.run.outputs(key), strict=True))
        ours = dict(zip(flax.results, self.flax.outputs_of(self.keys[key]), strict=True))
        found = correspondence(theirs, ours)
        return [(call.names.index(name), flax.results.index(found[name])) for name in call.names if name in found]

    def theirs(self, key: Key, outputs: Sequence[Any]) -> list[Any]:
        """Select the things of PyTorch's outputs that Flax returns too."""
        return [outputs[i] for i, _ in self.matches[key]]

    def ours(self, key: Key, outputs: Sequence[Any]) -> list[Any]:
        """Select the things of Flax's outputs that PyTorch returns too, in PyTorch's order."""
        return [outputs[j] for _, j in self.matches[key]]

    def right(self, key: Key) -> list[np.ndarray]:
        """PyTorch's outputs of a call that Flax returns too."""
        return self.theirs(key, self.run.outputs(key))

    def isolated(self, key: Key) -> list[np.ndarray]:
        """Flax's outputs of a call with PyTorch's inputs, in PyTorch's layout.

        Inputs whose layout does not show, because they differ, are tried in each that fits.
        """
        right, pairing = self.right(key), self.pairings[key]
        tried = []
        for choice in (pairing.layouts, self.other_layouts(key)):
            if choice:
                found = arranged(self.ours(key, [as_numpy(a) for a in self.repeat(key, choice)]), right)
                tried.append((sum(np.abs(wide(a) - wide(b)).mean() for a, b in zip(found, right, strict=False)), found))
                if pairing.agree:
                    break
        return min(tried, key=lambda one: np.inf if np.isnan(one[0]) else one[0])[1]

    def other_layouts(self, key: Key) -> dict[str, Layout]:
        """The second layout of each floating input that has two; empty if none has."""
        pairing = self.pairings[key]
        other = {}
        for name, layout in pairing.layouts.items():
            fitting = [x for x in layouts(layout.ours, layout.theirs) if x != layout]
            other[name] = fitting[0] if fitting and len(layout.ours) > 2 else layout
        return other if other != pairing.layouts else {}

    def repeat(
        self, key: Key, choice: Mapping[str, Layout], arguments: Mapping[str, np.ndarray] | None = None
    ) -> list[jax.Array]:
        """Repeat Flax's call with PyTorch's inputs, or others by PyTorch's name."""
        flax_key, inputs = self.keys[key], self.run.calls[key].inputs
        values = {}
        for name, other in self.pairings[key].theirs.items():
            array = self.run.kept.get(inputs[other]) if arguments is None else arguments[other]
            values[name] = self.flax.typed(flax_key, name, choice[name].there(array))
        return self.flax.repeat(flax_key, values)

    def errors(self, given: list[np.ndarray], right: list[np.ndarray], noises: Sequence[Noise]) -> Errors | None:
        """Errors in PyTorch's layout; None if shapes differ, which is allowed inside a model."""
        if not given or any(a.shape != b.shape for a, b in zip(given, right, strict=False)):
            return None
        return Errors.of(given, right, self.side.dtype, noises=noises)

    def pair(self, key: Key) -> Pairing:
        """Match a call's arguments with PyTorch's by name; then the rest, those that agree before those that fit."""
        ours = self.flax.inputs_of(self.keys[key])
        numbers = self.run.calls[key].inputs
        theirs = {name: self.run.kept.get(number) for name, number in numbers.items()}
        partner: dict[str, str] = {}
        for name in ours:
            short = name.removeprefix("kwargs[").removesuffix("]") if name.startswith("kwargs[") else name
            if short in theirs and numeric(ours[name]) == numeric(theirs[short]):
                partner[name] = short
        found = {name: nearest(ours[name], theirs[other]) for name, other in partner.items()}
        for name in ours:
            if name in partner:
                continue
            left = [n for n in theirs if n not in partner.values() and numeric(theirs[n]) == numeric(ours[name])]
            fitting = {n: layout for n in left if (layout := nearest(ours[name], theirs[n])) is not None}
            agreeing = [n for n, layout in fitting.items() if self.same(ours[name], theirs[n], numbers[n], layout)]
            if fitting:
                partner[name] = (agreeing or list(fitting))[0]
                found[name] = fitting[partner[name]]
        fits = {name: layout for name, layout in found.items() if layout is not None}
        agree = [self.same(ours[n], theirs[partner[n]], numbers[partner[n]], layout) for n, layout in fits.items()]
        return Pairing({n: partner[n] for n in fits}, fits, len(fits) == len(partner) > 0 and all(agree))

    def same(self, ours: np.ndarray, theirs: np.ndarray, number: int, layout: Layout) -> bool:
        """True if an argument agrees on both sides; never in a narrow dtype, whose rounding is not an error."""
        given = layout.back(ours)
        if numeric(theirs) != "f":
            return bool((given == theirs).all())
        (noise,) = self.run.noises([number])
        return self.exact and noise.error(given, theirs) <= LIMIT

    def narrow_limit(self, key: Key) -> float:
        """The limit in a narrow dtype: the prediction, or twice the error of PyTorch's sub-module in that dtype."""
        if key[1] >= RERUNS:
            return PREDICTED
        narrow = getattr(torch, self.side.dtype.name)
        try:
            module = copy.deepcopy(self.run.modules[key[0]]).to(narrow)
            outputs, _ = self.run.repeated(key, module, narrow)
        except Exception:  # PyTorch has no kernel for that dtype
            return PREDICTED
        own = [as_numpy(output.double() if not output.is_complex() else output) for output in outputs]
        errors = Errors.of(own, self.run.outputs(key), self.side.dtype, noises=self.run.isolated_noise(key))
        return max(PREDICTED, OWN * errors.noise) if errors is not None and np.isfinite(errors.noise) else PREDICTED


def counterparts(run: TorchRun, side: JaxSide) -> dict[Key, Key]:
    """Map Flax calls to PyTorch calls; layer 3 of a scanned stack is the fourth call of its single module."""
    pairs: dict[Key, Key] = {}
    stacked: dict[Key, Key] = {}
    for path, n in run.calls:
        name = side.weights.module(path)
        if name is None:
            continue
        pairs[name, n] = path, n
        words = name.split(".")
        for i, word in enumerate(words):
            if word.isdigit() and n == 0:
                stacked[".".join(words[:i] + words[i + 1 :]), int(word)] = path, n
    return stacked | pairs


def arranged(given: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Flax's arrays in PyTorch's layout; those that fit in none unchanged."""
    found = []
    for a, b in zip(given, right, strict=False):
        layout = nearest(a, b)
        found.append(wide(a if layout is None else layout.back(a)))
    return found
