"""Functions exchanged, applied along another axis or left out: activations, softmax, attention, additions."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from parity.locate.hints.mistake import Context, Mistake, Replacement, Subject, attributes, functions, nth

Activation = Callable[[torch.Tensor], torch.Tensor]

# By the name in hints; the first of each function's forms is PyTorch's default.
ACTIVATIONS: dict[str, Activation] = {
    "gelu (tanh approximation)": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu (exact)": functional.gelu,
    "gelu (x·sigmoid(1.702 x))": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu (slope 0.01)": lambda x: functional.leaky_relu(x, 0.01),
    "elu": functional.elu,
    "celu": functional.celu,
    "selu": functional.selu,
    "softplus": functional.softplus,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "hardtanh": functional.hardtanh,
    "relu6": functional.relu6,
    "mish": functional.mish,
    "squared relu": lambda x: torch.relu(x).square(),
    "softsign": functional.softsign,
    "logsigmoid": functional.logsigmoid,
    "no activation": lambda x: x,
}
LONGEST = 1 << 30  # positions: a diagonal that hides nothing
NAMES = {text.partition(" ")[0] for text in ACTIVATIONS} - {"squared", "no", "logsigmoid"} | {"log_sigmoid", "prelu"}
LEAFS = ("gelu", "silu", "swish", "relu", "activation", "mish", "elu")  # in names of classes without parameters


def activations(subject: Subject) -> Iterator[Mistake]:
    """Each activation that is called, or a module that computes one, replaced by each other."""
    found = sorted(name for name in NAMES if subject.uses(name))
    composed = [m for m in subject.module.modules() if computes_one(m)]
    for text, activation in ACTIVATIONS.items():
        for name in found:
            if text.split(" ")[0] != name or "(" in text:
                own = "another form" if text.startswith(f"{name} ") else name
                yield Mistake(f"activation: Flax has {text}, PyTorch {own}", functions({name: instead(activation)}))
        if composed:
            yield Mistake(
                f"activation: Flax has {text}, PyTorch {type(composed[0]).__name__}",
                attributes([(m, "forward", activation) for m in composed]),
            )


def one_activation(subject: Subject) -> Iterator[Mistake]:
    """One of several calls of an activation replaced by another."""
    for name in sorted(name for name in NAMES if subject.uses(name)):
        n = len(subject.used.get(name, [])) + len(subject.used.get(f"{name}_", []))
        for i in range(n) if 1 < n <= 4 else ():
            for text, activation in ACTIVATIONS.items():
                yield Mistake(
                    f"activation {i + 1} of {n}: Flax has {text}, PyTorch {name}", nth(name, i, instead(activation))
                )


def instead(activation: Activation) -> Replacement:
    """A replacement that calls an activation with the first argument alone."""
    return lambda _, args, kwargs: activation(args[0])


def computes_one(module: nn.Module) -> bool:
    """True for a module written in Python that computes an activation, as transformers has for each GELU."""
    if type(module).__module__.startswith("torch.nn") or next(module.children(), None) is not None:
        return False
    name = type(module).__name__.lower()
    return any(word in name for word in LEAFS) and next(module.parameters(), None) is None


def axis_of(args: tuple, kwargs: dict[str, Any]) -> int:
    """The axis of a softmax."""
    axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    return axis % args[0].ndim


def attention(subject: Subject) -> Iterator[Mistake]:
    """Softmax along another axis, masks that are ignored, inverted or off by one, another half of a causal mask."""
    if subject.uses("softmax", "log_softmax"):
        rank = max(len(s[0]) for name in ("softmax", "log_softmax") for s in subject.used.get(name, []) if s)

        def along(axis: int, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            same = axis_of(args, kwargs) == (args[0].ndim + axis)
            return function(args[0], dim=axis_of(args, kwargs) if same else axis)

        for axis in range(-1, -rank - 1, -1):
            change = functools.partial(along, axis)
            yield Mistake(
                f"softmax: Flax has it along axis {axis}, PyTorch along another",
                functions({"softmax": change, "log_softmax": change}),
            )
    if subject.uses("scaled_dot_product_attention"):
        yield from fused_attention()
    for name, text in (("masked_fill", "masked_fill"), ("where", "where")):
        if subject.uses(name):
            yield Mistake(f"mask ignored ({text})", functions({name: unmasked}))
            yield Mistake(f"mask inverted ({text})", functions({name: inverted}))
    for name in ("tril", "triu"):
        if subject.uses(name):
            for by in (1, -1):
                yield Mistake(
                    f"causal mask: Flax's diagonal is moved by {by:+d}",
                    functions({name: functools.partial(moved, by)}),
                )
    if subject.uses("add"):
        yield Mistake("additive mask ignored", functions({"add": without_mask}))


def fused_attention() -> Iterator[Mistake]:
    """Mistakes in the mask of scaled_dot_product_attention."""

    def changed(**new: Any) -> Context:
        def call(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            given |= kwargs
            if "attn_mask" in new and given.get("attn_mask") is not None:
                given["attn_mask"] = new["attn_mask"](given["attn_mask"])
            if "is_causal" in new:
                if given.get("is_causal"):
                    query, key = (given[n].shape[-2] for n in ("query", "key"))
                    mask = new["is_causal"](query, key)
                    given |= {"attn_mask": mask.to(given["query"].device), "is_causal": False}
                elif given.get("attn_mask") is None and new.get("add"):
                    given["is_causal"] = True
            tensors = [given.pop(n) for n in ("query", "key", "value")]
            return function(*tensors, **given)

        return functions({"scaled_dot_product_attention": call})

    def causal(diagonal: int) -> Callable[[int, int], torch.Tensor]:
        return lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(diagonal)

    yield Mistake("attention mask ignored", changed(attn_mask=lambda m: None))
    yield Mistake(
        "attention mask inverted",
        changed(attn_mask=lambda m: ~m if m.dtype == torch.bool else -m),
    )
    yield Mistake("causal mask ignored", changed(is_causal=causal(LONGEST)))
    for by in (1, -1):
        yield Mistake(f"causal mask: Flax's diagonal is moved by {by:+d}", changed(is_causal=causal(by)))
    yield Mistake(
        "causal mask aligned at the last query and key",
        changed(is_causal=lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q)),
    )
    yield Mistake("Flax's attention is causal, PyTorch's is not", changed(is_causal=causal(LONGEST), add=True))


def unmasked(_: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The scores without masked_fill, or the branch of a where that is no constant."""
    if isinstance(args[0], torch.Tensor) and args[0].dtype != torch.bool:
        return args[0]
    branches = [a for a in args[1:3] if isinstance(a, torch.Tensor) and a.ndim]
    return max(branches, key=lambda a: a.numel())


