"""Sources that `--text` names, to train on and to validate on: a corpus, a file, or a folder of documents."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.io.allowance import check_distinct
from jaxmodels.io.bounded import read_object
from jaxmodels.process.paths import below, is_plain
from jaxmodels.process.texts import quoted
from jaxmodels.text.corpora import load_corpus
from jaxmodels.text.documents import KINDS, Files, Source, Text, TextFile, file_identity, kind_of
from jaxmodels.text.vocabularies import CharVocabulary, code_points

DATASETS, DATASET = "dataset_dict.json", "state.json"  # what `datasets.save_to_disk` writes beside several, and one
CORPORA = ("python_docs", "tiny_shakespeare")
TRAINING, VALIDATION, TEST = "train", "validation", "test"
SPLITS = {
    **dict.fromkeys(("train", "training"), TRAINING),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
WHOLE = 2**22  # bytes of a text that is not read in pieces
SPLIT_NAME = re.compile(rf"(?<![A-Za-z])({'|'.join(SPLITS)})(?![A-Za-z])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Sources:
    """A text to train on, and one to validate on: None if that is the last tenth of the documents.

    notes: sentences to print about the text. found: identity of each file when it was opened.
    """

    train: Source
    validation: Source | None
    notes: tuple[str, ...] = ()
    found: Mapping[Path, list[Any]] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = {file: file_identity(file) for source in self.both for file in source.paths}
        object.__setattr__(self, "found", found)

    @property
    def both(self) -> list[Source]:
        return [self.train, *([self.validation] if self.validation is not None else [])]

    def check_unchanged(self) -> None:
        """Raise ValueError, naming the file, if one has changed since it was opened, or OSError if it is gone."""
        for file, before in self.found.items():
            if file_identity(file) != before:
                raise ValueError(f"{file} has changed while it was encoded: encode it again once nothing writes to it")


@dataclasses.dataclass(frozen=True)
class Census:
    """Numbers of a text's characters by code point, and of its ends of lines."""

    characters: np.ndarray
    line_ends: dict[str, int]

    @property
    def vocabulary(self) -> CharVocabulary:
        """Vocabulary of the characters, sorted."""
        return CharVocabulary("".join(map(chr, np.flatnonzero(self.characters).tolist())))

    def unknown(self, vocabulary: CharVocabulary) -> dict[str, int]:
        """Characters that a vocabulary lacks, and how often they are in the text."""
        missing = self.characters.copy()
        missing[code_points(vocabulary.characters)] = 0
        return {chr(c): int(missing[c]) for c in np.flatnonzero(missing).tolist()}


class Counter:
    """Counts a text's characters and ends of lines, chunk by chunk."""

    def __init__(self) -> None:
        self.seen = np.zeros(0x110000, np.int64)
        self.ends = {"LF": 0, "CRLF": 0, "CR": 0}
        self.length, self.carriage = 0, False

    def add(self, chunk: str, *, characters: bool) -> None:
        """Count a chunk; its characters one by one only if asked, as that takes longer."""
        both = chunk.count("\r\n")
        split = self.carriage and chunk.startswith("\n")  # a CRLF over two chunks
        self.ends["CRLF"] += both + split
        self.ends["CR"] += chunk.count("\r") - both - split
        self.ends["LF"] += chunk.count("\n") - both - split
        self.carriage = chunk.endswith("\r")
        self.length += len(chunk)
        if characters:
            np.add.at(self.seen, code_points(chunk), 1)  # bincount would count up to a million points for each chunk

    @property
    def census(self) -> Census:
        return Census(self.seen, self.ends)

    def notes(self, name: str) -> list[str]:
        """Sentence on ends of lines other than LF, which are kept."""
        if not self.ends["CRLF"] and not self.ends["CR"]:
            return []
        found = ", ".join(f"{n:,} {kind}" for kind, n in self.ends.items() if n)
        mixed = sum(n > 0 for n in self.ends.values()) > 1
        return [f"{name} has {'different ends of lines' if mixed else 'ends of lines'}: {found}; they are kept"]


def open_sources(text: str, field: str = "text") -> Sources:
    """Sources of a corpus by name, a UTF-8 file, a JSONL, Arrow or Parquet file, or a folder of such files.

    A single text is split at 90 % of its characters, which takes one pass over it. Raises ValueError if it is none of
    these, empty, or not UTF-8.
    """
    if not text:
        raise ValueError(f"text='' must be {', '.join(CORPORA)}, a file, or a folder; . is the current folder")
    path = Path(text)
    if text in CORPORA:
        content = load_corpus(text)
        cut = int(0.9 * len(content))
        return Sources(Text(text, content[:cut]), Text(text, content[cut:]))
    if path.is_dir():
        return with_text(of_folder(path, field))
    if kind_of(path) != "text":
        return with_text(Sources(Files(text, (path,), field), None))
    return split_file(path, text)


def with_text(sources: Sources) -> Sources:
    """Sources of documents as they are; raises ValueError if none to train on has a text."""
    if not any(sources.train.chunks()):
        raise ValueError(f"text={sources.train.name!r} has no documents to train on, or none with a text")
    return sources


def is_tokens(text: str) -> bool:
    """True for a folder that `jaxmodels tokenize` wrote, which has a vocabulary of its own."""
    return bool(text) and (Path(text) / "tokens.json").exists()


def names_documents(text: str) -> bool:
    """True for the name of a JSONL, Arrow or Parquet file, or of a folder that may have such files."""
    path = Path(text)
    if text in CORPORA:
        return False
    return not is_tokens(text) if path.is_dir() else kind_of(path) != "text"


