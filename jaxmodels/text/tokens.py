"""Texts as token ids, memory-mapped: encoded to a folder once, or to a temporary file.

TOKENS/tokens.json                {"format": 2, "train": …, "validation": …, "sha256": …}
TOKENS/vocabulary.json            characters, bytes or the whole tokenizer; read by `load_vocabulary`
TOKENS/train.npy, validation.npy  ids [n], the first 90 % of the text and the rest, in the smallest unsigned integer

Of a source of several documents, tokens.json has "documents": {"train": D, "validation": D}, and there are
TOKENS/train_documents.npy, …     where each document begins, and the end: int64 [D + 1]
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxmodels.io import manifest
from jaxmodels.io.atomic import atomic_folder, check_target, raise_named, recover, temporary_folder, unique
from jaxmodels.io.bounded import check_format, is_integer, read_object
from jaxmodels.io.formats.npy import map_array
from jaxmodels.process.paths import resolved
from jaxmodels.process.progress import progress
from jaxmodels.process.texts import quoted, visible
from jaxmodels.text.corpora import split
from jaxmodels.text.documents import Source, Text
from jaxmodels.text.encoding import SEPARATOR, SHOWN, Unknown, encode
from jaxmodels.text.partial import PARTS, Growing, files_of, fill, locked
from jaxmodels.text.pieces import pieces
from jaxmodels.text.sources import Sources, count, is_tokens, open_sources
from jaxmodels.text.tokenizer.files import TokenizerFile, load_vocabulary
from jaxmodels.text.vocabularies import ByteVocabulary, CharVocabulary, Vocabulary, utf8

FORMAT = 2
TEMPORARY = "jaxmodels-tokens"  # name of folders of a text that is encoded to be used at once
HASHED = 2**20  # ids that are hashed at once
CONTEXT = 64  # ids before others that may decide how these are decoded


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text as ids [n], in memory or memory-mapped, in two parts; sha256 is of the ids and the vocabulary.

    *_documents: where each document begins, and the end, int64 [D + 1]; None if the text is one document. notes:
    sentences to print about the text.
    """

    train: np.ndarray
    validation: np.ndarray
    vocabulary: Vocabulary
    sha256: str
    train_documents: np.ndarray | None = None
    validation_documents: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @property
    def documents(self) -> dict[str, int] | None:
        """Numbers of documents; None if the text is one."""
        if self.train_documents is None or self.validation_documents is None:
            return None
        return {"train": len(self.train_documents) - 1, "validation": len(self.validation_documents) - 1}


def open_tokens(text: str, vocabulary: Vocabulary | None = None, field: str = "text") -> Tokens:
    """Open a corpus by name, a file or folder of documents, or a folder written by this command.

    A text is encoded to a temporary file, which is memory-mapped. vocabulary: default the characters of a text; the ids
    of a folder must be of the same tokens. field: name of the texts in JSONL, Arrow and Parquet files. Raises
    ValueError if the text is none of these, or if the vocabularies differ.
    """
    recover(Path(text))
    if is_tokens(text):
        tokens = read(Path(text))
        if vocabulary is not None and not tokens.vocabulary.same_tokens(vocabulary):
            theirs, ours = (f"{len(each):,} {each.unit}s" for each in (tokens.vocabulary, vocabulary))
            raise ValueError(
                f"text={text!r} was encoded with another vocabulary, of {theirs}, than that of the model, of {ours}; "
                "name the text itself, or encode it again with the model's tokenizer"
            )
        return tokens
    sources = open_sources(text, field)
    vocabulary = vocabulary_of(sources, vocabulary or "chars")
    with temporary_folder(TEMPORARY) as folder:  # mapped files stay without their names
        return encode_to(folder, sources, vocabulary, end_ids(vocabulary, sources))


