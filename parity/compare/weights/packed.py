"""Layers that pack several weights in one tensor: the Flax arrays that hold the parts.

    nn.MultiheadAttention   in_proj_weight, in_proj_bias  ->  query, key, value;  out_proj  ->  out
    nn.LSTM, LSTMCell       gates i f g o in weight_ih, weight_hh  ->  dense_i, dense_h, or ii if ig io, hi hf hg ho
    nn.GRU, GRUCell         gates r z n                            ->  dense_i, dense_h, or ir iz in, hr hz hn
    nn.RNN, RNNCell                                                ->  i, h, or dense_i, dense_h

PyTorch's recurrent layers have two biases, b_ih and b_hh. Where Flax has one, it is their sum. That is the same
function, except for the gate n of a GRU, n = tanh(W x + b_in + r * (U h + b_hn)): without a place of its own b_hn is
refused.
"""

import dataclasses
import re
from collections.abc import Container, Iterator

from parity.compare.weights.roles import RECURRENT

GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": ""}
PROJECTIONS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Part:
    """One of equal parts of a tensor. name: of its array, None if it has none; slot: (i, n) for part i of n of it."""

    name: str | None
    slot: tuple[int, int] | None = None


def parts(classes: Container[str], key: str, name: str, names: Container[str]) -> list[Part] | None:
    """The parts of a packed tensor in order; None if the layer is none of these or Flax has nothing like its parts.

    classes: of the PyTorch layer. name: what the key is called in Flax. names: all arrays of the Flax model.
    """
    leaf, (base, _, last) = key.rpartition(".")[2], name.rpartition(".")
    bases = [base] if last == leaf else [name, base]
    direct = [] if last == leaf else [f"{name}.", f"{name}.cell."]  # a name may also be that of Flax's cell
    if "MultiheadAttention" in classes:
        return attention(leaf, bases, names)
    kind = next((cls.removesuffix("Cell") for cls in RECURRENT if cls in classes), None)
    match = re.fullmatch(r"(weight|bias)_([ih])h(?:_l(\d+)(_reverse)?)?", leaf)
    if kind is None or match is None:
        return None
    array, side, layer, reverse = match.groups()
    for cell in (*direct, *cells(bases, int(layer or 0), bool(reverse))):
        found = gates(kind, cell, "kernel" if array == "weight" else "bias", side, names)
        if found:
            return found
    return None


def attention(leaf: str, bases: list[str], names: Container[str]) -> list[Part] | None:
    """Parts of a tensor of nn.MultiheadAttention."""
    words = {
        "in_proj_weight": [f"{p}.kernel" for p in PROJECTIONS],
        "in_proj_bias": [f"{p}.bias" for p in PROJECTIONS],
        **{f"{p[0]}_proj_weight": [f"{p}.kernel"] for p in PROJECTIONS},
    }
    for base in bases:
        found = [f"{base}.{word}".lstrip(".") for word in words.get(leaf, ())]
        if found and all(name in names for name in found):
            return [Part(name) for name in found]
    return None


def cells(bases: list[str], layer: int, reverse: bool) -> Iterator[str]:
    """Paths where the cell of a layer and direction may be, with a dot at the end; '' is the model itself."""
    for base in bases:
        start = f"{base}." if base else ""
        towers = [start] if layer == 0 else []
        towers += [f"{start}{layer}.", *(f"{start}{word}.{layer}." for word in ("layers", "cells", "rnns"))]
        towers += [f"{start}{word}_{layer}." for word in ("layers", "cells", "rnns", "cell", "rnn")]
        for tower in towers:
            directions = ["backward_rnn.", "backward."] if reverse else ["", "forward_rnn.", "forward."]
            for direction in directions:
                yield tower + direction
                yield f"{tower}{direction}cell."


def gates(kind: str, cell: str, array: str, side: str, names: Container[str]) -> list[Part] | None:
    """Parts of a tensor in the arrays of one cell; None if the cell does not have them."""
    other = "h" if side == "i" else "i"
    n = len(GATES[kind])

    def first(options: list[str]) -> str | None:
        return next((option for option in options if option in names), None)

    fused = first([f"{cell}dense_{side}.{array}", *([f"{cell}{side}.{array}"] if kind == "RNN" else [])])
    if fused:
        return [Part(fused)]
    if array == "bias":
        shared = first([f"{cell}dense_{other}.bias", *([f"{cell}{other}.bias"] if kind == "RNN" else [])])
        if shared and kind == "GRU":
            return [Part(shared, (0, n)), Part(shared, (1, n)), Part(None)]
        if shared:
            return [Part(shared)]
    found = []
    for gate in GATES[kind]:
        options = [f"{cell}{side}{gate}{end}.{array}" for end in ("", "_")]
        if array == "bias" and (kind, gate) != ("GRU", "n"):
            options += [f"{cell}{other}{gate}{end}.{array}" for end in ("", "_")]
        found.append(first(options))
    return [Part(name) for name in found] if any(found) else None


def adds(classes: Container[str], key: str) -> bool:
    """True if a tensor is one of two biases whose sum is all that counts."""
    return key.rpartition(".")[2].startswith(("bias_ih", "bias_hh")) and any(cls in classes for cls in RECURRENT)
