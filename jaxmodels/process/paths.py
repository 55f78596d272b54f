"""Folders that a user names: `~` is expanded, and URLs are refused; names in files of others, and folders inside."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LONGEST = 255  # bytes of a name on common file systems
DEEPEST = 100  # folders inside each other that are searched
LONGEST_PATH = 3_840  # bytes of the path of a folder that is searched; Linux takes 4,096 with a file's name
MOUNTS = {"gs": "gcsfuse BUCKET /mnt/BUCKET", "s3": "mount-s3 BUCKET /mnt/BUCKET"}


def local(path: Path | str, name: str) -> Path:
    """Path on a file system, with `~` expanded.

    Raises ValueError, naming the argument, for the URL of a bucket, and for `~NAME` if there is no such user.
    """
    url = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", str(path))  # Path has made one slash of two
    if url is None:
        try:
            return at_home(path)
        except RuntimeError:
            user = Path(path).parts[0]
            raise ValueError(
                f"{name}={path}: {user} is no user's home folder; a folder of that name is ./{user}"
            ) from None
    scheme, inside = url.groups()
    bucket, _, rest = inside.partition("/")
    mount = MOUNTS.get(scheme)
    how = "" if mount is None else f", e.g. with {mount.replace('BUCKET', bucket or 'BUCKET')}"
    raise ValueError(
        f"{name}={scheme}://{inside} must be a folder of a file system: mount it{how}, and name "
        f"{name}=/mnt/{bucket or 'BUCKET'}/{rest}"
    )


def at_home(path: Path | str) -> Path:
    """Path with `~` or `~NAME` at its beginning expanded; raises RuntimeError if there is no such user.

    A text that begins with ./ names a folder `~` of the current one: Path has no ./ any more.
    """
    found = Path(path)
    if isinstance(path, str) and not path.startswith("~") and str(found).startswith("~"):
        return Path.cwd() / found
    return found.expanduser()


def resolved(path: str | os.PathLike) -> Path:
    """Absolute path without links, which need not exist, as `Path.resolve` has it.

    Raises ValueError for a link that leads to itself, for which Python's versions raise different errors or none.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is, or lies in, a link that leads to itself") from None
    return Path(path).resolve()


def check_utf8(path: Path | str, name: str) -> None:
    """Raise ValueError, naming the argument, for a path that is not UTF-8: JSON files and Orbax cannot hold it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={path} is not UTF-8, character {error.start + 1}: rename it, it cannot be saved in a file"
        ) from None


def is_plain(name: Any) -> bool:
    """True for a string that names one file or folder beside the file in which it stands, and nothing elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= LONGEST


def walk(
    folder: str | os.PathLike, too_deep: Callable[[Path], None] | None = None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Folder and all folders inside, each with the names of its folders and of its other files, as `os.walk` has them.

    Links to folders are among the folders, and are not followed; folders that cannot be read are left out, as are those
    whose names the caller removes from the list. Nothing here is recursive: others may nest thousands of folders.

    too_deep: called with each folder that is nested more than `DEEPEST` deep, or whose path is too long, which is then
    left out. Raises ValueError, naming `folder`, for such a one by default.
    """
    left = [(Path(folder), 0)]
    while left:
        here, depth = left.pop()
        if depth > DEEPEST or (depth and len(os.fsencode(here)) > LONGEST_PATH):
            if too_deep is None:
                raise ValueError(f"{folder} has folders nested more than {DEEPEST} deep, or with too long a path")
            too_deep(here)
            continue
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    (folders if is_folder(entry) else files).append(entry.name)
        except OSError:
            continue
        yield here, folders, files
        left += [(here / name, depth + 1) for name in reversed(folders) if not os.path.islink(here / name)]


def is_folder(entry: os.DirEntry) -> bool:
    """True for a folder, or a link to one; False if that cannot be told."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def below(folder: str | os.PathLike) -> Iterator[Path]:
    """Paths of everything in a folder, at any depth, as `walk` finds it and with its errors."""
    for here, folders, files in walk(folder):
        yield from (here / name for name in (*folders, *files))
