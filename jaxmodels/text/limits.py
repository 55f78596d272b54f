"""Limits of a tokenizer.json, checked before it is used: its rules must not multiply a text, and must not take forever.

A file of a few bytes may have normalizers that each double a text, a template that repeats it, tokens of megabytes, or
a regular expression that tries all ways to divide a word. What the rules may do is computed from the file; how long its
regular expressions take is measured on short texts.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmodels.process.texts import quoted
from jaxmodels.text.patterns import Pattern, Unsupported

STEPS = 256  # normalizers, pre-tokenizers, post-processors or decoders; published files have up to 30
GROWTH = 32  # characters that the rules may make of one; the largest that Unicode's own forms make is 18
LONGEST_TOKEN = 50_000  # characters; published vocabularies have runs of 1,024 spaces
LONGEST_PIECE = 512  # of a Unigram model, which compares every place of a text with all tokens
LONGEST_WORD = 1_000  # of WordPiece, which tries all parts of a word
LONGEST_AFFIX = 100  # continuing_subword_prefix and such, of every character
TEMPLATE = 1_000  # parts of a template, and ids of a special token
PATTERN = 10_000  # characters of a regular expression
SECONDS = 1.0  # for a probe; published tokenizers take some milliseconds
RUNS = (16, 24, 32, 64, 250, 1_000)  # characters
PROSE = "Wherever 2 or 3 are gathered, isn't it so: naïve größe, 中文 and déjà-vu;\n\tx_1 = f(a)[0] * 10.5  # (ok) "
NESTED = {"normalizers", "pretokenizers", "processors", "decoders"}
Step = Mapping[str, Any]


def check(content: str) -> None:
    """Raise ValueError for a tokenizer.json whose rules may multiply a text or take time without bound."""
    parts = json.loads(content)
    if not isinstance(parts, dict):
        raise ValueError("it is no object")
    found = {
        name: list(steps(parts.get(name))) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    }
    for name, kind in found.items():
        if len(kind) > STEPS:
            raise ValueError(f"its {name} has {len(kind):,} steps; at most {STEPS}")
    for name in ("normalizer", "decoder"):
        growth = grows(found[name])
        if growth > GROWTH:
            raise ValueError(f"its {name} may make {quoted(round(growth))} characters of one; at most {GROWTH}")
    for step in found["post_processor"]:
        check_template(step)
    check_model(parts.get("model"))
    check_tokens(token.get("content") for token in objects(parts.get("added_tokens")))


def steps(step: Any) -> Iterator[Step]:
    """Steps of a normalizer, pre-tokenizer, post-processor or decoder, those of sequences one after the other."""
    left = [step]
    while left:
        step = left.pop(0)
        if not isinstance(step, dict):
            continue
        if step.get("type") != "Sequence":
            yield step
        else:
            left[:0] = [inner for name in NESTED & step.keys() for inner in objects(step[name])]


def objects(values: Any) -> list[Step]:
    """Objects in a list of a JSON text; [] for any other value."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def grows(rules: list[Step]) -> float:
    """Largest number of characters that rules, one after the other, may make of one.

    Only a rule that may see what an earlier one has written multiplies its number.
    """
    written: list[tuple[float, str, int]] = []  # growth so far, content and place of each Replace
    largest, other = 1.0, -1  # `other`: place of the last rule of another kind, which may change what was written
    for place, rule in enumerate(rules):
        kind, content = rule.get("type"), rule.get("content")
        if kind == "Prepend" and isinstance(rule.get("prepend"), str):
            largest = max(largest, largest * len(rule["prepend"]))
        if kind != "Replace" or not isinstance(content, str) or not isinstance(rule.get("pattern"), dict):
            other = place if kind not in ("Strip", "Fuse", "ByteFallback") else other
            continue
        factor, pattern = factor_of(rule["pattern"], content)
        seen = [before for before, text, at in written if at < other or sees(pattern, text)]
        growth = max([1.0, *seen]) * factor
        written.append((growth, content, place))
        largest = max(largest, growth)
    return largest


def factor_of(pattern: Step, content: str) -> tuple[float, Pattern | str | None]:
    """Characters that a Replace writes for one, and its pattern: a string, or a regular expression; None if unknown."""
    text = pattern.get("String")
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text)), text
    try:
        return max(1.0, len(content)), Pattern(str(pattern.get("Regex", ""))[:PATTERN])
    except (Unsupported, IndexError, RecursionError):
        return max(1.0, len(content) + inserts(pattern, content)), None


