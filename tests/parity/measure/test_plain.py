"""The fused call against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity import check
from parity.measure.plain import FUSED, TOKENS

X = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(5, 7), torch.nn.Linear(7, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Activation(nnx.Module):
    def __call__(self, x):
        return jax.nn.relu(x)


class GELU(Activation):
    def __call__(self, x):
        return jax.nn.gelu(x)


class Plain(nnx.Module):
    """Calls its sub-modules."""

    def __init__(self, activation):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 5, rngs=rngs)
        self.activation = activation

    def plain(self, x):
        return self.second(self.activation(self.first(x)))

    def __call__(self, x):
        return self.plain(x)


class Fused(Plain):
    """Does the activation's work itself."""

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


def judged(model):
    report = check(Torch(), model, X, steps=0)
    return report, next((one for one in report.checks if one.kind == FUSED), None)


@pytest.mark.parametrize("kind", [Plain, Fused])
def test_a_call_that_computes_what_the_plain_form_does_agrees(kind):
    report, fused = judged(kind(Activation()))
    assert report.passed, str(report)
    assert fused.value < 3
    assert fused.limit == 32


def test_a_sub_module_that_the_fused_call_leaves_out_differs_though_the_outputs_agree():
    report, fused = judged(Fused(GELU()))
    assert [one.kind for one in report.checks if not one.passed] == [FUSED]
    assert fused.value > 1e3
    assert report.divergence is not None
    assert report.divergence.path in ("", "activation")


def test_a_sub_module_replaced_in_flax_alone_differs_in_every_form():
    report, fused = judged(Plain(GELU()))
    assert not report.passed
    assert fused.passed


def test_a_module_without_a_plain_form_has_no_such_reading():
    class Called(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(7, 5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    assert judged(Called())[1] is None


@pytest.mark.slow
def test_a_loop_over_tokens_is_compared_for_the_first_ones():
    lengths = []

    class Looped(Plain):
        sequence_axis = 0

        def plain(self, x):
            lengths.append(len(x))
            return jnp.stack([Plain.plain(self, token) for token in x])

        def __call__(self, x):
            return Plain.plain(self, x)

    x = np.concatenate([X] * 7)  # 21 tokens
    report = check(Torch(), Looped(Activation()), x, steps=0)
    assert report.passed, str(report)
    assert max(lengths) == TOKENS
