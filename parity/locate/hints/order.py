"""Order of features: heads in fused projections, blocks of gates, heads merged and images flattened, shared keys.

Flax with the right weights and another order computes what PyTorch does with the rows or columns of a weight permuted.
"""

import itertools
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from parity.locate.hints.mistake import Mistake, Subject, features_axis, matrices, values

HEADS = ("num_heads", "n_heads", "heads", "n_head", "num_attention_heads", "nhead", "h", "head_count", "num_head")
WIDTHS = ("head_dim", "d_k", "head_size", "attention_head_size", "dim_head", "d_head", "d_kv", "dim_per_head")
QUERY = re.compile(r"(^|[._])(q|query|queries|wq|to_q|q_proj|q_lin|query_proj)$")
KEY = re.compile(r"(^|[._])(k|key|keys|wk|to_k|k_proj|k_lin|key_proj)$")
VALUE = re.compile(r"(^|[._])(v|value|values|wv|to_v|v_proj|v_lin|value_proj)$")
OUT = re.compile(r"(^|[.])(o|out|output|wo|to_out|o_proj|out_proj|out_lin|c_proj|proj|dense)$")
KEY_VALUE = re.compile(r"(^|[._])(w?kv|kv_proj|to_kv|key_value|c_kv|kv_lin)$")
QUERY_KEY_VALUE = re.compile(r"(^|[._])(w?qkv|qkv_proj|to_qkv|query_key_value|c_attn)$")
MOST_DIVISORS = 30
PARTS = ("query", "key", "value")
LAYOUTS = ("thd", "htd", "hdt", "tdh")  # part, head, feature
FUSED = re.compile(r"qkv|kv|query_key_value|c_attn|in_proj|gate_up|wi$")


def mistakes(subject: Subject) -> Iterator[Mistake]:
    """Orders of output features, then of input features, then of the heads that share keys."""
    yield from fused(subject)
    yield from head_features(subject)
    yield from inputs(subject)
    yield from shared_keys(subject)


def rows(part: Any, index: np.ndarray) -> dict[torch.Tensor, torch.Tensor]:
    """The weight and bias of a layer with its output features in another order."""
    order = torch.from_numpy(np.ascontiguousarray(index))
    changed = {part.weight: part.weight.detach().index_select(features_axis(part) % 2, order)}
    if getattr(part, "bias", None) is not None:
        changed[part.bias] = part.bias.detach()[order]
    return changed


def columns(part: Any, index: np.ndarray) -> dict[torch.Tensor, torch.Tensor]:
    """The weight of a layer with its input features in another order."""
    order = torch.from_numpy(np.ascontiguousarray(index))
    return {part.weight: part.weight.detach().index_select((features_axis(part) + 1) % 2, order)}


