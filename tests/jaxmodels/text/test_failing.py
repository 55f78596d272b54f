"""Tokenizers of others that can be read and then fail on a text: the error names their file."""

import json

import numpy as np
import pytest

from jaxmodels.text import TokenizerFile, load_vocabulary
from jaxmodels.text.corpora import split
from jaxmodels.text.documents import Text
from jaxmodels.text.sources import Sources
from jaxmodels.text.tokens import write_sources

pytest.importorskip("tokenizers")
MODELS = {
    "WordPiece": {"vocab": {"a": 0}, "unk_token": "\x1b[31m", "continuing_subword_prefix": "##"}
    | {"max_input_chars_per_word": 100},
    "WordLevel": {"vocab": {"a": 0}, "unk_token": "?"},
    "Unigram": {"vocab": [["a", -1.0]], "unk_id": None, "byte_fallback": False},
    "BPE": {"vocab": {"a": 0}, "merges": [], "unk_token": "?"},
}


def content(kind: str, **parts: object) -> str:
    """A tokenizer.json without a token for what it does not know."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = {"type": kind, **MODELS[kind]}
    return json.dumps({"version": "1.0", **empty, "added_tokens": [], "model": model, **parts})


@pytest.mark.parametrize("kind", MODELS)
def test_the_error_names_the_file_of_a_tokenizer_that_fails_on_a_text(kind, tmp_path):
    file, saved = tmp_path / "tokenizer.json", tmp_path / "vocabulary.json"
    file.write_text(content(kind))
    vocabulary = TokenizerFile.read(file)
    vocabulary.save(saved)
    for read, name in ((vocabulary, file), (TokenizerFile.read(tmp_path), file), (load_vocabulary(saved), saved)):
        assert read == TokenizerFile(content(kind))
        assert repr(read) == repr(TokenizerFile(content(kind)))  # which fingerprints contain
        for encode in (read.encode, read.encode_prompt, lambda text, read=read: read.encode_batch([text])):
            with pytest.raises(ValueError, match=rf"^tokenizer={name} cannot encode the text: .") as refused:
                encode("abc")
            assert str(refused.value).isprintable()


def test_the_error_names_the_text_too_when_a_corpus_is_encoded(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content("WordLevel"))
    train, validation = (Text("corpus.txt", part) for part in split("b" * 40))
    with pytest.raises(ValueError, match=rf"corpus\.txt.*tokenizer={file} cannot encode"):
        write_sources(tmp_path / "tokens", Sources(train, validation), TokenizerFile.read(file))


def test_an_id_beyond_those_of_any_vocabulary_is_one_line(tmp_path):
    special = {"x": {"id": "x", "ids": [2**32 - 1], "tokens": ["x"]}}
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    rule = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (tmp_path / "tokenizer.json").write_text(content("WordLevel", post_processor=rule))
    vocabulary = TokenizerFile.read(tmp_path)
    np.testing.assert_array_equal(vocabulary.encode("a"), [0])
    with pytest.raises(ValueError, match=rf"^tokenizer={tmp_path / 'tokenizer.json'} cannot encode .* 4294967295"):
        vocabulary.encode_prompt("a")
