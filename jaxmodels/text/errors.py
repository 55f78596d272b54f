"""Errors of the tokenizers package as ValueErrors."""

import contextlib
from collections.abc import Iterator

from jaxmodels.process.texts import shortened


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Context in which any error of the package tokenizers becomes a ValueError, with its first line."""
    try:
        yield
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{what}: {first_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust; it is no Exception, and has no module to import
            raise
        raise ValueError(f"{what}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Beginning of an error's message."""
    return shortened(str(error).strip().partition("\n")[0], 300)
