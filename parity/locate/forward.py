"""The forward pass: compare a Flax model's calls with PyTorch's, as made and repeated with PyTorch's inputs."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.compare import limits
from parity.compare.inputs import named_leaves
from parity.compare.jax_side import JaxSide
from parity.locate.calls import FlaxCall, Key, LinenPart, NNXPart, TorchRun, leaves_of, numeric, unstacked, with_leaves
from parity.locate.hints.search import hint
from parity.locate.tree import Errors, Part

RERUNS = 3  # of one path in isolation, at most: a recurrence calls its parts at every step


@dataclasses.dataclass
class PathErrors:
    """The worst errors of one path so far, over its calls."""

    flax_path: str = ""
    flax_type: str = ""
    calls: int = 0
    order: int | None = None  # of the first call beyond the limit
    propagated: Errors | None = None
    isolated: Errors | None = None
    isolations: int = 0
    limit: float = limits.FLOAT64_LIMIT
    evidence: tuple[Key, list[np.ndarray]] | None = None  # a call beyond the limit in isolation, and Flax's outputs

    def worst(self, kind: str, errors: Errors | None) -> bool:
        """Record errors if they are the worst; returns True if they exceed the limit."""
        known = getattr(self, kind)
        if errors is not None and (known is None or errors.error > known.error):
            setattr(self, kind, errors)
        return errors is not None and errors.error > self.limit


Stored = tuple[int, tuple[int, ...], Any]  # number in the store, shape and dtype in Flax


@dataclasses.dataclass
class Repeatable:
    """A Flax call that can be repeated with PyTorch's inputs, which are numbers in the store."""

    part: NNXPart | LinenPart
    arguments: inspect.BoundArguments
    paired: dict[str, Stored]
    outputs: list[jax.ShapeDtypeStruct]

    def values(self, run: TorchRun) -> dict[str, jax.Array]:
        """PyTorch's inputs by the names of Flax's arguments."""
        return {
            name: jnp.asarray(arranged(run.kept.get(number), shape), dtype)
            for name, (number, shape, dtype) in self.paired.items()
        }

    def call(self, params: Any, values: dict[str, Any]) -> list[jax.Array]:
        """Repeat the call; returns its floating outputs."""
        arguments: Any = with_leaves(self.arguments.arguments, values)
        bound = inspect.BoundArguments(self.arguments.signature, arguments)
        return floating(self.part.call(params, bound.args, bound.kwargs))


class Forward:
    """Compare the calls of one run of a Flax model with those of PyTorch's."""

    def __init__(self, run: TorchRun, side: JaxSide):
        self.run, self.side = run, side
        self.model = unstacked(side.module)
        self.exact = side.dtype == np.float64
        self.counts: dict[str, int] = {}
        self.repeatable: dict[Key, Repeatable] = {}
        self.readings = {path: PathErrors() for path, _ in run.calls}
        self.pairs = self.counterparts()
        if not self.exact:
            for path, limit in own_errors(run, side.dtype).items():
                self.readings[path].limit = limit

    def counterparts(self) -> dict[Key, Key]:
        """Map Flax calls to PyTorch calls; layer 3 of a scanned stack is the fourth call of its single module."""
        pairs: dict[Key, Key] = {}
        stacked: dict[Key, Key] = {}
        for path, n in self.run.calls:
            name = self.side.weights.module(path)
            if name is None:
                continue
            pairs[name, n] = path, n
            words = name.split(".")
            for i, word in enumerate(words):
                if word.isdigit() and n == 0:
                    stacked[".".join(words[:i] + words[i + 1 :]), int(word)] = path, n
        return stacked | pairs

    def record(self, call: FlaxCall) -> Any:
        """Compare a call with its counterpart in PyTorch; returns its output."""
        n = self.counts[call.path] = self.counts.get(call.path, -1) + 1
        key = self.pairs.get((call.path, n))
        if key is None:
            return call.output
        reading = self.readings[key[0]]
        reading.flax_path, reading.flax_type = call.path, call.type
        reading.calls += 1
        right = self.run.outputs(key)
        bad = reading.worst("propagated", self.errors(floating(call.output), right))
        agree, paired = self.pair(call, key)
        # Do not keep arrays alive that are in the store.
        arguments: Any = with_leaves(call.arguments.arguments, dict.fromkeys(paired))
        call.arguments.arguments = arguments
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in floating(call.output)]
        repeat = self.repeatable[key] = Repeatable(call.part(), call.arguments, paired, shapes)
        results: Any = None
        if agree:
            bad_alone, results = reading.worst("isolated", self.errors(floating(call.output), right)), call.output
        elif paired and reading.isolations < RERUNS:
            reading.isolations += 1
            results = repeat.call(repeat.part.params, repeat.values(self.run))
            bad_alone = reading.worst("isolated", self.errors(results, right))
        else:
            bad_alone = False
        if bad_alone and reading.evidence is None:
            given = [np.asarray(array, np.float64) for array in floating(results)]
            reading.evidence = key, [arranged_back(a, b.shape) for a, b in zip(given, right, strict=False)]
        if (bad or bad_alone) and reading.order is None:
            reading.order = self.run.calls[key].order
        return call.output

    def errors(self, results: Sequence[Any], right: list[np.ndarray]) -> Errors | None:
        """Errors in PyTorch's layout; None if shapes differ, which is allowed inside a model."""
        given = [arranged_back(np.asarray(a, np.float64), b.shape) for a, b in zip(results, right, strict=False)]
        return Errors.of(given, right, self.side.dtype)

    def pair(self, call: FlaxCall, key: Key) -> tuple[bool, dict[str, Stored]]:
        """Match a call's arguments with PyTorch's: (True if they are equal, PyTorch's counterparts by name)."""
        ours = {name: leaf for name, leaf in leaves_of(call.arguments.arguments).items() if numeric(leaf)}
        theirs = self.run.calls[key].inputs
        kept = {name: self.run.kept.get(number) for name, number in theirs.items()}
        # Match arguments by name; then the rest in order, floats with floats.
        partner = {n: n for n in ours if n in kept and numeric(ours[n]) == numeric(kept[n])}
        left = [n for n in kept if n not in partner]
        for name in ours:
            same = [n for n in left if name not in partner and numeric(kept[n]) == numeric(ours[name])]
            if same:
                partner[name] = same[0]
                left.remove(same[0])
        agree = True
        paired: dict[str, Stored] = {}
        for name, other in partner.items():
            given, right = np.asarray(ours[name]), kept[other]
            if numeric(right) == "f":
                error = Errors.of([arranged_back(given.astype(np.float64), right.shape)], [right])
                agree &= self.exact and error is not None and error.error <= limits.FLOAT64_LIMIT
            elif given.shape == right.shape:
                agree &= bool((given == right).all())
            if arranged(right, given.shape).shape == given.shape:
                dtype = ours[name].dtype
                wide = jnp.promote_types(dtype, self.side.dtype) if numeric(right) == "f" else dtype
                paired[name] = theirs[other], given.shape, wide
        return agree, paired

    def tree(self) -> Part:
        """The sub-modules with their errors and verdicts."""
        orders = {path: self.run.calls[path, 0].order for path in self.readings}
        for path, reading in self.readings.items():
            reading.order = orders[path] if reading.order is None else reading.order
        return grown("", self.readings, self.run, "forward", self.hint)

    def hint(self, path: str) -> str:
        """The known mistake that explains the error of a path; empty if there is none."""
        evidence = self.readings[path].evidence
        if evidence is None:
            return ""
        key, given = evidence

        def repeat(module: torch.nn.Module) -> list[torch.Tensor]:
            return self.run.repeated(key, module)[0]

        return hint(self.run.modules[path], repeat, given, self.run.outputs(key), self.side.dtype)


