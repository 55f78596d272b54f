"""Hints at the cause of an error, found by making known mistakes in a copy of PyTorch's sub-module.

A mistake is the hint if it reproduces Flax's outputs. Only a narrower precision is inferred from the size of the error
alone, because rounding leaves no other trace.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from parity.locate.calls import Key, TorchRun

EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
EXPLAINED = 1e-3  # the largest share of the error that a hint may leave unexplained

Change = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


def hint(run: TorchRun, key: Key, given: list[np.ndarray], dtype: Any) -> str:
    """One line on the cause of an error, '' if it is unknown; `given` are Flax's outputs of the call."""
    right = run.outputs(key)
    if not all(np.isfinite(array).all() for array in given):
        return "not finite"
    if [a.shape for a in given] != [a.shape for a in right]:
        return ""
    for text, change in mistakes(run.modules[key[0]]):
        outputs = repeated(run, key, change)
        if outputs is not None and explains(outputs, given, right):
            return text
    return shape_of_error(given, right) or precision(given, right, dtype)


def repeated(run: TorchRun, key: Key, change: Change) -> list[np.ndarray] | None:
    """PyTorch's outputs of the same call with a mistake; None if the module cannot run with that mistake."""
    module = copy.deepcopy(run.modules[key[0]])
    try:
        with change(module):
            outputs, _ = run.repeated(key, module)
    except Exception:  # Flax's module ran, so this mistake is not the one in it
        return None
    return [output.detach().numpy() for output in outputs]


def explains(outputs: list[np.ndarray], given: list[np.ndarray], right: list[np.ndarray]) -> bool:
    """True if the outputs of a mistake equal Flax's up to a small share of Flax's error."""
    if any(a.shape != b.shape for a, b in zip(outputs, given, strict=True)):
        return False
    left = max(float(np.abs(a - b).max(initial=0.0)) for a, b in zip(outputs, given, strict=True))
    error = max(float(np.abs(a - b).max(initial=0.0)) for a, b in zip(given, right, strict=True))
    return left < EXPLAINED * error


def mistakes(module: nn.Module) -> Iterator[tuple[str, Change]]:
    """Each known mistake that can be made in this module or inside it, with its hint."""
    yield "GELU: Flax has its tanh approximation, PyTorch the exact one", gelu("tanh")
    yield "GELU: Flax has the exact one, PyTorch its tanh approximation", gelu("none")
    for epsilon in EPSILONS:
        yield f"epsilon: Flax has {epsilon:g}, PyTorch {own_epsilon(module):g}", with_epsilon(epsilon)
    for name, parameter in module.named_parameters():
        owner = name.rpartition(".")[0]
        where = f" of {owner}" if owner else ""
        if name.endswith("bias"):
            yield f"missing bias{where}", with_values(name, torch.zeros_like)
            yield f"bias added twice{where}", with_values(name, lambda p: 2 * p)
        if name.endswith("weight") and parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]:
            yield f"transposed kernel{where}", with_values(name, torch.t)
        if name.endswith("weight") and parameter.ndim == 1:
            yield f"missing scale{where}", with_values(name, torch.ones_like)
            yield f"scale taken as 1 + weight{where}", with_values(name, lambda p: 1 + p)
        if parameter.ndim > 2:
            yield f"kernel's window reversed{where}", with_values(name, lambda p: p.flip(tuple(range(2, p.ndim))))
    yield "attention without its scale 1/√d", unscaled
    yield "rotary: Flax rotates adjacent features, PyTorch the two halves", interleaved(split=True)
    yield "rotary: Flax rotates the two halves, PyTorch adjacent features", interleaved(split=False)


def own_epsilon(module: nn.Module) -> float:
    """The first epsilon in a module; 0 if it has none."""
    found = [v for m in module.modules() for n, v in vars(m).items() if n in ("eps", "variance_epsilon")]
    return float(found[0] or 0.0) if found else 0.0


def gelu(approximate: str) -> Change:
    """Replace every GELU, function or module, by one with the given approximation."""
    original = functional.gelu

    @contextlib.contextmanager
    def change(module: nn.Module) -> Iterator[None]:
        for part in module.modules():
            if isinstance(part, nn.GELU):
                part.approximate = approximate
            elif "gelu" in type(part).__name__.lower():  # transformers has a class for each
                part.forward = lambda x: original(x, approximate=approximate)
        with mock.patch.object(functional, "gelu", lambda x, **_: original(x, approximate=approximate)):
            yield

    return change


def with_epsilon(epsilon: float) -> Change:
    """Replace every epsilon."""

    @contextlib.contextmanager
    def change(module: nn.Module) -> Iterator[None]:
        for part in module.modules():
            for name in ("eps", "variance_epsilon"):
                if name in vars(part):
                    setattr(part, name, epsilon)
        yield

    return change


