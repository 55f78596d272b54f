"""Files that are not what their name says, recognised by their first bytes."""

import zipfile
from pathlib import Path

from jaxmodels.process.texts import shortened

HEAD = 512  # bytes that are looked at
DOWNLOAD = "download it with `hf download`"
# Beginnings of a file that stands for another one.
POINTERS = {
    b"version https://git-lfs.github.com/spec": "is a git-lfs pointer, not the file: run `git lfs pull` in its folder",
    b"version https://hawser.github.com/spec": "is a git-lfs pointer, not the file: run `git lfs pull` in its folder",
    b"# xet version": "is a git-xet pointer, not the file: run `git xet checkout` or download it with `hf download`",
    b"/annex/objects/": "is a git-annex pointer, not the file: run `git annex get` in its folder",
    b"<!DOCTYPE html": f"is a web page, not the file: {DOWNLOAD}",
    b"<!doctype html": f"is a web page, not the file: {DOWNLOAD}",
    b"<html": f"is a web page, not the file: {DOWNLOAD}",
    b"<?xml": f"is an XML document, such as a server's answer, not the file: {DOWNLOAD}",
    b"Entry not found": f"holds the Hub's answer that there is no such file: {DOWNLOAD}",
    b"Invalid username or password": "holds the Hub's refusal, not the file: log in with `hf auth login`",
    b"Access to model": "holds the Hub's refusal, not the file: ask for access on the model's page",
}
# Beginnings of files of other formats.
FORMATS = {
    b"GGUF": "is a GGUF file of llama.cpp, which is not supported",
    b"\x89HDF": "is an HDF5 file, as TensorFlow's weights, which is not supported",
    b"\x1f\x8b": "is compressed with gzip: decompress it",
    b"\xfd7zXZ\x00": "is compressed with xz: decompress it",
    b"BZh": "is compressed with bzip2: decompress it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: decompress it",
}


def recognised(file: Path) -> str | None:
    """Sentence on a file that stands for another one or is of another format, without its subject; None otherwise."""
    if not file.is_file():  # a FIFO would block
        return None
    try:
        with file.open("rb") as content:
            head = content.read(HEAD)
    except OSError:
        return None
    if not head:
        return "is truncated: it has 0 bytes"
    start = head.lstrip()
    for beginning, sentence in (POINTERS | FORMATS).items():
        if start.startswith(beginning):
            return sentence
    if not head.strip(b"\0"):
        return "is full of zeros, as after an interrupted download: download it again"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    if start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(file):
        return "is truncated: it is a zip file without its end"
    size = int.from_bytes(head[:8], "little")
    if file.suffix != ".safetensors" and head[8:10] in (b'{"', b"{}") and size <= file.stat().st_size - 8:
        return "is a safetensors file, though its name does not end in .safetensors"
    return None


def explained(file: Path, otherwise: str) -> ValueError:
    """Error for a file that could not be read: says what the file is, or `otherwise`."""
    return ValueError(f"{file} {recognised(file) or shortened(otherwise, 400)}")
