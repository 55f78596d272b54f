"""Vocabularies without a tokenizer: characters, as in the original experiments, and bytes."""

import collections
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import TOKENIZER_BYTES, read_object
from jaxmodels.process.texts import quoted
from jaxmodels.text.tokenizer.cuts import Anywhere, Cuts


def write_json(file: Path, content: dict[str, Any]) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


class Vocabulary:
    """Texts as ids, and back. `len` is the number of ids, one more than the largest: the rows that an embedding needs.

    special: ids that stand for no text, such as the end of a document. eos: those that end a text.
    """

    unit: ClassVar[str]
    eos: tuple[int, ...] = ()

    @property
    def cuts(self) -> Anywhere | Cuts:
        """Places where a text can be cut so that the ids of its pieces are those of the whole."""
        return Anywhere()

    @property
    def unknown(self) -> int | None:
        """Id of the token for what the vocabulary lacks; None if there is none."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to int32 ids."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Encode texts, each by itself, on all cores if a tokenizer does; `ids_of` makes ids of the results.

        They are two steps so that ids can be made of one batch while the next is encoded.
        """
        return [self.encode(text) for text in texts]

    def ids_of(self, encoded: Any) -> np.ndarray:
        """Ids of a result of `encode_batch`: int32 [n]."""
        return np.asarray(encoded)

    def interrupt(self) -> None:
        """End the work of another thread with this vocabulary, if that is possible."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """Encode a text to be continued to int32 ids; the same, unless a tokenizer puts special tokens before it."""
        return self.encode(text)

    def decode(self, ids: Any, *, skip_special: bool = False) -> str:
        """Decode ids [n] to text, with or without special tokens."""
        raise NotImplementedError

    def save(self, file: Path) -> None:
        """Write a file for `load_vocabulary`."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """Fields that tell this vocabulary from others of its class, as JSON values."""
        return {}

    def same_tokens(self, other: "Vocabulary") -> bool:
        """True if each id stands for the same token in another vocabulary."""
        return self == other

    @property
    def special(self) -> Mapping[int, str]:
        """Text of each special token by its id."""
        return {}

    def is_byte(self, token: int) -> bool:
        """True if a token is one byte of a run that is decoded as a whole (byte fallback)."""
        return False


@dataclasses.dataclass(frozen=True)
class CharVocabulary(Vocabulary):
    """One token per character; its id is the index in `characters`."""

    characters: str
    unit: ClassVar[str] = "character"

    @classmethod
    def of(cls, text: str) -> "CharVocabulary":
        """Vocabulary of the sorted characters of a text."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to int32 ids [len(text)]; raises ValueError that counts unknown characters and shows ten."""
        ids = self.table[code_points(text)]
        if ids.size and ids.min() < 0:
            counts = collections.Counter(text)
            self.refuse({character: counts[character] for character in counts.keys() - set(self.characters)})
        return ids

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Id of each code point; -1 for those that are not in the vocabulary."""
        table = np.full(sys.maxunicode + 1, -1, np.int32)
        table[code_points(self.characters)] = np.arange(len(self))
        return table

    def refuse(self, unknown: Mapping[str, int]) -> None:
        """Raise ValueError if there are characters, given with their counts, that the vocabulary lacks."""
        if not unknown:
            return
        raise ValueError(
            f"text has {listed(unknown)}; the vocabulary has {len(self)} characters and cannot encode others"
        )

    def decode(self, ids: Any, *, skip_special: bool = False) -> str:
        """Decode ids [n] to text; raises ValueError if one is outside the vocabulary."""
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise ValueError(f"ids from {ids.min()} to {ids.max()} must be from 0 to {len(self) - 1}")
        return "".join(self.characters[i] for i in ids.tolist())

    def save(self, file: Path) -> None:
        """Write a file for `load_vocabulary`."""
        write_json(file, self.described())

    def described(self) -> dict[str, Any]:
        """Fields that tell this vocabulary from others of its class, as JSON values."""
        return {"characters": self.characters}

    @classmethod
    def load(cls, file: Path) -> "CharVocabulary":
        """Load a file written by `save`; raises ValueError if it is missing or not one."""
        try:
            characters = read_object(file, TOKENIZER_BYTES).get("characters")
        except ValueError as error:
            raise ValueError(f"{file} is not a character vocabulary: {error}") from None
        if not isinstance(characters, str) or len(set(characters)) < len(characters):
            raise ValueError(
                f"{file} is not a character vocabulary: characters={quoted(characters)} must be a string without "
                "repetitions"
            )
        return cls(characters)


@dataclasses.dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
    """One token per byte of UTF-8, 256 in total; encodes any text."""

    unit: ClassVar[str] = "byte"

    def __len__(self) -> int:
        return 256

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to int32 ids [number of bytes]."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Any, *, skip_special: bool = False) -> str:
        """Decode ids [n] to text; invalid UTF-8, as at the ends of a piece of text, becomes �."""
        return bytes(np.asarray(ids).tolist()).decode("utf-8", errors="replace")

    def save(self, file: Path) -> None:
        """Write a file for `load_vocabulary`."""
        write_json(file, {"bytes": 256})


def listed(unknown: Mapping[str, int], shown: int = 10) -> str:
    """Number of unknown characters, or of other texts, and the most frequent of them."""
    most = sorted(unknown, key=lambda text: (-unknown[text], text))
    others = f" and {len(most) - shown:,} others" if len(most) > shown else ""
    what = ", ".join(quoted(text) for text in most[:shown])
    return f"{sum(unknown.values()):,} unknown characters: {what}{others}"


def code_points(text: str) -> np.ndarray:
    """Code points of a text: uint32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def utf8(text: str) -> bytes:
    """Encode a text as UTF-8; raises ValueError if it has lone surrogates, as arguments that are not UTF-8 have."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a character that is not Unicode, {text[error.start]!r} at {error.start}") from None