def own_errors(run: TorchRun, dtype: Any) -> dict[str, float]:
    """The largest error allowed in a narrower dtype, by path: 4 × that of PyTorch's sub-module on the same inputs."""
    narrow = getattr(torch, np.dtype(dtype).name)
    module = copy.deepcopy(run.side.module).to(narrow)
    allowed = dict.fromkeys((path for path, _ in run.calls), 0.0)
    for key in run.calls:
        if key[1] < RERUNS:
            outputs, _ = run.repeated(key, module.get_submodule(key[0]), narrow)
            own = Errors.of([output.detach().double().numpy() for output in outputs], run.outputs(key), dtype)
            error = 0.0 if own is None else own.error
            allowed[key[0]] = max(allowed[key[0]], limits.RATIO_LIMIT * (error + limits.RATIO_FLOOR))
    return allowed


def grown(path: str, readings: dict[str, PathErrors], run: TorchRun, stage: str, hint: Callable[[str], str]) -> Part:
    """The tree below a path; children of a module that is never called (a list) belong to the enclosing module."""
    below = [p for p in readings if p != path and p.startswith(f"{path}." if path else "")]
    direct = [p for p in below if not any(q != p and p.startswith(f"{q}.") for q in below)]
    children = tuple(grown(p, readings, run, stage, hint) for p in direct)
    reading = readings[path]
    inner = any(child.verdict in ("culprit", "encloses") for child in children)
    past = {
        kind: errors is not None and errors.error > reading.limit
        for kind, errors in (("propagated", reading.propagated), ("isolated", reading.isolated))
    }
    if past["isolated"] or (inner and past["propagated"]):
        verdict = "encloses" if inner else "culprit"
    elif past["propagated"]:
        verdict = "victim"
    else:
        verdict = "encloses" if inner else "unmatched" if reading.propagated is None else "agrees"
    return Part(
        path=path,
        flax_path=reading.flax_path,
        torch_type=type(run.modules[path]).__name__,
        flax_type=reading.flax_type,
        stage=stage,
        order=reading.order or 0,
        calls=reading.calls,
        propagated=reading.propagated,
        isolated=reading.isolated,
        limit=reading.limit,
        verdict=verdict,
        hint=hint(path) if verdict == "culprit" else "",
        children=children,
    )


def floating(output: Any) -> list[Any]:
    """The floating arrays of an output, in order."""
    return [leaf for leaf in named_leaves(output, jax.Array).values() if numeric(leaf) == "f"]


def arranged(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Rearrange PyTorch's array to Flax's shape, if only the channel axis or separate heads differ."""
    return laid_out(array, shape, lambda a: np.moveaxis(a, 1, -1))


def arranged_back(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Rearrange Flax's array to PyTorch's shape: the inverse of `arranged`."""
    return laid_out(array, shape, lambda a: np.moveaxis(a, -1, 1))


def laid_out(array: np.ndarray, shape: tuple[int, ...], moved: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Move channels or split axes if that gives the shape; otherwise return the array unchanged."""
    if array.shape != tuple(shape) and array.ndim > 2 and moved(array).shape == tuple(shape):
        return moved(array)
    return array.reshape(shape) if array.ndim != len(shape) and array.size == np.prod(shape) else array
