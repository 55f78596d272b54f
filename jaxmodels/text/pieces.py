"""Documents cut into pieces whose ids, one after the other, are those of the whole documents."""

import dataclasses
from collections.abc import Iterable, Iterator

from jaxmodels.text.documents import Document, Place, Source
from jaxmodels.text.tokenizer.cuts import Anywhere, Cuts

PIECE = 2**14  # characters
BEGINNING = Place()
LONGEST = 2**21  # characters of a text that is encoded at once because it has no place to cut


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a document. place: where reading goes on after it; ends: it is the document's last."""

    text: str
    place: Place
    ends: bool
    name: str


def pieces(source: Source, cuts: Anywhere | Cuts, place: Place = BEGINNING, size: int | None = None) -> Iterator[Piece]:
    """Cut a source's documents, from a place on, into pieces of about `size` characters (default PIECE).

    Raises ValueError, naming the document, if one of more than LONGEST characters has no place to cut.
    """
    size = size or PIECE
    for file in range(place.file, len(source)):
        first = file == place.file
        for document in source.documents(file, place.offset if first else 0):
            skip = place.done if first and document.offset == place.offset and not document.in_bytes else 0
            done = 0 if document.in_bytes else skip
            for text, left_out, ends in cut(skipped(document.chunks, skip), cuts, size, document.name):
                if not text and not done:
                    continue  # an empty document
                done += len((text + left_out).encode()) if document.in_bytes else len(text) + len(left_out)
                yield Piece(text, after(file, document, done, ends), ends, document.name)


def after(file: int, document: Document, done: int, ends: bool) -> Place:
    """Place after a piece."""
    if document.in_bytes:
        return Place(file + 1) if ends else Place(file, document.offset + done)
    return Place(file, document.following) if ends else Place(file, document.offset, done)


def skipped(chunks: Iterable[str], characters: int) -> Iterator[str]:
    """Chunks without their first characters."""
    for chunk in chunks:
        yield chunk[characters:]
        characters = max(0, characters - len(chunk))


def cut(chunks: Iterable[str], cuts: Anywhere | Cuts, size: int, name: str) -> Iterator[tuple[str, str, bool]]:
    """Cut one text: iterate over pieces, what is left out after each, and whether it is the last.

    Raises ValueError with the text's name if LONGEST characters have no place to cut.
    """
    rest, searched = "", 0  # the first `searched` characters of the rest have no place
    for chunk in chunks:
        text, begin = rest + chunk, 0
        while cuts.reason is None and len(text) - begin > size + 1:
            high = searched + size  # near `size` if possible, else the first place after it
            place = cuts.last(text, begin + searched, begin + high)
            if place is not None:
                yield text[begin:place], text[place : place + cuts.dropped], False
                begin, searched = place + cuts.dropped, 0
            elif begin + high < len(text) - 2:
                searched = high
            else:
                searched = max(0, len(text) - begin - 2)
                break
        rest = text[begin:]
        if len(rest) > LONGEST:
            why = f": {cuts.reason} is not known to allow it" if cuts.reason else ""
            raise ValueError(
                f"{name} has {LONGEST:,} characters in which it cannot be cut so that the tokenizer's ids stay the same"
                f"{why}; split the text into documents"
            )
    yield rest, "", True
