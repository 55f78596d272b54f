"""Vocabularies of tokenizer files, and the file of a vocabulary of any class."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmodels.io.bounded import TOKENIZER_BYTES, errors_naming, read_object, read_text, refuse_special
from jaxmodels.process.confined import Confined
from jaxmodels.process.extras import require
from jaxmodels.process.texts import quoted
from jaxmodels.text import limits
from jaxmodels.text.cuts import Cuts
from jaxmodels.text.errors import refusing
from jaxmodels.text.ids import end_tokens, token_id
from jaxmodels.text.untrusted import operations
from jaxmodels.text.untrusted.plain import is_plain
from jaxmodels.text.vocabularies import ByteVocabulary, CharVocabulary, Vocabulary, utf8, write_json

TOKENIZER_NAMES = ("tokenizer.json", "20B_tokenizer.json")
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
SLOW_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", VOCAB, MERGES)
MAKE_TOKENIZER_JSON = "make one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
SPECIAL_NAME = re.compile(r"<\|.+\|>")  # in a vocab.json, which does not say what is special
LARGEST_ID = 2**24  # published vocabularies have up to 262,144 tokens
END_OF_TEXT = "<|endoftext|>"  # ends a text if no file says what does
# Means of a confined tokenizer: seconds of processor time and megabytes, and more of both by the size of the work.
SECONDS, MEGABYTES = 3.0, 500.0
WORKS, BYTES_WORK = (
    50_000.0,
    250.0,
)  # bytes a second of encoding, published tokenizers do 20 times as many; memory a byte
READS, BYTES_READ = 1e6, 60.0  # of a tokenizer.json


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
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer={path} cannot be read: {error}") from None
        return cls(content, ends_beside(path.parent, vocabulary), str(path))

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

    def run(self, name: str, *arguments: Any, size: int) -> Any:
        """Result of an operation of `jaxmodels.text.untrusted.operations`, here or in the confined process.

        size: bytes of the texts, or of the ids.
        """
        tokenizer = self.tokenizer
        if self.confined is None:
            return getattr(operations, name)(tokenizer, *arguments)
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

    def normalize(self, step: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
        """Texts as the normalizer of a step of the file makes them."""
        size = sum(len(utf8(text)) for text in texts)
        with refusing(f"{self.name} cannot normalize the text"):
            return list(self.run("normalize", step, list(texts), size=size))

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


def byte_level(file: Path) -> str:
    """tokenizer.json of a vocab.json and the merges.txt beside it, as GPT-2 and GPT-NeoX tokenize.

    It is made of checked values: a merge whose result is no token is a panic of the tokenizers package.
    """
    config = json_beside(file, CONFIG)
    prefix = config.get("add_prefix_space")
    if not isinstance(prefix, bool | None):
        raise ValueError(f"{file.with_name(CONFIG)} has add_prefix_space={quoted(prefix)}; expected true or false")
    ids = {name: checked_id(file, i) for name, i in read_object(file, TOKENIZER_BYTES).items()}
    check_largest(max(ids.values(), default=0))
    vocabulary = dict(sorted(ids.items(), key=lambda entry: entry[1]))
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    content: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    content |= {"normalizer": None, "pre_tokenizer": level | {"add_prefix_space": bool(prefix)}}
    content |= {"post_processor": level, "decoder": level}
    content["model"] = model | {"vocab": vocabulary, "merges": read_merges(file.with_name(MERGES), vocabulary)}
    special = {**json_beside(file, SPECIAL), **config}
    names = [content_of(file.with_name(CONFIG), special, f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    known = {name for name in (*names, *vocabulary) if name and (name in names or SPECIAL_NAME.fullmatch(name))}
    added = dict(added_tokens(file.with_name(CONFIG), config.get("added_tokens_decoder")))
    for name, i in json_beside(file, ADDED).items():
        token = checked_id(file.with_name(ADDED), i)
        added.setdefault(token, {"content": name, "special": name in known, "normalized": name not in known})
    for name in known & vocabulary.keys():
        added.setdefault(vocabulary[name], {"content": name, "special": True})
    for i, about in sorted(added.items()):
        vocabulary[about["content"]] = i  # otherwise the package renumbers it
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        entry = {"id": i, "content": about["content"]} | {name: bool(about.get(name, flags[name])) for name in flags}
        content["added_tokens"].append(entry)
    return json.dumps(content)


def read_merges(file: Path, vocabulary: Mapping[str, int]) -> list[list[str]]:
    """Pairs of tokens in a merges.txt; raises ValueError, naming the file, if one is not, or not of the vocabulary."""
    merges: dict[tuple[str, ...], None] = {}
    for number, line in enumerate(read_text(file, TOKENIZER_BYTES).removesuffix("\n").split("\n"), 1):
        line = line.removesuffix("\r")
        if line.startswith("#version") or (number == 1 and not line):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise ValueError(f"{file} has {quoted(line)} in line {number:,}; expected two tokens")
        unknown = [token for token in (*pair, "".join(pair)) if token not in vocabulary]
        if unknown:
            raise ValueError(f"{file} has {quoted(line)} in line {number:,}; {VOCAB} lacks {quoted(unknown[0])}")
        merges.pop(pair, None)  # of a pair that is listed twice, the last place counts
        merges[pair] = None
    return [list(pair) for pair in merges]


def check_largest(largest: int) -> None:
    """Raises ValueError for an id of a token that no vocabulary has: memory is taken for all ids up to the largest."""
    if largest > LARGEST_ID:
        raise ValueError(f"a tokenizer with the id {largest}; ids are at most {LARGEST_ID}")


def added_tokens(file: Path, entries: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Ids and entries of "added_tokens_decoder"; raises ValueError, naming the file, if one has another form."""
    if not isinstance(entries, dict | None):
        raise ValueError(f"{file} has added_tokens_decoder={quoted(entries)}; expected an object")
    for i, about in (entries or {}).items():
        if not isinstance(about, dict) or not isinstance(about.get("content"), str):
            raise ValueError(f"{file} has {quoted(about)} in added_tokens_decoder; expected an object with content")
        yield checked_id(file, i), about


