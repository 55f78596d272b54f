"""The decoding loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.generate import generate, loop
from jaxmodels.generate.loop import compiled
from tests.common import MAX_LEN, B, V, language_model, token_ids

N, PROMPT = 6, 7
KEY = jax.random.key(0)


def talkative(attention):
    """Without biases at its end: otherwise it would repeat the token that they favour."""
    model = language_model(attention)
    for bias in (model.encoder.norm.bias, model.generator.projection.bias):
        bias[...] = jnp.zeros_like(bias)
    return model


@pytest.fixture(scope="module")
def model():
    return talkative("rotary")


@pytest.fixture(scope="module")
def ids():
    return token_ids(0, PROMPT, B)


@pytest.fixture(scope="module")
def greedy(model, ids):
    """The new tokens [N, B], and by the model's full forward: each token the argmax over all that came before."""
    forward = jax.jit(lambda model, ids: model(ids))
    texts = np.zeros((PROMPT + N, B), np.int32)  # causal: what follows is not read
    texts[:PROMPT] = ids
    for i in range(PROMPT, PROMPT + N):
        texts[i] = np.asarray(forward(model, texts))[i - 1].argmax(axis=-1)
    assert len(np.unique(texts[PROMPT:])) > 5  # a model that repeats itself would prove little
    return texts[PROMPT:]


@pytest.mark.slow
def test_greedy_is_the_argmax_of_full_forwards(model, ids, greedy):
    new = generate(model, ids, N)
    chex.assert_shape(new, (N, B))
    assert new.dtype == jnp.int32
    np.testing.assert_array_equal(new, greedy)
    np.testing.assert_array_equal(generate(model, np.asarray(ids, np.int64), N), greedy)
    np.testing.assert_array_equal(generate(model, ids, 1), greedy[:1])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 3, "top_p": 1e-6}], ids=str)
def test_a_choice_of_one_is_greedy(model, ids, greedy, settings):
    np.testing.assert_array_equal(generate(model, ids, N, temperature=1.7, rng=KEY, **settings), greedy)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["relative", "random+vanilla"])
def test_ragged_prompts_decode_loop_as_they_would_alone(attention):
    model, ids = talkative(attention), np.asarray(token_ids(0, PROMPT, B))
    start = np.array([0, 3, 1, 6, 2])
    ragged = generate(model, ids, N, start=start)
    assert len(np.unique(ragged)) > 2
    alone = generate(model, ids[3:, 1:2], N)
    np.testing.assert_array_equal(ragged[:, 1:2], alone)


class BatchFirst(nnx.Module):
    """The same model with ids as [B, S]."""

    sequence_axis = 1

    def __init__(self, model):
        self.model = model

    def init_cache(self, *args, **kwargs):
        return self.model.init_cache(*args, **kwargs)

    def prefill(self, ids, cache):
        return self.model.prefill(ids.T, cache)

    def decode(self, ids, cache):
        logits, cache = self.model.decode(ids.T, cache)
        return logits.swapaxes(0, 1), cache


def test_batch_first_models(model, ids, greedy):
    np.testing.assert_array_equal(generate(BatchFirst(model), ids.T, N), greedy.T)


def test_stop_tokens(model, ids, greedy):
    stops = [int(greedy[1, 0]), int(greedy[3, 1])]
    expected = greedy.copy()
    for row in expected.T:
        for i in np.flatnonzero(np.isin(row, stops))[:1]:
            row[i:] = row[i]
    assert (expected != greedy).any()
    np.testing.assert_array_equal(generate(model, ids, N, stop_tokens=stops), expected)


def test_all_rows_stopped(model, ids, greedy):
    stops = tuple(set(greedy[1].tolist()))
    new = np.asarray(generate(model, ids, N, stop_tokens=stops))
    np.testing.assert_array_equal(new[0], greedy[0])
    for i in range(2, N):
        np.testing.assert_array_equal(new[i], new[1])