def inverted(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The same with the mask inverted."""
    i = 0 if args[0].dtype == torch.bool else 1
    return function(*args[:i], ~args[i].bool(), *args[i + 1 :], **kwargs)


def moved(by: int, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A triangle whose diagonal is moved."""
    diagonal = kwargs.get("diagonal", args[1] if len(args) > 1 else 0)
    return function(args[0], diagonal=diagonal + by)


def without_mask(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A sum without a term that holds a large negative constant."""
    tensors = [a for a in args[:2] if isinstance(a, torch.Tensor) and a.is_floating_point()]
    if len(tensors) == 2:
        masks = [a for a in tensors if a.numel() and float(a.detach().min()) < -1e3]
        if len(masks) == 1:
            other = tensors[0] if masks[0] is tensors[1] else tensors[1]
            return other.expand(torch.broadcast_shapes(*(t.shape for t in tensors)))
    return function(*args, **kwargs)


def left_out(subject: Subject) -> Iterator[Mistake]:
    """Each sum, product and quotient of tensors without its second term; each sum with the sign reversed."""
    for name, word in (("add", "sum"), ("mul", "product"), ("div", "quotient")):
        calls = subject.used.get(name, [])
        for n, shapes in enumerate(calls[:12]):
            if len(shapes) != 2 and name == "add":
                continue
            about = " and ".join(str(list(shape)) for shape in shapes)
            for keep in range(len(shapes)):

                def only(_: Callable[..., Any], args: tuple, kwargs: dict[str, Any], keep: int = keep) -> Any:
                    tensors = [a for a in args if isinstance(a, torch.Tensor)]
                    return tensors[keep].expand(torch.broadcast_shapes(*(t.shape for t in tensors))).clone()

                text = f"{word} of {about}: Flax has the {('first', 'second')[keep]} term alone"
                if len(shapes) == 1:
                    text = f"{word} of {about} and a constant: Flax has no constant"
                yield Mistake(text, nth(name, n, only))
            if name == "add":
                yield Mistake(f"{word} of {about}: Flax subtracts", nth("add", n, difference))


def difference(_: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """The difference of two terms."""
    return args[0] - args[1]


def sqrt_width(shapes: list[tuple[tuple[int, ...], ...]]) -> float:
    """√ of the last axis of the first call's first tensor; 1 if there is none."""
    return math.sqrt(shapes[0][0][-1]) if shapes and shapes[0] and shapes[0][0] else 1.0
