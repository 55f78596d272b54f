"""Runs two models side by side and reads every sub-module's errors: propagated and isolated, forward and backward.

PyTorch runs first, in float64, and what went in and out of every call is kept, on disk past a limit. Then the Flax side
runs its `plain` form where it has one, so that every sub-module is called as a module; each call is compared as it
happens, and made once more with what PyTorch's was given.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity.compare.inputs import Inputs, named_leaves
from parity.compare.jax_side import FlaxSide, loss, split
from parity.compare.torch_side import TorchSide
from parity.locate.calls import FlaxCall, Key, LinenPart, NNXPart, TorchRun, leaves_of, numeric, recorded, with_leaves
from parity.locate.calls import unstacked as one_by_one
from parity.locate.hints import hint
from parity.locate.store import DEFAULT_LIMIT, store
from parity.locate.tree import Divergence, Errors, Part, Trace
from parity.measure import limits

RERUNS = 3  # calls of one path that are repeated in isolation; a recurrence calls its parts at every step


def trace(
    truth: TorchSide,
    side: FlaxSide,
    inputs: Inputs,
    *,
    labels: Any = None,
    targets: dict[str, np.ndarray] | None = None,
    memory_limit: int = DEFAULT_LIMIT,
) -> Trace:
    """Both trees of a Flax model against a PyTorch module in float64; backward where there are targets.

    Call it with x64 enabled where the side is in float64. A narrower side is held against what PyTorch itself loses in
    that dtype, sub-module by sub-module.
    """
    objective = None if targets is None else (labels, targets)
    with store(memory_limit) as kept:
        run = TorchRun(truth, inputs, kept, objective)
        forward = Forward(run, side)
        plain_loss = None
        with recorded(forward.model, forward.record):
            outputs = side.call(getattr(forward.model, "plain", forward.model), values_of(side, inputs))
        parts = {"forward": forward.tree()}
        if objective is not None:
            backward = Backward(forward, inputs, objective, memory_limit)
            parts["backward"] = backward.tree()
            plain_loss = backward.gradients
        first = first_divergence(parts) or fast_path(side, inputs, objective, outputs, plain_loss)
        if first is not None:
            first = dataclasses.replace(
                first, dtype=np.dtype(side.dtype).name, forward=parts["forward"], backward=parts.get("backward")
            )
        return Trace(np.dtype(side.dtype).name, parts["forward"], parts.get("backward"), first)


def first_divergence(trees: dict[str, Part]) -> Divergence | None:
    """The first culprit; without one the first victim, whose givers could not be compared."""
    for stage, tree in trees.items():
        victims = sorted((p for p in tree.walk() if p.verdict == "victim"), key=lambda part: part.order)
        for part in (*tree.culprits(), *victims):
            return Divergence(part.path, part.flax_type, part.worst, stage=stage, hint=part.hint)
    return None


def fast_path(side: FlaxSide, inputs: Inputs, objective, outputs: dict, gradients: dict | None) -> Divergence | None:
    """Where the model's own call parts from its plain form."""
    limit = limits.FLOAT64_LIMIT if side.dtype == np.float64 else 1e-3
    name = type(side.module).__name__
    plain = {key: np.asarray(value) for key, value in outputs.items()}
    error = limits.worst(limits.errors(side.outputs(inputs), plain))[1]
    if error > limit:
        return Divergence("", name, error, fast_path=True)
    if objective is not None and gradients:
        fast = side.evaluate(inputs, *objective)["parameter gradients"]
        error = limits.worst(limits.errors(fast, gradients))[1]
        if error > limit:
            return Divergence("", name, error, fast_path=True, stage="backward")
    return None


def values_of(side: FlaxSide, inputs: Inputs) -> dict[str, jax.Array]:
    floats, others, *_ = side.arguments(inputs, None, {})
    return floats | others


@dataclasses.dataclass
class Reading:
    """Of one path: its worst errors so far, over how many calls."""

    flax_path: str = ""
    flax_type: str = ""
    calls: int = 0
    order: int | None = None  # of the first call that errs
    propagated: Errors | None = None
    isolated: Errors | None = None
    isolations: int = 0
    limit: float = limits.FLOAT64_LIMIT
    evidence: tuple[Key, list[np.ndarray]] | None = None  # a call that errs in isolation, and what it gave

    def worst(self, kind: str, errors: Errors | None) -> bool:
        """Takes errors in if they are the worst; whether they are past the limit."""
        known = getattr(self, kind)
        if errors is not None and (known is None or errors.error > known.error):
            setattr(self, kind, errors)
        return errors is not None and errors.error > self.limit


