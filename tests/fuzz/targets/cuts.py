"""Tokenizers of random parts with texts made for them: the pieces of a text have the ids of the whole text.

Nothing is changed here: every input is made anew. Different ids are a finding, as nothing would say so.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutations.values import Rng
from tests.fuzz.targets.kind import Target
from tests.jaxmodels.text.tokenizers import BLOOM, CLIP, GPT2, LLAMA3, O200K

Step = dict[str, Any]
SIZES = (1, 4, 17)  # characters of a piece
LETTERS = "abABkKsSıİßſ\u212aﬁéжÖ"
OTHERS = "12½²Ⅷ٣.,'\"-_!?[]<>(`$^~…’‐。、▁中日한\u0e33\u0301\u1161\u200d\u00ad"
SPACES = " \t\n\r\v\x85\xa0\u2028\u3000"
CHARACTERS = LETTERS + OTHERS + SPACES
WORDS = (" the", "'s", "\r\n", "\n\n", "  ", "...", "12", " a", ". ", "``", "▁▁", "e\u0301", "ab", "Ab", " B")
CATEGORIES = ("L", "Lu", "Ll", "M", "N", "Nd", "P", "S", "Z")
ESCAPES = (r"\s", r"\S", r"\w", r"\W", r"\d", r"\D", r"\n", r"\.", ".")
QUANTIFIERS = ("", "", "", "+", "+", "*", "?", "{1,3}", "{2,}", "+?", "++", "*+", "??")
BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
PUBLISHED = (GPT2, LLAMA3, O200K, CLIP, BLOOM, r"\w+|[^\w\s]+", r"\s+", r"\d", r" {2,}")


def pick(rng: Rng, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def word(rng: Rng, most: int = 3) -> str:
    """A few characters or words, mostly letters."""
    kinds = (LETTERS[:4], LETTERS[:4], CHARACTERS, WORDS)
    return "".join(pick(rng, pick(rng, kinds)) for _ in range(rng.integers(1, most + 1)))


def expression(rng: Rng, depth: int = 2) -> str:
    """A regular expression: published, or of random parts, of which no quantifier is inside another's group."""
    if depth == 2 and rng.random() < 0.3:
        return str(pick(rng, PUBLISHED))
    alternatives = ("".join(atom(rng, depth) for _ in range(rng.integers(1, 4))) for _ in range(rng.integers(1, 4)))
    return "|".join(alternatives)


def atom(rng: Rng, depth: int) -> str:
    kind = rng.integers(8)
    if kind < 5 or not depth:
        one = [lambda: escaped(rng), lambda: pick(rng, ESCAPES), lambda: category(rng), lambda: characters(rng)]
        return str(pick(rng, one)() + pick(rng, QUANTIFIERS))
    return f"({pick(rng, ('?:', '?i:', '?=', '?!', '?>'))}{expression(rng, depth - 1)})"


def escaped(rng: Rng) -> str:
    c = pick(rng, CHARACTERS)
    return f"\\{c}" if c in ".'\"-_!?[]<>(`$^~" and c not in "'`<>_" else c


def category(rng: Rng) -> str:
    return rf"\{pick(rng, 'ppP')}{{{pick(rng, CATEGORIES)}}}"


def characters(rng: Rng) -> str:
    """A class of characters."""
    members = (lambda: pick(rng, LETTERS), lambda: category(rng), lambda: pick(rng, (r"\s", r"\w", "a-z", "A-Z", " ")))
    return f"[{pick(rng, ('', '^'))}{''.join(pick(rng, members)() for _ in range(rng.integers(1, 4)))}]"


def pattern(rng: Rng) -> Step:
    return {"Regex": expression(rng)} if rng.random() < 0.7 else {"String": word(rng, 2)}


def flag(rng: Rng) -> bool:
    return bool(rng.integers(2))


def pre_tokenizer(rng: Rng) -> Step:
    kind = pick(rng, ("ByteLevel", "Metaspace", "Split", "Split", "Split", "Digits", "Punctuation", "other"))
    return {
        "ByteLevel": lambda: {"add_prefix_space": flag(rng), "trim_offsets": True, "use_regex": flag(rng)},
        "Metaspace": lambda: {
            "replacement": pick(rng, "▁▁▁_"),
            "prepend_scheme": pick(rng, ("always", "never", "first")),
            "split": flag(rng),
        },
        "Split": lambda: {"pattern": pattern(rng), "behavior": pick(rng, BEHAVIORS), "invert": rng.random() < 0.2},
        "Digits": lambda: {"individual_digits": flag(rng)},
        "Punctuation": lambda: {"behavior": pick(rng, BEHAVIORS)},
        "other": lambda: pick(rng, OTHER_PRE_TOKENIZERS),
    }[kind]() | ({"type": kind} if kind != "other" else {})


