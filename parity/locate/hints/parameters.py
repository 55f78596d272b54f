"""Mistakes in parameters: biases and scales that are missing or doubled, kernels transposed or reversed."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from parity.locate.hints.mistake import Context, Mistake, Subject, values, where


def changed(module: nn.Module, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Context:
    """A context that gives a parameter or buffer other values."""
    tensor = dict([*module.named_parameters(), *module.named_buffers()])[name]
    return values({tensor: function(tensor.detach())})


def is_bias(name: str) -> bool:
    """True for a parameter that is a bias: 'bias', 'in_proj_bias', 'bias_ih_l0'."""
    return "bias" in name.rpartition(".")[2]


def biases_and_scales(subject: Subject) -> Iterator[Mistake]:
    """One parameter after the other: without it, twice, as 1 + weight, transposed, with its window reversed."""
    module = subject.module
    named = list(module.named_parameters())
    for name, parameter in named:
        owner = where(name)
        last = name.rpartition(".")[2]
        known = last if last not in ("bias", "weight") else ""
        if is_bias(name):
            yield Mistake(f"missing bias{known and f' {known}'}{owner}", changed(module, name, torch.zeros_like))
            yield Mistake(f"bias added twice{known and f': {known}'}{owner}", changed(module, name, lambda p: 2 * p))
        elif parameter.ndim <= 1:
            yield Mistake(f"missing scale{known and f' {known}'}{owner}", changed(module, name, torch.ones_like))
            yield Mistake(f"scale taken as 1 + weight{owner}", changed(module, name, lambda p: 1 + p))
            yield Mistake(f"scale taken as weight - 1{owner}", changed(module, name, lambda p: p - 1))
        if parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]:
            yield Mistake(f"transposed kernel{owner}", changed(module, name, torch.t))
        if parameter.ndim > 2:
            reverse = functools.partial(torch.flip, dims=tuple(range(2, parameter.ndim)))
            yield Mistake(f"kernel's window reversed{owner}", changed(module, name, reverse))
            if parameter.ndim == 4 and parameter.shape[2] == parameter.shape[3]:
                yield Mistake(f"kernel's window transposed{owner}", changed(module, name, lambda p: p.mT))
            if parameter.shape[0] == parameter.shape[1]:
                swap = changed(module, name, lambda p: p.transpose(0, 1))
                yield Mistake(f"kernel's inputs and outputs exchanged{owner}", swap)
    biases = [p for name, p in named if is_bias(name)]
    if len(biases) > 1:
        yield Mistake("missing biases", values({p: torch.zeros_like(p) for p in biases}))
        yield Mistake("biases added twice", values({p: 2 * p.detach() for p in biases}))
    for last in sorted({name.rpartition(".")[2] for name, p in named if p.ndim <= 1 and not is_bias(name)}):
        same = [p for name, p in named if p.ndim <= 1 and name.rpartition(".")[2] == last]
        if len(same) > 1:
            yield Mistake(f"missing scales {last}", values({p: torch.ones_like(p) for p in same}))
            yield Mistake("scales taken as 1 + weight", values({p: 1 + p.detach() for p in same}))


def forgotten(subject: Subject) -> Iterator[Mistake]:
    """Tables and buffers that Flax does not use, and parameters exchanged with others of their shape."""
    module = subject.module
    layers = [p for m in module.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
    kernels = {id(p) for p in layers if p.ndim > 1}
    for name, parameter in module.named_parameters():
        if (parameter.ndim > 1 and id(parameter) not in kernels) or name.rpartition(".")[2] not in ("weight", "bias"):
            zero = changed(module, name, torch.zeros_like)
            yield Mistake(f"{name} is not added", zero)
            yield Mistake(f"{name} taken for 1", changed(module, name, torch.ones_like))
            if parameter.ndim > 1:
                for by in (1, -1):
                    shifted = changed(module, name, functools.partial(torch.roll, shifts=by, dims=0))
                    yield Mistake(f"rows of {name} are off by {by:+d}", shifted)
    for name, buffer in module.named_buffers():
        if buffer.dtype == torch.bool:
            yield Mistake(f"mask {name} ignored", changed(module, name, torch.ones_like))
            yield Mistake(f"mask {name} inverted", changed(module, name, torch.logical_not))
        elif buffer.is_floating_point():
            yield Mistake(f"buffer {name} taken for 0", changed(module, name, torch.zeros_like))
            yield Mistake(f"buffer {name} taken for 1", changed(module, name, torch.ones_like))
            yield Mistake(f"buffer {name} with the opposite sign", changed(module, name, torch.neg))
    yield from exchanged(subject)


def exchanged(subject: Subject) -> Iterator[Mistake]:
    """Two parts of equal parameters exchanged, as of query and key."""
    parts = [(name, part) for name, part in subject.module.named_modules() if name]
    shapes = [{n: tuple(p.shape) for n, p in part.named_parameters()} for _, part in parts]
    found = 0
    for i in range(len(parts)):
        for j in range(i + 1, len(parts)):
            if not shapes[i] or shapes[i] != shapes[j] or found >= 40:
                continue
            found += 1
            (first, a), (second, b) = parts[i], parts[j]
            others = dict(b.named_parameters())
            new = {p: others[n].detach() for n, p in a.named_parameters()}
            back = {others[n]: p.detach() for n, p in a.named_parameters()}
            yield Mistake(f"weights of {first} and {second} exchanged", values(new | back))