def projections(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers with a weight of two axes, and the packed projection of nn.MultiheadAttention."""
    yield from matrices(module)
    for name, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            packed = types.SimpleNamespace(weight=part.in_proj_weight, bias=part.in_proj_bias)
            yield f"{name}.in_proj".removeprefix("."), packed


def n_features(part: Any) -> tuple[int, int]:
    """Output and input features of a layer."""
    out, inside = part.weight.shape
    return (int(out), int(inside)) if features_axis(part) == 0 else (int(inside), int(out))


def named_heads(module: nn.Module, width: int) -> list[int]:
    """Numbers of heads by the attributes of a module and of its configuration."""
    named: list[int] = []
    for part in module.modules():
        for holder in (part, getattr(part, "config", None)):
            for name, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    named += [value] if name in HEADS else [width // value] if name in WIDTHS else []
    return [h for h in dict.fromkeys(named) if 1 < h <= width and width % h == 0]


def heads_of(module: nn.Module, width: int) -> list[int]:
    """Numbers of heads that may divide a width: those that attributes name, else all divisors."""
    return named_heads(module, width) or [h for h in divisors(width) if 1 < h < width]


def divisors(n: int) -> list[int]:
    """The smallest divisors of a number."""
    return [d for d in range(1, n + 1) if n % d == 0][:MOST_DIVISORS]


def layout(sizes: dict[str, int], order: Sequence[str]) -> np.ndarray:
    """Positions of features [t, h, d] in a layout of these axes."""
    shape = [sizes[axis] for axis in order]
    grid = np.arange(int(np.prod(shape))).reshape(shape)
    return grid.transpose([list(order).index(axis) for axis in "thd"])


def fused(subject: Subject) -> Iterator[Mistake]:
    """Fused projections of 2, 3 or 4 parts: parts in another order, or features split by another layout."""
    gates = subject.uses("sigmoid") and subject.uses("tanh")
    for n in (4, 3, 2) if gates else (3, 2):
        group = [(name, part) for name, part in projections(subject.module) if fused_of(name, part, n)]
        # A recurrent cell's gates come from two projections that have one order.
        sets = [group] if gates and len({n_features(part)[0] for _, part in group}) == 1 and len(group) > 1 else []
        for parts in [*sets, *([one] for one in group)]:
            total = n_features(parts[0][1])[0]
            named = named_heads(subject.module, total // n)
            heads = [1] if gates else [*named, 1, *heads_of(subject.module, total // n)]
            for text, index in orders(n, total, heads[:7], gates):
                owner = " and ".join(name for name, _ in parts if name) or "the fused projection"
                yield Mistake(
                    text.format(owner=owner),
                    values({tensor: value for _, part in parts for tensor, value in rows(part, index).items()}),
                )


def orders(n: int, total: int, heads: Sequence[int], gates: bool) -> Iterator[tuple[str, np.ndarray]]:
    """(hint, order of the output features) of each other way to split a projection into n parts."""
    seen = {np.arange(total).tobytes()}
    for h in heads:
        sizes = {"t": n, "h": h, "d": total // n // h}
        for torch_axes, flax_axes in itertools.product(LAYOUTS, LAYOUTS):
            for parts in itertools.permutations(range(n)):
                if torch_axes != flax_axes and parts != tuple(range(n)):
                    continue
                # PyTorch reads a feature where its layout has it; the mistake puts there what Flax reads as it.
                index = np.empty(total, int)
                index[layout(sizes, torch_axes).ravel()] = layout(sizes, flax_axes)[list(parts)].ravel()
                if index.tobytes() in seen:
                    continue
                seen.add(index.tobytes())
                if torch_axes == flax_axes:
                    yield worded(parts, gates), index
                else:
                    axes = {"t": str(n), "h": "heads", "d": "features"}
                    flax, torch_ = (
                        ", ".join(axes[c] for c in order if c != "h" or h > 1) for order in (flax_axes, torch_axes)
                    )
                    at = f" ({h} heads)" if h > 1 else ""
                    yield f"order of features in {{owner}}: Flax splits [{flax}], PyTorch [{torch_}]{at}", index


def worded(parts: Sequence[int], gates: bool) -> str:
    """The hint for parts in another order."""
    if len(parts) == 3 and not gates:
        return "parts of {owner}: Flax takes " + ", ".join(PARTS[i] for i in parts) + " for query, key, value"
    return "parts of {owner}: Flax takes the blocks in the order " + ", ".join(str(i + 1) for i in parts)


def fused_of(name: str, part: Any, n: int) -> bool:
    """True if a layer may hold n projections in one."""
    out, inside = n_features(part)
    return out % n == 0 and (out > inside or FUSED.search(name) is not None)


def head_features(subject: Subject) -> Iterator[Mistake]:
    """Query, key and value projections whose heads are laid out [features, heads]."""
    found = [(n, p) for n, p in matrices(subject.module) if any(word.search(n) for word in (QUERY, KEY, VALUE))]
    groups = [found] if len(found) > 1 else []
    groups += [[one] for one in matrices(subject.module)]
    for group in groups:
        for heads in heads_of(subject.module, n_features(group[0][1])[0])[:4]:
            if any(n_features(part)[0] % heads for _, part in group):
                continue
            which = "query, key and value" if len(group) > 1 else group[0][0] or "the layer"
            for shape, flax, torch_ in (
                ((-1, heads), f"[features, heads={heads}]", "[heads, features]"),
                ((heads, -1), f"[heads={heads}, features]", "[features, heads]"),
            ):
                new: dict[torch.Tensor, torch.Tensor] = {}
                for _, part in group:
                    new |= rows(part, np.arange(n_features(part)[0]).reshape(shape).T.ravel())
                yield Mistake(f"features of {which}: Flax has {flax}, PyTorch {torch_}", values(new))


def inputs(subject: Subject) -> Iterator[Mistake]:
    """Input features of a layer in another order: an image flattened, heads merged."""
    for name, part in matrices(subject.module):
        n = n_features(part)[1]
        for a in [d for d in divisors(n) if 1 < d < n]:
            index = np.arange(n).reshape(a, n // a).T.ravel().argsort()
            yield Mistake(
                f"input features of {name or 'the layer'}: Flax has [{n // a}, {a}], PyTorch [{a}, {n // a}] "
                "(order of flattening, or of merged heads)",
                values(columns(part, index)),
            )


def shared_keys(subject: Subject) -> Iterator[Mistake]:
    """Groups of query heads that share keys: heads repeated one by one for all of them tiled, and the reverse."""
    for query, total, few, out in grouped(dict(matrices(subject.module))):
        shared = total // few
        for width in divisors(few):
            groups = few // width
            if groups < 2:
                continue
            for there, text in (
                ((shared, groups), "Flax tiles them, PyTorch repeats each"),
                ((groups, shared), "Flax repeats each, PyTorch tiles them"),
            ):
                index = np.arange(total).reshape(*there, width).transpose(1, 0, 2).ravel()
                rest = np.arange(total, n_features(query)[0])  # keys and values in one layer with the queries
                changed = rows(query, np.concatenate([index, rest])) | columns(out, index)
                yield Mistake(f"keys and values shared by {shared} heads: {text}", values(changed))


def grouped(layers: dict[str, Any]) -> Iterator[tuple[Any, int, int, Any]]:
    """Attentions whose keys have fewer features than their queries: the layer of the queries, both numbers, the output.

    Keys and values may be in layers of their own, in one together, or in one with the queries.
    """
    queries, keys, both, fused, outs = (
        [layer for name, layer in layers.items() if word.search(name)]
        for word in (QUERY, KEY, KEY_VALUE, QUERY_KEY_VALUE, OUT)
    )
    found = [
        (query, n_features(query)[0], n_features(key)[0], out)
        for query, key, out in zip(queries, keys, outs, strict=False)
    ]
    found += [
        (query, n_features(query)[0], n_features(kv)[0] // 2, out)
        for query, kv, out in zip(queries, both, outs, strict=False)
    ]
    for layer, out in zip(fused, outs, strict=False):
        total = n_features(out)[1]
        found.append((layer, total, (n_features(layer)[0] - total) // 2, out))
    for query, total, few, out in found:
        if 0 < few < total and total % few == 0 and n_features(out)[1] == total:
            yield query, total, few, out
