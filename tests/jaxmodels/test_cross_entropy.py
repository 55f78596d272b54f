"""Log-probabilities in chunks, compared with those of whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import cross_entropy
from jaxmodels.cross_entropy import chunk_length, token_log_probs
from tests.common import assert_close, normal

T, D, V = 11, 5, 23


@pytest.fixture
def _small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 4 * V)


def problem(n: int):
    draw = np.random.default_rng(1)
    return normal(0, T, D), normal(1, D, V), *map(jnp.asarray, (draw.integers(0, T, n), draw.integers(0, V, n)))


@pytest.mark.usefixtures("x64", "_small_chunks")
@pytest.mark.parametrize(("size", "n"), [(13, None), (13, 13), (13, 7), (13, 0), (4, None), (1, None)])
def test_chunks_give_the_log_softmax(size, n):
    x, weights, positions, targets = problem(size)
    found = jax.jit(lambda n: token_log_probs(lambda x: x @ weights, x, positions, targets, n, greedy=True))(n)
    expected = jax.nn.log_softmax(x @ weights)[positions]
    valid = np.arange(size) < (size if n is None else n)
    assert_close(found[0], np.where(valid, expected[jnp.arange(size), targets], 0))
    np.testing.assert_array_equal(found[1], (expected.argmax(-1) == targets) & valid)
    assert found[0].dtype == jnp.float64


@pytest.mark.usefixtures("x64", "_small_chunks")
def test_gradient():
    x, weights, positions, targets = problem(13)

    def chunked(weights):
        return token_log_probs(lambda x: x @ weights, x, positions, targets)[0].sum()

    def whole(weights):
        return jax.nn.log_softmax(x @ weights)[positions, targets].sum()

    assert_close(jax.grad(chunked)(weights), jax.grad(whole)(weights))


def test_of_equal_logits_the_first_is_greedy():
    ids = jnp.arange(3)
    _, greedy = token_log_probs(lambda x: x, jnp.ones((3, 3)), ids, ids, greedy=True)
    assert greedy.tolist() == [True, False, False]


def test_half_precision_logits_are_widened():
    log_probs, _ = token_log_probs(lambda x: x, jnp.ones((2, 3), jnp.bfloat16), jnp.arange(2), jnp.arange(2))
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, -np.log(3), rtol=1e-6)


def test_a_chunk_is_bounded():
    assert chunk_length(50_304, 4096) == 256
    assert chunk_length(50_304, 5) == 8
    assert chunk_length(1 << 30, 100) == 1
