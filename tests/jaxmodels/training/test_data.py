"""Batches of training windows: contents, order, resuming."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxmodels.sharding import make_mesh
from jaxmodels.training.data import (
    Batches,
    DocumentWindows,
    First,
    Windows,
    endless,
    in_batches,
    n_predicted,
    without_padding,
)

N, S, B = 1103, 11, 7  # 100 windows: batches reach over the ends of epochs
IDS = np.arange(N, dtype=np.uint16)  # a token is its own place
WINDOWS = Windows(IDS, S, "training")


def starts(seed: int, first: int, n: int) -> np.ndarray:
    examples = endless(WINDOWS, seed)
    return np.array([examples[i]["tokens"][0] for i in range(first, first + n)])


@pytest.fixture
def batches():
    made = []

    def make(seed: int = 3, mesh: Mesh | None = None) -> Batches:
        made.append(Batches(endless(WINDOWS, seed), B, mesh or make_mesh()))
        return made[-1]

    yield make
    for batch in made:
        batch.close()


def test_a_batch_is_windows_of_the_text_and_their_next_tokens(batches):
    tokens = next(batches())["tokens"]
    assert tokens.shape == (B, S + 1)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, tokens[:, :1] + np.arange(S + 1))


def test_batches_are_the_examples_in_order_and_depend_only_on_the_seed(batches):
    first, again, other = (batches(seed) for seed in (3, 3, 4))
    straight = np.stack([next(first)["tokens"] for _ in range(16)])
    np.testing.assert_array_equal(straight[:, :, 0].ravel(), starts(3, 0, 16 * B))
    np.testing.assert_array_equal(straight, [next(again)["tokens"] for _ in range(16)])
    assert (straight != [next(other)["tokens"] for _ in range(16)]).any()


def test_an_iterator_resumes_from_its_state(batches):
    first, second = batches(), batches()
    for _ in range(5):
        next(first)
    second.set_state(first.get_state())
    np.testing.assert_array_equal(next(second)["tokens"], next(first)["tokens"])
    assert next(second)["tokens"][0, 0] == starts(3, 6 * B, 1)


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_epoch_draws_each_window_once_in_a_new_order(epoch):
    now, later = (starts(3, e * 100, 100) for e in (epoch, epoch + 1))
    assert sorted(now // S) == list(range(100))
    assert (now // S != later // S).any()
    assert (np.sort(now) != np.sort(later)).any()  # other offsets, too


def test_offsets_take_every_value_up_to_the_sequence_length():
    few = Windows(IDS[: 3 * S + 5], S, "training")
    drawn = np.array([few.shifted(i, np.random.default_rng(e))["tokens"][0] for e in range(200) for i in range(3)])
    offsets = drawn.reshape(200, 3) - np.arange(3) * S
    assert set(offsets[:, 0]) == set(range(S))
    assert set(offsets[:, 2]) == set(range(5))  # the last window stays in the text


def test_validation_windows_predict_each_token_once_and_the_last_batch_is_padded():
    tokens = np.stack([WINDOWS[i]["tokens"] for i in range(len(WINDOWS))])
    np.testing.assert_array_equal(tokens[:, 1:].ravel(), np.arange(1, 100 * S + 1))
    with pytest.raises(IndexError):
        WINDOWS[100]
    batched = list(in_batches(WINDOWS, B, make_mesh()))
    assert {batch["tokens"].shape for batch, _, _ in batched} == {(B, S + 1)}
    assert [(n, predicted) for _, n, predicted in batched] == [(B, B * S)] * 14 + [(2, 2 * S)]
    np.testing.assert_array_equal(np.concatenate([batch["tokens"][:n] for batch, n, _ in batched]), tokens)
    assert n_predicted(WINDOWS) == n_predicted([WINDOWS[i] for i in range(100)]) == 100 * S


def test_a_text_shorter_than_a_sequence_is_an_error():
    with pytest.raises(ValueError, match=r"training text has 11 .*seq_len=11\b.*12"):
        Windows(IDS[:S], S, "training")


def test_batches_have_the_sharding_that_steps_expect(batches):
    batch = next(batches())["tokens"]
    assert isinstance(batch, jax.Array)
    assert batch.sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"))


def test_windows_within_documents_never_cross_and_predict_each_token_once():
    lengths = [3, 17, S, S + 1, 0, 5 * S + 2, 1, 2]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = 100 * np.repeat(np.arange(len(lengths)), lengths) + np.concatenate([np.arange(n) for n in lengths])
    windows = DocumentWindows(ids, S, "training", starts)
    assert len(windows) == sum(-(-max(0, n - 1) // S) for n in lengths)
    predicted = np.concatenate([without_padding(windows[i])[1:] for i in range(len(windows))])
    np.testing.assert_array_equal(predicted, [token for token in ids if token % 100])
    assert n_predicted(windows) == n_predicted([windows[i] for i in range(len(windows))]) == len(predicted)
    rng = np.random.default_rng(0)
    shifted = [windows.shifted(i, rng) for i in range(len(windows)) for _ in range(40)]
    for example in shifted:
        assert example["tokens"].shape == (S + 1,)
        assert example["predicted"].shape == (S,)
        assert len(set(without_padding(example) // 100)) == 1
    assert {token for example in shifted for token in without_padding(example)[1:]} == set(predicted)
    with pytest.raises(IndexError):
        windows[len(windows)]
    with pytest.raises(ValueError, match=r"validation text .* 2 tokens.*within_documents"):
        DocumentWindows(np.zeros(2, int), S, "validation", np.asarray([0, 1, 2]))


def test_examples_of_a_validation_are_made_when_they_are_used():
    made: list[int] = []

    class Examples(Sequence):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, i):
            made.append(i)
            return {"tokens": np.zeros(S + 1, np.int32)}

    first = First(Examples(), 7)
    assert len(first) == 7
    assert n_predicted(first) == 7 * S
    assert made == [0, 0]
    assert len(list(first)) == 7
    with pytest.raises(IndexError):
        first[7]
