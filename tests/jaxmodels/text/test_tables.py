"""Columns of texts in Arrow and Parquet files, which a child process reads."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys

import pytest

from jaxmodels.text.documents import Files
from jaxmodels.text.tables import columns, rows

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet as writer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*rows without a text are left out:UserWarning")
TEXTS = ["to be", "or not", "", "to be é", None, "that is", "to be"] * 101
READ = [(f"{row:,}", text) for row, text in enumerate(TEXTS) if text is not None]
TYPES = {
    "string": pyarrow.string(),
    "large": pyarrow.large_string(),
    "view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
}


def table(kind="string"):
    """A table of texts and other columns, with nested ones."""
    values = pyarrow.array(TEXTS, pyarrow.string())
    text = values.dictionary_encode() if kind == "dictionary" else values.cast(TYPES[kind])
    numbers = range(len(TEXTS))
    return pyarrow.table({"id": list(numbers), "text": text, "list": [[i] * (i % 3) for i in numbers]})


def write_arrow(file, content, new, compression=None, rows=None):
    options = pyarrow.ipc.IpcWriteOptions(compression=compression, emit_dictionary_deltas=True)
    with new(file, content.schema, options=options) as opened:
        opened.write_table(content, rows)


def read(file, offset=0):
    """Number and text of each row, from one on."""
    found = Files("a", (file,)).documents(0, offset)
    return [(document.name.rpartition(" ")[2], next(document.chunks)) for document in found]


def texts(file):
    return [text for _, text in read(file)]


@pytest.fixture
def alone():
    """No child process has read a file before, and none is left."""
    while columns.idle:
        columns.idle.pop().close()
    yield
    while columns.idle:
        columns.idle.pop().close()


def child_process():
    """Number of the process that has read a file."""
    (confined,) = columns.idle
    return confined.child.process.pid


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("form", ["new_file", "new_stream"])
@pytest.mark.parametrize("kind", TYPES)
def test_arrow_files_of_every_kind(tmp_path, kind, form, compression):
    write_arrow(tmp_path / "a.arrow", table(kind), getattr(pyarrow.ipc, form), compression, 53)
    for offset in (0, 52, 53, 303, len(TEXTS) - 1, len(TEXTS)):
        assert read(tmp_path / "a.arrow", offset) == [(row, text) for row, text in READ if int(row) >= offset]


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("encoding", ["dictionary", "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_parquet_files_of_every_kind(tmp_path, codec, version, encoding):
    settings = {"use_dictionary": True} if encoding == "dictionary" else {"use_dictionary": False}
    if encoding != "dictionary":
        settings["column_encoding"] = {"text": encoding}
    file = tmp_path / "a.parquet"
    writer.write_table(
        table(), file, compression=codec, data_page_version=version, row_group_size=251, data_page_size=64, **settings
    )
    for offset in (0, 250, 251, 303, len(TEXTS)):
        assert read(file, offset) == [(row, text) for row, text in READ if int(row) >= offset]


@pytest.mark.parametrize("kind", TYPES)
def test_a_parquet_file_of_every_type_of_strings(tmp_path, kind):
    writer.write_table(table(kind), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == READ


def test_views_that_this_version_does_not_cast_are_read():
    class Views:
        def cast(self, kind):
            raise pyarrow.ArrowNotImplementedError(kind)

        def to_pylist(self):
            return ["é", None, ""]

    assert rows.binary(Views()).to_pylist() == ["é".encode(), None, b""]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_long_text_among_short_ones(tmp_path, suffix):
    content = ["to be"] * 700 + ["é" + "a" * 20_000_000] + ["or not"] * 700
    file = tmp_path / f"a.{suffix}"
    if suffix == "arrow":
        write_arrow(file, pyarrow.table({"text": content}), pyarrow.ipc.new_stream, "zstd")
    else:
        writer.write_table(pyarrow.table({"text": content}), file)
    assert texts(file) == content


def test_short_texts_of_many_rows(tmp_path):
    content = [str(i) for i in range(3 * rows.ROWS + 7)]
    writer.write_table(pyarrow.table({"text": content}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == content


def test_a_column_whose_name_begins_with_that_of_the_texts(tmp_path):
    content = table().append_column("text.en", pyarrow.array([None, *range(len(TEXTS) - 1)]))
    writer.write_table(content, tmp_path / "a.parquet", row_group_size=251)
    assert read(tmp_path / "a.parquet") == READ


@pytest.mark.parametrize("groups", [0, 1])
def test_a_parquet_file_without_rows_has_no_documents(tmp_path, groups):
    empty = table().slice(0, 0)
    with writer.ParquetWriter(tmp_path / "a.parquet", empty.schema) as opened:
        for _ in range(groups):
            opened.write_table(empty)
    assert read(tmp_path / "a.parquet") == []


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_missing_values_alone(tmp_path, suffix):
    content, file = pyarrow.table({"text": pyarrow.nulls(20_000, pyarrow.string())}), tmp_path / f"a.{suffix}"
    if suffix == "arrow":
        write_arrow(file, content, pyarrow.ipc.new_file)
    else:
        writer.write_table(content, file)
    assert read(file) == []


def test_the_smallest_groups_of_rows_are_read(tmp_path):
    content = ["ab"] * 3_001
    writer.write_table(pyarrow.table({"text": content}), tmp_path / "a.parquet", row_group_size=1)
    assert texts(tmp_path / "a.parquet") == content
    assert read(tmp_path / "a.parquet", 2_999) == [("2,999", "ab"), ("3,000", "ab")]
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": content}), pyarrow.ipc.new_stream, rows=1)
    assert texts(tmp_path / "a.arrow") == content


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array([3])], ["text", "text", "id"])
    if suffix == "parquet":
        writer.write_table(twice, file)
    else:
        write_arrow(file, twice, pyarrow.ipc.new_stream)
    with pytest.raises(ValueError, match=rf"^{file} has 2 columns with the name 'text'"):
        read(file)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_of_another_type_or_none_is_named(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    parts = {f"part{i}": pyarrow.array(["a"]) for i in range(3)}
    for name, said in (("text", "has 'struct<.*' in the column 'text'"), ("txt", "has no column 'text'; it has 'txt'")):
        content = pyarrow.table({name: pyarrow.StructArray.from_arrays(list(parts.values()), list(parts))})
        if suffix == "parquet":
            writer.write_table(content, file)
        else:
            write_arrow(file, content, pyarrow.ipc.new_stream, "zstd")
        with pytest.raises(ValueError, match=rf"^{file} {said}"):
            read(file)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_file_of_another_kind_is_named(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    for content, said in (
        (b"", "is truncated: it has 0 bytes"),
        (b"BZh9", "bzip2"),
        (b"abc" * 99, "is not a readable"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{file} .*{said}"):
            read(file)


def test_files_one_after_the_other_are_read_by_one_process(tmp_path, alone):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged PAR1")
    write_arrow(tmp_path / "b.arrow", table(), pyarrow.ipc.new_file)
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable Parquet file"):
        read(tmp_path / "a.parquet")
    process = child_process()
    for _ in range(2):
        assert read(tmp_path / "b.arrow") == READ
    assert child_process() == process


def test_files_are_read_alternately(tmp_path, alone):
    writer.write_table(table(), tmp_path / "a.parquet", row_group_size=50)
    files = dataclasses.replace(Files("a", ()), files=(tmp_path / "a.parquet",) * 2)
    pairs = list(zip(files.documents(0), files.documents(1), strict=True))
    assert [(next(a.chunks), next(b.chunks)) for a, b in pairs] == [(text, text) for _, text in READ]


def test_the_process_ends_if_reading_does(tmp_path, alone):
    write_arrow(tmp_path / "a.arrow", table(), pyarrow.ipc.new_file)
    assert read(tmp_path / "a.arrow") == READ
    process = child_process()
    found = Files("a", (tmp_path / "a.arrow",)).documents()
    next(found)
    assert not columns.idle
    os.kill(process, 0)
    found.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_another_process_goes_on_at_a_row(tmp_path, alone):
    """As after a fork, which cannot use the child of the process that began to read."""
    content = [f"{i} " * 2_000 for i in range(700)]
    writer.write_table(pyarrow.table({"text": content}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == content
    found, process = Files("a", (tmp_path / "a.parquet",)).documents(), child_process()
    first = [next(document.chunks) for document in itertools.islice(found, 3)]
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert first + [next(document.chunks) for document in found] == content


def test_the_reading_process_does_not_import_pyarrow(tmp_path):
    """Arrow is imported by the child alone, whose process is changed by it."""
    write_arrow(tmp_path / "a.arrow", table(), pyarrow.ipc.new_file)
    program = (
        "import sys; from pathlib import Path; from jaxmodels.text.tables.columns import columns; "
        "print(sum(1 for _ in columns(Path(sys.argv[1]), 'arrow', 'text', 0)), 'pyarrow' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.arrow")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(READ)} False\n"


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_without_a_text_are_counted_in_a_warning(kind, tmp_path):
    file = tmp_path / f"a.{kind}"
    content = pyarrow.table({"text": pyarrow.array([*["a"] * 20_000, None, "b", None], pyarrow.string())})
    if kind == "parquet":
        writer.write_table(content, file, row_group_size=7_001)
    else:
        write_arrow(file, content, pyarrow.ipc.new_stream, rows=7_001)
    with pytest.warns(UserWarning, match=rf"{file}: rows without a text are left out: 2$"):
        assert len(texts(file)) == 20_001
