"""Axes by the layers on both sides: convolutions, heads, equations, and matrices that could lie either way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch.nn import functional as F

from jaxmodels.convert import ConversionError
from tests.parity.compare.weights.pairs import EXACT, distance, weights

RNG = np.random.default_rng(0)
IMAGES, ROWS = RNG.standard_normal((2, 3, 7, 5)), RNG.standard_normal((4, 6))
LAST = ("input 0", "output")


class Torch(torch.nn.Module):
    """One layer, called `up`."""

    def __init__(self, layer):
        super().__init__()
        self.up = layer

    def forward(self, x):
        return self.up(x).flatten(1) if x.ndim == 2 else self.up(x)


class Nnx(nnx.Module):
    def __init__(self, layer):
        self.up = layer

    def __call__(self, x):
        return self.up(x).reshape(len(x), -1) if x.ndim == 2 else self.up(x)


class Linen(linen.Module):
    layer: linen.Module

    @linen.compact
    def __call__(self, x):
        y = self.layer(x)
        return y.reshape(len(x), -1) if x.ndim == 2 else y


def rngs():
    return nnx.Rngs(0)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("outputs", [3, 4])
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_transposed_convolutions(kind, outputs, transpose_kernel):
    settings = {"padding": "VALID", "transpose_kernel": transpose_kernel}
    if kind == "nnx":
        flax = Nnx(nnx.ConvTranspose(3, outputs, (2, 3), (2, 2), **settings, rngs=rngs()))
    else:
        flax = Linen(linen.ConvTranspose(outputs, (2, 3), (2, 2), **settings))
    names = {"up": "up" if kind == "nnx" else "layer"}
    assert (
        distance(Torch(torch.nn.ConvTranspose2d(3, outputs, (2, 3), 2)), flax, IMAGES, names=names, channels_last=LAST)
        < EXACT
    )


def test_a_convolution_whose_sizes_are_all_equal():
    flax = Nnx(nnx.Conv(3, 3, (3, 3), padding=1, rngs=rngs()))
    assert distance(Torch(torch.nn.Conv2d(3, 3, 3, padding=1)), flax, IMAGES, channels_last=LAST) < EXACT


def test_a_convolution_of_width_one_is_a_linear_layer():
    flax = Nnx(nnx.Linear(3, 4, rngs=rngs()))
    assert distance(Torch(torch.nn.Conv2d(3, 4, 1)), flax, IMAGES, channels_last=LAST) < EXACT


@pytest.mark.parametrize(
    ("equation", "kernel", "bias"),
    [
        ("bd,dhk->bhk", (6, 2, 3), (2, 3)),
        ("bd,hdk->bhk", (2, 6, 3), (2, 3)),
        ("bd,hkd->bhk", (2, 3, 6), (2, 3)),
        ("bd,hd->bh", (6, 6), (6,)),
    ],
)
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_the_kernel_of_an_equation(kind, equation, kernel, bias):
    if kind == "nnx":
        assert (
            distance(Torch(torch.nn.Linear(6, 6)), Nnx(nnx.Einsum(equation, kernel, bias, rngs=rngs())), ROWS) < EXACT
        )
    else:
        flax = Linen(linen.Einsum(kernel, equation))
        assert distance(Torch(torch.nn.Linear(6, 6)), flax, ROWS, names={"up": "layer"}) < EXACT


class Matrix(nnx.Module):
    """x @ w or x @ w.T, with a parameter that is no kernel."""

    def __init__(self, outputs, turned):
        self.matrix = nnx.Param(jnp.zeros((6, outputs) if turned else (outputs, 6)))
        self.b = nnx.Param(jnp.zeros(outputs))
        self.turned = turned

    def __call__(self, x):
        return x @ (self.matrix[...] if self.turned else self.matrix[...].T) + self.b


MATRIX = {"up.weight": "matrix", "up.bias": "b"}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("outputs", [5, 6])
def test_a_square_matrix_lies_as_the_outputs_say(outputs, turned):
    pair = Torch(torch.nn.Linear(6, outputs)), Matrix(outputs, turned), ROWS
    assert distance(*pair, names=MATRIX) < EXACT
    notes = weights(*pair, names=MATRIX).notes
    assert any("up.weight" in note and "layouts=" in note for note in notes) == (outputs == 6 and not turned)
    assert any("up.weight" in note and "outputs decide" in note for note in notes) == (outputs == 6 and turned)
    layout = "o i -> i o" if turned else "o i -> o i"
    assert not weights(*pair, names=MATRIX, layouts={"up.weight": layout}).notes


def test_a_wrong_layout_differs():
    pair = Torch(torch.nn.Linear(6, 6)), Matrix(6, False), ROWS
    assert distance(*pair, names=MATRIX, layouts={"up.weight": "o i -> i o"}) > 0.1


class Gemma(nnx.Module):
    """Projections [heads, d, h] and [2, 1, d, h], as Gemma's, and [heads, h, d] back."""

    def __init__(self, d):
        shapes = {"q": (3, d, 4), "kv": (2, 1, d, 4), "out": (3, 4, d)}
        self.q, self.kv, self.out = (nnx.Param(jnp.zeros(shape)) for shape in shapes.values())

    def __call__(self, x):
        (k, v), q = jnp.einsum("td,ckdh->ctkh", x, self.kv[...]), jnp.einsum("td,ndh->tnh", x, self.q[...])
        return jnp.einsum("tnh,nhd->td", jnp.tanh(q) * k + v, self.out[...])


