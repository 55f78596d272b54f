"""Numbers: attributes such as an epsilon, a slope or a scale, and factors of scores and embeddings, solved for."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from parity.locate.hints.functions import sqrt_width
from parity.locate.hints.mistake import Context, Family, Mistake, Subject, attributes, functions

EPSILON = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps", "norm_eps", "rms_norm_eps")
IGNORED = ("p", "dropout", "momentum", "rate", "drop_prob", "attention_dropout", "hidden_dropout", "dropout_p")
SMALL = (0.0, 1e-16, 1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CALLED = (("embedding", "embeddings"), ("matmul", "matrix products"), ("linear", "linear layers' outputs"))
AROUND = (1e-3, 1e-2, 0.1, 0.3, 0.9, 1.1, 3.0, 10.0, 100.0, 1e3)


def attributes_of(subject: Subject) -> Iterator[Mistake | Family]:
    """Each attribute that is a number: of all modules at once, then of one module."""
    found: dict[str, list[tuple[Any, str, float]]] = {}
    for path, part in subject.module.named_modules():
        for name, value in vars(part).items():
            number = isinstance(value, float) and math.isfinite(value)
            if name in EPSILON and value is None:
                number, value = True, torch.finfo(torch.float64).eps
            if number and not name.startswith("_") and name not in IGNORED:
                found.setdefault(name, []).append((part, path, float(value)))
    for name in sorted(found, key=lambda name: (name not in EPSILON, name)):
        groups = [found[name]] + ([[one] for one in found[name]] if len(found[name]) > 1 else [])
        for group in groups:
            owner = f" of {group[0][1]}" if len(group) == 1 and group[0][1] else ""
            own = group[0][2]
            what = "epsilon" if name in EPSILON else name

            def text(value: float, what: str = what, owner: str = owner, own: float = own) -> str:
                return f"{what}{owner}: Flax has {value:g}, PyTorch {own:g}"

            def change(value: float, group: list = group, name: str = name) -> Context:
                return attributes([(part, name, value) for part, _, _ in group])

            if name in EPSILON:
                yield Family(text, change, SMALL)
            else:
                scale = abs(own) or 1.0
                yield Family(text, change, tuple(scale * factor for factor in AROUND))
                yield Mistake(text(0.0), change(0.0))
                yield Mistake(text(-own), change(-own))


def times(what: str, factor: float) -> str:
    """The hint for a factor."""
    return f"{what} are {factor:g} times PyTorch's"


def factors(subject: Subject) -> Iterator[Mistake | Family]:
    """Factors of attention scores, of embeddings and of logits."""
    used = subject.used
    if subject.uses("scaled_dot_product_attention"):
        width = sqrt_width(used["scaled_dot_product_attention"])

        def attention(factor: float) -> Context:
            def call(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
                scale = kwargs.pop("scale", None) or 1 / math.sqrt(args[0].shape[-1])
                return function(*args, **kwargs, scale=factor * scale)

            return functions({"scaled_dot_product_attention": call})

        yield Mistake("attention without its scale 1/√d", attention(width))
        yield Mistake("attention scaled by 1/d instead of 1/√d", attention(1 / width))
        yield Family(functools.partial(times, "attention scores"), attention, AROUND)
    if subject.uses("softmax"):

        def scores(factor: float) -> Context:
            return functions({"softmax": lambda f, args, kwargs: f(args[0] * factor, *args[1:], **kwargs)})

        widths = {
            math.sqrt(s[0][-1]) for name in ("matmul", "bmm", "baddbmm") for s in used.get(name, []) if s and s[0]
        }
        for width in sorted(widths):
            yield Mistake("attention without its scale 1/√d", scores(width))
            yield Mistake("attention scaled by 1/d instead of 1/√d", scores(1 / width))
        yield Family(functools.partial(times, "attention scores"), scores, AROUND)
    for name, what in (
        ("embedding", "embeddings"),
        ("matmul", "matrix products"),
        ("linear", "linear layers' outputs"),
    ):
        if subject.uses(name):
            calls = used[name]

            def scaled(factor: float, name: str = name) -> Context:
                return functions({name: lambda f, args, kwargs: f(*args, **kwargs) * factor})

            if name == "embedding":
                yield Mistake(
                    "embeddings are scaled by √d in Flax alone",
                    scaled(math.sqrt(max(s[0][-1] for s in calls if s))),
                )
            yield Family(functools.partial(times, what), scaled, AROUND)
