"""Ids of a text on disk while they are made, so that work that was killed continues where it was.

FOLDER/train.npy, validation.npy                  ids [n]
FOLDER/train_documents.npy, validation_…          where each document begins, and the end: int64 [D + 1]
FOLDER/progress.json                              how many of them count, and where reading goes on
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxmodels.io import manifest
from jaxmodels.io.atomic import TEMPORARY_FILE, atomic_file
from jaxmodels.io.bounded import exclusive, open_in_place, read_object
from jaxmodels.io.formats.npy import map_array
from jaxmodels.process.failures import naming
from jaxmodels.process.streams import say
from jaxmodels.text.documents import Place, Source
from jaxmodels.text.encoding import Unknown, encode
from jaxmodels.text.pieces import BEGINNING, pieces
from jaxmodels.text.sources import Sources
from jaxmodels.text.vocabularies import Vocabulary

PARTS = ("train", "validation")
HEADER = 128  # bytes of a .npy file with one axis of any length
SAVE_EVERY = 5.0  # seconds
COPIED = 2**22  # ids that are copied at once
LOCK, PROGRESS = "lock", "progress.json"
Report = Callable[[int, int, str], None]  # with bytes that are read, of how many, and a sentence


class Growing:
    """A .npy file of one axis that grows; its header is right once it is closed.

    length: number of items to keep of those that are there.
    """

    def __init__(self, file: Path, dtype: Any, length: int = 0):
        self.file, self.dtype, self.length = file, np.dtype(dtype), length
        self.opened: BinaryIO = io.BufferedRandom(open_in_place(file))
        end = HEADER + length * self.dtype.itemsize
        with naming(file):
            if not length:
                self.opened.truncate(0)
            self.write_header(0)
            assert self.opened.tell() == HEADER
            self.opened.truncate(end)
            self.opened.seek(end)

    def write_header(self, length: int) -> None:
        # Headers have room for a larger length, so that all of them are equally long.
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self.opened, about)

    def append(self, items: np.ndarray) -> None:
        with naming(self.file):
            self.opened.write(np.ascontiguousarray(items, self.dtype).data)
        self.length += len(items)

    def flush(self) -> None:
        with naming(self.file):
            self.opened.flush()
            os.fsync(self.opened.fileno())

    def close(self) -> None:
        with naming(self.file):
            self.opened.seek(0)
            self.write_header(self.length)
            self.opened.close()


@dataclasses.dataclass
class State:
    """Part of a folder that counts. part: index of the source that is read; lengths: ids and documents of each part."""

    key: str
    part: int = 0
    place: Place = BEGINNING
    lengths: list[list[int]] = dataclasses.field(default_factory=lambda: [[0, 0] for _ in PARTS])
    unknown: Unknown = dataclasses.field(default_factory=Unknown)

    def save(self, folder: Path) -> None:
        content: dict[str, Any] = {
            **{name: getattr(self, name) for name in ("key", "part", "place", "lengths")},
            "unknown": [self.unknown.count, self.unknown.examples],
        }
        content["sha256"] = checksum(content)
        with atomic_file(folder / PROGRESS) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, key: str, dtype: Any) -> "State":
        """State of a folder; a new one if it has none, a damaged one, one of other work, or fewer ids than it says."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            found = read_object(folder / PROGRESS)
            if found.pop("sha256") != checksum(found):
                return cls(key)
            count, examples = found["unknown"]
            unknown = Unknown(count, Counter(examples))
            state = cls(found["key"], found["part"], Place(*found["place"]), found["lengths"], unknown)
            if (
                state.key == key
                and state.is_whole()
                and all(state.is_there(folder, part, dtype) for part in range(len(PARTS)))
            ):
                return state
        return cls(key)

    def is_whole(self) -> bool:
        """True if all of its numbers are ones: True and 1.0 are equal to 1 in Python."""
        numbers = [self.part, *self.place, self.unknown.count, *(n for pair in self.lengths for n in pair)]
        return all(type(number) is int and 0 <= number < 2**63 for number in numbers) and self.part <= len(PARTS)

    def is_there(self, folder: Path, part: int, dtype: Any) -> bool:
        """True if the files of a part hold as many items as they should."""
        return all(
            not length or file.stat().st_size >= HEADER + length * np.dtype(kind).itemsize
            for file, kind, length in zip(files_of(folder, part), (dtype, np.int64), self.lengths[part], strict=True)
        )


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_of(folder: Path, part: int) -> tuple[Path, Path]:
    """Files of a part's ids and documents."""
    return folder / f"{PARTS[part]}.npy", folder / f"{PARTS[part]}_documents.npy"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which no other process works in a folder, which is made if it does not exist.

    Raises ValueError if another one does, or if the folder is or holds a symbolic link or a file of others: it is
    removed in the end. Raises ValueError too if the file of the lock is none, or has another name elsewhere.
    """
    manifest.refuse_link(folder)
    manifest.refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = {LOCK, PROGRESS, manifest.NAME, *(file.name for part in range(len(PARTS)) for file in files_of(folder, part))}
    other = [path for path in folder.iterdir() if path.name not in own and not TEMPORARY_FILE.fullmatch(path.name)]
    if other:
        raise ValueError(f"{other[0]} was not written by this program: move it, or choose another folder to write")
    if manifest.unproven(folder) is not None:  # before any other file, so that `jaxmodels clean` lists what is left
        try:
            manifest.begin(folder)
        except OSError:
            with contextlib.suppress(OSError):  # not empty: ids that were made are kept
                folder.rmdir()
            raise
    with exclusive(folder / LOCK):
        yield


def fill(
    folder: Path,
    sources: Sources,
    vocabulary: Vocabulary,
    end: np.ndarray,
    *,
    key: str,
    report: Report = lambda read, total, about: None,
) -> Unknown:
    """Write the ids of sources into a folder, continuing what is there of the same key; returns unknown tokens.

    end: ids that follow each document, if there are several. Raises ValueError for bad texts.
    """
    dtype = np.min_scalar_type(len(vocabulary) - 1)
    state = State.load(folder, key, dtype)
    if state.part or any(ids for ids, _ in state.lengths):
        done = sum(ids for ids, _ in state.lengths)
        say(f"{sources.train.name}: continues after {done:,} tokens of an interrupted process")
    for part, source in enumerate(sources.both):
        if state.part > part:
            continue
        (ids, documents), lengths = files_of(folder, part), state.lengths[part]
        files = Growing(ids, dtype, lengths[0]), Growing(documents, np.int64, lengths[1])
        if not lengths[1]:
            files[1].append(np.zeros(1, np.int64))
        with naming(ids), files[0].opened, files[1].opened:
            read_part(folder, source, vocabulary, end if source.many else end[:0], state, files, report)
            for file in files:
                file.close()
        state.part, state.place = part + 1, BEGINNING
        state.save(folder)
    if sources.validation is None:
        split_documents(folder, dtype, state.lengths[0])
    return state.unknown


def read_part(
    folder: Path,
    source: Source,
    vocabulary: Vocabulary,
    end: np.ndarray,
    state: State,
    files: tuple[Growing, Growing],
    report: Report,
) -> None:
    """Encode a source from the state's place on, and save the state every few seconds and when interrupted."""
    ids, documents = files
    before = [0, *np.cumsum(source.sizes()).tolist()]
    saved = time.monotonic()

    def save() -> None:
        for file in files:
            file.flush()
        state.save(folder)

    try:
        for batch in encode(vocabulary, pieces(source, vocabulary.cuts, state.place), end, state.unknown):
            documents.append(batch.ends + ids.length)
            ids.append(batch.ids)
            state.place, state.lengths[state.part] = batch.place, [ids.length, documents.length]
            report(min(before[batch.place.file] + batch.place.offset, before[-1]), before[-1], f"{ids.length:,} tokens")
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
    except BaseException:
        with contextlib.suppress(OSError):
            save()
        raise


