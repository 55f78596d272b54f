"""Texts to train on: a corpus by name, or a file."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from jaxmodels.io.atomic import atomic_file
from jaxmodels.io.bounded import read_bytes, read_text

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
LARGEST = 2**32  # bytes of a text, which is read whole; encode larger ones in parts


def load_corpus(name: str) -> str:
    """Text of a corpus: 'python_docs', 'tiny_shakespeare', or the path of a UTF-8 file.

    python_docs is the language reference contained in every Python: it needs no network, and differs slightly between
    versions. Raises ValueError if the name is neither a corpus nor a readable, non-empty UTF-8 file.
    """
    if name == "python_docs":
        return python_docs()
    if name == "tiny_shakespeare":
        return tiny_shakespeare()
    path = Path(name)
    try:
        text = read_text(path, LARGEST)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text={name!r} must be python_docs, tiny_shakespeare or a readable UTF-8 file: {error}"
        ) from None
    text = text.removeprefix("\ufeff")  # a byte order mark
    if not text:
        raise ValueError(f"text={name!r} is an empty file")
    return text


def python_docs() -> str:
    """Topics of `help()`, sorted by name and joined."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def tiny_shakespeare() -> str:
    """1,115,394 characters of Shakespeare, downloaded once to the user's cache; the sha256 is checked at every use.

    Raises ValueError if the download fails or the sha256 differs.
    """
    cache = cache_file()
    advice = f"download {TINY_SHAKESPEARE_URL} yourself and pass the file as the text"
    if not cache.exists():
        try:
            with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"tiny_shakespeare could not be downloaded ({error}); {advice}") from None
        check_sha256(content, advice)
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cache) as temporary:
            temporary.write_bytes(content)
    content = read_bytes(cache)
    check_sha256(content, f"delete {cache}, or {advice}")
    return content.decode("utf-8")


def cache_file() -> Path:
    """File of tiny_shakespeare in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels" / "tiny_shakespeare.txt"


def is_downloaded(name: str) -> bool:
    """True for a corpus that `load_corpus` would download."""
    return name == "tiny_shakespeare" and not cache_file().exists()


def check_sha256(content: bytes, advice: str) -> None:
    """Raises ValueError, ending with `advice`, if the content is not tiny_shakespeare."""
    found = hashlib.sha256(content).hexdigest()
    if found != TINY_SHAKESPEARE_SHA256:
        raise ValueError(f"tiny_shakespeare has sha256 {found}, expected {TINY_SHAKESPEARE_SHA256}; {advice}")


def split(text: str) -> tuple[str, str]:
    """Split into training and validation text: the first int(0.9·n) characters, and the rest."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]
