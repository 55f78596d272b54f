"""Vocabularies, tokenizers and corpora."""

import hashlib
import http.client
import io
import json
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from jaxmodels.text import (
    ByteVocabulary,
    CharVocabulary,
    TokenizerFile,
    as_vocabulary,
    corpora,
    find_tokenizer,
    load_corpus,
    load_vocabulary,
    split,
)
from tests.jaxmodels.tokenizer import byte_level_tokenizer

SHAKESPEARE = Path(__file__).parents[4] / "shared/data/tiny_shakespeare.txt"


def test_vocabulary_round_trip(tmp_path):
    content = "Grüße,\n\tWelt! 日本 👍"
    vocabulary = CharVocabulary.of(content)
    assert vocabulary.characters == "".join(sorted(set(content)))
    ids = vocabulary.encode(content)
    assert ids.dtype == np.int32
    assert ids.shape == (len(content),)
    assert sorted(set(ids.tolist())) == list(range(len(vocabulary)))
    assert vocabulary.decode(ids) == content
    vocabulary.save(tmp_path / "vocabulary.json")
    assert CharVocabulary.load(tmp_path / "vocabulary.json") == vocabulary


def test_vocabulary_of_nothing():
    assert CharVocabulary("ab").encode("").shape == (0,)
    assert CharVocabulary("ab").decode(np.zeros(0, np.int32)) == ""


def test_many_unknown_characters_are_counted_in_linear_time():
    text = "".join(map(chr, range(0x10000, 0x10000 + 100_000))) * 2
    began = time.process_time()
    with pytest.raises(ValueError, match="200,000 unknown"):
        CharVocabulary("abc").encode(text)
    assert time.process_time() - began < 3  # 30 with a search of the text for each


def test_vocabulary_refuses_unknown_characters():
    with pytest.raises(ValueError, match=r"3 unknown.*'x', 'z'.* 3 "):
        CharVocabulary.of("abc").encode("azaxxb")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "null", '{"characters": 5}', '{"characters": ["a"]}', '{"characters": "aba"}']
)
def test_vocabulary_refuses_another_file(tmp_path, content):
    file = tmp_path / "vocabulary.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"\.json\b"):
        CharVocabulary.load(file)


def test_vocabulary_refuses_a_missing_or_binary_file(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("missing", "binary"):
        with pytest.raises(ValueError, match=rf"{name}\b"):
            CharVocabulary.load(tmp_path / name)


@pytest.mark.parametrize("n", [0, 1, 7, 10, 1009])
def test_split(n):
    content = "".join(chr(97 + i % 26) for i in range(n))
    training, validation = split(content)
    assert training + validation == content
    assert len(training) == int(0.9 * n)


def test_python_docs():
    content = load_corpus("python_docs")
    assert len(content) > 300_000
    assert content == load_corpus("python_docs")
    assert 'The "while" statement' in content


def test_file(tmp_path):
    file = tmp_path / "ä.txt"
    file.write_text("Grüße\n", encoding="utf-8")
    assert load_corpus(str(file)) == "Grüße\n"


def test_refuses_a_bad_file(tmp_path):
    (tmp_path / "latin").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("latin", "empty", "missing", "."):
        with pytest.raises(ValueError, match="text="):
            load_corpus(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"text='shakespear'.*python_docs, tiny_shakespeare"):
        load_corpus("shakespear")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "jaxmodels/tiny_shakespeare.txt"


def serve(monkeypatch, answer):
    """Every download gives these bytes, or fails with this error; -> the addresses asked for."""
    asked = []

    def urlopen(url, **_):
        asked.append(url)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(corpora.urllib.request, "urlopen", urlopen)
    return asked


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route"), TimeoutError("timed out"), http.client.IncompleteRead(b"Fir")],
    ids=lambda error: type(error).__name__,
)
def test_shakespeare_says_what_to_do_when_the_download_fails(cache, monkeypatch, error):
    serve(monkeypatch, error)
    with pytest.raises(ValueError, match=r"tiny_shakespeare .*https://"):
        load_corpus("tiny_shakespeare")
    assert not cache.exists()


