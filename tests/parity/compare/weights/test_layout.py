"""Layouts in einops notation."""

import numpy as np
import pytest

from parity.compare.weights.layout import Layout

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("text", "torch", "flax", "expected"),
    [
        ("o i -> i o", (2, 3), (3, 2), lambda a: a.T),
        ("(h three d) i -> three h i d", (30, 7), (3, 2, 7, 5), lambda a: a.reshape(2, 3, 5, 7).transpose(1, 0, 3, 2)),
        ("(h d) i -> i (h d)", (6, 7), (7, 6), lambda a: a.T),
        ("o i ... -> ... i o", (2, 3, 5, 7), (5, 7, 3, 2), lambda a: a.transpose(2, 3, 1, 0)),
        ("i o k -> ~k i o", (2, 3, 5), (5, 2, 3), lambda a: a.transpose(2, 0, 1)[::-1]),
        ("1 1 e -> e", (1, 1, 5), (5,), lambda a: a[0, 0]),
        ("(a b) -> b a | a=2", (6,), (3, 2), lambda a: a.reshape(2, 3).T),
    ],
)
def test_a_layout_moves_numbers_there_and_back(text, torch, flax, expected):
    if "(h d)" in text:
        text += " | h=2"
    axes = Layout.parse(text).fit(torch, flax)
    tensor = RNG.standard_normal(torch)
    np.testing.assert_array_equal(axes.to_flax(tensor), expected(tensor))
    assert axes.to_flax(tensor).shape == flax
    np.testing.assert_array_equal(axes.to_torch(axes.to_flax(tensor)), tensor)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("o i", "->"),
        ("o i -> i", "o"),
        ("o i -> i o d", "d"),
        ("o i i -> i o", "i"),
        ("(o i -> i o", r"\("),
        ("o i -> (i o", r"\("),
        ("~o i -> i o", "~"),
        ("o i -> i o | h=2", "h"),
        ("o i -> i o | o=", "o="),
        ("o 2 -> 2 o", "'2'"),
    ],
)
def test_a_malformed_layout_is_refused(text, named):
    with pytest.raises(ValueError, match=named):
        Layout.parse(text)


def test_sizes_that_stay_open_are_named():
    layout = Layout.parse("(h three d) i -> three i (h d)")
    with pytest.raises(ValueError, match=r"\[30, 7\].*\[3, 7, 10\].*h, d"):
        layout.fit((30, 7), (3, 7, 10))
    assert Layout.parse("(h three d) i -> three i (h d) | d=5").fit((30, 7), (3, 7, 10)).split == (2, 3, 5, 7)


def test_sizes_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[2, 5\]"):
        Layout.parse("o i -> o i").fit((2, 3), (2, 5))
    with pytest.raises(ValueError, match=r"3 axes.*PyTorch"):
        Layout.parse("a o i -> a o i").fit((2, 3), (2, 3))