def test_draws_by_their_key(model, ids, greedy):
    draw = generate(model, ids, N, temperature=1.0, rng=KEY)
    np.testing.assert_array_equal(draw, generate(model, ids, N, temperature=1.0, rng=KEY))
    assert (draw != generate(model, ids, N, temperature=1.0, rng=jax.random.key(1))).any()
    assert (draw != greedy).any()


@pytest.mark.slow
def test_one_compilation_for_repeated_calls(model, ids, monkeypatch):
    made, sizes = [], []

    def remembered(*arguments):
        made.append(compiled(*arguments))
        return made[-1]

    monkeypatch.setattr(loop, "compiled", remembered)
    for i in range(3):
        prompts = token_ids(i, PROMPT, B)
        settings = {"temperature": 0.5 + i, "top_p": 0.6 + 0.1 * i, "repetition_penalty": 1.5 + i}
        generate(language_model("rotary"), prompts, N, rng=jax.random.key(i), **settings)
        sizes.append((made[-1].begin._cache_size(), made[-1].proceed._cache_size()))
    assert made[0] is made[1] is made[2]
    assert sizes[0] == sizes[2]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5"),
        ({"temperature": -1.0, "rng": KEY}, "temperature=-1.0"),
        ({"top_k": 3}, "temperature"),
        ({"top_p": 0.5}, "temperature"),
        ({"temperature": 1.0, "rng": KEY, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "rng": KEY, "top_p": 0.0}, r"top_p=0\.0"),
        ({"temperature": 1.0, "rng": KEY, "top_p": 1.1}, r"top_p=1\.1"),
        ({"ids": np.zeros((0, 2), int)}, "ids"),
        ({"ids": np.zeros((3, 0), int)}, "ids"),
        ({"ids": np.zeros(3, int)}, "ids"),
        ({"ids": np.zeros((3, 2), np.float32)}, "ids"),
        ({"start": np.zeros(B + 1, int)}, "start"),
        ({"start": np.full(B, PROMPT)}, "start"),
        ({"start": np.full(B, -1)}, "start"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_refuses_bad_settings(model, ids, settings, match):
    with pytest.raises(ValueError, match=match):
        generate(model, **{"ids": ids, "max_new_tokens": N} | settings)


def test_refuses_to_go_beyond_the_tables(ids):
    model = talkative("dense")
    with pytest.raises(ValueError, match=f"{MAX_LEN + 1} .*max_len={MAX_LEN}"):
        generate(model, ids, MAX_LEN + 1 - PROMPT)
    chex.assert_shape(generate(model, ids, MAX_LEN - PROMPT), (MAX_LEN - PROMPT, B))


def test_each_step_draws_anew(model, ids):
    new = np.asarray(generate(model, ids, N, temperature=1e4, rng=KEY))  # all tokens are as likely
    assert new.min() >= 0
    assert new.max() < V
    assert (new[1:] != new[:-1]).mean() > 0.7


@pytest.mark.parametrize("ids", [[[999], [1]], [[-1], [1]]])
def test_ids_outside_the_vocabulary_are_an_error_not_a_text(ids):
    model = language_model("rotary")
    with pytest.raises(ValueError, match=r"ids or stop_tokens \["):
        generate(model, jnp.asarray(ids), 3)
    with pytest.raises(ValueError, match=r"stop_tokens \[999\]"):
        generate(model, jnp.asarray([[1], [2]]), 3, stop_tokens=[999])


@pytest.mark.slow
def test_tokens_beyond_n_tokens_are_never_written(model, ids):
    ids = ids % 3
    new = np.asarray(generate(model, ids, N, temperature=1e4, n_tokens=3, rng=KEY))
    assert set(new.ravel()) == {0, 1, 2}
    assert np.asarray(generate(model, ids, N, n_tokens=3)).max() < 3
    for wrong in (0, V + 1):
        with pytest.raises(ValueError, match=rf"n_tokens={wrong}\b.*\b{V}\b"):
            generate(model, ids, N, n_tokens=wrong)
