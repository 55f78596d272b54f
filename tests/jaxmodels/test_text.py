"""Vocabularies, tokenizers and corpora."""

import hashlib
import http.client
import io
import json
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from jaxmodels import text
from jaxmodels.text import CharVocabulary, TokenizerFile, find_tokenizer, load_corpus, split
from tests.jaxmodels.tokenizer import byte_level_tokenizer

SHAKESPEARE = Path(__file__).parents[3] / "shared/data/tiny_shakespeare.txt"


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


def test_vocabulary_refuses_unknown_characters():
    with pytest.raises(ValueError, match=r"'xz'.*\b3\b"):
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

    monkeypatch.setattr(text.urllib.request, "urlopen", urlopen)
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
    monkeypatch.setattr(text, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    asked = serve(monkeypatch, content)
    assert load_corpus("tiny_shakespeare") == load_corpus("tiny_shakespeare") == content.decode()
    assert asked == [text.TINY_SHAKESPEARE_URL]
    assert list(cache.parent.iterdir()) == [cache]
    cache.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"sha256.*{cache}"):
        load_corpus("tiny_shakespeare")


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tiny_shakespeare.txt in ../shared/data")
def test_the_sha256_is_that_of_tiny_shakespeare():
    content = SHAKESPEARE.read_bytes()
    text.check_sha256(content, "")
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