def encode_whole(text: str | Source, vocabulary: Vocabulary, begin: Sequence[int] = ()) -> np.ndarray:
    """Ids of all of a text, after those of `begin`: int32 [n], or memory-mapped if the text is a source of pieces.

    Raises ValueError if the vocabulary cannot encode it.
    """
    if isinstance(text, str):
        return np.concatenate([np.asarray(begin, np.int32), vocabulary.encode(text)])
    sources = Sources(text, None)
    if isinstance(vocabulary, CharVocabulary):
        vocabulary.refuse(count(sources).unknown(vocabulary))
    size = sum(text.sizes())
    with (
        temporary_folder(TEMPORARY) as folder,  # a mapped file stays without its name
        progress(f"encoding {visible(text.name)}") as report,
    ):
        file = folder / "ids.npy"
        growing = Growing(file, np.min_scalar_type(max(len(vocabulary) - 1, *begin, 0)))
        growing.append(np.asarray(begin, np.int32))
        for batch in encode(vocabulary, pieces(text, vocabulary.cuts), np.zeros(0, np.int32), Unknown()):
            growing.append(batch.ids)
            report(min(batch.place.offset, size), size, f"{growing.length:,} tokens")
        growing.close()
        sources.check_unchanged()
        return map_array(file)


def decoded_size(vocabulary: Vocabulary, parts: Iterable[np.ndarray]) -> tuple[int, int]:
    """Number of characters and UTF-8 bytes of the text that ids stand for, which come in parts of any length."""
    before, sizes = np.zeros(0, np.int32), [0, 0]
    for ids in parts:
        # What lies before a part decides how it is decoded: the rest of a character, or the beginning of the text.
        for sign, some in ((1, np.concatenate([before, ids])), (-1, before)):
            text = vocabulary.decode(some) if len(some) else ""
            sizes = [sizes[0] + sign * len(text), sizes[1] + sign * len(utf8(text))]
        before = np.concatenate([before, ids])[-CONTEXT:]
    return sizes[0], sizes[1]


def vocabulary_of(sources: Sources, kind: str | Vocabulary) -> Vocabulary:
    """Vocabulary for a text: of its characters, or of bytes, or the given one.

    Raises ValueError if the text has characters that a given one of characters lacks.
    """
    if isinstance(kind, CharVocabulary):
        kind.refuse(count(sources).unknown(kind))
    if isinstance(kind, Vocabulary):
        return kind
    if kind == "bytes":
        return ByteVocabulary()
    found = count(sources).vocabulary
    return CharVocabulary.of(found.characters + SEPARATOR) if sources.train.many else found


def end_ids(vocabulary: Vocabulary, sources: Sources, end_token: str | None = None) -> np.ndarray:
    """Ids that follow each document: the end token, or an empty line; none if the text is one document.

    Raises ValueError if a tokenizer has no end token, or one that is no token of it, or not the given one.
    """
    if end_token is not None:
        token = vocabulary.tokenizer.token_to_id(end_token) if isinstance(vocabulary, TokenizerFile) else None
        if token is None:
            raise ValueError(f"--end-token {quoted(end_token)} is not a token of the vocabulary")
        return np.asarray([token], np.int32)
    if not sources.train.many:
        return np.zeros(0, np.int32)
    if not isinstance(vocabulary, TokenizerFile):
        return vocabulary.encode(SEPARATOR)
    if not vocabulary.eos:
        raise ValueError(
            "the tokenizer's files name no end token, which separates documents; name it with jaxmodels tokenize "
            "--end-token TOKEN"
        )
    end = vocabulary.eos[0]
    if end >= len(vocabulary):
        raise ValueError(
            f"{vocabulary.name}: the files beside it name the end token {end}, beyond its {len(vocabulary):,} tokens; "
            "name one with jaxmodels tokenize --end-token TOKEN"
        )
    return np.asarray([end], np.int32)


