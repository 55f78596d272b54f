"""Command `jaxmodels clean`: list and remove what killed runs of this program left behind."""

import argparse
import datetime
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxmodels.io import manifest, steps
from jaxmodels.io.atomic import TEMPORARY, TEMPORARY_FILE
from jaxmodels.io.bounded import read_object, sha256_of
from jaxmodels.process import programs
from jaxmodels.process.arguments import Parser
from jaxmodels.process.paths import DEEPEST, below, walk
from jaxmodels.process.streams import say
from jaxmodels.process.texts import shortened, visible

PROGRAM = "jaxmodels clean"
# A fixture's JSON that waits for its tensors, as `parity.golden.fixture` names it, and some of its fields.
PENDING = re.compile(r"\.(.+)\.json\.new")
FIXTURE = {"format", "sha256", "own values", "zero gradients", "torch"}
EXAMPLES = """\
examples:
  jaxmodels clean checkpoints/            # list, remove nothing
  jaxmodels clean checkpoints/ --delete

A process that is killed while it writes leaves a file or folder with a temporary name, a fixture's JSON without its
tensors, or a step of a training run without complete.json. A folder is listed if its manifest shows that this program
wrote all of it. What has changed within the last hour may be in use, and stays.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Arguments of the command."""
    arguments = Parser(
        prog=prog,
        description="List what killed runs left in a folder and in the folders inside, and remove it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("folder", type=Path, metavar="FOLDER", help="folder to search")
    arguments.add_argument("--delete", action="store_true", help="remove what is listed (default: only list it)")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code; `prog` is the command as typed."""
    options = parser(prog).parse_args(argv)
    return programs.run(lambda: clean(options.folder, delete=options.delete), prog)


def age_of(path: Path) -> datetime.timedelta:
    """Time since a path was changed, which a file may put anywhere: at most a million days."""
    days = (time.time() - path.lstat().st_mtime) / 86_400
    return datetime.timedelta(seconds=round(86_400 * max(-1e6, min(1e6, days))))


def clean(folder: Path, *, delete: bool) -> None:
    """Print the leftovers in a folder, and remove them if asked; raises ValueError if it is not a folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    total, count, young = 0, 0, 0
    for path in leftovers(folder):
        try:
            settled = manifest.is_settled(path)
            size, age = size_of(path), age_of(path)
            what = "" if settled else ", changed within the last hour: kept"
            print(f"{visible(str(path))}  {size:,} bytes, {age} old{what}")
            young += not settled
            if settled and delete:
                remove(path)
        except FileNotFoundError:  # a process that is not killed has renamed or removed it
            continue
        except PermissionError as error:  # of another user
            say(f"{path} is kept: {error.strerror}")
            continue
        if settled:
            count, total = count + 1, total + size
    if not count:
        print(f"{visible(str(folder))}: nothing to remove" + (f"; {young} may be in use" if young else ""))
    elif delete:
        print(f"removed {count}, {total:,} bytes")
    else:
        print(f"{count} to remove, {total:,} bytes: pass --delete")


def leftovers(folder: Path) -> Iterator[Path]:
    """Files and folders with temporary names, in a folder and those inside; symbolic links are not followed.

    Folders that are nested too deeply are left out, with a line on standard error.
    """
    deep: list[Path] = []
    for here, folders, files in walk(folder, deep.append):
        for name in sorted(folders):
            if TEMPORARY.fullmatch(name):
                folders.remove(name)
                if is_left(here / name):
                    yield here / name
            elif here.name == "checkpoints" and is_unfinished(here / name):
                folders.remove(name)
                yield here / name
        for name in sorted(files):
            if os.path.islink(here / name) or not os.path.isfile(here / name):  # False where nothing can be told
                continue
            if TEMPORARY_FILE.fullmatch(name) or is_pending(here / name):
                yield here / name
    if deep:
        more = f" and {len(deep) - 1:,} more" if len(deep) > 1 else ""
        first = shortened(str(deep[0]), 400)
        say(f"{folder}: more than {DEEPEST} folders inside each other are not searched: {first}{more}")


def is_left(folder: Path) -> bool:
    """True for a folder with a temporary name if nothing but what this program wrote is in it.

    False if it cannot be read, as one of another user in /tmp, or if its writer renames or removes it just now.
    """
    try:
        return manifest.is_begun(folder) or manifest.unproven(folder, complete=True) is None
    except OSError:
        return False


def is_pending(file: Path) -> bool:
    """True for a fixture's JSON whose tensors were not written; with them, the next reader gives it its name."""
    match = PENDING.fullmatch(file.name)
    if match is None:
        return False
    tensors = file.with_name(f"{match[1]}.safetensors")
    try:
        about = read_object(file)
        return about.keys() >= FIXTURE and not (tensors.exists() and sha256_of(tensors) == about["sha256"])
    except (OSError, ValueError):
        return False


def is_unfinished(folder: Path) -> bool:
    """True for a step of a training run that was killed while it saved."""
    try:
        ours = steps.is_step(folder) and (folder / manifest.NAME).is_file() and steps.foreign(folder) is None
    except (OSError, ValueError):  # as its folders are nested deeper than any that this program writes
        return False
    return ours and not (folder / steps.MARK).exists()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in below(path) if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def remove(path: Path) -> None:
    """Remove a file or folder."""
    if path.is_dir():
        manifest.remove(path)
    else:
        path.unlink()
