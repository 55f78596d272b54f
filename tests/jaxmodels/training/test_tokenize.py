"""The tokenize command and its folders."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxmodels.text import ByteVocabulary, CharVocabulary, TokenizerFile, load_vocabulary, sources
from jaxmodels.text import pieces as cut
from jaxmodels.text.sources import open_text
from jaxmodels.text.tokens import decoded_size, encode_whole
from jaxmodels.training.tokenize import open_tokens, parser, tokenize
from tests.jaxmodels.tokenizer import byte_level_tokenizer
from tests.train_common import TEXT

SPICED = TEXT + "ñandú 𝄞\n"


def run(arguments: list[str]) -> None:
    tokenize(**vars(parser().parse_args(arguments)))


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "sea.txt"
    file.write_text(SPICED)
    return str(file)


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["?", "men", "and", "women", "went", "to", "sea"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_folder_of_characters_equals_the_text_file(text, tmp_path, capsys):
    run([text, str(tmp_path / "tokens")])
    assert "tokens to train on" in capsys.readouterr().out
    mapped, read = open_tokens(str(tmp_path / "tokens")), open_tokens(text)
    assert isinstance(mapped.train, np.memmap)
    assert mapped.train.dtype == np.uint8
    np.testing.assert_array_equal(mapped.train, read.train)
    np.testing.assert_array_equal(mapped.validation, read.validation)
    assert mapped.vocabulary == read.vocabulary == CharVocabulary.of(SPICED)
    assert mapped.sha256 == read.sha256  # a run on either resumes with the other
    assert len(mapped.train) == int(0.9 * len(SPICED))


def test_bytes_write_any_text(text, tmp_path):
    run([text, str(tmp_path / "tokens"), "--kind", "bytes"])
    tokens = open_tokens(str(tmp_path / "tokens"))
    ids = np.concatenate([tokens.train, tokens.validation])
    assert bytes(ids) == SPICED.encode()
    assert tokens.vocabulary.decode(ids) == SPICED
    assert tokens.vocabulary.decode(ids[:-2])[-1] == "�"  # a character cut in two
    assert len(tokens.vocabulary) == 256


def test_a_tokenizer_file_is_copied_into_the_folder(text, tmp_path, tokenizer):
    run([text, str(tmp_path / "tokens"), "--tokenizer", str(tokenizer)])
    tokens = open_tokens(str(tmp_path / "tokens"))
    assert len(tokens.vocabulary) == 7
    assert tokens.vocabulary.decode(tokens.train[1:7]) == "men and ? women went to"
    tokenizer.unlink()
    np.testing.assert_array_equal(tokens.vocabulary.encode("sea men"), [6, 1])


@pytest.mark.parametrize("kind", ["chars", "bytes", "tokenizer"])
def test_a_vocabulary_is_read_as_it_was_saved(kind, tmp_path, request):
    made = {"chars": CharVocabulary("ab"), "bytes": ByteVocabulary()}.get(kind)
    vocabulary = made or TokenizerFile.read(request.getfixturevalue("tokenizer"))
    vocabulary.save(tmp_path / "vocabulary.json")
    assert load_vocabulary(tmp_path / "vocabulary.json") == vocabulary


def test_different_texts_have_different_checksums(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(SPICED.replace("ñ", "n"))
    assert open_tokens(text).sha256 != open_tokens(str(other)).sha256


def test_equal_ids_of_different_vocabularies_have_different_checksums(tmp_path):
    texts = [tmp_path / name for name in ("ab.txt", "cd.txt")]
    for file, characters in zip(texts, ("ab", "cd"), strict=True):
        file.write_text(characters * 10)
    one, other = (open_tokens(str(file)) for file in texts)
    np.testing.assert_array_equal(one.train, other.train)
    assert one.sha256 != other.sha256


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "tokenizer"], "--kind tokenizer.*--tokenizer"),
        (["--tokenizer", "nowhere.json"], "tokenizer=nowhere.json"),
        (["--tokenizer", "{text}"], "tokenizer.json"),
    ],
)
def test_bad_input_is_an_error_and_writes_nothing(flags, message, text, tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=message):
        run([text, str(tmp_path / "tokens"), *(flag.format(text=text) for flag in flags)])
    assert not (tmp_path / "tokens").exists()


def test_an_existing_folder_is_not_overwritten(text, tmp_path):
    with pytest.raises(ValueError, match="is not empty"):
        run([text, str(tmp_path)])


@pytest.mark.parametrize("how", ["no file", "cut", "other length", "other format"])
def test_a_damaged_folder_is_an_error(how, text, tmp_path):
    folder = tmp_path / "tokens"
    run([text, str(folder)])
    about = json.loads((folder / "tokens.json").read_text())
    match how:
        case "no file":
            (folder / "vocabulary.json").unlink()
        case "cut":
            (folder / "train.npy").write_bytes((folder / "train.npy").read_bytes()[:-100])
        case "other length":
            (folder / "tokens.json").write_text(json.dumps({**about, "train": 1}))
        case "other format":
            (folder / "tokens.json").write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(ValueError, match=f"text='{folder}'.*train.tokenize"):
        open_tokens(str(folder))


def test_documents_that_begin_beyond_64_bits_of_each_other_are_refused(tmp_path):
    """Their difference wraps around to a number above 0."""
    (tmp_path / "a.jsonl").write_text('{"text": "to be"}\n' * 30)
    run([str(tmp_path / "a.jsonl"), str(tmp_path / "tokens")])
    file = tmp_path / "tokens" / "train_documents.npy"
    starts = np.load(file)
    starts[1:3] = 2**62 + 2**61, -(2**62) - 2**61
    np.save(file, starts)
    with pytest.raises(ValueError, match=rf"{file} must grow from 0 to {starts[-1]}"):
        open_tokens(str(tmp_path / "tokens"))


def test_ids_of_a_vocabulary_with_gaps_do_not_wrap(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 3, "b": 300}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("a b b a " * 20)
    tokenize(str(tmp_path / "text"), tmp_path / "tokens", tokenizer=tmp_path / "tokenizer.json")
    tokens = open_tokens(str(tmp_path / "tokens"))
    assert tokens.train[:4].tolist() == [3, 300, 300, 3]
    assert tokens.sha256 == open_tokens(str(tmp_path / "text"), tokens.vocabulary).sha256
    file = tmp_path / "tokens" / "train.npy"
    np.save(file, np.load(file).astype(np.uint8))  # as an older version counted
    with pytest.raises(ValueError, match=r"train\.npy has uint8.*300"):
        open_tokens(str(tmp_path / "tokens"))


@pytest.mark.parametrize("dtype", ["<u8", ">u8", "<i8", ">u2"])
def test_ids_of_any_integers_stay_integers_among_others(dtype, text, tmp_path):
    run([text, str(tmp_path / "tokens")])
    found = open_tokens(str(tmp_path / "tokens"))
    train, validation = np.array(found.train), np.array(found.validation)
    for name in ("train", "validation"):
        file = tmp_path / "tokens" / f"{name}.npy"
        np.save(file, np.load(file).astype(dtype))
    tokens = open_tokens(str(tmp_path / "tokens"))
    assert isinstance(tokens.train, np.memmap)
    for ids, same in ((tokens.train, train), (tokens.validation, validation)):
        np.testing.assert_array_equal(ids, same)
        assert (np.zeros(1, np.int64) + ids[:1]).dtype == np.int64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("{text} gs://bucket/tokens", r"^TOKENS=gs://bucket/tokens .*gcsfuse"),
        ("{text} {out} --kind bytes --tokenizer {tokenizer}", r"--kind bytes .*--tokenizer"),
        ("{text} {out} --field body", r"--field body: .*sea\.txt .*\.jsonl"),
    ],
)
def test_flags_that_contradict_the_rest_are_refused(flags, message, text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        run(flags.format(text=text, out=tmp_path / "tokens", tokenizer=tokenizer).split())
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["chars", "bytes", "tokenizer"])
def test_a_large_text_is_encoded_in_pieces_as_it_is_whole(kind, text, tokenizer, monkeypatch):
    made = {"chars": CharVocabulary.of(SPICED), "bytes": ByteVocabulary()}
    vocabulary = made.get(kind) or TokenizerFile.read(tokenizer)
    whole = encode_whole(open_text(text), vocabulary, (3,))
    monkeypatch.setattr(sources, "WHOLE", 100)
    monkeypatch.setattr(cut, "PIECE", 64)
    parts = encode_whole(open_text(text), vocabulary, (3,))
    assert isinstance(parts, np.memmap)
    np.testing.assert_array_equal(parts, whole)
    assert whole[0] == 3


def test_unknown_characters_of_a_large_text_are_counted_in_all_of_it(text, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE", 100)
    with pytest.raises(ValueError, match=rf"{SPICED.count('m') + SPICED.count('ñ')} unknown characters"):
        encode_whole(open_text(text), CharVocabulary("".join(set(SPICED) - {"m", "ñ"})))


@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_the_size_of_decoded_text_does_not_depend_on_its_parts(kind):
    vocabulary = ByteVocabulary() if kind == "bytes" else TokenizerFile.of(byte_level_tokenizer())
    text = "ñandú 𝄞 went to sea; " * 9
    ids = vocabulary.encode(text)
    parts = [ids[first : first + 3] for first in range(0, len(ids), 3)]
    assert decoded_size(vocabulary, parts) == (len(text), len(text.encode()))


def test_documents_need_an_end_token_and_the_message_names_the_command_that_takes_it(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "men and women"}\n' * 2)
    with pytest.raises(ValueError, match=r"end token.*jaxmodels tokenize --end-token"):
        open_tokens(str(tmp_path / "a.jsonl"), TokenizerFile.read(tokenizer))
