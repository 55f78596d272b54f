"""Noise of tensors, and differences in units of it."""

import numpy as np
import pytest
import torch

from parity.compare.comparison import Comparison
from parity.compare.noise import LIMIT, ULPS, Largest, Noise, errors, moved, noises_of, worst
from tests.parity.pairs import mlp

ULP = ULPS["float64"]


def test_each_tensor_is_judged_by_its_own_noise():
    truth = {"large": np.array([1e8, -2e8]), "small": np.array([[1.0]])}
    noises = {"large": Noise(1e-7), "small": Noise(1e-15)}
    result = {"large": truth["large"] + 3e-7, "small": truth["small"] + 1e-3}
    found = errors(result, truth, noises)
    assert found["large"] == pytest.approx(3, rel=0.1)
    assert found["small"] > 1e11, "a large tensor does not hide a small one"


def test_a_missing_an_extra_and_a_misshapen_tensor_are_infinitely_off():
    truth = {"missing": np.ones(3), "misshapen": np.ones((3, 1)), "fine": np.ones(2)}
    result = {"extra": np.ones(3), "misshapen": np.ones((1, 3)), "fine": np.ones(2)}
    noises = {name: Noise(1e-16) for name in truth}
    assert errors(result, truth, noises) == {"missing": np.inf, "misshapen": np.inf, "fine": 0.0, "extra": np.inf}


@pytest.mark.parametrize("mask", [np.nan, np.inf, -np.inf, -1e30, np.finfo(np.float64).min])
def test_masks_agree_at_the_same_places_and_have_no_say_in_the_unit(mask):
    truth = np.array([1.0, mask, 3.0])
    (noise,) = noises_of({"x": truth}, [{"x": np.array([1 + 1e-16, mask, 3.0])}], ULP).values()
    assert noise.unit < 1e-14
    assert noise.error(truth, truth) == 0
    assert noise.error(np.array([1.0, mask, 3.0 + 1e-9]), truth) > 1e4
    assert noise.error(np.array([mask, 1.0, 3.0]), truth) == np.inf
    assert noise.error(np.array([1.0, 2.0, 3.0]), truth) == np.inf
    assert noise.error(np.array([1.0, -mask, 3.0]), truth) == (0 if np.isnan(mask) else np.inf)


def test_masks_of_two_float_types_are_the_same():
    """Widened, `finfo(dtype).min` of one side may be float64's and of the other float32's."""
    truth, result = np.array([1.0, np.finfo(np.float32).min]), np.array([1.0, np.finfo(np.float64).min])
    assert Noise(1e-16).error(result, truth) == 0


def test_a_mask_constant_among_ordinary_numbers_hides_nothing():
    """-1e9 plus a score rounds to 1e-7: that must not be the unit of the other scores."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((5, 7))
    truth[1, 2] = -1e9 + truth[1, 2]
    run = moved(truth, ULP, rng)
    (noise,) = noises_of({"x": truth}, [{"x": run}], ULP).values()
    assert noise.unit < 1e-14
    assert noise.error(run, truth) <= 1
    off = truth.copy()
    off[0, 0] += 1e-10
    assert noise.error(off, truth) > LIMIT
    off = truth.copy()
    off[1, 2] = -1e8
    assert noise.error(off, truth) == np.inf


def test_a_large_element_that_is_computed_is_no_mask():
    truth, run = np.array([1.0, 2.0, 1e9]), np.array([1.0, 2.0, 1e9 + 1])
    (noise,) = noises_of({"x": truth}, [{"x": run}], ULP).values()
    assert noise.error(truth + np.array([0, 0, 2.0]), truth) == pytest.approx(2)


def test_zeros_are_judged_by_the_rounding_of_the_other_tensors():
    truth = {"x": np.array([4.0]), "zero": np.zeros(3)}
    noises = noises_of(truth, [truth], ULP)
    assert noises["zero"].error(np.full(3, 1e-17), truth["zero"]) < 1
    assert noises["zero"].error(np.full(3, 1e-9), truth["zero"]) > LIMIT


@pytest.mark.parametrize("dtype", [np.int32, bool])
def test_integers_are_equal_or_differ(dtype):
    truth = np.array([0, 1, 1], dtype)
    (noise,) = noises_of({"x": truth}, [{"x": truth}], ULP).values()
    assert noise.error(truth, truth) == 0
    assert noise.error(truth[::-1], truth) == np.inf


def test_complex_numbers_are_compared_whole():
    truth = np.array([1 + 2j, 3 - 1j])
    (noise,) = noises_of({"x": truth}, [{"x": truth}], ULP).values()
    assert noise.error(truth, truth) == 0
    assert noise.error(truth.conj(), truth) > 1e10


def test_a_narrower_dtype_has_proportionally_more_noise():
    assert Noise(1e-16).scaled(ULPS["float32"] / ULP).unit == 1e-16 * 2.0**28


def test_the_noise_of_a_step_is_at_least_that_of_the_steps_before():
    largest = Largest()
    assert largest.of("loss", {"x": Noise(3.0)})["x"].unit == 3
    assert largest.of("loss", {"x": Noise(1.0)})["x"].unit == 3
    assert largest.of("other", {"x": Noise(1.0)})["x"].unit == 1


def test_the_worst_is_the_largest_and_nan_is_larger_than_all():
    assert worst({"a": 1.0, "b": 3.0, "c": 2.0}) == ("b", 3.0)
    assert worst({"a": 1.0, "b": np.nan})[0] == "b"


def test_pytorchs_noise_leaves_the_module_as_it_was():
    module, flax_module, x = mlp()
    comparison = Comparison.of(module, flax_module, x)
    with comparison.strict_precision():
        side = comparison.torch_side("float64")
        before = {name: tensor.clone() for name, tensor in side.state_dict().items()}
        batch, kinds = comparison.evaluated(side)
        noises = side.noises(batch, kinds, ULP, seed=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in side.state_dict().items())
    assert noises.keys() == kinds.keys()
    for kind, tensors in kinds.items():
        for name, tensor in tensors.items():
            assert ULP * np.abs(tensor).max() <= noises[kind][name].unit < 1e-13, name
