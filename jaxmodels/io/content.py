"""Kinds of files by name and first bytes: those that are not what their name says, and those that are written here."""

import codecs
import re
import zipfile
from pathlib import Path

from jaxmodels.process.texts import shortened

STEM = "params"  # of the files with the weights of a model that this program saves
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
ZIP = b"PK\x03\x04"
COMPRESSED = tuple(start for start, sentence in FORMATS.items() if sentence.startswith("is compressed"))


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
    if is_zip(file) and not has_directory(file):
        return "is truncated: it is a zip file without its end"
    size = int.from_bytes(head[:8], "little")
    if file.suffix != ".safetensors" and head[8:10] in (b'{"', b"{}") and size <= file.stat().st_size - 8:
        return "is a safetensors file, though its name does not end in .safetensors"
    return None


def is_zip(file: Path) -> bool:
    """True for a file that begins as a zip does, by which PyTorch tells its formats apart.

    Any file may end as a zip: one of PyTorch's older format whose last tensor holds another file.
    """
    with file.open("rb") as content:
        return content.read(len(ZIP)) == ZIP


def has_directory(file: Path) -> bool:
    """True if the directory of a zip file's entries is found."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # its end names other disks
        return False


def is_torch_file(file: Path) -> bool:
    """True for a file of torch.save: a zip file with an entry NAME/data.pkl. False for one of torch.jit.save."""
    if not file.is_file():  # opening a FIFO would wait for a writer
        return False
    try:
        if not is_zip(file):
            return False
        with zipfile.ZipFile(file) as opened:
            names = [name.partition("/")[2] for name in opened.namelist()]
        return "data.pkl" in names and "constants.pkl" not in names
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def explained(file: Path, otherwise: str) -> ValueError:
    """Error for a file that could not be read: says what the file is, or `otherwise`."""
    return ValueError(f"{file} {recognised(file) or shortened(otherwise, 400)}")


def weights_in(folder: Path) -> list[str]:
    """Names of what holds the weights in a model's folder, of which there should be one."""
    names = (STEM, f"{STEM}.safetensors", f"{STEM}.safetensors.index.json")
    return [name for name in names if (folder / name).exists()]


def holds_safetensors(folder: Path) -> bool:
    """True if a model's folder holds STEM.safetensors or its index; False if it holds STEM, an Orbax folder.

    Raises ValueError, naming the folder, if it holds more than one of them, or none.
    """
    found = weights_in(folder)
    if not found:
        raise ValueError(f"{folder} holds no weights; expected {STEM}/ or {STEM}.safetensors")
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(found)}; expected one of them")
    return found != [STEM]


# Files in the folders that this program writes: path in the folder, and first bytes; () if they may be any.
# A process that is killed leaves the beginning of a file, or nothing of it.
SPACES = b" \t\r\n"
TEMPORARY = r"((?:.*/)?)\.([^/]+)\.[0-9a-f]{8}\.jaxmodels"  # of `jaxmodels.io.atomic.atomic_file`
ORBAX = r"((model/)?params|state)(\.orbax-checkpoint-tmp[^/]*)?/"
OCDBT = b"\x0c\xdb"
BLOCK = rf"{ORBAX}state/(ocdbt\.process_\d+/)?d/[0-9a-f]{{32}}"
WRITTEN: dict[str, tuple[bytes, ...]] = {
    r"(model/)?config\.json": (b"{",),
    r"configs/model\.yml": (),
    r"\.jaxmodels\.json": (b"{",),  # of `jaxmodels.io.manifest`, before it has its name
    r"configs/vocabulary\.json": (b"{",),
    r"latest": (b"global_step",),
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json": (b"{",),
    r"(generation_config|vocabulary|adapter_config|tokens|progress|complete)\.json": (b"{",),
    r"(merges|vocab)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model": (),
    r"(additional_chat_templates/[^/]+|chat_template)\.jinja|lock": (),
    r"(model|params|adapter_model)(-\d{5}-of-\d{5})?\.safetensors": (),  # `is_safetensors` looks at its header
    r"(model|params)\.safetensors\.index\.json": (b"{",),
    r"global_step\d+/(layer_\d+-model_\d+|mp_rank_\d+)(-|_)model_states\.pt": (b"PK\x03\x04",),
    r"(train|validation)(_documents)?\.npy|losses\.npy|(tokens|documents|ids|array-\d+)\.npy": (b"\x93NUMPY",),
    r"index-\d{10}\.faiss": (b"I",),
    r"(training|validation_[a-z]+)\.npz": (b"PK\x03\x04",),
    rf"{ORBAX}((_CHECKPOINT)?_METADATA|state/(_METADATA|_sharding(\.__lock)?|array_metadatas/process_\d+))": (b"{",),
    rf"{ORBAX}(orbax\.checkpoint|commit_success\.txt)": (b"Checkpoint commit",),
    rf"{ORBAX}state/(ocdbt\.process_\d+/)?manifest\.ocdbt(\.__lock)?": (OCDBT,),
    rf"{BLOCK}(\.__lock)?": (OCDBT, b"\x28\xb5\x2f\xfd"),  # nodes of its tree, and arrays compressed with zstd
}


def is_written_here(folder: Path, name: str, *, complete: bool = False) -> bool:
    """True if a file may be a part of a folder that this program was writing: by its path in it, and its beginning.

    Empty files, and those that begin with zeros, as after the machine stopped, hold nothing. complete: of a folder that
    was finished, in which Orbax's blocks of numbers begin with any bytes.
    """
    file = folder / name
    if complete and re.fullmatch(BLOCK, name, re.ASCII):
        return file.is_file() and not file.is_symlink()
    name = re.sub(TEMPORARY, r"\1\2", name)
    found = next((beginnings for pattern, beginnings in WRITTEN.items() if re.fullmatch(pattern, name, re.ASCII)), None)
    if found is None or file.is_symlink() or not file.is_file():
        return False
    try:
        with file.open("rb") as content:
            head = content.read(HEAD)
    except OSError:
        return False
    if not head.strip(b"\0") or (name.endswith(".json") and not head.strip(SPACES)):
        return True
    if name.endswith(".safetensors"):
        return len(head) <= 8 or head[8:9] == b"{"
    return not found or any(text.startswith(start[: len(text)]) for start in found for text in (head, stripped(head)))


def begins_as_object(content: bytes) -> bool:
    """True if a file may be one of those that this program writes under a name of JSON."""
    return stripped(content).startswith(b"{")


def stripped(content: bytes) -> bytes:
    """Content without a byte order mark and spaces before it, as copies of others' JSON files may have them."""
    return content.removeprefix(codecs.BOM_UTF8).lstrip(SPACES)
