"""Training mode: what evaluation does not see, compared as settings and by one step where that is deterministic.

The settings are those of `train_settings`. A step is run if PyTorch's module averages statistics of batches: forward in
training mode, all rates of dropout at zero on both sides; outputs and the new averages are compared.

PyTorch averages the unbiased variance of a batch of n elements, Flax the biased one: a factor of n / (n - 1) between
the frameworks. It is no mistake of a port, so it is taken out of PyTorch's averages before they are compared, and
noted. A port that averages the unbiased variance agrees too.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from flax import linen, nnx
from flax.core.scope import DenyList
from torch import nn

from jaxmodels.weights.names import as_numpy, dotted, flat_arrays, with_arrays
from parity.compare import noise
from parity.compare.arguments import FLAGS as EVALUATION
from parity.compare.comparison import Comparison
from parity.compare.inputs import Inputs
from parity.compare.noise import LIMIT, RUNS, ULPS, Noise
from parity.compare.sides.adapters import LinenModule
from parity.compare.sides.functions import FunctionModule
from parity.compare.sides.jax_side import JaxSide
from parity.compare.sides.torch_side import TorchSide
from parity.locate.calls import calls_replaced
from parity.locate.tree import Divergence
from parity.measure.reference import judged
from parity.measure.train_settings import (
    CLOSE,
    PATHS,
    RATES,
    Compared,
    Setting,
    compared,
    flax_settings,
    torch_settings,
    tracks,
    unseen_updates,
)
from parity.report.results import Check

A_STEP = "a step in training mode"
SETTINGS, OUTPUT, AVERAGES = "training settings", "output in training", "averages after a step"
TRAINING_MODE = (SETTINGS, OUTPUT, AVERAGES)
FLAGS = {name: not value for name, value in EVALUATION.items()}  # arguments and fields that select training
RUNNING = ("running_mean", "running_var")
ROUNDING = 64.0  # an error is rounding if it is at most so many times as large, in units of the noise, as in float32

Tensors = dict[str, np.ndarray]


class NotComparable(Exception):
    """Raised if a step in training mode cannot be compared; the message is the reason."""


def train_mode(
    comparison: Comparison, side: Callable[[], TorchSide], ours: JaxSide, skipped: dict[str, str], notes: list[str]
) -> Iterator[Check]:
    """Checks of the settings and of a step; reasons for what is not compared go to `skipped` and `notes`.

    side: gives PyTorch's side in float64. ours: Flax's. Nothing for modules without such settings, at no cost.
    """
    module = comparison.torch
    assert isinstance(module, torch.nn.Module), "a recording has no training mode"
    try:
        theirs, ours_too = torch_settings(module), flax_settings(ours.module)
        if theirs:
            found = compared(
                theirs,
                ours_too,
                comparison.weights,
                lambda: (
                    torch_calls(side(), comparison.inputs, theirs),
                    flax_calls(ours, comparison.inputs, ours_too),
                ),
            )
            notes += found.notes
            yield from of_settings(found)
            if any(tracks(part) for part in module.modules()):
                yield from step(comparison, side(), ours, found.pairs, notes)
    except NotComparable as reason:
        skipped[A_STEP] = str(reason)
    except Exception as error:  # no reading of training may lose the others
        skipped[A_STEP] = first_line(error)
    updates = unseen_updates(module)
    if updates:
        notes.append(f"not compared, as it changes in training only: {', '.join(updates)}")


def of_settings(found: Compared) -> Iterator[Check]:
    """A check of the pairs of settings."""
    n, differences = len(found.pairs), found.differences
    if n:
        yield Check(SETTINGS, "settings", str(differences[0]) if differences else f"{n} settings", len(differences), 0)


def in_training(failed: Sequence[Check]) -> Divergence | None:
    """The first setting, output or average in training mode that differs."""
    first = next((check for check in failed if check.kind in TRAINING_MODE), None)
    if first is None:
        return None
    path = {SETTINGS: first.worst.partition(" ")[0], OUTPUT: "", AVERAGES: first.worst.rpartition(".")[0]}[first.kind]
    hint = first.worst if first.kind == SETTINGS else f"{first.kind}: {first.worst}"
    return Divergence(path, "", first.value, stage="training", hint=hint)


def torch_calls(side: TorchSide, inputs: Inputs, settings: Sequence[Setting]) -> list[str]:
    """The paths of PyTorch's sub-modules with settings, in the order of their calls."""
    paths: list[str] = []
    of_interest = {setting.path for setting in settings}
    with contextlib.ExitStack() as stack:
        for path, part in side.module.named_modules():
            if path in of_interest:
                handle = part.register_forward_hook(lambda *_, path=path: paths.append(path))
                stack.callback(handle.remove)
        side.outputs(inputs)
    return paths


