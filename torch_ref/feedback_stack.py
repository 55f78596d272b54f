"""FeedbackTransformerKV over a preallocated memory, the way the original trains it: no `torch.stack` at any step.

Axes: S sequence, n steps so far, B batch, H heads, d_k features of a head.

A step's key is written in place into one tensor [S, B, H, d_k], and what a layer sees is a view of its first rows.
Autograd would refuse the writing, and copy the views' gradients; a function of its own instead adds the gradient of
each view into one shared buffer, and takes the newest row's gradient from there: when the backward pass reaches the
view that ends with row n, every later view, which alone could add to row n, has been there.

Known defects, kept because they are the design's: the buffers belong to the module, so that two forward passes before
the first one's backward pass share them, and the gradients of both are wrong; a second backward pass through one
forward pass (`retain_graph`) adds to what the first left in the buffer, and counts it twice.
"""

from typing import Any

import torch

from torch_ref.feedback import FeedbackTransformerKV as PlainFeedbackTransformerKV


# [feedback.gradient]
class View(torch.autograd.Function):
    """First rows of the memory, of which `newest` is the last; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, newest: torch.Tensor, memory: torch.Tensor, gradient: torch.Tensor, n: int) -> torch.Tensor:
        ctx.gradient, ctx.n = gradient, n
        return memory[:n]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.gradient[: ctx.n] += grad_outputs[0]
        return ctx.gradient[ctx.n - 1], None, None, None


class Stack:
    """A growing [n, B, H, d_k] in a buffer that is allocated once for a shape."""

    def __init__(self) -> None:
        self.memory = self.gradient = torch.empty(0)
        self.n = 0

    def clear(self, length: int, like: torch.Tensor) -> None:
        """Empty the stack, with room for `length` rows."""
        self.n = 0
        if self.memory.shape == (length, *like.shape) and self.memory.dtype == like.dtype:
            self.gradient.zero_()
        else:
            self.memory, self.gradient = (like.new_zeros(length, *like.shape) for _ in range(2))

    # [feedback.recurrence]
    def append(self, row: torch.Tensor) -> torch.Tensor:
        """Append a row and return all rows so far, which may be differentiated once."""
        self.memory.data[self.n] = row.detach()  # through .data, so that autograd does not record the write
        self.n += 1
        return View.apply(row, self.memory, self.gradient, self.n)


class FeedbackTransformerKV(PlainFeedbackTransformerKV):
    """The same parameters and, up to rounding, the same outputs and gradients; `memory` is not supported."""

    def __init__(self, d_model: int, heads: int, d_ff: int, n_layers: int, dropout_prob: float = 0.0):
        super().__init__(d_model, heads, d_ff, n_layers, dropout_prob)
        self.key_stack, self.value_stack = Stack(), Stack()

    # [feedback.recurrence]
    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        """[S, B, D] -> [S, B, D]."""
        outputs, key, value = [], None, None
        for x in x_seq:
            x, memory = self.step(x, key, value)
            new_key, new_value = self.key(memory), self.value(memory)
            if key is None:
                self.key_stack.clear(len(x_seq), new_key)
                self.value_stack.clear(len(x_seq), new_value)
            key, value = self.key_stack.append(new_key), self.value_stack.append(new_value)
            outputs.append(x)
        return self.norm(torch.stack(outputs))
