"""Rotary embeddings: pairs of adjacent features for the two halves, the opposite direction."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from parity.locate.hints.mistake import Context, Mistake, Subject, matrices, values
from parity.locate.hints.order import KEY, LAYOUTS, QUERY, fused_of, heads_of, layout, n_features, projections, rows

WIDTHS = ("rotary_dim", "rotary_ndims", "rotary_emb_dim", "d_rope", "rope_dim")
SPLIT = "rotary: Flax rotates adjacent features, PyTorch the two halves"
ADJACENT = "rotary: Flax rotates the two halves, PyTorch adjacent features"


def mistakes(subject: Subject) -> Iterator[Mistake]:
    """The other pairs of features: in a module or function that rotates, then in the rows of query and key."""
    module = subject.module
    if rotates(module):
        yield Mistake(SPLIT, interleaved(split=True)(module))
        yield Mistake(ADJACENT, interleaved(split=False)(module))
    if subject.uses("cat", "stack", "chunk", "view_as_complex", "softmax", "scaled_dot_product_attention"):
        yield from projected(subject)


def rotates(module: nn.Module) -> bool:
    """True if a module or a function of its file has a rotary embedding's name."""
    names = [f"{type(part).__name__} {' '.join(vars(sys.modules[type(part).__module__]))}" for part in module.modules()]
    return any("rotary" in name.lower() for name in names)


def order(n: int, *, split: bool) -> torch.Tensor:
    """The order of n features that turns one kind of pairs into the other."""
    halves = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)])
    return halves if split else halves.argsort()


def projected(subject: Subject) -> Iterator[Mistake]:
    """The same by the rows of query and key: products of queries with keys do not depend on a common order."""
    module = subject.module
    single = [(n, p) for n, p in matrices(module) if QUERY.search(n) or KEY.search(n)]
    packed = [(n, p) for n, p in projections(module) if fused_of(n, p, 3)]
    named = [v for m in module.modules() for n, v in vars(m).items() if n in WIDTHS and isinstance(v, int)]
    for group, n_parts in ((single, 1), *(([one], 3) for one in packed)):
        if not group:
            continue
        for heads in heads_of(module, n_features(group[0][1])[0] // n_parts)[:4]:
            width = n_features(group[0][1])[0] // n_parts // heads
            for rotated in dict.fromkeys(
                n for n in [*named, width, width // 2, width // 4] if 2 < n <= width and n % 2 == 0
            ):
                for split, text in ((True, SPLIT), (False, ADJACENT)):
                    within = np.arange(width)
                    within[:rotated] = order(rotated, split=split).numpy()
                    for axes in LAYOUTS[:3] if n_parts == 3 else LAYOUTS[:1]:
                        yield Mistake(text, values(reordered(group, within, n_parts, axes)))


def reordered(group: list, within: np.ndarray, n_parts: int, axes: str) -> dict[torch.Tensor, torch.Tensor]:
    """Query and key projections with the features of each head in another order."""
    new: dict[torch.Tensor, torch.Tensor] = {}
    for _, part in group:
        total = n_features(part)[0]
        heads = total // n_parts // len(within)
        places = layout({"t": n_parts, "h": heads, "d": len(within)}, axes)
        index = np.arange(total)
        for t in range(min(n_parts, 2)):  # not the value
            index[places[t].ravel()] = places[t][:, within].ravel()
        new |= rows(part, index)
    return new


def interleaved(*, split: bool) -> Callable[[nn.Module], Context]:
    """Change which features rotary embeddings pair, in a module or in the function that applies them.

    split: the module rotates the two halves, and the mistake is to rotate adjacent features; otherwise the reverse.
    """

    def rearranged(function: Callable[..., Any], n_features: int | None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            n = n_features or args[-1].shape[-1]
            there = order(n, split=split)
            back = there.argsort()

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
                    stack.enter_context(mock.patch.object(part, "forward", rearranged(part.forward, width)))
                space = vars(sys.modules[type(part).__module__])
                function = space.get("apply_rotary_pos_emb")
                if function is not None and not hasattr(function, "rearranged"):
                    stack.enter_context(mock.patch.dict(space, apply_rotary_pos_emb=rearranged(function, None)))
            yield

    return change
