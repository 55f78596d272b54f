"""Convolutions, pools and resizing: padding at each side, what an average counts, corners, antialiasing, channels."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from parity.locate.hints.mistake import Context, Mistake, Subject, functions

Function = Callable[..., Any]
Pads = tuple[int, int]  # before and after, along every spatial axis
MOST = 8  # positions of padding at one side
CONVOLUTIONS, POOLS = ("conv1d", "conv2d", "conv3d"), ("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
RESIZED = (
    "upsample_nearest1d",
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)


def mistakes(subject: Subject) -> Iterator[Mistake]:
    """Mistakes in each kind of spatial function that is called."""
    if subject.uses(*CONVOLUTIONS):
        for mode in ("reflect", "replicate", "circular", "constant"):
            yield Mistake(f"padding: Flax's mode is {mode}", padded(CONVOLUTIONS, None, mode))
        yield from pads(CONVOLUTIONS, "convolution", zero_padded)
    if subject.uses(*POOLS):
        for name in (n for n in POOLS if subject.uses(n) and n.startswith("avg")):
            yield Mistake("average pool: the other count_include_pad", functions({name: other_count}))
        for name in (n for n in POOLS if subject.uses(n)):
            yield Mistake("pool: the other ceil_mode", functions({name: other_ceil}))
        yield from pads(POOLS, "pool", pooled)
        yield Mistake("pool: the maximum for the average, or the reverse", functions(dict.fromkeys(POOLS, other_pool)))
    if subject.uses(*TRANSPOSED):
        yield from pads(TRANSPOSED, "transposed convolution", cropped)
    if subject.uses(*RESIZED):
        yield from resized()
    if subject.uses("pixel_shuffle"):
        yield Mistake("pixel_shuffle: Flax has [r, r, C] in the channels, PyTorch [C, r, r]", shuffled())
    if subject.uses("grid_sampler", "grid_sample"):
        yield Mistake("grid_sample: the other align_corners", functions({"grid_sampler": other_corners}))


def pads(
    names: tuple[str, ...], what: str, changed: Callable[[Pads, Function, tuple, dict[str, Any]], Any]
) -> Iterator[Mistake]:
    """Every pair of paddings, those nearest to equal ones first; 'SAME' is one of them."""
    pairs = sorted(itertools.product(range(MOST), range(MOST)), key=lambda p: (abs(p[0] - p[1]), sum(p)))
    for pair in pairs:
        yield Mistake(
            f"padding: Flax's {what} pads by {pair[0]} before and {pair[1]} after",
            functions(dict.fromkeys(names, functools.partial(changed, pair))),
        )


def padded(names: tuple[str, ...], pair: Pads | None, mode: str) -> Context:
    """Convolutions that pad in another mode, by their own padding."""

    def call(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = convolution(args, kwargs)
        axes = given["input"].ndim - 2
        padding = tupled(given["padding"], axes)
        x = functional.pad(given["input"], [p for n in reversed(padding) for p in (n, n)], mode=mode)
        return function(x, given["weight"], given["bias"], given["stride"], 0, given["dilation"], given["groups"])

    return functions(dict.fromkeys(names, call))


def convolution(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a convolution by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def tupled(value: Any, axes: int) -> tuple[int, ...]:
    """A number for each axis."""
    return tuple(value) * (axes if len(value) == 1 else 1) if isinstance(value, tuple | list) else (value,) * axes


def zero_padded(pair: Pads, function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A convolution with other padding; one that has none, or a window of 1, is unchanged."""
    given = convolution(args, kwargs)
    if all(n == 1 for n in given["weight"].shape[2:]) or isinstance(given["padding"], str):
        return function(*args, **kwargs)
    x = functional.pad(given["input"], list(pair) * (given["input"].ndim - 2))
    return function(x, given["weight"], given["bias"], given["stride"], 0, given["dilation"], given["groups"])


def pooling(args: tuple, kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments of a pool by name."""
    names = ["input", "kernel_size", "stride", "padding"]
    names += ["dilation", "ceil_mode"] if name.startswith("max") else ["ceil_mode", "count_include_pad"]
    given: dict[str, Any] = {"stride": None, "padding": 0, "ceil_mode": False}
    given |= dict(zip(names, args, strict=False)) | kwargs
    given["stride"] = given["stride"] or given["kernel_size"]
    return given


def pooled(pair: Pads, function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A pool with other padding."""
    name = function.__name__
    given = pooling(args, kwargs, name)
    value = float("-inf") if name.startswith("max") else 0.0
    given["input"] = functional.pad(given["input"], list(pair) * (given["input"].ndim - 2), value=value)
    given["padding"] = 0
    return function(**given)


def other_count(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An average pool with the other count_include_pad."""
    given = pooling(args, kwargs, function.__name__)
    return function(**given | {"count_include_pad": not given.get("count_include_pad", True)})


def other_ceil(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A pool with the other ceil_mode."""
    given = pooling(args, kwargs, function.__name__)
    return function(**given | {"ceil_mode": not given["ceil_mode"]})


def other_pool(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An average for a maximum, and the reverse."""
    name = function.__name__
    given = pooling(args, kwargs, name)
    axes = given["input"].ndim - 2
    kind = "avg" if name.startswith("max") else "max"
    return getattr(functional, f"{kind}_pool{axes}d")(
        given["input"], given["kernel_size"], given["stride"], given["padding"], ceil_mode=given["ceil_mode"]
    )


def other_corners(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """grid_sample with the other align_corners."""
    return function(*args[:4], not args[4])


def cropped(pair: Pads, function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A transposed convolution whose whole output is cropped at both sides."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    given = defaults | dict(zip(names, args, strict=False)) | kwargs
    whole = function(**given | {"padding": 0, "output_padding": 0})
    before, after = pair
    for axis in range(2, whole.ndim):
        whole = whole.narrow(axis, before, whole.shape[axis] - before - after)
    return whole


def resized() -> Iterator[Mistake]:
    """Every mode of interpolate, to the size that PyTorch gives."""

    def by(mode: str, corners: bool | None, antialias: bool) -> Context:
        def call(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
            size = function(*args, **kwargs).shape[2:]
            known = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}.get(mode)
            name = known[len(size) - 1] if known else mode
            return functional.interpolate(args[0], size, mode=name, align_corners=corners, antialias=antialias)

        return functions(dict.fromkeys(RESIZED, call))

    for mode in ("linear", "cubic"):
        for corners, antialias in ((False, False), (True, False), (False, True)):
            text = f"resizing: Flax's is {mode}, align_corners={corners}"
            text += ", antialias=True" if antialias else ""
            yield Mistake(text, by(mode, corners, antialias))
    for mode in ("nearest", "nearest-exact"):
        yield Mistake(f"resizing: Flax's is {mode}", by(mode, None, False))


def shuffled() -> Context:
    """A pixel shuffle with the channels last among its features."""

    def call(function: Function, args: tuple, kwargs: dict[str, Any]) -> Any:
        x, r = args[0], kwargs.get("upscale_factor", args[1] if len(args) > 1 else 1)
        channels = torch.arange(x.shape[1]).view(r * r, -1).T.flatten()
        return function(x[:, channels], r)

    return functions({"pixel_shuffle": call})
