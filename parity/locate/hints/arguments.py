"""Arguments that Flax ignores, inverts or exchanges: masks, positions, states."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as tree

from parity.locate.hints.mistake import Context, Mistake, Subject, attributes

Change = Callable[[torch.Tensor], Any]


def mistakes(subject: Subject) -> Iterator[Mistake]:
    """Each kind of change to the arguments of the module's own call."""
    module = subject.module

    def on(applies: Change, function: Change) -> Context:
        original = module.forward

        def one(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, torch.Tensor) and applies(leaf) else leaf

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree.tree_map(one, (args, kwargs))
            return original(*args, **kwargs)

        return attributes([(module, "forward", call)])

    def swapped() -> Context:
        original = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            first, second, *rest = args
            return original(second, first, *rest, **kwargs)

        return attributes([(module, "forward", call)])

    yield Mistake("mask ignored", on(is_boolean, torch.ones_like))
    yield Mistake("mask ignored", on(is_boolean, torch.zeros_like))
    yield Mistake("mask inverted", on(is_boolean, torch.logical_not))
    yield Mistake("mask ignored", on(is_padding, torch.ones_like))
    yield Mistake("mask inverted", on(is_padding, lambda m: 1 - m))
    yield Mistake("additive mask ignored", on(is_additive, torch.zeros_like))
    for by in (1, -1):
        yield Mistake(
            f"mask is off by {by:+d} along its last axis",
            on(is_mask, functools.partial(torch.roll, shifts=by, dims=-1)),
        )
        yield Mistake(f"positions are off by {by:+d}", on(is_index, functools.partial(torch.add, other=by)))
    yield Mistake("mask transposed", on(lambda m: is_mask(m) and m.ndim > 1, lambda m: m.mT))
    yield Mistake("the first two arguments exchanged", swapped())


def is_boolean(leaf: torch.Tensor) -> bool:
    """True for a boolean tensor."""
    return leaf.dtype == torch.bool


def is_padding(leaf: torch.Tensor) -> bool:
    """True for numbers that are all 0 or 1, with both among them."""
    return leaf.dtype != torch.bool and leaf.numel() > 1 and set(leaf.detach().unique().tolist()) == {0, 1}


def is_additive(leaf: torch.Tensor) -> bool:
    """True for a floating mask: 0 and large negative constants."""
    return leaf.is_floating_point() and leaf.numel() > 0 and float(leaf.detach().min()) < -1e3


def is_mask(leaf: torch.Tensor) -> bool:
    """True for a mask of any of these kinds."""
    return leaf.ndim > 0 and (is_boolean(leaf) or is_padding(leaf) or is_additive(leaf))


def is_index(leaf: torch.Tensor) -> bool:
    """True for integers that are no mask."""
    return not leaf.is_floating_point() and leaf.dtype != torch.bool and not is_padding(leaf)
