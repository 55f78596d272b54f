"""Text corpora, and vocabularies: characters, as in the original experiments, bytes, tokenizer files."""

import dataclasses
import functools
import hashlib
import http.client
import json
import os
import urllib.request
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmodels.io.atomic import atomic_file
from jaxmodels.process.extras import require

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TOKENIZER_NAMES = ("tokenizer.json", "20B_tokenizer.json")


def load_corpus(name: str) -> str:
    """Text of a corpus: 'python_docs', 'tiny_shakespeare', or the path of a UTF-8 file.

    python_docs is the language reference contained in every Python: it needs no network, and differs slightly between
    versions. Raises ValueError if the name is neither a corpus nor a readable, non-empty UTF-8 file.
    """
    if name == "python_docs":
        return python_docs()
    if name == "tiny_shakespeare":
        return tiny_shakespeare()
    path = Path(name)
    try:
        text = path.read_bytes().decode("utf-8")  # not read_text, which would convert \r\n to \n
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"text={name!r} must be python_docs, tiny_shakespeare or a readable UTF-8 file: {error}"
        ) from None
    if not text:
        raise ValueError(f"text={name!r} is an empty file")
    return text


def python_docs() -> str:
    """Topics of `help()`, sorted by name and joined."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def tiny_shakespeare() -> str:
    """1,115,394 characters of Shakespeare, downloaded once to the user's cache; the sha256 is checked at every use.

    Raises ValueError if the download fails or the sha256 differs.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels" / "tiny_shakespeare.txt"
    advice = f"download {TINY_SHAKESPEARE_URL} yourself and pass the file as the text"
    if not cache.exists():
        try:
            with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"tiny_shakespeare could not be downloaded ({error}); {advice}") from None
        check_sha256(content, advice)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cache) as temporary:
            temporary.write_bytes(content)
    content = cache.read_bytes()
    check_sha256(content, f"delete {cache}, or {advice}")
    return content.decode("utf-8")


def check_sha256(content: bytes, advice: str) -> None:
    """Raises ValueError, ending with `advice`, if the content is not tiny_shakespeare."""
    found = hashlib.sha256(content).hexdigest()
    if found != TINY_SHAKESPEARE_SHA256:
        raise ValueError(f"tiny_shakespeare has sha256 {found}, expected {TINY_SHAKESPEARE_SHA256}; {advice}")


def split(text: str) -> tuple[str, str]:
    """Split into training and validation text: the first int(0.9·n) characters, and the rest."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def write_json(file: Path, content: dict[str, Any]) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class CharVocabulary:
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
        """Encode a text to int32 ids [len(text)]; raises ValueError listing unknown characters."""
        ids = {character: i for i, character in enumerate(self.characters)}
        unknown = sorted(set(text) - ids.keys())
        if unknown:
            raise ValueError(
                f"text has characters {''.join(unknown)!r}, which are not among the {len(self)} of the vocabulary"
            )
        return np.fromiter((ids[character] for character in text), np.int32, len(text))

    def decode(self, ids: np.ndarray) -> str:
        """Decode ids [n] to text; raises ValueError if one is outside the vocabulary."""
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise ValueError(f"ids from {ids.min()} to {ids.max()} must be from 0 to {len(self) - 1}")
        return "".join(self.characters[i] for i in ids.tolist())

    def save(self, file: Path) -> None:
        """Write a file for `load_vocabulary`."""
        write_json(file, {"characters": self.characters})

    @classmethod
    def load(cls, file: Path) -> "CharVocabulary":
        """Load a file written by `save`; raises ValueError if it is missing or not one."""
        try:
            characters = json.loads(file.read_text(encoding="utf-8"))["characters"]
            if not isinstance(characters, str) or len(set(characters)) < len(characters):
                raise ValueError("characters must be a string without repetitions")
            return cls(characters)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a character vocabulary: {error!r}") from None


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """One token per byte of UTF-8, 256 in total; encodes any text."""

    unit: ClassVar[str] = "byte"

    def __len__(self) -> int:
        return 256

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to int32 ids [number of bytes]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Decode ids [n] to text; invalid UTF-8, as at the ends of a piece of text, becomes �."""
        return bytes(np.asarray(ids).tolist()).decode("utf-8", errors="replace")

    def save(self, file: Path) -> None:
        """Write a file for `load_vocabulary`."""
        write_json(file, {"bytes": 256})


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """Vocabulary of a tokenizer.json; needs the package tokenizers. content: text of the file."""

    content: str
    unit: ClassVar[str] = "token"

    @classmethod
    def read(cls, file: str | os.PathLike) -> "TokenizerFile":
        """Read a tokenizer.json; raises ValueError, naming it, if it is missing or not one."""
        require("neox", "tokenizers")
        try:
            vocabulary = cls(Path(file).read_text(encoding="utf-8"))
            len(vocabulary)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer={file} cannot be read: {error}") from None
        return vocabulary

    @functools.cached_property
    def tokenizer(self) -> Any:
        """`tokenizers.Tokenizer` of the content; raises ValueError if it is not a tokenizer's."""
        require("neox", "tokenizers")
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self.content)
            tokenizer.no_truncation()  # published files store settings of somebody's last call
            tokenizer.no_padding()
            return tokenizer
        except Exception as error:  # the package raises bare Exceptions
            raise ValueError(f"not a tokenizer.json: {error}") from None

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Encode a text to int32 ids, without the special tokens that some tokenizers add around it."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Decode ids [n] to text, special tokens included."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def save(self, file: Path) -> None:
        """Write a file for `load_vocabulary`."""
        write_json(file, {"tokenizer": self.content})


def find_tokenizer(file: Path | None, folder: Path) -> Path:
    """Path of a tokenizer file: `file` if given, else the one in a checkpoint's folder or its parent folder.

    Raises ValueError if it does not exist.
    """
    places = [place / name for place in (folder, folder.absolute().parent) for name in TOKENIZER_NAMES]
    candidates = places if file is None else [file]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        what = "no tokenizer found" if file is None else f"tokenizer={file} not found"
        raise ValueError(f"{what}; looked for {', '.join(map(str, candidates))}")
    return found


Vocabulary = CharVocabulary | ByteVocabulary | TokenizerFile


def load_vocabulary(file: Path) -> Vocabulary:
    """Load a vocabulary of any class from the file that `save` wrote; raises ValueError if it is missing or not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a vocabulary: {error!r}") from None
    match content:
        case {"bytes": 256}:
            return ByteVocabulary()
        case {"tokenizer": str(tokenizer)}:
            return TokenizerFile(tokenizer)
    return CharVocabulary.load(file)