def open_text(text: str) -> str | TextFile:
    """Text of a corpus by name or of a UTF-8 file; of one above WHOLE bytes a source, which is read in pieces.

    Raises ValueError if the name is neither.
    """
    path = Path(text)
    if text in CORPORA or not path.is_file() or path.stat().st_size <= WHOLE:
        return load_corpus(text)
    return TextFile(path)


def split_file(file: Path, text: str) -> Sources:
    """Two parts of a text file: the first int(0.9·n) characters, and the rest."""
    counter, places = Counter(), []
    try:
        whole = Sources(TextFile(file), None)
        (document,) = whole.train.documents()
        at, end = document.offset, document.offset
        for chunk in document.chunks:
            places.append((counter.length, end))
            counter.add(chunk, characters=False)
            end += len(chunk.encode())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text={text!r} must be {', '.join(CORPORA)}, a readable UTF-8, JSONL, Arrow or Parquet file, or a folder "
            f"of such files: {error}"
        ) from None
    if not counter.length:
        raise ValueError(f"text={text!r} is an empty file")
    cut = int(0.9 * counter.length)
    first, place = places[max(i for i, (length, _) in enumerate(places) if length <= cut)]
    chunk = "".join(itertools.islice(TextFile(file).read(place), 2))
    middle = place + len(chunk[: cut - first].encode())
    notes = counter.notes(text)
    if at:
        notes.insert(0, f"{text} begins with a byte order mark, which is left out")
    whole.check_unchanged()
    return Sources(TextFile(file, at, middle), TextFile(file, middle, end), tuple(notes))


def of_folder(folder: Path, field: str) -> Sources:
    """Sources of a folder of `datasets.save_to_disk`, or of JSONL, Arrow, Parquet and .txt files.

    Files whose path names validation data are validated on; those of test data are left out.
    """
    found: dict[str, list[Path]] = {TRAINING: [], VALIDATION: [], TEST: []}
    files, others = files_of(folder)
    files.sort()
    check_distinct(files)
    for file in files:
        named = SPLIT_NAME.findall(str(file.relative_to(folder)))
        found[SPLITS[named[-1].lower()] if named else TRAINING].append(file)
    if not found[TRAINING]:
        raise ValueError(
            f"text={str(folder)!r} has no {', '.join(sorted(KINDS))} files to train on, and is not a folder written by "
            "train.tokenize"
        )
    train, validation = (
        Files(str(folder), tuple(found[split]), field) if found[split] else None for split in (TRAINING, VALIDATION)
    )
    assert train is not None
    notes = [f"{folder}: files of test data are left out: {len(found[TEST])}"] if found[TEST] else []
    if others:
        notes.append(f"{folder}: files of other kinds are left out: {len(others)}, such as {others[0].name}")
    return Sources(train, validation, tuple(notes))


def files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of documents in a folder, and files of other kinds that are left out.

    Of a folder of `datasets.save_to_disk`, also of one inside, the files are those that it names: others beside them
    are caches, or left by an earlier save. Raises ValueError if it is damaged, or if a file is no regular one.
    """
    if is_saved(folder):
        return dataset_files(folder), []
    visible = list(visible_below(folder))
    saved = {file.parent for file in visible if file.name in (DATASETS, DATASET)}
    outside = [file for file in visible if saved.isdisjoint(file.parents)]
    found = [file for file in outside if file.suffix.lower() in KINDS]
    for file in found:
        if not file.is_file():
            what = "a link to a file that is missing" if file.is_symlink() else "no regular file"
            raise ValueError(f"{file} is {what}: complete or remove it; texts are not left out without a word")
    outermost = (dataset for dataset in saved if saved.isdisjoint(dataset.parents))
    named = [file for dataset in outermost for file in dataset_files(dataset)]
    return found + named, [file for file in outside if file.suffix.lower() not in KINDS]


def is_saved(folder: Path) -> bool:
    """True for a folder of `datasets.save_to_disk`."""
    return any((folder / name).is_file() for name in (DATASETS, DATASET))


def dataset_files(folder: Path) -> list[Path]:
    """Files of a folder of `datasets.save_to_disk`, with one dataset or with several splits."""
    if not (folder / DATASETS).is_file():
        return saved_files(folder / DATASET)
    splits = read_object(folder / DATASETS).get("splits")
    named = isinstance(splits, list) and all(isinstance(name, str) and is_plain(name) for name in splits)
    if not isinstance(splits, list) or not named or len(set(splits)) < len(splits):
        raise ValueError(f"{folder / DATASETS} has splits={quoted(splits)}, must be names of folders, each once")
    return [file for name in splits for file in saved_files(folder / name / DATASET)]


def visible_below(folder: Path) -> Iterator[Path]:
    """Files in a folder and those inside, but for hidden ones; raises ValueError for a link to a folder."""
    for file in below(folder):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.is_dir():
            if file.is_symlink():
                raise ValueError(f"{file} is a link to a folder, which is not followed: replace it by the folder")
            continue
        yield file


def saved_files(state: Path) -> list[Path]:
    """Arrow files of a dataset that `datasets` saved; raises ValueError if the file names none."""
    about = read_object(state)
    files = about.get("_data_files")
    listed = files if isinstance(files, list) else []
    names = [str(each.get("filename", "")) if isinstance(each, dict) else "" for each in listed]
    if not names or not all(map(is_plain, names)) or len(set(names)) < len(names):
        raise ValueError(f"{state} has _data_files={quoted(files)}, must name the Arrow files beside it, each once")
    if about.get("_indices_data_files"):
        raise ValueError(
            f"{state} has _indices_data_files, which are not read; save the dataset after flatten_indices()"
        )
    return [state.with_name(name) for name in names]


def count(sources: Sources) -> Census:
    """Count the characters of both texts."""
    counter = Counter()
    for source in sources.both:
        for chunk in source.chunks():
            counter.add(chunk, characters=True)
    return counter.census
