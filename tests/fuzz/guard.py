"""Watch of what a reader does besides reading: writes, removals, processes, connections.

Python's audit events report what Python code does; a listing of the folders shows what compiled code changed.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmodels.process import confined

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
CHANGES |= {"os.chmod", "os.chown", "os.utime", "os.mkfifo", "shutil.move", "shutil.copyfile"}
RELATIVE = {"os.remove", "os.rmdir"}  # to a folder that is open, if there is a second argument
TO = {"shutil.copyfile", "os.link", "os.symlink"}  # what is changed is their second argument
RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.startfile"}
CONNECTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "http.client.connect"}
HARMLESS = ("/dev/null", "/dev/tty")


class Guard:
    """Records forbidden events while it is active; `allowed` are folders to write in, except for `kept` inside."""

    def __init__(self) -> None:
        self.active = False
        self.allowed: tuple[Path, ...] = ()
        self.kept: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Audit hook; never raises."""
        if not self.active:
            return
        if event == "subprocess.Popen" and list(arguments[1]) == [sys.executable, "-P", "-m", confined.__name__]:
            return  # for tokenizers, templates and names of arrays of others: nothing in it is named by a file
        if event in RUNS or event in CONNECTS:
            self.seen.append(f"{event} {arguments!r}"[:300])
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & WRITING:
                self.check(event, path)
        elif event in CHANGES:
            paths = arguments[1:2] if event in TO else arguments[:2]
            inside = next((fd for fd in arguments[1:] if type(fd) is int and fd >= 0 and event in RELATIVE), None)
            for path in paths:
                if isinstance(path, str | bytes | os.PathLike):
                    self.check(event, path if inside is None else f"/proc/self/fd/{inside}/{os.fsdecode(path)}")

    def check(self, event: str, path: Any) -> None:
        """Record a change of a path, unless it is allowed."""
        text = os.fsdecode(path)
        with contextlib.suppress(OSError, ValueError):
            text = os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
        inside = any(is_in(text, folder) for folder in self.allowed)
        if (not inside or (self.kept is not None and is_in(text, self.kept))) and not text.startswith(HARMLESS):
            self.seen.append(f"{event} {text!r}"[:300])

    @contextlib.contextmanager
    def watching(self, *allowed: Path, kept: Path | None = None) -> Iterator[list[str]]:
        """Context with the list of forbidden events."""
        self.kept = None if kept is None else Path(os.path.realpath(kept))
        self.seen, self.allowed = [], tuple(Path(os.path.realpath(path)) for path in allowed)
        self.active = True
        try:
            yield self.seen
        finally:
            self.active = False


def is_in(path: str, folder: Path) -> bool:
    """True for a folder and what is in it."""
    return path == str(folder) or path.startswith(f"{folder}/")


def listing(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Kind, size and time of every entry of a folder; links are not followed."""
    found: dict[str, tuple[Any, ...]] = {}
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = os.path.join(path, name)
            about = os.lstat(entry)
            size = about.st_size if name in files else 0
            found[os.path.relpath(entry, folder)] = (about.st_mode, size, about.st_mtime_ns if name in files else 0)
    return found


def differing(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> list[str]:
    """Entries that two listings do not share."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
