"""tokenizer.json of a vocab.json with its merges.txt, as GPT-2's and GPT-NeoX's tokenizers are published."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.io.bounded import TOKENIZER_BYTES, read_object, read_text
from jaxmodels.process.texts import quoted
from jaxmodels.text.tokenizer.settings import add, cleaning, missing_tokens, refuse_contradictions, refuse_split
from jaxmodels.text.tokenizer.special import (
    CONFIG,
    GPT2,
    NEOX,
    checked_id,
    files_beside,
    flag,
    special_tokens,
    tokenizer_class,
)
from jaxmodels.text.tokenizer.untrusted import operations

VOCAB, MERGES = "vocab.json", "merges.txt"
LARGEST_ID = 2**24  # published vocabularies have up to 262,144 tokens


def byte_level(file: Path) -> str:
    """tokenizer.json of a vocab.json and the merges.txt beside it, as transformers makes one for their class.

    GPT-NeoX's normalizes texts by NFC, GPT-2's does not; a folder that names no class is GPT-2's. The file is made of
    checked values: a merge whose result is no token is a panic of the tokenizers package. Raises ValueError, naming the
    file, for a class with other rules and for what is damaged.
    """
    files = files_beside(file)
    refuse_split(files, file.with_name(CONFIG))
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
    content["normalizer"] = {"type": "NFC"} if kind == NEOX else None
    content["pre_tokenizer"] = level | {"add_prefix_space": flag(files, "add_prefix_space")}
    content |= {"post_processor": level, "decoder": level}
    content["model"] = model | {"vocab": vocabulary, "merges": read_merges(file.with_name(MERGES), vocabulary)}
    tokenizer = operations.loaded(json.dumps(content))
    add(tokenizer, list(missing_tokens(file, files, tokenizer, every=True)), file.with_name(CONFIG))
    refuse_contradictions(file, files, file.with_name(CONFIG), tokenizer)
    around = template(file, tokenizer)
    rules = around | cleaning(files, tokenizer, {})
    return str(json.dumps(json.loads(tokenizer.to_str()) | rules) if rules else tokenizer.to_str())


def template(file: Path, tokenizer: Any) -> dict[str, Any]:
    """Post-processor of the tokens that add_bos_token and add_eos_token put around a text; {} if there are none."""
    files = files_beside(file)
    named = special_tokens(files)
    ends = [named.get(f"{name}_token") if flag(files, f"add_{name}_token") else None for name in ("bos", "eos")]
    if not any(ends):
        return {}

    def parts_of(*letters: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for i, letter in enumerate(letters):
            before, after = ([{"SpecialToken": {"id": end, "type_id": i}}] if end else [] for end in ends)
            parts += [*before, {"Sequence": {"id": letter, "type_id": i}}, *after]
        return parts

    special = {end: {"id": end, "ids": [tokenizer.token_to_id(end)], "tokens": [end]} for end in ends if end}
    about = {"type": "TemplateProcessing", "single": parts_of("A"), "pair": parts_of("A", "B")}
    return {"post_processor": about | {"special_tokens": special}}


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
