"""Chat templates of others, rendered within limits.

transformers renders them in Jinja's sandbox, where they reach no code and no files. But a template may have loops that
take days, or write gigabytes: rendering is ended after some seconds, or with some hundred megabytes.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from jaxmodels.process.texts import quoted

SECONDS = 5.0  # published templates take milliseconds
BYTES = 500_000_000


class TooMuch(Exception):
    """A template that takes too long."""


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Context in which Jinja's errors, more than SECONDS and more than BYTES are a ValueError that begins with `what`.

    Time is looked at between the lines of a template; memory by the operating system, which refuses it meanwhile to
    all threads of this process.
    """
    end, before, tracer = time.monotonic() + SECONDS, resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            sys.settrace(tracer)
            raise TooMuch(f"it takes more than {SECONDS:.0f} s")
        return trace

    size = address_space()
    most = None if size is None else size + BYTES
    if most is not None and (before[0] == resource.RLIM_INFINITY or most < before[0]):
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    sys.settrace(trace)
    try:
        yield
    except MemoryError:
        raise ValueError(f"{what}: it takes more than {BYTES / 1e6:,.0f} MB") from None
    except Exception as error:  # of Jinja, and whatever Python's operators raise in an expression
        raise ValueError(f"{what}: {quoted(str(error) or type(error).__name__, 200)}") from None
    finally:
        sys.settrace(tracer)
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(text: str, what: str) -> None:
    """Raise ValueError for a template with powers: of two numbers, one can take days within one line."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        powers = any(kind == "operator" and word == "**" for _, kind, word in Environment().lex(text))
    except TemplateSyntaxError as error:
        raise ValueError(f"{what}: {quoted(str(error), 200)}") from None
    if powers:
        raise ValueError(f"{what}: it has a power, **")


def address_space() -> int | None:
    """Bytes of this process's address space; None where the operating system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None
