"""Output of long runs: a stream that no closed pipe, hung-up terminal or encoding can stop, and warnings."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from jaxmodels.process.texts import shortened, visible


class Output:
    """Text stream that never raises: writes to another one until that one fails, and discards the rest.

    Characters that the other one's encoding lacks are written as escapes. closed(): called if its reader has closed it.
    """

    def __init__(self, stream: TextIO, closed: Callable[[], None] = lambda: None):
        self.stream, self.closed_by_reader = stream, closed
        self.quiet = False

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text, or as much as the stream takes."""
        if not self.quiet:
            try:
                self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except OSError as error:
                self.give_up(error)
        return len(text)

    def flush(self) -> None:
        if not self.quiet:
            try:
                self.stream.flush()
            except OSError as error:
                self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Discard what is written from here on."""
        self.quiet = True
        discard(self.stream)
        if isinstance(error, BrokenPipeError):
            self.closed_by_reader()
        else:
            warn(f"nothing more is printed: standard output cannot be written: {error.strerror}")

    def isatty(self) -> bool:
        return not self.quiet and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


def open_missing() -> None:
    """Discard what is printed to standard output or error if it was closed (`>&-`), where Python has None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, until the process ends


def discard(stream: TextIO) -> None:
    """Connect a stream to the null device: the interpreter flushes it once more as it exits, and would fail again."""
    with contextlib.suppress(OSError, ValueError):  # of tests, which have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def is_unwritable(stream: TextIO, error: OSError) -> bool:
    """True if what a stream holds cannot be written, as on a full disk; it is discarded then.

    One without a buffer (PYTHONUNBUFFERED) holds nothing: True if `error`, which names no file, is of a device.
    """
    if getattr(stream, "write_through", False) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return True
    try:
        stream.flush()
    except OSError:
        discard(stream)
        return True
    return False


def warn(sentence: str) -> None:
    """Print a warning to standard error, if it can be written."""
    say(f"warning: {sentence}")


def say(sentence: str) -> None:
    """Print a line to standard error, if it can be written: line breaks are escaped, a long name is shortened."""
    try:
        print(shortened(sentence), file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def escape_unencodable() -> None:
    """Print characters that standard output's encoding lacks as escapes, instead of raising UnicodeEncodeError."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def records_escaped() -> Iterator[None]:
    """Context in which control characters in the messages of `logging` are escaped: a library may log any text."""
    made = logging.getLogRecordFactory()

    def escaped(*arguments: Any, **settings: Any) -> logging.LogRecord:
        record = made(*arguments, **settings)
        with contextlib.suppress(Exception):  # arguments that do not fit: logging reports them later, and goes on
            record.msg, record.args = visible(record.getMessage(), keep="\n\t"), ()
        return record

    logging.setLogRecordFactory(escaped)
    try:
        yield
    finally:
        logging.setLogRecordFactory(made)


@contextlib.contextmanager
def line_ended() -> Iterator[None]:
    """Context that ends the printed line before an exception leaves it: its message stands on a line of its own."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the reader of a pipe may have closed it
            print(flush=True)
        raise
