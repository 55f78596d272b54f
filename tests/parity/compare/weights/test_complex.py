"""Complex parameters and buffers are carried whole, by names, by equal names and by a converter."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import parity
from jaxmodels.convert import ConversionError
from parity.compare.comparison import Comparison
from tests.parity.compare.weights.pairs import EXACT, distance, weights

ROWS = np.random.default_rng(0).standard_normal((3, 6))


class Spectral(torch.nn.Module):
    """A filter in the frequency domain, with a complex parameter and a complex buffer."""

    def __init__(self):
        super().__init__()
        self.filter = torch.nn.Parameter(torch.randn(4, dtype=torch.cfloat))
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4) / 3))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter * self.turn, n=6)


class FlaxSpectral(nnx.Module):
    def __init__(self, shape=(4,), dtype=jnp.complex64, conjugated=False):
        self.gain, self.conjugated = nnx.Param(jnp.zeros(shape, dtype)), conjugated
        self.turn = nnx.Variable(jnp.ones(4, jnp.complex64))

    def __call__(self, x):
        gain = jnp.conj(self.gain[...]) if self.conjugated else self.gain[...]
        gain = gain if gain.ndim == 1 else gain[:, 0] + 1j * gain[:, 1]
        return jnp.fft.irfft(jnp.fft.rfft(x) * gain * self.turn, n=6)


def convert(state):
    return {"gain": state["filter"], "turn": state["turn"]}


def as_reals(state):
    return {"gain": torch.view_as_real(state["filter"]), "turn": state["turn"]}


@pytest.mark.parametrize("names", [{"filter": "gain"}, convert])
def test_complex_tensors_agree_and_a_conjugate_differs(names):
    report = parity.check(Spectral(), FlaxSpectral(), ROWS, names=names, steps=2)
    assert report.passed, str(report)
    assert distance(Spectral(), FlaxSpectral(conjugated=True), ROWS, names=names) > 0.1


def test_a_converter_may_split_real_and_imaginary_parts():
    report = parity.check(Spectral(), FlaxSpectral((4, 2), jnp.float32), ROWS, names=as_reals, steps=2)
    assert report.passed, str(report)


def test_a_complex_tensor_fits_no_real_array():
    with pytest.raises(ConversionError, match=r"filter: PyTorch has complex64, Flax has float32 \(gain\)"):
        weights(Spectral(), FlaxSpectral(dtype=jnp.float32), ROWS, names={"filter": "gain"})


def test_a_flax_model_of_its_own_keeps_imaginary_parts():
    module = FlaxSpectral()
    module.gain[...] = jnp.arange(4) * 1j
    side = Comparison.of(None, module, ROWS, float64=False).jax_side("float32")
    assert (side.module.gain[...].imag == jnp.arange(4)).all()


def test_constant_complex_parameters_are_perturbed():
    module = Spectral()
    torch.nn.init.zeros_(module.filter)
    perturbed = Comparison.of(module, FlaxSpectral(), ROWS, names={"filter": "gain"}).torch
    assert perturbed.filter.real.unique().numel() == 4
    assert (perturbed.filter.imag != 0).all()
    assert distance(module, FlaxSpectral(), ROWS, names={"filter": "gain"}) < EXACT
