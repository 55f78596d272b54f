"""Outputs that say nothing of a port: no array at all, or nothing but NaN and infinities."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity
from parity.compare.noise import check_counted

X = np.random.default_rng(0).standard_normal((4, 5))


class Torch(torch.nn.Module):
    def __init__(self, end):
        super().__init__()
        self.a, self.end = torch.nn.Linear(5, 7), end

    def forward(self, x):
        return self.end(self.a(x))


class Flax(nnx.Module):
    def __init__(self, end):
        self.a, self.end = nnx.Linear(5, 7, rngs=nnx.Rngs(0)), end

    def __call__(self, x):
        return self.end(self.a(x))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e35])
@pytest.mark.parametrize("function", [parity.check, parity.sweep, parity.trajectory])
def test_outputs_without_a_number_are_refused(function, number):
    pair = Torch(lambda y: y.abs() * 0 + number), Flax(lambda y: jnp.tanh(y) ** 2 * 0 + number)
    with pytest.raises(ValueError, match=r"output float64 \[4, 7\] has no finite number"):
        function(*pair, X)


def test_outputs_that_overflow_in_pytorch_are_refused_without_float64():
    """Nothing limits what a port returns in float32 where PyTorch's own result is infinite."""
    pair = Torch(lambda y: torch.exp(y + 100) / torch.exp(y * 0 + 100)), Flax(jnp.tanh)
    with pytest.raises(ValueError, match=r"output: PyTorch has NaN.* in float32"):
        parity.check(*pair, X, steps=0, float64=False)


def test_empty_outputs_are_refused():
    with pytest.raises(ValueError, match=r"output float64 \[0, 7\] has no finite number"):
        parity.check(Torch(lambda y: y[:0]), Flax(lambda y: y[:0]), X)
    check_counted({"output[0]": np.ones(3, np.int32), "output[1]": np.ones(0)})


def test_the_share_of_elements_without_a_number_is_noted(tmp_path):
    mask = np.where(np.arange(28).reshape(4, 7) < 2, 0.0, np.nan)
    pair = Torch(lambda y: y + torch.tensor(mask, dtype=y.dtype)), Flax(lambda y: y + jnp.asarray(mask, y.dtype))
    parity.record(pair[0], X, tmp_path / "masked")
    for report in (parity.check(*pair, X, steps=0), parity.replay(pair[1], tmp_path / "masked")):
        assert report.passed, str(report)
        assert any("output (26 of 28 elements)" in note for note in report.notes), report.notes
    assert not parity.check(Torch(torch.tanh), Flax(jnp.tanh), X, steps=0).notes


@pytest.mark.parametrize("result", [None, "text", ()])
def test_a_module_that_returns_no_array_is_named_with_its_side(result, tmp_path):
    kind = type(result).__name__
    with pytest.raises(ValueError, match=f"PyTorch module returns '{kind}'"):
        parity.check(Torch(lambda y: result), Flax(lambda y: y), X)
    with pytest.raises(ValueError, match=f"Flax module returns '{kind}'"):
        parity.check(Torch(lambda y: y), Flax(lambda y: result), X)
    with pytest.raises(ValueError, match=f"PyTorch module returns '{kind}'"):
        parity.record(Torch(lambda y: result), X, tmp_path / "none")


def test_what_is_returned_beside_arrays_is_noted():
    def pair(theirs, ours):
        class Theirs(torch.nn.Module):
            def forward(self, x):
                return theirs(x)

        class Ours(nnx.Module):
            def __call__(self, x):
                return ours(x)

        return Theirs(), Ours()

    x = np.ones((3, 5), np.float32)
    both = pair(
        lambda x: (2 * x, 3.0, None, (), torch.distributions.Normal(x, 1.0)),
        lambda x: (2 * x, 4.0, None, (), {"a": "b"}),
    )
    report = parity.check(*both, {"x": x}, steps=0)
    assert report.passed
    assert report.notes == (
        "PyTorch also returns output[1] (float), output[4] (Normal); not compared",
        "the Flax module also returns output[1] (float), output[4][a] (str); not compared",
    )


def test_a_module_that_cannot_be_copied_is_named():
    module = torch.nn.Linear(5, 3)
    module.items = (i for i in range(3))
    with pytest.raises(ValueError, match=r"^torch_module=Linear cannot be copied: .*generator"):
        parity.check(module, nnx.Linear(5, 3, rngs=nnx.Rngs(0)), {"x": np.ones((2, 5), np.float32)})
