"""Roles of a tensor's axes by the layers that own it on both sides, and the layouts that follow from them.

    torch: Linear          weight [out, in]          linear
           Conv1D          weight [in, out]          linear io      (of transformers)
           Conv            weight [out, in, *k]      conv
           ConvTranspose   weight [in, out, *k]      transposed conv
           LSTM, GRU, RNN  weight_ih, weight_hh      linear
           Embedding       weight [rows, features]   table
           anything else                             plain, or bias
    Flax:  Dense, Linear, DenseGeneral, LinearGeneral   kernel [*in, *out]       kernel
           Conv                                         kernel [*k, in, out]     conv
           ConvTranspose                                kernel [*k, in, out], reversed; with transpose_kernel=True
                                                        [*k, out, in], not reversed
           Einsum                                       kernel, its axes by the equation
           Embed                                        embedding                table
           of Haiku and penzai                          w, weights               matrix, as a kernel
           of Equinox, and others with PyTorch's name   weight                   plain, alike
           anything else                                plain, or kernel by name

`layouts_of` returns the layouts that fit, the most usual one first. More than one: the shapes cannot tell.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from parity.compare.weights.layout import Axes, Layout, Shape

WEIGHTS = ("weight", "weight_v", "weight_orig", "original", "original1")  # with weight_norm and spectral_norm
RECURRENT = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
DENSE = ("Dense", "Linear", "DenseGeneral", "LinearGeneral")


@dataclasses.dataclass(frozen=True)
class FlaxRole:
    """How a Flax layer uses an array.

    certain: its class says so; otherwise the array's name suggests it. alike: it lies as in PyTorch, if it can.
    """

    kind: str
    certain: bool = False
    equation: str = ""
    alike: bool = False


def classes(owner: Any) -> set[str]:
    """Names of an object's class and its bases, and of the class that TorchScript compiled."""
    return {getattr(owner, "original_name", "")} | {base.__name__ for base in type(owner).__mro__}


def torch_role(owner: Any, key: str, shape: Shape) -> str:
    """The role of a tensor of a PyTorch layer."""
    names, leaf = classes(owner), key.rpartition(".")[2]
    if leaf.endswith("bias") and len(shape) == 1:
        return "bias"
    if names & {"MultiheadAttention", *RECURRENT} and leaf.startswith(("in_proj", "q_", "k_", "v_", "weight_")):
        return "linear"
    if leaf not in WEIGHTS or len(shape) < 2:
        return "plain"
    if names & {"Embedding", "EmbeddingBag"}:
        return "table"
    if "Conv1D" in names:
        return "linear io"
    if any(name.startswith("ConvTranspose") for name in names):
        return "transposed conv"
    if names & {"Conv1d", "Conv2d", "Conv3d"}:
        return "conv"
    return "linear" if "Linear" in names else "plain"


def flax_role(owner: Any, leaf: str) -> FlaxRole:
    """The role of an array of a Flax layer; owner: None if it is unknown."""
    names = classes(owner)
    if leaf == "bias":
        return FlaxRole("bias")
    if leaf == "weight":
        return FlaxRole("plain", alike=True)
    if leaf in ("w", "weights"):
        return FlaxRole("matrix")
    if leaf in ("embedding", "embeddings"):
        return FlaxRole("table", "Embed" in names)
    if leaf != "kernel":
        return FlaxRole("plain")
    if "ConvTranspose" in names:
        return FlaxRole("swapped conv" if owner.transpose_kernel else "transposed conv", certain=True)
    if names & {"Conv", "_Conv"}:
        return FlaxRole("conv", certain=True)
    if "Einsum" in names and owner.einsum_str:
        return FlaxRole("einsum", certain=True, equation=owner.einsum_str.replace(" ", ""))
    return FlaxRole("kernel", bool(names & set(DENSE)))