def flax_calls(side: JaxSide, inputs: Inputs, settings: Sequence[Setting]) -> list[str]:
    """The same for Flax."""
    if not isinstance(side.module, nnx.Module) or hasattr(side.module, "to_nnx__module"):
        return list(dict.fromkeys(setting.path for setting in settings))  # recorded in the order of the calls
    paths: list[str] = []

    def run(params: Any, values: Any) -> Any:
        module = side.merged(params)
        names = {id(part): dotted(path) for path, part in nnx.iter_modules(module)}

        def wrapped(original: Any) -> Any:
            @functools.wraps(original)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                paths.append(names.get(id(self), ""))
                return original(self, *args, **kwargs)

            return call

        with calls_replaced(module, wrapped):
            return side.call(module, values)

    floats, others = side.values(inputs)
    jax.eval_shape(run, side.params, floats | others)
    of_interest = {setting.path for setting in settings}
    return [path for path in paths if path in of_interest]


def step(
    comparison: Comparison,
    side: TorchSide,
    ours: JaxSide,
    pairs: Sequence[tuple[Setting, Setting]],
    notes: list[str],
) -> Iterator[Check]:
    """Outputs in training mode and the averages after a step, in units of their rounding noise.

    If momentum is a setting of both sides, Flax's averages are those of PyTorch's momentum.
    """
    if ours.dtype != np.float64:
        raise NotComparable("it needs float64")
    theirs = TorchStep(side, comparison)
    truth, units = theirs.truth()
    momenta = {a.path: (a.value, 1 - b.value) for a, b in pairs if a.kind == "momentum" and a.value * (1 - b.value) > 0}

    def values(ours: JaxSide, precision: str) -> dict[str, dict[str, float]]:
        """Differences in units of the noise in a dtype, by kind."""
        result = FlaxStep(ours).run(theirs.averages(comparison.weights.read(ours.module)))
        by = ULPS[precision] / ULPS["float64"]
        errors = {OUTPUT: noise.errors(result[OUTPUT], truth[OUTPUT], scaled(units[OUTPUT], by)), AVERAGES: {}}
        for name, new in result[AVERAGES].items():
            path, old = name.rpartition(".")[0], theirs.before[name]
            torch_share, flax_share = momenta.get(path, (1.0, 1.0))
            ratio = torch_share / flax_share
            if abs(ratio - 1) > CLOSE and len(theirs.variances[path]) != 1:
                continue  # of several calls, or of none that is known, the share of the old average is not known
            unit = units[AVERAGES][name].scaled(by * max(1.0, ratio))
            of = [unit.error(old + ratio * (new - old), right) for right in theirs.alternatives(name, truth)]
            errors[AVERAGES][name] = min(of)
            theirs.biased |= len(of) > 1 and of[1] < of[0]
        return errors

    wide = values(ours, "float64")
    limits: dict[str, dict[str, float]] = {kind: {} for kind in wide}
    if any(value > LIMIT for of_kind in wide.values() for value in of_kind.values()):
        narrow = values(comparison.jax_side("float32"), "float32")
        for kind, of_kind in wide.items():
            limits[kind] = {n: v for n, v in of_kind.items() if LIMIT < v <= ROUNDING * narrow[kind][n] < math.inf}
    if any(limits.values()):
        notes.append("in training mode Flax loses more precision than PyTorch: its error shrinks with the dtype's")
    if theirs.biased:
        notes.append("running variances: PyTorch averages n / (n - 1) times the variance that Flax does; accounted for")
    for kind, of_kind in wide.items():
        yield judged(kind, "float64", of_kind, dict.fromkeys(of_kind, LIMIT) | limits[kind])


