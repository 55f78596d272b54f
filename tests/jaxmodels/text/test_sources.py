"""Sources of documents: text, JSONL, Arrow and Parquet files, folders of datasets."""

import dataclasses
import itertools
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxmodels.text import CharVocabulary, TokenizerFile, documents
from jaxmodels.text.sources import count, open_sources
from jaxmodels.text.tokens import open_tokens, read, vocabulary_of, write_sources
from jaxmodels.training.tokenize import tokenize
from tests.jaxmodels.tokenizer import byte_level_tokenizer

DOCUMENTS = [
    "The first document.",
    "",
    "Zweites Dokument: äöü 日本",
    "line one\nline two\r\n",
    *(f"number {i}" for i in range(37)),
]
WRITTEN = [text for text in DOCUMENTS if text]


@pytest.fixture
def vocabulary():
    return TokenizerFile(byte_level_tokenizer().to_str(), eos=(0,))


def jsonl(file, texts=DOCUMENTS, field="text"):
    file.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))
    return str(file)


def texts(tokens, which="train"):
    """Documents of tokens as texts, without their end tokens."""
    ids, starts = getattr(tokens, which), getattr(tokens, f"{which}_documents")
    parts = [ids[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert all(part[-1] == 0 for part in parts)
    return [tokens.vocabulary.decode(part[:-1]) for part in parts]


def test_jsonl_documents_end_with_the_end_token(tmp_path, vocabulary):
    tokens = open_tokens(jsonl(tmp_path / "a.jsonl"), vocabulary)
    assert texts(tokens) + texts(tokens, "validation") == WRITTEN
    assert 0 < len(tokens.validation) < 0.2 * len(tokens.train)
    written = write_sources(tmp_path / "tokens", open_sources(str(tmp_path / "a.jsonl")), vocabulary)
    found = read(tmp_path / "tokens")
    assert found.sha256 == written.sha256 == tokens.sha256
    assert texts(found) == texts(tokens)
    assert found.documents == {"train": len(texts(tokens)), "validation": len(texts(tokens, "validation"))}
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "tokens"]


def test_objects_without_a_text_are_counted_in_a_warning(tmp_path, vocabulary):
    """The datasets package writes a missing text as null, to JSONL as to Parquet."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [None, *DOCUMENTS, None]))
    with pytest.warns(UserWarning, match=rf"{file}: rows without a text are left out: 2$"):
        tokens = open_tokens(str(file), vocabulary)
    assert texts(tokens) + texts(tokens, "validation") == WRITTEN
    file.write_text('{"id": 7}\n')  # this is another field
    with pytest.raises(ValueError, match=rf"^{file}, line at byte 0 has 'text'=None.*'id'"):
        open_tokens(str(file), vocabulary)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow file", "dataset", "splits", "hub"])
def test_arrow_and_parquet_hold_the_same_documents(kind, tmp_path, vocabulary):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    folder = tmp_path / "source"
    folder.mkdir()
    source = folder

    def stream(file, table=table):
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)

    match kind:
        case "parquet":
            source = folder / "a.parquet"
            parquet.write_table(table, source, row_group_size=5)
        case "arrow":
            source = folder / "a.arrow"
            stream(source)
        case "arrow file":
            source = folder / "a.arrow"
            with pyarrow.OSFile(str(source), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
        case "dataset":
            stream(folder / "data-00000-of-00001.arrow")
            state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_data_files": None}
            (folder / "state.json").write_text(json.dumps(state))
        case "splits":
            (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
            for name, part in (("train", table[:30]), ("validation", table[30:]), ("test", table)):
                (folder / name).mkdir()
                stream(folder / name / "data-00000-of-00001.arrow", part)
                state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
                (folder / name / "state.json").write_text(json.dumps(state))
        case "hub":
            (folder / "data").mkdir()
            for name, part in (("train-0", table[:20]), ("train-1", table[20:30]), ("validation-0", table[30:])):
                parquet.write_table(part, folder / "data" / f"{name}.parquet")
    tokens = open_tokens(str(source), vocabulary)
    assert texts(tokens) + texts(tokens, "validation") == WRITTEN
    if kind in ("splits", "hub"):
        assert texts(tokens, "validation") == DOCUMENTS[30:]
    assert any("test data" in note for note in tokens.notes) == (kind == "splits")


def test_characters_and_bytes_have_an_empty_line_between_documents(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", ["ab", "c"] * 10, field="content")
    tokens = open_tokens(file, field="content")
    assert tokens.vocabulary == CharVocabulary("\nabc")
    ids = np.concatenate([tokens.train, tokens.validation])
    assert tokens.vocabulary.decode(ids) == "ab\n\nc\n\n" * 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 5}\n', r"byte 14 has 'text'=5, must be a string"),
        (b'{"txt": "a"}\n', r"byte 0 has 'text'=None.*'txt'"),
        (b"[1]\n", r"byte 0 holds \[1\]"),
        (b'{"text": "a"\n', "byte 0 is not JSON"),
        (b"\x1f\x8b\x08\n", "gzip"),
        (b"[" * 100_000 + b"\n", "byte 0 is not read"),
        (b'{"text": "\\ud800"}\n', "byte 0: text has a character that is not Unicode"),
        (b'{"text": "' + b"a" * 200 + b'"}\n', "byte 0 has more than 100 bytes"),
        (b'{"text": "\xff"}\n', "byte 0 is not UTF-8"),
        (b"9" * 5000 + b"\n", "byte 0 is not read"),
    ],
)
def test_a_bad_line_is_one_error_that_names_it(content, message, tmp_path, monkeypatch, vocabulary):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    if "100 bytes" in message:
        monkeypatch.setattr(documents, "LINE_BYTES", 100)
    with pytest.raises(ValueError, match=rf"^{file}, line at .*{message}") as error:
        open_tokens(str(file), vocabulary)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_damaged_tables_are_one_error_that_names_the_file(kind, tmp_path, vocabulary):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / f"a.{kind}"
    table = pyarrow.table({"txt": DOCUMENTS, "n": range(len(DOCUMENTS))})
    if kind == "parquet":
        parquet.write_table(table, file)
    else:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match=f"^{file} .*no column 'text'; it has 'txt', 'n'"):
        open_tokens(str(file), vocabulary)
    with pytest.raises(ValueError, match=f"^{file} .*'int64' in the column 'n', must be strings"):
        open_tokens(str(file), vocabulary, "n")
    content = file.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\x00" * 100, b"<html>" * 50, os.urandom(300)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file} "):
            open_tokens(str(file), vocabulary, "txt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", {"_data_files": [{"filename": "../../secret.arrow"}]}),
        ("state.json", {"_data_files": 5}),
        ("state.json", {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}),
        ("dataset_dict.json", {"splits": ["../train"]}),
        ("dataset_dict.json", {}),
    ],
)
def test_folders_that_name_other_files_are_refused(name, content, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{tmp_path / name} has"):
        open_sources(str(tmp_path))


def test_a_text_is_named_once(tmp_path):
    """A few bytes of JSON, or links, would stand for any amount of text."""
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "data").mkdir()
    os.link(tmp_path / "a.jsonl", tmp_path / "data" / "a.jsonl")
    (tmp_path / "data" / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"b\.jsonl and a\.jsonl are the same file"):
        open_sources(str(tmp_path / "data"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}] * 2}))
    with pytest.raises(ValueError, match=r"state\.json has _data_files=.* each once"):
        open_sources(str(tmp_path / "set"))
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "train"]}))
    with pytest.raises(ValueError, match=r"dataset_dict\.json has splits=.* each once"):
        open_sources(str(tmp_path / "set"))


def saved(folder, texts, *others):
    """Files that `datasets.save_to_disk` writes, and Arrow files beside them that they do not name."""
    folder.mkdir(parents=True)
    for name, content in (("data-00000-of-00001.arrow", texts), *((other, ["stale"]) for other in others)):
        table = pyarrow.table({"text": content})
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_datasets_inside_a_folder_have_the_files_that_they_name(tmp_path):
    saved(tmp_path / "data" / "train", ["a", "b"], "cache-1f.arrow", "data-00001-of-00004.arrow")
    saved(tmp_path / "data" / "validation", ["c"], "cache-2e.arrow")
    saved(tmp_path / "data" / "more" / "splits" / "train", ["d"], "cache-3d.arrow")
    saved(tmp_path / "data" / "more" / "splits" / "unnamed", ["e"])
    (tmp_path / "data" / "more" / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "data" / "plain.txt").write_text("f")
    sources = open_sources(str(tmp_path / "data"))
    assert list(sources.train.chunks()) == ["d", "f", "a", "b"]
    assert list(sources.validation.chunks()) == ["c"]
    assert sources.notes == ()
    train = tmp_path / "data" / "train"
    assert list(open_sources(str(train)).train.chunks()) == ["a", "b"]
    (train / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(OSError, match=r"data-00000-of-00001\.arrow"):
        open_sources(str(tmp_path / "data"))
    (train / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(ValueError, match=rf"{train / 'state.json'} has _data_files=\[\]"):
        open_sources(str(tmp_path / "data"))


def test_folders_are_not_among_the_files_that_are_left_out(tmp_path):
    (tmp_path / "texts" / "part.parquet").mkdir(parents=True)
    (tmp_path / "texts" / "part.parquet" / "a.txt").write_text("a")
    assert open_sources(str(tmp_path)).notes == ()


@pytest.mark.parametrize("what", ["link to nothing", "FIFO", "link to a folder"])
def test_no_part_of_a_folder_is_left_out_without_a_word(what, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train-0.jsonl").write_text('{"text": "abc"}\n')
    (folder / "labels.csv.gz").write_bytes(b"\x1f\x8b")
    (folder / ".hidden").write_text("x")
    assert open_sources(str(folder)).notes == (
        f"{folder}: files of other kinds are left out: 1, such as labels.csv.gz",
    )
    name = "more" if what == "link to a folder" else "train-1.jsonl"
    if what == "FIFO":
        os.mkfifo(folder / name)
    else:
        (tmp_path / "elsewhere").mkdir()
        (folder / name).symlink_to(tmp_path / ("elsewhere" if name == "more" else "nothing"))
    with pytest.raises(ValueError, match=f"{folder / name} is "):
        open_sources(str(folder))


def test_files_of_a_folder_share_what_a_small_file_may_stand_for(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["a" * 10**6] * 30)})
    (tmp_path / "data").mkdir()
    for i in range(40):
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{i}.parquet", compression="zstd")
    files = open_sources(str(tmp_path / "data")).train
    assert sum(1 for _ in dataclasses.replace(files, files=files.files[:1]).documents()) == 30
    with pytest.raises(ValueError, match="1,000 times as much text"):
        list(files.documents())


def test_a_tokenizer_without_an_end_token_needs_one(tmp_path):
    vocabulary = TokenizerFile(byte_level_tokenizer().to_str())
    sources = open_sources(jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="--end-token"):
        write_sources(tmp_path / "tokens", sources, vocabulary)
    with pytest.raises(ValueError, match="--end-token '<eos>'"):
        write_sources(tmp_path / "tokens", sources, vocabulary, "<eos>")
    tokens = write_sources(tmp_path / "tokens", sources, vocabulary, "<|endoftext|>")
    assert texts(tokens) + texts(tokens, "validation") == WRITTEN


@pytest.mark.parametrize("block", [1, 3, 7, 2**20])
def test_a_text_file_is_split_at_a_character_and_has_no_mark(block, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", block)
    content = "aä日𝄞\r\n" * 11 + "\n\r"
    (tmp_path / "a.txt").write_bytes(content.encode("utf-8-sig"))
    sources = open_sources(str(tmp_path / "a.txt"))
    parts = ["".join(source.chunks()) for source in sources.both]
    assert parts == [content[: int(0.9 * len(content))], content[int(0.9 * len(content)) :]]
    mark, ends = sources.notes
    assert "byte order mark" in mark
    assert "1 LF, 11 CRLF, 1 CR" in ends
    census = count(sources)
    assert census.vocabulary == CharVocabulary.of(content)
    with pytest.raises(ValueError, match="34 unknown characters: '\\\\n', '日', '𝄞';"):
        vocabulary_of(sources, CharVocabulary("aä\r"))


def test_unknown_characters_are_counted_and_ten_are_shown(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 50 + "".join(map(chr, range(0x4E00, 0x4E64))) + "丁")
    with pytest.raises(ValueError, match=r"101 unknown characters: '丁', '一'(, '.'){8} and 90 others;"):
        open_tokens(str(tmp_path / "a.txt"), CharVocabulary("ab"))


def test_unknown_tokens_of_a_tokenizer_are_counted_and_shown(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text("a b a c " * 10 + " ".join(f"w{i}" for i in range(20)))
    (note,) = open_tokens(str(tmp_path / "a.txt"), TokenizerFile(made.to_str())).notes
    assert note.startswith("40 tokens are the unknown token, for '")
    assert note.count("'") == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfea\x00", "UTF-16"), (b"abc\xff", "not UTF-8: .* at byte 3"), (b"a" * 9 + b"\xe6\x97", "at byte 9")],
)
def test_other_encodings_name_the_file_and_the_place(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 4)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"text=.*{tmp_path / 'a.txt'} .*{message}"):
        open_sources(str(tmp_path / "a.txt"))


def test_an_end_token_beyond_the_tokenizer_is_refused(tmp_path):
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 300}))
    vocabulary = TokenizerFile.read(tmp_path)
    sources = open_sources(jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"tokenizer\.json.* end token 300, beyond its 300 tokens.*--end-token"):
        write_sources(tmp_path / "tokens", sources, vocabulary)


@pytest.mark.filterwarnings("ignore:.*rows without a text are left out:UserWarning")
@pytest.mark.parametrize("kind", ["empty", "empty texts", "no rows", "nulls", "null", "stream", "folder"])
def test_a_source_without_a_text_is_refused_and_leaves_nothing(kind, tmp_path):
    file = tmp_path / "a.jsonl"
    match kind:
        case "empty":
            file.touch()
        case "empty texts":
            jsonl(file, ["", ""])
        case "null":
            jsonl(file, [None])
        case "no rows" | "nulls":
            file = tmp_path / "a.parquet"
            values = pyarrow.array([None] * 3 * (kind == "nulls"), pyarrow.string())
            pyarrow.parquet.write_table(pyarrow.table({"text": values}), file)
        case "stream":
            file = tmp_path / "a.arrow"
            pyarrow.ipc.new_stream(file, pyarrow.schema([("text", pyarrow.string())])).close()
        case "folder":
            file = tmp_path / "a"
            file.mkdir()
            (file / "b.jsonl").touch()
    for encode in (lambda: open_tokens(str(file)), lambda: tokenize(str(file), tmp_path / "tokens", "bytes")):
        with pytest.raises(ValueError, match=f"^text='{file}' has no documents"):
            encode()
    assert os.listdir(tmp_path) == [file.name]
