"""The Witten-Bell n-gram baseline."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from jaxmodels.training.reporting import ngram
from jaxmodels.training.reporting.ngram import NGram

V = 7


def text(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).zipf(1.7, n).astype(np.int32) % V


def oracle(train: list[int], context: list[int], token: int) -> float:
    """The recursion as it is written, with counters."""

    def p(context: tuple[int, ...]) -> float:
        lower = 1 / V if not context else p(context[1:])
        if len(context) > 0 or train:
            k = len(context)
            followers = Counter(train[i + k] for i in range(len(train) - k) if tuple(train[i : i + k]) == context)
            if followers:
                total, types = sum(followers.values()), len(followers)
                return (followers[token] + types * lower) / (total + types)
        return lower

    return p(tuple(context))


def test_by_hand():
    # a a b of two letters: P(a) = (2 + 2/2) / (3 + 2), P(b | a) = (1 + 2·P(b)) / (2 + 2); b is followed by nothing
    nats = NGram(np.array([0, 0, 1]), n_vocab=2, order=2).nats(np.array([0, 1, 1]))
    np.testing.assert_allclose(np.exp(-nats), [3 / 5, (1 + 2 * 2 / 5) / 4, 2 / 5], rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, ">u8", ">i2"])
def test_ids_of_any_dtype_count_the_same(dtype):
    ids = text(200, 1)
    expected = NGram(ids, V).nats(ids)
    np.testing.assert_array_equal(NGram(ids.astype(dtype), V).nats(ids.astype(dtype)), expected)


@pytest.mark.parametrize("order", [1, 3, 4])
def test_against_the_recursion(order):
    train, held_out = text(211, seed=0), text(53, seed=1)
    nats = NGram(train, V, order).nats(held_out)
    expected = [
        oracle(train.tolist(), held_out[max(0, i - order + 1) : i].tolist(), held_out[i]) for i in range(len(held_out))
    ]
    np.testing.assert_allclose(np.exp(-nats), expected, rtol=1e-12)


@pytest.mark.parametrize("context", [[0, 0, 1], [6, 5, 6], [3, 0, 0]])  # seen, never seen, seen in part
def test_probabilities_sum_to_one(context):
    model = NGram(text(97, seed=2), V)
    p = [np.exp(-model.nats(np.array([*context, token])))[-1] for token in range(V)]
    assert min(p) > 0
    assert sum(p) == pytest.approx(1, abs=1e-14)


def test_texts_shorter_than_the_order():
    assert NGram(np.array([2]), V, order=4).nats(np.array([2, 2])).shape == (2,)
    assert NGram(text(97, seed=2), V).nats(np.array([], np.int32)).shape == (0,)
    with pytest.raises(ValueError, match="ids has 0 tokens"):
        NGram(np.array([], np.int32), V)


def test_blocks_are_counted_as_the_whole(monkeypatch):
    train, held_out = text(211, 1), text(97, 2)
    whole = NGram(train, V)
    expected = whole.nats(held_out)
    monkeypatch.setattr(ngram, "BLOCK", 13)
    found = NGram(train, V)
    for ours, theirs in zip(found.orders, whole.orders, strict=True):
        for field in dataclasses.fields(ours):
            np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    np.testing.assert_array_equal(found.nats(held_out), expected)
