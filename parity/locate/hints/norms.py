"""Normalisation: epsilon outside the root, the other variance, other axes and groups, statistics of the batch."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from parity.locate.hints.mistake import Context, Mistake, Subject, attributes, functions, together
from parity.locate.hints.numbers import EPSILON

Function = Callable[..., Any]


def mistakes(subject: Subject) -> Iterator[Mistake]:
    """Mistakes in fused norms, and in norms that are written out with var, std, mean and rsqrt."""
    if subject.uses("layer_norm"):
        yield Mistake("epsilon is added outside the root", layer_norm(outside=True))
        yield Mistake("variance: Flax divides by n - 1, PyTorch by n", layer_norm(correction=1))
        yield Mistake("the mean is not subtracted (RMSNorm for LayerNorm)", layer_norm(centred=False))
        for axis in (-2, 1, 0):
            yield Mistake(f"normalised along axis {axis} instead of the last", layer_norm(axis=axis))
    if subject.uses("rms_norm"):
        yield Mistake("epsilon is added outside the root", rms_norm(outside=True))
        yield Mistake("the mean is subtracted (LayerNorm for RMSNorm)", rms_norm(centred=True))
    if subject.uses("group_norm"):
        yield from groups(subject)
    if subject.uses("batch_norm"):
        yield Mistake("BatchNorm with the statistics of the batch", batch_statistics())
        yield Mistake("BatchNorm's epsilon is added outside the root", batch_norm(outside=True))
        yield Mistake("BatchNorm's variance taken for a standard deviation", batch_norm(deviation=True))
    for name in ("var", "std", "var_mean", "std_mean"):
        if subject.uses(name):
            yield Mistake(f"variance: the other of n and n - 1 ({name})", functions({name: other_correction}))
    if subject.uses("rsqrt", "sqrt", "std"):
        yield from written_out(subject.module)


def layer_norm(*, outside: bool = False, correction: int = 0, centred: bool = True, axis: int | None = None) -> Context:
    """LayerNorm computed otherwise."""

    def call(_: Function, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
        x, eps = given["input"], given.get("eps", 1e-5)
        axes = tuple(range(-len(given["normalized_shape"]), 0)) if axis is None else (axis,)
        mean = x.mean(axes, keepdim=True) if centred else 0.0
        size = x[..., :].shape if axis is None else (x.shape[axis],)
        n = 1
        for length in size[-len(axes) :]:
            n *= length
        variance = (x - mean).square().sum(axes, keepdim=True) / max(n - correction, 1)
        y = (x - mean) / (variance.sqrt() + eps if outside else (variance + eps).sqrt())
        y = y if given.get("weight") is None else y * given["weight"]
        return y if given.get("bias") is None else y + given["bias"]

    return functions({"layer_norm": call})


def rms_norm(*, outside: bool = False, centred: bool = False) -> Context:
    """RMSNorm computed otherwise."""

    def call(_: Function, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
        x, eps = given["input"], given.get("eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        axes = tuple(range(-len(given["normalized_shape"]), 0))
        x = x - x.mean(axes, keepdim=True) if centred else x
        square = x.square().mean(axes, keepdim=True)
        y = x / (square.sqrt() + eps if outside else (square + eps).sqrt())
        return y if given.get("weight") is None else y * given["weight"]

    return functions({"rms_norm": call})


def groups(subject: Subject) -> Iterator[Mistake]:
    """GroupNorm with other numbers of groups, and over channels alone."""
    channels = max((s[0][1] for s in subject.used.get("group_norm", []) if s and len(s[0]) > 1), default=0)
    own = next((m.num_groups for m in subject.module.modules() if isinstance(m, nn.GroupNorm)), 0)
    for n in [n for n in range(1, channels + 1) if channels % n == 0 and n != own]:
        yield Mistake(
            f"GroupNorm: Flax has {n} groups, PyTorch {own or 'others'}",
            functions({"group_norm": functools.partial(regrouped, n)}),
        )
    if own and channels % own == 0:

        def interleaved(f: Function, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
            x, order = args[0], torch.arange(channels).view(-1, own).T.flatten()
            plain = f(x[:, order], args[1])
            y = plain[:, order.argsort()]
            shape = (1, -1, *[1] * (x.ndim - 2))
            weight, bias = (args[i] if len(args) > i else None for i in (2, 3))
            y = y if weight is None else y * weight.view(shape)
            return y if bias is None else y + bias.view(shape)

        yield Mistake(
            f"GroupNorm: Flax groups each {own}-th channel, PyTorch adjacent ones",
            functions({"group_norm": interleaved}),
        )


def regrouped(n: int, function: Function, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """GroupNorm with another number of groups."""
    return function(args[0], n, *args[2:], **kwargs)


def batch_statistics() -> Context:
    """BatchNorm in training mode, without changing the running statistics."""

    def call(_: Function, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        x, weight, bias = args[:3]
        eps = kwargs.get("eps", args[7] if len(args) > 7 else 1e-5)
        return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    return functions({"batch_norm": call})


def batch_norm(*, outside: bool = False, deviation: bool = False) -> Context:
    """BatchNorm's evaluation computed otherwise."""

    def call(_: Function, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        x, weight, bias, mean, variance = args[:5]
        eps = kwargs.get("eps", args[7] if len(args) > 7 else 1e-5)
        scale = variance.sqrt() + eps if outside else variance + eps if deviation else (variance + eps).sqrt()
        shape = (1, -1, *[1] * (x.ndim - 2))
        y = (x - mean.view(shape)) / scale.view(shape)
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)

    return functions({"batch_norm": call})


def other_correction(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A variance that divides by n where it divided by n - 1, and the reverse."""
    kwargs = dict(kwargs)
    unbiased = kwargs.pop("unbiased", None)
    correction = kwargs.pop("correction", None)
    args = tuple(a for i, a in enumerate(args) if not (i and isinstance(a, bool)))
    flags = [a for a in args[1:] if isinstance(a, bool)]
    if unbiased is None and correction is None:
        own = 1 if not flags else int(flags[0])
    else:
        own = int(unbiased if correction is None else correction)
    return function(*args, **kwargs, correction=0 if own else 1)


def written_out(module: nn.Module) -> Iterator[Mistake]:
    """Norms written out with an epsilon as an attribute: inside the root for outside, and the reverse."""
    own = [(part, name, value) for part in module.modules() for name, value in vars(part).items() if name in EPSILON]
    for eps in {float(value) for _, _, value in own if value}:
        zero = [(part, name, 0.0) for part, name, value in own if value == eps]

        def outside(name: str, eps: float = eps) -> Any:
            def call(f: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
                root = torch.sqrt(torch.clamp(args[0] - eps, min=0.0)) + eps
                return 1 / root if name == "rsqrt" else root

            return call

        yield Mistake(
            "epsilon: Flax adds it outside the root, PyTorch inside",
            functions({"rsqrt": outside("rsqrt"), "sqrt": outside("sqrt")}),
        )

        def inside(f: Function, args: tuple, kwargs: dict[str, Any], eps: float = eps) -> Any:
            y = f(*args, **kwargs)
            return (y.square() + eps).sqrt() if f.__name__ == "std" else torch.sqrt(args[0] + eps)

        yield Mistake(
            "epsilon: Flax adds it inside the root, PyTorch outside",
            together(attributes(zero), functions({"sqrt": inside, "std": inside})),
        )
