"""Regular expressions of pre-tokenizers, analysed: can a text be cut between two characters without changing a match?

The subset that published tokenizers use: alternatives, groups, classes, quantifiers and lookaheads. A pattern becomes
its positions (atoms that match one character) with the positions that may follow each of them (Glushkov's automaton).
"""

import contextlib
import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Iterator

Test = Callable[[str], bool]  # of one character
WHITESPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(map(chr, range(0x2000, 0x200B)))
ATOMS = 300  # of a pattern; published ones have up to 70, and each may follow each
DEPTH = 50  # of groups and classes
CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b", "0": "\0"}


class Unsupported(ValueError):
    """A pattern with a construct outside the subset; the message names it."""


class Nullable(Unsupported):
    """A pattern that may match nothing, between any two characters."""


def is_word(c: str) -> bool:
    """True for a character of words; raises Unsupported for a fraction or an exponent, on which libraries differ."""
    category = unicodedata.category(c)
    if category == "No":
        raise Unsupported("characters of words beside a fraction or an exponent")
    return category[0] in "LM" or category in ("Nd", "Pc")


SHORTHANDS: dict[str, Test] = {
    "s": lambda c: c in WHITESPACE,
    "d": lambda c: unicodedata.category(c) == "Nd",
    "w": is_word,
}


def category_test(name: str) -> Test:
    r"""Test of \p{name}, for general categories; raises Unsupported for scripts and other properties."""
    if name not in CATEGORIES:
        raise Unsupported(f"\\p{{{name}}}")
    return lambda c: unicodedata.category(c).startswith(name)


NAMES = {"L": "ultmo", "M": "nce", "N": "dlo", "P": "cdseifo", "S": "mcko", "Z": "slp", "C": "cfson"}
CATEGORIES = frozenset([*NAMES, *(name + letter for name, letters in NAMES.items() for letter in letters)])


def negated(test: Test) -> Test:
    return lambda c: not test(c)


def either(tests: list[Test]) -> Test:
    return lambda c: any(test(c) for test in tests)


def ignoring_case(test: Test) -> Test:
    """Test that takes a letter's cases for one; raises Unsupported for a letter of which libraries find others.

    Those have a case of several letters (ß, ﬁ), or one in ASCII though they are not (ı, the sign of kelvins).
    """

    def folded(c: str) -> bool:
        cases = {c.lower(), c.upper(), c.casefold()} - {c}
        if not c.isascii() and any(len(other) > 1 or other.isascii() for other in cases):
            raise Unsupported("letters of either case, of which libraries find different ones")
        return test(c) or any(test(other) for other in cases)

    return folded


@dataclasses.dataclass(frozen=True)
class Atom:
    """A position of a pattern: one character, or a lookahead, which consumes none (`ahead` is its content)."""

    test: Test
    ahead: "Part | None" = None


@dataclasses.dataclass
class Part:
    """A part of a pattern: whether it can match nothing, and the positions that can be first and last in a match.

    empty, alone: whether nothing, and which positions by themselves, are sure to match: without a lookahead's consent,
    and whatever an atomic group keeps.
    """

    nullable: bool = True
    first: set[int] = dataclasses.field(default_factory=set)
    last: set[int] = dataclasses.field(default_factory=set)
    empty: bool = True
    alone: set[int] = dataclasses.field(default_factory=set)


