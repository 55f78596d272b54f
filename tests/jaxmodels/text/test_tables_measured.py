"""Arrow and Parquet files that no writer makes, and what is measured of them must be what Arrow reads."""

import struct

import pytest

from jaxmodels.text.documents import Files
from jaxmodels.text.tables import footer, parquet, sizes

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet as writer  # noqa: E402

SIZES = b"\x15\x00\x15\x10\x15\x08"  # fields 1, 2 and 3 of a page's header, of 32 bits: kind 0, 8 and 4 bytes
VALUES = b"\x2c\x15\x06\x00"  # field 5: 3 values


def read(file):
    return [next(document.chunks) for document in Files("a", (file,)).documents()]


def test_a_header_of_a_page_with_fields_of_later_versions_is_read():
    known = b"\x2c\x15\x06\x15\x00\x3c\x18\x01a\x18\x01a\x46\x02\x11\x00\x00"  # field 5, with statistics
    assert list(parquet.pages(SIZES + known + b"\x45\x02\x18\x03abc\x00" + b"data", 0, 4)) == [(48, 3)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(SIZES + b"\x05\x04\xc8\x01" + VALUES, "field 2 after field 3", id="twice"),
        pytest.param(SIZES + b"\x06\x06\xc8\x01" + VALUES, "field 3 after field 3", id="again, of 64 bits"),
        pytest.param(SIZES + VALUES + b"\x05\x84\x80\x08\xc8\x01", "has more than 16 bits", id="65538"),
        pytest.param(SIZES + b"\x2c\x15\x06\x05\x01\x00\x00", "field -1 after field 1", id="below 0"),
        pytest.param(b"\x15\x00\x16\x10\x15\x08" + VALUES, "kind 6 in field 2", id="size of 64 bits"),
        pytest.param(SIZES + b"\x25\x00", "kind 5 in field 5", id="no structure"),
        pytest.param(SIZES + b"\x2c\x16\x06\x00", "kind 6 in field 1", id="values of 64 bits"),
        pytest.param(SIZES + b"\x4c\x14\x06\x00", "kind 4 in field 1", id="values of 16 bits, of a dictionary"),
        pytest.param(SIZES + b"\x5c\x1c\x00\x00", "kind 12 in field 1", id="values as a structure"),
        pytest.param(b"\x15\x00\x15\x90\x80\x80\x80\x10\x15\x08" + VALUES, "has more than 32 bits", id="33 bits"),
        pytest.param(SIZES + b"\x78\x85\x80\x80\x80\x10", "of 4,294,967,301 bytes", id="text of 33 bits"),
        pytest.param(SIZES + b"\x10" + VALUES, "kind 0", id="end with a number"),
    ],
)
def test_a_header_of_a_page_that_can_be_read_in_two_ways_is_refused(data, said):
    """Arrow takes the last of two equal fields, cuts numbers, and skips fields of other kinds than it expects."""
    with pytest.raises(ValueError, match=said):
        list(parquet.pages(data + b"\x00" * 8, 0, 4))


@pytest.mark.parametrize("form", ["new_file", "new_stream"])
def test_compression_that_a_message_names_in_its_metadata_is_refused(tmp_path, form):
    """Arrow 0.17 named it so, in messages of version 4."""
    file = tmp_path / "a.arrow"
    batch = pyarrow.record_batch({"text": ["to be"]})
    named = {"ARROW:experimental_compression": "ZSTD"}
    for version, metadata in (("V4", None), ("V5", named), ("V4", named)):
        options = pyarrow.ipc.IpcWriteOptions(metadata_version=getattr(pyarrow.ipc.MetadataVersion, version))
        with getattr(pyarrow.ipc, form)(file, batch.schema, options=options) as opened:
            opened.write_batch(batch, custom_metadata=metadata)
        if version == "V5" or metadata is None:
            assert read(file) == ["to be"]
    with pytest.raises(ValueError, match=rf"^{file} .*the message at byte \d+ has metadata in a version before 5"):
        read(file)


def test_pages_that_lack_values_of_the_footer_are_refused(tmp_path):
    """Arrow would read on beyond those that are measured, in a file of parquet-mr before 1.2.9."""
    file = tmp_path / "a.parquet"
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, "row_group_size": 5}
    writer.write_table(pyarrow.table({"text": ["a", "b", None, "d", "e"]}), file, **settings)
    assert read(file) == ["a", "b", "d", "e"]
    ((rows, values, begin, end),) = footer.places(file, [0])[0]
    assert (rows, values) == (5, 5)
    data = file.read_bytes()
    for stop, lacking in ((begin, 5), (end, 0)):
        with pytest.raises(ValueError, match=rf"^{file} .* lack {lacking or 1} values"):
            parquet.largest_page(file, data, begin, stop, "text", 9, values + (not lacking))
    assert parquet.largest_page(file, data, begin, end, "text", 9, values)[1] == 1


def views(count, length):
    """Column of views of one text."""
    view = struct.pack("<i4sii", length, b"aaaa", 0, 0)
    buffers = [None, pyarrow.py_buffer(view * count), pyarrow.py_buffer(b"a" * length)]
    return pyarrow.Array.from_buffers(pyarrow.string_view(), count, buffers)


@pytest.mark.parametrize("dictionary", [False, True])
def test_views_of_one_long_text_are_counted_before_each_is_looked_at(tmp_path, monkeypatch, dictionary):
    monkeypatch.setattr(sizes, "LEAST_SUM", 10**6)
    monkeypatch.setattr(sizes, "EXPANSION", 1)
    for count in (90, 110):
        column = views(count, 10_000)
        if dictionary:
            column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0], pyarrow.int8()), column)
        file = tmp_path / f"{count}.arrow"
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        batch = pyarrow.record_batch([column], ["text"])
        with pyarrow.ipc.new_stream(file, batch.schema, options=options) as opened:
            opened.write_batch(batch)
    assert len(read(tmp_path / "90.arrow")) == (1 if dictionary else 90)
    with pytest.raises(ValueError, match=r"110\.arrow has views of more than [\d,]+ times as much text"):
        read(tmp_path / "110.arrow")