def scaled(units: Mapping[str, Noise], by: float) -> dict[str, Noise]:
    """The noise of tensors in a dtype whose last place is `by` times as large."""
    return {name: unit.scaled(by) for name, unit in units.items()}


class TorchStep:
    """PyTorch's module in training mode, with all rates at 0, in float64.

    before: the averages at the start, by name. variances: of each call of a module, by its path, with the number of
    elements.
    """

    def __init__(self, side: TorchSide, comparison: Comparison):
        self.side, self.comparison = side.again(), comparison
        module, carries = self.side.module.train(), comparison.weights.carries
        without_dropout(module)
        self.parts = {path: part for path, part in module.named_modules() if tracks(part)}
        idle = [path for path, part in self.parts.items() if not part.training]
        if idle:
            raise NotComparable(f"{idle[0]} stays in evaluation mode in PyTorch")
        self.before = {n: a for n, a in self.now().items() if carries(n)}
        if not self.before:
            raise NotComparable("Flax has no place for PyTorch's averages")
        self.variances: dict[str, list[tuple[np.ndarray, float]]] = {path: [] for path in self.parts}
        self.biased = False

    def now(self) -> Tensors:
        """The averages."""
        names = ((f"{p}.{n}".lstrip("."), getattr(part, n)) for p, part in self.parts.items() for n in RUNNING)
        return {name: as_numpy(tensor).copy() for name, tensor in names}

    def averages(self, tensors: Mapping[str, np.ndarray]) -> Tensors:
        """The averages among tensors."""
        return {name: tensors[name] for name in self.before}

    def run(self, inputs: Inputs) -> dict[str, Tensors]:
        """Outputs, and the averages after them; the module then has its own again if the caller restores it."""
        try:
            outputs = self.side.outputs(inputs)
        except Exception as error:  # such as one value per channel, which has no variance
            raise NotComparable(f"PyTorch in training mode: {first_line(error)}") from error
        return {OUTPUT: outputs, AVERAGES: self.averages(self.now())}

    def truth(self) -> tuple[dict[str, Tensors], dict[str, dict[str, Noise]]]:
        """Results, and their noise; raises NotComparable if they are random."""
        inputs, ulp = self.comparison.inputs, ULPS["float64"]
        rng = np.random.default_rng(self.comparison.seed)
        with torch.random.fork_rng(), self.recorded():
            torch.manual_seed(0)
            truth = self.run(inputs)
        self.side.restore()
        runs = []
        with torch.random.fork_rng():
            torch.manual_seed(1)
            again = self.run(inputs)
            self.side.restore()
            for _ in range(RUNS):
                with self.side.moved(ulp, rng):
                    runs.append(self.run(inputs.moved(ulp, rng)))
        if any(not np.array_equal(a, again[kind][n], equal_nan=True) for kind in truth for n, a in truth[kind].items()):
            raise NotComparable("PyTorch's module is random in training mode, with all known rates at 0")
        return truth, {kind: noise.noises_of(truth[kind], [run[kind] for run in runs], ulp) for kind in truth}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the variances that calls within the block average."""
        before: dict[str, np.ndarray] = {}

        def enter(path: str, part: Any) -> None:
            before[path] = as_numpy(part.running_var).copy()

        def leave(path: str, part: Any, x: torch.Tensor) -> None:
            groups = x.shape[1] * (1 if isinstance(part, nn.modules.batchnorm._BatchNorm) else x.shape[0])
            if part.momentum:
                batch = (as_numpy(part.running_var) - (1 - part.momentum) * before[path]) / part.momentum
                self.variances[path].append((batch, x.numel() / groups))

        with contextlib.ExitStack() as stack:
            for path, part in self.parts.items():
                entered = part.register_forward_pre_hook(lambda part, _, path=path: enter(path, part))
                left = part.register_forward_hook(lambda part, args, _, path=path: leave(path, part, args[0]))
                stack.callback(entered.remove)
                stack.callback(left.remove)
            yield

    def alternatives(self, name: str, truth: Mapping[str, Tensors]) -> list[np.ndarray]:
        """PyTorch's averages and, of a variance, what they would be of biased variances."""
        path, _, which = name.rpartition(".")
        right, momentum = truth[AVERAGES][name], self.parts[path].momentum
        if which != "running_var" or not momentum:
            return [right]
        average = self.before[name]
        for batch, n in self.variances[path]:
            average = (1 - momentum) * average + momentum * batch * (n - 1) / n
        return [right, average]


