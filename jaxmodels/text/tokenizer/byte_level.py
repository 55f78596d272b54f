"""tokenizer.json of a vocab.json with its merges.txt, as GPT-2's and GPT-NeoX's tokenizers are published."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import TOKENIZER_BYTES, read_object, read_text, refuse_special
from jaxmodels.process.texts import quoted
from jaxmodels.text.tokenizer.special import (
    CONFIG,
    GPT2,
    NEOX,
    added_tokens,
    checked_id,
    content_of_file,
    files_beside,
    flag,
    special_tokens,
    tokenizer_class,
    unnamed_tokens,
)

VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
LARGEST_ID = 2**24  # published vocabularies have up to 262,144 tokens


def byte_level(file: Path) -> str:
    """tokenizer.json of a vocab.json and the merges.txt beside it, as transformers makes one for their class.

    GPT-NeoX's normalizes texts by NFC, GPT-2's does not; a folder that names no class is GPT-2's. The file is made of
    checked values: a merge whose result is no token is a panic of the tokenizers package. Raises ValueError, naming the
    file, for a class with other rules and for what is damaged.
    """
    files = files_beside(file)
    kind = tokenizer_class(files) or GPT2
    if kind not in (GPT2, NEOX):
        raise ValueError(f"{file.parent} has tokenizer_class={quoted(kind)}; {VOCAB} needs {GPT2} or {NEOX}")
    ids = {name: checked_id(file, i) for name, i in read_object(file, TOKENIZER_BYTES).items()}
    check_largest(max(ids.values(), default=0))
    vocabulary = dict(sorted(ids.items(), key=lambda entry: entry[1]))
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    content: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    content["added_tokens"] = [entry | {"id": i} for i, entry in added_to(file, vocabulary).items()]
    content["normalizer"] = {"type": "NFC"} if kind == NEOX else None
    content["pre_tokenizer"] = level | {"add_prefix_space": flag(files, "add_prefix_space")}
    content |= {"post_processor": around(file, vocabulary) or level, "decoder": level}
    content["model"] = model | {"vocab": vocabulary, "merges": read_merges(file.with_name(MERGES), vocabulary)}
    return json.dumps(content)


def added_to(file: Path, vocabulary: dict[str, int]) -> dict[int, dict[str, Any]]:
    """Tokens added to a vocabulary.json by id: special ones, and those of added_tokens.json or added_tokens_decoder.

    They are entered into the vocabulary, too: otherwise the tokenizers package numbers them anew. A special token
    without an id has the next one.
    """
    files, more = files_beside(file), file.with_name(ADDED)
    settings, named = content_of_file(files, CONFIG), special_tokens(files)
    special = dict.fromkeys((*named.values(), *unnamed_tokens(files)))
    entries = dict(added_tokens(file.with_name(CONFIG), settings.get("added_tokens_decoder")))
    refuse_special(more)
    if "added_tokens_decoder" not in settings and more.is_file():
        for name, i in read_object(more).items():
            entries[checked_id(more, i)] = {"content": name, "special": name in special}
    known = {about["content"] for about in entries.values()}
    for name in special:
        if name not in known:
            i = vocabulary.get(name, max([*vocabulary.values(), *entries], default=-1) + 1)
            entries[i] = {"content": name, "special": True}
    found = {}
    for i, about in sorted(entries.items()):
        vocabulary[about["content"]] = i
        is_special = bool(about.get("special")) or about["content"] in special
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not is_special}
        found[i] = {name: bool(about.get(name, value)) for name, value in flags.items()}
        found[i] |= {"content": about["content"], "special": is_special}
    return found


def around(file: Path, vocabulary: Mapping[str, int]) -> dict[str, Any] | None:
    """Template of the tokens that add_bos_token and add_eos_token put around a text; None if there are none."""
    files = files_beside(file)
    named = special_tokens(files)
    ends = [named.get(f"{name}_token") if flag(files, f"add_{name}_token") else None for name in ("bos", "eos")]
    if not any(ends):
        return None

    def template(*letters: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for i, letter in enumerate(letters):
            before, after = ([{"SpecialToken": {"id": end, "type_id": i}}] if end else [] for end in ends)
            parts += [*before, {"Sequence": {"id": letter, "type_id": i}}, *after]
        return parts

    special = {end: {"id": end, "ids": [vocabulary[end]], "tokens": [end]} for end in ends if end}
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": special,
    }


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
