"""Settings of training that evaluation does not see: BatchNorm's momentum, rates of dropout and of dropped paths.

They are read from the modules of both sides and compared in pairs. A pair is found by the names of the weights or, for
modules without a counterpart there, by the order of the calls. What cannot be paired is not judged: many ports are
made for inference alone and leave dropout out.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from flax import linen, nnx

from jaxmodels.weights.names import dotted
from parity.compare.weights import Weights

PATHS = {"DropPath", "StochasticDepth"}  # classes that skip a branch of random examples; no framework has a base class
RATES = ("rate", "p", "drop_prob", "drop_rate", "dropout_rate")
CLOSE = 1e-6  # 1 - 0.1 is not 0.9 in binary


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of one sub-module. kind: settings of one kind are compared. default: nobody chose the value."""

    path: str
    type: str
    kind: str
    name: str
    value: float
    default: bool = False

    def __str__(self) -> str:
        value = "None" if math.isnan(self.value) else f"{self.value:g}"
        return f"{self.path} ({self.type}) has {self.name}={value}"


@dataclasses.dataclass(frozen=True)
class Difference:
    """A pair of settings that differ. expected: the value in Flax that equals PyTorch's."""

    torch: Setting
    flax: Setting
    expected: float

    def __str__(self) -> str:
        right = "" if math.isnan(self.expected) else f", which is {self.flax.name}={self.expected:g} in Flax"
        return f"{self.torch} in PyTorch{right}; {self.flax}"


def torch_settings(module: torch.nn.Module) -> list[Setting]:
    """The settings of a PyTorch module, in the order of their definition."""
    return [setting for path, part in module.named_modules() for setting in of_torch(path, part)]


def of_torch(path: str, part: torch.nn.Module) -> Iterator[Setting]:
    """The settings of one sub-module."""
    kind = type(part).__name__
    if tracks(part):
        momentum = getattr(part, "momentum", None)  # None: the mean over all batches
        yield Setting(
            path, kind, "momentum", "momentum", float("nan") if momentum is None else momentum, momentum == 0.1
        )
    elif isinstance(part, torch.nn.modules.dropout._DropoutNd):
        yield Setting(path, kind, "dropout", "p", part.p)
    elif isinstance(part, torch.nn.MultiheadAttention):
        yield Setting(path, kind, "attention dropout", "dropout", part.dropout)
    elif isinstance(part, torch.nn.RNNBase):
        layers = part.num_layers - 1
        yield from [Setting(path, kind, "dropout", "dropout", part.dropout)] * (layers if part.dropout else 0)
    elif kind in PATHS:
        yield from rate_of(path, part, "dropped paths")
    else:
        yield from smoothing(path, part)


def smoothing(path: str, part: Any) -> Iterator[Setting]:
    """The label smoothing of a loss, on either side."""
    value = getattr(part, "label_smoothing", None)
    if isinstance(value, int | float):
        yield Setting(path, type(part).__name__, "label smoothing", "label_smoothing", float(value))


def unseen_updates(module: torch.nn.Module) -> list[str]:
    """Spectral norms: their power iteration runs in training only, and Flax has no common counterpart."""
    hooks = {path: part._forward_pre_hooks.values() for path, part in module.named_modules()}
    old = [path for path, of in hooks.items() if any(type(hook).__name__ == "SpectralNorm" for hook in of)]
    new = [path.partition(".parametrizations")[0] for path, part in module.named_modules() if is_spectral(part)]
    return [f"spectral norm of {path or 'the model'}" for path in (*old, *new)]


def is_spectral(part: torch.nn.Module) -> bool:
    """True for the parametrization of `torch.nn.utils.parametrizations.spectral_norm`."""
    return type(part).__name__ == "_SpectralNorm"


def tracks(part: Any) -> bool:
    """True for a BatchNorm or an InstanceNorm that averages its statistics."""
    return isinstance(part, torch.nn.modules.batchnorm._NormBase) and part.running_mean is not None


def flax_settings(module: Any) -> list[Setting]:
    """The settings of a Flax module as the harness runs it; of a Linen module those of the sub-modules it calls."""
    parts = getattr(getattr(module, "to_nnx__parts", None), "modules", None)
    if parts is None:
        parts = dict(nnx.iter_modules(module))
    return [setting for path, part in parts.items() for setting in of_flax(dotted(path), part)]


def of_flax(path: str, part: Any) -> Iterator[Setting]:
    """The settings of one sub-module, of NNX or Linen."""
    kind = type(part).__name__
    if isinstance(part, nnx.BatchNorm | linen.BatchNorm):
        yield Setting(path, kind, "momentum", "momentum", part.momentum, part.momentum == 0.99)
    elif isinstance(part, nnx.Dropout | linen.Dropout):
        yield Setting(path, kind, "dropout", "rate", part.rate)
    elif isinstance(part, nnx.MultiHeadAttention | linen.MultiHeadDotProductAttention):
        yield Setting(path, kind, "attention dropout", "dropout_rate", part.dropout_rate, not part.dropout_rate)
    elif kind in PATHS:
        yield from rate_of(path, part, "dropped paths")
    else:
        yield from smoothing(path, part)