@dataclasses.dataclass
class Again:
    """A Flax call that can be repeated with PyTorch's inputs: numbers in the store stand for them."""

    part: NNXPart | LinenPart
    arguments: Any
    paired: dict[str, tuple[int, tuple[int, ...], Any]]  # by leaf: number, shape and dtype
    outputs: list[jax.ShapeDtypeStruct]

    def values(self, run: TorchRun) -> dict[str, jax.Array]:
        return {
            name: jnp.asarray(arranged(run.kept.get(number), shape), dtype)
            for name, (number, shape, dtype) in self.paired.items()
        }

    def call(self, params: Any, values: dict[str, Any]) -> list[jax.Array]:
        """The floating outputs."""
        arguments = with_leaves(self.arguments.arguments, values)
        again = inspect.BoundArguments(self.arguments.signature, arguments)
        return floating(self.part.call(params, again.args, again.kwargs))


class Forward:
    """Compares the calls of one run of a Flax model with those of PyTorch's."""

    def __init__(self, run: TorchRun, side: FlaxSide):
        self.run, self.side = run, side
        self.model = one_by_one(side.module)
        self.exact = side.dtype == np.float64
        self.counts: dict[str, int] = {}
        self.again: dict[Key, Again] = {}
        self.readings = {path: Reading() for path, _ in run.calls}
        self.wanted = self.counterparts()
        if not self.exact:
            for path, limit in own_errors(run, side.dtype).items():
                self.readings[path].limit = limit

    def counterparts(self) -> dict[Key, Key]:
        """PyTorch's call by Flax's; layer 3 of a stack that is scanned is the fourth call of its one module."""
        wanted, stacked = {}, {}
        for path, n in self.run.calls:
            name = self.side.weights.module(path)
            if name is None:
                continue
            wanted[name, n] = path, n
            words = name.split(".")
            for i, word in enumerate(words):
                if word.isdigit() and n == 0:
                    stacked[".".join(words[:i] + words[i + 1 :]), int(word)] = path, n
        return stacked | wanted

    def record(self, call: FlaxCall) -> Any:
        n = self.counts[call.path] = self.counts.get(call.path, -1) + 1
        key = self.wanted.get((call.path, n))
        if key is None:
            return call.output
        reading = self.readings[key[0]]
        reading.flax_path, reading.flax_type = call.path, call.type
        reading.calls += 1
        truth = self.run.outputs(key)
        bad = reading.worst("propagated", self.errors(floating(call.output), truth))
        agree, paired = self.pair(call, key)
        # What has a number is not to be kept alive here as well.
        call.arguments.arguments = with_leaves(call.arguments.arguments, dict.fromkeys(paired))
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in floating(call.output)]
        repeat = self.again[key] = Again(call.part(), call.arguments, paired, shapes)
        results = None
        if agree:
            bad_alone, results = reading.worst("isolated", self.errors(floating(call.output), truth)), call.output
        elif paired and reading.isolations < RERUNS:
            reading.isolations += 1
            results = repeat.call(repeat.part.params, repeat.values(self.run))
            bad_alone = reading.worst("isolated", self.errors(results, truth))
        else:
            bad_alone = False
        if bad_alone and reading.evidence is None:
            given = [np.asarray(array, np.float64) for array in floating(results)]
            reading.evidence = key, [arranged_back(a, b.shape) for a, b in zip(given, truth, strict=False)]
        if (bad or bad_alone) and reading.order is None:
            reading.order = self.run.calls[key].order
        return call.output

    def errors(self, results: list, truth: list[np.ndarray]) -> Errors | None:
        """Of outputs in PyTorch's layout; no shape is an error here, another layout inside a model may be wanted."""
        given = [arranged_back(np.asarray(a, np.float64), b.shape) for a, b in zip(results, truth, strict=False)]
        return Errors.of(given, truth, self.side.dtype)

    def pair(self, call: FlaxCall, key: Key) -> tuple[bool, dict[str, tuple[int, tuple[int, ...], Any]]]:
        """Whether it was given what PyTorch's call was, and the number of each argument that has a counterpart."""
        ours = {name: leaf for name, leaf in leaves_of(call.arguments.arguments).items() if numeric(leaf)}
        theirs = self.run.calls[key].inputs
        kept = {name: self.run.kept.get(number) for name, number in theirs.items()}
        # By name where both call it so, the rest in order, floats with floats.
        partner = {n: n for n in ours if n in kept and numeric(ours[n]) == numeric(kept[n])}
        left = [n for n in kept if n not in partner]
        for name in ours:
            same = [n for n in left if name not in partner and numeric(kept[n]) == numeric(ours[name])]
            if same:
                partner[name] = same[0]
                left.remove(same[0])
        agree, paired = True, {}
        for name, other in partner.items():
            given, truth = np.asarray(ours[name]), kept[other]
            if numeric(truth) == "f":
                error = Errors.of([arranged_back(given.astype(np.float64), truth.shape)], [truth])
                agree &= self.exact and error is not None and error.error <= limits.FLOAT64_LIMIT
            elif given.shape == truth.shape:
                agree &= bool((given == truth).all())
            if arranged(truth, given.shape).shape == given.shape:
                dtype = ours[name].dtype
                wide = jnp.promote_types(dtype, self.side.dtype) if numeric(truth) == "f" else dtype
                paired[name] = theirs[other], given.shape, wide
        return agree, paired

    def tree(self) -> Part:
        orders = {path: self.run.calls[path, 0].order for path in self.readings}
        for path, reading in self.readings.items():
            reading.order = orders[path] if reading.order is None else reading.order
        return grown("", self.readings, self.run, "forward", self.hint)

    def hint(self, path: str) -> str:
        """What is known to leave such an error."""
        evidence = self.readings[path].evidence
        return hint(self.run, *evidence, self.side.dtype) if evidence else ""


