"""Companions of a checkpoint's weights: ids of special tokens, generation settings, tokenizer files. Knows no model.

In a Hugging Face folder they lie as published, with the ids of special tokens in generation_config.json and
config.json. A model of this project, a training run and GPT-NeoX shards written here have the same files at the top of
the folder, and the ids of config.json as an object "token_ids" in config.json (shards: configs/vocabulary.json).
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import TOKENIZER_BYTES, read_bytes, read_object, read_text, refuse_special
from jaxmodels.io.content import begins_as_object
from jaxmodels.io.manifest import refuse_link
from jaxmodels.process.texts import quoted
from jaxmodels.text.tokenizer.ids import end_tokens, special_id

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"  # a tokenizer in several files
VOCABULARY = "vocabulary.json"  # written by a training run; `jaxmodels.text.load_vocabulary` reads it
FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    ADDED,
    VOCAB,
    MERGES,
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
    VOCABULARY,
)
TEMPLATES = "additional_chat_templates"  # folder of further *.jinja files
MOST_TEMPLATES, TEMPLATE_BYTES = 100, 2**20  # of them; published ones have thousands of bytes
ALL_BYTES = 2**27  # of a checkpoint's companions; a file that occupies nothing may say that it is large
OTHER_NAMES = {TOKENIZER: ("20B_tokenizer.json",)}  # names under which GPT-NeoX publishes them
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
KEY = "token_ids"
# Files with ids of special tokens, relative to the folder; the ids are at the top, or under KEY.
CONFIGS = ("config.json", "configs/vocabulary.json")


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids of special tokens: any of `eos` ends a text; None or empty if a checkpoint names none."""

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str) -> "TokenIds":
        """Ids under the keys of TOKEN_IDS; raises ValueError, naming `where`, if one is not an integer."""
        found = {key: special_id(content.get(key), key, where) for key in ("bos_token_id", "pad_token_id")}
        eos = end_tokens(content.get("eos_token_id"), where)
        return cls(eos, found["bos_token_id"], found["pad_token_id"])