def checked_id(file: Path, value: Any) -> int:
    """Id of a token, an integer or its digits; raises ValueError, naming the file, for any other value."""
    token = token_id(value)
    if token is None:
        raise ValueError(f"{file} has the id {quoted(value)}; expected an integer from 0 to 2³¹ - 1")
    return token


def content_of(file: Path, settings: Mapping[str, Any], name: str) -> str | None:
    """Text of a special token in a file of transformers: a string, or an object with "content"; None if there is none.

    Raises ValueError, naming the file, for any other value.
    """
    value = settings.get(name)
    token = value.get("content") if isinstance(value, dict) else value
    if not isinstance(token, str) and value is not None:
        raise ValueError(f"{file} has {name}={quoted(value)}; expected a string, or an object with content")
    return token


def json_beside(file: Path, name: str) -> dict[str, Any]:
    """Content of a JSON file beside another one; {} if there is none. Raises ValueError if it is no object."""
    beside = file.with_name(name)
    refuse_special(beside)
    if not beside.is_file():
        return {}
    return read_object(beside)


def ends_beside(folder: Path, vocabulary: "TokenizerFile") -> tuple[int, ...]:
    """Ids that end a text, from the files of a checkpoint's folder.

    Those of generation_config.json, else of config.json, as transformers has it; else the eos_token of the tokenizer's
    own configuration; else <|endoftext|>, if the vocabulary has it.
    """
    beside = folder / CONFIG
    for name in ("generation_config.json", "config.json"):
        content = json_beside(beside, name)
        nested = content.get("token_ids")  # in a config.json of this project
        ids = end_tokens((nested if isinstance(nested, dict) else content).get("eos_token_id"), folder / name)
        if ids:
            return ids
    names = [content_of(folder / name, json_beside(beside, name), "eos_token") for name in (CONFIG, SPECIAL)]
    for text in (*names, END_OF_TEXT):
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