class Backward:
    """Compares gradients: those that arrive at every output, and those of every sub-module alone."""

    def __init__(self, forward: Forward, inputs: Inputs, objective: tuple, memory_limit: int):
        run = self.run = forward.run
        self.forward, self.side, self.inputs, self.objective = forward, forward.side, inputs, objective
        keys = [key for key in run.calls if key in forward.again and run.calls[key].gradients]
        self.scale = max((float(np.abs(g).max()) for k in keys for g in run.gradients(k).values()), default=0.0)
        self.readings = {
            path: dataclasses.replace(reading, propagated=None, isolated=None, order=None, evidence=None)
            for path, reading in forward.readings.items()
        }
        for group in self.groups(keys, memory_limit):
            self.gradients = self.propagated(group)
        for key in keys:
            if key[1] in (0, run.counts[key[0]] - 1):  # what a recurrence does between, it does there
                self.read(key, "isolated", self.isolated(key))
        for path, reading in self.readings.items():
            reading.order = self.order(path, run.counts[path] - 1) if reading.order is None else reading.order

    def order(self, *key: Any) -> int:
        """Backwards, what was done last comes first."""
        return len(self.run.calls) - 1 - self.run.calls[key].order

    def read(self, key: Key, kind: str, errors: Errors | None) -> None:
        reading = self.readings[key[0]]
        if reading.worst(kind, errors) and (reading.order is None or self.order(*key) < reading.order):
            reading.order = self.order(*key)

    def groups(self, keys: list[Key], limit: int) -> Iterator[list[Key]]:
        """All calls, as many at a time as have outputs of at most `limit` bytes."""
        group: list[Key] = []
        size = 0
        for key in keys:
            more = sum(a.size * a.dtype.itemsize for a in self.forward.again[key].outputs)
            if group and size + more > limit:
                yield group
                group, size = [], 0
            group.append(key)
            size += more
        yield group

    def propagated(self, group: list[Key]) -> dict[str, np.ndarray]:
        """Reads the gradients at the outputs of some calls; returns those of all parameters by PyTorch name.

        A zero is added to every output, and the loss of the whole model is differentiated with respect to it.
        """
        floats, others, labels, targets = self.side.arguments(self.inputs, *self.objective)
        graphdef, params, rest = split(self.forward.model)
        keys = {flax: key for flax, key in self.forward.wanted.items() if key in group}

        def objective(params, zeros):
            counts: dict[str, int] = {}

            def add(call: FlaxCall) -> Any:
                n = counts[call.path] = counts.get(call.path, -1) + 1
                key = keys.get((call.path, n))
                return call.output if key is None else added(call.output, zeros[key])

            model = nnx.merge(graphdef, params, rest)
            with recorded(model, add):
                return loss(self.side.call(getattr(model, "plain", model), floats | others), labels, targets)

        zeros = {key: [jnp.zeros(a.shape, a.dtype) for a in self.forward.again[key].outputs] for key in group}
        of_params, of_outputs = jax.grad(objective, argnums=(0, 1))(params, zeros)
        for key in group:
            truth = self.run.gradients(key)
            ours = [np.asarray(of_outputs[key][i], np.float64) for i in truth if i < len(of_outputs[key])]
            self.read(key, "propagated", self.errors(ours, list(truth.values()), self.scale))
        return self.side.weights.read(of_params)

    def isolated(self, key: Key) -> Errors | None:
        """Of the gradients of a sub-module's inputs and parameters, given PyTorch's inputs and output gradients."""
        given = self.run.gradients(key)
        module = self.run.modules[key[0]]
        module.zero_grad(set_to_none=True)
        outputs, inputs = self.run.again(key, grad=True)
        torch.autograd.backward([outputs[i] for i in given], [torch.tensor(g) for g in given.values()])
        again, path = self.forward.again[key], self.readings[key[0]].flax_path
        values = again.values(self.run)
        floats = {name: value for name, value in values.items() if numeric(value) == "f"}
        ours, pull = jax.vjp(lambda params, floats: again.call(params, values | floats), again.part.params, floats)
        cotangents = [
            jnp.asarray(arranged(given[i], a.shape), a.dtype) if i in given else jnp.zeros_like(a)
            for i, a in enumerate(ours)
        ]
        if any(np.shape(cotangent) != a.shape for cotangent, a in zip(cotangents, ours, strict=True)):
            return None  # laid out otherwise, as an attention's weights may be; what encloses it is comparable
        of_params, of_inputs = pull(cotangents)
        names = {number: name for name, number in self.run.calls[key].inputs.items()}
        pairs = [(of_inputs[name], inputs[names[again.paired[name][0]]].grad) for name in floats]
        prefix = tuple(int(word) if word.isdigit() else word for word in path.split(".") if word)
        gradients = self.side.weights.read(again.part.state(of_params), prefix)
        theirs = {".".join(filter(None, (key[0], n))): p.grad for n, p in module.named_parameters() if p.requires_grad}
        pairs += [(gradients[name], gradient) for name, gradient in theirs.items() if name in gradients]
        module.zero_grad(set_to_none=True)
        pairs = [(np.asarray(a, np.float64), np.zeros(np.shape(a)) if b is None else b.numpy()) for a, b in pairs]
        # A gradient that is zero in exact arithmetic is noise: it is read on the scale of what it was made from.
        scale = max(float(np.abs(b).max(initial=0.0)) for b in [*(b for _, b in pairs), *given.values()])
        return self.errors([a for a, _ in pairs], [b for _, b in pairs], scale)

    def errors(self, ours: list[np.ndarray], truth: list[np.ndarray], scale: float) -> Errors | None:
        ours = [arranged_back(a, b.shape) for a, b in zip(ours, truth, strict=False)]
        return Errors.of(ours, truth, self.side.dtype, scale)

    def tree(self) -> Part:
        return grown("", self.readings, self.run, "backward", lambda path: "")


