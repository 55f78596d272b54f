"""Arrow and Parquet files that stand for far more than they have, or that no writer makes: all processes together take
a few seconds and less than 1 GB."""

import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from jaxmodels.text.documents import Files
from jaxmodels.text.tables import columns

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet as writer  # noqa: E402

SECONDS, BYTES = 5.0, 1e9
UNREADABLE = "is not a readable (Arrow|Parquet) file: "
UNREAD, MUCH = "is not read: it takes more than", "holds more than 1,000 times as much text"


def cost(file):
    """Output of `reading` for a file."""
    command = [sys.executable, "-W", "ignore::UserWarning", "-m", f"{__package__}.reading", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def refused(file, *said):
    """Read a file of others, which must be one line that names it and says one of several things, and cost little."""
    found = cost(file)
    assert re.match(rf"{re.escape(str(file))} ({'|'.join(said)})", found["error"]), found
    assert "\n" not in found["error"]
    assert found["seconds"] < SECONDS
    assert found["bytes"] < BYTES


def write_arrow(file, array, form="new_stream", compression="zstd", rows=None):
    content = pyarrow.table({"text": array})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression, emit_dictionary_deltas=True)
    with getattr(pyarrow.ipc, form)(file, content.schema, options=options) as opened:
        opened.write_table(content, rows)


def zeros(length, count=1):
    """Column of texts of zero bytes, which takes no memory until it is written."""
    places = np.arange(count + 1) * (length // count)
    return pyarrow.LargeStringArray.from_buffers(count, pyarrow.py_buffer(places), pyarrow.py_buffer(bytes(length)))


def views(count, length):
    """Column of views of one text."""
    view = struct.pack("<i4sii", length, b"aaaa", 0, 0)
    buffers = [None, pyarrow.py_buffer(view * count), pyarrow.py_buffer(b"a" * length)]
    return pyarrow.Array.from_buffers(pyarrow.string_view(), count, buffers)


def varint(number):
    """Number in Thrift's compact protocol, as the size of a page."""
    number, digits = 2 * number, []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def read(file):
    return [next(document.chunks) for document in Files("a", (file,)).documents()]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("form", ["new_file", "new_stream"])
def test_an_arrow_batch_that_grows(tmp_path, form, compression):
    write_arrow(tmp_path / "a.arrow", zeros(7 * 10**8), form, compression)
    refused(tmp_path / "a.arrow", UNREAD)


@pytest.mark.parametrize("count", [1, 400])
def test_a_batch_within_the_memory_of_more_text_than_is_read(tmp_path, count):
    write_arrow(tmp_path / "a.arrow", zeros(4 * 10**8, count))
    refused(tmp_path / "a.arrow", MUCH)


def test_a_page_that_says_to_be_larger_than_it_is(tmp_path):
    """Arrow takes as much memory as its header says."""
    file, count = tmp_path / "a.parquet", 140_000_000
    content = pyarrow.table({"text": ["a" * count]})
    writer.write_table(content, file, compression="zstd", use_dictionary=False, write_statistics=False)
    data = file.read_bytes()
    # Field 2 of 32 bits; the footer has the size in 64.
    size = next(each for n in range(count, count + 20) if data.count(each := b"\x15" + varint(n)) == 1)
    file.write_bytes(data.replace(size, b"\x15" + varint(2**31 - 1)))
    refused(file, UNREAD)


@pytest.mark.slow
@pytest.mark.parametrize("dictionary", [False, True])
def test_views_of_one_long_text(tmp_path, dictionary):
    column = views(10**5, 10**7)
    if dictionary:
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0], pyarrow.int8()), column)
    write_arrow(tmp_path / "a.arrow", column)
    refused(tmp_path / "a.arrow", UNREAD)
    write_arrow(tmp_path / "b.arrow", views(20, 10_000))
    assert read(tmp_path / "b.arrow") == ["a" * 10_000] * 20


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_rows_that_repeat_a_long_text(tmp_path, suffix):
    indices = pyarrow.array(np.zeros(10**6, np.int32))
    column = pyarrow.DictionaryArray.from_arrays(indices, ["a" * 3_000_000])
    if suffix == "arrow":
        write_arrow(tmp_path / "a.arrow", column)
        refused(tmp_path / "a.arrow", MUCH)
    else:
        writer.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", store_schema=False)
        refused(tmp_path / "a.parquet", MUCH, UNREAD)


@pytest.mark.parametrize("text", ["", "a", None])
def test_millions_of_short_rows_in_a_few_kilobytes(tmp_path, text):
    content = pyarrow.array([text] * 2_000_000, pyarrow.string())
    writer.write_table(pyarrow.table({"text": content}), tmp_path / "a.parquet", compression="zstd")
    if text is None:
        assert cost(tmp_path / "a.parquet")["rows"] == 0
    else:
        refused(tmp_path / "a.parquet", MUCH, UNREAD)


