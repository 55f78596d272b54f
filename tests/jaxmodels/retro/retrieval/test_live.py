"""Retrieval during generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import generate
from jaxmodels.generate import loop
from jaxmodels.process.programs import run
from jaxmodels.retro.retrieval.corpus import Corpus
from jaxmodels.retro.retrieval.embedders import HashedNGrams
from jaxmodels.retro.retrieval.index import ChunkIndex
from jaxmodels.retro.retrieval.live import Retriever, Retrieving
from jaxmodels.text import CharVocabulary
from tests.common import token_ids
from tests.jaxmodels.retro.common import L, model

VOCABULARY = CharVocabulary("abcdefghijklmnopqrstuvw")  # as many as the model has
forward = jax.jit(lambda model, x, ret: model(x, ret))


@pytest.fixture(scope="module")
def retriever(tmp_path_factory) -> Retriever:
    tokens = np.asarray(token_ids(9, 200))
    folder = tmp_path_factory.mktemp("index") / "index"
    index = ChunkIndex.build(folder, Corpus.of(tokens, VOCABULARY), L, HashedNGrams(64, 1, 2))
    return Retriever(index)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [2, 8], ids=["short of a chunk", "two chunks"])
def test_what_is_written_is_what_the_full_forward_says_of_it(retriever, prompt, monkeypatch):
    """Greedily, a batch, past several chunks and sizes of the cache: each token from neighbors of what was written."""
    monkeypatch.setattr(loop, "MIN_SLOTS", 8)
    retro, x = model(scale=1.0), token_ids(prompt, 2, prompt)
    written = np.asarray(generate.generate(Retrieving(retro, retriever), x, 13))
    text = np.concatenate([x, written], axis=1)
    chunks = text[:, : text.shape[1] // L * L].reshape(2, -1, L)
    logits = forward(retro, jnp.asarray(text), jnp.asarray(retriever(chunks)))
    np.testing.assert_array_equal(logits[:, prompt - 1 : -1].argmax(-1), written)
    without = generate.generate(retro, x, 13)
    assert (np.asarray(without) != written).any()


@pytest.mark.slow
def test_rows_with_left_padding_write_as_if_alone(retriever):
    retro, x = Retrieving(model(scale=1.0), retriever), token_ids(1, 2, 9)
    together = generate.generate(retro, x, 6, start=jnp.array([0, 5]))
    for row, padding in enumerate([0, 5]):
        np.testing.assert_array_equal(generate.generate(retro, x[row : row + 1, padding:], 6)[0], together[row])


@pytest.mark.slow
def test_several_tokens_at_once_are_as_one_by_one(retriever):
    retro, x = Retrieving(model(), retriever), token_ids(2, 2, 11)
    decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache))
    _, cache = jax.jit(lambda model, ids, cache: model.prefill(ids, cache))(retro, x[:, :2], retro.init_cache(2, 11))
    at_once, _ = decode(retro, x[:, 2:], cache)
    for t in range(2, 11):
        logits, cache = decode(retro, x[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], at_once[:, t - 2], atol=1e-5)


def test_a_model_of_other_chunks_or_tokens_is_refused(retriever):
    retro = model()
    retro.chunk_len = 7
    with pytest.raises(ValueError, match=r"chunk_len=7\b.*chunk_len=4\b"):
        Retrieving(retro, retriever)
    retro = model()
    retro.n_vocab = 5
    with pytest.raises(ValueError, match=r"\b23 .*n_vocab=5\b"):
        Retrieving(retro, retriever)


def test_an_error_of_the_index_is_one_line(retriever, monkeypatch, capfd):
    def neighbors(chunks, k):
        raise ValueError(f"index: {len(chunks)} chunks cannot be embedded" if failing else "another error")

    monkeypatch.setattr(ChunkIndex, "neighbors", lambda index, *arguments: neighbors(*arguments))
    retro = Retrieving(model(), retriever)
    for failing in (True, False):
        said = "index: 2 chunks cannot be embedded" if failing else "another error"
        assert run(lambda: print(generate.generate(retro, token_ids(1, 1, 9), 3)), "command") == 2
        assert capfd.readouterr().err == f"command: {said}\n"
    monkeypatch.setattr(ChunkIndex, "neighbors", lambda *arguments: {}["a bug"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        run(lambda: print(generate.generate(retro, token_ids(1, 1, 9), 3)), "command")
