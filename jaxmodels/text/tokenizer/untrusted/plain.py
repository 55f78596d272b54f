"""Tokenizers whose work is known to be linear in a text, to grow it little and not to fail: most published ones.

They are used as they are. All others, such as those with a regular expression that is not listed here, work in a
confined process: how long an expression takes for a text that nobody has tried cannot be told from its own text.
"""

import collections
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels.text.tokenizer.limits import NESTED, UNICODE, Step, grows, unicode_growth

STEPS = 16  # of a normalizer, pre-tokenizer, post-processor or decoder
GROWTH = 64  # characters that all normalizers, or all decoders, may make of one
REMOVING = {"Strip", "StripAccents", "Nmt", "BertNormalizer"}  # remove spaces, marks or control characters
LONGEST = 100  # characters of a string that is looked for, or of an affix
LONGEST_PIECE = 128  # of a Unigram model: each place of a text is compared with so many characters
LONGEST_WORD = 200  # of WordPiece, which tries all parts of a word

MARK = re.compile(r"<[^<>]{2,}>|\[[A-Z]{3,}\]")  # <mask>, [MASK]: no text has thousands of them by accident

# Regular expressions of published tokenizers. Each takes time in proportion to the text: its alternatives differ in the
# first character or two, and a repetition gives back one character at most, or is followed by nothing else.
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD, OTHER = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{letters}" for letters in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*"))
LINEAR = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2, GPT-NeoX
    rf"{SHORT}|{WORD}|\p{{N}}{{1,3}}|{OTHER}|{SPACES}",  # GPT-4, Llama 3
    rf"{SHORT}|{WORD}|\p{{N}}|{OTHER}|{SPACES}",  # Qwen 2
    rf"{SHORT}|{WORD}|\p{{N}}+|{OTHER}|{SPACES}",
    rf"{CASED[0]}{SHORT}?|{CASED[1]}{SHORT}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",  # GPT-4o
    rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",  # Mistral's Tekken
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # BLOOM
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",  # DeepSeek-V3
    "[0-9][0-9][0-9]",  # Falcon
}
# One character or a class of them, not of nested ones, and a repetition of it.
ESCAPE, PROPERTY = r"\\[sSdDwWrnt]", r"\\[pP]\{[A-Za-z]{1,2}\}"
CLASS = rf"\[\^?(?:[^\\\[\]&^]|{ESCAPE}|{PROPERTY})+\]"
SINGLE = re.compile(rf"(?:[^\\\[\](){{}}.*+?|^$&]|{ESCAPE}|{PROPERTY}|{CLASS})(?:\+|\{{\d{{1,2}}(?:,\d{{0,2}})?\}})?")


def is_plain(parts: Step) -> bool:
    """True if all parts of a tokenizer.json, as `limits.check` returns it, are known to be harmless."""
    if type(parts) is not dict:
        return False
    sections = {name: simple_steps(parts.get(name)) for name in PARTS}
    for name, section in sections.items():
        if section is None or len(section) > STEPS or not all(harmless(step, PARTS[name]) for step in section):
            return False
    normalizers, pre_tokenizers, decoders = (
        sections[name] or [] for name in ("normalizer", "pre_tokenizer", "decoder")
    )
    if unicode_growth(normalizers) * grows(normalizers) > GROWTH or grows(decoders) > GROWTH:
        return False
    # Two of a kind may make four characters of one, and so on.
    kinds = [step["type"] for step in (*normalizers, *pre_tokenizers)], [step["type"] for step in decoders]
    if any(kinds[0].count(kind) > 1 for kind in ("ByteLevel", "Metaspace")):
        return False
    if any(kinds[1].count(kind) > 1 for kind in ("BPEDecoder", "WordPiece")):
        return False
    # What is prepended is no part of the text: other steps look for its place there, as do those that trim offsets.
    trims = any(step["type"] in ("ByteLevel", "RobertaProcessing") for step in sections["post_processor"] or [])
    others = {step["type"] for step in normalizers} - {"Prepend", "Replace"}
    if "Prepend" in kinds[0] and (trims or others or kinds[0].count("Prepend") > 1):
        return False
    return harmless_model(parts.get("model")) and harmless_added(parts.get("added_tokens"), normalizers)


def simple_steps(step: Any) -> list[Step] | None:
    """Steps of a section, those of sequences one after the other; None if it has anything but objects.

    An object with a name twice is none: other libraries may read another value.
    """
    left: collections.deque[Any] = collections.deque([] if step is None else [step])
    found: list[Step] = []
    while left:
        step = left.popleft()
        if type(step) is not dict:
            return None
        if step.get("type") != "Sequence":
            found.append(step)
            continue
        names = NESTED & step.keys()
        if len(names) != 1 or not isinstance(inner := step[names.pop()], list):
            return None
        left.extendleft(reversed(inner))
    return found


