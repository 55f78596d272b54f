"""Errors, ratios and their limits."""

import numpy as np
import pytest

from parity.compare import limits


def test_errors_are_in_units_of_the_largest_tensor_of_the_kind():
    truth = {"large": np.array([100.0, -200.0]), "small": np.array([[1.0]])}
    result = {"large": np.array([100.0, -200.0]), "small": np.array([[1.5]])}
    assert limits.errors(result, truth) == {"large": 0.0, "small": 0.5 / 200}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["result", "truth", "both"])
def test_what_is_not_finite_on_either_side_fails(bad, side):
    good, broken = {"x": np.ones(3)}, {"x": np.array([1.0, bad, 1.0])}
    result, truth = {"result": (broken, good), "truth": (good, broken), "both": (broken, broken)}[side]
    assert limits.errors(result, truth)["x"] == np.inf


def test_a_missing_an_extra_and_a_misshapen_tensor_fail():
    truth = {"missing": np.ones(3), "misshapen": np.ones((3, 1)), "fine": np.ones(2)}
    result = {"extra": np.ones(3), "misshapen": np.ones((1, 3)), "fine": np.ones(2)}
    assert limits.errors(result, truth) == {"missing": np.inf, "misshapen": np.inf, "fine": 0.0, "extra": np.inf}


def test_all_zero_tensors_are_compared_absolutely():
    assert limits.errors({"x": np.array([0.25])}, {"x": np.zeros(1)})["x"] == 0.25


@pytest.mark.parametrize("torch_error", [0.0, 1e-7, 3e-5])
def test_the_ratio_says_four_times_torch_plus_a_millionth(torch_error):
    truth, torch = {"x": np.array([1.0])}, {"x": np.array([1.0 + torch_error])}
    limit = 4 * torch_error + 1e-6
    for share, good in ((0.999, True), (1.001, False)):
        flax = {"x": np.array([1.0 + share * limit])}
        assert (limits.ratios(flax, torch, truth)["x"] <= limits.RATIO_LIMIT) is good


def test_the_worst_is_the_largest_and_nan_is_larger_than_all():
    assert limits.worst({"a": 1.0, "b": 3.0, "c": 2.0}) == ("b", 3.0)
    assert limits.worst({"a": np.inf, "b": np.nan})[0] in ("a", "b")
    assert limits.worst({"a": 1.0, "b": np.nan})[0] == "b"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_torch_excuses_nothing(bad):
    truth, torch, flax = {"x": np.ones(2)}, {"x": np.array([1.0, bad])}, {"x": np.ones(2)}
    assert limits.ratios(flax, torch, truth)["x"] == np.inf
