import numpy as np
import pytest

from train.data import Batches, windows

N, S, B = 257, 11, 5  # 23 windows: batches reach over the ends of epochs
IDS = np.arange(N, dtype=np.int32)  # a token is its own place


def epoch_starts(batches: Batches, epoch: int) -> np.ndarray:
    """Where the windows of an epoch start, in the order they are drawn."""
    n = (N - 1) // S
    steps = range(epoch * n // B, -(-(epoch + 1) * n // B))
    starts = np.concatenate([batches(step)[0] for step in steps])
    return starts[epoch * n - steps[0] * B :][:n]


def test_a_batch_is_windows_of_the_text_and_their_next_tokens():
    tokens = Batches(IDS, S, B, seed=3)(7)
    assert tokens.shape == (S + 1, B)
    assert tokens.dtype == np.int32
    assert (tokens == tokens[0] + np.arange(S + 1)[:, None]).all()


def test_batches_depend_on_seed_and_step_alone():
    batches, again, other = Batches(IDS, S, B, seed=3), Batches(IDS, S, B, seed=3), Batches(IDS, S, B, seed=4)
    straight = [batches(step) for step in range(13)]
    backwards = [again(step) for step in reversed(range(13))][::-1]
    np.testing.assert_array_equal(straight, backwards)
    assert (np.asarray(straight) != [other(step) for step in range(13)]).any()


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_epoch_draws_each_window_once_in_an_order_of_its_own(epoch):
    batches = Batches(IDS, S, B, seed=3)
    starts, later = epoch_starts(batches, epoch), epoch_starts(batches, epoch + 1)
    assert sorted(starts // S) == list(range((N - 1) // S))
    assert (starts // S != later // S).any()
    assert (np.sort(starts) != np.sort(later)).any()  # other offsets, too


def test_offsets_take_every_value_up_to_the_sequence_length():
    batches = Batches(IDS, S, B, seed=3)
    starts = np.stack([np.sort(epoch_starts(batches, epoch)) for epoch in range(40)])
    offsets = starts - np.arange((N - 1) // S) * S
    assert set(offsets[:, 0]) == set(range(S))
    assert set(offsets[:, -1]) == set(range((N - 1) % S + 1))  # the last window stays in the text


def test_a_text_of_one_window_and_many_sequences_a_batch():
    tokens = Batches(IDS[: S + 1], S, B, seed=3)(2)
    assert (tokens == np.arange(S + 1)[:, None]).all()


def test_validation_windows_predict_each_token_once():
    tokens = windows(IDS, S, "validation")
    np.testing.assert_array_equal(tokens[1:].T.ravel(), np.arange(1, 23 * S + 1))


def test_a_text_shorter_than_a_sequence_is_an_error():
    with pytest.raises(ValueError, match=r"the training text has 11 .* seq_len=11"):
        Batches(IDS[:S], S, B, seed=3)
    with pytest.raises(ValueError, match="the validation text has 0 "):
        windows(IDS[:0], S, "validation")
