"""Hints: padding, pools, resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.parity.locate.hints.probe import hint_of

IMAGE = np.random.default_rng(0).standard_normal((2, 3, 8, 10))


def windows(image, size, stride, padding, init, reduce):
    with jax.enable_x64(True):
        spatial = [(0, 0), (0, 0), *padding] if isinstance(padding, list) else padding
        return jax.lax.reduce_window(
            jnp.asarray(image), init, reduce, (1, 1, size, size), (1, 1, stride, stride), spatial
        )


def test_a_strided_convolution_with_same_padding():
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def port(x):
        with jax.enable_x64(True):
            kernel = jnp.asarray(module.weight.detach().numpy())
            y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME")
            return y + module.bias.detach().numpy()[:, None, None]

    assert "pads by 0 before and 1 after" in hint_of(module, port, IMAGE)


def test_pools():
    same = lambda x: windows(x, 3, 2, "SAME", -jnp.inf, jax.lax.max)  # noqa: E731
    assert "pool pads by 0 before and 1 after" in hint_of(nn.MaxPool2d(3, 2, 1), same, IMAGE)

    def average(x):
        pad = [(1, 1), (1, 1)]
        counts = windows(np.ones_like(x), 3, 2, pad, 0.0, jax.lax.add)
        return windows(x, 3, 2, pad, 0.0, jax.lax.add) / counts

    assert "the other count_include_pad" in hint_of(nn.AvgPool2d(3, 2, 1), average, IMAGE)


class Resize(nn.Module):
    def __init__(self, size, **options):
        super().__init__()
        self.size, self.options = size, options

    def forward(self, x):
        return F.interpolate(x, self.size, **self.options)


@pytest.mark.parametrize(
    ("size", "options", "method", "antialias", "expected"),
    [
        ((16, 20), {"mode": "bilinear", "align_corners": True}, "bilinear", True, "linear, align_corners=False"),
        ((5, 7), {"mode": "bilinear"}, "bilinear", True, "antialias=True"),
        ((16, 20), {"mode": "nearest"}, "bilinear", True, "linear, align_corners=False"),
        ((16, 20), {"mode": "bilinear"}, "nearest", True, "nearest"),
        ((16, 20), {"mode": "bicubic"}, "cubic", True, "cubic, align_corners=False, antialias=True"),
    ],
)
def test_resizing(size, options, method, antialias, expected):
    def port(x):
        with jax.enable_x64(True):
            return jax.image.resize(x, (*x.shape[:2], *size), method, antialias=antialias)

    assert expected in hint_of(Resize(size, **options), port, IMAGE)