def layouts_of(torch: str, flax: FlaxRole, shape: Shape, target: Shape) -> list[Axes]:
    """The layouts in which a tensor fits an array, the most usual one first; empty if none does."""
    if math.prod(shape) != math.prod(target):
        return []
    for tier in tiers(torch, flax, shape, target):
        found: list[Axes] = []
        for text in tier:
            try:
                axes = Layout.parse(text).fit(shape, target)
            except ValueError:
                continue
            if not any(same(axes, other) for other in found):
                found.append(axes)
        if found:
            return found
    return []


def fits(owner: Any, key: str, shape: Shape, leaf: str, target: Shape, parts: int = 1) -> bool:
    """True if a tensor of a PyTorch layer, or one of equal parts of its outputs, fits an array by a known rule.

    leaf: the last word of the array's path; the class of Flax's layer is not taken into account.
    """
    torch, flax = torch_role(owner, key, shape), flax_role(None, leaf)
    for axis in split_axes(torch, flax, len(shape))[: 1 if parts > 1 else None]:
        if parts > 1 and shape[axis] % parts:
            return False
        size = shape[axis] // parts
        return bool(layouts_of(torch, flax, (*shape[:axis], size, *shape[axis + 1 :]), target))
    return parts == 1 and bool(layouts_of(torch, flax, shape, target))


def split_axes(torch: str, flax: FlaxRole, rank: int) -> list[int]:
    """The axes along which a tensor is divided between several arrays, the most usual one first."""
    if torch in ("linear", "conv", "bias"):
        return [0]
    if torch in ("linear io", "transposed conv"):
        return [1]
    axes = list(range(rank))
    return axes if torch == "plain" and flax.kind != "plain" else axes[::-1]


def same(axes: Axes, other: Axes) -> bool:
    """True if two layouts move all numbers alike: they differ in axes of length 1 at most."""
    forms = []
    for each in (axes, other):
        kept = [axis for axis in each.order if each.split[axis] > 1]
        reverse = [each.order[i] for i in each.reversed if each.split[each.order[i]] > 1]
        forms.append(([each.split[axis] for axis in sorted(kept)], merged(kept, sorted(kept)), reverse))
    return forms[0] == forms[1]


def merged(order: Sequence[int], axes: Sequence[int]) -> list[int]:
    """The places of axes in their sorted order."""
    return [axes.index(axis) for axis in order]


def tiers(torch: str, flax: FlaxRole, shape: Shape, target: Shape) -> Iterator[list[str]]:
    """Layouts that roles and ranks allow, not all of which fit; those of a later tier count if none before fits."""
    alike = list(same_order(shape, target))
    if flax.alike:
        yield alike
    turned = ["a b -> b a"] if len(shape) == 2 else ["... o i -> ... i o", "o i ... -> ... i o"]
    if torch in ("linear", "linear io", "conv", "transposed conv"):
        yield list(roled(torch, flax, shape, target))
        if not flax.certain:
            yield alike
            yield turned
    elif torch == "bias" or flax.kind == "bias":
        yield [*split_vector(shape, target), *alike]
    elif torch == "table":
        yield from (turned, alike) if flax.kind == "kernel" else (alike, turned)
    elif flax.kind in ("plain", "table", "matrix") or len(shape) < 2:
        yield alike
        yield turned if len(shape) > 1 else []
    else:
        yield [*turned[::-1], *alike]


