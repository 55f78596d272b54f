"""The choice of the next token: processed logits as transformers has them, and the distribution of draws."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from jaxmodels.generate.sampling import Sampling, draw, drawable, nucleus, processed

KEY = jax.random.key(0)
LOGITS = np.array([1.0, -0.5, 2.0, 0.3, 1.4, -3.0, 0.0])


def sampled(logits, **settings):
    """One token for each row [B, V]."""
    sampling = Sampling(**settings)
    logits = jnp.asarray(logits)
    knobs = sampling.knobs(logits.shape[-1])
    return draw(processed(logits, knobs, sampling.top_k), knobs, jax.random.split(KEY, len(logits)))


def probabilities(temperature, kept):
    weights = np.exp(LOGITS / temperature) * np.isin(np.arange(7), kept)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, range(7)),
        ({"temperature": 2.5}, range(7)),
        ({"top_k": 3}, [2, 4, 0]),
        ({"temperature": 0.7, "top_k": 90}, range(7)),
        ({"top_p": 0.5}, [2, 4]),  # .43 alone is not enough
        ({"top_p": 0.4}, [2]),
        ({"top_p": 1.0}, range(7)),
        ({"temperature": 3.0, "top_p": 0.5}, [2, 4, 0]),  # the temperature comes first
        ({"top_k": 3, "top_p": 0.9}, [2, 4, 0]),  # top_p of what top_k has left
        ({"top_k": 3, "top_p": 0.7}, [2, 4]),
        ({"min_p": 0.5}, [2, 4]),
        ({"temperature": 3.0, "min_p": 0.5}, [2, 4, 0, 3, 6]),
        ({"min_p": 1}, [2]),
        ({"min_p": 0}, range(7)),
        ({"logit_bias": {2: -math.inf, 4: -math.inf}}, [0, 1, 3, 5, 6]),
    ],
    ids=str,
)
def test_draws_are_distributed_as_they_should(settings, kept):
    n = 20_011
    settings = {"temperature": 1.0} | settings
    draws = np.asarray(sampled(np.tile(LOGITS, (n, 1)), **settings))
    counts, p = np.bincount(draws, minlength=7), probabilities(settings["temperature"], list(kept))
    assert (counts[p == 0] == 0).all()
    p, counts = p[p > 0], counts[p > 0]
    chi_square = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi_square < len(p) - 1 + 5 * np.sqrt(2 * len(p))


def test_each_row_has_its_own_probabilities():
    logits = np.stack([LOGITS, LOGITS[::-1]])
    for settings in ({"top_p": 0.4}, {"top_k": 1}, {"min_p": 1}):
        np.testing.assert_array_equal(sampled(logits, temperature=1.0, **settings), [2, 4])
    np.testing.assert_array_equal(sampled(logits), [2, 4])


PROCESSORS = {
    "logit_bias": lambda bias: theirs.SequenceBiasLogitsProcessor({(i,): float(value) for i, value in bias.items()}),
    "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
    "temperature": theirs.TemperatureLogitsWarper,
    "top_k": theirs.TopKLogitsWarper,
    "top_p": theirs.TopPLogitsWarper,
    "min_p": theirs.MinPLogitsWarper,
}  # in the order in which transformers applies them


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "logit_bias": {3: 2.5, 100: -math.inf}},
        {"temperature": 0.7, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 11, "top_p": 0.8},
        {"temperature": 2.0, "top_p": 0.95, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "logit_bias": {7: 4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_are_processed_as_by_transformers(settings, dtype):
    rng = np.random.default_rng(len(str(settings)))
    logits, ids = rng.normal(size=(5, 131)).astype(dtype) * 3, rng.integers(0, 131, (5, 17))
    expected = torch.as_tensor(logits).float()
    for name, processor in PROCESSORS.items():
        if name in settings:
            expected = processor(settings[name])(torch.as_tensor(ids), expected)
    seen = jnp.zeros((5, 131), bool).at[jnp.arange(5)[:, None], ids].set(True)
    sampling = Sampling(**settings)
    found = processed(jnp.asarray(logits), sampling.knobs(131), sampling.top_k, seen)
    assert found.dtype == jnp.float32
    expected = expected.numpy()
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    if sampling.temperature:  # the largest is subtracted
        expected = expected - expected.max(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_the_nucleus_is_that_of_a_sort():
    rng = np.random.default_rng(0)
    for scale in (0.1, 3, 30):
        p = jax.nn.softmax(jnp.asarray(rng.normal(size=(7, 1009)) * scale))
        for top_p in (1e-6, 0.3, 0.9, 0.999):
            order = np.argsort(-np.asarray(p), axis=-1, kind="stable")
            before = np.cumsum(np.take_along_axis(np.asarray(p, np.float64), order, -1), -1)
            before = np.concatenate([np.zeros((7, 1)), before[:, :-1]], -1)
            expected = np.zeros(p.shape, bool)
            np.put_along_axis(expected, order, before < top_p, -1)
            assert (np.asarray(nucleus(p, jnp.float32(top_p))) != expected).sum() <= 1  # rounding of a sum
    equal = np.asarray(nucleus(jnp.full((1, 8), 0.125), jnp.float32(0.5)))
    np.testing.assert_array_equal(equal, [[True] * 4 + [False] * 4])


def test_top_k_of_tokens_that_are_as_likely_draws_from_k_of_them():
    assert set(np.asarray(sampled(np.zeros((40, 5)), temperature=1.0, top_k=2)).tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-10, 1e-30, 1e-37, 1e-40, 5e-324])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_smallest_temperatures_are_greedy(temperature, dtype):
    logits = np.random.default_rng(0).normal(size=(11, 29)).astype(dtype) * 1000
    for others in ({}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.1}):
        found = sampled(logits, temperature=temperature, **others)
        np.testing.assert_array_equal(found, logits.argmax(axis=1))
        assert len(set(np.asarray(found).tolist())) > 3


@pytest.mark.parametrize("settings", [{"temperature": 1e300}, {"temperature": 1e300, "top_p": 0.9, "min_p": 0.5}])
def test_the_largest_temperature_draws_from_all_that_is_left(settings):
    logits = np.tile([1.0, -np.inf, 5.0], (99, 1))
    assert set(np.asarray(sampled(logits, **settings)).tolist()) == {0, 2}


def test_logits_without_a_choice_stay_without():
    nothing = np.full((2, 3), -np.inf)
    for settings in ({}, {"temperature": 0.5}, {"temperature": 0.5, "top_k": 2, "top_p": 0.5, "min_p": 0.5}):
        sampling = Sampling(**settings)
        found = processed(jnp.asarray(nothing), sampling.knobs(3), sampling.top_k)
        np.testing.assert_array_equal(found, nothing)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": np.float16(0.5), "min_p": np.float64(0.1)},
        {"temperature": jnp.float32(0.5), "top_k": jnp.int32(3), "logit_bias": {np.int32(3): np.float32(2)}},
        {"repetition_penalty": 2, "temperature": 1},
    ],
    ids=["numpy", "jax", "int"],
)
def test_numbers_of_any_kind(settings):
    sampling = Sampling(**settings)
    assert {type(sampling.temperature), type(sampling.repetition_penalty)} == {float}
    assert sampling.top_k in (3, None)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"temperature": True}, "temperature=True"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 10**400}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": None}, "temperature=None"),
        ({"top_k": 3}, "top_k=3 .*temperature"),
        ({"top_p": 0.5}, r"top_p=0\.5 .*temperature"),
        ({"min_p": 0.5}, r"min_p=0\.5 .*temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_k": 2.5}, r"top_k=2\.5 .*integer"),
        ({"temperature": 1.0, "top_k": True}, "top_k=True"),
        ({"temperature": 1.0, "top_k": 2**31}, "top_k=2147483648 must be at most 2147483647"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0\.0"),
        ({"temperature": 1.0, "top_p": 1.1}, r"top_p=1\.1"),
        ({"temperature": 1.0, "top_p": "x"}, r"top_p='x' .*at most 1"),
        ({"temperature": 1.0, "top_p": math.nan}, "top_p=nan"),
        ({"temperature": 1.0, "min_p": -0.1}, r"min_p=-0\.1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"repetition_penalty": "x"}, "repetition_penalty='x'"),
        ({"logit_bias": [1, 2]}, r"logit_bias=\[1, 2\]"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias.*'a'"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias.*-1"),
        ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\]=nan"),
        ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\]=inf"),
    ],
    ids=str,
)
def test_refuses_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match) as error:
        Sampling(**settings)
    assert "\n" not in str(error.value)


def test_biases_must_be_within_the_vocabulary_and_leave_a_token():
    with pytest.raises(ValueError, match=r"logit_bias.*\[5\].*0 to 4"):
        Sampling(logit_bias={5: 1.0}).knobs(5)
    with pytest.raises(ValueError, match="logit_bias excludes all 2"):
        Sampling(logit_bias={0: -math.inf, 1: -math.inf}).knobs(2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 40}, {"min_p": 0.1}])
def test_logits_with_one_number_that_is_none_are_not_drawn_from(settings, dtype):
    """XLA drops NaN from the maximum of a large array on CPUs."""
    logits = np.random.default_rng(0).normal(size=(7, 8192))
    logits[[1, 2, 3], [5, 8191, 77]] = np.nan, -np.nan, np.inf
    logits[4, 9] = -np.inf  # a token that is never drawn
    logits[5], logits[6] = np.nan, -np.inf
    sampling = Sampling(temperature=0.8, **settings) if settings else Sampling()
    given = jnp.asarray(logits, dtype)
    found = jax.jit(lambda x: drawable(x, processed(x, sampling.knobs(8192), sampling.top_k)))(given)
    assert found.tolist() == [True, False, False, False, True, False, False]