@dataclasses.dataclass(frozen=True)
class Companions:
    """Token ids, generation settings and files that belong to a checkpoint.

    token_ids: those of generation_config.json, then, for each that it lacks, of config.json. generation: content of
    generation_config.json, empty if there is none. files: by published name. config_ids: the entries of config.json
    about special tokens as they are there, for writing them again.
    """

    token_ids: TokenIds = dataclasses.field(default_factory=TokenIds)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    config_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, *folders: Path, defaults: Mapping[str, Any] | None = None, published: bool = False) -> "Companions":
        """Companions in a folder of any kind; with several folders, each file is taken from the first that has it.

        defaults: ids of special tokens that config.json lacks. published: of a Hugging Face folder, which has no
        vocabulary.json of this program beside a tokenizer.json. Raises ValueError, naming the file, if a JSON file with
        ids cannot be read or an id is not an integer.
        """
        files = {name: file for folder in reversed(folders) for name, file in files_in(folder).items()}
        if published and TOKENIZER in files:
            files.pop(VOCABULARY, None)
        generation = read_object(files[GENERATION]) if GENERATION in files else {}
        TokenIds.of(generation, str(files.get(GENERATION)))  # raises ValueError that names the file
        config_ids: dict[str, Any] = dict(defaults or {})
        for folder in reversed(folders):
            config_ids |= stored_ids(folder)
        merged = config_ids | {key: generation[key] for key in TOKEN_IDS if generation.get(key) is not None}
        where = ", ".join(str(folder) for folder in folders)
        return cls(TokenIds.of(merged, where), generation, files, config_ids)

    def write(self, folder: Path) -> None:
        """Copy the files into a folder, byte for byte, under their published names.

        A vocabulary.json with a tokenizer in it is written as tokenizer.json: it is what a run was trained with. Raises
        ValueError if a link takes the place of the folder of further templates, or a FIFO or a device that of a file,
        if a .json file holds no object, and if the files have more than ALL_BYTES together.
        """
        total = 0
        inside = self.tokenizer_inside()
        for name, file in self.files.items():
            if name == VOCABULARY and inside is not None:
                continue
            target = folder / name
            if target.parent != folder:
                refuse_link(target.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (target.exists() and target.samefile(file)):
                limit = TEMPLATE_BYTES if name.startswith(f"{TEMPLATES}/") else TOKENIZER_BYTES
                content = read_bytes(file, limit)  # a copy of a sparse file would fill the disk
                if name.endswith(".json") and not begins_as_object(content):  # which `jaxmodels clean` may not know
                    raise ValueError(f"{file} holds no JSON object")
                total += len(content)
                if total > ALL_BYTES:
                    raise ValueError(
                        f"{file} and the files beside it have {total:,} bytes; at most {ALL_BYTES:,} are copied"
                    )
                with atomic_file(target) as new:
                    new.write_bytes(content)
        same = TOKENIZER in self.files and read_text(self.files[TOKENIZER], TOKENIZER_BYTES) == inside
        if inside is not None and not same:
            with atomic_file(folder / TOKENIZER) as new:
                new.write_text(inside, encoding="utf-8")

    def tokenizer_inside(self) -> str | None:
        """Content of a tokenizer.json that is within the vocabulary.json; None if there is none."""
        if VOCABULARY not in self.files:
            return None
        inside = read_object(self.files[VOCABULARY], TOKENIZER_BYTES).get("tokenizer")
        return inside if isinstance(inside, str) else None

    def refuse_others(self, run: Path) -> None:
        """Raise ValueError if a run that begins has files of another checkpoint, which `write` would not replace.

        Such are those of a first attempt that was killed. Its vocabulary.json is the run's own, and always replaced.
        """
        written = {VOCABULARY, *self.files, *([TOKENIZER] if self.tokenizer_inside() is not None else [])}
        if others := sorted(files_in(run).keys() - written):
            raise ValueError(
                f"{run} has {', '.join(map(quoted, others))} of another checkpoint, beside which this run would begin: "
                "delete them, or name another folder with --out"
            )

    def in_config(self) -> dict[str, Any]:
        """Entry for a config.json of this project: {"token_ids": {…}}, or {} if there are none."""
        return {KEY: dict(self.config_ids)} if self.config_ids else {}


def files_in(folder: Path) -> dict[str, Path]:
    """Companion files of one folder by their published names.

    Raises ValueError, naming the file, for a FIFO or a device of such a name, and for templates that are too many or
    have a name that is not UTF-8, which the manifest of a folder that is written could not list.
    """
    found: dict[str, Path] = {}
    for name in FILES:
        places = [folder / other for other in (name, *OTHER_NAMES.get(name, ()))]
        for place in places:
            refuse_special(place)
        present = [place for place in places if place.is_file()]
        if present:
            found[name] = present[0]
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    if len(templates) > MOST_TEMPLATES:
        raise ValueError(f"{folder / TEMPLATES} has {len(templates):,} templates; at most {MOST_TEMPLATES} are read")
    for file in templates:
        if not is_utf8(file.name):
            raise ValueError(f"{folder / TEMPLATES} has {quoted(file.name)}, whose name is not UTF-8; rename it")
    return found | {f"{TEMPLATES}/{file.name}": file for file in templates}


def is_utf8(name: str) -> bool:
    """True for a name without bytes that are not UTF-8, which Python keeps as halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def stored_ids(folder: Path) -> dict[str, Any]:
    """Ids of special tokens in a folder's configuration, as they are there; raises ValueError if one is no id."""
    for name in CONFIGS:
        if os.path.lexists(folder / name):
            content = read_object(folder / name)
            nested = content.get(KEY)
            ids = only_ids(nested if isinstance(nested, dict) else content)
            TokenIds.of(ids, str(folder / name))
            return ids
    return {}


def only_ids(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: content[key] for key in TOKEN_IDS if key in content}
