"""Atomic writes of files and folders: under a unique temporary name, flushed to disk, then renamed.

A reader sees the old content or the new content, never a part of it, whenever the process or the machine stops.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

# A folder with one of these is a checkpoint, of this project or another, which may be overwritten.
CHECKPOINT = ("config.json", "latest", "params", "*.safetensors", "global_step*", "layer_*-model_*.pt")


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Raises ValueError if a folder must not be written.

    The target must not be a file. A folder that is not empty must hold a checkpoint, and needs `overwrite`. It must not
    contain `source`, which has not been read yet.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; expected a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} is not empty; choose another folder, or pass overwrite (--overwrite)")
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(
            f"{target} contains the source {source}, which overwriting would delete; choose another folder"
        )
    if not any(any(target.glob(pattern)) for pattern in CHECKPOINT):
        raise ValueError(f"{target} is not overwritten, as it holds no checkpoint ({', '.join(CHECKPOINT)})")


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Context with a temporary folder to fill, which replaces the target at the end, or is deleted on an exception.

    If the target is a symbolic link, the folder it points to is replaced. The new folder is on disk before the old one
    is deleted. Raises ValueError as `check_target` before anything is written, and OSError naming the target if it
    cannot be replaced.
    """
    target = Path(target).resolve()
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    old = temporary.with_name(temporary.name + ".old")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        replace(target, temporary, old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(target.parent)
    if old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike) -> Iterator[Path]:
    """Context with a temporary path to write to, which replaces the target at the end, or is deleted on an exception.

    Several processes may write one target: it is then the complete file of one of them.
    """
    target = Path(target)
    temporary = temporary_name(target)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(target: Path) -> Path:
    """Unique name in the target's folder: a rename must stay on one file system."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


def replace(target: Path, new: Path, old: Path) -> None:
    """Rename the target to `old` and `new` to the target; raises OSError naming the target, with nothing changed."""
    try:
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        saved = f"; its former content is in {old}" if old.exists() else ""
        raise OSError(error.errno, f"{error.strerror}: it could not be replaced{saved}", str(target)) from error


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's directory entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
