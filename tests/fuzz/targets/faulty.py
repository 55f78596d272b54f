"""Readers that do on purpose what the fuzzers have to find; they are not among the targets of a run."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.mutations.values import CANARY
from tests.fuzz.targets.kind import Target


def make(folder: Path) -> None:
    (folder / "text.txt").write_text("to be or not to be\n" * 3)


def raises(folder: Path) -> None:
    raise KeyError("text.txt")


def names_no_file(folder: Path) -> None:
    raise ValueError("something is wrong")


def panics(folder: Path) -> None:
    class PanicException(BaseException):
        """As Rust's, which is no Exception."""

    raise PanicException("text.txt")


def prints(folder: Path) -> None:
    print("\x1b[2J")


def writes(folder: Path) -> None:
    (folder / "new.txt").write_text("new")


def writes_beside(folder: Path) -> None:
    (folder.with_name("beside") / "secret.txt").unlink()


def removes_canary(folder: Path) -> None:
    CANARY.unlink()


def runs(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", ""], check=False)


def swells(folder: Path) -> None:
    sys.getsizeof(b"\x01" * 1_100_000_000)


def hangs(folder: Path) -> None:
    time.sleep(1000)


def crashes(folder: Path) -> None:
    os.abort()


READERS = (raises, names_no_file, panics, prints, writes, writes_beside, removes_canary, runs)
READERS += (swells, hangs, crashes)
TARGETS = {reader.__name__: Target(reader.__name__, make, reader) for reader in READERS}