def roled(torch: str, flax: FlaxRole, shape: Shape, target: Shape) -> Iterator[str]:
    """Layouts of a tensor with input and output axes."""
    window = [f"k{i}" for i in range(len(shape) - 2)]
    k = " ".join(window)
    left = f"i o {k}".strip() if torch in ("linear io", "transposed conv") else f"o i {k}".strip()
    if flax.kind == "einsum":
        yield from of_equation(flax.equation, torch, target)
        return
    if flax.kind == "table":
        yield f"{left} -> o i"
        return
    if window and len(target) == len(shape):
        if flax.kind == "plain":
            yield f"{left} -> {left}"
        if torch == "transposed conv":
            reverse = " ".join(f"~{name}" for name in window)
            swapped, usual = f"{left} -> {k} o i", f"{left} -> {reverse} i o"
            if flax.kind != "swapped conv":
                yield usual
            if flax.kind not in ("transposed conv", "conv") or not flax.certain:
                yield swapped
            if flax.kind == "plain":
                yield f"{left} -> {k} i o"
        else:
            yield f"{left} -> {k} i o"
            if flax.kind == "plain":
                yield f"{left} -> o {k} i"
        return
    ones = " 1" * len(window)  # a convolution of width 1 is a Linear
    outputs, inputs = (shape[1], shape[0]) if left.startswith("i") else shape[:2]
    if any(size != 1 for size in shape[2:]):
        return
    for chosen in divisions(flax.kind, target, outputs, inputs):
        several = {which: chosen.count(which) > 1 for which in (True, False)}
        names = [("o" if out else "i") + (str(j) if several[out] else "") for j, out in enumerate(chosen)]
        o, i = (grouped([n for n in names if n.startswith(which)]) for which in "oi")
        sizes = " ".join(f"{name}={size}" for name, size in zip(names, target, strict=True))
        yield f"{f'{i} {o}' if left.startswith('i') else f'{o} {i}'}{ones} -> {' '.join(names)} | {sizes}"


def grouped(names: Sequence[str]) -> str:
    """Axes as one axis of a layout."""
    return names[0] if len(names) == 1 else f"({' '.join(names)})"


def divisions(kind: str, target: Shape, outputs: int, inputs: int) -> Iterator[tuple[bool, ...]]:
    """For each axis of an array if it belongs to the outputs: all ways that give both sizes.

    The input axes of a kernel come first; those of a matrix usually do, and those of a plain array are anywhere.
    """
    rank = len(target)
    ways: list[tuple[bool, ...]] = []
    if kind != "plain":
        ways += [tuple(j >= split for j in range(rank)) for split in range(rank, -1, -1)]
    if kind in ("plain", "matrix"):
        ways += itertools.product((True, False), repeat=min(rank, 8))
    for way in dict.fromkeys(ways):
        sizes = [math.prod(t for t, out in zip(target, way, strict=False) if out is which) for which in (True, False)]
        if len(way) == rank and sizes == [outputs, inputs]:
            yield way


def of_equation(equation: str, torch: str, target: Shape) -> Iterator[str]:
    """The layout of an Einsum's kernel: contracted axes are inputs, in the operand's order; the others are outputs."""
    (operand, kernel), result = equation.partition("->")[0].split(","), equation.partition("->")[2]
    sizes = dict(zip(kernel, target, strict=False))
    i = " ".join(name for name in operand if name in sizes and name not in result)
    o = " ".join(name for name in result if name in sizes)
    given = " ".join(f"{name}={size}" for name, size in sizes.items())
    left = f"({i}) ({o})" if torch == "linear io" else f"({o}) ({i})"
    yield f"{left} -> {' '.join(kernel)} | {given}"


def split_vector(shape: Shape, target: Shape) -> Iterator[str]:
    """The layout of a bias whose features have several axes in Flax, as those of its kernel."""
    if len(shape) == 1:
        names = [f"a{i}" for i in range(len(target))]
        sizes = " ".join(f"{name}={size}" for name, size in zip(names, target, strict=True))
        yield f"({' '.join(names)}) -> {' '.join(names)} | {sizes}"


def same_order(shape: Shape, target: Shape) -> Iterator[str]:
    """The layout of arrays that differ in axes of length 1 at most."""
    if [size for size in shape if size > 1] == [size for size in target if size > 1]:
        names = iter(f"a{i}" for i in range(len(shape)))
        left = ["1" if size == 1 else next(names) for size in shape]
        kept = iter(word for word in left if word != "1")
        yield f"{' '.join(left)} -> {' '.join('1' if size == 1 else next(kept) for size in target)}"
