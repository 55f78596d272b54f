"""The stack form of the Feedback Transformer against its plain form."""

import pytest
import torch

from tests.common import randomised_torch
from torch_ref.feedback import FeedbackTransformerKV
from torch_ref.feedback_stack import FeedbackTransformerKV as Stacked


def evaluate(module, x, direction):
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    (y * direction).sum().backward()
    return [y.detach(), x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters())]


def pair():
    torch.manual_seed(0)
    plain = randomised_torch(FeedbackTransformerKV(6, 3, 7, 2).double(), 0.3)
    stacked = Stacked(6, 3, 7, 2).double()
    stacked.load_state_dict(plain.state_dict())
    return plain, stacked


def test_equals_the_plain_form_call_after_call():
    plain, stacked = pair()
    for n, batch in [(1, 2), (2, 2), (19, 2), (19, 2), (7, 5)]:
        x, direction = torch.randn(2, n, batch, 6).double()
        torch.testing.assert_close(evaluate(stacked, x, direction), evaluate(plain, x, direction), rtol=0, atol=1e-11)


def test_a_second_backward_pass_counts_twice():
    """The defect that the module's docstring names: the buffer still holds the first one's gradients."""
    _, stacked = pair()
    x = torch.randn(5, 2, 6).double().requires_grad_()
    loss = stacked(x).sin().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0].clone() for _ in range(2))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first, second)