def encode_to(folder: Path, sources: Sources, vocabulary: Vocabulary, end: np.ndarray) -> Tokens:
    """Encode sources into a folder, continuing what an interrupted process left there; the ids are memory-mapped.

    Raises ValueError for bad texts, and if a file has changed meanwhile.
    """
    key = hashlib.sha256(json.dumps(key_of(sources, vocabulary, end)).encode()).hexdigest()
    with progress(f"encoding {visible(sources.train.name)}") as report:
        unknown = fill(folder, sources, vocabulary, end, key=key, report=report)
    sources.check_unchanged()
    (train, starts), (validation, more) = files_of(folder, 0), files_of(folder, 1)
    documents = (map_array(starts), map_array(more)) if sources.train.many else (None, None)
    sha256 = fingerprint(train, validation, vocabulary, documents)
    notes = (*sources.notes, *unknown_notes(vocabulary, unknown))
    return Tokens(map_array(train), map_array(validation), vocabulary, sha256, documents[0], documents[1], notes)


def key_of(sources: Sources, vocabulary: Vocabulary, end: np.ndarray) -> list[object]:
    """JSON values that are equal only for the same work."""
    identities = [source.identity() for source in sources.both]
    return [FORMAT, identities, type(vocabulary).__name__, vocabulary.described(), end.tolist()]


def unknown_notes(vocabulary: Vocabulary, unknown: Unknown) -> list[str]:
    """Sentence on unknown tokens, with ten examples."""
    if not unknown.count or vocabulary.unknown is None:
        return []
    examples = ", ".join(quoted(text) for text, _ in unknown.examples.most_common(SHOWN))
    more = ", …" if len(unknown.examples) > SHOWN else ""
    return [f"{unknown.count:,} tokens are the unknown token, for {examples}{more}"]


def blocks(ids: np.ndarray | Path) -> Iterator[np.ndarray]:
    """Parts of ids; those of a .npy file are read, not mapped, so that they take no memory."""
    if isinstance(ids, Path):
        mapped = map_array(ids)
        with ids.open("rb") as opened:
            opened.seek(mapped.offset if isinstance(mapped, np.memmap) else 0)
            while len(part := np.fromfile(opened, mapped.dtype, HASHED)):
                yield part
        return
    for first in range(0, len(ids), HASHED):
        yield ids[first : first + HASHED]


def fingerprint(
    train: np.ndarray | Path,
    validation: np.ndarray | Path,
    vocabulary: Vocabulary,
    documents: Sequence[np.ndarray | None] = (),
) -> str:
    """SHA-256 of ids, independent of their dtype, of their vocabulary, and of where documents begin."""
    about = [type(vocabulary).__name__, vocabulary.described()]
    found = hashlib.sha256(json.dumps(about).encode())
    for part in (train, validation):
        length = len(map_array(part)) if isinstance(part, Path) else len(part)
        found.update(length.to_bytes(8, "little"))
        for block in blocks(part):
            found.update(block.astype("<i4").tobytes())
    for starts in documents:
        if starts is not None:
            found.update(np.asarray(starts, "<i8").tobytes())
    return found.hexdigest()


def write(folder: Path, text: str, vocabulary: Vocabulary) -> Tokens:
    """Encode a text in memory and write it to a new folder atomically."""
    train, validation = (Text(str(folder), part) for part in split(text))
    return write_sources(folder, Sources(train, validation), vocabulary)


