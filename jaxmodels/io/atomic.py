"""The one way a file or a folder is written: under a temporary name beside the target, flushed to disk, then renamed.

A reader sees the old content or the new content, never a part of it, whenever the process or the machine stops.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

# By one of these a folder is known as a checkpoint, of this project or another, which may be overwritten.
CHECKPOINT = ("config.json", "latest", "params", "*.safetensors", "global_step*", "layer_*-model_*.pt")


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Raises ValueError where a folder cannot be written.

    That is a file; a folder that is not empty, unless `overwrite` is set and it holds a checkpoint; and one that is
    `source`, which is yet to be read, or around it: both would be deleted together.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder to write to")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{target} is not empty; name another folder, or allow overwriting")
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} holds the source {source}, which would be deleted with it; name another folder")
    if not any(any(target.glob(pattern)) for pattern in CHECKPOINT):
        raise ValueError(
            f"{target} is not overwritten: it holds no checkpoint ({', '.join(CHECKPOINT)}), and all of it would go"
        )


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill, which takes the target's place once it is complete and vanishes if filling it fails.

    A symbolic link stays one: what it leads to is replaced. The disk has all of the new folder before the old one goes.
    Raises ValueError before anything is written where `check_target` does, and OSError that names the target where the
    new folder cannot take its place.
    """
    target = Path(target).resolve()
    check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    old = beside.with_name(beside.name + ".old")
    beside.mkdir()
    try:
        yield beside
        for path in (*beside.rglob("*"), beside):
            flush(path)
        replace(target, beside, old)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush(target.parent)
    if old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike) -> Iterator[Path]:
    """A path to write a file to, which takes the target's place once it is complete and vanishes if writing it fails.

    It has the name of no other, so that several processes may write one target: it is the whole file of one of them.
    """
    target = Path(target)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield beside
        flush(beside)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace(target: Path, new: Path, old: Path) -> None:
    """Puts `new` at the target, and what was there at `old`; or nothing changes, and an OSError names the target."""
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
        where = f"; its former content is in {old}" if old.exists() else ""
        raise OSError(error.errno, f"{error.strerror}: it could not be replaced{where}", str(target)) from error


def flush(path: Path) -> None:
    """Returns when the disk has a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