class Pattern:
    """A regular expression in the syntax of the tokenizers package; raises Unsupported if it is outside the subset."""

    def __init__(self, source: str):
        self.source, self.at, self.fold, self.depth = source, 0, False, 0
        self.atoms: list[Atom] = []
        self.follow: list[set[int]] = []
        self.whole = self.alternatives()
        if self.at < len(source):
            raise Unsupported(f"{source[self.at]!r} at {self.at}")
        if self.whole.nullable:
            raise Nullable("a pattern that matches nothing")

    @classmethod
    def of(cls, pattern: dict[str, str]) -> "Pattern":
        """Pattern of a tokenizer.json: {"Regex": …} or {"String": …}."""
        if "Regex" in pattern:
            return parsed(pattern["Regex"])
        if len(pattern["String"]) > ATOMS:
            raise Unsupported(f"more than {ATOMS} characters")
        return parsed("".join(f"\\x{{{ord(c):x}}}" for c in pattern["String"]))

    # What the automaton says.

    def touches(self, c: str) -> bool:
        """True if a match, or a lookahead, may contain a character."""
        return any(atom.test(c) for atom in self.atoms)

    def always_matches(self, c: str) -> bool:
        """True if the character alone is a match, whatever comes after it, so that each of its kind is in a match."""
        return any(self.atoms[i].test(c) for i in self.whole.alone)

    def may_cut(self, before: str, after: str) -> bool:
        """True if the matches in a text with `before`, `after` are those of its two parts, cut between them.

        No match has one after the other, and no lookahead that can be reached behind `before` sees `after`.
        """
        here = [i for i, atom in enumerate(self.atoms) if atom.ahead is None and atom.test(before)]
        for i in here:
            for j in self.follow[i]:
                atom = self.atoms[j]
                if atom.ahead is None:
                    if atom.test(after):
                        return False
                elif any(self.atoms[k].test(after) for k in atom.ahead.first):
                    return False
        return True

    # The parser. Positions of lookaheads are in `follow` between their neighbors, which also follow each other.

    def alternatives(self) -> Part:
        found = self.sequence()
        while self.taken("|"):
            other = self.sequence()
            first, last, alone = found.first | other.first, found.last | other.last, found.alone | other.alone
            found = Part(found.nullable or other.nullable, first, last, found.empty or other.empty, alone)
        return found

    def sequence(self) -> Part:
        found = Part()
        while self.at < len(self.source) and self.source[self.at] not in "|)":
            found = self.joined(found, self.quantified())
        return found

    def joined(self, a: Part, b: Part) -> Part:
        for i in a.last:
            self.follow[i] |= b.first
        first = a.first | b.first if a.nullable else a.first
        last = a.last | b.last if b.nullable else b.last
        alone = (a.alone if b.empty else set()) | (b.alone if a.empty else set())
        return Part(a.nullable and b.nullable, first, last, a.empty and b.empty, alone)

    def quantified(self) -> Part:
        begin = self.at
        found = self.single()
        end = self.at
        low, repeats = self.quantifier()
        if low is None:
            return found
        if repeats:
            for i in found.last:
                self.follow[i] |= found.first
        self.taken("?")  # lazy: the same matches are possible
        possessive = self.taken("+")
        if self.at < len(self.source) and self.source[self.at] in "*+?{":
            raise Unsupported(f"a quantifier of {self.source[begin:end]!r} and its quantifier")
        empty = (found.empty or low == 0) and not possessive
        return Part(found.nullable or low == 0, found.first, found.last, empty, found.alone if low < 2 else set())

    def quantifier(self) -> tuple[int | None, bool]:
        """Least number of repetitions, and whether there may be more than one; None if there is no quantifier."""
        for sign, low, repeats in (("*", 0, True), ("+", 1, True), ("?", 0, False)):
            if self.taken(sign):
                return low, repeats
        if not self.taken("{"):
            return None, False
        end = self.source.find("}", self.at)
        bounds = self.source[self.at : end].split(",") if end > 0 else []
        if not 1 <= len(bounds) <= 2 or not all(bound.isdecimal() or not bound for bound in bounds) or bounds == [""]:
            raise Unsupported("a { that is no quantifier")
        self.at = end + 1
        return int(bounds[0] or 0), True

    def single(self) -> Part:
        c = self.source[self.at]
        if c == "(":
            with self.nested():
                return self.group()
        if c == "[":
            return self.atom(self.character_class())
        if c == ".":
            self.at += 1
            return self.atom(lambda c: c != "\n")
        if c == "\\":
            return self.atom(self.escape())
        if c in "^$*+?{":
            raise Unsupported(repr(c))
        self.at += 1
        return self.atom(lambda other: other == c)

    @contextlib.contextmanager
    def nested(self) -> Iterator[None]:
        """Context of a group or class; raises Unsupported if it is in too many others."""
        if self.depth == DEPTH:
            raise Unsupported(f"more than {DEPTH} nested groups or classes")
        self.depth += 1
        yield
        self.depth -= 1

    def atom(self, test: Test, ahead: Part | None = None) -> Part:
        i = len(self.atoms)
        if i == ATOMS:
            raise Unsupported(f"more than {ATOMS} characters and classes")
        self.atoms.append(Atom(ignoring_case(test) if self.fold and ahead is None else test, ahead))
        self.follow.append(set())
        return Part(ahead is not None, {i}, {i}, False, {i} if ahead is None else set())

    def group(self) -> Part:
        self.at += 1
        fold, ahead, atomic = self.fold, False, False
        if self.taken("?"):
            if self.taken("i:"):
                self.fold = True
            elif self.taken("=") or self.taken("!"):
                ahead = True
            elif self.taken(">"):
                atomic = True
            elif not self.taken(":"):
                raise Unsupported(f"(?{self.source[self.at : self.at + 2]}")
        found = self.alternatives()
        if not self.taken(")"):
            raise Unsupported("a group without its end")
        self.fold = fold
        if ahead:
            return self.atom(lambda c: False, found)
        return dataclasses.replace(found, empty=False) if atomic else found

    def character_class(self) -> Test:
        """Parse a class with nested ones; the intersections && and [:names:] are not supported."""
        self.at += 1
        negate, tests, opened = self.taken("^"), [], self.at
        while not (self.source[self.at : self.at + 1] == "]" and self.at > opened):
            if self.at >= len(self.source):
                raise Unsupported("a class without its end")
            if self.source.startswith(("&&", "[:"), self.at):
                raise Unsupported(repr(self.source[self.at : self.at + 2]))
            if self.source[self.at] == "[":
                with self.nested():
                    tests.append(self.character_class())
                continue
            low = self.class_member()
            if not isinstance(low, str):
                tests.append(low)
            elif self.source[self.at : self.at + 1] == "-" and self.source[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.class_member()
                if not isinstance(high, str):
                    raise Unsupported("a range to a class")
                tests.append(within(low, high))
            else:
                tests.append(within(low, low))
        self.at += 1
        test = either(tests)
        if self.fold:
            test = ignoring_case(test)
        return negated(test) if negate else test

    def class_member(self) -> str | Test:
        c = self.source[self.at]
        if c == "\\":
            return self.escaped()
        self.at += 1
        return c

    def escape(self) -> Test:
        found = self.escaped()
        return found if not isinstance(found, str) else within(found, found)

    def escaped(self) -> str | Test:
        """Character or class of an escape."""
        c = self.source[self.at + 1 : self.at + 2]
        self.at += 2
        if c.lower() in SHORTHANDS and c:
            return SHORTHANDS[c] if c in SHORTHANDS else negated(SHORTHANDS[c.lower()])
        if c in ("p", "P"):
            if self.taken("{"):
                name = self.up_to_brace()
            else:
                name, self.at = self.source[self.at : self.at + 1], self.at + 1
            negate = (c == "P") != name.startswith("^")
            test = category_test(name.removeprefix("^"))
            return negated(test) if negate else test
        if c in CONTROLS:
            return CONTROLS[c]
        if c in ("x", "u"):
            return self.code_point(2 if c == "x" else 4)
        if not c or c.isalnum():
            raise Unsupported(f"\\{c}")
        return c

    def code_point(self, digits: int) -> str:
        if self.taken("{"):
            text = self.up_to_brace()
        else:
            text, self.at = self.source[self.at : self.at + digits], self.at + digits
        try:
            return chr(int(text, 16))
        except (ValueError, OverflowError):
            raise Unsupported(f"the character code {text!r}") from None

    def up_to_brace(self) -> str:
        """Skip what comes before the next closing brace, and the brace."""
        end = self.source.find("}", self.at)
        if end < 0:
            raise Unsupported("a { without its end")
        text, self.at = self.source[self.at : end], end + 1
        return text

    def taken(self, text: str) -> bool:
        """Skip a text if it comes next."""
        if not self.source.startswith(text, self.at):
            return False
        self.at += len(text)
        return True


def within(low: str, high: str) -> Test:
    return lambda c: low <= c <= high


@functools.lru_cache(maxsize=256)  # each is asked about thousands of pairs of characters
def parsed(source: str) -> Pattern:
    """Pattern of a regular expression; raises Unsupported as `Pattern`."""
    return Pattern(source)
