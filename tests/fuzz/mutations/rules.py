"""Tokenizers with other rules, and chat templates with other expressions, of parts that may hang, swell or fail."""

import json
from typing import Any

from tests.fuzz.mutations.values import INTEGERS, Rng, choose

LETTERS = ("a", "b", "-", " ", "é", "ß", "中", "\ufdfa", "▁", "\n", "0", "\U0001f600", "")
ATOMS = (
    "a",
    "-",
    " ",
    ".",
    r"\s",
    r"\w",
    r"\d",
    r"\p{L}",
    "[^a]",
    "[a-z]",
    r"\S",
    "é",
    "$",
    "^",
    r"\b",
    r"(?<=a)",
    r"\p{LL",
)
SUFFIXES = ("", "", "+", "*", "?", "{2,}", "{1,3}", "{22}", "{1000}", "*?", "++", "{100000}")
SIZES = (0, 1, 1, 2, 7, 100, 2**31 - 1, 2**63 - 1, 2**64 - 1, -1)
BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous", "Other")
KINDS = {
    "normalizer": "NFC NFD NFKC NFKD Lowercase StripAccents Nmt ByteLevel Strip Prepend BertNormalizer Replace "
    "Precompiled",
    "pre_tokenizer": "ByteLevel Whitespace WhitespaceSplit BertPreTokenizer Metaspace CharDelimiterSplit Punctuation "
    "Digits UnicodeScripts Split FixedLength",
    "post_processor": "ByteLevel BertProcessing RobertaProcessing TemplateProcessing",
    "decoder": "ByteLevel ByteFallback Fuse Metaspace WordPiece BPEDecoder CTC Strip Replace",
}
NAMES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


def expression(rng: Rng, depth: int = 0) -> str:
    """A regular expression."""
    found = ""
    for _ in range(int(rng.integers(1, 5))):
        part = f"({expression(rng, depth + 1)})" if depth < 3 and rng.random() < 0.3 else choose(rng, ATOMS)
        found += part + choose(rng, SUFFIXES) + ("|" if rng.random() < 0.2 else "")
    return found


def some(rng: Rng) -> str:
    """A short text, which is seldom long."""
    return choose(rng, LETTERS) * choose(rng, (1, 1, 1, 2, 3, 17, 1000))


