"""Columns of texts in Arrow and Parquet files, and files that stand for far more than they have."""

import itertools
import struct

import pytest

from jaxmodels.text.documents import Files
from jaxmodels.text.tables import arrow, columns, parquet, sizes
from tests.fuzz.judge import memory, peak_reset

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet as writer  # noqa: E402

TEXTS = ["to be", "or not", "", "to be é", None, "that is", "to be"] * 101
READ = [text for text in TEXTS if text is not None]
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
    rows = range(len(TEXTS))
    return pyarrow.table({"id": list(rows), "text": text, "list": [[i] * (i % 3) for i in rows]})


def write_arrow(file, content, new, compression=None, rows=None):
    options = pyarrow.ipc.IpcWriteOptions(compression=compression, emit_dictionary_deltas=True)
    with new(file, content.schema, options=options) as opened:
        opened.write_table(content, rows)


def read(file):
    return [document.chunks.__next__() for document in Files("a", (file,)).documents()]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("form", ["new_file", "new_stream"])
@pytest.mark.parametrize("kind", TYPES)
def test_arrow_files_of_every_kind(tmp_path, kind, form, compression):
    write_arrow(tmp_path / "a.arrow", table(kind), getattr(pyarrow.ipc, form), compression, 53)
    assert read(tmp_path / "a.arrow") == READ


def test_a_column_whose_name_begins_with_that_of_the_texts(tmp_path):
    content = table().append_column("text.en", pyarrow.array([None, *range(len(TEXTS) - 1)]))
    writer.write_table(content, tmp_path / "a.parquet", row_group_size=251)
    assert read(tmp_path / "a.parquet") == READ


