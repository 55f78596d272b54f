"""Files that would hang or fill the memory are refused in a line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmodels.io.bounded import (
    CONFIG_BYTES,
    TOKENIZER_BYTES,
    open_regular,
    read_bytes,
    read_json,
    read_object,
    read_text,
)
from jaxmodels.text import TokenizerFile

PROGRAM = """
import resource, sys
from jaxmodels.io.bounded import read_json
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_json(sys.argv[1])
except ValueError as error:
    print(len(str(error)), str(error)[:200])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def read_elsewhere(file: Path) -> list[str]:
    """Lines that a process prints that reads a JSON file: the error if there is one, MB of memory."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, file], capture_output=True, text=True, timeout=20, check=True, cwd=Path.cwd()
    )
    return run.stdout.splitlines()


def test_a_regular_file_is_read(tmp_path):
    file = tmp_path / "text"
    file.write_text("größe", encoding="utf-8")
    assert read_text(file) == "größe"
    assert read_bytes(file, 7) == "größe".encode()
    link = tmp_path / "link"
    link.symlink_to(file)
    assert read_text(link) == "größe"


def test_a_larger_file_is_refused(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(8))
    with pytest.raises(ValueError, match=rf"{file} has 8 bytes; at most 7\b"):
        read_bytes(file, 7)


def test_a_sparse_file_of_a_terabyte_is_refused(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as opened:
        opened.truncate(10**12)
    with pytest.raises(ValueError, match=rf"{file} has 1,000,000,000,000 bytes"):
        read_json(file)


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(kind, tmp_path):
    file = tmp_path / "f"
    if kind == "folder":
        file.mkdir()
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind == "device":
        file = Path("/dev/zero")
    else:
        opened = socket.socket(socket.AF_UNIX)
        opened.bind(str(file))
        opened.close()
    with pytest.raises((ValueError, OSError), match=str(file)) as error:
        read_bytes(file)
    assert kind == "socket" or kind in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"a":' * 10**6,
        "1" * 10**6,
        '{"a": ' + "9" * 5000 + "}",
        '{"a": [1' + "0" * 40 + "]}",
        '"' + "x" * 10**6,
        "\ufeff{}",
        "",
        "{'a': 1}",
        "{" + '"a": 1, ' * 10**5,
    ],
    ids=["lists", "objects", "digits", "integer", "integer beyond floats", "string", "BOM", "empty", "Python", "open"],
)
def test_what_is_no_json_is_one_short_line(text, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=str(file)) as error:
        read_json(file)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_other_values_than_an_object_are_quoted_shortly(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("[" + "1," * 10**5 + "1]")
    with pytest.raises(ValueError, match=str(file)) as error:
        read_object(file)
    assert len(str(error.value)) < 400


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["[],", '"a",', "{},", "1.5,", "[[]],"])
def test_the_largest_file_that_is_read_takes_less_than_a_gigabyte(unit, tmp_path):
    file = tmp_path / "config.json"
    file.write_text("[" + unit * ((CONFIG_BYTES - 3) // len(unit)) + "0]")
    assert file.stat().st_size <= CONFIG_BYTES
    assert int(read_elsewhere(file)[-1]) < 700


@pytest.mark.parametrize(("unit", "counted"), [('{"":0},', "2,500,002 lists and objects"), ("1,", "9,000,000 commas")])
def test_a_large_text_of_more_values_than_a_tokenizer_has_is_not_parsed(unit, counted, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text('{"a":[' + unit * (2_500_000 if "{" in unit else 9_000_000) + "0]}")
    assert file.stat().st_size > CONFIG_BYTES
    with pytest.raises(ValueError, match=rf"tokenizer\.json is not read: .*{counted}"):
        read_object(file, TOKENIZER_BYTES)
    with pytest.raises(ValueError, match=rf"tokenizer\.json cannot be read: .*{counted}"):
        TokenizerFile.read(file)


@pytest.mark.parametrize("written", [0, 4096])
def test_a_large_file_of_which_nothing_was_written_is_refused(written, tmp_path):
    file = tmp_path / "tokens.npy"
    with file.open("wb") as opened:
        opened.seek(2**39)
        opened.write(b"x" * written)
        opened.truncate(2**40)
    with pytest.raises(ValueError, match=r"tokens\.npy has 1,099,511,627,776 bytes, of which [\d,]{1,6} were"):
        open_regular(file)


@pytest.mark.parametrize("blocks", [0, 2**20 // 512])
def test_a_file_system_that_does_not_tell_has_no_holes(blocks, tmp_path, monkeypatch):
    """As mounted buckets, which count no blocks, and name all of a file data."""
    monkeypatch.setattr("jaxmodels.io.bounded.HOLES_FROM", 2**16)
    file = tmp_path / "tokens.npy"
    file.write_bytes(bytes(2**20))
    about = os.stat_result([*file.stat()[:10]] + [0] * 3, {"st_blocks": blocks})
    monkeypatch.setattr("jaxmodels.io.bounded.os.fstat", lambda descriptor: about)
    with open_regular(file) as opened:
        assert len(opened.read()) == 2**20


def test_half_of_a_character_is_refused(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"embedder": "\\ud83d\\ude00 \\u0120"}')
    assert read_json(file) == {"embedder": "\N{GRINNING FACE} \u0120"}
    file.write_text('{"embedder": ["\\uD800"]}')
    with pytest.raises(ValueError, match=r"a\.json is not read: .*ud800"):
        read_json(file)
