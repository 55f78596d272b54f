"""Vocabularies of tokenizer files, and the file of a vocabulary of any class."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmodels.io.bounded import TOKENIZER_BYTES, errors_naming, read_object, read_text, refuse_special
from jaxmodels.process.confined import Confined
from jaxmodels.process.extras import require
from jaxmodels.text.tokenizer import limits
from jaxmodels.text.tokenizer.byte_level import MERGES, VOCAB, byte_level, check_largest
from jaxmodels.text.tokenizer.cuts import Cuts
from jaxmodels.text.tokenizer.errors import refusing
from jaxmodels.text.tokenizer.ids import end_tokens
from jaxmodels.text.tokenizer.settings import with_settings
from jaxmodels.text.tokenizer.special import CONFIG, END_OF_TEXT, files_beside, special_tokens
from jaxmodels.text.tokenizer.untrusted import operations
from jaxmodels.text.tokenizer.untrusted.plain import is_plain
from jaxmodels.text.vocabularies import ByteVocabulary, CharVocabulary, Vocabulary, utf8, write_json

TOKENIZER_NAMES = ("tokenizer.json", "20B_tokenizer.json")
SLOW_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", VOCAB, MERGES)
MAKE_TOKENIZER_JSON = "make one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
# Means of a confined tokenizer: seconds of processor time and megabytes, and more of both by the size of the work.
SECONDS, MEGABYTES = 3.0, 500.0
# Of encoding: bytes a second, of which published tokenizers do 20 times as many, and memory for each byte.
WORKS, BYTES_WORK = 50_000.0, 250.0
READS, BYTES_READ = 3e6, 40.0  # of a tokenizer.json


def means(size: int, memory: float, rate: float) -> dict[str, float]:
    """Limits of work on some bytes, each of which takes so many bytes of memory, and so many of which take a second."""
    return {"seconds": SECONDS + size / rate, "megabytes": MEGABYTES + size * memory / 1e6}


@dataclasses.dataclass(frozen=True)
class TokenizerFile(Vocabulary):
    """Vocabulary of a tokenizer.json; needs the package tokenizers.

    content: text of the file. Truncation, padding and dropout of merges that are stored in it are switched off.
    eos: ids that end a text; tokenizer.json does not say which they are. file: where the content was read, for errors.
    """

    content: str
    eos: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    file: str | None = dataclasses.field(default=None, compare=False, repr=False)  # no part of fingerprints
    unit: ClassVar[str] = "token"

    @classmethod
    def read(cls, file: str | os.PathLike) -> "TokenizerFile":
        """Read a tokenizer.json, a vocab.json of GPT-2's kind with its merges.txt, or a folder that holds either.

        `eos` is read from the files beside it. Raises ValueError, naming the file, if it is missing or none of these.
        """
        require("neox", "tokenizers")
        path = find_tokenizer(None, Path(file)) if Path(file).is_dir() else Path(file)
        try:
            content = byte_level(path) if path.name == VOCAB else read_text(path, TOKENIZER_BYTES)
            vocabulary = cls(content, file=str(path))
            len(vocabulary)
            if path.name != VOCAB:
                with refusing("its settings cannot be applied", silent=True):
                    settled = with_settings(path, content, vocabulary.tokenizer)
                if settled != content:
                    vocabulary = cls(settled, file=str(path))
                    len(vocabulary)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer={path} cannot be read: {error}") from None
        return vocabulary.ending(ends_beside(path.parent, vocabulary))

    def ending(self, eos: tuple[int, ...]) -> "TokenizerFile":
        """This vocabulary with other ids that end a text."""
        found = dataclasses.replace(self, eos=eos)
        vars(found).update({name: value for name, value in vars(self).items() if name in ("tokenizer", "confined")})
        return found  # which is not read again: that takes seconds and as much memory for a large file

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenizerFile":
        """Vocabulary of a tokenizer of tokenizers or of transformers; raises ValueError if it is neither."""
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}, must be a vocabulary of jaxmodels.text, a tokenizer of "
                "tokenizers or transformers, or the path of a tokenizer.json or of its folder"
            )
        eos = getattr(tokenizer, "eos_token_id", None)
        return cls(backend.to_str(), () if eos is None else (int(eos),))

    @functools.cached_property
    def tokenizer(self) -> Any:
        """`tokenizers.Tokenizer` of the content; raises ValueError if it is not a tokenizer's, or if it is empty."""
        require("neox", "tokenizers")
        with refusing("not a tokenizer.json", silent=True):
            if self.confined is not None:
                self.confined.start()  # reading it may fail in the same ways as using it
            return operations.loaded(self.content)

    @functools.cached_property
    def confined(self) -> Confined | None:
        """Process that works for a tokenizer that is not known to be harmless; None for one that is.

        Raises ValueError for one that is refused.
        """
        if is_plain(limits.check(self.content)):
            return None
        size = len(self.content)
        return Confined(operations.__name__, self.content, **means(size, BYTES_READ, READS))

    @functools.cached_property
    def here(self) -> Mapping[str, Callable[..., Any]]:
        """Operations in this process, by name."""
        return operations.operations_of(self.tokenizer)

    def run(self, name: str, *arguments: Any, size: int) -> Any:
        """Result of an operation of `jaxmodels.text.tokenizer.untrusted.operations`, here or in the confined process.

        size: bytes of the texts, or of the ids.
        """
        here = self.here  # also reads the tokenizer, whose errors come first
        if self.confined is None:
            return here[name](*arguments)
        return self.confined.call(name, *arguments, **means(size, BYTES_WORK, WORKS))

    @property
    def name(self) -> str:
        """Subject of errors about the tokenizer: its file, if it was read from one."""
        return "the tokenizer" if self.file is None else f"tokenizer={self.file}"

    @functools.cached_property
    def size(self) -> int:
        """One more than the largest id: vocabularies may have gaps, and added tokens lie beyond the others."""
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=None)
        if largest is None:
            raise ValueError("a tokenizer without tokens")
        check_largest(largest)
        return int(largest) + 1

    def __len__(self) -> int:
        return self.size

    @functools.cached_property
    def n_model(self) -> int:
        """One more than the largest id of a token that was not added to the tokenizer's model later."""
        added = self.tokenizer.get_added_tokens_decoder()
        model = self.tokenizer.get_vocab(with_added_tokens=False).values()
        return 1 + max((token for token in model if token not in added), default=-1)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """Encode a text to int32 ids, by default without the special tokens that some tokenizers add around it."""
        size = len(utf8(text))
        with refusing(f"{self.name} cannot encode the text"):
            return np.asarray(self.run("encode", text, special, size=size), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Encode texts as `encode`, each by itself, on all cores; `ids_of` makes ids of the results."""
        size = sum(len(utf8(text)) for text in texts)
        with refusing(f"{self.name} cannot encode the text"):
            tokenizer = self.tokenizer
            if self.confined is None:  # ids are made of the results later, in another thread
                return list(tokenizer.encode_batch_fast(list(texts), add_special_tokens=False))
            return list(self.run("encode_batch", list(texts), size=size))

    def ids_of(self, encoded: Any) -> np.ndarray:
        """Ids of a result of `encode_batch`: int32 [n]."""
        return np.asarray(encoded if isinstance(encoded, list) else encoded.ids, np.int32)

    def interrupt(self) -> None:
        """End the work of another thread with this vocabulary, if a confined process does it."""
        if self.confined is not None:
            self.confined.interrupt()

    def unknown_in(self, text: str) -> list[str]:
        """Parts of a text that become the unknown token."""
        with refusing(f"{self.name} cannot encode the text"):
            found = self.run("encode_with_offsets", text, size=len(utf8(text)))
        return [text[start:stop] for token, (start, stop) in found if token == self.unknown]

    @functools.cached_property
    def cuts(self) -> Cuts:
        """Places where a text can be cut so that the ids of its pieces are those of the whole."""
        return Cuts(self.tokenizer.to_str(), self.normalize)

    def normalize(self, first: int, last: int, texts: Sequence[str]) -> list[str]:
        """Texts as the normalizers of the file from `first` to `last` - 1 make them."""
        size = sum(len(utf8(text)) for text in texts)
        with refusing(f"{self.name} cannot normalize the text"):
            return list(self.run("normalize", first, last, list(texts), size=size))

    @functools.cached_property
    def unknown(self) -> int | None:
        """Id of the token for what the vocabulary lacks; None if there is none."""
        model = self.tokenizer.model
        if type(model).__name__ == "Unigram":
            unknown = json.loads(self.tokenizer.to_str())["model"].get("unk_id")
            return None if unknown is None else int(unknown)
        token = getattr(model, "unk_token", None)
        return None if token is None else self.tokenizer.token_to_id(token)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Encode a text to be continued to int32 ids, after the special tokens that the tokenizer puts before texts.

        Those that it puts after texts are left out: they would end the text.
        """
        size = len(utf8(text))
        with refusing(f"{self.name} cannot encode the text"):
            return np.asarray(self.run("encode_prompt", text, size=size), np.int32)

    def decode(self, ids: Any, *, skip_special: bool = False) -> str:
        """Decode ids [n] to text, with or without special tokens; incomplete characters become �."""
        tokens = np.asarray(ids).tolist()
        with refusing(f"{self.name} cannot decode these ids"):
            return str(self.run("decode", tokens, skip_special, size=4 * len(tokens)))

    def save(self, file: Path) -> None:
        """Write a file for `load_vocabulary`."""
        write_json(file, {"tokenizer": self.content, "eos": list(self.eos)})

    def described(self) -> dict[str, Any]:
        """Fields that tell this vocabulary from others of its class, as JSON values."""
        return {"content": self.content}

    def same_tokens(self, other: Vocabulary) -> bool:
        """True if each id stands for the same token in another vocabulary, whatever else their files say."""
        if self == other or not isinstance(other, TokenizerFile):
            return self == other
        ours, theirs = (each.tokenizer.get_vocab(with_added_tokens=True) for each in (self, other))
        return bool(ours == theirs)

    @functools.cached_property
    def special(self) -> Mapping[int, str]:
        """Text of each special token by its id."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {token: about.content for token, about in added.items() if about.special}

    @functools.cached_property
    def bytes(self) -> frozenset[int]:
        """Ids of the tokens of byte fallback, <0x00> to <0xFF>."""
        if '"ByteFallback"' not in self.content:
            return frozenset()
        found = (self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token for token in found if token is not None)

    def is_byte(self, token: int) -> bool:
        """True if a token is one byte of a run that is decoded as a whole (byte fallback)."""
        return token in self.bytes


def ends_beside(folder: Path, vocabulary: "TokenizerFile") -> tuple[int, ...]:
    """Ids that end a text, from the files of a checkpoint's folder.

    Those of generation_config.json, else of config.json, as transformers has it; else the eos_token of the tokenizer's
    own configuration; else <|endoftext|>, if the vocabulary has it.
    """
    beside = folder / CONFIG
    for name in ("generation_config.json", "config.json"):
        refuse_special(folder / name)
        content = read_object(folder / name) if (folder / name).is_file() else {}
        nested = content.get("token_ids")  # in a config.json of this project
        ids = end_tokens((nested if isinstance(nested, dict) else content).get("eos_token_id"), folder / name)
        if ids:
            return ids
    for text in (special_tokens(files_beside(beside)).get("eos_token"), END_OF_TEXT):
        with refusing(f"{beside} names a special token that the tokenizer cannot look up"):
            token = None if text is None else vocabulary.tokenizer.token_to_id(text)
        if token is not None:
            return (token,)
    return ()


def find_tokenizer(file: Path | None, folder: Path) -> Path:
    """Path of a tokenizer file: `file` if given, else the one in a checkpoint's folder or its parent folder.

    That of a vocab.json if there is only that, with a merges.txt. Raises ValueError if there is none.
    """
    if file is not None and not file.is_dir():
        if not file.is_file():
            raise ValueError(f"tokenizer={file} not found; looked for {file}")
        return file
    folders = [folder, folder.absolute().parent] if file is None else [file]
    candidates = [place / name for place in folders for name in TOKENIZER_NAMES]
    for candidate in (*candidates, *(place / name for place in folders for name in (VOCAB, MERGES))):
        refuse_special(candidate)
    pairs = [place / VOCAB for place in folders if (place / MERGES).is_file()]
    found = next((candidate for candidate in (*candidates, *pairs) if candidate.is_file()), None)
    if found is None:
        unusable = [place / name for place in folders for name in SLOW_NAMES if (place / name).is_file()]
        if unusable:
            raise ValueError(f"{unusable[0]} is not a tokenizer.json; {MAKE_TOKENIZER_JSON}")
        what = "no tokenizer found" if file is None else f"tokenizer={file} not found"
        raise ValueError(f"{what}; looked for {', '.join(map(str, candidates))}")
    return found


def as_vocabulary(tokenizer: Any) -> Vocabulary:
    """Vocabulary of anything that names one.

    tokenizer: a Vocabulary, a `tokenizers.Tokenizer`, a tokenizer of transformers, or the path of a tokenizer.json or
    of its folder. Raises ValueError if it is none of these.
    """
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        return TokenizerFile.read(tokenizer)
    return TokenizerFile.of(tokenizer)


def load_vocabulary(file: Path) -> Vocabulary:
    """Load a vocabulary of any class from the file that `save` wrote; raises ValueError if it is missing or not one."""
    try:
        content = read_object(file, TOKENIZER_BYTES)
    except ValueError as error:
        raise ValueError(f"{file} is not a vocabulary: {error}") from None
    if len(kinds := sorted({"bytes", "characters", "tokenizer"} & content.keys())) > 1:
        raise ValueError(f"{file} is not a vocabulary: it has {' and '.join(kinds)}; expected one of them")
    match content:
        case {"bytes": 256}:
            return ByteVocabulary()
        case {"tokenizer": str(tokenizer)}:
            vocabulary = TokenizerFile(tokenizer, end_tokens(content.get("eos"), file, "eos"), str(file))
            with errors_naming(file):
                len(vocabulary)
            return vocabulary
    return CharVocabulary.load(file)
