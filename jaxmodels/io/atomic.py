"""Atomic writes of files and folders: under a unique temporary name, flushed to disk, then renamed.

A reader sees the old content or the new content, never a part of it, whenever the process or the machine stops. A
folder that is written here has a manifest, `jaxmodels.io.manifest`; only such a folder is ever replaced.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import re
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxmodels.io import manifest
from jaxmodels.io.bounded import kind_of
from jaxmodels.process.paths import below, local, resolved
from jaxmodels.process.streams import say
from jaxmodels.process.texts import visible

# Names of folders, whose manifest tells them from those of others, and of files, which have nothing else that does. A
# letter is among the digits: a user's own copy may end in a date.
UNIQUE = r"(?=[0-9]*[a-f])[0-9a-f]{8}"
TEMPORARY = re.compile(rf"\..+\.{UNIQUE}(\.old)?", re.DOTALL)
TEMPORARY_FILE = re.compile(rf"\..+\.{UNIQUE}\.jaxmodels", re.DOTALL)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
SWAPPING = 0.2  # seconds; a process that is not killed takes microseconds between the two renames
FLUSHING = 8  # threads
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def check_target(target: Path, *, overwrite: bool | None, sources: Iterable[Path] = ()) -> None:
    """Raises ValueError if a folder must not be written.

    overwrite: None if the caller has no such option.

    The target must not be a file, nor the URL of a bucket. A folder that is not empty needs `overwrite`, and must have
    been written by this module, with nothing foreign in it. It must not contain `sources`, files and folders that are
    read, or what they lead to if they are links.
    A target that is missing because a process was killed while it replaced it is recovered first.
    """
    local(target, "target")
    real = resolved(target)
    recover(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; expected a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        option = "" if overwrite is None else ", or pass overwrite (--overwrite)"
        raise ValueError(f"{target} is not empty; choose another folder{option}")
    within = next((source for source in sources if resolved(source).is_relative_to(real)), None)
    if within is not None:
        raise ValueError(
            f"{target} contains the source {within}, which overwriting would delete; choose another folder"
        )
    if reason := manifest.foreign(real):
        raise ValueError(f"{target} is not overwritten: {reason}; delete it yourself, or choose another folder")


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Context with a temporary folder to fill, which replaces the target at the end, or is deleted on an exception.

    If the target is a symbolic link, the folder it points to is replaced. The new folder is on disk before the old one
    is deleted. Raises ValueError as `check_target` before anything is written, and again before the target is replaced,
    and OSError naming the target if it cannot be.
    """
    target = resolved(target)
    check_target(target, overwrite=overwrite)
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise_named(error, temporary, target)
        raise
    try:
        manifest.begin(temporary)
        yield temporary
        manifest.finish(temporary)
        flush_all((*below(temporary), temporary))
        check_target(target, overwrite=overwrite)  # again: hours may have passed, and others write there too
        old = replace(target, temporary)
    except BaseException as error:
        with contextlib.suppress(OSError):
            manifest.remove(temporary)
        raise_named(error, temporary, target)
        raise
    flush(target.parent)
    if old is None:
        return
    if manifest.is_empty(old) or manifest.foreign(old) is None:
        manifest.remove(old)
    else:  # written after the last check
        say(f"{old} is kept: it holds what others wrote to {target} as it was replaced")


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Context with a temporary path to write to, which replaces the target at the end, or is deleted on an exception.

    check: called before the target is replaced; if it raises an exception, the target is kept. Several processes may
    write one target: it is then the complete file of one of them. If the target is a symbolic link, the link is
    replaced. Raises ValueError, before anything is written, if the target is a folder, a FIFO, a device or a socket, or
    a link to one. An OSError, as of a full disk, names the target.
    """
    target = Path(target)
    check_file(target)
    temporary = temporary_name(target)
    temporary = temporary.with_name(f"{temporary.name}.jaxmodels")
    try:
        yield temporary
        flush(temporary)
        check()
        temporary.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise_named(error, temporary, target)
        raise


def check_file(target: Path) -> None:
    """Raise ValueError if a path is the URL of a bucket, or is something other than a regular file.

    /dev/null, /dev/stdout and the FIFOs of a shell are such paths: a rename would replace a device by a file.
    """
    local(target, "target")
    with contextlib.suppress(OSError):  # there is nothing, or the writer says what is wrong
        mode = target.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{target} is a {kind_of(mode)}; expected a regular file, or a new one, to write")


def raise_named(error: BaseException, temporary: Path, target: Path) -> None:
    """Raise an OSError that names no file, or a temporary one, again with the name that the user knows.

    On a full disk, `write` raises one without a name.
    """
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
        return
    name = target if error.filename is None else Path(os.fsdecode(error.filename))
    if name.is_relative_to(temporary):
        name = target / name.relative_to(temporary)
    elif error.filename is not None:
        return
    raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(name)) from error


def temporary_name(target: Path) -> Path:
    """Unique name in the target's folder: a rename must stay on one file system."""
    return target.with_name(f".{target.name}.{unique()}")


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Context with a folder for temporary files, removed in the end; `jaxmodels clean` knows what is left of it."""
    folder = temporary_name(Path(tempfile.gettempdir()) / name)
    folder.mkdir(mode=0o700)
    try:
        manifest.begin(folder)
        yield folder
    finally:
        with contextlib.suppress(OSError):
            manifest.remove(folder)


def unique(digits: str = "") -> str:
    """Eight hexadecimal digits, the first a letter: those of a digest, or digits that no other process draws."""
    digits = digits or uuid.uuid4().hex
    return "abcdef"[int(digits[0], 16) % 6] + digits[1:8]


def replace(target: Path, new: Path) -> Path | None:
    """Make `new` the target; returns the name of its former content, if there was any.

    Where the kernel can, both exchange their names in one step. Elsewhere the target is missing between two renames;
    `recover` undoes the first. Raises OSError naming the target, with nothing changed.
    """
    try:
        if not target.exists() or not any(target.iterdir()):
            new.rename(target)  # fails if a file has come into an empty folder
            return None
        if exchange(target, new):
            return new
        old = new.with_name(new.name + manifest.OLD)
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
        return old
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: it could not be replaced", str(target)) from error


def exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders in one step; False if the kernel or the file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(a))


def recover(target: Path) -> None:
    """Give a folder its name back, if a killed process had renamed it to replace it; says so on standard error.

    To be called before a folder of this program is opened or replaced; without effect on any other path.
    """
    if target.exists() or target.is_symlink() or not target.name or not target.parent.is_dir():
        return
    found = sorted(target.parent.glob(f".{glob_escaped(target.name)}.????????{manifest.OLD}"))
    if found:
        time.sleep(SWAPPING)
    for old in found:
        if not target.exists() and manifest.is_ours(old):
            old.rename(target)
            message = f"{target}: recovered from {old.name}, which an interrupted overwrite had left"
            print(visible(message), file=sys.stderr)
            return


def glob_escaped(name: str) -> str:
    """Pattern that matches exactly a name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def flush_all(paths: Iterable[Path]) -> None:
    """Flush files and folders, several at a time: the file system combines their requests to the disk."""
    with concurrent.futures.ThreadPoolExecutor(FLUSHING) as threads:
        for _ in threads.map(flush, paths):
            pass


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's directory entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