def step(section: str, rng: Rng) -> dict[str, Any]:
    """A normalizer, pre-tokenizer, post-processor or decoder with all fields that any of its kind has."""
    pattern = {"String": some(rng)} if rng.random() < 0.4 else {"Regex": expression(rng)}
    token = choose(rng, ("a", "b", "<|endoftext|>", "?"))
    pieces = [{"Sequence": {"id": choose(rng, "AAB"), "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}]
    special = {
        token: {"id": token, "ids": [choose(rng, (0, 1, 2**32 - 1))] * choose(rng, (0, 1, 40)), "tokens": [token]}
    }
    return {
        "type": choose(rng, KINDS[section].split()),
        "pattern": pattern,
        "content": some(rng)[:1] if section == "decoder" and rng.random() < 0.5 else some(rng),
        "behavior": choose(rng, BEHAVIORS),
        "invert": bool(rng.integers(2)),
        "prepend": some(rng),
        "suffix": some(rng),
        "prefix": some(rng),
        "replacement": choose(rng, LETTERS[:-1]),
        "prepend_scheme": choose(rng, ("always", "first", "never")),
        "split": bool(rng.integers(2)),
        "delimiter": choose(rng, LETTERS[:-1]),
        "precompiled_charsmap": choose(rng, ("", "AAAA", "BAAAAAAAAABhYWE=", "////////", "BAAAAAEAAABhAA==")),
        "start": choose(rng, SIZES),
        "stop": choose(rng, SIZES),
        "length": choose(rng, SIZES),
        "cleanup": True,
        "pad_token": some(rng),
        "word_delimiter_token": some(rng),
        "sep": [token, choose(rng, (0, 2**32 - 1))],
        "cls": [token, 0],
        "single": [choose(rng, pieces) for _ in range(choose(rng, (0, 1, 2, 3, 70)))],
        "pair": pieces[:1],
        "special_tokens": special if rng.random() < 0.9 else {},
        **dict.fromkeys(("strip_left", "strip_right", "add_prefix_space", "clean_text", "handle_chinese_chars"), True),
        **dict.fromkeys(("use_regex", "lowercase", "individual_digits", "trim_offsets"), bool(rng.integers(2))),
        "strip_accents": None,
    }


def mutated_rules(content: bytes, rng: Rng) -> bytes:
    """tokenizer.json with one section of other rules; raises ValueError or TypeError if it is none."""
    parts = json.loads(content)
    section = choose(rng, list(KINDS))
    steps = [step(section, rng) for _ in range(choose(rng, (1, 1, 2, 3, 5)))]
    steps *= choose(rng, (1, 1, 1, 2, 7, 40))
    single = len(steps) == 1 and rng.random() < 0.5
    parts[section] = steps[0] if single else {"type": "Sequence", NAMES.get(section, "decoders"): steps}
    if rng.random() < 0.2:
        token = {"id": 0, "content": some(rng), "special": bool(rng.integers(2)), "normalized": bool(rng.integers(2))}
        flags = {name: bool(rng.integers(2)) for name in ("single_word", "lstrip", "rstrip")}
        parts["added_tokens"] = [token | flags]
    return json.dumps(parts).encode()


METHODS = "center ljust rjust zfill expandtabs join replace format split splitlines translate encode rjust partition"
FILTERS = (
    "abs attr batch capitalize center default dictsort escape filesizeformat first float forceescape format groupby "
    "indent int items join last length list lower map max min pprint random reject rejectattr replace reverse round "
    "safe select selectattr slice sort string striptags sum title tojson trim truncate unique upper urlencode urlize "
    "wordcount wordwrap xmlattr"
)
VALUES = (
    "messages",
    "messages[0].content",
    "'a'",
    "'\\n\\t'",
    "'%1000000000d'",
    "'{:>9999999999}'",
    "[1, 'a']",
    "{'a': 1}",
    "range(99999)",
    "namespace(a=1)",
    "x",
    "loop",
    "self",
    "bos_token",
    "lipsum",
    "cycler(1)",
    "joiner()",
    "dict(a=1)",
    "1.5",
    "none",
    "strftime_now",
    "raise_exception",
    "''.__class__",
    *map(str, INTEGERS),
)
OPERATORS = ("+", "-", "*", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or")


def value(rng: Rng, depth: int = 0) -> str:
    """An expression of Jinja."""
    kind = int(rng.integers(7)) if depth < 4 else 0
    if kind < 2:
        return choose(rng, VALUES)
    one, other = value(rng, depth + 1), value(rng, depth + 1)
    if kind < 4:
        return f"({one} {choose(rng, OPERATORS)} {other})"
    if kind == 4:
        return f"({one})|{choose(rng, FILTERS.split())}" + (f"({other})" if rng.random() < 0.6 else "")
    if kind == 5:
        return f"({one}).{choose(rng, METHODS.split())}({other})"
    return f"({one})({other})" if rng.random() < 0.3 else f"({one})[{other}:{value(rng, depth + 1)}]"


def statement(rng: Rng, depth: int = 0) -> str:
    """A statement of Jinja, or a text."""
    kind = int(rng.integers(8)) if depth < 4 else 0
    if kind < 3:
        return f"{{{{ {value(rng)} }}}}"
    inner = "".join(statement(rng, depth + 1) for _ in range(int(rng.integers(1, 4))))
    return {
        3: f"{{% for x in {value(rng)} %}}{inner}{{% endfor %}}",
        4: f"{{% if {value(rng)} %}}{inner}{{% endif %}}",
        5: f"{{% set x = {value(rng)} %}}{inner}",
        6: f"{{% macro f(x) %}}{inner}{choose(rng, ('', '', '{{ f(x) }}'))}{{% endmacro %}}{{{{ f(1) }}}}",
        7: f"{{% filter {choose(rng, FILTERS.split())} %}}{inner}{{% endfilter %}}\x1b[2J",
    }[kind]


def other_template(content: bytes, rng: Rng) -> bytes:
    """Another chat template."""
    return "".join(statement(rng) for _ in range(int(rng.integers(1, 5)))).encode()