def test_pages_of_a_column_that_is_read_as_well_are_measured(tmp_path, monkeypatch):
    content = pyarrow.table({"text": ["to be"], "text.en": ["x" * 3000]})
    writer.write_table(content, tmp_path / "a.parquet")
    monkeypatch.setattr(parquet, "largest", lambda file: 2000)
    with pytest.raises(ValueError, match="a page of 3,0"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli"])
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
    assert read(file) == READ
    assert [d.name.rpartition(" ")[2] for d in itertools.islice(Files("a", (file,)).documents(0, 300), 2)] == [
        "300",
        "301",
    ]


def test_a_dictionary_column_of_parquet_is_read_as_one(tmp_path):
    writer.write_table(table("dictionary"), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == READ


@pytest.fixture
def small(monkeypatch):
    """Limits of a part of a file in the size of a test's."""
    monkeypatch.setattr(sizes, "LEAST_PART", 10**5)
    monkeypatch.setattr(sizes, "RATIO", 10)


ZEROS = {"text": ["0" * 10**6, "to be"]}


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("form", ["new_file", "new_stream"])
def test_an_arrow_batch_that_grows_is_not_decompressed(tmp_path, monkeypatch, small, form, compression):
    write_arrow(tmp_path / "a.arrow", pyarrow.table(ZEROS), getattr(pyarrow.ipc, form), compression)
    monkeypatch.setattr(pyarrow, "memory_map", lambda *given: pytest.fail("reads it"))
    with pytest.raises(
        ValueError, match=r"a\.arrow has 1,000,\d{3} bytes in a batch at byte [\d,]+ after decompression"
    ):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("form", ["new_file", "new_stream"])
def test_dictionaries_that_grow_are_counted_together(tmp_path, monkeypatch, form):
    monkeypatch.setattr(sizes, "LEAST_PART", 10**5)
    monkeypatch.setattr(sizes, "RATIO", 1)
    kind = pyarrow.schema([("text", pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))])
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd", emit_dictionary_deltas=True)
    values = []
    with getattr(pyarrow.ipc, form)(tmp_path / "a.arrow", kind, options=options) as opened:
        for i in range(7):
            values.append(f"{i}" * 20_000)
            array = pyarrow.DictionaryArray.from_arrays(pyarrow.array([i], pyarrow.int32()), pyarrow.array(values))
            opened.write_batch(pyarrow.record_batch([array], schema=kind))
    with pytest.raises(ValueError, match=r"a\.arrow has 1\d\d,\d{3} bytes in dictionaries up to byte"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_parquet_page_that_grows_is_not_decompressed(tmp_path, small, monkeypatch, version, dictionary):
    """Sizes in the file's own metadata are not used."""
    file = tmp_path / "a.parquet"
    writer.write_table(
        pyarrow.table(ZEROS), file, compression="zstd", use_dictionary=dictionary, data_page_version=version
    )
    monkeypatch.setattr(writer.ParquetFile, "iter_batches", lambda *given, **named: pytest.fail("reads it"))
    with pytest.raises(ValueError, match=r"a\.parquet has a page of 1,000,\d{3} bytes in the column 'text'"):
        read(file)


def test_values_that_take_no_bytes_are_counted(tmp_path, small):
    writer.write_table(pyarrow.table({"text": ["a"] * 10**5}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"a\.parquet has a page of [\d,]+ bytes in the column 'text'"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_rows_that_repeat_a_long_text_take_the_memory_of_one(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(parquet, "DECODED", 2**22)
    file = tmp_path / f"a.{suffix}"
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, pyarrow.int32()), ["a" * 3_000_000])
    if suffix == "arrow":
        write_arrow(file, pyarrow.table({"text": repeated}), pyarrow.ipc.new_stream, "zstd")
    else:
        writer.write_table(pyarrow.table({"text": repeated.dictionary_decode()}), file, compression="zstd")
    peak_reset()
    before = memory("VmRSS")
    assert sum(len(next(document.chunks)) for document in Files("a", (file,)).documents()) == 64 * 3_000_000
    assert memory("VmHWM") - before < 8e7
    monkeypatch.setattr(sizes, "LEAST_SUM", 10**7)
    with pytest.raises(ValueError, match="more than 1,000 times as much text"):
        read(file)


@pytest.mark.parametrize("form", ["new_file", "new_stream"])
def test_every_changed_byte_of_an_arrow_file_is_read_or_refused(tmp_path, form):
    """Places and lengths may be anything."""
    file = tmp_path / "a.arrow"
    write_arrow(file, pyarrow.table({"text": ["to be", "or not"]}), getattr(pyarrow.ipc, form), "zstd")
    content = file.read_bytes()
    for at in range(0, len(content) - 8, 12):
        for value in (0x7FFFFFFF, 0xFFFFFFFF, 0):
            file.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
            try:
                arrow.check_messages(file)
            except ValueError:
                continue


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x15\x00", "has no sizes"),
        (b"\x15\x00\x15\x01\x15\x00\x00", "has no sizes"),
        (b"\x15" + b"\xff" * 11, "64 bits"),
        (b"\x4c" + b"\x1c" * 20, "nested too deeply"),
        (b"\x19\x00", "kind 9"),
        (b"\x15", "refers to byte 1 of 1"),
    ],
)
def test_a_damaged_header_of_a_page_is_refused(data, said):
    with pytest.raises(ValueError, match=said):
        list(parquet.pages(data + b"\0" * (said == "has no sizes"), 0, 100))


@pytest.mark.parametrize("groups", [0, 1])
def test_a_parquet_file_without_rows_has_no_documents(tmp_path, groups):
    empty = table().slice(0, 0)
    with writer.ParquetWriter(tmp_path / "a.parquet", empty.schema) as opened:
        for _ in range(groups):
            opened.write_table(empty)
    assert read(tmp_path / "a.parquet") == []


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


@pytest.mark.parametrize("shift", [0, 8])
def test_a_message_that_is_listed_twice_or_lies_in_another_is_refused(tmp_path, shift):
    file = tmp_path / "a.arrow"
    write_arrow(file, table(), pyarrow.ipc.new_file, rows=100)
    data = bytearray(file.read_bytes())
    footer = arrow.Table.root(data, len(data) - 10 - struct.unpack_from("<i", data, len(data) - 10)[0])
    first, second, *_ = footer.vector(3, arrow.BLOCK)
    data[second : second + arrow.BLOCK] = data[first : first + arrow.BLOCK]
    at = struct.unpack_from("<q", data, first)[0] + shift
    struct.pack_into("<q", data, second, at)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{file} lists a message at byte {at}, within another one or twice$"):
        read(file)


def test_messages_that_all_grow_are_counted_together(tmp_path, monkeypatch):
    write_arrow(tmp_path / "a.arrow", table(), pyarrow.ipc.new_stream, "zstd", 100)
    monkeypatch.setattr(sizes, "LEAST_SUM", 0)
    monkeypatch.setattr(sizes, "EXPANSION", 1)
    with pytest.raises(ValueError, match=r"a.arrow has [\d,]+ bytes in its messages after decompression"):
        read(tmp_path / "a.arrow")


def test_a_dictionary_counts_for_each_batch(tmp_path, monkeypatch):
    """A file of a megabyte could take minutes: each batch may add a word to a dictionary of any length."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 50, pyarrow.int32()), ["a" * 100_000])
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": values}), pyarrow.ipc.new_stream, "zstd", 1)
    monkeypatch.setattr(sizes, "EXPANSION", 1)
    monkeypatch.setattr(sizes, "LEAST_SUM", 10**7)
    assert len(read(tmp_path / "a.arrow")) == 50
    monkeypatch.setattr(sizes, "LEAST_SUM", 10**6)
    with pytest.raises(ValueError, match="with the dictionaries for each of 50 batches"):
        read(tmp_path / "a.arrow")


def test_groups_of_rows_that_share_pages_are_refused(tmp_path):
    file = tmp_path / "a.parquet"
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, "row_group_size": 1}
    writer.write_table(pyarrow.table({"text": ["a", "b"]}), file, **settings)
    metadata = writer.ParquetFile(file).metadata
    first, second = (metadata.row_group(i).column(0).data_page_offset for i in range(2))
    data = file.read_bytes()
    own, shared = (b"\x26" + bytes([2 * place]) for place in (second, first))  # as Thrift writes small numbers
    assert data.count(own) == 2  # of the chunk and of its first page
    file.write_bytes(data.replace(own, shared))
    with pytest.raises(ValueError, match=rf"^{file} has groups of rows that share pages of 'text' at byte {first}$"):
        read(file)


def test_a_footer_that_ends_the_process_is_refused(tmp_path):
    """Arrow aborts if the statistics of a column are those of another type."""
    file = tmp_path / "a.parquet"
    writer.write_table(pyarrow.table({"text": ["a", None]}), file)
    optional, required = (b"\x25" + bytes([kind]) + b"\x18\x04text" for kind in (2, 0))
    data = file.read_bytes()
    assert data.count(optional) == 1
    file.write_bytes(data.replace(optional, required))
    with pytest.raises(ValueError, match=rf"^{file} has a footer that is not read: "):
        read(file)
    writer.write_table(pyarrow.table({"text": ["a", "b"]}), file)
    assert read(file) == ["a", "b"]  # by another child process


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_of_another_type_is_refused_before_it_is_decoded(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"a.{suffix}"
    parts = {f"part{i}": pyarrow.array(["a" * 1_000_000]) for i in range(7)}
    content = pyarrow.table({"text": pyarrow.StructArray.from_arrays(list(parts.values()), list(parts))})
    if suffix == "parquet":
        writer.write_table(content, file)
        monkeypatch.setattr(writer.ParquetFile, "iter_batches", None)
    else:
        write_arrow(file, content, pyarrow.ipc.new_stream, "zstd")
        monkeypatch.setattr(columns, "strings", None)  # which sees a batch that was read
    with pytest.raises(ValueError, match=rf"^{file} has 'struct<.* in the column 'text', must be strings"):
        read(file)


def test_pages_are_counted_over_all_groups(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    writer.write_table(pyarrow.table({"text": ["a", "b", "c"]}), file, use_dictionary=False, row_group_size=1)
    monkeypatch.setattr(sizes, "PAGE_BYTES", 10**9)
    monkeypatch.setattr(sizes, "LEAST_PIECES", 3)
    assert read(file) == ["a", "b", "c"]
    monkeypatch.setattr(sizes, "LEAST_PIECES", 2)
    with pytest.raises(ValueError, match=rf"^{file} has more than 2 pages in the column 'text'"):
        read(file)


def test_the_smallest_groups_of_rows_are_read(tmp_path):
    rows = ["ab"] * 3_001
    file = tmp_path / "a.parquet"
    writer.write_table(pyarrow.table({"text": rows}), file, row_group_size=1, write_statistics=False)
    assert read(file) == rows
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": rows}), pyarrow.ipc.new_stream, rows=1)
    assert read(tmp_path / "a.arrow") == rows


def test_messages_of_no_kind_are_counted(tmp_path):
    file = tmp_path / "a.arrow"
    # Length of the description; where its table lies; 12 bytes of a table without fields, which refers to them.
    message = struct.pack("<IiIiHHI", 0xFFFFFFFF, 16, 8, 4, 4, 4, 0)
    file.write_bytes(message * 2_000)
    with pytest.raises(ValueError, match=rf"^{file} "):
        read(file)