class TorchGemma(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.out = torch.nn.Linear(d, 12, bias=False), torch.nn.Linear(12, d, bias=False)
        self.k, self.v = (torch.nn.Linear(d, 4, bias=False) for _ in range(2))

    def forward(self, x):
        q = torch.tanh(self.q(x)).unflatten(-1, (3, 4))
        return self.out((q * self.k(x)[:, None] + self.v(x)[:, None]).flatten(1))


@pytest.mark.parametrize("d", [7, 12])
def test_heads_before_the_input_axis(d):
    """With d = heads * h all of these are square."""
    names = {"q.weight": "q", "k.weight": "kv", "v.weight": "kv", "out.weight": "out"}
    assert distance(TorchGemma(d), Gemma(d), RNG.standard_normal((5, d)), names=names) < EXACT


class Patches(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(12, 5, rngs=rngs())

    def __call__(self, x):
        b, c, h, w = x.shape
        return self.up(x.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(b, h // 2, w // 2, 12))


def test_nothing_is_reshaped_without_a_rule():
    pair = Torch(torch.nn.Conv2d(3, 5, 2, 2)), Patches(), RNG.standard_normal((2, 3, 4, 6))
    with pytest.raises(ConversionError, match=r"up.weight: PyTorch has \[5, 3, 2, 2\], Flax has \[12, 5\].*layouts"):
        weights(*pair)
    layout = {"up.weight": "o c h w -> (c h w) o"}
    assert distance(*pair, layouts=layout, channels_last=["output"]) < EXACT


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 6)
        self.token, self.table = torch.nn.Parameter(torch.randn(1, 1, 6)), torch.nn.Parameter(torch.randn(12))

    def forward(self, x):
        return F.silu(self.up(x)) + self.token[0] + self.table.reshape(2, 6).sum(0)


class FlaxPlain(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(6, 6, rngs=rngs())
        self.token, self.table = nnx.Param(jnp.zeros(6)), nnx.Param(jnp.zeros((2, 6)))

    def __call__(self, x):
        return jax.nn.silu(self.up(x)) + self.token + self.table.sum(0)


def test_axes_of_length_one_may_be_absent_and_a_vector_is_no_matrix():
    with pytest.raises(ConversionError) as error:
        weights(Plain(), FlaxPlain(), ROWS)
    assert error.value.problems.keys() == {"misshapen"}
    assert len(error.value.problems["misshapen"]) == 1
    assert distance(Plain(), FlaxPlain(), ROWS, layouts={"table": "(n e) -> n e"}) < EXACT


def test_layers_of_other_sizes_are_named_with_both_shapes():
    with pytest.raises(ConversionError, match=r"up.weight: PyTorch has \[5, 6\], Flax has \[5, 6\]"):
        weights(Torch(torch.nn.Linear(6, 5)), Nnx(nnx.Linear(5, 6, rngs=rngs())), ROWS)


class OwnConvolution(nnx.Module):
    """Holds its weight as PyTorch does; the number of inputs is the width of the window."""

    def __init__(self, name):
        self.up = nnx.Dict({name: nnx.Param(jnp.zeros((5, 4, 4))), "bias": nnx.Param(jnp.zeros(5))})
        self.name = name

    def __call__(self, x):
        kernel = self.up[self.name][...].transpose(2, 1, 0)
        y = jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return y + self.up["bias"]


@pytest.mark.parametrize("name", ["weight", "filters"])
def test_a_convolution_of_ones_own_lies_as_in_pytorch_if_it_fits_so(name):
    pair = Torch(torch.nn.Conv1d(4, 5, 4)), OwnConvolution(name), RNG.standard_normal((2, 4, 7))
    names = {"up.weight": f"up.{name}"}
    assert distance(*pair, names=names, channels_last=LAST) < EXACT
    assert bool(weights(*pair, names=names, channels_last=LAST).notes) == (name == "filters")