def write_sources(folder: Path, sources: Sources, vocabulary: Vocabulary, end_token: str | None = None) -> Tokens:
    """Encode sources and write them to a new folder atomically.

    They are encoded in a folder beside it, where a later call with the same arguments continues if this process is
    killed. Raises ValueError for bad texts, and OSError naming the new folder if it cannot be written.
    """
    end = end_ids(vocabulary, sources, end_token)
    key = hashlib.sha256(json.dumps(key_of(sources, vocabulary, end)).encode()).hexdigest()
    folder = resolved(folder)
    partial = folder.with_name(f".{folder.name}.{unique(key)}")  # `jaxmodels clean` knows such names
    try:
        with locked(partial):
            try:
                check_target(folder, overwrite=None)
            except ValueError:  # another process has written it since the caller looked
                manifest.remove(partial)
                raise
            tokens = encode_to(partial, sources, vocabulary, end)
            about: dict[str, object] = {"train": len(tokens.train), "validation": len(tokens.validation)}
            files = [files_of(partial, part)[0] for part in range(len(PARTS))]
            if tokens.documents is not None:
                about["documents"] = tokens.documents
                files += [files_of(partial, part)[1] for part in range(len(PARTS))]
            with atomic_folder(folder) as new:
                vocabulary.save(new / "vocabulary.json")
                content = {"format": FORMAT, **about, "sha256": tokens.sha256}
                (new / "tokens.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                for file in files:
                    file.rename(new / file.name)
            manifest.remove(partial)
    except OSError as error:
        if error.filename is not None:  # of a write: those of reading may name nothing
            raise_named(error, partial, folder)
        raise
    return tokens


def read(folder: Path) -> Tokens:
    """Open a folder that `write` wrote, the ids memory-mapped; raises ValueError if it is not complete."""
    file = folder / "tokens.json"
    try:
        manifest.refuse_links(folder)
        about = read_object(file)
        check_format(file, about.get("format"), FORMAT)
        parts = {name: map_array(folder / f"{name}.npy") for name in ("train", "validation")}
        vocabulary = load_vocabulary(folder / "vocabulary.json")
        for name, part in parts.items():
            check_part(folder / f"{name}.npy", part, about.get(name), len(vocabulary))
        parts = {name: signed(part) for name, part in parts.items()}
        documents = read_documents(folder, about.get("documents"), parts)
        sha256 = about.get("sha256")
        if not isinstance(sha256, str):
            raise ValueError(f"{file} has sha256={quoted(sha256)}, must be a string")
        return Tokens(parts["train"], parts["validation"], vocabulary, sha256, *documents)
    except (OSError, ValueError) as error:
        raise ValueError(f"text={str(folder)!r} is not a folder written by train.tokenize: {error}") from None


def read_documents(
    folder: Path, lengths: object, parts: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Beginnings of the documents of each part; raises ValueError if the files are not what tokens.json says."""
    if lengths is None:
        return None, None
    if not isinstance(lengths, dict):
        raise ValueError(f"{folder / 'tokens.json'} has documents={quoted(lengths)}, must be an object")
    found = []
    for name, ids in parts.items():
        file = folder / f"{name}_documents.npy"
        starts = map_array(file)
        if (
            starts.ndim != 1
            or starts.dtype != np.int64
            or not len(starts)
            or not is_integer(lengths.get(name), len(starts) - 1)
        ):
            raise ValueError(
                f"{file} has {starts.dtype}{list(starts.shape)}; tokens.json says {quoted(lengths.get(name))} documents"
            )
        if starts[0] != 0 or starts[-1] != len(ids) or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"{file} must grow from 0 to {len(ids)}, the number of ids")
        found.append(starts)
    train, validation = found
    return train, validation


def signed(ids: np.ndarray) -> np.ndarray:
    """Ids of 64 bits as signed ones: with signed integers, NumPy makes floats of unsigned ones."""
    return ids.view(ids.dtype.str.replace("u", "i")) if ids.dtype.itemsize == 8 else ids


def check_part(file: Path, ids: np.ndarray, length: object, n_vocab: int) -> None:
    """Raise ValueError if an array does not hold as many ids as tokens.json says, or an id is not in the vocabulary."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{file} has {ids.dtype}{list(ids.shape)}, must be integers [n]")
    if not is_integer(length, len(ids)):
        raise ValueError(f"{file} has {len(ids)} tokens, tokens.json says {quoted(length)}")
    if n_vocab - 1 > np.iinfo(ids.dtype).max:
        raise ValueError(
            f"{file} has {ids.dtype}, which cannot hold ids up to {n_vocab - 1}, as its vocabulary has; tokenize the "
            "text again"
        )
    low, high = 0, 0
    for block in blocks(ids):  # a signal ends it between two of them
        low, high = min(low, int(block.min())), max(high, int(block.max()))
    if low < 0 or high >= n_vocab:
        raise ValueError(f"{file} has ids from {low} to {high}, must be from 0 to {n_vocab - 1}")
