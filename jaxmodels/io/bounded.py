"""Texts and configurations of unknown origin, read without hanging and in bounded memory.

A FIFO or a device would block or never end, a sparse file of a terabyte would fill the memory: only regular files are
read, up to a size. A JSON text takes about twenty times as much memory as Python objects if it consists of empty lists,
so that the values of a larger one than a configuration are counted first.
"""

import collections
import contextlib
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmodels.io.content import explained
from jaxmodels.process.failures import memory_naming
from jaxmodels.process.texts import quoted, shortened

CONFIG_BYTES = 2**24  # of a JSON or YAML text: 17 MB; the index of a model with 90,000 tensors has 9 MB
TOKENIZER_BYTES = 2**26  # of a tokenizer.json, or a vocabulary that holds one; the largest published have 35 MB
TEXT_BYTES = 2**28  # of any other text
# Lists and objects, and commas, in a JSON text of more than CONFIG_BYTES; tokenizers have up to 1 and 3 million.
MOST_OPENED, MOST_COMMAS = 2_000_000, 5_000_000
MOST_DIGITS = 40  # of an integer in a JSON file; those of random states have 39
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON writes the halves of a character beyond 16 bits
# Files of more bytes are looked at for holes, and refused if they have more than this for each byte that was written.
HOLES_FROM, MOST_HOLES = 2**28, 1000
PARTS = 1000  # of a file that are looked at


def open_regular(file: str | os.PathLike) -> io.BufferedReader:
    """Open a regular file to read bytes; raises ValueError, naming it, for a folder, a FIFO, a device or a socket.

    Raises ValueError too for a large file of which the disk holds next to nothing, as of an interrupted download: its
    holes are read as zeros, terabytes of them. Raises OSError as `open` does.
    """
    # Opening a FIFO would wait for a writer; the flag has no effect on regular files.
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise ValueError(f"{file} is a {kind_of(about.st_mode)}; expected a regular file")
    if about.st_size > HOLES_FROM and about.st_blocks * 512 * MOST_HOLES < about.st_size:
        held = bytes_held(descriptor, about.st_size)  # st_blocks is 0 on some mounted buckets, and for small files
        if held * MOST_HOLES < about.st_size:
            os.close(descriptor)
            raise ValueError(f"{file} has {about.st_size:,} bytes, of which {held:,} were ever written: it is sparse")
    return os.fdopen(descriptor, "rb")


def open_in_place(file: str | os.PathLike) -> io.FileIO:
    """Open a file to read and write where it lies, without truncating it, or create it.

    Raises ValueError, naming it, if it is a symbolic link, a FIFO, a device or a socket, or if another name leads to
    the same file (a hard link): what is written would change a file that lies elsewhere. Raises OSError as `open` does.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{file} is a symbolic link; expected a regular file to write") from None
        raise
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        what = f"file with {about.st_nlink} names" if stat.S_ISREG(about.st_mode) else kind_of(about.st_mode)
        raise ValueError(f"{file} is a {what}; expected a regular file without hard links to write")
    return io.FileIO(descriptor, "r+b")


@contextlib.contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Context in which no other process has the lock of a file, which is made if it does not exist.

    Raises ValueError, naming the folder of the file, if another one does; and as `open_in_place`.
    """
    with open_in_place(file) as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{file.parent} is being written by another process") from None
        yield


def bytes_held(descriptor: int, size: int) -> int:
    """Bytes of an open file outside of its holes; all if the file system does not tell, or if it has many parts."""
    held, end = 0, 0
    for _ in range(PARTS):
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            os.lseek(descriptor, 0, os.SEEK_SET)
            return held if error.errno == errno.ENXIO else size  # ENXIO: there is nothing but a hole
        held += end - start
    os.lseek(descriptor, 0, os.SEEK_SET)
    return size


def kind_of(mode: int) -> str:
    """Name of a kind of file, from the mode that stat returns."""
    kinds = {"folder": stat.S_ISDIR, "FIFO": stat.S_ISFIFO, "device": stat.S_ISCHR, "disk": stat.S_ISBLK}
    return next((name for name, check in kinds.items() if check(mode)), "socket")