def test_shakespeare_refuses_another_text(cache, monkeypatch):
    serve(monkeypatch, b"captive portal")
    with pytest.raises(ValueError, match=r"sha256 .*https://"):
        load_corpus("tiny_shakespeare")
    assert not cache.exists()


def test_shakespeare_is_downloaded_once_and_checked_each_time(cache, monkeypatch):
    content = b"First Citizen:\n"
    monkeypatch.setattr(corpora, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    asked = serve(monkeypatch, content)
    assert load_corpus("tiny_shakespeare") == load_corpus("tiny_shakespeare") == content.decode()
    assert asked == [corpora.TINY_SHAKESPEARE_URL]
    assert list(cache.parent.iterdir()) == [cache]
    cache.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"sha256.*{cache}"):
        load_corpus("tiny_shakespeare")


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tiny_shakespeare.txt in ../shared/data")
def test_the_sha256_is_that_of_tiny_shakespeare():
    content = SHAKESPEARE.read_bytes()
    corpora.check_sha256(content, "")
    characters = CharVocabulary.of(content.decode())
    assert len(characters) == 65
    assert characters.encode("\n ").tolist() == [0, 1]
    assert [len(part) for part in split(content.decode())] == [1_003_854, 111_540]


def test_vocabulary_file_is_json(tmp_path):
    CharVocabulary("ab").save(tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text()) == {"characters": "ab"}


def test_a_tokenizer_is_found_in_the_parent_folder_of_a_checkpoint(tmp_path):
    tokenizer = byte_level_tokenizer()
    (tmp_path / "global_step7").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer.*tokenizer\.json"):
        find_tokenizer(None, tmp_path / "global_step7")
    tokenizer.save(str(tmp_path / "20B_tokenizer.json"))
    found = TokenizerFile.read(find_tokenizer(None, tmp_path / "global_step7"))
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.fixture
def stored(tmp_path):
    """A tokenizer.json that stores truncation and padding, as published ones do."""
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_stored_truncation_and_padding_are_switched_off(stored, tmp_path):
    text = "a text of more than five tokens"
    expected = byte_level_tokenizer().encode(text).ids
    assert len(expected) > 8
    TokenizerFile.read(stored).save(tmp_path / "vocabulary.json")
    for vocabulary in (TokenizerFile.read(stored), load_vocabulary(tmp_path / "vocabulary.json")):
        assert vocabulary.encode(text).tolist() == vocabulary.encode_prompt(text).tolist() == expected
        assert vocabulary.encode("a").tolist() == byte_level_tokenizer().encode("a").ids


def test_merges_are_never_dropped_at_random(tmp_path):
    content = json.loads(byte_level_tokenizer().to_str())
    content["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "the statement"
    assert TokenizerFile.read(tmp_path).encode(text).tolist() == byte_level_tokenizer().encode(text).ids


def test_the_length_is_one_more_than_the_largest_id(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 3, "b": 70_000, "c": 300}, unk_token="a"))
    assert len(TokenizerFile.of(tokenizer)) == 70_001
    tokenizer = Tokenizer(models.WordLevel({"a": 3, "b": 300}, unk_token="a"))
    tokenizer.add_tokens(["added"])
    vocabulary = TokenizerFile.of(tokenizer)
    added = tokenizer.token_to_id("added")
    assert len(vocabulary) == 1 + max(300, added)
    assert vocabulary.n_model == 301
    with pytest.raises(ValueError, match="without tokens"):
        len(TokenizerFile.of(Tokenizer(models.BPE())))