def own_errors(run: TorchRun, dtype: Any) -> dict[str, float]:
    """By path, what a narrower dtype may cost: 4 × what it costs PyTorch's sub-module, given the same inputs."""
    narrow = getattr(torch, np.dtype(dtype).name)
    module = copy.deepcopy(run.side.module).to(narrow)
    allowed = dict.fromkeys((path for path, _ in run.calls), 0.0)
    for key in run.calls:
        if key[1] < RERUNS:
            outputs, _ = run.again(key, module.get_submodule(key[0]), narrow)
            own = Errors.of([output.double().numpy() for output in outputs], run.outputs(key), dtype)
            error = 0.0 if own is None else own.error
            allowed[key[0]] = max(allowed[key[0]], limits.RATIO_LIMIT * (error + limits.RATIO_FLOOR))
    return allowed


def grown(path: str, readings: dict[str, Reading], run: TorchRun, stage: str, hint: Callable[[str], str]) -> Part:
    """The tree below a path; what PyTorch never called (a list of layers) has its children with what encloses it."""
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


def added(output: Any, zeros: list[jax.Array]) -> Any:
    """The output with a number added to each of its floating arrays."""
    named = {n: leaf for n, leaf in leaves_of({"output": output}).items() if numeric(leaf) == "f"}
    values = {name: leaf + zero for (name, leaf), zero in zip(named.items(), zeros, strict=True)}
    return with_leaves({"output": output}, values)["output"]


def arranged(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch's array in a shape of Flax's, where only its channels are last or its heads apart there."""
    return laid_out(array, shape, lambda a: np.moveaxis(a, 1, -1))


def arranged_back(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse."""
    return laid_out(array, shape, lambda a: np.moveaxis(a, -1, 1))


def laid_out(array: np.ndarray, shape: tuple[int, ...], moved: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if array.shape != tuple(shape) and array.ndim > 2 and moved(array).shape == tuple(shape):
        return moved(array)
    return array.reshape(shape) if array.ndim != len(shape) and array.size == np.prod(shape) else array