def without_dropout(module: Any) -> None:
    """Set all rates of a module's parts to 0, in place."""
    parts = module.modules() if isinstance(module, nn.Module) else (part for _, part in nnx.iter_modules(module))
    for part in parts:
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention | nn.RNNBase):
            part.dropout = 0.0
        elif isinstance(part, nnx.Dropout):
            part.rate = 0.0
        elif isinstance(part, nnx.MultiHeadAttention):
            part.dropout_rate = 0.0
        elif type(part).__name__ in PATHS:
            for name in RATES:
                if isinstance(getattr(part, name, None), int | float):
                    setattr(part, name, 0.0)


class FlaxStep:
    """Flax's module in training mode, with all rates at 0."""

    def __init__(self, side: JaxSide):
        if isinstance(side.module, FunctionModule):
            raise NotComparable("a function has no training mode")
        module = nnx.merge(*nnx.split(side.module))
        self.linen = isinstance(module, LinenModule)
        if isinstance(module, LinenModule):
            inner = module.to_nnx__module
            fields = {field.name for field in dataclasses.fields(inner)}
            training: dict[str, Any] = {name: flag for name, flag in FLAGS.items() if name in fields}
            module.to_nnx__module = inner.clone(**training)
            called: Any = type(inner).__call__
        else:
            without_dropout(module)
            for _, part in nnx.iter_modules(module):
                for name in FLAGS.keys() & {n for n, value in vars(part).items() if isinstance(value, bool)}:
                    setattr(part, name, FLAGS[name])
            called = type(module).__call__
        taken = [*inspect.signature(called).parameters, *side.inputs.flax_kwargs]
        flags = {name: FLAGS[name] for name in taken if name in FLAGS}
        inputs = dataclasses.replace(side.inputs, flax_kwargs=side.inputs.flax_kwargs | flags)
        self.side = JaxSide(module, side.weights, inputs, side.dtype, side.channels_last)

    def run(self, before: Tensors) -> dict[str, Tensors]:
        """Outputs, and the averages after them; raises NotComparable if no average changes."""
        side, paths = self.side, list(flat_arrays(self.side.module))

        def call(params: Any, values: Any, rest: Any) -> tuple[Any, list[jax.Array]]:
            module = side.merged(params, rest)
            function = functools.partial(linen_step, module) if self.linen else module
            outputs = side.call(function, values)
            after = flat_arrays(module)
            return outputs, [after[path] for path in paths]

        floats, others = side.values(side.inputs)
        try:
            with linen.intercept_methods(passing_dropout):
                outputs, arrays = side.prepared(call)(side.params, floats | others, side.rest)
        except Exception as error:
            raise NotComparable(f"Flax in training mode: {first_line(error)}") from error
        tensors = side.weights.read(with_arrays(side.module, dict(zip(paths, arrays, strict=True))))
        averages = {name: tensors[name] for name in before}
        if all(np.array_equal(array, before[name]) for name, array in averages.items()):
            raise NotComparable(f"Flax's averages do not change; known flags of training are {', '.join(FLAGS)}")
        return {OUTPUT: {name: np.asarray(output) for name, output in outputs.items()}, AVERAGES: averages}


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def linen_step(module: LinenModule, *args: Any, **kwargs: Any) -> Any:
    """Call a Linen module and keep what it writes."""
    kept = DenyList(("params", "intermediates"))
    return nnx.bridge.ToNNX.__call__(module, *args, rngs=nnx.Rngs(0), mutable=kept, **kwargs)


def passing_dropout(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
    """An interceptor in which dropout returns its input."""
    drops = isinstance(context.module, linen.Dropout) or type(context.module).__name__ in PATHS
    if context.method_name != "__call__" or not drops:
        return call(*args, **kwargs)
    return args[0] if args else next(iter(kwargs.values()))
