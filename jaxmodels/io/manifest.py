"""Manifests: the proof that this program wrote a folder, and what of it.

FOLDER/.jaxmodels.json    {"format": 1, "complete": true, "files": {"config.json": 210, "params/…": 4096, …}}

The sizes in bytes of all files. A folder is replaced or removed only if it has a manifest, and nothing that the
manifest does not list.

While a folder is filled, it has a temporary name, and {"format": 1, "complete": false, "name": its name, "files": {}}.
If its writer is killed, it is removed only under that name. Whether complete or not, what a killed writer left is
removed only if each of its files is of a kind that is written to such folders (`jaxmodels.io.content.WRITTEN`): anybody
can write a manifest into the folder of another.
"""

import bisect
import contextlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import is_integer, read_bytes, read_object, refuse_special
from jaxmodels.io.content import is_written_here
from jaxmodels.process.failures import naming
from jaxmodels.process.paths import below, walk
from jaxmodels.process.texts import quoted

NAME = ".jaxmodels.json"
NEW = re.compile(rf"\.{re.escape(NAME)}\.a[0-9a-f]{{7}}\.jaxmodels")  # before it has its name
FORMAT = 1
OLD = ".old"  # ends the name of a folder that is being replaced
BEGUN_BYTES = 4096  # of a manifest without files: a name has 255 bytes, each of which is written as at most 6
SETTLED = 3600.0  # seconds without a change, after which a temporary name belongs to no running process


def begin(folder: Path, name: str | None = None, links: Iterable[str] = ()) -> None:
    """Write the manifest of a folder that is about to be filled.

    name: the one that it will have, if not its own. links: paths in it of symbolic links that are made there.

    One that says so already is left as it is: on a full disk it could not be written again.
    """
    about = begun(folder.name if name is None else name) | {"files": dict.fromkeys(links, -1)}
    with contextlib.suppress(ValueError):
        if read(folder) == {"format": FORMAT, **about}:
            return
    write(folder, **about)


def begun(name: str) -> dict[str, Any]:
    """Content of the manifest of a folder that is being filled, by the folder's name."""
    return {"complete": False, "name": spelled(name), "files": {}}


def spelled(name: str) -> str:
    """Name of a folder with escapes for bytes that are not UTF-8, which JSON has not."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def finish(folder: Path) -> None:
    """List all files of a folder in its manifest."""
    write(folder, complete=True, files=dict(sorted(sizes(folder))))


def write(folder: Path, **content: object) -> None:
    """Write a folder's manifest, which replaces an earlier one at once: a killed process leaves one of them."""
    file = folder / NAME
    refuse_link(file)
    refuse_special(file)
    new = file.with_name(f".{NAME}.a{uuid.uuid4().hex[:7]}.jaxmodels")  # a name of `jaxmodels.io.atomic`
    with naming(file):
        try:
            new.write_text(as_text(**content), encoding="utf-8")
            new.replace(file)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def as_text(**content: object) -> str:
    """Text of a manifest."""
    return json.dumps({"format": FORMAT, **content}, indent=1) + "\n"


def sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Path in the folder and size of every file but the manifest; -1 for links, devices and empty folders.

    Raises ValueError if folders are nested deeper than any that this program writes.
    """
    for here, folders, files in walk(folder):
        links = [name for name in folders if (here / name).is_symlink()]
        for name in [*files, *links]:
            file = here / name
            regular = file.is_file() and not file.is_symlink()
            if file != folder / NAME:
                yield str(file.relative_to(folder)), file.stat().st_size if regular else -1
        if not files and not folders and here != folder:
            yield str(here.relative_to(folder)), -1


def foreign(folder: Path) -> str | None:
    """Reason why a folder must not be replaced: no complete manifest, or files that the manifest does not list."""
    try:
        about, found = read(folder), list(sizes(folder))
    except ValueError as error:
        return str(error)
    if about["complete"] is not True:
        return f"{folder / NAME} says that it is not complete"
    listed = about["files"]
    names = sorted(listed)
    for name, size in found:
        empty = is_empty(folder / name)
        same = type(listed.get(name)) is int and listed[name] == size and (size >= 0 or empty)
        if not same and not (empty and holds(names, name)):
            changed = "has changed since" if name in listed else "was not written by this program"
            return f"{quoted(name)} in it {changed}"
    return None


def holds(names: Sequence[str], folder: str) -> bool:
    """True if one of the sorted names lies in a folder, which may be empty by now.

    Nobody knows how long the names of a manifest are: a set of the folders above each takes quadratic memory.
    """
    at = bisect.bisect_left(names, f"{folder}/")
    return at < len(names) and names[at].startswith(f"{folder}/")


def unproven(folder: Path, *, complete: bool = False) -> str | None:
    """Reason why what a killed process left must not be removed: nothing shows that this program wrote all of it.

    complete: a complete manifest is accepted, too, as of a folder whose writer was killed before it had its name.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is not a folder"
    try:
        about, found = read(folder), list(sizes(folder))
    except ValueError as error:
        return str(error)
    finished = about["complete"] is True
    if finished and not complete:
        return f"{folder / NAME} says that it is complete, which such a folder never is"
    if finished and (reason := foreign(folder)):
        return reason
    if not finished and about.get("name") != spelled(folder.name):
        return f"{folder / NAME} is of a folder with the name {quoted(about.get('name'))}"
    for name, _ in found:
        is_link = (folder / name).is_symlink() and about["files"].get(name) == -1
        if not is_link and not is_written_here(folder, name, complete=finished) and not is_empty(folder / name):
            return f"{quoted(name)} in it is nothing that this program writes there"
    return None


def is_begun(folder: Path) -> bool:
    """True for an empty folder, or one with the beginning of a manifest alone: the process was killed as it wrote that.

    Zeros are left of it if the machine stops. The manifest may name the folder that a temporary name stands for.
    """
    if folder.is_symlink():
        return False
    for path in folder.iterdir():
        if not (path.name == NAME or NEW.fullmatch(path.name)) or path.is_symlink() or not path.is_file():
            return False
        try:
            content = read_bytes(path, BEGUN_BYTES)
        except (OSError, ValueError):
            return False
        names = (folder.name, folder.name[1:].rpartition(".")[0])
        written = (as_text(**begun(name)).encode() for name in names)
        if content.strip(b"\0") and not any(text.startswith(content) for text in written):
            return False
    return True


def is_empty(path: Path) -> bool:
    """True for an empty folder."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def read(folder: Path) -> dict[str, Any]:
    """Content of a folder's manifest; raises ValueError if it has none, or not one of this format."""
    if (folder / NAME).is_symlink() or not (folder / NAME).is_file():
        raise ValueError(f"it was not written by this program, as it has no {NAME}")
    about = read_object(folder / NAME)
    if (
        not is_integer(about.get("format"), FORMAT)
        or not isinstance(about.get("files"), dict)
        or "complete" not in about
    ):
        raise ValueError(f"{folder / NAME} is no manifest of format {FORMAT}")
    return about


def is_ours(folder: Path) -> bool:
    """True if a folder has a complete manifest and nothing foreign."""
    return folder.is_dir() and not folder.is_symlink() and foreign(folder) is None


def remove(folder: Path) -> None:
    """Remove a folder, its manifest last: whenever the process is killed, what is left has one.

    So has one in which other threads still write. Raises OSError if it cannot be removed.
    """
    clear(folder)
    (folder / NAME).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        with contextlib.suppress(OSError):
            begin(folder)
        raise


def clear(folder: Path) -> None:
    """Remove everything in a folder but its manifest, which is written if it has none."""
    if not (folder / NAME).exists():
        with contextlib.suppress(OSError):  # a full disk has no room for it
            begin(folder)
    for path in folder.iterdir():
        if path.name == NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def refuse_links(folder: Path) -> None:
    """Raise ValueError if a folder of files holds a symbolic link, which would lead out of it.

    Folders inside are not looked into: no file of theirs is read, and a stranger may name any folder of this machine.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            refuse_link(Path(entry.path))


def refuse_link(path: Path) -> None:
    """Raise ValueError, naming the path, if it is a symbolic link."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; expected a file or folder that lies there itself")


def is_settled(path: Path) -> bool:
    """True if neither a path nor a file in it has changed for an hour: no process is writing it."""
    newest = max((file.lstat().st_mtime for file in [path, *below(path)]), default=0.0)
    return time.time() - newest > SETTLED