def rate_of(path: str, part: Any, kind: str) -> Iterator[Setting]:
    """The rate of a user's module, if an attribute with a known name has it."""
    found = ((name, getattr(part, name, None)) for name in RATES)
    rates = [(name, value) for name, value in found if isinstance(value, int | float)]
    for name, value in rates[:1]:
        yield Setting(path, type(part).__name__, kind, name, float(value))


def in_flax(setting: Setting) -> float:
    """The value that Flax has for a setting of PyTorch: its momentum is the share of the old average."""
    return 1 - setting.value if setting.kind == "momentum" else setting.value


@dataclasses.dataclass(frozen=True)
class Compared:
    """Pairs of settings of PyTorch and Flax, the differences among them, and notes on what cannot be judged."""

    pairs: list[tuple[Setting, Setting]]
    differences: list[Difference]
    notes: list[str]


def compared(
    theirs: Sequence[Setting],
    ours: Sequence[Setting],
    weights: Weights,
    calls: Callable[[], tuple[Sequence[str], Sequence[str]]],
) -> Compared:
    """Pair the settings of both sides and compare them.

    calls: the paths of both sides' sub-modules in the order of their calls, needed if the names of the weights leave
    settings without a counterpart.
    """
    pairs, notes = by_name(theirs, ours, weights), []
    for kind in dict.fromkeys(setting.kind for setting in theirs):
        left = [s for s in theirs if s.kind == kind and s not in {a for a, _ in pairs}]
        right = [s for s in ours if s.kind == kind and s not in {b for _, b in pairs}]
        if not left:
            continue
        if right:
            order = calls()
            left, right = (in_order(of_side, paths) for of_side, paths in zip((left, right), order, strict=True))
        matched = by_order(left, right)
        if matched is None and kind != "momentum" and any(setting.value for setting in left):  # a step shows momentum
            notes.append(f"{kind} is not compared: {some(left)} in PyTorch, {some(right)} in Flax")
        pairs += matched or []
    differences = []
    for a, b in pairs:
        expected = in_flax(a)
        if abs(expected - b.value) <= CLOSE:
            continue
        if b.default and (a.default or b.kind == "attention dropout"):
            notes.append(f"training differs by default: {Difference(a, b, expected)}")
        else:
            differences.append(Difference(a, b, expected))
    return Compared(pairs, differences, notes)


def by_name(theirs: Sequence[Setting], ours: Sequence[Setting], weights: Weights) -> list[tuple[Setting, Setting]]:
    """Pairs whose paths correspond; layers that Flax stacks have one path without a number."""
    of = {(setting.path, setting.kind): setting for setting in ours}
    pairs = []
    for setting in theirs:
        path = weights.module(setting.path)
        words = [] if path is None else path.split(".")
        stacked = [".".join(words[:i] + words[i + 1 :]) for i, word in enumerate(words) if word.isdigit()]
        found = (of.get((option, setting.kind)) for option in (path, *stacked) if option is not None)
        pairs += [(setting, one) for one in found if one is not None][:1]
    return pairs


def in_order(settings: Sequence[Setting], calls: Sequence[str]) -> list[Setting]:
    """The settings once for every call of their module; those of modules that are not called come last."""
    called = [setting for path in calls for setting in settings if setting.path == path]
    return called + [setting for setting in settings if setting.path not in calls]


def by_order(left: Sequence[Setting], right: Sequence[Setting]) -> list[tuple[Setting, Setting]] | None:
    """Pairs of settings of one kind, in the order of the calls; None if their numbers and values say nothing.

    A rate of zero may be left out on one side. Layers that Flax scans are called once, in PyTorch several times: then
    the values that occur are compared.
    """
    for a, b in ((left, right), ([s for s in left if s.value], [s for s in right if s.value])):
        if a and len(a) == len(b):
            by_value = sorted(a, key=in_flax), sorted(b, key=lambda setting: setting.value)
            same = all(abs(in_flax(x) - y.value) <= CLOSE for x, y in zip(*by_value, strict=True))
            return list(zip(*by_value, strict=True)) if same else list(zip(a, b, strict=True))
    first, second = ({round(value(s), 6): s for s in side} for value, side in ((in_flax, a), (lambda s: s.value, b)))
    if first and first.keys() == second.keys():
        return [(first[value], second[value]) for value in first]
    return [(a[0], b[0])] if len(first) == len(second) == 1 else None


def some(settings: Sequence[Setting]) -> str:
    """The settings in a few words."""
    values = sorted({f"{setting.name}={setting.value:g}" for setting in settings})
    return f"{len(settings)} with {', '.join(values)}" if settings else "none"