def inserts(pattern: Step, content: str) -> bool:
    """True if a Replace may write between characters, by a pattern that matches nothing."""
    from tokenizers import Regex, normalizers

    if not content:
        return False
    try:
        rule = normalizers.Replace(Regex(str(pattern.get("Regex", ""))[:PATTERN]), "\0")
        return any(len(rule.normalize_str(text)) > len(text) for text in (PROSE, "a", " ", "\n\n", "1"))
    except BaseException as error:  # an expression that is none is refused when it is used, also by a Rust panic
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return True


def sees(pattern: Pattern | str | None, text: str) -> bool:
    """True if a pattern may match a part of a text, or what is beside it."""
    if isinstance(pattern, str):
        return not set(pattern).isdisjoint(text)
    return pattern is None or any(map(pattern.touches, set(text)))


def check_template(step: Step) -> None:
    """Raise ValueError for a post-processor that repeats a text, or adds special tokens without ids, or thousands."""
    special = step.get("special_tokens")
    known = special if isinstance(special, dict) else {}
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
    for token in known.values():
        if isinstance(token, dict) and isinstance(token.get("ids"), list) and len(token["ids"]) > TEMPLATE:
            raise ValueError(f"its special token {quoted(token.get('id'))} has {len(token['ids']):,} ids")


def check_model(model: Any) -> None:
    """Raise ValueError for a model whose tokens or words are so long that a text takes minutes."""
    if not isinstance(model, dict):
        return
    vocabulary, unigram = model.get("vocab"), model.get("type") == "Unigram"
    if isinstance(vocabulary, dict):
        check_tokens(vocabulary)
    elif isinstance(vocabulary, list):
        tokens = (pair[0] for pair in vocabulary if isinstance(pair, list) and pair)
        check_tokens(tokens, LONGEST_PIECE if unigram else LONGEST_TOKEN)
    longest = model.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > LONGEST_WORD:
        raise ValueError(f"its max_input_chars_per_word={quoted(longest)} must be at most {LONGEST_WORD}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        affix = model.get(name)
        if isinstance(affix, str) and len(affix) > LONGEST_AFFIX:
            raise ValueError(f"its {name} has {len(affix):,} characters; at most {LONGEST_AFFIX}")


def check_tokens(tokens: Any, most: int = LONGEST_TOKEN) -> None:
    """Raise ValueError for a token that is far longer than any published one: texts of its id would be as long."""
    longest = max((len(token) for token in tokens if isinstance(token, str)), default=0)
    if longest > most:
        raise ValueError(f"it has a token of {longest:,} characters; at most {most:,}")


def probe(tokenizer: Any, content: str) -> None:
    """Raise ValueError if a tokenizer with regular expressions of its own is very slow with short texts.

    Oniguruma, which the package uses, gives up a match after ten million steps, but it may take nearly as many at each
    place of a text. Its own time is measured, which does not depend on other processes.
    """
    patterns = list(expressions(json.loads(content)))
    if not patterns:
        return
    if max(map(len, patterns)) > PATTERN:
        raise ValueError(f"it has a regular expression of {max(map(len, patterns)):,} characters; at most {PATTERN:,}")
    letters = sorted({c for pattern in patterns for c in pattern if c.isalnum()})[:40]
    characters = dict.fromkeys(["a", "B", "0", " ", "\n", ".", "_", "é", "中", *letters])
    texts = ["!".join(c * length for c in characters) for length in RUNS]
    texts += [PROSE * (length // len(PROSE)) for length in (3_000, 10_000, 30_000)]
    for text in texts:
        began = time.thread_time()
        try:
            tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # a vocabulary without an unknown token
            continue
        seconds = time.thread_time() - began
        if seconds > SECONDS:
            raise ValueError(f"its regular expressions take {seconds:.1f} s for {len(text):,} characters")


def expressions(value: Any) -> Iterator[str]:
    """Regular expressions in the steps of a tokenizer.json."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        for step in steps(value.get(name)):
            pattern = step.get("pattern")
            if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
                yield pattern["Regex"]
