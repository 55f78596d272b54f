"""`score`: every language model, long documents in strides, and documents without predicted tokens."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.feedback import AutoregressiveModel, FeedbackTransformer
from jaxmodels.neox import NeoX, NeoXConfig
from jaxmodels.protocols import DividedReadout, has_divided_readout
from jaxmodels.retro import RetroModel
from jaxmodels.scoring import Score, rows, score
from jaxmodels.scoring.documents import checked_window
from jaxmodels.scoring.rows import batches, padded_length
from jaxmodels.scoring.windows import windows
from jaxmodels.text import ByteVocabulary, CharVocabulary, TokenizerFile
from jaxmodels.text.documents import TextFile
from tests.common import V, filled, language_model
from tests.jaxmodels.tokenizer import byte_level_tokenizer

SIZES = {"n_vocab": V, "n_hidden": 12, "n_layers": 2, "n_heads": 3, "n_ff": 17, "rope_percentage": 0.5, "max_len": 19}


def neox(n_vocab: int = V, stacked: bool = True, **others) -> NeoX:
    config = NeoXConfig(**SIZES | {"n_vocab": n_vocab} | others)
    return filled(lambda: NeoX(config, stacked=stacked, rngs=nnx.Rngs(0)))


MODELS = {
    "neox": neox,
    "tied": lambda: neox(stacked=False, tied=True),
    "rotary": lambda: language_model("rotary"),
    "synthesizer": lambda: language_model("random+dense"),
    "feedback": lambda: filled(
        lambda: AutoregressiveModel(V, FeedbackTransformer(6, 3, 5, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    ),
    "retro": lambda: filled(lambda: RetroModel(V, 6, 1, set(), 4, 3, 2, 5, None, rngs=nnx.Rngs(0))),
}


def documents(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, V, n) for i, n in enumerate(lengths)]


@jax.jit
def whole(model, inputs: jax.Array) -> jax.Array:
    logits = model(inputs[None])[0] if model.sequence_axis == 1 else model(inputs[:, None])[:, 0]
    return jax.nn.log_softmax(logits)


def log_probs(model, ids, length: int | None = None) -> np.ndarray:
    """Log-probabilities of ids[1:], from whole logits; the sequence is padded to a length if that is given."""
    inputs = np.asarray(ids[:-1])
    padded = np.pad(inputs, (0, (length or len(inputs)) - len(inputs)))
    return np.asarray(whole(model, jnp.asarray(padded)))[np.arange(len(inputs)), ids[1:]]


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_every_model_can_be_computed_in_chunks(name):
    assert isinstance(MODELS[name](), DividedReadout)


@nnx.dataclass
class Whole(nnx.Module):
    """A language model that has its call alone."""

    model: nnx.Module
    sequence_axis = 1

    def __call__(self, ids):
        return self.model(ids)


def test_a_model_without_a_divided_readout_is_scored_too():
    model, texts = neox(), documents(5, 9)
    assert not isinstance(Whole(model), DividedReadout)
    expected = score(model, texts).total.nats
    assert score(Whole(model), texts).total.nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MODELS)
def test_documents_of_different_lengths_score_as_alone(name):
    model, texts = MODELS[name](), documents(7, 3, 7, 3)
    found = score(model, texts)
    for text, alone in zip(texts, found.documents, strict=True):
        assert alone.tokens == len(text) - 1
        np.testing.assert_allclose(alone.loss, -log_probs(model, text).mean(), rtol=1e-12)
    assert found.total.tokens == 16
    np.testing.assert_allclose(found.total.nats, sum(s.nats for s in found.documents), rtol=1e-14)
    assert found.total.perplexity == pytest.approx(math.exp(found.total.nats / 16))
    assert found.total.bits_per_byte is found.total.bits_per_character is None


class Doubled(NeoX):
    """A model whose call is not that of its parts."""

    def __call__(self, ids, start=None):
        return 2 * super().__call__(ids, start)


def test_a_subclass_that_overrides_the_call_alone_is_scored_by_its_call():
    model, texts = neox(), documents(5, 9)
    doubled = Doubled(model.settings, rngs=nnx.Rngs(0))
    assert not has_divided_readout(doubled)
    assert has_divided_readout(model)
    assert score(doubled, texts).total.nats != pytest.approx(score(model, texts).total.nats, rel=1e-3)


@pytest.mark.usefixtures("x64")
def test_the_chunk_does_not_change_the_scores():
    model, texts = neox(), documents(7, 3, 7, 3)
    expected = score(model, texts).total.nats
    assert score(model, texts, loss_chunk=1).total.nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["neox", "synthesizer"])
@pytest.mark.parametrize(("max_length", "stride"), [(7, 3), (7, 6), (2, 1)])
def test_long_documents_are_scored_in_strides(name, max_length, stride):
    model, (ids,) = MODELS[name](), documents(41)
    expected, scored = 0.0, 1
    for begin in range(0, 41, stride):
        end = min(begin + max_length, 41)
        expected += log_probs(model, ids[begin:end], 7)[scored - end :].sum() if end > scored else 0
        scored = end
        if end == 41:
            break
    found = score(model, [ids], max_length=max_length, stride=stride).total
    assert found.tokens == 40
    np.testing.assert_allclose(found.nats, -expected, rtol=1e-12)


@pytest.mark.parametrize("n", range(30))
def test_each_token_is_scored_once_with_the_promised_context(n):
    scored = []
    for begin, end, first in windows(n, 7, 3):
        assert end - begin <= 7
        assert begin == 0 or first - begin >= 4
        scored += range(first, end)
    assert scored == list(range(1, n))


def test_the_windows_default_to_the_models_length():
    model, texts = neox(), documents(43)
    assert score(model, texts) == score(model, texts, max_length=19, stride=9)


def test_the_window_of_a_model_of_any_length_is_bounded(capsys):
    model = SimpleNamespace(config=lambda: {"max_len": 10**9})
    assert checked_window(model, None, None) == (4096, 2048)
    assert "max_len=1,000,000,000" in capsys.readouterr().err
    assert checked_window(model, 10**5, 3) == (10**5, 3)
    assert capsys.readouterr().err == ""


def test_documents_without_predicted_tokens():
    found = score(neox(), [np.array([], int), np.array([3]), np.array([3, 5])])
    assert [s.tokens for s in found.documents] == [0, 0, 1]
    assert found.documents[0] == found.documents[1] == Score(0, 0.0)
    assert found.documents[0].loss is found.documents[0].perplexity is None
    assert found.total.nats == found.documents[2].nats > 0
    assert score(neox(), []).total == Score(0, 0.0, 0, 0)
    assert score(neox(), iter([[3, 5]])).documents == found.documents[2:]


def test_with_bos_the_first_token_is_predicted_too():
    model, texts = neox(), documents(5, 1, 0)
    found = score(model, texts, bos=2)
    assert [s.tokens for s in found.documents] == [5, 1, 0]
    assert found.documents[0].nats == pytest.approx(score(model, [np.array([2, *texts[0]])]).total.nats, rel=1e-6)


@pytest.mark.parametrize(
    ("vocabulary", "text", "bos", "sizes"),
    [
        (ByteVocabulary(), "größe", None, (4, 6)),
        (ByteVocabulary(), "größe", 0, (5, 7)),
        (ByteVocabulary(), "ößchen", None, (6, 7)),
        (CharVocabulary("eghrößz"), "größe", None, (4, 6)),
        (TokenizerFile(byte_level_tokenizer().to_str()), "größe", None, (4, 6)),
        (TokenizerFile(byte_level_tokenizer().to_str()), "ößchen", None, (6, 8)),
        (ByteVocabulary(), "", None, (0, 0)),
    ],
)
def test_bits_are_divided_by_the_text_of_the_predicted_tokens(vocabulary, text, bos, sizes):
    found = score(neox(n_vocab=300), [text], tokenizer=vocabulary, bos=bos).total
    assert (found.characters, found.n_bytes) == sizes
    if text:
        assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / sizes[1])
        assert found.bits_per_character == pytest.approx(found.nats / math.log(2) / sizes[0])


def test_a_decoder_that_makes_more_than_the_text_gives_no_negative_bits():
    class Repeating(ByteVocabulary):
        unit = "token"

        def decode(self, ids):
            return 24 * super().decode(ids)

    for text in ("abcab", "é", "24 letters and some more of them"):
        (found,) = score(neox(256), [text], tokenizer=Repeating()).documents
        assert 0 <= found.characters <= len(text)
        assert 0 <= found.n_bytes <= len(text.encode())


def test_a_tokenizer_is_anything_that_names_one(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = neox(n_vocab=300)
    found = [score(model, ["größe"], tokenizer=one) for one in (tokenizer, tmp_path, tmp_path / "tokenizer.json")]
    assert found[0] == found[1] == found[2]


def test_few_shapes_are_compiled(monkeypatch):
    shapes = set()
    inputs = rows.inputs

    def noting(model, rows, shape):
        shapes.add(shape)
        return inputs(model, rows, shape)

    monkeypatch.setattr(rows, "inputs", noting)
    score(neox(), documents(*range(2, 19)), batch_size=4)
    assert shapes == {(4, 18), (4, 16), (1, 16)}  # of inputs of 1 to 17 tokens


def test_batches_are_sorted_by_length_and_hold_all_rows():
    lengths = np.random.default_rng(0).integers(1, 700, 101).tolist()
    found = list(batches(lengths, None, None))
    assert sorted(i for batch in found for i in batch.rows) == list(range(101))
    for batch in found:
        assert max(lengths[i] for i in batch.rows) <= batch.shape[1]
        assert len(batch.rows) <= batch.shape[0]
        assert batch.shape[0] * batch.shape[1] <= rows.BATCH_TOKENS
    assert [padded_length(n) for n in (1, 16, 17, 33, 65, 200, 257, 2048)] == [16, 16, 20, 40, 80, 224, 320, 2048]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 2.5}, "max_length=2.5"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 19}, "stride=19 .*18"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"loss_chunk": 0}, "loss_chunk=0"),
        ({"bos": V}, f"bos={V} .*{V - 1}"),
        ({"texts": "abc"}, "texts"),
        ({"texts": ["abc"]}, "tokenizer=None"),
        ({"texts": ["a", "\ud800"], "tokenizer": ByteVocabulary()}, "document 1 .*Unicode"),
        ({"texts": [[1, 2], [1, V]]}, f"document 1 .*id {V}"),
        ({"texts": [[1, -1]]}, "document 0 .*id -1"),
        ({"texts": [[0.5]]}, r"document 0 .*float64\[1\]"),
        ({"model": object()}, "object.*sequence_axis"),
    ],
)
def test_bad_input_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        score(**{"model": neox(), "texts": [[1, 2, 3]]} | settings)


def test_weights_that_are_not_finite_are_refused():
    model = neox()
    model.readout.linear.kernel[...] = jnp.full_like(model.readout.linear.kernel[...], jnp.nan)
    with pytest.raises(ValueError, match="document 1 is nan"):
        score(model, [[1], [1, 2, 3]])


@pytest.mark.parametrize("bos", [None, 3])
def test_windows_are_scored_in_groups_and_a_source_in_pieces(bos, tmp_path, monkeypatch):
    text = "went to sea, ñandú; " * 11
    (tmp_path / "a.txt").write_text(text)
    model, tokenizer, texts = neox(256), ByteVocabulary(), [text, "in a boat", text[7:]]
    expected = score(model, texts, tokenizer=tokenizer, bos=bos)
    monkeypatch.setattr("jaxmodels.scoring.documents.GROUP", 50)
    found = score(model, iter([TextFile(tmp_path / "a.txt"), *texts[1:]]), tokenizer=tokenizer, bos=bos)
    for one, other in zip((*found.documents, found.total), (*expected.documents, expected.total), strict=True):
        assert (one.tokens, one.characters, one.n_bytes) == (other.tokens, other.characters, other.n_bytes)
        assert one.nats == pytest.approx(other.nats, rel=1e-6)