def refuse_special(path: Path) -> None:
    """Raise ValueError, naming the path, if it is a FIFO, a device or a socket, or a link to one.

    Where a file may be missing, such a one would count as missing.
    """
    with contextlib.suppress(FileNotFoundError):  # a file of another process, such as a temporary one
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a {kind_of(mode)}; expected a regular file or a folder")


def read_bytes(file: str | os.PathLike, limit: int = TEXT_BYTES) -> bytes:
    """Content of a regular file of at most `limit` bytes; raises ValueError, naming it, and OSError as `open`."""
    with open_regular(file) as opened, memory_naming(file):
        size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise ValueError(f"{file} has {size:,} bytes; at most {limit:,} are read")
        content = opened.read(limit + 1)
    if len(content) > limit:  # files of /proc have no size, and another process may append
        raise ValueError(f"{file} has more than {limit:,} bytes")
    return content


def sha256_of(file: str | os.PathLike, limit: int | None = None) -> str:
    """SHA-256 of a regular file, in hexadecimal; raises as `read_bytes`, by default for no size."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if limit is not None and size > limit:
            raise ValueError(f"{file} has {size:,} bytes; at most {limit:,} are read")
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_text(file: str | os.PathLike, limit: int = TEXT_BYTES) -> str:
    """Content of a UTF-8 file, as `read_bytes`; raises ValueError, naming the file, if it is not UTF-8."""
    try:
        return read_bytes(file, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Object of a JSON text; raises ValueError if a key is there twice, of which Python would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counted = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{quoted(counted.most_common(1)[0][0])} is there twice")
    return found


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Context without garbage collection, which visits the objects of a long text again and again, in vain."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def read_json(file: str | os.PathLike, limit: int = CONFIG_BYTES) -> Any:
    """Content of a JSON file; raises ValueError, naming it, if it cannot be read, is too large or is not JSON."""
    try:
        with without_collection(), memory_naming(file):
            text = read_text(file, limit)
            content = parsed(text, parse_int=integer)
            if SURROGATE.search(text):  # a half of a character, which no text in UTF-8 may hold, raises here
                json.dumps(content, ensure_ascii=False).encode("utf-8")
            return content
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        what = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise explained(Path(file), what) from None
    except RecursionError:
        raise ValueError(f"{file} is not read: its lists and objects are nested too deeply") from None
    except ValueError as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file} is not read: {quoted(str(error), 200)}") from None


def integer(digits: str) -> int:
    """Integer of a JSON text; raises ValueError for one of more than MOST_DIGITS, with which floats overflow."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits; at most {MOST_DIGITS} are read")
    return int(digits)


def parsed(text: str, **options: Any) -> Any:
    """Content of a JSON text, as `json.loads`; raises ValueError too for a large one of more values than a tokenizer's.

    An object of 7 bytes takes 230 as a Python object.
    """
    if len(text) > CONFIG_BYTES:
        opened, commas = text.count("[") + text.count("{"), text.count(",")
        if opened > MOST_OPENED or commas > MOST_COMMAS:
            raise ValueError(
                f"{opened:,} lists and objects and {commas:,} commas; at most {MOST_OPENED:,} and {MOST_COMMAS:,} are "
                "read"
            )
    return json.loads(text, **options)


@contextlib.contextmanager
def errors_naming(where: str | os.PathLike) -> Iterator[None]:
    """Context that adds a file or folder to the message of a ValueError or MemoryError that does not name it."""
    try:
        with memory_naming(where):
            yield
    except ValueError as error:
        if str(where) not in str(error):
            error.args = (f"{where}: {shortened(str(error))}",)  # its class, and what it holds, stay
        raise


def is_integer(value: Any, number: int) -> bool:
    """True if a value of a JSON text is an integer of that size: in Python, True and 1.0 are equal to 1."""
    return type(value) is int and value == number


def check_format(where: str | os.PathLike, found: Any, number: int, advice: str = "") -> None:
    """Raise ValueError, beginning with `where`, unless the format that a file names is the integer `number`."""
    if not is_integer(found, number):
        raise ValueError(f"{where} has format {quoted(found)}, this version reads {number}{advice}")


def read_object(file: str | os.PathLike, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """Content of a JSON file that holds an object; raises ValueError as `read_json`, and for other values."""
    content = read_json(file, limit)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {quoted(content)}; expected a JSON object")
    return content
