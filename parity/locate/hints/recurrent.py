"""Recurrent layers of torch.nn: order of gates, biases of single gates, the GRU's reset before the product."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from parity.locate.hints.mistake import Mistake, Subject, attributes, values

GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}


def mistakes(subject: Subject) -> Iterator[Mistake]:
    """Mistakes in every LSTM and GRU inside the module."""
    for kind, gates in GATES.items():
        n_gates, layers = len(gates), [m for m in subject.module.modules() if type(m).__name__ in (kind, f"{kind}Cell")]
        if not layers:
            continue
        tensors = [
            p for m in layers for n, p in m.named_parameters(recurse=False) if n.startswith(("weight_", "bias_"))
        ]
        tensors = [p for p in tensors if p.shape[0] % len(gates) == 0]
        biases = [(m, n, p) for m in layers for n, p in m.named_parameters(recurse=False) if n.startswith("bias_")]
        for word in ("bias_ih", "bias_hh"):
            lost = [p for _, n, p in biases if n.startswith(word)]
            if lost:
                yield Mistake(
                    f"{kind}: missing second bias, {word}",
                    values({p: torch.zeros_like(p) for p in lost}),
                )
        for order in list(itertools.permutations(range(len(gates))))[1:]:
            yield Mistake(
                f"{kind}: order of gates, Flax takes {', '.join(gates)} from {', '.join(gates[i] for i in order)}",
                values({p: blocks(p, order, n_gates) for p in tensors}),
            )
        for i, gate in enumerate(gates):
            for word in ("bias_ih", "bias_hh"):
                some = [p for _, n, p in biases if n.startswith(word)]
                zero = values({p: with_block(p, i, n_gates, 0.0) for p in some})
                yield Mistake(f"{kind}: {word} of gate {gate} is not added", zero)
                if kind == "GRU" or word == "bias_hh":
                    continue
                more = values({p: with_block(p, i, n_gates, 1.0) for p in some})
                yield Mistake(f"{kind}: 1 is added to gate {gate}", more)
        if kind == "GRU":
            yield Mistake(
                "GRU: Flax applies the reset gate before the product, PyTorch after it",
                attributes([(m, "forward", reset_before(m)) for m in layers]),
            )


def blocks(tensor: torch.Tensor, order: tuple[int, ...], n: int) -> torch.Tensor:
    """The tensor with its n blocks of rows in another order."""
    parts = tensor.detach().chunk(n)
    return torch.cat([parts[i] for i in order])


def with_block(tensor: torch.Tensor, i: int, n: int, value: float) -> torch.Tensor:
    """The tensor with block i of n set to 0, or with a value added to it."""
    parts = list(tensor.detach().clone().chunk(n))
    parts[i] = parts[i] + value if value else torch.zeros_like(parts[i])
    return torch.cat(parts)


def reset_before(module: Any) -> Any:
    """forward of a GRU or GRUCell of one direction whose reset gate multiplies the state before the product."""

    def step(x: torch.Tensor, h: torch.Tensor, suffix: str) -> torch.Tensor:
        w_ih, w_hh = (getattr(module, f"weight_{kind}{suffix}") for kind in ("ih", "hh"))
        b_ih, b_hh = (getattr(module, f"bias_{kind}{suffix}", torch.zeros(len(w_ih))) for kind in ("ih", "hh"))
        b_ih, b_hh = (torch.zeros(len(w_ih)) if b is None else b for b in (b_ih, b_hh))
        i, b, w = (x @ w_ih.T + b_ih).chunk(3, -1), b_hh.chunk(3), w_hh.chunk(3)
        r, z = (torch.sigmoid(i[k] + h @ w[k].T + b[k]) for k in range(2))
        n = torch.tanh(i[2] + (r * h) @ w[2].T + b[2])
        return (1 - z) * n + z * h

    def cell(x: torch.Tensor, h: torch.Tensor | None = None) -> torch.Tensor:
        h = x.new_zeros(*x.shape[:-1], module.hidden_size) if h is None else h
        return step(x, h, "")

    def layers(x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.transpose(0, 1) if module.batch_first and x.ndim == 3 else x
        states = []
        for layer in range(int(module.num_layers)):
            h = x.new_zeros(*x.shape[1:-1], module.hidden_size) if state is None else state[layer]
            outputs = []
            for t in x:
                h = step(t, h, f"_l{layer}")
                outputs.append(h)
            x = torch.stack(outputs)
            states.append(h)
        y = x.transpose(0, 1) if module.batch_first and x.ndim == 3 else x
        return y, torch.stack(states)

    return cell if type(module).__name__.endswith("Cell") else layers
