"""Limits of what the files of one checkpoint ask for together, in proportion to their sizes.

A file of a few bytes can stand for gigabytes, and ask for hours: a thousand tensors may share one storage, a thousand
names may be links to one file, and each file may have the largest structure that is read.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from jaxmodels.weights.pickles import MOST, check_pickle

# Tensors may have twice the bytes of the files: a tied readout is stored once, and a view of a fused matrix with it.
SHARED = 2
REPEATED_BYTES = 2**28  # more: masks that repeat their values or share them; 44 layers of 2,048 tokens have 185 MB
# Bytes of the files for each value of a structure beyond MOST. Published shards have thousands for each of theirs.
VALUE_BYTES = 1_000


class Allowance:
    """Counts of the bytes of tensors, and of the values in structures, that the files of a checkpoint may have.

    files: all that will be read; one that is there by several names counts once, and one that is missing is not judged.
    """

    def __init__(self, files: Iterable[Path]):
        held = dict(found for file in files if (found := place_and_size(file)) is not None)
        self.stored, self.tensors, self.values = sum(held.values()), 0, 0

    def add_structure(self, content: BinaryIO) -> None:
        """Check the pickle at a file's position, where the file stays, and count its values; see `check_pickle`."""
        position = content.tell()
        self.values = check_pickle(content, MOST + self.stored // VALUE_BYTES, self.values)
        content.seek(position)

    def add_tensors(self, file: Path, tensors: Iterable[Any]) -> None:
        """Count the bytes of a file's dense tensors of PyTorch; raises ValueError, naming the file, for too many."""
        before, most = self.tensors, SHARED * self.stored + REPEATED_BYTES
        self.tensors += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self.tensors > most:
            together = ", with the files before it" if before else ""
            raise ValueError(
                f"{file} has tensors of {self.tensors:,} bytes{together}, in {self.stored:,} bytes of files: they "
                f"repeat or share their values; at most {most:,} are read: save contiguous copies"
            )


def place_and_size(file: Path) -> tuple[tuple[int, int], int] | None:
    """Device and number of a file on it, by which links are told apart, and its bytes; None if it is missing."""
    try:
        about = os.stat(file)
    except OSError:
        return None
    return (about.st_dev, about.st_ino), about.st_size


def check_distinct(files: Iterable[Path]) -> None:
    """Raise ValueError, naming both, if two files of a checkpoint are one: links to it, or hard links."""
    seen: dict[tuple[int, int], Path] = {}
    for file in files:
        found = place_and_size(file)
        if found is not None and seen.setdefault(found[0], file) is not file:
            raise ValueError(f"{file} and {seen[found[0]].name} are the same file; expected one for each name")
