"""The statements of the figures, from the arrays they are drawn from."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from docs.figures import chunks, feedback, ranks, rotation


def test_neighbors_serve_the_positions_of_the_equation():
    u, i = np.indices((chunks.C, chunks.S))
    np.testing.assert_array_equal(chunks.reached_by_attention(), u == (i + 1) // chunks.L - 1)


@pytest.mark.slow
def test_logits_change_from_the_end_of_the_chunk_on():
    u, i = np.indices((chunks.C, chunks.S))
    np.testing.assert_array_equal(chunks.reached_by_model(), u <= (i + 1) // chunks.L - 1)


def test_scores_depend_on_the_distance_alone():
    distances = np.arange(61)
    first, *others = (rotation.scores(position, distances) for position in rotation.FIRST)
    assert np.ptp(first) > 1
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-3)


@pytest.mark.slow  # differentiates each step on its own
def test_the_gradient_of_a_slot_is_complete_when_the_reverse_scan_reaches_it():
    sums = feedback.reverse_scan()
    for slot in range(feedback.STEPS - 2):
        complete = sums[: slot + 1, slot]
        assert (complete == complete[0]).all()
        assert (np.diff(sums[slot:, slot]) != 0).any()


def test_ranks_are_drawn_without_a_warning(monkeypatch):
    drawn = []
    monkeypatch.setattr(ranks, "save", lambda figure, name: drawn.append((figure, name)))
    ranks.draw()
    ((figure, name),) = drawn
    assert name == "ranks"
    assert {text.get_text() for text in figure.axes[0].texts} >= {"2 ranks", "4 ranks", "−4", "−7"}