def test_a_vocabulary_of_anything_that_names_one(stored):
    backend = Tokenizer.from_file(str(stored))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    text = "the statement"
    expected = byte_level_tokenizer().encode(text).ids
    for given in (stored, str(stored), stored.parent, backend, fast, TokenizerFile.read(stored)):
        assert as_vocabulary(given).encode(text).tolist() == expected
    assert as_vocabulary(fast).eos == (0,)
    assert as_vocabulary(characters := CharVocabulary("ab")) is characters
    with pytest.raises(ValueError, match="tokenizer is a int"):
        as_vocabulary(3)


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, (0,)),  # <|endoftext|>
        ({"tokenizer_config.json": {"eos_token": "e"}}, ("e",)),
        ({"special_tokens_map.json": {"eos_token": {"content": "e", "lstrip": False}}}, ("e",)),
        ({"tokenizer_config.json": {"eos_token": "e"}, "config.json": {"eos_token_id": 7}}, (7,)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [2, 5]}}, (2, 5)),
        ({"config.json": {"token_ids": {"eos_token_id": [9]}}}, (9,)),
        ({"config.json": {"eos_token_id": -1}}, (0,)),
        ({"config.json": {"eos_token_id": [3, -1, "4", 3]}}, (3, 4)),
    ],
    ids=str,
)
def test_end_tokens_are_those_of_the_files_beside(stored, files, eos):
    for name, content in files.items():
        (stored.parent / name).write_text(json.dumps(content))
    found = TokenizerFile.read(stored)
    assert found.eos == tuple(found.tokenizer.token_to_id(one) if isinstance(one, str) else one for one in eos)
    assert found.same_tokens(TokenizerFile(stored.read_text()))


def test_a_vocab_json_with_merges_is_a_tokenizer(tmp_path):
    byte_level_tokenizer().model.save(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 300}))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = TokenizerFile.read(tmp_path)
    text = "the statement<|endoftext|>é €<extra> x"
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    assert vocabulary.encode(text).tolist() == theirs(text)["input_ids"]
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.eos == (vocabulary.tokenizer.token_to_id("<|endoftext|>"),)
    assert vocabulary.special[vocabulary.eos[0]] == "<|endoftext|>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 400}))
    with pytest.raises(ValueError, match=r"added_tokens\.json has '<extra>' with the id 400; the tokenizer has 300"):
        TokenizerFile.read(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "said"),
    [
        ({"a": 0, "b": 1}, "a b\n", r"merges\.txt has 'a b' in line 1; vocab\.json lacks 'ab'"),
        ({"a": 0, "ab": 1}, "#version: 0.2\na b\n", r"merges\.txt has 'a b' in line 2; .*lacks 'b'"),
        ({"a": 0, "b": 1, "ab": 2}, "a b c\n", r"merges\.txt has 'a b c' in line 1; expected two"),
        ({"a": 0, "b": "x"}, "", r"vocab\.json has the id 'x'"),
        ({"a": 0, "b": [1]}, "", r"vocab\.json has the id \[1\]"),
        ({"a": 0, "b": 2**30}, "", "ids are at most"),
    ],
)
def test_merges_that_do_not_fit_a_vocabulary_are_refused(tmp_path, vocabulary, merges, said, capfd):
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ValueError, match=said):
        TokenizerFile.read(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", {"eos_token_id": {"a": 1}}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": [0, -5]}, "eos_token_id"),
        ("config.json", {"eos_token_id": 2**31}, "eos_token_id"),
        ("config.json", {"token_ids": {"eos_token_id": 1.5}}, "eos_token_id"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token"),
        ("special_tokens_map.json", {"eos_token": {"content": ["e"]}}, "eos_token"),
    ],
)
def test_an_end_token_of_another_kind_is_refused(stored, name, content, said):
    (stored.parent / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name} has {said}="):
        TokenizerFile.read(stored)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.txt", "vocab.json"])
def test_other_tokenizers_say_how_to_convert_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name} .*save_pretrained"):
        TokenizerFile.read(tmp_path)


def test_bytes_that_are_not_unicode_are_one_line():
    for vocabulary in (ByteVocabulary(), TokenizerFile.of(byte_level_tokenizer())):
        with pytest.raises(ValueError, match="udcff"):
            vocabulary.encode("a\udcff")