def test_dictionaries_that_are_looked_at_with_each_batch(tmp_path):
    """Each of thousands of batches could have Arrow look at all texts of one dictionary."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([1] * 5_000, pyarrow.int8()), ["a" * 10**7, "b"])
    write_arrow(tmp_path / "a.arrow", values, rows=1)
    refused(tmp_path / "a.arrow", UNREAD)


@pytest.mark.parametrize("shift", [0, 8])
def test_messages_that_are_listed_many_times_or_lie_in_each_other(tmp_path, shift):
    file, count = tmp_path / "a.arrow", 2_000
    write_arrow(file, pyarrow.array(["a" * 10**6] + ["b"] * count), "new_file", rows=1)
    data = bytearray(file.read_bytes())
    places = [found.start() for found in re.finditer(rb"\xff\xff\xff\xff", data) if found.start() % 8 == 0]
    block = data.index(struct.pack("<q", places[1]), len(data) - 24 * (count + 9))
    first = data[block : block + 24]
    first[0] += shift
    data[block : block + 24 * (count + 1)] = first * (count + 1)
    file.write_bytes(data)
    refused(file, UNREAD, MUCH, UNREADABLE)


def test_messages_of_no_kind(tmp_path):
    # Length of the description; where its table lies; 12 bytes of a table without fields, which refers to them.
    message = struct.pack("<IiIiHHI", 0xFFFFFFFF, 16, 8, 4, 4, 4, 0)
    (tmp_path / "a.arrow").write_bytes(message * 400_000)
    refused(tmp_path / "a.arrow", UNREADABLE)


def test_compression_that_a_message_names_in_its_metadata(tmp_path):
    """Arrow 0.17 named it so, in messages of version 4: the first bytes of a text are taken for its length."""
    batch = pyarrow.record_batch({"text": ["to be"]})
    options = pyarrow.ipc.IpcWriteOptions(metadata_version=pyarrow.ipc.MetadataVersion.V4)
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", batch.schema, options=options) as opened:
        opened.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "ZSTD"})
    refused(tmp_path / "a.arrow", UNREADABLE, UNREAD)


def test_groups_of_rows_that_share_pages(tmp_path):
    file = tmp_path / "a.parquet"
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, "row_group_size": 1}
    writer.write_table(pyarrow.table({"text": ["a"] * 3_000}), file, **settings)
    metadata = writer.ParquetFile(file).metadata
    first, second = (metadata.row_group(i).column(0).data_page_offset for i in range(2))
    own, shared = (b"\x26" + bytes([2 * place]) for place in (second, first))  # as Thrift writes small numbers
    file.write_bytes(file.read_bytes().replace(own, shared))
    found = cost(file)
    assert found["rows"] == 3_000 or found["error"].startswith(f"{file} ")
    assert found["seconds"] < SECONDS


def test_a_footer_that_ends_the_process(tmp_path):
    """Arrow aborts if the statistics of a column are those of another type."""
    file = tmp_path / "a.parquet"
    writer.write_table(pyarrow.table({"text": ["a", None]}), file)
    optional, required = (b"\x25" + bytes([kind]) + b"\x18\x04text" for kind in (2, 0))
    data = file.read_bytes()
    assert data.count(optional) == 1
    file.write_bytes(data.replace(optional, required))
    refused(file, "is not read: ", UNREADABLE)
    with pytest.raises(ValueError, match=f"^{file} is not "):
        read(file)
    writer.write_table(pyarrow.table({"text": ["a", "b"]}), file)
    assert read(file) == ["a", "b"]  # by another child process


@pytest.mark.parametrize("form", ["new_file", "new_stream"])
def test_every_changed_byte_of_an_arrow_file_is_read_or_refused(tmp_path, form):
    """Places and lengths may be anything."""
    file = tmp_path / "a.arrow"
    write_arrow(file, pyarrow.array(["to be", "or not"]), form)
    content = file.read_bytes()
    for at in range(0, len(content) - 8, 12):
        for value in (0x7FFFFFFF, 0xFFFFFFFF, 0):
            file.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
            try:
                read(file)
            except ValueError as error:
                assert str(error).startswith(f"{file} ")  # noqa: PT017, others are read


def test_limits_are_those_of_all_pieces_together(tmp_path, monkeypatch):
    """Time and memory are not granted anew for each."""
    file = tmp_path / "a.parquet"
    writer.write_table(pyarrow.table({"text": [f"{i}" * 3_000 for i in range(2_000)]}), file)
    assert len(read(file)) == 2_000
    given = []
    call = columns.Confined.call

    def recorded(self, *arguments, **limits):
        about, texts = call(self, *arguments, **limits)
        given.append(limits["seconds"])
        return about | {"seconds": 0.4 * len(given)}, texts

    monkeypatch.setattr(columns.Confined, "call", recorded)
    with pytest.raises(ValueError, match=rf"^{file} is not read: it takes more than 2 s"):
        read(file)
    assert given == sorted(given, reverse=True)
    assert given[-1] < 1


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_other_columns_are_not_decompressed(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    content = pyarrow.table({"other": zeros(2 * 10**8), "text": ["to be"]})
    if suffix == "parquet":
        writer.write_table(content, file, compression="zstd", use_dictionary=False, write_statistics=False)
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_stream(file, content.schema, options=options) as opened:
            opened.write_table(content)
    found = cost(file)
    assert (found["rows"], found["error"]) == (1, None)
    assert found["bytes"] < 2.8e8
