"""Texts of continuations: tokens become text as soon as no later token can change it, up to a stop text."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxmodels.text import Vocabulary

REPLACEMENT = "\ufffd"  # stands for an incomplete character at the end of a text
MOST, KEPT = 512, 256  # tokens that are decoded with each further one; more are cut to the last ones


class TextStream:
    """Incremental decoder of one continuation; its pieces, with `rest`, join to the text of `continuation`.

    prompt: ids before the first token: some tokenizers decode a token by what comes before it.
    stops: texts that end the continuation, and are left out. They may contain special tokens.
    end_tokens: ids that end it, and are left out.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Any = (),
        stops: Sequence[str] = (),
        end_tokens: Sequence[int] = (),
    ):
        self.vocabulary, self.stops, self.end_tokens = vocabulary, tuple(stops), frozenset(end_tokens)
        # Tokens that are decoded together with the next one: the last piece, and what follows it.
        self.ids = [int(token) for token in prompt if int(token) not in vocabulary.special]
        self.read = len(self.ids)
        self.known = self.decoded()  # text of `ids` that was returned, or is the prompt's
        self.held: list[tuple[str, bool]] = []  # characters that may begin a stop text, and whether they are shown
        self.ended = False

    def decoded(self) -> str:
        return self.vocabulary.decode(self.ids, skip_special=True) if self.ids else ""

    def add(self, token: int) -> str:
        """Add a token and return the text that is final now.

        Sets `ended` at a stop text or an end token.
        """
        token = int(token)
        if token in self.end_tokens:
            self.ended = True
            return self.rest()
        special = self.vocabulary.special.get(token)
        if special is not None:
            return self.release(special, shown=False)
        self.ids.append(token)
        return self.release(self.fresh())

    def fresh(self, *, final: bool = False) -> str:
        """Text of the last tokens that was not returned yet; only that which cannot change, unless `final`."""
        if not final and self.vocabulary.is_byte(self.ids[-1]):
            return ""
        text = self.decoded()
        stable = text if final else text.removesuffix(REPLACEMENT)
        if not stable.startswith(self.known):
            if not final and text.startswith(self.known):
                return ""  # an incomplete character that was returned as such: the prompt's last
            self.known = common_prefix(stable, self.known)
        piece = stable[len(self.known) :]
        self.known = stable
        if stable == text and self.vocabulary.decode(self.ids[self.read :], skip_special=True).strip():
            # Tokens before the last piece have no effect on later ones. A blank piece is not enough to begin with:
            # some tokenizers drop a space at the beginning.
            self.ids = self.ids[self.read :]
            self.read = len(self.ids)
            self.known = self.decoded()
        elif len(self.ids) > MOST:  # as of thousands of line breaks, or of bytes that are no characters
            self.ids, incomplete = self.ids[-KEPT:], len(text) - len(stable)
            self.read = len(self.ids)
            decoded = self.decoded()
            self.known = decoded[: len(decoded) - incomplete]
        return piece

    def release(self, piece: str, *, shown: bool = True) -> str:
        """Add a piece to what is held, and return what cannot begin a stop text, up to the first stop text."""
        self.held += [(character, shown) for character in piece]
        text = "".join(character for character, _ in self.held)
        found = [text.index(stop) for stop in self.stops if stop in text]
        if found:
            self.ended = True
            kept, self.held = self.held[: min(found)], []
        else:
            # Hold the longest suffix that begins a stop text.
            suffixes = range(min(len(text), max(map(len, self.stops), default=0)), 0, -1)
            n = next((n for n in suffixes if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
            kept, self.held = self.held[: len(text) - n], self.held[len(text) - n :]
        return "".join(character for character, is_shown in kept if is_shown)

    def rest(self) -> str:
        """Return the text that was held back; an incomplete character is a replacement character."""
        text = self.release(self.fresh(final=True)) if self.ids else ""
        kept, self.held = self.held, []
        return text + "".join(character for character, shown in kept if shown)


def common_prefix(a: str, b: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def continuation(stream: TextStream, tokens: Sequence[int]) -> str:
    """Text of tokens, all at once."""
    return "".join(pieces(stream, tokens))


def pieces(stream: TextStream, tokens: Any) -> Iterator[str]:
    """Iterate over the non-empty pieces of text of tokens, up to the end of the stream."""
    for token in tokens:
        piece = stream.add(token)
        if piece:
            yield piece
        if stream.ended:
            return
    piece = stream.rest()
    if piece:
        yield piece


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Convert stop texts to a tuple; raises ValueError if one is not a text, or empty."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop={text!r} must be a text of at least one character")
    return stops