def with_values(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Replace the values of a parameter by a function of them."""

    @contextlib.contextmanager
    def change(module: nn.Module) -> Iterator[None]:
        with torch.no_grad():
            parameter = module.get_parameter(name)
            parameter.copy_(function(parameter.clone()))
        yield

    return change


@contextlib.contextmanager
def unscaled(_: nn.Module) -> Iterator[None]:
    """Set the scale of attention scores to 1."""
    original = functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        return original(*args, **(kwargs | {"scale": 1.0}))

    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


def interleaved(split: bool) -> Change:
    """Change which features rotary embeddings pair, in a module or in the function that applies them.

    split: the module rotates the two halves, and the mistake is to rotate adjacent features; otherwise the reverse.
    """

    def order(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        halves = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)])
        there = halves if split else halves.argsort()
        return there, there.argsort()

    def rearranged(function: Callable[..., Any], n_features: int | None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            n = n_features or args[-1].shape[-1]
            there, back = order(n)

            def arranged(x: Any, index: torch.Tensor) -> Any:
                if not isinstance(x, torch.Tensor) or x.ndim < 3 or x.shape[-1] < n:
                    return x
                return torch.cat([x[..., :n][..., index], x[..., n:]], dim=-1)

            q_and_k = 1 if n_features else 2  # a module rotates one tensor, the function queries and keys
            given = [arranged(x, there) for x in args[:q_and_k]]
            output = function(*given, *args[q_and_k:], **kwargs)
            return arranged(output, back) if n_features else tuple(arranged(x, back) for x in output)

        call.rearranged = True  # type: ignore[attr-defined]
        return call

    @contextlib.contextmanager
    def change(module: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in list(module.modules()):
                width = next((v for n, v in vars(part).items() if n in ("d", "dim", "d_rope") and v), None)
                if "rotary" in type(part).__name__.lower() and isinstance(width, int):
                    part.forward = rearranged(part.forward, width)
                space = vars(sys.modules[type(part).__module__])
                function = space.get("apply_rotary_pos_emb")
                if function is not None and not hasattr(function, "rearranged"):
                    stack.enter_context(mock.patch.dict(space, apply_rotary_pos_emb=rearranged(function, None)))
            yield

    return change


def shape_of_error(given: list[np.ndarray], right: list[np.ndarray]) -> str:
    """A pattern in the difference: a factor, one vector everywhere, an axis shifted or reversed, few features."""
    a, b = given[0], right[0]
    if len(given) > 1 or not b.size:
        return ""
    error = float(np.abs(a - b).max())
    factor = float((a * b).sum() / ((b * b).sum() or 1.0))
    if np.abs(a - factor * b).max() < EXPLAINED * error:
        return "all zero" if abs(factor) < 1e-9 else f"PyTorch's output times {factor:.6g}"
    for axis in range(a.ndim):
        n = a.shape[axis]
        if n < 3:
            continue
        if np.abs(np.flip(a, axis) - b).max() < EXPLAINED * error:
            return f"reversed along axis {axis}"
        for by in (1, -1):
            rest = range(1, n) if by == 1 else range(n - 1)
            if np.abs(np.roll(b, by, axis).take(rest, axis) - a.take(rest, axis)).max() < EXPLAINED * error:
                return f"shifted by {by:+d} along axis {axis}"
    offset = (a - b).reshape(-1, a.shape[-1]) if a.ndim else a.reshape(1, 1)
    if len(offset) > 2 and np.abs(offset - offset[0]).max() < EXPLAINED * error:
        return "one vector is added at every position: an extra bias, or a missing one"
    changed = (np.abs(a - b) > EXPLAINED * error).mean(axis=tuple(range(a.ndim - 1))) if a.ndim > 1 else np.ones(1)
    if 0 < (changed > 0).mean() <= 0.5:
        return f"only {int((changed > 0).sum())} of {changed.size} features differ"
    return ""


def precision(given: list[np.ndarray], right: list[np.ndarray], dtype: Any) -> str:
    """A narrower type inside, by the signal-to-noise ratio: 24, 11 and 8 bits leave about 140, 65 and 48 dB."""
    noise = sum(float(np.square(a - b).sum()) for a, b in zip(given, right, strict=True))
    signal = sum(float(np.square(b).sum()) for b in right)
    if not noise or not signal:
        return ""
    snr = 10 * (np.log10(signal) - np.log10(noise))
    wide = np.dtype(dtype) == np.float64
    if wide and 120 < snr < 170:
        return f"float32 somewhere inside ({snr:.0f} dB)"
    if 35 < snr < 80 and (wide or np.dtype(dtype) == np.float32):
        return f"bfloat16 or TF32 somewhere inside, or an approximation ({snr:.0f} dB)"
    return ""