def split_documents(folder: Path, dtype: Any, lengths: Sequence[int]) -> None:
    """Move the last tenth of the ids to the validation part: whole documents, if there are several.

    lengths: number of ids and of entries of documents.
    """
    for file, kind, length in zip(files_of(folder, 0), (dtype, np.int64), lengths, strict=True):
        Growing(file, kind, length).close()  # its header, if a process was killed while it made the file shorter
    starts = map_array(folder / "train_documents.npy")
    total = int(starts[-1])
    first = min(int(np.searchsorted(starts, int(0.9 * total))), max(1, len(starts) - 2))
    cut = int(starts[first]) if len(starts) > 2 else int(0.9 * total)
    ids = map_array(folder / "train.npy")
    tail = Growing(folder / "validation.npy", dtype)
    for at in range(cut, total, COPIED):
        tail.append(ids[at : at + COPIED])
    tail.close()
    later = Growing(folder / "validation_documents.npy", np.int64)
    later.append(np.asarray(starts[first:]) - cut if len(starts) > 2 else np.asarray([0, total - cut]))
    later.close()
    shorter = Growing(folder / "train.npy", dtype, cut)
    shorter.close()
    kept = first + 1 if len(starts) > 2 else 1
    documents = Growing(folder / "train_documents.npy", np.int64, kept)
    if len(starts) == 2:
        documents.append(np.asarray([cut]))
    documents.close()
