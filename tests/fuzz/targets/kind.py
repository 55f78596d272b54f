"""`Target`: a small valid example of a kind of file that others may have made, and its reader."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0


@dataclasses.dataclass(frozen=True)
class Target:
    """make: write the example to a folder. read: read all of it. files: pattern of the files to change.

    seal: write the checksums of changed files anew, so that a reader goes on. changes: `read` may change the folder.
    build: write another example to a folder, which is read instead of a changed one.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: str = "*"
    seal: Callable[[Path], None] | None = None
    changes: bool = False
    build: Callable[[Path, np.random.Generator], None] | None = None


def commands(*lines: Sequence[str]) -> Callable[[Path], list[int]]:
    """Reader that runs commands of `jaxmodels` in this process, and returns their exit codes.

    SUBJECT, BESIDE and OUT stand for the folder that is read, the example beside it, and one to write to.
    """

    def read(folder: Path) -> list[int]:
        from jaxmodels.command import main

        places = {"SUBJECT": folder, "BESIDE": folder.with_name("beside") / "folder", "OUT": folder.with_name("out")}
        codes = []
        for line in lines:
            argv = [str(places[word]) if word in places else word.replace("OUT/", f"{places['OUT']}/") for word in line]
            code = main(argv)
            if code not in (0, 1, 2):
                raise AssertionError(f"{' '.join(line)} exits with code {code}")
            codes.append(code)
        return codes

    return read
