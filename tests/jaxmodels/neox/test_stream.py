"""Text of streamed tokens; `Stream` itself is compared with `generate` in `neox/test_generate.py`."""

import pytest

from jaxmodels.neox.stream import END_OF_TEXT, StreamedText
from tests.jaxmodels.tokenizer import byte_level_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


def added(text, tokens):
    return [text.add(token) for token in tokens if not text.ended]


def test_text_comes_in_whole_characters(tokenizer):
    ids = tokenizer.encode("a – é€ b").ids
    parts = added(StreamedText(tokenizer), ids)
    assert "".join(parts) == "a – é€ b"
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts  # a character of several tokens came at its last


def test_what_may_become_a_stop_text_is_held_back(tokenizer):
    ids = tokenizer.encode("abababac").ids
    text = StreamedText(tokenizer, ["abac"])
    assert "".join(added(text, ids)) == "abab"
    assert text.ended
    text = StreamedText(tokenizer, ["abac"])
    shown = "".join(added(text, ids[:-1]))
    assert (shown + text.rest()) == tokenizer.decode(ids[:-1])
    assert not text.ended
    text = StreamedText(tokenizer, ["xyz"])
    assert "".join(added(text, tokenizer.encode("ab xy").ids)) == "ab "
    assert text.rest() == "xy"


def test_the_first_of_several_stop_texts_counts(tokenizer):
    text = StreamedText(tokenizer, ["cd", "bc"])
    assert "".join(added(text, tokenizer.encode("abcd").ids)) == "a"


def test_the_end_of_text_ends_it(tokenizer):
    text = StreamedText(tokenizer)
    assert added(text, [*tokenizer.encode("ab").ids, tokenizer.token_to_id(END_OF_TEXT)])[-1] == ""
    assert text.ended
