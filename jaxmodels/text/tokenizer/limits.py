"""Limits of a tokenizer.json, checked before it is used: no published one is beyond them.

A file of a few bytes may have normalizers that each double a text, a template that repeats it, or tokens of megabytes.
What cannot be computed from the file, as how long its regular expressions take, is limited where it is used:
`jaxmodels.text.tokenizer.untrusted`.
"""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxmodels.io.bounded import parsed
from jaxmodels.process.texts import quoted
from jaxmodels.text.tokenizer.patterns import Nullable, Pattern, Unsupported

STEPS = 256  # normalizers, pre-tokenizers, post-processors or decoders; published files have up to 30
GROWTH = 32  # characters that the rules may make of one; the largest that Unicode's own forms make is 18
LONGEST_TOKEN = 50_000  # characters; published vocabularies have runs of 1,024 spaces
LONGEST_PIECE = 512  # of a Unigram model, which compares every place of a text with all tokens
# Different beginnings of the pieces of a Unigram model, each of which takes 340 bytes; a large file may have one for
# every 6 of its bytes.
BEGINNINGS = 1_800_000
ADDED_BYTES = 2_000_000  # of all added tokens, which take a second for each million; published ones have up to 100,000
LONGEST_WORD = 1_000  # of WordPiece, which tries all parts of a word
LONGEST_AFFIX = 100  # continuing_subword_prefix and such, of every character, and the token of unknown words
TEMPLATE = 1_000  # parts of a template, and ids of a special token
ADDED = 64  # special tokens that all templates together add to a text
PATTERN = 10_000  # characters of all regular expressions; published tokenizers have up to 600
LETTERS = 256  # different characters that replacements write, of which is computed what sees them
# Characters that a normalizer may make of one.
UNICODE = {"NFKC": 18, "NFKD": 18, "Lowercase": 3, "NFC": 3, "NFD": 4, "Nmt": 1, "StripAccents": 1, "ByteLevel": 2}
NESTED = {"normalizers", "pretokenizers", "processors", "decoders"}
Step = Mapping[str, Any]


class Repeated(dict[str, Any]):
    """Object of a JSON text that has a name twice, with the last value of each."""


def check(content: str) -> dict[str, Any]:
    """Content of a tokenizer.json; raises ValueError for one whose rules may multiply a text, or that is no object."""
    parts = parsed(content, object_pairs_hook=object_of)
    if not isinstance(parts, dict):
        raise ValueError("it is no object")
    found = {
        name: list(steps(parts.get(name))) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    }
    for name, kind in found.items():
        if len(kind) > STEPS:
            raise ValueError(f"its {name} has {len(kind):,} steps; at most {STEPS}")
    size = sum(len(pattern) for kind in found.values() for pattern in expressions(kind))
    if size > PATTERN:
        raise ValueError(f"its regular expressions have {size:,} characters; at most {PATTERN:,}")
    for name in ("normalizer", "decoder"):
        growth = grows(found[name])
        if growth > GROWTH:
            raise ValueError(f"its {name} may make {quoted(round(growth))} characters of one; at most {GROWTH}")
    check_templates(found["post_processor"])
    check_model(parts.get("model"), len(content))
    check_added(objects(parts.get("added_tokens")), found["normalizer"])
    return parts


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Object of a JSON text."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(found)


def steps(step: Any) -> Iterator[Step]:
    """Steps of a normalizer, pre-tokenizer, post-processor or decoder, those of sequences one after the other."""
    left = collections.deque([step])
    while left:
        step = left.popleft()
        if not isinstance(step, dict):
            continue
        if step.get("type") != "Sequence":
            yield step
        else:
            inner = [each for name in NESTED & step.keys() for each in objects(step[name])]
            left.extendleft(reversed(inner))


def objects(values: Any) -> list[Step]:
    """Objects in a list of a JSON text; [] for any other value."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def grows(rules: Sequence[Step]) -> float:
    """Largest number of characters that rules, one after the other, may make of one.

    Only a rule that may see what an earlier one has written multiplies its number.
    """
    letters = {c for rule in rules if isinstance(rule.get("content"), str) for c in rule["content"]}
    written: list[tuple[float, set[str], int]] = []  # growth so far, characters and place of each Replace
    largest, other = 1.0, -1  # `other`: place of the last rule of another kind, which may change what was written
    for place, rule in enumerate(rules):
        kind, content = rule.get("type"), rule.get("content")
        if kind == "Prepend" and isinstance(rule.get("prepend"), str):
            largest = max(largest, largest * len(rule["prepend"]))
        if kind != "Replace" or not isinstance(content, str) or not isinstance(rule.get("pattern"), dict):
            other = place if kind not in ("Strip", "Fuse", "ByteFallback") else other
            continue
        factor, pattern = factor_of(rule["pattern"], content)
        sees = seen_by(pattern, letters)
        growth = max([1.0, *(before for before, text, at in written if at < other or not sees.isdisjoint(text))])
        written.append((growth * factor, set(content), place))
        largest = max(largest, growth * factor)
    return largest


def unicode_growth(rules: Sequence[Step]) -> int:
    """Largest number of characters that Unicode's rules among normalizers may make of one."""
    return math.prod(UNICODE.get(kind, 1) for kind in {str(rule.get("type")) for rule in rules})