def harmless(step: Step, kinds: Mapping[str, Callable[[Step], bool]]) -> bool:
    """True if a step is of one of several kinds, and fulfils its condition."""
    check = kinds.get(step["type"]) if isinstance(step.get("type"), str) else None
    return check is not None and check(step)


def always(step: Step) -> bool:
    return True


def harmless_pattern(step: Step) -> bool:
    """True if the pattern of a step is a short string, or an expression that is known to take linear time."""
    pattern = step.get("pattern")
    if type(pattern) is not dict or len(pattern) != 1:
        return False
    ((kind, text),) = pattern.items()
    if not isinstance(text, str):
        return False
    if kind == "Regex":
        return text in LINEAR or SINGLE.fullmatch(text) is not None
    return kind == "String" and 0 < len(text) <= LONGEST


def harmless_template(step: Step) -> bool:
    """True if a post-processor keeps a text once, and of two each once: others are a panic."""
    return texts_of(step.get("single")) == ["A"] and texts_of(step.get("pair")) in (["A", "B"], ["B", "A"])


def texts_of(template: Any) -> list[Any] | None:
    """Names of the texts in a template; None if it has anything but texts and special tokens."""
    if not isinstance(template, list):
        return None
    found = []
    for piece in template:
        if type(piece) is not dict or len(piece) != 1:
            return None
        ((kind, about),) = piece.items()
        if kind not in ("Sequence", "SpecialToken") or type(about) is not dict:
            return None
        if kind == "Sequence":
            found.append(about.get("id"))
    return found


def harmless_strip(step: Step) -> bool:
    """True if a decoder removes characters at the start only: both ends of one character are a panic."""
    return step.get("stop") == 0


def harmless_suffix(step: Step) -> bool:
    """True if a decoder replaces a suffix: nothing is found between all characters."""
    return isinstance(step.get("suffix"), str) and bool(step["suffix"])


def harmless_model(model: Any) -> bool:
    """True if a model takes time in proportion to the text."""
    if type(model) is not dict:
        return False
    if model.get("type") == "WordPiece":
        longest = model.get("max_input_chars_per_word")
        return isinstance(longest, int) and longest <= LONGEST_WORD
    if model.get("type") == "Unigram":
        pieces = model.get("vocab")
        return isinstance(pieces, list) and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and len(pair[0]) <= LONGEST_PIECE
            for pair in pieces
        )
    return model.get("type") == "WordLevel" or (model.get("type") == "BPE" and harmless_merges(model))


def harmless_merges(model: Step) -> bool:
    """True if the result of each merge of a BPE is a token, without which the package panics.

    With a prefix of continuing subwords it cuts the second token, also inside a character, which ends the process.
    """
    tokens, merges = model.get("vocab"), model.get("merges")
    if not isinstance(tokens, dict) or not isinstance(merges, list) or model.get("continuing_subword_prefix"):
        return False
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            return False
        if "".join(pair) not in tokens:
            return False
    return True


def harmless_added(tokens: Any, normalizers: list[Step]) -> bool:
    """True if no added token sees what is beside it, nor may be normalized to nothing.

    To look beside a token, the package reads all of the text before it. An empty one is a panic.
    """
    if not isinstance(tokens, list):
        return tokens is None
    removes = any(step["type"] in REMOVING for step in normalizers)
    removes_any = any(step["type"] == "Replace" and not step.get("content") for step in normalizers)
    for token in tokens:
        if type(token) is not dict or not isinstance(content := token.get("content"), str) or token.get("single_word"):
            return False
        if (token.get("lstrip") or token.get("rstrip")) and not MARK.fullmatch(content):
            return False
        visible = any("!" <= c <= "~" for c in content)
        if token.get("normalized", True) and (removes_any or (removes and not visible)):
            return False
    return True


NORMALIZERS = dict.fromkeys(("BertNormalizer", "Strip", "Prepend", *UNICODE), always) | {"Replace": harmless_pattern}
WORDS = ("Digits", "Punctuation", "UnicodeScripts", "Whitespace", "WhitespaceSplit", "BertPreTokenizer")
PRE_TOKENIZERS = dict.fromkeys((*WORDS, "ByteLevel", "CharDelimiterSplit", "Metaspace"), always) | {
    "Split": harmless_pattern
}
POST_PROCESSORS = dict.fromkeys(("BertProcessing", "ByteLevel", "RobertaProcessing"), always) | {
    "TemplateProcessing": harmless_template
}
DECODERS = dict.fromkeys(("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "WordPiece"), always) | {
    "BPEDecoder": harmless_suffix,
    "Replace": harmless_pattern,
    "Strip": harmless_strip,
}
PARTS: dict[str, Mapping[str, Callable[[Step], bool]]] = {
    "normalizer": NORMALIZERS,
    "pre_tokenizer": PRE_TOKENIZERS,
    "post_processor": POST_PROCESSORS,
    "decoder": DECODERS,
}