OTHER_PRE_TOKENIZERS: tuple[Step, ...] = (
    *({"type": name} for name in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")),
    *({"type": "CharDelimiterSplit", "delimiter": c} for c in " a.\n"),
)


def normalizer(rng: Rng) -> Step:
    kind = pick(rng, ("Replace", "Replace", "Replace", "Prepend", "Strip", "BertNormalizer", *PLAIN))
    parts: dict[str, Callable[[], Step]] = {
        "Replace": lambda: {"pattern": pattern(rng), "content": pick(rng, (" ", "▁", "", "b", "xy", word(rng)))},
        "Prepend": lambda: {"prepend": pick(rng, "▁▁▁ a")},
        "Strip": lambda: {"strip_left": flag(rng), "strip_right": flag(rng)},
        "BertNormalizer": lambda: {
            "clean_text": flag(rng),
            "handle_chinese_chars": flag(rng),
            "lowercase": flag(rng),
            "strip_accents": pick(rng, (None, True, False)),
        },
    }
    return {"type": kind, **parts.get(kind, dict)()}


PLAIN = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt")
LLAMA2 = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]


def sequence(name: str, steps: list[Step]) -> Step | None:
    return {"type": "Sequence", name: steps} if steps else None


def model(rng: Rng) -> Step:
    """A model whose vocabulary has every character of a text, as such and as its bytes' characters."""
    tokens = ["<unk>", *dict.fromkeys([*CHARACTERS, *map(chr, range(0x21, 0x144))])]
    kind = pick(rng, ("BPE", "BPE", "BPE", "WordLevel", "WordPiece", "Unigram"))
    known = {token: i for i, token in enumerate(tokens)}
    if kind == "BPE":
        parts, merges = [*"abABs12.,'▁ĠĊ_ "], []
        for _ in range(rng.integers(16)):
            one, other = str(pick(rng, parts)), str(pick(rng, parts))
            if one + other not in known and len(one + other) < 7:
                merges.append([one, other])
                parts.append(one + other)
                known[one + other] = len(known)
        return {
            "type": kind,
            "vocab": known,
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": flag(rng),
            "ignore_merges": rng.random() < 0.2,
            "byte_fallback": False,
        }
    for _ in range(20):
        known.setdefault(word(rng), len(known))
    if kind == "WordPiece":
        for token in list(known):
            known.setdefault(f"##{token}", len(known))
        longest = pick(rng, (4, 100))
        return {
            "type": kind,
            "vocab": known,
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": longest,
        }
    if kind == "WordLevel":
        return {"type": kind, "vocab": known, "unk_token": "<unk>"}
    scores = rng.uniform(-9, 0, len(known)).tolist()
    return {"type": kind, "vocab": [list(pair) for pair in zip(known, scores, strict=True)], "unk_id": 0}


def added(rng: Rng, number: int, first: int) -> list[Step]:
    """Added tokens with ids from a number on."""
    contents = dict.fromkeys(pick(rng, ("<m>", "[/INST]", " a", "ss", "\n\n", "1.", word(rng))) for _ in range(number))
    options = ("single_word", "lstrip", "rstrip", "special")
    return [
        {"id": first + i, "content": content, "normalized": flag(rng)} | {name: rng.random() < 0.2 for name in options}
        for i, content in enumerate(contents)
    ]


def make(folder: Path) -> None:
    build(folder, np.random.default_rng(0))


def build(folder: Path, rng: Rng) -> None:
    """Write a tokenizer and a text of what its parts look for."""
    normalizers = [normalizer(rng) for _ in range(pick(rng, (0, 0, 0, 1, 1, 2)))]
    found = model(rng)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "decoder": None,
        "added_tokens": added(rng, pick(rng, (0, 0, 1, 2)), len(found["vocab"])),
        "normalizer": sequence("normalizers", LLAMA2 if rng.random() < 0.1 else normalizers),
        "pre_tokenizer": sequence("pretokenizers", [pre_tokenizer(rng) for _ in range(pick(rng, (0, 1, 1, 1, 2)))]),
        "model": found,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=1))
    special = [token["content"] for token in content["added_tokens"]]
    sought = [step["pattern"].get("String", " ") for step in normalizers if "pattern" in step]
    joined = ["".join(pair) for pair in found.get("merges", [])]
    own = [*special, *(f" {token} " for token in special), *sought, *joined, " "]
    text = "".join(str(pick(rng, own)) if rng.random() < 0.2 else word(rng, 1) for _ in range(rng.integers(10, 100)))
    (folder / "text.json").write_text(json.dumps(text))


def read(folder: Path) -> Any:
    """Ids of the text; raises AssertionError if those of its pieces are others."""
    from jaxmodels.text import TokenizerFile
    from jaxmodels.text.documents import Text
    from jaxmodels.text.pieces import pieces

    file = folder / "tokenizer.json"
    vocabulary = TokenizerFile(file.read_text(), file=str(file))
    len(vocabulary)
    text = json.loads((folder / "text.json").read_text())
    whole = vocabulary.encode(text).tolist()
    if vocabulary.cuts.reason is None:
        for size in SIZES:
            parts = [piece.text for piece in pieces(Text("text", text), vocabulary.cuts, size=size)]
            ids = list(itertools.chain.from_iterable(vocabulary.encode(part).tolist() for part in parts))
            if ids != whole:
                first = next((i for i, pair in enumerate(zip(ids, whole, strict=False)) if pair[0] != pair[1]), -1)
                raise AssertionError(f"pieces of {size}: ids differ from number {first} on: {parts!a}")
    return len(whole)


TARGETS = (Target("tokenizer, cut", make, read, build=build),)