def factor_of(pattern: Step, content: str) -> tuple[float, Pattern | str | None]:
    """Characters that a Replace writes for one, and its pattern: a string, or a regular expression; None if unknown."""
    text = pattern.get("String")
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text)), text
    try:
        return max(1.0, len(content)), Pattern(str(pattern.get("Regex", ""))[:PATTERN])
    except Nullable:  # it writes between characters too
        return len(content) + 1.0 if content else 1.0, None
    except Unsupported:
        return max(1.0, len(content)), None


def seen_by(pattern: Pattern | str | None, letters: set[str]) -> set[str]:
    """Characters among `letters` that a pattern may match, or look at beside a match."""
    if isinstance(pattern, str):
        return letters & set(pattern)
    return letters if pattern is None or len(letters) > LETTERS else {c for c in letters if may_touch(pattern, c)}


def may_touch(pattern: Pattern, c: str) -> bool:
    """True if a match may contain a character, also if that cannot be told."""
    try:
        return pattern.touches(c)
    except Unsupported:
        return True


def check_templates(processors: list[Step]) -> None:
    """Raise ValueError for post-processors that add many tokens to a text, one or all together."""
    for name in ("single", "pair"):
        added = sum(check_template(step)[name] for step in processors)
        if added > ADDED:
            raise ValueError(f"its template {name!r} adds {added:,} special tokens to each text; at most {ADDED}")


def check_template(step: Step) -> dict[str, int]:
    """Number of tokens that each template of a post-processor adds to a text.

    Raises ValueError for one that repeats a text, or adds special tokens without ids, or thousands.
    """
    adds = {"single": 0, "pair": 0}
    special = step.get("special_tokens")
    known = special if isinstance(special, dict) else {}
    for token in known.values():
        if isinstance(token, dict) and isinstance(token.get("ids"), list) and len(token["ids"]) > TEMPLATE:
            raise ValueError(f"its special token {quoted(token.get('id'))} has {len(token['ids']):,} ids")
    for name in ("single", "pair"):
        pieces = objects(step.get(name))
        if len(pieces) > TEMPLATE:
            raise ValueError(f"its template {name!r} has {len(pieces):,} parts; at most {TEMPLATE:,}")
        for text in ("A", "B"):
            if sum((piece.get("Sequence") or {}).get("id") == text for piece in pieces if "Sequence" in piece) > 1:
                raise ValueError(f"its template {name!r} repeats the text {text}")
        tokens = [piece["SpecialToken"] for piece in pieces if isinstance(piece.get("SpecialToken"), dict)]
        unknown = [token.get("id") for token in tokens if token.get("id") not in known]
        if unknown:
            raise ValueError(f"its template {name!r} has the special token {quoted(unknown[0])} without ids")
        ids = [known[token["id"]].get("ids") for token in tokens if isinstance(known[token["id"]], dict)]
        adds[name] = sum(len(found) for found in ids if isinstance(found, list))
    return adds


def check_model(model: Any, size: int) -> None:
    """Raise ValueError for a model whose tokens or words are so long that a text takes minutes, or it takes gigabytes.

    size: characters of its file.
    """
    if not isinstance(model, dict):
        return
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        check_tokens(vocabulary)
    elif isinstance(vocabulary, list):  # of a Unigram model, whose "type" older files leave out
        tokens = [pair[0] for pair in vocabulary if isinstance(pair, list) and pair]
        check_tokens(tokens, LONGEST_PIECE)
        check_pieces([utf8(token) for token in tokens if isinstance(token, str)], max(BEGINNINGS, size // 6))
    longest = model.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > LONGEST_WORD:
        raise ValueError(f"its max_input_chars_per_word={quoted(longest)} must be at most {LONGEST_WORD}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        affix = model.get(name)
        if isinstance(affix, str) and len(affix) > LONGEST_AFFIX:
            raise ValueError(f"its {name} has {len(affix):,} characters; at most {LONGEST_AFFIX}")


def check_pieces(pieces: list[bytes], most: int) -> None:
    """Raise ValueError for pieces of a Unigram model with many different beginnings, each a node of a tree."""
    if sum(map(len, pieces)) <= most:
        return
    found, previous = 0, b""
    for piece in sorted(pieces):
        found += len(piece) - shared(previous, piece)
        previous = piece
    if found > most:
        raise ValueError(f"its pieces have {found:,} different beginnings; at most {most:,}")


def shared(one: bytes, other: bytes) -> int:
    """Number of bytes with which both begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def check_added(tokens: Sequence[Step], normalizers: Sequence[Step]) -> None:
    """Raise ValueError for added tokens that are far longer than any published ones, one or all together."""
    found = [token for token in tokens if isinstance(token.get("content"), str)]
    check_tokens(token["content"] for token in found)
    growth = grows(normalizers) * unicode_growth(normalizers)
    size = sum(len(utf8(token["content"])) * (growth if token.get("normalized", True) else 1) for token in found)
    if size > ADDED_BYTES:
        raise ValueError(f"its added tokens may have {size:,.0f} bytes; at most {ADDED_BYTES:,}")


def check_tokens(tokens: Any, most: int = LONGEST_TOKEN) -> None:
    """Raise ValueError for a token that is far longer than any published one: texts of its id would be as long."""
    longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    if longest > most:
        raise ValueError(f"it has a token of {longest:,} characters; at most {most:,}")


def utf8(token: str) -> bytes:
    """Bytes of a token of a JSON text, which may have lone surrogates."""
    return token.encode("utf-8", "surrogatepass")


def expressions(found: list[Step]) -> Iterator[str]:
    """Regular expressions in the steps of a tokenizer.json."""
    for step in found:
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            yield pattern["Regex"]
