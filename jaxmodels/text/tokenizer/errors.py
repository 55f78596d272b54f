"""Errors of the tokenizers package as ValueErrors."""

import contextlib
import os
import threading
from collections.abc import Iterator

from jaxmodels.process.texts import shortened


class Quiet:
    """Context in which a panic of the tokenizers package prints nothing: Rust reports it on standard error by itself.

    What is written to standard error meanwhile, also by other threads, is printed afterwards if there was no panic.
    """

    def __init__(self) -> None:
        self.lock, self.depth, self.panicked = threading.Lock(), 0, False
        self.kept = self.captured = -1

    def __enter__(self) -> None:
        with self.lock:
            self.depth += 1
            if self.depth > 1 or not hasattr(os, "memfd_create"):
                return
            try:
                self.kept = os.dup(2)
            except OSError:  # there is no standard error
                self.kept = -1
                return
            self.captured = os.memfd_create("stderr")
            os.dup2(self.captured, 2)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self.lock:
            self.depth -= 1
            self.panicked = self.panicked or is_panic(error)
            if self.depth or self.kept < 0:
                return
            os.dup2(self.kept, 2)
            if not self.panicked:
                written = os.pread(self.captured, 2**20, 0)
                with contextlib.suppress(OSError):
                    while written:
                        written = written[os.write(2, written) :]
            os.close(self.kept)
            os.close(self.captured)
            self.kept, self.panicked = -1, False


quiet = Quiet()


def is_panic(error: BaseException | None) -> bool:
    """True for a panic of Rust, which is no Exception, and has no module to import."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def refusing(what: str, *, silent: bool = False) -> Iterator[None]:
    """Context in which any error of the package tokenizers becomes a ValueError, with its first line.

    silent: for what may panic; see `Quiet`.
    """
    try:
        with quiet if silent else contextlib.nullcontext():
            yield
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{what}: {first_line(error)}") from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"{what}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Beginning of an error's message."""
    return shortened(str(error).strip().partition("\n")[0], 300)
