"""Places where a text can be cut so that the ids of its pieces, one after the other, are those of the whole text.

A cut is judged by the two characters beside it, from the parts of a tokenizer.json:

- no added token spans it, and none at its edge sees or strips what lies beyond;
- normalizers map both sides independently;
- a pre-tokenizer always separates the two characters, and finds the same pieces on both sides; or, if none does, the
  model is a BPE without a merge that joins a token that ends with the one character to one that begins with the other.

What is not known to have these properties is never cut: the text is then encoded whole.
"""

import functools
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxmodels.text.tokenizer.limits import expressions
from jaxmodels.text.tokenizer.patterns import WHITESPACE, Pattern, Unsupported, is_word, parsed
from jaxmodels.text.tokenizer.untrusted.operations import Step, flat

# Characters that a piece may begin with: none combines with what is before it.
AFTER = frozenset(" \n\r\t!\"#$%&'()*+,-./:;<=>?@[\\]^{|}~—…、。「」『』《》！（），：；？")
# Letters that belong to the same grapheme as the next or the previous character.
JOINING = frozenset("\u0d4e\u0e33\u0eb3\U000111c2\U000111c3\U0001193f\U00011941\U00011a3a\U00011d46\U00011f02") | set(
    map(chr, range(0x11A84, 0x11A8A))
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SAMPLES = [("a", " "), ("a", "\n"), ("a", "."), (".", " "), ("中", "。"), ("1", " ")]  # tried to say why none can
# Beyond these, cuts are not looked for. Published tokenizers have up to 30 steps, and 600 characters of expressions.
MOST_STEPS, MOST_EXPRESSIONS = 40, 2_000
MOST_IMAGES = 8  # pairs of characters that normalizers may make of one
MOST_PAIRS = 2_000  # of characters that are judged for a tokenizer; no others are cut
REMOVE_SPACES = ("WhitespaceSplit", "BertPreTokenizer", "Whitespace")
Normalized = Callable[[int, int, Sequence[str]], list[str]]


class NoCut(Exception):
    """A cut may change ids; the message says which part of the tokenizer is the reason."""


class Anywhere:
    """Texts that can be cut everywhere: each character, or byte, has its own ids."""

    dropped = 0
    reason: str | None = None

    def last(self, text: str, low: int, high: int) -> int | None:
        """Largest place from low + 1 to high where a text can be cut; None if there is none."""
        return min(high, len(text)) if min(high, len(text)) > low else None


class Cuts:
    """Places where texts can be cut for a tokenizer.

    content: text of a tokenizer.json, as the package writes it. normalize: function that normalizes texts by the
    normalizers from one number to before another. dropped: number of characters, 0 or 1, that a cut leaves out: a
    tokenizer that prepends a space to every text is given what follows a space. reason: why no text can be cut; None
    if some can.
    """

    def __init__(self, content: str, normalize: Normalized):
        parts = json.loads(content)
        self.normalize = normalize
        self.normalizers = flat(parts.get("normalizer"), "normalizers")
        self.pre_tokenizers = flat(parts.get("pre_tokenizer"), "pretokenizers")
        self.content = content
        self.model: Step = {name: value for name, value in parts["model"].items() if name not in ("vocab", "merges")}
        added = parts.get("added_tokens") or []
        changed = [token for token in added if token["normalized"] and self.normalizers]
        self.raw = Added(token for token in added if not (token["normalized"] and self.normalizers))
        n = len(self.normalizers)
        contents = self.normalize(0, n, [token["content"] for token in changed]) if changed else []
        self.normalized = Added({**token, "content": content} for token, content in zip(changed, contents, strict=True))
        self.dropped = int(any(step["type"] == "Prepend" for step in self.normalizers))
        self.known: dict[tuple[str, str], bool] = {}
        self.reason = self.explain()

    def last(self, text: str, low: int, high: int) -> int | None:
        """Largest place from low + 1 to high where a text can be cut; None if there is none."""
        if self.reason is not None:
            return None
        for place in range(min(high, len(text) - 2), low, -1):
            after = text[place]
            if after in AFTER and self.separate(text[place - 1], after):
                following = text[place + 1]
                if not self.dropped or (following.isalnum() and steady(following) and following not in self.raw.first):
                    return place
        return None

    def separate(self, before: str, after: str) -> bool:
        """True if every text can be cut between two characters."""
        pair = before, after
        if pair not in self.known:
            if len(self.known) >= MOST_PAIRS:
                return False
            try:
                self.check(before, after)
            except (NoCut, Unsupported):
                self.known[pair] = False
            else:
                self.known[pair] = True
        return self.known[pair]

    def explain(self) -> str | None:
        """Reason why the likeliest places are no cuts; None if one is."""
        rules: list[Mapping[str, Any]] = [*self.normalizers, *self.pre_tokenizers]
        if len(rules) > MOST_STEPS or sum(len(text) for text in expressions(rules)) > MOST_EXPRESSIONS:
            return "its rules, which are more than in any published tokenizer"
        reasons = []
        for before, after in SAMPLES:
            try:
                self.check(before, after)
            except NoCut as reason:
                reasons.append(str(reason))
            except Unsupported as reason:
                reasons.append(f"its regular expression has {reason}")
            else:
                return None
        return reasons[0]

    def check(self, before: str, after: str) -> None:
        """Raise NoCut or Unsupported if a cut between two characters may change ids."""
        if unicodedata.category(before)[0] not in "LNP" or before in JOINING or not steady(before):
            raise NoCut("the character before the cut may combine with others")
        self.raw.check(before, after)
        images = {(before, after)}
        for i, step in enumerate(self.normalizers):
            if step["type"] == "Prepend":
                self.check_prepend(i, before, after)
            else:
                images = {image for pair in images for image in self.images(i, *pair)}
            if len(images) > MOST_IMAGES or not all(steady(c) for pair in images for c in pair):
                raise NoCut(f"its normalizer {step['type']}")
        for before, after in images:
            self.normalized.check(before, after)
            self.check_words(before, after)

    def images(self, i: int, before: str, after: str) -> set[tuple[str, str]]:
        """Characters that those beside a cut may become by a normalizer, of which `i` is the number.

        Raises NoCut if it does not map the sides separately.
        """
        step = self.normalizers[i]
        kind = step["type"]
        if kind == "Replace":
            pattern = Pattern.of(step["pattern"])
            if not pattern.may_cut(before, after):
                raise NoCut("its normalizer Replace")
            left, right = (replaced(pattern, c, step["content"]) for c in (before, after))
            return {(a[-1], b[0]) for a in left for b in right}
        if kind == "Strip":
            if (step["strip_left"] and after in WHITESPACE) or (step["strip_right"] and before in WHITESPACE):
                raise NoCut("its normalizer Strip")
            return {(before, after)}
        if kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled"):
            one, other = self.normalize(i, i + 1, [before, after])
            if one and other:
                return {(one[-1], other[0])}
        raise NoCut(f"its normalizer {kind}")

    def check_words(self, before: str, after: str) -> None:
        """Raise NoCut or Unsupported if pre-tokenizers and model may treat a cut in normalized text otherwise."""
        for i, step in enumerate(self.pre_tokenizers):
            check_prefix(step, after)
            images = separate(step, before, after)
            if images is None:
                if not (step["type"] in REMOVE_SPACES and after in WHITESPACE):
                    for done, later in itertools.pairwise(self.pre_tokenizers[i:]):
                        after = shown(done, after)
                        check_prefix(later, after)
                return
            before, after = images
        self.check_model(before, after)

    def check_prepend(self, i: int, before: str, after: str) -> None:
        """Raise NoCut unless a piece without its first character, and with what is prepended, is as it was.

        Behind an added token it is not: what follows one has both the character and what is prepended.
        """
        prefix, rest = self.normalizers[i]["prepend"], self.normalizers[i + 1 :]
        simple = all(step["type"] == "Replace" and len(step["pattern"].get("String", "  ")) == 1 for step in rest)
        if i or self.normalized.any or before in self.raw.last or after in self.raw.first or not simple:
            raise NoCut("its normalizer Prepend, with what is beside it")
        one, other = self.normalize(i + 1, len(self.normalizers), [after, prefix])
        if one != other:
            raise NoCut("its normalizer Prepend")

    def check_model(self, before: str, after: str) -> None:
        """Raise NoCut unless a model that sees both sides of the cut never joins them."""
        model = self.model
        if model["type"] != "BPE":
            raise NoCut(f"its model {model['type']}, as no pre-tokenizer always separates words")
        if any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
            raise NoCut("its BPE model, which treats words as wholes, as no pre-tokenizer always separates them")
        characters, joined = self.merges
        if not {before, after} <= characters or (before, after) in joined:
            raise NoCut("its merges, as no pre-tokenizer always separates words")

    @functools.cached_property
    def merges(self) -> tuple[set[str], set[tuple[str, str]]]:
        """Characters that are tokens of a BPE, and the last and first character of the two tokens of each merge."""
        model = json.loads(self.content)["model"]
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        return {token for token in model["vocab"] if len(token) == 1}, {
            (left[-1], right[0]) for left, right in merges if left and right
        }


class Added:
    """Added tokens: what a cut must not be beside."""

    def __init__(self, tokens: Iterable[Step]):
        found = [token for token in tokens if token["content"]]
        self.any = bool(found)
        self.first = {token["content"][0] for token in found}
        self.last = {token["content"][-1] for token in found}
        self.inside = {pair for token in found for pair in zip(token["content"], token["content"][1:], strict=False)}
        self.strips = any(token["lstrip"] or token["rstrip"] for token in found)
        self.ends_that_strip = {token["content"][-1] for token in found if token["rstrip"]}
        self.starts_of_words = {token["content"][0] for token in found if token["single_word"]}
        self.ends_of_words = {token["content"][-1] for token in found if token["single_word"]}

    def check(self, before: str, after: str) -> None:
        """Raise NoCut if a token may span a cut, or see or strip what lies beyond."""
        if (
            (before, after) in self.inside
            or before in self.ends_that_strip
            or after in self.starts_of_words
            or (before in self.ends_of_words and is_word(after))
            or (self.strips and before in WHITESPACE)
        ):
            raise NoCut("its added tokens")


def steady(c: str) -> bool:
    """True if a character does not combine with those before it in any Unicode normal form."""
    first = unicodedata.normalize("NFKD", c)[0]
    if unicodedata.category(c) == "Nl":  # a letter of words for one library, and none for another
        return False
    return unicodedata.category(first)[0] not in "MC" and not "\u1160" <= first <= "\u11ff"


def replaced(pattern: Pattern, c: str, content: str) -> set[str]:
    """Characters that one beside a cut may become: the content, if it is in a match; raises NoCut if that is empty."""
    if not pattern.touches(c):
        return {c}
    if not content:
        raise NoCut("its normalizer Replace")
    return {content} if pattern.always_matches(c) else {content, c}


def check_prefix(step: Step, after: str) -> None:
    """Raise NoCut if a pre-tokenizer may put a space before a piece that begins with a character."""
    if step["type"] == "ByteLevel":
        prepends, kept = step["add_prefix_space"], " "
    elif step["type"] == "Metaspace":
        prepends, kept = step["prepend_scheme"] != "never", " " + step["replacement"]
    else:
        return
    if prepends and after not in kept:
        raise NoCut(f"its pre-tokenizer {step['type']}, which prepends a space")


def shown(step: Step, c: str) -> str:
    """First character that a pre-tokenizer makes of one."""
    if step["type"] == "Metaspace" and c == " ":
        return step["replacement"]
    return byte_characters(c)[0] if step["type"] == "ByteLevel" else c


def separate(step: Step, before: str, after: str) -> tuple[str, str] | None:
    """None if a pre-tokenizer always separates two characters; else what they become.

    Raises NoCut or Unsupported if the pieces on one side may depend on the other side.
    """
    kind = step["type"]
    pair = before, after
    if kind == "Metaspace":
        after = step["replacement"] if after == " " else after
        before = step["replacement"] if before == " " else before
        return None if after == step["replacement"] and step["split"] else (before, after)
    if kind == "ByteLevel":
        if step["use_regex"] and divided(parsed(GPT2), pair):
            return None
        return byte_characters(before)[-1], byte_characters(after)[0]
    if kind in ("WhitespaceSplit", "BertPreTokenizer"):
        punctuation = kind == "BertPreTokenizer" and (is_punctuation(before) or is_punctuation(after))
        return None if punctuation or before in WHITESPACE or after in WHITESPACE else pair
    if kind == "Whitespace":
        return None if divided(parsed(r"\w+|[^\w\s]+"), pair) else pair
    if kind == "Digits":
        return None if is_number(before) != is_number(after) else pair_of_one_kind(step, pair, is_number(before))
    if kind == "Punctuation":
        different = is_punctuation(before) != is_punctuation(after)
        return separated(step, pair, different, is_punctuation(before), is_punctuation(after))
    if kind == "CharDelimiterSplit":
        return None if step["delimiter"] in pair else pair
    if kind == "Split":
        pattern = Pattern.of(step["pattern"])
        apart = divided(pattern, pair)
        return separated(step, pair, apart, pattern.touches(before), pattern.touches(after))
    raise NoCut(f"its pre-tokenizer {kind}")


def divided(pattern: Pattern, pair: tuple[str, str]) -> bool:
    """True if a pattern's matches always have an edge at a cut; raises NoCut if one may span it."""
    if not pattern.may_cut(*pair):
        raise NoCut("its pre-tokenizer's regular expression")
    return any(map(pattern.always_matches, pair))


def separated(step: Step, pair: tuple[str, str], apart: bool, first: bool, second: bool) -> tuple[str, str] | None:
    """Result of a Split: apart if matches have an edge at the cut; first, second: whether matches may have either."""
    if step["behavior"] in ("Isolated", "Removed"):
        return None if apart else pair
    if first or second:  # matches join their neighbors
        raise NoCut(f"its pre-tokenizer {step['type']} with behavior {step['behavior']}")
    return pair


def pair_of_one_kind(step: Step, pair: tuple[str, str], number: bool) -> tuple[str, str] | None:
    return None if number and step["individual_digits"] else pair


def byte_characters(c: str) -> str:
    """Characters that stand for the bytes of a character in a byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in level.pre_tokenize_str(c))


def is_number(c: str) -> bool:
    return unicodedata.category(c)[0] == "N"


def is_punctuation(c: str) -> bool:
    """True for punctuation of ASCII or Unicode, as Bert's pre-tokenizer and Punctuation have it."""
    return unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~"
