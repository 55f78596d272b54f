"""`loglikelihood`: continuations after contexts, shared contexts, truncation."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.scoring import likelihood, loglikelihood
from tests.common import V
from tests.jaxmodels.scoring.test_documents import MODELS, documents, log_probs


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["neox", "rotary"])
def test_continuations_score_as_alone(name):
    model = MODELS[name]()
    contexts, continuations = documents(6, 4, 7, 1), documents(2, 4, 1, 3)
    found = loglikelihood(model, contexts, continuations)
    for context, continuation, one in zip(contexts, continuations, found, strict=True):
        expected = log_probs(model, np.concatenate([context, continuation]))[-len(continuation) :].sum()
        np.testing.assert_allclose(one.log_prob, expected, rtol=1e-12)


def test_exactly_the_greedy_continuation_is_greedy():
    model, context = MODELS["neox"](), documents(5)[0]
    best = max(range(V), key=lambda i: loglikelihood(model, [context], [[i]])[0].log_prob)
    found = loglikelihood(model, [context] * V, [[i] for i in range(V)])
    assert [one.greedy for one in found] == [i == best for i in range(V)]
    assert np.exp([one.log_prob for one in found]).sum() == pytest.approx(1, abs=1e-5)


def test_pairs_that_differ_in_the_last_token_are_computed_once(monkeypatch):
    counted = []
    score_rows = likelihood.score_rows
    monkeypatch.setattr(
        likelihood, "score_rows", lambda model, rows, **kw: counted.append(len(rows)) or score_rows(model, rows, **kw)
    )
    model = MODELS["neox"]()
    pairs = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 5]), ([1, 2], [3]), ([1, 2, 3], [4])]
    found = loglikelihood(model, *zip(*pairs, strict=True))
    assert counted == [3]
    for pair, one in zip(pairs, found, strict=True):
        assert one.log_prob == pytest.approx(loglikelihood(model, [pair[0]], [pair[1]])[0].log_prob, rel=1e-5)


def test_long_pairs_lose_the_beginning_of_the_context():
    model, (context,) = MODELS["neox"](), documents(30)
    found = loglikelihood(model, [context], [[3, 4]], max_length=6)
    assert found[0].log_prob == pytest.approx(loglikelihood(model, [context[-5:]], [[3, 4]])[0].log_prob, rel=1e-5)


def test_empty_continuations_have_log_probability_zero():
    assert loglikelihood(MODELS["neox"](), [[1]], [[]]) == [(0.0, True)]


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        ([[]], [[1]], "context 0"),
        ([[1]], [[1, 2, 3, 4]], "continuation 0 .*4 .*max_length=3"),
        ([[1]], [[1], [2]], "1 contexts and 2"),
        ([[1], [V]], [[1], [2]], f"document 1 .*id {V}"),
    ],
)
def test_bad_input_is_refused(contexts, continuations, message):
    with pytest.raises(ValueError, match=message):
        loglikelihood(MODELS["neox"](), contexts, continuations, max_length=3)


def test_a_log_probability_that_is_nan_is_refused_and_an_excluded_token_is_not():
    model = MODELS["rotary"]()
    bias = np.zeros(V, np.float32)
    bias[3] = -np.inf
    model.generator.projection.bias = nnx.Param(jnp.asarray(bias))
    assert [one.log_prob > -np.inf for one in loglikelihood(model, [[1], [1]], [[2], [3]])] == [True, False]
    model.generator.projection.bias = nnx.Param(jnp.full(V, jnp.nan))
    with pytest.raises(ValueError, match="continuation 0 is nan"):
        loglikelihood(model, [[1], [1]], [[2], [3]])
